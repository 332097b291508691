"""Groups of roles in the real controller on a make-believe Ray: as one, whatever fails in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from operator import itemgetter
from typing import Any

import pytest

from placement import Deployment, Group
from placement.core.roles import tell
from placement.core.routes import Via
from placement.errors import (
    DeploymentConflict,
    GroupStands,
    NotEnoughGpus,
    PartlyApplied,
    ReservationFailed,
    UnknownDeployment,
    Unplaceable,
)
from placement.runtime import asking, group_reconciler, records, state
from placement.runtime.asking import Asked
from placement.runtime.clock import Clock
from placement.runtime.needs import Need
from placement.wire.groups import GroupLink
from tests.properties.test_service import AtOnce, DirectService, Killed, NoAutoscaler, Ray, StoreFailed


def pd(
    units: int = 2, owner: Any = "detached", counts: Mapping[str, int] = {"a": 1, "b": 2}, **link: Any
) -> list[Deployment]:
    """Two replicas of ``b`` for each of ``a``, on one node."""
    links = GroupLink.model_validate({"between": ("a", "b"), "via": "pcie", "within": "node", **link})
    group = Group(name="g", members=counts, units=units, links=(links,))
    return group.of([Deployment(name=name, model="org/m", owner=owner) for name in counts])


def placed(service: DirectService) -> dict[str, list[str]]:
    """Deployment -> the nodes of its replicas."""
    return {name: [a.node for a in service.get(name).assignments] for name in service.state.names()}


def a_while_passes(service: DirectService) -> None:
    Clock(service, AtOnce()).look()


def asked_for(service: DirectService) -> dict[str, Any]:
    """What the autoscaler is asked for."""
    a_while_passes(service)
    demand = service.queue.demand
    assert isinstance(demand, NoAutoscaler)
    return demand.wanted


def told(service: DirectService, name: str) -> list[tuple[int | None, str]]:
    return [(event["replica"], event["state"]) for event in service.events(name)]


def test_each_unit_is_on_one_node_and_another_call_changes_nothing(
    outside: Ray, service: DirectService
) -> None:
    service.apply_all(pd(), atomic=True)
    assert {"a": ["x", "y"], "b": ["x", "x", "y", "y"]} == placed(service)
    before = dict(outside.groups)
    service.apply_all(pd())
    assert before == outside.groups
    assert 6 == service.release("g")
    assert ({}, {}) == (outside.groups, placed(service))


def test_what_was_placed_is_given_back_if_a_node_refuses_the_rest(
    outside: Ray, service: DirectService
) -> None:
    outside.meanwhile = [lambda: setattr(outside, "refusals", 1), lambda: None]
    service.apply_all(pd(1), atomic=True)
    assert {"a": [1], "b": [2]} == {name: [len(nodes)] for name, nodes in placed(service).items()}
    assert 3 == len(outside.groups)
    states = [state for _, state in told(service, "a")]
    assert ["placed", "released", "placed"] == [state for state in states if state != "pending"]
    assert not service.state.claims


def test_shares_and_whole_gpus_are_placed_lost_and_placed_again(outside: Ray, service: DirectService) -> None:
    links = (GroupLink(between=("a", "b"), via=Via.PCIE, within="node"),)
    group = Group(name="g", members={"a": 1, "b": 1}, units=2, links=links)
    share = Deployment(name="b", model="org/m", gpus=0.25)
    service.apply_all(group.of([Deployment(name="a", model="org/m", gpus=2), share]), atomic=True)
    assert {"a": ["x", "y"], "b": ["x", "y"]} == placed(service)
    assert {0.25} == {part.share for part in service.get("b").assignments}
    outside.nodes.remove("x")
    outside.nodes.add("z")
    a_while_passes(service)
    assert {"a": ["z", "y"], "b": ["z", "y"]} == placed(service)
    assert not service.state.claims
    assert 4 == service.release("g")


def test_a_replica_over_several_nodes_waits_for_both_and_is_placed_anew_with_the_rest(
    outside: Ray, service: DirectService
) -> None:
    links = (GroupLink(between=("a", "b"), via=Via.NETWORK),)
    group = Group(name="g", members={"a": 1, "b": 1}, links=links)
    wide = Deployment(name="a", model="org/m", tensor_parallel=4, pipeline_parallel=2)
    outside.nodes.add("z")
    wanted = group.of([wide, Deployment(name="b", model="org/m", gpus=2)])
    service.apply_all(wanted, atomic=True)
    assert {"a": ["x", "y"], "b": ["z"]} == placed(service)
    outside.nodes.remove("y")
    a_while_passes(service)
    assert {"a": [], "b": ["z"]} == placed(service)
    outside.nodes.add("w")
    a_while_passes(service)
    assert {"a": ["w", "x"], "b": ["z"]} == placed(service)
    assert ["unchanged"] * 2 == [one.change for one in service.plan_all(wanted)]
    assert not service.state.claims
    assert 2 == service.release("g")


@pytest.mark.parametrize(
    ("others", "within", "asked"),
    [
        (3, None, {"b:1:0": 1}),
        (4, None, {"a:0:0": 1, "b:0:0": 1, "b:1:0": 1}),
        (3, "node", {"a:0:0": 3}),
        (2, "node", {"a:0:0": 3}),
        (2, "rack", {"a:0:0": 3}),
    ],
)
def test_nodes_are_asked_for_what_all_lack_and_for_what_a_floor_binds_as_one(
    service: DirectService, others: int, within: str | None, asked: dict[str, int]
) -> None:
    service.apply({"name": "other", "model": "org/m", "gpus": others, "replicas": 2})
    service.apply_all(pd(1, within=within))
    assert asked == {key: need.ways[0].total["GPU"] for key, need in asked_for(service).items()}


def test_only_units_that_have_no_place_are_asked_for(service: DirectService) -> None:
    service.apply({"name": "other", "model": "org/m", "constraints": {"gpu_nodes": ["x"]}, "gpus": 2})
    service.apply_all(pd(3))
    needs = asked_for(service)
    assert ["a:1:0", "a:2:0"] == [*needs]
    assert {"a node with 3 GPUs for replicas of 'g' that talk"} == {str(need) for need in needs.values()}
    service.apply({"name": "other", "model": "org/m", "gpus": 2, "replicas": 2})
    assert ["a:0:0", "a:1:0", "a:2:0"] == [*asked_for(service)]
    service.release("g")
    assert {} == asked_for(service)


def test_no_node_is_asked_for_while_another_part_of_the_group_cannot_get_one(
    service: DirectService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would come, be idle and leave, again and again."""
    large = "a node with 4 GPUs"
    tried: set[str] = set()

    def outlook(need: Need | str) -> Asked:
        if isinstance(need, str):
            return Asked(asking.State.NOT_ASKED, need)
        known = str(need) not in tried
        return (
            Asked(asking.State.ASKED, f"asked for {need}")
            if known
            else Asked(asking.State.INFEASIBLE, "too large")
        )

    monkeypatch.setattr(service.queue.demand, "outlook", outlook)
    service.apply({"name": "other", "model": "org/m", "gpus": 2, "replicas": 2})
    links = (GroupLink(between=("b", "c"), via="pcie", within="node"),)
    group = Group(name="g", members={"a": 1, "b": 1, "c": 2}, links=links)
    sizes = {"a": 4, "b": 1, "c": 1}
    wanted = group.of([Deployment(name=name, model="org/m", gpus=gpus) for name, gpus in sizes.items()])
    results = service.apply_all(wanted)
    pair = "a node with 3 GPUs for replicas of 'g' that talk"
    assert [large, pair] == [str(need) for need in asked_for(service).values()]
    assert all(
        why.endswith(f"; autoscaler: asked for {large}") for one in results for why in one.pending.values()
    )
    tried.add(large)
    assert [large, "too large"] == [str(need) for need in asked_for(service).values()]
    assert all(why.endswith("; autoscaler: too large") for why in service.get("c").pending.values())
    tried.clear()
    assert [large, pair] == [str(need) for need in asked_for(service).values()]


