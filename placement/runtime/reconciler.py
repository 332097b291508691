"""Reconciles one deployment: decide, act, and look again, until nothing is left to do.

:func:`placement.core.reconcile.reconcile` decides; this module calls it with the current cluster, claims the plan,
executes it by :class:`~placement.runtime.actions.Actions`, and decides again if a node refused.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from placement.core.policy import Policy
from placement.core.reconcile import (
    Decision,
    Desired,
    Drop,
    Keep,
    Observed,
    Release,
    Reserve,
    Wait,
    reconcile,
)
from placement.core.request import Request, Told
from placement.core.snapshot import Snapshot
from placement.errors import LeaseExpired, ReservationFailed, UnknownGpu, Unplaceable
from placement.runtime import faults, metrics
from placement.runtime.actions import Actions
from placement.runtime.claims import Claim
from placement.runtime.deployment_state import DeploymentState
from placement.runtime.discovery import NodeInfo
from placement.runtime.feed import Feed
from placement.runtime.fleet import VIEW_LAG_SECONDS, Fleet
from placement.runtime.leases import Lending
from placement.runtime.node_agent import FRESH_SECONDS
from placement.runtime.observed import ObservedCluster
from placement.runtime.orders import Refusal
from placement.runtime.state import ServiceState
from placement.wire.deployment import Deployment
from placement.wire.requests import mix_of, request_of, request_unchecked

logger = logging.getLogger(__name__)

MAX_REPLANS = 5
"""How often a plan that nodes refused is made again, since others act meanwhile."""


@dataclass
class Work:
    """A deployment that is being reconciled.

    Attributes:
        known: the deployment before, with its declaration; ``None`` if it is new.
        wanted: the deployment with the new declaration, and the existing replicas.
        atomic: make the change completely or not at all.
        strict: nodes that its constraints name must exist.
        lending: the caller creates the groups.
        patient: look again before anything is refused.
        told: for a member of a group, where its replicas go.
        claim: the claim for these places, until the decision.
        durable: whether the ledger and the state hold ``wanted``.
        is_refused: the last plan refused the whole change.
        vacated: replicas were released to make room for their replacements.
        refused: nodes that refused, for any reason; for these Ray's records are used.
        full: node id -> most whole GPUs or instances that may be planned there.
        replans, attempts, where, reason: how often it was tried, and why it failed last.
        began: its start, on the monotonic clock.
    """

    known: DeploymentState | None
    wanted: DeploymentState
    atomic: bool = False
    strict: bool = False
    lending: Lending | None = None
    patient: bool = True
    told: Told | None = None
    claim: Claim | None = None
    durable: DeploymentState | None = None
    is_refused: bool = False
    vacated: bool = False
    refused: set[str] = field(default_factory=set)
    full: dict[str, int] = field(default_factory=dict)
    replans: int = 0
    attempts: int = 0
    where: str = ""
    reason: str = ""
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.durable = self.known

    @property
    def most_replans(self) -> int:
        """How often it is planned again; never for a member of a group, which is planned again as a whole."""
        return MAX_REPLANS if self.told is None else 1


class Reconciler:
    """Reconciles deployments. The caller ensures that each deployment has one change at a time.

    Args:
        state: all deployments.
        cluster: the nodes as they were last seen.
        fleet: the nodes' actors.
        actions: what changes things.
        feed: who wants to know of it.

    Attributes:
        gone: ids of placement groups that are not there any more although a deployment has them.
        forget_removed: forgets what the owners of leases have removed; whether there was anything.
        outlook: what is asked of the autoscaler for replicas that wait, or why nothing is: the ends of their reasons.
    """

    def __init__(
        self, state: ServiceState, cluster: ObservedCluster, fleet: Fleet, actions: Actions, feed: Feed
    ) -> None:
        self.state, self.cluster, self.fleet, self.actions, self.feed = state, cluster, fleet, actions, feed
        self.gone: set[str] = set()
        self.forget_removed: Callable[[], bool] = lambda: False
        self.outlook: Callable[[Request, Sequence[int]], Mapping[int, str]] = lambda request, indices: {}
        self.types_for: Callable[[Request, Sequence[int]], str] = lambda request, indices: ""

    def bring_about(self, work: Work) -> DeploymentState:
        """Decides and acts until nothing is left to do; returns the deployment then.

        Raises:
            UnknownNode, UnknownGpu: its new constraints name a node or a GPU that does not exist.
            Unplaceable, ReservationFailed: it does not fit, and the change is atomic. What was placed before still is;
                if it had to be released first, it is placed again, or waits.
            LeaseExpired: its caller is gone.
        """
        before, name = work.known, work.wanted.name
        announced = []  # from here on others keep away from it if it names them in apart_from
        limits = work.wanted.deployment.constraints
        is_new = before is None or before.deployment is not work.wanted.deployment
        if is_new and limits is not None and limits.apart_from:
            announced.append(self.state.claim(Claim(work.wanted.deployment, ())))
        try:
            try:
                while self._advance(work):
                    pass
            except Unplaceable as refusal:
                raise self._with_types(refusal, work.wanted.deployment) from None
            if work.wanted is not work.durable:
                self.actions.commit(work.wanted)
                self._surplus_told(work)
        except Exception:
            if work.vacated:  # earlier replicas are placed again, now or as soon as there is room
                self._bring_back(name)
            raise
        finally:
            if announced:
                self.state.close(announced)
        if before is not None and before.deployment != work.wanted.deployment:
            changed = ", ".join(differences(before.deployment, work.wanted.deployment))
            self.feed.add(name, None, "changed", changed)
        return work.wanted

    def _with_types(self, refusal: Unplaceable, deployment: Deployment) -> Unplaceable:
        """A refusal that names the node type that would help, if node types are known."""
        types = self.types_for(request_unchecked(deployment, (0,), {}), (0,))
        return refusal.advised(types) if types else refusal

    def _advance(self, work: Work) -> bool:
        """Decides, and acts until a node refuses; returns whether to decide once more."""
        nodes, decision, claims = self._decide(work)
        reserves = any(isinstance(action, Reserve) for action in decision.actions)
        try:
            if dropped := [action.index for action in decision.actions if isinstance(action, Drop)]:
                self._drop(work, dropped, {info.id for info in nodes})
            for action in decision.actions:
                if isinstance(action, Keep):
                    work.wanted = work.wanted.kept(action.indices)
                elif isinstance(action, Release):
                    self._release_some(work, action.indices, in_place=reserves)
                elif isinstance(action, Wait):
                    request = request_unchecked(work.wanted.deployment, action.indices, work.wanted.nodes())
                    ends = self.outlook(replace(request, told=work.told), action.indices)
                    self._wait(work, {i: f"{action.refusal}{ends.get(i, '')}" for i in action.indices})
                elif isinstance(action, Reserve) and not self._reserve(work, action, claims.pop(0), nodes):
                    return work.replans < work.most_replans
        finally:
            if claims:
                self.state.close(claims)
        return False

    def _decide(self, work: Work) -> tuple[list[NodeInfo], Decision, list[Claim]]:
        """Decides what to do now, and claims all that is to be reserved, in order."""

        def decide(
            nodes: list[NodeInfo], lag_seconds: float, fresh: bool, accept: bool = False
        ) -> tuple[list[NodeInfo], Decision, list[Claim]]:
            inventory, deployment = self.fleet.inventory, work.wanted.deployment
            avoided = work.refused | self.fleet.agents.suspect()
            if deployment.gpus_per_replica:
                if deployment.needs.free_memory_bytes:
                    inventory.refresh(nodes, again=True, max_age_seconds=FRESH_SECONDS)
                else:
                    inventory.refresh(nodes, patience_seconds=0.0)
                avoided |= inventory.unknown_nodes(nodes)
            if deployment.needs.named and fresh:
                with self.state.lock:
                    snapshot = self.cluster.snapshot(nodes, lag_seconds)
                self.cluster.locate(snapshot, [request_unchecked(deployment, (), {})])
            if avoided:
                with contextlib.suppress(Unplaceable, UnknownGpu):
                    return nodes, *self._decide_with(work, nodes, lag_seconds, fresh, avoided)
                if deployment.gpus_per_replica:
                    inventory.refresh(nodes)
            return nodes, *self._decide_with(work, nodes, lag_seconds, fresh, accept=accept)

        if not work.patient:
            return decide(self.cluster.nodes(), VIEW_LAG_SECONDS, True, accept=True)
        try:
            # A replica may have lost its node since the nodes were last read.
            fresh = work.replans > 0 or work.known is not None
            return self.cluster.patiently(decide, fresh, self.forget_removed)
        except Unplaceable:
            if work.is_refused:
                raise
        return decide(self.cluster.nodes(), VIEW_LAG_SECONDS, True, accept=True)

    def _decide_with(
        self,
        work: Work,
        nodes: list[NodeInfo],
        lag_seconds: float,
        fresh: bool,
        avoided: Collection[str] = (),
        accept: bool = False,
    ) -> tuple[Decision, list[Claim]]:
        """The same, but without some nodes.

        Raises:
            Unplaceable: there is no room for all of it, and it may not wait.
        """
        self.cluster.read(fresh or bool(work.refused))
        with self.state.lock:
            if work.claim is not None:
                self.state.close([work.claim])
                work.claim = None
            snapshot = self.cluster.snapshot(nodes, lag_seconds, work.refused, work.full, avoided)
            decision = self._decision(work, snapshot)
            refusals = [action.refusal for action in decision.actions if isinstance(action, Wait)]
            work.is_refused = decision.refusal is not None
            if decision.refusal is not None:
                raise decision.refusal
            if refusals and not accept:
                raise refusals[0]
            plans = [action.plan for action in decision.actions if isinstance(action, Reserve)]
            return decision, [
                self.state.claim(Claim(work.wanted.deployment, plan.replicas, plan.set_size))
                for plan in plans
            ]

    def _decision(self, work: Work, snapshot: Snapshot) -> Decision:
        """Under the lock.

        Raises:
            UnknownNode, UnknownGpu: its new constraints name a node or a GPU that does not exist.
        """
        desired, observed = self.seen(work.wanted, snapshot, work.strict, lent=work.lending is not None)
        if work.told is not None:
            desired = replace(desired, request=replace(desired.request, told=work.told))
        if work.wanted.deployment.policy is Policy.FRAGMENTATION:
            snapshot = snapshot.changed((), mix_of(snapshot, [one.deployment for one in self.state.all()]))
        return reconcile(desired, observed, snapshot, atomic=work.atomic)

    def seen(
        self, wanted: DeploymentState, snapshot: Snapshot, strict: bool = False, lent: bool = False
    ) -> tuple[Desired, dict[int, Observed]]:
        """A deployment in the form for :mod:`placement.core.reconcile`. Under the lock.

        Args:
            wanted: the deployment.
            snapshot: the cluster.
            strict: nodes that its constraints name must exist.
            lent: the owner of its groups is calling, and can create missing groups.
        """
        deployment, name = wanted.deployment, wanted.name
        indices: Sequence[int] = range(deployment.replicas)
        if wanted.given_up or (wanted.is_lease and wanted.replicas and not lent):
            # Its lost replicas are not placed again.
            indices = [
                index
                for index, one in sorted(wanted.replicas.items())
                if one.group_id not in self.gone and all(snapshot.bit(part.node) for part in one.parts)
            ]
        if strict:
            request_of(deployment, (), {}, snapshot)
        request = request_unchecked(deployment, indices, {}, self.state.keeping_apart(name))
        before = {generation: request_unchecked(one, (), {}) for generation, one in wanted.earlier.items()}
        observed = {
            index: Observed(one.planned(), before.get(one.generation, request), one.group_id in self.gone)
            for index, one in wanted.replicas.items()
        }
        return Desired(request, gang=deployment.gang or deployment.group is not None), observed

    def _drop(self, work: Work, indices: Sequence[int], alive: Collection[str]) -> None:
        """Gives back what is left of replicas that lost a node, or their placement group."""
        declared_anew = work.known is not None and work.known is not work.wanted
        for index in indices:
            self.gone.discard(work.wanted.replicas[index].group_id)
            partly, reason = self.actions.drop(work.wanted, index, alive)
            work.wanted = work.wanted.lost(index, partly, reason)
            if declared_anew and work.known is not None:
                work.known = work.known.lost(index, partly, reason)
        if not declared_anew:
            work.known = work.durable = work.wanted
        if work.known is not None:
            self.actions.note(work.known)

    def _release_some(self, work: Work, indices: Collection[int], in_place: bool) -> None:
        """Gives back what some replicas hold, to make room for others or because there are too many."""
        if in_place and work.atomic and work.known is not None:
            # Until the new replicas are placed, the old declaration stays in the ledger.
            rest = self.actions.release(work.known, indices)
            why = "its room was given back for its replacement"
            reasons = {**rest.reasons, **{i: why for i in indices if i in rest.states}}
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

    def _reserve(self, work: Work, action: Reserve, claim: Claim, nodes: Sequence[NodeInfo]) -> bool:
        """Reserves what was planned, and gives back what it replaces; returns whether it succeeded."""
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
            self.actions.commit(kept, [got])  # first, as nothing that is in a record may be given back
        except BaseException:
            self.actions.undo(later, placed, got)
            raise
        work.wanted = work.durable = kept
        work.vacated = False
        faults.point("service.kept")
        self._surplus_told(work)
        self.actions.release(before, action.replaces)
        if action.replaces:
            self.fleet.recorded(kept.name)
        self.actions.tell_places(kept, placed)
        metrics.placed(time.monotonic() - work.began)
        return True

    def _learn(self, work: Work, refusals: Sequence[Refusal]) -> None:
        """Records why nodes refused; gives up after the last try.

        Raises:
            ReservationFailed: it was the last try, and the change is atomic.
            LeaseExpired: the caller is gone.
        """
        name = work.wanted.name
        for refusal in refusals:
            said = "%s could not reserve for %r, after %d attempts: %s"
            logger.info(said, refusal.node_name, name, refusal.attempts, refusal.reason)
            work.refused.add(refusal.node_id)
            if refusal.full and not work.wanted.deployment.named:
                # For these nodes the holders of GPUs are known now.
                fewer = work.wanted.deployment.gpus_per_replica - 1
                work.full[refusal.node_id] = fewer if refusal.at_most is None else refusal.at_most
            work.attempts += refusal.attempts
            work.where, work.reason = refusal.node_name, refusal.reason
        if work.lending is not None and work.lending.is_over:
            raise LeaseExpired(name, "its placement group did not come in time")
        work.replans += 1
        if work.replans >= work.most_replans:
            failure = ReservationFailed(name, work.where, work.attempts, work.reason)
            if work.atomic:
                raise failure
            if surplus := [i for i in work.wanted.replicas if i >= work.wanted.deployment.replicas]:
                self._release_some(work, surplus, in_place=False)
            self._wait(work, dict.fromkeys(work.wanted.unfinished(), str(failure)))

    def _wait(self, work: Work, reasons: dict[int, str]) -> None:
        """Makes replicas wait for room; from here on their declaration is durable."""
        before = work.wanted
        durable = work.wanted is work.durable and before.waiting_since is not None
        if work.wanted is not work.durable:
            self._surplus_told(work)
        keep = self.actions.note if durable else self.actions.commit
        work.wanted = work.durable = self.actions.wait(before, reasons, time.time(), keep)

    def _surplus_told(self, work: Work) -> None:
        """Reports as events the waiting replicas that are no longer declared."""
        if work.known is not None:
            for index in work.known.states.keys() - work.wanted.states.keys() - work.known.replicas.keys():
                self.feed.add(work.wanted.name, index, "released")
            work.known = work.wanted

    def _bring_back(self, name: str) -> None:
        """Places the earlier replicas again, as far as there is room."""
        known = self.state.get(name)
        if known is not None:
            self.bring_about(Work(known, known))


def differences(old: Deployment, new: Deployment) -> dict[str, tuple[str, str]]:
    """Field -> (what is declared, what was asked for), as text, for fields that differ."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    # Nested fields may name endpoints and key references: only report that they differ.
    return {
        field: ("", "")
        if isinstance(after[field] or before[field], dict)
        else (str(before[field]), str(after[field]))
        for field in after
        if before[field] != after[field]
    }
