"""How long the reserver waits, for what, and not longer: on a clock of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from placement import topologies
from placement.core.needs import Needs
from placement.core.topology import Topology
from placement.runtime import free_gpus, reservation
from placement.runtime.orders import GpuHardware, Holding, Order, Refused, Reserved
from placement.runtime.reservation import NodeReserver
from tests.runtime.test_reservation import Clock, Slots

PAIRS, FLAT = GpuHardware(topologies.load("a100-pcie-4x")), GpuHardware(Topology.unknown(4))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.now = 100.0
    clock.rule(monkeypatch)
    return clock


class Timed(Slots):
    """Notes when what was asked of the node."""

    def __init__(self, count: int, clock: Clock, **fields: object) -> None:
        super().__init__(count, **fields)  # type: ignore[arg-type]
        self.clock = clock
        self.asked: list[tuple[str, float]] = []
        self.patience: list[float] = []
        self.in_books: Callable[[], float] = super().available

    def hold(self, amount: float) -> int:
        self.asked.append(("hold", self.clock.now))
        return super().hold(amount)

    def reserve(self, name: str, bundle: dict[str, float], count: int) -> int:
        self.asked.append(("reserve", self.clock.now))
        return super().reserve(name, bundle, count)

    def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
        self.asked.append(("look", self.clock.now))
        self.patience.append(deadline_seconds)
        return super().lowest_free(count, deadline_seconds)

    def available(self) -> float:
        return self.in_books()


def order(gpus: int = 2, name: str = "r") -> Order:
    return Order(name, Needs(gpus), "d")


def test_nothing_waits_on_a_node_that_nobody_else_uses(clock: Clock) -> None:
    slots = Timed(4, clock)
    reserver = NodeReserver(slots, 4)
    clock.now += 10
    assert isinstance(reserver.reserve(order(), PAIRS), Reserved)
    assert (slots.asked, clock.now) == ([("reserve", 110.0)], 110.0)


@pytest.mark.parametrize(("late_by", "waited"), [(0.0, 0.0), (0.2, 0.2), (5.0, free_gpus.CATCH_UP_SECONDS)])
def test_steering_begins_once_the_books_show_what_the_look_gave_back_or_after_a_while(
    clock: Clock, late_by: float, waited: float
) -> None:
    slots = Timed(4, clock, others={0})
    reserver = NodeReserver(slots, 4)
    clock.now += 10

    def in_books() -> float:
        looked_at = [at for what, at in slots.asked if what == "look"]
        return 0.0 if looked_at and clock.now < looked_at[-1] + late_by - 1e-9 else 3.0

    slots.in_books = in_books
    outcome = reserver.reserve(order(), PAIRS)
    assert isinstance(outcome, Reserved)
    assert (outcome.gpus, [what for what, _ in slots.asked]) == ((2, 3), ["look", "hold", "reserve"])
    looked_at, steered_at, _ = (at for _, at in slots.asked)
    assert looked_at == 110.0
    assert looked_at + waited - 1e-6 <= steered_at < looked_at + waited + 0.006


def test_a_node_that_is_full_is_looked_at_three_times_the_last_time_with_patience(clock: Clock) -> None:
    slots = Timed(4, clock, others={0, 1, 2})
    reserver = NodeReserver(slots, 4)
    clock.now += 10
    outcome = reserver.reserve(order(), PAIRS)
    assert isinstance(outcome, Refused)
    assert (outcome.attempts, outcome.full) == (reservation.MAX_LOOKS, True)
    assert 110.0 + free_gpus.BOOKS_LAG_SECONDS <= clock.now < 111.0
    assert slots.patience == [free_gpus.LOOK_DEADLINE_SECONDS] * len(slots.patience)


def test_what_was_just_given_back_here_is_given_time_to_come_free(clock: Clock) -> None:
    """Workers take a moment to die. The books of Ray show it as free at once, and later as taken."""
    slots = Timed(4, clock)
    reserver = NodeReserver(slots, 4)
    clock.now += 10
    held = reserver.reserve(order(4), FLAT)
    assert isinstance(held, Reserved)
    clock.now += 10
    reserver.remove("r", held.group)
    freed_at = clock.now
    slots.others = {0, 1, 2}
    outcome = reserver.reserve(order(), FLAT)
    assert isinstance(outcome, Refused)
    assert slots.patience
    expected = freed_at + free_gpus.RETURN_SECONDS
    assert slots.patience[-1] == pytest.approx(expected - slots.asked[-1][1])
    assert slots.patience[-1] > 1.0


def test_a_look_is_good_for_ten_seconds_while_as_many_gpus_are_free(clock: Clock) -> None:
    slots = Timed(4, clock, others={0})
    reserver = NodeReserver(slots, 4)
    clock.now += 10
    for gpus, looks in ((1, 1), (1, 1)):
        assert isinstance(reserver.reserve(order(gpus, f"r{len(slots.groups)}"), FLAT), Reserved)
        assert len(slots.patience) == looks
        clock.now += 1
    assert reserver.gpus.foreign == {0}
    slots.others = {0, 3}
    clock.now += 1
    outcome = reserver.reserve(order(1, "third"), FLAT)
    assert isinstance(outcome, Refused)
    assert len(slots.patience) > 1, "fewer are free than there should be"
    slots.others = set()
    clock.now += free_gpus.TRUST_SECONDS
    outcome = reserver.reserve(order(2, "fourth"), FLAT)
    assert isinstance(outcome, Reserved)
    assert outcome.gpus == (0, 3)
    assert reserver.gpus.foreign == frozenset()


def test_after_a_restart_nothing_is_taken_for_granted(clock: Clock) -> None:
    slots = Timed(4, clock, others={2})
    standing = slots.reserve("before", {"GPU": 1}, 1)
    slots.asked.clear()
    reserver = NodeReserver(slots, 4)
    reserver.gpus.adopt({"before": Holding.whole("d", (0,))})
    clock.now += 10
    outcome = reserver.reserve(order(), FLAT)
    assert isinstance(outcome, Reserved)
    assert (outcome.gpus, slots.asked[0][0]) == ((1, 3), "look")
    assert reserver.gpus.foreign == {2}
    reserver.remove("before", standing)
    assert reserver.reserve(order(1, "s"), FLAT).gpus == (0,)  # type: ignore[union-attr]
