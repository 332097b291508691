"""Whether waiting can help at all: what the nodes that are there could hold if nothing were placed on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from placement import topologies
from placement.core.at_best import capacity
from placement.core.needs import GIB, Needs, Within
from placement.core.node import Node
from placement.core.reconcile import Desired, Observed, Wait, reconcile
from placement.core.replicas import PlannedReplica
from placement.core.request import Bundle, Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology


def node(name: str, gpus: int | str, **fields: object) -> Node:
    """A node on which everything is held."""
    machine = Topology.unknown(gpus) if isinstance(gpus, int) else topologies.load(gpus)
    return Node(f"id-{name}", name, topology=machine, **fields)  # type: ignore[arg-type]


def request(replicas: int, gpus: int = 8, **fields: object) -> Request:
    needs = {name: fields.pop(name) for name in Needs._fields if name in fields}
    return Request("d", tuple(range(replicas)), Needs(gpus, **needs), **fields)  # type: ignore[arg-type]


TWENTY = [node("a", 8), node("b", 8), node("c", 4)]
UNLESS = ": waiting does not help all of them unless nodes join"


@pytest.mark.parametrize(
    ("nodes", "asked", "says"),
    [
        (TWENTY, request(8), f"the whole cluster has 20 GPUs, and its 8 replicas need 64{UNLESS}"),
        (TWENTY, request(2), ""),
        (TWENTY, request(5, 4), ""),
        (TWENTY, request(10, 2), ""),
        ([*TWENTY, node("d", 4)], request(3),
         f"the whole cluster has room for 2 of its 3 replicas when all is free{UNLESS}"),
        (TWENTY, request(1, 64, divisible=True),
         "the whole cluster has 20 GPUs, and it needs 64: waiting does not help unless nodes join"),
        (TWENTY, request(1, 20, divisible=True), ""),
        (TWENTY, request(1, stages=3),
         "the whole cluster has 20 GPUs, and it needs 24: waiting does not help unless nodes join"),
        (TWENTY, request(5, gpu_nodes=("a", "b")),
         f"the nodes that it may use have 16 GPUs, and its 5 replicas need 40{UNLESS}"),
        ([node("a", 2)], request(9, 1, share=250),
         f"the whole cluster has room for 8 of its 9 replicas when all is free{UNLESS}"),
        ([node("a", 2, gpu_memory_bytes=80 * GIB)], request(3, 1, memory_bytes=60 * GIB),
         f"the whole cluster has room for 2 of its 3 replicas when all is free{UNLESS}"),
        ([node("a", 2)], request(3, 1, memory_bytes=60 * GIB), ""),  # the node may say later how large they are
        ([node("a", 3, slots={0: "1g.10gb", 1: "2g.20gb"})], request(2, 1, profile="1g.10gb"),
         f"the whole cluster has room for 1 of its 2 replicas when all is free{UNLESS}"),
        ([node("a", 3, slots={0: "1g.10gb", 1: "2g.20gb"})], request(2, 1),
         f"the whole cluster has 1 whole GPU, and its 2 replicas need 2{UNLESS}"),
        ([node("a", 2)], request(2, 1, profile="1g.10gb"), ""),
        ([node("a", 8), node("b", 8)], request(5, 1, named=(0, 1, 2)),
         "the whole cluster has room for 3 of its 5 replicas when all is free: waiting does not help all of them"),
        ([node("p", "a100-pcie-4x"), node("q", "a100-pcie-4x")], request(5, 2, within=Within.NVLINK),
         f"the whole cluster has 8 GPUs, and its 5 replicas need 10{UNLESS}"),
        ([node("v", "dgx-1v")], request(2, 3, min_bandwidth_gb_per_s=40.0), ""),
        ([node("l", "l40s-4x"), node("p", "a100-pcie-4x")], request(3, 2, within=Within.NVLINK),
         f"the whole cluster has room for 2 of its 3 replicas when all is free{UNLESS}"),
        ([node("p", "a100-pcie-4x"), node("u", 2)], request(3, 2, within=Within.NVLINK), ""),
        ([*TWENTY, node("d", 64, problem="is draining")], request(8), ""),
        ([node("e", 0)], request(8), ""),
        (TWENTY, Request("d", (0,), provider="openai", egress=999), ""),
        (TWENTY, Request("d", (0,), cpu_milli=1 << 40), ""),
        (TWENTY, request(1, 64, bundles=(Bundle(8),) * 8), ""),
    ],
)  # fmt: skip
def test_what_the_cluster_can_never_hold(nodes: Sequence[Node], asked: Request, says: str) -> None:
    assert capacity(Snapshot(nodes), asked).lacks(asked, len(asked.replicas)) == says


def test_the_reason_to_wait_says_it_of_all_replicas_placed_or_not() -> None:
    never = "; the whole cluster has 20 GPUs, and its 8 replicas need 64: waiting does not help "
    free = [replace(one, free=frozenset(range(len(one.topology)))) for one in TWENTY]
    for nodes in (TWENTY, free):
        *_, waits = reconcile(Desired(request(8)), {}, Snapshot(nodes)).actions
        assert isinstance(waits, Wait)
        assert str(waits.refusal).endswith(f"{never}all of them unless nodes join")
    for gang, atomic in ((True, False), (True, True)):
        decision = reconcile(Desired(request(8), gang=gang), {}, Snapshot(free), atomic=atomic)
        found = decision.refusal or decision.actions[-1].refusal  # type: ignore[union-attr]
        assert str(found).endswith(f"{never}unless nodes join")
    placed = {
        i: Observed((PlannedReplica(i, f"id-{name}", tuple(range(8))),), request(2))
        for i, name in enumerate("ab")
    }
    assert not reconcile(Desired(request(2)), placed, Snapshot(TWENTY)).actions
    *_, waits = reconcile(Desired(request(8)), placed, Snapshot(TWENTY)).actions
    assert isinstance(waits, Wait) and waits.indices == (2, 3, 4, 5, 6, 7)
    assert str(waits.refusal).endswith(f"{never}all of them unless nodes join")
