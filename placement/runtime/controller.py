"""The controller: makes each deployment match its declaration; nothing else changes deployments.

Every event (a call, a dead node, a restart, a timer) leads to the same loop: look, ask
:func:`placement.core.reconcile.reconcile` what to do, do it. Recovery uses the same loop.

This module has the changes that calls make. Releases (``releases``), what ends by itself (``lifetimes``), recovery
(``restart``) and queries (``queries``) are modules of their own.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from placement.core.lifecycle import State
from placement.core.snapshot import NEAR_LABELS
from placement.errors import (
    DeploymentConflict,
    GroupStands,
    PartlyApplied,
    PlacementError,
    UnknownDeployment,
    UnreadableRecord,
)
from placement.runtime import ledger
from placement.runtime.actions import Actions
from placement.runtime.demand import Demand
from placement.runtime.deployment_state import DeploymentState, Owner, expiry
from placement.runtime.discovery import NodeInfo
from placement.runtime.feed import Feed
from placement.runtime.fleet import Fleet
from placement.runtime.group_reconciler import GroupReconciler
from placement.runtime.history import History
from placement.runtime.leases import Lending
from placement.runtime.lifetimes import Lifetimes
from placement.runtime.membership import changed_with
from placement.runtime.observed import ObservedCluster
from placement.runtime.owners import belongs_to_another
from placement.runtime.queries import Queries
from placement.runtime.queue import WaitingQueue
from placement.runtime.reconciler import Reconciler, Work, differences
from placement.runtime.releases import Releases
from placement.runtime.restart import recall, restore
from placement.runtime.results import PlacementResult
from placement.runtime.settings import IDLE_SECONDS
from placement.runtime.state import ServiceState
from placement.runtime.sweeper import Sweeper
from placement.runtime.turns import Turns
from placement.wire.deployment import Deployment
from placement.wire.groups import Group
from placement.wire.measurements import Measurement
from placement.wire.node_types import NodeType
from placement.wire.requests import request_of, require_same_places

logger = logging.getLogger(__name__)


class Controller:
    """All that changes deployments. Thread-safe; every method may be called again at any time.

    Args:
        make_agent: creates (or finds) the node actor of a node.
        near: labels that have the same value on nodes near each other, widest first.
        idle_seconds: how long a node actor stays on a node that holds nothing.
        node_types: what the autoscaler can bring, as far as somebody has told.
        history: where events and decisions are kept.

    Attributes:
        state: what is declared and what is there.
        cluster: the nodes as they were last seen.
        fleet: the GPU nodes.
        feed: what happened.
        turns: one change of a deployment at a time.
        reconciler: reconciles deployments.
        group_reconciler: reconciles groups.
        queue: what waits for room.
        sweeper: removes placement groups that belong to no deployment.
        releases: gives back what deployments hold.
        lifetimes: ends deployments whose owner or time has ended.
        queries: answers questions that change nothing.
    """

    def __init__(
        self,
        make_agent: Callable[[NodeInfo], Any],
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
        node_types: Sequence[NodeType] = (),
        history: History | None = None,
    ) -> None:
        self.node_types = tuple(node_types)
        self.near, self.idle_seconds = tuple(near), max(1.0, idle_seconds)
        self.prefix = f"placement:{ledger.token()}:"
        self.state = ServiceState(lambda nodes: self.cluster.touch(nodes))
        self.fleet = Fleet(make_agent, self.state.holdings, self.prefix)
        self.cluster = ObservedCluster(self.state, self.fleet, self.near)
        self.history = history or History()
        self.feed = Feed(
            ledger.event_numbers(),
            ledger.save_event_numbers,
            self.state.deployments.__contains__,
            keep=self.history.add,
        )
        self.actions = Actions(self.state, self.fleet, self.feed)
        self.turns = Turns()
        self.reconciler = Reconciler(self.state, self.cluster, self.fleet, self.actions, self.feed)
        self.group_reconciler = GroupReconciler(self.reconciler)
        token = self.prefix.split(":")[1]
        demand = Demand(f"placement-demand:{token}:")
        self.queue = WaitingQueue(self.reconciler, self.turns, demand, self.node_types)
        self.sweeper = Sweeper(self.prefix, self.state, self.cluster, self.fleet, self.turns)
        self.releases = Releases(self.prefix, self.state, self.fleet, self.actions, self.turns, self.sweeper)
        self.lifetimes = Lifetimes(
            self.queue, self.reconciler, partial(self._reconcile, patient=False), self.releases, self.turns
        )
        self.reconciler.forget_removed = self.lifetimes.forget_removed
        self.queries = Queries(
            self.state, self.cluster, self.fleet, self.feed, self.queue, self.near, self.history
        )
        recall(self.history, self.feed)
        restore(self.state, self.cluster, self.fleet, self.actions, self.feed, self.releases, self.sweeper)

    # -- what callers want ---------------------------------------------------------------------------

    def place(
        self, wanted: Deployment, owner: Owner | None = None, lending: Lending | None = None
    ) -> PlacementResult:
        """Places all replicas of a deployment, or none; see the service."""
        with self.turns.sole(wanted.name):
            known = self.lifetimes.settled(wanted.name)
            if known is not None:
                if known.deployment != wanted:
                    raise DeploymentConflict(wanted.name, differences(known.deployment, wanted))
                if known.owner != owner:
                    raise belongs_to_another(known, owner)
                if lending is None or not known.missing():
                    return self._renewed(known).result()
                with self._refusal_told(wanted.name):  # its owner has removed some of its placement groups
                    work = Work(known, known, atomic=True, lending=lending)
                    return self.reconciler.bring_about(work).result()
            self._require_readable(wanted.name)
            with self._refusal_told(wanted.name):
                work = Work(None, _new(wanted, owner), atomic=True, strict=True, lending=lending)
                return self.reconciler.bring_about(work).result()

    def apply(self, wanted: Deployment, atomic: bool = False, owner: Owner | None = None) -> PlacementResult:
        """Declares a deployment, and places what fits now; see the service."""
        return self._apply(wanted, atomic, owner)[0]

    def _apply_group(
        self, wanted: Sequence[Deployment], atomic: bool, owners: Mapping[str, Owner | None]
    ) -> tuple[list[PlacementResult], bool]:
        """Applies all members of a group as one; returns whether the group is new.

        They are declared before any of them is placed, so that after a restart the service goes on with all of them.
        """
        group = wanted[0].group
        assert group is not None
        with self.turns.sole_all(sorted(group.members)):
            known = {one.name: self.lifetimes.settled(one.name) for one in wanted}
            if self.state.get(group.name) is not None:
                raise GroupStands(group.name, group.name, "a deployment of that name exists")
            group_placed = any(before.replicas for before in known.values() if before is not None)
            for one in wanted:
                before = known[one.name]
                if before is None:
                    self._require_readable(one.name)
                    continue
                if before.is_lease:
                    raise belongs_to_another(before, owners.get(one.name))
                require_same_places(before.deployment, one, bool(before.replicas), group_placed)
            self._require_nodes(wanted)
            fresh = [name for name, before in known.items() if before is None]
            try:
                for one in wanted:
                    self._declare_member(known[one.name], one, owners.get(one.name))
            except Exception:
                self._undeclare(fresh)
                raise
            refusal = self.group_reconciler.bring_about(group)
            if refusal is not None:
                self.feed.add(wanted[0].name, None, "refused", str(refusal))
            if refusal is not None and atomic:
                self._undeclare(fresh)
                raise refusal
            return [self.state.deployments[one.name].result() for one in wanted], len(fresh) == len(wanted)

    def _undeclare(self, names: Sequence[str]) -> None:
        """Releases members of a group that were declared just now. The caller has their turns."""
        try:
            self.releases.release_together([name for name in names if self.state.get(name) is not None])
        except Exception:  # the next look at the group finishes it
            logger.exception("%s could not be released again", ", ".join(map(repr, names)))

    def _declare_member(
        self, before: DeploymentState | None, wanted: Deployment, owner: Owner | None
    ) -> None:
        """Declares a member of a group, with its missing replicas waiting."""
        anew = _new(wanted, owner) if before is None else before.renewed(owner).declared(wanted)
        if anew is before:
            return
        waits = {**dict.fromkeys(anew.missing(), "its group is being placed"), **anew.reasons}
        self.actions.commit(anew.pending(waits, time.time()))
        if before is not None and before.deployment != wanted:
            self.feed.add(wanted.name, None, "changed", ", ".join(differences(before.deployment, wanted)))

    def _require_nodes(self, wanted: Sequence[Deployment]) -> None:
        """Raises ``UnknownNode`` if constraints name a node that does not exist."""
        nodes = self.cluster.nodes()
        self.cluster.read()
        with self.state.lock:
            snapshot = self.cluster.snapshot(nodes)
        for one in wanted:
            request_of(one, (), {}, snapshot)

    def _apply(self, wanted: Deployment, atomic: bool, owner: Owner | None) -> tuple[PlacementResult, bool]:
        """The same; also returns whether the deployment is new."""
        with self.turns.sole(wanted.name):
            known = self.lifetimes.settled(wanted.name)
            if known is None:
                self._require_readable(wanted.name)
                with self._refusal_told(wanted.name):
                    work = Work(None, _new(wanted, owner), atomic=atomic, strict=True)
                    return self.reconciler.bring_about(work).result(), True
            if known.is_lease:
                raise belongs_to_another(known, owner)
            require_same_places(known.deployment, wanted, bool(known.replicas))
            if known.deployment == wanted and known.owner == owner and not known.unfinished():
                return self._renewed(known).result(), False
            with self._refusal_told(wanted.name):
                anew = known.renewed(owner).declared(wanted)
                strict = known.deployment.shape() != wanted.shape()
                work = Work(known, anew, atomic=atomic, strict=strict)
                return self.reconciler.bring_about(work).result(), False

    def apply_all(
        self,
        wanted: Sequence[Deployment],
        atomic: bool = False,
        owners: Mapping[str, Owner | None] | None = None,
    ) -> list[PlacementResult]:
        """Applies several deployments; see the service."""
        results: dict[int, PlacementResult] = {}
        fresh: list[str] = []
        failures: dict[str, dict[str, Any]] = {}
        for position in self._in_order(wanted, atomic):
            one = wanted[position]
            if position in results or one.name in failures:  # with its group
                continue
            positions = [i for i, each in enumerate(wanted) if one.group and each.group == one.group] or [
                position
            ]
            try:
                if one.group is None:
                    results[position], is_new = self._apply(one, atomic, (owners or {}).get(one.name))
                else:
                    several, is_new = self._apply_group([wanted[i] for i in positions], atomic, owners or {})
                    results |= zip(positions, several, strict=True)
            except Exception as error:
                if not atomic and isinstance(error, PlacementError):
                    failures |= {wanted[i].name: error.to_dict() for i in positions}
                    continue
                self._release_again(fresh)
                raise
            if is_new and atomic:
                fresh.append(one.name)
        if failures:
            raise PartlyApplied(failures, tuple(wanted[i].name for i in sorted(results)))
        return [result for _, result in sorted(results.items())]

    def _release_again(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self.release(name)
            except Exception:
                logger.exception("%r was placed just now and could not be released again", name)

    def _in_order(self, wanted: Sequence[Deployment], atomic: bool) -> list[int]:
        """The order in which to apply them."""
        try:
            return [position for position, _ in self.queries.plan_in_order(wanted, atomic)]
        except PlacementError:
            if atomic:
                raise
            return list(range(len(wanted)))

    def record_measurements(self, measurements: Sequence[Measurement]) -> None:
        """Keeps measured rates of hosts; see the service."""
        for one in measurements:
            self.fleet.inventory.record_measurement(one)

    def forget_measurements(self, node: str | None) -> list[Measurement]:
        """Forgets the measured rates of a node, or of all; see the service."""
        return self.fleet.inventory.forget_measurements(node, self.cluster.nodes())

    def release(self, name: str) -> int:
        """Releases a deployment, or all members of a group; returns how many replicas that were.

        A group is released as one, by its name or that of any member.
        """
        names = changed_with(name, self.state.deployments)
        with self.turns.sole_all(names):
            return self.releases.release_together(names)

    def release_all(self) -> list[str]:
        """Releases every deployment; their names."""
        released = []
        for name in self.state.names():
            with contextlib.suppress(UnknownDeployment):  # somebody else released it first
                self.release(name)
                released.append(name)
        return released

    def renew(self, name: str) -> float | None:
        """Renews a deployment: its ``ttl_seconds`` start again now. Returns its end, in seconds since 1970."""
        with self.turns.sole(name):
            known = self.lifetimes.settled(name)
            if known is None:
                raise UnknownDeployment(name, self.state.names())
            return self._renewed(known).expires_at

    def _renewed(self, known: DeploymentState) -> DeploymentState:
        """The same with its ``ttl_seconds`` starting again now, if it has any."""
        expires_at = expiry(known.deployment)
        if expires_at is None:
            return known
        later = replace(known, expires_at=expires_at)
        self.actions.commit(later)
        return later

    # -- one deployment --------------------------------------------------------------------------------

    def _require_readable(self, name: str) -> None:
        record = self.state.unreadable.get(name)
        if record is not None:
            raise UnreadableRecord(name, record.problem, record.newer)

    @contextlib.contextmanager
    def _refusal_told(self, name: str) -> Iterator[None]:
        """Reports a refusal as an event, once nothing is left to try."""
        try:
            yield
        except Exception as refusal:
            self.feed.add(name, None, "refused", str(refusal))
            raise

    def reconcile(self, name: str, patient: bool = True) -> None:
        """Reconciles a deployment, as far as there is room.

        It does nothing while another change of it is under way: it will be called again.

        Args:
            name: of the deployment.
            patient: look again before replicas have to wait, since Ray's records lag.
        """
        with self.turns.sole_all(changed_with(name, self.state.deployments), wait=False) as mine:
            if mine:
                self._reconcile(name, patient)

    def _reconcile(self, name: str, patient: bool = True) -> None:
        known = self.state.get(name)
        if known is None:
            return
        if known.deployment.group is not None:
            self._reconcile_group(known.deployment.group)
            return
        if known.releasing or (known.is_lease and not known.replicas):
            self.releases.release(name)
            return
        self.reconciler.bring_about(Work(known, known, patient=patient))
        later = self.state.get(name)
        if later is not None and later.is_lease and not later.replicas:
            self.releases.release(name)

    def _reconcile_group(self, group: Group) -> None:
        """Reconciles a group, if there is room for all of it; of one that is not whole the rest is released."""
        known = [one for name in group.members if (one := self.state.get(name)) is not None]
        is_whole = len(known) == len(group.members)
        # Somebody who declared or released it was cut off; a record that cannot be read may be the other member's.
        is_part = not is_whole and self.state.unreadable.keys().isdisjoint(group.members)
        if is_part or any(one.releasing for one in known):
            self.releases.release_together([one.name for one in known])
        elif is_whole:
            self.group_reconciler.bring_about(group)

    # -- what the clock asks for ---------------------------------------------------------------------

    def stranded(self, alive: frozenset[str]) -> list[str]:
        """The deployments with a replica on a node that no longer exists."""
        dead = self.state.nodes() - alive
        return sorted({name for node in dead for name, _ in self.state.on_node(node)})

    def write_again(self) -> None:
        """Writes to the ledger what could not be written before."""
        for name in sorted(self.actions.unwritten):
            with self.turns.sole(name, wait=False) as mine:
                if mine:
                    self.actions.write_back(name)

    def stop_idle_agents(self) -> None:
        """Ends the actors of nodes that hold nothing, so that they can be scaled down; drops old data."""
        awaited = self.queue.awaited_nodes()
        for node_id in self.fleet.agents.idle(self.idle_seconds):
            in_use = self.state.holds(node_id) or node_id in awaited
            if not in_use and not self.fleet.inventory.is_asked(node_id):
                self.fleet.agents.stop_idle(node_id, self.idle_seconds)
        self.releases.forget_answers()


def _new(wanted: Deployment, owner: Owner | None) -> DeploymentState:
    """A new deployment."""
    states = dict.fromkeys(range(wanted.replicas), State.PENDING)
    return DeploymentState(wanted, states=states, owner=owner, expires_at=expiry(wanted))
