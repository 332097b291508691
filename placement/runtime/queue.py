"""The queue: declarations and calls that wait for room, tried in turn; and the requests to the autoscaler for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar

from placement.core.planner import Shortfall, attempt
from placement.core.reconcile import Decision, Desired, Observed, Wait, admit, reconcile
from placement.core.request import Request
from placement.core.role_lacks import lacks
from placement.core.roles import refusal_of, tell
from placement.core.snapshot import Snapshot
from placement.errors import LeaseExpired, ReservationFailed, Unplaceable
from placement.runtime.actions import AUTOSCALER
from placement.runtime.asking import Asked, State
from placement.runtime.autoscaler import NO_AUTOSCALER
from placement.runtime.demand import Demand
from placement.runtime.deployment_state import DeploymentState, Owner
from placement.runtime.group_needs import GroupNeeds
from placement.runtime.needs import Need, by_type, needs_of
from placement.runtime.owners import has_ended
from placement.runtime.reconciler import Reconciler
from placement.runtime.turns import Turns
from placement.wire.deployment import Deployment
from placement.wire.groups import Group
from placement.wire.node_types import NodeType
from placement.wire.requests import request_unchecked

T = TypeVar("T")

NOT_KNOWN = "has not said yet what its GPUs are"


class Ticket(Generic[T]):
    """One call that waits.

    Args:
        wanted: the deployment that it is about.
        do: the attempt; raises ``Unplaceable`` or ``ReservationFailed`` while there is no room.
        needed_by: the caller and the future owner: once one of these has ended, the call is not needed.

    Attributes:
        since: when it began to wait, in seconds since 1970.
        outcome: its outcome, once it is over.
    """

    def __init__(
        self, wanted: Deployment, do: Callable[[], T], needed_by: Iterable[Owner | None] = ()
    ) -> None:
        self.wanted, self.name, self.since = wanted, wanted.name, time.time()
        self.outcome: Future[T] = Future()
        self._needed_by = [owner for owner in needed_by if owner is not None]
        self._do = do
        self._trying = threading.Lock()
        self._ending = threading.Lock()
        self._refusal: Exception | None = None

    @property
    def is_over(self) -> bool:
        """Whether it is no longer tried."""
        return self.outcome.done()

    def attempt(self) -> T:
        """Makes an attempt.

        Raises:
            Unplaceable, ReservationFailed: there is no room. Any other error ends it.
        """
        with self._trying:
            if self.outcome.done():
                return self.outcome.result()
            try:
                result = self._do()
            except (Unplaceable, ReservationFailed) as refusal:
                self._refusal = refusal
                raise
            except BaseException as error:
                self.end(error)
                raise
            with self._ending:
                if not self.outcome.done():
                    self.outcome.set_result(result)
            return result

    def refuse(self, why: Exception) -> None:
        """Records why there is still no room."""
        self._refusal = why

    def result(self) -> T:
        """Ends it; returns its outcome, or why there was no room if it is still waiting."""
        if not self.is_over:
            with self._trying:
                self.end()
        return self.outcome.result()

    def end(self, error: BaseException | None = None) -> None:
        """Gives it up; does not wait for an attempt that is under way.

        Args:
            error: why, if the reason is not lack of room.
        """
        with self._ending:
            if not self.outcome.done():
                self.outcome.set_exception(
                    error or self._refusal or TimeoutError(f"{self.name!r} was given up")
                )

    def end_if_for_nobody(self) -> None:
        """Ends it if its caller, or its future owner, has ended."""
        if not self.is_over and any(has_ended(owner) for owner in self._needed_by):
            self.end(LeaseExpired(self.name, "its caller, or the owner it was to have, has ended"))


class Tickets:
    """All calls that wait. Thread-safe.

    Attributes:
        version: grows with each ticket that is added or removed.
    """

    def __init__(self) -> None:
        # Reentrant: the garbage collector may close the coroutine of a waiting caller while its thread is in here.
        self._lock = threading.RLock()
        self._waiting: dict[int, Ticket[object]] = {}
        self.version = 0

    def add(self, ticket: Ticket[T]) -> None:
        """Adds a call, which is then tried in its turn."""
        with self._lock:
            self._waiting[id(ticket)] = ticket  # type: ignore[assignment]
            self.version += 1

    def remove(self, ticket: Ticket[T]) -> None:
        """Removes a call."""
        with self._lock:
            self._waiting.pop(id(ticket), None)
            self.version += 1

    def all(self) -> list[Ticket[object]]:
        """The waiting calls, the oldest first."""
        with self._lock:
            return sorted(self._waiting.values(), key=lambda ticket: ticket.since)


Waiting = DeploymentState | Ticket[object]
"""A declaration or a call."""


class WaitingQueue:
    """All that waits for room, the oldest first. Thread-safe.

    Args:
        reconciler: reconciles deployments.
        turns: one change of a deployment at a time.
        demand: asks Ray's autoscaler for nodes.
        node_types: the node types that the autoscaler can start, if given; refusals name the right one.

    Attributes:
        tickets: the waiting calls.
    """

    def __init__(
        self, reconciler: Reconciler, turns: Turns, demand: Demand, node_types: Sequence[NodeType] = ()
    ) -> None:
        self._reconciler, self._turns, self.demand = reconciler, turns, demand
        self._state, self._cluster = reconciler.state, reconciler.cluster
        self._fleet, self._actions = reconciler.fleet, reconciler.actions
        self.tickets = Tickets()
        self._needs: dict[str, Need | str] = {}
        self._group_needs = GroupNeeds(demand)
        self._node_types = node_types
        reconciler.outlook, reconciler.types_for = self.outlook, self.types_for

    def try_all(
        self,
        attempt: Callable[[str], None],
        begin: Callable[[str, Callable[[], None]], None] = lambda name, do: do(),
    ) -> None:
        """Tries all that waits for room, the oldest first, with one look at the cluster.

        Args:
            attempt: reconciles a deployment for which there seems to be room.
            begin: starts the work for a name; it need not wait for its end.
        """
        for one in self._promising():
            do = partial(attempt, one.name) if isinstance(one, DeploymentState) else partial(_try, one)
            begin(one.name, do)

    def end_what_is_for_nobody(self) -> None:
        """Ends the calls whose callers have ended."""
        for ticket in self.tickets.all():
            ticket.end_if_for_nobody()
            if ticket.is_over:
                self.tickets.remove(ticket)

    def _promising(self) -> list[Waiting]:
        """The waiting entries for which something can be done now, the oldest first; the others get their reason.

        For entries that find no room the autoscaler is asked.
        """
        names, tickets = self._state.queue(), self.tickets.all()
        self._group_needs.keep({group.name for one in self._in_turn(names, ()) if (group := _group(one))})
        if not names and not tickets:
            self._needs = {}
            self.ask_for_nodes()
            return []
        inventory = self._fleet.inventory
        nodes = self._cluster.nodes()
        inventory.refresh(nodes, patience_seconds=0.0)
        unknown = inventory.unknown_nodes(nodes)
        self._cluster.read()
        with self._state.lock:
            # An entry that is being tried has claimed its room, and would find none beside that.
            busy = set(self._turns.names())
            for name in tuple(busy):
                if (known := self._state.get(name)) is not None and known.deployment.group is not None:
                    busy.update(known.deployment.group.members)
            snapshot = self._cluster.snapshot(nodes)
            queue = [one for one in self._in_turn(names, tickets) if one.name not in busy]
            found, waiting = self._look_at(queue, snapshot)
            groups = {group.name: group for one, *_ in waiting if (group := _group(one))}
            members = {name: self._members(group, snapshot) for name, group in groups.items()}
        if self._cluster.locate(snapshot, [desired.request for _, desired, _ in waiting]):
            with self._state.lock:
                snapshot = self._cluster.snapshot(nodes)
        decided = admit(waiting, snapshot)
        # A node that has not reported its GPUs yet cannot be used, but no other node is asked for meanwhile.
        before = _without(snapshot, unknown) if unknown else snapshot
        usable = admit(waiting, before) if unknown else decided
        needs = {key: need for key, need in self._needs.items() if key.rsplit(":", 2)[0] in busy}
        told = self.demand.poll()
        for (_, desired, observed), (one, decision), (_, now) in zip(waiting, decided, usable, strict=True):
            waits = [action for action in now.actions if isinstance(action, Wait)]
            if (group := _group(one)) is not None:
                # A group is tried as one, in the turn of the first of its members.
                if groups.pop(group.name, None):
                    unmet = self._unmet_of(group, before, members[group.name], told)
                    needs |= unmet or {}
                    if unmet is None:
                        found.append(one)
            else:
                unmet = _unmet(desired, observed, decision)
                needs |= unmet
                if len(waits) < len(now.actions):
                    found.append(one)
                elif isinstance(one, DeploymentState):
                    self._reasons_changed(one, self._reasons(waits, unmet, told))
                elif waits:
                    one.refuse(waits[0].refusal)
            before = now.snapshot
        if any(snapshot.bit(node_id) and snapshot.node(node_id).free for node_id in unknown):
            needs = {key: need for key, need in needs.items() if key in self._needs}
        self._needs = needs
        self.ask_for_nodes()
        return sorted(found, key=_turn)

    def _look_at(
        self, queue: Sequence[Waiting], snapshot: Snapshot
    ) -> tuple[list[Waiting], list[tuple[Waiting, Desired, Mapping[int, Observed]]]]:
        """The entries to try without checking room, and the others as ``core.reconcile`` takes them. Under the lock."""
        at_once: list[Waiting] = []
        waiting: list[tuple[Waiting, Desired, Mapping[int, Observed]]] = []
        for one in queue:
            if isinstance(one, DeploymentState):
                if one.releasing:
                    at_once.append(one)
                else:
                    waiting.append((one, *self._reconciler.seen(one, snapshot)))
            elif self._state.get(one.name) is not None:
                # It has been placed, or another deployment of that name has.
                at_once.append(one)
            else:
                apart = self._state.keeping_apart(one.name)
                request = request_unchecked(one.wanted, range(one.wanted.replicas), {}, apart)
                waiting.append((one, Desired(request, gang=True), {}))
        return at_once, waiting

    def _in_turn(self, names: Sequence[str], tickets: Sequence[Ticket[object]]) -> list[Waiting]:
        """What waits, the oldest first."""
        known = [one for name in names if (one := self._state.get(name)) is not None]
        return sorted([*known, *tickets], key=_turn)

    def _members(
        self, group: Group, snapshot: Snapshot
    ) -> dict[str, tuple[Desired, Mapping[int, Observed]]] | None:
        """What is declared and there of a group's members; ``None`` if some are missing. Under the lock."""
        known = [one for name in group.members if (one := self._state.get(name)) is not None]
        if len(known) < len(group.members) or any(one.releasing for one in known):
            return None
        return {one.name: self._reconciler.seen(one, snapshot) for one in known}

    def _unmet_of(
        self,
        group: Group,
        snapshot: Snapshot,
        members: Mapping[str, tuple[Desired, Mapping[int, Observed]]] | None,
        told: Mapping[str, Asked],
    ) -> dict[str, Need | str] | None:
        """The needs of a group that finds no room, whose members get their reason; ``None`` if it is to be tried."""
        if members is None or any(one.gone for _, observed in members.values() for one in observed.values()):
            return None
        roles = group.planned()
        refusal = refusal_of(tell(snapshot, roles, members))
        if refusal is None:
            return None
        unmet = self._group_needs.of(lacks(snapshot, roles, members))
        self._group_needs.seen(group, unmet, told)
        reason = f"{refusal}{self._end(unmet, told)}"
        for name in members:
            if (one := self._state.get(name)) is not None:
                self._reasons_changed(one, dict.fromkeys(one.reasons, reason))
        return unmet

    def _reasons(
        self, waits: Sequence[Wait], needs: Mapping[str, Need | str], told: Mapping[str, Asked]
    ) -> dict[int, str]:
        """Why replicas wait, by index."""
        ends = self._ends(needs, told)
        other = next(iter(ends.values()), "")  # of replicas that are placed all at once, some alone would fit
        return {i: f"{wait.refusal}{ends.get(i, other)}" for wait in waits for i in wait.indices}

    def _reasons_changed(self, one: DeploymentState, reasons: dict[int, str]) -> None:
        """Updates the reasons why replicas wait."""
        if reasons == one.reasons:
            return
        with self._turns.sole(one.name, wait=False) as mine:
            if mine and self._state.get(one.name) is one:
                self._actions.wait(one, reasons, time.time(), self._actions.note)

    def outlook(self, request: Request, indices: Sequence[int]) -> dict[int, str]:
        """What the autoscaler is, or will be, asked for waiting replicas; as the end of their reason."""
        if request.told is not None:
            needs = self._group_needs.of(request.told.lacks)
            return dict.fromkeys(indices, self._end(needs, self.demand.poll()))
        return self._ends(_needs_of(request, indices), self.demand.poll())

    def _end(self, needs: Mapping[str, Need | str], told: Mapping[str, Asked]) -> str:
        """The end of the reason of all replicas of a group."""
        asked = [(told.get(key) or self.demand.outlook(need), need) for key, need in needs.items()]
        # Why no node is coming is more informative.
        asked.sort(key=lambda one: one[0].state in (State.ASKED, State.ARRIVED))
        return self._told(*asked[0]) if asked else ""

    def _ends(self, needs: Mapping[str, Need | str], told: Mapping[str, Asked]) -> dict[int, str]:
        ends: dict[int, str] = {}
        for key, need in needs.items():
            index = int(key.rsplit(":", 2)[1])
            asked = told.get(key) or self.demand.outlook(need)
            # Of several sets, one for which no node is coming is more informative.
            if index not in ends or asked.state not in (State.ASKED, State.ARRIVED):
                ends[index] = self._told(asked, need)
        return ends

    def _told(self, asked: Asked, need: Need | str) -> str:
        """The state of a need, as the end of a reason."""
        comes = asked.state in (State.ASKED, State.ARRIVED)
        types = "" if comes or isinstance(need, str) else by_type(need, self._node_types)
        if asked.reason == NO_AUTOSCALER:
            return AUTOSCALER + types if types else ""
        said = f"no node is asked for: {asked.reason}" if asked.state is State.NOT_ASKED else asked.reason
        return AUTOSCALER + said + (f"; {types}" if types else "")

    def types_for(self, request: Request, indices: Sequence[int]) -> str:
        """Which node type would hold a replica that finds no room; empty without node types."""
        if not self._node_types:
            return ""
        needs = [need for need in _needs_of(request, indices[:1]).values() if isinstance(need, Need)]
        return by_type(needs[0], self._node_types) if needs else ""

    def ask_for_nodes(self) -> None:
        """Updates what the autoscaler is asked for, and which nodes are known by now."""
        calls = {ticket.name for ticket in self.tickets.all()}
        needs = {key: need for key, need in self._needs.items() if self._still_waits(key, calls)}
        if not needs:
            self.demand.want({}, ())
            return
        nodes = self._cluster.nodes_lately()
        self._fleet.inventory.refresh(nodes, patience_seconds=0.0)
        unknown = self._fleet.inventory.unknown_nodes(nodes)
        self.demand.want(needs, [info.id for info in nodes if info.id not in unknown])

    def _still_waits(self, key: str, calls: Collection[str]) -> bool:
        """Whether a replica still waits; it may have been placed or released since the last look."""
        name, index, _ = key.rsplit(":", 2)
        known = self._state.get(name)
        if known is None:
            return name in calls
        return int(index) in known.reasons and not known.releasing and not known.given_up

    def awaited_nodes(self) -> frozenset[str]:
        """Nodes that have joined for waiting entries that are not placed yet."""
        return frozenset(node_id for one in self.demand.poll().values() for node_id in one.nodes)

    def depends_on(self) -> object:
        """The version of all that the queue depends on: once it changes, trying again may succeed."""
        return self._fleet.changed_at, self.news()

    def news(self) -> object:
        """The same, only for what must be noticed at once: changes of the queue, and nodes that join for it."""
        unknown = self._fleet.inventory.unknown_nodes(self._cluster.nodes_lately()) if self._needs else None
        return self._state.queue_version, self.tickets.version, self.demand.version, unknown


