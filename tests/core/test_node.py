"""What one node offers, and what it is once something is taken or given back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.core.needs import GIB, WHOLE, Needs
from placement.core.node import Choice, Node
from placement.core.shape import Offer
from placement.core.topology import Topology

FOUR = Topology.unknown(4)

SHARED = Node("n", "n", topology=FOUR, free=frozenset({2, 3}), rests={0: 600, 1: 250})
MEMORY = replace(SHARED, gpu_memory_bytes=80 * GIB, free_memory={0: 10 * GIB, 1: 70 * GIB, 3: 70 * GIB})
SLOTS = {0: "1g.10gb", 1: "1g.10gb", 2: "3g.40gb"}
CUT_UP = Node(
    "m", "m", topology=FOUR, free=frozenset({3}), slots=SLOTS, instances={1: "1g.10gb", 2: "3g.40gb"},
    free_memory={1: 9 * GIB, 2: 30 * GIB, 3: 70 * GIB},
)  # fmt: skip


def unused(gib: int, **fields: object) -> Needs:
    return Needs(1, free_memory_bytes=gib * GIB, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "node", "needs", "expected"),
    [
        ("a share: where it leaves the least", SHARED, Needs(1, share=200), Choice((1,), 200, 50)),
        ("just so much is left", SHARED, Needs(1, share=250), Choice((1,), 250, 0)),
        ("the fullest has too little", SHARED, Needs(1, share=251), Choice((0,), 251, 349)),
        ("no shared GPU has so much: a whole one", SHARED, Needs(1, share=601), Choice((2,), 601, 399)),
        ("whole GPUs are not those that are shared", SHARED, Needs(2), Choice((2, 3), WHOLE, 0)),
        ("and not more than are free", SHARED, Needs(3), None),
        ("memory is a share", MEMORY, Needs(1, memory_bytes=20 * GIB), Choice((1,), 250, 0)),
        ("of a size that nobody knows it is none", SHARED, Needs(1, memory_bytes=GIB), None),
        ("free memory counts on a shared GPU", MEMORY, unused(70, share=200), Choice((1,), 200, 50)),
        ("and keeps it off", MEMORY, unused(11, share=300), Choice((3,), 300, 700)),
        ("a free GPU whose memory is unknown is passed over", MEMORY, unused(1), Choice((3,), WHOLE, 0)),
        ("too little is free anywhere", MEMORY, unused(71, share=300), None),
        ("an instance of that profile", CUT_UP, Needs(1, profile="1g.10gb"), Choice((1,), WHOLE, 0)),
        ("with the memory that is asked", CUT_UP, unused(30, profile="3g.40gb"), Choice((2,), WHOLE, 0)),
        ("or none", CUT_UP, unused(10, profile="1g.10gb"), None),
        ("a profile that it has not", CUT_UP, Needs(1, profile="7g.80gb"), None),
        ("a whole GPU beside instances", CUT_UP, Needs(1), Choice((3,), WHOLE, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)  # fmt: skip
def test_what_a_node_gives(case: str, node: Node, needs: Needs, expected: Choice | None) -> None:
    assert node.choose(needs) == expected
    assert node.best(needs) == (None if expected is None else expected.gpus)
    assert (node.offer(needs) is None) == (expected is None)


def test_of_equal_rests_a_gpu_without_a_replica_of_the_same_deployment_is_taken() -> None:
    equal = replace(SHARED, rests={0: 600, 1: 600})
    assert equal.choose(Needs(1, share=100)) == Choice((0,), 100, 500)
    assert equal.choose(Needs(1, share=100), crowded=(0,)) == Choice((1,), 100, 500)
    assert equal.choose(Needs(1, share=100), crowded=(0, 1)) == Choice((0,), 100, 500)
    fuller = replace(SHARED, rests={0: 500, 1: 600})
    assert fuller.choose(Needs(1, share=100), crowded=(0,)) == Choice((0,), 100, 400), "it would cost room"


@pytest.mark.parametrize(
    ("node", "needs", "expected"),
    [
        (SHARED, Needs(1, share=200), Offer(0, (-1, -1, -1), 50, 2)),  # less than any whole GPU costs
        (SHARED, Needs(1, share=700), Offer(0, (0, 0, 100), 300, 2)),
        (SHARED, Needs(2), Offer(-100, (0, 0, 100), 0, 2)),
        (CUT_UP, Needs(1, profile="1g.10gb"), Offer(0, (), 0, 2)),
        (CUT_UP, Needs(1), Offer(0, (0, 0, 0), 0, 1)),
    ],
)
def test_what_that_costs_others(node: Node, needs: Needs, expected: Offer) -> None:
    assert node.offer(needs) == expected


@pytest.mark.parametrize(
    ("node", "needs"),
    [
        (SHARED, Needs(1, share=200)),
        (SHARED, Needs(1, share=700)),
        (SHARED, Needs(2)),
        (CUT_UP, Needs(1, profile="3g.40gb")),
        (CUT_UP, Needs(1)),
    ],
)
def test_what_is_taken_and_given_back_leaves_the_node_as_it_was(node: Node, needs: Needs) -> None:
    taken = node.choose(needs)
    assert taken is not None
    after = node.after(taken)
    assert after != node
    assert after.before(dict.fromkeys(taken.gpus, taken.share), needs.profile) == node


def test_a_share_is_taken_off_the_rest_of_its_gpu_and_of_no_other() -> None:
    after = SHARED.after(Choice((1,), 200, 50))
    assert (after.free, after.rests) == ({2, 3}, {0: 600, 1: 50})
    after = SHARED.after(Choice((3,), 700, 300))
    assert (after.free, after.rests) == ({2}, {0: 600, 1: 250, 3: 300})
    assert SHARED.after(Choice((), WHOLE, 0)) is SHARED
    after = CUT_UP.after(Choice((2,), WHOLE, 0))
    assert (after.free, after.instances) == ({3}, {1: "1g.10gb"})


def test_a_gpu_is_free_again_when_the_last_share_of_it_has_left() -> None:
    assert SHARED.before({0: 300}, "").rests == {0: 900, 1: 250}
    whole = SHARED.before({0: 400}, "")
    assert (whole.free, whole.rests) == ({0, 2, 3}, {1: 250})
    part = replace(SHARED, rests={}).before({0: 400}, "")
    assert (part.free, part.rests) == ({2, 3}, {0: 400})


def test_whole_gpus_and_profiles_are_those_of_the_machine_not_of_what_is_free() -> None:
    assert (SHARED.whole_gpus, SHARED.profiles) == (4, frozenset())
    assert (CUT_UP.whole_gpus, CUT_UP.profiles) == (1, {"1g.10gb", "3g.40gb"})
    unknown = replace(CUT_UP, slots={0: "?", 1: "1g.10gb"})
    assert (unknown.whole_gpus, unknown.profiles) == (2, {"1g.10gb"})


def test_what_is_lost_is_held_by_nobody_and_gives_nothing_back() -> None:
    assert SHARED.held == {0, 1}
    assert CUT_UP.held == {0}
    lost = replace(CUT_UP, slots={**SLOTS, 0: "?", 3: "?"}, free=frozenset())
    assert lost.held == frozenset()
    assert lost.emptied() is lost
    assert replace(lost, instances={1: "1g.10gb"}).held == {2}


def test_a_node_goes_by_id_name_and_address() -> None:
    node = Node("id", "name", "10.0.0.1")
    assert [node.named(name) for name in ("id", "name", "10.0.0.1", "", "i")] == [True] * 3 + [False] * 2


def test_the_resource_of_the_provider_goes_before_the_general_one() -> None:
    both = Node("e", "e", egress={"egress": 1, "egress_openai": 1})
    assert [both.egress_resource(one) for one in ("openai", "gemini")] == ["egress_openai", "egress"]
    assert Node("e", "e", egress={"egress_openai": 1}).egress_resource("gemini") is None
