"""What happened to each deployment, for those who want to know, and those who wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

KEPT_PER_DEPLOYMENT = 200
KEPT_DEPLOYMENTS = 2000
NUMBERS = 10_000_000
"""So many numbers are set aside at a time; a service that starts anew goes on after them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Happening:
    """One thing that happened.

    Attributes:
        number: later ones have higher numbers, also across restarts of the service, and whatever the clock says.
        at: seconds since 1970.
        replica: its index; ``None`` for the deployment as a whole.
        state: the replica's state from then on; ``released`` once it is no more. Of a deployment as a whole
            ``refused``, ``changed`` (it is declared anew; the text names the fields) or ``restarted`` (the service).
        text: where it is, or why.
    """

    number: int
    at: float
    replica: int | None
    state: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """The happening as JSON-ready values; ``time`` is ``at`` in words, in UTC."""
        when = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds")
        return {**vars(self), "time": when}


class EventLog:
    """The last happenings of each deployment, in memory: a restart of the service begins anew. Thread-safe.

    Of a deployment that stands at least the last one is kept, however many others there are.

    Args:
        begin: no number below was given out by now.
        set_aside: keeps, for a later log, where the numbers that this one may give out end.
        stands: whether a deployment stands.
    """

    def __init__(
        self,
        begin: int = 0,
        set_aside: Callable[[int], None] = lambda end: None,
        stands: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self._changed = threading.Condition()
        self._by_name: dict[str, deque[Happening]] = {}
        self._lasts: dict[str, Happening] = {}
        self._set_aside, self._stands = set_aside, stands
        self._last = self._end = max(begin, int(time.time() * 1000)) - 1
        self._set_more_aside()

    def add(self, name: str, replica: int | None, state: str, text: str = "") -> None:
        """Notes one and wakes those who wait for it."""
        with self._changed:
            log = self._by_name.pop(name, None) or deque(self._rest(name), maxlen=KEPT_PER_DEPLOYMENT)
            self._lasts.pop(name, None)
            now = time.time()
            self._last = max(self._last + 1, int(now * 1000))
            if self._last >= self._end:
                try:
                    self._set_more_aside()
                except Exception:  # tried again with the next one
                    logger.exception("how far the numbers of events go could not be noted")
            log.append(Happening(self._last, now, replica, str(state), text))
            self._by_name[name] = log  # the one that changed last comes last
            if len(self._by_name) > KEPT_DEPLOYMENTS:
                oldest = next(iter(self._by_name))
                last = self._by_name.pop(oldest)[-1]
                if self._stands(oldest):
                    self._lasts[oldest] = last
            self._changed.notify_all()

    def _set_more_aside(self) -> None:
        end = self._last + NUMBERS
        self._set_aside(end)
        self._end = end

    def _rest(self, name: str) -> list[Happening]:
        return [self._lasts[name]] if name in self._lasts else []

    def known(self, name: str) -> bool:
        """Whether anything is known of a deployment."""
        with self._changed:
            return name in self._by_name or name in self._lasts

    def since(self, name: str, number: int) -> list[Happening]:
        """Those after ``number``, in order."""
        with self._changed:
            return [one for one in self._by_name.get(name, self._rest(name)) if one.number > number]

    def wait(self, name: str, number: int, timeout_seconds: float) -> list[Happening]:
        """The same, as soon as there is one; none if the time runs out."""
        end = time.monotonic() + timeout_seconds
        with self._changed:
            while True:
                found = self.since(name, number)
                left = end - time.monotonic()
                if found or left <= 0:
                    return found
                self._changed.wait(left)
