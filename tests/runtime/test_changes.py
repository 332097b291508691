"""What applying a declaration does to what stands: on a make-believe Ray, with the real service."""

from __future__ import annotations

from typing import Any

import pytest

from placement.errors import NotEnoughGpus, ReservationFailed, Unplaceable
from placement.runtime.clock import Clock
from tests.properties.test_service import AtOnce, DirectService, Ray


def one(name: str = "a", **fields: Any) -> dict[str, Any]:
    return {"name": name, "model": "m", **fields}


def remote(name: str = "a", **fields: Any) -> dict[str, Any]:
    return one(name, runtime="openai", **fields)


def told(service: DirectService, name: str = "a") -> list[tuple[int | None, str]]:
    return [(event["replica"], event["state"]) for event in service.events(name)]


def node_dies(outside: Ray, service: DirectService, name: str) -> None:
    outside.nodes.remove(name)
    for group_id, group in list(outside.groups.items()):
        if name in group.held:
            del outside.groups[group_id]
    Clock(service, AtOnce()).look()


@pytest.mark.parametrize(
    "change",
    [
        {"constraints": {}},
        {"constraints": {"egress_preference": ["x"]}},
        {"constraints": {"gpu_nodes": ["x", "y"]}},
        {"within": "node"},
        {"gpus": None, "tensor_parallel": 2},
        {"gpus": None, "tensor_parallel": 1, "pipeline_parallel": 2},
        {"min_bandwidth_gb_per_s": 1},
        {"budget": {"usd_per_day": 1}},
        {"model": "n"},
    ],
)
def test_what_satisfies_the_declaration_stays_and_the_declaration_is_kept(
    outside: Ray, service: DirectService, change: dict[str, Any]
) -> None:
    service.apply(one(gpus=2, replicas=2))
    before = set(outside.groups)
    wanted = {**one(gpus=2, replicas=2), **change}
    assert service.plan(wanted).standing
    result = service.apply(wanted)
    assert set(outside.groups) == before
    assert [a.replica_index for a in result.assignments] == [0, 1]
    again = DirectService()
    assert again.place(wanted).to_dict() == result.to_dict(), "it stands as declared, also after a restart"


def test_only_replicas_that_do_not_satisfy_the_declaration_are_replaced(
    outside: Ray, service: DirectService
) -> None:
    old = service.apply(one(replicas=4))
    kept = {a.replica_index: a.placement_group.id.hex() for a in old.assignments if a.node == "x"}
    new = service.apply(one(replicas=4, constraints={"gpu_nodes": ["x"]}))
    assert {a.node for a in new.assignments} == {"x"}
    assert kept.items() <= {a.replica_index: a.placement_group.id.hex() for a in new.assignments}.items()
    assert told(service)[4:] == [
        *[(i, "released") for i in range(4) if i not in kept],
        *[(i, "placed") for i in range(4) if i not in kept],
        (None, "changed"),
    ]


def test_without_room_beside_it_only_what_is_replaced_is_released(
    outside: Ray, service: DirectService
) -> None:
    outside.nodes = {"x"}
    kept, replaced = service.apply(one(gpus=2, replicas=2)).assignments
    shrunk = service.apply(one(gpus=2, replicas=1))
    assert [a.placement_group.id.hex() for a in shrunk.assignments] == [kept.placement_group.id.hex()]
    assert replaced.placement_group.id.hex() not in outside.groups
    service.apply(one("b"))
    with pytest.raises(NotEnoughGpus):
        service.apply(one(gpus=4), atomic=True)
    assert service.get("a").assignments == shrunk.assignments
    assert {a.node for a in service.apply(one(gpus=3)).assignments} == {"x"}


def test_what_could_not_be_placed_anew_after_all_is_pending_with_its_old_declaration(
    outside: Ray, service: DirectService
) -> None:
    outside.nodes = {"x"}
    service.apply(one(gpus=3))
    outside.refusals = 99
    with pytest.raises(ReservationFailed):
        service.apply(one(gpus=2), atomic=True)
    assert (service.get("a").assignments, list(service.get("a").pending)) == ([], [0])
    outside.refusals = 0
    Clock(service, AtOnce()).look()
    assert len(service.get("a").assignments[0].gpus) == 3


