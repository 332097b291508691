"""The caller's half of a lease: it creates the placement groups itself, so that Ray ends them with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, get_placement_group

from placement.errors import LeaseExpired, PlacementError, ReservationFailed, Unplaceable
from placement.runtime import groups
from placement.runtime.client_base import Constraints, DeploymentLike
from placement.runtime.connection import answer, answer_or_abandon, ask, ask_or_abandon, caller, in_cluster
from placement.runtime.leases import Loan
from placement.runtime.results import PlacementResult
from placement.wire.deployment import Deployment

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")


class OwnGroups:
    """Placement groups that belong to this process: Ray removes them when it ends.

    Under ``ray://`` they belong to its proxy process in the cluster, which ends when it disconnects.
    """

    def warm(self) -> None:
        """Returns once :meth:`create` will be quick: under ``ray://`` a worker process has to start first."""
        in_cluster(_nothing)

    def create(self, loan: Loan) -> PlacementGroup:
        """Has Ray create the group that a loan is for. The actors of its nodes wait until it is ready."""
        return in_cluster(_create, loan)

    def find(self, name: str) -> PlacementGroup | None:
        """A group of this process's namespace that has not been removed, ready or not."""
        try:
            return get_placement_group(name)
        except ValueError:
            return None

    def remove(self, group: PlacementGroup) -> None:
        """See :func:`placement.runtime.groups.remove_group`."""
        groups.remove_group(group)


class Borrowed:
    """The loans of one request so far. None of them stays unless the request succeeds.

    Args:
        service: the service's actor handle.
        groups: creates and removes the groups.
        own: the caller's own settings of the groups: fields of :class:`Loan`.
    """

    def __init__(self, service: ActorHandle, groups: OwnGroups, own: Mapping[str, Any] | None = None) -> None:
        self._service, self._groups, self._own = service, groups, own or {}
        self._loan: Loan | None = None
        self._made: list[PlacementGroup] = []

    def make(self, loan: Loan) -> str:
        """Creates the group that a loan is for.

        Returns:
            The group's id, hex, to confirm the loan with.
        """
        self._loan = loan
        group = self._groups.create(replace(loan, **self._own))
        self._made.append(group)
        return str(group.id.hex())

    def keep(self, result: PlacementResult) -> PlacementResult:
        """Ends a request that succeeded. Groups of failed attempts, which are not in its result, are removed."""
        used = {a.placement_group.id for a in result.assignments}
        for group in self._made:
            if group.id not in used:
                with contextlib.suppress(Exception):
                    self._groups.remove(group)
        return result

    def give_back(self, error: BaseException) -> None:
        """Ends a request that failed: removes all its groups, and cancels its loan unless the service ended it."""
        for group in self._made:
            with contextlib.suppress(Exception):
                self._groups.remove(group)
        if self._loan is None:
            return
        with contextlib.suppress(Exception):
            # A group that was being created when the request was interrupted.
            found = self._groups.find(self._loan.group_name)
            if found is not None and found.id not in {group.id for group in self._made}:
                self._groups.remove(found)
        if not isinstance(error, PlacementError):
            with contextlib.suppress(Exception):
                # Not waited for: if it is lost, the loan ends by itself.
                self._service.cancel.remote(self._loan.id)


