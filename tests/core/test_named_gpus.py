"""GPUs that are named: just these, on one node, and why not, if they cannot be had."""

from __future__ import annotations

from typing import Any

import pytest

from placement import topologies
from placement.core.explanation import explain
from placement.core.mix import Mix
from placement.core.needs import ANY_PROFILE, GpuName, Needs, Within
from placement.core.node import Node
from placement.core.planner import advance, plan, vacate
from placement.core.policy import Policy
from placement.core.reconcile import Desired, Observed, Reserve, Wait, outcome, reconcile
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.staying import staying
from placement.errors import BelowFloor, NoGpuNodes, NotEnoughGpus, Unplaceable

PAIRS = topologies.load("a100-pcie-4x")
"""Four GPUs, bridged in pairs: 0-1 and 2-3."""


def node(name: str, free: str = "0123", **fields: Any) -> Node:
    uuids = {gpu: f"GPU-{name}-{gpu}" for gpu in range(4)}
    return Node(f"id-{name}", name, topology=PAIRS, free=frozenset(map(int, free)), uuids=uuids, **fields)


def request(*named: GpuName, gpus: int = 1, replicas: int = 1, fields: Any = None, **needs: Any) -> Request:
    return Request("d", tuple(range(replicas)), Needs(gpus, named=named, **needs), **(fields or {}))


def where(outcome: Plan | Unplaceable) -> list[tuple[str, tuple[int, ...]]]:
    assert isinstance(outcome, Plan), outcome
    return [(one.node_id[3:], one.gpus) for one in outcome.replicas]


