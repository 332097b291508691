"""Many clients at once, an idle service, and many deployments standing: ``python -m benchmarks.clients``.

Clients place and release one deployment each, over and over, for 1 or 2 GPUs anywhere in the cluster; then the same
clients do the same with plain placement groups (create, wait, remove), on the same cluster. Ours chooses, steers and
verifies from inside a worker; the plain way learns of no GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

import placement
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
        ray.get(service.place.remote({"name": name, "model": "m", "gpus": 1 + turn % 2}))
        ray.get(service.release.remote(name))

    return once


def plain(number: int, turn: int) -> None:
    """Creates a group, waits, and removes it."""
    group = placement_group([{"GPU": 1}] * (1 + turn % 2))
    if not group.wait(30):
        remove_placement_group(group)
        raise TimeoutError
    remove_placement_group(group)


def tell(name: str, took: list[float], errors: Counter[str], seconds: float) -> None:
    """One line of the table."""
    ordered = sorted(took) or [float("nan")]
    p50, p99 = statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]
    said = ", ".join(f"{count} {kind}" for kind, count in errors.most_common()) or "none"
    print(
        f"{name:28}{len(took) / seconds:>10.1f}/s{p50:>10.0f} ms{p99:>10.0f} ms   refusals: {said}",
        flush=True,
    )


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Runs all and prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--standing", type=int, default=500, help="deployments standing at a time")
    options = parser.parse_args()
    nodes = [SimulatedNode(f"gpu-{i:02}", topology="l40s-4x") for i in range(options.nodes)]
    nodes.append(SimulatedNode("out", resources={"egress": 100_000}))
    with embedded_cluster(nodes, progress=lambda name: print(f"starting {name}", flush=True)):
        service = placement.start()
        pid = ray.get(service.__ray_call__.remote(lambda self: os.getpid()))
        print(
            f"\n{options.clients} clients, {options.nodes} nodes with 4 GPUs, {os.cpu_count()} cores, "
            f"ray {ray.__version__}"
        )
        print(f"{'':28}{'throughput':>12}{'p50':>13}{'p99':>13}")
        total = ray.cluster_resources()["GPU"]
        for name, once in (("place() and release()", ours(service)), ("plain placement groups", plain)):
            tell(name, *storm(once, options.clients, options.seconds), options.seconds)
            time.sleep(3)
            print(
                f"{'':28}GPUs free afterwards: {ray.available_resources()['GPU']:g} of {total:g}", flush=True
            )

        begin, used = time.monotonic(), cpu_seconds(pid)
        time.sleep(20)
        print(
            f"\nidle service: {100 * (cpu_seconds(pid) - used) / (time.monotonic() - begin):.2f} % of a core"
        )

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
