"""The typed client: for editors, type checkers, and callers that own what they place.

Each method calls the service's method of the same name, and returns its answer, or raises its error.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from placement.core.snapshot import NEAR_LABELS
from placement.runtime.borrowing import Borrower
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
from placement.runtime.connection import ask, ask_or_abandon, caller
from placement.runtime.results import PlacementResult
from placement.runtime.settings import HISTORY_DAYS, HISTORY_MIB, IDLE_SECONDS
from placement.wire.plans import PlacementPlan


class Client(Connected):
    """The placement service of the connected cluster, for code that may block.

    Args:
        service: the service's actor handle; the running service if left out.

    Raises:
        RuntimeError: Ray is not connected; call ``ray.init(address="auto")`` first.
        ServiceNotRunning: it was not started; :meth:`start` does that. Every method raises it once the service is
            stopped.
    """

    def __init__(self, service: ActorHandle | None = None) -> None:
        super().__init__(service)
        self._borrower = Borrower(self._handle)

    @classmethod
    def start(
        cls,
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
        node_types: str | Path | None = None,
        history_days: float = HISTORY_DAYS,
        history_mib: float = HISTORY_MIB,
    ) -> Client:
        """The same, with the service started if need be; see :func:`placement.start`."""
        from placement.runtime import bootstrap  # all of the service, which its other clients need not import

        return cls(bootstrap.start(near, idle_seconds, node_types, history_days, history_mib))

    def place(
        self,
        deployment: DeploymentLike,
        constraints: Constraints = None,
        wait_seconds: float = 0.0,
        *,
        owner: ActorHandle | None = None,
    ) -> PlacementResult:
        """Places all replicas of a deployment, or none. Placing an identical deployment again returns the existing
        result; replicas of it that wait are ``pending``.

        With ``owner: caller`` in the deployment this process creates the placement groups, and Ray removes them when
        it ends, however it ends. (If this process is a normal actor, its driver must have ended, too; if it is
        connected through ``ray://``, once Ray no longer expects it to come back, which is 30 s after it was killed.) On
        Ctrl-C, the request is given up.

        Args:
            deployment: a :class:`~placement.Deployment`, or a mapping of its fields.
            constraints: limits the choice of nodes; replaces ``deployment.constraints``.
            wait_seconds: how long it may wait for room.
            owner: an actor whose end ends the deployment.

        Raises:
            InvalidDeployment: a field is refused.
            UnknownNode: the constraints name a node that the cluster lacks.
            UnreadableRecord: the ledger has a record of that name that the service cannot read.
            DeploymentConflict: the name is in use with another declaration.
            Unplaceable: no room was found in time: ``NoGpuNodes``, ``NotEnoughGpus``, ``BelowFloor``,
                ``NoEgressNodes``, ``NotEnoughEgress`` or ``NoCpuNodes``.
            ReservationFailed: others kept taking the GPUs.
            LeaseExpired: this process was too slow to create a group, twice; or the actor ``owner`` has ended. In every
                case nothing of it stays reserved.
            Busy: the service has reached its limit of calls under way.
        """
        who = caller(owner)
        if is_lease(deployment, owner):
            return self._borrower.borrow(deployment, constraints, wait_seconds, who)
        place = self._handle.place
        return ask_or_abandon(place.remote(deployment, constraints, wait_seconds, caller=who))

    def apply(
        self,
        deployment: DeploymentLike,
        constraints: Constraints = None,
        *,
        atomic: bool = False,
        owner: ActorHandle | None = None,
    ) -> PlacementResult:
        """Stores the declaration, and makes the cluster match it. Replicas that find no room are ``pending``.

        With ``owner: caller`` in the deployment it is all or nothing, since the service could not create the groups
        later.

        Args:
            deployment: a :class:`~placement.Deployment`, or a mapping of its fields.
            constraints: limits the choice of nodes; replaces ``deployment.constraints``.
            atomic: place all replicas, also those that were pending before, or change nothing.
            owner: an actor whose end ends the deployment.

        Raises:
            InvalidDeployment, UnknownNode, UnreadableRecord, Busy: as :meth:`place`; nothing is changed.
            Unplaceable, ReservationFailed: only with ``atomic``, or with ``owner: caller``.
        """
        who = caller(owner)
        if is_lease(deployment, owner):
            return self._borrower.borrow(deployment, constraints, 0.0, who)
        return ask(self._handle.apply.remote(deployment, constraints, atomic, caller=who))

    def apply_all(
        self, deployments: Sequence[DeploymentLike], *, atomic: bool = False
    ) -> list[PlacementResult]:
        """Applies several deployments; with ``atomic`` all of them, or none if one does not fit.

        The members of a group (:meth:`placement.Group.of`) are placed all at once, or all of them wait.

        Raises:
            PartlyApplied: some could not be applied, the others were.
            Unplaceable, ReservationFailed: only with ``atomic``.
        """
        return ask(self._handle.apply_all.remote(deployments, atomic, caller=caller()))

    def plan(
        self, deployment: DeploymentLike, constraints: Constraints = None, *, atomic: bool = False
    ) -> PlacementPlan:
        """What :meth:`apply` would do now. Reserves nothing.

        Raises:
            Same as :meth:`apply`, but never ``ReservationFailed``.
        """
        return ask(self._handle.plan.remote(deployment, constraints, atomic))

    def plan_all(self, deployments: Sequence[DeploymentLike], *, atomic: bool = False) -> list[PlacementPlan]:
        """What :meth:`apply_all` would do now, each deployment planned on top of the ones before."""
        return ask(self._handle.plan_all.remote(deployments, atomic))

    def get(self, name: str) -> PlacementResult:
        """Where a deployment's replicas are.

        Raises:
            UnknownDeployment: no deployment of that name exists.
        """
        return ask(self._handle.get.remote(name))

    def describe(self, name: str) -> dict[str, Any]:
        """A deployment's declaration, its replicas, owner and age; JSON-ready.

        Raises:
            UnknownDeployment: no deployment of that name exists.
        """
        return ask(self._handle.describe.remote(name))

    def members(self, name: str) -> list[str]:
        """The deployments that a name means: the members of the group of that name, or the one of that name.

        Raises:
            UnknownDeployment: neither exists.
        """
        return ask(self._handle.members.remote(name))

    def wait(self, name: str, timeout_seconds: float | None = None) -> PlacementResult:
        """Where a deployment's replicas are, as soon as none of them is pending, or when the time is over.

        Args:
            name: the deployment.
            timeout_seconds: how long to wait; without limit if left out.

        Raises:
            UnknownDeployment: no deployment of that name exists, or it was released meanwhile.
        """
        waiting = Waiting(timeout_seconds)
        while True:
            result = ask_or_abandon(self._handle.wait.remote(name, waiting.next_seconds()))
            if waiting.is_over():
                return result

    def renew(self, name: str) -> float | None:
        """Renews a deployment with ``ttl_seconds``: its time starts again now. Placing or applying it again does the
        same.

        Returns:
            Until when, in seconds since 1970; ``None`` if it has no such limit.

        Raises:
            UnknownDeployment: no deployment of that name exists.
        """
        return ask(self._handle.renew.remote(name))

    def release(self, name: str) -> int:
        """Gives back everything that a deployment holds, and ends the workers in its groups.

        The members of a group are released together, by the group's name or that of any member.

        Returns:
            How many replicas were released.

        Raises:
            UnknownDeployment: no deployment of that name exists.
            UnreadableRecord: a later version of the service wrote its record.
        """
        return ask(self._handle.release.remote(name, caller=caller()))

    def release_all(self) -> list[str]:
        """Releases every deployment.

        Returns:
            Their names.
        """
        return ask(self._handle.release_all.remote(caller=caller()))

    def status(
        self, node: str | None = None, deployment: str | None = None, state: str | None = None
    ) -> Status:
        """Nodes with their GPUs and the replicas on them, and deployments with their replicas; JSON-ready.

        Args:
            node: only this node, by its name, id or address.
            deployment: only this deployment, or the members of this group.
            state: only deployments with a replica that is ``placed``, ``pending``, ``lost`` or ``releasing``.
        """
        return ask(self._handle.status.remote(node, deployment, state))

    def events(self, name: str | None = None, since: int = 0) -> list[Event]:
        """What happened lately, to one deployment, to the members of a group, or to all, oldest first.

        Args:
            name: the deployment, or the group, which may be gone by now.
            since: the ``number`` of the last event already known.

        Raises:
            UnknownDeployment: nothing is known of that name.
        """
        return ask(self._handle.events.remote(name, since))

    def watch(
        self, since: int = 0, names: Sequence[str] | None = None, timeout_seconds: float = WATCH_SECONDS
    ) -> list[Event]:
        """Events after ``since``, as soon as there is one; empty if nothing happened in time.

        Args:
            since: the ``number`` of the last event already known; with 0 all that are known come at once. Where events
                after it are not kept any more, the first one says so: its state is ``gap``.
            names: only those of these deployments, which need not be known yet, and of the members of these groups.
            timeout_seconds: how long to wait.
        """
        watch = self._handle.watch
        return ask_or_abandon(watch.remote(since=since, names=names, timeout_seconds=timeout_seconds))

    def follow(self, names: Sequence[str] | None = None, since: int = 0) -> Iterator[Event]:
        """Events as they happen, without end, each once, also across restarts of the service; see :meth:`watch`.

        A group is followed to its end.
        """
        while True:
            found = self.watch(since, names)
            names = heard_of(names, found)
            for event in found:
                since = event["number"]
                yield event

    def history(
        self,
        names: Sequence[str] | None = None,
        *,
        since: int = 0,
        earliest: float = 0.0,
        follow: bool = False,
    ) -> Iterator[Entry]:
        """Events and decisions of the last days, oldest first, also of before the service last started.

        Args:
            names: only those about these deployments, and the members of these groups.
            since: the ``number`` of the last entry already known.
            earliest: only those of this time or later, in seconds since 1970.
            follow: go on without end, with what happens as it does.
        """
        while True:
            page = ask(self._handle.history.remote(since, names, earliest))
            yield from page["entries"]
            names, since = heard_of(names, page["entries"]), page["last"]
            if not page["more"]:
                if not follow:
                    return
                time.sleep(FOLLOW_SECONDS)

    def topology(self, node: str | None = None) -> list[dict[str, Any]]:
        """The facts of each GPU node's GPUs, read now; JSON-ready.

        Raises:
            UnknownNode: no GPU node has that id, name or address.
        """
        return ask(self._handle.topology.remote(node))

    def forget_measurements(self, node: str | None = None) -> list[dict[str, Any]]:
        """Forgets the measured rates of a node, or of all hosts; GPUs are then chosen by other rates, or by
        predictions.

        Args:
            node: its id, name or address, or the name of a host that is no longer a node. ``None`` for all hosts.

        Returns:
            The forgotten rates, as ``placement measure --export`` writes them; empty if the node had none.
        """
        return ask(self._handle.forget_measurements.remote(node))

    def snapshot(self) -> dict[str, Any]:
        """The cluster as the planner sees it now; JSON-ready, for ``placement plan --file``."""
        return ask(self._handle.snapshot.remote())

    def ping(self) -> str:
        """The version of the package that the service runs."""
        return ask(self._handle.ping.remote())