def test_with_one_replica_pending_a_budget_is_changed_and_a_file_applied(
    outside: Ray, service: DirectService
) -> None:
    service.apply_all([one(gpus=4, replicas=2), one("r", runtime="openai", replicas=2)])
    node_dies(outside, service, "y")
    assert list(service.get("a").pending) == [1]
    wanted = one(gpus=4, replicas=2, budget={"usd_per_day": 3})
    assert list(service.plan(wanted).pending) == [1]
    result = service.apply(wanted)
    assert (len(result.assignments), list(result.pending)) == (1, [1])
    assert result.budget is not None and result.budget.usd_per_day == 3
    planned = service.plan_all([wanted, remote("r", replicas=1)])
    applied = service.apply_all([wanted, remote("r", replicas=1)])
    assert [list(one.pending) for one in planned] == [list(one.pending) for one in applied] == [[1], []]
    assert [len(one.assignments) for one in applied] == [1, 1]
    with pytest.raises(NotEnoughGpus):
        service.apply_all([{**wanted, "replicas": 3}], atomic=True)
    shrunk = service.apply({**wanted, "replicas": 1})
    assert (len(shrunk.assignments), shrunk.pending) == (1, {})
    outside.nodes.add("z")
    assert not service.apply(wanted).pending, "it is tried"


def test_what_waits_already_is_refused_if_it_is_to_be_all_or_nothing(
    outside: Ray, service: DirectService
) -> None:
    outside.nodes = {"x"}
    waits = one(gpus=4, replicas=2)
    assert list(service.apply(waits).pending) == [1]
    for refused in (waits, {**waits, "budget": {"usd_per_day": 3}}):
        for change in (service.plan_all, service.apply_all):
            with pytest.raises(NotEnoughGpus):
                change([one("b", cpus=0.001), refused], atomic=True)
        with pytest.raises(NotEnoughGpus):
            service.apply(refused, atomic=True)
    assert (list(service.get("a").pending), service.get("a").budget) == ([1], None)
    assert service.state.queue() == ["a"] == list(service.state.names())
    assert list(service.place(waits).pending) == [1], "placing what is declared already changes nothing"
    outside.nodes.add("y")
    assert not service.apply(waits, atomic=True).pending
    assert not service.state.queue()


def test_a_deployment_all_of_which_is_pending_takes_a_declaration_that_fits(
    outside: Ray, service: DirectService
) -> None:
    outside.nodes = {"x"}
    service.apply(one(gpus=4))
    outside.nodes.add("z")
    service.apply(one("b"))
    node_dies(outside, service, "x")
    assert list(service.get("a").pending) == [0]
    result = service.apply(one(gpus=3))
    assert ([len(a.gpus) for a in result.assignments], result.pending) == ([3], {})


def test_a_named_node_that_died_is_no_reason_to_refuse_the_file(outside: Ray, service: DirectService) -> None:
    wanted = one(gpus=4, replicas=2, constraints={"gpu_nodes": ["x", "y"]})
    service.apply_all([wanted])
    node_dies(outside, service, "y")
    changed = {**wanted, "budget": {"usd_per_day": 1}}
    [result] = service.apply_all([changed])
    assert (len(result.assignments), list(result.pending)) == (1, [1])


def test_what_is_replaced_in_its_place_is_not_called_refused(outside: Ray, service: DirectService) -> None:
    service.apply(remote(replicas=2, serving={"max_concurrent": 5}))
    service.apply(remote(replicas=2, serving={"max_concurrent": 6}))
    assert told(service) == [
        *[(i, state) for state in ("placed", "released", "placed") for i in (0, 1)],
        (None, "changed"),
    ]
    with pytest.raises(Unplaceable):
        service.apply(remote(replicas=2, serving={"max_concurrent": 9}), atomic=True)
    assert told(service)[-1] == (None, "refused")
    assert len(told(service)) == 8


def test_a_change_that_moves_nothing_is_an_event_that_names_fields_and_no_values(
    service: DirectService,
) -> None:
    service.apply(remote())
    service.apply(remote(budget={"usd_per_day": 4321}, runtime_config={"base_url": "http://inner.example"}))
    *_, event = service.events("a")
    assert (event["replica"], event["state"], event["text"]) == (None, "changed", "runtime_config, budget")
    seen = len(service.events("a"))
    service.apply(remote(budget={"usd_per_day": 4321}, runtime_config={"base_url": "http://inner.example"}))
    assert len(service.events("a")) == seen


