"""Which nodes replicas go to, and why not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from placement import topologies
from placement.core.explanation import explain
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import GIB, Needs, Within
from placement.core.node import Node
from placement.core.planner import advance, plan, steps, vacate
from placement.core.policy import Policy
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import (
    BelowFloor,
    NoEgressNodes,
    NoGpuNodes,
    NotEnoughEgress,
    NotEnoughGpus,
    Unplaceable,
)


def gpu_node(name: str, topology: str | int, busy: Iterable[int] = (), **fields: Any) -> Node:
    shape = Topology.unknown(topology) if isinstance(topology, int) else topologies.load(topology)
    free = frozenset(range(len(shape))) - set(busy)
    return Node(
        id=f"id-{name}", name=name, address=f"10.0.0.{len(name)}", topology=shape, free=free, **fields
    )


def egress_node(name: str, serving: tuple[tuple[str, str], ...] = (), **egress: int) -> Node:
    return Node(id=f"id-{name}", name=name, egress=egress, serving=dict.fromkeys(serving, 1))


def where(outcome: object) -> list[tuple[str, tuple[int, ...]]]:
    assert isinstance(outcome, Plan), outcome
    return [(replica.node_id.removeprefix("id-"), replica.gpus) for replica in outcome.replicas]


def local(gpus: int, replicas: int = 1, **fields: object) -> Request:
    needs = {name: fields.pop(name) for name in Needs._fields if name in fields}
    return Request("d", tuple(range(replicas)), Needs(gpus, **needs), **fields)  # type: ignore[arg-type]


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
    backwards = Snapshot(MIXED.nodes[::-1])
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
    assert "replica 0 needs 4 GPUs free on one node; at best pcie has 3 of its 4 GPUs free: GPU 1-3" in str(
        refusal
    )

    refusal = plan(MIXED, local(4, gpu_nodes=("pcie",), replicas=2))
    assert isinstance(refusal, NotEnoughGpus)
    assert refusal.excluded == {"not in constraints.gpu_nodes": 2, "has fewer than 4 GPUs free": 1}
    assert "replica 1 needs 4 GPUs free on one node; at best pcie has none of its 4 GPUs free" in str(refusal)


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
    return replace(node, serving={("openai", key): 1})


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
    assert "replica 0 needs 9 concurrent requests to openai on one node; at best b has 8 free" in str(refusal)
    refusal = plan(Snapshot((egress_node("c", egress_gemini=4),)), remote(1))
    assert isinstance(refusal, NoEgressNodes)
    assert refusal.provider == "openai"
    assert str(refusal).endswith("start one with `ray start --resources='{\"egress_openai\": 64}'`")


def test_an_egress_node_that_may_not_be_used_gets_no_replica_and_a_refusal_counts_it() -> None:
    draining = replace(B, egress={"egress": 64}, problem="is draining")
    assert where(plan(Snapshot((A, draining)), remote(2, 4))) == [("a", ())] * 4
    refusal = plan(Snapshot((A, draining)), remote(9))
    assert isinstance(refusal, NotEnoughEgress)
    assert refusal.excluded == {"has fewer than 9 egress units free": 1, "is draining": 1}
    refusal = plan(Snapshot((draining,)), remote(1, egress_nodes=("b",)))
    assert isinstance(refusal, NoEgressNodes)
    assert str(refusal) == (
        "cannot place 'd': no egress node may be used (1 node: is draining); run `placement status` and repair "
        "the nodes it names, or add a node"
    )
    stages = explain(Snapshot((A, draining)), remote(1)).stages
    assert [(stage.name, stage.kept) for stage in stages] == [
        ("egress nodes", 2), ("constraints", 2), ("health", 1), ("egress capacity", 1),
    ]  # fmt: skip


def test_the_general_resource_is_used_once_the_nodes_own_is_full() -> None:
    both = egress_node("both", egress=5, egress_openai=4)
    outcome = plan(Snapshot((both,)), remote(2, 4))
    assert isinstance(outcome, Plan)
    assert [r.egress_resource for r in outcome.replicas] == [
        "egress_openai",
        "egress_openai",
        "egress",
        "egress",
    ]
    refusal = plan(Snapshot((both,)), remote(2, 5))
    assert isinstance(refusal, NotEnoughEgress)
    assert "replica 4 needs 2 concurrent requests to openai on one node; at best both has 1 free" in str(
        refusal
    )
    refusal = plan(Snapshot((both,)), remote(6))
    assert isinstance(refusal, NotEnoughEgress)
    assert refusal.excluded == {"has no 6 egress units free in one resource": 1}
    placed = [PlannedReplica(r.replica_index, "id-both", egress_resource="egress", egress_units=2) for r in
              outcome.replicas[2:]]  # fmt: skip
    used = replace(both, egress={"egress": 1, "egress_openai": 0})
    assert vacate(Snapshot((used,)), placed).node("id-both").egress == {"egress": 5, "egress_openai": 0}


def test_the_emptiest_node_counts_what_is_left_of_both_resources() -> None:
    nodes = (egress_node("a", egress_openai=6), egress_node("b", egress=4, egress_openai=4))
    assert [name for name, _ in where(plan(Snapshot(nodes), remote(2)))] == ["b"]


@pytest.mark.parametrize("replicas", [1, 2])
def test_round_robin_takes_the_nodes_in_turn_from_deployment_to_deployment(replicas: int) -> None:
    snapshot = Snapshot(tuple(gpu_node(name, 4) for name in "abc"))
    turns = []
    for i in range(6 // replicas):
        request = local(1, replicas, policy=Policy.ROUND_ROBIN)
        step, snapshot = advance(snapshot, replace(request, deployment=f"d{i}"))
        turns += [name for name, _ in where(step.outcome)]
    assert "".join(turns) == "abcabc"


def one_each(*names: str, **fields: Any) -> Snapshot:
    return Snapshot(tuple(gpu_node(name, 1, **fields) for name in names))


def test_on_nodes_of_one_gpu_a_replica_of_two_is_cut_into_two_stages() -> None:
    outcome = plan(one_each("a", "b"), local(2, divisible=True))
    assert isinstance(outcome, Plan) and outcome.set_size == 1
    assert [(r.node_id, r.gpus, r.ranks) for r in outcome.replicas] == [
        ("id-a", (0,), (0,)),
        ("id-b", (0,), (1,)),
    ]


def test_or_lies_in_one_nvlink_domain() -> None:
    racks = one_each("a", "b", labels={GPU_DOMAIN_LABEL: "rack"})
    for needs in (Needs(2), Needs(2, Within.NVLINK)):
        assert where(plan(racks, Request("d", (0,), needs))) == [("a", (0,)), ("b", (0,))]
    assert not isinstance(plan(racks, Request("d", (0,), Needs(2, min_bandwidth_gb_per_s=1.0))), Plan)


@pytest.mark.parametrize(
    ("request_", "advice"),
    [
        (
            local(2),
            "ask for pipeline_parallel = 2 instead, ask for at most 1 GPU per replica, or add a node with 2",
        ),
        (
            local(2, divisible=True, within=Within.NVLINK),
            "leave within out, since links between nodes are not known, or add a node with 2",
        ),
        (
            local(2, divisible=True, min_bandwidth_gb_per_s=9.0),
            "leave min_bandwidth_gb_per_s out, since links between nodes are not known, or add a node with 2",
        ),
        (
            local(2, within=Within.NVLINK),
            "ask for pipeline_parallel = 2 instead, without within, since links between nodes are not known, or "
            "add a node with 2",
        ),
        (local(3), "ask for at most 1 GPU per replica, or add a node with 3"),
    ],
)
def test_where_it_cannot_be_cut_the_advice_is_one_that_works(request_: Request, advice: str) -> None:
    refusal = plan(one_each("a", "b"), request_)
    assert isinstance(refusal, NotEnoughGpus)
    assert refusal.advice == advice


@pytest.mark.parametrize(
    ("nodes", "request_", "summary", "advice"),
    [
        (
            [gpu_node(name, 4) for name in "abc"],
            local(99, divisible=True),
            "replica 0 needs 33 x 3 GPUs, each on one node, all of one GPU model; there is room for 3",
            "add nodes with room for 30 more sets of 3 GPUs, or ask for fewer GPUs",
        ),
        (
            [gpu_node(name, 4, busy=(0, 1)) for name in "abc"],
            local(99, divisible=True),
            "replica 0 needs 33 x 3 GPUs, each on one node, all of one GPU model; not one is free; at best c has "
            "2 of its 4 GPUs free: GPU 2-3",
            "add nodes with room for 33 more sets of 3 GPUs, or ask for fewer GPUs",
        ),
        (
            [gpu_node("a", 8)],
            local(16, divisible=True),
            "replica 0 needs 2 x 8 GPUs, each on one node, all of one GPU model; there is room for 1",
            "add nodes with room for 1 more set of 8 GPUs, or ask for fewer GPUs",
        ),
        (
            [gpu_node("a", 8), gpu_node("b", 8, busy=(0,))],
            local(16, divisible=True),
            "replica 0 needs 2 x 8 GPUs, each on one node, all of one GPU model; there is room for 1",
            "release something, add nodes with room for 1 more set of 8 GPUs, or ask for fewer GPUs",
        ),
        (
            [gpu_node("a", 8, busy=(0,)), gpu_node("b", 8, busy=(0,)), gpu_node("c", 8, busy=(0, 1, 2, 3))],
            local(8, stages=2),
            "replica 0 needs 2 x 8 GPUs, each on one node, all of one GPU model; not one is free; at best b has "
            "7 of its 8 GPUs free: GPU 1-7",
            "release something, add nodes with room for 2 more sets of 8 GPUs, or ask for fewer GPUs",
        ),
        (
            [gpu_node("a", 8)],
            local(8, replicas=2),
            "replica 1 needs 8 GPUs free on one node; at best a has none of its 8 GPUs free",
            "add a node with 8 GPUs, or ask for fewer replicas",
        ),
        (
            [gpu_node("a", 1, busy=(0,))],
            local(1),
            "replica 0 needs 1 GPU free on one node; at best a has none of its 1 GPU free",
            "release something, or add a node with 1 GPU",
        ),
        (
            [gpu_node("a", 2), gpu_node("b", 1), gpu_node("c", 1)],
            local(4, divisible=True),
            "replica 0 needs 2 x 2 GPUs, each on one node, all of one GPU model; there is room for 1",
            "add nodes with room for 1 more set of 2 GPUs, ask for pipeline_parallel = 4 instead, or ask for "
            "fewer GPUs",
        ),
    ],
)
def test_advice_is_true(nodes: list[Node], request_: Request, summary: str, advice: str) -> None:
    refusal = plan(Snapshot(nodes), request_)
    assert isinstance(refusal, NotEnoughGpus)
    assert (refusal.summary, refusal.advice) == (summary, advice)


def test_one_gpu_is_not_counted_in_the_plural() -> None:
    refusal = plan(Snapshot((gpu_node("a", 1, busy=(0,)),)), local(1))
    assert isinstance(refusal, NotEnoughGpus)
    assert refusal.excluded == {"has no GPU free": 1}
    refusal = plan(Snapshot((egress_node("a", egress=0),)), remote(1))
    assert isinstance(refusal, NotEnoughEgress)
    assert refusal.excluded == {"has no egress unit free": 1}
    assert "replica 0 needs 1 concurrent request to openai on one node" in str(refusal)


def test_without_any_node_a_refusal_says_how_to_get_one() -> None:
    assert [(s.name, s.kept) for s in explain(Snapshot(()), local(1)).stages] == [("GPU nodes", 0)]
    assert isinstance(plan(Snapshot(()), local(1)), NoGpuNodes)
    assert isinstance(plan(Snapshot(()), remote(1)), NoEgressNodes)


def test_a_floor_that_no_node_reaches_is_called_impossible_and_the_best_is_named() -> None:
    bridged = Snapshot((gpu_node("gpu-a", "a100-pcie-4x"), gpu_node("gpu-b", "a100-pcie-4x", busy=(0, 1, 2))))
    refusal = plan(bridged, local(4, within=Within.NVLINK))
    assert isinstance(refusal, BelowFloor)
    assert str(refusal) == (
        "cannot place 'd': replica 0 needs 4 GPUs within 'nvlink', and no node that it may use has such a set even "
        "with all its GPUs free; at best gpu-a has 4 GPUs, but in NVLink islands of 2 + 2 (2 nodes: has no 4 GPUs "
        "within 'nvlink', free or not); add a node with such a set, or ask for within: node (16.565 GB/s, weakest link "
        "SYS, on gpu-a); waiting does not help unless such a node joins"
    )
    refusal = plan(bridged, local(4, min_bandwidth_gb_per_s=100.0))
    assert isinstance(refusal, BelowFloor)
    assert str(refusal) == (
        "cannot place 'd': replica 0 needs 4 GPUs at 100 GB/s, and no node that it may use has such a set even with "
        "all its GPUs free; at best gpu-a reaches 16.565 GB/s with 4 GPUs (weakest link SYS) (2 nodes: has no 4 GPUs "
        "at 100 GB/s, free or not); lower min_bandwidth_gb_per_s to 16.565, or add a faster node; waiting does not "
        "help unless such a node joins"
    )
    assert where(plan(bridged, local(2, replicas=2, within=Within.NVLINK, min_bandwidth_gb_per_s=230.4))) == [
        ("gpu-a", (0, 1)),
        ("gpu-a", (2, 3)),
    ]


DGX_1V = gpu_node("v", "dgx-1v", busy=(0, 1, 2, 4, 6))
NO_USE = "waiting does not help"


def test_of_an_impossible_bandwidth_it_says_what_is_reached_now_and_what_at_best() -> None:
    both = Snapshot((DGX_1V, gpu_node("p", "a100-pcie-4x")))
    refusal = plan(both, local(3, min_bandwidth_gb_per_s=900.0))
    assert isinstance(refusal, BelowFloor)
    assert "; at best v reaches 40 GB/s with 3 GPUs (weakest link NV1) (" in str(refusal)
    assert "lower min_bandwidth_gb_per_s to 40 (15.986 for what is free now), or" in refusal.advice
    # The same where there is not even room: the floor is what waiting cannot change.
    full = Snapshot([replace(node, free=frozenset()) for node in both.nodes])
    refusal = plan(full, local(3, min_bandwidth_gb_per_s=900.0))
    assert isinstance(refusal, BelowFloor)
    assert (
        refusal.advice
        == f"lower min_bandwidth_gb_per_s to 40, or add a faster node; {NO_USE} unless such a node joins"
    )
    refusal = plan(both, local(3, within=Within.NVLINK, min_bandwidth_gb_per_s=900.0))
    assert "needs 3 GPUs within 'nvlink' at 900 GB/s, and" in str(refusal)


@pytest.mark.parametrize(
    ("case", "others", "asked"),
    [
        ("it is held", [gpu_node("h", "dgx-h100", busy=range(8))], local(4, within=Within.NVLINK)),
        ("it drains", [gpu_node("h", "dgx-h100", problem="is draining")], local(4, min_bandwidth_gb_per_s=99.0)),
        ("another is on it", [replace(gpu_node("h", "dgx-h100"), deployments={"o": 1})],
         local(4, within=Within.NVLINK, apart_from=("o",))),
        ("its links are unknown", [gpu_node("h", 4)], local(4, within=Within.NVLINK)),
        ("memory is in use", [replace(gpu_node("h", "dgx-h100"), free_memory=dict.fromkeys(range(8), 1))],
         replace(local(4), needs=Needs(4, Within.NVLINK, free_memory_bytes=9))),
        ("smaller pieces reach it", [gpu_node("i", "a100-pcie-4x", busy=range(4))],
         local(8, divisible=True, within=Within.NVLINK)),
    ],
)  # fmt: skip
def test_a_floor_that_a_node_may_reach_is_not_called_impossible(
    case: str, others: Sequence[Node], asked: Request
) -> None:
    refusal = plan(Snapshot((gpu_node("p", "a100-pcie-4x", busy=(0,)), *others)), asked)
    assert isinstance(refusal, Unplaceable) and NO_USE not in str(refusal), case


def test_where_the_constraints_exclude_what_reaches_a_floor_that_is_impossible_too() -> None:
    both = Snapshot((gpu_node("h", "dgx-h100"), gpu_node("p", "a100-pcie-4x")))
    refusal = plan(both, local(4, within=Within.NVLINK, gpu_nodes=("p",)))
    assert isinstance(refusal, BelowFloor) and NO_USE in refusal.advice
    assert refusal.excluded == {
        "not in constraints.gpu_nodes": 1, "has no 4 GPUs within 'nvlink', free or not": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "busy", "within", "miss"),
    [
        ("dgx-1v", (3, 4, 6, 7), Within.NVLINK, "4 free GPUs, but no 4 of them form an NVLink ring"),
        ("rtx-4090-8x", (0, 1, 4, 5), Within.NUMA, "4 free GPUs, but in NUMA nodes of 2 + 2"),
        ("dgx-1v", (0, 1, 2, 3), Within.NUMA, "8 GPUs, but its NUMA nodes are unknown"),
        ("l40s-4x", (), Within.SWITCH, "4 GPUs, but in PCIe switches of 1 + 1 + 1 + 1"),
    ],
)
def test_what_keeps_free_gpus_apart(machine: str, busy: tuple[int, ...], within: Within, miss: str) -> None:
    refusal = plan(Snapshot((gpu_node("a", machine, busy),)), local(4, within=within))
    assert isinstance(refusal, BelowFloor)
    assert f"at best a has {miss} (" in str(refusal)


def test_a_floor_leads_to_a_slower_node_only_where_it_is_met() -> None:
    # the switch is faster, but spans sockets; the DGX-1V knows no NUMA nodes
    snapshot = Snapshot(
        (gpu_node("hgx", "dgx-h100", busy=(0, 1, 2, 4, 5, 6)), gpu_node("pcie", "a100-pcie-4x"))
    )
    assert where(plan(snapshot, local(2))) == [("hgx", (3, 7))]
    assert where(plan(snapshot, local(2, within=Within.NUMA))) == [("pcie", (0, 1))]


def test_single_gpus_come_from_where_others_lose_least() -> None:
    whole, broken = gpu_node("a", "dgx-h100"), gpu_node("b", "dgx-h100", busy=(0,))
    assert where(plan(Snapshot((whole, broken)), local(1))) == [("b", (1,))]
    slow = gpu_node("c", "rtx-4090-8x")
    assert where(plan(Snapshot((whole, slow)), local(1))) == [("c", (6,))]  # and the card is near GPU 6


def test_the_stages_of_an_explanation() -> None:
    snapshot = Snapshot(
        (
            *MIXED.nodes,
            egress_node("e", egress=1),
            gpu_node("ill", 4, problem="is ill"),
            gpu_node("busy", 8, busy=tuple(range(6))),
        )
    )
    why = explain(snapshot, local(4, gpu_nodes=("dgx", "hgx", "ill", "busy"), within=Within.NVLINK))
    assert [(stage.name, stage.kept, stage.excluded) for stage in why.stages] == [
        ("GPU nodes", 5, {"has no GPUs": 1}),
        ("constraints", 4, {"not in constraints.gpu_nodes": 1}),
        ("health", 3, {"is ill": 1}),
        ("size", 3, {}),
        ("free GPUs", 2, {"has fewer than 4 GPUs free": 1}),
        ("within", 2, {}),
    ]
    assert (why.nodes, why.nearest_miss, why.advice) == (6, "busy has 2 of its 8 GPUs free: GPU 6-7", "")


def test_several_deployments_are_planned_on_top_of_each_other() -> None:
    one_machine = Snapshot((gpu_node("a", "a100-pcie-4x"),))
    first, second, third = (replace(local(2), deployment=name) for name in "fst")
    outcomes = [step.outcome for step in steps(one_machine, [first, second, third])]
    assert [where(outcome)[0][1] for outcome in outcomes[:2]] == [(0, 1), (2, 3)]
    assert isinstance(outcomes[2], NotEnoughGpus)


def test_vacating_gives_back_gpus_and_egress_and_passes_over_nodes_that_are_gone() -> None:
    snapshot = Snapshot((gpu_node("g", 4, busy=(0, 1)), egress_node("e", egress=1)))
    gone = PlannedReplica(2, "id-x", (0,))
    left = vacate(
        snapshot,
        [
            PlannedReplica(0, "id-g", (1,)),
            PlannedReplica(1, "id-e", egress_resource="egress", egress_units=3),
            gone,
        ],
    )
    assert left.node("id-g").free == {1, 2, 3}
    assert left.node("id-e").egress == {"egress": 4}
    assert snapshot.node("id-g").free == {2, 3}


INSTANCES = dict(enumerate(["1g.10gb", "1g.10gb", "3g.40gb"]))
CUT_UP = Node("a", "a", topology=Topology.unknown(3), slots=INSTANCES, instances=INSTANCES)
PARTLY = Node("b", "b", topology=Topology.unknown(5), slots=INSTANCES, free=frozenset({3, 4}))


def test_instances_and_whole_gpus_are_never_taken_for_each_other() -> None:
    snapshot = Snapshot([CUT_UP, PARTLY])
    outcome = plan(snapshot, Request("d", (0, 1), Needs(1, profile="1g.10gb")))
    assert isinstance(outcome, Plan)
    assert [(one.node_id, one.gpus) for one in outcome.replicas] == [("a", (0,)), ("a", (1,))]
    outcome = plan(snapshot, Request("d", (0, 1), Needs(1)))
    assert isinstance(outcome, Plan)
    assert [(one.node_id, one.gpus) for one in outcome.replicas] == [("b", (3,)), ("b", (4,))]


@pytest.mark.parametrize(
    ("nodes", "needs", "sentence"),
    [
        ([CUT_UP, PARTLY], Needs(3), "3 GPUs per replica, but the largest node has 2"),
        (
            [CUT_UP],
            Needs(1),
            "1 GPU per replica, but all GPUs have MIG on, and only their instances can be used",
        ),
        (
            [CUT_UP],
            Needs(1),
            "ask for a MIG instance (mig: one of 1g.10gb, 3g.40gb), or add a node with 1 GPU",
        ),
        ([CUT_UP, PARTLY], Needs(1, profile="7g.80gb"), "ask for one of: 1g.10gb, 3g.40gb"),
        (
            [PARTLY],
            Needs(1, profile="1g.10gb"),
            "replica 0 needs a MIG instance 1g.10gb free on one node; at best b has none of its 2 free",
        ),
        ([PARTLY], Needs(1, profile="1g.10gb"), "(1 node: has no MIG instance 1g.10gb free)"),
    ],
)
def test_a_refusal_tells_instances_from_gpus(nodes: list[Node], needs: Needs, sentence: str) -> None:
    refusal = plan(Snapshot(nodes), Request("d", (0,), needs))
    assert isinstance(refusal, NotEnoughGpus)
    assert sentence in str(refusal)


def lost(node: Node, *gpus: int) -> Node:
    """The node, with GPUs of which nobody can tell what they are."""
    return replace(node, free=node.free - set(gpus), slots=dict.fromkeys(gpus, "?"))


@pytest.mark.parametrize(
    ("node", "needs", "sentences"),
    [
        (
            gpu_node("gb10", 1),  # its memory is that of the machine, and NVML does not tell it
            Needs(1, memory_bytes=20 * GIB),
            (
                "but the memory of the GPUs cannot be read",
                "1 node: the memory of its GPUs cannot be read",
                "0.5",
            ),
        ),
        (
            gpu_node("small", 1, gpu_memory_bytes=16 * GIB),
            Needs(1, memory_bytes=20 * GIB),
            ("but the largest GPU has 16 GiB", "1 node: its GPUs have less than 20 GiB"),
        ),
        (lost(gpu_node("a", 4), 1), Needs(4), ("but the largest node has 3", "ask for at most 3 GPUs")),
        (
            lost(gpu_node("a", 2), 0, 1),
            Needs(1),
            ("but no GPU can be used", "1 node: has no GPU that can be used", "add a node with 1 GPU"),
        ),
    ],
)
def test_a_refusal_tells_what_cannot_be_read_or_used(
    node: Node, needs: Needs, sentences: tuple[str, ...]
) -> None:
    refusal = plan(Snapshot([node]), Request("d", (0,), needs))
    assert isinstance(refusal, NotEnoughGpus)
    assert [sentence for sentence in sentences if sentence not in str(refusal)] == []


@pytest.mark.parametrize(
    ("request_of_d", "advice"),
    [
        (
            Request("d", (0,), Needs(2), cpu_milli=64_000),
            "ask for less CPU or memory per GPU, or add a node that has more",
        ),
        (
            Request("d", (0,), Needs(1, free_memory_bytes=20 * GIB)),
            "end what uses GPU memory without holding a GPU, or add a node with 1 GPU",
        ),
        (
            Request("d", (0,), Needs(2), stages=2),
            "add nodes with room for 1 more set of 2 GPUs, or ask for fewer GPUs",
        ),
    ],
)
def test_nobody_is_told_to_release_a_gpu_that_is_lost(request_of_d: Request, advice: str) -> None:
    node = lost(gpu_node("a", 4), 3)
    refusal = plan(Snapshot([replace(node, cpu_milli=8000)]), request_of_d)
    assert isinstance(refusal, Unplaceable)
    assert refusal.advice == advice


def test_a_share_of_memory_goes_on_a_shared_gpu_although_less_would_be_left_on_a_whole_one() -> None:
    """20 GiB are most of a GPU of 24 GiB, and a quarter of one of 80 GiB that has half of it left."""
    nodes = [
        Node("a", "a", topology=Topology.unknown(1), free=frozenset({0}), gpu_memory_bytes=24 * GIB),
        Node("b", "b", topology=Topology.unknown(1), rests={0: 500}, gpu_memory_bytes=80 * GIB),
    ]
    planned = plan(Snapshot(nodes), Request("d", (0,), Needs(1, memory_bytes=20 * GIB)))
    assert isinstance(planned, Plan)
    assert [(replica.node_id, replica.share) for replica in planned.replicas] == [("b", 250)]


def test_what_leaves_a_node_that_drains_makes_no_room_there() -> None:
    draining = Node("id", "n", topology=Topology.unknown(2), free=frozenset({1}), problem="is draining")
    snapshot = Snapshot([draining])
    request = Request("d", (0,), Needs(1, share=500))
    assert not isinstance(plan(snapshot, request), Plan)  # by now the offers for such a request are known
    emptied = vacate(snapshot, [PlannedReplica(0, "id", (0,))])
    assert emptied.node("id").free == {0, 1}
    assert not isinstance(plan(emptied, request), Plan)
