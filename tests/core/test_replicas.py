"""Where replicas of one deployment sit together, counted."""

from __future__ import annotations

from placement.core.needs import NO_GPUS
from placement.core.node import Node
from placement.core.replicas import Crowd
from placement.core.request import Request
from placement.core.snapshot import Snapshot

ZONES = Snapshot(
    [Node(name, name, labels={"zone": name[0]}) for name in ("a1", "a2", "b1", "c1")] + [Node("x", "x")]
)
A1, A2, B1, C1, X = (1 << i for i in range(5))
ALL = A1 | A2 | B1 | C1 | X


def crowd(allowed: int = ALL, **fields: object) -> Crowd:
    return Crowd(ZONES, Request("d", (0,), NO_GPUS, **fields), allowed)  # type: ignore[arg-type]


def test_the_emptiest_nodes_come_first() -> None:
    there = crowd(standing={"a2": 2, "x": 1})
    assert there.preference() == [A1 | B1 | C1, X, A2]
    assert [there.on(bit) for bit in (A1, A2, X)] == [0, 2, 1]
    there.add(A1)
    assert there.preference() == [B1 | C1, A1 | X, A2]
    there.add(A2)
    assert there.preference() == [B1 | C1, A1 | X, 0, A2]
    assert there.on(A2) == 3


def test_nodes_that_are_not_allowed_or_not_there_are_never_offered() -> None:
    there = crowd(A1 | B1, standing={"a2": 1, "gone": 5, "a1": 1})
    assert there.preference() == [B1, A1]
    there.add(C1)
    assert there.preference() == [B1, A1]
    assert there.open() == [A1 | B1]


def test_a_closed_node_is_offered_no_more() -> None:
    there = crowd(standing={"a1": 1})
    there.close(A1 | C1)
    assert there.preference() == [A2 | B1 | X, 0]
    assert there.open() == [A2 | B1 | X]


def test_without_a_label_to_spread_over_all_nodes_are_one_set() -> None:
    there = crowd(standing={"a1": 1})
    assert (there.open(), there.domains()) == ([ALL], [])


def test_the_emptiest_domain_comes_before_the_emptiest_node() -> None:
    there = crowd(spread_label="zone", standing={"a1": 1, "b1": 2})
    assert there.domains() == [[C1], [A1 | A2], [B1]]
    assert there.open() == [C1, A1 | A2, B1]
    assert [found for found in there.preference() if found] == [C1, A2, A1, B1]
    there.add(C1)
    assert there.domains() == [[A1 | A2, C1], [B1]]
    assert there.open() == [A1 | A2 | C1, B1]
    assert [found for found in there.preference() if found] == [A2, A1 | C1, B1]


def test_a_domain_that_has_its_most_is_closed_whole() -> None:
    there = crowd(spread_label="zone", max_per_domain=2, standing={"a1": 1, "b1": 2})
    assert there.domains() == [[C1], [A1 | A2]]
    assert [found for found in there.preference() if found] == [C1, A2, A1]
    there.add(A2)
    assert there.domains() == [[C1]]
    assert [found for found in there.preference() if found] == [C1]
    there.add(C1)
    assert there.domains() == [[C1]]
    there.add(C1)
    assert (there.domains(), [found for found in there.preference() if found]) == ([], [])


def test_a_node_that_is_not_allowed_counts_in_its_domain() -> None:
    there = crowd(A1 | C1, spread_label="zone", max_per_domain=1, standing={"a2": 1})
    assert (there.domains(), there.open()) == ([[0, C1]], [C1])
