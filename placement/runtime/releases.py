"""Releases deployments: a release that has begun is always finished, and its call answered, even after a restart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from placement.errors import UnknownDeployment, UnreadableRecord
from placement.runtime import faults, groups, ledger
from placement.runtime.actions import Actions
from placement.runtime.fleet import Fleet
from placement.runtime.membership import names_of
from placement.runtime.state import ServiceState
from placement.runtime.sweeper import Sweeper
from placement.runtime.turns import Turns

ENDED_SECONDS = 60.0
"""How long the result of a release is kept; Ray sends a call again within seconds after a restart."""


class Releases:
    """Releases deployments. The caller ensures that each deployment has one change at a time.

    Args:
        prefix: begins the name of every group of this service.
        state: all deployments.
        fleet: the nodes' actors.
        actions: what changes things.
        turns: one change of a deployment at a time.
        sweeper: removes groups that belong to no deployment.
    """

    def __init__(
        self,
        prefix: str,
        state: ServiceState,
        fleet: Fleet,
        actions: Actions,
        turns: Turns,
        sweeper: Sweeper,
    ) -> None:
        self._prefix, self._state, self._fleet = prefix, state, fleet
        self._actions, self._turns, self._sweeper = actions, turns, sweeper
        self._ended: dict[str, int] = {}
        self._ended_at: dict[str, float] = {}

    def release(self, name: str) -> int:
        """Releases a deployment, in its turn, or continues an interrupted release; returns the number of replicas.

        Raises:
            UnknownDeployment: no deployment of that name exists.
            UnreadableRecord: a later version of the service wrote its record.
        """
        if name in self._state.unreadable:
            return self._release_unreadable(name)
        known = self._state.get(name)
        if known is None and name in self._ended:  # this call was interrupted, and sent again
            return self._ended.pop(name)
        if known is None:
            raise UnknownDeployment(name, names_of(self._state.deployments, self._state.unreadable))
        if not known.releasing:
            known = replace(known, releasing=True)
            self._actions.commit(known)  # from here on the release is carried out, whatever fails
            self._ended.pop(name, None)
        faults.point("service.releasing")
        count = self._ended.setdefault(name, len(known.replicas))
        self._actions.release(known, list(known.states))
        ledger.note_ended(name, count)
        ledger.delete(name)
        faults.point("service.ended")
        with self._state.lock:
            self._state.drop(name)
            del self._ended[name]
            self._ended_at[name] = time.monotonic()
        self._actions.unwritten.discard(name)
        self._fleet.recorded(name)
        return count

    def _release_unreadable(self, name: str) -> int:
        """Removes a broken record, and all placement groups of that name."""
        record = self._state.unreadable[name]
        if record.newer:
            raise UnreadableRecord(name, record.problem, newer=True)
        held = groups.live_groups(lambda group: group.startswith(f"{self._prefix}{name}:"))
        for group_id, group in held.items():
            self._sweeper.remove(group_id, group)
        ledger.delete(name)
        del self._state.unreadable[name]
        self._fleet.recorded(name)
        return len(held)

    def release_together(self, names: Sequence[str]) -> int:
        """Releases deployments as one, in their turns: from here on all are released, whatever fails."""
        if len(names) > 1:
            for name in names:
                known = self._state.get(name)
                if known is not None and not known.releasing:
                    self._actions.commit(replace(known, releasing=True))
            names = [name for name in names if self._state.get(name) is not None]
        return sum(self.release(name) for name in names)

    def recall_answers(self) -> None:
        """Reads the results of releases before a restart, since Ray may send the calls again."""
        self._ended = ledger.ended()
        self._ended_at = dict.fromkeys(self._ended, time.monotonic())

    def resume(self, name: str) -> None:
        """Continues a release that a restart interrupted; Ray sends its call again, which is then answered."""
        self._ended.pop(name, None)
        self._ended[name] = self.release(name)

    def forget_answers(self) -> None:
        """Forgets results that are so old that no call comes again."""
        now = time.monotonic()
        for name in [name for name, at in self._ended_at.copy().items() if now - at > ENDED_SECONDS]:
            with self._turns.sole(name, wait=False) as mine:
                if mine and now - self._ended_at[name] > ENDED_SECONDS:
                    ledger.forget_ended(name)
                    del self._ended_at[name]
                    self._ended.pop(name, None)
