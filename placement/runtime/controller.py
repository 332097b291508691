"""The controller: brings each deployment from what is there to what is declared, and is the only one to change it.

Whatever happens (a call, a node that died, a kill, a while that passed) ends in the same loop: look, ask
:func:`placement.core.reconcile.reconcile` what to do, do it. What a death left behind is dealt with in this way, too.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from placement.core.lifecycle import State
from placement.core.reconcile import (
    Decision,
    Desired,
    Drop,
    Keep,
    Observed,
    Release,
    Reserve,
    Wait,
    admit,
    reconcile,
)
from placement.core.request import Request
from placement.core.snapshot import NEAR_LABELS, Policy, Snapshot
from placement.errors import (
    DeploymentConflict,
    LeaseExpired,
    PartlyApplied,
    PlacementError,
    ReservationFailed,
    UnknownDeployment,
    UnknownNode,
    Unplaceable,
    UnreadableRecord,
)
from placement.runtime import faults, groups, ledger
from placement.runtime.actions import Actions
from placement.runtime.demand import Asked, Demand, Need, needs_of
from placement.runtime.discovery import NodeInfo
from placement.runtime.feed import Event, Feed
from placement.runtime.fleet import VIEW_LAG_SECONDS, Fleet
from placement.runtime.leases import Lending
from placement.runtime.node_agent import FRESH_SECONDS
from placement.runtime.observed import ObservedCluster
from placement.runtime.orders import Refusal, deployment_of, order_of_group
from placement.runtime.queue import Ticket, Tickets
from placement.runtime.report import Observed as Seen
from placement.runtime.report import cluster_status, topology_report
from placement.runtime.results import PlacementResult
from placement.runtime.state import Claim, DeploymentState, Owner, ServiceState
from placement.wire.cluster import ClusterFile
from placement.wire.deployment import Deployment
from placement.wire.plans import (
    ExplainedPlan,
    PlacementPlan,
    explain_deployments,
    mix_of,
    plan_in_order,
    request_of,
    request_unchecked,
)

MAX_REPLANS = 5
"""How often a plan is made anew that nodes refused, since others act meanwhile."""
IDLE_SECONDS = 60.0
"""How long a node's actor stays where nothing is held: to Ray's autoscaler, which removes nodes that were idle for
minutes, a node with an actor is busy."""
STATUS_SECONDS = 5.0
"""How long ``status`` waits for nodes that have not said yet what their GPUs are."""
ENDED_SECONDS = 60.0
"""How long it is remembered what a release gave back; Ray sends a call again within seconds of a restart."""

logger = logging.getLogger(__name__)


class Controller:
    """All that changes deployments. Thread-safe; every method may be called again at any time.

    Args:
        make_agent: creates (or finds) the node actor of a node.
        near: labels of which nodes near each other share the values, widest first.
        idle_seconds: how long a node actor stays on a node that holds nothing.

    Attributes:
        state: what is declared and what is there.
        cluster: the nodes as they were last seen.
        fleet: the nodes' actors.
        feed: what happened.
        tickets: calls that wait for room.
        demand: what is asked of Ray's autoscaler.
    """

    def __init__(
        self,
        make_agent: Callable[[NodeInfo], Any],
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self.near, self.idle_seconds = tuple(near), max(1.0, idle_seconds)
        self.prefix = f"placement:{ledger.token()}:"
        self.state = ServiceState(lambda nodes: self.cluster.touch(nodes))
        self.fleet = Fleet(make_agent, self.state.holdings, self.prefix)
        self.cluster = ObservedCluster(self.state, self.fleet, self.near)
        self.feed = Feed(
            ledger.event_numbers(), ledger.save_event_numbers, self.state.deployments.__contains__
        )
        self.actions = Actions(self.state, self.fleet, self.feed)
        self._turns: dict[str, _Turn] = {}
        self._turns_lock = threading.Lock()
        self._ended: dict[str, int] = {}
        self._ended_at: dict[str, float] = {}
        self._undecided: dict[str, groups.LiveGroup] = {}
        self._gone: set[tuple[str, int]] = set()
        self.tickets = Tickets()
        self.demand = Demand(f"placement-demand:{self.prefix.split(':')[1]}:")
        self._needs: dict[str, Need | str] = {}
        self._restore()

    # -- what callers want ---------------------------------------------------------------------------

    def place(
        self, wanted: Deployment, owner: Owner | None = None, lending: Lending | None = None
    ) -> PlacementResult:
        """Places all replicas of a deployment, or none; see the service."""
        with self.sole(wanted.name):
            known = self._known(wanted.name)
            if known is not None:
                if known.deployment == wanted and known.owner == owner:
                    return known.result()
                if known.deployment == wanted:
                    kinds = tuple("nobody" if one is None else one["kind"] for one in (known.owner, owner))
                    raise DeploymentConflict(wanted.name, {"owner": (kinds[0], f"another {kinds[1]}")})
                raise DeploymentConflict(wanted.name, differences(known.deployment, wanted))
            self._require_readable(wanted.name)
            with self._refusal_told(wanted.name):
                new = _new(wanted, owner)
                return self._bring_about(_Work(None, new, atomic=True, strict=True, lending=lending)).result()

    def apply(self, wanted: Deployment, atomic: bool = False, owner: Owner | None = None) -> PlacementResult:
        """Declares a deployment, and does what can be done for it now; see the service."""
        return self._apply(wanted, atomic, owner)[0]

    def _apply(self, wanted: Deployment, atomic: bool, owner: Owner | None) -> tuple[PlacementResult, bool]:
        """The same, and whether nothing of that name was there before."""
        with self.sole(wanted.name):
            known = self._known(wanted.name)
            if known is None:
                self._require_readable(wanted.name)
                with self._refusal_told(wanted.name):
                    work = _Work(None, _new(wanted, owner), atomic=atomic, strict=True)
                    return self._bring_about(work).result(), True
            if known.deployment == wanted and not known.unfinished():
                return known.result(), False
            with self._refusal_told(wanted.name):
                anew = replace(known, given_up=False).declared(wanted)
                if known.deployment == wanted and not known.given_up:
                    anew = known
                may_wait = frozenset(known.missing())
                strict = known.deployment.shape() != wanted.shape()
                work = _Work(known, anew, atomic=atomic, strict=strict, may_wait=may_wait)
                return self._bring_about(work).result(), False

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
            try:
                results[position], is_new = self._apply(one, atomic, (owners or {}).get(one.name))
            except Exception as error:
                if not atomic and isinstance(error, PlacementError):
                    failures[one.name] = error.to_dict()
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
            lambda nodes, lag_seconds, fresh: plan_in_order(*self.cluster.look(), wanted, atomic=atomic)
        )

    def plan_all(self, wanted: Sequence[Deployment], atomic: bool = False) -> list[PlacementPlan]:
        """What applying these would do; see the service."""
        return [plan for _, plan in sorted(self.plan_in_order(wanted, atomic), key=itemgetter(0))]

    def explain_all(self, wanted: Sequence[Deployment]) -> list[ExplainedPlan]:
        """The same, with what became of every node."""
        return explain_deployments(*self.cluster.look(), wanted)

    def snapshot(self) -> ClusterFile:
        """The cluster as the planner sees it now."""
        snapshot, held = self.cluster.look()
        return ClusterFile.of(snapshot, held.values())

    def status(self, node: str | None, deployment: str | None, state: str | None) -> dict[str, Any]:
        """What there is and who holds it; see the service."""
        nodes = self.cluster.nodes()
        self.fleet.machines.refresh(nodes, patience_seconds=STATUS_SECONDS)
        available = groups.available_resources()
        for node_id in self.fleet.settling():
            available.pop(node_id, None)
        deployments = self.state.deployments.copy()
        seen = Seen(
            nodes,
            deployments,
            self.fleet.machines.machine,
            self.fleet.machines.facts,
            self.fleet.foreign,
            available,
            self.state.unreadable.copy(),
            self.cluster.draining,
            self.cluster.dead(),
            [name for name in self.state.queue() if name in deployments and not deployments[name].releasing],
            self.demand.report(),
        )
        return cluster_status(seen, node, deployment, state)

    def topology(self, node: str | None) -> list[dict[str, Any]]:
        """What the GPUs of each node report, read anew; see the service."""
        nodes = [info for info in self.cluster.nodes() if info.gpu_count]
        if node is not None:
            chosen = [info for info in nodes if node in (info.id, info.name, info.address)]
            if not chosen:
                raise UnknownNode("--node", node, tuple(info.name for info in nodes))
            nodes = chosen
        self.fleet.machines.refresh(nodes, again=True)
        return [topology_report(info, self.fleet.machines.facts.get(info.id)) for info in nodes]

    def release(self, name: str) -> int:
        """Gives back everything that a deployment holds; how many replicas that were."""
        with self.sole(name):
            return self._release(name)

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

    def events(self, name: str | None, since: int) -> list[Event]:
        """What happened to a deployment, or to all; see the service."""
        if name is not None and not self.feed.known(name) and self.state.get(name) is None:
            raise UnknownDeployment(name, self.state.names())
        return self.feed.since(since, None if name is None else (name,))

    def renew(self, name: str) -> float | None:
        """Has a deployment stand for its ``ttl_seconds`` from now on; until when, in seconds since 1970."""
        with self.sole(name):
            known = self._known(name)
            if known is None:
                raise UnknownDeployment(name, self.state.names())
            if known.deployment.ttl_seconds is None:
                return None
            later = replace(known, expires_at=time.time() + known.deployment.ttl_seconds)
            self.actions.commit(later)
            return later.expires_at

    # -- one deployment at a time --------------------------------------------------------------------

    @contextlib.contextmanager
    def sole(self, name: str, wait: bool = True) -> Iterator[bool]:
        """One change of a deployment at a time; different deployments change side by side.

        Yields:
            Whether it is ours to change; always, if we ``wait`` for it.
        """
        with self._turns_lock:
            turn = self._turns.setdefault(name, _Turn())
            turn.users += 1
        mine = turn.lock.acquire(blocking=wait)
        try:
            yield mine
        finally:
            if mine:
                turn.lock.release()
            with self._turns_lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[name]

    def is_changing(self, name: str) -> bool:
        """Whether a deployment is being changed."""
        return name in self._turns

    def _known(self, name: str) -> DeploymentState | None:
        """What is to be changed; a release that was cut off comes first."""
        known = self.state.get(name)
        if known is not None and known.releasing:
            self._release(name)
            return None
        return known

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
        with self.sole(name, wait=False) as mine:
            if mine:
                self._reconcile(name, patient)

    def _reconcile(self, name: str, patient: bool = True) -> None:
        known = self.state.get(name)
        if known is None:
            return
        if known.releasing:
            self._release(name)
            return
        self._bring_about(_Work(known, known, patient=patient))
        later = self.state.get(name)
        if later is not None and later.is_lease and not later.replicas:
            self._release(name)

    # -- the loop ------------------------------------------------------------------------------------

    def _bring_about(self, work: _Work) -> DeploymentState:
        """Decides and acts until nothing is left to do; what is there then.

        Raises:
            UnknownNode: its constraints name a node that is not there, and are new.
            Unplaceable, ReservationFailed: it does not fit, and the change is atomic. What was there before still is;
                where it had to be released first, it is placed anew, or waits.
            LeaseExpired: its caller has gone.
        """
        before, name = work.known, work.wanted.name
        announced = []  # from here on others keep away from it, if it wants that
        if before is None or before.deployment is not work.wanted.deployment:
            announced.append(self.state.claim(Claim(work.wanted.deployment, ())))
        try:
            while self._advance(work):
                pass
            if work.wanted is not work.durable:
                self.actions.commit(work.wanted)
                self._surplus_told(work)
        except Exception:
            if work.vacated:  # what was there is there again, or as soon as there is room for it
                self._reconcile(name)
            raise
        finally:
            self.state.close(announced)
        if before is not None and before.deployment != work.wanted.deployment:
            changed = ", ".join(differences(before.deployment, work.wanted.deployment))
            self.feed.add(name, None, "changed", changed)
        return work.wanted

    def _advance(self, work: _Work) -> bool:
        """Decides, and acts until something was reserved; whether to decide once more."""
        nodes, decision, claim = self._decide(work)
        reserves = any(isinstance(action, Reserve) for action in decision.actions)
        try:
            if dropped := [action.index for action in decision.actions if isinstance(action, Drop)]:
                self._drop(work, dropped, {info.id for info in nodes})
            for position, action in enumerate(decision.actions, 1):
                if isinstance(action, Keep):
                    work.wanted = work.wanted.kept(action.indices)
                elif isinstance(action, Release):
                    self._release_some(work, action.indices, in_place=reserves)
                elif isinstance(action, Wait):
                    self._wait(work, dict.fromkeys(action.indices, str(action.refusal)))
                elif isinstance(action, Reserve):
                    assert claim is not None
                    open_claim, claim = claim, None
                    if self._reserve(work, action, open_claim, nodes):
                        return position < len(decision.actions)
                    return work.replans < MAX_REPLANS
        finally:
            if claim is not None:
                self.state.close([claim])
        return False

    def _decide(self, work: _Work) -> tuple[list[NodeInfo], Decision, Claim | None]:
        """What to do now. What is to be reserved first is claimed."""

        def decide(
            nodes: list[NodeInfo], lag_seconds: float, fresh: bool, accept: bool = False
        ) -> tuple[list[NodeInfo], Decision, Claim | None]:
            machines, deployment = self.fleet.machines, work.wanted.deployment
            avoided = work.refused | self.fleet.agents.suspect()
            if not deployment.remote:
                if deployment.needs.free_memory_bytes:
                    machines.refresh(nodes, again=True, max_age_seconds=FRESH_SECONDS)
                else:
                    machines.refresh(nodes, patience_seconds=0.0)
                avoided |= machines.unknown_nodes(nodes)
            if avoided:
                with contextlib.suppress(Unplaceable):
                    return nodes, *self._decide_with(work, nodes, lag_seconds, fresh, avoided)
                if not deployment.remote:
                    machines.refresh(nodes)
            return nodes, *self._decide_with(work, nodes, lag_seconds, fresh, accept=accept)

        if not work.patient:
            return decide(self.cluster.nodes(), VIEW_LAG_SECONDS, True, accept=True)
        try:
            # A replica that is there may have lost its node since the nodes were last read.
            fresh = work.replans > 0 or work.known is not None
            return self.cluster.patiently(decide, fresh)
        except Unplaceable:
            if work.is_refused:
                raise
        return decide(self.cluster.nodes(), VIEW_LAG_SECONDS, True, accept=True)

    def _decide_with(
        self,
        work: _Work,
        nodes: list[NodeInfo],
        lag_seconds: float,
        fresh: bool,
        avoided: Collection[str] = (),
        accept: bool = False,
    ) -> tuple[Decision, Claim | None]:
        """The same, without some nodes.

        Raises:
            Unplaceable: there is no room for all of it, and nobody said that this will do.
        """
        with self.state.lock:
            snapshot = self.cluster.snapshot(nodes, lag_seconds, work.refused, work.full, avoided, fresh)
            decision = self._decision(work, snapshot)
            refusals = [action.refusal for action in decision.actions if isinstance(action, Wait)]
            work.is_refused = decision.refusal is not None
            if decision.refusal is not None:
                raise decision.refusal
            if refusals and not accept:
                raise refusals[0]
            for action in decision.actions:
                if isinstance(action, Reserve):
                    plan = action.plan
                    claim = Claim(work.wanted.deployment, plan.replicas, plan.set_size)
                    return decision, self.state.claim(claim)
            return decision, None

    def _decision(self, work: _Work, snapshot: Snapshot) -> Decision:
        """Under the lock.

        Raises:
            UnknownNode: its constraints name a node that is not there, and are new.
        """
        desired, observed = self._seen(work.wanted, snapshot, work.strict)
        if work.wanted.deployment.policy is Policy.FRAGMENTATION:
            snapshot = snapshot.changed((), mix_of(snapshot, [one.deployment for one in self.state.all()]))
        return reconcile(desired, observed, snapshot, atomic=work.atomic, may_wait=work.may_wait)

    def _seen(
        self, wanted: DeploymentState, snapshot: Snapshot, strict: bool = False
    ) -> tuple[Desired, dict[int, Observed]]:
        """A deployment in the terms of :mod:`placement.core.reconcile`. Under the lock."""
        deployment, name = wanted.deployment, wanted.name
        indices: Sequence[int] = range(deployment.replicas)
        if wanted.given_up or (wanted.is_lease and wanted.replicas):  # what is lost of it is not placed anew
            indices = [
                index
                for index, one in sorted(wanted.replicas.items())
                if (name, index) not in self._gone and all(snapshot.bit(part.node) for part in one.parts)
            ]
        if strict:
            request_of(deployment, (), {}, snapshot)
        request = request_unchecked(deployment, indices, {}, self.state.keeping_apart(name))
        before = {generation: request_unchecked(one, (), {}) for generation, one in wanted.earlier.items()}
        observed = {
            index: Observed(one.planned(), before.get(one.generation, request), (name, index) in self._gone)
            for index, one in wanted.replicas.items()
        }
        return Desired(request, gang=deployment.gang), observed

    def _drop(self, work: _Work, indices: Sequence[int], alive: Collection[str]) -> None:
        """Gives back what is left of replicas that lost a node, or their group."""
        declared_anew = work.known is not None and work.known is not work.wanted
        for index in indices:
            partly, reason = self.actions.drop(work.wanted, index, alive)
            work.wanted = work.wanted.lost(index, partly, reason)
            if declared_anew and work.known is not None:
                work.known = work.known.lost(index, partly, reason)
            self._gone.discard((work.wanted.name, index))
        if not declared_anew:
            work.known = work.durable = work.wanted
        if work.known is not None:
            self.actions.note(work.known)

    def _release_some(self, work: _Work, indices: Collection[int], in_place: bool) -> None:
        """Gives back what some replicas hold, for the sake of others or since they are too many."""
        if in_place and work.atomic and work.known is not None:
            # Until the others are there, what stood is declared as before.
            why = dict.fromkeys(indices, "its room was given back for what replaces it")
            rest = self.actions.release(work.known, indices)
            reasons = {**rest.reasons, **{i: reason for i, reason in why.items() if i in rest.states}}
            work.known = rest.pending(reasons, time.time())
            work.wanted = work.wanted.without([i for i in indices if i in work.wanted.states])
            work.vacated = True
            self.actions.note(work.known)
            return
        if work.wanted is not work.durable:
            self.actions.commit(work.wanted)
            self._surplus_told(work)
        work.wanted = work.durable = self.actions.release(work.wanted, indices)
        self.actions.note(work.wanted)

    def _reserve(self, work: _Work, action: Reserve, claim: Claim, nodes: Sequence[NodeInfo]) -> bool:
        """Reserves what was planned, and gives back what it replaces; whether it could be had."""
        faults.point("service.planned")
        before = work.wanted
        create = None if work.lending is None else work.lending.create
        outcome = self.actions.reserve(before, claim, nodes, create)
        if isinstance(outcome, list):
            self._learn(work, outcome)
            return False
        later, got = outcome
        placed = sorted({replica.replica_index for replica in action.plan.replicas})
        faults.point("service.reserved")
        surplus = [index for index in action.replaces if index not in placed]
        kept = later.without(surplus)
        try:
            self.actions.commit(kept, [got])  # first: what a record tells of is never given back
        except BaseException:
            self.actions.undo(later, placed, got)
            raise
        work.wanted = work.durable = kept
        work.vacated = False
        faults.point("service.kept")
        self._surplus_told(work)
        self.actions.release(before, action.replaces)
        if action.replaces:
            self.fleet.tell(kept.name)
        self.actions.tell_places(kept, placed)
        return True

    def _learn(self, work: _Work, refusals: Sequence[Refusal]) -> None:
        """Notes why nodes refused; gives up when that has been often enough.

        Raises:
            ReservationFailed: it is, and the change is atomic.
            LeaseExpired: the caller has gone.
        """
        name = work.wanted.name
        for refusal in refusals:
            work.refused.add(refusal.node_id)
            if refusal.full:
                fewer = work.wanted.deployment.gpus_per_replica - 1
                work.full[refusal.node_id] = fewer if refusal.room is None else refusal.room
            work.attempts += refusal.attempts
            work.where, work.reason = refusal.node_name, refusal.reason
        if work.lending is not None and work.lending.is_over:
            raise LeaseExpired(name, "its placement group did not come in time")
        work.replans += 1
        if work.replans >= MAX_REPLANS:
            failure = ReservationFailed(name, work.where, work.attempts, work.reason)
            if work.atomic:
                raise failure
            if surplus := [i for i in work.wanted.replicas if i >= work.wanted.deployment.replicas]:
                self._release_some(work, surplus, in_place=False)
            self._wait(work, dict.fromkeys(work.wanted.unfinished(), str(failure)))

    def _wait(self, work: _Work, reasons: dict[int, str]) -> None:
        """Has replicas wait for room; their declaration is durable from here on."""
        before = work.wanted
        durable = work.wanted is work.durable and before.waiting_since is not None
        if work.wanted is not work.durable:
            self._surplus_told(work)
        keep = self.actions.note if durable else self.actions.commit
        work.wanted = work.durable = self.actions.wait(before, reasons, time.time(), keep)

    def _surplus_told(self, work: _Work) -> None:
        """Has those who watch hear of replicas that waited and are not declared any more."""
        if work.known is not None:
            for index in work.known.states.keys() - work.wanted.states.keys() - work.known.replicas.keys():
                self.feed.add(work.wanted.name, index, "released")
            work.known = work.wanted

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
        self.fleet.tell(name)
        return count

    def _release_unreadable(self, name: str) -> int:
        """Removes a record that makes no sense, and all groups of that name."""
        record = self.state.unreadable[name]
        if record.newer:
            raise UnreadableRecord(name, record.problem, newer=True)
        held = groups.live_groups(lambda group: group.startswith(f"{self.prefix}{name}:"))
        for group_id, group in held.items():
            self._remove(group_id, group)
        ledger.delete(name)
        del self.state.unreadable[name]
        self.fleet.tell(name)
        return len(held)

    # -- what the clock asks for ---------------------------------------------------------------------

    def stranded(self, alive: frozenset[str]) -> list[str]:
        """The deployments with a replica on a node that is no more."""
        dead = self.state.nodes() - alive
        return sorted({name for node in dead for name, _ in self.state.on_node(node)})

    def try_queue(self, attempt: Callable[[str], None]) -> None:
        """Tries all that waits for room, the oldest first, with one look at the cluster.

        Args:
            attempt: reconciles a deployment for which there seems to be room.
        """
        promising = self._promising()
        waiting: list[tuple[float, str, Ticket[object] | None]] = [
            (ticket.since, ticket.name, ticket) for ticket in self.tickets.all()
        ]
        for name in promising:
            known = self.state.get(name)
            if known is not None:
                waiting.append((known.waiting_since or 0.0, name, None))
        for _, name, ticket in sorted(waiting, key=itemgetter(0, 1)):
            if ticket is None:
                attempt(name)
                continue
            with contextlib.suppress(Exception):  # who waits for it is told
                ticket.attempt()

    def _promising(self) -> list[str]:
        """Of what waits in the state, that of which something can be done now; the rest is told why not.

        What finds no room is what the autoscaler is asked for.
        """
        names, tickets = self.state.queue(), self.tickets.all()
        if not names and not tickets:
            self._needs = {}
            return []
        nodes = self.cluster.nodes()
        self.fleet.machines.refresh(nodes, patience_seconds=0.0)
        with self.state.lock:
            snapshot = self.cluster.snapshot(nodes)
            known = [one for name in names if (one := self.state.get(name)) is not None]
            waiting = [(one, *self._seen(one, snapshot)) for one in known if not one.releasing]
        found = [one.name for one in known if one.releasing]
        needs: dict[str, Need | str] = {}
        requests = {one.name: desired.request for one, desired, _ in waiting}
        for one, decision in admit(waiting, snapshot):
            waits = [action for action in decision.actions if isinstance(action, Wait)]
            for wait in waits:
                needs |= _needs_of(requests[one.name], wait.indices)
            if len(waits) < len(decision.actions):
                found.append(one.name)
            else:
                self._reasons_changed(one, waits)
        for ticket in tickets:
            request = request_unchecked(ticket.wanted, range(ticket.wanted.replicas), {})
            needs |= _needs_of(request, request.replicas)
        self._needs = needs
        return found

    def _reasons_changed(self, one: DeploymentState, waits: Sequence[Wait]) -> None:
        """Has those who look know why replicas wait, as it is now."""
        asked = self.demand.poll()
        reasons = {}
        for wait in waits:
            for index in wait.indices:
                told = asked.get(f"{one.name}:{index}:0")
                reasons[index] = f"{wait.refusal}{_told(told)}"
        if reasons == one.reasons:
            return
        with self.sole(one.name, wait=False) as mine:
            if mine and self.state.get(one.name) is one:
                self.actions.wait(one, reasons, time.time(), self.actions.note)

    def ask_for_nodes(self) -> None:
        """Has the autoscaler know what waits, and no more than that."""
        needs = self._needs
        if not needs:
            self.demand.want({}, ())
            return
        nodes = self.cluster.nodes_lately()
        unknown = self.fleet.machines.unknown_nodes(nodes)
        self.demand.want(needs, [info.id for info in nodes if info.id not in unknown])

    def queue_depends_on(self) -> object:
        """What what waits depends on: once this is another, it is worth trying it again."""
        asked = tuple((key, one.state) for key, one in self.demand.poll().items())
        unknown = self.fleet.machines.unknown_nodes(self.cluster.nodes_lately())
        return self.fleet.changed_at, self.state.queue_version, len(self.tickets.all()), asked, unknown

    def sweep(self) -> None:
        """Removes groups that carry our token and that no deployment knows of, and finds node actors that live on."""
        try:
            self.fleet.agents.doubt(self.fleet.agents.take_up(self.cluster.nodes_lately()), now=False)
            self._undecided = self._sweep(self._live_groups())
        except BaseException:
            self.fleet.agents.doubt()
            raise

    def sweep_again(self) -> None:
        """The same with the groups of which it could not be told yet whether a deployment will know of them."""
        if self._undecided:
            self._undecided = self._sweep(self._undecided)

    def _live_groups(self) -> dict[str, groups.LiveGroup]:
        return groups.live_groups(lambda name: name.startswith(self.prefix))

    def _sweep(self, live: Mapping[str, groups.LiveGroup]) -> dict[str, groups.LiveGroup]:
        undecided = {}
        for group_id, group in live.items():
            name = deployment_of(order_of_group(group.name))
            if name in self.state.unreadable or self._knows(name, group_id):
                continue
            with self.sole(name, wait=False) as mine:
                if not mine:  # something is being reserved, and this may be it
                    undecided[group_id] = group
                elif not self._knows(name, group_id):
                    self._remove(group_id, group)
                    self.fleet.tell(name)
        return undecided

    def _remove(self, group_id: str, group: groups.LiveGroup) -> None:
        """Removes a group that is in no record."""
        self.fleet.note_removed(order_of_group(group.name), group.nodes)
        groups.remove_group(groups.group_from_hex(group_id))

    def _knows(self, name: str, group_id: str) -> bool:
        known = self.state.get(name)
        return known is not None and any(one.group_id == group_id for one in known.replicas.values())

    def write_again(self) -> None:
        """Has the ledger say what it could not be told before."""
        for name in sorted(self.actions.unwritten):
            with self.sole(name, wait=False) as mine:
                if mine:
                    self.actions.write_back(name)

    def rest(self) -> None:
        """Ends the actors of nodes that hold nothing, so that they can be scaled down; forgets what nobody asks for."""
        for node_id in self.fleet.agents.idle(self.idle_seconds):
            if not self.state.holds(node_id):
                self.fleet.agents.rest(node_id, self.idle_seconds)
        now = time.monotonic()
        for name in [name for name, at in self._ended_at.copy().items() if now - at > ENDED_SECONDS]:
            with self.sole(name, wait=False) as mine:
                if mine and now - self._ended_at[name] > ENDED_SECONDS:
                    ledger.forget_ended(name)
                    del self._ended_at[name]
                    self._ended.pop(name, None)

    def end_what_is_over(self, has_ended: Callable[[Owner], bool], now: float) -> None:
        """Releases what outlived its owner or its time; gives up what has waited for longer than it wants.

        Args:
            has_ended: whether an owner is no more.
            now: seconds since 1970.
        """
        for one in self.state.temporary():
            if one.is_lease:
                gone = {i for i, replica in one.replicas.items() if groups.is_gone(replica.group_id)}
                if gone:
                    self._gone |= {(one.name, index) for index in gone}
                    self.reconcile(one.name, patient=False)
                continue
            ended = one.owner is not None and has_ended(one.owner)
            expired = one.expires_at is not None and one.expires_at <= now
            late = (
                one.deployment.deadline_seconds is not None
                and one.waiting_since is not None
                and now - one.waiting_since > one.deployment.deadline_seconds
                and not one.given_up
            )
            if ended or expired or late:
                self._end(one.name, "its owner has ended" if ended else "its time is over" if expired else "")

    def _end(self, name: str, why: str) -> None:
        with self.sole(name, wait=False) as mine:
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
            self._release(name)

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
        self.fleet.recall(nodes)
        self._ended = ledger.ended()
        self._ended_at = dict.fromkeys(self._ended, time.monotonic())
        live, alive = self._live_groups(), {info.id for info in nodes}
        for one in self.state.all():
            self.feed.add(one.name, None, "restarted", "the service has started anew")
            if one.releasing:
                self._ended.pop(one.name, None)
                self._ended[one.name] = self._release(one.name)
                continue
            later = one
            for index, replica in one.replicas.items():
                if replica.group_id not in live:
                    partly, reason = self.actions.drop(later, index, alive | replica.nodes)
                    later = later.lost(index, partly, reason)
            surplus = [index for index in later.replicas if index >= one.deployment.replicas]
            if surplus:  # an apply was cut off
                later = self.actions.release(later, surplus)
            if later is not one:
                self.actions.note(later)
                if later.is_lease and not later.replicas:
                    self._release(one.name)
        self._undecided = self._sweep(live)


@dataclass
class _Work:
    """A deployment that is being brought about.

    Attributes:
        known: what was there before, under its own declaration; ``None`` if nothing was.
        wanted: what it is to be; what is there already is the same.
        atomic: all of it, or nothing is changed.
        strict: nodes that its constraints name must be there.
        may_wait: replicas that may go on waiting, even so.
        lending: the caller creates the groups.
        patient: look again before anything is refused.
        durable: what the ledger and the state say, if that is ``wanted``.
        is_refused: nothing of the change is done, as it was planned last.
        vacated: what was there was released for what is to replace it.
        refused: nodes that refused, for whatever reason; of these Ray's books are believed.
        full: node id -> most whole GPUs or instances that may be planned there.
        replans, attempts, where, reason: how often, and why the last time.
    """

    known: DeploymentState | None
    wanted: DeploymentState
    atomic: bool = False
    strict: bool = False
    may_wait: frozenset[int] = frozenset()
    lending: Lending | None = None
    patient: bool = True
    durable: DeploymentState | None = None
    is_refused: bool = False
    vacated: bool = False
    refused: set[str] = field(default_factory=set)
    full: dict[str, int] = field(default_factory=dict)
    replans: int = 0
    attempts: int = 0
    where: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        self.durable = self.known


@dataclass
class _Turn:
    """Whose turn it is to change a deployment, and how many are there or wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


