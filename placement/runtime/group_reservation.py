"""Reserves one replica whose group is not created by a node's actor, but by the service or by the caller.

1. Prepare: the actor of each node makes the best GPUs those that Ray gives next.
2. Create: one placement group, in the service for a replica over several nodes, or in the caller's own process,
   whose end is then that of the group.
3. Confirm: each actor waits until the group is ready, and verifies from inside that its bundles hold just what it
   prepared; or cancel.

This is tried a limited number of times, under the nodes' turns. If the group does not come in time, prepared GPUs are
freed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ray.util.placement_group import PlacementGroup

from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.core.request import Strategy
from placement.core.topology import MeasuredRates
from placement.runtime import faults, groups, metrics
from placement.runtime.agents import DEADLINE_SECONDS, Agents, Unanswered
from placement.runtime.claims import Claim
from placement.runtime.discovery import NodeInfo
from placement.runtime.node_agent import LEASE_SECONDS, Part
from placement.runtime.orders import Order, Prepared, Refusal, Refused, order_of
from placement.runtime.results import NodeAssignment

MAX_ATTEMPTS = 6
NOT_MADE = f"no placement group was created within {LEASE_SECONDS:g} s"


class Creator(Protocol):
    """Creates a group for which the GPUs are prepared."""

    def __call__(
        self,
        name: str,
        bundles: list[dict[str, float]],
        nodes: list[str],
        domain: Mapping[str, str] | None = None,
    ) -> PlacementGroup | None:
        """Creates a group of that name, with each bundle on the node given for it.

        A bundle without a given node is on any node with the labels of the ``domain``: label -> value.

        It may take up to :data:`~placement.runtime.node_agent.LEASE_SECONDS`. An exception ends the reservation,
        and then nothing is held.

        Returns:
            The group, ready or about to be; ``None`` if it was not made.
        """


class GroupReservation:
    """One replica to be reserved, on one node or several.

    Args:
        agents: the node actors.
        foreign: node id -> GPUs that other Ray users hold; updated here.
        nodes: the nodes by id.
        claim: what the replica belongs to.
        name: the name of its order, with which the group's name begins.
        parts: the replica, by node.
        create: the creator of the group; by default the service.
        more: how many replicas like it will follow on its node.
        measured: node id -> its measured rates.
    """

    def __init__(
        self,
        agents: Agents,
        foreign: dict[str, frozenset[int]],
        nodes: Mapping[str, NodeInfo],
        claim: Claim,
        name: str,
        parts: Sequence[PlannedReplica],
        create: Creator | None = None,
        more: int = 0,
        measured: Mapping[str, MeasuredRates] | None = None,
    ) -> None:
        self._all, self._foreign, self._nodes = agents, foreign, nodes
        self._name, self._parts, self._create, self._more = name, parts, create, more
        self._over_nodes = bool(parts[0].ranks)
        self._measured = measured or {}
        self._layout = layout = claim.deployment.placement_group
        # The bundle of each rank of a part, ascending: the rank itself, unless the caller laid out the bundles.
        of = range(sum(len(part.gpus) for part in parts)) if layout is None else layout.bundle_of_rank
        self._bundles = {
            part.node_id: [of[rank] for rank in sorted(part.ranks or range(len(of)))] for part in parts
        }
        self._orders = {part.node_id: self._order(claim, part) for part in parts}
        self._agents: dict[str, Any] = {}
        self._deadline = float("inf")
        self._too_slow = False

    def _order(self, claim: Claim, part: PlannedReplica) -> Order:
        in_sets = self._over_nodes and self._layout is None
        set_size = claim.set_size if in_sets else len(part.gpus)
        planned = None if self._over_nodes else part
        measured = self._measured.get(part.node_id, ())
        order = order_of(self._name, claim.deployment, set_size, planned, measured)
        if self._layout is None:
            return order
        bundles = self._bundles[part.node_id]
        per_gpu = {"CPU": part.cpu_milli / 1000 / len(bundles), "memory": part.memory_bytes // len(bundles)}
        order = replace(order, beside={resource: amount for resource, amount in per_gpu.items() if amount})
        if not self._layout.amounts:
            return order
        here = {bundle: self._layout.bundles[bundle]["GPU"] for bundle in bundles}
        thousandths = tuple(round(amount * WHOLE) for amount in here.values())
        gpus = sum(amount // WHOLE for amount in thousandths)
        amounts = thousandths if min(thousandths) < WHOLE else ()
        return replace(
            order, needs=order.needs._replace(gpus=gpus, amounts=amounts), amounts=here if amounts else {}
        )

    def reserve(self) -> list[NodeAssignment] | Refusal:
        """One assignment for each part; or why there is none, and then nothing is held.

        Raises:
            Whatever the creator raises.
        """
        self._deadline = time.monotonic() + DEADLINE_SECONDS
        node_ids = [part.node_id for part in self._parts]
        with self._all.working(node_ids):
            self._find_agents()
            # Not under the nodes' turns, so that an actor that hangs or is starting does not block others.
            if self._over_nodes and self._all.are_cold(node_ids) and (refusal := self._warm(gpus=False)):
                return refusal
            try:
                with self._all.sole(node_ids):
                    return self._reserve()
            except Unanswered as error:
                return Refusal(error.node_id, self._nodes[error.node_id].name, 1, str(error))

    def _find_agents(self) -> None:
        self._agents = {part.node_id: self._all.agent(self._nodes[part.node_id]) for part in self._parts}

    def _reserve(self) -> list[NodeAssignment] | Refusal:
        self._find_agents()  # an actor may have died since
        if self._over_nodes and (refusal := self._warm()):
            return refusal
        for attempt in range(1, MAX_ATTEMPTS + 1):
            outcome = self._attempt(attempt)
            if isinstance(outcome, list) or outcome.full or self._too_slow or self._lost_one():
                break
            time.sleep(0.02 * attempt)
        return outcome

    def _lost_one(self) -> bool:
        """Whether an actor has failed: then a new one is created for the next plan, before anything is held."""
        known = self._all.known()
        return any(known.get(node) is not agent for node, agent in self._agents.items())

    def _warm(self, gpus: bool = True) -> Refusal | None:
        """Waits for all actors first, so that no GPUs are held while another node's processes start, or it looks."""
        starting = {
            part.node_id: self._agents[part.node_id].warm.remote(len(part.gpus) if gpus else 0)
            for part in self._parts
        }
        for node, outcome in self._all.answers(starting, self._deadline).items():
            if isinstance(outcome, Refused):
                return outcome.at(node, self._nodes[node].name)
        return None

    def _attempt(self, attempt: int) -> list[NodeAssignment] | Refusal:
        group = None
        done = False
        try:
            prepared = self._prepare()
            if isinstance(prepared, Refusal):
                return prepared
            faults.point("service.prepared")
            began = time.monotonic()
            group = self._created(attempt, prepared)
            faults.point("service.group_created")
            found = NOT_MADE if group is None else self._confirm(group)
            faults.point("service.confirmed")
            if isinstance(found, str):
                self._too_slow = time.monotonic() - began > LEASE_SECONDS
                return self._interfered(attempt, found)
            assert group is not None
            done = True
            for one in prepared.values():
                metrics.steered(attempt - 1 + one.attempts)
            return [
                _assignment(self._nodes[node], part, found[node], group, self._orders[node])
                for part in self._parts
                for node in [part.node_id]
            ]
        finally:
            if not done:
                for agent in self._agents.values():
                    if group is not None:
                        agent.release.remote([(self._name, group)])
                    agent.cancel.remote()
                if group is not None:
                    groups.remove_group(group)

    def _prepare(self) -> dict[str, Prepared] | Refusal:
        asked = {}
        for part in self._parts:
            order = self._orders[part.node_id]
            sets = 1 if order.needs.amounts else len(part.gpus) // order.needs.gpus
            asked[part.node_id] = self._agents[part.node_id].prepare.remote(order, sets, self._more)
        prepared: dict[str, Prepared] = {}
        refusal = None
        for node, outcome in self._all.answers(asked, self._deadline).items():
            if isinstance(outcome, Refused):
                at_most = len(self._bundles[node]) - 1
                refusal = outcome.at(node, self._nodes[node].name, at_most=at_most)
                if outcome.foreign_gpus is not None:
                    self._foreign[node] = frozenset(outcome.foreign_gpus)
            else:
                prepared[node] = outcome
                self._foreign[node] = frozenset(outcome.foreign_gpus)
        return refusal or prepared

    def _created(self, attempt: int, prepared: Mapping[str, Prepared]) -> PlacementGroup | None:
        at = {bundle: node for node, bundles in self._bundles.items() for bundle in bundles}
        if self._layout is None:
            nodes = [at[bundle] for bundle in sorted(at)]
            bundles = [prepared[node].bundle(self._orders[node].beside) for node in nodes]
        else:  # Ray places a bundle without GPUs, unless all bundles are to be on one node
            bundles = [dict(bundle) for bundle in self._layout.bundles]
            home = self._parts[0].node_id if self._layout.strategy is Strategy.STRICT_PACK else ""
            nodes = [at.get(i, home) for i in range(len(bundles))]
        if self._create is None:  # it stays until it is released
            return groups.create_group(f"{self._name}:{attempt}", bundles, nodes)
        faults.point("service.lent")
        label = None if self._layout is None else self._layout.domain_label
        labels = self._nodes[self._parts[0].node_id].labels
        domain = {label: labels[label]} if label else None
        return self._create(f"{self._name}:{attempt}", bundles, nodes, domain)

    def _confirm(self, group: PlacementGroup) -> dict[str, Part] | str:
        """Node -> its part; or why one does not hold just what it prepared."""
        asked = {
            node: self._agents[node].confirm.remote(self._orders[node], group, bundles)
            for node, bundles in self._bundles.items()
        }
        found = self._all.answers(asked, self._deadline)
        refused = [one.reason for one in found.values() if isinstance(one, Refused)]
        return refused[0] if refused else found

    def _interfered(self, attempts: int, reason: str) -> Refusal:
        names = ", ".join(self._nodes[part.node_id].name for part in self._parts)
        return Refusal(self._parts[0].node_id, names, attempts, reason)


