"""A node's part in a replica over several nodes: its GPUs are made the lowest free ones, confirmed, and let go."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import topologies
from placement.core.needs import WHOLE, Needs, Within
from placement.core.score import ray_set
from placement.core.topology import Topology
from placement.runtime import free_gpus, reservation
from placement.runtime.orders import GpuHardware, Order, Prepared, Refused, Reserved
from placement.runtime.reservation import NodeReserver
from tests.runtime.test_reservation import Clock, Slots

DGX1, PAIRS = GpuHardware(topologies.load("dgx-1v")), GpuHardware(topologies.load("a100-pcie-4x"))


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.rule(monkeypatch)
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
    machine: GpuHardware,
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
    reserver.finish(prepared, used=False)
    assert slots.groups == {}


def test_what_is_confirmed_is_known_as_ours_and_by_bundle() -> None:
    slots = Watched(8, others={0})
    reserver = NodeReserver(slots, 8)
    prepared = reserver.prepare(order(2), DGX1, 2)
    assert isinstance(prepared, Prepared)
    wanted = sorted(gpu for gpus in prepared.sets for gpu in gpus)
    group = slots.reserve("r", {"GPU": 1}, 4)
    reserver.finish(prepared, used=True)
    found = reserver.confirm(order(2), prepared, group, range(8, 12))
    assert found == list(zip(wanted, range(8, 12), strict=True))
    assert list(slots.groups) == [group]
    after = reserver.reserve(order(2, "s"), DGX1)
    assert isinstance(after, Reserved)
    assert not set(after.gpus) & {0, *wanted}
    assert slots.looks == 1, "nothing that is not ours has changed"
    reserver.gpus.forget("r")
    assert reserver.gpus.foreign == {0}, "nothing that is not ours has changed"


def test_other_gpus_than_those_prepared_are_not_confirmed() -> None:
    slots = Slots(4)
    reserver = NodeReserver(slots, 4)
    prepared = reserver.prepare(order(2), PAIRS, 1)
    assert isinstance(prepared, Prepared)
    slots.others = {prepared.sets[0][0]}  # somebody was faster
    group = slots.reserve("r", {"GPU": 1}, 2)
    assert reserver.confirm(order(2), prepared, group, [0, 1]) is None
    slots.remove(group)
    reserver.finish(prepared, used=False)
    again = reserver.prepare(order(2), PAIRS, 1)
    assert isinstance(again, Prepared)
    assert (again.sets, again.foreign_gpus) == (((2, 3),), (0,))


@pytest.mark.parametrize("others", [set(), {7}])
def test_a_node_is_not_looked_at_for_what_owners_have_removed(clock: Clock, others: set[int]) -> None:
    slots = Watched(8, others=others)
    reserver = NodeReserver(slots, 8)
    reserver.look_ahead(1)
    looks = slots.looks

    def lend(name: str) -> tuple[int, tuple[int, ...]]:
        clock.now += free_gpus.BOOKS_LAG_SECONDS * 2
        prepared = reserver.prepare(order(2, name), DGX1, 1)
        assert isinstance(prepared, Prepared) and prepared.attempts == 1
        group = create(slots, prepared)
        reserver.finish(prepared, used=True)
        assert reserver.confirm(order(2, name), prepared, group, [0, 1])
        return group, prepared.sets[0]

    first, gpus = lend("first")
    slots.remove(first)  # its owner has, and the service has not heard of it
    assert not {*gpus} & {*lend("second")[1]}, "they are given to nobody until it has"
    clock.now -= free_gpus.BOOKS_LAG_SECONDS * 2
    assert not {*gpus} & {*lend("at once")[1]}, "and steered past without a look at the books"
    slots.remove(max(slots.groups))
    reserver.gpus.forget("at once")
    reserver.gpus.forget("first")
    assert lend("third")[1] == gpus
    assert slots.looks == looks
    slots.others = {*others, slots.free()[-1]}
    lend("fourth")
    assert slots.looks == looks + 1, "somebody has come, which the books tell"


@pytest.mark.parametrize(
    ("machine", "others", "gpus", "sets"),
    [
        (PAIRS, {0, 1, 2}, 2, 1),
        (PAIRS, {0}, 2, 2),
        (GpuHardware(PAIRS.topology, lost=frozenset({1, 3})), set(), 3, 1),
        (GpuHardware(Topology.unknown(4)), {3}, 4, 1),
    ],
)
def test_a_node_with_too_little_refuses_and_holds_nothing(
    machine: GpuHardware, others: set[int], gpus: int, sets: int
) -> None:
    slots = Slots(4, others=others)
    outcome = NodeReserver(slots, 4).prepare(order(gpus), machine, sets)
    assert isinstance(outcome, Refused)
    assert (outcome.full, outcome.attempts, slots.groups) == (True, reservation.MAX_LOOKS, {})
    asked = (
        f"and as demanded for {sets} x {gpus}" if sets > 1 else f"healthy and as close as demanded for {gpus}"
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
    reserver.finish(prepared, used=True)
    prepared = reserver.prepare(order(4), DGX1, 1)
    assert isinstance(prepared, Prepared)
    assert slots.looks == 1
    reserver.finish(prepared, used=False)
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
            reserver.finish(outcome, used=chance.random() < 0.5)
        assert slots.groups == {}


def share(name: str, thousandths: int) -> Order:
    return Order(name, Needs(1, share=thousandths), "d")


FLAT = GpuHardware(Topology.unknown(4))
CUT = replace(FLAT, instances={0: "a", 1: "a", 2: "b"})


def create(slots: Slots, prepared: Prepared, beside: dict[str, float] | None = None) -> int:
    """What a caller does between prepare and confirm."""
    gpus = [gpu for gpus in prepared.sets for gpu in gpus]
    return slots.reserve("r", prepared.bundle(beside or {}), len(gpus))


def test_a_bundle_is_one_gpu_or_the_share_of_it_and_what_is_beside() -> None:
    whole = Prepared(((2, 3),), (0, 1), (), 1)
    assert whole.bundle({"CPU": 4.0}) == {"GPU": 1.0, "CPU": 4.0}
    assert replace(whole, share=250).bundle({}) == {"GPU": 0.25}


@pytest.mark.parametrize(
    ("case", "machine", "others", "asked", "expected"),
    [
        ("the pair that is whole", PAIRS, {0}, Needs(2), (2, 3)),
        ("the instance of that profile", CUT, set(), Needs(1, profile="b"), (2,)),
        ("a GPU that is no instance", CUT, set(), Needs(1), (3,)),
        ("a share, on the GPU that others miss least", PAIRS, {3}, Needs(1, share=250), (2,)),
        ("a share by memory", replace(FLAT, gpu_memory_bytes=80 << 30), {0}, Needs(1, memory_bytes=20 << 30), (1,)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_caller_creates_is_what_the_node_would_have_reserved(
    case: str, machine: GpuHardware, others: set[int], asked: Needs, expected: tuple[int, ...]
) -> None:
    wanted = Order("r", asked, "d")
    theirs = NodeReserver(Slots(4, others=set(others)), 4).reserve(wanted, machine)
    assert isinstance(theirs, Reserved) and theirs.gpus == expected
    slots = Slots(4, others=set(others))
    reserver = NodeReserver(slots, 4)
    prepared = reserver.prepare(wanted, machine, 1)
    assert isinstance(prepared, Prepared)
    assert (prepared.sets, prepared.share) == ((expected,), theirs.share)
    assert prepared.ray_gpus == ray_set(theirs.free, len(expected))
    group = create(slots, prepared)
    reserver.finish(prepared, used=True)
    assert reserver.confirm(wanted, prepared, group, range(len(expected))) == [
        (gpu, bundle) for bundle, gpu in enumerate(expected)
    ]
    assert slots.groups == {group: dict.fromkeys(expected, theirs.share)}


@pytest.mark.parametrize(
    "asked", [Needs(2), Needs(1, profile="none"), Needs(1, share=900), Needs(1, memory_bytes=1)]
)
def test_a_caller_hears_the_same_refusal_as_the_node_would_give(asked: Needs) -> None:
    others, shares = {0, 1, 2}, {3: 200}
    wanted = Order("r", asked, "d")
    refused = NodeReserver(Slots(4, others, shares), 4).reserve(wanted, FLAT)
    slots = Slots(4, others, shares)
    outcome = NodeReserver(slots, 4).prepare(wanted, FLAT, 1)
    assert isinstance(outcome, Refused) and outcome == refused
    assert slots.groups == {}


def test_room_is_left_for_those_that_follow() -> None:
    """The best pair of these would leave none for another."""
    machine = GpuHardware(topologies.load("dgx-1v"))
    floor = Needs(2, within=Within.NVLINK)
    for others in itertools.combinations(range(8), 4):
        slots = Slots(8, others=set(others))
        reserver = NodeReserver(slots, 8)
        expected = NodeReserver(Slots(8, others=set(others)), 8).reserve(Order("r", floor), machine, 1)
        prepared = reserver.prepare(Order("r", floor), machine, 1, 1)
        if isinstance(prepared, Refused):
            assert isinstance(expected, Refused)
        else:
            assert isinstance(expected, Reserved) and prepared.sets == (expected.gpus,)


def test_shares_are_packed_and_steered_past_the_rests_that_ray_would_prefer() -> None:
    slots = Slots(4)
    reserver = NodeReserver(slots, 4)
    for name, thousandths in [("a", 600), ("b", 700)]:
        reserver.reserve(share(name, thousandths), FLAT)
    before = dict(slots.groups)
    assert slots.rests() == {0: 400, 1: 300, 2: 1000, 3: 1000}
    planned = replace(share("c", 200), planned=0)  # Ray would give it on GPU 1
    prepared = reserver.prepare(planned, FLAT, 1)
    assert isinstance(prepared, Prepared) and prepared.sets == ((0,),)
    group = create(slots, prepared)
    reserver.finish(prepared, used=True)
    assert reserver.confirm(planned, prepared, group, [0]) == [(0, 0)]
    assert slots.groups == before | {group: {0: 200}}
    reserver.gpus.forget("c")
    slots.remove(group)
    again = reserver.reserve(share("e", 400), FLAT)
    assert isinstance(again, Reserved) and again.gpus == (0,), "it is known that the share is free again"


def test_a_share_that_lands_on_a_rest_that_nobody_knew_of_is_steered_past_it_the_next_time() -> None:
    slots = Slots(4, others_shares={0: 500, 2: 200})
    reserver = NodeReserver(slots, 4)
    wanted = share("r", 250)
    attempts = 0
    while True:
        attempts += 1
        prepared = reserver.prepare(wanted, FLAT, 1)
        assert isinstance(prepared, Prepared)
        group = create(slots, prepared)
        reserver.finish(prepared, used=True)
        if reserver.confirm(wanted, prepared, group, [0]) is not None:
            break
        slots.remove(group)
        assert slots.groups == {}
    assert attempts == 2
    assert slots.groups == {group: {prepared.sets[0][0]: 250}}
    assert prepared.sets[0][0] in (1, 3)


@given(seed=st.integers(0, 10_000))
def test_whoever_interferes_a_share_is_exact_or_nothing_of_it_is_held(seed: int) -> None:
    chance = random.Random(seed)

    def churn(slots: Slots) -> None:
        gpu = chance.randrange(4)
        if chance.random() < 0.2 and gpu in slots.others:
            slots.others.remove(gpu)
        elif chance.random() < 0.2 and slots.rests()[gpu] == WHOLE:
            slots.others.add(gpu)

    slots = Slots(4, disturb=churn, others_shares={chance.randrange(4): 300})
    reserver = NodeReserver(slots, 4)
    standing: dict[int, dict[int, int]] = {}
    for step in range(6):
        wanted = share(f"r{step}", chance.choice([100, 250, 500]))
        prepared = reserver.prepare(wanted, FLAT, 1)
        if isinstance(prepared, Prepared):
            assert set(slots.groups) == set(prepared.fillers) | set(standing)
            group = create(slots, prepared)
            used = chance.random() < 0.8
            reserver.finish(prepared, used)
            if used and group in slots.groups and reserver.confirm(wanted, prepared, group, [0]):
                standing[group] = {prepared.sets[0][0]: wanted.needs.share}
            else:
                slots.remove(group)
        assert slots.groups == standing
