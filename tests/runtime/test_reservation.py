"""The hold / create / verify protocol against a model of Ray's slots: always the lowest-numbered free GPUs.

The model may be disturbed between any two calls, as other Ray users do.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import topologies
from placement.core.needs import WHOLE, Needs
from placement.core.score import best_set, score
from placement.core.topology import Topology
from placement.runtime import free_gpus, reservation, steering
from placement.runtime.orders import GpuHardware, Holding, Order, Refused, Reserved, Steering, hardware_of
from placement.runtime.reservation import NodeReserver
from placement.wire.facts import GpuFacts, NodeFacts


class Clock:
    """Time passes only when the reserver sleeps; everybody else, hypothesis too, keeps the real one."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def rule(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Has all that reserves go by it."""
        for module in (free_gpus, reservation, steering):
            monkeypatch.setattr(module, "time", self)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.rule(monkeypatch)
    return clock


@dataclass
class Slots:
    """A raylet's GPU slots. ``disturb`` is called before every operation."""

    count: int
    others: set[int] = field(default_factory=set)
    others_shares: dict[int, int] = field(default_factory=dict)
    groups: dict[int, dict[int, int]] = field(default_factory=dict)
    disturb: Any = None
    steps: int = 0
    books_lag_by: int = 0
    bundles: dict[int, list[list[int]]] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def rests(self) -> dict[int, int]:
        """Thousandths free of each GPU."""
        rests = {gpu: WHOLE * (gpu not in self.others) for gpu in range(self.count)}
        for taken in (self.others_shares, *self.groups.values()):
            for gpu, share in taken.items():
                rests[gpu] -= share
        assert min(rests.values()) >= 0
        return rests

    def free(self) -> list[int]:
        return [gpu for gpu, rest in self.rests().items() if rest == WHOLE]

    def _step(self) -> None:
        self.steps += 1
        if self.disturb is not None:
            self.disturb(self)

    def _create(self, amount: float) -> int:
        self._step()
        group = next(self._ids)
        if amount < 1:  # as measured: the smallest rest that is enough, then the lowest
            share = round(amount * WHOLE)
            enough = [(rest, gpu) for gpu, rest in self.rests().items() if rest >= share]
            if enough:
                self.groups[group] = {min(enough)[1]: share}
            return group
        lowest = self.free()[: round(amount)]
        if len(lowest) == amount:
            self.groups[group] = dict.fromkeys(lowest, WHOLE)
        return group

    def hold(self, amount: float) -> int:
        return self._create(amount)

    def reserve(self, name: str, bundle: dict[str, float], count: int) -> int:
        return self._create(bundle["GPU"] * count)

    def ready_or_removed(self, group: int, deadline_seconds: float) -> bool:
        return group in self.groups

    def wait_for(self, group: int, deadline_seconds: float) -> bool:
        return group in self.groups

    def is_gone(self, group: int) -> bool:
        return group not in self.groups

    def remove(self, group: int) -> None:
        self.groups.pop(group, None)

    def together(self, amounts: Sequence[float]) -> int:
        """A group of bundles, which Ray reserves one after the other; removed if one of them finds no room."""
        self._step()
        group, rests = next(self._ids), self.rests()
        given: list[list[int]] = []
        for amount in amounts:
            free = [gpu for gpu, rest in rests.items() if rest == WHOLE]
            enough = [(rest, gpu) for gpu, rest in rests.items() if rest >= round(amount * WHOLE)]
            gpus = free[: round(amount)] if amount >= 1 else [min(enough)[1]] if enough else []
            if len(gpus) < amount:
                return group
            for gpu in gpus:
                rests[gpu] -= round(min(amount, 1) * WHOLE)
            given.append(gpus)
        self.bundles[group] = given
        before = self.rests()
        self.groups[group] = {gpu: before[gpu] - rest for gpu, rest in rests.items() if rest < before[gpu]}
        return group

    def gpus_of(self, group: int, amounts: Mapping[int, float]) -> list[int]:
        self._step()
        if group in self.bundles:
            return [gpu for bundle in amounts for gpu in self.bundles[group][bundle]]
        return sorted(self.groups[group])

    def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
        self._step()
        lowest = self.free()[:count]
        return lowest if len(lowest) == count else None

    def available(self) -> float:
        return sum(self.rests().values()) / WHOLE - self.books_lag_by


