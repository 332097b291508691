"""Deployments that end by themselves: with their owner, when their time is over, or when they waited too long.

A lease also loses the placement groups that its owner removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from placement.runtime import groups
from placement.runtime.deployment_state import DeploymentState, Owner
from placement.runtime.membership import changed_with
from placement.runtime.owners import has_ended
from placement.runtime.queue import WaitingQueue
from placement.runtime.reconciler import Reconciler
from placement.runtime.releases import Releases
from placement.runtime.turns import Turns

OWNER_ENDED = "its owner has ended"


class Lifetimes:
    """Ends deployments that are over. Thread-safe.

    Args:
        queue: what waits for room.
        reconciler: reconciles deployments.
        reconcile: reconciles the deployment of that name, with one look; in its turn.
        releases: gives back what deployments hold.
        turns: one change of a deployment at a time.
    """

    def __init__(
        self,
        queue: WaitingQueue,
        reconciler: Reconciler,
        reconcile: Callable[[str], None],
        releases: Releases,
        turns: Turns,
    ) -> None:
        self._queue, self._reconciler, self._reconcile = queue, reconciler, reconcile
        self._state, self._actions, self._feed = reconciler.state, reconciler.actions, reconciler.feed
        self._releases, self._turns = releases, turns

    def settled(self, name: str) -> DeploymentState | None:
        """The deployment to change, in its turn; ``None`` if there is none of that name.

        An interrupted release is finished first, and groups that its owner removed are forgotten.
        """
        known = self._state.get(name)
        if known is not None and known.releasing:
            self._releases.release(name)
            return None
        if known is not None and known.owner is not None:
            if has_ended(known.owner):
                self._feed.add(name, None, "ended", OWNER_ENDED)
                self._releases.release(name)
            elif known.is_lease:
                self._forget_gone(known)
            return self._state.get(name)
        return known

    def end_what_is_over(
        self,
        has_ended: Callable[[Owner], bool],
        now: float,
        begin: Callable[[str, Callable[[], None]], object] = lambda name, do: do(),
    ) -> None:
        """Releases deployments whose owner or time has ended; gives up replicas that waited past their deadline.

        Args:
            has_ended: whether an owner has ended.
            now: seconds since 1970.
            begin: starts work on a deployment that may take as long as its nodes take to answer.
        """
        self._queue.end_what_is_for_nobody()
        for one in self._state.temporary():
            ended = one.owner is not None and has_ended(one.owner)
            expired = one.expires_at is not None and one.expires_at <= now
            late = (
                one.deployment.deadline_seconds is not None
                and one.waiting_since is not None
                and now - one.waiting_since > one.deployment.deadline_seconds
                and not one.given_up
                and not one.is_lease
            )
            if ended or expired or late:
                why = OWNER_ENDED if ended else "its time is over" if expired else ""
                begin(one.name, partial(self._end, one.name, why))
            elif one.is_lease and (not one.replicas or _lost_groups(one)):
                # Even if its release was interrupted, or will be.
                begin(one.name, partial(self._end_gone, one))

    def forget_removed(self) -> bool:
        """Forgets groups that owners of leases have removed since the last look; returns whether there were any."""
        removed = [one for one in self._state.temporary() if one.is_lease and _lost_groups(one)]
        for lease in removed:
            self._end_gone(lease)
        return bool(removed)

    def _end_gone(self, lease: DeploymentState) -> None:
        with self._turns.sole(lease.name, wait=False) as mine:
            if mine and self._state.get(lease.name) is lease:
                self._forget_gone(lease)

    def _end(self, name: str, why: str) -> None:
        names = changed_with(name, self._state.deployments)
        with self._turns.sole_all(names, wait=False) as mine:
            known = self._state.get(name)
            if not mine or known is None:
                return
            if not why:
                seconds = known.deployment.deadline_seconds
                why = f"there was no room for {seconds:g} s"
                if known.replicas:
                    reasons = {index: f"given up: {why}; apply it again to try" for index in known.reasons}
                    later = replace(known.pending(reasons, time.time()), given_up=True)
                    self._actions.note(later)
                    for index, reason in reasons.items():
                        self._feed.add(name, index, "given up", reason)
                    return
            self._feed.add(name, None, "ended", why)
            self._releases.release_together(names)

    def _forget_gone(self, lease: DeploymentState) -> None:
        """Forgets the groups of a lease that its owner removed, or that ended with the owner; in its turn."""
        gone = _lost_groups(lease)
        if not gone and lease.replicas:
            return
        self._reconciler.gone |= gone
        try:
            self._reconcile(lease.name)
        finally:
            self._reconciler.gone -= gone


def _lost_groups(lease: DeploymentState) -> set[str]:
    """The ids of the groups of a lease that no longer exist."""
    return {one.group_id for one in lease.replicas.values() if groups.is_gone(one.group_id)}
