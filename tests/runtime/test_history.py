"""What is kept of events and decisions: complete, bounded, and never in the way. On a make-believe Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InvalidDeployment, NotEnoughGpus, PartlyApplied
from placement.runtime import feed, history, ledger
from placement.runtime import service as service_module
from placement.runtime.history import History
from placement.runtime.service import DeploymentPlacementActor
from tests.properties.test_service import Ray, StoreFailed, make_believe

ALICE = {"user": "alice", "job": "0a000000", "address": "10.0.0.9", "secret": "sk-planted"}
DAY = 86400.0


@pytest.fixture
def start(outside: Ray) -> Callable[[], DeploymentPlacementActor]:
    """Starts a service; the one before is dead then."""

    def start() -> DeploymentPlacementActor:
        with mock.patch.object(service_module, "Clock", lambda controller: SimpleNamespace(start=int)):
            return DeploymentPlacementActor(lambda info: None)

    return start


def one(name: str = "a", **fields: Any) -> dict[str, Any]:
    return {"name": name, "model": "m", **fields}


def asked(*calls: Awaitable[Any]) -> list[Any]:
    """What each call answers, one after the other; an error is an answer."""

    async def each() -> list[Any]:
        return [(await asyncio.gather(call, return_exceptions=True))[0] for call in calls]

    return asyncio.run(each())


def flush(service: DeploymentPlacementActor) -> None:
    service._controller.history.flush()


def kept(service: DeploymentPlacementActor, *kinds: str, after: int = 0) -> list[dict[str, Any]]:
    [page] = asked(service.history(after))
    assert not page["more"]
    return [entry for entry in page["entries"] if entry["kind"] in kinds or not kinds]


def filled(count: int, first: int = 1, at: float | None = None, **bounds: float) -> History:
    """A history with so many entries more, all of them written."""
    found, at = History(**bounds), time.time() if at is None else at
    for number in range(first, first + count):
        found.add(
            history.entry(number, at, "event", f"d{number % 3}", "placed", f"on {number:x} {number**9:x}")
        )
    found.flush()
    return found


def numbers(page: history.Page) -> list[int]:
    return [entry["number"] for entry in page.entries]


# -- decisions -------------------------------------------------------------------------------------


def test_a_decision_says_who_asked_for_what_and_what_became_of_it(
    start: Callable[[], DeploymentPlacementActor],
) -> None:
    service = start()
    asked(
        service.place(one(gpus=2), caller=ALICE),
        service.place(one(gpus=9), caller=ALICE),
        service.apply(one("b", gpus=4, replicas=3), caller={"driver": "0b000000"}),
        service.release("a"),
    )
    placed, conflict, pending, released = kept(service, "decision")
    assert placed["text"] == "replica 0 on x GPUs [0, 1]"
    assert (placed["state"], placed["call"], placed["deployment"], placed["replica"]) == (
        "placed",
        "place",
        "a",
        None,
    )
    assert placed["caller"] == {"user": "alice", "job": "0a000000", "address": "10.0.0.9"}
    assert placed["time"].endswith("+00:00") and placed["seconds"] > 0
    assert (conflict["state"], conflict["code"]) == ("refused", "deployment_conflict")
    assert pending["text"].startswith("replica 0 on y GPUs [0, 1, 2, 3]; replicas 1-2 wait: cannot place 'b'")
    assert pending["text"].count("cannot place") == 1, "the reason, once"
    assert (pending["state"], pending["caller"]) == ("pending", {"job": "0b000000"})
    assert (released["state"], released["text"], released["caller"]) == ("released", "1 replica", {})
    assert "sk-planted" not in json.dumps(kept(service))


def test_what_changes_nothing_is_no_news_and_what_is_refused_is(
    start: Callable[[], DeploymentPlacementActor],
) -> None:
    service = start()
    asked(service.apply(one()))
    seen = kept(service)[-1]["number"]
    same, *_ = asked(service.apply(one()), service.place(one()), service.renew("a"))
    assert same.assignments and kept(service, after=seen) == []
    invalid, full = asked(service.place({"name": "\x1b[2J", "gpus": "many"}), service.place(one("b", gpus=9)))
    assert (type(invalid), type(full)) == (InvalidDeployment, NotEnoughGpus)
    assert [entry["code"] for entry in kept(service, "decision", after=seen)] == [
        "invalid_deployment",
        "not_enough_gpus",
    ]


def test_of_a_file_each_deployment_has_its_decision(start: Callable[[], DeploymentPlacementActor]) -> None:
    service = start()
    file = [one("a"), one("b", gpus=9, constraints={"gpu_nodes": ["nowhere"]}), one("c")]
    [partly] = asked(service.apply_all(file, caller=ALICE))
    assert isinstance(partly, PartlyApplied)
    assert {entry["deployment"]: entry["state"] for entry in kept(service, "decision")} == {
        "a": "applied",
        "b": "refused",
        "c": "applied",
    }
    [refused] = asked(service.apply_all(file, True))
    assert [entry["code"] for entry in kept(service, "decision")[3:]] == [refused.code] * 3


def test_a_lease_is_a_decision_of_its_caller_once_it_is_there(
    start: Callable[[], DeploymentPlacementActor],
) -> None:
    service = start()

    async def scene() -> None:
        loan = await service.lend(one(), caller=ALICE)
        await service.confirm(loan.id, "")  # type: ignore[union-attr]

    asked(scene())
    [failed] = kept(service, "decision")
    assert (failed["call"], failed["deployment"], failed["caller"]["user"]) == ("lend", "a", "alice")


# -- over a death ----------------------------------------------------------------------------------


def test_events_are_known_after_a_death_and_who_watches_misses_none(
    start: Callable[[], DeploymentPlacementActor],
) -> None:
    before = start()
    asked(before.place(one()), before.place(one("b")))
    [events] = asked(before.events())
    flush(before)
    after = start()
    [known] = asked(after.events())
    assert known[:2] == events and [event["state"] for event in known[2:]] == ["restarted"] * 2
    [watched] = asked(after.watch(events[0]["number"], None, 0.0))
    assert watched == known[1:]
    started = [entry["text"] for entry in kept(after, "service")]
    assert len(started) == 2 and "its last second may be missing" in started[1]
    assert numbers_rise(kept(after))


def test_a_service_that_was_stopped_leaves_no_doubt(
    start: Callable[[], DeploymentPlacementActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = start()
    monkeypatch.setattr(before._controller.fleet.agents, "stop", int, raising=False)
    asked(before.place(one()), before.stop_agents(ALICE))
    told = kept(start(), "service")
    assert [entry["state"] for entry in told] == ["started", "stopped", "started"]
    assert told[1]["caller"] == {"user": "alice", "job": "0a000000", "address": "10.0.0.9"}
    assert "missing" not in kept(start(), "service")[-1]["text"]


def test_what_memory_has_forgotten_the_history_tells_and_what_it_has_not_is_a_gap(
    start: Callable[[], DeploymentPlacementActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "KEPT_PER_DEPLOYMENT", 3)
    service = start()
    for number in range(9):
        service._controller.feed.add("a", 0, "lost", str(number))
    all_of_it = kept(service, "event")
    [first] = [entry["number"] for entry in all_of_it[:1]]
    short, exact = asked(service.events("a", first), service.watch(first, ["a"], 0.0))
    assert [event["text"] for event in short] == ["6", "7", "8"]
    assert [event["text"] for event in exact] == [str(number) for number in range(1, 9)]

    [lacking] = asked(service.watch(1, ["a"], 0.0))
    assert (lacking[0]["state"], lacking[0]["deployment"]) == ("gap", "") and len(lacking) == 10
    assert lacking[0]["number"] < lacking[1]["number"], "who goes on after it does not hear it again"


def numbers_rise(entries: list[dict[str, Any]]) -> bool:
    found = [entry["number"] for entry in entries]
    return found == sorted(set(found))


# -- the store -------------------------------------------------------------------------------------


def test_the_store_may_fail_at_any_write_and_no_call_hears_of_it(
    start: Callable[[], DeploymentPlacementActor], outside: Ray, caplog: pytest.LogCaptureFixture
) -> None:
    service = start()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 9:
            raise KeyboardInterrupt  # ends the thread's loop

    with (
        mock.patch.object(ledger, "save_history_segment", side_effect=StoreFailed("no answer")),
        mock.patch.object(history, "time", SimpleNamespace(sleep=sleep, time=lambda: 0.0)),
        pytest.raises(KeyboardInterrupt),
    ):
        assert asked(service.place(one()))[0].assignments
        service._controller.history._run()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["the history cannot be written; trying again: no answer"]
    before = kept(service)
    flush(service)
    assert kept(start())[: len(before)] == before, "it is written as soon as that is possible, once"


def test_a_write_of_which_it_is_not_known_whether_it_was_done_is_done_again(outside: Ray) -> None:
    found = filled(3)
    with mock.patch.object(outside, "store_fails", "after"):
        found.add(history.entry(9, time.time(), "event", "a", "placed", ""))
        with mock.patch.object(Ray, "_write", side_effect=StoreFailed), pytest.raises(StoreFailed):
            found.flush()
        found.flush()
    assert numbers(found.read()) == numbers(History().read()) == [1, 2, 3, 9]


def test_what_a_failing_store_makes_it_lose_is_said(outside: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_UNWRITTEN", 3)
    monkeypatch.setattr(history, "BATCH", 1)
    found = History()
    for number in range(1, 7):
        found.add(history.entry(number, time.time(), "event", "d", "placed", ""))
    with (
        mock.patch.object(ledger, "save_history_segment", side_effect=StoreFailed),
        mock.patch.object(history.time, "sleep", side_effect=[None, None, KeyboardInterrupt]),
        pytest.raises(KeyboardInterrupt),
    ):
        found._run()
    found.flush()
    assert [(entry["number"], entry["kind"]) for entry in History().read().entries] == [
        (1, "event"), (3, "gap"), (4, "event"), (5, "event"), (6, "event"),
    ]  # fmt: skip


def test_it_is_bounded_by_size_and_the_oldest_go_first(outside: Ray) -> None:
    found = filled(20_000, mib=0.25)
    values = [value for key, value in outside.store.items() if key.startswith(b"history/")]
    assert len(values) == 4 and sum(map(len, values)) <= 2**18
    page = found.read(5, most=10**6)
    assert page.entries[0]["kind"] == "gap" and numbers(page)[-1] == 20_000
    assert numbers(page) == list(range(numbers(page)[0], 20_001))
    again, part, seen = History(mib=0.25), history.Page(more=True), list[int]()
    while part.more:
        part = again.read(part.last, most=100)
        seen += numbers(part)
    assert seen == numbers(page)[1:], "a page at a time, each once"


def test_it_is_bounded_by_days(outside: Ray) -> None:
    with mock.patch.object(history.time, "time", lambda: 40 * DAY):
        for day in range(40):
            found = filled(2, first=2 * day + 1, at=day * DAY + 100.0, days=30)
        assert [entry["at"] // DAY for entry in found.read().entries][::2] == [
            float(day) for day in range(9, 40)
        ]
        assert numbers(found.read(earliest=39 * DAY)) == [79, 80]


def test_entries_of_a_later_version_are_left_as_they_are_skipped_and_counted(outside: Ray) -> None:
    filled(2)
    [key] = [key for key in outside.store if key.startswith(b"history/")]
    newer = json.dumps({"version": history.VERSION + 1, "number": 3, "what": "else"}).encode()
    outside.store[key] = zlib.compress(zlib.decompress(outside.store[key]) + newer + b"\nnonsense\n")
    found = filled(1, first=4)
    assert (numbers(found.read()), found.read().skipped) == ([1, 2, 4], 2)
    assert found.read(4).skipped == 0, "who follows hears it once"
    outside.store[b"history/of another form"] = b""
    assert newer in zlib.decompress(outside.store[key])
    outside.store[key] = b"nonsense"
    assert (numbers(filled(1, first=5).read()), History().read().skipped) == ([5], 1)


def test_names_and_texts_of_any_kind_and_length_come_back(outside: Ray) -> None:
    found = History()
    for number, text in enumerate(["a\nb\x00", "\ud800 lone", "日本" * 10_000, "x" * 100_000], 1):
        found.add(history.entry(number, 0.0, "event", text[:20], "placed", text))
    found.flush()
    texts = [entry["text"] for entry in History().read().entries]
    assert texts[:2] == ["a\nb\x00", "\ud800 lone"] and list(map(len, texts[2:])) == [history.LONGEST] * 2


def test_only_what_is_asked_for_is_read(outside: Ray) -> None:
    found = filled(9)
    assert numbers(found.read(4, ["d0", "d1"])) == [6, 7, 9]
    assert (numbers(found.read(9)), found.read(9).last) == ([], 9)


DONE = st.sampled_from(("add", "add", "add", "write", "fails before", "fails after", "death"))


@given(st.lists(DONE, max_size=60), st.integers(1, 9))
@settings(deadline=None)
def test_whatever_fails_and_dies_what_was_written_is_kept_each_once_and_in_order(
    steps: list[str], page_of: int
) -> None:
    ray = Ray()
    with make_believe(ray), mock.patch.multiple(history, SEGMENT_BYTES=1800, PIECE_BYTES=400):
        found, added, durable = History(), list[int](), list[int]()
        for number, step in enumerate(steps, 1):
            if step == "add":
                found.add(history.entry(number, time.time(), "event", "d", "placed", f"{number**40:x}"[:120]))
                added.append(number)
            elif step == "death":
                found, added = History(), list(durable)
            else:
                with suppress(StoreFailed), failing(ray, step.removeprefix("fails ")):
                    found.flush()
                    durable = list(added)
            part, seen = history.Page(more=True), list[int]()
            while part.more:
                part = found.read(part.last, most=page_of)
                seen += numbers(part)
            assert seen == numbers(found.read(most=10**6))
            assert seen == sorted(set(seen))
            assert set(durable) <= set(seen) <= {*added, *range(number + 1)}
            if step != "death":
                assert set(added) <= set(seen), "what waits to be written is read, too"
            else:
                added = seen  # a write that failed may have been done


@contextmanager
def failing(ray: Ray, how: str) -> Iterator[None]:
    """A store whose next write fails before it is done, or after."""

    @contextmanager
    def write(self: Ray, key: bytes) -> Iterator[None]:
        if how == "before":
            raise StoreFailed
        yield
        if how == "after":
            raise StoreFailed

    with mock.patch.object(Ray, "_write", write):
        yield