PAIRS = topologies.load("a100-pcie-4x")
DGX1 = topologies.load("dgx-1v")


def test_a_pair_stays_on_its_bridge_when_gpu_0_is_busy() -> None:
    slots = Slots(4, others={0})
    outcome = NodeReserver(slots, 4).reserve(Order("r", Needs(2)), GpuHardware(PAIRS))
    assert isinstance(outcome, Reserved)
    assert (outcome.gpus, outcome.free, outcome.attempts) == ((2, 3), {1, 2, 3}, 1)
    assert [list(group) for group in slots.groups.values()] == [[2, 3]]


def test_nothing_is_steered_where_rays_own_choice_is_best() -> None:
    slots = Slots(8)
    outcome = NodeReserver(slots, 8).reserve(Order("r", Needs(4)), GpuHardware(DGX1))
    assert isinstance(outcome, Reserved)
    assert outcome.gpus == (0, 1, 2, 3)
    assert slots.steps == 2, "one group created, one verification"


def test_several_runs_are_steered_with_every_hold_given_back() -> None:
    slots = Slots(8, others={3})
    outcome = NodeReserver(slots, 8).reserve(Order("r", Needs(2)), GpuHardware(Topology.unknown(8)))
    assert isinstance(outcome, Reserved)
    wanted = best_set(DGX1, {0, 1, 2, 4, 5, 6, 7}, 2)
    outcome = NodeReserver(Slots(8, others={3}), 8).reserve(Order("r", Needs(2)), GpuHardware(DGX1))
    assert isinstance(outcome, Reserved)
    assert outcome.gpus == wanted


def test_just_the_gpus_that_are_named_are_taken_or_none() -> None:
    slots = Slots(8, others={3})
    outcome = NodeReserver(slots, 8).reserve(Order("r", Needs(2, named=(4, 6))), GpuHardware(DGX1))
    assert isinstance(outcome, Reserved)
    assert (4, 6) == outcome.gpus
    refused = NodeReserver(slots, 8).reserve(Order("s", Needs(2, named=(3, 5))), GpuHardware(DGX1))
    assert isinstance(refused, Refused)
    assert refused.full
    assert "too few of GPU 3,5 are free, healthy and as close as demanded for 2" == refused.reason
    assert [[4, 6]] == [list(group) for group in slots.groups.values()]


def test_just_the_gpus_that_are_named_and_no_better_ones() -> None:
    slots = Slots(4)
    machine = GpuHardware(PAIRS, uuids={gpu: f"GPU-{gpu}" for gpu in range(4)})
    outcome = NodeReserver(slots, 4).reserve(Order("r", Needs(2, named=(1, "GPU-2"))), machine)
    assert isinstance(outcome, Reserved)
    assert outcome.gpus == (1, 2)
    assert [list(group) for group in slots.groups.values()] == [[1, 2]]


def test_others_that_are_as_good_will_not_do_where_gpus_are_named() -> None:
    """Another user takes GPU 0 just before, and gives it back: what was got instead is given back, too."""
    slots = Slots(4)

    def disturb(slots: Slots) -> None:
        slots.others = {0} if slots.steps == 1 else set()

    slots.disturb = disturb
    outcome = NodeReserver(slots, 4).reserve(Order("r", Needs(2, named=(0, 1))), GpuHardware(PAIRS))
    assert isinstance(outcome, Reserved)
    assert (outcome.gpus, outcome.attempts) == ((0, 1), 2)
    assert [list(group) for group in slots.groups.values()] == [[0, 1]]


def test_a_named_gpu_that_others_hold_is_not_had() -> None:
    slots = Slots(4, others={2})
    reserver = NodeReserver(slots, 4)
    outcome = reserver.reserve(Order("r", Needs(2, named=(2, 3))), GpuHardware(PAIRS))
    assert isinstance(outcome, Refused)
    assert outcome.full and "too few of GPU 2-3 are free" in outcome.reason
    assert reserver.gpus.foreign == {2}
    slots.others = {0, 1}
    assert reserver.gpus.locate() == {0, 1}, "they have moved"
    prepared = reserver.prepare(Order("r", Needs(2, named=(2, 3))), GpuHardware(PAIRS), 1)
    assert not isinstance(prepared, Refused) and prepared.sets == ((2, 3),)


