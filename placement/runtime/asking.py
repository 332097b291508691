"""Decides step by step what the autoscaler is asked for: from what waits to groups to create and to remove.

Each waiting set is one *ask*: a pending placement group that takes nothing on the existing nodes. Its life:

    open ──> held ──> freeing ──> arrived
     │         a new node has it; its GPUs are given back once that node is known
     └──> infeasible: no node type can hold it now

No need starts node after node. If a node arrived and the planner does not want it, the set still waits; it is not
asked for again for minutes, nor is anything of the same shape; nor is a shape for which nodes arrive that lack the
labels which their type promises. A shape that failed is tried again with one ask, and with all asks after that one
arrived.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from placement.core.labels import parse_condition
from placement.errors import counted
from placement.runtime.arrivals import Arrival, Arrivals, Verdict
from placement.runtime.autoscaler import Cluster, Heard, SeenNode
from placement.runtime.backoff import Backoff
from placement.runtime.needs import NODE_ID_LABEL, Need, Way
from placement.runtime.shapes import Shapes

FICKLE_SECONDS = 5.0, 3600.0
"""The first and the longest delay before a need that was withdrawn, and waits again, is asked for again:
its node may be on its way."""

FORGOTTEN_SECONDS = 60.0
"""After how long that is forgotten."""

HOLD_SECONDS = 60.0
"""How long a new node is held while its GPUs are not known yet. Reading them takes 3 s, more on a
machine that is still busy with its own start; if it were given back earlier, it would be idle and might be removed."""

BOOKS_SECONDS = 0.25
"""After this time Ray's records show what a group took. They lag by up to 0.1 s."""

RIVAL_SECONDS = 1.0
"""How long Ray takes to place on a new node all groups that fit; it places one after the other."""

FREE_SECONDS = 1.0
"""Longest wait for the records to show it free again; 43 to 95 ms were measured."""

STATUS_SECONDS = 2.0
"""How often the autoscaler's report is read while something is asked; its own round takes 5 s by default."""

NEW_SECONDS = 10.0, 0.5
"""How long an ask is new, and how often the report is read in that time: in each round in which the autoscaler cannot
start it, Ray prints a line on the console of every driver."""

QUIET_SECONDS = 10.0
"""The same while nothing is asked."""

LEAVE_SECONDS = 2.0
"""Longest wait for a moment at which a group can be removed; Ray tries to reserve a pending one every second."""


class State(StrEnum):
    """The state of a need."""

    ASKED = "asked"
    ARRIVED = "arrived"
    INFEASIBLE = "infeasible"
    NOT_ASKED = "not asked"


@dataclass(frozen=True)
class Asked:
    """The state of one need, with its reason.

    Attributes:
        state: see :class:`State`.
        reason: why, or what it waits for.
        nodes: ids of the new nodes that hold it, or held it until now.
        since: when that state began, by :func:`time.monotonic`; ``None`` if unknown.
        again: when it will be asked for again, likewise; ``None`` if that depends on something else.
    """

    state: State
    reason: str = ""
    nodes: tuple[str, ...] = ()
    since: float | None = None
    again: float | None = None


@dataclass
class _Ask:
    """The group of one need."""

    need: Need
    way: Way
    group: str
    since: float
    there: frozenset[str]
    held: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    held_since: float = 0.0
    freeing_since: float = 0.0
    free_before: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def fits(self, node: SeenNode) -> bool:
        """Whether a node has what is asked for, by its labels and its total resources."""
        return self.need.met_by(node.labels) and any(
            all(node.total.get(resource, 0.0) >= amount for resource, amount in bundle)
            for bundle in self.way.bundles
        )


@dataclass
class _Leaving:
    """A group to be removed."""

    group: str
    since: float
    attempt: int | None = None
    renews: str = ""


