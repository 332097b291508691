"""A node's actor between prepare and confirm: what it prepared is let go if nobody comes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from placement.core.needs import WHOLE, Needs
from placement.runtime import node_agent
from placement.runtime.node_agent import NodePlacementActor, Part
from placement.runtime.orders import Order, Prepared, Refused
from tests.runtime.test_reservation import Slots


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Slots:
    slots = Slots(4, others={0})
    monkeypatch.setattr(node_agent, "NodeGroups", lambda *_: slots)
    return slots


@pytest.fixture
def actor(slots: Slots) -> NodePlacementActor:
    return NodePlacementActor("n", 4, "a100-pcie-4x", None)


PAIR, QUARTER = (
    Order("placement:t:d:0:x", Needs(2), "d"),
    Order("placement:t:s:0:x", Needs(1, share=250), "s"),
)


def create(slots: Slots, order: Order, prepared: Prepared | Refused) -> Any:
    assert isinstance(prepared, Prepared) and not prepared.fillers, "who asks has no use for them"
    return slots.reserve(order.name, prepared.bundle(order.beside), len(prepared.sets[0]))


def test_what_is_confirmed_is_told_with_how_good_it_is(actor: NodePlacementActor, slots: Slots) -> None:
    group = create(slots, PAIR, actor.prepare(PAIR, 1))
    part = actor.confirm(PAIR, group, [0, 1])
    assert isinstance(part, Part)
    assert (part.sets, part.slots, part.ray_gpus) == (((2, 3),), [(2, 0), (3, 1)], (1, 2))
    assert (part.score.link_name, part.ray_score.link_name, part.share) == ("NV12", "SYS", WHOLE)
    assert part.sorted_score == part.score
    share = create(slots, QUARTER, actor.prepare(QUARTER, 1))
    part = actor.confirm(QUARTER, share, [0])
    assert isinstance(part, Part) and (part.sets, part.share) == (((1,),), 250)
    assert slots.groups == {group: {2: WHOLE, 3: WHOLE}, share: {1: 250}}


def test_groups_that_an_engine_may_not_keep_are_told_with_what_it_makes_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slots = Slots(8, others={0})
    monkeypatch.setattr(node_agent, "NodeGroups", lambda *_: slots)
    actor = NodePlacementActor("n", 8, "dgx-1v", None)
    assert isinstance(actor.prepare(PAIR, 3), Prepared)
    part = actor.confirm(PAIR, slots.reserve(PAIR.name, {"GPU": 1}, 6), range(6))
    assert isinstance(part, Part)
    assert part.sets == ((1, 5), (2, 3), (4, 7))
    assert part.slots == [(1, 0), (5, 4), (2, 1), (3, 2), (4, 3), (7, 5)]
    assert (part.score.known_gb_per_s, part.sorted_score.known_gb_per_s) == (40.0, 5.302)


@pytest.mark.parametrize(("order", "others"), [(PAIR, {0}), (QUARTER, {3})], ids=["whole", "share"])
def test_what_nobody_comes_for_is_let_go(
    actor: NodePlacementActor,
    slots: Slots,
    order: Order,
    others: set[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_agent, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(node_agent, "GRACE_SECONDS", 0.0)
    slots.others = others
    assert isinstance(actor.prepare(order, 1), Prepared) and slots.groups
    end = time.monotonic() + 10
    while slots.groups and time.monotonic() < end:
        time.sleep(0.01)
    assert slots.groups == {}
    late = slots.reserve(order.name, {"GPU": 1.0}, 1)
    refused = actor.confirm(order, late, [0])
    assert isinstance(refused, Refused) and refused.reason == "the GPUs that were prepared had been let go"
    actor.release([(order.name, late)])
    assert slots.groups == {}


def test_a_group_that_does_not_get_ready_is_refused_with_the_reason(
    actor: NodePlacementActor, slots: Slots
) -> None:
    """The caller does not wait for it; what is prepared is held until here."""
    prepared = actor.prepare(PAIR, 1)
    assert isinstance(prepared, Prepared) and slots.groups
    slots.others = {0, 2, 3}  # somebody was faster
    group = slots.reserve(PAIR.name, prepared.bundle({}), 2)
    refused = actor.confirm(PAIR, group, [0, 1])
    assert isinstance(refused, Refused) and not refused.full
    assert refused.reason == "another Ray user took GPUs meanwhile, or CPUs or memory are short"
    assert slots.groups == {}


def test_a_new_preparation_lets_go_of_the_one_before(actor: NodePlacementActor, slots: Slots) -> None:
    assert isinstance(actor.prepare(PAIR, 1), Prepared)
    held = set(slots.groups)
    assert held, "GPU 1 is kept from Ray"
    group = create(slots, QUARTER, actor.prepare(QUARTER, 1))
    assert isinstance(actor.confirm(QUARTER, group, [0]), Part) and set(slots.groups) == {group}


def test_what_ray_alone_would_give_is_another_set_for_each_replica(
    actor: NodePlacementActor, slots: Slots
) -> None:
    """Each pair of ours is on a bridge; Ray's are not."""
    slots.others = {2}
    [filled] = actor.reserve([PAIR]).filled
    assert (filled.reserved.gpus, filled.ray_gpus) == ((0, 1), (0, 1))
    actor.release([(PAIR.name, filled.reserved.group)])
    orders = [replace(PAIR, name=f"placement:t:d:{i}:x", needs=Needs(1)) for i in range(3)]
    one, two, three = actor.reserve(orders).filled
    assert {one.reserved.gpus, two.reserved.gpus, three.reserved.gpus} == {(0,), (1,), (3,)}
    assert one.reserved.gpus == (3,), "the GPU without its partner comes first"
    assert [one.ray_gpus, two.ray_gpus, three.ray_gpus] == [(0,), (1,), (3,)]


def test_it_chooses_by_the_rates_that_the_plan_was_made_with(slots: Slots) -> None:
    slots.others = set()
    actor = NodePlacementActor("n", 4, "a100-pcie-4x", None)
    slow = replace(PAIR, measured=(((0, 1), 12_000), ((2, 3), 207_000)))
    [filled] = actor.reserve([slow]).filled
    assert (filled.reserved.gpus, filled.score.known_gb_per_s, filled.score.measured) == ((2, 3), 207.0, True)
    group = create(slots, slow, actor.prepare(slow, 1))
    part = actor.confirm(slow, group, [0, 1])
    assert isinstance(part, Part) and part.sets == ((0, 1),)
    assert (part.score.known_gb_per_s, part.score.measured) == (12.0, True), "no others are left"
