"""Declarations that wait, owners and times: the real controller on a make-believe Ray."""

from __future__ import annotations

import itertools
import json
import threading
from functools import partial
from typing import Any

import pytest

from placement.core.lifecycle import State
from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.errors import (
    DeploymentConflict,
    LeaseExpired,
    NotEnoughGpus,
    PartlyApplied,
    UnknownDeployment,
    UnknownNode,
    Unplaceable,
)
from placement.runtime import ledger, lifetimes, queue
from placement.runtime.asking import Asked
from placement.runtime.asking import State as Became
from placement.runtime.claims import Claim
from placement.runtime.clock import Clock
from placement.runtime.declarations import parse
from placement.runtime.deployment_state import Owner
from placement.runtime.queue import Ticket
from placement.runtime.reconciler import Work
from placement.wire.node_types import NodeType
from tests.properties.test_service import (
    AtOnce,
    DirectService,
    Group,
    NoAutoscaler,
    Ray,
    places,
)


@pytest.fixture
def node_names() -> set[str]:
    return {"x"}


def one(name: str = "a", **fields: Any) -> dict[str, Any]:
    return {"name": name, "model": "m", **fields}


def placed(service: DirectService, name: str = "a") -> dict[int, int]:
    """Replica -> how many GPUs it has."""
    return {a.replica_index: len(a.gpus) for a in service.get(name).assignments}


def a_while_passes(service: DirectService) -> None:
    Clock(service, AtOnce()).look()


def told(service: DirectService, name: str = "a") -> list[tuple[int | None, str]]:
    return [(event["replica"], event["state"]) for event in service.events(name)]


def test_what_finds_no_room_waits_with_its_declaration_and_gets_room_when_there_is_some(
    outside: Ray, service: DirectService
) -> None:
    result = service.apply(one(gpus=2, replicas=3))
    assert (placed(service), list(result.pending)) == ({0: 2, 1: 2}, [2])
    assert "needs 2 GPUs free on one node" in result.pending[2]
    recorded = json.loads(outside.store[b"deployment/a"])
    assert recorded["deployment"]["replicas"] == 3
    assert recorded["waiting_since"] > 0
    outside.nodes.add("y")
    a_while_passes(service)
    assert (placed(service), service.get("a").pending) == ({0: 2, 1: 2, 2: 2}, {})
    assert json.loads(outside.store[b"deployment/a"])["waiting_since"] is None


def test_a_declaration_that_waits_survives_the_service_and_keeps_its_place_in_the_queue(
    outside: Ray, service: DirectService
) -> None:
    service.place(one("holds", gpus=4))
    service.apply(one("first", gpus=3))
    service.apply(one("second", gpus=1))
    service = DirectService()
    assert service.state.queue() == ["first", "second"]
    assert [list(service.get(name).pending) for name in ("first", "second")] == [[0], [0]]
    service.release("holds")
    a_while_passes(service)
    assert (placed(service, "first"), placed(service, "second")) == ({0: 3}, {0: 1})
    assert service.state.queue() == []


def test_who_waits_longest_gets_room_first_and_the_small_pass_by_the_large_only_where_these_do_not_fit(
    outside: Ray, service: DirectService
) -> None:
    service.place(one("holds", gpus=2))
    service.place(one("also", gpus=2))
    service.apply(one("large", gpus=4))
    service.apply(one("small", gpus=2))
    service.release("also")
    a_while_passes(service)
    assert (list(service.get("large").pending), placed(service, "small")) == ([0], {0: 2})
    service.release("small")
    service.release("holds")
    a_while_passes(service)
    assert placed(service, "large") == {0: 4}


def test_a_gang_gets_all_its_places_at_once_or_waits(outside: Ray, service: DirectService) -> None:
    result = service.apply(one(gpus=2, replicas=3, gang=True))
    assert (placed(service), list(result.pending)) == ({}, [0, 1, 2])
    assert not outside.groups
    outside.nodes.add("y")
    a_while_passes(service)
    assert placed(service) == {0: 2, 1: 2, 2: 2}


