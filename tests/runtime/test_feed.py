"""The feed of what happened, and those who wait for it."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from placement.errors import Busy
from placement.runtime import feed
from placement.runtime.feed import Event, Feed


def waited(log: Feed, timeout_seconds: float) -> list[Event]:
    return asyncio.run(log.wait(0, ["d"], timeout_seconds))


def test_numbers_rise_and_since_gives_what_came_after() -> None:
    log = Feed()
    for replica in range(3):
        log.add("d", replica, "placed")
    log.add("other", 0, "placed")
    first, second, third = log.since(0, ["d"])
    assert first.number < second.number < third.number
    assert log.since(second.number, ["d"]) == [third]
    assert log.since(0, ["nobody"]) == []
    assert (log.known("d"), log.known("nobody")) == (True, False)


def test_numbers_go_on_after_a_restart() -> None:
    before, later = Feed(), Feed()
    before.add("d", 0, "placed")
    time.sleep(0.002)
    later.add("d", 0, "lost")
    assert later.since(before.since(0, ["d"])[0].number, ["d"])


def test_who_waits_is_woken_by_the_next_one_of_that_name() -> None:
    log = Feed()
    heard: list[str] = []
    waiting = threading.Thread(target=lambda: heard.extend(one.state for one in waited(log, 10)))
    waiting.start()
    log.add("other", 0, "placed")
    log.add("d", 0, "lost", "its node died")
    waiting.join(5)
    assert heard == ["lost"]


def test_waiting_ends_when_the_time_is_over() -> None:
    log = Feed()
    assert (waited(log, 0.01), waited(log, 0.0), log.waiting()) == ([], [], 0)


def test_what_is_kept_is_bounded() -> None:
    log = Feed()
    for _ in range(feed.KEPT_PER_DEPLOYMENT + 10):
        log.add("d", 0, "placed")
    assert len(log.since(0, ["d"])) == feed.KEPT_PER_DEPLOYMENT
    for name in range(feed.KEPT_DEPLOYMENTS):
        log.add(f"d{name}", 0, "placed")
    assert not log.known("d")


def at_once(work: Callable[[], None]) -> None:
    work()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is."""
    now = [1_700_000_000.0]
    monkeypatch.setattr(feed.time, "time", lambda: now[0])
    return now


def numbers(log: Feed, count: int, name: str = "d") -> list[int]:
    before = log.since(0, [name])
    for _ in range(count):
        log.add(name, 0, "placed")
    return [one.number for one in log.since(before[-1].number if before else 0, [name])]


def test_numbers_rise_whatever_the_clock_does_and_however_often_the_log_begins_anew(
    clock: list[float],
) -> None:
    kept = [0]
    seen = [0]
    for change in (0.0, -1e9, 1e9, -1e6, 0.0):
        clock[0] += change
        log = Feed(kept[-1], kept.append)
        for _ in range(3):
            seen += numbers(log, 5)
            clock[0] -= 3600.0
    assert seen == sorted(set(seen))
    assert len(kept) == 6, "noted once by each log"


def test_thousands_of_events_at_once_are_no_reason_to_go_back(clock: list[float]) -> None:
    kept = [0]
    [last] = numbers(Feed(kept[-1], kept.append), 1)
    log = Feed(kept[-1], kept.append)
    for name in range(5000):
        log.add(f"d{name}", None, "restarted")
    [first] = numbers(Feed(kept[-1], kept.append), 1)
    assert log.since(0, ["d4999"])[0].number < first
    assert last < log.since(0, ["d4999"])[0].number


def test_more_numbers_are_set_aside_before_they_are_used(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "NUMBERS", 4)
    monkeypatch.setattr(feed, "RETRY_SECONDS", 0.0)
    kept: list[int] = []

    def keep(end: int) -> None:
        if len(kept) == 1 and clock[0] > 0:  # the second time it fails
            clock[0] = 0.0
            raise OSError("the store is away")
        kept.append(end)

    log = Feed(0, keep, run=at_once)
    for count in range(1, 30):
        [number] = numbers(log, 1)
        assert number < kept[-1] or len(kept) == 1, count
    assert len(kept) > 5


def test_of_what_stands_the_last_event_is_known_however_many_came_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "KEPT_DEPLOYMENTS", 3)
    standing = {"a", "b"}
    log = Feed(stands=standing.__contains__)
    for name in ("a", "a", "gone", "b"):
        log.add(name, 0, "placed", name)
    last = log.since(0, ["a"])[-1]
    for number in range(9):
        log.add(f"d{number}", 0, "placed")
    assert (log.since(0, ["a"]), log.known("a"), log.known("gone")) == ([last], True, False)
    log.add("a", 0, "released")
    assert [one.state for one in log.since(0, ["a"])] == ["placed", "released"]
    standing.clear()
    for number in range(9):
        log.add(f"d{number}", 0, "placed")
    assert not log.known("a")