def _try(ticket: Ticket[object]) -> None:
    with contextlib.suppress(Exception):  # its caller gets the error
        ticket.end_if_for_nobody()
        ticket.attempt()


def _without(snapshot: Snapshot, unknown: Collection[str]) -> Snapshot:
    """The cluster without nodes that have not reported their GPUs yet."""
    nodes = [snapshot.node(node_id) for node_id in unknown if snapshot.bit(node_id)]
    return snapshot.changed([replace(node, problem=node.problem or NOT_KNOWN) for node in nodes])


def _turn(one: Waiting) -> tuple[float, str]:
    since = one.since if isinstance(one, Ticket) else one.waiting_since
    return since or 0.0, one.name


def _unmet(desired: Desired, observed: Mapping[int, Observed], decision: Decision) -> dict[str, Need | str]:
    """The needs of the waiting replicas' sets for which there is no room.

    Of replicas that are placed all at once some may fit. Then it does not matter for which of the sets nodes are asked.
    """
    waits = _waits(decision)
    if desired.gang and len(waits) > 1:
        decision = reconcile(replace(desired, gang=False), observed, decision.snapshot)
        waits = _waits(decision)
    request = desired.request
    if request.needs.named:
        request = replace(request, standing=Counter(one.parts[0].node_id for one in observed.values()))
    needs = _needs_of(request, waits)
    if request.provider is None and request.stages > 1 and request.parts == 1 and not request.spread_label:
        sets = replace(request, replicas=tuple(range(len(needs))), stages=1)
        found = attempt(decision.snapshot, sets)
        if isinstance(found, Shortfall):
            return dict([*needs.items()][found.fitting :])
    return needs


def _group(one: Waiting) -> Group | None:
    """The group of a waiting member."""
    return one.deployment.group if isinstance(one, DeploymentState) else None


def _waits(decision: Decision) -> list[int]:
    return [index for action in decision.actions if isinstance(action, Wait) for index in action.indices]


def _needs_of(request: Request, indices: Sequence[int]) -> dict[str, Need | str]:
    """The needs of some replicas' sets, by ``deployment:replica:set``; or why no node is asked for."""
    needs = needs_of(request, indices)
    if isinstance(needs, str):
        return {f"{request.deployment}:{index}:0": needs for index in indices}
    return dict(needs)
