"""The keeper's one look a second: deaths first, and never so long at what is pending that a death waits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from placement.runtime import keeper
from placement.runtime.keeper import POLL_SECONDS, RETRY_SECONDS, Keeper

MEND_SECONDS = 0.3


class Service:
    """What the keeper asks for and sees; mending takes time on a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lost: list[str] = []
        self.pending = [f"p{i:02}" for i in range(10)]
        self.mended: list[str] = []
        self.draining: frozenset[str] = frozenset()
        self.fleet = SimpleNamespace(changed_at=0.0, in_doubt=lambda: False)

    def stranded(self, alive: frozenset[str]) -> list[str]:
        lost, self.lost = self.lost, []
        return lost

    def waiting(self) -> list[str]:
        return list(self.pending)

    def mend(self, name: str) -> None:
        self.mended.append(name)
        self.now += MEND_SECONDS

    def rest(self) -> None: ...


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setattr(keeper.time, "monotonic", lambda: service.now)
    monkeypatch.setattr(keeper, "live_node_ids", lambda: frozenset({"n"}))
    monkeypatch.setattr(keeper, "draining_nodes", frozenset)
    return service


def test_many_that_are_pending_are_tried_over_several_looks_and_a_death_comes_first(service: Service) -> None:
    looks = Keeper(service)
    looks.look()
    first = len(service.mended)
    assert first == -(-POLL_SECONDS // MEND_SECONDS)
    service.lost = ["lost"]
    looks.look()
    assert service.mended[first] == "lost"
    for _ in range(3):
        looks.look()
    assert [name for name in service.mended if name != "lost"] == service.pending


def test_what_is_pending_is_tried_again_when_something_changed_or_after_a_while(service: Service) -> None:
    service.pending = ["p"]
    looks = Keeper(service)
    looks.look()
    looks.look()
    assert service.mended == ["p"], "nothing has changed"
    service.fleet.changed_at = 1.0  # somebody gave something back
    looks.look()
    assert service.mended == ["p", "p"]
    service.now += RETRY_SECONDS + 1  # or another Ray user did
    looks.look()
    assert service.mended == ["p", "p", "p"]