class Asks:
    """All asks of one service. Not thread-safe; Ray's errors pass through :meth:`step`, after which it can go on.

    Args:
        prefix: begins the name of every group.
        max_open: the most asks at a time.
        cluster: Ray.
    """

    def __init__(self, prefix: str, max_open: int, cluster: Cluster) -> None:
        self._prefix, self._max_open, self._cluster = prefix, max_open, cluster
        self._asks: dict[str, _Ask] = {}
        self._arrivals = Arrivals(cluster)
        self._shapes = Shapes()
        self._leaving: list[_Leaving] = []
        self._fickle = Backoff(*FICKLE_SECONDS)
        self._absent: dict[str, float] = {}
        self._heard: Heard | None = None
        self._heard_at = -QUIET_SECONDS
        self._told: dict[str, Asked] = {}
        self._waiting: dict[str, Asked] = {}

    @property
    def told(self) -> Mapping[str, Asked]:
        """The state of each need after the last step. Never changed, only replaced."""
        return self._told

    @property
    def empty(self) -> bool:
        """Whether no group is left."""
        return not self._asks and not self._leaving

    def listen(self) -> None:
        """Reads the autoscaler's report."""
        self._heard = self._cluster.hear()
        self._heard_at = time.monotonic()

    def outlook(self, need: Need | str) -> Asked:
        """What would happen to a need if it were asked for, as far as known. May be called by any thread."""
        if isinstance(need, str):
            return Asked(State.NOT_ASKED, need)
        heard = self._heard
        if heard is None:
            return Asked(State.NOT_ASKED, "the autoscaler has not reported yet")
        if heard.problem:
            return Asked(State.NOT_ASKED, heard.problem)
        return self._waiting.get(str(need)) or Asked(State.ASKED, f"asked for {need}")

    def step(self, wanted: Mapping[str, Need | str], known: Collection[str]) -> float | None:
        """Changes what is asked to what is wanted.

        Args:
            wanted: key -> need, oldest first; or why no node is asked for.
            known: ids of nodes whose GPUs are known.

        Returns:
            After how many seconds to call it again; ``None``: not before something else is wanted.
        """
        now, known = time.monotonic(), frozenset(known)
        self._hand_over(wanted)
        for key, ask in list(self._asks.items()):
            if wanted.get(key) != ask.need:
                self._leave(key, now)
                if key not in wanted:
                    self._fickle.fail(key)
            else:
                self._follow(key, ask, known, now)
        self._judge(wanted, known, now)
        self._hear(wanted, now)
        self._remove(now)
        self._ask(wanted, known, now)
        self._waiting = {
            shape: Asked(
                State.INFEASIBLE if one.infeasible else State.NOT_ASKED, one.why, (), one.since, one.until
            )
            for shape, one in self._shapes.setbacks().items()
        }
        self._told = {key: self._tell(key, need) for key, need in wanted.items()}
        if self._leaving or any(ask.freeing_since for ask in self._asks.values()):
            return 0.02
        if any(ask.held for ask in self._asks.values()):
            return 0.1
        return 0.5 if self._asks else 2.0 if wanted else None

    # -- one ask -----------------------------------------------------------------------------------

    def _hand_over(self, wanted: Mapping[str, Need | str]) -> None:
        """Transfers the ask of a need that no longer waits to another need of the same shape.

        The planner decides who gets a new node: on the node that was asked for the second replica it may place
        the first; from then on the ask of the first is for the second.
        """
        for key, ask in list(self._asks.items()):
            if wanted.get(key) == ask.need:
                continue
            alike = [other for other, need in wanted.items() if need == ask.need and other not in self._asks]
            if alike:
                other = next((one for one in alike if one in self._arrivals), alike[0])
                self._arrivals.pop(other, None)
                self._asks[other] = self._asks.pop(key)

    def _follow(self, key: str, ask: _Ask, known: frozenset[str], now: float) -> None:
        """Takes an ask one step on."""
        if ask.freeing_since:
            if now - ask.freeing_since < FREE_SECONDS and not self._freed(ask):
                return
            del self._asks[key]
            self._arrivals[key] = Arrival(ask.need, ask.held, now)
            self._shapes.arrived(ask.need, ask.since)
            return
        seen = self._cluster.look(ask.group)
        if seen.state == "CREATED":
            if not ask.held:
                ask.held, ask.held_since = seen.nodes, now
            waited = now - ask.held_since
            is_known = waited >= BOOKS_SECONDS and ask.held.keys() <= known
            if waited >= HOLD_SECONDS or (is_known and self._is_undisputed(ask, waited, now)):
                ask.free_before = self._cluster.free()
                self._cluster.remove(ask.group)
                ask.freeing_since = now
        elif seen.state in ("RESCHEDULING", "REMOVED"):  # its node died, or somebody removed it
            self._leave(key, now)

    def _is_undisputed(self, ask: _Ask, waited: float, now: float) -> bool:
        """Whether no other ask would take at once what this one gives back; asks that would are replaced by new ones.

        They were created before the node joined, so their selectors do not exclude it.
        """
        if waited >= RIVAL_SECONDS:  # by now Ray has placed all groups that fit beside it
            for key in self._rivals(ask):
                if self._cluster.look(self._asks[key].group).state == "PENDING":
                    self._leave(key, now, renew=True)
        return not self._rivals(ask) and not any(one.renews for one in self._leaving)

    def _rivals(self, ask: _Ask) -> list[str]:
        nodes = self._heard.nodes if self._heard else {}
        return [
            key
            for key, other in self._asks.items()
            if not other.held
            and any(
                node_id not in other.there and (node_id not in nodes or other.fits(nodes[node_id]))
                for node_id in ask.held
            )
        ]

    def _freed(self, ask: _Ask) -> bool:
        """Whether Ray's records show what the group took as free again."""
        free = self._cluster.free()
        for node, amounts in ask.held.items():
            before, after = ask.free_before.get(node, {}), free.get(node, {})
            short = (
                after.get(name, 0.0) - before.get(name, 0.0) < held - 1e-6 for name, held in amounts.items()
            )
            if any(short):
                return False
        return True

    def _leave(self, key: str, now: float, renew: bool = False) -> None:
        """Withdraws an ask, perhaps to ask for it again once it is gone."""
        ask = self._asks.pop(key)
        if not ask.freeing_since:
            self._leaving.append(_Leaving(ask.group, now, renews=key if renew else ""))

    def _remove(self, now: float) -> None:
        """Removes the withdrawn groups that can be removed now: removal while Ray reserves a group leaks its GPUs."""
        for one in list(self._leaving):
            seen = self._cluster.look(one.group)
            one.attempt = seen.attempt if one.attempt is None else one.attempt
            failed = seen.state == "PENDING" and seen.idle and seen.attempt > one.attempt
            late = seen.state == "PENDING" and now - one.since > LEAVE_SECONDS
            if seen.state in ("CREATED", "RESCHEDULING") or seen.hopeless or failed or late:
                self._cluster.remove(one.group)
            elif seen.state != "REMOVED":
                continue
            self._leaving.remove(one)

    # -- shapes that fail --------------------------------------------------------------------------

    def _judge(self, wanted: Mapping[str, Need | str], known: frozenset[str], now: float) -> None:
        """Records which arrivals were placed, and which the planner did not want."""
        for key, arrival, verdict in self._arrivals.judge(wanted, known, (self._heard, self._heard_at), now):
            if verdict is Verdict.PLACED:
                self._shapes.placed(arrival.need)
            elif verdict is Verdict.LOST:
                self._fickle.fail(key)
            else:
                came = counted(len(arrival.held), "node")
                self._refuse(arrival.need, f"{came} joined for it, and it was not placed there", now)
        for key, since in list(self._absent.items()):
            if now - since >= FORGOTTEN_SECONDS:
                del self._absent[key]
                self._fickle.pop(key, None)
            elif key in wanted:
                del self._absent[key]
        for key in self._fickle.keys() - self._absent.keys() - wanted.keys():
            self._absent[key] = now

    def _refuse(self, need: Need, why: str, now: float) -> None:
        """Nothing of this shape is asked for again for minutes."""
        self._shapes.refuse(need, why)
        for key in [key for key, ask in self._asks.items() if ask.need == need and not ask.held]:
            self._leave(key, now)

    def _hear(self, wanted: Mapping[str, Need | str], now: float) -> None:
        """Reads the autoscaler's report when it is time to, and withdraws what it cannot start."""
        pause = STATUS_SECONDS if self._asks else QUIET_SECONDS
        if any(now - ask.since < NEW_SECONDS[0] and not ask.held for ask in self._asks.values()):
            pause = NEW_SECONDS[1]
        if now - self._heard_at < pause:
            return
        if not self._asks and not any(isinstance(need, Need) for need in wanted.values()):
            return
        self._heard = heard = self._cluster.hear()
        self._heard_at = now
        if heard.problem:
            for key in list(self._asks):
                self._leave(key, now)
            return
        for key, ask in list(self._asks.items()):
            if ask.group in heard.infeasible and not ask.held:
                self._leave(key, now)
                self._next_way(ask, heard)
        for need in {ask.need for ask in self._asks.values()}:
            asks = [ask for ask in self._asks.values() if ask.need == need]
            strays = {node for ask in asks for node in self._strays(ask, heard)}
            if len(strays) > len(asks):  # each ask started one node; one more shows that it would never end
                came = counted(len(strays), "node")
                self._refuse(need, f"{came} joined without the labels that it asks for", now)

    def _next_way(self, ask: _Ask, heard: Heard) -> None:
        """What no node type can hold is asked for in another way, or later."""
        largest = max((node.total.get("GPU", 0.0) for node in heard.nodes.values()), default=0.0)
        # A node that large may be on its way: then the maximum is reached, and smaller parts would take its place.
        for other in self._asks.values():
            if other.group not in heard.infeasible:
                sizes = [amount for bundle in other.way.bundles for name, amount in bundle if name == "GPU"]
                largest = max(largest, *sizes, 0.0)
        self._shapes.next_way(ask.need, ask.way, largest)

    def _strays(self, ask: _Ask, heard: Heard) -> set[str]:
        """Nodes that joined after it was asked for and are large enough, but lack the labels."""
        total = ask.way.total
        return {
            node_id
            for node_id, node in heard.nodes.items()
            if node_id not in ask.there
            and not ask.need.met_by(node.labels)
            and all(node.total.get(resource, 0.0) >= amount for resource, amount in total.items())
        }

    # -- new asks ----------------------------------------------------------------------------------

    def _ask(self, wanted: Mapping[str, Need | str], known: frozenset[str], now: float) -> None:
        """Asks for what is wanted and may be asked for, oldest first."""
        if self._heard is None or self._heard.problem:
            return
        there = known.union(self._heard.nodes, *(ask.held for ask in self._asks.values()))
        leaving = {one.renews for one in self._leaving}
        asked = {str(ask.need) for ask in self._asks.values()}
        waiting, fickle = set(self._shapes.setbacks()), self._fickle.waiting()
        for key, need in wanted.items():
            shape = str(need)
            if isinstance(need, str) or key in self._asks or key in fickle or shape in waiting:
                continue
            if key in leaving:
                continue
            if key in self._arrivals and self._arrivals[key].need == need:
                continue
            if shape in asked and self._shapes.failed(shape):
                continue  # one ask shows whether it works now
            if len(self._asks) >= self._max_open:
                return
            way = self._shapes.way(need)
            try:
                group = self._cluster.create(self._prefix + secrets.token_hex(6), way, _beyond(need, there))
            except Exception as error:  # an error of one ask must not stop the others
                self._shapes.fail(need, f"it could not be asked for: {error}")
                waiting.add(shape)
                continue
            self._asks[key] = _Ask(need, way, group, now, there)
            asked.add(shape)

    def _tell(self, key: str, need: Need | str) -> Asked:
        """The state of one need."""
        if isinstance(need, str):
            return Asked(State.NOT_ASKED, need)
        if ask := self._asks.get(key):
            if ask.held:
                return Asked(State.ASKED, "a node has joined for it", tuple(ask.held), ask.since)
            refused = self._heard.refused if self._heard else ()
            reason = f"asked for {need}"
            if refused:
                reason += f"; the cloud refuses node type {', '.join(refused)}"
            return Asked(State.ASKED, reason, (), ask.since)
        if arrival := self._arrivals.get(key):
            return Asked(State.ARRIVED, "a node has joined for it", tuple(arrival.held), arrival.at)
        asked = self.outlook(need)
        if asked.state is not State.ASKED:
            return asked
        if any(one.renews == key for one in self._leaving):
            return asked
        if key in self._fickle.waiting():
            wait, until = self._fickle[key]
            return Asked(State.NOT_ASKED, "it was withdrawn a moment ago", (), until - wait, until)
        if len(self._asks) >= self._max_open:
            return Asked(State.NOT_ASKED, f"{counted(self._max_open, 'other')} are asked for first")
        return Asked(State.NOT_ASKED, "one like it is asked for first, since the last one failed")


def _beyond(need: Need, there: frozenset[str]) -> dict[str, str]:
    """The conditions of a need, and the exclusion of all existing nodes."""
    labels = dict(need.labels)
    but = there | (parse_condition(labels[NODE_ID_LABEL])[1] if NODE_ID_LABEL in labels else frozenset())
    if but:
        labels[NODE_ID_LABEL] = f"!in({', '.join(sorted(but))})"
    return labels
