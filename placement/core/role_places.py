"""The possible places of a group's replicas beside others, and their cost; see :mod:`placement.core.roles`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.limits import eligible
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.offers import Bits
from placement.core.request import Place, Request
from placement.core.routes import (
    Gpus,
    Member,
    RoleLink,
    Roles,
    Route,
    Via,
    fastest_nvlink,
    meets,
    on_node,
    route,
)
from placement.core.snapshot import Snapshot
from placement.core.topology import PATH_ORDER, Topology
from placement.core.twins import twins_of
from placement.errors import BelowFloor, Unplaceable

MOST_SETS = 3_000
"""How many sets of GPUs of one node are considered for one replica; the slowest are left out."""

Cost = tuple[int, int, int, int]
"""Routes that leave a node, by how far; slowness of the sets, and of the routes; steps of PCIe between GPUs that talk.

Each is at least 0: a speed counts as its difference from :data:`_FASTEST`.
"""

NOTHING: Cost = (0, 0, 0, 0)
_FASTEST = 1 << 32
"""MB/s; faster than any link."""


def plus(one: Cost, other: Cost, times: int = 1) -> Cost:
    """The sum of two costs, the second multiplied by a number."""
    a, b, c, d = other
    return one[0] + times * a, one[1] + times * b, one[2] + times * c, one[3] + times * d


Level = tuple[int, int]
"""Level and slowness of a route, for comparison."""

NONE: Level = (-3, -_FASTEST)
"""Better than any route: the value if there is none."""


class Left(NamedTuple):
    """What is left of a node: free GPUs as a bit mask, CPUs and memory."""

    mask: int
    cpu_milli: int
    memory_bytes: int


class Option(NamedTuple):
    """A place for a replica. Sorts from the best to the worst."""

    worst: Level
    cost: Cost
    crowd: int
    loss: tuple[int, ...]
    free: int
    bit: Bits
    gpus: Gpus


@dataclass
class Partial:
    """Where replicas are, while others are being placed.

    Attributes:
        limit: no route is slower.
        left: what is left of the nodes that have been used.
        at: where replicas are.
        crowd: (node, deployment) -> how many replicas have been placed there.
        seen: how many places have been considered.
    """

    limit: Level
    left: dict[Bits, Left]
    at: dict[Member, tuple[Bits, Gpus]]
    crowd: dict[tuple[Bits, str], int] = field(default_factory=dict)
    seen: int = 0


class Places:
    """The places that the replicas of a group may have.

    Args:
        snapshot, roles, requests, standing: as in :func:`placement.core.roles.plan`.
        floors: whether the links' floors count.

    Attributes:
        roles: as given.
        missing: the replicas that have no place.
        todo: the missing replicas in the order in which to place them, unit by unit.
        bounded: places were left out that might be better.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        roles: Roles,
        requests: Mapping[str, Request],
        standing: Mapping[Member, Place],
        floors: bool = True,
    ) -> None:
        self._snapshot, self.roles, self._requests, self._floors = snapshot, roles, requests, floors
        self._allowed = {name: eligible(snapshot, request) for name, request in requests.items()}
        self._stands = {
            member: (bit, place.gpus)
            for member, place in standing.items()
            if (bit := snapshot.bit(place.node_id))
        }
        self._partners: dict[str, list[tuple[RoleLink, str]]] = {name: [] for name in roles.counts}
        for link in roles.links:
            one, other = link.between
            self._partners[one].append((link, other))
            self._partners[other].append((link, one))
        largest_first = sorted(roles.counts, key=lambda name: -requests[name].needs.gpus)
        self.missing = {(name, index) for name, request in requests.items() for index in request.replicas}
        self.todo = [
            member
            for unit in range(roles.units)
            for name in largest_first
            for member in roles.members(unit, name)
            if member in self.missing
        ]
        self.bounded = False
        self._is_connected = self._all_talk()
        self._fastest_sets: dict[str, int] = {}
        self._fastest_ways: dict[Via, tuple[int, int]] = {}
        self._exact_gpus = any(request.needs.free_memory_bytes for request in requests.values())
        self._kinds: dict[int, list[int]] = {}
        self._sets: dict[tuple[int, int, Needs], list[tuple[int, tuple[int, ...], Gpus]]] = {}
        self._routes: dict[tuple[Via, Bits, Gpus, Bits, Gpus], tuple[Route, int]] = {}
        self._classes = self._alike()
        self._touched: dict[Bits, Left] = {bit: self._whole(bit) for bit, _ in self._stands.values()}

    def without_nvlink(self) -> Unplaceable | None:
        """Why a link via NVLink is impossible on all nodes; ``None`` if it is possible."""
        for link in self.roles.links:
            if link.via is not Via.NVLINK or not self.missing:
                continue
            nodes = list(self._nodes(self._allowed[link.between[0]] | self._allowed[link.between[1]]))
            has = any(
                GPU_DOMAIN_LABEL in node.labels
                or any(fastest_nvlink(node, gpu) for gpu in range(len(node.topology)))
                for node in nodes
            )
            if nodes and not has:
                names = " and ".join(link.between)
                return BelowFloor(
                    self.roles.name,
                    f"the link between {names} is via 'nvlink', and no node that they may go to is known to have "
                    "NVLink",
                    {"has no NVLink": len(nodes)},
                    "set its via to 'pcie' or 'network', whichever their transport uses, or add a node with NVLink",
                )
        return None

    def _nodes(self, bits: Bits) -> Iterator[Node]:
        return (self._snapshot.at(bit) for bit in _each(bits))

    def _whole(self, bit: Bits) -> Left:
        node = self._snapshot.at(bit)
        return Left(node.mask, node.cpu_milli, node.memory_bytes)

    def _alike(self) -> list[list[Bits]]:
        """The nodes that may be used, in classes of interchangeable nodes."""
        labels = {*self._snapshot.near, GPU_DOMAIN_LABEL, *(link.within for link in self.roles.links)}
        takes = any(request.cpu_milli or request.memory_bytes for request in self._requests.values())
        anywhere = 0
        for bits in self._allowed.values():
            anywhere |= bits
        classes: dict[object, list[Bits]] = {}
        for bit in _each(anywhere):
            node = self._snapshot.at(bit)
            key = (
                id(node.topology),
                tuple(
                    (
                        bool(bit & self._allowed[name]),
                        node.free_mask(request.needs),
                        node.deployments.get(name, 0),
                    )
                    for name, request in self._requests.items()
                ),
                (node.cpu_milli, node.memory_bytes) if takes else (),
                tuple(node.labels.get(label) for label in sorted(labels)),
            )
            classes.setdefault(key, []).append(bit)
        return list(classes.values())

    def options(self, now: Partial, member: Member, to_come: Sequence[Member]) -> list[Option]:
        """The places that a replica may have now, the best first.

        Args:
            now: where others are.
            member: the replica.
            to_come: the replica, and those of its unit that come after it.
        """
        name = member[0]
        request, allowed, found = self._requests[name], self._allowed[name], []
        unit = self.roles.unit_of(member)
        talks = [
            (link, now.at[other])
            for link, partner in self._partners[name]
            for other in self.roles.members(unit, partner)
            if other in now.at
        ]
        together = self._is_connected and now.limit[0] == -2
        wanted = sum(self._requests[one].needs.gpus for one, _ in to_come) if together else 0
        bits = [bit for bit in now.left if bit & allowed]
        if together and talks:
            bits = [bit for bit in bits if bit == talks[0][1][0]]
        for alike in self._classes if not (together and talks) else ():
            if alike[0] & allowed and (bit := next((one for one in alike if one not in now.left), 0)):
                bits.append(bit)
        for bit in bits:
            left = now.left.get(bit) or self._whole(bit)
            if left.cpu_milli < request.cpu_milli or left.memory_bytes < request.memory_bytes:
                continue
            if left.mask.bit_count() < wanted:
                continue
            node = self._snapshot.at(bit)
            crowd = node.deployments.get(name, 0) + now.crowd.get((bit, name), 0)
            mask = left.mask if not self._exact_gpus else left.mask & node.free_mask(request.needs)
            sets = self._sets_on(node, mask, request.needs)
            now.seen += len(sets)
            for slowness, loss, gpus in sets:
                worst, cost = NONE, (0, _FASTEST + slowness, 0, 0)
                for link, place in talks:
                    way, steps = self._route(link.via, (bit, gpus), place)
                    level = way.level, way.slowness
                    there = self._snapshot.at(place[0]), place[1]
                    if level > now.limit or (self._floors and not meets(link, way, (node, gpus), there)):
                        break
                    worst = max(worst, level)
                    cost = plus(cost, (way.level + 2, 0, _FASTEST + way.slowness, steps))
                else:
                    free = mask.bit_count()
                    found.append(Option(worst, cost, crowd, loss, free, bit, gpus))
        found.sort()
        return found

    def _sets_on(self, node: Node, mask: int, needs: Needs) -> list[tuple[int, tuple[int, ...], Gpus]]:
        """Sets of free GPUs that meet the floors: slowness, the loss to others, and the GPUs."""
        key = id(node.topology), mask, needs
        if key not in self._sets:
            found = []
            before = node.shape.on_offer(mask)
            for gpus in self._picks(node.topology, mask, needs.gpus):
                taken = sum(1 << gpu for gpu in gpus)
                offer = node.shape.offer(taken, needs.gpus, needs.within)
                if offer is not None and offer.slowness <= needs.slowest:
                    after = node.shape.on_offer(mask & ~taken)
                    loss = tuple(a - b for a, b in zip(before, after, strict=True))
                    found.append((offer.slowness, loss, gpus))
            found.sort()
            self.bounded |= len(found) > MOST_SETS
            self._sets[key] = found[:MOST_SETS]
        return self._sets[key]

    def _picks(self, topology: Topology, mask: int, count: int) -> Iterator[Gpus]:
        """The sets of ``count`` free GPUs; of sets that differ only in twins, the lowest."""
        key = id(topology)
        if key not in self._kinds:
            gpus = range(len(topology))
            ways = tuple(tuple((topology.link(a, b), topology.pcie_path(a, b)) for b in gpus) for a in gpus)
            near = [(topology.numa[gpu], topology.nearest_nic[gpu], gpu * self._exact_gpus) for gpu in gpus]
            self._kinds[key] = [sum(1 << gpu for gpu in kind) for kind in twins_of(ways, near)]
        pools = [
            [gpu for gpu in range(len(topology)) if (mask & kind) >> gpu & 1] for kind in self._kinds[key]
        ]

        def pick(pools: Sequence[list[int]], count: int) -> Iterator[Gpus]:
            if not count:
                yield ()
            elif pools:
                for taken in range(min(count, len(pools[0])), -1, -1):
                    for rest in pick(pools[1:], count - taken):
                        yield (*pools[0][:taken], *rest)

        return (tuple(sorted(gpus)) for gpus in pick(pools, count))

    def _route(self, via: Via, one: tuple[Bits, Gpus], other: tuple[Bits, Gpus]) -> tuple[Route, int]:
        """The route between two places, and how far apart their GPUs are by PCIe, in sum."""
        key = (via, *one, *other)
        if key not in self._routes:
            a, b = self._snapshot.at(one[0]), self._snapshot.at(other[0])
            steps = 0
            if one[0] == other[0]:
                steps = sum(PATH_ORDER[a.topology.pcie_path(*pair)] for pair in product(one[1], other[1]))
            self._routes[key] = route(self._snapshot.near, via, (a, one[1]), (b, other[1])), steps
        return self._routes[key]

    def least(self, member: Member, before: Sequence[Member]) -> Cost:
        """A lower bound of a replica's cost beside others of its unit."""
        name, needs = member[0], self._requests[member[0]].needs
        if name not in self._fastest_sets:
            sets = [
                found[0][0]
                for alike in self._classes
                if alike[0] & self._allowed[name]
                and (
                    found := self._sets_on(node := self._snapshot.at(alike[0]), node.free_mask(needs), needs)
                )
            ]
            self._fastest_sets[name] = min(sets, default=-_FASTEST)
        cost: Cost = (0, _FASTEST + self._fastest_sets[name], 0, 0)
        for link, partner in self._partners[name]:
            slowness, steps = self._fastest_way(link.via)
            pairs = needs.gpus * self._requests[partner].needs.gpus
            times = sum(other == partner for other, _ in before)
            cost = plus(cost, (0, 0, _FASTEST + slowness, steps * pairs), times)
        return cost

    def _fastest_way(self, via: Via) -> tuple[int, int]:
        """The fastest route on a node, and the nearest two GPUs by PCIe: lower bounds of the cost."""
        if via not in self._fastest_ways:
            machines = {
                id(node.topology): node.topology for node in self._nodes(sum(c[0] for c in self._classes))
            }
            ways = [
                (on_node(machine, via, (a,), (b,)).slowness, PATH_ORDER[machine.pcie_path(a, b)])
                for machine in machines.values()
                for b in range(len(machine))
                for a in range(b)
            ]
            slowness, steps = (min(each) for each in zip(*ways, strict=True)) if ways else (-_FASTEST, 0)
            self._fastest_ways[via] = slowness, steps
        return self._fastest_ways[via]

    def _all_talk(self) -> bool:
        """Whether links join all roles, directly or through others."""
        reached = {*[*self.roles.counts][:1]}
        for _ in self.roles.counts:
            reached |= {other for name in reached for _, other in self._partners[name]}
        return reached == self.roles.counts.keys()

    def standing_of(self, unit: int) -> list[Member]:
        """The placed replicas of a unit."""
        return [member for member in self._stands if self.roles.unit_of(member) == unit]

    def begin(self, limit: Level) -> Partial:
        """The placed replicas and their nodes; no new route may be slower than ``limit``."""
        return Partial(limit, dict(self._touched), self.placed())

    def placed(self) -> dict[Member, tuple[Bits, Gpus]]:
        """The placed replicas."""
        return dict(self._stands)

    def taken(self, name: str, left: Left | None, option: Option) -> Left:
        """A node after a replica was placed there."""
        request, left = self._requests[name], left or self._whole(option.bit)
        return Left(
            left.mask & ~sum(1 << gpu for gpu in option.gpus),
            left.cpu_milli - request.cpu_milli,
            left.memory_bytes - request.memory_bytes,
        )

    def units(self, todo: Sequence[Member]) -> list[int]:
        """The unit of each replica."""
        return [self.roles.unit_of(member) for member in todo]


def _each(bits: Bits) -> Iterator[Bits]:
    while bits:
        bit = bits & -bits
        bits ^= bit
        yield bit
