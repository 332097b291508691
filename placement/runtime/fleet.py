"""The GPU nodes' actors: meeting them, reserving on many of them side by side, giving back."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from placement.core.replicas import PlannedReplica
from placement.core.score import WHOLE
from placement.core.snapshot import Policy
from placement.runtime import faults, groups, ledger
from placement.runtime.books import Claim
from placement.runtime.discovery import NodeInfo
from placement.runtime.node_agent import Part, Reply, living_agents
from placement.runtime.reservation import Holding, Machine, Order, Refused, machine_of
from placement.runtime.results import NodeAssignment
from placement.wire.deployment import Deployment
from placement.wire.facts import NodeFacts

FACTS_DEADLINE_SECONDS = 45.0
"""A first NVML reading takes 30 s on an 8-GPU machine without persistence mode (Azure/aks-gpu#105)."""
ASK_AGAIN_SECONDS = 30.0
"""When a node whose actor did not answer is asked again what its GPUs are."""
RESERVE_DEADLINE_SECONDS = 60.0
"""Some ten times what a node actor's bounded attempts take at worst; one that hangs is done without."""
SETTLE_DEADLINE_SECONDS = 20.0
"""A reservation that was under way when the service died ends within its node actor's bounded attempts."""
GANG_DEADLINE_SECONDS = 0.3
"""Long enough for Ray to try twice; see :func:`~placement.runtime.groups.ready_or_removed`."""
MAX_GANG_ATTEMPTS = 6
VIEW_LAG_SECONDS = 0.25
"""Ray's books follow a change after 0.1 s (measured), and as long again if a worker has to die first."""

logger = logging.getLogger(__name__)

Reserved = tuple[str, NodeAssignment]
"""The name of a replica's order, which begins its group's name, and the assignment."""


@dataclass(frozen=True)
class Refusal:
    """A node that did not reserve what was planned. ``full``: it has too few GPUs free, ``room`` at most."""

    node_id: str
    node_name: str
    attempts: int
    reason: str
    full: bool = False
    room: int | None = None


class Fleet:
    """All node actors. Thread-safe.

    Args:
        make_agent: creates (or finds) the actor of a node.
        holdings: node id -> order name -> what stands there, for an actor that is new.
        prefix: begins the name of every group that is made.
    """

    def __init__(
        self,
        make_agent: Callable[[NodeInfo], Any],
        holdings: Callable[[str], dict[str, Holding]],
        prefix: str,
    ) -> None:
        self._make_agent = make_agent
        self._holdings = holdings
        self._prefix = prefix
        self._lock = threading.Lock()
        self._agents: dict[str, Any] = {}
        self.facts: dict[str, NodeFacts] = {}
        self._machines: dict[str, Machine] = {}
        self.foreign: dict[str, frozenset[int]] = {}
        self.changed_at = float("-inf")
        self._changed: dict[str, float] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._used: dict[str, float] = {}
        self._late: list[Any] = []
        self._unanswered: dict[str, float] = {}
        self._in_doubt = False

    def settling(self) -> frozenset[str]:
        """Nodes of which Ray's books may not yet show our own last change; what we know of them is newer."""
        now = time.monotonic()
        return frozenset(node for node, at in self._changed.items() if now - at < VIEW_LAG_SECONDS)

    def meet(
        self, nodes: Sequence[NodeInfo], again: bool = False, max_age_seconds: float | None = None
    ) -> None:
        """Makes sure that every GPU node has said what its GPUs are, all side by side."""
        now = time.monotonic()
        asked = {
            info.id: self._agent(info).facts.remote(max_age_seconds)
            for info in nodes
            if info.gpu_count
            and info.label_problem() is None
            and (
                again
                or info.id not in self.facts
                or now - self._unanswered.get(info.id, now) > ASK_AGAIN_SECONDS
            )
        }
        if not asked:
            return
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=FACTS_DEADLINE_SECONDS)
        for node_id, reference in asked.items():
            self._unanswered.pop(node_id, None)
            try:
                facts = ray.get(reference, timeout=0)
            except ray.exceptions.RayError as error:
                problem = f"the node actor does not answer: {type(error).__name__}"
                facts = NodeFacts(source="none", problem=problem)
                self._unanswered[node_id] = time.monotonic()
                self._lost(node_id, error, reference)
            with self._lock:
                known = self.facts.get(node_id)
                if facts.gpus or known is None:
                    self.facts[node_id] = facts
                    self._machines.pop(node_id, None)
            if facts.gpus and not (known and known.gpus):
                ledger.save_facts(node_id, facts)

    def recall(self, nodes: Sequence[NodeInfo]) -> None:
        """Takes up what an earlier service knew of these nodes, and forgets the others.

        Waits until the node actors that it left have ended what they were doing, and know what stands on their nodes.
        """
        alive = {info.id for info in nodes}
        for node_id, facts in ledger.facts().items():
            if node_id not in alive:
                ledger.forget_facts(node_id)
            elif facts is not None:
                self.facts[node_id] = facts
        living = living_agents()
        told = []
        for info in nodes:
            if info.id in living:
                agent = self._agent(info)
                agent.cancel.remote()  # what was prepared for a group that nobody will make
                told.append(agent.adopt.remote(self._holdings(info.id)))
        if told:
            _, late = ray.wait(told, num_returns=len(told), timeout=SETTLE_DEADLINE_SECONDS)
            with self._lock:
                self._late += late

    def in_doubt(self) -> bool:
        """Whether, since the last call, groups may have been left over that nobody knows of.

        That is so when a node actor has died, and when one that did not answer in time is done at last.
        """
        with self._lock:
            if self._late:
                done, self._late = ray.wait(self._late, num_returns=len(self._late), timeout=0)
                self._in_doubt |= bool(done)
            doubt, self._in_doubt = self._in_doubt, False
            return doubt

    def doubt(self) -> None:
        """Has :meth:`in_doubt` say so."""
        self._in_doubt = True

    def idle(self, seconds: float) -> list[str]:
        """Nodes of which the actor has had nothing to do for so long."""
        now = time.monotonic()
        with self._lock:
            return [node for node in self._agents if now - self._used[node] > seconds]

    def rest(self, node_id: str, seconds: float) -> None:
        """Ends a node's actor, unless it has something to do by now; what its GPUs are stays known.

        To Ray's autoscaler a node with an actor on it is busy, and stays.
        """
        with self._lock:
            turn = self._turns.setdefault(node_id, threading.Lock())
        if not turn.acquire(blocking=False):
            return
        try:
            with self._lock:
                if node_id not in self._agents or time.monotonic() - self._used[node_id] <= seconds:
                    return
                agent = self._agents.pop(node_id)
            ray.kill(agent)
        finally:
            turn.release()

    def forget_all_but(self, alive: Collection[str]) -> None:
        """Forgets nodes that are no more."""
        with self._lock:
            gone = [one for one in self.facts if one not in alive]
            for node_id in gone:
                self._agents.pop(node_id, None)
                self.facts.pop(node_id, None)
                self._machines.pop(node_id, None)
        for node_id in gone:
            ledger.forget_facts(node_id)

    def machine(self, info: NodeInfo) -> Machine:
        """What a node's GPUs are, as far as is known. The same object until it reports something else."""
        known = self._machines.get(info.id)
        if known is None:
            known = self._machines[info.id] = machine_of(self.facts.get(info.id), info.gpu_count)
        return known

    def reserve(self, claim: Claim, known: Iterable[NodeInfo]) -> tuple[list[Reserved], list[Refusal]]:
        """Reserves a claim on all its nodes side by side; what some refuse, others may have reserved.

        Args:
            claim: what was planned.
            known: the nodes that it was planned with.
        """
        nodes = {info.id: info for info in known}
        by_node: dict[str, list[PlannedReplica]] = {}
        for replica in claim.replicas:
            by_node.setdefault(replica.node_id, []).append(replica)
        stem = f"{self._prefix}{claim.deployment.name}"
        names = {
            replica.replica_index: f"{stem}:{replica.replica_index}:{secrets.token_hex(4)}"
            for replica in claim.replicas
        }
        reserved: list[Reserved] = []
        refusals: list[Refusal] = []
        gangs = _gangs(claim.replicas)
        if gangs:
            for index, parts in gangs.items():
                if refusals:
                    break
                self._reserve_gang(nodes, claim, names[index], parts, reserved, refusals)
            self.note_change(by_node)
            return reserved, refusals
        if claim.deployment.remote:
            for node_id, replicas in by_node.items():
                self._reserve_egress(nodes[node_id], claim, replicas, names, reserved, refusals)
        else:
            with self._sole(by_node):
                calls = {
                    node_id: self._agent(nodes[node_id]).reserve.remote(
                        [_order(names[r.replica_index], claim.deployment, planned=r) for r in replicas]
                    )
                    for node_id, replicas in by_node.items()
                }
                faults.point("service.ordered")
                for node_id, reference in calls.items():
                    self._collect(nodes[node_id], reference, by_node[node_id], reserved, refusals)
        self.note_change(by_node)
        return reserved, refusals

    def give_back(self, reserved: Sequence[Reserved]) -> None:
        """Removes groups, by their nodes' actors so that no steering is disturbed, and ends the workers in them."""
        with self._lock:
            agents = dict(self._agents)
            self._used |= dict.fromkeys(agents.keys() & {a.node for _, a in reserved}, time.monotonic())
        by_node: dict[str, list[tuple[str, Any]]] = {}
        for order, assignment in reserved:
            if assignment.gpus and assignment.node in agents:
                by_node.setdefault(assignment.node, []).append((order, assignment.placement_group))
            else:
                groups.remove_group(assignment.placement_group, ready=True)
        calls = {node: agents[node].release.remote(orders) for node, orders in by_node.items()}
        for node, reference in calls.items():
            try:
                ray.get(reference, timeout=RESERVE_DEADLINE_SECONDS)
            except ray.exceptions.RayError as error:
                self._lost(node, error, reference)
                for _, group in by_node[node]:
                    groups.remove_group(group)
        self.note_change(by_node)

    def stop(self) -> None:
        """Ends the node actors. Placement groups stay as they are."""
        with self._lock:
            agents, self._agents = self._agents, {}
        for agent in agents.values():
            ray.kill(agent)

    def _collect(
        self,
        info: NodeInfo,
        reference: Any,
        replicas: Sequence[PlannedReplica],
        reserved: list[Reserved],
        refusals: list[Refusal],
    ) -> None:
        try:
            reply: Reply = ray.get(reference, timeout=RESERVE_DEADLINE_SECONDS)
        except ray.exceptions.RayError as error:
            late = self._lost(info.id, error, reference)
            reason = f"its node actor failed: {type(error).__name__}"
            refusals.append(Refusal(info.id, info.name, 1, reason, full=late, room=0))
            return
        self.foreign[info.id] = frozenset(reply.foreign_gpus)
        if reply.refused is not None:
            refused = reply.refused
            refusals.append(Refusal(info.id, info.name, refused.attempts, refused.reason, refused.full))
            return
        for replica, one in zip(replicas, reply.filled, strict=True):
            assignment = NodeAssignment(
                replica_index=replica.replica_index,
                node=info.id,
                gpus=list(one.reserved.gpus),
                placement_group=one.reserved.group,
                bundle_indices=list(one.reserved.bundles),
                node_name=info.name,
                share=one.reserved.share / WHOLE,
                mig=one.order.needs.profile,
                cpus_per_gpu=one.order.beside.get("CPU", 0.0),
                memory_bytes_per_gpu=int(one.order.beside.get("memory", 0)),
                ray_gpus=list(one.reserved.ray_gpus),
                bandwidth_gb_per_s=one.score.known_gb_per_s,
                weakest_link=one.score.link_name,
                ray_bandwidth_gb_per_s=one.ray_score.known_gb_per_s,
                ray_weakest_link=one.ray_score.link_name,
            )
            reserved.append((one.order.name, assignment))

    def _reserve_gang(
        self,
        nodes: Mapping[str, NodeInfo],
        claim: Claim,
        name: str,
        parts: Sequence[PlannedReplica],
        reserved: list[Reserved],
        refusals: list[Refusal],
    ) -> None:
        """Reserves one replica over its nodes, in one group, or nothing of it.

        All nodes make their GPUs the lowest free ones; then one group is made of all, with a bundle for each
        rank, in their order; then each node verifies its part. A bounded number of times.
        """
        size = claim.set_size
        order = _order(name, claim.deployment, size)
        at = {rank: part.node_id for part in parts for rank in part.ranks}
        bundles = [{"GPU": 1.0, **order.beside}] * len(at)
        agents = {part.node_id: self._agent(nodes[part.node_id]) for part in parts}
        refusal: Refusal | None = None
        with self._sole(agents):
            # No node's GPUs are kept from others while another's actor or worker process is still starting.
            starting = [(part, agents[part.node_id].warm.remote()) for part in parts]
            for part, reference in starting:
                outcome = self._answer(nodes[part.node_id], reference)
                if isinstance(outcome, Refused):
                    refusals.append(_refusal(nodes, [part], outcome.attempts, outcome.reason))
                    return
            for attempt in range(1, MAX_GANG_ATTEMPTS + 1):
                group = None
                asked = {
                    part.node_id: agents[part.node_id].prepare.remote(order, len(part.ranks) // size)
                    for part in parts
                }
                refusal, found = None, {}
                try:
                    for part in parts:
                        info = nodes[part.node_id]
                        outcome = self._answer(info, asked[info.id])
                        if isinstance(outcome, Refused):
                            room = len(part.ranks) - 1
                            refusal = Refusal(
                                info.id, info.name, outcome.attempts, outcome.reason, outcome.full, room
                            )
                        else:
                            self.foreign[info.id] = frozenset(outcome.foreign_gpus)
                    faults.point("service.prepared")
                    if refusal is None:
                        group = groups.create_group(
                            f"{name}:{attempt}", bundles, [at[rank] for rank in sorted(at)]
                        )
                        if not groups.ready_or_removed(group, GANG_DEADLINE_SECONDS):
                            reason = "another Ray user took GPUs meanwhile, or CPUs or memory are short"
                            refusal, group = _refusal(nodes, parts, attempt, reason), None
                        faults.point("service.group_created")
                    if refusal is None:
                        checks = {
                            part.node_id: agents[part.node_id].confirm.remote(
                                order, group, sorted(part.ranks)
                            )
                            for part in parts
                        }
                        for part in parts:
                            found[part.node_id] = self._answer(nodes[part.node_id], checks[part.node_id])
                        faults.point("service.confirmed")
                        if all(isinstance(part, Part) for part in found.values()):
                            for part in parts:
                                info = nodes[part.node_id]
                                reserved.append(
                                    (name, _gang_assignment(info, part, found[info.id], group, order))
                                )
                            group = None
                            return
                        reason = "another Ray user took or freed GPUs meanwhile"
                        refusal = _refusal(nodes, parts, attempt, reason)
                finally:
                    if group is not None:
                        groups.remove_group(group)
                        for agent in agents.values():
                            agent.release.remote([(name, group)])
                    for agent in agents.values():
                        agent.cancel.remote()
                if refusal is not None and refusal.full:
                    break
                time.sleep(0.02 * attempt)
        assert refusal is not None
        refusals.append(refusal)

    def _answer(self, info: NodeInfo, reference: Any) -> Any:
        """What a node actor says; a refusal, if it fails."""
        try:
            return ray.get(reference, timeout=RESERVE_DEADLINE_SECONDS)
        except ray.exceptions.RayError as error:
            late = self._lost(info.id, error, reference)
            return Refused(f"its node actor failed: {type(error).__name__}", 1, full=late)

    @contextlib.contextmanager
    def _sole(self, node_ids: Iterable[str]) -> Iterator[None]:
        """One reservation at a time on each of these nodes. Always taken in the same order: no deadlock."""
        with contextlib.ExitStack() as turns:
            for node_id in sorted(node_ids):
                with self._lock:
                    turn = self._turns.setdefault(node_id, threading.Lock())
                turns.enter_context(turn)
            yield

    def _reserve_egress(
        self,
        info: NodeInfo,
        claim: Claim,
        replicas: Sequence[PlannedReplica],
        names: Mapping[int, str],
        reserved: list[Reserved],
        refusals: list[Refusal],
    ) -> None:
        """Reserves egress capacity. There are no slots to steer, so that Ray's own table verifies it."""
        units = claim.deployment.egress_per_replica
        made = [
            (
                replica,
                groups.create_group(
                    names[replica.replica_index], [{replica.egress_resource or "": units}], [info.id]
                ),
            )
            for replica in replicas
        ]
        faults.point("service.egress_created")
        for replica, group in made:
            if not groups.ready_or_removed(group) or groups.node_of_group(group) != info.id:
                groups.remove_group(group)
                reason = "another Ray user took egress capacity meanwhile"
                refusals.append(Refusal(info.id, info.name, 1, reason))
                continue
            assignment = NodeAssignment(
                replica_index=replica.replica_index,
                node=info.id,
                gpus=[],
                placement_group=group,
                bundle_indices=[0],
                node_name=info.name,
                egress_resource=replica.egress_resource,
                egress_units=units,
            )
            reserved.append((names[replica.replica_index], assignment))

    def note_change(self, nodes: Iterable[str]) -> None:
        """Notes that something was taken or given back on these nodes just now; Ray's books will follow."""
        self.changed_at = time.monotonic()
        for node in nodes:
            self._changed[node] = self.changed_at

    def _agent(self, info: NodeInfo) -> Any:
        with self._lock:
            self._used[info.id] = time.monotonic()
            agent = self._agents.get(info.id)
            if agent is None:
                agent = self._agents[info.id] = self._make_agent(info)
                agent.adopt.remote(self._holdings(info.id))
            return agent

    def _lost(self, node_id: str, error: Exception, call: Any) -> bool:
        """Forgets an actor that failed, to make it anew, unless the failure was an error that it raised itself.

        Returns:
            Whether it did not answer in time. It may still do what it was asked to.
        """
        logger.error("the node actor of %s failed: %s", node_id, error)
        if isinstance(error, ray.exceptions.RayTaskError):
            return False
        late = isinstance(error, ray.exceptions.GetTimeoutError)
        with self._lock:
            self._agents.pop(node_id, None)
            if late:
                self._late.append(call)
            else:
                self._in_doubt = True
        return late


def _gangs(replicas: Iterable[PlannedReplica]) -> dict[int, list[PlannedReplica]]:
    """Replica index -> its parts, of replicas that are made of several sets of GPUs."""
    found: dict[int, list[PlannedReplica]] = {}
    for replica in replicas:
        if replica.ranks:
            found.setdefault(replica.replica_index, []).append(replica)
    return found


def _refusal(
    nodes: Mapping[str, NodeInfo], parts: Sequence[PlannedReplica], attempts: int, reason: str
) -> Refusal:
    names = ", ".join(nodes[part.node_id].name for part in parts)
    return Refusal(parts[0].node_id, names, attempts, reason)


def _gang_assignment(
    info: NodeInfo, part: PlannedReplica, found: Part, group: Any, order: Order
) -> NodeAssignment:
    gpus = [gpu for gpus in found.sets for gpu in gpus]
    return NodeAssignment(
        replica_index=part.replica_index,
        node=info.id,
        gpus=gpus,
        ranks=list(part.ranks),
        placement_group=group,
        bundle_indices=[found.bundle_of[gpu] for gpu in gpus],
        node_name=info.name,
        cpus_per_gpu=order.beside.get("CPU", 0.0),
        memory_bytes_per_gpu=int(order.beside.get("memory", 0)),
        ray_gpus=list(found.ray_gpus),
        bandwidth_gb_per_s=found.score.known_gb_per_s,
        weakest_link=found.score.link_name,
    )


def _order(
    name: str, deployment: Deployment, set_size: int | None = None, planned: PlannedReplica | None = None
) -> Order:
    beside: dict[str, float] = {}
    if deployment.cpu_milli_per_gpu:
        beside["CPU"] = deployment.cpu_milli_per_gpu / 1000
    if deployment.memory_bytes_per_gpu:
        beside["memory"] = deployment.memory_bytes_per_gpu
    needs = deployment.needs if set_size is None else deployment.needs._replace(gpus=set_size)
    exact = deployment.policy is Policy.FRAGMENTATION and planned is not None and planned.share < WHOLE
    return Order(name, needs, deployment.name, beside, planned.gpus[0] if planned and exact else None)
