"""Exponential backoff: what fails is tried less and less often."""

from __future__ import annotations

import time


class Backoff(dict[str, tuple[float, float]]):
    """What failed -> how many seconds to wait, and until when: twice as long each time. Not thread-safe.

    ``del`` or ``pop`` removes an entry. It stays in after its wait, so that the next failure doubles the wait.

    Args:
        first_seconds: the first wait.
        most_seconds: the longest.
    """

    def __init__(self, first_seconds: float, most_seconds: float) -> None:
        super().__init__()
        self._first, self._most = first_seconds, most_seconds

    def fail(self, key: str) -> None:
        """Records a failure."""
        wait = min(2 * self[key][0], self._most) if key in self else self._first
        self[key] = wait, time.monotonic() + wait

    def waiting(self) -> frozenset[str]:
        """The entries whose wait is not over yet."""
        now = time.monotonic()
        return frozenset(key for key, (_, until) in self.items() if now < until)