def test_by_its_name_the_events_of_all_members_are_told_in_order(
    outside: Ray, service: DirectService
) -> None:
    service.place({"name": "other", "model": "m"})
    service.apply_all(pd(1), atomic=True)
    found = service.events("g")
    assert {"a", "b"} == {one["deployment"] for one in found}
    assert sorted([*service.events("a"), *service.events("b")], key=itemgetter("number")) == found
    assert found[-1:] == service.events("g", found[-2]["number"])
    watched = asyncio.run(service.feed.wait(0, service.queries.with_members(["g", "nobody yet"]), 0))
    assert found == [one.to_dict() for one in watched]
    service.release("g")
    released = service.events("g", found[-1]["number"])
    assert [("a", 0), ("b", 0), ("b", 1)] == sorted((e["deployment"], e["replica"]) for e in released[-3:])
    assert {"released"} == {one["state"] for one in released[-3:]}
    # Who was told of nothing yet, and asks on now, is told how it ended, and nothing of others of its name.
    watched = asyncio.run(service.feed.wait(found[-1]["number"], service.queries.with_members(["g"]), 0))
    assert released == [one.to_dict() for one in watched]
    with pytest.raises(UnknownDeployment):
        service.events("nobody")
    service.place({"name": "g", "model": "m"})
    assert {"g"} == {one["deployment"] for one in service.events("g")}


