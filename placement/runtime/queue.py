"""What waits for room: declarations and calls, tried in their turn; and what the autoscaler hears of them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from operator import itemgetter
from typing import Generic, TypeVar

from placement.core.reconcile import Wait, admit
from placement.core.request import Request
from placement.errors import ReservationFailed, Unplaceable
from placement.runtime.actions import AUTOSCALER
from placement.runtime.demand import Asked, Demand, Need, needs_of
from placement.runtime.reconciler import Reconciler
from placement.runtime.state import DeploymentState
from placement.runtime.turns import Turns
from placement.wire.deployment import Deployment
from placement.wire.plans import request_unchecked

T = TypeVar("T")


class Ticket(Generic[T]):
    """One call that waits.

    Args:
        wanted: the deployment that it is about.
        do: what it waits to do; raises ``Unplaceable`` or ``ReservationFailed`` while there is no room.

    Attributes:
        since: when it came, in seconds since 1970.
        outcome: what it came to, once it is over.
    """

    def __init__(self, wanted: Deployment, do: Callable[[], T]) -> None:
        self.wanted, self.name, self.since = wanted, wanted.name, time.time()
        self.outcome: Future[T] = Future()
        self._do = do
        self._lock = threading.Lock()
        self._refusal: Exception | None = None

    def attempt(self) -> T:
        """Does it, if there is room.

        Raises:
            Unplaceable, ReservationFailed: there is none. Any other error ends it.
        """
        with self._lock:
            if self.outcome.done():
                return self.outcome.result()
            try:
                result = self._do()
            except (Unplaceable, ReservationFailed) as refusal:
                self._refusal = refusal
                raise
            except BaseException as error:
                self.outcome.set_exception(error)
                raise
            self.outcome.set_result(result)
            return result

    def result(self) -> T:
        """What it came to; why there was no room, if it is still waiting. It is not tried any more then."""
        with self._lock:
            if not self.outcome.done():
                self.outcome.set_exception(self._refusal or TimeoutError())
        return self.outcome.result()


class Tickets:
    """All calls that wait. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, Ticket[object]] = {}

    def add(self, ticket: Ticket[T]) -> None:
        """From here on it is tried in its turn."""
        with self._lock:
            self._waiting[id(ticket)] = ticket  # type: ignore[assignment]

    def remove(self, ticket: Ticket[T]) -> None:
        """It is not tried any more."""
        with self._lock:
            self._waiting.pop(id(ticket), None)

    def all(self) -> list[Ticket[object]]:
        """Those that wait, the oldest first."""
        with self._lock:
            return sorted(self._waiting.values(), key=lambda ticket: ticket.since)


class WaitingQueue:
    """All that waits for room, oldest first. Thread-safe.

    Args:
        reconciler: what brings deployments about.
        turns: one change of a deployment at a time.
        demand: what is asked of Ray's autoscaler.

    Attributes:
        tickets: the calls among it.
    """

    def __init__(self, reconciler: Reconciler, turns: Turns, demand: Demand) -> None:
        self._reconciler, self._turns, self.demand = reconciler, turns, demand
        self._state, self._cluster = reconciler.state, reconciler.cluster
        self._fleet, self._actions = reconciler.fleet, reconciler.actions
        self.tickets = Tickets()
        self._needs: dict[str, Need | str] = {}

    def try_all(self, attempt: Callable[[str], None]) -> None:
        """Tries all that waits for room, the oldest first, with one look at the cluster.

        Args:
            attempt: reconciles a deployment for which there seems to be room.
        """
        promising = self._promising()
        waiting: list[tuple[float, str, Ticket[object] | None]] = [
            (ticket.since, ticket.name, ticket) for ticket in self.tickets.all()
        ]
        for name in promising:
            known = self._state.get(name)
            if known is not None:
                waiting.append((known.waiting_since or 0.0, name, None))
        for _, name, ticket in sorted(waiting, key=itemgetter(0, 1)):
            if ticket is None:
                attempt(name)
                continue
            with contextlib.suppress(Exception):  # who waits for it is told
                ticket.attempt()

    def _promising(self) -> list[str]:
        """Of what waits in the state, that of which something can be done now; the rest is told why not.

        What finds no room is what the autoscaler is asked for.
        """
        names, tickets = self._state.queue(), self.tickets.all()
        if not names and not tickets:
            self._needs = {}
            return []
        nodes = self._cluster.nodes()
        self._fleet.machines.refresh(nodes, patience_seconds=0.0)
        with self._state.lock:
            snapshot = self._cluster.snapshot(nodes)
            known = [one for name in names if (one := self._state.get(name)) is not None]
            waiting = [(one, *self._reconciler.seen(one, snapshot)) for one in known if not one.releasing]
        found = [one.name for one in known if one.releasing]
        needs: dict[str, Need | str] = {}
        requests = {one.name: desired.request for one, desired, _ in waiting}
        for one, decision in admit(waiting, snapshot):
            waits = [action for action in decision.actions if isinstance(action, Wait)]
            for wait in waits:
                needs |= _needs_of(requests[one.name], wait.indices)
            if len(waits) < len(decision.actions):
                found.append(one.name)
            else:
                self._reasons_changed(one, waits)
        for ticket in tickets:
            request = request_unchecked(ticket.wanted, range(ticket.wanted.replicas), {})
            needs |= _needs_of(request, request.replicas)
        self._needs = needs
        return found

    def _reasons_changed(self, one: DeploymentState, waits: Sequence[Wait]) -> None:
        """Has those who look know why replicas wait, as it is now."""
        asked = self.demand.poll()
        reasons = {}
        for wait in waits:
            for index in wait.indices:
                told = asked.get(f"{one.name}:{index}:0")
                reasons[index] = f"{wait.refusal}{_told(told)}"
        if reasons == one.reasons:
            return
        with self._turns.sole(one.name, wait=False) as mine:
            if mine and self._state.get(one.name) is one:
                self._actions.wait(one, reasons, time.time(), self._actions.note)

    def ask_for_nodes(self) -> None:
        """Has the autoscaler know what waits, and no more than that."""
        needs = self._needs
        if not needs:
            self.demand.want({}, ())
            return
        nodes = self._cluster.nodes_lately()
        unknown = self._fleet.machines.unknown_nodes(nodes)
        self.demand.want(needs, [info.id for info in nodes if info.id not in unknown])

    def depends_on(self) -> object:
        """What what waits depends on: once this is another, it is worth trying it again."""
        asked = tuple((key, one.state) for key, one in self.demand.poll().items())
        unknown = self._fleet.machines.unknown_nodes(self._cluster.nodes_lately())
        return self._fleet.changed_at, self._state.queue_version, len(self.tickets.all()), asked, unknown


def _needs_of(request: Request, indices: Sequence[int]) -> dict[str, Need | str]:
    """What the sets of some replicas ask of a new node, by ``deployment:replica:set``; or why nothing is asked."""
    needs = needs_of(request, indices)
    if isinstance(needs, str):
        return {f"{request.deployment}:{index}:0": needs for index in indices}
    return dict(needs)


def _told(asked: Asked | None) -> str:
    """What became of a need, as the end of a reason."""
    if asked is None or not asked.reason:
        return ""
    said = asked.reason if asked.state == "asked" else f"{asked.state.value}, {asked.reason}"
    return AUTOSCALER + said
