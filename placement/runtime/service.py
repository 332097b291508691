"""The placement service: one actor that decides where deployments go and keeps what stands."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, TypeVar

import ray

from placement.core import planner
from placement.core.lifecycle import Event, State
from placement.core.replicas import Plan
from placement.core.snapshot import NEAR_LABELS, Policy, Snapshot
from placement.errors import (
    DeploymentConflict,
    ReservationFailed,
    UnknownDeployment,
    UnknownNode,
    Unplaceable,
    UnreadableRecord,
)
from placement.runtime import faults, groups, ledger
from placement.runtime.books import Books, Claim, Standing, Tally, held_replica
from placement.runtime.discovery import NodeInfo, NodeView, node_state
from placement.runtime.events import EventLog
from placement.runtime.fleet import MOST_LAG_SECONDS, VIEW_LAG_SECONDS, Fleet
from placement.runtime.keeper import Keeper
from placement.runtime.node_agent import FRESH_SECONDS
from placement.runtime.orders import Refusal
from placement.runtime.recovery import Recovery
from placement.runtime.report import status_report, topology_report
from placement.runtime.results import PlacementResult
from placement.wire.cluster import ClusterFile, HeldDeployment
from placement.wire.deployment import Deployment, PlacementConstraints
from placement.wire.files import parse_model
from placement.wire.plans import (
    Difference,
    ExplainedPlan,
    PlacementPlan,
    difference,
    explain_deployments,
    mix_of,
    plan_in_order,
    request_of,
)

T = TypeVar("T")

MAX_REPLANS = 5
STATUS_SECONDS = 5.0
"""How long ``status`` waits for nodes that have not said yet what their GPUs are."""
IDLE_SECONDS = 60.0
"""How long a node's actor stays where nothing is held: to Ray's autoscaler, which removes nodes that were idle for
minutes, a node with an actor is busy."""

logger = logging.getLogger(__name__)

DeploymentLike = Deployment | Mapping[str, Any]


class DeploymentPlacementActor(Recovery):
    """``ray.get_actor("placement", namespace="placement")``. Every method may be called at any time by anybody.

    Args:
        make_agent: creates (or finds) the node actor of a node.
        near: labels of which nodes near each other share the values, widest first.
        idle_seconds: how long a node actor stays on a node that holds nothing.
    """

    def __init__(
        self,
        make_agent: Callable[[NodeInfo], Any],
        near: Sequence[str] = NEAR_LABELS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._near = tuple(near)
        self._idle_seconds = max(1.0, idle_seconds)
        self._nodes = NodeView()
        self._lock = threading.Lock()
        self._turns: dict[str, _Turn] = {}
        self._books = Books()
        self._prefix = f"placement:{ledger.token()}:"
        self.fleet = Fleet(make_agent, self._books.holdings, self._prefix)
        self.draining: frozenset[str] = frozenset()
        self._events = EventLog(
            ledger.event_numbers(), ledger.save_event_numbers, self._books.standing.__contains__
        )
        self._ended: dict[str, int] = {}
        self._ended_at: dict[str, float] = {}
        self._unwritten: set[str] = set()
        self._undecided: dict[str, groups.LiveGroup] = {}
        self._reload()
        Keeper(self).start()

    # -- the public surface ------------------------------------------------------------------------

    @ray.method(concurrency_group="read")
    def ping(self) -> str:
        """Answers once the service is up, with the version of the package that it runs."""
        from placement import __version__

        return __version__

    @ray.method(concurrency_group="read")
    def settings(self) -> dict[str, Any]:
        """What :func:`placement.start` started it with: ``near`` and ``idle_seconds``."""
        return {"near": list(self._near), "idle_seconds": self._idle_seconds}

    def place(
        self, deployment: DeploymentLike, constraints: PlacementConstraints | Mapping[str, Any] | None = None
    ) -> PlacementResult:
        """Places all replicas of a deployment, or none.

        Placing an identical deployment again returns what stands.

        Args:
            deployment: a :class:`~placement.Deployment`, or a dict of its fields.
            constraints: limits the choice of nodes; replaces ``deployment.constraints``.

        Raises:
            InvalidDeployment: a field is refused.
            UnknownNode: the constraints name a node that the cluster lacks.
            UnreadableRecord: the ledger has a record of that name that this version cannot read.
            DeploymentConflict: the name stands with another declaration.
            Unplaceable: it fits nowhere now: ``NoGpuNodes``, ``NotEnoughGpus``, ``NoEgressNodes`` or
                ``NotEnoughEgress``.
            ReservationFailed: others kept taking the GPUs. In every case nothing of it stays reserved.
        """
        wanted = self._parse(deployment, constraints)
        with self._sole(wanted.name):
            standing = self._what_stands(wanted.name)
            if standing is not None:
                if standing.deployment == wanted:
                    return standing.result()
                raise DeploymentConflict(wanted.name, _differences(standing.deployment, wanted))
            self._require_readable(wanted.name)
            with self._refusal_told(wanted.name):
                return self._add(Standing(wanted), range(wanted.replicas)).result()

    def apply(
        self, deployment: DeploymentLike, constraints: PlacementConstraints | Mapping[str, Any] | None = None
    ) -> PlacementResult:
        """Makes what stands be as declared: places, adds or removes replicas, replaces only what changed.

        A replica that holds what is declared now (GPUs, CPUs, provider, API key, egress units), on nodes that meet the
        limits, stays. The others are replaced: beside the old ones if there is room, else after releasing them.
        Replicas that are ``pending`` already are tried, and may go on waiting.

        Raises:
            Same as :meth:`place`, but never ``DeploymentConflict``. What stood before still stands then; where it had
            to be released first, it is placed anew, or waits as ``pending``.
        """
        return self._apply(self._parse(deployment, constraints))[0]

    def _apply(self, wanted: Deployment) -> tuple[PlacementResult, bool]:
        """The same, and whether nothing of that name stood before."""
        with self._sole(wanted.name):
            standing = self._what_stands(wanted.name)
            if standing is None:
                self._require_readable(wanted.name)
                with self._refusal_told(wanted.name):
                    return self._add(Standing(wanted), range(wanted.replicas)).result(), True
            if standing.deployment == wanted and not standing.missing():
                return standing.result(), False
            with self._refusal_told(wanted.name):
                return self._change(standing, wanted).result(), False

    def apply_all(self, deployments: Sequence[DeploymentLike]) -> list[PlacementResult]:
        """Applies several deployments. If one fits nowhere, nothing is changed at all.

        In order, if that works; one that is to be near another, or apart from it, may come after it.
        If one cannot be reserved although it was planned, since others take GPUs meanwhile, those that this call
        placed anew are released again; changes to what stood before remain. So does what was placed by a call that
        died with the service halfway: sent again by Ray, it finds that standing.

        Raises:
            Same as :meth:`apply`.
        """
        wanted = [self._parse(one, None) for one in deployments]
        results: dict[int, PlacementResult] = {}
        fresh: list[str] = []
        try:
            for position, _ in self._plan_in_order(wanted):
                results[position], is_new = self._apply(wanted[position])
                if is_new:
                    fresh.append(wanted[position].name)
        except Exception:
            for name in fresh:
                try:
                    self.release(name)
                except Exception:
                    logger.exception("%r, which was placed just now, could not be released again", name)
            raise
        return [result for _, result in sorted(results.items())]

    @ray.method(concurrency_group="read")
    def plan(
        self, deployment: DeploymentLike, constraints: PlacementConstraints | Mapping[str, Any] | None = None
    ) -> PlacementPlan:
        """What applying would do now. Reserves nothing.

        Raises:
            Same as :meth:`apply`, but never ``ReservationFailed``.
        """
        return self.plan_all([self._parse(deployment, constraints)])[0]

    @ray.method(concurrency_group="read")
    def plan_all(self, deployments: Sequence[DeploymentLike]) -> list[PlacementPlan]:
        """What :meth:`apply_all` would do now, each deployment planned on top of the ones before."""
        wanted = [self._parse(one, None) for one in deployments]
        return [plan for _, plan in sorted(self._plan_in_order(wanted), key=itemgetter(0))]

    @ray.method(concurrency_group="read")
    def explain_all(self, deployments: Sequence[DeploymentLike]) -> list[ExplainedPlan]:
        """:meth:`plan_all`, with what became of every node; a refusal is an answer here, and ends the list.

        With one look: for a moment after a change, Ray's books may show less room than there is.
        """
        wanted = [self._parse(one, None) for one in deployments]
        return explain_deployments(*self._look(self._nodes.now()), wanted)

    @ray.method(concurrency_group="read")
    def snapshot(self) -> dict[str, Any]:
        """The cluster as the planner sees it now; JSON-ready, for ``placement plan --file``."""
        snapshot, held = self._look(self._nodes.now())
        return ClusterFile.of(snapshot, held.values()).model_dump(mode="json", exclude_none=True)

    def release(self, name: str) -> int:
        """Gives back everything that a deployment holds, and ends the workers in its groups.

        Returns:
            How many replicas were released.

        Raises:
            UnknownDeployment: no deployment of that name stands.
            UnreadableRecord: a later version of the service wrote its record. (If it is just broken, it is removed
                with all groups of that name, which are counted then.)
        """
        with self._sole(name):
            return self._release(name)

    @ray.method(concurrency_group="read")
    def get(self, name: str) -> PlacementResult:
        """Where a deployment's replicas are.

        Raises:
            UnknownDeployment: no deployment of that name stands.
        """
        standing = self._books.standing.get(name)
        if standing is None:
            raise UnknownDeployment(name, self._books.names())
        return standing.result()

    @ray.method(concurrency_group="read")
    def status(self) -> dict[str, Any]:
        """Nodes with their GPUs and who sits where, and deployments with their replicas; JSON-ready."""
        nodes = self._nodes.now()
        self.fleet.machines.meet(nodes, patience_seconds=STATUS_SECONDS)
        with self._lock:
            available = groups.available_resources()
            for node_id in self.fleet.settling():
                available.pop(node_id, None)
            return status_report(nodes, self._books, self.fleet, available)

    @ray.method(concurrency_group="read")
    def events(self, name: str, since: int = 0) -> list[dict[str, Any]]:
        """What happened to a deployment's replicas, the last 200 at most, since the service last started; JSON-ready.

        Of one that stands there is one at least. Of those that are gone, the 2,000 that changed last are known.

        Args:
            name: the deployment, which may be gone by now.
            since: the ``number`` of the last one already known.

        Raises:
            UnknownDeployment: nothing is known of that name.
        """
        if not self._events.known(name) and name not in self._books.standing:
            raise UnknownDeployment(name, self._books.names())
        return [one.to_dict() for one in self._events.since(name, since)]

    @ray.method(concurrency_group="watch")
    def watch(self, name: str, since: int = 0, timeout_seconds: float = 30.0) -> list[dict[str, Any]]:
        """The same, as soon as something has happened; empty if nothing did within the time.

        ``watch(name, seen)``, where ``seen`` is the ``number`` of the last one known, waits for the next change; with
        ``seen = 0`` all that is known comes at once. The name need not be known yet.
        """
        return [one.to_dict() for one in self._events.wait(name, since, min(timeout_seconds, 3600.0))]

    @ray.method(concurrency_group="read")
    def topology(self, node: str | None = None) -> list[dict[str, Any]]:
        """What each GPU node's GPUs report, read anew; JSON-ready.

        Raises:
            UnknownNode: ``node`` is given and no GPU node has that id, name or address.
        """
        nodes = [info for info in self._nodes.now() if info.gpu_count]
        if node is not None:
            chosen = [info for info in nodes if node in (info.id, info.name, info.address)]
            if not chosen:
                raise UnknownNode("--node", node, tuple(info.name for info in nodes))
            nodes = chosen
        self.fleet.machines.meet(nodes, again=True)
        return [topology_report(info, self.fleet.machines.facts.get(info.id)) for info in nodes]

    def release_all(self) -> list[str]:
        """Releases every deployment.

        Returns:
            Their names.
        """
        released = []
        for name in self._books.names():
            with contextlib.suppress(UnknownDeployment):  # somebody else was quicker
                self.release(name)
                released.append(name)
        return released

    def stop_agents(self) -> None:
        """Ends the node actors. Placement groups stay as they are."""
        self.fleet.agents.stop()

    # -- planning ----------------------------------------------------------------------------------

    def _parse(self, deployment: DeploymentLike, constraints: Any) -> Deployment:
        source = f"deployment {deployment.get('name')!r}" if isinstance(deployment, Mapping) else "deployment"
        wanted = parse_model(Deployment, deployment, source)
        if constraints is not None:
            limits = parse_model(
                PlacementConstraints, constraints, f"deployment {wanted.name!r}: constraints"
            )
            # Read anew, as a whole: constraints can contradict the rest.
            wanted = parse_model(Deployment, wanted.model_copy(update={"constraints": limits}), source)
        return wanted

    def _plan_in_order(self, wanted: Sequence[Deployment]) -> list[tuple[int, PlacementPlan]]:
        """What applying these would do, in the order in which to apply them; each with its position."""
        return self._patiently(lambda nodes, _: plan_in_order(*self._look(nodes), wanted))

    def _snapshot(
        self,
        nodes: list[NodeInfo],
        available: Mapping[str, Mapping[str, float]],
        sought: _Sought | None = None,
        avoided: Collection[str] = (),
        lag_seconds: float = VIEW_LAG_SECONDS,
    ) -> Snapshot:
        """The cluster as the planner sees it.

        Args:
            nodes: what is alive.
            available: node id -> resource -> free amount in Ray's books.
            sought: what it is for.
            avoided: nodes that are not to be planned on.
            lag_seconds: for how long after a change of ours the books are not believed.
        """
        full, refused = (sought.full, sought.refused) if sought else ({}, set())
        settling, tallies = self.fleet.settling(lag_seconds) - refused, self._books.tallies()
        states = []
        for info in nodes:
            state = node_state(
                info,
                self.fleet.machines.machine(info),
                None if info.id in settling else available.get(info.id, {}),
                tallies.get(info.id, Tally()),
                self.fleet.foreign.get(info.id, frozenset()),
                info.id in self.draining,
            )
            if info.id in full:
                room = full[info.id]
                some = dict(sorted(state.instances.items())[:room])
                state = replace(state, free=frozenset(sorted(state.free)[:room]), instances=some, rests={})
            if info.id in avoided:
                state = replace(state, problem=state.problem or "is avoided")
            states.append(state)
        return Snapshot(states, self._near)

    def _patiently(self, decide: Callable[[list[NodeInfo], float], T], fresh: bool = False) -> T:
        """Decides; before a refusal stands, looks again at all nodes, and at books that show our own last change.

        Three times in all: others' changes, which keep coming, are no reason to wait. The last time with what we
        know ourselves, since on an overrun machine the books lag by more.

        Args:
            decide: what to do with the nodes that are alive, and books that may lag by so many seconds.
            fresh: begin with the nodes as they are now.
        """
        nodes = self._nodes.now() if fresh else self._nodes.lately()
        for looks_left in (1, 0):
            changed_at = self.fleet.changed_at
            try:
                return decide(nodes, VIEW_LAG_SECONDS)
            except (Unplaceable, UnknownNode) as error:
                refusal = error
                if not self.fleet.catch_up(changed_at) and fresh:
                    break
                if looks_left:
                    nodes, fresh = self._nodes.now(), True
        with contextlib.suppress(Unplaceable, UnknownNode):
            return decide(nodes, MOST_LAG_SECONDS)
        raise refusal

    def _look(self, nodes: list[NodeInfo]) -> tuple[Snapshot, dict[str, HeldDeployment]]:
        """The cluster as it is now, and what stands on it."""
        self.fleet.machines.meet(nodes)
        with self._lock:
            return self._snapshot(nodes, groups.available_resources()), self._books.held()

    # -- reserving ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _sole(self, name: str, wait: bool = True) -> Iterator[bool]:
        """One change of a deployment at a time; different deployments change side by side.

        Yields:
            Whether it is ours to change; always, if we ``wait`` for it.
        """
        with self._lock:
            turn = self._turns.setdefault(name, _Turn())
            turn.users += 1
        mine = turn.lock.acquire(blocking=wait)
        try:
            yield mine
        finally:
            if mine:
                turn.lock.release()
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[name]

    def _what_stands(self, name: str) -> Standing | None:
        """What is to be changed; a release that was cut off comes first."""
        standing = self._books.standing.get(name)
        if standing is not None and standing.releasing:
            self._release(name)
            return None
        return standing

    def _add(self, standing: Standing, indices: Iterable[int]) -> Standing:
        """Reserves more replicas of a deployment, all or none, and keeps it."""
        added = tuple(indices)
        self._reserve(standing, added)
        faults.point("service.reserved")
        self._keep_added(standing, added)
        faults.point("service.kept")
        self._tell_places(standing, added)
        return standing

    def _keep(self, standing: Standing) -> None:
        """Has the ledger and the books say what a deployment is, or neither of them."""
        try:
            standing.save()
        except BaseException:  # whether it was written is not known
            self._write_back(standing.deployment.name)
            raise
        self._enter(standing)

    def _keep_added(self, standing: Standing, added: Iterable[int]) -> None:
        """Keeps replicas that were just reserved; what no record can tell of does not stay reserved."""
        try:
            self._keep(standing)
        except BaseException:
            self._give_back(standing, added)
            self.fleet.tell(standing.deployment.name)
            self._settle(standing.claims)
            raise

    def _note(self, standing: Standing) -> None:
        """Has the books say what a deployment is now that something of it is gone; the ledger, as soon as it can."""
        self._enter(standing)
        self._write_back(standing.deployment.name)

    def _enter(self, standing: Standing) -> None:
        with self._lock:
            self._books.standing[standing.deployment.name] = standing
            self._books.settle(standing.claims)
            standing.claims.clear()
        self.fleet.tell(standing.deployment.name)

    def _write_back(self, name: str) -> None:
        """Has the ledger say what the books say; later, if it cannot be reached."""
        standing = self._books.standing.get(name)
        try:
            standing.save() if standing else ledger.delete(name)
        except Exception:
            logger.exception("what stands of %r could not be written; trying again", name)
            self._unwritten.add(name)
        else:
            self._unwritten.discard(name)

    def _settle(self, claims: Sequence[Claim]) -> None:
        with self._lock:
            self._books.settle(claims)

    @contextlib.contextmanager
    def _refusal_told(self, name: str) -> Iterator[None]:
        """Has those who watch a deployment hear of a refusal, once nothing is left to try."""
        try:
            yield
        except Exception as refusal:
            self._events.add(name, None, "refused", str(refusal))
            raise

    def _change(self, old: Standing, wanted: Deployment) -> Standing:
        """Has what stands be as declared; what satisfies the declaration stays.

        The rest is placed anew: beside what it replaces, or in its place, and then that is given back. What was
        pending before may go on waiting.
        """
        name = wanted.name
        announced = Claim(wanted, ())  # from here on others keep away from it, if it wants that
        with self._lock:
            self._books.claim(announced)
        try:
            todo = self._difference(old, wanted)
            new = old.only([*todo.keep, *todo.may], wanted)
            going = [index for index in old.states if index not in new.states]
            try:
                if todo.must:
                    self._reserve(new, todo.must)
                    faults.point("service.reserved")
            except Unplaceable:
                if not todo.leaving:
                    raise
                new = self._change_in_place(old, wanted, todo)
            else:
                if todo.must:
                    self._keep_added(new, todo.must)  # first: what a record tells of is never given back
                    faults.point("service.kept")
                elif old.deployment != wanted:
                    self._keep(new)
                self._give_back(old, going)
                self.fleet.tell(name)
                self._tell_places(new, todo.must)
        finally:
            self._settle([announced])
        if old.deployment != wanted:
            changed = ", ".join(_differences(old.deployment, wanted))
            self._events.add(name, None, "changed", changed)
        if new.missing():
            self._mend(name)
        return self._books.standing[name]

    def _difference(self, standing: Standing, wanted: Deployment) -> Difference:
        """What is to be done for a deployment that is declared anew."""
        nodes = self._nodes.now()
        if standing.deployment.shape() != wanted.shape():
            self.fleet.machines.meet(nodes)
        with self._lock:
            snapshot = self._snapshot(nodes, groups.available_resources())
        return difference(snapshot, standing.held(), wanted)

    def _change_in_place(self, old: Standing, wanted: Deployment, todo: Difference) -> Standing:
        """Gives back what leaves first, if that makes room for what is to be placed."""
        name, kept = wanted.name, [*todo.keep, *todo.may]
        leaving = [part for parts in todo.leaving.values() for part in parts]
        stays = old.only(todo.keep, wanted)
        nodes = self._nodes.now()
        with self._lock:
            snapshot = self._snapshot(nodes, groups.available_resources())
            snapshot = planner.vacate(snapshot, leaving, name, old.deployment.calls)
            outcome = self._decide(snapshot, _Sought(wanted, todo.must, stays.nodes(), mending=False))
        if isinstance(outcome, Unplaceable):
            raise outcome from None
        rest = old.copy()
        going = [index for index in old.states if index not in kept]
        self._give_back(rest, going)
        rest.states |= dict.fromkeys(going, State.PENDING)
        rest.reasons |= dict.fromkeys(going, "its room was given back for what replaces it")
        self._note(rest)
        try:
            return self._add(rest.only(kept, wanted), todo.must)
        except Exception:  # what stood stands again, or as soon as there is room for it
            self._mend(name)
            raise

    def _reserve(self, standing: Standing, indices: tuple[int, ...], mending: bool = False) -> None:
        """Plans and reserves replicas, all or none, and adds them to ``standing``.

        A node may refuse, since the plan is made with books that lag and other users act meanwhile. Then
        the plan is made anew, a bounded number of times.
        """
        for index in indices:
            standing.happen(index, Event.RESERVE)
        try:
            self._reserve_all(standing, indices, mending)
        except BaseException:
            for index in indices:
                standing.happen(index, Event.REFUSED)
            raise
        for index in indices:
            standing.happen(index, Event.RESERVED)
            standing.reasons.pop(index, None)

    def _reserve_all(self, standing: Standing, indices: tuple[int, ...], mending: bool) -> None:
        wanted = standing.deployment
        sought = _Sought(wanted, indices, standing.nodes(), mending)
        where, attempts, reason = "", 0, ""
        for replan in range(MAX_REPLANS):
            nodes, claim = self._patiently(
                lambda nodes, lag_seconds: (nodes, self._claim(nodes, lag_seconds, sought)), fresh=replan > 0
            )
            faults.point("service.planned")
            try:
                reserved, refusals = self.fleet.reserve(claim, nodes)
                if refusals:
                    self.fleet.give_back(reserved)
                    self.fleet.tell(wanted.name)
            except BaseException:
                self._settle([claim])
                raise
            if not refusals:
                for order, assignment in reserved:
                    standing.add(order, assignment)
                taken = tuple(held_replica(assignment).planned() for _, assignment in reserved)
                with self._lock:  # until it stands in the books; what is really held may not be as planned
                    standing.claims.append(self._books.claim(replace(claim, replicas=taken)))
                    self._books.settle([claim])
                return
            self._settle([claim])
            for refusal in refusals:
                where, attempts, reason = refusal.node_name, attempts + refusal.attempts, refusal.reason
                sought.learn(refusal)
        raise ReservationFailed(wanted.name, where, attempts, reason)

    def _claim(self, nodes: list[NodeInfo], lag_seconds: float, sought: _Sought) -> Claim:
        """Plans, and claims what was planned.

        First without the nodes that refused, on which actors failed lately, or that have not said yet what they
        have; if there is no room on the others, with them.
        """
        machines = self.fleet.machines
        avoided = sought.refused | self.fleet.agents.ailing()
        if not sought.deployment.remote:
            if sought.deployment.needs.free_memory_bytes:
                machines.meet(nodes, again=True, max_age_seconds=FRESH_SECONDS)
            else:
                machines.meet(nodes, patience_seconds=0.0)
            avoided |= machines.strangers(nodes)
        if avoided:
            with contextlib.suppress(Unplaceable):
                return self._claim_without(avoided, nodes, lag_seconds, sought)
            if not sought.deployment.remote:
                machines.meet(nodes)
        return self._claim_without((), nodes, lag_seconds, sought)

    def _claim_without(
        self, avoided: Collection[str], nodes: list[NodeInfo], lag_seconds: float, sought: _Sought
    ) -> Claim:
        with self._lock:
            snapshot = self._snapshot(nodes, groups.available_resources(), sought, avoided, lag_seconds)
            outcome = self._decide(snapshot, sought)
            if isinstance(outcome, Unplaceable):
                raise outcome
            return self._books.claim(Claim(sought.deployment, outcome.replicas, outcome.set_size))

    def _decide(self, snapshot: Snapshot, sought: _Sought) -> Plan | Unplaceable:
        """Plans beside all that stands and is under way. Under the lock."""
        wanted = sought.deployment
        request = request_of(
            wanted, sought.indices, sought.standing, snapshot, sought.mending, self._books.declared()
        )
        if wanted.policy is Policy.FRAGMENTATION:
            others = [one.deployment for one in self._books.standing.values()]
            snapshot = snapshot.changed((), mix_of(snapshot, others))
        return planner.plan(snapshot, request)

    def _give_back(self, standing: Standing, indices: Iterable[int]) -> None:
        """Removes the groups of some replicas, and the replicas from ``standing``."""
        leaving = tuple(indices)
        for index in leaving:
            if standing.states[index] is not State.RELEASING:
                standing.happen(index, Event.RELEASE)
        held = [index for index in leaving if index in standing.replicas]
        self.fleet.give_back([(standing.orders[i], part) for i in held for part in standing.replicas[i]])
        faults.point("service.given_back")
        for index in held:
            del standing.orders[index], standing.replicas[index]
        for index in leaving:
            standing.happen(index, Event.RELEASED)
            standing.reasons.pop(index, None)
            self._events.add(standing.deployment.name, index, "released")

    def _tell_places(self, standing: Standing, indices: Iterable[int]) -> None:
        for index in indices:
            where = ", ".join(
                f"{part.node_name} GPUs {part.gpus}" if part.gpus else part.node_name
                for part in standing.replicas[index]
            )
            self._events.add(standing.deployment.name, index, standing.states[index], f"on {where}")

    def _require_readable(self, name: str) -> None:
        record = self._books.unreadable.get(name)
        if record is not None:
            raise UnreadableRecord(name, record.problem, record.newer)


@dataclass
class _Sought:
    """Replicas to be reserved, and what was learned of nodes that refused.

    Attributes:
        standing: node id -> replicas of the deployment that begin there already.
        mending: they are placed anew after a death.
        full: node id -> most whole GPUs or instances that may be planned there.
        refused: nodes that refused, for whatever reason; of these Ray's books are believed.
    """

    deployment: Deployment
    indices: tuple[int, ...]
    standing: Mapping[str, int]
    mending: bool
    full: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def learn(self, refusal: Refusal) -> None:
        """Notes why a node refused."""
        self.refused.add(refusal.node_id)
        if refusal.full:
            fewer = self.deployment.gpus_per_replica - 1
            self.full[refusal.node_id] = fewer if refusal.room is None else refusal.room


@dataclass
class _Turn:
    """Whose turn it is to change a deployment, and how many are there or wait for it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


def _differences(old: Deployment, new: Deployment) -> dict[str, tuple[str, str]]:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    # Nested fields may name endpoints and key references: say only that they differ.
    return {
        field: ("", "")
        if isinstance(after[field] or before[field], dict)
        else (str(before[field]), str(after[field]))
        for field in after
        if before[field] != after[field]
    }