def test_a_replacement_that_finds_no_room_waits_and_what_is_there_stays(
    outside: Ray, service: DirectService
) -> None:
    service.place(one("other"))
    before = service.place(one(gpus=2)).assignments
    result = service.apply(one(gpus=4))
    assert ([a.placement_group for a in result.assignments], list(result.pending)) == (
        [a.placement_group for a in before], [0],
    )  # fmt: skip
    known = service.state.deployments["a"]
    assert (known.generation, known.outdated, known.deployment.gpus) == (2, [0], 4)
    service = DirectService()
    assert service.state.deployments["a"].outdated == [0], "also after a restart"
    outside.nodes.add("y")
    a_while_passes(service)
    assert (placed(service), service.state.deployments["a"].earlier) == ({0: 4}, {})
    assert len(outside.groups) == 2, "what was replaced is given back"


def test_of_several_that_are_to_be_replaced_each_is_as_soon_as_it_can_be(
    outside: Ray, service: DirectService
) -> None:
    service.apply(one(gpus=1, replicas=2))
    outside.take(Group("", 900), "x", range(1), WHOLE, 0)
    result = service.apply(one(gpus=2, replicas=2))
    assert (placed(service), list(result.pending)) == ({0: 2, 1: 1}, [1])
    outside.nodes.add("y")
    a_while_passes(service)
    assert placed(service) == {0: 2, 1: 2}


def test_what_does_not_fit_changes_nothing_if_it_is_atomic(outside: Ray, service: DirectService) -> None:
    with pytest.raises(NotEnoughGpus):
        service.apply(one(gpus=2, replicas=3), atomic=True)
    with pytest.raises(NotEnoughGpus):
        service.apply_all([one("b"), one(gpus=2, replicas=3)], atomic=True)
    assert not outside.groups and not service.state.deployments
    assert b"deployment/a" not in outside.store


def test_the_trouble_of_one_deployment_does_not_stop_the_others(outside: Ray, service: DirectService) -> None:
    unknown = one("b", constraints={"gpu_nodes": ["nowhere"]})
    with pytest.raises(PartlyApplied) as caught:
        service.apply_all([one("a", gpus=4), unknown, one("c", gpus=2)])
    assert caught.value.applied == ("a", "c")
    assert caught.value.failures["b"]["code"] == UnknownNode.code
    assert (placed(service, "a"), list(service.get("c").pending)) == ({0: 4}, [0])


