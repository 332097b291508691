"""The controller: brings each deployment from what is there to what is declared, and is the only one to change it.

Whatever happens (a call, a node that died, a kill, a while that passed) ends in the same loop: look, ask
:func:`placement.core.reconcile.reconcile` what to do, do it. What a death left behind is dealt with in this way, too.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

from placement.core.lifecycle import State
from placement.core.simulation import fragmentation
from placement.core.snapshot import NEAR_LABELS, Snapshot
from placement.errors import (
    DeploymentConflict,
    GroupStands,
    PartlyApplied,
    PlacementError,
    UnknownDeployment,
    UnknownNode,
    Unplaceable,
    UnreadableRecord,
)
from placement.runtime import faults, groups, ledger, metrics
from placement.runtime.actions import Actions
from placement.runtime.demand import Demand
from placement.runtime.discovery import NodeInfo
from placement.runtime.feed import Event, Feed
from placement.runtime.fleet import Fleet
from placement.runtime.leases import Lending
from placement.runtime.observed import ObservedCluster
from placement.runtime.owners import has_ended
from placement.runtime.queue import WaitingQueue
from placement.runtime.reconciler import Reconciler, Work, differences
from placement.runtime.report import Observed as Seen
from placement.runtime.report import cluster_status, measured_report, topology_report
from placement.runtime.results import PlacementResult
from placement.runtime.state import DeploymentState, Owner, ServiceState, expiry
from placement.runtime.sweeper import Sweeper
from placement.runtime.turns import Turns
from placement.wire.cluster import ClusterFile
from placement.wire.deployment import Deployment
from placement.wire.dry_run import explain_deployments, plan_in_order
from placement.wire.groups import Group
from placement.wire.held import HeldDeployment
from placement.wire.measurements import Measurement
from placement.wire.node_types import NodeType
from placement.wire.plans import ExplainedPlan, PlacementPlan
from placement.wire.requests import mix_of, request_of, request_unchecked, require_same_places

MAX_REPLANS = 5
"""How often a plan is made anew that nodes refused, since others act meanwhile."""
IDLE_SECONDS = 60.0
"""How long a node's actor stays where nothing is held: to Ray's autoscaler, which removes nodes that were idle for
minutes, a node with an actor is busy."""
STATUS_SECONDS = 5.0
"""How long ``status`` waits for nodes that have not said yet what their GPUs are."""
OWNER_ENDED = "its owner has ended"
ENDED_SECONDS = 60.0
"""How long it is remembered what a release gave back; Ray sends a call again within seconds of a restart."""

logger = logging.getLogger(__name__)


class Controller:
    """All that changes deployments. Thread-safe; every method may be called again at any time.

    Args:
        make_agent: creates (or finds) the node actor of a node.
        near: labels of which nodes near each other share the values, widest first.
        idle_seconds: how long a node actor stays on a node that holds nothing.
        node_types: what the autoscaler can bring, as far as somebody has told.

    Attributes:
        state: what is declared and what is there.
        cluster: the nodes as they were last seen.
        fleet: the nodes' actors.
        feed: what happened.
        turns: one change of a deployment at a time.
        reconciler: what brings deployments about.
        queue: what waits for room.
        sweeper: what removes groups that no deployment knows of.
    """

    def __init__(
        self,
        make_agent: Callable[[NodeInfo], Any],
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
        node_types: Sequence[NodeType] = (),
    ) -> None:
        self.node_types = tuple(node_types)
        self.near, self.idle_seconds = tuple(near), max(1.0, idle_seconds)
        self.prefix = f"placement:{ledger.token()}:"
        self.state = ServiceState(lambda nodes: self.cluster.touch(nodes))
        self.fleet = Fleet(make_agent, self.state.holdings, self.prefix)
        self.cluster = ObservedCluster(self.state, self.fleet, self.near)
        self.feed = Feed(
            ledger.event_numbers(), ledger.save_event_numbers, self.state.deployments.__contains__
        )
        self.actions = Actions(self.state, self.fleet, self.feed)
        self.turns = Turns()
        self.reconciler = Reconciler(self.state, self.cluster, self.fleet, self.actions, self.feed)
        token = self.prefix.split(":")[1]
        demand = Demand(f"placement-demand:{token}:")
        self.queue = WaitingQueue(self.reconciler, self.turns, demand, self.node_types)
        self.sweeper = Sweeper(self.prefix, self.state, self.cluster, self.fleet, self.turns)
        self._ended: dict[str, int] = {}
        self._ended_at: dict[str, float] = {}
        self._restore()

    # -- what callers want ---------------------------------------------------------------------------

    def place(
        self, wanted: Deployment, owner: Owner | None = None, lending: Lending | None = None
    ) -> PlacementResult:
        """Places all replicas of a deployment, or none; see the service."""
        with self.turns.sole(wanted.name):
            known = self._known(wanted.name)
            if known is not None:
                if known.deployment != wanted:
                    raise DeploymentConflict(wanted.name, differences(known.deployment, wanted))
                if known.owner != owner:
                    raise _others(known, owner)
                if lending is None or not known.missing():
                    return self._renewed(known).result()
                with self._refusal_told(wanted.name):  # its owner has removed some of its groups
                    work = Work(known, known, atomic=True, lending=lending)
                    return self.reconciler.bring_about(work).result()
            self._require_readable(wanted.name)
            with self._refusal_told(wanted.name):
                new = _new(wanted, owner)
                try:
                    return self._place(new, lending)
                except Unplaceable:
                    if not self._forget_removed():
                        raise
                return self._place(new, lending)

    def _place(self, new: DeploymentState, lending: Lending | None) -> PlacementResult:
        work = Work(None, new, atomic=True, strict=True, lending=lending)
        return self.reconciler.bring_about(work).result()

    def apply(self, wanted: Deployment, atomic: bool = False, owner: Owner | None = None) -> PlacementResult:
        """Declares a deployment, and does what can be done for it now; see the service."""
        return self._apply(wanted, atomic, owner)[0]

    def _apply_group(
        self, wanted: Sequence[Deployment], atomic: bool, owners: Mapping[str, Owner | None]
    ) -> tuple[list[PlacementResult], bool]:
        """Applies all members of a group as one; whether nothing of it was there before.

        They are declared before any of them is placed, so that a service that dies in between goes on with all of it.
        """
        group = wanted[0].group
        assert group is not None
        with self._sole(sorted(group.members)):
            known = {one.name: self._known(one.name) for one in wanted}
            if self.state.get(group.name) is not None:
                raise GroupStands(group.name, group.name, "a deployment of that name is there")
            for one in wanted:
                before = known[one.name]
                if before is None:
                    self._require_readable(one.name)
                    continue
                if before.is_lease:
                    raise _others(before, owners.get(one.name))
                require_same_places(before.deployment, one, bool(before.replicas))
            self._require_nodes(wanted)
            fresh = [name for name, before in known.items() if before is None]
            try:
                for one in wanted:
                    self._declare_member(known[one.name], one, owners.get(one.name))
            except Exception:
                self._release_again(fresh)
                raise
            refusal = self.reconciler.bring_group_about(group)
            if refusal is not None:
                self.feed.add(wanted[0].name, None, "refused", str(refusal))
            if refusal is not None and atomic:
                for name in fresh:
                    self._release(name)
                raise refusal
            return [self.state.deployments[one.name].result() for one in wanted], len(fresh) == len(wanted)

    def _declare_member(
        self, before: DeploymentState | None, wanted: Deployment, owner: Owner | None
    ) -> None:
        """Has a member of a group be declared, its missing replicas waiting."""
        anew = _new(wanted, owner) if before is None else before.renewed(owner).declared(wanted)
        if anew is before:
            return
        waits = {**dict.fromkeys(anew.missing(), "its group is about to be placed"), **anew.reasons}
        self.actions.commit(anew.pending(waits, time.time()))
        if before is not None and before.deployment != wanted:
            self.feed.add(wanted.name, None, "changed", ", ".join(differences(before.deployment, wanted)))

    def _require_nodes(self, wanted: Sequence[Deployment]) -> None:
        """Raises ``UnknownNode`` if constraints name a node that is not there."""
        nodes = self.cluster.nodes()
        self.cluster.read()
        with self.state.lock:
            snapshot = self.cluster.snapshot(nodes)
        for one in wanted:
            request_of(one, (), {}, snapshot)

    @contextlib.contextmanager
    def _sole(self, names: Sequence[str], wait: bool = True) -> Iterator[bool]:
        """The turn of several deployments, in the order of their names; whether all is ours to change."""
        with contextlib.ExitStack() as stack:
            yield all([stack.enter_context(self.turns.sole(name, wait)) for name in sorted(names)])

    def _members(self, name: str) -> list[str]:
        """The members of the group that goes by that name, or that a deployment of that name is a member of.

        Just the name, if there is no such group.
        """
        known = self.state.get(name)
        if known is not None:
            group = known.deployment.group
        else:
            groups = (one.deployment.group for one in self.state.all())
            group = next((one for one in groups if one is not None and one.name == name), None)
        return sorted(group.members) if group is not None else [name]

    def _apply(self, wanted: Deployment, atomic: bool, owner: Owner | None) -> tuple[PlacementResult, bool]:
        """The same, and whether nothing of that name was there before."""
        with self.turns.sole(wanted.name):
            known = self._known(wanted.name)
            if known is None:
                self._require_readable(wanted.name)
                with self._refusal_told(wanted.name):
                    work = Work(None, _new(wanted, owner), atomic=atomic, strict=True)
                    return self.reconciler.bring_about(work).result(), True
            if known.is_lease:
                raise _others(known, owner)
            require_same_places(known.deployment, wanted, bool(known.replicas))
            if known.deployment == wanted and known.owner == owner and not known.unfinished():
                return self._renewed(known).result(), False
            with self._refusal_told(wanted.name):
                anew = known.renewed(owner).declared(wanted)
                strict = known.deployment.shape() != wanted.shape()
                may_wait = frozenset(known.missing() if strict else known.unfinished())
                work = Work(known, anew, atomic=atomic, strict=strict, may_wait=may_wait)
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
                logger.exception("%r, which was placed just now, could not be released again", name)

    def _in_order(self, wanted: Sequence[Deployment], atomic: bool) -> list[int]:
        """The order in which to apply them."""
        try:
            return [position for position, _ in self.plan_in_order(wanted, atomic)]
        except PlacementError:
            if atomic:
                raise
            return list(range(len(wanted)))

    def plan_in_order(self, wanted: Sequence[Deployment], atomic: bool) -> list[tuple[int, PlacementPlan]]:
        """What applying these would do, in the order in which to apply them; each with its position."""
        return self.cluster.patiently(
            lambda nodes, lag_seconds, fresh: plan_in_order(*self._look(wanted), wanted, atomic=atomic)
        )

    def plan_all(self, wanted: Sequence[Deployment], atomic: bool = False) -> list[PlacementPlan]:
        """What applying these would do; see the service."""
        for one in wanted:
            known = self.state.get(one.name)
            if known is not None and known.is_lease and not known.releasing:
                raise _others(known, None)
        return [plan for _, plan in sorted(self.plan_in_order(wanted, atomic), key=itemgetter(0))]

    def explain_all(self, wanted: Sequence[Deployment]) -> list[ExplainedPlan]:
        """The same, with what became of every node."""
        return explain_deployments(*self._look(wanted), wanted)

    def _look(self, wanted: Iterable[Deployment]) -> tuple[Snapshot, dict[str, HeldDeployment]]:
        return self.cluster.look(request_unchecked(one, (), {}) for one in wanted)

    def snapshot(self) -> ClusterFile:
        """The cluster as the planner sees it now."""
        snapshot, held = self.cluster.look()
        return ClusterFile.of(snapshot, held.values())

    def status(
        self, node: str | None = None, deployment: str | None = None, state: str | None = None
    ) -> dict[str, Any]:
        """What there is and who holds it; see the service."""
        nodes = self.cluster.nodes()
        self.fleet.inventory.refresh(nodes, patience_seconds=STATUS_SECONDS)
        return cluster_status(self._seen(nodes), node, deployment, state)

    def readings(self) -> dict[metrics.Series, float]:
        """What the gauges say now. No node is asked for it, nor its actor started."""
        nodes, now = self.cluster.nodes(), time.time()
        seen = self._seen(nodes)
        self.cluster.read()
        with self.state.lock:
            snapshot = self.cluster.snapshot(nodes)
        declared, queue = self.state.all(), set(seen.queue)
        mix = mix_of(snapshot, [one.deployment for one in declared])
        waiting = {
            "deployment": [one.waiting_since or now for one in declared if one.name in queue],
            "call": [ticket.since for ticket in self.queue.tickets.all()],
        }
        topologies = {info.id: self.fleet.inventory.hardware(info).topology for info in nodes}
        fragmented = fragmentation(snapshot.changed((), mix))[1]
        return metrics.readings(cluster_status(seen), topologies, waiting, fragmented, now)

    def _seen(self, nodes: list[NodeInfo]) -> Seen:
        available = groups.available_resources()
        for node_id in self.fleet.lagging():
            available.pop(node_id, None)
        deployments = self.state.deployments.copy()
        return Seen(
            nodes,
            deployments,
            self.fleet.inventory.hardware,
            self.fleet.inventory.facts,
            self.fleet.foreign,
            available,
            self.state.unreadable.copy(),
            self.cluster.draining,
            self.cluster.dead(),
            [name for name in self.state.queue() if name in deployments and not deployments[name].releasing],
            self.queue.demand.report(),
            near=self.near,
        )

    def topology(self, node: str | None) -> list[dict[str, Any]]:
        """What the GPUs of each node report, read anew; see the service."""
        nodes = [info for info in self.cluster.nodes() if info.gpu_count]
        if node is not None:
            chosen = [info for info in nodes if node in (info.id, info.name, info.address)]
            if not chosen:
                raise UnknownNode("--node", node, tuple(info.name for info in nodes))
            nodes = chosen
        inventory = self.fleet.inventory
        inventory.refresh(nodes, again=True)
        found = []
        for info in nodes:
            hardware = inventory.hardware(info)
            own = inventory.measurements.of(info.name, hardware)
            measured = measured_report(hardware.topology, own)
            found.append(topology_report(info, inventory.facts.get(info.id), measured))
        return found

    def record_measurements(self, measurements: Sequence[Measurement]) -> None:
        """Keeps what was measured on hosts; see the service."""
        for one in measurements:
            self.fleet.inventory.record_measurement(one)

    def release(self, name: str) -> int:
        """Gives back everything that a deployment holds, or all members of a group; how many replicas that were.

        A group ends as one, by its name or by that of any member.
        """
        names = self._members(name)
        with self._sole(names):
            return self._release_members(names)

    def _release_members(self, names: Sequence[str]) -> int:
        """Releases deployments as one: from here on all of them go, whatever happens."""
        if len(names) > 1:
            for name in names:
                known = self.state.get(name)
                if known is not None and not known.releasing:
                    self.actions.commit(replace(known, releasing=True))
            names = [name for name in names if self.state.get(name) is not None]
        return sum(self._release(name) for name in names)

    def release_all(self) -> list[str]:
        """Releases every deployment; their names."""
        released = []
        for name in self.state.names():
            with contextlib.suppress(UnknownDeployment):  # somebody else was quicker
                self.release(name)
                released.append(name)
        return released

    def get(self, name: str) -> DeploymentState:
        """What is known of a deployment.

        Raises:
            UnknownDeployment: nothing is.
        """
        known = self.state.get(name)
        if known is None:
            raise UnknownDeployment(name, self.state.names())
        return known

    def members(self, name: str) -> list[str]:
        """The deployments that a name means; see the service."""
        names = [name] if self.state.get(name) is not None else self._members(name)
        found = [one for one in names if self.state.get(one) is not None]
        if not found:
            raise UnknownDeployment(name, self.state.names())
        return found

    def events(self, name: str | None, since: int) -> list[Event]:
        """What happened to a deployment, or to all; see the service."""
        if name is not None and not self.feed.known(name) and self.state.get(name) is None:
            raise UnknownDeployment(name, self.state.names())
        return self.feed.since(since, None if name is None else (name,))

    def renew(self, name: str) -> float | None:
        """Has a deployment stand for its ``ttl_seconds`` from now on; until when, in seconds since 1970."""
        with self.turns.sole(name):
            known = self._known(name)
            if known is None:
                raise UnknownDeployment(name, self.state.names())
            return self._renewed(known).expires_at

    def _renewed(self, known: DeploymentState) -> DeploymentState:
        """The same with all its ``ttl_seconds`` before it, if it has any."""
        expires_at = expiry(known.deployment)
        if expires_at is None:
            return known
        later = replace(known, expires_at=expires_at)
        self.actions.commit(later)
        return later

    # -- one deployment --------------------------------------------------------------------------------

    def _known(self, name: str) -> DeploymentState | None:
        """What is to be changed; a release that was cut off comes first, and what nobody has noticed of its owner."""
        known = self.state.get(name)
        if known is not None and known.releasing:
            self._release(name)
            return None
        if known is not None and known.owner is not None:
            if has_ended(known.owner):
                self.feed.add(name, None, "ended", OWNER_ENDED)
                self._release(name)
            elif known.is_lease:
                self._forget_gone(known)
            return self.state.get(name)
        return known

    def _forget_gone(self, lease: DeploymentState) -> None:
        """Forgets of a lease what its owner has removed, or what ended with him; in its turn."""
        gone = _lost_groups(lease)
        if not gone and lease.replicas:
            return
        self.reconciler.gone |= gone
        try:
            self._reconcile(lease.name, patient=False)
        finally:
            self.reconciler.gone -= gone

    def _require_readable(self, name: str) -> None:
        record = self.state.unreadable.get(name)
        if record is not None:
            raise UnreadableRecord(name, record.problem, record.newer)

    @contextlib.contextmanager
    def _refusal_told(self, name: str) -> Iterator[None]:
        """Has those who watch a deployment hear of a refusal, once nothing is left to try."""
        try:
            yield
        except Exception as refusal:
            self.feed.add(name, None, "refused", str(refusal))
            raise

    def reconcile(self, name: str, patient: bool = True) -> None:
        """Brings a deployment to what is declared, as far as there is room.

        Not while something else happens to it: then there will be another time.

        Args:
            name: of the deployment.
            patient: look again before replicas have to wait, since Ray's books lag.
        """
        with self._sole(self._members(name), wait=False) as mine:
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
            self._release(name)
            return
        self.reconciler.bring_about(Work(known, known, patient=patient))
        later = self.state.get(name)
        if later is not None and later.is_lease and not later.replicas:
            self._release(name)

    def _reconcile_group(self, group: Group) -> None:
        """Brings a group to what is declared, as far as there is room for all of it."""
        known = [one for name in group.members if (one := self.state.get(name)) is not None]
        if any(one.releasing for one in known):
            self._release_members([one.name for one in known])
        elif len(known) == len(group.members):
            self.reconciler.bring_group_about(group)

    # -- giving back ---------------------------------------------------------------------------------

    def _release(self, name: str) -> int:
        """Releases a deployment of which we are the only one to change it; goes on with one that was cut off."""
        if name in self.state.unreadable:
            return self._release_unreadable(name)
        known = self.state.get(name)
        if known is None and name in self._ended:  # this call was cut off, and sent again
            return self._ended.pop(name)
        if known is None:
            raise UnknownDeployment(name, self.state.names())
        if not known.releasing:
            known = replace(known, releasing=True)
            self.actions.commit(known)  # from here on it goes, whatever happens
            self._ended.pop(name, None)
        faults.point("service.releasing")
        count = self._ended.setdefault(name, len(known.replicas))
        self.actions.release(known, list(known.states))
        ledger.note_ended(name, count)
        ledger.delete(name)
        faults.point("service.ended")
        with self.state.lock:
            self.state.drop(name)
            del self._ended[name]
            self._ended_at[name] = time.monotonic()
        self.actions.unwritten.discard(name)
        self.fleet.recorded(name)
        return count

    def _release_unreadable(self, name: str) -> int:
        """Removes a record that makes no sense, and all groups of that name."""
        record = self.state.unreadable[name]
        if record.newer:
            raise UnreadableRecord(name, record.problem, newer=True)
        held = groups.live_groups(lambda group: group.startswith(f"{self.prefix}{name}:"))
        for group_id, group in held.items():
            self.sweeper.remove(group_id, group)
        ledger.delete(name)
        del self.state.unreadable[name]
        self.fleet.recorded(name)
        return len(held)

    # -- what the clock asks for ---------------------------------------------------------------------

    def stranded(self, alive: frozenset[str]) -> list[str]:
        """The deployments with a replica on a node that is no more."""
        dead = self.state.nodes() - alive
        return sorted({name for node in dead for name, _ in self.state.on_node(node)})

    def write_again(self) -> None:
        """Has the ledger say what it could not be told before."""
        for name in sorted(self.actions.unwritten):
            with self.turns.sole(name, wait=False) as mine:
                if mine:
                    self.actions.write_back(name)

    def stop_idle_agents(self) -> None:
        """Ends the actors of nodes that hold nothing, so that they can be scaled down; forgets what nobody asks for."""
        awaited = self.queue.awaited_nodes()
        for node_id in self.fleet.agents.idle(self.idle_seconds):
            in_use = self.state.holds(node_id) or node_id in awaited
            if not in_use and not self.fleet.inventory.is_asked(node_id):
                self.fleet.agents.stop_idle(node_id, self.idle_seconds)
        now = time.monotonic()
        for name in [name for name, at in self._ended_at.copy().items() if now - at > ENDED_SECONDS]:
            with self.turns.sole(name, wait=False) as mine:
                if mine and now - self._ended_at[name] > ENDED_SECONDS:
                    ledger.forget_ended(name)
                    del self._ended_at[name]
                    self._ended.pop(name, None)

    def end_what_is_over(
        self,
        has_ended: Callable[[Owner], bool],
        now: float,
        begin: Callable[[str, Callable[[], None]], object] = lambda name, do: do(),
    ) -> None:
        """Releases what outlived its owner or its time; gives up what has waited for longer than it wants.

        Args:
            has_ended: whether an owner is no more.
            now: seconds since 1970.
            begin: does something to a deployment that takes as long as its nodes take to answer.
        """
        self.queue.end_what_is_for_nobody()
        for one in self.state.temporary():
            ended = one.owner is not None and has_ended(one.owner)
            expired = one.expires_at is not None and one.expires_at <= now
            late = (
                one.deployment.deadline_seconds is not None
                and one.waiting_since is not None
                and now - one.waiting_since > one.deployment.deadline_seconds
                and not one.given_up
                and not one.is_lease
            )
            if ended or expired or late:
                why = OWNER_ENDED if ended else "its time is over" if expired else ""
                begin(one.name, partial(self._end, one.name, why))
            elif one.is_lease and (not one.replicas or _lost_groups(one)):  # if its end was cut off, or is
                begin(one.name, partial(self._end_gone, one))

    def _forget_removed(self) -> bool:
        """Forgets what the owners of leases have removed since the clock last looked; whether there was anything."""
        removed = [one for one in self.state.temporary() if one.is_lease and _lost_groups(one)]
        for lease in removed:
            self._end_gone(lease)
        return bool(removed)

    def _end_gone(self, lease: DeploymentState) -> None:
        with self.turns.sole(lease.name, wait=False) as mine:
            if mine and self.state.get(lease.name) is lease:
                self._forget_gone(lease)

    def _end(self, name: str, why: str) -> None:
        names = self._members(name)
        with self._sole(names, wait=False) as mine:
            known = self.state.get(name)
            if not mine or known is None:
                return
            if not why:
                seconds = known.deployment.deadline_seconds
                why = f"there was no room for {seconds:g} s"
                if known.replicas:
                    reasons = {index: f"given up: {why}; apply it again to try" for index in known.reasons}
                    later = replace(known.pending(reasons, time.time()), given_up=True)
                    self.actions.note(later)
                    for index, reason in reasons.items():
                        self.feed.add(name, index, "given up", reason)
                    return
            self.feed.add(name, None, "ended", why)
            self._release_members(names)

    # -- after a death -------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Reads the ledger, drops what is gone, ends what was cut off, and removes what is in no record."""
        for record in ledger.records():
            try:
                if record.content is not None:
                    one = DeploymentState.from_record(record.content)
                    if one.name != record.name:
                        raise ValueError(f"it is about {one.name!r}")
                    self.state.put(one)
                    continue
            except Exception:
                record = replace(record, content=None, problem="its record does not make sense")
                logger.exception("the record of %r cannot be understood", record.name)
            logger.error("%r: %s; it is left as it is", record.name, record.problem)
            self.state.unreadable[record.name] = record
        nodes = self.cluster.nodes()
        self.fleet.restore(nodes)
        self._ended = ledger.ended()
        self._ended_at = dict.fromkeys(self._ended, time.monotonic())
        live, alive = self.sweeper.live(), {info.id for info in nodes}
        ending = {
            one.deployment.group.name for one in self.state.all() if one.releasing and one.deployment.group
        }
        for one in self.state.all():
            self.feed.add(one.name, None, "restarted", "the service has started anew")
            group = one.deployment.group
            if one.releasing or (group is not None and group.name in ending):
                self._ended.pop(one.name, None)
                self._ended[one.name] = self._release(one.name)
                continue
            later = one
            for index, replica in one.replicas.items():
                theirs = one.is_lease and not groups.is_gone(replica.group_id)  # under a name of its owner's
                if replica.group_id not in live and not theirs:
                    partly, reason = self.actions.drop(later, index, alive | replica.nodes)
                    later = later.lost(index, partly, reason)
            surplus = [index for index in later.replicas if index >= one.deployment.replicas]
            if surplus:  # an apply was cut off
                later = self.actions.release(later, surplus)
            if later is not one:
                self.actions.note(later)
            if later.is_lease and not later.replicas:
                self._release(one.name)
        self.sweeper.begin(live)


def _new(wanted: Deployment, owner: Owner | None) -> DeploymentState:
    """A deployment that was not there before."""
    states = dict.fromkeys(range(wanted.replicas), State.PENDING)
    return DeploymentState(wanted, states=states, owner=owner, expires_at=expiry(wanted))


def _lost_groups(lease: DeploymentState) -> set[str]:
    """The ids of the groups of a lease that are not there any more."""
    return {one.group_id for one in lease.replicas.values() if groups.is_gone(one.group_id)}


def _others(known: DeploymentState, owner: Owner | None) -> DeploymentConflict:
    """What is there belongs to somebody else than who asks."""
    theirs, ours = ("nobody" if one is None else one["kind"] for one in (known.owner, owner))
    return DeploymentConflict(known.name, {"owner": (theirs, f"another {ours}" if ours == theirs else ours)})
