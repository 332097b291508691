"""The planner's snapshot, kept up to date: a plan costs what has changed, not the number of nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from placement.core.node import Node
from placement.core.snapshot import Snapshot
from placement.runtime.claims import Tally
from placement.runtime.discovery import NodeInfo, node_state
from placement.runtime.fleet import VIEW_LAG_SECONDS
from placement.runtime.orders import GpuHardware

_Read = tuple[float | None, ...]
"""The free resources of a node that count here: GPUs, CPUs, memory, its egress resources, and custom ones."""


class ClusterView:
    """The nodes as the planner sees them. Not thread-safe: the caller holds a lock.

    Returned snapshots are immutable, and may be used without the lock.

    Args:
        near: labels that have the same value on nodes near each other, widest first.
        hardware: the hardware of a node's GPUs; the same object until they report something else.
        tally: node id -> what the service holds and claims there.
        foreign: node id -> GPUs that other Ray users held when the node's actor last looked.
        lagging: seconds -> nodes whose records in Ray may not yet show the service's last change, if they lag by that
            much; the service's own knowledge is newer.
    """

    def __init__(
        self,
        near: Sequence[str],
        hardware: Callable[[NodeInfo], GpuHardware],
        tally: Callable[[str], Tally],
        foreign: Callable[[str], frozenset[int]],
        lagging: Callable[[float], frozenset[str]],
    ) -> None:
        self._near = tuple(near)
        self._hardware, self._tally, self._foreign, self._lagging = hardware, tally, foreign, lagging
        self._nodes: Sequence[NodeInfo] = ()
        self._infos: dict[str, NodeInfo] = {}
        self._draining: frozenset[str] = frozenset()
        self._available: Mapping[str, Mapping[str, float]] = {}
        self._read: dict[str, _Read] = {}
        self._dirty: set[str] = set()
        self._shown_without: frozenset[str] = frozenset()
        self._states: dict[str, Node] = {}
        self._snapshot: Snapshot | None = None

    def update_nodes(self, nodes: Sequence[NodeInfo], draining: frozenset[str]) -> None:
        """Updates which nodes are alive, and which of them are draining.

        It is quick if ``nodes`` is the same object as last time; do not change that object afterwards.
        """
        self._dirty |= (draining ^ self._draining) & self._infos.keys()
        self._draining = draining
        if nodes is self._nodes:
            return
        self._nodes = nodes
        before, self._infos = self._infos, {info.id: info for info in nodes}
        for gone in before.keys() - self._infos.keys():
            self._states.pop(gone, None)
            self._read.pop(gone, None)
            self._snapshot = None
        for node_id, info in self._infos.items():
            known = before.get(node_id)
            if known is not info and known != info:
                self._dirty.add(node_id)
                self._snapshot = None  # its name or a label may have changed, or it is new
        self._dirty &= self._infos.keys()

    def update_available(self, available: Mapping[str, Mapping[str, float]]) -> None:
        """Updates what is free in Ray's records: node id -> resource -> amount. Only changed nodes are computed again.

        Do not change the inner mappings afterwards.
        """
        before, self._available = self._available, dict(available)
        changed = [
            node_id
            for node_id, free in available.items()
            if free is not (earlier := before.get(node_id)) and free != earlier
        ]
        changed += before.keys() - available.keys()
        for node_id in changed:
            info = self._infos.get(node_id)
            if info is None:
                continue
            free = available.get(node_id, _NOTHING)
            named = ("GPU", "CPU", "memory", *info.egress, *info.resources)
            read = tuple(map(free.get, named))
            if self._read.get(node_id) != read:
                self._read[node_id] = read
                self._dirty.add(node_id)

    def touch(self, node_ids: Iterable[str]) -> None:
        """Records that what is held or claimed on these nodes, or their hardware, has changed."""
        self._dirty.update(self._infos.keys() & set(node_ids))

    def snapshot(self, lag_seconds: float = VIEW_LAG_SECONDS, believed: Collection[str] = ()) -> Snapshot:
        """The cluster as it is now.

        Args:
            lag_seconds: for how long after a change of the service Ray's records of a node are not used.
            believed: nodes of which they are always used.
        """
        lagging = (self._lagging(lag_seconds) - frozenset(believed)) & self._infos.keys()
        dirty = self._dirty | (lagging ^ self._shown_without) & self._infos.keys()
        changed = [self._state(node_id, node_id in lagging) for node_id in dirty]
        self._states.update((node.id, node) for node in changed)
        if self._snapshot is None:
            self._snapshot = Snapshot(self._states.values(), self._near)
        elif changed:
            self._snapshot = self._snapshot.followed(changed)
        self._shown_without = lagging
        self._dirty.clear()
        return self._snapshot.copy()

    def _state(self, node_id: str, lags: bool) -> Node:
        info = self._infos[node_id]
        return node_state(
            info,
            self._hardware(info),
            None if lags else self._available.get(node_id, _NOTHING),
            self._tally(node_id),
            self._foreign(node_id),
            node_id in self._draining,
        )


_NOTHING: Mapping[str, float] = {}


def overlaid(snapshot: Snapshot, full: Mapping[str, int], avoided: Collection[str]) -> Snapshot:
    """The snapshot for one request, with the answers of nodes that refused.

    Args:
        snapshot: the cluster.
        full: node id -> most whole GPUs, or MIG instances, that may be planned there; no share at all.
        avoided: nodes to exclude.
    """
    changed = []
    for node_id in {*full, *avoided}:
        if not snapshot.bit(node_id):
            continue
        node = snapshot.node(node_id)
        if node_id in full:
            most = full[node_id]
            some = dict(sorted(node.instances.items())[:most])
            node = replace(node, free=frozenset(sorted(node.free)[:most]), instances=some, rests={})
        if node_id in avoided:
            node = replace(node, problem=node.problem or "is avoided")
        changed.append(node)
    return snapshot.changed(changed) if changed else snapshot