def test_of_as_many_groups_as_are_known_the_last_are(service: DirectService, monkeypatch: Any) -> None:
    monkeypatch.setattr(state, "KEPT_GROUPS", 2)
    for name in ("g", "h", "g", "i"):
        group = Group(name=name, members={f"{name}-a": 1})
        service.apply_all(group.of([Deployment(name=f"{name}-a", model="m")]))
        service.release(name)
    assert [["g-a"], ["h"], ["i-a"]] == [service.queries.with_members([name]) for name in "ghi"]


@pytest.mark.parametrize("atomic", [True, False])
def test_it_waits_as_one_if_nodes_keep_refusing(outside: Ray, service: DirectService, atomic: bool) -> None:
    outside.refusals = 100
    if atomic:
        with pytest.raises(ReservationFailed, match="cannot reserve 'g'"):
            service.apply_all(pd(), atomic=True)
        assert () == service.state.names()
    else:
        a, b = service.apply_all(pd())
        assert ([0, 1], [0, 1, 2, 3]) == (sorted(a.pending), sorted(b.pending))
        outside.refusals = 0
        a_while_passes(service)
        assert {"a": ["x", "y"], "b": ["x", "x", "y", "y"]} == placed(service)
    assert atomic == (not outside.groups)
    assert not service.state.claims


def test_all_of_it_waits_until_there_is_room_for_all(outside: Ray, service: DirectService) -> None:
    service.place({"name": "other", "model": "m", "gpus": 2})
    with pytest.raises(Unplaceable, match="their link via 'pcie' asks for within = 'node'"):
        service.apply_all(pd(), atomic=True)
    service.apply_all(pd())
    assert {"other": 1, "a": 0, "b": 0} == {name: len(nodes) for name, nodes in placed(service).items()}
    again = DirectService()  # it is declared, and survives the service
    assert ["a", "b"] == again.state.queue()
    a_while_passes(again)
    assert [] == placed(again)["b"]
    reasons = [event["text"] for event in again.events("b") if event["state"] == "pending"]
    assert "cannot place 'g'" in reasons[-1]
    a_while_passes(again)
    assert reasons == [event["text"] for event in again.events("b") if event["state"] == "pending"]
    again.release("other")
    a_while_passes(again)
    assert {"a": ["x", "y"], "b": ["x", "x", "y", "y"]} == placed(again)


