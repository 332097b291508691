"""What is to be done for one deployment: tables, then all small cases there are."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.reconcile import (
    Action,
    Desired,
    Drop,
    Observed,
    Reserve,
    Wait,
    admit,
    reconcile,
)
from placement.core.replicas import PlannedReplica
from placement.core.request import Request
from placement.core.topology import Topology
from placement.errors import NotEnoughGpus
from tests.properties.rounds import World, checked, lost, waiting


def ask(gpus: int = 1, replicas: int = 1, **fields: Any) -> Request:
    return Request("d", tuple(range(replicas)), Needs(gpus), **fields)


def world(free: Mapping[str, str], there: Mapping[int, tuple[str, str, Request]] | None = None) -> World:
    """Nodes by their free GPUs, and what is there: index -> (node, GPUs, what was asked for)."""
    observed = {
        index: Observed((PlannedReplica(index, where, tuple(map(int, gpus))),), request)
        for index, (where, gpus, request) in (there or {}).items()
    }
    nodes = []
    for name, gpus in free.items():
        here = sum(part.node_id == name for one in observed.values() for part in one.parts)
        nodes.append(
            Node(
                name,
                name,
                topology=Topology.unknown(4),
                free=frozenset(map(int, gpus)),
                deployments={"d": here} if here else {},
            )
        )
    return World(nodes, observed)


def shown(actions: Sequence[Action]) -> list[str]:
    """Actions as a line each: ``drop 0``, ``+1 on b beside 1``, ``wait 2``."""
    lines = []
    for action in actions:
        if isinstance(action, Drop):
            lines.append(" ".join(["drop", str(action.index), *action.nodes]))
        elif isinstance(action, Reserve):
            where = ", ".join(f"+{part.replica_index} on {part.node_id}" for part in action.plan.replicas)
            lines.append(where + "".join(f" -{index}" for index in action.replaces))
        else:
            lines.append(" ".join([type(action).__name__.lower(), *map(str, action.indices)]))
    return lines


ONE, TWO, THREE = ask(1, 3), ask(2, 3), ask(3, 3)

TABLE = [
    ("all of a new one fits", {"a": "0123"}, {}, Desired(ONE), ["+0 on a, +1 on a, +2 on a"]),
    ("some of a new one fit", {"a": "01"}, {}, Desired(ONE), ["+0 on a", "+1 on a", "wait 2"]),
    ("a gang fits or waits", {"a": "01"}, {}, Desired(ONE, gang=True), ["wait 0 1 2"]),
    ("nothing to do", {"a": "3"}, {0: ("a", "0", ask())}, Desired(ask()), []),
    ("one more, one less", {"a": "3"}, {1: ("a", "0", ask())}, Desired(ask()), ["+0 on a -1"]),
    ("one less makes room", {"a": ""}, {1: ("a", "0", ask())}, Desired(ask()), ["release 1", "+0 on a"]),
    ("what is not wanted goes", {"a": ""}, {0: ("a", "0", ask()), 1: ("a", "1", ask())}, Desired(ask()),
     ["release 1"]),
    ("what is not wanted goes, even if the rest waits", {"a": "", "b": ""},
     {3: ("a", "0", ask()), 4: ("b", "0", ask())}, Desired(TWO), ["release 3 4", "wait 0 1 2"]),
    ("replaced beside", {"a": "23"}, {0: ("a", "0", ask())}, Desired(ask(2)), ["+0 on a -0"]),
    ("replaced in place", {"a": "2"}, {0: ("a", "0", ask())}, Desired(ask(2)), ["release 0", "+0 on a"]),
    ("what cannot be replaced stays", {"a": "", "b": "3"}, {0: ("a", "0", ask())}, Desired(ask(2)),
     ["wait 0"]),
    ("what is not wanted makes room for some", {"a": ""}, {2: ("a", "0", ask())}, Desired(ask(1, 2)),
     ["release 2", "+0 on a", "wait 1"]),
    ("one replaced, one not", {"a": "23", "b": ""},
     {0: ("a", "0", ask(1)), 1: ("b", "0", ask(1)), 2: ("b", "1", ask(1))}, Desired(TWO),
     ["+0 on a -0", "wait 1 2"]),
    ("what is replaced by less makes room for what is missing", {"a": ""}, {1: ("a", "012", ask(3))},
     Desired(replace(ONE, replicas=(0, 1, 2, 3))), ["release 1", "+1 on a", "+0 on a", "+2 on a", "wait 3"]),
    ("a node that died", {"a": "123"}, {0: ("gone", "0", ask(1, 2)), 1: ("a", "0", ask(1, 2))},
     Desired(ask(1, 2)), ["drop 0 gone", "+0 on a"]),
    ("a node that died, and no room", {"a": ""}, {0: ("gone", "0", ask(1, 2)), 1: ("a", "0", ask(1, 2))},
     Desired(ask(1, 2)), ["drop 0 gone", "wait 0"]),
    ("a declaration that asks for the same", {"a": "1"}, {0: ("a", "0", ask())},
     Desired(ask(1, 2, labels={})), ["+1 on a"]),
    ("others keep away from it now", {"a": "1"}, {0: ("a", "0", ask())}, Desired(ask(kept_away_by=("x",))), []),
    ("one that asks for the same otherwise", {"a": "1"}, {0: ("a", "0", ask())},
     Desired(ask(1, 2, accelerators=("A100",))), ["keep 0", "wait 1"]),
    ("released", {"a": "1"}, {0: ("a", "0", ask()), 7: ("gone", "0", ask())},
     Desired(ask(), releasing=True), ["release 0 7"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("what", "free", "there", "desired", "expected"), TABLE, ids=[row[0] for row in TABLE]
)
def test_what_is_to_be_done(
    what: str,
    free: Mapping[str, str],
    there: Mapping[int, tuple[str, str, Request]],
    desired: Desired,
    expected: list[str],
) -> None:
    decision, _ = checked(world(free, there), desired)
    assert shown(decision.actions) == expected


# -- all small cases -----------------------------------------------------------------------------------


def cases(sizes: Sequence[int], replicas: int) -> Iterator[World]:
    """All that can be there on nodes of so many GPUs, of which others hold some."""
    names = [chr(ord("a") + number) for number in range(len(sizes))]
    # Where a replica is, how many GPUs it holds, and whether its placement group is gone.
    places: list[tuple[str, int, bool] | None] = [None, ("dead", 1, False), (names[0], 1, True)]
    places += [(name, gpus, False) for name in names for gpus in (1, 2)]
    for chosen in itertools.product(places, repeat=replicas):
        for others in itertools.product(*(range(size + 1) for size in sizes)):
            left = {name: list(range(size)) for name, size in zip(names, sizes, strict=True)}
            for name, held in zip(names, others, strict=True):
                del left[name][:held]
            observed: dict[int, Observed] = {}
            for index, place in enumerate(chosen):
                if place is None:
                    continue
                where, gpus, gone = place
                free = left.get(where, [0, 1])
                if len(free) < gpus:
                    break
                taken = tuple(free[:gpus])
                del free[:gpus]
                observed[index] = Observed((PlannedReplica(index, where, taken),), ask(gpus), gone)
            else:
                nodes = []
                for name, size in zip(names, sizes, strict=True):
                    here = sum(one.parts[0].node_id == name for one in observed.values())
                    nodes.append(
                        Node(
                            name,
                            name,
                            topology=Topology.unknown(size),
                            free=frozenset(left[name]),
                            deployments={"d": here} if here else {},
                        )
                    )
                yield World(nodes, observed)


def room(world: World, gpus: int, without: Collection[int] = ()) -> int:
    """For how many replicas there is room once some have gone."""
    left = {node.id: len(node.free) for node in world.nodes}
    for index in without:
        for part in world.observed[index].parts:
            if part.node_id in left:
                left[part.node_id] += len(part.gpus)
    return sum(free // gpus for free in left.values())


@pytest.mark.parametrize(
    ("sizes", "replicas", "every"),
    [((2,), 3, 1), ((2, 2), 2, 1), ((3, 2), 2, 8), ((2, 4), 2, 8), ((4,), 3, 16), ((2, 2), 3, 16)],
)
def test_every_small_case(sizes: Sequence[int], replicas: int, every: int) -> None:
    """``ORACLE_EXAMPLES`` has it look at all of the larger ones, too, of which one in so many will do."""
    every = 1 if "ORACLE_EXAMPLES" in os.environ else every
    for start in itertools.islice(cases(sizes, replicas), 0, None, every):
        for wanted, gpus in itertools.product(range(1, replicas + 2), (1, 2)):
            request = ask(gpus, wanted)
            assert_default(start, request)
            assert_gang(start, request)
            assert_atomic(start, request)
        checked(start, Desired(ask(), releasing=True))


def assert_default(start: World, request: Request) -> None:
    """As many are placed as there is room for; of the others none has room, nor would have in its own place."""
    decision, after = checked(start, Desired(request))
    gpus = request.needs.gpus
    for index in waiting(decision):
        own = [index] if index in after.observed else []
        assert not room(after, gpus, own), "it waits, and there is room"


def assert_gang(start: World, request: Request) -> None:
    """What is missing is placed together, exactly if there is room for all of it."""
    decision, after = checked(start, Desired(request, gang=True))
    gpus, waits = request.needs.gpus, waiting(decision)
    missing = to_be_placed(start, request)
    assert waits in (set(), missing)
    if waits:
        assert room(after, gpus, [index for index in waits if index in after.observed]) < len(missing)


def assert_atomic(start: World, request: Request) -> None:
    """All is placed, or nothing is done; nothing only if there is no room."""
    decision, after = checked(start, Desired(request), atomic=True)
    missing = to_be_placed(start, request)
    surplus = {index for index in start.observed if index >= len(request.replicas)}
    leaving = (missing & start.observed.keys()) | surplus | {*lost(start)}
    enough = room(start, request.needs.gpus, leaving) >= len(missing)
    assert (decision.refusal is None) == enough
    assert not enough or not to_be_placed(after, request)


def to_be_placed(start: World, request: Request) -> set[int]:
    """The replicas that are not there, or hold something else."""
    return {
        index
        for index in request.replicas
        if index not in start.observed
        or index in lost(start)
        or len(start.observed[index].parts[0].gpus) != request.needs.gpus
    }


# -- others ------------------------------------------------------------------------------------------


def in_racks(world: World, *racks: str) -> World:
    """The world with its nodes in racks: ``in_racks(world, "ab", "c")``."""
    rack = {name: str(number) for number, names in enumerate(racks) for name in names}
    return World([replace(node, labels={"rack": rack[node.id]}) for node in world.nodes], world.observed)


def one_a_rack(request: Request) -> Request:
    return replace(request, spread_label="rack", max_per_domain=1)


def test_what_is_replaced_is_not_in_its_own_way_where_it_is_to_spread() -> None:
    start = in_racks(world({"a": "12", "b": ""}, {0: ("a", "0", one_a_rack(ask(1, 2)))}), "a", "b")
    decision, _ = checked(start, Desired(one_a_rack(ask(2, 2))))
    assert shown(decision.actions) == ["+0 on a -0", "wait 1"]


def test_what_still_holds_counts_where_it_is_to_spread() -> None:
    there = {1: ("a", "0", one_a_rack(ask(1, 2)))}
    start = in_racks(world({"a": "", "b": "", "c": "01"}, there), "ac", "b")
    decision, _ = checked(start, Desired(one_a_rack(ask(2, 2))))
    assert shown(decision.actions) == ["+1 on c -1", "wait 0"]


def test_replicas_of_this_declaration_count_first_where_it_is_to_spread() -> None:
    """Two stay in one rack, which is one too many: the one of the earlier declaration goes, once it has a place."""
    there = {0: ("b", "0", ask(1, 2)), 1: ("a", "0", ask(1, 2))}
    start = in_racks(world({"a": "1", "b": "", "c": ""}, there), "ab", "c")
    spread = one_a_rack(ask(1, 2))
    decision, after = checked(start, Desired(spread))
    assert shown(decision.actions) == ["keep 0", "wait 1"]
    full_nodes = [replace(node, free=frozenset({3})) if node.id == "c" else node for node in after.nodes]
    decision, _ = checked(World(full_nodes, after.observed), Desired(spread))
    assert shown(decision.actions) == ["+1 on c -1"]


def test_a_gang_of_which_one_is_lost_waits_and_the_others_stay() -> None:
    two = ask(1, 2)
    start = world({"a": ""}, {0: ("a", "0", two), 1: ("dead", "0", two)})
    decision, after = checked(start, Desired(two, gang=True))
    assert shown(decision.actions) == ["drop 1 dead", "wait 1"]
    assert list(after.observed) == [0]


@pytest.mark.parametrize("gang", [False, True])
def test_an_atomic_change_is_refused_for_what_waited_before_too(gang: bool) -> None:
    """Nothing is done then: not even what is lost is dropped, which the next round does."""
    there = {0: ("a", "0", ask(1, 3)), 1: ("dead", "0", ask(1, 3))}
    start = world({"a": "3"}, there)
    decision, _ = checked(start, Desired(ask(2, 3), gang), atomic=True)
    assert isinstance(decision.refusal, NotEnoughGpus)
    decision, after = checked(start, Desired(ask(1, 2), gang), atomic=True)
    assert shown(decision.actions) == ["drop 1 dead", "+1 on a"]
    assert [0, 1] == list(after.observed)


def test_each_part_of_what_is_lost_is_given_back_where_its_node_lives() -> None:
    request = replace(ask(2, 1), stages=2)
    parts = tuple(
        PlannedReplica(0, where, (0, 1), ranks, set_size=2)
        for where, ranks in (("a", (0, 1)), ("dead", (2, 3)))
    )
    node = Node("a", "a", topology=Topology.unknown(4), free=frozenset({2, 3}), deployments={"d": 1})
    decision, after = checked(World([node], {0: Observed(parts, request)}), Desired(request))
    assert shown(decision.actions) == ["drop 0 dead", "+0 on a"]
    assert after.nodes[0].free == frozenset()


def test_what_waited_gets_room_the_oldest_first() -> None:
    snapshot = world({"a": "012"}).snapshot
    names = ["first", "second", "third"]
    queue: list[Any] = [(name, Desired(replace(ask(2), deployment=name)), {}) for name in names]
    decided = dict(admit([*queue, ("small", Desired(replace(ask(1), deployment="small")), {})], snapshot))
    assert [shown(one.actions) for one in decided.values()] == [
        ["+0 on a"],
        ["wait 0"],
        ["wait 0"],
        ["+0 on a"],
    ]
    assert decided["small"].snapshot.nodes[0].free == frozenset()


def test_who_asks_for_the_same_is_refused_in_the_same_words_by_its_own_name_and_index() -> None:
    snapshot = world({"a": "01"}).snapshot
    later = world({"a": ""}, {0: ("a", "3", replace(ask(3), deployment="y"))})
    queue: list[tuple[str, Desired, Mapping[int, Observed]]] = [
        ("x", Desired(replace(ask(3), deployment="x")), {}),
        ("y", Desired(replace(ask(3, 3), deployment="y")), later.observed),
        ("z", Desired(replace(ask(3, 2), deployment="z")), {}),
    ]
    texts = {}
    for key, decision in admit(queue, snapshot):
        [wait] = decision.actions
        assert isinstance(wait, Wait)
        texts[key] = str(wait.refusal)
        assert wait.refusal.deployment == key
    assert texts["x"].startswith(
        "cannot place 'x': replica 0 needs 3 GPUs free on one node; at best a has 2 of its 4 GPUs free: GPU 0-1"
    )
    never = (
        "; the whole cluster has 4 GPUs, and its 2 replicas need 6: waiting does not help all of them unless "
    )
    assert texts["z"] == texts["x"].replace("'x'", "'z'") + never + "nodes join"
    assert "cannot place 'y': replica 1 needs 3 GPUs free on one node" in texts["y"]
    assert "ask for fewer replicas or GPUs" in texts["y"]
    assert "replicas" not in texts["x"]


def test_room_that_is_made_on_the_way_is_seen_by_those_who_come_after() -> None:
    start = world({"a": ""}, {0: ("a", "01", ask(2))})
    queue: list[tuple[str, Desired, Mapping[int, Observed]]] = [
        ("x", Desired(replace(ask(1), deployment="x")), {}),
        ("d", Desired(ask(1)), start.observed),
        ("y", Desired(replace(ask(1), deployment="y")), {}),
        ("z", Desired(replace(ask(1), deployment="z")), {}),
    ]
    decided = admit(queue, start.snapshot)
    assert [shown(decision.actions) for _, decision in decided] == [
        ["wait 0"], ["release 0", "+0 on a"], ["+0 on a"], ["wait 0"]
    ]  # fmt: skip


def test_where_replicas_are_to_spread_each_is_refused_for_itself() -> None:
    """There is room in one rack, in which the first has a replica, and the second has none."""
    spread = one_a_rack(ask(1, 2))
    start = in_racks(world({"a": "12", "b": ""}), "a", "b")
    queue: list[tuple[str, Desired, Mapping[int, Observed]]] = []
    for name, where in (("x", "a"), ("y", "b")):
        request = replace(spread, deployment=name)
        there = {0: Observed((PlannedReplica(0, where, (0,)),), request)}
        queue.append((name, Desired(request), there))
    assert [shown(decision.actions) for _, decision in admit(queue, start.snapshot)] == [
        ["wait 1"], ["+1 on a"]
    ]  # fmt: skip


def test_who_is_near_to_another_is_not_refused_since_somebody_was() -> None:
    """The first asks for what nobody is near to yet; for the third, the second is there."""
    snapshot = world({"a": "0123"}).snapshot
    queue: list[tuple[str, Desired, Mapping[int, Observed]]] = [
        (name, Desired(replace(ask(1), deployment=name, near_to=near)), {})
        for name, near in (("x", ("y",)), ("y", ()), ("z", ("y",)))
    ]
    assert [shown(decision.actions) for _, decision in admit(queue, snapshot)] == [
        ["wait 0"], ["+0 on a"], ["+0 on a"]
    ]  # fmt: skip


def test_nothing_to_do_is_the_snapshot_as_it_was() -> None:
    start = world({"a": "3"}, {0: ("a", "0", ask())})
    snapshot = start.snapshot
    decision = reconcile(Desired(ask()), start.observed, snapshot)
    assert decision.snapshot is snapshot
    assert (decision.actions, decision.refusal, decision.step) == ((), None, None)
