"""The GPU nodes' actors: found or created, given one reservation at a time, and ended if they are not needed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import ray

from placement.runtime import groups
from placement.runtime.backoff import Backoff
from placement.runtime.discovery import NodeInfo
from placement.runtime.node_agent import living_agents
from placement.runtime.orders import Holding, Refused
from placement.wire.facts import NodeFacts

DEADLINE_SECONDS = 60.0
"""How long actors may take for one step, all together; after that one that hangs is ignored."""
SUSPECT_SECONDS = 2.0
"""An actor that has answered before takes 20 to 200 ms. After this time other nodes are preferred."""
COLD_SECONDS = 10.0
"""The same for a new actor: its process, and that of its first probe, start within 3 to 5 s."""
UNREACHABLE_SECONDS = 10.0
"""An actor that has answered before, and shows no sign of life for this long, is not waited for any longer."""
POLL_SECONDS = 0.25
"""How often a thread that waits for an actor, or for a node's turn, checks whether to give up."""
HOLDS_SECONDS = 2.0
"""How long the holds of an actor stay after its death, at most; 0.3 to 1.5 s were measured."""
RESTORE_DEADLINE_SECONDS = 20.0
"""A reservation that was under way when the service died ends within its node actor's bounded attempts."""

HUNG_SECONDS = 1.0
"""How long an actor may take that is still at a call for which it was too late."""
AILING_SECONDS, MOST_AILING_SECONDS = 10.0, 3600.0
"""How long other nodes are preferred to one on which an actor failed: the first and the longest time."""

logger = logging.getLogger(__name__)


class Unanswered(Exception):
    """A node's turn does not come: another reservation has it and waits for an actor that does not answer.

    Args:
        node_id: the node.
        problem: why, as a part of a refusal's sentence.
    """

    def __init__(self, node_id: str, problem: str) -> None:
        super().__init__(node_id, problem)
        self.node_id, self.problem = node_id, problem

    def __str__(self) -> str:
        return self.problem


class _Hung(NamedTuple):
    """An actor that was too late: it answers ``call`` once its current work is over.

    It has been waited for ``since`` that time; ``sign`` is its last sign of life.
    """

    call: Any
    since: float
    sign: float


