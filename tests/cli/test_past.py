"""``events`` and ``logs``: what is asked, what is shown, how it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from placement.cli import past
from tests.cli.fake_service import FakeService, run, use
from tests.cli.test_apply import lines

EVENTS = [
    {"number": 5, "at": 0.0, "time": "", "deployment": "a", "replica": 0, "state": "placed", "text": "on a"},
    {
        "number": 8,
        "at": 0.0,
        "time": "",
        "deployment": "b",
        "replica": None,
        "state": "changed",
        "text": "model",
    },
]


def test_events_of_all_say_whose_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(events=EVENTS)
    use(monkeypatch, service)
    first, second = lines(run("events", "--since", "4").stdout)
    assert ["a", "replica", "0", "placed", "on", "a"] == first.split()[2:]
    assert ["b", "changed", "model"] == second.split()[2:]
    assert [((None, 4), {})] == service.asked("events")
    assert {"deployment": None, "events": EVENTS} == json.loads(run("events", "--json").stdout)
    assert " a " not in lines(run("events", "a").stdout)[0][:-2]


def test_who_follows_hears_of_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(events=EVENTS[:1], watch=iter([[], EVENTS[1:], KeyboardInterrupt()]))
    use(monkeypatch, service)
    done = run("events", "--follow", "--json")
    assert 130 == done.exit_code
    assert EVENTS == [json.loads(line) for line in done.stdout.splitlines()]
    assert [(5, None), (5, None), (8, None)] == [
        (one["since"], one["names"]) for _, one in service.asked("watch")
    ]


DECISION = {
    **EVENTS[0], "number": 9, "replica": None, "kind": "decision", "state": "refused", "text": "no\nroom\x1b[2J",
    "call": "apply", "caller": {"user": "a\x07lice", "job": "0a", "address": "10.0.0.9", "pid": "7"}, "seconds": 0.1,
}  # fmt: skip


def page(*entries: dict[str, Any], last: int = 9, more: bool = False, skipped: int = 0) -> dict[str, Any]:
    return {"entries": [*entries], "last": last, "more": more, "skipped": skipped}


def test_all_that_is_kept_is_shown_page_by_page_with_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(history=iter([page(*EVENTS, last=8, more=True), page(DECISION, skipped=2)] * 2))
    use(monkeypatch, service)
    shown = run("events", "--all", "a", "--since", "2h")
    assert "apply        refused    no room [2J (asked by a lice at 10.0.0.9 in job 0a)" in shown.stdout
    assert "another version wrote are left out: 2" in shown.stderr and not service.asked("events")
    [(first, _), (second, _)] = service.asked("history")
    assert (first[:2], second[:2]) == ((0, ["a"]), (8, ["a", "b"]))  # as of a group, whose member b is
    assert 7100 < time.time() - first[2] < 7300 + 60
    assert [*EVENTS, DECISION] == json.loads(run("events", "--all", "--json").stdout)["events"]


def test_who_follows_from_a_number_on_is_told_all_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(watch=iter([EVENTS, KeyboardInterrupt()]))
    use(monkeypatch, service)
    assert 130 == run("events", "--follow", "--since", "3").exit_code
    assert [3, 8] == [one["since"] for _, one in service.asked("watch")] and not service.asked("events")


def test_the_history_is_followed_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "POLL_SECONDS", 0.0)
    service = FakeService(
        history=iter([page(*EVENTS, last=8), page(last=8), page(DECISION), KeyboardInterrupt()])
    )
    use(monkeypatch, service)
    done = run("events", "--all", "--follow", "--json")
    assert (130, [*EVENTS, DECISION]) == (
        done.exit_code,
        [json.loads(line) for line in done.stdout.splitlines()],
    )
    assert [0, 8, 8, 9] == [args[0] for args, _ in service.asked("history")]


def test_the_log_is_printed_and_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(past, "POLL_SECONDS", 0.0)

    def pages() -> Iterator[Any]:
        yield {"lines": ["a", "b"], "cursor": "1:4"}
        yield {"lines": [], "cursor": "1:4"}
        yield {"lines": ["c"], "cursor": "1:6"}
        yield KeyboardInterrupt()

    service = FakeService(log=pages())
    use(monkeypatch, service)
    assert (130, "a\nb\nc\n") == ((done := run("logs", "--follow", "--lines", "2")).exit_code, done.stdout)
    assert [(2,), (0, "1:4"), (0, "1:4"), (0, "1:6")] == [args for args, _ in service.asked("log")]
    use(monkeypatch, FakeService(log={"lines": ["a"], "cursor": ""}))
    assert "a\n" == run("logs").stdout
    assert {"lines": ["a"]} == json.loads(run("logs", "--json").stdout)


def test_each_event_is_one_line_where_it_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    long = {**EVENTS[0], "text": "cannot place 'a': " + "no room " * 40 + "at all"}
    use(monkeypatch, FakeService(events=[long]))
    [line] = run("events").stdout.splitlines()
    assert line.endswith("at all")
