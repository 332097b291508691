"""The GPU nodes' actors: found or made, given one reservation at a time, and ended where nothing is left to do."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import ray

from placement.runtime import groups
from placement.runtime.backoff import Backoff
from placement.runtime.discovery import NodeInfo
from placement.runtime.node_agent import living_agents
from placement.runtime.orders import Holding, Refused
from placement.wire.facts import NodeFacts

DEADLINE_SECONDS = 60.0
"""How long an actor may take for what it is asked; one that hangs is done without."""
HOLDS_SECONDS = 2.0
"""How long the holds of an actor stay after its death, at most; 0.3 to 1.5 s were measured."""
SETTLE_DEADLINE_SECONDS = 20.0
"""A reservation that was under way when the service died ends within its node actor's bounded attempts."""

HUNG_SECONDS = 1.0
"""How long one may take that has not even done yet what it was too late with before."""
AILING_SECONDS, MOST_AILING_SECONDS = 10.0, 3600.0
"""How long other nodes are preferred to one on which an actor failed: at first, and at most."""

logger = logging.getLogger(__name__)


class Agents:
    """All node actors. Thread-safe.

    Args:
        make_agent: creates (or finds) the actor of a node.
        holdings: node id -> order name -> what stands there.
        facts: node id -> what its GPUs are, as far as is known; for an actor that is new.
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
        self._hung: dict[str, Any] = {}
        self._ailing = Backoff(AILING_SECONDS, MOST_AILING_SECONDS)
        self._in_doubt = False
        self._died: dict[str, float] = {}

    def agent(self, info: NodeInfo) -> Any:
        """The actor of a node, made if there is none."""
        with self._lock:
            self._used[info.id] = time.monotonic()
            agent = self._agents.get(info.id)
            if agent is None:
                agent = self._agents[info.id] = self._make_agent(info)
                self._adopt(info.id)
            return agent

    def known(self) -> dict[str, Any]:
        """Node id -> its actor, of those that were made or found by now."""
        with self._lock:
            return dict(self._agents)

    def forget(self, order: str, node_ids: Collection[str]) -> None:
        """Tells the actors of these nodes of an order that is gone without their doing."""
        for node_id, agent in self.known().items():
            if node_id in node_ids:
                agent.forget.remote(order)

    def _adopt(self, node_id: str) -> Any:
        return self._agents[node_id].adopt.remote(self._holdings(node_id), self._facts(node_id))

    @contextlib.contextmanager
    def sole(self, node_ids: Iterable[str]) -> Iterator[None]:
        """One reservation at a time on each of these nodes. Always taken in the same order: no deadlock."""
        chosen = sorted(set(node_ids))
        with self.working(chosen), contextlib.ExitStack() as turns:
            for node_id in chosen:
                with self._lock:
                    turn = self._turns.setdefault(node_id, threading.Lock())
                turns.enter_context(turn)
            yield

    @contextlib.contextmanager
    def working(self, node_ids: Iterable[str]) -> Iterator[None]:
        """The actors of these nodes have something to do; they are not ended meanwhile."""
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
        """What an actor answers; :class:`~placement.runtime.orders.Refused`, if it fails or is too late."""
        with self._lock:
            before = self._hung.get(node_id)
        hangs = before is not None and not ray.wait([before], timeout=0)[0]
        try:
            said = ray.get(call, timeout=HUNG_SECONDS if hangs else DEADLINE_SECONDS)
            with self._lock:
                self._hung.pop(node_id, None)
                self._ailing.pop(node_id, None)
            return said
        except ray.exceptions.RayError as error:
            lives = self.failed(node_id, error)
            cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else None
            what = type(error).__name__ if cause is None else f"{type(cause).__name__}: {cause}"
            return Refused(f"its node actor failed: {what}", 1, full=lives, room=0 if lives else None)

    def failed(self, node_id: str, error: Exception) -> bool:
        """Takes note of a call that failed. What it did or may still do is looked after (:meth:`in_doubt`).

        Returns:
            Whether the actor may live on and still be at it.
        """
        logger.error("the node actor of %s failed: %s", node_id, error)
        lives = isinstance(error, (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError))
        with self._lock:
            self._ailing.fail(node_id)
            if not lives:
                agent = self._agents.pop(node_id, None)
                if isinstance(error, ray.exceptions.RayTaskError) and agent is not None:
                    ray.kill(agent)  # it may not have tidied up: what it held for a moment goes with it
                self._died[node_id] = time.monotonic()
                self._in_doubt = True
            elif node_id in self._agents:
                # It does one thing after the other: once it answers this, what it was at is over.
                self._hung[node_id] = self._adopt(node_id)
                self._late.append(self._hung[node_id])
        return lives

    def ailing(self) -> frozenset[str]:
        """Nodes on which an actor failed lately, longer if again and again: others are to be preferred."""
        with self._lock:
            return self._ailing.waiting()

    def doubt(self, calls: Iterable[Any] = (), now: bool = True) -> None:
        """Groups may be left over that nobody knows of: now, and once these calls have ended."""
        with self._lock:
            self._in_doubt |= now
            self._late += calls

    def in_doubt(self) -> bool:
        """Whether, since the last call, groups may have been left over that nobody knows of."""
        with self._lock:
            if self._late:
                done, self._late = ray.wait(self._late, num_returns=len(self._late), timeout=0)
                self._in_doubt |= bool(done)
            doubt, self._in_doubt = self._in_doubt, False
            return doubt

    def take_up(self, nodes: Sequence[NodeInfo]) -> list[Any]:
        """Finds the actors that live and are not known here: those of an earlier service, or given up as lost.

        Returns:
            Calls that are answered once these have ended what they were doing and know what stands on their nodes.
        """
        strange = living_agents() - self.known().keys()
        # What was prepared was so for a group that nobody will make.
        return [self.agent(info).cancel.remote() for info in nodes if info.id in strange]

    def settle(self, nodes: Sequence[NodeInfo]) -> None:
        """Takes up what an earlier service left, and waits until it has ended what it was doing."""
        with self._lock:  # some may have died with it
            self._died |= dict.fromkeys((info.id for info in nodes if info.gpu_count), time.monotonic())
        told = self.take_up(nodes)
        if told:
            _, late = ray.wait(told, num_returns=len(told), timeout=SETTLE_DEADLINE_SECONDS)
            self.doubt(late, now=False)

    def bury(self) -> list[str]:
        """Waits until the holds of actors that died are gone: Ray ends them, within two seconds.

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
        """Nodes of which the actor has had nothing to do for so long."""
        with self._lock:
            return [node_id for node_id in self._agents if self._is_idle(node_id, seconds)]

    def rest(self, node_id: str, seconds: float) -> None:
        """Ends a node's actor, unless it has something to do by now.

        To Ray's autoscaler a node with an actor on it is busy, and stays.
        """
        with self._lock:
            if node_id in self._agents and self._is_idle(node_id, seconds):
                ray.kill(self._agents.pop(node_id))

    def _is_idle(self, node_id: str, seconds: float) -> bool:
        return self._busy[node_id] <= 0 and time.monotonic() - self._used[node_id] > seconds

    def forget_all_but(self, alive: Collection[str]) -> None:
        """Forgets nodes that are no more."""
        with self._lock:
            everything: tuple[MutableMapping[str, Any], ...] = (
                self._agents, self._turns, self._busy, self._used, self._hung, self._ailing, self._died,
            )  # fmt: skip
            # One that has something to do may have joined since these were read.
            for node_id in {node for known in everything for node in known} - set(alive):
                if self._busy[node_id] <= 0:
                    for known in everything:
                        known.pop(node_id, None)

    def stop(self) -> None:
        """Ends all of them. Placement groups stay as they are."""
        with self._lock:
            for agent in self._agents.values():
                ray.kill(agent)
            self._agents.clear()
