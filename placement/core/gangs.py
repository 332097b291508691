"""Replicas made of several sets of GPUs: on one node, or on several that are near each other.

A replica is ``stages`` tensor-parallel groups; a group is ``parts`` sets of GPUs, each on one node, and, if there
are several, on nodes of one NVLink domain. All GPUs of a replica are of one model. Of all the places it is
given the one where, in this order,

1. the fewest replicas of the deployment are, where it spreads over a label;
2. the slowest set is fastest;
3. the nodes are nearest to each other: on one node, in the narrowest region by the operator's labels;
4. it lies on the fewest nodes, in the region with the least room, on nodes others miss least.

All replicas are placed exactly when they can be: a node has room for a certain number of disjoint sets, a
domain, a model and a region for the sum of their nodes', and each set that is taken lowers it by just one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from placement.core.replicas import Crowd, Placed, PlannedReplica, take
from placement.core.request import Request
from placement.core.score import WHOLE
from placement.core.snapshot import GPU_DOMAIN_LABEL, Bits, Node, Policy, Snapshot, Take

Gpus = tuple[int, ...]


class Unit(NamedTuple):
    """A set of GPUs that is free. Sorts the fastest first."""

    slowness: int
    node: Bits
    turn: int
    gpus: Gpus


def splits(snapshot: Snapshot, request: Request, nodes: Bits) -> Iterator[Request]:
    """The ways to cut a request that is larger than each of ``nodes``: first inside NVLink domains, then into stages.

    The fewest, and so the largest, pieces first; all pieces are equal and have two GPUs or more.
    """
    needs = request.needs
    members = list(_members(snapshot, nodes))
    largest = max((node.whole_gpus for node in members), default=0)
    if not needs.whole or needs.gpus <= largest:
        return
    pieces = [size for size in range(largest, 1, -1) if needs.gpus % size == 0]

    def cut(size: int) -> Request:
        return replace(
            request,
            needs=needs._replace(gpus=size),
            cpu_milli=request.cpu_milli * size // needs.gpus,
            memory_bytes=request.memory_bytes * size // needs.gpus,
        )

    if any(GPU_DOMAIN_LABEL in node.labels for node in members):
        yield from (replace(cut(size), parts=needs.gpus // size) for size in pieces)
    if request.divisible:
        yield from (replace(cut(size), stages=needs.gpus // size) for size in pieces)


def place(snapshot: Snapshot, request: Request, allowed: Bits) -> Placed:
    """Places as many replicas as there is room for."""
    room = _Room(snapshot, request, allowed)
    planned: list[PlannedReplica] = []
    for index in request.replicas:
        chosen = room.choose()
        if chosen is None:
            break
        planned += room.take(index, chosen)
    return planned, room.changed


def groups_free(snapshot: Snapshot, request: Request, allowed: Bits) -> int:
    """For how many tensor-parallel groups there is room on GPUs of one model: the most of any."""
    room = _Room(snapshot, request, allowed)
    return max((len(room.groups(alike)) for alike in room.alike), default=0)


def _members(snapshot: Snapshot, nodes: Bits) -> Iterator[Node]:
    while nodes:
        bit = nodes & -nodes
        nodes &= ~bit
        yield snapshot.at(bit)


class _Room:
    """The sets that are free, by node."""

    def __init__(self, snapshot: Snapshot, request: Request, allowed: Bits) -> None:
        self._snapshot, self._request, self._allowed = snapshot, request, allowed
        self._crowd = Crowd(snapshot, request, allowed)
        self._units: dict[Bits, list[Unit]] = {}
        self._domain: dict[Bits, str] = {}
        self.changed: dict[Bits, Node] = {}
        models: dict[str, Bits] = {}
        for node in _members(snapshot, allowed):
            model = node.topology.model or ""
            models[model] = models.get(model, 0) | snapshot.bit(node.id)
        self.alike = [models[model] for model in sorted(models)]
        for node in _members(snapshot, allowed):
            bit = snapshot.bit(node.id)
            domain = node.labels.get(GPU_DOMAIN_LABEL)
            if request.parts > 1 and domain is None:
                continue
            if units := _units(node, bit, request):
                self._units[bit] = units
                self._domain[bit] = domain or ""

    def groups(self, region: Bits) -> list[list[Unit]]:
        """Disjoint tensor-parallel groups within a region, as many as there are, the fastest first."""
        units = [unit for bit, units in self._units.items() if bit & region for unit in units]
        if self._request.parts == 1:
            return [[unit] for unit in sorted(units)]
        by_domain: dict[str, list[Unit]] = {}
        for unit in units:
            by_domain.setdefault(self._domain[unit.node], []).append(unit)
        found = []
        for domain, inside in sorted(by_domain.items()):
            ordered = self._fewest_nodes(inside, len(inside) // self._request.parts * self._request.parts)
            slices = range(0, len(ordered), self._request.parts)
            found += [(len(inside), domain, ordered[i : i + self._request.parts]) for i in slices]
        found.sort(key=lambda group: (max(group[2]).slowness, group[:2]))
        return [group for *_, group in found]

    def choose(self) -> list[Unit] | None:
        """The sets of the next replica, in rank order; ``None`` if there is no room for it."""
        spread = self._request.spread_label is not None
        for domains in self._crowd.domains() if spread else [[self._allowed]]:
            places = [bits & alike for bits in domains for alike in self.alike]
            found = [nearest for bits in places if (nearest := self._nearest(bits))]
            if found:
                return min(found)[1]
        return None

    def take(self, index: int, chosen: Sequence[Unit]) -> list[PlannedReplica]:
        """Takes the sets for a replica."""
        size = self._request.needs.gpus
        parts: dict[Bits, PlannedReplica] = {}
        for position, unit in enumerate(chosen):
            node = self.changed.get(unit.node) or self._snapshot.at(unit.node)
            part, self.changed[unit.node] = take(index, node, Take(unit.gpus, WHOLE, 0), self._request)
            alone = len(chosen) == 1
            ranks = () if alone else tuple(range(position * size, (position + 1) * size))
            before = parts.get(unit.node)
            parts[unit.node] = replace(
                part,
                gpus=(*before.gpus, *part.gpus) if before else part.gpus,
                ranks=(*before.ranks, *ranks) if before else ranks,
                cpu_milli=part.cpu_milli + (before.cpu_milli if before else 0),
                memory_bytes=part.memory_bytes + (before.memory_bytes if before else 0),
            )
            self._units[unit.node].remove(unit)
        self._crowd.add(chosen[0].node)
        return list(parts.values())

    def _nearest(self, within: Bits) -> tuple[tuple[int, ...], list[Unit]] | None:
        """The best of the nodes for a replica, and how good they are; the least is best."""
        best: tuple[tuple[int, ...], list[Unit]] | None = None
        fastest = None
        wanted = self._request.stages
        for level, bits in self._snapshot.regions:
            region = bits & within
            if best is not None and best[0][:2] < (fastest or 0, level):
                break  # nothing is faster, and all that follow are wider
            groups = self.groups(region)
            if len(groups) < wanted:
                continue
            fastest = self._fastest(within) if fastest is None else fastest
            chosen = self._pick(groups)
            nodes = {unit.node for unit in chosen}
            key = (max(chosen).slowness, -1 if len(nodes) == 1 else level, len(nodes), len(groups), region)
            if best is None or key < best[0]:
                best = key, chosen
        return best

    def _fastest(self, within: Bits) -> int:
        """A bound on what any region can give."""
        return max(group[-1].slowness for group in self.groups(within)[: self._request.stages])

    def _pick(self, groups: list[list[Unit]]) -> list[Unit]:
        """As many of the groups as a replica has stages, none slower than need be, on the fewest nodes."""
        wanted = self._request.stages
        slowest = max(groups[wanted - 1]).slowness
        usable = [group for group in groups if max(group).slowness <= slowest]
        if self._request.parts > 1:
            return [unit for group in usable[:wanted] for unit in group]
        chosen = self._fewest_nodes((group[0] for group in usable), wanted)
        return sorted(chosen, key=lambda unit: (self._place(unit.node), unit.gpus))

    def _fewest_nodes(self, units: Iterable[Unit], count: int) -> list[Unit]:
        """So many of the units, node by node: the fullest use of each, the last one where the least is left."""
        by_node: dict[Bits, list[Unit]] = {}
        for unit in sorted(units):
            by_node.setdefault(unit.node, []).append(unit)
        rank = {bit: self._rank(bit) for bit in by_node}
        chosen: list[Unit] = []
        while len(chosen) < count:
            missing = count - len(chosen)
            enough = [bit for bit, found in by_node.items() if len(found) >= missing]
            if enough:
                bit = min(enough, key=lambda bit: (rank[bit][0], len(by_node[bit]), rank[bit]))
            else:
                bit = min(by_node, key=lambda bit: (rank[bit][0], -len(by_node[bit]), rank[bit]))
            chosen += by_node.pop(bit)[:missing]
        return chosen

    def _rank(self, bit: Bits) -> tuple[int, int, Bits]:
        """Which of two nodes with equal sets goes first."""
        node = self.changed.get(bit) or self._snapshot.at(bit)
        policy = self._request.policy
        crowded = self._crowd.on(bit)
        spread = crowded if policy in (Policy.SPREAD, Policy.ROUND_ROBIN) else 0
        free = -len(node.free) if policy is Policy.LEAST_LOADED else len(node.free)
        return spread, free if policy is not Policy.ROUND_ROBIN else 0, bit

    def _place(self, bit: Bits) -> tuple[tuple[str, ...], str]:
        """Sorts nodes so that those near each other are neighbours, as consecutive stages are."""
        node = self._snapshot.at(bit)
        return tuple(node.labels.get(label, "") for label in self._snapshot.near), node.name


def _units(node: Node, bit: Bits, request: Request) -> list[Unit]:
    """Disjoint sets that are free on a node: as many as there are, if a floor makes that a question."""
    needs = request.needs
    mask = node.free_mask(needs)
    sets: list[Gpus] = []
    if needs.floor:
        sets = node.shape.packed(mask, needs)
    else:
        while gpus := node.shape.best(mask, needs.gpus):
            sets.append(gpus)
            mask &= ~sum(1 << gpu for gpu in gpus)
    most = len(sets)
    for have, each in ((node.cpu_milli, request.cpu_milli), (node.memory_bytes, request.memory_bytes)):
        if each:
            most = min(most, have // each)
    return [
        Unit(-node.shape.mb_per_s(gpus) if len(gpus) > 1 else 0, bit, turn, gpus)
        for turn, gpus in enumerate(sets[:most])
    ]
