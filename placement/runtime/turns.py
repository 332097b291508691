"""One change of a deployment at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


class Turns:
    """Turns by deployment. Thread-safe; different deployments change at the same time."""

    def __init__(self) -> None:
        self._turns: dict[str, _Turn] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def sole(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Keeps others from changing a deployment.

        Yields:
            Whether the caller has the turn; always with ``wait``.
        """
        with self._lock:
            turn = self._turns.setdefault(name, _Turn())
            turn.users += 1
        mine = turn.lock.acquire(blocking=wait)
        try:
            yield mine
        finally:
            if mine:
                turn.lock.release()
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[name]

    @contextlib.contextmanager
    def sole_all(self, names: Iterable[str], wait: bool = True) -> Iterator[bool]:
        """The same for several deployments, in the order of their names; yields whether the caller has all turns."""
        with contextlib.ExitStack() as stack:
            yield all([stack.enter_context(self.sole(name, wait)) for name in sorted(names)])

    def names(self) -> frozenset[str]:
        """The deployments that are being changed."""
        return frozenset(self._turns.copy())


@dataclass
class _Turn:
    """The holder of a deployment's turn, and how many have it or wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
