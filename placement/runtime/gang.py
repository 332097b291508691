"""A replica over several nodes: one placement group of all of them, on the best GPUs of each, or nothing.

All nodes make their GPUs the lowest free ones; then one group is made of all, with a bundle for each rank, in
their order; then each node verifies its part. A bounded number of times.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from placement.core.replicas import PlannedReplica
from placement.runtime import faults, groups
from placement.runtime.agents import Agents
from placement.runtime.books import Claim
from placement.runtime.discovery import NodeInfo
from placement.runtime.node_agent import Part
from placement.runtime.orders import Order, Refusal, Refused, order_of
from placement.runtime.results import NodeAssignment

GROUP_DEADLINE_SECONDS = 0.3
"""Long enough for Ray to try twice; see :func:`~placement.runtime.groups.ready_or_removed`."""
MAX_ATTEMPTS = 6


class Gang:
    """One replica over several nodes, to be reserved.

    Args:
        agents: the node actors.
        foreign: node id -> GPUs that other Ray users hold; brought along here.
        nodes: the nodes by id.
        claim: what the replica belongs to.
        name: of its order; begins the group's name.
        parts: the replica, by node.
    """

    def __init__(
        self,
        agents: Agents,
        foreign: dict[str, frozenset[int]],
        nodes: Mapping[str, NodeInfo],
        claim: Claim,
        name: str,
        parts: Sequence[PlannedReplica],
    ) -> None:
        self._all, self._foreign, self._nodes = agents, foreign, nodes
        self._name, self._parts = name, parts
        self._set_size = claim.set_size
        self._order = order_of(name, claim.deployment, claim.set_size)
        self._agents: dict[str, Any] = {}

    def reserve(self) -> list[NodeAssignment] | Refusal:
        """One assignment for each part; or why there is none, and nothing is held then."""
        with self._all.sole(part.node_id for part in self._parts):
            self._agents = {part.node_id: self._all.agent(self._nodes[part.node_id]) for part in self._parts}
            if refusal := self._warm():
                return refusal
            for attempt in range(1, MAX_ATTEMPTS + 1):
                outcome = self._attempt(attempt)
                if isinstance(outcome, list) or outcome.full or self._lost_one():
                    break
                time.sleep(0.02 * attempt)
        return outcome

    def _lost_one(self) -> bool:
        """Whether an actor has failed: another is made for the next plan, and waited for before anything is held."""
        known = self._all.known()
        return any(known.get(node) is not agent for node, agent in self._agents.items())

    def _warm(self) -> Refusal | None:
        """Waits for all: no node's GPUs are kept from others while another's processes start, or it looks."""
        starting = {
            part.node_id: self._agents[part.node_id].warm.remote(len(part.ranks)) for part in self._parts
        }
        for node, reference in starting.items():
            outcome = self._all.answer(node, reference)
            if isinstance(outcome, Refused):
                return outcome.at(node, self._nodes[node].name)
        return None

    def _attempt(self, attempt: int) -> list[NodeAssignment] | Refusal:
        group = None
        try:
            if refusal := self._prepare():
                return refusal
            faults.point("service.prepared")
            group = self._create(attempt)
            faults.point("service.group_created")
            if group is None:
                return self._interfered(
                    attempt, "another Ray user took GPUs meanwhile, or CPUs or memory are short"
                )
            found = self._confirm(group)
            faults.point("service.confirmed")
            if found is None:
                return self._interfered(attempt, "another Ray user took or freed GPUs meanwhile")
            kept, group = group, None
            return [
                _assignment(self._nodes[part.node_id], part, found[part.node_id], kept, self._order)
                for part in self._parts
            ]
        finally:
            for agent in self._agents.values():
                if group is not None:
                    agent.release.remote([(self._name, group)])
                agent.cancel.remote()
            if group is not None:
                groups.remove_group(group)

    def _prepare(self) -> Refusal | None:
        asked = [
            (part, self._agents[part.node_id].prepare.remote(self._order, len(part.ranks) // self._set_size))
            for part in self._parts
        ]
        refusal = None
        for part, reference in asked:
            outcome = self._all.answer(part.node_id, reference)
            if isinstance(outcome, Refused):
                name = self._nodes[part.node_id].name
                refusal = outcome.at(part.node_id, name, room=len(part.ranks) - 1)
            else:
                self._foreign[part.node_id] = frozenset(outcome.foreign_gpus)
        return refusal

    def _create(self, attempt: int) -> Any:
        at = {rank: part.node_id for part in self._parts for rank in part.ranks}
        bundles = [{"GPU": 1.0, **self._order.beside}] * len(at)
        group = groups.create_group(f"{self._name}:{attempt}", bundles, [at[rank] for rank in sorted(at)])
        return group if groups.ready_or_removed(group, GROUP_DEADLINE_SECONDS) else None

    def _confirm(self, group: Any) -> dict[str, Part] | None:
        """Node -> its part; ``None`` if any does not hold just what it prepared."""
        asked = {
            part.node_id: self._agents[part.node_id].confirm.remote(self._order, group, sorted(part.ranks))
            for part in self._parts
        }
        found = {node: self._all.answer(node, reference) for node, reference in asked.items()}
        return found if all(isinstance(part, Part) for part in found.values()) else None

    def _interfered(self, attempts: int, reason: str) -> Refusal:
        names = ", ".join(self._nodes[part.node_id].name for part in self._parts)
        return Refusal(self._parts[0].node_id, names, attempts, reason)


def _assignment(
    info: NodeInfo, part: PlannedReplica, found: Part, group: Any, order: Order
) -> NodeAssignment:
    gpus = [gpu for gpus in found.sets for gpu in gpus]
    return NodeAssignment(
        replica_index=part.replica_index,
        node=info.id,
        gpus=gpus,
        ranks=list(part.ranks),
        set_size=part.set_size,
        placement_group=group,
        bundle_indices=[found.bundle_of[gpu] for gpu in gpus],
        node_name=info.name,
        cpus_per_gpu=order.beside.get("CPU", 0.0),
        memory_bytes_per_gpu=int(order.beside.get("memory", 0)),
        ray_gpus=list(found.ray_gpus),
        bandwidth_gb_per_s=found.score.known_gb_per_s,
        weakest_link=found.score.link_name,
    )
