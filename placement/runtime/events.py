"""The feed as the service uses it until it is asynchronous; to be deleted with its last user."""

from __future__ import annotations

import asyncio
import time as time
from collections.abc import Callable

from placement.runtime.feed import KEPT_DEPLOYMENTS as KEPT_DEPLOYMENTS
from placement.runtime.feed import KEPT_PER_DEPLOYMENT as KEPT_PER_DEPLOYMENT
from placement.runtime.feed import Event, Feed


class EventLog:
    """A feed whose waiting costs a thread."""

    def __init__(
        self,
        begin: int = 0,
        set_aside: Callable[[int], None] = lambda end: None,
        stands: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.feed = Feed(begin, set_aside, stands)
        self.add, self.known = self.feed.add, self.feed.known

    def since(self, name: str, number: int) -> list[Event]:
        """Those after ``number``, in order."""
        return self.feed.since(number, [name])

    def wait(self, name: str, number: int, timeout_seconds: float) -> list[Event]:
        """The same, as soon as there is one; none if the time runs out."""
        return asyncio.run(self.feed.wait(number, [name], timeout_seconds))
