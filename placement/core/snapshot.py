"""What the cluster has and holds at one moment. Immutable; a plan is a function of it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from placement.core.score import Offer, Shape, Within, shape_of
from placement.core.topology import Topology

Bits = int
"""A set of nodes: bit *i* is the *i*-th node by name and id. Thousands of nodes are met in one operation."""


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        id: Ray's node id, hex.
        name: what people call it (Ray's node name, else its address).
        topology: its GPUs; no GPUs on a pure egress node.
        free: GPU ordinals believed free. Exact unless other Ray users hold GPUs here; the node actor
            finds out when it reserves.
        egress: resource name (``egress`` or ``egress_<provider>``) -> concurrent requests still free.
        serving: (provider, key fingerprint) of the remote replicas that sit here.
        problem: why nothing may be placed here, if so.
    """

    id: str
    name: str
    address: str = ""
    topology: Topology = field(default_factory=lambda: Topology.unknown(0))
    free: frozenset[int] = frozenset()
    egress: Mapping[str, int] = field(default_factory=dict)
    serving: frozenset[tuple[str, str]] = frozenset()
    problem: str | None = None

    @cached_property
    def shape(self) -> Shape:
        """The tables of its machine, shared by all nodes like it."""
        return shape_of(self.topology)

    @cached_property
    def mask(self) -> int:
        """The free GPUs as a bit mask."""
        return sum(1 << gpu for gpu in self.free)

    def named(self, name: str) -> bool:
        """Whether ``name`` is this node's id, name or address."""
        return name in (self.id, self.name, self.address)

    def best(self, count: int, within: Within = Within.NODE) -> tuple[int, ...] | None:
        """The best ``count`` of its free GPUs; see :func:`~placement.core.score.best_set`."""
        return self.shape.best(self.mask, count, within)

    def offer(self, count: int, within: Within = Within.NODE) -> Offer | None:
        """How good they are, and what taking them costs the others."""
        return self.shape.offer(self.mask, count, within)

    def egress_resource(self, provider: str) -> str | None:
        """The resource that a replica calling ``provider`` takes here: its own before the general one."""
        return next((r for r in (f"egress_{provider}", "egress") if r in self.egress), None)


class Offers:
    """Which nodes have which :class:`~placement.core.score.Offer` for one kind of request."""

    def __init__(self, nodes: dict[Offer, Bits]) -> None:
        self._nodes = nodes
        self._best_first = sorted(nodes)

    def copy(self) -> Offers:
        """The same, to be changed on its own."""
        return Offers(dict(self._nodes))

    def move(self, node: Bits, old: Offer | None, new: Offer | None) -> None:
        """Notes that one node's offer has changed."""
        if old == new:
            return
        if old is not None:
            left = self._nodes[old] & ~node
            if left:
                self._nodes[old] = left
            else:
                del self._nodes[old]
                self._best_first.remove(old)
        if new is not None:
            if new not in self._nodes:
                insort(self._best_first, new)
            self._nodes[new] = self._nodes.get(new, 0) | node

    def best(self, preference: Iterable[Bits], slowest: int) -> tuple[Offer, Bits] | None:
        """The best offer and one node, the first, that has it.

        The fastest sets on offer count first. Among the nodes that have such, those in the first of the
        ``preference`` sets that holds any; among these the least loss to others, then the fewest free GPUs.

        Args:
            preference: disjoint sets of nodes, most wanted first. No others are considered.
            slowest: the greatest slowness that will do.
        """
        sets = list(preference)
        start = 0
        while start < len(self._best_first):
            slowness = self._best_first[start].slowness
            if slowness > slowest:
                break
            end = start
            while end < len(self._best_first) and self._best_first[end].slowness == slowness:
                end += 1
            for wanted in sets:
                for offer in self._best_first[start:end]:
                    found = self._nodes[offer] & wanted
                    if found:
                        return offer, found & -found
            start = end
        return None


class Snapshot:
    """All nodes that are alive.

    Args:
        nodes: in any order; :attr:`nodes` has them by name and id.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes: tuple[Node, ...] = tuple(sorted(nodes, key=lambda node: (node.name, node.id)))
        self._offers: dict[tuple[int, Within], Offers] = {}

    @cached_property
    def _position(self) -> dict[str, int]:
        return {node.id: i for i, node in enumerate(self.nodes)}

    @cached_property
    def usable(self) -> Bits:
        """The nodes that have GPUs, and no problem."""
        return self.select(node for node in self.nodes if len(node.topology) and node.problem is None)

    @cached_property
    def _by_name(self) -> dict[str, Bits]:
        found: dict[str, Bits] = {}
        for i, node in enumerate(self.nodes):
            for name in {node.id, node.name, node.address}:
                found[name] = found.get(name, 0) | 1 << i
        return found

    def node(self, node_id: str) -> Node:
        """The node of that id.

        Raises:
            KeyError: there is none.
        """
        return self.nodes[self._position[node_id]]

    def bit(self, node_id: str) -> Bits:
        """The set of just the node of that id; empty if there is none."""
        position = self._position.get(node_id)
        return 0 if position is None else 1 << position

    def at(self, bit: Bits) -> Node:
        """The one node of a set."""
        return self.nodes[bit.bit_length() - 1]

    def select(self, nodes: Iterable[Node]) -> Bits:
        """Some of the nodes, as a set."""
        marks = bytearray(len(self.nodes) // 8 + 1)
        for node in nodes:
            position = self._position[node.id]
            marks[position >> 3] |= 1 << (position & 7)
        return int.from_bytes(marks, "little")

    def named(self, names: Iterable[str]) -> Bits:
        """The nodes that have one of these ids, names or addresses."""
        found = 0
        for name in names:
            found |= self._by_name.get(name, 0)
        return found

    def offers(self, count: int, within: Within) -> Offers:
        """What every usable node offers to a request for ``count`` GPUs. Not to be changed."""
        key = (count, within)
        if key not in self._offers:
            groups: dict[Offer, list[Node]] = {}
            for node in self.nodes:
                if node.problem is None and len(node.topology):
                    offer = node.offer(count, within)
                    if offer is not None:
                        groups.setdefault(offer, []).append(node)
            self._offers[key] = Offers({offer: self.select(nodes) for offer, nodes in groups.items()})
        return self._offers[key]

    def changed(self, nodes: Iterable[Node]) -> Snapshot:
        """The same cluster with some nodes replaced by others of the same id, name, address and topology.

        What was worked out of the cluster is carried over, so that this takes next to no time.
        """
        listed = list(self.nodes)
        offers = {key: known.copy() for key, known in self._offers.items()}
        for node in nodes:
            position = self._position[node.id]
            old, listed[position] = listed[position], node
            for (count, within), known in offers.items():
                known.move(1 << position, old.offer(count, within), node.offer(count, within))
        later = Snapshot(())
        later.nodes = tuple(listed)
        later._offers = offers
        for name in ("_position", "_by_name", "usable"):
            if name in self.__dict__:
                later.__dict__[name] = self.__dict__[name]
        return later
