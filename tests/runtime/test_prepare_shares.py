"""A node's part in a group of several shares, beside whole GPUs or not: prepared, confirmed, and let go."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.core.needs import WHOLE, Needs
from placement.core.node import Node
from placement.runtime import free_gpus
from placement.runtime.orders import GpuHardware, Order, Prepared, Refused, Reserved
from placement.runtime.reservation import NodeReserver
from tests.runtime.test_prepare import DGX1, FLAT, PAIRS, share
from tests.runtime.test_reservation import Clock, Slots


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.rule(monkeypatch)
    return clock


def mixture(name: str, *amounts: float) -> Order:
    """An order of bundles: bundle 0 has so many GPUs, or such a share, and so on."""
    thousandths = tuple(round(amount * WHOLE) for amount in amounts)
    needs = Needs(sum(amount // WHOLE for amount in thousandths), amounts=thousandths)
    return Order(name, needs, "d", amounts=dict(enumerate(amounts)))


def lend(slots: Slots, reserver: NodeReserver, wanted: Order, machine: GpuHardware) -> int | Refused | None:
    """A group of a caller, who has gone on where it is not confirmed; or why nothing was prepared for it."""
    prepared = reserver.prepare(wanted, machine, 1)
    if isinstance(prepared, Refused):
        return prepared
    group = slots.together(list(wanted.amounts.values()))
    got = group in slots.groups
    reserver.finish(prepared, used=got)
    bundles = [bundle for bundle, amount in wanted.amounts.items() for _ in range(max(1, int(amount)))]
    slots_of = reserver.confirm(wanted, prepared, group, bundles) if got and group in slots.groups else None
    if slots_of is None:
        slots.remove(group)
        return None
    given = slots.bundles[group]
    assert slots_of == [(gpu, bundle) for bundle, gpus in enumerate(given) for gpu in gpus]
    assert slots.groups[group] == dict(reserver.gpus.held[wanted.name].taken) == dict(prepared.taken)
    return group


def test_shares_and_whole_gpus_are_given_as_they_were_prepared() -> None:
    slots = Slots(4, others={0})
    reserver = NodeReserver(slots, 4)
    wanted = mixture("r", 0.5, 2, 0.5)
    prepared = reserver.prepare(wanted, PAIRS, 1)
    assert isinstance(prepared, Prepared)
    assert (prepared.sets, prepared.ray_gpus, prepared.attempts) == (((2, 3),), (2, 3), 1)
    assert (prepared.taken, prepared.foreign_gpus) == ({1: 1000, 2: 1000, 3: 1000}, (0,))
    group = slots.together([0.5, 2, 0.5])
    reserver.finish(prepared, used=True)
    assert reserver.confirm(wanted, prepared, group, [0, 1, 1, 2]) == [(1, 0), (2, 1), (3, 1), (1, 2)]
    assert slots.groups == {group: {1: 1000, 2: 1000, 3: 1000}}
    assert reserver.gpus.rests() == {}, "nothing is left of any"


def test_what_is_not_prepared_is_refused_and_nothing_stays_held() -> None:
    slots = Slots(4, others={0, 1})
    refused = NodeReserver(slots, 4).prepare(mixture("r", 2, 0.5), PAIRS, 1)
    assert isinstance(refused, Refused)
    assert (refused.reason, refused.full) == (
        "too little of its GPUs is free for 2 GPUs and 0.5 of a GPU",
        True,
    )
    assert (slots.groups, slots.free()) == ({}, [2, 3])


def test_a_group_that_is_gone_before_it_is_confirmed_counts_as_nothing() -> None:
    slots = Slots(4)
    reserver = NodeReserver(slots, 4)
    prepared = reserver.prepare(mixture("r", 0.5, 0.5), PAIRS, 1)
    assert isinstance(prepared, Prepared)

    class Gone(Slots):
        def gpus_of(self, group: int, amounts: Mapping[int, float]) -> list[int]:
            return []

    slots.__class__ = Gone
    reserver.finish(prepared, used=True)
    assert reserver.confirm(mixture("r", 0.5, 0.5), prepared, 99, [0, 1]) is None
    assert (reserver.gpus.held, slots.groups) == ({}, {})


def test_parts_that_may_not_be_used_are_filled_whatever_ray_prefers() -> None:
    """Of GPU 0 less is left than of GPU 1, which is named: Ray alone would take that."""
    slots = Slots(4)
    reserver = NodeReserver(slots, 4)
    for name, gpu, thousandths in (("a", 0, 700), ("b", 1, 600)):
        wanted = replace(share(name, thousandths), planned=gpu)
        assert isinstance(reserver.reserve(wanted, FLAT), Reserved)
    assert slots.rests() == {0: 300, 1: 400, 2: 1000, 3: 1000}
    named = mixture("r", 0.25, 1)
    named = replace(named, needs=named.needs._replace(named=(1, 3)))
    group = lend(slots, reserver, named, FLAT)
    assert isinstance(group, int)
    assert slots.groups[group] == {1: 250, 3: 1000}
    assert slots.rests() == {0: 300, 1: 150, 2: 1000, 3: 0}


@pytest.mark.parametrize("others", [(), (5,)])
def test_a_part_whose_owner_has_given_it_back_is_not_used_until_that_is_known(
    clock: Clock, others: tuple[int, ...]
) -> None:
    slots = Slots(8, others={*others})
    reserver = NodeReserver(slots, 8)
    first = lend(slots, reserver, mixture("first", 0.25, 0.5), DGX1)
    second = lend(slots, reserver, mixture("second", 0.1, 0.1), DGX1)
    assert isinstance(first, int) and isinstance(second, int)
    [gpu] = {*slots.groups[first]} & {*slots.groups[second]}
    slots.remove(first)  # its owner has, and the service has not heard of it
    clock.now += free_gpus.TRUST_SECONDS
    third = lend(slots, reserver, mixture("third", 0.25, 0.3), DGX1)
    if others:  # what the books show may as well be parts of others
        assert third is None
        third = lend(slots, reserver, mixture("third", 0.25, 0.3), DGX1)
    assert isinstance(third, int)
    assert gpu not in slots.groups[third]
    reserver.gpus.forget("first")
    clock.now += free_gpus.TRUST_SECONDS
    fourth = lend(slots, reserver, mixture("fourth", 0.3, 0.3), DGX1)
    assert isinstance(fourth, int) and gpu in slots.groups[fourth]


AMOUNTS = (0.001, 0.1, 0.25, 0.25, 0.3, 0.5, 0.5, 0.6, 0.999, 1, 1, 2)


def some_amounts(chance: random.Random) -> Sequence[float]:
    amounts = [*chance.choices(AMOUNTS, k=chance.randint(1, 4)), chance.choice(AMOUNTS[:9])]
    return chance.sample(amounts, k=len(amounts))


@given(seed=st.integers(0, 2**32))
def test_undisturbed_whatever_fits_is_given_at_the_first_attempt(seed: int) -> None:
    chance = random.Random(seed)
    count = 8
    slots = Slots(count, others=set(chance.sample(range(count), chance.randint(0, 4))))
    reserver = NodeReserver(slots, count)
    groups: dict[str, int] = {}
    for step in range(8):
        if groups and chance.random() < 0.3:
            name = chance.choice(sorted(groups))
            slots.remove(groups.pop(name))
            reserver.gpus.forget(name)
            continue
        wanted = mixture(f"r{step}", *some_amounts(chance))
        rests = {gpu: rest for gpu, rest in slots.rests().items() if 0 < rest < WHOLE}
        node = Node("n", "n", topology=DGX1.topology, free=frozenset(slots.free()), rests=rests)
        expected = node.choose(wanted.needs)
        outcome = lend(slots, reserver, wanted, DGX1)
        if expected is None:
            assert isinstance(outcome, Refused) and outcome.full
            continue
        assert isinstance(outcome, int), outcome
        groups[wanted.name] = outcome
        assert slots.groups[outcome] == dict(zip(expected.gpus, expected.shares, strict=True))
        assert {*slots.groups} == {*groups.values()}


@pytest.mark.parametrize("unnoticed", [False, True])
@given(seed=st.integers(0, 2**32))
def test_whoever_interferes_mixtures_are_exact_or_nothing_of_them_is_held(unnoticed: bool, seed: int) -> None:
    """Others come and go with GPUs and parts of them, and owners remove groups without a word."""
    chance = random.Random(seed)
    groups: dict[str, int] = {}

    def churn(slots: Slots) -> None:
        if chance.random() < 0.8:
            return
        gpu = chance.randrange(8)
        if chance.random() < 0.3:
            slots.others_shares.pop(gpu, None)
            slots.others.discard(gpu)
        elif slots.rests()[gpu] == WHOLE and chance.random() < 0.5:
            slots.others.add(gpu)
        elif slots.rests()[gpu] >= 300:
            slots.others_shares[gpu] = slots.others_shares.get(gpu, 0) + 300
        elif groups and unnoticed:
            slots.remove(groups.pop(chance.choice(sorted(groups))))

    slots = Slots(8, disturb=churn)
    reserver = NodeReserver(slots, 8)
    for step in range(8):
        if groups and chance.random() < 0.3:
            name = chance.choice(sorted(groups))
            slots.remove(groups.pop(name))
            reserver.gpus.forget(name)
            continue
        wanted = mixture(f"r{step}", *some_amounts(chance))
        outcome = lend(slots, reserver, wanted, DGX1)
        if isinstance(outcome, int):
            groups[wanted.name] = outcome
        assert {*slots.groups} <= {*groups.values()}, "no filler, and no hold, is left"


@given(seed=st.integers(0, 2**32))
def test_parts_that_others_use_are_found_out_and_steered_past(seed: int) -> None:
    """What fits on GPUs of which nobody uses parts is given after a few attempts, wherever others have parts."""
    chance = random.Random(seed)
    theirs = {gpu: chance.choice((100, 500, 900)) for gpu in chance.sample(range(8), chance.randint(1, 3))}
    slots = Slots(8, others_shares=theirs)
    reserver = NodeReserver(slots, 8)
    for step in range(3):
        amounts = [max(amount, 0.1 if len(theirs) > 1 else 0) for amount in some_amounts(chance)]
        wanted = mixture(f"r{step}", *amounts)
        needed = -(-sum(wanted.needs.amounts) // WHOLE) + len(wanted.needs.amounts)
        if needed > len(slots.free()):
            break
        outcomes = [lend(slots, reserver, wanted, DGX1)]
        while not isinstance(outcomes[-1], int) and len(outcomes) < 4:
            outcomes.append(lend(slots, reserver, wanted, DGX1))
        assert isinstance(outcomes[-1], int), outcomes
        assert not {*slots.groups[outcomes[-1]]} & {*theirs}
