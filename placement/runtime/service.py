"""The placement service: one actor that decides where deployments go and keeps what stands."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from placement.core import planner
from placement.core.planner import Plan, PlannedReplica, Request
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import DeploymentConflict, ReservationFailed, UnknownDeployment, UnknownNode, Unplaceable
from placement.runtime import groups, ledger
from placement.runtime.books import Books, Claim, Standing
from placement.runtime.discovery import NodeInfo, live_nodes
from placement.runtime.node_agent import Order, Reply
from placement.runtime.report import status_report, topology_report
from placement.runtime.results import NodeAssignment, PlacementPlan, PlacementResult, PlannedAssignment
from placement.wire.deployment import Deployment, PlacementConstraints
from placement.wire.facts import NodeFacts
from placement.wire.files import parse_model

MAX_REPLANS = 5
FACTS_DEADLINE_SECONDS = 45.0
"""A first NVML reading without persistence mode takes up to 30 s on 8 GPUs (docs/design.md, sources)."""
RESERVE_DEADLINE_SECONDS = 180.0
VIEW_LAG_SECONDS = 0.25
"""No refusal is based on books that may be older than our own last change."""

logger = logging.getLogger(__name__)

DeploymentLike = Deployment | Mapping[str, Any]


class DeploymentPlacementActor:
    """``ray.get_actor("placement", namespace="placement")``. Every method may be called at any time by anybody.

    Args:
        make_agent: creates (or finds) the node actor of a node.
    """

    def __init__(self, make_agent: Callable[[NodeInfo], Any]) -> None:
        self._make_agent = make_agent
        self._lock = threading.Lock()
        self._name_locks: dict[str, threading.Lock] = {}
        self._books = Books()
        self._agents: dict[str, Any] = {}
        self._facts: dict[str, NodeFacts] = {}
        self._shapes: dict[str, Topology] = {}
        self._changed_at = float("-inf")
        self._prefix = f"placement:{ledger.token()}:"
        self._reload()
        self._meet(live_nodes())

    # -- the public surface ------------------------------------------------------------------------

    def ping(self) -> str:
        """Answers once the service is up, with the version of the package that it runs."""
        from placement import __version__

        return __version__

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
            DeploymentConflict: the name stands with another declaration.
            Unplaceable: it fits nowhere now (``NoGpuNodes``, ``NotEnoughGpus``, ``NoEgressNodes``, ``NotEnoughEgress``).
            ReservationFailed: others kept taking the GPUs. In every case nothing of it stays reserved.
        """
        wanted = self._parse(deployment, constraints)
        with self._sole(wanted.name):
            standing = self._books.standing.get(wanted.name)
            if standing is not None:
                if standing.deployment == wanted:
                    return standing.result()
                raise DeploymentConflict(wanted.name, _differences(standing.deployment, wanted))
            return self._add(Standing(wanted), range(wanted.replicas)).result()

    def apply(
        self, deployment: DeploymentLike, constraints: PlacementConstraints | Mapping[str, Any] | None = None
    ) -> PlacementResult:
        """Makes what stands be as declared: places, adds or removes replicas, replaces only what changed.

        A change of shape (GPUs, provider, API key, egress units, constraints) replaces the replicas: beside the old
        ones if there is room, else after releasing them. Any other change keeps them.

        Raises:
            Same as :meth:`place`, but never ``DeploymentConflict``. What stood before still stands then.
        """
        wanted = self._parse(deployment, constraints)
        with self._sole(wanted.name):
            standing = self._books.standing.get(wanted.name)
            if standing is None:
                return self._add(Standing(wanted), range(wanted.replicas)).result()
            if standing.deployment == wanted and len(standing.replicas) == wanted.replicas:
                return standing.result()
            if standing.deployment.shape() != wanted.shape():
                return self._replace(standing, wanted).result()
            surplus = [index for index in standing.replicas if index >= wanted.replicas]
            missing = [index for index in range(wanted.replicas) if index not in standing.replicas]
            changed = Standing(wanted, dict(standing.replicas), dict(standing.orders))
            if missing:
                self._add(changed, missing)
            if surplus:
                self._give_back(changed, surplus)
            self._keep(changed)
            return changed.result()

    def apply_all(self, deployments: Sequence[DeploymentLike]) -> list[PlacementResult]:
        """Applies several deployments, in order. If one fits nowhere, nothing is changed at all.

        Raises:
            Same as :meth:`apply`. Deployments that this call placed anew are released again then.
        """
        wanted = [self._parse(one, None) for one in deployments]
        self.plan_all(wanted)
        results: list[PlacementResult] = []
        fresh: list[str] = []
        try:
            for one in wanted:
                is_new = one.name not in self._books.standing
                results.append(self.apply(one))
                if is_new:
                    fresh.append(one.name)
        except Exception:
            for name in fresh:
                self.release(name)
            raise
        return results

    def plan(
        self, deployment: DeploymentLike, constraints: PlacementConstraints | Mapping[str, Any] | None = None
    ) -> PlacementPlan:
        """What applying would do now. Reserves nothing.

        Raises:
            Same as :meth:`apply`, but never ``ReservationFailed``.
        """
        return self.plan_all([self._parse(deployment, constraints)])[0]

    def plan_all(self, deployments: Sequence[DeploymentLike]) -> list[PlacementPlan]:
        """What :meth:`apply_all` would do now, each deployment planned on top of the ones before."""
        wanted = [self._parse(one, None) for one in deployments]
        return self._patiently(lambda: self._plan_all(wanted))

    def release(self, name: str) -> int:
        """Gives back everything that a deployment holds, and ends the workers in its groups.

        Returns:
            How many replicas were released.

        Raises:
            UnknownDeployment: no deployment of that name stands.
        """
        with self._sole(name):
            standing = self._books.standing.get(name)
            if standing is None:
                raise UnknownDeployment(name, self._books.names())
            count = len(standing.replicas)
            self._give_back(standing, list(standing.replicas))
            ledger.delete(name)
            with self._lock:
                del self._books.standing[name]
            return count

    def get(self, name: str) -> PlacementResult:
        """Where a deployment's replicas are.

        Raises:
            UnknownDeployment: no deployment of that name stands.
        """
        standing = self._books.standing.get(name)
        if standing is None:
            raise UnknownDeployment(name, self._books.names())
        return standing.result()

    def status(self) -> dict[str, Any]:
        """Nodes with their GPUs and who sits where, and deployments with their replicas; JSON-ready."""
        nodes = live_nodes()
        self._meet(nodes)
        with self._lock:
            return status_report(nodes, self._books, self._shapes, self._facts, groups.available_resources())

    def topology(self, node: str | None = None) -> list[dict[str, Any]]:
        """What each GPU node's GPUs report, read anew; JSON-ready.

        Raises:
            UnknownNode: ``node`` is given and no GPU node has that id, name or address.
        """
        nodes = [info for info in live_nodes() if info.gpu_count]
        if node is not None:
            chosen = [info for info in nodes if node in (info.id, info.name, info.address)]
            if not chosen:
                raise UnknownNode("--node", node, tuple(info.name for info in nodes))
            nodes = chosen
        self._meet(nodes, again=True)
        return [topology_report(info, self._facts.get(info.id)) for info in nodes]

    def release_all(self) -> list[str]:
        """Releases every deployment.

        Returns:
            Their names.
        """
        names = self._books.names()
        for name in names:
            self.release(name)
        return list(names)

    def stop_agents(self) -> None:
        """Ends the node actors. Placement groups stay as they are."""
        with self._lock:
            agents, self._agents = self._agents, {}
        for agent in agents.values():
            ray.kill(agent)

    # -- planning ----------------------------------------------------------------------------------

    def _parse(self, deployment: DeploymentLike, constraints: Any) -> Deployment:
        source = f"deployment {deployment.get('name')!r}" if isinstance(deployment, Mapping) else "deployment"
        wanted = parse_model(Deployment, deployment, source)
        if constraints is not None:
            limits = parse_model(PlacementConstraints, constraints, f"deployment {wanted.name!r}: constraints")
            wanted = wanted.model_copy(update={"constraints": limits})
        return wanted

    def _request(self, wanted: Deployment, indices: Iterable[int], standing: Mapping[str, int], nodes: list[NodeInfo]) -> Request:
        limits = wanted.constraints or PlacementConstraints()
        known = {name for info in nodes for name in (info.id, info.name, info.address)}
        for field in ("gpu_nodes", "egress_nodes", "egress_preference"):
            for name in getattr(limits, field) or ():
                if name not in known:
                    raise UnknownNode(f"constraints.{field}", name, tuple(info.name for info in nodes))
        return Request(
            deployment=wanted.name,
            replicas=tuple(indices),
            gpus=wanted.gpus_per_replica,
            provider=wanted.provider,
            key=wanted.key_fingerprint,
            egress=wanted.egress_per_replica,
            gpu_nodes=limits.gpu_nodes,
            egress_nodes=limits.egress_nodes,
            egress_preference=limits.egress_preference,
            standing=dict(standing),
        )

    def _snapshot(self, nodes: list[NodeInfo], ignoring: str | None = None, full: Mapping[str, int] | None = None) -> Snapshot:
        return self._books.snapshot(nodes, self._shapes, groups.available_resources(), ignoring, full)

    def _patiently(self, decide: Callable[[], Any]) -> Any:
        """Decides; before a refusal stands, looks once more with books that show our own last change."""
        while True:
            changed_at = self._changed_at
            try:
                return decide()
            except Unplaceable:
                behind = VIEW_LAG_SECONDS - (time.monotonic() - changed_at)
                if behind <= 0:
                    raise
                time.sleep(behind)

    def _plan_all(self, wanted: Sequence[Deployment]) -> list[PlacementPlan]:
        nodes = live_nodes()
        self._meet(nodes)
        with self._lock:
            snapshot = self._snapshot(nodes)
            plans = []
            for one in wanted:
                standing = self._books.standing.get(one.name)
                keep: dict[int, NodeAssignment] = {}
                if standing is not None and standing.deployment.shape() == one.shape():
                    keep = {i: a for i, a in standing.replicas.items() if i < one.replicas}
                missing = [index for index in range(one.replicas) if index not in keep]
                where = Standing(one, keep).nodes()
                request = self._request(one, missing, where, nodes)
                outcome = planner.plan(snapshot, request)
                if isinstance(outcome, Unplaceable) and standing is not None and not keep:
                    outcome = planner.plan(self._snapshot(nodes, ignoring=one.name), request)
                if isinstance(outcome, Unplaceable):
                    raise outcome
                for replica in outcome.replicas:
                    if set(replica.gpus) <= snapshot.node(replica.node_id).free:
                        snapshot = planner.occupy(snapshot, request, replica)
                plans.append(self._preview(one, keep, outcome, snapshot))
            return plans

    def _preview(self, one: Deployment, keep: Mapping[int, NodeAssignment], outcome: Plan, snapshot: Snapshot) -> PlacementPlan:
        planned = {
            index: PlannedAssignment(
                index, a.node, a.node_name, list(a.gpus), a.weakest_link, a.weakest_gb_per_s, a.egress_resource, a.egress_units
            )
            for index, a in keep.items()
        }
        for replica in outcome.replicas:
            node = snapshot.node(replica.node_id)
            value = score(node.topology, replica.gpus) if len(replica.gpus) > 1 else None
            known = value is not None and value.weakest is not None and str(value.weakest) != "?"
            planned[replica.replica_index] = PlannedAssignment(
                replica.replica_index,
                replica.node_id,
                node.name,
                list(replica.gpus),
                str(value.weakest) if value is not None and value.weakest is not None else None,
                value.weakest_gb_per_s if value is not None and known else None,
                replica.egress_resource,
                one.egress_per_replica,
            )
        return PlacementPlan(one.name, [planned[i] for i in sorted(planned)], standing=not outcome.replicas)

    # -- reserving ---------------------------------------------------------------------------------

    @contextmanager
    def _sole(self, name: str) -> Any:
        """One change of a deployment at a time; different deployments change side by side."""
        with self._lock:
            lock = self._name_locks.setdefault(name, threading.Lock())
        with lock:
            yield

    def _add(self, standing: Standing, indices: Iterable[int]) -> Standing:
        """Reserves more replicas of a deployment, all or none, and keeps it."""
        self._reserve(standing, tuple(indices))
        self._keep(standing)
        return standing

    def _keep(self, standing: Standing) -> None:
        standing.save()
        with self._lock:
            self._books.standing[standing.deployment.name] = standing

    def _replace(self, old: Standing, wanted: Deployment) -> Standing:
        new = Standing(wanted)
        try:
            self._reserve(new, tuple(range(wanted.replicas)))
        except Unplaceable as refusal:
            nodes = live_nodes()
            with self._lock:
                snapshot = self._snapshot(nodes, ignoring=wanted.name)
                outcome = planner.plan(snapshot, self._request(wanted, range(wanted.replicas), {}, nodes))
            if isinstance(outcome, Unplaceable):
                raise refusal from None
            before, indices = old.deployment, tuple(old.replicas)
            self._give_back(old, list(indices))
            try:
                return self._add(new, range(wanted.replicas))
            except Exception:
                self._add(Standing(before), indices)
                raise
        self._give_back(old, list(old.replicas))
        self._keep(new)
        return new

    def _reserve(self, standing: Standing, indices: tuple[int, ...]) -> None:
        """Plans and reserves replicas, all or none, and adds them to ``standing``.

        A node may refuse, since the plan is made with books that lag and other users act meanwhile. Then
        the plan is made anew, a bounded number of times.
        """
        wanted = standing.deployment
        full: dict[str, int] = {}
        where, attempts, reason = "", 0, ""
        for _ in range(MAX_REPLANS):
            claim = self._patiently(lambda: self._claim(wanted, indices, standing.nodes(), full))
            try:
                filled, refusals = self._enact(claim)
            finally:
                with self._lock:
                    self._books.claims.remove(claim)
            if not refusals:
                for order, assignment in filled:
                    standing.replicas[assignment.replica_index] = assignment
                    standing.orders[assignment.replica_index] = order
                return
            undone = Standing(wanted, {a.replica_index: a for _, a in filled}, {a.replica_index: o for o, a in filled})
            self._give_back(undone, list(undone.replicas))
            for node, tried, why, is_full in refusals:
                where, attempts, reason = node.name, attempts + tried, why
                if is_full:
                    full[node.id] = wanted.gpus_per_replica - 1
        raise ReservationFailed(wanted.name, where, attempts, reason)

    def _claim(self, wanted: Deployment, indices: tuple[int, ...], standing: Mapping[str, int], full: Mapping[str, int]) -> Claim:
        nodes = live_nodes()
        self._meet(nodes)
        with self._lock:
            request = self._request(wanted, indices, standing, nodes)
            outcome = planner.plan(self._snapshot(nodes, full=full), request)
            if isinstance(outcome, Unplaceable):
                raise outcome
            claim = Claim(wanted, outcome.replicas)
            self._books.claims.append(claim)
            return claim

    def _enact(
        self, claim: Claim
    ) -> tuple[list[tuple[str, NodeAssignment]], list[tuple[NodeInfo, int, str, bool]]]:
        """Reserves a claim on all its nodes side by side.

        Returns:
            (order name, assignment) of what was reserved, and (node, attempts, reason, full?) of each refusal.
        """
        nodes = {info.id: info for info in live_nodes()}
        names = {r.replica_index: f"{self._prefix}{claim.deployment.name}:{r.replica_index}:{secrets.token_hex(4)}" for r in claim.replicas}
        by_node: dict[str, list[PlannedReplica]] = {}
        for replica in claim.replicas:
            by_node.setdefault(replica.node_id, []).append(replica)

        filled: list[tuple[str, NodeAssignment]] = []
        refusals: list[tuple[NodeInfo, int, str, bool]] = []
        pending: list[tuple[str, Any]] = []
        for node_id, replicas in by_node.items():
            info = nodes.get(node_id)
            if info is None:
                gone = NodeInfo(node_id, node_id[:12], "", 0)
                refusals.append((gone, 1, "the node died", False))
            elif claim.deployment.remote:
                self._reserve_egress(info, claim.deployment, replicas, names, filled, refusals)
            else:
                orders = [Order(names[r.replica_index], claim.deployment.gpus_per_replica) for r in replicas]
                pending.append((node_id, self._agent(info).reserve.remote(orders)))
        for node_id, reference in pending:
            info = nodes[node_id]
            try:
                reply: Reply = ray.get(reference, timeout=RESERVE_DEADLINE_SECONDS)
            except ray.exceptions.RayError as error:
                logger.exception("the node actor of %s failed", info.name)
                if not isinstance(error, ray.exceptions.RayTaskError):
                    self._lose_agent(node_id)
                refusals.append((info, 1, f"its node actor failed: {type(error).__name__}", False))
                continue
            with self._lock:
                self._books.foreign[node_id] = frozenset(reply.foreign_gpus)
            if reply.refused is not None:
                refusals.append((info, reply.refused.attempts, reply.refused.reason, reply.refused.full))
            for replica, one in zip(by_node[node_id], reply.filled, strict=False):
                assignment = NodeAssignment(
                    replica.replica_index, node_id, list(one.gpus), one.group, list(one.bundles), info.name,
                    list(one.ray_gpus), one.weakest_link, one.weakest_gb_per_s, one.ray_weakest_gb_per_s,
                )  # fmt: skip
                filled.append((one.order.name, assignment))
        self._changed_at = time.monotonic()
        return filled, refusals

    def _reserve_egress(
        self,
        info: NodeInfo,
        wanted: Deployment,
        replicas: Sequence[PlannedReplica],
        names: Mapping[int, str],
        filled: list[tuple[str, NodeAssignment]],
        refusals: list[tuple[NodeInfo, int, str, bool]],
    ) -> None:
        """Reserves egress capacity. There are no slots to steer, so that Ray's own table verifies it."""
        made = []
        for replica in replicas:
            resource, units = replica.egress_resource or "", wanted.egress_per_replica
            group = groups.create_group(names[replica.replica_index], [{resource: units}], info.id)
            made.append((replica, group))
        for replica, group in made:
            if not groups.ready_or_removed(group) or groups.node_of_group(group) != info.id:
                groups.remove_group(group)
                refusals.append((info, 1, "another Ray user took egress capacity meanwhile", False))
                continue
            assignment = NodeAssignment(
                replica.replica_index, info.id, [], group, [0], info.name,
                egress_resource=replica.egress_resource, egress_units=wanted.egress_per_replica,
            )  # fmt: skip
            filled.append((names[replica.replica_index], assignment))

    def _give_back(self, standing: Standing, indices: Iterable[int]) -> None:
        """Removes the groups of some replicas, by their node actors so that no steering is disturbed."""
        by_node: dict[str, list[tuple[str, Any]]] = {}
        for index in indices:
            assignment = standing.replicas.pop(index)
            order = standing.orders.pop(index)
            if assignment.gpus and assignment.node in self._agents:
                by_node.setdefault(assignment.node, []).append((order, assignment.placement_group))
            else:
                groups.remove_group(assignment.placement_group, ready=True)
        calls = {node: (self._agents[node].release.remote(orders), orders) for node, orders in by_node.items()}
        for node, (reference, orders) in calls.items():
            try:
                ray.get(reference, timeout=RESERVE_DEADLINE_SECONDS)
            except ray.exceptions.RayError:
                self._lose_agent(node)
                for _, group in orders:
                    groups.remove_group(group)
        self._changed_at = time.monotonic()

    # -- nodes and their actors --------------------------------------------------------------------

    def _agent(self, info: NodeInfo) -> Any:
        with self._lock:
            agent = self._agents.get(info.id)
            if agent is None:
                agent = self._agents[info.id] = self._make_agent(info)
                agent.adopt.remote(self._books.holdings(info.id))
            return agent

    def _lose_agent(self, node_id: str) -> None:
        with self._lock:
            self._agents.pop(node_id, None)

    def _meet(self, nodes: Sequence[NodeInfo], again: bool = False) -> None:
        """Makes sure that every GPU node has its actor and has said what its GPUs are, all side by side."""
        asked = {
            info.id: self._agent(info).facts.remote()
            for info in nodes
            if info.gpu_count and info.label_problem() is None and (again or info.id not in self._facts)
        }
        if not asked:
            return
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=FACTS_DEADLINE_SECONDS)
        for node_id, reference in asked.items():
            try:
                facts = ray.get(reference, timeout=0)
            except ray.exceptions.RayError as error:
                facts = NodeFacts(source="none", problem=f"the node actor does not answer: {type(error).__name__}")
                self._lose_agent(node_id)
            with self._lock:
                if facts.gpus or node_id not in self._shapes:
                    self._shapes[node_id] = facts.topology()
                self._facts[node_id] = facts

    def _reload(self) -> None:
        """Reads the ledger, and removes groups that carry our token but stand in no record."""
        for record in ledger.records():
            standing = Standing.load(record)
            self._books.standing[standing.deployment.name] = standing
        kept = {a.placement_group.id.hex() for _, a in self._books.assignments()}
        for group_id in groups.live_groups(lambda name: name.startswith(self._prefix)):
            if group_id not in kept:
                groups.remove_group(groups.group_from_hex(group_id))


def _differences(old: Deployment, new: Deployment) -> dict[str, tuple[str, str]]:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    # Nested fields may name endpoints and key references: say only that they differ.
    return {
        field: (str(before[field]), str(after[field])) if not isinstance(after[field] or before[field], dict) else ("one", "another")
        for field in after
        if before[field] != after[field]
    }
