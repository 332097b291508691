"""The cluster as last seen, for plans: nodes, Ray's records, and what the service knows better."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from placement.core.limits import eligible
from placement.core.needs import Needs
from placement.core.node import UNKNOWN_PROFILE, Node
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.errors import UnknownGpu, UnknownNode, Unplaceable
from placement.runtime import groups
from placement.runtime.discovery import DeadNode, NodeInfo, NodeView
from placement.runtime.fleet import MOST_LAG_SECONDS, VIEW_LAG_SECONDS, Fleet
from placement.runtime.state import ServiceState
from placement.runtime.view import ClusterView, overlaid
from placement.wire.held import HeldDeployment

T = TypeVar("T")

BOOKS_SECONDS = 0.05
"""How old Ray's records may be for a plan; they lag by 0.1 s anyway, and a wrong plan is
refused by the node and made again. If reading them takes long, as on many nodes, they may be older."""
READING_SECONDS = 0.005
"""The records may be :data:`BOOKS_SECONDS` older for each time that reading them takes this long: at most a tenth of
the time is spent on reading them."""


LOCATED_SECONDS = 30.0
"""How long a look at which GPUs of a node others hold is used while their number stays the same. They may have changed
GPUs, but a look takes all free GPUs there for a moment."""


@dataclass(frozen=True)
class _Books:
    """One reading of what is free in Ray's records.

    Attributes:
        available: node id -> resource -> amount.
        at: when the reading began, on the monotonic clock.
        seconds: how long it took.
    """

    available: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    at: float = float("-inf")
    seconds: float = 0.0


class ObservedCluster:
    """The source of snapshots for plans.

    Args:
        state: what this service holds and claims; plans are made under its lock.
        fleet: the GPU nodes.
        near: labels that have the same value on nodes near each other, widest first.

    Attributes:
        draining: ids of the nodes that are draining.
    """

    def __init__(self, state: ServiceState, fleet: Fleet, near: Sequence[str]) -> None:
        self._state, self._fleet = state, fleet
        self._nodes = NodeView()
        self.draining: frozenset[str] = frozenset()
        self._reading = threading.Lock()
        self._books = _Books()
        self._noted = self._books
        self._view = ClusterView(
            near,
            hardware=fleet.inventory.hardware,
            tally=state.tally,
            foreign=lambda node_id: fleet.foreign.get(node_id, frozenset()),
            lagging=lambda seconds: fleet.lagging(seconds, self._noted.at),
        )

    def touch(self, nodes: Iterable[str]) -> None:
        """Records that what is held, claimed or known on some nodes has changed. Under the lock."""
        self._view.touch(nodes)

    def nodes(self) -> list[NodeInfo]:
        """The nodes that are alive now."""
        return self._nodes.now()

    def dead(self) -> list[DeadNode]:
        """The nodes that died in the last minutes."""
        return self._nodes.dead()

    def nodes_lately(self) -> list[NodeInfo]:
        """The nodes that were alive less than a second ago."""
        return self._nodes.lately()

    def read(self, fresh: bool = True) -> None:
        """Reads Ray's records for the next snapshot. Not under the lock, as it may take long and others plan meanwhile.

        Args:
            fresh: read them again, however recently that was done.
        """
        asked = time.monotonic()
        with self._reading:
            known = self._books
            may_be = BOOKS_SECONDS * (1 + known.seconds / READING_SECONDS)
            if known.at >= asked or (not fresh and asked - known.at <= may_be):
                return
            began = time.monotonic()
            available = groups.available_resources()
            self._books = _Books(available, began, time.monotonic() - began)

    def snapshot(
        self,
        nodes: list[NodeInfo],
        lag_seconds: float = VIEW_LAG_SECONDS,
        believed: Collection[str] = (),
        full: Mapping[str, int] | None = None,
        avoided: Collection[str] = (),
    ) -> Snapshot:
        """The cluster as the planner sees it, with Ray's records from the last :meth:`read`. Under the lock.

        Args:
            nodes: the nodes that are alive.
            lag_seconds: records that were read less than this time after a change of the service are not used,
            believed: except for these nodes.
            full: node id -> most whole GPUs or instances that may be planned there.
            avoided: nodes to exclude.
        """
        if self._books is not self._noted:
            self._noted = self._books
            self._view.update_available(self._noted.available)
        self._view.update_nodes(nodes, self.draining)
        self._view.touch(self._fleet.inventory.pop_changed())
        return overlaid(self._view.snapshot(lag_seconds, believed), full or {}, avoided)

    def locate(self, snapshot: Snapshot, requests: Iterable[Request]) -> bool:
        """Looks at nodes on which named GPUs count as other Ray users'; not under the lock.

        Ray's records say how many GPUs others hold, but not which; only requests that name GPUs need to know that.

        Returns:
            Whether any node was looked at, so that a new snapshot may differ.
        """
        wanted: set[str] = set()
        for request in requests:
            if request.needs.named and request.provider is None:
                allowed = eligible(snapshot, request)
                unclear = (node for node in snapshot.nodes if _counts_as_others(node, request.needs))
                wanted |= {node.id for node in unclear if snapshot.bit(node.id) & allowed}
        wanted = {node_id for node_id in wanted if not self._is_located(snapshot.node(node_id))}
        wanted -= self._fleet.agents.suspect()
        if not wanted:
            return False
        self._fleet.locate([info for info in self.nodes_lately() if info.id in wanted])
        with self._state.lock:
            self.touch(wanted)
        return True

    def _is_located(self, node: Node) -> bool:
        """Whether the last look at a node can be used: others hold as many GPUs as then."""
        since = time.monotonic() - self._fleet.located.get(node.id, float("-inf"))
        foreign = self._fleet.foreign.get(node.id, frozenset())
        usable = [gpu for gpu in foreign if node.slots.get(gpu) != UNKNOWN_PROFILE]
        return since < LOCATED_SECONDS and len(node.held - node.holders.keys()) == len(usable)

    def look(self, requests: Iterable[Request] = ()) -> tuple[Snapshot, dict[str, HeldDeployment]]:
        """The cluster as it is now, with all deployments; waits for nodes that have not reported their GPUs yet.

        Args:
            requests: the requests to plan with it; see :meth:`locate`.
        """
        nodes = self.nodes()
        self._fleet.inventory.refresh(nodes)
        self.read()
        with self._state.lock:
            snapshot, held = self.snapshot(nodes), self._state.held()
        if not self.locate(snapshot, requests):
            return snapshot, held
        with self._state.lock:
            return self.snapshot(nodes), self._state.held()

    def patiently(
        self,
        decide: Callable[[list[NodeInfo], float, bool], T],
        fresh: bool = False,
        forget_removed: Callable[[], bool] = lambda: False,
    ) -> T:
        """Decides; before a refusal stands, looks again at all nodes, and at books that show our own last change.

        It decides three times at most, since other users' changes never end. The last time it uses what the service
        itself knows, since on an overloaded machine the records lag by more.

        Args:
            decide: called with the nodes that are alive, by how many seconds the records may lag, and whether they must
                be read again.
            fresh: begin with everything as it is now.
            forget_removed: forgets what owners have removed, which comes before any wait; whether there was anything.

        Raises:
            UnknownNode, UnknownGpu, Unplaceable: the last error of ``decide``.
        """
        nodes = self.nodes() if fresh else self.nodes_lately()
        is_fresh = fresh
        for looks_left in (1, 0):
            changed_at = self._fleet.changed_at
            try:
                return decide(nodes, VIEW_LAG_SECONDS, is_fresh)
            except (Unplaceable, UnknownNode, UnknownGpu) as error:
                refusal = error
                if looks_left and forget_removed():
                    nodes, is_fresh = self.nodes(), True
                    continue
                if not self._fleet.catch_up(changed_at) and is_fresh:
                    break
                if looks_left:
                    nodes, is_fresh = self.nodes(), True
        with contextlib.suppress(Unplaceable, UnknownNode, UnknownGpu):
            return decide(nodes, MOST_LAG_SECONDS, True)
        raise refusal


def _counts_as_others(node: Node, needs: Needs) -> bool:
    """Whether named GPUs are taken, but not by anything that this service placed."""
    mask = node.named_mask(needs)
    return any(mask >> gpu & 1 and gpu not in node.holders for gpu in node.held)
