"""Calls that wait for room, beside the declarations that do: each is tried in its turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from placement.errors import ReservationFailed, Unplaceable
from placement.wire.deployment import Deployment

T = TypeVar("T")


class Ticket(Generic[T]):
    """One call that waits.

    Args:
        wanted: the deployment that it is about.
        do: what it waits to do; raises ``Unplaceable`` or ``ReservationFailed`` while there is no room.

    Attributes:
        since: when it came, in seconds since 1970.
        outcome: what it came to, once it is over.
    """

    def __init__(self, wanted: Deployment, do: Callable[[], T]) -> None:
        self.wanted, self.name, self.since = wanted, wanted.name, time.time()
        self.outcome: Future[T] = Future()
        self._do = do
        self._lock = threading.Lock()
        self._refusal: Exception | None = None

    def attempt(self) -> T:
        """Does it, if there is room.

        Raises:
            Unplaceable, ReservationFailed: there is none. Any other error ends it.
        """
        with self._lock:
            if self.outcome.done():
                return self.outcome.result()
            try:
                result = self._do()
            except (Unplaceable, ReservationFailed) as refusal:
                self._refusal = refusal
                raise
            except BaseException as error:
                self.outcome.set_exception(error)
                raise
            self.outcome.set_result(result)
            return result

    def result(self) -> T:
        """What it came to; why there was no room, if it is still waiting. It is not tried any more then."""
        with self._lock:
            if not self.outcome.done():
                self.outcome.set_exception(self._refusal or TimeoutError())
        return self.outcome.result()


class Tickets:
    """All calls that wait. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, Ticket[object]] = {}

    def add(self, ticket: Ticket[T]) -> None:
        """From here on it is tried in its turn."""
        with self._lock:
            self._waiting[id(ticket)] = ticket  # type: ignore[assignment]

    def remove(self, ticket: Ticket[T]) -> None:
        """It is not tried any more."""
        with self._lock:
            self._waiting.pop(id(ticket), None)

    def all(self) -> list[Ticket[object]]:
        """Those that wait, the oldest first."""
        with self._lock:
            return sorted(self._waiting.values(), key=lambda ticket: ticket.since)
