"""The log of what happened, and those who wait for it."""

from __future__ import annotations

import threading
import time

import pytest

from placement.runtime import events
from placement.runtime.events import EventLog


def test_numbers_rise_and_since_gives_what_came_after() -> None:
    log = EventLog()
    for replica in range(3):
        log.add("d", replica, "placed")
    log.add("other", 0, "placed")
    first, second, third = log.since("d", 0)
    assert first.number < second.number < third.number
    assert log.since("d", second.number) == [third]
    assert log.since("nobody", 0) == []
    assert (log.known("d"), log.known("nobody")) == (True, False)


def test_numbers_go_on_after_a_restart() -> None:
    before, later = EventLog(), EventLog()
    before.add("d", 0, "placed")
    time.sleep(0.002)
    later.add("d", 0, "lost")
    assert later.since("d", before.since("d", 0)[0].number)


def test_who_waits_is_woken_by_the_next_one_of_that_name() -> None:
    log = EventLog()
    heard: list[str] = []
    waiting = threading.Thread(target=lambda: heard.extend(one.state for one in log.wait("d", 0, 10)))
    waiting.start()
    log.add("other", 0, "placed")
    log.add("d", 0, "lost", "its node died")
    waiting.join(5)
    assert heard == ["lost"]


def test_waiting_ends_when_the_time_is_over() -> None:
    assert EventLog().wait("d", 0, 0.01) == []


def test_what_is_kept_is_bounded() -> None:
    log = EventLog()
    for _ in range(events.KEPT_PER_DEPLOYMENT + 10):
        log.add("d", 0, "placed")
    assert len(log.since("d", 0)) == events.KEPT_PER_DEPLOYMENT
    for name in range(events.KEPT_DEPLOYMENTS):
        log.add(f"d{name}", 0, "placed")
    assert not log.known("d")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is."""
    now = [1_700_000_000.0]
    monkeypatch.setattr(events.time, "time", lambda: now[0])
    return now


def numbers(log: EventLog, count: int, name: str = "d") -> list[int]:
    before = log.since(name, 0)
    for _ in range(count):
        log.add(name, 0, "placed")
    return [one.number for one in log.since(name, before[-1].number if before else 0)]


def test_numbers_rise_whatever_the_clock_does_and_however_often_the_log_begins_anew(
    clock: list[float],
) -> None:
    kept = [0]
    seen = [0]
    for change in (0.0, -1e9, 1e9, -1e6, 0.0):
        clock[0] += change
        log = EventLog(kept[-1], kept.append)
        for _ in range(3):
            seen += numbers(log, 5)
            clock[0] -= 3600.0
    assert seen == sorted(set(seen))
    assert len(kept) == 6, "noted once by each log"


def test_thousands_of_events_at_once_are_no_reason_to_go_back(clock: list[float]) -> None:
    kept = [0]
    [last] = numbers(EventLog(kept[-1], kept.append), 1)
    log = EventLog(kept[-1], kept.append)
    for name in range(5000):
        log.add(f"d{name}", None, "restarted")
    [first] = numbers(EventLog(kept[-1], kept.append), 1)
    assert log.since("d4999", 0)[0].number < first
    assert last < log.since("d4999", 0)[0].number


def test_more_numbers_are_set_aside_before_they_are_used(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "NUMBERS", 4)
    kept: list[int] = []

    def keep(end: int) -> None:
        if len(kept) == 1 and clock[0] > 0:  # the second time it fails
            clock[0] = 0.0
            raise OSError("the store is away")
        kept.append(end)

    log = EventLog(0, keep)
    for count in range(1, 30):
        [number] = numbers(log, 1)
        assert number < kept[-1] or len(kept) == 1, count
    assert len(kept) > 5


def test_of_what_stands_the_last_event_is_known_however_many_came_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "KEPT_DEPLOYMENTS", 3)
    standing = {"a", "b"}
    log = EventLog(stands=standing.__contains__)
    for name in ("a", "a", "gone", "b"):
        log.add(name, 0, "placed", name)
    last = log.since("a", 0)[-1]
    for name in range(9):
        log.add(f"d{name}", 0, "placed")
    assert (log.since("a", 0), log.known("a"), log.known("gone")) == ([last], True, False)
    log.add("a", 0, "released")
    assert [one.state for one in log.since("a", 0)] == ["placed", "released"]
    standing.clear()
    for name in range(9):
        log.add(f"d{name}", 0, "placed")
    assert not log.known("a")


def test_an_event_has_its_time_with_a_date(clock: list[float]) -> None:
    log = EventLog()
    log.add("d", 0, "placed", "on n")
    [one] = log.since("d", 0)
    assert one.to_dict() == {
        "number": 1_700_000_000_000,
        "at": 1_700_000_000.0,
        "time": "2023-11-14T22:13:20.000+00:00",
        "replica": 0,
        "state": "placed",
        "text": "on n",
    }