@pytest.mark.parametrize("others", [set(), {0, 1, 2, 3}, {3}])
def test_which_gpus_others_hold_can_be_looked_at(others: set[int]) -> None:
    slots = Slots(4, others=others)
    assert NodeReserver(slots, 4).gpus.locate() == others
    assert slots.groups == {}


def test_a_full_node_refuses_and_holds_nothing() -> None:
    slots = Slots(4, others={0, 1, 2})
    outcome = NodeReserver(slots, 4).reserve(Order("r", Needs(2)), GpuHardware(PAIRS))
    assert isinstance(outcome, Refused)
    assert outcome.full
    assert slots.groups == {}


def test_books_that_lag_for_long_are_no_reason_to_refuse() -> None:
    """They show one GPU free where three are: the raylet is asked, and gives them."""
    slots = Slots(4, others={0}, books_lag_by=2)
    outcome = NodeReserver(slots, 4).reserve(Order("r", Needs(2)), GpuHardware(PAIRS))
    assert isinstance(outcome, Reserved)
    assert len(outcome.gpus) == 2


def test_books_that_lag_do_not_hide_the_better_set() -> None:
    slots = Slots(4, books_lag_by=3)
    reserver = NodeReserver(slots, 4)
    reserver.gpus.adopt({"standing": Holding.whole("d", (0,))})
    slots.groups[-1] = {0: WHOLE}
    outcome = reserver.reserve(Order("r", Needs(2)), GpuHardware(PAIRS))
    assert isinstance(outcome, Reserved)
    assert outcome.gpus == (2, 3)


def test_unending_interference_ends_in_a_refusal_that_holds_nothing() -> None:
    def swap(slots: Slots) -> None:
        held = {gpu for gpus in slots.groups.values() for gpu in gpus}
        slots.others = ({0, 2} if slots.steps % 2 else {1, 3}) - held

    slots = Slots(4, disturb=swap)
    outcome = NodeReserver(slots, 4).reserve(Order("r", Needs(2)), GpuHardware(PAIRS))
    if isinstance(outcome, Refused):
        assert (outcome.attempts, slots.groups) == (reservation.MAX_ATTEMPTS, {})
    else:
        assert [sorted(group) for group in slots.groups.values()] == [list(outcome.gpus)]


def test_a_failing_probe_leaves_nothing_held() -> None:
    class Broken(Slots):
        def gpus_of(self, group: int, amounts: Mapping[int, float]) -> list[int]:
            raise RuntimeError("worker died")

    slots = Broken(4, others={0})
    with pytest.raises(RuntimeError):
        NodeReserver(slots, 4).reserve(Order("r", Needs(2)), GpuHardware(PAIRS))
    assert slots.groups == {}


@pytest.mark.parametrize("machine", [PAIRS, DGX1], ids=["pairs", "dgx-1v"])
@given(seed=st.integers(0, 10_000))
def test_undisturbed_the_best_free_set_is_reserved_whatever_others_hold(machine: Topology, seed: int) -> None:
    chance = random.Random(seed)
    count = len(machine)
    others = set(chance.sample(range(count), chance.randrange(count)))
    slots, size = Slots(count, others=others), chance.randint(1, count)
    free = set(range(count)) - others
    outcome = NodeReserver(slots, count).reserve(Order("r", Needs(size)), GpuHardware(machine))
    if size > len(free):
        assert isinstance(outcome, Refused)
        assert slots.groups == {}
    else:
        assert isinstance(outcome, Reserved)
        assert outcome.gpus == best_set(machine, free, size)
        assert [sorted(group) for group in slots.groups.values()] == [list(outcome.gpus)]


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
        outcome = reserver.reserve(Order(f"r{step}", Needs(size)), GpuHardware(DGX1))
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


def share(name: str, thousandths: int, deployment: str = "d") -> Order:
    return Order(name, Needs(1, share=thousandths), deployment)


FLAT = GpuHardware(Topology.unknown(4))