@pytest.mark.parametrize("takes", [{"gpus": 2}, {"apart_from": ["a"]}])
def test_others_are_placed_while_the_places_of_a_group_are_searched(
    outside: Ray, service: DirectService, monkeypatch: pytest.MonkeyPatch, takes: dict[str, Any]
) -> None:
    chosen: list[str] = []

    def search(*args: Any) -> Any:
        found = tell(*args)
        told = found["a"].request.told
        assert told is not None
        [[place]] = told.places.values()
        chosen.append(place.node_id)
        if len(chosen) == 1:
            limits = {"gpu_nodes": [place.node_id], "apart_from": takes.get("apart_from", ())}
            other = {"name": "other", "model": "m", "gpus": takes.get("gpus"), "constraints": limits}
            with ThreadPoolExecutor(1) as elsewhere:
                elsewhere.submit(service.place, other).result(30)
        return found

    monkeypatch.setattr(group_reconciler, "tell", search)
    service.apply_all(pd(1), atomic=True)
    assert ["x", "y"] == chosen
    assert {"a": ["y"], "b": ["y", "y"], "other": ["x"]} == placed(service)
    assert not service.state.claims


@pytest.mark.parametrize("point", ["service.planned", "service.reserved", "service.kept"])
def test_a_service_that_dies_in_between_goes_on_with_all_of_it(
    outside: Ray, service: DirectService, point: str
) -> None:
    outside.kill_at = point
    with pytest.raises(Killed):
        service.apply_all(pd(), atomic=True)
    again = DirectService()
    a_while_passes(again)
    a_while_passes(again)
    assert {"a": ["x", "y"], "b": ["x", "x", "y", "y"]} == placed(again)
    assert 6 == len(outside.groups)


@pytest.mark.parametrize("write", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [StoreFailed, Killed])
def test_all_of_it_is_declared_or_nothing(
    outside: Ray,
    service: DirectService,
    monkeypatch: pytest.MonkeyPatch,
    write: int,
    kind: type[BaseException],
) -> None:
    """Its two members are written one after the other; once both are, a new service goes on with them."""
    writes, save = count(1), records.save

    def fail(one: Any) -> None:
        if next(writes) == write:
            raise kind
        save(one)

    monkeypatch.setattr(records, "save", fail)
    outside.refusals = 100
    with pytest.raises((kind, ReservationFailed)):
        service.apply_all(pd(), atomic=True)
    outside.refusals = 0
    again = service if kind is StoreFailed else DirectService()
    a_while_passes(again)
    a_while_passes(again)
    goes_on = kind is Killed and write > 2
    assert placed(again) == ({"a": ["x", "y"], "b": ["x", "x", "y", "y"]} if goes_on else {})
    assert (6 if goes_on else 0) == len(outside.groups)
    again.apply_all(pd(), atomic=True)


@pytest.mark.parametrize("point", ["service.releasing", "service.given_back", "service.ended"])
def test_a_refusal_that_was_cut_off_leaves_nothing(outside: Ray, service: DirectService, point: str) -> None:
    outside.kill_at, outside.refusals = point, 100
    with pytest.raises(Killed):
        service.apply_all(pd(), atomic=True)
    again = DirectService()
    a_while_passes(again)
    assert ({}, {}) == (outside.groups, placed(again))


def test_a_member_whose_record_cannot_be_read_ends_no_others(outside: Ray, service: DirectService) -> None:
    service.apply_all(pd(1), atomic=True)
    [key] = [key for key in outside.store if key.endswith(b"a")]
    outside.store[key] = json.dumps({**json.loads(outside.store[key]), "version": 99}).encode()
    again = DirectService()
    again.reconcile("b")
    assert {"b": ["x", "x"]} == placed(again)


@pytest.mark.parametrize("point", ["service.releasing", "service.given_back", "service.ended"])
def test_a_release_that_was_cut_off_is_finished(outside: Ray, service: DirectService, point: str) -> None:
    service.apply_all(pd(), atomic=True)
    outside.kill_at = point
    with pytest.raises(Killed):
        service.release("b")
    again = DirectService()
    a_while_passes(again)
    assert ({}, {}) == (outside.groups, placed(again))


def test_a_unit_that_lost_its_node_is_placed_anew_whole(outside: Ray, service: DirectService) -> None:
    service.apply_all(pd(), atomic=True)
    outside.nodes.remove("x")
    a_while_passes(service)
    # y holds the other unit, and has one GPU left: all that was lost waits.
    assert {"a": ["y"], "b": ["y", "y"]} == placed(service)
    assert ([0], [0, 1]) == tuple(sorted(service.get(name).pending) for name in "ab")
    outside.nodes.add("z")
    a_while_passes(service)
    assert {"a": ["z", "y"], "b": ["z", "z", "y", "y"]} == placed(service)