def test_an_event_has_its_time_with_a_date(clock: list[float]) -> None:
    log = Feed()
    log.add("d", 0, "placed", "on n")
    [one] = log.since(0, ["d"])
    assert one.to_dict() == {
        "number": 1_700_000_000_000,
        "at": 1_700_000_000.0,
        "time": "2023-11-14T22:13:20.000+00:00",
        "deployment": "d",
        "replica": 0,
        "state": "placed",
        "text": "on n",
    }


def test_numbers_are_set_aside_in_another_thread_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "NUMBERS", 4)
    kept: list[threading.Thread] = []
    went_on, noted = threading.Event(), threading.Event()

    def keep(end: int) -> None:
        kept.append(threading.current_thread())
        if len(kept) > 1:
            assert went_on.wait(10)
            noted.set()

    log = Feed(0, keep)
    for _ in range(20):
        log.add("d", 0, "placed")
    assert len(log.since(0)) == 20
    went_on.set()
    assert noted.wait(10)
    first, second = kept[:2]
    assert first is threading.main_thread() is not second


def test_a_clock_that_jumps_ahead_is_followed_once_numbers_are_set_aside(clock: list[float]) -> None:
    kept: list[int] = []
    log = Feed(0, kept.append, run=at_once)
    clock[0] += 1e9
    [before] = numbers(log, 1)
    assert before < kept[0]
    [after] = numbers(log, 1)
    assert clock[0] * 1000 == after < kept[1]


def test_no_thread_to_be_had_is_no_reason_to_lose_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "NUMBERS", 2)
    monkeypatch.setattr(feed, "RETRY_SECONDS", 0.0)
    asked: list[Callable[[], None]] = []

    def refuse(work: Callable[[], None]) -> None:
        asked.append(work)
        raise RuntimeError("can't start new thread")

    log = Feed(run=refuse)
    assert (len(numbers(log, 5)), len(asked)) == (5, 5)


def test_since_gives_the_events_of_all_or_some_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "KEPT_DEPLOYMENTS", 3)
    log = Feed(stands={"old", "older"}.__contains__)
    for name in ("older", "old", "gone", "a", "b", "a", "c", "a", "b"):
        log.add(name, 0, "placed")
    found = log.since(0)
    assert [one.deployment for one in found] == ["older", "old", "a", "b", "a", "c", "a", "b"]
    assert [one.number for one in found] == sorted(one.number for one in found)
    for after in range(len(found)):
        assert log.since(found[after].number) == found[after + 1 :]
    assert log.since(found[2].number, ["b", "old", "a", "b"]) == [
        one for one in found[3:] if one.deployment in "ab"
    ]
    assert log.since(0, []) == []