def _needs_of(request: Request, indices: Sequence[int]) -> dict[str, Need | str]:
    """What the sets of some replicas ask of a new node, by ``deployment:replica:set``; or why nothing is asked."""
    needs = needs_of(request, indices)
    if isinstance(needs, str):
        return {f"{request.deployment}:{index}:0": needs for index in indices}
    return dict(needs)


def _told(asked: Asked | None) -> str:
    """What became of a need, as the end of a reason."""
    if asked is None or not asked.reason:
        return ""
    return (
        f"; autoscaler: {asked.state.value}, {asked.reason}"
        if asked.state != "asked"
        else f"; {asked.reason}"
    )


def _new(wanted: Deployment, owner: Owner | None) -> DeploymentState:
    """A deployment that was not there before."""
    ttl = wanted.ttl_seconds
    states = dict.fromkeys(range(wanted.replicas), State.PENDING)
    return DeploymentState(
        wanted, states=states, owner=owner, expires_at=None if ttl is None else time.time() + ttl
    )


def differences(old: Deployment, new: Deployment) -> dict[str, tuple[str, str]]:
    """Field -> (what is declared, what was asked for), as text, of those that differ."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    # Nested fields may name endpoints and key references: say only that they differ.
    return {
        field: ("", "")
        if isinstance(after[field] or before[field], dict)
        else (str(before[field]), str(after[field]))
        for field in after
        if before[field] != after[field]
    }
