"""The clock's one look a second: nothing that takes long keeps the next look waiting."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from placement.runtime import clock
from placement.runtime.clock import RETRY_SECONDS, Clock


class Controller:
    """What the clock asks for and sees."""

    def __init__(self) -> None:
        self.now = 0.0
        self.alive = {"n", "m"}
        self.lost: list[str] = []
        self.pending: list[str] = []
        self.reconciled: list[str] = []
        self.over: list[str] = []
        self.ended: list[str] = []
        self.forgot: list[frozenset[str]] = []
        self.changed_at = 0.0
        self.asked = 0
        self.came = 0
        self.takes = 0.0
        self.demand = SimpleNamespace(listen=int)
        self.cluster = SimpleNamespace(draining=frozenset())
        self.fleet = SimpleNamespace(
            agents=SimpleNamespace(orphans_suspected=lambda: False),
            forget_all_but=self.forgot.append,
        )

        self.queue = self.lifetimes = self.queries = self
        self.history = SimpleNamespace(start=int)
        self.sweeper = SimpleNamespace(sweep_again=int)

    def readings(self) -> dict[object, float]:
        return {}

    def stranded(self, alive: frozenset[str]) -> list[str]:
        return list(self.lost)

    def depends_on(self) -> object:
        return self.changed_at

    def try_all(
        self, attempt: Callable[[str], None], begin: Callable[[str, Callable[[], None]], None]
    ) -> None:
        self.now += self.takes
        for name in self.pending:
            begin(name, partial(attempt, name))

    def reconcile(self, name: str) -> None:
        self.reconciled.append(name)
        if name == "broken":
            raise ConnectionError

    def ask_for_nodes(self) -> None:
        self.asked += 1

    def news(self) -> object:
        return self.came

    def end_what_is_over(
        self, has_ended: object, now: float, begin: Callable[[str, Callable[[], None]], None]
    ) -> None:
        for name in self.over:
            begin(name, lambda name=name: self.ended.append(name))  # type: ignore[misc]

    def write_again(self) -> None: ...

    def stop_idle_agents(self) -> None: ...


class Later(Executor):
    """Begins what it is given when told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], Any], Future[Any]]] = []

    def submit(self, do: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((lambda: do(*args, **more), future))
        return future

    def go(self) -> None:
        while self.waiting:
            do, future = self.waiting.pop(0)
            future.set_result(do())


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    controller = Controller()
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: controller.now, time=float))
    monkeypatch.setattr(clock, "live_node_ids", lambda: frozenset(controller.alive))
    monkeypatch.setattr(clock, "draining_nodes", frozenset)
    monkeypatch.setattr(clock, "ATTEMPT_SECONDS", 0.0)
    return controller


def test_a_death_is_noticed_while_what_is_pending_is_still_being_tried(controller: Controller) -> None:
    reconcilers = Later()
    looks = Clock(controller, reconcilers)  # type: ignore[arg-type]
    controller.pending = ["p1", "p2"]
    looks.look()
    controller.lost = ["lost"]
    for _ in range(3):  # looks go on, and nothing is begun twice
        looks.look()
    assert len(reconcilers.waiting) == 2
    reconcilers.go()
    assert controller.reconciled == ["lost", "p1", "p2"]


def test_what_is_pending_is_tried_again_when_something_changed_or_after_a_while(
    controller: Controller,
) -> None:
    reconcilers = Later()
    looks = Clock(controller, reconcilers)  # type: ignore[arg-type]
    controller.pending = ["p"]

    def look() -> int:
        looks.look()
        reconcilers.go()
        return len(controller.reconciled)

    assert look() == 1
    assert look() == 1, "nothing has changed"
    assert controller.asked == 2, "the autoscaler hears of it with each look"
    controller.changed_at = 1.0  # somebody gave something back
    assert look() == 2
    controller.now += RETRY_SECONDS + 1  # or another Ray user did
    assert look() == 3
    controller.alive.add("new")
    assert look() == 4


