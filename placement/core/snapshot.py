"""What the cluster has and holds at one moment. Immutable; a plan is a function of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import compress
from operator import is_not
from typing import Protocol

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.mix import Kind, Mix
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.offers import Bits, Offers, is_usable, usable_rank
from placement.core.policy import Policy, Rank

NEAR_LABELS = ("ray.io/availability-region", "ray.io/availability-zone", "block", "rack", GPU_DOMAIN_LABEL)
"""The labels that make nodes near each other unless the operator names others, widest first."""

MOST_KINDS = 256
"""For how many kinds of requests the nodes' ranks are remembered."""


class Follower(Protocol):
    """What is computed from all nodes, and kept up to date: :class:`placement.core.room.Room`."""

    def update(self, bit: Bits, node: Node) -> None:
        """Records that a node has changed."""


class Snapshot:
    """All nodes that are alive.

    Args:
        nodes: in any order; :attr:`nodes` has them by name and id.
        near: labels that have the same value on nodes near each other, widest first.
        mix: the mix of requests on this cluster, as far as known.

    Attributes:
        room: the room of its nodes, once computed; passed on to changed snapshots.
        open_to: kind of request -> the nodes that it may go to, for kinds that were asked for.

    A snapshot shared by threads is copied for planning (:meth:`copy`), and updated by :meth:`followed`.
    """

    def __init__(
        self, nodes: Iterable[Node], near: Sequence[str] = NEAR_LABELS, mix: Mix | None = None
    ) -> None:
        self.near = tuple(near)
        self.mix = mix or Mix()
        self.room: Follower | None = None
        self.open_to: dict[Kind, Bits] = {}
        self.nodes: tuple[Node, ...] = tuple(sorted(nodes, key=lambda node: (node.name, node.id)))
        self._offers: dict[tuple[Needs, Policy], Offers] = {}
        self._earlier: dict[tuple[Needs, Policy], tuple[Offers, tuple[Node, ...]]] = {}
        self._origin: Snapshot | None = None

    @cached_property
    def _position(self) -> dict[str, int]:
        if self._origin is not None:
            return self._origin._position
        return {node.id: i for i, node in enumerate(self.nodes)}

    @cached_property
    def usable(self) -> Bits:
        """The nodes that have GPUs, and no problem."""
        return self.select(filter(is_usable, self.nodes))

    def domains(self, label: str) -> dict[str, Bits]:
        """The nodes by their value of a label; those without it are left out."""
        members: dict[str, list[Node]] = {}
        for node in self.nodes:
            if label in node.labels:
                members.setdefault(node.labels[label], []).append(node)
        return {value: self.select(nodes) for value, nodes in sorted(members.items())}

    @cached_property
    def regions(self) -> list[tuple[int, Bits]]:
        """Sets of nodes that are near each other, as (level, nodes); the narrowest level, 0, first.

        The last one is the whole cluster.
        """
        if self._origin is not None:
            return self._origin.regions
        found: dict[Bits, int] = {self.select(self.nodes): len(self.near)}
        for labels in range(1, len(self.near) + 1):
            named = self.near[:labels]
            members: dict[tuple[str | None, ...], list[Node]] = {}
            for node in self.nodes:
                if named[-1] in node.labels:
                    members.setdefault(tuple(map(node.labels.get, named)), []).append(node)
            for nodes in members.values():
                found[self.select(nodes)] = len(self.near) - labels
        return sorted((level, bits) for bits, level in found.items())

    @cached_property
    def _by_name(self) -> dict[str, Bits]:
        if self._origin is not None:
            return self._origin._by_name
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
        """The set of only the node of that id; empty if there is none."""
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

    def offers(self, needs: Needs, policy: Policy) -> Offers:
        """The ranks of all usable nodes for a request. Do not change the result.

        Results of the snapshot from which this one was made are updated, not computed again for every node.
        """
        key = (needs, policy)
        known = self._offers.get(key)
        if known is None:
            if self._origin is not None:
                known = self._since(key, self._origin.offers(needs, policy), self._origin.nodes)
            elif key in self._earlier:
                known = self._since(key, *self._earlier[key])
            else:
                groups: dict[Rank, list[Node]] = {}
                for node in self.nodes:
                    rank = usable_rank(node, needs, policy)
                    if rank is not None:
                        groups.setdefault(rank, []).append(node)
                known = Offers({rank: self.select(nodes) for rank, nodes in groups.items()})
            self._offers[key] = known
        return known

    def _since(self, key: tuple[Needs, Policy], known: Offers, nodes: tuple[Node, ...]) -> Offers:
        """Offers that were computed for these older nodes, brought up to date."""
        if nodes is self.nodes:
            return known
        found = known.copy()
        for i in compress(range(len(nodes)), map(is_not, nodes, self.nodes)):
            found.move(1 << i, usable_rank(nodes[i], *key), usable_rank(self.nodes[i], *key))
        return found

    def changed(self, nodes: Iterable[Node], mix: Mix | None = None) -> Snapshot:
        """The same cluster with some nodes replaced, by others of the same id, name, address and labels.

        Computed results are carried over, so this is fast.
        """
        offers = {key: known.copy() for key, known in self._offers.copy().items()}
        later, positions = self._replaced(nodes, mix)
        for position in positions:
            old, node = self.nodes[position], later.nodes[position]
            for (needs, policy), known in offers.items():
                before, after = usable_rank(old, needs, policy), usable_rank(node, needs, policy)
                known.move(1 << position, before, after)
        later._offers, later._origin, later._earlier = offers, self._origin, self._earlier
        return later

    def followed(self, nodes: Iterable[Node]) -> Snapshot:
        """The same as :meth:`changed`, for a cluster that is followed for long, with all kinds of requests.

        Offers are brought up to date when they are next asked for; the least recently used ones are forgotten.
        """
        later, _ = self._replaced(nodes, None)
        earlier = {
            **self._earlier,
            **{key: (known, self.nodes) for key, known in self._offers.copy().items()},
        }
        for key in [*earlier][: max(0, len(earlier) - MOST_KINDS)]:
            del earlier[key]
        later._earlier = earlier
        if len(later.open_to) > MOST_KINDS:
            later.open_to = {}
        return later

    def copy(self) -> Snapshot:
        """A copy to plan with: results that are computed with it are also known to this one.

        The room is not shared, as planning changes it.
        """
        later = Snapshot((), self.near, self.mix)
        later.nodes, later.open_to, later._origin = self.nodes, self.open_to, self
        later.__dict__["usable"] = self.usable
        return later

    def _replaced(self, nodes: Iterable[Node], mix: Mix | None) -> tuple[Snapshot, list[int]]:
        """The same with some nodes replaced, and their positions; no offers are known yet."""
        listed, positions = list(self.nodes), []
        later = Snapshot((), self.near, mix or self.mix)
        lasting, closed = True, 0
        for node in nodes:
            position = self._position[node.id]
            old, listed[position] = listed[position], node
            positions.append(position)
            if not _is_same_machine(old, node):
                lasting = lasting and not is_usable(node)
                closed |= 1 << position
        later.nodes = tuple(listed)
        for name in _OF_ALL:
            if name in self.__dict__:
                later.__dict__[name] = self.__dict__[name]
        later.open_to = self.open_to
        if closed:
            usable = later.select(later.nodes[i] for i in positions if is_usable(later.nodes[i]))
            later.__dict__["usable"] = self.usable & ~closed | usable & closed
            later.open_to = {}
            if lasting:
                later.open_to = {kind: bits & ~closed for kind, bits in self.open_to.copy().items()}
        elif self.room is not None:
            later.room, self.room = self.room, None
            for position in positions:
                later.room.update(1 << position, later.nodes[position])
        return later, positions


_OF_ALL = ("_position", "_by_name", "usable", "regions")
"""Results that depend only on the nodes, not on what is free on them."""


def _is_same_machine(old: Node, new: Node) -> bool:
    """Whether nodes differ only in what is free and what is placed there."""
    return (
        old.problem == new.problem
        and (old.topology is new.topology or old.topology == new.topology)
        and (old.accelerators is new.accelerators or old.accelerators == new.accelerators)
        and old.compute_capability == new.compute_capability
        and (old.slots is new.slots or old.slots == new.slots)
        and old.gpu_memory_bytes == new.gpu_memory_bytes
        and (old.uuids is new.uuids or old.uuids == new.uuids)
    )
