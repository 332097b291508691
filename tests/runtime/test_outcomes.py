"""Identical calls that share an outcome, and turns that are waited for."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from placement.errors import Busy, UnknownDeployment
from placement.runtime.outcomes import Bound, Outcomes, Queues


class Call:
    """A call that others share; it ends when it is let."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.count, self.ended = error, 0, False
        self.may_end = asyncio.Event()

    async def start(self) -> int:
        self.count += 1
        await self.may_end.wait()
        self.ended = True
        if self.error is not None:
            raise self.error
        return self.count


async def turns(count: int = 3) -> None:
    """Lets the loop come to everything that is ready."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_identical_calls_meanwhile_share_one_outcome_and_later_ones_begin_anew() -> None:
    async def scene() -> None:
        shared, call, other = Outcomes(), Call(), Call()
        threads = threading.active_count()
        tasks = [asyncio.create_task(shared.share(("d", 1), call.start)) for _ in range(1000)]
        apart = asyncio.create_task(shared.share(("d", 2), other.start))
        await turns()
        assert (call.count, other.count, shared.running()) == (1, 1, 2)
        assert threading.active_count() <= threads
        call.may_end.set()
        assert await asyncio.gather(*tasks) == [1] * 1000
        assert (shared.running(), apart.done()) == (1, False)
        assert await shared.share(("d", 1), call.start) == 2
        other.may_end.set()
        await apart
        assert shared.running() == 0

    asyncio.run(scene())


def test_an_error_is_everybody_s_and_is_not_kept() -> None:
    async def scene() -> None:
        shared, call = Outcomes(), Call(UnknownDeployment("d", ()))
        tasks = [asyncio.create_task(shared.share("key", call.start)) for _ in range(3)]
        await turns()
        call.may_end.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) for one in found] == [UnknownDeployment] * 3
        assert shared.running() == 0
        call.error = None
        assert await shared.share("key", call.start) == 2

    asyncio.run(scene())


@pytest.mark.parametrize("cancelled", [[0], [1], [0, 1, 2]], ids=["the first", "another", "all"])
def test_who_is_cancelled_does_not_cancel_the_call(cancelled: list[int]) -> None:
    async def scene() -> None:
        shared, call = Outcomes(), Call()
        tasks = [asyncio.create_task(shared.share("key", call.start)) for _ in range(3)]
        await turns()
        for index in cancelled:
            tasks[index].cancel()
        await turns()
        assert [task.cancelled() for task in tasks] == [index in cancelled for index in range(3)]
        late = asyncio.create_task(shared.share("key", call.start))
        await turns()
        call.may_end.set()
        assert await late == 1
        assert [await task for index, task in enumerate(tasks) if index not in cancelled] == [1] * (
            3 - len(cancelled)
        )
        assert (call.ended, call.count, shared.running()) == (True, 1, 0)

    asyncio.run(scene())


def test_a_call_whose_loop_ends_is_an_error_to_those_of_other_loops() -> None:
    shared, started = Outcomes(), threading.Event()

    async def first() -> None:
        async def endless() -> None:
            started.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(shared.share("key", endless))
        while not waits.is_set():
            await asyncio.sleep(0.001)
        task.cancel()

    async def other() -> None:
        task = asyncio.create_task(shared.share("key", Call().start))
        await turns()
        waits.set()
        with pytest.raises(RuntimeError, match="was cancelled"):
            await task

    waits = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        loop = pool.submit(asyncio.run, first())
        assert started.wait(10)
        asyncio.run(other())
        loop.result(10)
    assert shared.running() == 0


def test_calls_of_several_loops_share_an_outcome() -> None:
    shared, all_here, begun = Outcomes(), threading.Barrier(4), []

    async def call() -> object:
        begun.append(object())
        while here < 4:
            await asyncio.sleep(0.001)
        return begun[0]

    here = 0

    async def scene() -> object:
        nonlocal here
        all_here.wait(10)
        task = asyncio.create_task(shared.share("key", call))
        await turns()
        here += 1
        return await task

    with ThreadPoolExecutor(4) as pool:
        found = [one.result(10) for one in [pool.submit(asyncio.run, scene()) for _ in range(4)]]
    assert found == begun * 4


# -- turns -----------------------------------------------------------------------------------------


def test_turns_come_in_order_one_at_a_time_and_names_do_not_wait_for_each_other() -> None:
    async def scene() -> None:
        queues, order, inside = Queues(), list[int](), 0

        async def change(index: int) -> None:
            nonlocal inside
            async with queues.turn("d"):
                inside += 1
                assert inside == 1
                await asyncio.sleep(0)
                order.append(index)
                inside -= 1

        threads = threading.active_count()
        async with queues.turn("d"):
            tasks = [asyncio.create_task(change(index)) for index in range(1000)]
            await turns()
            assert order == [] and threading.active_count() <= threads
            async with queues.turn("other"):
                assert sorted(queues.names()) == ["d", "other"]
        await asyncio.gather(*tasks)
        assert order == list(range(1000))
        assert queues.names() == []

    asyncio.run(scene())


def test_an_error_within_a_turn_ends_it() -> None:
    async def scene() -> None:
        queues = Queues()
        for _ in range(2):
            with pytest.raises(ValueError, match="within"):
                async with queues.turn("d"):
                    raise ValueError("within")
        assert queues.names() == []

    asyncio.run(scene())


@pytest.mark.parametrize("when", ["it waits", "its turn has just come"])
def test_who_is_cancelled_gives_its_place_to_the_next(when: str) -> None:
    async def scene() -> None:
        queues, order = Queues(), list[str]()

        async def change(who: str) -> None:
            async with queues.turn("d"):
                order.append(who)

        async with queues.turn("d"):
            tasks = [asyncio.create_task(change(who)) for who in "abc"]
            await turns()
            if when == "it waits":
                tasks[0].cancel()
                await turns()
        if when != "it waits":
            await asyncio.sleep(0)
            tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (tasks[0].cancelled(), order, queues.names()) == (True, ["b", "c"], [])

    asyncio.run(scene())


def test_how_many_calls_are_under_way_is_bounded() -> None:
    bound = Bound("calls", 2)
    with bound.one_more():
        with bound.one_more(), pytest.raises(Busy) as busy, bound.one_more():
            pass
        assert busy.value.args == ("calls", 2)
        with pytest.raises(UnknownDeployment), bound.one_more():
            raise UnknownDeployment("a", ())
        with bound.one_more():
            pass


def test_several_loops_take_turns() -> None:
    queues, inside, most, done = Queues(), 0, 0, list[int]()

    def work() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        done.append(inside)
        inside -= 1

    async def scene() -> None:
        async def change() -> None:
            async with queues.turn("d"):
                work()
                await asyncio.sleep(0)

        await asyncio.gather(*(change() for _ in range(100)))

    with ThreadPoolExecutor(6) as pool:
        for one in [pool.submit(asyncio.run, scene()) for _ in range(6)]:
            one.result(60)
    assert (len(done), most, queues.names()) == (600, 1, [])


def test_who_waits_in_a_loop_that_is_closed_is_passed_over() -> None:
    queues, order = Queues(), list[str]()

    async def change(who: str) -> None:
        async with queues.turn("d"):
            order.append(who)

    async def scene() -> None:
        async with queues.turn("d"):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(abandon).result(10)
                other = pool.submit(asyncio.run, asyncio.wait_for(change("other"), 0.05))
                with suppress(TimeoutError):
                    other.result(10)
            assert order == []

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: None)  # that its task is destroyed
        task = loop.create_task(change("abandoned"))
        loop.run_until_complete(asyncio.sleep(0))
        assert not task.done()
        loop.close()

    asyncio.run(scene())
    asyncio.run(change("next"))
    assert (order, queues.names()) == (["next"], [])


def test_a_call_that_nobody_waits_for_any_more_hears_of_it_and_the_next_one_begins_anew() -> None:
    async def scene() -> None:
        shared, call, heard = Outcomes(), Call(), []
        tasks = [
            asyncio.create_task(shared.share("key", call.start, lambda: heard.append("first")))
            for _ in range(2)
        ]
        await turns()
        tasks[0].cancel()
        await turns()
        assert (heard, shared.running()) == ([], 1)
        tasks[1].cancel()
        await turns()
        assert (heard, shared.running(), call.ended) == (["first"], 0, False)
        again = asyncio.create_task(shared.share("key", call.start, lambda: heard.append("second")))
        await turns()
        assert call.count == 2
        call.may_end.set()
        assert await again == 2
        assert call.ended
        assert heard == ["first"], "who has got an outcome has not abandoned it"
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)

    asyncio.run(scene())
