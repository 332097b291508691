"""The typed client for ``async`` code: the methods of :class:`~placement.runtime.client.Client`, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from placement.core.snapshot import NEAR_LABELS
from placement.runtime.borrowing import AsyncBorrower
from placement.runtime.client_base import (
    FOLLOW_SECONDS,
    WATCH_SECONDS,
    Connected,
    Constraints,
    DeploymentLike,
    Entry,
    Event,
    Status,
    Waiting,
    heard_of,
    is_lease,
)
from placement.runtime.connection import answer, answer_or_abandon, caller
from placement.runtime.results import PlacementResult
from placement.runtime.settings import HISTORY_DAYS, HISTORY_MIB, IDLE_SECONDS
from placement.wire.plans import PlacementPlan


class AsyncClient(Connected):
    """The placement service of the connected cluster, for ``async`` code: nothing blocks the event loop.

    Args:
        service: the service's actor handle; the running service if left out.

    Raises:
        Same as :class:`Client`.
    """

    def __init__(self, service: ActorHandle | None = None) -> None:
        super().__init__(service)
        self._borrower = AsyncBorrower(self._handle)

    @classmethod
    async def start(
        cls,
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
        node_types: str | Path | None = None,
        history_days: float = HISTORY_DAYS,
        history_mib: float = HISTORY_MIB,
    ) -> AsyncClient:
        """The same, with the service started if need be; see :func:`placement.start`."""
        from placement.runtime import bootstrap  # all of the service, which its other clients need not import

        return cls(
            await asyncio.to_thread(
                bootstrap.start, near, idle_seconds, node_types, history_days, history_mib
            )
        )

    async def place(
        self,
        deployment: DeploymentLike,
        constraints: Constraints = None,
        wait_seconds: float = 0.0,
        *,
        owner: ActorHandle | None = None,
    ) -> PlacementResult:
        """See :meth:`Client.place`. Cancelling it while it waits for room gives up the request."""
        who = caller(owner)
        if is_lease(deployment, owner):
            return await self._borrower.borrow(deployment, constraints, wait_seconds, who)
        place = self._handle.place
        return await answer_or_abandon(place.remote(deployment, constraints, wait_seconds, caller=who))

    async def apply(
        self,
        deployment: DeploymentLike,
        constraints: Constraints = None,
        *,
        atomic: bool = False,
        owner: ActorHandle | None = None,
    ) -> PlacementResult:
        """See :meth:`Client.apply`."""
        who = caller(owner)
        if is_lease(deployment, owner):
            return await self._borrower.borrow(deployment, constraints, 0.0, who)
        return await answer(self._handle.apply.remote(deployment, constraints, atomic, caller=who))

    async def apply_all(
        self, deployments: Sequence[DeploymentLike], *, atomic: bool = False
    ) -> list[PlacementResult]:
        """See :meth:`Client.apply_all`."""
        return await answer(self._handle.apply_all.remote(deployments, atomic, caller=caller()))

    async def plan(
        self, deployment: DeploymentLike, constraints: Constraints = None, *, atomic: bool = False
    ) -> PlacementPlan:
        """See :meth:`Client.plan`."""
        return await answer(self._handle.plan.remote(deployment, constraints, atomic))

    async def plan_all(
        self, deployments: Sequence[DeploymentLike], *, atomic: bool = False
    ) -> list[PlacementPlan]:
        """See :meth:`Client.plan_all`."""
        return await answer(self._handle.plan_all.remote(deployments, atomic))

    async def get(self, name: str) -> PlacementResult:
        """See :meth:`Client.get`."""
        return await answer(self._handle.get.remote(name))

    async def describe(self, name: str) -> dict[str, Any]:
        """See :meth:`Client.describe`."""
        return await answer(self._handle.describe.remote(name))

    async def members(self, name: str) -> list[str]:
        """See :meth:`Client.members`."""
        return await answer(self._handle.members.remote(name))

    async def wait(self, name: str, timeout_seconds: float | None = None) -> PlacementResult:
        """See :meth:`Client.wait`."""
        waiting = Waiting(timeout_seconds)
        while True:
            result = await answer_or_abandon(self._handle.wait.remote(name, waiting.next_seconds()))
            if waiting.is_over():
                return result

    async def renew(self, name: str) -> float | None:
        """See :meth:`Client.renew`."""
        return await answer(self._handle.renew.remote(name))

    async def release(self, name: str) -> int:
        """See :meth:`Client.release`."""
        return await answer(self._handle.release.remote(name, caller=caller()))

    async def release_all(self) -> list[str]:
        """See :meth:`Client.release_all`."""
        return await answer(self._handle.release_all.remote(caller=caller()))

    async def status(
        self, node: str | None = None, deployment: str | None = None, state: str | None = None
    ) -> Status:
        """See :meth:`Client.status`."""
        return await answer(self._handle.status.remote(node, deployment, state))

    async def events(self, name: str | None = None, since: int = 0) -> list[Event]:
        """See :meth:`Client.events`."""
        return await answer(self._handle.events.remote(name, since))

    async def watch(
        self, since: int = 0, names: Sequence[str] | None = None, timeout_seconds: float = WATCH_SECONDS
    ) -> list[Event]:
        """See :meth:`Client.watch`."""
        watch = self._handle.watch
        return await answer_or_abandon(
            watch.remote(since=since, names=names, timeout_seconds=timeout_seconds)
        )

    async def follow(self, names: Sequence[str] | None = None, since: int = 0) -> AsyncIterator[Event]:
        """See :meth:`Client.follow`; for ``async for``."""
        while True:
            found = await self.watch(since, names)
            names = heard_of(names, found)
            for event in found:
                since = event["number"]
                yield event

    async def history(
        self,
        names: Sequence[str] | None = None,
        *,
        since: int = 0,
        earliest: float = 0.0,
        follow: bool = False,
    ) -> AsyncIterator[Entry]:
        """See :meth:`Client.history`; for ``async for``."""
        while True:
            page = await answer(self._handle.history.remote(since, names, earliest))
            for entry in page["entries"]:
                yield entry
            names, since = heard_of(names, page["entries"]), page["last"]
            if not page["more"]:
                if not follow:
                    return
                await asyncio.sleep(FOLLOW_SECONDS)

    async def topology(self, node: str | None = None) -> list[dict[str, Any]]:
        """See :meth:`Client.topology`."""
        return await answer(self._handle.topology.remote(node))

    async def forget_measurements(self, node: str | None = None) -> list[dict[str, Any]]:
        """See :meth:`Client.forget_measurements`."""
        return await answer(self._handle.forget_measurements.remote(node))

    async def snapshot(self) -> dict[str, Any]:
        """See :meth:`Client.snapshot`."""
        return await answer(self._handle.snapshot.remote())

    async def ping(self) -> str:
        """See :meth:`Client.ping`."""
        return await answer(self._handle.ping.remote())
