"""What a choice of GPUs costs, and what it is worth in the long run: ``python -m benchmarks.choice``.

Two peers are given the same questions: the lowest ordinals, which is what Ray takes of itself, and the
choice by partitions (:mod:`benchmarks.partition`), which is what NVIDIA's device plugin does. On one core,
without Ray, all of it Python.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path as File

from benchmarks import partition
from placement import topologies
from placement.core.score import best_set, ray_set, score
from placement.core.shape import shape_of
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology

Gpus = tuple[int, ...]
Chooser = Callable[[frozenset[int], int], Gpus | None]
Event = tuple[int, int]
"""A job and how many GPUs it wants; 0 when it leaves."""

SIZES = (1, 2, 4)


def where() -> str:
    """The command and the machine, for a table's head."""
    info = File("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU unknown"
    )
    return (
        f"python -m benchmarks.choice   {os.cpu_count()} cores ({model}), Python {platform.python_version()}"
    )


# -- what a choice costs -----------------------------------------------------------------------------


def two_dgx1() -> Topology:
    """The worst case for tables: 16 GPUs, no two of them alike. Two DGX-1V that would share a host."""
    one = topologies.load("dgx-1v")
    far = Link(Path.SYS)

    def link(a: int, b: int) -> Link:
        if a == b:
            return UNKNOWN_LINK
        return one.link(a % 8, b % 8) if a // 8 == b // 8 else far

    return Topology(tuple(tuple(link(a, b) for b in range(16)) for a in range(16)), model=one.model)


def questions(count: int, size: int, most: int) -> list[frozenset[int]]:
    """Different sets of free GPUs, 70 % free, in which ``size`` can be had."""
    dice = random.Random(f"{count} {size}")
    found: dict[frozenset[int], None] = {}
    for _ in range(20 * most):
        free = frozenset(gpu for gpu in range(count) if dice.random() < 0.7)
        if len(free) >= size and len(found) < most:
            found[free] = None
    return list(found) or [frozenset(range(count))]


def microseconds(choose: Chooser, asked: list[frozenset[int]], size: int) -> float:
    """Per choice."""
    start = time.perf_counter()
    for free in asked:
        choose(free, size)
    return (time.perf_counter() - start) / len(asked) * 1e6


def costs(most: int) -> Iterator[str]:
    """The first table."""
    yield (
        f"{'machine':>14}{'GPUs':>6}{'table':>11}{'size':>6}{'asked':>7}{'first time':>13}{'again':>11}"
        f"{'partitions':>14}{'longer by':>13}{'divisions':>11}"
    )
    machines = {name: topologies.load(name) for name in ("a100-pcie-4x", "dgx-1v", "dgx-2")}
    machines["two dgx-1v"] = two_dgx1()
    for name, machine in machines.items():
        count = len(machine)
        start = time.perf_counter()
        shape_of(machine)
        built = (time.perf_counter() - start) * 1000
        for size in (2, 4, 8):
            if size > count:
                continue
            asked = questions(count, size, most)
            first, again = (
                microseconds(lambda free, size: best_set(machine, free, size), asked, size)  # noqa: B023
                for _ in range(2)
            )
            divisions = partition.count_partitions(count, size)
            peer = ratio = "-"
            if divisions <= partition.MOST_PARTITIONS:
                took = microseconds(
                    lambda free, size: partition.best_set(machine, free, size),  # noqa: B023
                    asked,
                    size,
                )
                peer, ratio = f"{took:.0f} us", f"{took / first:.1f}x"
            yield (
                f"{name:>14}{count:>6}{built:>8.1f} ms{size:>6}{len(asked):>7}{first:>10.1f} us{again:>8.1f} us"
                f"{peer:>14}{ratio:>13}{divisions:>11}"
            )


# -- what it is worth --------------------------------------------------------------------------------


def arrivals(count: int, seed: str, steps: int, waiting: bool) -> list[Event]:
    """Jobs that come and leave by chance. Who chooses does not matter: all hold as many GPUs at any time.

    Args:
        count: the machine's GPUs.
        seed: of the chance.
        steps: how many jobs come.
        waiting: when a job does not fit, others leave one by one until it does, so that the machine is
            always full. Otherwise it is sent away, and some of the others leave.
    """
    dice = random.Random(f"{count} {seed}")
    sizes = [size for size in SIZES if size <= count]
    free, events = count, []
    held: dict[int, int] = {}

    def leave(job: int) -> None:
        nonlocal free
        free += held.pop(job)
        events.append((job, 0))

    for job in range(steps):
        size = dice.choice(sizes)
        if size > free and not waiting:
            for other in dice.sample(sorted(held), dice.randint(1, len(held))):
                leave(other)
            continue
        while size > free:
            leave(dice.choice(sorted(held)))
        held[job] = size
        free -= size
        events.append((job, size))
    return events