def test_a_result_carries_what_workers_need_but_its_json_no_endpoint(
    service: DirectService,
) -> None:
    config = {"base_url": "http://inner.example", "api_key": {"from_env": "A_KEY"}}
    result = service.apply(
        remote(
            model="gpt-4o", budget={"usd_per_day": 2}, serving={"max_concurrent": 3}, runtime_config=config
        )
    )
    assert (result.model, result.runtime) == ("gpt-4o", "openai")
    assert result.runtime_config is not None and result.runtime_config.base_url == config["base_url"]
    content = result.to_dict()
    assert (content["model"], content["runtime"], content["budget"]) == (
        "gpt-4o",
        "openai",
        {"usd_per_day": 2},
    )
    assert content["serving"] == {"max_concurrent": 3, "on_capacity_exhausted": "queue"}
    assert "inner.example" not in str(content) and "A_KEY" not in str(content)


def apart(name: str, *others: str, **fields: Any) -> dict[str, Any]:
    return one(name, constraints={"apart_from": list(others)}, **fields)


def test_a_later_deployment_keeps_away_from_one_that_is_to_be_apart_from_it(
    outside: Ray, service: DirectService
) -> None:
    [first] = service.place(apart("b", "a", "r")).assignments
    placed = service.place(one("a", replicas=3)).assignments
    remotes = service.place(remote("r", replicas=3)).assignments
    assert first.node not in {a.node for a in [*placed, *remotes]}
    with pytest.raises(Unplaceable, match="has a replica of"):
        service.place(one("c", replicas=2, constraints={"apart_from": ["a", "b", "r"]}))
    outside.nodes.add("z")
    service.apply(remote("r", replicas=3, constraints={"egress_nodes": ["z"]}))
    service.apply(one("c", constraints={"apart_from": ["a", "b"]}))
    assert [a.node for a in service.get("c").assignments] == ["z"]


def test_mending_keeps_away_as_well(outside: Ray, service: DirectService) -> None:
    service.place(one("b", constraints={"apart_from": ["a"], "gpu_nodes": ["x"]}))
    service.place(one("a"))
    node_dies(outside, service, "y")
    assert "which is to be apart" in service.get("a").pending[0]
    outside.nodes.add("z")
    Clock(service, AtOnce()).look()
    assert [a.node for a in service.get("a").assignments] == ["z"]


def test_others_keep_away_while_a_declaration_that_asks_for_it_is_being_applied(
    outside: Ray, service: DirectService
) -> None:
    service.place(one("b", constraints={"gpu_nodes": ["x"]}))
    outside.meanwhile.append(lambda: service.place(one("a", constraints={"gpu_nodes": ["y", "x"]})))
    service.apply(one("b", replicas=2, constraints={"gpu_nodes": ["x"], "apart_from": ["a"]}))
    assert {a.node for a in service.get("a").assignments} == {"y"}


def test_a_file_is_applied_whatever_its_order_and_answers_in_it(outside: Ray, service: DirectService) -> None:
    service.place(one("a", constraints={"gpu_nodes": ["x"]}))
    file = [
        one("c", constraints={"near_to": ["b"]}),
        one("b", constraints={"gpu_nodes": ["x"], "apart_from": ["a"]}),
        one("a", constraints={"gpu_nodes": ["y"]}),
    ]
    results = service.apply_all(file)
    assert [result.deployment for result in results] == ["c", "b", "a"]
    assert [result.assignments[0].node for result in results] == ["x", "x", "y"]


def test_the_numbers_of_events_go_on_after_a_restart_though_the_clock_goes_back(
    outside: Ray, service: DirectService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.place(one())
    seen = service.events("a")[-1]["number"]
    for _ in range(3):
        monkeypatch.setattr("placement.runtime.feed.time.time", lambda: 1.0)
        service = DirectService()
        [event] = service.events("a", seen)
        assert (event["state"], event["time"]) == ("restarted", "1970-01-01T00:00:01.000+00:00")
        seen = event["number"]
