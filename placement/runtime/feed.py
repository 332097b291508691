"""The events of each deployment, and the watchers that wait for them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from placement.errors import Busy
from placement.runtime import history, metrics

KEPT_PER_DEPLOYMENT = 200
KEPT_DEPLOYMENTS = 2000
NUMBERS = 10_000_000
"""How many event numbers are reserved at a time; a restarted service goes on after them."""
RETRY_SECONDS = 1.0
"""How long to wait after reserving numbers failed before the next try."""
WATCHERS = 4096
"""How many watchers may wait at once."""

K = TypeVar("K")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        number: later events have higher numbers, also across restarts of the service, and whatever the clock says.
        at: seconds since 1970.
        deployment: its name; empty where events of any may be missing (``gap``).
        replica: its index; ``None`` for the deployment as a whole.
        state: the replica's state from then on; ``released`` once it is no more. Of a deployment as a whole
            ``refused``, ``changed`` (it is declared anew; the text names the fields) or ``restarted`` (the service).
            ``gap`` if events up to this number are not known any more.
        text: where it is, or why.
    """

    number: int
    at: float
    deployment: str
    replica: int | None
    state: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON-ready values; ``time`` is ``at`` as a date, in UTC."""
        when = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds")
        return {**vars(self), "time": when}


def event_of(entry: history.Entry) -> Event:
    """An event, or a gap, of the history."""
    return Event(*(entry[name] for name in ("number", "at", "deployment", "replica", "state", "text")))


@dataclass(eq=False, slots=True)
class _Watcher:
    """One watcher: the future belongs to its event loop, and is used only there."""

    loop: asyncio.AbstractEventLoop
    names: frozenset[str] | None
    woken: asyncio.Future[None]


def _in_a_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="event-numbers", daemon=True).start()


class Feed:
    """The last events of each deployment, in memory; all of them, and decisions, are handed on to the history.

    At least the last event of an existing deployment is kept, however many others there are. Every method may be
    called from any thread, and from any event loop; none blocks on more than a short lock.

    Args:
        begin: all numbers used so far are below this one.
        set_aside: records, for a later feed, where the reserved numbers of this one end. Called once before the
            feed exists, and later with no lock held.
        stands: whether a deployment stands. Called under the feed's lock: it must take none, nor wait.
        run: has the later calls of ``set_aside`` done, in a thread of their own.
        keep: is given every entry for the history, in order. Called under the feed's lock, too.
    """

    def __init__(
        self,
        begin: int = 0,
        set_aside: Callable[[int], None] = lambda end: None,
        stands: Callable[[str], bool] = lambda name: False,
        run: Callable[[Callable[[], None]], object] = _in_a_thread,
        keep: Callable[[history.Entry], None] = lambda entry: None,
    ) -> None:
        # Reentrant: the garbage collector may close the coroutine of a watcher while its thread is in here.
        self._lock = threading.RLock()
        # Both in the order of their last events; all of the second come before those of the first.
        self._by_name: dict[str, deque[Event]] = {}
        self._lasts: dict[str, Event] = {}
        self._set_aside, self._stands, self._run, self._keep = set_aside, stands, run, keep
        self._last = max(begin, int(time.time() * 1000)) - 1
        self._forgotten = self._last
        self._end = self._last + NUMBERS
        self._is_setting_aside = False
        self._not_before = 0.0
        set_aside(self._end)
        self._watchers: dict[asyncio.AbstractEventLoop, set[_Watcher]] = {}
        self._by_watched: dict[str | None, set[_Watcher]] = {}
        self._to_wake: dict[asyncio.AbstractEventLoop, list[_Watcher]] = {}

    # -- events ------------------------------------------------------------------------------------

    def add(self, name: str, replica: int | None, state: str, text: str = "") -> None:
        """Adds an event and wakes the watchers that wait for it."""
        with self._lock:
            now = time.time()
            event = Event(self._next_number(now), now, name, replica, str(state), text)
            self._remember(event)
            self._keep(history.entry(event.number, now, "event", name, event.state, text, replica=replica))
            self._wake(name)
            need_more = self._needs_more()
        metrics.noted(name, replica, str(state))
        if need_more:
            try:
                self._run(self._set_more_aside)
            except RuntimeError:  # no thread could be started
                logger.exception("the numbers of events could not be reserved in the ledger")
                self._set_aside_later()

    def note(self, kind: str, name: str, state: str, text: str, **more: Any) -> None:
        """Has an entry be kept in the history that is no event; see :func:`placement.runtime.history.entry`."""
        with self._lock:
            now = time.time()
            self._keep(history.entry(self._next_number(now), now, kind, name, state, text, **more))

    def recall(self, events: Iterable[Event], before: int) -> None:
        """Takes up what the history has of the time before; up to ``before`` it may lack events."""
        with self._lock:
            self._forgotten = before
            for event in events:
                self._remember(event)

    def may_lack(self, number: int, names: Collection[str] | None = None) -> bool:
        """Whether events after ``number``, of which the caller has some before, may be forgotten by now."""
        with self._lock:
            if not 0 < number < self._forgotten:
                return False
            return names is None or not all(
                (log := self._log(name)) and log[0].number <= number for name in names
            )

    def since(self, number: int, names: Collection[str] | None = None) -> list[Event]:
        """The events after ``number``, in order: of these deployments, or of all."""
        with self._lock:
            return self._since(number, names)

    @property
    def last_number(self) -> int:
        """The number of the last event."""
        return self._last

    def known(self, name: str) -> bool:
        """Whether anything is known of a deployment."""
        with self._lock:
            return name in self._by_name or name in self._lasts

    def _remember(self, event: Event) -> None:
        name = event.deployment
        log = self._by_name.pop(name, None) or deque(self._kept_last(name), maxlen=KEPT_PER_DEPLOYMENT)
        self._lasts.pop(name, None)
        if len(log) == KEPT_PER_DEPLOYMENT:
            self._forgotten = max(self._forgotten, log[0].number)
        log.append(event)
        self._by_name[name] = log  # the one that changed last comes last
        if len(self._by_name) > KEPT_DEPLOYMENTS:
            oldest = next(iter(self._by_name))
            last = self._by_name.pop(oldest)[-1]
            self._forgotten = max(self._forgotten, last.number)
            if self._stands(oldest):
                self._lasts[oldest] = last

    def _since(self, number: int, names: Collection[str] | None) -> list[Event]:
        found: list[Event] = []
        for log in self._newest_first() if names is None else map(self._log, set(names)):
            before = len(found)
            for event in reversed(log):
                if event.number <= number:
                    break
                found.append(event)
            if names is None and len(found) == before:
                break  # all further deployments changed earlier
        found.sort(key=lambda event: event.number)
        return found

    def _log(self, name: str) -> deque[Event] | list[Event]:
        return self._by_name.get(name) or self._kept_last(name)

    def _kept_last(self, name: str) -> list[Event]:
        return [self._lasts[name]] if name in self._lasts else []

    def _newest_first(self) -> Iterable[deque[Event] | list[Event]]:
        yield from reversed(self._by_name.values())
        for event in reversed(self._lasts.values()):
            yield [event]

    # -- numbers -----------------------------------------------------------------------------------

    def _next_number(self, now: float) -> int:
        """Follows the clock, within the reserved numbers, so that numbers rise even if the ledger is lost."""
        following, clock = self._last + 1, int(now * 1000)
        self._last = clock if following < clock < self._end else following
        return self._last

    def _needs_more(self) -> bool:
        """Whether the caller must reserve more numbers now."""
        if self._is_setting_aside or time.monotonic() < self._not_before:
            return False
        self._is_setting_aside = max(self._last, int(time.time() * 1000)) >= self._end - NUMBERS // 2
        return self._is_setting_aside

    def _set_more_aside(self) -> None:
        with self._lock:
            end = max(self._last, int(time.time() * 1000)) + NUMBERS
        try:
            self._set_aside(end)
        except Exception:  # tried again with a later event
            logger.exception("the numbers of events could not be reserved in the ledger")
            self._set_aside_later()
        else:
            with self._lock:
                self._end, self._is_setting_aside = max(self._end, end), False

    def _set_aside_later(self) -> None:
        with self._lock:
            self._not_before, self._is_setting_aside = time.monotonic() + RETRY_SECONDS, False

    # -- those who wait ----------------------------------------------------------------------------

    async def wait(
        self, number: int, names: Collection[str] | None = None, timeout_seconds: float = 30.0
    ) -> list[Event]:
        """The events after ``number``, in order, as soon as there is one; none if the time runs out. Costs no thread.

        Args:
            number: the number of the last event already known.
            names: only of these deployments, which need not exist yet; of all if ``None``.
            timeout_seconds: the longest wait.

        Raises:
            Busy: 4,096 wait already.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_seconds
        wanted = None if names is None else frozenset(names)
        while True:
            with self._lock:
                found = self._since(number, wanted)
                if found or not loop.time() < end:
                    return found
                watcher = self._enter(loop, wanted)
            # Not asyncio.wait_for: before Python 3.12 that may swallow a cancellation.
            timer = loop.call_at(end, _finish, watcher.woken)
            try:
                await watcher.woken
            finally:
                timer.cancel()
                with self._lock:
                    self._leave(watcher)

    def waiting(self) -> int:
        """How many wait."""
        with self._lock:
            return sum(map(len, self._watchers.values()))

    def _enter(self, loop: asyncio.AbstractEventLoop, names: frozenset[str] | None) -> _Watcher:
        for closed in [one for one in self._watchers if one.is_closed()]:
            self._forget(closed)
        if sum(map(len, self._watchers.values())) >= WATCHERS:
            raise Busy("watchers", WATCHERS)
        watcher = _Watcher(loop, names, loop.create_future())
        self._watchers.setdefault(loop, set()).add(watcher)
        for name in _keys(watcher):
            self._by_watched.setdefault(name, set()).add(watcher)
        return watcher

    def _leave(self, watcher: _Watcher) -> None:
        _discard(self._watchers, watcher.loop, watcher)
        for name in _keys(watcher):
            _discard(self._by_watched, name, watcher)

    def _wake(self, name: str) -> None:
        """Wakes the watchers of this name: with a single call into each event loop, however many they are."""
        for key in (name, None):
            for watcher in list(self._by_watched.get(key, ())):
                self._leave(watcher)
                batch = self._to_wake.setdefault(watcher.loop, [])
                batch.append(watcher)
                if len(batch) > 1:
                    continue
                try:
                    watcher.loop.call_soon_threadsafe(self._finish_batch, watcher.loop)
                except RuntimeError:  # the loop is closed
                    self._forget(watcher.loop)

    def _finish_batch(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            batch = self._to_wake.pop(loop, [])
        for watcher in batch:
            _finish(watcher.woken)

    def _forget(self, loop: asyncio.AbstractEventLoop) -> None:
        for watcher in list(self._watchers.get(loop, ())):
            self._leave(watcher)
        self._to_wake.pop(loop, None)


def _finish(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


def _keys(watcher: _Watcher) -> Collection[str | None]:
    return (None,) if watcher.names is None else watcher.names


def _discard(index: dict[K, set[_Watcher]], key: K, watcher: _Watcher) -> None:
    watchers = index.get(key)
    if watchers is not None:
        watchers.discard(watcher)
        if not watchers:
            del index[key]
