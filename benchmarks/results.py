"""The quick benchmarks as data, a file for each release: ``python -m benchmarks.results record``, ``... compare``.

All figures are ratios or counts, so that machines can be compared. What chance decides is seeded: those figures are the
same on any machine. Ratios of times are the median of several runs, with the range: where two ranges come near each
other, a difference is noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import choice, plan
from placement import __version__, topologies
from placement.cli.simulate import cluster_of
from placement.core.policy import Policy
from placement.core.simulation import simulate
from placement.wire.workload import load_workload, with_policy

FOLDER = Path(__file__).with_name("results")
MIX = Path(__file__).parents[1] / "examples" / "workloads" / "mix.toml"
MACHINES = ("dgx-1p", "dgx-1v", "a100-pcie-8x")
RUNS = 5
NEAR = 1.2
"""Times on a busy machine differ by so much from one minute to the next."""


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: what it is.
        value: a ratio or a count; of several runs the median.
        least, most: of these runs.
        more_is_better: or less is.
    """

    name: str
    value: float
    least: float
    most: float
    more_is_better: bool


def exact(name: str, value: float, more_is_better: bool = True) -> Figure:
    """A figure that is the same on any machine."""
    value = round(value, 6)
    return Figure(name, value, value, value, more_is_better)


def of_runs(name: str, once: Callable[[], float], more_is_better: bool) -> Figure:
    """A ratio of times."""
    runs = [round(once(), 3) for _ in range(RUNS)]
    return Figure(name, statistics.median(runs), min(runs), max(runs), more_is_better)


def measured() -> Iterator[Figure]:
    """All figures of this version, on this machine."""
    for machine in MACHINES:
        reached = choice.sequences(topologies.load(machine), seeds=20, steps=60, waiting=False)
        for chooser, one in reached.items():
            mean = statistics.fmean(one.bandwidth)
            yield exact(f"choice: bandwidth that {chooser} reaches on {machine}, of the best", mean)
    for nodes in (100, 1000):
        placed = plan.many_deployments(plan.cluster(nodes))
        yield exact(f"plan: replicas placed in deployments of 4, {nodes} nodes", placed)
    for case in ("one deployment", "deployments of 4"):
        grows = partial(longer, case, 5000, than=(case, 100))
        yield of_runs(f"plan: {case}, time of a replica on 5,000 nodes beside 100", grows, False)
    peer = partial(longer, "every node anew", 1000, than=("one deployment", 1000))
    yield of_runs("plan: asking every node anew beside one deployment, 1,000 nodes", peer, True)
    snapshot = cluster_of("dgx-h100=4,l40s-4x=8")
    arriving = load_workload(MIX, 0, None)(snapshot)
    for policy in (Policy.TOPOLOGY, Policy.FRAGMENTATION):
        report: dict[str, Any] = simulate(snapshot, with_policy(arriving, policy)).to_dict()
        fragmented = statistics.fmean(moment["fragmented_gpus"] for moment in report["moments"])
        yield exact(f"simulate: placed, {policy}", report["placed"])
        yield exact(f"simulate: fragmented GPUs, mean, {policy}", fragmented, more_is_better=False)
        yield exact(f"simulate: bandwidth of the best, mean, {policy}", report["bandwidth_of_best_mean"])


def longer(case: str, nodes: int, than: tuple[str, int]) -> float:
    """How much longer a replica takes in one case of ``benchmarks.plan`` than in another."""
    took = plan.microseconds(plan.CASES[case], nodes, repeat=1)
    other, fewer = than
    return took / plan.microseconds(plan.CASES[other], fewer, repeat=1)


def recorded(figures: Sequence[Figure]) -> dict[str, Any]:
    """As the file has it."""
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "ray": version("ray")}
    return {"version": __version__, "machine": machine, "figures": [asdict(one) for one in figures]}


def load(which: str) -> dict[str, Any]:
    """The file of a version, or at a path."""
    path = Path(which) if which.endswith(".json") else FOLDER / f"{which}.json"
    if not path.exists():
        there = ", ".join(sorted(one.stem for one in FOLDER.glob("*.json")))
        raise SystemExit(f"{which}: nothing is recorded of it; there are {there}")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def verdict(old: Figure, new: Figure) -> str:
    """``same``, ``noise``, ``better``, ``worse``."""
    if old.value == new.value:
        return "same"
    times = old.least < old.most or new.least < new.most
    if times and old.least <= NEAR * new.most and new.least <= NEAR * old.most:
        return "noise"
    return "better" if (new.value > old.value) == new.more_is_better else "worse"


def compared(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """A line for each figure."""
    before, after = ({one["name"]: Figure(**one) for one in file["figures"]} for file in (old, new))
    for file in (old, new):
        yield f"{file['version']}: " + ", ".join(f"{key} {value}" for key, value in file["machine"].items())
    width = max(map(len, {**before, **after}))
    yield f"\n{'':{width}}{'old':>12}{'new':>12}{'new/old':>10}"
    for name in {**before, **after}:
        was, now = before.get(name), after.get(name)
        if was is None or now is None:
            yield f"{name:{width}}  only in the {'new' if was is None else 'old'}"
            continue
        ratio = f"{now.value / was.value:.3f}" if was.value else "-"
        yield f"{name:{width}}{was.value:>12g}{now.value:>12g}{ratio:>10}  {verdict(was, now)}"


def main(arguments: list[str] | None = None) -> None:
    """Records, or compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="measure, and write results/VERSION.json")
    record.add_argument("--to", type=Path, default=FOLDER / f"{__version__}.json", help="write here instead")
    compare = commands.add_parser("compare", help="print what changed between two versions")
    compare.add_argument("old", help="a version, or a file")
    compare.add_argument("new", nargs="?", help="a version, or a file; without it, this tree is measured")
    options = parser.parse_args(arguments)
    if options.command == "record":
        options.to.write_text(json.dumps(recorded([*measured()]), indent=1) + "\n", "utf-8")
        print(f"wrote {options.to}")
    else:
        new = load(options.new) if options.new else recorded([*measured()])
        print(*compared(load(options.old), new), sep="\n")


if __name__ == "__main__":
    main()
