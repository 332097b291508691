"""Reconciles a group of roles: all that is missing of it is placed, or all of it waits.

:func:`placement.core.roles.tell` decides the places of all members at once; each is then reconciled by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Mapping, Sequence

from placement.core.reconcile import Desired, Observed
from placement.core.replicas import Plan
from placement.core.request import Told
from placement.core.role_lacks import lacks
from placement.core.roles import as_told, refusal_of, tell
from placement.core.snapshot import Snapshot
from placement.errors import ReservationFailed, Unplaceable
from placement.runtime.claims import Claim
from placement.runtime.deployment_state import DeploymentState
from placement.runtime.discovery import NodeInfo
from placement.runtime.reconciler import MAX_REPLANS, Reconciler, Work
from placement.wire.groups import Group


class GroupReconciler:
    """Reconciles groups. The caller ensures that each deployment has one change at a time.

    Args:
        reconciler: reconciles their members.
    """

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._state, self._cluster = reconciler.state, reconciler.cluster
        self._fleet, self._actions = reconciler.fleet, reconciler.actions

    def bring_about(self, group: Group) -> Unplaceable | ReservationFailed | None:
        """Reconciles all members of a group: all missing replicas are placed, or all of them wait.

        All of them are declared.

        The caller ensures that each has one change at a time.

        Returns:
            Why it waits; ``None`` if it does not.
        """
        names, refused = sorted(group.members), set[str]()
        failure: Unplaceable | ReservationFailed | None = None
        for _ in range(MAX_REPLANS):
            told, claims = self._places(group, refused)
            placed: dict[str, list[int]] = {}
            failed: Work | None = None
            try:
                for name in names:
                    known = self._declared(name)
                    work = Work(known, known, patient=False, told=told[name], claim=claims.get(name))
                    try:
                        later = self._reconciler.bring_about(work)
                    finally:
                        if work.claim is None:
                            claims.pop(name, None)
                    placed[name] = sorted(later.replicas.keys() - known.replicas.keys())
                    refused |= work.refused
                    if told[name].refusal is None and later.unfinished():
                        failed = work
                        break
            except BaseException:
                self._give_back(placed, "its group could not be placed")
                raise
            finally:
                self._state.close(claims.values())
            if failed is None:
                return next((one.refusal for one in told.values() if one.refusal is not None), None)
            why = failed.reason or "its planned GPUs are no longer free"
            failure = ReservationFailed(group.name, failed.where or "its nodes", max(1, failed.attempts), why)
            self._give_back(placed, str(failure))
        for name in names:
            known = self._declared(name)
            if missing := known.unfinished():
                self._actions.wait(
                    known, dict.fromkeys(missing, str(failure)), time.time(), self._actions.note
                )
        return failure

    def _declared(self, name: str) -> DeploymentState:
        known = self._state.get(name)
        assert known is not None
        return known

    def _give_back(self, placed: Mapping[str, Sequence[int]], why: str) -> None:
        """Makes replicas wait again that were placed just now, as the rest of their group could not be placed."""
        for name, indices in placed.items():
            if indices:
                later = self._actions.release(self._declared(name), indices)
                reasons = {**later.reasons, **dict.fromkeys(indices, why)}
                self._actions.note(later.pending(reasons, time.time()))

    def _places(self, group: Group, refused: Collection[str]) -> tuple[dict[str, Told], dict[str, Claim]]:
        """The places of a group's missing replicas, with a claim for each member; or why there are none."""
        roles = group.planned()
        seen: list[tuple[Snapshot, dict[str, tuple[Desired, dict[int, Observed]]]]] = []

        def decide(
            nodes: list[NodeInfo], lag_seconds: float, fresh: bool
        ) -> tuple[dict[str, Told], dict[str, Claim]]:
            inventory = self._fleet.inventory
            inventory.refresh(nodes, patience_seconds=0.0)
            avoided = self._fleet.agents.suspect() | inventory.unknown_nodes(nodes)
            if avoided:
                with contextlib.suppress(Unplaceable):
                    return decide_with(nodes, lag_seconds, fresh, avoided)
                inventory.refresh(nodes)
            return decide_with(nodes, lag_seconds, fresh)

        def decide_with(
            nodes: list[NodeInfo], lag_seconds: float, fresh: bool, avoided: Collection[str] = ()
        ) -> tuple[dict[str, Told], dict[str, Claim]]:
            def look() -> tuple[Snapshot, dict[str, tuple[Desired, dict[int, Observed]]]]:
                snapshot = self._cluster.snapshot(nodes, lag_seconds, refused, avoided=avoided)
                return snapshot, {
                    name: self._reconciler.seen(self._declared(name), snapshot) for name in roles.counts
                }

            self._cluster.read(fresh or bool(refused))
            with self._state.lock:
                snapshot, members = look()
            found = tell(snapshot, roles, members)  # others plan meanwhile, as the search may take a second
            with self._state.lock:
                snapshot, members = look()
                plans = as_told(snapshot, found)
                if plans is None:  # they were quicker, and wait this time
                    found = tell(snapshot, roles, members)
                    plans = as_told(snapshot, found)
                seen[:] = [(snapshot, members)]
                return self._claimed(found, plans or {})

        try:
            return self._cluster.patiently(decide, fresh=True)
        except Unplaceable as refusal:
            snapshot, members = seen[-1]
            lacking = lacks(snapshot, roles, members)
            return dict.fromkeys(roles.counts, Told(refusal=refusal, lacks=lacking)), {}

    def _claimed(
        self, members: Mapping[str, Desired], plans: Mapping[str, Plan]
    ) -> tuple[dict[str, Told], dict[str, Claim]]:
        """What the members of a group are told, and claims of what they are to take. Under the lock.

        Raises:
            Unplaceable: there is no place for the group.
        """
        if refusal := refusal_of(members):
            raise refusal
        told = {name: desired.request.told or Told() for name, desired in members.items()}
        claims: dict[str, Claim] = {}
        for name, plan in plans.items():
            if plan.replicas:
                claims[name] = self._state.claim(Claim(self._declared(name).deployment, plan.replicas))
        return told, claims
