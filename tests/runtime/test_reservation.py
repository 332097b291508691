"""The hold / create / verify protocol against a model of Ray's slots: always the lowest-numbered free GPUs.

The model may be disturbed between any two calls, as other Ray users do.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import topologies
from placement.core.score import Needs, best_set, score
from placement.core.topology import Topology
from placement.runtime import reservation
from placement.runtime.reservation import NodeReserver, Refused, Reserved


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has no lag: time passes only when somebody sleeps."""
    clock = itertools.count()
    monkeypatch.setattr(reservation.time, "sleep", lambda _: None)
    monkeypatch.setattr(reservation.time, "monotonic", lambda: float(next(clock)))


@dataclass
class Slots:
    """A raylet's GPU slots. ``disturb`` is called before every operation."""

    count: int
    others: set[int] = field(default_factory=set)
    groups: dict[int, list[int]] = field(default_factory=dict)
    disturb: object = None
    steps: int = 0
    _ids: itertools.count = field(default_factory=itertools.count)

    def free(self) -> list[int]:
        taken = self.others.union(*self.groups.values()) if self.groups else self.others
        return [gpu for gpu in range(self.count) if gpu not in taken]

    def _step(self) -> None:
        self.steps += 1
        if self.disturb is not None:
            self.disturb(self)

    def _create(self, count: int) -> int:
        self._step()
        group = next(self._ids)
        lowest = self.free()[:count]
        if len(lowest) == count:
            self.groups[group] = lowest
        return group

    def hold(self, count: int) -> int:
        return self._create(count)

    def reserve(self, name: str, count: int) -> int:
        return self._create(count)

    def ready_or_removed(self, group: int, deadline_seconds: float) -> bool:
        return group in self.groups

    def remove(self, group: int) -> None:
        self.groups.pop(group, None)

    def gpus_of(self, group: int, count: int) -> list[int]:
        self._step()
        return list(self.groups[group])

    def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
        self._step()
        lowest = self.free()[:count]
        return lowest if len(lowest) == count else None

    def available(self) -> int:
        return len(self.free())


PAIRS = topologies.load("a100-pcie-4x")
DGX1 = topologies.load("dgx-1v")


def test_a_pair_stays_on_its_bridge_when_gpu_0_is_busy() -> None:
    """Ray alone would give 1 and 2, one half of each bridge."""
    slots = Slots(4, others={0})
    outcome = NodeReserver(slots, 4).reserve("r", Needs(2), PAIRS)
    assert isinstance(outcome, Reserved)
    assert (outcome.gpus, outcome.ray_gpus, outcome.attempts) == ((2, 3), (1, 2), 1)
    assert list(slots.groups.values()) == [[2, 3]]


def test_nothing_is_steered_where_rays_own_choice_is_best() -> None:
    slots = Slots(8)
    outcome = NodeReserver(slots, 8).reserve("r", Needs(4), DGX1)
    assert isinstance(outcome, Reserved)
    assert outcome.gpus == outcome.ray_gpus == (0, 1, 2, 3)
    assert slots.steps == 2, "one group created, one verification"


def test_several_runs_are_steered_with_every_hold_given_back() -> None:
    slots = Slots(8, others={3})
    outcome = NodeReserver(slots, 8).reserve("r", Needs(2), Topology.unknown(8))
    assert isinstance(outcome, Reserved)
    wanted = best_set(DGX1, {0, 1, 2, 4, 5, 6, 7}, 2)
    outcome = NodeReserver(Slots(8, others={3}), 8).reserve("r", Needs(2), DGX1)
    assert isinstance(outcome, Reserved)
    assert outcome.gpus == wanted


def test_a_full_node_refuses_and_holds_nothing() -> None:
    slots = Slots(4, others={0, 1, 2})
    outcome = NodeReserver(slots, 4).reserve("r", Needs(2), PAIRS)
    assert isinstance(outcome, Refused)
    assert outcome.full
    assert slots.groups == {}


def test_unending_interference_ends_in_a_refusal_that_holds_nothing() -> None:
    def swap(slots: Slots) -> None:
        held = {gpu for gpus in slots.groups.values() for gpu in gpus}
        slots.others = ({0, 2} if slots.steps % 2 else {1, 3}) - held

    slots = Slots(4, disturb=swap)
    outcome = NodeReserver(slots, 4).reserve("r", Needs(2), PAIRS)
    if isinstance(outcome, Refused):
        assert (outcome.attempts, slots.groups) == (reservation.MAX_ATTEMPTS, {})
    else:
        assert list(slots.groups.values()) == [list(outcome.gpus)]


def test_a_failing_probe_leaves_nothing_held() -> None:
    class Broken(Slots):
        def gpus_of(self, group: int, count: int) -> list[int]:
            raise RuntimeError("worker died")

    slots = Broken(4, others={0})
    with pytest.raises(RuntimeError):
        NodeReserver(slots, 4).reserve("r", Needs(2), PAIRS)
    assert slots.groups == {}


@pytest.mark.parametrize("machine", [PAIRS, DGX1], ids=["pairs", "dgx-1v"])
@given(seed=st.integers(0, 10_000))
def test_undisturbed_the_best_free_set_is_reserved_whatever_others_hold(machine: Topology, seed: int) -> None:
    chance = random.Random(seed)
    count = len(machine)
    others = set(chance.sample(range(count), chance.randrange(count)))
    slots, size = Slots(count, others=others), chance.randint(1, count)
    free = set(range(count)) - others
    outcome = NodeReserver(slots, count).reserve("r", Needs(size), machine)
    if size > len(free):
        assert isinstance(outcome, Refused)
        assert slots.groups == {}
    else:
        assert isinstance(outcome, Reserved)
        assert outcome.gpus == best_set(machine, free, size)
        assert list(slots.groups.values()) == [list(outcome.gpus)]


@given(seed=st.integers(0, 10_000))
def test_disturbed_at_any_step_the_result_is_what_is_held_or_nothing_is(seed: int) -> None:
    chance = random.Random(seed)

    def churn(slots: Slots) -> None:
        if chance.random() < 0.2:
            if slots.others and chance.random() < 0.5:
                slots.others.remove(chance.choice(sorted(slots.others)))
            elif slots.free():
                slots.others.add(slots.free()[0])

    slots = Slots(8, disturb=churn)
    reserver = NodeReserver(slots, 8)
    standing: dict[str, Reserved] = {}
    for step in range(6):
        size = chance.choice([1, 2, 2, 4])
        outcome = reserver.reserve(f"r{step}", Needs(size), DGX1)
        if isinstance(outcome, Reserved):
            standing[f"r{step}"] = outcome
        elif standing and chance.random() < 0.5:
            name = chance.choice(sorted(standing))
            reserver.remove(name, standing.pop(name).group)
        held = sorted(gpu for gpus in slots.groups.values() for gpu in gpus)
        assert held == sorted(gpu for one in standing.values() for gpu in one.gpus)
        assert len(held) == len(set(held))
        assert not set(held) & slots.others
    assert all(score(DGX1, one.gpus) for one in standing.values())