def test_a_deadline_ends_what_has_no_place_and_gives_up_what_has_some(
    outside: Ray, service: DirectService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.apply(one("none", gpus=8, deadline_seconds=60))
    service.apply(one("some", gpus=3, replicas=2, deadline_seconds=60))
    service.lifetimes.end_what_is_over(
        lambda owner: False, service.state.deployments["none"].declared_at + 30
    )
    assert service.state.queue() == ["none", "some"]
    service.lifetimes.end_what_is_over(
        lambda owner: False, service.state.deployments["some"].declared_at + 61
    )
    with pytest.raises(UnknownDeployment):
        service.get("none")
    assert told(service, "none")[-2:] == [(None, "ended"), (0, "released")]
    assert "no room for 60 s" in service.get("some").pending[1]
    assert service.state.queue() == []
    outside.nodes.add("y")
    a_while_passes(service)
    assert placed(service, "some") == {0: 3}, "it is not tried any more"
    assert placed_after_applying_again(service) == {0: 3, 1: 3}


def placed_after_applying_again(service: DirectService) -> dict[int, int]:
    service.apply(one("some", gpus=3, replicas=2, deadline_seconds=60))
    return placed(service, "some")


def test_what_outlives_its_owner_or_its_time_is_released(outside: Ray, service: DirectService) -> None:
    job: Owner = {"kind": "job", "job": "01000000"}
    DirectService.__mro__[1].place(service, parse(one("owned"), None), job)  # type: ignore[attr-defined]
    service.place(one("brief", ttl_seconds=100))
    began = service.state.deployments["brief"].declared_at
    a_while_passes_at(service, began + 50, set())
    assert set(service.state.names()) == {"owned", "brief"}
    service = DirectService()
    a_while_passes_at(service, began + 50, {"01000000"})
    assert service.state.names() == ("brief",)
    expires = service.state.deployments["brief"].expires_at
    assert expires is not None
    renewed = service.renew("brief")
    assert renewed is not None and renewed >= expires
    a_while_passes_at(service, renewed + 1, set())
    assert service.state.names() == () and not outside.groups


@pytest.mark.parametrize("again", ["apply", "place"])
def test_to_ask_for_it_again_renews_its_time(outside: Ray, service: DirectService, again: str) -> None:
    wanted = one("brief", ttl_seconds=100)
    service.place(wanted)
    first = service.state.deployments["brief"].expires_at
    assert first is not None
    getattr(service, again)(wanted)
    service = DirectService()
    a_while_passes_at(service, first, set())
    assert service.state.names() == ("brief",), "it would have been over by now"
    service.apply(one("endless"))
    writes = len(outside.store)
    getattr(service, again)(one("endless"))
    assert (None, writes) == (service.state.deployments["endless"].expires_at, len(outside.store))


def a_while_passes_at(service: DirectService, now: float, ended: set[str]) -> None:
    service.lifetimes.end_what_is_over(lambda owner: owner["job"] in ended, now)


def test_a_lease_whose_group_its_owner_removed_is_forgotten_and_not_placed_anew(
    outside: Ray, service: DirectService
) -> None:
    caller: Owner = {"kind": "caller", "job": "01000000"}
    DirectService.__mro__[1].place(service, parse(one(gpus=2, replicas=2), None), caller)  # type: ignore[attr-defined]
    first, second = sorted(outside.groups)
    del outside.groups[first]
    a_while_passes_at(service, 0.0, set())
    known = service.state.deployments["a"]
    assert (list(known.replicas), known.states[0]) == ([1], State.LOST)
    a_while_passes(service)
    assert list(outside.groups) == [second], "nothing is placed in its stead"
    assert service.state.queue() == []
    del outside.groups[second]
    a_while_passes_at(service, 0.0, set())
    assert service.state.names() == ()
    assert b"deployment/a" not in outside.store


def test_a_lease_that_ended_while_the_service_was_dead_is_forgotten_when_it_starts(
    outside: Ray, service: DirectService
) -> None:
    caller: Owner = {"kind": "caller", "job": "01000000"}
    DirectService.__mro__[1].place(service, parse(one(gpus=2), None), caller)  # type: ignore[attr-defined]
    outside.groups.clear()
    service = DirectService()
    assert service.state.names() == () and not outside.groups
    with pytest.raises(UnknownDeployment):
        service.get("a")


def test_somebody_elses_lease_is_a_conflict(service: DirectService) -> None:
    place = DirectService.__mro__[1].place  # type: ignore[attr-defined]
    wanted = parse(one(gpus=2), None)
    place(service, wanted, {"kind": "caller", "job": "01000000"})
    assert place(service, wanted, {"kind": "caller", "job": "01000000"}).assignments
    with pytest.raises(DeploymentConflict, match="owner"):
        place(service, wanted, {"kind": "caller", "job": "02000000"})
    with pytest.raises(DeploymentConflict, match="owner"):
        service.apply(one(gpus=4))


def test_all_that_was_decided_is_done_as_a_dry_run_says_though_it_is_done_step_by_step(
    outside: Ray, service: DirectService
) -> None:
    """Replica 0 may not stay and has no room; the place of replica 1 has room for two, which are 1 and 2."""
    outside.nodes.add("y")
    before = service.apply(one("b", gpus=4, replicas=2))
    beside = {"egress_nodes": [before.assignments[0].node]}
    service.apply(
        one(
            "c",
            runtime="openai",
            runtime_config={"api_key": {"from_env": "K"}},
            serving={"max_concurrent": 3},
            constraints=beside,
        )
    )
    wanted = one("b", gpus=2, replicas=3, constraints={"apart_from": ["c"]})
    planned, done = service.plan(wanted), service.apply(wanted)
    assert places(planned) == places(done)
    assert (placed(service, "b"), sorted(done.pending)) == ({0: 4, 1: 2, 2: 2}, [0])
    assert not service.state.claims


def test_a_dry_run_refuses_to_change_a_lease_as_applying_does(service: DirectService) -> None:
    place = DirectService.__mro__[1].place  # type: ignore[attr-defined]
    place(service, parse(one(gpus=2), None), {"kind": "caller", "job": "01000000"})
    for does in (service.plan, service.apply):
        with pytest.raises(DeploymentConflict, match="owner"):
            does(one(gpus=1))
    assert service.plan(one("b")).assignments


def test_a_lease_with_a_time_ends_with_it(outside: Ray, service: DirectService) -> None:
    place = DirectService.__mro__[1].place  # type: ignore[attr-defined]
    place(service, parse(one(gpus=2, ttl_seconds=100), None), {"kind": "caller", "job": "01000000"})
    began = service.state.deployments["a"].declared_at
    a_while_passes_at(service, began + 101, set())
    assert service.state.names() == () and not outside.groups


def test_who_declares_it_last_owns_it(service: DirectService) -> None:
    apply = DirectService.__mro__[1].apply  # type: ignore[attr-defined]
    wanted = parse(one(owner="job"), None)
    apply(service, wanted, False, {"kind": "job", "job": "01000000"})
    apply(service, wanted, False, {"kind": "job", "job": "02000000"})
    began = service.state.deployments["a"].declared_at
    a_while_passes_at(service, began, {"01000000"})
    assert service.state.names() == ("a",)
    service = DirectService()
    a_while_passes_at(service, began, {"02000000"})
    assert service.state.names() == ()


def test_calls_that_wait_are_tried_in_their_turn_among_the_declarations(
    outside: Ray, service: DirectService, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1000.0)
    monkeypatch.setattr("placement.runtime.queue.time.time", lambda: next(clock))
    monkeypatch.setattr("placement.runtime.reconciler.time.time", lambda: next(clock))
    service.place(one("holds", gpus=4))
    tickets = []
    for name in ("early", "late"):
        ticket = Ticket(parse(one(name, gpus=3), None), partial(service.place, one(name, gpus=3)))
        with pytest.raises(NotEnoughGpus):
            ticket.attempt()
        service.queue.tickets.add(ticket)
        tickets.append(ticket)
        if name == "early":
            service.apply(one("between", gpus=1))
    service.release("holds")
    a_while_passes(service)
    early, late = tickets
    assert early.outcome.result().assignments[0].node == "x"
    assert placed(service, "between") == {0: 1}
    assert not late.outcome.done()
    with pytest.raises(NotEnoughGpus):
        late.result()
    service.queue.tickets.remove(late)
    service.release("early")
    a_while_passes(service)
    assert service.state.names() == ("between",), "a call that gave up is not tried any more"


def wanted(service: DirectService) -> list[str]:
    """What the autoscaler is asked for, oldest first."""
    demand = service.queue.demand
    assert isinstance(demand, NoAutoscaler)
    return [*demand.wanted]


def ticket_for(service: DirectService, declared: dict[str, Any], **caller: str) -> Ticket[Any]:
    """A call that waits."""
    ticket = Ticket(parse(declared, None), lambda: service.place(declared), [caller] if caller else ())
    with pytest.raises(NotEnoughGpus):
        ticket.attempt()
    service.queue.tickets.add(ticket)
    return ticket


def test_who_told_the_node_types_hears_which_one_would_do(outside: Ray) -> None:
    """Whatever it is that finds no room: a call, what is all or nothing, and what waits."""
    service = DirectService([NodeType("large", {"GPU": 8.0}, {}, 2)])
    large, other = one("large", gpus=8), one("other", constraints={"accelerators": ["H100"]})
    with pytest.raises(Unplaceable, match=r"; node type large \(at most 2\) would hold it$"):
        service.place(large)
    with pytest.raises(Unplaceable, match=r"; no node type holds it \(large promises no label ray.io/accel"):
        service.apply(other, atomic=True)
    told = "; autoscaler: node type large (at most 2) would hold it"
    assert service.apply(large).pending[0].endswith(told)
    a_while_passes(service)
    assert service.get("large").pending[0].endswith(told)


def test_the_autoscaler_is_asked_for_what_has_no_room_and_no_more(
    outside: Ray, service: DirectService
) -> None:
    """Of what comes all at once, for the part that has none."""
    result = service.apply(one("gang", gpus=3, replicas=2, gang=True))
    assert "autoscaler" not in result.pending[0], "where there is none, nothing is said of it"
    service.apply(one("large", gpus=8))
    ticket_for(service, one("call", gpus=2, replicas=3))
    a_while_passes(service)
    assert wanted(service) == ["gang:1:0", "large:0:0", "call:2:0"]
    assert result.pending == service.get("gang").pending, "the reason is the same as before"
    service.release("large")
    service.queue.ask_for_nodes()
    assert wanted(service) == ["gang:1:0", "call:2:0"], "before anything is tried again"
    outside.nodes.add("y")
    a_while_passes(service)
    assert placed(service, "gang") == {0: 3, 1: 3}
    service.queue.ask_for_nodes()
    assert wanted(service) == ["call:0:0", "call:1:0", "call:2:0"], (
        "the gang has taken what they would have had"
    )


def test_of_a_replica_on_several_nodes_the_part_is_asked_for_that_has_no_room(
    outside: Ray, service: DirectService
) -> None:
    service.apply(one(tensor_parallel=4, pipeline_parallel=3))
    a_while_passes(service)
    assert len(wanted(service)) == 2
    outside.nodes.add("y")
    a_while_passes(service)
    assert len(wanted(service)) == 1
    outside.nodes.add("z")
    a_while_passes(service)
    assert wanted(service) == [] and sum(len(a.gpus) for a in service.get("a").assignments) == 12


def test_a_node_actor_that_is_asked_what_there_is_does_not_go_before_it_has_answered(
    service: DirectService,
) -> None:
    """Nor that of a node that has just come for what waits."""
    ended: list[str] = []
    asked = {"a"}
    fleet: Any = service.fleet
    fleet.inventory.is_asked = asked.__contains__
    fleet.agents.idle = lambda seconds: ["a", "b", "c"]
    fleet.agents.stop_idle = lambda node_id, seconds: ended.append(node_id)
    demand: Any = service.queue.demand
    demand.poll = lambda: {"d:0:0": Asked(Became.ARRIVED, "a node has joined for it", ("c",))}
    service.stop_idle_agents()
    assert ended == ["b"]


def test_what_is_being_tried_is_not_asked_for_since_it_finds_no_room_beside_itself(
    outside: Ray, service: DirectService
) -> None:
    service.apply(one("busy", gpus=4, replicas=2))
    service.apply(one("a", gpus=4))
    service.queue.try_all(lambda name: None)
    assert wanted(service) == ["busy:1:0", "a:0:0"]
    outside.nodes |= {"y", "z"}
    tried: list[str] = []

    def meanwhile(name: str) -> None:
        tried.append(name)
        if name == "busy":
            known = service.state.deployments[name]
            part = PlannedReplica(1, "y", (0, 1, 2, 3))
            claim = service.state.claim(Claim(known.deployment, (part,), 4))
            with service.turns.sole(name):
                service.queue.try_all(tried.append)
            service.state.close([claim])

    service.queue.try_all(meanwhile)
    assert tried == ["busy", "a", "a"]
    assert wanted(service) == [], "nor is it by the time that it is there"


def test_what_a_call_asks_for_ends_with_it_and_a_call_with_its_caller(
    outside: Ray, service: DirectService, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = ticket_for(service, one("patient", gpus=8), job="02000000")
    gone = ticket_for(service, one("gone", gpus=8), job="01000000")
    nobody = ticket_for(service, one("nobody", gpus=8))
    service.queue.try_all(service.reconcile)
    assert wanted(service) == ["patient:0:0", "gone:0:0", "nobody:0:0"]
    monkeypatch.setattr(queue, "has_ended", lambda caller: caller["job"] == "01000000")
    service.queue.end_what_is_for_nobody()
    assert [ticket.outcome.done() for ticket in (patient, gone, nobody)] == [False, True, False]
    with pytest.raises(LeaseExpired, match="has ended"):
        gone.result()
    service.queue.tickets.remove(nobody)
    service.queue.ask_for_nodes()
    assert wanted(service) == ["patient:0:0"]


def test_a_node_that_has_not_said_what_it_has_is_neither_tried_nor_a_reason_to_ask_for_another(
    outside: Ray, service: DirectService
) -> None:
    tried: list[str] = []
    inventory: Any = service.fleet.inventory
    service.place(one("holds", gpus=4))
    service.apply(one("a", gpus=2))
    outside.nodes.add("new")
    inventory.unknown_nodes = lambda nodes: frozenset({"new"})
    service.queue.try_all(tried.append)
    assert (tried, wanted(service)) == ([], [])
    service.apply(one("large", gpus=8))
    service.queue.try_all(tried.append)
    assert (tried, wanted(service)) == ([], []), "not before it is known what it has"
    inventory.unknown_nodes = lambda nodes: frozenset()
    service.queue.try_all(tried.append)
    assert (tried, wanted(service)) == (["a"], ["large:0:0"])


def test_a_call_that_waits_is_tried_only_when_there_is_room_or_its_name_is_taken(
    outside: Ray, service: DirectService
) -> None:
    service.place(one("holds", gpus=4))
    ticket = ticket_for(service, one("call", gpus=3))
    attempts: list[int] = []
    ticket._do = lambda: attempts.append(1) or service.place(one("call", gpus=3))
    a_while_passes(service)
    assert not attempts
    service.release("holds")
    service.place(one("call", gpus=1))
    a_while_passes(service)
    with pytest.raises(DeploymentConflict):
        ticket.result()


CALLER: Owner = {"kind": "caller", "job": "01000000"}
OTHER: Owner = {"kind": "caller", "job": "02000000"}


def place_for(service: DirectService, owner: Owner | None, /, **fields: Any) -> Any:
    return DirectService.__mro__[1].place(service, parse(one(**fields), None), owner)  # type: ignore[attr-defined]


def apply_for(service: DirectService, owner: Owner | None, /, **fields: Any) -> Any:
    return DirectService.__mro__[1].apply(service, parse(one(**fields), None), False, owner)  # type: ignore[attr-defined]


def test_whose_owner_has_ended_makes_room_for_who_asks_before_anybody_has_noticed(
    outside: Ray, service: DirectService, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_for(service, CALLER, gpus=4)
    with pytest.raises(DeploymentConflict):
        place_for(service, OTHER, gpus=4)
    monkeypatch.setattr(lifetimes, "has_ended", lambda owner: owner == CALLER)
    place_for(service, OTHER, gpus=4)
    assert (service.state.deployments["a"].owner, len(outside.groups)) == (OTHER, 1)
    assert told(service)[-3:] == [(None, "ended"), (0, "released"), (0, "placed")]


def test_what_the_owner_of_a_lease_has_removed_is_not_what_he_gets_when_he_asks_again(
    outside: Ray, service: DirectService
) -> None:
    place_for(service, CALLER, gpus=2)
    [first] = outside.groups
    outside.groups.clear()
    [again] = place_for(service, CALLER, gpus=2).assignments
    assert again.placement_group.id.hex() in outside.groups.keys() - {first}


def test_what_an_owner_has_removed_makes_room_before_anything_waits_for_rays_books(
    outside: Ray, service: DirectService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waited(since: float) -> bool:
        raise AssertionError("it was waited for Ray's books")

    place_for(service, CALLER, gpus=4)
    outside.groups.clear()
    monkeypatch.setattr(service.fleet, "catch_up", waited)
    service.place(one("b", gpus=4))
    assert service.state.names() == ("b",)


def test_a_lease_ends_with_its_time_and_is_nobodys_to_change_by_apply(
    outside: Ray, service: DirectService
) -> None:
    place_for(service, CALLER, gpus=2, ttl_seconds=60)
    for owner in (None, CALLER, OTHER):
        with pytest.raises(DeploymentConflict, match="owner"):
            apply_for(service, owner, gpus=1)
    expires = service.state.deployments["a"].expires_at
    assert expires is not None
    a_while_passes_at(service, expires - 1, set())
    assert service.state.names() == ("a",)
    a_while_passes_at(service, expires + 1, set())
    assert service.state.names() == () and not outside.groups


def test_whose_it_is_and_for_how_long_is_as_it_was_declared_last(
    outside: Ray, service: DirectService
) -> None:
    job: Owner = {"kind": "job", "job": "01000000"}
    apply_for(service, job, owner="job")
    apply_for(service, {**job, "job": "02000000"}, owner="job")
    a_while_passes_at(service, 0.0, {"01000000"})
    known = service.state.deployments["a"]
    assert (known.owner, known.generation) == ({**job, "job": "02000000"}, 1)
    assert json.loads(outside.store[b"deployment/a"])["owner"] == known.owner
    apply_for(service, None, ttl_seconds=60)
    a_while_passes_at(service, 0.0, {"02000000"})
    expires = service.state.deployments["a"].expires_at
    assert expires is not None
    apply_for(service, None)
    a_while_passes_at(service, expires + 1, set())
    assert service.state.names() == ("a",)
    assert len(outside.groups) == 1, "the replica has stayed"


def test_a_call_that_was_ended_while_it_was_tried_is_not_tried_again(service: DirectService) -> None:
    tried = []

    def do() -> None:
        tried.append(1)
        ticket.end()
        raise NotEnoughGpus("a", "too few", {}, "wait")

    ticket = Ticket(parse(one(), None), do)
    for _ in range(2):
        with pytest.raises((NotEnoughGpus, TimeoutError)):
            ticket.attempt()
    assert tried == [1]
    assert ticket.is_over


def test_a_lease_of_which_the_end_was_cut_off_is_forgotten(outside: Ray, service: DirectService) -> None:
    """Its record without replicas is written, and then the service dies, or the store does not answer."""
    caller: Owner = {"kind": "caller", "job": "01000000"}
    DirectService.__mro__[1].place(service, parse(one(gpus=2), None), caller)  # type: ignore[attr-defined]
    outside.groups.clear()
    service.reconciler.gone = {service.state.deployments["a"].replicas[0].group_id}
    service.reconciler.bring_about(Work(service.state.deployments["a"], service.state.deployments["a"]))
    assert not json.loads(outside.store[b"deployment/a"])["replicas"]
    a_while_passes_at(service, 0.0, set())
    assert service.state.names() == ()
    service.apply(one(gpus=2))


def test_a_record_of_a_lease_without_replicas_is_dropped_at_the_start(
    outside: Ray, service: DirectService
) -> None:
    caller: Owner = {"kind": "caller", "job": "01000000"}
    DirectService.__mro__[1].place(service, parse(one(gpus=2), None), caller)  # type: ignore[attr-defined]
    record = json.loads(outside.store[b"deployment/a"])
    outside.groups.clear()
    outside.store[b"deployment/a"] = json.dumps({**record, "replicas": []}).encode()
    assert DirectService().state.names() == ()


def test_what_was_seen_of_a_lease_that_is_gone_says_nothing_of_the_next_of_its_name(
    outside: Ray, service: DirectService
) -> None:
    caller: Owner = {"kind": "caller", "job": "01000000"}
    DirectService.__mro__[1].place(service, parse(one(gpus=2), None), caller)  # type: ignore[attr-defined]
    outside.groups.clear()
    with service.turns.sole("a"):  # somebody is about to release it
        a_while_passes_at(service, 0.0, set())
    service.release("a")
    service.place(one(gpus=2))
    service.reconcile("a")
    assert placed(service) == {0: 2}
    assert [a.placement_group.id.hex() for a in service.get("a").assignments] == list(outside.groups)


def test_what_was_given_up_has_all_its_time_before_it_when_it_is_applied_again(
    outside: Ray, service: DirectService, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = one(gpus=3, replicas=2, deadline_seconds=60)
    service.apply(declared)
    began = service.state.deployments["a"].declared_at
    monkeypatch.setattr("placement.runtime.reconciler.time.time", lambda: began + 100)
    a_while_passes_at(service, began + 100, set())
    assert service.state.deployments["a"].given_up
    service.apply(declared)
    a_while_passes_at(service, began + 101, set())
    assert service.state.queue() == ["a"]
    a_while_passes_at(service, began + 161, set())
    service.apply(one(gpus=3, replicas=3, deadline_seconds=60))
    a_while_passes_at(service, began + 159, set())
    assert service.state.queue() == ["a"]


@pytest.mark.parametrize("again", [{"replicas": 1, "gpus": 3}, {"replicas": 2, "gpus": 2}])
def test_what_does_not_wait_any_more_is_not_given_up(
    again: dict[str, Any], outside: Ray, service: DirectService
) -> None:
    """It is declared with fewer replicas, or as it was placed before."""
    before = {**again, "replicas": 1} if again["gpus"] == 3 else again
    service.place(one(**before))
    outside.take(Group("", 900), "x", range(4), WHOLE, 0)
    service.apply(one(gpus=3, replicas=2, deadline_seconds=60))
    assert service.state.deployments["a"].waiting_since
    service.apply(one(**again, deadline_seconds=60))
    known = service.state.deployments["a"]
    assert (known.unfinished(), known.waiting_since) == ([], None)
    assert json.loads(outside.store[b"deployment/a"])["waiting_since"] is None
    a_while_passes_at(service, known.declared_at + 100, set())
    assert not service.state.deployments["a"].given_up


def test_renewing_does_not_try_again_what_was_given_up(service: DirectService) -> None:
    service.apply(one(gpus=3, replicas=2, deadline_seconds=60, ttl_seconds=1000))
    a_while_passes_at(service, service.state.deployments["a"].declared_at + 100, set())
    assert service.renew("a") == service.state.deployments["a"].expires_at
    assert service.state.deployments["a"].given_up


def test_a_lost_replica_has_its_place_in_the_queue_from_then_on(outside: Ray, service: DirectService) -> None:
    service.apply(one(gpus=2))
    outside.groups.clear()
    known = DirectService().state.deployments["a"]
    assert known.waiting_since is not None
    assert known.waiting_since == json.loads(outside.store[b"deployment/a"])["waiting_since"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_service_goes_on_with_what_an_earlier_version_wrote(version: int, outside: Ray) -> None:
    """Version 1 had no ``releasing``; neither had generations, owners, times or a queue. Replica 1 was pending."""
    group = Group(f"placement:{ledger.token()}:a:0:x7:1", 7)
    assert outside.take(group, "x", range(2), WHOLE, 0)
    held = {
        "order": f"placement:{ledger.token()}:a:0:x7", "group": group.id.hex(), "replica_index": 0, "node": "x",
        "node_name": "x", "gpus": [0, 1], "bundle_indices": [0, 1],
    }  # fmt: skip
    record: dict[str, Any] = {"version": version, "deployment": one(gpus=2, replicas=2), "replicas": [held]}
    outside.store[b"deployment/a"] = json.dumps(
        record | ({"releasing": False} if version > 1 else {})
    ).encode()
    assert outside.take(Group("", 900), "x", range(1), WHOLE, 0)
    service = DirectService()
    known = service.state.deployments["a"]
    assert (known.generation, known.earlier, known.owner, known.expires_at) == (1, {}, None, None)
    assert (placed(service), list(known.reasons), service.state.queue()) == ({0: 2}, [1], ["a"])
    assert known.waiting_since is not None
    a_while_passes(service)
    outside.nodes.add("y")
    a_while_passes(service)
    assert placed(service) == {0: 2, 1: 2}
    assert json.loads(outside.store[b"deployment/a"])["version"] == 3
    assert service.release("a") == 2 and len(outside.groups) == 1


def test_a_service_goes_on_with_all_that_a_record_says(outside: Ray) -> None:
    """A replica of an earlier declaration, an owner, a time, and a place in the queue; all in one."""
    job: Owner = {"kind": "job", "job": "01000000"}
    before = DirectService()
    apply = DirectService.__mro__[1].apply  # type: ignore[attr-defined]
    apply(before, parse(one(gpus=1, replicas=2), None), False, job)
    assert outside.take(Group("", 900), "x", range(2), WHOLE, 0)
    apply(before, parse(one(gpus=3, replicas=3, ttl_seconds=100, deadline_seconds=60), None), False, job)
    record = json.loads(outside.store[b"deployment/a"])
    assert (list(record["earlier"]), [r["generation"] for r in record["replicas"]]) == (["1"], [1, 1])
    service = DirectService()
    known, was = service.state.deployments["a"], before.state.deployments["a"]
    assert (known.generation, known.outdated, known.missing()) == (2, [0, 1], [2])
    assert (known.earlier, known.owner, known.expires_at) == (was.earlier, job, was.expires_at)
    assert (known.waiting_since, known.declared_at) == (was.waiting_since, was.declared_at)
    assert known.placed_under(known.replicas[0]).gpus == 1
    assert json.loads(outside.store[b"deployment/a"]) == record, "to start changes nothing"
    outside.nodes |= {"y", "z", "w"}
    a_while_passes(service)
    assert (placed(service), service.state.deployments["a"].earlier) == ({0: 3, 1: 3, 2: 3}, {})
    expires_at = service.state.deployments["a"].expires_at
    assert expires_at is not None
    a_while_passes_at(service, expires_at + 1, set())
    assert service.state.names() == () and len(outside.groups) == 1


class Counted:
    """A lock that counts how often it is taken anew."""

    def __init__(self) -> None:
        self.lock, self.depth, self.taken = threading.RLock(), 0, 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.taken += not self.depth
        self.depth += 1

    def __exit__(self, *args: object) -> None:
        self.depth -= 1
        self.lock.release()


def test_a_placement_takes_the_planning_lock_twice(outside: Ray, service: DirectService) -> None:
    """To claim what was planned, and once it is written down: with many callers each time is a wait."""
    service.fleet._holdings = lambda node_id: {}  # type: ignore[method-assign]  # what a new actor is told
    service.state.lock = lock = Counted()  # type: ignore[assignment]
    service.place(one(gpus=2))
    assert lock.taken == 2 and not service.state.claims
    lock.taken = 0
    service.place(
        one("b", constraints={"apart_from": ["c"]})
    )  # others are told before it is planned, and after
    assert lock.taken == 4 and not service.state.claims
