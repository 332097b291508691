"""How many replicas a second the planner places, by the number of nodes: ``python -m benchmarks.plan``.

Two ways of use, on 8-GPU nodes of six makes with 70 % of their GPUs free: one deployment of many replicas, and
many deployments of four, each planned on top of the ones before. On one core, without Ray. The peer is what
this planner was before it had an index: every node is asked for its best set anew for every replica.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import time
from collections.abc import Callable

from placement import topologies
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.planner import plan, steps
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot

MAKES = ("dgx-1v", "dgx-a100", "dgx-h100", "gcp-a4", "a100-pcie-8x", "rtx-4090-8x")
REPLICAS = 1000


def cluster(count: int) -> Snapshot:
    """A seeded cluster, as it comes from outside: nothing worked out yet."""
    dice = random.Random(count)
    return Snapshot(
        Node(
            id=f"{i:05x}",
            name=f"node-{i:05}",
            topology=topologies.load(MAKES[i % len(MAKES)]),
            free=frozenset(gpu for gpu in range(8) if dice.random() < 0.7),
        )
        for i in range(count)
    )


def one_deployment(snapshot: Snapshot) -> int:
    """Places one deployment of many single GPUs, as many as fit."""
    room = sum(len(node.free) for node in snapshot.nodes)
    outcome = plan(snapshot, Request("d", tuple(range(min(REPLICAS, room // 2))), Needs(1)))
    assert isinstance(outcome, Plan)
    return len(outcome.replicas)


def many_deployments(snapshot: Snapshot) -> int:
    """Places deployments of four replicas of 1, 2 or 4 GPUs until there are many, or one does not fit."""
    dice = random.Random(1)
    requests = [Request(f"d{i}", (0, 1, 2, 3), Needs(dice.choice((1, 2, 4)))) for i in range(REPLICAS // 4)]
    done = [step.outcome for step in steps(snapshot, requests)]
    return sum(len(outcome.replicas) for outcome in done if isinstance(outcome, Plan))


def every_node_anew(snapshot: Snapshot) -> int:
    """The peer: ranks all nodes for each replica. A tenth of the replicas, since it takes so long."""
    nodes = {node.id: node for node in snapshot.nodes}
    placed = 0
    for _ in range(REPLICAS // 10):
        roomy = [node for node in nodes.values() if len(node.free) >= 2]
        if not roomy:
            break
        best = min(roomy, key=lambda node: (node.offer(Needs(2)), node.name))
        gpus = set(best.best(Needs(2)) or ())
        nodes[best.id] = Node(best.id, best.name, topology=best.topology, free=best.free - gpus)
        placed += 1
    return placed


CASES: dict[str, Callable[[Snapshot], int]] = {
    "one deployment": one_deployment,
    "deployments of 4": many_deployments,
    "every node anew": every_node_anew,
}


def microseconds(case: Callable[[Snapshot], int], count: int, repeat: int) -> float:
    """CPU time per replica, the best of several runs; each on a snapshot that was asked once before, as a service's."""
    best = float("inf")
    for _ in range(repeat):
        snapshot = cluster(count)
        for gpus in (1, 2, 4):
            plan(snapshot, Request("first", (0,), Needs(gpus)))
        start = time.process_time()
        placed = case(snapshot)
        best = min(best, (time.process_time() - start) / placed * 1e6)
    return best


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    print(f"python -m benchmarks.plan   {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'8-GPU nodes':>12}" + "".join(f"{name:>32}" for name in CASES))
    first: dict[str, float] = {}
    for count in options.nodes:
        line = f"{count:>12}"
        for name, case in CASES.items():
            took = microseconds(case, count, options.repeat)
            growth = took / first.setdefault(name, took)
            line += f"{took:>10.1f} us {1e6 / took:>9.0f}/s {growth:>6.1f}x"
        print(line, flush=True)
    print("per replica; replicas a second; times the first line")


if __name__ == "__main__":
    main()