def _assignment(
    info: NodeInfo, part: PlannedReplica, found: Part, group: PlacementGroup, order: Order
) -> NodeAssignment:
    parts = [min(1.0, order.amounts[bundle]) for _, bundle in found.slots] if order.amounts else []
    shares = {*parts}
    alone = found.ray_score if not part.ranks else None  # for several nodes, Ray's own choice is unknown
    return NodeAssignment(
        replica_index=part.replica_index,
        node=info.id,
        gpus=[gpu for gpu, _ in found.slots],
        ranks=list(part.ranks),
        set_size=part.set_size,
        placement_group=group,
        bundle_indices=[bundle for _, bundle in found.slots],
        node_name=info.name,
        share=found.share / WHOLE if len(shares) > 1 or not shares else shares.pop(),
        shares=parts if len(shares) > 1 else [],
        mig=found.mig,
        cpus_per_gpu=order.beside.get("CPU", 0.0),
        memory_bytes_per_gpu=int(order.beside.get("memory", 0)),
        ray_gpus=list(found.ray_gpus),
        bandwidth_gb_per_s=found.score.known_gb_per_s,
        weakest_link=found.score.link_name,
        sorted_bandwidth_gb_per_s=found.sorted_score.known_gb_per_s,
        ray_bandwidth_gb_per_s=None if alone is None else alone.known_gb_per_s,
        ray_weakest_link=None if alone is None else alone.link_name,
        upper_bandwidth_gb_per_s=found.score.known_upper_gb_per_s,
        ray_upper_bandwidth_gb_per_s=None if alone is None else alone.known_upper_gb_per_s,
        affinities=list(found.affinities),
        bandwidth_measured=found.score.measured,
    )
