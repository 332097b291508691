"""Many clients at once, an idle service, and many deployments standing: ``python -m benchmarks.clients``.

Clients place, apply and release one deployment each, over and over, for 1 or 2 GPUs anywhere in the cluster; then the
same clients do the same with plain placement groups, on the same cluster: create, wait, remove; and the same with
a task in each bundle, as whoever uses the GPUs or wants to know them has to. Ours chooses, steers and verifies.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import placement
from benchmarks.place import gpu_id
from placement.runtime.embedded import SimulatedNode, embedded_cluster


def storm(once: Callable[[int, int], None], clients: int, seconds: float) -> tuple[list[float], Counter[str]]:
    """Milliseconds of each call that succeeded, and the errors by type."""
    took: list[float] = []
    errors: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        turn = 0
        while time.monotonic() < end:
            turn += 1
            begin = time.perf_counter()
            try:
                once(number, turn)
                took.append((time.perf_counter() - begin) * 1000)
            except Exception as error:
                errors[type(getattr(error, "cause", error)).__name__] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took, errors


def ours(service: Any) -> Callable[[int, int], None]:
    """Places and releases."""

    def once(number: int, turn: int) -> None:
        name = f"c{number}"
        if turn % 3 == 2:
            ray.get(service.apply.remote({"name": name, "model": "m", "gpus": 1, "replicas": 2}))
        else:
            ray.get(service.place.remote({"name": name, "model": "m", "gpus": 1 + turn % 3}))
        ray.get(service.release.remote(name))

    return once


def plain(number: int, turn: int, used: bool = False) -> None:
    """Creates a group, waits, and removes it."""
    count = min(1 + turn % 3, 2)
    group = placement_group([{"GPU": 1}] * count)
    try:
        if not group.wait(60):
            raise TimeoutError
        if used:
            inside = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(count)]
            ray.get([gpu_id.options(scheduling_strategy=one).remote() for one in inside])
    finally:
        remove_placement_group(group)


def tell(name: str, took: list[float], errors: Counter[str], seconds: float, beside: float = 0.0) -> float:
    """One line of the table.

    Args:
        name: what was done.
        took: milliseconds of each call that succeeded.
        errors: the others, by type.
        seconds: for how long it was done.
        beside: how many others did a second, if this is to be set beside them.

    Returns:
        How many there were a second.
    """
    ordered = sorted(took) or [float("nan")]
    p50, p99 = statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]
    said = ", ".join(f"{count} {kind}" for kind, count in errors.most_common()) or "none"
    rate = len(took) / seconds
    ratio = f"{100 * rate / beside:>7.0f} %" if beside else f"{'':>9}"
    print(f"{name:28}{rate:>10.1f}/s{ratio}{p50:>10.0f} ms{p99:>10.0f} ms   refusals: {said}", flush=True)
    return rate


class Nothing:
    """An actor that does nothing."""

    def pid(self) -> int:
        """Its process."""
        return os.getpid()


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120, help="for each way")
    parser.add_argument("--warm-up", type=float, default=20, help="seconds before that, not counted")
    parser.add_argument("--idle", type=float, default=30, help="seconds for which an idle service is watched")
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--standing", type=int, default=500, help="deployments standing at a time")
    options = parser.parse_args(arguments)
    nodes = [SimulatedNode(f"gpu-{i:02}", topology="l40s-4x") for i in range(options.nodes)]
    nodes.append(SimulatedNode("out", resources={"egress": 100_000}))
    with embedded_cluster(nodes, progress=lambda name: print(f"starting {name}", flush=True)):
        service = placement.start()
        pid = ray.get(service.__ray_call__.remote(lambda self: os.getpid()))
        print(
            f"\n{options.clients} clients, {options.nodes} nodes with 4 GPUs, {os.cpu_count()} cores, "
            f"ray {ray.__version__}"
        )
        print(f"{'':28}{'throughput':>12}{'ratio':>9}{'p50':>13}{'p99':>13}")
        total = ray.cluster_resources()["GPU"]
        storm(ours(service), options.clients, options.warm_up)
        rate = 0.0
        for name, once in (
            ("groups, a task in each", partial(plain, used=True)),
            ("place, apply, release", ours(service)),
            ("groups, never used", plain),
        ):
            found = tell(name, *storm(once, options.clients, options.seconds), options.seconds, rate)
            rate = rate or found
            time.sleep(3)
            print(
                f"{'':28}GPUs free afterwards: {ray.available_resources()['GPU']:g} of {total:g}", flush=True
            )

        other = ray.remote(num_cpus=0)(Nothing).remote()
        pids = [pid, ray.get(other.pid.remote())]
        time.sleep(5)
        begin, used = time.monotonic(), [cpu_seconds(one) for one in pids]
        time.sleep(options.idle)
        took = time.monotonic() - begin
        shares = [100 * (cpu_seconds(one) - before) / took for one, before in zip(pids, used, strict=True)]
        print(f"\nidle service: {shares[0]:.2f} % of a core; any idle actor: {shares[1]:.2f} %")

        wanted = [
            {"name": f"d{i}", "model": "gpt-4o", "serving": {"max_concurrent": 1}}
            for i in range(options.standing)
        ]
        ray.get([service.place.remote(one) for one in wanted])
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            ray.get(service.status.remote())
            times.append((time.perf_counter() - begin) * 1000)
        print(
            f"{options.standing} deployments standing: status {statistics.median(times):.0f} ms",
            end="",
            flush=True,
        )
        ray.kill(service, no_restart=False)
        begin = time.perf_counter()
        while ray.get(service.__ray_call__.remote(lambda self: os.getpid())) == pid:
            time.sleep(0.01)
        print(f", restart {time.perf_counter() - begin:.1f} s")
        ray.get(service.release_all.remote())


if __name__ == "__main__":
    main()