@pytest.mark.parametrize(
    ("case", "nodes", "asked", "expected"),
    [
        (
            "just these, although others are faster",
            [node("a")],
            request(1, 2, gpus=2),
            [("a", (1, 2))],
        ),
        (
            "on the first node where they are free",
            [node("a", "023"), node("b")],
            request(0, 1, gpus=2),
            [("b", (0, 1))],
        ),
        (
            "a UUID says which node",
            [node("a"), node("b")],
            request("GPU-b-3"),
            [("b", (3,))],
        ),
        (
            "by ordinal and by UUID",
            [node("a"), node("b")],
            request(0, "GPU-b-1", gpus=2),
            [("b", (0, 1))],
        ),
        (
            "replicas share out what is named",
            [node("a"), node("b")],
            request(1, 2, 3, replicas=3),
            [("a", (1,)), ("a", (2,)), ("a", (3,))],
        ),
        (
            "all of them on one node, though the other has room for one",
            [node("a", "1"), node("b", "12")],
            request(1, 2, replicas=2),
            [("b", (1,)), ("b", (2,))],
        ),
        (
            "the best two of three",
            [node("a")],
            request(1, 2, 3, gpus=2),
            [("a", (2, 3))],
        ),
        (
            "as floors demand, not the best set first where that is in the way of others",
            [node("a")],
            request(0, 1, 2, 3, gpus=2, replicas=2, within=Within.NVLINK),
            [("a", (0, 1)), ("a", (2, 3))],
        ),
        (
            "shares of just that GPU",
            [node("a", "123", rests={0: 500})],
            request(2, replicas=2, share=500),
            [("a", (2,)), ("a", (2,))],
        ),
        (
            "a MIG instance by its profile or by its UUID alone",
            [node("a", "01", slots={2: "1g.10gb", 3: "3g.40gb"}, instances={2: "1g.10gb", 3: "3g.40gb"})],
            request("GPU-a-3", profile=ANY_PROFILE),
            [("a", (3,))],
        ),
        (
            "beside the replicas that stand",
            [node("a"), node("b")],
            request(1, 2, fields={"standing": {"id-b": 1}}),
            [("b", (1,))],
        ),
        (
            "on the fullest node, by the policy",
            [node("a"), node("b", "123")],
            request(2, fields={"policy": Policy.PACK}),
            [("b", (2,))],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_just_these_gpus(
    case: str, nodes: list[Node], asked: Request, expected: list[tuple[str, tuple[int, ...]]]
) -> None:
    assert where(plan(Snapshot(nodes), asked)) == expected


def test_pipeline_stages_lie_on_the_node_whose_slowest_set_is_fastest() -> None:
    slow = Node("id-a", "a", topology=topologies.load("dgx-1v"), free=frozenset(range(8)))
    fast = Node("id-b", "b", topology=topologies.load("dgx-h100"), free=frozenset(range(8)))
    asked = request(0, 3, 4, 5, gpus=2, fields={"stages": 2})
    assert {name for name, _ in where(plan(Snapshot([slow, fast]), asked))} == {"b"}


@pytest.mark.parametrize(
    ("nodes", "asked", "error", "text"),
    [
        (
            [node("a", "013", holders={2: ("whisper",)})],
            request(2, 3, gpus=2),
            NotEnoughGpus,
            "replica 0 needs 2 GPUs of GPU 2-3 free on one node; at best a has 1 of them free: GPU 2 is held by "
            "'whisper' (1 node: has fewer than 2 of GPU 2-3 free); release something, name other GPUs, or ask for "
            "fewer GPUs",
        ),
        (
            [node("a", "013"), node("b", "")],
            request("GPU-a-2"),
            NotEnoughGpus,
            "replica 0 needs 1 GPU of GPU-a-2 free on one node; at best a has none of them free: GPU-a-2 is held by "
            "another Ray user (1 node: has no GPU-a-2, 1 node: has none of GPU-a-2 free)",
        ),
        (
            [node("a", "013", rests={2: 250}, holders={2: ("x", "x", "y")})],
            request(2, share=500),
            NotEnoughGpus,
            "GPU 2 is held by 'x' and 'y', 0.25 of it is left",
        ),
        (
            [node("a"), node("b")],
            request("GPU-a-0", "GPU-b-0"),
            NoGpuNodes,
            "no node has GPU-a-0, GPU-b-0 for it (1 node: has no GPU-a-0, 1 node: has no GPU-b-0); name GPUs of one "
            "node; `placement status --json` shows which there are",
        ),
        (
            [node("a", "01", slots={2: "1g.10gb", 3: "?"}, instances={2: "1g.10gb"})],
            request(2),
            NoGpuNodes,
            "its GPU 2 is a MIG instance 1g.10gb",
        ),
        (
            [node("a", "01", slots={2: "1g.10gb", 3: "?"}, instances={2: "1g.10gb"})],
            request(3, profile=ANY_PROFILE),
            NoGpuNodes,
            "its GPU 3 cannot be used",
        ),
        ([node("a")], request(1, profile="1g.10gb"), NoGpuNodes, "its GPU 1 is no MIG instance"),
        (
            [node("a")],
            request(1, 2, gpus=2, within=Within.NVLINK),
            BelowFloor,
            "at best a has 2 GPUs, but in NVLink islands of 1 + 1",
        ),
        (
            [node("a"), node("b", "")],
            request(1, 2, fields={"standing": {"id-b": 1}}),
            NotEnoughGpus,
            "1 node: other replicas have GPUs of another node",
        ),
        (
            [node("a", "0"), node("b", "1")],
            request(0, 1, fields={"stages": 2}),
            NotEnoughGpus,
            "there is room for 1",
        ),
    ],
)  # fmt: skip
def test_why_not(nodes: list[Node], asked: Request, error: type[Unplaceable], text: str) -> None:
    refusal = plan(Snapshot(nodes), asked)
    assert isinstance(refusal, error), refusal
    assert text in str(refusal)


def test_who_has_a_gpu_is_known_through_plans_and_forgotten_with_the_last() -> None:
    snapshot = Snapshot([node("a")])
    first, later = advance(snapshot, request(2, replicas=2, share=250))
    assert later.node("id-a").holders == {2: ("d", "d")}
    assert isinstance(first.outcome, Plan)
    other = Request("e", (0,), Needs(1, named=(2,)))
    assert "GPU 2 is held by 'd', 0.5 of it is left" in str(plan(later, other))
    assert "'d'" in explain(later, other).nearest_miss
    one_left = vacate(later, first.outcome.replicas[:1], "d")
    assert one_left.node("id-a").holders == {2: ("d",)}
    assert vacate(one_left, first.outcome.replicas[1:], "d").nodes == snapshot.nodes


def test_no_room_is_left_for_what_asks_for_just_these() -> None:
    assert Mix().plus(request(2)).kinds == {}
    assert len(Mix().plus(request()).kinds) == 1


def test_a_node_whose_gpus_are_read_anew_is_asked_anew() -> None:
    unread = Node("id-a", "a", topology=PAIRS, free=frozenset(range(4)))
    snapshot = Snapshot([unread])
    assert isinstance(plan(snapshot, request("GPU-a-1")), NoGpuNodes)
    assert where(plan(snapshot.followed([node("a")]), request("GPU-a-1"))) == [("a", (1,))]


# -- declared anew -----------------------------------------------------------------------------------


def standing_on(*gpus: int, name: str = "a") -> tuple[Snapshot, dict[int, Any]]:
    """Replicas of one GPU each on a node, and the cluster with them."""
    asked = request(*gpus, replicas=len(gpus), fields={"gpu_nodes": (name,)})
    step, later = advance(Snapshot([node("a"), node("b")]), asked)
    assert isinstance(step.outcome, Plan)
    return later, {one.replica_index: (one,) for one in step.outcome.replicas}


@pytest.mark.parametrize(
    ("named", "stay"),
    [
        ((1, 2, 3), [0, 1]),
        ((2,), [1]),
        ((0,), []),
        (("GPU-a-1", "GPU-a-2"), [0, 1]),
        (("GPU-b-1", "GPU-b-2"), []),
        ((), [0, 1]),
    ],
)
def test_who_has_gpus_that_are_named_now_stays(named: tuple[GpuName, ...], stay: list[int]) -> None:
    snapshot, replicas = standing_on(1, 2)
    assert staying(snapshot, replicas, request(replicas=2), request(*named, replicas=2)) == stay


def test_of_replicas_on_two_nodes_only_those_on_one_stay() -> None:
    nodes = [node("a", "0123"), node("b", "0123")]
    step, later = advance(Snapshot(nodes), request(replicas=2))
    assert isinstance(step.outcome, Plan)
    replicas = {one.replica_index: (one,) for one in step.outcome.replicas}
    assert {one.node_id for (one,) in replicas.values()} == {"id-a", "id-b"}
    assert staying(later, replicas, request(replicas=2), request(0, 1, replicas=2)) == [0]


def test_other_gpus_are_had_beside_or_instead_of_the_old_ones() -> None:
    snapshot, replicas = standing_on(1, 2)
    before = request(1, 2, replicas=2)
    observed = {index: Observed(parts, before) for index, parts in replicas.items()}
    for named, on in (((0, 3), {0, 3}), ((2, 3), {2, 3})):
        desired = Desired(request(*named, replicas=2))
        decision = reconcile(desired, observed, snapshot)
        assert any(isinstance(action, Reserve) for action in decision.actions)
        there = outcome(desired, observed, decision.actions)
        assert {gpu for one in there.values() for part in one.parts for gpu in part.gpus} == on
        assert {part.node_id for one in there.values() for part in one.parts} == {"id-a"}


def test_a_replica_more_waits_for_the_node_of_the_others() -> None:
    snapshot, replicas = standing_on(1)
    snapshot = snapshot.changed([node("a", "03", holders={1: ("d",), 2: ("x",)})])
    observed = {index: Observed(parts, request(1, 2)) for index, parts in replicas.items()}
    decision = reconcile(Desired(request(1, 2, replicas=2)), observed, snapshot)
    [wait] = decision.actions
    assert isinstance(wait, Wait) and wait.indices in ((0, 1), (1,))


def test_a_node_with_the_gpus_but_not_the_memory_hides_no_other() -> None:
    """The first has GPUs for one replica and a half, and memory for none; the second both for one."""
    nodes = [node("a", "012", memory_bytes=1), node("b", "01", memory_bytes=4)]
    wanted = request(0, 1, 2, replicas=2, fields={"stages": 2, "memory_bytes": 1})
    outcome = plan(Snapshot(nodes), wanted)
    assert isinstance(outcome, NotEnoughGpus)
    assert str(outcome).startswith(
        "cannot place 'd': replica 1 needs 2 GPUs of GPU 0-2 free on one node; at best b"
    )
