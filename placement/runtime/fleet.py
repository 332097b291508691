"""All GPU nodes: reserving on many of them at once, giving back, and how current Ray's records are."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.core.topology import MeasuredRates
from placement.runtime import faults, groups, metrics
from placement.runtime.agents import Agents, Unanswered
from placement.runtime.amount_reservation import reserve_amounts
from placement.runtime.claims import Claim
from placement.runtime.deployment_state import holding_of
from placement.runtime.discovery import NodeInfo
from placement.runtime.group_reservation import Creator, GroupReservation
from placement.runtime.inventory import Inventory
from placement.runtime.node_agent import Reply
from placement.runtime.orders import Holding, Refusal, Refused, deployment_of, order_name, order_of
from placement.runtime.results import NodeAssignment
from placement.wire.facts import NodeFacts

VIEW_LAG_SECONDS = 0.25
"""Ray's records show a change after 0.1 s (measured), and as long again if a worker has to die first."""

MOST_LAG_SECONDS = 2.0
"""On an overloaded machine they take longer; until then a node itself is asked before its GPUs count as taken."""

RELEASE_SECONDS = 10.0
"""How long node actors may take to give groups back, all together; after that the groups are removed without them."""

logger = logging.getLogger(__name__)

Reserved = tuple[str, NodeAssignment]
"""The name of a replica's order, with which its group's name begins, and the assignment."""


