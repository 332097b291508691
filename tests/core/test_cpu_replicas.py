"""CPU replicas: which node, how many on one, what is spared for GPUs, and what a refusal says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from placement.core.explanation import explain
from placement.core.needs import GIB, Needs
from placement.core.node import Node
from placement.core.planner import advance, plan, vacate
from placement.core.policy import Policy
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.simulation import Arrival, simulate
from placement.core.snapshot import Snapshot
from placement.core.staying import staying
from placement.core.topology import Topology
from placement.errors import NoCpuNodes, Unplaceable


def node(
    name: str, cpus: float = 8, gib: float = 32, gpus: int = 0, free: int | None = None, **labels: str
) -> Node:
    """A node; all of its GPUs are free unless it says how many."""
    free_gpus = frozenset(range(gpus if free is None else free))
    amounts: dict[str, Any] = {"cpu_milli": round(cpus * 1000), "memory_bytes": round(gib * GIB)}
    return Node(name, name, topology=Topology.unknown(gpus), free=free_gpus, labels=labels, **amounts)


def ask(replicas: int = 1, cpus: float = 2, gib: float = 0, **fields: Any) -> Request:
    amounts = {"cpu_milli": round(cpus * 1000), "memory_bytes": round(gib * GIB), "spared_milli": 1000}
    return replace(Request("d", tuple(range(replicas)), **amounts), **fields)  # type: ignore[arg-type]


def where(nodes: list[Node], request: Request) -> list[str]:
    """The node of each replica, in order."""
    planned = plan(Snapshot(nodes), request)
    assert isinstance(planned, Plan), planned
    return [replica.node_id for replica in planned.replicas]


def test_a_cpu_replica_takes_cpus_and_memory_and_gives_them_back() -> None:
    before = Snapshot([node("a", 8, 32)])
    step, after = advance(before, ask(2, cpus=2.5, gib=4))
    assert isinstance(step.outcome, Plan)
    assert step.outcome.replicas == tuple(
        PlannedReplica(i, "a", cpu_milli=2500, memory_bytes=4 * GIB) for i in range(2)
    )
    left = after.node("a")
    assert (left.cpu_milli, left.memory_bytes, left.deployments) == (3000, 24 * GIB, {"d": 2})
    assert vacate(after, step.outcome.replicas, "d").nodes == before.nodes


def test_nodes_without_gpus_come_first_whatever_the_policy() -> None:
    nodes = [node("a", 64, gpus=4), node("b", 4), node("c", 4, gpus=2, free=0)]
    for policy in Policy:
        assert where(nodes, ask(2, policy=policy)) == ["b", "b"], policy


def test_replicas_spread_and_then_fill_the_fullest_node() -> None:
    nodes = [node("a", 8), node("b", 6), node("c", 7)]
    assert where(nodes, ask(4)) == ["b", "c", "a", "b"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy.PACK, ["b", "b", "b"]),
        (Policy.SPREAD, ["b", "c", "a"]),
        (Policy.LEAST_LOADED, ["a", "c", "b"]),
        (Policy.ROUND_ROBIN, ["a", "b", "c"]),
    ],
)
def test_policies_mean_of_cpus_what_they_mean_of_gpus(policy: Policy, expected: list[str]) -> None:
    assert where([node("a", 8), node("b", 6), node("c", 7)], ask(3, policy=policy)) == expected


def test_on_gpu_nodes_those_with_the_fewest_free_gpus_come_first() -> None:
    nodes = [node("a", 64, gpus=8), node("b", 16, gpus=8, free=2), node("c", 16, gpus=8, free=4)]
    assert where(nodes, ask(3)) == ["b", "c", "a"]


def test_each_free_gpu_keeps_a_cpu() -> None:
    machine = node("a", 8, gpus=4)
    assert where([machine], ask(2, cpus=2)) == ["a", "a"]
    refused = plan(Snapshot([machine]), ask(3, cpus=2))
    assert isinstance(refused, NoCpuNodes)
    assert refused.summary == (
        "replica 2 needs 2 CPUs on one node; at best a has 0 of its 4 CPUs to spare beside its free GPUs, and 32 GiB "
        "free"
    )
    assert refused.excluded == {"has not 2 CPUs to spare beside its free GPUs": 1}
    assert where([replace(machine, free=frozenset({0}))], ask(3, cpus=2)) == ["a"] * 3, (
        "what is held keeps none"
    )
    assert where([machine], ask(4, cpus=2, spared_milli=0)) == ["a"] * 4


def test_a_free_mig_instance_keeps_a_cpu_and_a_lost_slot_none() -> None:
    slots = {0: "1g.10gb", 1: "?"}
    machine = replace(node("a", 3, gpus=2, free=0), slots=slots, instances=slots)
    assert isinstance(plan(Snapshot([machine]), ask(cpus=2.5)), NoCpuNodes)
    assert where([machine], ask(cpus=2)) == ["a"]


def test_limits_on_nodes_hold_and_limits_on_gpus_are_of_no_concern() -> None:
    nodes = [node("a", zone="1"), node("b", zone="2"), replace(node("c"), problem="is draining")]
    assert where(nodes, ask(labels={"zone": "2"})) == ["b"]
    assert where(nodes, ask(cpu_nodes=("b", "c"), gpu_nodes=("x",), accelerators=("H100",))) == ["b"]
    beside = [replace(nodes[0], deployments={"db": 1}), nodes[1]]
    assert where(beside, ask(apart_from=("db",))) == ["b"]
    assert where(beside, ask(kept_away_by=("db",))) == ["b"]
    assert where(beside, ask(near_to=("db",))) == ["a"]


def test_cpu_replicas_spread_over_a_label() -> None:
    nodes = [node("a", 64, zone="1"), node("b", 64, zone="1"), node("c", 64, zone="2"), node("d", 64)]
    assert Counter(where(nodes, ask(4, spread_label="zone", max_per_domain=2))) == {"a": 1, "b": 1, "c": 2}
    refused = plan(Snapshot(nodes), ask(5, spread_label="zone", max_per_domain=2))
    assert type(refused) is Unplaceable  # there are nodes, with room
    assert refused.summary == "replica 4 finds no node: every zone with room has 2 replicas already"
    assert refused.advice == "raise constraints.spread.max, or add a node with another zone"


@pytest.mark.parametrize(
    ("nodes", "request_", "summary", "advice"),
    [
        ([], ask(), "the cluster has no node", "start one with `ray start --num-cpus=N`"),
        ([node("a")], ask(cpu_nodes=("b",)), "no node may be used", "widen constraints.cpu_nodes"),
        (
            [replace(node("a"), problem="is draining")],
            ask(),
            "no node may be used",
            "run `placement status` and repair the nodes it names, or add a node",
        ),
        (
            [node("a", zone="1")],
            ask(labels={"zone": "7"}),
            "no node may be used",
            "loosen the constraint (label zone), or add a node that meets it",
        ),
        (
            [node("a", 1), node("b", 2)],
            ask(cpus=4, gib=2),
            "replica 0 needs 4 CPUs and 2 GiB of memory on one node; at best b has 2 CPUs and 32 GiB free",
            "ask for fewer cpus or less memory_gib, or add a node with 4 CPUs and 2 GiB of memory",
        ),
        (
            [replace(node("a", 8, 1), deployments={"other": 1})],
            ask(cpus=1, gib=2),
            "replica 0 needs 1 CPU and 2 GiB of memory on one node; at best a has 8 CPUs and 1 GiB free",
            "ask for fewer cpus or less memory_gib, release something, or add a node with 1 CPU and 2 GiB of memory",
        ),
    ],
)
def test_a_refusal_says_what_is_missing(
    nodes: list[Node], request_: Request, summary: str, advice: str
) -> None:
    refused = plan(Snapshot(nodes), request_)
    assert isinstance(refused, NoCpuNodes)
    assert (refused.summary, refused.advice, refused.code) == (summary, advice, "no_cpu_nodes")


def test_an_explanation_goes_stage_by_stage() -> None:
    why = explain(Snapshot([node("a", 1), node("b", 8), node("c", 8, gpus=8)]), ask())
    assert [(stage.name, stage.kept) for stage in why.stages] == [
        ("nodes", 3), ("constraints", 3), ("health", 3), ("CPUs and memory", 1),
    ]  # fmt: skip
    assert why.stages[-1].excluded == {
        "has fewer than 2 CPUs free": 1,
        "has not 2 CPUs to spare beside its free GPUs": 1,
    }
    assert why.nearest_miss == "a has 1 CPU and 32 GiB free"


def test_a_gpu_that_is_taken_may_make_room_for_a_cpu_replica() -> None:
    """Which is why nobody may take a refusal of one for that of another like it."""
    snapshot = Snapshot([node("a", 2, gpus=1)])
    wanted = ask(cpus=2)
    assert isinstance(plan(snapshot, wanted), NoCpuNodes)
    assert wanted.likeness is None
    _, later = advance(snapshot, Request("gpu", (0,), Needs(1)))
    assert isinstance(plan(later, wanted), Plan)
    arrivals = [Arrival(0, wanted), Arrival(1, Request("gpu", (0,), Needs(1))), Arrival(2, wanted)]
    report = simulate(snapshot, arrivals)
    assert (report.placed, report.refused) == (2, 1)


def test_the_fragmentation_policy_takes_cpus_that_gpus_miss_least() -> None:
    """Both have 4 CPUs too many for GPUs that ask 2 each, but on one of them no GPU is left to ask."""
    nodes = [node("a", 6, gpus=1), node("b", 6, gpus=1, free=0)]
    snapshot = Snapshot(nodes)
    mix = snapshot.mix.plus(Request("gpu", (0,), Needs(1), cpu_milli=2000))
    planned = plan(snapshot.changed((), mix), ask(cpus=5, policy=Policy.FRAGMENTATION))
    assert isinstance(planned, Plan)
    assert planned.replicas[0].node_id == "b"


def test_a_replica_stays_while_as_much_is_asked_for_and_its_node_may_be_used() -> None:
    snapshot = Snapshot([node("a", zone="1"), node("b", gpus=2)])
    stands = {0: (PlannedReplica(0, "a", cpu_milli=2000, memory_bytes=GIB),)}
    before = ask(gib=1)
    for fields, expected in (
        ({"policy": Policy.PACK, "gpu_nodes": ("x",), "accelerators": ("H100",)}, True),
        ({"cpu_nodes": ("a",)}, True),
        ({"cpu_nodes": ("b",)}, False),
        ({"labels": {"zone": "2"}}, False),
        ({"cpu_milli": 1000}, False),
        ({"memory_bytes": 2 * GIB}, False),
        ({"needs": Needs(1)}, False),
        ({"provider": "openai", "key": "k", "egress": 1}, False),
    ):
        asked = replace(before, **fields)
        assert staying(snapshot, stands, before, asked) == ([0] if expected else []), fields
    on_gpus = {0: (PlannedReplica(0, "b", (0,), cpu_milli=2000),)}
    beside = Request("d", (), Needs(1), cpu_milli=2000)
    assert staying(snapshot, on_gpus, beside, ask()) == []
