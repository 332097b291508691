"""What the nodes' actors reported of their GPUs: asked once, kept in the ledger, asked again if nothing was known."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from placement.runtime import ledger
from placement.runtime.agents import Agents
from placement.runtime.backoff import Backoff
from placement.runtime.discovery import NodeInfo
from placement.runtime.measurements import Measurements, identity_on, make_of
from placement.runtime.orders import GpuHardware, hardware_of
from placement.wire.facts import NodeFacts
from placement.wire.machine import Machine
from placement.wire.measurements import Measurement

DEADLINE_SECONDS = 45.0
"""A first NVML reading takes 30 s on an 8-GPU machine without persistence mode (Azure/aks-gpu#105)."""
ASK_AGAIN_SECONDS = 30.0
"""When a node without an answer is asked again; twice as long each time it still has none."""
MOST_SECONDS = 3600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """A question under way, and until when it is worth waiting for the answer."""

    call: Any
    until: float


class Inventory:
    """What is known of each node. Thread-safe.

    A call only handles open questions: nodes that answered are not checked again as long as the list of nodes is the
    same.

    Args:
        agents: the actors to ask.
        facts: node id -> its last report; filled in here.
    """

    def __init__(self, agents: Agents, facts: dict[str, NodeFacts]) -> None:
        self.facts = facts
        self.measurements = Measurements()
        self._agents = agents
        self._lock = threading.Lock()
        self._hardware: dict[str, GpuHardware] = {}
        self._asked: dict[str, _Asked] = {}
        self._silent = Backoff(ASK_AGAIN_SECONDS, MOST_SECONDS)
        self._saved: dict[str, GpuHardware] = {}
        self._changed: set[str] = set()
        self._nodes: Sequence[NodeInfo] | None = None
        self._open: dict[str, NodeInfo] = {}

    def hardware(self, info: NodeInfo) -> GpuHardware:
        """What is known of a node's GPUs. The same object until it reports something else."""
        known = self._hardware.get(info.id)
        if known is None:
            with self._lock:
                found = hardware_of(self.facts.get(info.id), info.gpu_count)
                known = self._hardware[info.id] = self.measurements.applied(info.name, found)
        return known

    def record_measurement(self, measurement: Measurement) -> None:
        """Keeps measured rates of a host; :meth:`hardware` of all nodes of its make includes them from now on."""
        self.measurements.record(measurement)
        self._rated_anew({measurement.machine})

    def forget_measurements(self, node: str | None, nodes: Iterable[NodeInfo]) -> list[Measurement]:
        """Forgets the measured rates of a node, or of all, and returns them.

        Args:
            node: id, name or address of a node, or the name of a host that is no node now; ``None`` for all hosts.
            nodes: the nodes that are alive.
        """
        if node is None:
            found = self.measurements.forget([one.host for one in self.measurements.all()], ())
        else:
            here = [info for info in nodes if info.named(node)]
            identities = [identity_on(info.name, self.hardware(info)) for info in here if info.gpu_count]
            found = self.measurements.forget({node, *(info.name for info in here)}, identities)
        self._rated_anew({one.machine for one in found})
        return found

    def _rated_anew(self, makes: Collection[Machine]) -> None:
        """Updates :meth:`hardware` of all nodes of these makes with the current rates."""
        with self._lock:
            concerned = {
                node_id for node_id, known in self._hardware.items() if make_of(known.topology) in makes
            }
            for node_id in concerned:
                del self._hardware[node_id]
            self._changed |= concerned

    def pop_changed(self) -> frozenset[str]:
        """The nodes whose :meth:`hardware` has changed since the last call of this."""
        with self._lock:
            changed, self._changed = frozenset(self._changed), set()
            return changed

    def unknown_nodes(self, nodes: Sequence[NodeInfo]) -> frozenset[str]:
        """GPU nodes that have not reported their GPUs yet, and are still worth waiting for."""
        now = time.monotonic()
        with self._lock:
            return frozenset(node_id for node_id in self._open_of(nodes) if self._is_awaited(node_id, now))

    def is_asked(self, node_id: str) -> bool:
        """Whether a node's answer is waited for; its actor may not even have started."""
        with self._lock:
            asked = self._asked.get(node_id)
            return asked is not None and time.monotonic() < asked.until

    def refresh(
        self,
        nodes: Sequence[NodeInfo],
        again: bool = False,
        max_age_seconds: float | None = None,
        patience_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        """Makes sure that every GPU node was asked for its GPUs, all at the same time.

        Waits for the :meth:`unknown_nodes`, or for all that are asked ``again``; for a hanging node only once.

        Args:
            nodes: the nodes that are alive. Do not change the list afterwards.
            again: also ask nodes that have answered.
            max_age_seconds: how old the reading in an answer may be; any by default.
            patience_seconds: the longest wait.
        """
        now = time.monotonic()
        with self._lock:
            candidates = self._open_of(nodes)
            if again:
                candidates = {info.id: info for info in nodes if _can_say(info)}
            waiting = self._silent.waiting() if candidates else frozenset()
            due = [info for info in candidates.values() if again or self._is_due(info.id, waiting)]
        asked = {info.id: self._ask(info, again, max_age_seconds, now) for info in due}
        with self._lock:
            awaited = {
                one.call: one.until - now
                for node_id, one in asked.items()
                if again or self._is_awaited(node_id, now)
            }
        if not asked:
            return
        awaited = {call: min(patience_seconds, left) for call, left in awaited.items() if left > 0}
        with self._agents.working(asked):
            if awaited:
                ray.wait([*awaited], num_returns=len(awaited), timeout=max(awaited.values()))
            done, _ = ray.wait([one.call for one in asked.values()], num_returns=len(asked), timeout=0)
        answered = set(done)
        for node_id, one in asked.items():
            self._record(node_id, one, one.call in answered)

    def _open_of(self, nodes: Sequence[NodeInfo]) -> dict[str, NodeInfo]:
        """The nodes that can report their GPUs and have not, or are asked again."""
        if nodes is not self._nodes:
            self._nodes = nodes
            self._open = {info.id: info for info in nodes if not self._is_known(info.id) and _can_say(info)}
        return self._open

    def _is_known(self, node_id: str) -> bool:
        """Whether a node has reported its GPUs, and is not asked again."""
        facts = self.facts.get(node_id)
        is_open = node_id in self._asked or node_id in self._silent
        return facts is not None and facts.source != "none" and not is_open

    def _is_awaited(self, node_id: str, now: float) -> bool:
        says_nothing = node_id not in self.facts or self.facts[node_id].source == "none"
        open_since = self._asked.get(node_id)
        return says_nothing and node_id not in self._silent and (open_since is None or now < open_since.until)

    def _is_due(self, node_id: str, waiting: frozenset[str]) -> bool:
        if node_id not in self.facts or node_id in self._asked:
            return True
        return node_id in self._silent and node_id not in waiting

    def _ask(self, info: NodeInfo, again: bool, max_age_seconds: float | None, now: float) -> _Asked:
        """Asks, unless an equal question is open, or has been open for too long."""
        with self._lock:
            before = self._asked.get(info.id)
        if before is not None and not (again and now < before.until):
            return before
        # Not under the lock: creating the actor may take long, and needs to know what is held there.
        call = self._agents.agent(info).facts.remote(max_age_seconds)
        asked = _Asked(call, now + DEADLINE_SECONDS if before is None else before.until)
        with self._lock:
            self._asked[info.id] = asked
            if info.id not in self._open:
                self._nodes = None  # a question to a known node is open again
        return asked

    def _record(self, node_id: str, asked: _Asked, done: bool) -> None:
        problem = "the node actor does not answer"
        facts = NodeFacts(source="none", problem=problem)
        if done:
            try:
                facts = ray.get(asked.call, timeout=0)
            except ray.exceptions.RayError as error:
                self._agents.failed(node_id, error)
                facts = NodeFacts(source="none", problem=f"{problem}: {type(error).__name__}")
        says_nothing = facts.source == "none"
        with self._lock:
            if done and self._asked.get(node_id) is asked:
                del self._asked[node_id]
            if done and says_nothing:
                self._silent.fail(node_id)
            elif done:
                self._silent.pop(node_id, None)
            known = self.facts.get(node_id)
            # Old knowledge is better than an empty report.
            if known is None or not says_nothing or (done and known.source == "none"):
                self.facts[node_id] = facts
                self._hardware.pop(node_id, None)
                self._changed.add(node_id)
            if self._is_known(node_id):
                self._open.pop(node_id, None)
        if not says_nothing:
            self._save(node_id, facts)

    def _save(self, node_id: str, facts: NodeFacts) -> None:
        """Writes a node's GPUs to the ledger if they changed; current memory use does not count as a change."""
        lasting = replace(hardware_of(facts, 0), free_memory={})
        known = self._saved.get(node_id)
        if known == lasting:
            return
        try:
            ledger.save_facts(node_id, facts)
            self._saved[node_id] = lasting
            if lost := lasting.lost - (known.lost if known else frozenset()):
                logger.warning(
                    "GPUs %s of node %s are lost; nothing is placed on them", sorted(lost), node_id
                )
        except Exception:  # it is only there to spare a later service the question
            logger.exception("what the GPUs of node %s are could not be saved", node_id)

    def restore(self, alive: Collection[str]) -> None:
        """Takes over what an earlier service knew, and forgets nodes that no longer exist."""
        self.measurements.restore()
        for node_id, facts in ledger.facts().items():
            if node_id not in alive:
                ledger.forget_facts(node_id)
            elif facts is not None:
                with self._lock:
                    self.facts[node_id] = facts
                    self._hardware.pop(node_id, None)
                    self._changed.add(node_id)
                    self._nodes = None

    def forget_all_but(self, alive: Collection[str]) -> None:
        """Forgets nodes that no longer exist."""
        with self._lock:
            gone = self.facts.keys() - set(alive)
            for node_id in gone:
                del self.facts[node_id]
                for known in (self._hardware, self._asked, self._silent, self._saved):
                    known.pop(node_id, None)
            self._changed |= gone
            self._nodes = None
        for node_id in gone:
            ledger.forget_facts(node_id)


def _can_say(info: NodeInfo) -> bool:
    """Whether a node has GPUs that its actor can report."""
    return info.gpu_count > 0 and info.label_problem() is None
