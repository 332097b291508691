"""The policy ``fragmentation``: of all GPUs that a request could take, those that cost the others least.

**Room* is how often a kind of request would fit on a node if nothing else were placed: whole sets of GPUs or shares of
them, limited by the node's CPUs and memory, which are counted in fractions. The cost of a choice is

    sum over the kinds k of what is asked for here:   asked_k / share_k  x  room_k lost / room_k in the cluster

so that scarce room costs much (the one GPU model that some deployments demand, the last empty nodes, the GPUs
with free CPUs beside them) and plentiful room costs little. A kind counts as often as it was asked for; a share
counts more the smaller it is, since small shares fill up GPUs that are partly taken.

Fragmentation Gradient Descent (Weng et al., "Beware of Fragmentation", USENIX ATC 2023) also considers what a
choice takes from a typical mix. It weighs the GPUs of a node that a kind cannot use; this policy weighs what is
left for the kind on all nodes together. ``python -m benchmarks.openb`` shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.core.limits import open_to
from placement.core.mix import Kind, Mix
from placement.core.needs import WHOLE, Needs
from placement.core.node import Choice, Node
from placement.core.offers import Bits, rank_of
from placement.core.policy import Policy
from placement.core.request import Request
from placement.core.snapshot import Snapshot

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

TIE = 1e-9
"""Costs that differ by less than this part of the greatest are equal: rounding of sums can differ by that much."""


def room_of(snapshot: Snapshot) -> Room:
    """The room in a cluster; computed once, and passed on from snapshot to snapshot."""
    if not isinstance(snapshot.room, Room):
        snapshot.room = Room(snapshot)
    return snapshot.room


class Room:
    """The room of every node. It follows one cluster through its changes.

    Nodes with the same GPUs that are equally free are in one *state*, whichever GPUs these are. The room of a
    state, and the states that can follow it, are computed once.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._nodes = list(snapshot.nodes)
        self._widest = 1 + max((len(node.topology) for node in self._nodes), default=0)
        self._ids: dict[Hashable, int] = {}
        self._examples: list[Node] = []
        self._ways: dict[Needs, Ints] = {}
        self._state: Ints = np.array([self._intern(node) for node in self._nodes], dtype=np.int64)
        self._cpu: Floats = np.array([node.cpu_milli for node in self._nodes], dtype=np.float64)
        self._memory: Floats = np.array([node.memory_bytes for node in self._nodes], dtype=np.float64)
        self._filled = 0
        self._kinds: tuple[Kind, ...] = ()
        self._copies: Floats = np.zeros((0, 0))
        self._look_at(())

    def _look_at(self, kinds: tuple[Kind, ...]) -> None:
        """Uses these kinds of requests from now on. Results for kinds with the same needs are kept."""
        known = {kind.needs: self._copies[:, column] for column, kind in enumerate(self._kinds)}
        table = np.zeros((len(self._copies), len(kinds)))
        for column, kind in enumerate(kinds):
            if kind.needs not in known:
                found = np.zeros(len(self._copies))
                found[: self._filled] = [node.copies(kind.needs) for node in self._examples[: self._filled]]
                known[kind.needs] = found
            table[:, column] = known[kind.needs]
        self._kinds, self._copies = kinds, table
        members = [self._members(open_to(self._snapshot, kind)) for kind in kinds]
        self._open = np.array(members, dtype=np.float64).reshape(len(kinds), len(self._nodes)).T.copy()
        self._shares = np.array([self._share(kind) for kind in kinds], dtype=np.float64) / WHOLE
        self._each_cpu = self._each_memory = np.zeros(len(kinds))
        self._room = np.zeros((len(self._nodes), len(kinds)))
        self._changed = set(range(len(self._nodes)))

    def update(self, bit: Bits, node: Node) -> None:
        """Records that a node has changed."""
        position = bit.bit_length() - 1
        self._nodes[position] = node
        self._state[position] = self._intern(node)
        self._cpu[position] = node.cpu_milli
        self._memory[position] = node.memory_bytes
        self._changed.add(position)

    def choose(
        self, request: Request, mix: Mix, wanted: Iterable[Bits], crowded: Callable[[Bits], int]
    ) -> tuple[Bits, Choice] | None:
        """The node and the GPUs on it for one replica; ``None`` if there are none.

        Args:
            request: what is placed.
            mix: the mix of requests on the cluster, including this one.
            wanted: sets of nodes, the most wanted first.
            crowded: how many replicas of the same deployment are on a node.
        """
        for bits in wanted:
            nodes = np.flatnonzero(
                self._members(bits)
                & (self._cpu >= request.cpu_milli)
                & (self._memory >= request.memory_bytes)
            )
            ways = self._ways_of(request.needs, np.unique(self._state[nodes]))[self._state[nodes]]
            rows, turns = np.nonzero(ways >= 0)
            if len(rows):
                nodes, afterwards = nodes[rows], ways[rows, turns]
                if request.needs.gpus > 1:
                    nodes, afterwards = self._fastest(request.needs, nodes, afterwards)
                return self._least(request, mix, nodes, afterwards, crowded)
        return None

    def _least(
        self, request: Request, mix: Mix, nodes: Ints, afterwards: Ints, crowded: Callable[[Bits], int]
    ) -> tuple[Bits, Choice]:
        """Of these nodes, which would then be in these states, the one with the least cost."""
        costs = self._costs(request, mix, nodes, afterwards)
        equal = np.flatnonzero(costs <= costs.min() + TIE * np.abs(costs).max())
        replicas = np.array([crowded(1 << position) for position in nodes[equal].tolist()])
        alike = np.stack([self._state[nodes[equal]], afterwards[equal], replicas])
        firsts = np.unique(alike, axis=1, return_index=True)[1].tolist()  # of nodes that are alike, the first

        def order(i: int) -> tuple[int, Any, int]:
            node = self._nodes[nodes[equal[i]]]
            return int(replicas[i]), rank_of(node, request.needs, Policy.TOPOLOGY), i

        chosen = equal[min(firsts, key=order)]
        position, becomes = int(nodes[chosen]), int(afterwards[chosen])
        node = self._nodes[position]
        taken = next(way for way in ways(node, request.needs) if self._intern(node.after(way)) == becomes)
        return 1 << position, taken

    def _costs(self, request: Request, mix: Mix, nodes: Ints, afterwards: Ints) -> Floats:
        """The cost of each of these choices for the kinds of the mix."""
        asked = self._follow(mix)
        total = self._room.sum(axis=0)
        prices = np.divide(asked, self._shares * total, out=np.zeros_like(asked), where=total > 0)
        left = self._room_in(
            afterwards,
            self._cpu[nodes] - request.cpu_milli,
            self._memory[nodes] - request.memory_bytes,
            self._open[nodes],
        )
        costs: Floats = (self._room @ prices)[nodes] - left @ prices
        return costs

    def _follow(self, mix: Mix) -> Floats:
        """Brings the room of all nodes up to date; returns how much of each kind is asked for."""
        if self._kinds != tuple(mix.kinds):
            self._look_at(tuple(mix.kinds))
        self._fill()
        sets, cpu, memory = np.array(list(mix.kinds.values()), dtype=np.float64).reshape(-1, 3).T
        moved = np.flatnonzero((self._each_cpu != cpu / sets) | (self._each_memory != memory / sets))
        self._each_cpu, self._each_memory = cpu / sets, memory / sets
        if len(moved):
            self._room[:, moved] = self._room_in(
                self._state, self._cpu, self._memory, self._open[:, moved], moved
            )
        if self._changed:
            rows = np.array(sorted(self._changed))
            self._room[rows] = self._room_in(
                self._state[rows], self._cpu[rows], self._memory[rows], self._open[rows]
            )
            self._changed.clear()
        return sets

    def _room_in(
        self, states: Ints, cpu: Floats, memory: Floats, opened: Floats, kinds: Ints | None = None
    ) -> Floats:
        """How often each of the kinds fits on nodes in such states."""
        some = slice(None) if kinds is None else kinds
        found = self._copies[states] if kinds is None else self._copies[states[:, None], kinds]
        for have, each in ((cpu, self._each_cpu[some]), (memory, self._each_memory[some])):
            if each.all():
                np.minimum(found, have[:, None] * (1 / each), out=found)
            elif each.any():
                limited = np.flatnonzero(each)
                found[:, limited] = np.minimum(found[:, limited], have[:, None] / each[limited])
        found *= found >= 1 - TIE
        found *= opened
        return found

    def _fastest(self, needs: Needs, nodes: Ints, afterwards: Ints) -> tuple[Ints, Ints]:
        """The nodes that offer the fastest set."""
        speeds: dict[int, int] = {}
        for state in np.unique(self._state[nodes]).tolist():
            offer = self._examples[state].offer(needs)
            assert offer is not None
            speeds[state] = offer.slowness
        best = min(speeds.values())
        keep = np.array([speeds[state] == best for state in self._state[nodes].tolist()])
        return nodes[keep], afterwards[keep]

    # -- states ----------------------------------------------------------------------------------

    def _intern(self, node: Node) -> int:
        """The number of a node's state."""
        key = _state_of(node)
        number = self._ids.get(key)
        if number is None:
            number = self._ids[key] = len(self._examples)
            self._examples.append(node)
        return number

    def _ways_of(self, needs: Needs, states: Ints) -> Ints:
        """State -> the states that it may be in once ``needs`` are met; -1 where there is no more, -2 unknown."""
        known = self._ways.get(needs)
        if known is None or len(known) < len(self._examples):
            grown = np.full((2 * len(self._examples), self._widest), -2, dtype=np.int64)
            if known is not None:
                grown[: len(known)] = known
            self._ways[needs] = known = grown
        for state in states[known[states, 0] == -2].tolist():
            node = self._examples[state]
            found = list(dict.fromkeys(self._intern(node.after(way)) for way in ways(node, needs)))
            known[state] = -1
            known[state, : len(found)] = found
        return known

    def _fill(self) -> None:
        """Computes for new states how often each kind fits, by GPUs only."""
        new = self._examples[self._filled :]
        if not new:
            return
        if len(self._examples) > len(self._copies):
            larger = np.zeros((2 * len(self._examples), len(self._kinds)))
            larger[: self._filled] = self._copies[: self._filled]
            self._copies = larger
        known: dict[Needs, list[int]] = {}
        for column, kind in enumerate(self._kinds):
            if kind.needs not in known:
                known[kind.needs] = [node.copies(kind.needs) for node in new]
            self._copies[self._filled : len(self._examples), column] = known[kind.needs]
        self._filled = len(self._examples)

    # -- nodes -----------------------------------------------------------------------------------

    def _members(self, bits: Bits) -> Bools:
        packed = np.frombuffer(bits.to_bytes(len(self._nodes) // 8 + 1, "little"), dtype=np.uint8)
        return np.unpackbits(packed, bitorder="little", count=len(self._nodes)).astype(np.bool_)

    def _share(self, kind: Kind) -> int:
        """Thousandths of a GPU that a kind asks for; of the largest GPU that it may have, if that matters."""
        if not kind.needs.memory_bytes:
            return kind.needs.share
        may = open_to(self._snapshot, kind)
        return kind.needs.least_share(
            {node.gpu_memory_bytes for i, node in enumerate(self._nodes) if may >> i & 1}
        )


def ways(node: Node, needs: Needs) -> Sequence[Choice]:
    """What a replica may take on a node: for a share one GPU of each fullness, the fullest first; else the best set."""
    share = needs.share_of(node.gpu_memory_bytes)
    if needs.profile or share is None or share == WHOLE:
        offer = rank_of(node, needs, Policy.TOPOLOGY)
        taken = None if offer is None else node.choose(needs)
        return [] if taken is None else [taken]
    found: dict[int, Choice] = {}
    for rest, gpu in sorted(node.shared_with_room(needs, share)):
        found.setdefault(rest, Choice((gpu,), share, rest - share))
    whole = node.shape.best(node.free_mask(needs), 1)
    if whole is not None:
        found[WHOLE] = Choice(whole, share, WHOLE - share)
    return list(found.values())


def _state_of(node: Node) -> Hashable:
    """Equal for nodes that have the same room, now and after a choice."""
    fixed = (node.shape, node.gpu_memory_bytes, tuple(sorted(node.instances.values())))
    if node.free_memory or not node.shape.in_order:  # here it matters which GPUs are free, not only how many
        named = (node.instances, node.rests, node.free_memory)
        return (*fixed, node.mask, *(tuple(sorted(one.items())) for one in named))
    rests = {**dict.fromkeys(node.free, WHOLE), **node.rests}
    return (*fixed, *(tuple(sorted(rests.get(gpu, 0) for gpu in twins)) for twins in node.shape.twins))
