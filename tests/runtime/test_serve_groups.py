"""``placement.serve.install`` beside a scheduler like Serve's: a replica is scheduled once its group is made."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from placement import serve
from placement.errors import NotEnoughGpus

NO_ROOM = NotEnoughGpus("a", "cannot place", {}, "add one")


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Scheduler:
    """What is used of Serve's: it tries all that are pending, in each round."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make, self.pending, self.scheduled = make, dict[str, Any](), dict[str, Any]()

    def _schedule_replica(self, scheduling_request: Any, default_scheduling_strategy: str) -> bool:
        name = scheduling_request.actor_options["name"]
        self.scheduled[name] = self.make(
            SimpleNamespace(
                name=name,
                bundles=scheduling_request.placement_group_bundles,
                strategy="PACK",
                bundle_label_selector=None,
            )
        )
        del self.pending[name]
        return True

    def on_replica_stopping(self, replica_id: Any) -> None:
        self.pending.pop(replica_id.to_full_id_str(), None)

    def round(self) -> dict[str, Any]:
        for request in list(self.pending.values()):
            self._schedule_replica(scheduling_request=request, default_scheduling_strategy="SPREAD")
        return self.scheduled

    def add(self, name: str, bundles: list[dict[str, float]], gang: Any = None) -> None:
        self.pending[name] = SimpleNamespace(
            actor_options={"name": name},
            placement_group_bundles=bundles,
            placement_group_strategy=None,
            placement_group_bundle_label_selector=None,
            gang_placement_group=gang,
        )

    def stop(self, name: str) -> None:
        self.on_replica_stopping(SimpleNamespace(to_full_id_str=lambda: name))


class Service:
    """The placement service: how it answers each call, and which groups were removed again."""

    def __init__(self) -> None:
        self.answers, self.may_answer = list[Any](), threading.Event()
        self.waited, self.removed = list[float](), list[Any]()

    def place(self, borrower: Any, layout: Any, name: str, known_as: str, wait_seconds: float) -> Any:
        self.waited.append(wait_seconds)
        assert self.may_answer.wait(30)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    it = Service()
    monkeypatch.setenv("PLACEMENT_WITHOUT_SERVICE", "ray")
    monkeypatch.setattr(serve, "detached_group", it.place)
    monkeypatch.setattr(serve, "_hurried", lambda end, is_given_up: None)
    monkeypatch.setattr(serve, "remove_placement_group", it.removed.append)
    return it


@pytest.fixture
def scheduler(service: Service) -> Any:
    rays = SimpleNamespace(
        _default_create_placement_group=lambda request: "Serve's own",
        CreatePlacementGroupRequest=SimpleNamespace,
    )
    groups = serve._Groups(rays, 5.0, 60.0)
    return groups.attend(Scheduler(groups))


def test_a_replica_is_pending_until_its_group_is_made(service: Service, scheduler: Any) -> None:
    service.answers = ["exact"]
    scheduler.add("a", [{"GPU": 1}])
    assert scheduler.round() == scheduler.round() == {}
    service.may_answer.set()
    until(lambda: scheduler.round() == {"a": "exact"})
    assert service.waited == [0.0] and service.removed == []


def test_without_room_it_waits_and_then_it_is_serves_own(service: Service, scheduler: Any) -> None:
    service.answers = [NO_ROOM, NO_ROOM]
    service.may_answer.set()
    scheduler.add("a", [{"GPU": 1}])
    until(lambda: scheduler.round() == {"a": "Serve's own"})
    assert service.waited == [0.0, 60.0]


def test_what_has_no_gpu_is_serves_own_at_once(service: Service, scheduler: Any) -> None:
    scheduler.add("a", [{"CPU": 1}])
    assert scheduler.round() == {"a": "Serve's own"}


def test_a_gangs_group_is_made_while_the_controller_waits_and_its_replicas_make_none(
    service: Service, scheduler: Any
) -> None:
    service.answers = ["exact", NO_ROOM]
    service.may_answer.set()
    asked = SimpleNamespace(
        name="gang", bundles=[{"GPU": 1}] * 2, strategy="PACK", bundle_label_selector=None
    )
    assert [scheduler.make(asked), scheduler.make(asked)] == ["exact", "Serve's own"]
    assert service.waited == [0.0, 0.0], "it does not wait for room"
    scheduler.add("a", [{"CPU": 1}], gang="exact")
    scheduler.round()
    assert len(service.waited) == 2


@pytest.mark.parametrize("made", [True, False], ids=["made", "being made"])
def test_the_group_of_a_replica_that_is_given_up_is_removed(
    service: Service, scheduler: Any, made: bool
) -> None:
    service.answers = ["exact"]
    scheduler.add("a", [{"GPU": 1}])
    scheduler.round()
    if made:
        service.may_answer.set()
        until(lambda: service.answers == [])
    scheduler.stop("a")
    service.may_answer.set()
    until(lambda: service.removed == ["exact"])
    assert scheduler.round() == {}
