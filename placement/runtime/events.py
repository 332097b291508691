"""What happened to each deployment, for those who want to know, and those who wait for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

KEPT_PER_DEPLOYMENT = 200
KEPT_DEPLOYMENTS = 2000


@dataclass(frozen=True)
class Happening:
    """One thing that happened.

    Attributes:
        number: later ones have higher numbers, also across restarts of the service.
        at: seconds since 1970.
        replica: its index; ``None`` for the deployment as a whole.
        state: the replica's state from then on; empty once it is no more.
        text: where it is, or why.
    """

    number: int
    at: float
    replica: int | None
    state: str
    text: str

    def to_dict(self) -> dict[str, Any]:
        """The happening as JSON-ready values."""
        return dict(vars(self))


class EventLog:
    """The last happenings of each deployment, in memory: a restart of the service begins anew. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._by_name: dict[str, deque[Happening]] = {}
        self._last = 0

    def add(self, name: str, replica: int | None, state: str, text: str = "") -> None:
        """Notes one and wakes those who wait for it."""
        with self._changed:
            now = time.time()
            self._last = max(self._last + 1, int(now * 1000))
            log = self._by_name.pop(name, None) or deque(maxlen=KEPT_PER_DEPLOYMENT)
            log.append(Happening(self._last, now, replica, str(state), text))
            self._by_name[name] = log  # the one that changed last comes last
            if len(self._by_name) > KEPT_DEPLOYMENTS:
                del self._by_name[next(iter(self._by_name))]
            self._changed.notify_all()

    def known(self, name: str) -> bool:
        """Whether anything is known of a deployment."""
        with self._changed:
            return name in self._by_name

    def since(self, name: str, number: int) -> list[Happening]:
        """Those after ``number``, in order."""
        with self._changed:
            return [one for one in self._by_name.get(name, ()) if one.number > number]

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
