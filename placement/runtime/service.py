"""The placement service: the actor that callers talk to. It validates, lets the controller act, and waits.

Every method is asynchronous, so that waiting for an outcome or for events costs no thread. What
blocks (Ray's own calls) runs in threads, of which status, plans, releases and placements have their own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from placement.core.snapshot import NEAR_LABELS
from placement.errors import (
    ReservationFailed,
    UnknownDeployment,
    Unplaceable,
)
from placement.runtime import metrics, ray_internals
from placement.runtime.clock import Clock
from placement.runtime.controller import Controller
from placement.runtime.decisions import decided, noted, who
from placement.runtime.declarations import (
    ONE_BY_ONE,
    Caller,
    DeploymentLike,
    Limits,
    alone,
    owner_key,
    owner_unless_caller,
    parse,
)
from placement.runtime.discovery import NodeInfo
from placement.runtime.history import History
from placement.runtime.leases import Lending, Loan, Loans
from placement.runtime.outcomes import Bound, Outcomes, Queues
from placement.runtime.owners import asker_of, owner_of
from placement.runtime.past import Past
from placement.runtime.queue import Ticket
from placement.runtime.results import PlacementResult
from placement.runtime.settings import HISTORY_DAYS, HISTORY_MIB, IDLE_SECONDS
from placement.wire.groups import groups_of
from placement.wire.measurements import as_file, read_measurements
from placement.wire.node_types import NodeType
from placement.wire.plans import ExplainedPlan, PlacementPlan

T = TypeVar("T")

PLANNERS, RELEASERS, CHANGERS = 64, 512, 512
"""How many threads plan and ask nodes what they have, give something back, and place, at most; all are made when
needed. All may have to wait for a node."""
CALLS = 4096
"""So many calls change something or wait to, at once. Together with the watchers these are fewer than Ray lets in, so
that a release, and who only looks, never waits for them."""
MOST_SECONDS = 24 * 3600.0
"""The longest wait of one call."""

COLLECT_EVERY = 50_000
"""How many new objects make Python's garbage collector run. With its default of 700, one ``status`` of 5,000 replicas
makes it go through all objects, for longer than the rest of ``status`` takes, while all callers wait."""


class DeploymentPlacementActor(Past):
    """``ray.get_actor("placement", namespace="placement")``. Every method may be called at any time by anybody.

    Args:
        make_agent: creates (or finds) the node actor of a node.
        near: labels of which nodes near each other share the values, widest first.
        idle_seconds: how long a node actor stays on a node that holds nothing.
        node_types: what the autoscaler can bring; refusals name the right one then.
        history_days, history_mib: how long events and decisions are kept, and how much of Ray's store they may take.
    """

    def __init__(
        self,
        make_agent: Callable[[NodeInfo], Any],
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
        node_types: Sequence[NodeType] = (),
        history_days: float = HISTORY_DAYS,
        history_mib: float = HISTORY_MIB,
    ) -> None:
        # The threads below may block, and do nothing else.
        ray_internals.allow_blocking_get()
        gc.set_threshold(COLLECT_EVERY, 10, 10)
        kept = History(history_days, history_mib)
        super().__init__(Controller(make_agent, near, idle_seconds, node_types, kept))
        gc.freeze()  # what was restored stays; to look through it again and again would cost each answer
        self._plans = ThreadPoolExecutor(PLANNERS, "plan")
        self._releases = ThreadPoolExecutor(RELEASERS, "release")
        self._changes = ThreadPoolExecutor(CHANGERS, "change")
        self._queues, self._outcomes = Queues(), Outcomes()
        self._calls = Bound("calls that change deployments", CALLS)
        self._loans = Loans()
        Clock(self._controller).start()

    async def ping(self) -> str:
        """Answers once the service is up, with the version of the package that it runs."""
        from placement import __version__

        return __version__

    async def settings(self) -> dict[str, Any]:
        """What :func:`placement.start` started it with: ``near``, ``idle_seconds``, its node types by name,
        ``history_days`` and ``history_mib``.
        """
        return {
            "near": list(self._controller.near),
            "idle_seconds": self._controller.idle_seconds,
            "node_types": [one.name for one in self._controller.node_types],
            "history_days": self._controller.history.days,
            "history_mib": self._controller.history.mib,
        }

    # -- what changes deployments --------------------------------------------------------------------

    @decided
    async def place(
        self,
        deployment: DeploymentLike,
        constraints: Limits = None,
        wait_seconds: float = 0.0,
        caller: Caller = None,
    ) -> PlacementResult:
        """Places all replicas of a deployment, or none.

        Placing an identical deployment again returns the existing result; replicas of it that wait are ``pending``.

        Args:
            deployment: a :class:`~placement.Deployment`, or a dict of its fields.
            constraints: limits the choice of nodes; replaces ``deployment.constraints``.
            wait_seconds: how long to wait for room, in the queue.
            caller: who asks; :class:`placement.Client` fills it in.

        Raises:
            InvalidDeployment: a field is refused.
            UnknownNode: the constraints name a node that the cluster lacks.
            UnreadableRecord: the ledger has a record of that name that this version cannot read.
            DeploymentConflict: the name is in use with another declaration.
            Unplaceable: it fits nowhere now: ``NoGpuNodes``, ``NotEnoughGpus``, ``NoEgressNodes``,
                ``NotEnoughEgress`` or ``NoCpuNodes``.
            ReservationFailed: others kept taking the GPUs. In every case nothing of it stays reserved.
            LeaseExpired: the actor that is to own it has ended.
            Busy: too many calls wait already.

        If a caller ends or cancels its call while it waits, nothing is placed for it later.
        """
        wanted = alone(parse(deployment, constraints))
        owner = owner_unless_caller(wanted, caller)
        asker = asker_of(caller)
        ticket = Ticket(wanted, lambda: self._controller.place(wanted, owner), (owner, asker))
        # If several callers wait for the same deployment, each has a ticket, which ends with its caller.
        waits = (wait_seconds, owner_key(asker)) if wait_seconds > 0 else ()
        key = "place", wanted.model_dump_json(), owner_key(owner), waits
        with self._calls.one_more():
            return await self._outcomes.share(key, lambda: self._wait_for(ticket, wait_seconds), ticket.end)

    async def _wait_for(self, ticket: Ticket[PlacementResult], wait_seconds: float) -> PlacementResult:
        """Tries it now, and again in its turn, until the time is over or somebody ends it."""
        end = time.monotonic() + min(max(wait_seconds, 0.0), MOST_SECONDS)
        tickets = self._controller.queue.tickets
        try:
            try:
                async with self._queues.turn(ticket.name):
                    return await self._in(self._changes, ticket.attempt)
            except (Unplaceable, ReservationFailed):
                if time.monotonic() >= end or ticket.is_over:
                    raise
            tickets.add(ticket)
            left = max(0.0, end - time.monotonic())
            await asyncio.wait([over(ticket.outcome)], timeout=left)
        except asyncio.CancelledError:
            ticket.end()
            raise
        finally:
            tickets.remove(ticket)
        return await self._in(self._changes, ticket.result)  # it may be in the middle of an attempt

    @decided
    async def apply(
        self,
        deployment: DeploymentLike,
        constraints: Limits = None,
        atomic: bool = False,
        caller: Caller = None,
    ) -> PlacementResult:
        """Declares a deployment: places, adds, removes or replaces replicas as far as there is room; the rest waits.

        A replica that holds what is declared now (GPUs, CPUs, provider, API key, egress units), on nodes that meet the
        limits, stays. The others are replaced: beside the old ones if there is room, else in their place; as long as
        there is no room, the old ones stay. Waiting replicas are ``pending`` in the result, and are placed when there
        is room, the oldest first, also after a restart of the service.

        Args:
            deployment: a :class:`~placement.Deployment`, or a dict of its fields.
            constraints: limits the choice of nodes; replaces ``deployment.constraints``.
            atomic: place all replicas, also those that were pending before, or change nothing.
            caller: who asks; :class:`placement.Client` fills it in.

        Raises:
            InvalidDeployment, UnknownNode, UnreadableRecord, Busy: as :meth:`place`.
            Unplaceable, ReservationFailed: it is atomic, and does not fit. What was placed before is still placed; if
                it had to be released first, it is placed again, or waits as ``pending``.
        """
        wanted = alone(parse(deployment, constraints))
        owner = owner_unless_caller(wanted, caller)

        async def begin() -> PlacementResult:
            async with self._queues.turn(wanted.name):
                return await self._in(self._changes, self._controller.apply, wanted, atomic, owner)

        with self._calls.one_more():
            return await self._outcomes.share(
                ("apply", wanted.model_dump_json(), atomic, owner_key(owner)), begin
            )

    @decided
    async def apply_all(
        self, deployments: Sequence[DeploymentLike], atomic: bool = False, caller: Caller = None
    ) -> list[PlacementResult]:
        """Applies several deployments; an error of one does not stop the others.

        They are applied in the given order if that works; one that is ``near_to`` or ``apart_from`` another may come
        after it. The members of a group (:class:`~placement.Group`) are placed all at once, or all of them wait.

        Args:
            deployments: the declarations.
            atomic: if one fits nowhere, also one that waits already, nothing is changed at all. If one cannot be
                reserved although it was planned, since others take GPUs meanwhile, new deployments of this call are
                released again; changes to existing deployments remain. If the service dies during the call, what it had
                placed also remains: when Ray sends the call again, it finds that placed.
            caller: who asks; :class:`placement.Client` fills it in.

        Raises:
            PartlyApplied: some could not be applied, the others were.
            InvalidDeployment: one is refused, or a group lacks a member; nothing is changed.
            GroupStands: a group is placed, and its new declaration would move its replicas.
            UnknownNode, Unplaceable, ReservationFailed, UnreadableRecord: as :meth:`apply`, if it is atomic.
            Busy: too many calls wait already.
        """
        wanted = [parse(one, None) for one in deployments]
        groups_of(wanted)
        owners = {one.name: owner_unless_caller(one, caller, ONE_BY_ONE) for one in wanted}
        asked = tuple((one.model_dump_json(), owner_key(owners[one.name])) for one in wanted)
        with self._calls.one_more():
            return await self._outcomes.share(
                ("apply_all", asked, atomic),
                lambda: self._in(self._changes, self._controller.apply_all, wanted, atomic, owners),
            )

    @decided
    async def release(self, name: str, caller: Caller = None) -> int:
        """Gives back everything that a deployment holds, and ends the workers in its groups.

        The members of a group (:class:`~placement.Group`) are released together, by its name or that of any member.

        Args:
            name: of the deployment or group.
            caller: who asks; :class:`placement.Client` fills it in.

        Returns:
            How many replicas were released.

        Raises:
            UnknownDeployment: no deployment of that name exists.
            UnreadableRecord: a later version of the service wrote its record. (If it is only broken, it is removed
                with all groups of that name, which are then counted.)
        """

        async def begin() -> int:
            async with self._queues.turn(name):
                return await self._in(self._releases, self._controller.release, name)

        return await self._outcomes.share(("release", name), begin)

    async def release_all(self, caller: Caller = None) -> list[str]:
        """Releases every deployment.

        Returns:
            Their names.
        """

        async def one(name: str) -> str | None:
            try:
                await self.release(name, caller)
            except UnknownDeployment:  # somebody else was quicker
                return None
            return name

        released = await asyncio.gather(*map(one, self._controller.state.names()))
        return [name for name in released if name is not None]

    async def renew(self, name: str) -> float | None:
        """Renews a deployment with ``ttl_seconds``: its time starts again now. Placing or applying it again does the
        same.

        Returns:
            Until when, in seconds since 1970; ``None`` if it has no such limit.

        Raises:
            UnknownDeployment: no deployment of that name exists.
        """
        async with self._queues.turn(name):
            return await self._in(self._releases, self._controller.renew, name)

    # -- leases: the caller creates the groups -------------------------------------------------------

    @metrics.counted
    async def lend(
        self,
        deployment: DeploymentLike,
        constraints: Limits = None,
        wait_seconds: float = 0.0,
        caller: Caller = None,
    ) -> Loan | PlacementResult:
        """Begins a placement whose groups the caller creates itself, so that Ray ends them with the caller.

        Returns:
            The loan that the caller must create at once, and :meth:`confirm`; or the result, if it is placed already.

        Raises:
            Same as :meth:`place`.
        """
        wanted = alone(parse(deployment, constraints)).model_copy(update={"owner": "caller"})
        lending = Lending(wanted.name, wanted.placement_group)
        owner = owner_of(wanted, caller)
        ticket = Ticket(wanted, lambda: self._controller.place(wanted, owner, lending), (owner,))
        with self._calls.one_more():
            placing = self._wait_for(ticket, wait_seconds)
            return await self._loans.begin(
                lending, noted(self._controller.feed, "lend", wanted, caller, placing)
            )

    @metrics.counted
    async def confirm(self, loan_id: str, group_id: str) -> Loan | PlacementResult:
        """Says that the group of a loan is made, by its id in hex; empty if it was not.

        Returns:
            The next loan, or the result.

        Raises:
            LeaseExpired: it is too late.
            Unplaceable, ReservationFailed: as :meth:`place`; the caller removes what it created.
        """
        return await self._loans.confirm(loan_id, group_id)

    async def cancel(self, loan_id: str) -> None:
        """The caller gives the request up. Harmless if it is over already."""
        self._loans.cancel(loan_id)

    # -- what only looks -----------------------------------------------------------------------------

    async def plan(
        self, deployment: DeploymentLike, constraints: Limits = None, atomic: bool = False
    ) -> PlacementPlan:
        """What :meth:`apply` would do now. Reserves nothing.

        Raises:
            Same as :meth:`apply`, but never ``ReservationFailed``.
        """
        return (await self.plan_all([parse(deployment, constraints)], atomic))[0]

    async def plan_all(
        self, deployments: Sequence[DeploymentLike], atomic: bool = False
    ) -> list[PlacementPlan]:
        """What :meth:`apply_all` would do now, each deployment planned on top of the ones before."""
        wanted = [parse(one, None) for one in deployments]
        return await self._in(self._plans, self._controller.queries.plan_all, wanted, atomic)

    async def explain_all(self, deployments: Sequence[DeploymentLike]) -> list[ExplainedPlan]:
        """:meth:`plan_all`, with which nodes were excluded and why; a refusal is the last entry of the list.

        It reads Ray's records once: for a moment after a change they may show less room than there is.
        """
        wanted = [parse(one, None) for one in deployments]
        return await self._in(self._plans, self._controller.queries.explain_all, wanted)

    async def snapshot(self) -> dict[str, Any]:
        """The cluster as the planner sees it now; JSON-ready, for ``placement plan --file``."""
        found = await self._in(self._plans, self._controller.queries.snapshot)
        return found.model_dump(mode="json", exclude_none=True)

    async def get(self, name: str) -> PlacementResult:
        """Where a deployment's replicas are.

        Raises:
            UnknownDeployment: no deployment of that name exists.
        """
        return self._controller.queries.get(name).result()

    async def describe(self, name: str) -> dict[str, Any]:
        """A deployment's declaration, and its replicas; JSON-ready.

        Raises:
            UnknownDeployment: no deployment of that name exists.
        """
        return self._controller.queries.describe(name)

    async def members(self, name: str) -> list[str]:
        """The deployments that a name means: the members of the group of that name, or the one of that name.

        Raises:
            UnknownDeployment: neither exists.
        """
        return self._controller.queries.members(name)

    async def wait(self, name: str, timeout_seconds: float = MOST_SECONDS) -> PlacementResult:
        """Where a deployment's replicas are, as soon as none is pending, or the pending ones are given up, or
        the time is over.

        Raises:
            UnknownDeployment: no deployment of that name exists, or it no longer does.
        """
        end = time.monotonic() + min(max(timeout_seconds, 0.0), MOST_SECONDS)
        while True:
            seen = self._controller.feed.last_number
            one = self._controller.queries.get(name)
            left = end - time.monotonic()
            if not one.unfinished() or one.given_up or left <= 0:
                return one.result()
            await self._controller.feed.wait(seen, (name,), left)

    async def status(
        self, node: str | None = None, deployment: str | None = None, state: str | None = None
    ) -> dict[str, Any]:
        """Nodes with their GPUs and the replicas on them, and deployments with their replicas; JSON-ready.

        Args:
            node: only this node, by id, name or address, and what is on it.
            deployment: only this deployment, or the members of this group, and the nodes that they are on.
            state: only deployments in this state: ``placed``, ``pending``, ``lost`` or ``releasing``.
        """
        return await self._in(self._reads, self._controller.queries.status, node, deployment, state)

    async def topology(self, node: str | None = None) -> list[dict[str, Any]]:
        """The facts of each GPU node's GPUs, read now; JSON-ready.

        Raises:
            UnknownNode: ``node`` is given and no GPU node has that id, name or address.
        """
        return await self._in(self._plans, self._controller.queries.topology, node)

    async def record_measurements(self, measurements: Sequence[Mapping[str, Any]]) -> None:
        """Keeps measured rates of hosts; these nodes, and others of their make, use them from now on.

        Args:
            measurements: as ``placement measure --export`` writes them.

        Raises:
            InvalidMeasurement: one is not of that form; nothing is kept.
        """
        file = json.dumps({"measurements": list(measurements)})
        found = read_measurements(file, "measurements")
        await self._in(self._reads, self._controller.record_measurements, found)

    async def forget_measurements(self, node: str | None = None) -> list[dict[str, Any]]:
        """Forgets the measured rates of a node, or of all hosts; GPUs are then chosen by other rates, or by
        predictions.

        Args:
            node: its id, name or address, or the name of a host that is no longer a node. ``None`` for all hosts.

        Returns:
            The forgotten rates, in the form of :meth:`measurements`; empty if the node had none.
        """
        found = await self._in(self._reads, self._controller.forget_measurements, node)
        return list(as_file(found)["measurements"])

    async def measurements(self) -> list[dict[str, Any]]:
        """The measured rates of all hosts, whether they are nodes now or not; JSON-ready."""
        found = as_file(self._controller.fleet.inventory.measurements.all())
        return list(found["measurements"])

    async def stop_agents(self, caller: Caller = None) -> None:
        """Ends the node actors, and writes the history to its end. Placement groups stay as they are.

        Args:
            caller: who stops the service.
        """
        await self._in(self._plans, self._controller.fleet.agents.stop)
        text = "the service is about to be stopped"
        self._controller.feed.note("service", "", "stopped", text, caller=who(caller))
        await self._in(self._plans, self._controller.history.flush)


def over(outcome: Future[Any]) -> asyncio.Future[Any]:
    """The end of a future, to wait for without its result."""
    waiting = asyncio.wrap_future(outcome)
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
    return waiting
