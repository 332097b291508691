"""The log of what happened, and those who wait for it."""

from __future__ import annotations

import threading
import time

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
