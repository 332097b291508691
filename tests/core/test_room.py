"""The policy ``fragmentation``: room by hand, and the choice against all choices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.mix import Kind, Mix
from placement.core.needs import GIB, WHOLE, Needs, Within
from placement.core.node import Node
from placement.core.planner import advance, plan, vacate
from placement.core.policy import Policy
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.room import Room, ways
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology

FOUR = Topology.unknown(4)


def node(
    name: str, free: str = "0123", rests: dict[int, int] | None = None, cpus: int = 64, **more: object
) -> Node:
    return Node(
        name,
        name,
        topology=FOUR,
        free=frozenset(map(int, free)),
        rests=rests or {},
        cpu_milli=cpus * 1000,
        memory_bytes=512 * GIB,
        **more,  # type: ignore[arg-type]
    )


def ask(share: int = WHOLE, gpus: int = 1, cpus: int = 0, **more: object) -> Request:
    return Request(
        "d",
        (0,),
        Needs(gpus, share=share),
        policy=Policy.FRAGMENTATION,
        cpu_milli=cpus * 1000,
        **more,  # type: ignore[arg-type]
    )


def mix_of(*requests: Request) -> Mix:
    mix = Mix()
    for request in requests:
        mix = mix.plus(request)
    return mix


def placed(nodes: list[Node], request: Request, *mix: Request) -> tuple[str, tuple[int, ...]]:
    outcome = plan(Snapshot(nodes, mix=mix_of(*mix)), request)
    assert isinstance(outcome, Plan)
    return outcome.replicas[0].node_id, outcome.replicas[0].gpus


@pytest.mark.parametrize(
    ("there", "needs", "expected"),
    [
        (node("a"), Needs(1), 4),
        (node("a"), Needs(3), 1),
        (node("a"), Needs(5), 0),
        (node("a"), Needs(1, share=300), 12),
        (node("a", "3", {0: 700, 1: 250, 2: 300}), Needs(1, share=300), 2 + 0 + 1 + 3),
        (node("a", gpu_memory_bytes=80 * GIB), Needs(1, memory_bytes=20 * GIB), 16),
        (node("a"), Needs(1, memory_bytes=20 * GIB), 0),  # nobody knows how large its GPUs are
        (
            node("a", "", instances={0: "1g.10gb", 1: "1g.10gb", 2: "3g.40gb"}),
            Needs(1, profile="1g.10gb"),
            2,
        ),
    ],
)
def test_how_often_needs_are_met_by_the_gpus_of_a_node(there: Node, needs: Needs, expected: int) -> None:
    assert expected == there.copies(needs)


def test_sets_that_must_be_close_are_counted_as_such() -> None:
    bridged = Node("a", "a", topology=topologies.load("a100-pcie-4x"), free=frozenset(range(4)))
    together = [set(gpus) for gpus in bridged.topology.islands]
    assert bridged.copies(Needs(2, Within.NVLINK)) == len(together) == 2
    one_of_each = frozenset(min(island) for island in together)
    assert replace(bridged, free=one_of_each).copies(Needs(2, Within.NVLINK)) == 0


def test_a_share_may_go_on_any_gpu_that_is_shared_or_on_one_more() -> None:
    there = node("a", "23", {0: 700, 1: 250})
    assert [way.gpus for way in ways(there, Needs(1, share=200))] == [(1,), (0,), (2,)]
    assert [way.gpus for way in ways(there, Needs(1, share=300))] == [(0,), (2,)]


def test_the_last_empty_node_is_left_to_those_who_need_all_of_it() -> None:
    nodes = [node("a-empty"), node("b-half", "01")]
    assert placed(nodes, ask(gpus=2), ask(gpus=4))[0] == "b-half"


def test_the_gpus_that_some_insist_on_are_left_to_them() -> None:
    nodes = [node("a-t4", accelerators=frozenset(["T4"])), node("b-any", accelerators=frozenset(["G2"]))]
    insists = ask(accelerators=("T4",))
    assert placed(nodes, ask(), ask())[0] == "a-t4"  # nobody does: the first
    assert placed(nodes, ask(), ask(), insists)[0] == "b-any"
    assert placed(nodes, insists, ask(), insists)[0] == "a-t4"


def test_gpus_with_few_cpus_beside_them_are_taken_by_those_who_need_few() -> None:
    nodes = [node("a-many", cpus=128), node("b-few", cpus=8)]
    heavy, light = ask(cpus=30), ask(cpus=1)
    assert placed(nodes, light, heavy, light)[0] == "b-few"
    assert placed(nodes, heavy, heavy, light)[0] == "a-many"


def test_a_share_fills_the_gap_that_fewest_others_could_use() -> None:
    there = [node("a", "3", {0: 300, 1: 500, 2: 700})]
    small, middle = ask(300), ask(500)
    assert placed(there, small, small, middle)[1] == (0,)
    assert placed(there, middle, small, middle)[1] == (1,)


def test_the_fastest_set_comes_first() -> None:
    fast = Node("b", "b", topology=topologies.load("dgx-h100"), free=frozenset(range(8)))
    slow = Node("a", "a", topology=topologies.load("l40s-4x"), free=frozenset(range(2)))
    assert placed([slow, fast], ask(gpus=2), ask(gpus=8))[0] == "b"


def test_replicas_spread_over_a_label_as_under_other_policies() -> None:
    nodes = [node(name, labels={"zone": name[0]}) for name in ("a1", "a2", "b1")]
    request = replace(ask(), replicas=(0, 1), spread_label="zone", max_per_domain=1)
    outcome = plan(Snapshot(nodes), request)
    assert isinstance(outcome, Plan)
    assert sorted(replica.node_id[0] for replica in outcome.replicas) == ["a", "b"]


def cut_up(name: str, *profiles: str, free: int, **more: object) -> Node:
    """A machine of MIG instances, on the first ``free`` of which memory is free."""
    slots = dict(enumerate(profiles))
    memory = {slot: (80 if slot < free else 10) * GIB for slot in slots}
    machine = Topology.unknown(len(slots))
    return Node(name, name, topology=machine, slots=slots, instances=slots, free_memory=memory, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("profile", "there"), [("1g.10gb", "a"), ("3g.40gb", "b")])
def test_it_matters_on_which_instance_memory_is_free(profile: str, there: str) -> None:
    nodes = [cut_up("a", "1g.10gb", "3g.40gb", free=1), cut_up("b", "3g.40gb", "1g.10gb", free=1)]
    asked = Request(
        "d", (0,), Needs(1, profile=profile, free_memory_bytes=40 * GIB), policy=Policy.FRAGMENTATION
    )
    assert placed(nodes, asked) == placed(nodes[::-1], asked) == (there, (0,))
    for one in nodes:
        alone = plan(Snapshot(nodes), replace(asked, gpu_nodes=(one.name,)))
        assert isinstance(alone, Plan) == (one.name == there)
        assert one.copies(asked.needs) == (one.name == there)


def test_it_matters_which_gpus_are_free_where_those_that_are_alike_take_turns() -> None:
    machine = replace(Topology.unknown(6), numa=((0,), (1,)) * 3)
    nodes = [Node(name, name, topology=machine, free=frozenset(gpus)) for name, gpus in
             [("a", {0, 1, 2, 3}), ("b", {1, 2, 3, 4})]]  # fmt: skip
    assert placed(nodes, replace(ask(gpus=2), gpu_nodes=("b",))) == ("b", (1, 3))


def test_what_fails_halfway_leaves_the_room_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot([node("a", cpus=8), node("b", cpus=8)])
    one = ask(gpus=3)
    first = plan(snapshot, one)
    choose, calls = Room.choose, []

    def fails_at_the_second(self: Room, *args: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return choose(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Room, "choose", fails_at_the_second)
        with pytest.raises(MemoryError):
            plan(snapshot, replace(one, replicas=(0, 1)))
    assert plan(snapshot, one) == first


# -- against all choices -------------------------------------------------------------------------------

SHARES = (200, 250, 400, 500, 700)


@st.composite
def nodes(draw: st.DrawFn) -> list[Node]:
    found = []
    for i in range(draw(st.integers(1, 4))):
        rests = draw(st.dictionaries(st.integers(0, 3), st.sampled_from((100, 300, 500, 750)), max_size=3))
        free = draw(st.frozensets(st.integers(0, 3))) - rests.keys()
        made = node(f"n{i}", "", rests, draw(st.sampled_from((4, 16, 64))))
        model = draw(st.sampled_from(("T4", "G2")))
        found.append(replace(made, free=free, accelerators=frozenset([model])))
    return found


@st.composite
def requests(draw: st.DrawFn) -> Request:
    gpus = draw(st.integers(1, 4))
    share = draw(st.sampled_from(SHARES)) if gpus == 1 and draw(st.booleans()) else WHOLE
    models = draw(st.sampled_from(((), (), ("T4",))))
    return ask(share, gpus, draw(st.sampled_from((0, 2, 8))), accelerators=models)


def room_on(there: Node, kind: Kind, cpus: float) -> float:
    if kind.accelerators and not there.accelerators & set(kind.accelerators):
        return 0.0
    room = min(there.copies(kind.needs), there.cpu_milli / cpus if cpus else float("inf"))
    return room if room >= 1 else 0.0


def cost(cluster: list[Node], mix: Mix, old: Node, new: Node) -> float:
    total = 0.0
    for kind, asked in mix.kinds.items():
        cpus = asked.cpu_milli / asked.sets
        everywhere = sum(room_on(there, kind, cpus) for there in cluster)
        if everywhere:
            lost = room_on(old, kind, cpus) - room_on(new, kind, cpus)
            total += asked.sets * lost / (everywhere * kind.needs.share / WHOLE)
    return total


@settings(max_examples=200, deadline=None)
@given(nodes(), requests(), st.lists(requests(), max_size=4))
def test_no_choice_costs_less(cluster: list[Node], request: Request, others: list[Request]) -> None:
    mix = mix_of(*others).plus(request)
    choices = {}
    for there in cluster:
        if there.cpu_milli >= request.cpu_milli and (
            not request.accelerators or there.accelerators & set(request.accelerators)
        ):
            for way in ways(there, request.needs):
                after = replace(there.after(way), cpu_milli=there.cpu_milli - request.cpu_milli)
                choices[there.id, way.gpus] = cost(cluster, mix, there, after)
    outcome = plan(Snapshot(cluster, mix=mix_of(*others)), request)
    assert isinstance(outcome, Plan) == bool(choices)
    if isinstance(outcome, Plan):
        [replica] = outcome.replicas
        assert choices[replica.node_id, replica.gpus] == pytest.approx(min(choices.values()), abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(nodes(), st.lists(st.one_of(requests(), st.integers(0, 9)), max_size=12))
def test_a_snapshot_that_came_about_step_by_step_plans_as_one_made_anew(
    cluster: list[Node], steps: list[Request | int]
) -> None:
    snapshot = Snapshot(cluster)
    standing: list[Any] = []
    for step in steps:
        if isinstance(step, int):
            if standing:
                snapshot = vacate(snapshot, standing.pop(step % len(standing)))
            continue
        anew = plan(Snapshot(snapshot.nodes[::-1], mix=snapshot.mix), step)
        done, snapshot = advance(snapshot, step)
        assert str(anew) == str(done.outcome)
        if isinstance(done.outcome, Plan):
            standing.append(done.outcome.replicas)
