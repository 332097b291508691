"""The keeper's one look a second: nothing that takes long keeps the next look waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import pytest

from placement.runtime import keeper
from placement.runtime.keeper import RETRY_SECONDS, Keeper


class Service:
    """What the keeper asks for and sees."""

    def __init__(self) -> None:
        self.now = 0.0
        self.alive = {"n", "m"}
        self.lost: list[str] = []
        self.pending: list[str] = []
        self.mended: list[str] = []
        self.forgot: list[frozenset[str]] = []
        self.draining: frozenset[str] = frozenset()
        self.fleet = SimpleNamespace(
            changed_at=0.0,
            agents=SimpleNamespace(in_doubt=lambda: False),
            forget_all_but=self.forgot.append,
        )

    def stranded(self, alive: frozenset[str]) -> list[str]:
        return list(self.lost)

    def waiting(self) -> list[str]:
        return list(self.pending)

    def mend(self, name: str) -> None:
        self.mended.append(name)
        if name == "broken":
            raise ConnectionError

    def write_again(self) -> None: ...

    def sweep_again(self) -> None: ...

    def rest(self) -> None: ...


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
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    service = Service()
    monkeypatch.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: service.now))
    monkeypatch.setattr(keeper, "live_node_ids", lambda: frozenset(service.alive))
    monkeypatch.setattr(keeper, "draining_nodes", frozenset)
    return service


def test_a_death_is_noticed_while_what_is_pending_is_still_being_tried(service: Service) -> None:
    menders = Later()
    looks = Keeper(service, menders)  # type: ignore[arg-type]
    service.pending = ["p1", "p2"]
    looks.look()
    service.lost = ["lost"]
    for _ in range(3):  # looks go on, and nothing is begun twice
        looks.look()
    assert len(menders.waiting) == 2
    menders.go()
    assert service.mended == ["p1", "p2", "lost"]


def test_what_is_pending_is_tried_again_when_something_changed_or_after_a_while(service: Service) -> None:
    menders = Later()
    looks = Keeper(service, menders)  # type: ignore[arg-type]
    service.pending = ["p"]

    def look() -> int:
        looks.look()
        menders.go()
        return len(service.mended)

    assert look() == 1
    assert look() == 1, "nothing has changed"
    service.fleet.changed_at = 1.0  # somebody gave something back
    assert look() == 2
    service.now += RETRY_SECONDS + 1  # or another Ray user did
    assert look() == 3
    service.alive.add("new")
    assert look() == 4


def test_what_cannot_be_mended_keeps_nobody_else_waiting(service: Service) -> None:
    menders = Later()
    looks = Keeper(service, menders)  # type: ignore[arg-type]
    service.lost = ["broken", "lost"]
    service.pending = ["broken", "p"]
    looks.look()
    menders.go()
    assert service.mended == ["broken", "lost", "broken", "p"]
    looks.look()
    menders.go()
    assert service.mended[4:] == ["broken", "lost"]


def test_what_is_known_of_a_node_goes_with_it(service: Service) -> None:
    looks = Keeper(service, Later())  # type: ignore[arg-type]
    looks.look()
    looks.look()
    service.alive.remove("m")
    looks.look()
    assert service.forgot == [{"n", "m"}, {"n"}]


def test_which_nodes_drain_is_known_before_the_first_look(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that starts anew would otherwise place on them for a second."""
    monkeypatch.setattr(keeper, "draining_nodes", lambda: frozenset({"a"}))
    monkeypatch.setattr(keeper, "threading", SimpleNamespace(Thread=lambda **_: SimpleNamespace(start=int)))
    Keeper(service, Later()).start()  # type: ignore[arg-type]
    assert service.draining == {"a"}