class Fleet:
    """All GPU nodes. Thread-safe.

    Args:
        make_agent: creates (or finds) the actor of a node.
        holdings: node id -> order name -> what is held there, for a new actor.
        prefix: begins the name of every created group.

    Attributes:
        agents: the nodes' actors.
        inventory: what their GPUs are.
        foreign: node id -> GPUs that other Ray users held when its actor last looked.
        located: node id -> when it was last looked at by :meth:`locate`, on the monotonic clock.
        changed_at: when something was last taken or given back here, on the monotonic clock.
    """

    def __init__(
        self,
        make_agent: Callable[[NodeInfo], Any],
        holdings: Callable[[str], dict[str, Holding]],
        prefix: str,
    ) -> None:
        facts: dict[str, NodeFacts] = {}
        self._in_books = holdings
        self.agents = Agents(make_agent, self._holdings, facts.get)
        self.inventory = Inventory(self.agents, facts)
        self.foreign: dict[str, frozenset[int]] = {}
        self.located: dict[str, float] = {}
        self.changed_at = float("-inf")
        self._prefix = prefix
        self._changed: dict[str, float] = {}
        self._noting = threading.Lock()
        self._under_way: dict[str, list[NodeAssignment]] = {}
        self._gone: dict[str, frozenset[str]] = {}

    def lagging(self, lag_seconds: float = VIEW_LAG_SECONDS, read_at: float | None = None) -> frozenset[str]:
        """Nodes of which Ray's records may not yet show the service's last change; its own knowledge is newer.

        Args:
            lag_seconds: by how much the records may lag.
            read_at: when they were read, on the monotonic clock; now, by default.
        """
        since = (time.monotonic() if read_at is None else read_at) - lag_seconds
        lately = takewhile(lambda one: one[1] > since, reversed(self._changed.copy().items()))
        return frozenset(node for node, _ in lately)

    def catch_up(self, since: float) -> bool:
        """Waits until Ray's records show earlier changes, and no holds of actors that died.

        Args:
            since: what :attr:`changed_at` was then.

        Returns:
            Whether it had to wait, so that records read before were not yet right.
        """
        reaped = self.agents.reap()
        if reaped:
            for node in reaped:
                self.foreign.pop(node, None)
            self.note_change(reaped)
            since = self.changed_at
        behind = VIEW_LAG_SECONDS - (time.monotonic() - since)
        time.sleep(max(0.0, behind))
        return behind > 0

    def restore(self, nodes: Sequence[NodeInfo]) -> None:
        """Takes over what an earlier service knew of these nodes and left on them, and forgets the others.

        Waits until its node actors have finished their work, and know what is held on their nodes.
        """
        self.inventory.restore({info.id for info in nodes})
        self.agents.restore(nodes)

    def forget_all_but(self, alive: Collection[str]) -> None:
        """Forgets nodes that no longer exist."""
        self.agents.forget_all_but(alive)
        self.inventory.forget_all_but(alive)
        for known in (self.foreign, self.located, self._changed):
            for node_id in known.keys() - set(alive):
                known.pop(node_id, None)

    def note_change(self, nodes: Iterable[str]) -> None:
        """Records that something was just taken or given back on these nodes; Ray's records will follow."""
        with self._noting:
            self.changed_at = time.monotonic()
            for node in nodes:
                self._changed.pop(node, None)  # what changed last comes last
                self._changed[node] = self.changed_at

    def _note_reserved(self, order: str, assignment: NodeAssignment) -> Reserved:
        """Remembers what was just reserved, until :meth:`recorded`."""
        self._under_way.setdefault(order, []).append(assignment)
        return order, assignment

    def note_removed(self, order: str, nodes: Collection[str]) -> None:
        """Records that an order's group is gone, or about to be, from these nodes without their actors' knowledge."""
        self._gone[order] = self._gone.get(order, frozenset()) | set(nodes)
        self.note_change(nodes)

    def forget_gone(self, order: str, nodes: Collection[str]) -> None:
        """Makes these nodes look again at what is free: an order's group was removed by its owner, or ended with it.

        If Ray's records still show it, call :meth:`recorded` once they do not.
        """
        self.note_removed(order, nodes)
        self.agents.forget(order, nodes)
        if not any(order in self._in_books(node) for node in nodes):
            self._gone.pop(order, None)

    def recorded(self, name: str) -> None:
        """Tells the node actors about such orders of a deployment, once Ray's records are right."""
        for order in self._under_way.copy() | self._gone.copy():
            if deployment_of(order) == name:
                self._acknowledge(order)

    def _acknowledge(self, order: str) -> None:
        self._under_way.pop(order, None)
        if nodes := self._gone.pop(order, None):
            self.agents.forget(order, nodes)

    def _holdings(self, node_id: str) -> dict[str, Holding]:
        """Order -> what is held on a node, even if Ray's records do not show it yet, or show it still.

        An actor that is created meanwhile is told this.
        """
        held = self._in_books(node_id)
        for order, assignments in self._under_way.copy().items():
            for a in assignments:
                if a.node == node_id and a.gpus:
                    held[order] = holding_of(deployment_of(order), a)
        return {order: holding for order, holding in held.items() if order not in self._gone}

    def reserve(
        self, claim: Claim, known: Iterable[NodeInfo], create: Creator | None = None
    ) -> tuple[list[Reserved], list[Refusal]]:
        """Reserves a claim on all its nodes at once; some nodes may refuse while others have reserved.

        Args:
            claim: what was planned.
            known: the nodes that it was planned with.
            create: the creator of the groups if not the service: the caller, with which they end.

        Raises:
            Whatever ``create`` raises; what was reserved before for the same claim is given back.
        """
        nodes = {info.id: info for info in known}
        by_node: dict[str, list[PlannedReplica]] = {}
        for replica in claim.replicas:
            by_node.setdefault(replica.node_id, []).append(replica)
        names = {
            index: order_name(self._prefix, claim.deployment.name, index)
            for index in {replica.replica_index for replica in claim.replicas}
        }
        reserved: list[Reserved] = []
        refusals: list[Refusal] = []
        calls: dict[str, Any] = {}
        try:
            if not claim.deployment.gpus_per_replica:
                for node_id, replicas in by_node.items():
                    reserve_amounts(nodes[node_id], replicas, names, reserved, refusals, create)
            elif create is not None or any(replica.ranks for replica in claim.replicas):
                self._reserve_groups(nodes, claim, names, reserved, refusals, create)
            else:
                self._reserve_on_nodes(nodes, claim, by_node, names, calls, reserved, refusals)
        except BaseException:  # it is no longer known what was or will be reserved
            self.agents.suspect_orphans(calls.values())
            if create is not None:
                self._drop(reserved)
            raise
        finally:
            self.note_change(by_node)
        return reserved, refusals

    def _drop(self, reserved: Sequence[Reserved]) -> None:
        """Gives back reservations that no record will have."""
        try:
            self.give_back(reserved)
        except Exception:
            logger.exception("a caller's reservation could not be given back; trying again")
        for order, _ in reserved:
            self._acknowledge(order)

    def _reserve_on_nodes(
        self,
        nodes: Mapping[str, NodeInfo],
        claim: Claim,
        by_node: Mapping[str, Sequence[PlannedReplica]],
        names: Mapping[int, str],
        calls: dict[str, Any],
        reserved: list[Reserved],
        refusals: list[Refusal],
    ) -> None:
        """Lets the nodes' actors create the groups, which is fastest."""
        try:
            with self.agents.sole(by_node) as leave:
                for node_id, replicas in by_node.items():
                    measured = self._measured(nodes[node_id])
                    orders = [
                        order_of(names[r.replica_index], claim.deployment, planned=r, measured=measured)
                        for r in replicas
                    ]
                    calls[node_id] = self.agents.agent(nodes[node_id]).reserve.remote(orders)
                faults.point("service.ordered")
                answers = self.agents.answers(calls, answered=leave)
        except Unanswered as error:
            refusals.append(Refusal(error.node_id, nodes[error.node_id].name, 1, str(error)))
            return
        for node_id, answer in answers.items():
            self._collect(nodes[node_id], answer, by_node[node_id], reserved, refusals)

    def _measured(self, info: NodeInfo) -> MeasuredRates:
        """The measured rates of a node."""
        return self.inventory.hardware(info).topology.measured

    def locate(self, nodes: Sequence[NodeInfo]) -> None:
        """Asks nodes which GPUs other Ray users hold; for a node that cannot tell, the old knowledge stays."""
        calls: dict[str, Any] = {}
        with contextlib.suppress(Unanswered), self.agents.sole([info.id for info in nodes]) as leave:
            calls = {info.id: self.agents.agent(info).locate.remote() for info in nodes}
            for node_id, answer in self.agents.answers(calls, answered=leave).items():
                if not isinstance(answer, Refused):
                    self.foreign[node_id] = frozenset(answer)
        now = time.monotonic()
        self.located.update({info.id: now for info in nodes})
        self.note_change(info.id for info in nodes)

    def give_back(self, reserved: Sequence[Reserved]) -> None:
        """Removes groups, by their nodes' actors so that no steering is disturbed, and ends the workers in them.

        On nodes that do not answer they are removed without the actors. A group that cannot be removed now is removed
        later, as it is in no record; that is no error.
        """
        for order, _ in reserved:
            self._gone.setdefault(order, frozenset())
        self._give_back(reserved)

    def _give_back(self, reserved: Sequence[Reserved]) -> None:
        silent = self.agents.silent()
        agents = {node: agent for node, agent in self.agents.known().items() if node not in silent}
        by_node: dict[str, list[tuple[str, Any]]] = {}
        directly: list[Reserved] = []
        for order, assignment in reserved:
            if assignment.gpus and assignment.node in agents:
                by_node.setdefault(assignment.node, []).append((order, assignment.placement_group))
            else:
                directly.append((order, assignment))
        with self.agents.working(by_node):
            calls = {node: agents[node].release.remote(orders) for node, orders in by_node.items()}
            for order, assignment in directly:
                self._remove(order, assignment, ready=True)
            answers = self.agents.answers(calls, time.monotonic() + RELEASE_SECONDS)
        for order, assignment in reserved:
            if isinstance(answers.get(assignment.node), Refused) and assignment.gpus:
                self._remove(order, assignment)
        self.note_change(by_node)

    def _remove(self, order: str, assignment: NodeAssignment, ready: bool = False) -> None:
        self.note_removed(order, [assignment.node])
        try:
            groups.remove_group(assignment.placement_group, ready)
        except Exception:
            logger.exception("a group could not be removed; trying again")
            self.agents.suspect_orphans()

    def _reserve_groups(
        self,
        nodes: Mapping[str, NodeInfo],
        claim: Claim,
        names: Mapping[int, str],
        reserved: list[Reserved],
        refusals: list[Refusal],
        create: Creator | None,
    ) -> None:
        """Reserves replicas whose groups the service or the caller creates, one after the other."""
        replicas: dict[int, list[PlannedReplica]] = {}
        for part in claim.replicas:
            replicas.setdefault(part.replica_index, []).append(part)
        to_follow = Counter(part.node_id for part in claim.replicas)
        measured = {node_id: self._measured(nodes[node_id]) for node_id in to_follow}
        for index, parts in replicas.items():
            to_follow.subtract(part.node_id for part in parts)
            more = 0 if parts[0].ranks else to_follow[parts[0].node_id]
            outcome = GroupReservation(
                self.agents, self.foreign, nodes, claim, names[index], parts, create, more, measured
            ).reserve()
            if isinstance(outcome, Refusal):
                refusals.append(outcome)
                return
            reserved += [self._note_reserved(names[index], assignment) for assignment in outcome]

    def _collect(
        self,
        info: NodeInfo,
        answer: Reply | Refused,
        replicas: Sequence[PlannedReplica],
        reserved: list[Reserved],
        refusals: list[Refusal],
    ) -> None:
        if isinstance(answer, Refused):
            refusals.append(answer.at(info.id, info.name))
            return
        self.foreign[info.id] = frozenset(answer.foreign_gpus)
        if answer.refused is not None:
            refusals.append(answer.refused.at(info.id, info.name))
            return
        for replica, one in zip(replicas, answer.filled, strict=True):
            metrics.steered(one.reserved.attempts)
            assignment = NodeAssignment(
                replica_index=replica.replica_index,
                node=info.id,
                gpus=list(one.reserved.gpus),
                placement_group=one.reserved.group,
                bundle_indices=list(one.reserved.bundles),
                node_name=info.name,
                share=one.reserved.share / WHOLE,
                mig=one.mig,
                cpus_per_gpu=one.order.beside.get("CPU", 0.0),
                memory_bytes_per_gpu=int(one.order.beside.get("memory", 0)),
                ray_gpus=list(one.ray_gpus),
                bandwidth_gb_per_s=one.score.known_gb_per_s,
                weakest_link=one.score.link_name,
                sorted_bandwidth_gb_per_s=one.score.known_gb_per_s,
                ray_bandwidth_gb_per_s=one.ray_score.known_gb_per_s,
                ray_weakest_link=one.ray_score.link_name,
                upper_bandwidth_gb_per_s=one.score.known_upper_gb_per_s,
                ray_upper_bandwidth_gb_per_s=one.ray_score.known_upper_gb_per_s,
                affinities=list(one.affinities),
                bandwidth_measured=one.score.measured,
            )
            reserved.append(self._note_reserved(one.order.name, assignment))