@dataclass
class Reached:
    """What a chooser reached, as parts of what the empty machine has for a request of that size."""

    bandwidth: list[float] = field(default_factory=list)
    pair_score: list[float] = field(default_factory=list)
    refused: int = 0


class Yardsticks:
    """What sets of a machine are worth, as parts of the best one of their size."""

    def __init__(self, machine: Topology) -> None:
        self._machine = machine
        self.bandwidth = self._as_part_of_best(lambda gpus: score(machine, gpus).bandwidth_gb_per_s)
        self.pair_score = self._as_part_of_best(lambda gpus: partition.set_score(machine, gpus))

    def _as_part_of_best(self, worth: Callable[[Gpus], float]) -> Callable[[Gpus], float]:
        known = cache(worth)
        best = cache(lambda size: max(map(known, combinations(range(len(self._machine)), size))))
        return lambda gpus: known(gpus) / best(len(gpus)) if best(len(gpus)) else 1.0


def follow(count: int, choose: Chooser, events: list[Event], worth: Yardsticks, reached: Reached) -> None:
    """Lets one chooser place all of the jobs, on the machine as it left it before."""
    free = frozenset(range(count))
    held: dict[int, Gpus] = {}
    for job, size in events:
        if not size:
            free |= frozenset(held.pop(job, ()))
            continue
        gpus = choose(free, size)
        if gpus is None:
            reached.refused += 1
            continue
        held[job] = gpus
        free -= frozenset(gpus)
        if size > 1:
            reached.bandwidth.append(worth.bandwidth(gpus))
            reached.pair_score.append(worth.pair_score(gpus))


def sequences(machine: Topology, seeds: int, steps: int, waiting: bool) -> dict[str, Reached]:
    """What each chooser reaches on one machine."""
    count = len(machine)
    choosers: dict[str, Chooser] = {
        "ours": lambda free, size: best_set(machine, free, size),
        "partitions": cache(lambda free, size: partition.best_set(machine, free, size)),
        "Ray": ray_set,
    }
    if count > 8:
        del choosers["partitions"]
    worth = Yardsticks(machine)
    reached = {name: Reached() for name in choosers}
    for seed in range(seeds):
        events = arrivals(count, str(seed), steps, waiting)
        for name, choose in choosers.items():
            follow(count, choose, events, worth, reached[name])
    return reached


def worths(seeds: int, steps: int, waiting: bool, names: tuple[str, ...]) -> Iterator[str]:
    """The second table. Machines on which every set is as good as any other come in one line."""
    columns = ("ours", "partitions", "Ray")
    yield f"{'':>18}{'bandwidth reached / best':^35}{'pair scores reached / best':^35}{'refused':^15}"
    yield f"{'machine':>18}" + "".join(f"{name:>11}" for name in columns) * 2 + "   all three"
    alike = []
    for name in names:
        reached = sequences(topologies.load(name), seeds, steps, waiting)
        parts = [
            [
                statistics.fmean(getattr(reached[column], measure)) if column in reached else None
                for column in columns
            ]
            for measure in ("bandwidth", "pair_score")
        ]
        refused = sum(one.refused for one in reached.values())
        if not refused and all(part in (None, 1.0) for row in parts for part in row):
            alike.append(name)
            continue
        cells = "".join(
            f"{'-' if part is None else format(part, '.4f'):>11}" for row in parts for part in row
        )
        yield f"{name:>18}{cells}{refused:>12}"
    if alike:
        yield f"1.0000 for all, none refused: {', '.join(alike)}"


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--asked", type=int, default=100, help="choices timed per machine and size")
    parser.add_argument("--seeds", type=int, default=40, help="sequences per machine")
    parser.add_argument("--steps", type=int, default=60, help="requests per sequence")
    whole = [
        name for name in topologies.names() if not any(g.mig_profile for g in topologies.facts(name).gpus)
    ]
    parser.add_argument(
        "--machines", nargs="+", default=whole, help="of the catalogue; by default those of GPUs"
    )
    options = parser.parse_args(arguments)
    print(where())
    print(
        "\nOne choice on different sets of free GPUs: none known when asked first, all of them when asked again"
    )
    for line in costs(options.asked):
        print(line, flush=True)
    for waiting, title in {
        False: "a job that does not fit is sent away, and some of the others leave",
        True: "a job that does not fit waits until enough of the others left: always full",
    }.items():
        print(f"\n{options.seeds} x {options.steps} requests for 1, 2 or 4 GPUs; {title}")
        for line in worths(options.seeds, options.steps, waiting, tuple(options.machines)):
            print(line, flush=True)
    print(
        "means over the requests for 2 and 4, of the best set of an empty machine; bandwidth as our model predicts"
        "\nit, pair scores as the choice by partitions counts them; refused: though enough GPUs were free"
    )


if __name__ == "__main__":
    main()