def test_what_cannot_be_reconciled_keeps_nobody_else_waiting(controller: Controller) -> None:
    reconcilers = Later()
    looks = Clock(controller, reconcilers)  # type: ignore[arg-type]
    controller.lost = ["broken", "lost"]
    controller.pending = ["broken", "p"]
    looks.look()
    reconcilers.go()
    assert controller.reconciled == ["broken", "lost", "broken", "p"]
    looks.look()
    reconcilers.go()
    assert controller.reconciled[4:] == ["broken", "lost"]


def test_what_outlived_its_owner_is_ended_beside_the_looks_once(controller: Controller) -> None:
    """Its node may not answer."""
    reconcilers = Later()
    looks = Clock(controller, reconcilers)  # type: ignore[arg-type]
    controller.over = ["a", "b"]
    for _ in range(3):
        looks.look()
    assert controller.ended == []
    reconcilers.go()
    assert controller.ended == ["a", "b"]


def test_what_is_known_of_a_node_goes_with_it(controller: Controller) -> None:
    looks = Clock(controller, Later())  # type: ignore[arg-type]
    looks.look()
    looks.look()
    controller.alive.remove("m")
    looks.look()
    assert controller.forgot == [{"n", "m"}, {"n"}]


def test_which_nodes_drain_is_known_before_the_first_look(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller that starts anew would otherwise place on them for a second."""
    monkeypatch.setattr(clock, "draining_nodes", lambda: frozenset({"a"}))
    monkeypatch.setattr(clock, "threading", SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=int)))
    read: list[object] = []
    monkeypatch.setattr(clock, "metrics", SimpleNamespace(start=read.append))
    Clock(controller, Later()).start()  # type: ignore[arg-type]
    assert controller.cluster.draining == {"a"}
    assert read == [controller.readings]


def test_what_waits_is_tried_at_once_when_something_has_come_for_it(controller: Controller) -> None:
    reconcilers = Later()
    looks = Clock(controller, reconcilers)  # type: ignore[arg-type]
    controller.pending = ["p"]

    def glance() -> int:
        looks.glance()
        reconcilers.go()
        return len(controller.reconciled)

    looks.look()
    reconcilers.go()
    controller.now = 0.1
    assert glance() == 1, "nothing has come"
    assert controller.asked == 2
    controller.changed_at = 1.0
    assert glance() == 1, "that is for the next look"
    controller.came = 1
    looks.glance()
    looks.glance()
    assert len(reconcilers.waiting) == 1, "it is being tried"
    reconcilers.go()
    assert len(controller.reconciled) == 2


def test_what_waits_is_not_kept_waiting_by_one_that_is_tried_and_hangs(controller: Controller) -> None:
    reconcilers = Later()
    looks = Clock(controller, reconcilers)  # type: ignore[arg-type]
    controller.pending = ["hangs", "p"]
    looks.look()
    try_all, done = reconcilers.waiting.pop()
    done.set_result(try_all())
    hangs, p = reconcilers.waiting
    p[1].set_result(p[0]())
    assert controller.reconciled == ["p"]
    reconcilers.waiting.clear()
    controller.changed_at = 1.0
    looks.look()
    reconcilers.go()
    assert controller.reconciled == ["p", "p"], "it is being tried already"
    hangs[1].set_result(hangs[0]())
    controller.changed_at = 2.0
    looks.look()
    reconcilers.go()
    assert controller.reconciled == ["p", "p", "hangs", "hangs", "p"]


def test_no_more_than_a_fifth_of_the_time_goes_into_trying_at_once(controller: Controller) -> None:
    looks = Clock(controller, Takes(controller, 2.0))  # type: ignore[arg-type]
    controller.pending = ["p"]
    looks.look()
    for tenth in range(100):
        controller.now = 2.0 + tenth / 10
        controller.came += 1
        looks.glance()
    assert len(controller.reconciled) == 2


class Takes(Executor):
    """Does what it is given, which takes a while."""

    def __init__(self, controller: Controller, seconds: float) -> None:
        self.controller, self.seconds = controller, seconds

    def submit(self, do: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        self.controller.takes = self.seconds
        do(*args, **more)
        done: Future[Any] = Future()
        done.set_result(None)
        return done