class Agents:
    """All node actors. Thread-safe.

    Args:
        make_agent: creates or finds the actor of a node.
        holdings: node id -> order name -> what is held there.
        facts: node id -> what is known of its GPUs, for a new actor.
    """

    def __init__(
        self,
        make_agent: Callable[[NodeInfo], Any],
        holdings: Callable[[str], dict[str, Holding]],
        facts: Callable[[str], NodeFacts | None],
    ) -> None:
        self._make_agent, self._holdings, self._facts = make_agent, holdings, facts
        self._lock = threading.Lock()
        self._agents: dict[str, Any] = {}
        self._turns: dict[str, threading.Lock] = {}
        self._busy: Counter[str] = Counter()
        self._used: dict[str, float] = {}
        self._late: list[Any] = []
        self._hung: dict[str, _Hung] = {}
        self._awaited: dict[str, list[float]] = {}
        self._answered: set[str] = set()
        self._ailing = Backoff(AILING_SECONDS, MOST_AILING_SECONDS)
        self._orphans_suspected = False
        self._died: dict[str, float] = {}

    def agent(self, info: NodeInfo) -> Any:
        """The actor of a node, created if there is none."""
        with self._lock:
            self._used[info.id] = time.monotonic()
            if info.id in self._agents:
                return self._agents[info.id]
        # Not under the lock, as Ray may take long; two callers get the same actor.
        made = self._make_agent(info)
        with self._lock:
            if info.id not in self._agents:
                self._agents[info.id] = made
                self._answered.discard(info.id)
                self._adopt(info.id)
            return self._agents[info.id]

    def known(self) -> dict[str, Any]:
        """Node id -> its actor, for those created or found so far."""
        with self._lock:
            return dict(self._agents)

    def forget(self, order: str, node_ids: Collection[str]) -> None:
        """Tells the actors of these nodes that an order is gone, which others removed."""
        for node_id, agent in self.known().items():
            if node_id in node_ids:
                agent.forget.remote(order)

    def _adopt(self, node_id: str) -> Any:
        return self._agents[node_id].adopt.remote(self._holdings(node_id), self._facts(node_id))

    @contextlib.contextmanager
    def sole(self, node_ids: Iterable[str]) -> Iterator[Callable[[str], None]]:
        """One reservation at a time on each of these nodes. Always taken in the same order: no deadlock.

        Yields:
            A function that gives one node's turn up before the others'.

        Raises:
            Unanswered: a node's turn is taken by a reservation that waits for a hanging actor, or an actor is known to
                hang.
        """
        chosen = sorted(set(node_ids))
        began = time.monotonic()
        taken: dict[str, threading.Lock] = {}

        def leave(node_id: str) -> None:
            if (turn := taken.pop(node_id, None)) is not None:
                turn.release()

        with self.working(chosen):
            try:
                while len(taken) < len(chosen):
                    while self._is_kept_from(chosen, began):  # no turn is held meanwhile
                        time.sleep(POLL_SECONDS)
                    for node_id in chosen:
                        with self._lock:
                            turn = self._turns.setdefault(node_id, threading.Lock())
                        while not turn.acquire(timeout=POLL_SECONDS):
                            self._is_kept_from([node_id], began)
                        taken[node_id] = turn
                    if self._is_kept_from(chosen, began):  # the holder of the turn has given up
                        for node_id in chosen:
                            leave(node_id)
                yield leave
            finally:
                for node_id in list(taken):
                    leave(node_id)

    def _is_kept_from(self, node_ids: Iterable[str], began: float) -> bool:
        """Checks that no actor of these nodes is known not to answer.

        Raises:
            Unanswered: one does not, and the wait since ``began`` was long enough.
        """
        waited = time.monotonic() - began
        with self._lock:
            silent = self._silent()
            given_up = self._unreachable()
        for node_id in node_ids:
            if node_id in silent and (waited > SUSPECT_SECONDS or node_id in given_up):
                problem = f"its node actor has not answered for {silent[node_id]:.0f} s"
                raise Unanswered(node_id, problem)
            if waited > DEADLINE_SECONDS:
                raise Unanswered(node_id, f"other reservations there have taken {waited:.0f} s")
        return any(node_id in silent for node_id in node_ids)

    def _silent(self) -> dict[str, float]:
        """Node id -> seconds that its actor has not answered, if that is longer than normal. Under the lock."""
        now = time.monotonic()
        found = {}
        for node_id, since in self._awaited.items():
            normal = SUSPECT_SECONDS if node_id in self._answered else COLD_SECONDS
            if since and now - min(since) > normal:
                found[node_id] = now - min(since)
        if self._hung:
            done, _ = ray.wait(
                [one.call for one in self._hung.values()], num_returns=len(self._hung), timeout=0
            )
            self._hung = {node: one for node, one in self._hung.items() if one.call not in done}
        return found | {node_id: now - one.since for node_id, one in self._hung.items()}

    @contextlib.contextmanager
    def working(self, node_ids: Iterable[str]) -> Iterator[None]:
        """A block in which the actors of these nodes are in use and not ended."""
        chosen = set(node_ids)
        with self._lock:
            self._busy.update(chosen)
        try:
            yield
        finally:
            with self._lock:
                self._busy.subtract(chosen)
                self._used |= dict.fromkeys(chosen, time.monotonic())

    def answer(self, node_id: str, call: Any) -> Any:
        """The answer of an actor; :class:`~placement.runtime.orders.Refused` if it fails or is too late."""
        return self.answers({node_id: call})[node_id]

    def answers(
        self,
        calls: Mapping[str, Any],
        deadline: float | None = None,
        answered: Callable[[str], None] = lambda node_id: None,
    ) -> dict[str, Any]:
        """The answers of several actors, waited for at the same time.

        Args:
            calls: node id -> the call of its actor.
            deadline: when all of them are too late, on the monotonic clock; in a minute by default. One that hung
                before, or shows no sign of life, is given less time.
            answered: called for each node when it has answered, or is no longer waited for.

        Returns:
            Node id -> the answer; :class:`~placement.runtime.orders.Refused` if it fails or is too late.
        """
        began = time.monotonic()
        end = began + DEADLINE_SECONDS if deadline is None else deadline
        said: dict[str, Any] = {}
        left = dict(calls)
        signs: dict[str, Any] | None = None
        works: set[str] = set()
        with self._lock:
            silent = self._silent()
            for node_id in calls:
                self._awaited.setdefault(node_id, []).append(began)
        ends = {node_id: min(end, began + HUNG_SECONDS) if node_id in silent else end for node_id in calls}
        try:
            while left:
                soonest = min(ends[node_id] for node_id in left) - time.monotonic()
                patience = max(0.0, min(soonest, POLL_SECONDS))
                done, _ = ray.wait([*left.values()], num_returns=len(left), timeout=patience)
                ready, now = set(done), time.monotonic()
                for node_id, call in list(left.items()):
                    if call in ready or now >= ends[node_id]:
                        sign = now if node_id in works else began
                        said[node_id] = self._said(node_id, call, call in ready, began, sign)
                        del left[node_id]
                        answered(node_id)
                if left and signs is None and now - began > SUSPECT_SECONDS:
                    signs = self._signs_of_life(left)
                if left and signs and now - began > UNREACHABLE_SECONDS:
                    alive, _ = ray.wait([*signs.values()], num_returns=len(signs), timeout=0)
                    works = {node_id for node_id, sign in signs.items() if sign in alive}
                    ends |= dict.fromkeys(signs.keys() - works, now)
                    signs = {}
        finally:
            with self._lock:
                for node_id in calls:
                    self._awaited[node_id].remove(began)
                    if not self._awaited[node_id]:
                        del self._awaited[node_id]
        return said

    def _signs_of_life(self, node_ids: Iterable[str]) -> dict[str, Any]:
        """Asks the actors of these nodes, except new ones, for a sign of life, which they give beside their work."""
        with self._lock:
            known = {node_id: self._agents.get(node_id) for node_id in node_ids if node_id in self._answered}
        return {node_id: agent.facts.remote() for node_id, agent in known.items() if agent is not None}

    def _said(self, node_id: str, call: Any, done: bool, began: float, sign: float) -> Any:
        """One answer, or why there is none; ``sign`` is the time of the actor's last sign of life."""
        try:
            if not done:
                raise ray.exceptions.GetTimeoutError
            said = ray.get(call, timeout=HUNG_SECONDS)
        except ray.exceptions.RayError as error:
            lives = self.failed(node_id, error, began, sign)
            if not done:
                reason = f"its node actor has not answered for {time.monotonic() - began:.0f} s"
                return Refused(reason, 1, full=True, at_most=0)
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
            what = type(error).__name__ if cause is None else f"{type(cause).__name__}: {cause}"
            return Refused(f"its node actor failed: {what}", 1, full=lives, at_most=0 if lives else None)
        with self._lock:
            self._answered.add(node_id)
            self._hung.pop(node_id, None)
            self._ailing.pop(node_id, None)
        return said

    def failed(
        self, node_id: str, error: Exception, since: float | None = None, sign: float | None = None
    ) -> bool:
        """Records a call that failed. Groups that it may leave behind are removed later (:meth:`orphans_suspected`).

        Args:
            node_id: of the actor.
            error: the error of the call.
            since: when it was made, on the monotonic clock.
            sign: when the actor last showed a sign of life; when the call was made, if not given.

        Returns:
            Whether the actor may be alive and still working on it.
        """
        logger.error("the node actor of %s failed: %s", node_id, str(error) or type(error).__name__)
        raised = isinstance(error, ray.exceptions.RayTaskError)  # any exception of the actor's code
        lives = not raised and isinstance(
            error, (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError)
        )
        with self._lock:
            self._ailing.fail(node_id)
            if not lives:
                agent = self._agents.pop(node_id, None)
                self._answered.discard(node_id)
                if raised and agent is not None:
                    ray.kill(agent)  # it may not have cleaned up: its holds end with it
                self._died[node_id] = time.monotonic()
                self._orphans_suspected = True
            elif node_id in self._agents:
                # It does one thing after the other: once it answers this, the earlier work is over.
                told = self._adopt(node_id)
                since = time.monotonic() if since is None else since
                self._hung[node_id] = _Hung(told, since, since if sign is None else sign)
                self._late.append(told)
        return lives

    def suspect(self) -> frozenset[str]:
        """Nodes to avoid if possible: their actors have not answered for longer than normal.

        Also, for a while, nodes on which an actor failed; longer if it fails repeatedly.
        """
        with self._lock:
            return self._ailing.waiting() | self._silent().keys()

    def silent(self) -> frozenset[str]:
        """Nodes whose actors have not answered for longer than normal, and are still waited for."""
        with self._lock:
            return frozenset(self._silent())

    def _unreachable(self) -> dict[str, float]:
        now = time.monotonic()
        return {
            node_id: now - one.sign
            for node_id, one in self._hung.items()
            if now - one.sign >= UNREACHABLE_SECONDS
        }

    def are_cold(self, node_ids: Iterable[str]) -> bool:
        """Whether the actor of one of these nodes has never answered yet, or no longer answers."""
        with self._lock:
            silent = self._silent()
            return any(node_id in silent or node_id not in self._answered for node_id in node_ids)

    def suspect_orphans(self, calls: Iterable[Any] = (), now: bool = True) -> None:
        """Records that unknown groups may be left over: now, and once these calls have ended."""
        with self._lock:
            self._orphans_suspected |= now
            self._late += calls

    def orphans_suspected(self) -> bool:
        """Whether unknown groups may have been left over since the last call."""
        with self._lock:
            if self._late:
                done, self._late = ray.wait(self._late, num_returns=len(self._late), timeout=0)
                self._orphans_suspected |= bool(done)
            suspected, self._orphans_suspected = self._orphans_suspected, False
            return suspected

    def rediscover(self, nodes: Sequence[NodeInfo]) -> list[Any]:
        """Finds living actors that are not known here: those of an earlier service, or given up as lost.

        Returns:
            Calls that are answered once these actors have finished their work and know what is held on their nodes.
        """
        return list(self._rediscover(nodes).values())

    def _rediscover(self, nodes: Sequence[NodeInfo]) -> dict[str, Any]:
        unknown = living_agents() - self.known().keys()
        # What they had prepared was for a group that will not be created.
        return {info.id: self.agent(info).cancel.remote() for info in nodes if info.id in unknown}

    def restore(self, nodes: Sequence[NodeInfo]) -> None:
        """Takes over the actors of an earlier service, and waits until they have finished their work."""
        with self._lock:  # some may have died with the earlier service
            self._died |= dict.fromkeys((info.id for info in nodes if info.gpu_count), time.monotonic())
        told = self._rediscover(nodes)
        if told:
            began = time.monotonic()
            _, late = ray.wait([*told.values()], num_returns=len(told), timeout=RESTORE_DEADLINE_SECONDS)
            self.suspect_orphans(late, now=False)
            with self._lock:
                self._hung |= {
                    node_id: _Hung(call, began, began) for node_id, call in told.items() if call in late
                }
                self._answered |= {node_id for node_id, call in told.items() if call not in late}

    def reap(self) -> list[str]:
        """Waits until the holds of dead actors are gone: Ray ends them within two seconds.

        Returns:
            The nodes that had such an actor.
        """
        with self._lock:
            died = dict(self._died)
        while nodes := {node for node, at in died.items() if time.monotonic() - at < HOLDS_SECONDS}:
            held = groups.live_groups(lambda name: name.startswith(groups.HOLD))
            if not any(nodes & hold.nodes for hold in held.values()):
                break
            time.sleep(0.25)
        with self._lock:
            self._died = {node: at for node, at in self._died.items() if died.get(node) != at}
        return list(died)

    def idle(self, seconds: float) -> list[str]:
        """Nodes whose actor has been idle for this long."""
        with self._lock:
            return [node_id for node_id in self._agents if self._is_idle(node_id, seconds)]

    def stop_idle(self, node_id: str, seconds: float) -> None:
        """Ends a node's actor, unless it is in use again.

        Ray's autoscaler counts a node with an actor as busy, and keeps it.
        """
        with self._lock:
            if node_id in self._agents and self._is_idle(node_id, seconds):
                ray.kill(self._agents.pop(node_id))

    def _is_idle(self, node_id: str, seconds: float) -> bool:
        return self._busy[node_id] <= 0 and time.monotonic() - self._used[node_id] > seconds

    def forget_all_but(self, alive: Collection[str]) -> None:
        """Forgets nodes that no longer exist."""
        with self._lock:
            everything: tuple[MutableMapping[str, Any], ...] = (
                self._agents, self._turns, self._busy, self._used, self._hung, self._ailing, self._died,
            )  # fmt: skip
            self._answered &= set(alive) | {node_id for node_id, users in self._busy.items() if users > 0}
            # A node in use may have joined since the list was read.
            for node_id in {node for known in everything for node in known} - set(alive):
                if self._busy[node_id] <= 0:
                    for known in everything:
                        known.pop(node_id, None)

    def stop(self) -> None:
        """Ends all of them. Placement groups stay."""
        with self._lock:
            for agent in self._agents.values():
                ray.kill(agent)
            self._agents.clear()
