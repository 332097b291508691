"""What the service does after something died: places anew what was lost, ends what was cut off, removes the rest."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

from placement.core.lifecycle import Event, State
from placement.errors import ReservationFailed, UnknownDeployment, UnknownNode, Unplaceable, UnreadableRecord
from placement.runtime import faults, groups, ledger
from placement.runtime.books import Books, Standing
from placement.runtime.discovery import NodeView
from placement.runtime.events import EventLog
from placement.runtime.fleet import Fleet
from placement.runtime.orders import deployment_of, order_of_group

ENDED_SECONDS = 60.0
"""How long it is remembered what a release gave back; Ray sends a call again within seconds of a restart."""

logger = logging.getLogger(__name__)


class Recovery(ABC):
    """The part of the service that puts things right. Every method may be called again at any time."""

    fleet: Fleet
    _books: Books
    _events: EventLog
    _prefix: str
    _nodes: NodeView
    _lock: threading.Lock
    _idle_seconds: float
    _ended: dict[str, int]
    _ended_at: dict[str, float]
    _unwritten: set[str]
    _undecided: dict[str, groups.LiveGroup]

    @abstractmethod
    def _sole(self, name: str, wait: bool = True) -> AbstractContextManager[bool]: ...

    @abstractmethod
    def _reserve(self, standing: Standing, indices: tuple[int, ...], mending: bool = False) -> None: ...

    @abstractmethod
    def _keep(self, standing: Standing) -> None: ...

    @abstractmethod
    def _note(self, standing: Standing) -> None: ...

    @abstractmethod
    def _write_back(self, name: str) -> None: ...

    @abstractmethod
    def _keep_added(self, standing: Standing, added: Iterable[int]) -> None: ...

    @abstractmethod
    def _give_back(self, standing: Standing, indices: Iterable[int]) -> None: ...

    @abstractmethod
    def _tell_places(self, standing: Standing, indices: list[int]) -> None: ...

    def stranded(self, alive: frozenset[str]) -> list[str]:
        """The deployments with a replica on a node that is no more."""
        names = {standing.deployment.name for standing, a in self._books.assignments() if a.node not in alive}
        return sorted(names)

    def waiting(self) -> list[str]:
        """The deployments of which replicas are pending, or of which a release was cut off."""
        found = []
        for name in self._books.names():
            standing = self._books.standing.get(name)
            if standing is not None and (standing.missing() or standing.releasing):
                found.append(name)
        return found

    def mend(self, name: str) -> None:
        """Places the replicas of a deployment that have no place, or lost it with a node, as far as there is room.

        Not while something else happens to it: then there will be another time.
        """
        with self._sole(name, wait=False) as mine:
            if mine:
                self._mend(name)

    def _mend(self, name: str) -> None:
        standing = self._books.standing.get(name)
        if standing is None:
            return
        if standing.releasing:
            self._release(name)
            return
        changed = standing.copy()
        if self._drop_lost(changed):
            self._note(changed)
        missing = changed.missing()
        for position, index in enumerate(missing):
            more = changed.copy()
            try:
                self._reserve(more, (index,), mending=True)
            except (Unplaceable, ReservationFailed, UnknownNode) as refusal:
                for pending in missing[position:]:  # the others ask for the same
                    self._note_pending(changed, pending, str(refusal))
                break
            self._keep_added(more, [index])
            faults.point("service.kept")
            self._tell_places(more, [index])
            changed = more
        self._books.standing[name] = changed

    def _release(self, name: str) -> int:
        """Releases a deployment of which we are the only one to change it; goes on with one that was cut off."""
        if name in self._books.unreadable:
            return self._release_unreadable(name)
        standing = self._books.standing.get(name)
        if standing is None and name in self._ended:  # this call was cut off, and sent again
            return self._ended.pop(name)
        if standing is None:
            raise UnknownDeployment(name, self._books.names())
        if not standing.releasing:
            standing = standing.copy()
            standing.releasing = True
            self._keep(standing)  # from here on it goes, whatever happens
            self._ended.pop(name, None)
        faults.point("service.releasing")
        count = self._ended.setdefault(name, len(standing.replicas))
        self._give_back(standing, list(standing.states))
        ledger.note_ended(name, count)
        ledger.delete(name)
        faults.point("service.ended")
        with self._lock:
            del self._books.standing[name], self._ended[name]
            self._ended_at[name] = time.monotonic()
        self.fleet.tell(name)
        return count

    def _drop_lost(self, standing: Standing) -> bool:
        """Gives back what is left of replicas with a dead node; says whether there were any."""
        alive = {info.id for info in self._nodes.now()}
        found = False
        for index, parts in sorted(standing.replicas.items()):
            dead = sorted({part.node_name for part in parts if part.node not in alive})
            if not dead:
                continue
            found = True
            rest = [part for part in parts if part.node in alive]
            if rest:
                standing.happen(index, Event.PART_LOST)
            groups.remove_group(parts[0].placement_group)
            self.fleet.give_back([(standing.orders[index], part) for part in rest])
            faults.point("service.given_back")
            del standing.replicas[index], standing.orders[index]
            state = standing.happen(index, Event.LOST)
            reason = f"node {', '.join(dead)} died"
            standing.reasons[index] = reason
            self._events.add(standing.deployment.name, index, str(state), reason)
        return found

    def _note_pending(self, standing: Standing, index: int, reason: str) -> None:
        if standing.states.get(index) is not State.PENDING:
            standing.happen(index, Event.RESERVE)
            standing.happen(index, Event.REFUSED)
        if standing.reasons.get(index) != reason:
            standing.reasons[index] = reason
            self._events.add(standing.deployment.name, index, State.PENDING, reason)

    def sweep(self) -> None:
        """Removes groups that carry our token and that no deployment knows of, and finds node actors that live on."""
        try:
            self.fleet.agents.doubt(self.fleet.agents.take_up(self._nodes.lately()), now=False)
            self._undecided = self._sweep(self._live_groups())
        except BaseException:
            self.fleet.agents.doubt()
            raise

    def sweep_again(self) -> None:
        """The same with the groups of which it could not be told yet whether a deployment will know of them."""
        if self._undecided:
            self._undecided = self._sweep(self._undecided)

    def _live_groups(self) -> dict[str, groups.LiveGroup]:
        return groups.live_groups(lambda name: name.startswith(self._prefix))

    def _sweep(self, live: Mapping[str, groups.LiveGroup]) -> dict[str, groups.LiveGroup]:
        undecided = {}
        for group_id, group in live.items():
            name = deployment_of(order_of_group(group.name))
            if name in self._books.unreadable or self._knows(name, group_id):
                continue
            with self._sole(name, wait=False) as mine:
                if not mine:  # something is being reserved, and this may be it
                    undecided[group_id] = group
                elif not self._knows(name, group_id):
                    self._remove(group_id, group)
                    self.fleet.tell(name)
        return undecided

    def _remove(self, group_id: str, group: groups.LiveGroup) -> None:
        """Removes a group that stands in no record."""
        self.fleet.note_removed(order_of_group(group.name), group.nodes)
        groups.remove_group(groups.group_from_hex(group_id))

    def _knows(self, name: str, group_id: str) -> bool:
        standing = self._books.standing.get(name)
        known = standing.assignments() if standing else []
        return any(a.placement_group.id.hex() == group_id for a in known)

    def write_again(self) -> None:
        """Has the ledger say what it could not be told before."""
        for name in sorted(self._unwritten):
            with self._sole(name, wait=False) as mine:
                if mine:
                    self._write_back(name)

    def rest(self) -> None:
        """Ends the actors of nodes that hold nothing, so that they can be scaled down; forgets what nobody asks for."""
        if idle := self.fleet.agents.idle(self._idle_seconds):
            holding = {a.node for _, a in self._books.assignments()}
            for node_id in idle:
                if node_id not in holding:
                    self.fleet.agents.rest(node_id, self._idle_seconds)
        now = time.monotonic()
        for name in [name for name, at in self._ended_at.copy().items() if now - at > ENDED_SECONDS]:
            with self._sole(name, wait=False) as mine:
                if mine and now - self._ended_at[name] > ENDED_SECONDS:
                    ledger.forget_ended(name)
                    del self._ended_at[name]
                    self._ended.pop(name, None)

    def _reload(self) -> None:
        """Reads the ledger, drops what is gone, ends what was cut off, and removes what stands in no record."""
        for record in ledger.records():
            try:
                if record.content is not None:
                    standing = Standing.load(record.content)
                    if standing.deployment.name != record.name:
                        raise ValueError(f"it is about {standing.deployment.name!r}")
                    self._books.standing[record.name] = standing
                    continue
            except Exception:
                record = replace(record, content=None, problem="its record does not make sense")
                logger.exception("the record of %r cannot be understood", record.name)
            logger.error("%r: %s; it is left as it is", record.name, record.problem)
            self._books.unreadable[record.name] = record
        self.fleet.recall(self._nodes.now())
        self._ended = ledger.ended()
        self._ended_at = dict.fromkeys(self._ended, time.monotonic())
        live = self._live_groups()
        for name in self._books.names():
            standing = self._books.standing[name]
            self._events.add(name, None, "restarted", "the service has started anew")
            if standing.releasing:
                self._ended.pop(name, None)
                self._ended[name] = self._release(name)
                continue
            for index, parts in list(standing.replicas.items()):
                if parts[0].placement_group.id.hex() not in live:
                    state = standing.happen(index, Event.LOST)
                    self.fleet.note_removed(standing.orders[index], [part.node for part in parts])
                    del standing.replicas[index], standing.orders[index]
                    standing.reasons[index] = "its placement group is gone"
                    self._events.add(name, index, str(state), standing.reasons[index])
            if surplus := [index for index in standing.states if index >= standing.deployment.replicas]:
                self._give_back(standing, surplus)  # an apply was cut off
            if surplus or standing.missing():
                self._note(standing)
        self._undecided = self._sweep(live)

    def _release_unreadable(self, name: str) -> int:
        """Removes a record that makes no sense, and all groups of that name."""
        record = self._books.unreadable[name]
        if record.newer:
            raise UnreadableRecord(name, record.problem, newer=True)
        held = groups.live_groups(lambda group: group.startswith(f"{self._prefix}{name}:"))
        for group_id, group in held.items():
            self._remove(group_id, group)
        ledger.delete(name)
        del self._books.unreadable[name]
        self.fleet.tell(name)
        return len(held)
