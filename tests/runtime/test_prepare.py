"""A node's part in a replica over several nodes: its GPUs are made the lowest free ones, confirmed, and let go."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import topologies
from placement.core.score import Needs
from placement.core.topology import Topology
from placement.runtime import reservation
from placement.runtime.orders import Machine, Order, Prepared, Refused, Reserved
from placement.runtime.reservation import NodeReserver
from tests.runtime.test_reservation import Clock, Slots

DGX1, PAIRS = Machine(topologies.load("dgx-1v")), Machine(topologies.load("a100-pcie-4x"))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(reservation, "time", clock)
    return clock


class Watched(Slots):
    """Counts how often the node is looked at."""

    looks = 0

    def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
        self.looks += 1
        return super().lowest_free(count, deadline_seconds)


def order(gpus: int, name: str = "r") -> Order:
    return Order(name, Needs(gpus), "d")


@pytest.mark.parametrize(
    ("case", "machine", "others", "gpus", "sets", "expected", "rays"),
    [
        ("the best set", DGX1, {0}, 4, 1, ((4, 5, 6, 7),), (1, 2, 3, 4)),
        ("both quads, which need no steering", DGX1, set(), 4, 2, ((0, 1, 2, 3), (4, 5, 6, 7)), tuple(range(8))),
        ("two pairs", PAIRS, set(), 2, 2, ((0, 1), (2, 3)), (0, 1, 2, 3)),
        ("the pair that is whole", PAIRS, {0}, 2, 1, ((2, 3),), (1, 2)),
        ("single GPUs", PAIRS, {1}, 1, 2, ((0,), (2,)), (0, 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_gpus_are_the_lowest_free_ones_until_they_are_let_go(
    case: str,
    machine: Machine,
    others: set[int],
    gpus: int,
    sets: int,
    expected: tuple[tuple[int, ...], ...],
    rays: tuple[int, ...],
) -> None:
    slots = Slots(len(machine.topology), others=set(others))
    reserver = NodeReserver(slots, slots.count)
    prepared = reserver.prepare(order(gpus), machine, sets)
    assert isinstance(prepared, Prepared)
    assert (prepared.sets, prepared.ray_gpus, prepared.attempts) == (expected, rays, 1)
    assert prepared.foreign_gpus == tuple(others)
    assert slots.free()[: gpus * sets] == sorted(gpu for one in expected for gpu in one)
    assert set(slots.groups) == set(prepared.fillers)
    reserver.settle(prepared, used=False)
    assert slots.groups == {}


def test_what_is_confirmed_is_known_as_ours_and_by_bundle() -> None:
    slots = Watched(8, others={0})
    reserver = NodeReserver(slots, 8)
    prepared = reserver.prepare(order(2), DGX1, 2)
    assert isinstance(prepared, Prepared)
    wanted = sorted(gpu for gpus in prepared.sets for gpu in gpus)
    group = slots.reserve("r", {"GPU": 1}, 4)
    reserver.settle(prepared, used=True)
    found = reserver.confirm(order(2), prepared, group, range(8, 12))
    assert found == dict(zip(wanted, range(8, 12), strict=True))
    assert list(slots.groups) == [group]
    after = reserver.reserve(order(2, "s"), DGX1)
    assert isinstance(after, Reserved)
    assert not set(after.gpus) & {0, *wanted}
    assert slots.looks == 1, "nothing that is not ours has changed"
    reserver.forget("r")
    assert reserver.foreign == frozenset()


def test_other_gpus_than_those_prepared_are_not_confirmed() -> None:
    slots = Slots(4)
    reserver = NodeReserver(slots, 4)
    prepared = reserver.prepare(order(2), PAIRS, 1)
    assert isinstance(prepared, Prepared)
    slots.others = {prepared.sets[0][0]}  # somebody was faster
    group = slots.reserve("r", {"GPU": 1}, 2)
    assert reserver.confirm(order(2), prepared, group, [0, 1]) is None
    slots.remove(group)
    reserver.settle(prepared, used=False)
    again = reserver.prepare(order(2), PAIRS, 1)
    assert isinstance(again, Prepared)
    assert (again.sets, again.foreign_gpus) == (((2, 3),), (0,))


@pytest.mark.parametrize(
    ("machine", "others", "gpus", "sets"),
    [
        (PAIRS, {0, 1, 2}, 2, 1),
        (PAIRS, {0}, 2, 2),
        (Machine(PAIRS.topology, lost=frozenset({1, 3})), set(), 3, 1),
        (Machine(Topology.unknown(4)), {3}, 4, 1),
    ],
)
def test_a_node_with_too_little_refuses_and_holds_nothing(
    machine: Machine, others: set[int], gpus: int, sets: int
) -> None:
    slots = Slots(4, others=others)
    outcome = NodeReserver(slots, 4).prepare(order(gpus), machine, sets)
    assert isinstance(outcome, Refused)
    assert (outcome.full, outcome.attempts, slots.groups) == (True, reservation.MAX_LOOKS, {})
    asked = (
        f"and as demanded for {sets} x {gpus}" if sets > 1 else f"sound and as close as demanded for {gpus}"
    )
    assert outcome.reason.endswith(asked)


def test_a_node_that_was_looked_at_ahead_is_not_looked_at_again() -> None:
    slots = Watched(8, others={3})
    reserver = NodeReserver(slots, 8)
    reserver.look_ahead(4)
    assert (slots.looks, slots.groups) == (1, {})
    prepared = reserver.prepare(order(4), DGX1, 1)
    assert isinstance(prepared, Prepared)
    assert (slots.looks, prepared.sets) == (1, ((4, 5, 6, 7),))
    reserver.settle(prepared, used=True)
    prepared = reserver.prepare(order(4), DGX1, 1)
    assert isinstance(prepared, Prepared)
    assert slots.looks == 1
    reserver.settle(prepared, used=False)
    reserver.prepare(order(4), DGX1, 1)
    assert slots.looks == 2, "they were not to be had: who holds what is not known any more"


@given(seed=st.integers(0, 10_000))
def test_whoever_interferes_nothing_but_the_fillers_is_held_and_nothing_afterwards(seed: int) -> None:
    chance = random.Random(seed)

    def churn(slots: Slots) -> None:
        if chance.random() < 0.2:
            if slots.others and chance.random() < 0.5:
                slots.others.remove(chance.choice(sorted(slots.others)))
            elif slots.free():
                slots.others.add(slots.free()[0])

    slots = Slots(8, disturb=churn)
    reserver = NodeReserver(slots, 8)
    for _ in range(4):
        outcome = reserver.prepare(order(chance.choice([1, 2, 4])), DGX1, chance.choice([1, 2]))
        if isinstance(outcome, Prepared):
            assert set(slots.groups) == set(outcome.fillers)
            reserver.settle(outcome, used=chance.random() < 0.5)
        assert slots.groups == {}