def test_a_group_that_waits_is_refused_if_it_is_to_be_all_or_nothing_and_goes_on_waiting(
    outside: Ray, service: DirectService
) -> None:
    never = "the whole cluster has 8 GPUs, and the group needs 9: waiting does not help unless nodes join"
    assert all(never in one.pending[0] for one in service.apply_all(pd(3)))
    for change in (service.plan_all, service.apply_all):
        with pytest.raises(NotEnoughGpus, match=never):
            change(pd(3), atomic=True)
    assert ["a", "b"] == sorted(service.state.queue()) and not outside.groups
    outside.nodes.add("z")
    assert not any(one.pending for one in service.apply_all(pd(3), atomic=True))


def test_units_come_and_go(outside: Ray, service: DirectService) -> None:
    service.apply_all(pd(1), atomic=True)
    service.apply_all(pd(2), atomic=True)
    assert {"a": 2, "b": 4} == {name: len(nodes) for name, nodes in placed(service).items()}
    with pytest.raises(NotEnoughGpus):
        service.apply_all(pd(3), atomic=True)
    service.apply_all(pd(1))
    assert {"a": 1, "b": 2} == {name: len(nodes) for name, nodes in placed(service).items()}
    assert 3 == len(outside.groups)


def test_its_name_means_its_members(service: DirectService) -> None:
    service.apply_all(pd())
    assert (["a", "b"], ["b"]) == (service.queries.members("g"), service.queries.members("b"))
    service.release("g")
    for name in ("g", "b"):
        with pytest.raises(UnknownDeployment):
            service.queries.members(name)


def test_what_would_part_or_move_it_is_refused(service: DirectService) -> None:
    service.apply_all(pd())
    for wanted in (pd(via="network", within=None), pd(counts={"a": 2, "b": 2})):
        with pytest.raises(
            PartlyApplied, match="the group has another name, other members or other links now"
        ):
            service.apply_all(wanted)
    with pytest.raises(GroupStands, match="declared without the group"):
        service.apply({"name": "a", "model": "org/m", "replicas": 2})
    with pytest.raises(DeploymentConflict):
        service.place({"name": "a", "model": "org/m", "replicas": 2})


def test_while_nothing_of_it_is_placed_it_may_ask_for_less(service: DirectService) -> None:
    service.place({"name": "other", "model": "m", "gpus": 2, "replicas": 2})
    service.apply_all(pd(1))
    since = service.state.deployments["a"].waiting_since
    with pytest.raises(PartlyApplied, match="other members"):
        service.apply_all(pd(1, counts={"a": 1, "b": 1, "c": 1}))
    service.apply_all(pd(1, counts={"a": 1, "b": 4}))
    assert since == service.state.deployments["a"].waiting_since
    service.apply_all(pd(2, counts={"a": 1, "b": 1}))
    assert {"a": ["x", "y"], "b": ["x", "y"], "other": ["x", "y"]} == placed(service)
    service.release("g")
    service.apply_all(pd(1))
    assert "asks for within = 'node'" in service.get("a").pending[0]
    assert ["changed", "changed"] == [one.change for one in service.plan_all(pd(1, within=None))]
    service.apply_all(pd(1, within=None))
    assert (1, 2) == (len(placed(service)["a"]), len(placed(service)["b"]))


def test_a_group_needs_a_name_of_its_own(service: DirectService) -> None:
    service.place({"name": "g", "model": "org/m"})
    with pytest.raises(GroupStands, match="a deployment of that name exists"):
        service.apply_all(pd(), atomic=True)
    assert ("g",) == service.state.names()


def test_it_ends_as_one_with_its_owner(outside: Ray, service: DirectService) -> None:
    wanted = pd(owner="job")
    owners = {one.name: {"kind": "job", "job": "01000000"} for one in wanted}
    super(DirectService, service).apply_all(wanted, True, owners)
    assert 6 == len(outside.groups)
    outside.end_job("01000000")
    a_while_passes(service)
    a_while_passes(service)
    assert ({}, {}) == (outside.groups, placed(service))
