"""Who may be beside whom: counted on every node, of GPU replicas and remote ones alike."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.core.explanation import explain
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.planner import advance, plan, vacate
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import NoEgressNodes, NoGpuNodes


def node(name: str, *deployments: str, gpus: int = 2) -> Node:
    return Node(
        id=name,
        name=name,
        topology=Topology.unknown(gpus),
        free=frozenset(range(gpus)),
        egress={"egress": 8},
        deployments=dict.fromkeys(deployments, 1),
    )


def ask(name: str, replicas: int = 1, remote: bool = False, **limits: tuple[str, ...]) -> Request:
    request = Request(name, tuple(range(replicas)), Needs(1), **limits)  # type: ignore[arg-type]
    return replace(request, provider="openai", key=name, egress=2) if remote else request


def where(outcome: object) -> list[str]:
    assert isinstance(outcome, Plan), outcome
    return [replica.node_id for replica in outcome.replicas]


@pytest.mark.parametrize("remote", [False, True], ids=["on GPUs", "remote"])
def test_a_deployment_is_on_a_node_until_its_last_replica_leaves(remote: bool) -> None:
    request = ask("d", 3, remote)
    step, after = advance(Snapshot((node("n", gpus=4),)), request)
    assert isinstance(step.outcome, Plan)
    calls = {("openai", "d"): 3} if remote else {}
    assert (after.node("n").deployments, after.node("n").serving) == ({"d": 3}, calls)
    first, *others = step.outcome.replicas
    after = vacate(after, [first], "d", request.calls)
    assert after.node("n").deployments == {"d": 2}
    after = vacate(after, others, "d", request.calls)
    assert (after.node("n").deployments, after.node("n").serving) == ({}, {})


def test_a_replica_of_several_sets_on_a_node_is_one() -> None:
    step, after = advance(Snapshot((node("n", gpus=4),)), replace(ask("d"), stages=2, needs=Needs(2)))
    assert isinstance(step.outcome, Plan)
    assert after.node("n").deployments == {"d": 1}
    assert vacate(after, step.outcome.replicas, "d").node("n").deployments == {}


@pytest.mark.parametrize("first_is_remote", [False, True], ids=["from GPUs", "from remote"])
@pytest.mark.parametrize("remote", [False, True], ids=["GPUs", "remote"])
def test_apart_near_and_kept_away_hold_for_both_kinds(first_is_remote: bool, remote: bool) -> None:
    _, snapshot = advance(Snapshot((node("a", gpus=4), node("b", gpus=4))), ask("first", 1, first_is_remote))
    [taken] = [one.id for one in snapshot.nodes if "first" in one.deployments]
    [other] = {"a", "b"} - {taken}
    assert where(plan(snapshot, ask("d", 2, remote, apart_from=("first",)))) == [other, other]
    assert where(plan(snapshot, ask("d", 2, remote, kept_away_by=("first",)))) == [other, other]
    assert where(plan(snapshot, ask("d", 2, remote, near_to=("first",)))) == [taken, taken]


@pytest.mark.parametrize(("remote", "kind"), [(False, NoGpuNodes), (True, NoEgressNodes)])
def test_a_refusal_says_who_keeps_whom_away(remote: bool, kind: type[Exception]) -> None:
    snapshot = Snapshot((node("a", "x"), node("b", "y")))
    refusal = plan(snapshot, ask("d", 1, remote, kept_away_by=("x",), near_to=("x",)))
    assert isinstance(refusal, kind)
    assert refusal.excluded == {
        "has a replica of 'x', which is to be apart from this one": 1,
        "has no replica of 'x'": 1,
    }
    why = explain(snapshot, ask("d", 1, remote, apart_from=("x",), kept_away_by=("y",)))
    assert [stage.name for stage in why.stages][-2:] == ["apart from x", "y keeps apart"]


def test_what_leaves_a_node_is_no_longer_kept_apart_from_there() -> None:
    without = vacate(Snapshot((node("n", "a"),)), [PlannedReplica(0, "n", (1,))], "a")
    assert where(plan(without, ask("b", apart_from=("a",)))) == ["n"]
