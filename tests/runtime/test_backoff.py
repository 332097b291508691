"""Who failed waits, twice as long each time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from placement.runtime import backoff
from placement.runtime.backoff import Backoff


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(backoff, "time", clock)
    return clock


def test_each_wait_is_twice_as_long_up_to_the_longest(clock: SimpleNamespace) -> None:
    waits = Backoff(1.0, 5.0)
    for wait in (1.0, 2.0, 4.0, 5.0, 5.0):
        waits.fail("n")
        clock.now += wait - 0.001
        assert waits.waiting() == {"n"}
        clock.now += 0.001
        assert waits.waiting() == frozenset()
        assert "n" in waits, "the next failure counts on"


def test_each_waits_for_itself_and_begins_anew_once_it_has_done_well(clock: SimpleNamespace) -> None:
    waits = Backoff(1.0, 60.0)
    waits.fail("n")
    waits.fail("n")
    waits.fail("m")
    clock.now += 1.5
    assert waits.waiting() == {"n"}
    del waits["n"]
    waits.fail("n")
    clock.now += 1.0
    assert waits.waiting() == frozenset()