# -- many who wait ---------------------------------------------------------------------------------


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread, or the feed, wakes it."""

    wakes = 0

    def call_soon_threadsafe(self, *args: object, **options: object) -> asyncio.Handle:
        self.wakes += 1
        return super().call_soon_threadsafe(*args, **options)  # type: ignore[arg-type]


async def all_wait(log: Feed, count: int) -> None:
    while log.waiting() < count:
        await asyncio.sleep(0.001)


def wakes() -> int:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, CountingLoop)
    return loop.wakes


async def follow(log: Feed, names: list[str] | None, ends: int) -> list[Event]:
    """What one hears that asks again and again, until so many deployments are released."""
    heard: list[Event] = []
    while sum(one.state == "released" for one in heard) < ends:
        heard += await log.wait(heard[-1].number if heard else 0, names, 60)
    return heard


def test_a_thousand_wait_and_none_misses_an_event_or_hears_it_twice() -> None:
    log, names = Feed(), [f"d{index}" for index in range(100)]
    wanted = [[name] for name in names for _ in range(8)]
    some: list[list[str] | None] = [
        *wanted,
        *(names[index : index + 3] for index in range(98)),
        *[None] * 102,
    ]

    def add(thread: int) -> None:
        for turn in range(12):
            for name in names[thread::4]:
                log.add(name, turn, "released" if turn == 11 else "placed")

    async def scene() -> list[list[Event]]:
        tasks = [asyncio.create_task(follow(log, one, len(one or names))) for one in some]
        threads = threading.active_count()
        await all_wait(log, 1000)
        assert threading.active_count() <= threads
        with ThreadPoolExecutor(4) as pool:
            adders = [asyncio.wrap_future(pool.submit(add, thread)) for thread in range(4)]
            found = await asyncio.gather(*tasks)
            await asyncio.gather(*adders)
        return found

    found = asyncio.run(scene())
    assert len(some) == 1000
    assert len(log.since(0)) == 1200
    for one, heard in zip(some, found, strict=True):
        assert heard == log.since(0, one)
    assert log.waiting() == 0


def test_many_are_woken_by_one_call_and_only_those_who_wait_for_that_name() -> None:
    log = Feed()

    async def scene() -> None:
        tasks = [asyncio.create_task(log.wait(0, [f"d{index % 10}"], 60)) for index in range(1000)]
        every = [asyncio.create_task(log.wait(0, None, 60)) for _ in range(10)]
        await all_wait(log, 1010)
        before = wakes()
        for _ in range(5):
            log.add("d3", 0, "placed")
            log.add("d4", 0, "placed")
        assert wakes() - before == 1
        await asyncio.gather(*every, *tasks[3::10], *tasks[4::10])
        assert [task.done() for task in tasks] == [index % 10 in (3, 4) for index in range(1000)]
        assert log.waiting() == 800
        log.add("nobody waits for it", 0, "placed")
        assert wakes() - before == 1
        for task in tasks:
            task.cancel()

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(scene())
    assert log.waiting() == 0


def test_who_is_cancelled_costs_nothing_afterwards() -> None:
    log = Feed()

    async def scene() -> None:
        tasks = [asyncio.create_task(log.wait(0, names, 60)) for names in (["d"], ["d", "e"], None)]
        await all_wait(log, 3)
        before = wakes()
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in outcomes] == [asyncio.CancelledError] * 3
        assert log.waiting() == 0
        log.add("d", 0, "placed")
        assert wakes() == before

    with asyncio.Runner(loop_factory=CountingLoop) as runner:
        runner.run(scene())


def test_who_is_cancelled_just_when_it_is_woken_is_cancelled() -> None:
    log = Feed()

    async def scene() -> None:
        task = asyncio.create_task(log.wait(0, ["d"], 60))
        await all_wait(log, 1)
        log.add("d", 0, "placed")
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())


def abandoned(log: Feed, names: list[str] | None) -> None:
    """One waits in a loop that is closed without an end."""
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # that its task is destroyed
    task = loop.create_task(log.wait(0, names, 60))
    loop.run_until_complete(asyncio.sleep(0))
    assert not task.done()
    loop.close()


@pytest.mark.parametrize("names", [["d"], None], ids=str)
def test_a_closed_loop_costs_nothing_afterwards(
    names: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "WATCHERS", 1)
    log = Feed()
    abandoned(log, names)
    assert waited(log, 0.001) == [], "its place is free again"
    abandoned(log, names)
    log.add("d", 0, "placed")
    gc.collect()
    assert log.waiting() == 0
    assert len(waited(log, 60)) == 1


def test_each_of_several_loops_hears_all() -> None:
    log = Feed()

    async def scene() -> list[list[Event]]:
        return await asyncio.gather(*(follow(log, names, 1) for names in (["d"], None) for _ in range(50)))

    with ThreadPoolExecutor(3) as pool:
        loops = [pool.submit(asyncio.run, scene()) for _ in range(3)]
        asyncio.run(all_wait(log, 300))
        for turn in range(20):
            log.add("d", turn, "placed")
        log.add("d", None, "released")
        heard = [one for loop in loops for one in loop.result(60)]
    assert len(heard) == 300
    assert Counter(map(tuple, heard)) == {tuple(log.since(0)): 300}


def test_how_many_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "WATCHERS", 2)
    log = Feed()
    log.add("known", 0, "placed")

    async def scene() -> None:
        first, second = (asyncio.create_task(log.wait(0, ["d"], 60)) for _ in range(2))
        await all_wait(log, 2)
        with pytest.raises(Busy) as busy:
            await log.wait(0, ["d"], 60)
        assert busy.value.args == ("watchers", 2)
        assert len(await log.wait(0, ["known"], 60)) == 1, "what is known already needs no place"
        first.cancel()
        await asyncio.sleep(0)
        third = asyncio.create_task(log.wait(0, ["d"], 60))
        await all_wait(log, 2)
        log.add("d", 0, "placed")
        assert await second == await third == log.since(0, ["d"])

    asyncio.run(scene())
