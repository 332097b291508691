"""Which nodes replicas go to, and why not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement import topologies
from placement.core.planner import Plan, Request, plan
from placement.core.snapshot import Node, Snapshot
from placement.core.topology import Topology
from placement.errors import NoEgressNodes, NoGpuNodes, NotEnoughEgress, NotEnoughGpus


def gpu_node(name: str, topology: str | int, busy: tuple[int, ...] = (), **fields: object) -> Node:
    shape = Topology.unknown(topology) if isinstance(topology, int) else topologies.load(topology)
    free = frozenset(range(len(shape))) - set(busy)
    return Node(
        id=f"id-{name}", name=name, address=f"10.0.0.{len(name)}", topology=shape, free=free, **fields
    )  # type: ignore[arg-type]


def egress_node(name: str, serving: tuple[tuple[str, str], ...] = (), **egress: int) -> Node:
    return Node(id=f"id-{name}", name=name, egress=egress, serving=frozenset(serving))


def where(outcome: object) -> list[tuple[str, tuple[int, ...]]]:
    assert isinstance(outcome, Plan), outcome
    return [(replica.node_id.removeprefix("id-"), replica.gpus) for replica in outcome.replicas]


def local(gpus: int, replicas: int = 1, **fields: object) -> Request:
    return Request("d", tuple(range(replicas)), gpus=gpus, **fields)  # type: ignore[arg-type]


def remote(units: int = 1, replicas: int = 1, key: str = "k", **fields: object) -> Request:
    return Request("d", tuple(range(replicas)), provider="openai", key=key, egress=units, **fields)  # type: ignore[arg-type]


MIXED = Snapshot((gpu_node("dgx", "dgx-1v"), gpu_node("hgx", "dgx-h100"), gpu_node("pcie", "a100-pcie-4x")))


@pytest.mark.parametrize(
    ("case", "snapshot", "request_", "expected"),
    [
        ("the fastest set on offer wins", MIXED, local(4), [("hgx", (0, 1, 2, 3))]),
        ("the next replica takes the rest", MIXED, local(4, 2), [("hgx", (0, 1, 2, 3)), ("hgx", (4, 5, 6, 7))]),
        (
            "a bridged pair beats a DGX-1V pair once the switch is full",
            Snapshot((gpu_node("dgx", "dgx-1v"), gpu_node("pcie", "a100-pcie-4x", busy=(0,)))),
            local(2),
            [("pcie", (2, 3))],
        ),
        (
            "single GPUs go to the node with the fewest free, so that large sets stay whole",
            Snapshot((gpu_node("big", 8), gpu_node("small", 4, busy=(0,)))),
            local(1),
            [("small", (1,))],
        ),
        (
            "replicas spread where equal sets are on offer",
            Snapshot((gpu_node("a", 4), gpu_node("b", 4))),
            local(1, 4),
            [("a", (0,)), ("b", (0,)), ("a", (1,)), ("b", (1,))],
        ),
        (
            "a replica that stands already counts for spreading",
            Snapshot((gpu_node("a", 4), gpu_node("b", 4))),
            local(1, standing={"id-a": 1}),
            [("b", (0,))],
        ),
        ("constraints narrow the choice, by name", MIXED, local(4, gpu_nodes=("dgx",)), [("dgx", (0, 1, 2, 3))]),
        ("or by id", MIXED, local(2, gpu_nodes=("id-pcie",)), [("pcie", (0, 1))]),
        (
            "without a topology ordinals are ascending and never twice",
            Snapshot((gpu_node("a", 4, busy=(1,)),)),
            local(1, 3),
            [("a", (0,)), ("a", (2,)), ("a", (3,))],
        ),
    ],
)  # fmt: skip
def test_gpu_replicas(
    case: str, snapshot: Snapshot, request_: Request, expected: list[tuple[str, tuple[int, ...]]]
) -> None:
    assert where(plan(snapshot, request_)) == expected, case


def test_the_order_of_nodes_does_not_matter() -> None:
    backwards = replace(MIXED, nodes=MIXED.nodes[::-1])
    assert plan(MIXED, local(2, 5)) == plan(backwards, local(2, 5))


def test_every_refusal_counts_its_reasons_and_says_what_would_help() -> None:
    refusal = plan(MIXED, local(9))
    assert isinstance(refusal, NotEnoughGpus)
    assert (refusal.requested, refusal.largest_node, refusal.excluded) == (9, 8, {"has fewer than 9 GPUs": 3})
    assert str(refusal) == (
        "cannot place 'd': 9 GPUs per replica, but the largest node has 8 (3 nodes: has fewer than 9 GPUs); "
        "ask for at most 8 GPUs per replica, or add a node with 9"
    )

    busy = Snapshot(
        (gpu_node("dgx", "dgx-1v", busy=(0, 1, 2, 3, 4, 5)), gpu_node("pcie", "a100-pcie-4x", busy=(0,)))
    )
    refusal = plan(busy, local(4, gpu_nodes=("dgx", "pcie")))
    assert isinstance(refusal, NotEnoughGpus)
    assert refusal.excluded == {"has fewer than 4 GPUs free": 2}
    assert "replica 0 needs 4 free GPUs on one node, and 3 (1-3) are free on pcie at best" in str(refusal)

    refusal = plan(MIXED, local(4, gpu_nodes=("pcie",), replicas=2))
    assert isinstance(refusal, NotEnoughGpus)
    assert refusal.excluded == {"not in constraints.gpu_nodes": 2, "has fewer than 4 GPUs free": 1}
    assert "replica 1 needs 4 free GPUs on one node, and none is free on pcie at best" in str(refusal)


def test_without_gpu_nodes_it_says_how_to_get_one() -> None:
    refusal = plan(Snapshot((egress_node("e", egress=1),)), local(1))
    assert isinstance(refusal, NoGpuNodes)
    assert (
        str(refusal)
        == "cannot place 'd': the cluster has no GPU node; start one with `ray start --num-gpus=N`"
    )
    assert isinstance(plan(MIXED, local(1, gpu_nodes=("nowhere",))), NoGpuNodes)


def test_a_node_with_a_problem_is_left_out_for_that_reason() -> None:
    refusal = plan(
        Snapshot((gpu_node("a", 4, problem="label placement/topology of node a: unknown"),)), local(1)
    )
    assert isinstance(refusal, NoGpuNodes)
    assert refusal.excluded == {"label placement/topology of node a: unknown": 1}


A, B = egress_node("a", egress_openai=8), egress_node("b", egress=8)


def serves(node: Node, key: str) -> Node:
    return replace(node, serving=frozenset({("openai", key)}))


def full(node: Node) -> Node:
    return replace(node, egress=dict.fromkeys(node.egress, 1))


@pytest.mark.parametrize(
    ("case", "nodes", "request_", "expected"),
    [
        ("replicas spread", (A, B), remote(2, 2), ["a", "b"]),
        ("and go round", (A, B), remote(2, 4), ["a", "b", "a", "b"]),
        ("the same key goes where it is served", (A, serves(B, "k")), remote(2), ["b"]),
        ("another key does not", (A, serves(B, "x")), remote(2), ["a"]),
        ("a full node is passed over, served or not", (A, full(serves(B, "k"))), remote(2), ["a"]),
        ("spreading goes before sharing a key", (A, serves(B, "k")), remote(2, 2), ["b", "a"]),
        ("a preference goes before sharing", (serves(A, "k"), B), remote(2, egress_preference=("b",)), ["b"]),
        ("constraints narrow", (A, B), remote(2, egress_nodes=("b",)), ["b"]),
        ("the emptiest otherwise", (A, egress_node("b", egress=9)), remote(2), ["b"]),
    ],
)  # fmt: skip
def test_remote_replicas(case: str, nodes: tuple[Node, ...], request_: Request, expected: list[str]) -> None:
    assert [name for name, _ in where(plan(Snapshot(nodes), request_))] == expected, case


def test_a_nodes_own_provider_resource_goes_before_the_general_one() -> None:
    both = egress_node("both", egress=8, egress_openai=8)
    outcome = plan(Snapshot((both,)), remote(2))
    assert isinstance(outcome, Plan)
    assert [replica.egress_resource for replica in outcome.replicas] == ["egress_openai"]


def test_remote_refusals() -> None:
    refusal = plan(Snapshot((A, B)), remote(9))
    assert isinstance(refusal, NotEnoughEgress)
    assert "replica 0 needs 9 concurrent requests to openai on one node, and 8 are free on b at best" in str(
        refusal
    )
    refusal = plan(Snapshot((egress_node("c", egress_gemini=4),)), remote(1))
    assert isinstance(refusal, NoEgressNodes)
    assert refusal.provider == "openai"
    assert str(refusal).endswith("start one with `ray start --resources='{\"egress_openai\": 64}'`")
