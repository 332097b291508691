"""What earlier replicas of the same request used up is not there for later ones; nothing else is missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.core.needs import GIB, Needs
from placement.core.node import Node
from placement.core.planner import advance, plan, vacate
from placement.core.policy import Policy
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import Unplaceable


def node(name: str, cpus: float = 0, memory_gib: int = 0, gpus: int = 8, **fields: object) -> Node:
    return Node(
        f"id-{name}",
        name,
        topology=Topology.unknown(gpus),
        free=frozenset(range(gpus)),
        cpu_milli=int(cpus * 1000),
        memory_bytes=memory_gib * GIB,
        **fields,  # type: ignore[arg-type]
    )


def ask(replicas: int, cpus: float = 0, memory_gib: int = 0, gpus: int = 1, **fields: object) -> Request:
    return Request(
        "d",
        tuple(range(replicas)),
        Needs(gpus),
        cpu_milli=int(cpus * 1000),
        memory_bytes=memory_gib * GIB,
        **fields,  # type: ignore[arg-type]
    )


def where(outcome: object) -> list[str]:
    assert isinstance(outcome, Plan), outcome
    return [replica.node_id.removeprefix("id-") for replica in outcome.replicas]


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize(
    ("there", "each"),
    [
        ({"cpus": 4}, {"cpus": 2}),
        ({"cpus": 5.999}, {"cpus": 2}),
        ({"memory_gib": 8}, {"memory_gib": 4}),
        ({"cpus": 64, "memory_gib": 11}, {"cpus": 2, "memory_gib": 4}),
        ({"cpus": 4, "memory_gib": 64}, {"cpus": 2, "memory_gib": 4}),
    ],
)
def test_a_node_takes_as_many_replicas_as_it_has_cpus_and_memory_for(
    policy: Policy, there: dict[str, float], each: dict[str, float]
) -> None:
    snapshot = Snapshot([node("a", **there)])  # type: ignore[arg-type]
    assert where(plan(snapshot, ask(2, policy=policy, **each))) == ["a", "a"]  # type: ignore[arg-type]
    refused = plan(snapshot, ask(3, policy=policy, **each))  # type: ignore[arg-type]
    assert isinstance(refused, Unplaceable)
    assert "replica 2 finds no node: a has " in str(refused)
    assert list(refused.excluded.values()) == [1]


@pytest.mark.parametrize("policy", Policy)
def test_a_node_that_has_run_out_of_cpus_is_left_for_the_next_one(policy: Policy) -> None:
    snapshot = Snapshot([node("a", cpus=2, gpus=4), node("b", cpus=6)])
    assert sorted(where(plan(snapshot, ask(4, cpus=2, policy=policy)))) == ["a", "b", "b", "b"]


def test_packing_goes_on_at_the_next_node_once_the_cpus_are_used_up() -> None:
    snapshot = Snapshot([node("a", cpus=4, gpus=4), node("b", cpus=64)])
    assert where(plan(snapshot, ask(3, cpus=2, policy=Policy.PACK))) == ["a", "a", "b"]


def test_a_request_that_takes_no_cpus_needs_none() -> None:
    assert where(plan(Snapshot([node("a")]), ask(8))) == ["a"] * 8


def test_a_floor_does_not_lift_the_limit_of_cpus() -> None:
    """Where sets are packed exactly, CPUs still bound them."""
    needs = Needs(2, min_bandwidth_gb_per_s=0.1)
    snapshot = Snapshot([node("a", cpus=4)])
    two, three = (Request("d", tuple(range(n)), needs, cpu_milli=2000) for n in (2, 3))
    assert where(plan(snapshot, two)) == ["a", "a"]
    assert isinstance(plan(snapshot, three), Unplaceable)


def test_a_replica_takes_its_cpus_and_memory_along_and_gives_them_back() -> None:
    before = Snapshot([node("a", cpus=8, memory_gib=64), node("b", cpus=1, memory_gib=1)])
    step, after = advance(before, ask(2, cpus=1.5, memory_gib=10))
    assert isinstance(step.outcome, Plan)
    assert {(one.cpu_milli, one.memory_bytes) for one in step.outcome.replicas} == {(1500, 10 * GIB)}
    taken = after.node("id-a")
    assert (taken.cpu_milli, taken.memory_bytes, taken.free) == (5000, 44 * GIB, set(range(2, 8)))
    back = vacate(after, step.outcome.replicas).node("id-a")
    assert (back.cpu_milli, back.memory_bytes, back.free) == (8000, 64 * GIB, set(range(8)))


def test_a_refused_request_takes_nothing() -> None:
    before = Snapshot([node("a", cpus=3)])
    step, after = advance(before, ask(2, cpus=2))
    assert isinstance(step.outcome, Unplaceable)
    assert after.node("id-a").cpu_milli == 3000
    assert step.seen.node("id-a").cpu_milli == 1000, "as the refused replica found it"
    assert step.request.standing == {"id-a": 1}


def test_what_stands_counts_towards_the_refusal() -> None:
    step, _ = advance(Snapshot([node("a", gpus=2), node("b", gpus=1)]), ask(4, standing={"id-b": 2}))
    assert isinstance(step.outcome, Unplaceable)
    assert step.request.standing == {"id-a": 2, "id-b": 3}


def remote(replicas: int, units: int) -> Request:
    return Request("r", tuple(range(replicas)), provider="openai", key="k", egress=units)


def test_egress_is_used_up_by_earlier_replicas_and_given_back() -> None:
    before = Snapshot([Node("id-e", "e", egress={"egress": 5, "egress_gemini": 9})])
    step, after = advance(before, remote(2, 2))
    assert isinstance(step.outcome, Plan)
    assert [(one.egress_resource, one.egress_units) for one in step.outcome.replicas] == [("egress", 2)] * 2
    assert after.node("id-e").egress == {"egress": 1, "egress_gemini": 9}
    assert after.node("id-e").serving == {("openai", "k"): 2}
    assert vacate(after, step.outcome.replicas).node("id-e").egress == {"egress": 5, "egress_gemini": 9}
    refused = plan(before, remote(3, 2))
    assert isinstance(refused, Unplaceable)
    assert "replica 2 needs 2 concurrent requests to openai on one node; at best e has 1 free" in str(refused)


def test_every_remote_replica_of_the_request_counts_for_spreading() -> None:
    _, after = advance(Snapshot([Node("id-a", "a", egress={"egress": 20})]), remote(1, 1))
    nodes = [after.node("id-a"), Node("id-b", "b", egress={"egress": 9})]  # a serves the same key
    asked = replace(remote(3, 1), standing={"id-a": 2})
    assert where(plan(Snapshot(nodes), asked)) == ["b", "b", "a"]
