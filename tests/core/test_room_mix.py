"""What the policy ``fragmentation`` knows of the mix: means of a kind, parts of GPUs, several kinds at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement import topologies
from placement.core.mix import Kind, Mix
from placement.core.needs import GIB, WHOLE, Needs, Within
from placement.core.node import Choice, Node
from placement.core.planner import advance, plan
from placement.core.policy import Policy
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.room import Room, room_of, ways
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology

FOUR = Topology.unknown(4)


def node(name: str, free: str = "0123", cpus: float = 64, memory_gib: float = 512, **more: object) -> Node:
    return Node(
        name,
        name,
        topology=FOUR,
        free=frozenset(map(int, free)),
        cpu_milli=int(cpus * 1000),
        memory_bytes=int(memory_gib * GIB),
        **more,  # type: ignore[arg-type]
    )


def ask(
    gpus: int = 1,
    cpus: float = 0,
    memory_gib: float = 0,
    replicas: int = 1,
    share: int = WHOLE,
    **more: object,
) -> Request:
    return Request(
        "d",
        tuple(range(replicas)),
        Needs(gpus, share=share),
        policy=Policy.FRAGMENTATION,
        cpu_milli=int(cpus * 1000),
        memory_bytes=int(memory_gib * GIB),
        **more,  # type: ignore[arg-type]
    )


def where(nodes: list[Node], request: Request, *others: Request) -> list[str]:
    mix = Mix()
    for other in others:
        mix = mix.plus(other)
    outcome = plan(Snapshot(nodes, mix=mix), request)
    assert isinstance(outcome, Plan), outcome
    return [replica.node_id for replica in outcome.replicas]


@pytest.mark.parametrize("resource", ["cpus", "memory_gib"])
def test_cpus_and_memory_of_a_kind_count_by_their_mean(resource: str) -> None:
    """Pairs with 8 CPUs each, asked for three times, fit on either node, and a single GPU with one breaks none on b."""
    pairs = ask(2, replicas=3, **{resource: 8})
    nodes = [node("a", **{resource: 16}), node("b", "012", **{resource: 16})]  # type: ignore[arg-type]
    assert where(nodes, ask(**{resource: 0.5}), pairs) == ["b"]  # type: ignore[arg-type]
    poor = [node("a", "012", **{resource: 7}), node("b", "012", **{resource: 16})]
    assert where(poor, ask(1), pairs) == ["a"], "too little for a pair there: nobody misses the GPU"
    assert where(poor[::-1], ask(1), pairs) == ["a"]


@pytest.mark.parametrize("resource", ["cpus", "memory_gib"])
def test_a_replica_goes_only_where_there_is_as_much_as_it_takes(resource: str) -> None:
    nodes = [node("a", **{resource: 7.999}), node("b", **{resource: 8})]  # type: ignore[arg-type]
    assert where(nodes, ask(**{resource: 8})) == ["b"]
    assert where(nodes, ask(2, **{resource: 4}, replicas=3)).count("b") == 2


def test_what_is_asked_for_more_often_counts_more() -> None:
    """T4 and G2 are both wanted by name; the free choice goes to the one that fewer want."""
    nodes = [node(name, accelerators=frozenset([name])) for name in ("G2", "T4")]
    g2, t4 = (ask(accelerators=(name,)) for name in ("G2", "T4"))
    assert where(nodes, ask(), g2, t4, t4) == ["G2"]
    assert where(nodes, ask(), g2, g2, t4) == ["T4"]
    assert where(nodes, ask(), g2, replace(t4, replicas=(0, 1))) == ["G2"]


def test_a_kind_counts_more_the_smaller_its_share() -> None:
    """A quarter of one model is asked for as often as a whole GPU of the other."""
    nodes = [node(name, accelerators=frozenset([name])) for name in ("G2", "T4")]
    assert where(nodes, ask(), ask(share=250, accelerators=("G2",)), ask(accelerators=("T4",))) == ["T4"]
    assert where(nodes, ask(), ask(accelerators=("G2",)), ask(share=250, accelerators=("T4",))) == ["G2"]


def test_memory_of_a_gpu_is_a_share_of_the_largest_that_the_kind_may_have() -> None:
    nodes = [node(f"{gib}", gpu_memory_bytes=gib * GIB) for gib in (40, 80)]
    snapshot = Snapshot(nodes)
    room = Room(snapshot)
    anywhere = Request("d", (0,), Needs(1, memory_bytes=20 * GIB))
    assert room._share(Kind.of(anywhere)) == 250
    assert room._share(Kind.of(replace(anywhere, gpu_nodes=("40",)))) == 500
    assert room._share(Kind.of(ask(share=300))) == 300


def test_the_room_of_a_cluster_is_handed_on_and_follows_it() -> None:
    snapshot = Snapshot([node("a"), node("b")])
    room = room_of(snapshot)
    assert room_of(snapshot) is room
    step, later = advance(snapshot, ask(3))
    assert isinstance(step.outcome, Plan)
    assert later.room is room and snapshot.room is None
    [taken] = step.outcome.replicas
    _, after = advance(later, ask(3))
    [second] = advance(later, ask(3))[0].outcome.replicas  # type: ignore[union-attr]
    assert {taken.node_id, second.node_id} == {"a", "b"}
    assert after.nodes != later.nodes


# -- ways and copies ---------------------------------------------------------------------------------

SHARED = node(
    "s", "23", rests={0: 700, 1: 250}, gpu_memory_bytes=80 * GIB, free_memory={0: GIB, 2: 9 * GIB, 3: 9 * GIB}
)
SLOTS = {0: "1g.10gb", 1: "1g.10gb", 2: "3g.40gb"}
CUT_UP = node("c", "3", slots=SLOTS, instances=SLOTS, free_memory={0: GIB, 1: 9 * GIB})
EQUAL = node("f", "", rests={0: 300, 1: 300, 2: 600})
BRIDGED = Node("p", "p", topology=topologies.load("a100-pcie-4x"), free=frozenset({0, 2, 3}))


@pytest.mark.parametrize(
    ("there", "needs", "expected"),
    [
        (SHARED, Needs(1, share=250), [Choice((1,), 250, 0), Choice((0,), 250, 450), Choice((2,), 250, 750)]),
        (SHARED, Needs(1, share=701), [Choice((2,), 701, 299)]),
        (SHARED, Needs(1, memory_bytes=40 * GIB), [Choice((0,), 500, 200), Choice((2,), 500, 500)]),
        (SHARED, Needs(1, memory_bytes=80 * GIB), [Choice((2,), WHOLE, 0)]),
        (SHARED, Needs(1, memory_bytes=81 * GIB), []),
        (SHARED, Needs(1, share=250, free_memory_bytes=2 * GIB), [Choice((2,), 250, 750)]),
        (SHARED, Needs(2), [Choice((2, 3), WHOLE, 0)]),
        (SHARED, Needs(3), []),
        (CUT_UP, Needs(1, profile="1g.10gb"), [Choice((0,), WHOLE, 0)]),
        (CUT_UP, Needs(1, profile="7g.80gb"), []),
        (BRIDGED, Needs(2, min_bandwidth_gb_per_s=230.4), [Choice((2, 3), WHOLE, 0)]),
        (BRIDGED, Needs(2, min_bandwidth_gb_per_s=231.0), []),
        (EQUAL, Needs(1, share=300), [Choice((0,), 300, 0), Choice((2,), 300, 300)]),
    ],
)  # fmt: skip
def test_what_may_be_taken(there: Node, needs: Needs, expected: list[Choice]) -> None:
    assert list(ways(there, needs)) == expected


@pytest.mark.parametrize(
    ("there", "needs", "expected"),
    [
        (SHARED, Needs(1, share=250), 2 + 1 + 2 * 4),
        (SHARED, Needs(1, share=251), 2 + 0 + 2 * 3),
        (SHARED, Needs(1, share=250, free_memory_bytes=2 * GIB), 2 * 4),
        (SHARED, Needs(1, memory_bytes=81 * GIB), 0),
        (SHARED, Needs(1, memory_bytes=80 * GIB), 2),
        (SHARED, Needs(2), 1),
        (CUT_UP, Needs(1, profile="1g.10gb"), 2),
        (CUT_UP, Needs(1), 1),
        (BRIDGED, Needs(2), 1),
        (BRIDGED, Needs(2, Within.NVLINK), 1),
        (replace(BRIDGED, free=frozenset({0, 2})), Needs(2, Within.NVLINK), 0),
    ],
)
def test_how_often_that_goes(there: Node, needs: Needs, expected: int) -> None:
    assert there.copies(needs) == expected
