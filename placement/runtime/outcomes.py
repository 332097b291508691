"""Waiting without a thread: for the outcome of an identical call, and for a turn."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from placement.errors import Busy

T = TypeVar("T")


class Bound:
    """Limits how many calls of a kind are under way at once, in one event loop.

    Args:
        what: the calls, in words.
        limit: the most of them.
    """

    def __init__(self, what: str, limit: int) -> None:
        self._what, self.limit = what, limit
        self._count = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """A block that counts as one call under way.

        Raises:
            Busy: the limit is reached.
        """
        if self._count >= self.limit:
            raise Busy(self._what, self.limit)
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1


@dataclass(eq=False, slots=True)
class _Running:
    """A call that has no outcome yet, and how many wait for it.

    Attributes:
        outcome: Any, as each key's outcome has a type of its own.
    """

    abandoned: Callable[[], object] | None
    outcome: Future[Any] = field(default_factory=Future)
    waiting: int = 0


class Outcomes:
    """Lets identical calls share one outcome. Works with several event loops; nothing is kept after the outcome."""

    def __init__(self) -> None:
        # Reentrant, as in :class:`Queues`.
        self._lock = threading.RLock()
        self._running: dict[Hashable, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def share(
        self,
        key: Hashable,
        start: Callable[[], Awaitable[T]],
        abandoned: Callable[[], object] | None = None,
    ) -> T:
        """The outcome of ``start``; or, if a call with an equal key is under way, the outcome of that call.

        A started call goes on to its end, in the event loop of its first caller, even if all its callers are
        cancelled: then ``abandoned`` is called, which may end it soon.

        Args:
            key: calls with equal keys must be the same call.
            start: begins the call.
            abandoned: called when all callers were cancelled; a later caller starts the call again.

        Raises:
            RuntimeError: the call was cancelled before it had an outcome, as its event loop ended.
        """
        with self._lock:
            running = self._running.get(key)
            if running is None:
                running = self._running[key] = _Running(abandoned)
                running.outcome.set_running_or_notify_cancel()  # a cancelled caller must not cancel it
                task = asyncio.get_running_loop().create_task(self._carry_out(key, running, start))
                self._tasks.add(task)  # an event loop keeps only weak references
                task.add_done_callback(self._drop)
            running.waiting += 1
        try:
            outcome: T = await asyncio.wrap_future(running.outcome)
            return outcome
        finally:
            self._leave(key, running)

    def running(self) -> int:
        """How many calls have no outcome yet."""
        with self._lock:
            return len(self._running)

    async def _carry_out(self, key: Hashable, running: _Running, start: Callable[[], Awaitable[T]]) -> None:
        try:
            result = await start()
        except asyncio.CancelledError:
            self._end(key, running)
            running.outcome.set_exception(RuntimeError("the call that this one shares was cancelled"))
            raise
        except BaseException as error:
            self._end(key, running)
            running.outcome.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._end(key, running)
            running.outcome.set_result(result)

    def _leave(self, key: Hashable, running: _Running) -> None:
        with self._lock:
            running.waiting -= 1
            if running.waiting or running.outcome.done() or running.abandoned is None:
                return
            self._forget(key, running)
        running.abandoned()

    def _end(self, key: Hashable, running: _Running) -> None:
        with self._lock:
            self._forget(key, running)

    def _forget(self, key: Hashable, running: _Running) -> None:
        if self._running.get(key) is running:
            del self._running[key]

    def _drop(self, task: asyncio.Task[None]) -> None:
        with self._lock:
            self._tasks.discard(task)


@dataclass(eq=False, slots=True)
class _Place:
    """A place in a queue; ``begin`` signals, from any thread, that it is the first, or raises RuntimeError."""

    begin: Callable[[], object]


class Queues:
    """One caller at a time by name, first come, first served; the callers may be in several event loops.

    A name is forgotten once nobody has its turn or waits for it.
    """

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close the coroutine of a waiting caller while its thread is in here.
        self._lock = threading.RLock()
        self._by_name: dict[str, deque[_Place]] = {}

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        """A block in which only the caller has this name. Waiting costs no thread."""
        loop = asyncio.get_running_loop()
        begun = loop.create_future()
        place = _Place(lambda: loop.call_soon_threadsafe(_finish, begun))
        try:
            if not self._enter(name, place):
                await begun
            yield
        finally:
            self._leave(name, place)

    def names(self) -> list[str]:
        """The names whose turn somebody has or waits for."""
        with self._lock:
            return list(self._by_name)

    def _enter(self, name: str, place: _Place) -> bool:
        """Joins the queue; returns whether it is the caller's turn at once."""
        with self._lock:
            queue = self._by_name.setdefault(name, deque())
            queue.append(place)
            return len(queue) == 1

    def _leave(self, name: str, place: _Place) -> None:
        """Gives up the turn, or the place in the queue; does nothing if there is none."""
        with self._lock:
            queue = self._by_name.get(name, deque())
            had_turn = bool(queue) and queue[0] is place
            if place not in queue:
                return
            queue.remove(place)
            while had_turn and queue:
                try:
                    queue[0].begin()
                    return
                except RuntimeError:  # its event loop is closed: it will never go on
                    queue.popleft()
            if not queue:
                del self._by_name[name]


def _finish(begun: asyncio.Future[None]) -> None:
    if not begun.done():
        begun.set_result(None)