def test_shares_are_packed_on_as_few_gpus_as_possible() -> None:
    slots = Slots(4, others={0})
    reserver = NodeReserver(slots, 4)
    outcomes = [reserver.reserve(share(f"r{i}", 250), FLAT) for i in range(8)]
    assert [outcome.gpus for outcome in outcomes] == [(1,)] * 4 + [(2,)] * 4  # type: ignore[union-attr]
    assert slots.free() == [3]


def test_a_share_goes_where_it_leaves_the_least_whatever_ray_would_do() -> None:
    slots = Slots(4)
    reserver = NodeReserver(slots, 4)
    for name, thousandths in [("a", 600), ("b", 500), ("c", 300)]:
        reserver.reserve(share(name, thousandths), FLAT)
    # GPU 0 has 100 left, GPU 1 has 500
    assert slots.rests() == {0: 100, 1: 500, 2: 1000, 3: 1000}
    pair = GpuHardware(PAIRS)
    reserver.reserve(Order("pair", Needs(2)), pair)
    assert slots.free() == []
    assert isinstance(reserver.reserve(share("big", 600), FLAT), Refused)
    assert reserver.reserve(share("half", 500), FLAT).gpus == (1,)  # type: ignore[union-attr]


def test_a_share_breaks_the_gpu_that_others_miss_least_and_is_steered_there() -> None:
    slots = Slots(4, others={3})
    outcome = NodeReserver(slots, 4).reserve(share("r", 250), GpuHardware(PAIRS))
    assert isinstance(outcome, Reserved)
    assert (outcome.gpus, outcome.share) == ((2,), 250)  # 0 and 1 are a whole bridge
    assert list(slots.groups.values()) == [{2: 250}]


def test_a_share_goes_on_the_gpu_that_was_planned_if_that_still_has_it() -> None:
    slots = Slots(4)
    reserver = NodeReserver(slots, 4)
    for name, thousandths in [("a", 600), ("b", 700)]:
        reserver.reserve(share(name, thousandths), FLAT)
    assert slots.rests() == {0: 400, 1: 300, 2: 1000, 3: 1000}

    def planned(name: str, gpu: int) -> tuple[int, ...]:
        outcome = reserver.reserve(replace(share(name, 200), planned=gpu), FLAT)
        assert isinstance(outcome, Reserved)
        assert slots.groups[outcome.group] == {outcome.gpus[0]: 200}
        return outcome.gpus

    assert planned("a shared one that is not the fullest", 0) == (0,)
    assert planned("a whole one", 3) == (3,)
    assert planned("one that has too little by now", 0) == (0,)
    assert planned("as before", 0) == (1,)
    assert planned("one that nobody has", 7) == (3,)


def test_rests_that_nobody_knew_of_are_filled_and_given_back() -> None:
    slots = Slots(4, others_shares={0: 500, 2: 200})
    outcome = NodeReserver(slots, 4).reserve(share("r", 250), GpuHardware(Topology.unknown(4)))
    assert isinstance(outcome, Reserved)
    assert list(slots.groups.values()) == [{outcome.gpus[0]: 250}]
    assert outcome.gpus[0] in (1, 3)


def test_memory_asks_for_a_share_of_the_gpu_that_the_node_has() -> None:
    order = Order("r", Needs(1, memory_bytes=20 << 30))
    outcome = NodeReserver(Slots(4), 4).reserve(order, replace(FLAT, gpu_memory_bytes=80 << 30))
    assert isinstance(outcome, Reserved)
    assert outcome.share == 250
    assert isinstance(NodeReserver(Slots(4), 4).reserve(order, FLAT), Refused)


def test_instances_and_whole_gpus_keep_to_themselves() -> None:
    mixed = replace(FLAT, instances={1: "1g.10gb", 2: "2g.20gb"})
    reserver = NodeReserver(Slots(4), 4)
    assert reserver.reserve(Order("a", Needs(1, profile="2g.20gb")), mixed).gpus == (2,)  # type: ignore[union-attr]
    assert reserver.reserve(Order("b", Needs(2)), mixed).gpus == (0, 3)  # type: ignore[union-attr]
    assert isinstance(reserver.reserve(Order("c", Needs(1)), mixed), Refused)
    assert isinstance(reserver.reserve(Order("e", Needs(1, profile="2g.20gb")), mixed), Refused)
    assert reserver.reserve(Order("f", Needs(1, profile="1g.10gb")), mixed).gpus == (1,)  # type: ignore[union-attr]


