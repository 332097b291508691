"""The steps by which the controller changes one deployment. Every step may be repeated at any time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from placement.core.lifecycle import State
from placement.core.replicas import PlannedReplica
from placement.runtime import faults, groups, ledger, metrics, records
from placement.runtime.claims import Claim
from placement.runtime.decisions import place_of
from placement.runtime.deployment_state import DeploymentState, held_replica
from placement.runtime.discovery import NodeInfo
from placement.runtime.feed import Feed
from placement.runtime.fleet import Fleet
from placement.runtime.group_reservation import Creator
from placement.runtime.orders import Refusal
from placement.runtime.results import NodeAssignment
from placement.runtime.state import ServiceState

AUTOSCALER = "; autoscaler: "
"""Separates, in a reason why a replica waits, the part about Ray's autoscaler."""

logger = logging.getLogger(__name__)


class Actions:
    """Changes what is there, and records it in the ledger and the state.

    Args:
        state: what is declared and what is there.
        fleet: the nodes.
        feed: where events are reported.

    Attributes:
        unwritten: deployments whose last change could not be written to the ledger.
    """

    def __init__(self, state: ServiceState, fleet: Fleet, feed: Feed) -> None:
        self._state, self._fleet, self._feed = state, fleet, feed
        self.unwritten: set[str] = set()

    def commit(self, one: DeploymentState, closing: Iterable[Claim] = ()) -> None:
        """Writes a deployment to the ledger and the state, or to neither; closes claims with it."""
        try:
            records.save(one)
        except BaseException:  # it is unknown whether it was written
            self.write_back(one.name)
            raise
        self._put(one, closing)

    def note(self, one: DeploymentState) -> None:
        """Writes a deployment that lost something to the state now, and to the ledger as soon as possible."""
        self._put(one)
        self.write_back(one.name)

    def _put(self, one: DeploymentState, closing: Iterable[Claim] = ()) -> None:
        with self._state.lock:
            self._state.put(one)
            self._state.close(closing)
        self._fleet.recorded(one.name)

    def write_back(self, name: str) -> None:
        """Writes the state of a deployment to the ledger; later, if the ledger cannot be reached."""
        known = self._state.get(name)
        try:
            records.save(known) if known else ledger.delete(name)
        except Exception:
            logger.exception("the record of %r could not be written; trying again", name)
            self.unwritten.add(name)
        else:
            self.unwritten.discard(name)

    def release(self, one: DeploymentState, indices: Collection[int]) -> DeploymentState:
        """Gives back what some replicas hold; returns what is left. The state is not changed yet."""
        held = [index for index in indices if index in one.replicas]
        self._fleet.give_back([(one.replicas[i].order, part) for i in held for part in one.replicas[i].parts])
        faults.point("service.given_back")
        for index in indices:
            self._feed.add(one.name, index, "released")
        return one.without([index for index in indices if index in one.states])

    def drop(self, one: DeploymentState, index: int, alive: Collection[str]) -> tuple[bool, str]:
        """Gives back what is left of a replica that lost a node, or its placement group.

        Returns:
            Whether anything was left of it, and what happened.
        """
        replica = one.replicas[index]
        dead = sorted({part.node_name for part in replica.parts if part.node not in alive})
        rest = [part for part in replica.parts if part.node in alive] if dead else []
        if dead:
            groups.remove_group(replica.parts[0].placement_group)
            self._fleet.give_back([(replica.order, part) for part in rest])
            faults.point("service.given_back")
            reason = f"node {', '.join(dead)} died"
        else:
            self._fleet.note_removed(replica.order, [part.node for part in replica.parts])
            reason = "its placement group is gone"
        self._feed.add(one.name, index, str(State.LOST), reason)
        return bool(rest), reason

    def reserve(
        self, one: DeploymentState, claim: Claim, nodes: Sequence[NodeInfo], create: Creator | None
    ) -> tuple[DeploymentState, Claim] | list[Refusal]:
        """Reserves a claim, all or nothing; returns the deployment with it, and a claim of what was really reserved.

        Returns:
            The reason, if it fails: then nothing of it is held, and the claim is closed.
        """
        try:
            with metrics.reserving() as outcome:
                reserved, refusals = self._fleet.reserve(claim, nodes, create)
                outcome(_outcome(refusals))
            if refusals:
                self._fleet.give_back(reserved)
                self._fleet.recorded(one.name)
        except BaseException:
            self._state.close([claim])
            raise
        if refusals:
            self._state.close([claim])
            return refusals
        parts: dict[int, list[NodeAssignment]] = {}
        orders: dict[int, str] = {}
        for order, assignment in reserved:
            parts.setdefault(assignment.replica_index, []).append(assignment)
            orders[assignment.replica_index] = order
        for index, of in parts.items():
            one = one.with_replica(index, orders[index], of)
        taken = tuple(held_replica(assignment).planned() for _, assignment in reserved)
        if _as_counted(taken) == _as_counted(claim.replicas):
            return one, claim
        with self._state.lock:  # until it is in the state; what is really held may differ from the plan
            got = self._state.claim(replace(claim, replicas=taken))
            self._state.close([claim])
        return one, got

    def undo(self, one: DeploymentState, indices: Iterable[int], claim: Claim) -> None:
        """Gives back what was just reserved but could not be recorded."""
        held = [(one.replicas[i].order, part) for i in indices for part in one.replicas[i].parts]
        self._fleet.give_back(held)
        self._fleet.recorded(one.name)
        self._state.close([claim])

    def wait(
        self,
        one: DeploymentState,
        reasons: dict[int, str],
        now: float,
        keep: Callable[[DeploymentState], None],
    ) -> DeploymentState:
        """Records which replicas wait, and why; ``keep`` says whether in the ledger, too."""
        later = one.pending(reasons, now)
        if later != self._state.get(one.name):
            keep(later)
        for index, reason in reasons.items():
            # The part about the autoscaler is shown in the status, but is no event.
            if one.reasons.get(index, "").partition(AUTOSCALER)[0] != reason.partition(AUTOSCALER)[0]:
                self._feed.add(one.name, index, State.PENDING, reason)
        return later

    def tell_places(self, one: DeploymentState, indices: Iterable[int]) -> None:
        """Reports the places of replicas as events."""
        for index in indices:
            where = ", ".join(map(place_of, one.replicas[index].parts))
            self._feed.add(one.name, index, one.states[index], f"on {where}")


def _outcome(refusals: Sequence[Refusal]) -> str:
    """The outcome of a reservation, for the metrics."""
    if not refusals:
        return "reserved"
    return "full" if all(one.full for one in refusals) else "interfered"


def _as_counted(replicas: Iterable[PlannedReplica]) -> set[PlannedReplica]:
    """Replicas as they count for plans: without the order of their GPUs, their ranks and sets."""
    return {replace(one, gpus=tuple(sorted(one.gpus)), ranks=(), set_size=0) for one in replicas}
