"""The GPU nodes together: reserving on many of them side by side, giving back, and how current Ray's books are."""

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
"""Ray's books follow a change after 0.1 s (measured), and as long again if a worker has to die first."""

MOST_LAG_SECONDS = 2.0
"""On a machine that is overrun they take longer; for so long a node is asked itself before its GPUs count as taken."""

RELEASE_SECONDS = 10.0
"""How long node actors may take to give groups back, all together; after that these are removed without them."""

logger = logging.getLogger(__name__)

Reserved = tuple[str, NodeAssignment]
"""The name of a replica's order, which begins its group's name, and the assignment."""


class Fleet:
    """All GPU nodes. Thread-safe.

    Args:
        make_agent: creates (or finds) the actor of a node.
        holdings: node id -> order name -> what stands there, for an actor that is new.
        prefix: begins the name of every group that is made.

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
        """Nodes of which Ray's books may not yet show our own last change; what we know of them is newer.

        Args:
            lag_seconds: by how much the books may lag.
            read_at: when they were read, on the monotonic clock; now, by default.
        """
        since = (time.monotonic() if read_at is None else read_at) - lag_seconds
        lately = takewhile(lambda one: one[1] > since, reversed(self._changed.copy().items()))
        return frozenset(node for node, _ in lately)

    def catch_up(self, since: float) -> bool:
        """Waits until Ray's books show what was changed here before, and without the holds of actors that died.

        Args:
            since: what :attr:`changed_at` was then.

        Returns:
            Whether they did not, and what was read of them before was not yet right.
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
        """Takes up what an earlier service knew of these nodes and left on them, and forgets the others.

        Waits until the node actors that it left have ended what they were doing, and know what stands on their nodes.
        """
        self.inventory.restore({info.id for info in nodes})
        self.agents.restore(nodes)

    def forget_all_but(self, alive: Collection[str]) -> None:
        """Forgets nodes that are no more."""
        self.agents.forget_all_but(alive)
        self.inventory.forget_all_but(alive)
        for known in (self.foreign, self.located, self._changed):
            for node_id in known.keys() - set(alive):
                known.pop(node_id, None)

    def note_change(self, nodes: Iterable[str]) -> None:
        """Notes that something was taken or given back on these nodes just now; Ray's books will follow."""
        with self._noting:
            self.changed_at = time.monotonic()
            for node in nodes:
                self._changed.pop(node, None)  # what changed last comes last
                self._changed[node] = self.changed_at

    def _note_reserved(self, order: str, assignment: NodeAssignment) -> Reserved:
        """What was just reserved; noted until :meth:`recorded`."""
        self._under_way.setdefault(order, []).append(assignment)
        return order, assignment

    def note_removed(self, order: str, nodes: Collection[str]) -> None:
        """Notes that an order's group is gone, or about to be, from these nodes without their actors knowing."""
        self._gone[order] = self._gone.get(order, frozenset()) | set(nodes)
        self.note_change(nodes)

    def forget_gone(self, order: str, nodes: Collection[str]) -> None:
        """Has these nodes look anew at what is free: an order's group was removed by its owner, or ended with it.

        While the books still show it, :meth:`recorded` is to follow once they do not.
        """
        self.note_removed(order, nodes)
        self.agents.forget(order, nodes)
        if not any(order in self._in_books(node) for node in nodes):
            self._gone.pop(order, None)

    def recorded(self, name: str) -> None:
        """Tells the node actors of such orders of a deployment, once the books show what has become of it."""
        for order in self._under_way.copy() | self._gone.copy():
            if deployment_of(order) == name:
                self._acknowledge(order)

    def _acknowledge(self, order: str) -> None:
        self._under_way.pop(order, None)
        if nodes := self._gone.pop(order, None):
            self.agents.forget(order, nodes)

    def _holdings(self, node_id: str) -> dict[str, Holding]:
        """Order -> what stands on a node, also where the books do not show it yet, or still do.

        What an actor that is made meanwhile is told.
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
        """Reserves a claim on all its nodes side by side; what some refuse, others may have reserved.

        Args:
            claim: what was planned.
            known: the nodes that it was planned with.
            create: who creates the groups, one after the other, if not the service: the caller, with whom they end.

        Raises:
            Whatever ``create`` does; what was reserved before that for the same claim is given back.
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
        except BaseException:  # what was reserved by now, or will be, is not known any more
            self.agents.suspect_orphans(calls.values())
            if create is not None:
                self._drop(reserved)
            raise
        finally:
            self.note_change(by_node)
        return reserved, refusals

    def _drop(self, reserved: Sequence[Reserved]) -> None:
        """Gives back what the books will not show."""
        try:
            self.give_back(reserved)
        except Exception:
            logger.exception("what was reserved for a caller could not be given back; trying again")
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
        """Has the nodes' actors create the groups, which is quickest."""
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
        """What was measured of a node."""
        return self.inventory.hardware(info).topology.measured

    def locate(self, nodes: Sequence[NodeInfo]) -> None:
        """Has nodes looked at for which GPUs other Ray users hold; of one that cannot tell, nothing new is known."""
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

        On nodes that do not answer they are removed without the actors. What cannot be removed now is swept later, and
        no reason to fail: no record will tell of it.
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
        """Reserves replicas of which the service or the caller creates the groups, one after the other."""
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
                ray_gpus=list(one.reserved.ray_gpus),
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