def test_a_machine_tells_instances_from_whole_gpus() -> None:
    facts = topologies.facts("a100-mig-4x")
    machine = hardware_of(facts, 13)
    assert machine.gpu_memory_bytes == 80 << 30, "that of the whole GPUs"
    node = machine.node(range(13), {})
    assert (node.free, len(node.instances)) == ({11, 12}, 11)
    assert node.profiles == {"1g.10gb", "2g.20gb", "3g.40gb"}


def test_an_instance_of_unknown_size_and_a_gpu_that_is_cut_up_are_given_to_nobody() -> None:
    gpus = (GpuFacts(ordinal=0, mig_enabled=True), GpuFacts(ordinal=1))
    machine = hardware_of(NodeFacts(source="nvml", gpus=gpus), 2)
    node = machine.node({0, 1}, {})
    assert (node.free, node.profiles) == ({1}, frozenset())
    reserver = NodeReserver(Slots(2), 2)
    assert isinstance(reserver.reserve(Order("a", Needs(2)), machine), Refused)
    assert reserver.reserve(Order("b", Needs(1)), machine).gpus == (1,)  # type: ignore[union-attr]


def test_a_share_never_lands_on_an_instance() -> None:
    mixed = replace(FLAT, instances={0: "1g.10gb", 1: "2g.20gb"})
    reserver = NodeReserver(Slots(4), 4)
    assert reserver.reserve(share("a", 500), mixed).gpus == (2,)  # type: ignore[union-attr]


def test_an_instance_must_have_as_much_free_memory_as_is_asked() -> None:
    mixed = replace(
        FLAT, instances={0: "1g.10gb", 1: "1g.10gb", 2: "1g.10gb"}, free_memory={0: 1 << 30, 1: 9 << 30}
    )
    needs = Needs(1, profile="1g.10gb", free_memory_bytes=8 << 30)
    reserver = NodeReserver(Slots(4), 4)
    assert reserver.reserve(Order("a", needs), mixed).gpus == (1,)  # type: ignore[union-attr]
    assert isinstance(reserver.reserve(Order("b", needs), mixed), Refused)


@given(st.integers(0, 10_000))
def test_shares_and_whole_gpus_under_churn_are_exact_or_refused_and_leave_nothing_else(seed: int) -> None:
    dice = random.Random(seed)

    def churn(slots: Slots) -> None:
        if slots.steps > 200 or dice.random() < 0.8:
            return
        gpu = dice.randrange(8)
        if gpu in slots.others:
            slots.others.remove(gpu)
        elif slots.rests()[gpu] == WHOLE:
            slots.others.add(gpu)

    slots = Slots(8, disturb=churn)
    reserver = NodeReserver(slots, 8)
    standing: dict[str, dict[int, int]] = {}
    groups: dict[str, int] = {}
    for step in range(12):
        name = f"r{step}"
        if standing and dice.random() < 0.3:
            gone = dice.choice(sorted(standing))
            reserver.remove(gone, groups.pop(gone))
            del standing[gone]
            continue
        thousandths = dice.choice([100, 250, 500, 1000, 1000])
        count = dice.choice([1, 2]) if thousandths == WHOLE else 1
        order = Order(name, Needs(count, share=thousandths), dice.choice("ab"))
        outcome = reserver.reserve(order, GpuHardware(DGX1))
        if isinstance(outcome, Reserved):
            assert slots.groups[outcome.group] == dict.fromkeys(outcome.gpus, thousandths)
            standing[name], groups[name] = slots.groups[outcome.group], outcome.group
        assert sorted(map(str, slots.groups.values())) == sorted(map(str, standing.values()))


