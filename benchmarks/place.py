"""What placing costs beside plain Ray, in one run on one warm cluster: ``python -m benchmarks.place``.

Plain: ``placement_group()``, wait, one task in each bundle (each says its GPU), as a careful user would do
by hand. Ours: ``place()``, which chooses, reserves, steers and verifies. Both from a driver on the head
node, for 2 GPUs on the same node, in turn, so that both see the same noise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import placement
from placement.runtime.embedded import SimulatedNode, embedded_cluster

NODES = [
    SimulatedNode("hgx", topology="dgx-h100"),
    SimulatedNode("pcie", topology="a100-pcie-4x"),
    SimulatedNode("dgx", topology="dgx-1v"),
]


@ray.remote(num_cpus=0, num_gpus=1, max_calls=0)
def gpu_id() -> str:
    """Which GPU a task got."""
    return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])


@ray.remote(num_cpus=0)
class Neighbour:
    """Another Ray user, who keeps the GPU it got."""

    def ready(self) -> bool:
        """Answers once the GPU is held."""
        return True


def plain(node: str) -> Callable[[], None]:
    """The plain way on one node."""

    def once() -> None:
        group = placement_group([{"GPU": 1}] * 2, bundle_label_selector=[{"ray.io/node-id": node}] * 2)
        group.wait(30)
        strategies = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(2)
        ]
        ray.get([gpu_id.options(scheduling_strategy=strategy).remote() for strategy in strategies])
        once.undo = lambda: remove_placement_group(group)

    return once


def ours(service: Any, node: str, seen: list[list[int]]) -> Callable[[], None]:
    """``place()`` limited to one node."""

    def once() -> None:
        result = ray.get(
            service.place.remote({"name": "bench", "model": "m", "gpus": 2}, {"gpu_nodes": [node]})
        )
        seen.append(result.assignments[0].gpus)
        once.undo = lambda: ray.get(service.release.remote("bench"))

    return once


def timed(once: Callable[[], None]) -> float:
    """Milliseconds of one call; what it made is given back afterwards and has time to show in Ray's books."""
    start = time.perf_counter()
    once()
    took = (time.perf_counter() - start) * 1000
    once.undo()
    time.sleep(0.4)
    return took


def main() -> None:
    """Runs all cases in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    with embedded_cluster(NODES, progress=lambda name: print(f"starting {name}", flush=True)):
        service = placement.start()
        ids = {node["NodeName"]: node["NodeID"] for node in ray.nodes()}
        pinned = NodeAffinitySchedulingStrategy(ids["pcie"], soft=False)
        neighbour = Neighbour.options(num_gpus=1, scheduling_strategy=pinned).remote()
        ray.get(neighbour.ready.remote())

        seen: dict[str, list[list[int]]] = {"hgx": [], "pcie": [], "dgx": []}
        cases = {
            "plain placement_group() + a task in each bundle": plain(ids["hgx"]),
            "place(), Ray's own choice is the best": ours(service, ids["hgx"], seen["hgx"]),
            "place(), one run to steer to": ours(service, ids["pcie"], seen["pcie"]),
            "place(), several runs to steer to": ours(service, ids["dgx"], seen["dgx"]),
        }
        for once in cases.values():
            for _ in range(3):
                timed(once)
        took: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, once in cases.items():
                took[name].append(timed(once))

    base = statistics.median(next(iter(took.values())))
    print(f"\n2 GPUs on one node, {rounds} rounds in turn, {os.cpu_count()} cores, ray {ray.__version__}")
    print(f"{'':50} {'median':>9} {'min':>9} {'max':>9} {'ratio':>6}")
    for name, values in took.items():
        median = statistics.median(values)
        print(f"{name:50} {median:6.1f} ms {min(values):6.1f} ms {max(values):6.1f} ms {median / base:6.2f}")
    print("GPUs chosen: " + ", ".join(f"{node} {gpus[-1]}" for node, gpus in seen.items()))


if __name__ == "__main__":
    main()