class Borrower:
    """Lets the service lend GPUs for groups that the caller owns; for code that may block.

    Args:
        service: the service's actor handle.
        ask: waits for the answer of a call.
        ask_or_abandon: the same; has the service stop the call as well if it is not waited for to the end.

    Attributes:
        groups: creates and removes the groups.
    """

    def __init__(
        self,
        service: ActorHandle,
        ask: Callable[[Any], Any] = ask,
        ask_or_abandon: Callable[[Any], Any] = ask_or_abandon,
    ) -> None:
        self.groups = OwnGroups()
        self._service, self._ask, self._ask_or_abandon = service, ask, ask_or_abandon

    def borrow(
        self,
        deployment: DeploymentLike,
        constraints: Constraints,
        wait_seconds: float,
        who: dict[str, str],
        own: Mapping[str, Any] | None = None,
    ) -> PlacementResult:
        """Places a deployment in groups of this process's own; see :meth:`~placement.runtime.client.Client.place`.

        Args:
            deployment: what is declared.
            constraints: replaces the deployment's own.
            wait_seconds: how long it may wait for room.
            who: see :func:`~placement.runtime.connection.caller`.
            own: what the caller says of the groups himself: fields of :class:`~placement.runtime.leases.Loan`.
        """
        end = time.monotonic() + wait_seconds
        try:
            return self._borrow_once(deployment, constraints, wait_seconds, who, own)
        except LeaseExpired:  # the service has started anew meanwhile, or this process was slow for once
            left = max(0.0, end - time.monotonic())
            return self._borrow_once(deployment, constraints, left, who, own)

    def _borrow_once(
        self,
        deployment: DeploymentLike,
        constraints: Constraints,
        wait_seconds: float,
        who: dict[str, str],
        own: Mapping[str, Any] | None,
    ) -> PlacementResult:
        borrowed = Borrowed(self._service, self.groups, own)
        try:
            self.groups.warm()
            lend = self._service.lend.remote(deployment, constraints, wait_seconds, caller=who)
            lent: Loan | PlacementResult = self._ask_or_abandon(lend)
            while isinstance(lent, Loan):
                group_id = borrowed.make(lent)
                lent = self._ask(self._service.confirm.remote(lent.id, group_id))
            return borrowed.keep(lent)
        except BaseException as error:
            borrowed.give_back(error)
            raise

    def create_group(
        self, deployment: Deployment, name: str, lifetime: str | None, wait_seconds: float | None
    ) -> PlacementGroup:
        """The group of a deployment that is laid out bundle by bundle; see :func:`placement.placement_group`."""
        # A detached group has no owner, whose end would end it.
        who, own = (
            {} if lifetime else caller(),
            {"lifetime": lifetime} | ({"group_name": name} if name else {}),
        )
        result = self.borrow_patiently(deployment, wait_seconds, "placement_group(...)", who, own)
        return result.assignments[0].placement_group

    def borrow_patiently(
        self,
        deployment: Deployment,
        wait_seconds: float | None,
        what: str,
        who: dict[str, str],
        own: Mapping[str, Any] | None = None,
    ) -> PlacementResult:
        """Groups of this process's own. While there is no room it waits; a warning says that ``what`` does, and why."""
        end = math.inf if wait_seconds is None else time.monotonic() + wait_seconds
        left = 0.0
        while True:
            try:
                return self.borrow(deployment, None, left, who, own)
            except (Unplaceable, ReservationFailed, LeaseExpired) as refusal:
                waits, left = left > 0, max(0.0, end - time.monotonic())
                if not left:
                    raise
                if not waits:
                    logger.warning("%s waits: %s", what, refusal)


class AsyncBorrower:
    """The same for ``async`` code.

    Args:
        service: the service's actor handle.

    Attributes:
        groups: creates and removes the groups.
    """

    def __init__(self, service: ActorHandle) -> None:
        self.groups = OwnGroups()
        self._service = service

    async def borrow(
        self, deployment: DeploymentLike, constraints: Constraints, wait_seconds: float, who: dict[str, str]
    ) -> PlacementResult:
        """See :meth:`Borrower.borrow`."""
        end = time.monotonic() + wait_seconds
        try:
            return await self._borrow_once(deployment, constraints, wait_seconds, who)
        except LeaseExpired:  # as Borrower does
            left = max(0.0, end - time.monotonic())
            return await self._borrow_once(deployment, constraints, left, who)

    async def _borrow_once(
        self, deployment: DeploymentLike, constraints: Constraints, wait_seconds: float, who: dict[str, str]
    ) -> PlacementResult:
        borrowed = Borrowed(self._service, self.groups)
        try:
            await _in_thread(self.groups.warm)
            lend = self._service.lend.remote(deployment, constraints, wait_seconds, caller=who)
            lent: Loan | PlacementResult = await answer_or_abandon(lend)
            while isinstance(lent, Loan):
                group_id = await _in_thread(borrowed.make, lent)
                lent = await answer(self._service.confirm.remote(lent.id, group_id))
            return await _in_thread(borrowed.keep, lent)
        except BaseException as error:
            await _in_thread(borrowed.give_back, error)
            raise


async def _in_thread(function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What a function returns that blocks. If this is cancelled, the function still comes to its end before."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **named))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        running.exception()
        raise


def _nothing() -> None:
    pass


def _create(loan: Loan) -> PlacementGroup:
    return groups.create_group(
        loan.group_name, loan.bundles, loan.nodes, loan.lifetime, loan.strategy, loan.labels
    )