def test_one_look_serves_those_that_follow_and_a_change_since_is_found_out(clock: Clock) -> None:
    looks = []

    class Watched(Slots):
        def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
            looks.append(count)
            return super().lowest_free(count, deadline_seconds)

    slots = Watched(8, others={0})
    reserver = NodeReserver(slots, 8)

    def reserve(name: str) -> tuple[int, ...]:
        outcome = reserver.reserve(Order(name, Needs(2)), GpuHardware(DGX1))
        assert isinstance(outcome, Reserved)
        assert sorted(slots.groups[outcome.group]) == list(outcome.gpus)
        return outcome.gpus

    first = reserve("first")
    reserver.remove("first", max(slots.groups))
    assert (reserve("second"), looks) == (first, [7])
    slots.others = {7}  # as many, but another
    third = reserve("third")
    assert not {7, *first} & set(third) and len(looks) == 1, "it showed when the GPUs were verified"
    reserver.remove("third", max(slots.groups))
    clock.now += free_gpus.TRUST_SECONDS
    assert (reserve("fourth"), looks) == (third, [7, 5])


@pytest.mark.parametrize("others", [set(), {7}])
def test_gpus_of_an_owner_that_has_ended_are_steered_past_until_that_is_known(
    clock: Clock, others: set[int]
) -> None:
    slots = Slots(8, others=others)
    reserver = NodeReserver(slots, 8)
    first = reserver.reserve(Order("lease", Needs(2)), GpuHardware(DGX1))
    assert isinstance(first, Reserved)
    slots.remove(first.group)  # Ray has, with its creator
    for size, name in ((2, "second"), (1, "third")):
        clock.now += free_gpus.TRUST_SECONDS
        outcome = reserver.reserve(Order(name, Needs(size)), GpuHardware(DGX1))
        assert isinstance(outcome, Reserved) and not set(outcome.gpus) & {*first.gpus, *others}
        assert (list(slots.groups[outcome.group]), outcome.attempts) == (list(outcome.gpus), 1)
    reserver.gpus.forget("lease")
    clock.now += free_gpus.TRUST_SECONDS
    rest = set(slots.free())
    outcome = reserver.reserve(Order("all", Needs(len(rest))), GpuHardware(DGX1))
    assert isinstance(outcome, Reserved) and set(first.gpus) < rest == set(outcome.gpus)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (set(), Steering(3, 3, 4, 1)),
        ({0, 3}, Steering(2, 2, 2, 1)),
        ({0, 1, 2}, Steering(3, 3, 1, 1)),
    ],
)
def test_a_trial_has_ray_give_the_highest_free_gpu_and_keeps_nothing(
    others: set[int], expected: Steering
) -> None:
    slots = Slots(4, others=others)
    assert NodeReserver(slots, 4).try_steering() == expected
    assert slots.groups == {}


def test_a_trial_where_none_is_free_says_so() -> None:
    slots = Slots(2, others={0, 1})
    trial = NodeReserver(slots, 2).try_steering()
    assert (trial.wanted, trial.got, trial.free) == (None, None, 0)


def test_a_trial_leaves_alone_what_is_held() -> None:
    slots = Slots(4)
    reserver = NodeReserver(slots, 4)
    held = reserver.reserve(Order("r", Needs(2), "d"), GpuHardware(PAIRS))
    assert isinstance(held, Reserved)
    assert reserver.try_steering() == Steering(3, 3, 2, 1)
    assert list(slots.groups.values()) == [dict.fromkeys(held.gpus, WHOLE)]


def test_a_trial_tells_a_ray_that_gives_gpus_in_another_way() -> None:
    class Highest(Slots):
        def free(self) -> list[int]:
            return super().free()[::-1]

    slots = Highest(4)
    trial = NodeReserver(slots, 4).try_steering()
    assert (trial.wanted, trial.got, trial.attempts) == (3, 0, reservation.MAX_ATTEMPTS)
    assert slots.groups == {}


@given(st.integers(0, 2**32))
def test_a_trial_beside_others_ends_and_keeps_nothing(seed: int) -> None:
    dice = random.Random(seed)

    def disturb(slots: Slots) -> None:
        if dice.random() < 0.3:
            free = slots.free()
            if free and dice.random() < 0.5:
                slots.others.add(dice.choice(free))
            elif slots.others:
                slots.others.remove(dice.choice(sorted(slots.others)))

    slots = Slots(4, others={1}, disturb=disturb)
    trial = NodeReserver(slots, 4).try_steering()
    assert trial.attempts <= reservation.MAX_ATTEMPTS
    assert slots.groups == {}
