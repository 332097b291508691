"""Replicas made of several sets of GPUs: on one node, or on several that are near each other.

A replica is ``stages`` tensor-parallel groups; a group is ``parts`` sets of GPUs, each on one node, and, if there
are several, on nodes of one NVLink domain. All GPUs of a replica are of one model. A replica gets
the places that are best in this order:

1. the domain has the fewest replicas of the deployment, if it spreads over a label;
2. the slowest set is as fast as possible;
3. the nodes are nearest to each other: on one node, in the narrowest region by the operator's labels;
4. the replica is on the fewest nodes; its ranks go by ascending GPU on most of them; it is in the region with the least
   room, and on the nodes where others lose least.

Of equally fast sets of a node it takes those whose ranks go by ascending GPU, as engines sort the GPUs of a node.

All replicas are placed whenever that is possible: a node has room for a certain number of disjoint sets; a
domain, a model and a region have room for the sum over their nodes; each set that is taken lowers that number by one.
With a floor on the links a fast set may lower it by more; then it is taken only if the other replicas still fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import WHOLE, Within
from placement.core.node import Choice, Node
from placement.core.offers import Bits
from placement.core.policy import Policy
from placement.core.replicas import Crowd, Placed, PlannedReplica, in_parts, take
from placement.core.request import Request
from placement.core.shape import Shape
from placement.core.snapshot import Snapshot

Gpus = tuple[int, ...]


Picked = tuple[Bits, int]
"""How many sets are taken from a node."""


class Near(NamedTuple):
    """Nodes for a replica. Sorts the best first.

    Attributes:
        level: the level of the narrowest region that holds them; -1 for one node.
        nodes: how many.
        resorted: on how many of them an engine that sorts GPUs would change the sets to slower ones.
        groups: how many groups that region has room for.
        picked: the nodes; where groups have parts, group by group.
    """

    level: int
    nodes: int
    resorted: int
    groups: int
    region: Bits
    picked: list[Picked]


class Unit(NamedTuple):
    """A free set of GPUs."""

    node: Bits
    gpus: Gpus


def splits(snapshot: Snapshot, request: Request, nodes: Bits) -> Iterator[Request]:
    """The ways to cut a request that is larger than each of ``nodes``: first inside NVLink domains, then into stages.

    The fewest, and so the largest, pieces first; all pieces are equal. They have two GPUs or more, except where no
    node has two. A floor on the links between GPUs holds within each piece. Pieces of one GPU have no links, so with a
    floor they are not used, unless an NVLink domain keeps them on NVLink.
    """
    needs = request.needs
    if not needs.whole or any(node.whole_gpus >= needs.gpus for node in _members(snapshot, nodes)):
        return
    members = list(_members(snapshot, nodes))
    largest = max((node.whole_gpus for node in members), default=0)
    least = 1 if largest == 1 else 2
    pieces = [size for size in range(largest, least - 1, -1) if needs.gpus % size == 0]
    if any(GPU_DOMAIN_LABEL in node.labels for node in members):
        on_nvlink = needs.slowest == 0 and needs.within in (Within.NODE, Within.NVLINK)
        for size in pieces:
            if size > 1 or on_nvlink:
                yield replace(_cut(request, size), parts=needs.gpus // size)
    if request.divisible:
        yield from (in_stages(request, size) for size in pieces if size > 1 or not needs.floor)


def in_stages(request: Request, size: int) -> Request:
    """The request cut into stages of ``size`` GPUs."""
    return replace(_cut(request, size), stages=request.stages * request.needs.gpus // size)


def _cut(request: Request, size: int) -> Request:
    gpus = request.needs.gpus
    return replace(
        request,
        needs=request.needs._replace(gpus=size),
        cpu_milli=request.cpu_milli * size // gpus,
        memory_bytes=request.memory_bytes * size // gpus,
    )


def nearness(snapshot: Snapshot, node: Node) -> tuple[tuple[str, ...], str, str]:
    """Sorts nodes so that those near each other are neighbours, as consecutive stages are."""
    return tuple(node.labels.get(label, "") for label in snapshot.near), node.name, node.id


def place(snapshot: Snapshot, request: Request, allowed: Bits) -> Placed:
    """Places as many replicas as there is room for."""
    free = _FreeSets(snapshot, request, allowed)
    planned: list[PlannedReplica] = []
    for to_come, index in zip(range(len(request.replicas) - 1, -1, -1), request.replicas, strict=True):
        chosen = free.choose(to_come)
        if chosen is None:
            break
        planned += free.take(index, chosen)
    return planned, free.changed


def groups_free(snapshot: Snapshot, request: Request, allowed: Bits) -> int:
    """How many tensor-parallel groups a single place has room for: the most of any place."""
    free = _FreeSets(snapshot, request, allowed)
    return max(map(free.groups, free.places()), default=0)


def has_room_emptied(snapshot: Snapshot, request: Request, allowed: Bits) -> bool:
    """Whether one more replica would fit if all other deployments were gone."""
    emptied = {node.id: node.emptied() for node in _members(snapshot, allowed)}
    others = Snapshot((emptied.get(node.id, node) for node in snapshot.nodes), snapshot.near)
    return _FreeSets(others, request, allowed).more_than_stand()


def _each(nodes: Bits) -> Iterator[Bits]:
    while nodes:
        bit = nodes & -nodes
        nodes ^= bit
        yield bit


def _members(snapshot: Snapshot, nodes: Bits) -> Iterator[Node]:
    return map(snapshot.at, _each(nodes))


class _FreeSets:
    """The free sets.

    A *place* is nodes with GPUs of one model, in one domain of the label that the deployment spreads over, if it
    does: all sets of a replica are in one place.
    """

    def __init__(self, snapshot: Snapshot, request: Request, allowed: Bits) -> None:
        self._snapshot, self._request, self._allowed = snapshot, request, allowed
        self._crowd = Crowd(snapshot, request, allowed)
        self.changed: dict[Bits, Node] = {}
        self._mask: dict[Bits, int] = {}
        self._domain: dict[Bits, str] = {}
        self._counts: dict[Bits, dict[int, int]] = {}
        self._sets: dict[tuple[Shape, int, int], tuple[list[Gpus], list[Gpus]]] = {}
        self._ranked: dict[tuple[Shape, int, int, int], list[Gpus]] = {}
        self._speeds: dict[Bits, list[int]] = {}
        self._listed: dict[Bits, list[Bits]] = {}
        models: dict[str, Bits] = {}
        for node in _members(snapshot, allowed):
            domain = node.labels.get(GPU_DOMAIN_LABEL)
            if request.parts > 1 and domain is None:
                continue
            bit = snapshot.bit(node.id)
            self._mask[bit] = node.free_mask(request.needs)
            self._domain[bit] = domain or ""
            self._counts[bit] = {}
            model = node.topology.model or ""
            models[model] = models.get(model, 0) | bit
        self._alike = [models[model] for model in sorted(models)]

    # -- counting --------------------------------------------------------------------------------

    def places(self) -> list[Bits]:
        """The places that may still take replicas."""
        return [
            bits & alike for bits, _ in self._crowd.open_domains() for alike in self._alike if bits & alike
        ]

    def more_than_stand(self) -> bool:
        """Whether a domain of the spread, or the cluster, has room for more replicas than it has."""
        for bits, _ in self._crowd.open_domains():
            standing = sum(self._crowd.on(bit) for bit in _each(bits))
            if sum(self.groups(bits & alike) // self._request.stages for alike in self._alike) > standing:
                return True
        return False

    def groups(self, nodes: Bits, slowest: int | None = None) -> int:
        """How many tensor-parallel groups fit on some nodes with no slower set."""
        least = self._request.needs.slowest if slowest is None else slowest
        return sum(self._groups_by_domain(nodes, least).values())

    def _groups_by_domain(self, nodes: Bits, slowest: int) -> dict[str, int]:
        sets: dict[str, int] = {}
        for bit in self._within(nodes):
            if count := self._count(bit, slowest):
                domain = self._domain[bit] if self._request.parts > 1 else ""
                sets[domain] = sets.get(domain, 0) + count
        groups = {domain: count // self._request.parts for domain, count in sets.items()}
        return {domain: count for domain, count in sorted(groups.items()) if count}

    def _within(self, nodes: Bits) -> list[Bits]:
        if nodes not in self._listed:
            self._listed[nodes] = [bit for bit in _each(nodes) if bit in self._mask]
        return self._listed[nodes]

    def _count(self, bit: Bits, slowest: int) -> int:
        """How many disjoint sets that are no slower a node has room for."""
        known = self._counts[bit]
        if slowest not in known:
            known[slowest] = self._count_with(bit, slowest, self._mask[bit], 0)
        return known[slowest]

    def _count_with(self, bit: Bits, slowest: int, mask: int, taken: int) -> int:
        """The same for these free GPUs, after a number of sets has been taken."""
        node, request = self._node(bit), self._request
        count = max(map(len, self._disjoint(node.shape, mask, slowest)))
        for have, each in ((node.cpu_milli, request.cpu_milli), (node.memory_bytes, request.memory_bytes)):
            if each:
                count = min(count, max(0, have // each - taken))
        return count

    def _disjoint(self, shape: Shape, mask: int, slowest: int) -> tuple[list[Gpus], list[Gpus]]:
        """Disjoint sets that are no slower: the best one after the other; as many as there are."""
        key = (shape, mask, slowest)
        if key not in self._sets:
            self._sets[key] = shape.disjoint(mask, self._request.needs, slowest)
        return self._sets[key]

    def _node(self, bit: Bits) -> Node:
        return self.changed.get(bit) or self._snapshot.at(bit)

    # -- choosing --------------------------------------------------------------------------------

    def choose(self, to_come: int) -> list[Unit] | None:
        """The sets of the next replica, in rank order; ``None`` if it does not fit.

        Args:
            to_come: how many replicas are still to be placed after it.
        """
        spread = self._request.spread_label is not None
        for domains in self._crowd.domains() if spread else [[self._allowed]]:
            places = [bits & alike for bits in domains for alike in self._alike if bits & alike]
            speeds = {place: found for place in places if (found := self._speeds_in(place))}
            for slowest in sorted({speed for known in speeds.values() for speed in known}):
                fast = [place for place, known in speeds.items() if known[0] <= slowest]
                for near in sorted(self._nearest(place, slowest) for place in fast):
                    for exchanged in (True, False):
                        chosen = self._in_rank_order(near, slowest, exchanged)
                        if self._spares(chosen, to_come):
                            return chosen
            if speeds:  # every fast set would leave others without room
                near = min(self._nearest(place, slowest) for place in speeds)
                return self._in_rank_order(near, slowest, exchanged=False, packed=True)
        return None

    def _speeds_in(self, place: Bits) -> list[int]:
        """The values of the slowest set's slowness with which a replica fits in a place, the fastest first."""
        needs = self._request.needs
        if place not in self._speeds:
            shapes = {self._node(bit).shape for bit in self._within(place)}
            known = {speed for shape in shapes for speed in shape.slownesses(needs.gpus)}
            self._speeds[place] = sorted(speed for speed in known if speed <= needs.slowest)
        speeds = self._speeds[place]
        while speeds and self.groups(place, speeds[0]) < self._request.stages:
            speeds.pop(0)  # for good: room only shrinks
        return speeds

    def _spares(self, chosen: Sequence[Unit], to_come: int) -> bool:
        """Whether as many of the replicas to come still fit once these sets are taken."""
        needs = self._request.needs
        if not to_come or not needs.floor:
            return True  # every set that is taken lowers the room of its node by exactly one
        taken: dict[Bits, list[int]] = {}
        for unit in chosen:
            taken.setdefault(unit.node, []).append(sum(1 << gpu for gpu in unit.gpus))
        left = {
            bit: self._count_with(bit, needs.slowest, self._mask[bit] & ~sum(masks), len(masks))
            for bit, masks in taken.items()
        }
        if all(self._count(bit, needs.slowest) - left[bit] <= len(masks) for bit, masks in taken.items()):
            return True
        wanted = min(to_come, self._replicas() - 1)
        before = {bit: self._counts[bit] for bit in left}
        self._counts |= {bit: {needs.slowest: count} for bit, count in left.items()}
        spared = self._replicas(without=chosen[0].node) >= wanted
        self._counts |= before
        return spared

    def _replicas(self, without: Bits = 0) -> int:
        """How many replicas fit once one more is on a node."""
        total = 0
        for bits, most in self._crowd.open_domains():
            fit = sum(self.groups(bits & alike) // self._request.stages for alike in self._alike)
            if most is not None:
                fit = min(fit, most - bool(bits & without))
            total += fit
        return total

    def _nearest(self, place: Bits, slowest: int) -> Near:
        """The nodes of a place that are nearest to each other and hold a replica with no slower set."""
        best: Near | None = None
        wanted = self._request.stages * self._request.parts
        alone = any(self._count(bit, slowest) >= wanted for bit in self._within(place))
        found_at = 0
        for level, bits in self._snapshot.regions:
            region = bits & place
            if best is not None and level > found_at and (best.level < 0 or not alone):
                break  # all further regions are wider
            if not region or (groups := self.groups(region, slowest)) < self._request.stages:
                continue
            picked = self._pick(region, slowest)
            nodes = len({bit for bit, _ in picked})
            resorted = sum(self._is_resorted(bit, count, slowest) for bit, count in picked)
            near = Near(-1 if nodes == 1 else level, nodes, resorted, groups, region, picked)
            if best is None or near < best:
                best, found_at = near, level
        assert best is not None  # the last region is the whole cluster
        return best

    def _pick(self, region: Bits, slowest: int) -> list[Picked]:
        """How many sets to take from which nodes, on the fewest nodes, group by group if groups have parts."""
        missing, parts = self._request.stages, self._request.parts
        if parts == 1:
            return self._fewest_nodes(region, missing, slowest)
        room = self._groups_by_domain(region, slowest)
        by_domain = dict.fromkeys(room, 0)
        for bit in self._within(region):
            if self._domain[bit] in room:
                by_domain[self._domain[bit]] |= bit
        picked: list[Picked] = []
        while missing:
            enough = [domain for domain in room if room[domain] >= missing]
            if enough:
                ways = {
                    domain: self._fewest_nodes(by_domain[domain], missing * parts, slowest)
                    for domain in enough
                }
                domain = min(enough, key=lambda domain: (len(ways[domain]), room[domain], domain))
                return picked + ways[domain]
            domain = max(room, key=lambda domain: (room[domain], domain))
            picked += self._fewest_nodes(by_domain[domain], room[domain] * parts, slowest)
            missing -= room.pop(domain)
        return picked

    def _fewest_nodes(self, nodes: Bits, sets: int, slowest: int) -> list[Picked]:
        """The sets, node by node: each node is used fully, the last one is the one with the least left over."""
        room = {bit: count for bit in self._within(nodes) if (count := self._count(bit, slowest))}
        rank = {bit: self._rank(bit) for bit in room}
        picked: list[Picked] = []
        while sets:
            enough = [bit for bit, count in room.items() if count >= sets]
            if enough:
                bit = min(enough, key=lambda bit: (rank[bit][0], room[bit], rank[bit]))
                if self._is_resorted(bit, sets, slowest):
                    torn = {bit: self._is_resorted(bit, sets, slowest) for bit in enough}
                    bit = min(enough, key=lambda bit: (rank[bit][0], torn[bit], room[bit], rank[bit]))
            else:
                bit = min(room, key=lambda bit: (rank[bit][0], -room[bit], rank[bit]))
            picked.append((bit, min(sets, room.pop(bit))))
            sets -= picked[-1][1]
        return picked

    def _in_rank_order(self, near: Near, slowest: int, exchanged: bool, packed: bool = False) -> list[Unit]:
        """The sets themselves.

        Args:
            near: on which nodes.
            slowest: none is slower.
            exchanged: whether other sets than the best ones may be taken so that ranks go by ascending GPU.
            packed: whether they are taken from a largest collection of disjoint sets.
        """
        units = []
        for bit, count in near.picked:
            if exchanged:
                sets = self._sets_on(bit, count, slowest)
            else:
                shape = self._node(bit).shape
                best, most = self._disjoint(shape, self._mask[bit], slowest)
                sets = best if len(best) >= count and not packed else most
                sets = shape.in_rank_order(sets[:count], self._request.needs)
            units += [Unit(bit, gpus) for gpus in sets]
        if self._request.parts > 1:
            return units
        return sorted(
            units, key=lambda unit: (nearness(self._snapshot, self._snapshot.at(unit.node)), unit.gpus)
        )

    def _sets_on(self, bit: Bits, count: int, slowest: int) -> list[Gpus]:
        """Sets of a node in rank order: if possible those that stay the same when an engine sorts the GPUs."""
        shape, mask = self._node(bit).shape, self._mask[bit]
        key = (shape, mask, count, slowest)
        if key not in self._ranked:
            best, most = self._disjoint(shape, mask, slowest)
            sets = best if len(best) >= count else most
            self._ranked[key] = shape.in_rank_order(sets[:count], self._request.needs, mask)
        return self._ranked[key]

    def _is_resorted(self, bit: Bits, count: int, slowest: int) -> bool:
        """Whether an engine that sorts the GPUs of a node would get other sets."""
        if count == 1 or self._request.needs.gpus == 1:
            return False
        return any(one[-1] > other[0] for one, other in pairwise(self._sets_on(bit, count, slowest)))

    def _rank(self, bit: Bits) -> tuple[int, int, Bits]:
        """Which of two nodes with equal sets goes first."""
        node, policy = self._node(bit), self._request.policy
        spread = self._crowd.on(bit) if policy in (Policy.SPREAD, Policy.ROUND_ROBIN) else 0
        if policy is Policy.ROUND_ROBIN:
            return spread, node.replicas, bit
        return spread, -len(node.free) if policy is Policy.LEAST_LOADED else len(node.free), bit

    # -- taking ----------------------------------------------------------------------------------

    def take(self, index: int, chosen: Sequence[Unit]) -> list[PlannedReplica]:
        """Takes the sets for a replica."""
        sets = []
        for unit in chosen:
            part, self.changed[unit.node] = take(
                index, self._node(unit.node), Choice(unit.gpus, WHOLE, 0), self._request
            )
            sets.append(part)
            self._mask[unit.node] &= ~sum(1 << gpu for gpu in unit.gpus)
            self._counts[unit.node] = {}
        self._crowd.add(chosen[0].node)
        return in_parts(sets)
