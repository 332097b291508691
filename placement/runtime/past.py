"""What the service tells of the past: events, the history, its log."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from placement.runtime import history, log, ray_internals
from placement.runtime.controller import Controller
from placement.runtime.feed import Event

T = TypeVar("T")

READERS = 16
"""How many threads read, at most."""
WATCH_SECONDS = 60.0
"""The longest that one watcher waits: one that has died is not noticed before."""
MOST_LINES = 10_000


class Past:
    """The calls of the service that tell of the past; part of :class:`~placement.runtime.service.\
DeploymentPlacementActor`.

    Args:
        controller: what changes deployments.
    """

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._reads = ThreadPoolExecutor(READERS, "read")

    async def events(self, name: str | None = None, since: int = 0) -> list[dict[str, Any]]:
        """What happened to a deployment's replicas, the last 200 at most; JSON-ready.

        Of one that stands there is one at least. Of those that are gone, the 2,000 that changed last are known, also
        after a restart of the service if that was lately.

        Args:
            name: the deployment, or a group, for its members, which may be gone by now; all, if it is left out.
            since: the ``number`` of the last one already known.

        Raises:
            UnknownDeployment: nothing is known of that name.
        """
        return [one.to_dict() for one in self._controller.queries.events(name, since)]

    async def watch(
        self,
        since: int | str = 0,
        names: list[str] | int | None = None,
        timeout_seconds: float = 30.0,
    ) -> list[dict[str, Any]]:
        """The same, as soon as something has happened; empty if nothing did within the time.

        ``watch(seen, ["llama"])``, where ``seen`` is the ``number`` of the last one known, waits for the next change;
        with ``seen = 0`` all that is known comes at once. The names need not be known yet; that of a group stands for
        its members, once it has been declared. Without any, all are meant. What memory has no more comes from the
        history, also after a restart of the service; if that does not have it either, the first event is a ``gap``.

        Raises:
            Busy: too many watch already.
        """
        if isinstance(since, str):
            warnings.warn("watch(name, since) is now watch(since, [name])", DeprecationWarning, stacklevel=2)
            named, since = since, names if isinstance(names, int) else 0
            names = [named]
        assert not isinstance(names, int)
        meant = None if names is None else self._controller.queries.with_members(names)
        found: list[Event] = []
        if self._controller.feed.may_lack(since, meant):
            found = await self._in(self._reads, self._controller.queries.kept_events, since, meant)
        if not found:
            found = await self._controller.feed.wait(since, meant, min(timeout_seconds, WATCH_SECONDS))
        return [one.to_dict() for one in found]

    async def history(
        self, since: int = 0, names: Sequence[str] | None = None, earliest: float = 0.0
    ) -> dict[str, Any]:
        """Events and decisions of the last days, a page at a time; JSON-ready. docs/events.md says what they have.

        Args:
            since: the ``number`` of the last entry already known; for the next page the ``last`` of the one before.
            names: only those about these deployments, and the members of these groups.
            earliest: only those of this time or later, in seconds since 1970.

        Returns:
            ``entries``, oldest first; ``last``; whether there are ``more``; how many entries were ``skipped``, since a
            later version wrote them.
        """
        meant = None if names is None else self._controller.queries.with_members(names)
        page = await self._in(self._reads, self._controller.history.read, since, meant, earliest)
        return {**vars(page), "entries": [history.told(one) for one in page.entries]}

    async def log(self, lines: int = 100, cursor: str = "") -> dict[str, Any]:
        """The service's log.

        Args:
            lines: how many of the last lines, if there is no cursor; 10,000 at most.
            cursor: that of the answer before, for the lines that follow.

        Returns:
            ``lines``, and a ``cursor``.
        """
        return await self._in(
            self._reads, log.read, ray_internals.logs_folder(), min(lines, MOST_LINES), cursor
        )

    async def _in(self, pool: ThreadPoolExecutor, do: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, do, *args)
