"""The service, typed: for editors, type checkers, and callers who own what they place.

Each method asks the service's method of the same name, and hands its answer and its errors back as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypedDict, TypeVar

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from placement.core.snapshot import NEAR_LABELS
from placement.errors import InvalidDeployment, LeaseExpired, ReservationFailed, Unplaceable
from placement.runtime import bootstrap
from placement.runtime.borrowing import Borrower, OwnGroups
from placement.runtime.connection import abandoning, ask, caller, cluster, own_errors
from placement.runtime.controller import IDLE_SECONDS
from placement.runtime.leases import Loan
from placement.runtime.results import PlacementResult
from placement.wire.constraints import PlacementConstraints
from placement.wire.deployment import Deployment
from placement.wire.plans import PlacementPlan

__all__ = ["AsyncClient", "Client", "Event", "Status", "ask", "cluster"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

DeploymentLike = Deployment | Mapping[str, Any]
Constraints = PlacementConstraints | Mapping[str, Any] | None

WATCH_SECONDS = 30.0
"""How long one call of ``watch`` waits for something to happen."""
WAIT_SECONDS = 60.0
"""How long one call of ``wait`` waits at most: the service does not notice that who waits has died."""


class Event(TypedDict):
    """One thing that happened to a deployment.

    ``number`` grows from event to event, also across restarts of the service; ``at`` is in seconds since 1970, and
    ``time`` the same in words, in UTC; ``replica`` is ``None`` for the deployment as a whole.
    """

    number: int
    at: float
    time: str
    deployment: str
    replica: int | None
    state: str
    text: str


class Status(TypedDict):
    """Nodes with their GPUs and who is on them, deployments with their replicas, groups with their routes."""

    nodes: list[dict[str, Any]]
    deployments: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    unreadable: list[dict[str, Any]]
    totals: dict[str, int | float]
    demand: list[dict[str, Any]]


class _Connected:
    """What both clients are."""

    def __init__(self, service: ActorHandle | None = None) -> None:
        self._handle = bootstrap.connect() if service is None else service
        self._groups = OwnGroups()

    @property
    def handle(self) -> ActorHandle:
        """The bare actor handle, for ``client.handle.place.remote(...)``: its answers are awaited, or got by Ray."""
        return self._handle

    def _cancel(self, loan_id: str) -> None:
        self._handle.cancel.remote(loan_id)  # not waited for: if it is lost, the loan ends by itself


class Client(_Connected):
    """The placement service of the connected cluster, for code that may block.

    Args:
        service: the service's actor handle; the running service if left out.

    Raises:
        RuntimeError: Ray is not connected; call ``ray.init(address="auto")`` first.
        ServiceNotRunning: nobody started it; :meth:`start` does. Every method raises it once the service is stopped.
    """

    @classmethod
    def start(
        cls,
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
        node_types: str | Path | None = None,
    ) -> Client:
        """The same, with the service started if need be; see :func:`placement.start`."""
        return cls(bootstrap.start(near, idle_seconds, node_types))

    def place(
        self,
        deployment: DeploymentLike,
        constraints: Constraints = None,
        wait_seconds: float = 0.0,
        *,
        owner: ActorHandle | None = None,
    ) -> PlacementResult:
        """Places all replicas of a deployment, or none. Placing an identical deployment again returns what stands.

        With ``owner: caller`` in the deployment this process creates the placement groups, and Ray removes them when
        it ends, however it ends. (If this process is a normal actor, when its driver has ended, too; if it is connected
        through ``ray://``, once Ray no longer expects it to come back, which is 30 s after it was killed.) On Ctrl-C,
        what was asked for is given up.

        Args:
            deployment: a :class:`~placement.Deployment`, or a mapping of its fields.
            constraints: limits the choice of nodes; replaces ``deployment.constraints``.
            wait_seconds: how long it may wait for room.
            owner: an actor whose end ends the deployment.

        Raises:
            InvalidDeployment: a field is refused.
            UnknownNode: the constraints name a node that the cluster lacks.
            UnreadableRecord: the ledger has a record of that name that the service cannot read.
            DeploymentConflict: the name stands with another declaration.
            Unplaceable: it fits nowhere in time: ``NoGpuNodes``, ``NotEnoughGpus``, ``BelowFloor``,
                ``NoEgressNodes``, ``NotEnoughEgress`` or ``NoCpuNodes``.
            ReservationFailed: others kept taking the GPUs.
            LeaseExpired: this process was too slow to create a group, twice; or the actor ``owner`` has ended. In every
                case nothing of it stays reserved.
            Busy: the service has too much to do.
        """
        who = caller(owner)
        if _is_lease(deployment, owner):
            return self._borrow(deployment, constraints, wait_seconds, who)
        place = self._handle.place
        return self._ask_or_abandon(place.remote(deployment, constraints, wait_seconds, caller=who))

    def apply(
        self,
        deployment: DeploymentLike,
        constraints: Constraints = None,
        *,
        atomic: bool = False,
        owner: ActorHandle | None = None,
    ) -> PlacementResult:
        """Stores the declaration, and makes what stands be like it. Replicas that find no room are ``pending``.

        With ``owner: caller`` in the deployment it is all or nothing: nobody could create the groups later.

        Args:
            deployment: a :class:`~placement.Deployment`, or a mapping of its fields.
            constraints: limits the choice of nodes; replaces ``deployment.constraints``.
            atomic: all of the change or nothing.
            owner: an actor whose end ends the deployment.

        Raises:
            InvalidDeployment, UnknownNode, UnreadableRecord, Busy: as :meth:`place`; nothing is changed.
            Unplaceable, ReservationFailed: only with ``atomic``, or with ``owner: caller``.
        """
        who = caller(owner)
        if _is_lease(deployment, owner):
            return self._borrow(deployment, constraints, 0.0, who)
        return self._ask(self._handle.apply.remote(deployment, constraints, atomic, caller=who))

    def apply_all(
        self, deployments: Sequence[DeploymentLike], *, atomic: bool = False
    ) -> list[PlacementResult]:
        """Applies several deployments; with ``atomic`` all of them, or none if one does not fit.

        The members of a group (:meth:`placement.Group.of`) are placed all at once, or all of them wait.

        Raises:
            PartlyApplied: some could not be applied, the others were.
            Unplaceable, ReservationFailed: only with ``atomic``.
        """
        return self._ask(self._handle.apply_all.remote(deployments, atomic, caller=caller()))

    def plan(
        self, deployment: DeploymentLike, constraints: Constraints = None, *, atomic: bool = False
    ) -> PlacementPlan:
        """What :meth:`apply` would do now. Reserves nothing.

        Raises:
            Same as :meth:`apply`, but never ``ReservationFailed``.
        """
        return self._ask(self._handle.plan.remote(deployment, constraints, atomic))

    def plan_all(self, deployments: Sequence[DeploymentLike], *, atomic: bool = False) -> list[PlacementPlan]:
        """What :meth:`apply_all` would do now, each deployment planned on top of the ones before."""
        return self._ask(self._handle.plan_all.remote(deployments, atomic))

    def get(self, name: str) -> PlacementResult:
        """Where a deployment's replicas are.

        Raises:
            UnknownDeployment: no deployment of that name stands.
        """
        return self._ask(self._handle.get.remote(name))

    def describe(self, name: str) -> dict[str, Any]:
        """A deployment as it is declared, what is there of it, its owner and age; JSON-ready.

        Raises:
            UnknownDeployment: no deployment of that name stands.
        """
        return self._ask(self._handle.describe.remote(name))

    def members(self, name: str) -> list[str]:
        """The deployments that a name means: the members of the group of that name, or the one of that name.

        Raises:
            UnknownDeployment: neither stands.
        """
        return self._ask(self._handle.members.remote(name))

    def wait(self, name: str, timeout_seconds: float | None = None) -> PlacementResult:
        """Where a deployment's replicas are, once none of them is pending; after the time, as it is then.

        Args:
            name: the deployment.
            timeout_seconds: how long to wait; for ever if left out.

        Raises:
            UnknownDeployment: no deployment of that name stands, or it was released meanwhile.
        """
        waiting = _Waiting(timeout_seconds)
        while True:
            result = self._ask_or_abandon(self._handle.wait.remote(name, waiting.next_seconds()))
            if waiting.is_over():
                return result

    def renew(self, name: str) -> float | None:
        """Has a deployment with ``ttl_seconds`` stand for so long from now on. To ask for it again does the same.

        Returns:
            Until when, in seconds since 1970; ``None`` if it has no such limit.

        Raises:
            UnknownDeployment: no deployment of that name stands.
        """
        return self._ask(self._handle.renew.remote(name))

    def release(self, name: str) -> int:
        """Gives back everything that a deployment holds, and ends the workers in its groups.

        The members of a group end as one, by its name or by that of any of them.

        Returns:
            How many replicas were released.

        Raises:
            UnknownDeployment: no deployment of that name stands.
            UnreadableRecord: a later version of the service wrote its record.
        """
        return self._ask(self._handle.release.remote(name))

    def release_all(self) -> list[str]:
        """Releases every deployment.

        Returns:
            Their names.
        """
        return self._ask(self._handle.release_all.remote())

    def status(
        self, node: str | None = None, deployment: str | None = None, state: str | None = None
    ) -> Status:
        """Nodes with their GPUs and who is on them, and deployments with their replicas; JSON-ready.

        Args:
            node: only this node, by its name, id or address.
            deployment: only this deployment, or the members of this group.
            state: only deployments with a replica that is ``placed``, ``pending``, ``lost`` or ``releasing``.
        """
        return self._ask(self._handle.status.remote(node, deployment, state))

    def events(self, name: str | None = None, since: int = 0) -> list[Event]:
        """What happened lately, to one deployment or to all, oldest first.

        Args:
            name: the deployment, which may be gone by now.
            since: the ``number`` of the last event already known.

        Raises:
            UnknownDeployment: nothing is known of that name.
        """
        return self._ask(self._handle.events.remote(name, since))

    def watch(
        self, since: int = 0, names: Sequence[str] | None = None, timeout_seconds: float = WATCH_SECONDS
    ) -> list[Event]:
        """Events after ``since``, as soon as there is one; none if nothing happened within the time.

        Args:
            since: the ``number`` of the last event already known; with 0 all that are known come at once.
            names: only those of these deployments, which need not be known yet.
            timeout_seconds: how long to wait.
        """
        watch = self._handle.watch
        return self._ask_or_abandon(watch.remote(since=since, names=names, timeout_seconds=timeout_seconds))

    def follow(self, names: Sequence[str] | None = None, since: int = 0) -> Iterator[Event]:
        """Events as they happen, without end; see :meth:`watch`."""
        while True:
            for event in self.watch(since, names):
                since = event["number"]
                yield event

    def topology(self, node: str | None = None) -> list[dict[str, Any]]:
        """What each GPU node's GPUs report, read anew; JSON-ready.

        Raises:
            UnknownNode: no GPU node has that id, name or address.
        """
        return self._ask(self._handle.topology.remote(node))

    def snapshot(self) -> dict[str, Any]:
        """The cluster as the planner sees it now; JSON-ready, for ``placement plan --file``."""
        return self._ask(self._handle.snapshot.remote())

    def ping(self) -> str:
        """The version of the package that the service runs."""
        return self._ask(self._handle.ping.remote())

    def _borrow(
        self,
        deployment: DeploymentLike,
        constraints: Constraints,
        wait_seconds: float,
        who: dict[str, str],
        own: Mapping[str, Any] | None = None,
    ) -> PlacementResult:
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
        borrower = Borrower(self._groups, self._cancel, own)
        try:
            self._groups.warm()
            lend = self._handle.lend.remote(deployment, constraints, wait_seconds, caller=who)
            answer: Loan | PlacementResult = self._ask_or_abandon(lend)
            while isinstance(answer, Loan):
                group_id = borrower.make(answer)
                answer = self._ask(self._handle.confirm.remote(answer.id, group_id))
            return borrower.keep(answer)
        except BaseException as error:
            borrower.give_back(error)
            raise

    def _create_group(
        self, deployment: Deployment, name: str, lifetime: str | None, wait_seconds: float | None
    ) -> PlacementGroup:
        """The group of a deployment that is laid out bundle by bundle; see :func:`placement.placement_group`."""
        # A detached group has no owner, whose end would end it.
        who, own = (
            {} if lifetime else caller(),
            {"lifetime": lifetime} | ({"group_name": name} if name else {}),
        )
        result = self._borrow_patiently(deployment, wait_seconds, "placement_group(...)", who, own)
        return result.assignments[0].placement_group

    def _borrow_patiently(
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
                return self._borrow(deployment, None, left, who, own)
            except (Unplaceable, ReservationFailed, LeaseExpired) as refusal:
                waits, left = left > 0, max(0.0, end - time.monotonic())
                if not left:
                    raise
                if not waits:
                    logger.warning("%s waits: %s", what, refusal)

    def _ask(self, reference: Any) -> Any:
        return ask(reference)

    def _ask_or_abandon(self, reference: Any) -> Any:
        with abandoning(reference):
            return ask(reference)


class AsyncClient(_Connected):
    """The placement service of the connected cluster, for ``async`` code: nothing blocks the event loop.

    Args:
        service: the service's actor handle; the running service if left out.

    Raises:
        Same as :class:`Client`.
    """

    @classmethod
    async def start(
        cls,
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
        node_types: str | Path | None = None,
    ) -> AsyncClient:
        """The same, with the service started if need be; see :func:`placement.start`."""
        return cls(await asyncio.to_thread(bootstrap.start, near, idle_seconds, node_types))

    async def place(
        self,
        deployment: DeploymentLike,
        constraints: Constraints = None,
        wait_seconds: float = 0.0,
        *,
        owner: ActorHandle | None = None,
    ) -> PlacementResult:
        """See :meth:`Client.place`. If it is cancelled while it waits for room, it no longer waits."""
        who = caller(owner)
        if _is_lease(deployment, owner):
            return await self._borrow(deployment, constraints, wait_seconds, who)
        place = self._handle.place
        return await self._ask_or_abandon(place.remote(deployment, constraints, wait_seconds, caller=who))

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
        if _is_lease(deployment, owner):
            return await self._borrow(deployment, constraints, 0.0, who)
        return await self._ask(self._handle.apply.remote(deployment, constraints, atomic, caller=who))

    async def apply_all(
        self, deployments: Sequence[DeploymentLike], *, atomic: bool = False
    ) -> list[PlacementResult]:
        """See :meth:`Client.apply_all`."""
        return await self._ask(self._handle.apply_all.remote(deployments, atomic, caller=caller()))

    async def plan(
        self, deployment: DeploymentLike, constraints: Constraints = None, *, atomic: bool = False
    ) -> PlacementPlan:
        """See :meth:`Client.plan`."""
        return await self._ask(self._handle.plan.remote(deployment, constraints, atomic))

    async def plan_all(
        self, deployments: Sequence[DeploymentLike], *, atomic: bool = False
    ) -> list[PlacementPlan]:
        """See :meth:`Client.plan_all`."""
        return await self._ask(self._handle.plan_all.remote(deployments, atomic))

    async def get(self, name: str) -> PlacementResult:
        """See :meth:`Client.get`."""
        return await self._ask(self._handle.get.remote(name))

    async def describe(self, name: str) -> dict[str, Any]:
        """See :meth:`Client.describe`."""
        return await self._ask(self._handle.describe.remote(name))

    async def members(self, name: str) -> list[str]:
        """See :meth:`Client.members`."""
        return await self._ask(self._handle.members.remote(name))

    async def wait(self, name: str, timeout_seconds: float | None = None) -> PlacementResult:
        """See :meth:`Client.wait`."""
        waiting = _Waiting(timeout_seconds)
        while True:
            result = await self._ask_or_abandon(self._handle.wait.remote(name, waiting.next_seconds()))
            if waiting.is_over():
                return result

    async def renew(self, name: str) -> float | None:
        """See :meth:`Client.renew`."""
        return await self._ask(self._handle.renew.remote(name))

    async def release(self, name: str) -> int:
        """See :meth:`Client.release`."""
        return await self._ask(self._handle.release.remote(name))

    async def release_all(self) -> list[str]:
        """See :meth:`Client.release_all`."""
        return await self._ask(self._handle.release_all.remote())

    async def status(
        self, node: str | None = None, deployment: str | None = None, state: str | None = None
    ) -> Status:
        """See :meth:`Client.status`."""
        return await self._ask(self._handle.status.remote(node, deployment, state))

    async def events(self, name: str | None = None, since: int = 0) -> list[Event]:
        """See :meth:`Client.events`."""
        return await self._ask(self._handle.events.remote(name, since))

    async def watch(
        self, since: int = 0, names: Sequence[str] | None = None, timeout_seconds: float = WATCH_SECONDS
    ) -> list[Event]:
        """See :meth:`Client.watch`."""
        watch = self._handle.watch
        return await self._ask_or_abandon(
            watch.remote(since=since, names=names, timeout_seconds=timeout_seconds)
        )

    async def follow(self, names: Sequence[str] | None = None, since: int = 0) -> AsyncIterator[Event]:
        """See :meth:`Client.follow`; for ``async for``."""
        while True:
            for event in await self.watch(since, names):
                since = event["number"]
                yield event

    async def topology(self, node: str | None = None) -> list[dict[str, Any]]:
        """See :meth:`Client.topology`."""
        return await self._ask(self._handle.topology.remote(node))

    async def snapshot(self) -> dict[str, Any]:
        """See :meth:`Client.snapshot`."""
        return await self._ask(self._handle.snapshot.remote())

    async def ping(self) -> str:
        """See :meth:`Client.ping`."""
        return await self._ask(self._handle.ping.remote())

    async def _borrow(
        self, deployment: DeploymentLike, constraints: Constraints, wait_seconds: float, who: dict[str, str]
    ) -> PlacementResult:
        end = time.monotonic() + wait_seconds
        try:
            return await self._borrow_once(deployment, constraints, wait_seconds, who)
        except LeaseExpired:  # as Client does
            left = max(0.0, end - time.monotonic())
            return await self._borrow_once(deployment, constraints, left, who)

    async def _borrow_once(
        self, deployment: DeploymentLike, constraints: Constraints, wait_seconds: float, who: dict[str, str]
    ) -> PlacementResult:
        borrower = Borrower(self._groups, self._cancel)
        try:
            await _in_thread(self._groups.warm)
            lend = self._handle.lend.remote(deployment, constraints, wait_seconds, caller=who)
            answer: Loan | PlacementResult = await self._ask_or_abandon(lend)
            while isinstance(answer, Loan):
                group_id = await _in_thread(borrower.make, answer)
                answer = await self._ask(self._handle.confirm.remote(answer.id, group_id))
            return await _in_thread(borrower.keep, answer)
        except BaseException as error:
            await _in_thread(borrower.give_back, error)
            raise

    async def _ask(self, reference: Any) -> Any:
        with own_errors():
            return await reference

    async def _ask_or_abandon(self, reference: Any) -> Any:
        with abandoning(reference):
            return await self._ask(reference)


class _Waiting:
    """The time that somebody waits, in parts.

    Args:
        seconds: all of it; ``None`` for ever.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._until = 0.0

    def next_seconds(self) -> float:
        """How long to wait next."""
        now = time.monotonic()
        self._until = min(self._end, now + WAIT_SECONDS)
        return max(0.0, self._until - now)

    def is_over(self) -> bool:
        """Whether what was waited for came before that time was over, or no more is left."""
        now = time.monotonic()
        return now < self._until or now >= self._end


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


def _is_lease(deployment: DeploymentLike, owner: ActorHandle | None) -> bool:
    """Whether the caller creates the groups itself."""
    declared = (
        deployment.get("owner") if isinstance(deployment, Mapping) else getattr(deployment, "owner", None)
    )
    if declared == "caller" and owner is not None:
        problem = "owner: caller is declared, and an actor is named as the owner; leave one of them out"
        raise InvalidDeployment("deployment", (problem,))
    return declared == "caller"
