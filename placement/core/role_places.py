"""The places that a replica of a group may have beside others, and what each costs; see :mod:`placement.core.roles`."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.limits import eligible
from placement.core.needs import WHOLE, Needs
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
"""So many sets of GPUs of one node are looked at for one replica; the slowest are left out."""

Cost = tuple[int, int, int, int]
"""Routes that leave a node, by how far; slowness of the sets, and of the routes; steps of PCIe between GPUs that talk.

Each at least 0: of speeds, what is missing to :data:`_FASTEST`. Steps are those of whole GPUs.
"""

NOTHING: Cost = (0, 0, 0, 0)
_FASTEST = 1 << 32
"""MB/s; faster than anything."""


def plus(one: Cost, other: Cost, times: int = 1) -> Cost:
    """The cost of both, of the other so many times."""
    a, b, c, d = other
    return one[0] + times * a, one[1] + times * b, one[2] + times * c, one[3] + times * d


Level = tuple[int, int]
"""Level and slowness of a route, to be compared."""

NONE: Level = (-3, -_FASTEST)
"""Better than any: of no route."""


class Left(NamedTuple):
    """What is left of a node: slots wholly free as a bit mask, thousandths by GPU that is shared, CPUs and memory."""

    mask: int
    rests: tuple[tuple[int, int], ...]
    cpu_milli: int
    memory_bytes: int


class Option(NamedTuple):
    """A place for a replica. Sorts from the most to the least welcome."""

    worst: Level
    cost: Cost
    crowd: int
    loss: tuple[int, ...]
    free: int
    bit: Bits
    gpus: Gpus


@dataclass
class Partial:
    """Where some replicas are, while others are being placed.

    Attributes:
        limit: no route is slower.
        left: what is left of the nodes that are not like others any more.
        at: where replicas are.
        crowd: (node, deployment) -> how many replicas have been placed there.
        seen: how many places have been looked at.
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
        floors: whether those of the links count.

    Attributes:
        roles: as given.
        missing: the replicas that have no place.
        todo: the same in the order in which to place them, unit by unit.
        bounded: something was left out that might be better.
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
        largest_first = sorted(roles.counts, key=lambda name: _smallness(requests[name].needs))
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
        self._fastest_ways: dict[tuple[Via, bool], tuple[int, int]] = {}
        self._named = [name for name, request in requests.items() if request.needs.named]
        self._exact_gpus = any(
            request.needs.free_memory_bytes or request.needs.named for request in requests.values()
        )
        self._kinds: dict[int, list[int]] = {}
        self._sets: dict[tuple[int, int, Needs], list[tuple[int, tuple[int, ...], Gpus]]] = {}
        self._routes: dict[tuple[Via, Bits, Gpus, Bits, Gpus], tuple[Route, int]] = {}
        self._classes = self._alike()
        self._touched: dict[Bits, Left] = {bit: self._whole(bit) for bit, _ in self._stands.values()}

    def without_nvlink(self) -> Unplaceable | None:
        """Why a transport over NVLink cannot be had at all, if that is so."""
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
        slots = sum(1 << slot for slot in node.instances)
        return Left(node.mask | slots, tuple(sorted(node.rests.items())), node.cpu_milli, node.memory_bytes)

    def _alike(self) -> list[list[Bits]]:
        """The nodes that may be used, in classes of which any may stand for any other."""
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
                        _usable(node, request.needs),
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
        """The places that a replica may have now, the most welcome first.

        Args:
            now: where others are.
            member: the replica.
            to_come: it, and those of its unit that come after it.
        """
        name = member[0]
        request, allowed, found = self._requests[name], self._allowed[name], []
        unit = self.roles.unit_of(member)
        talks = [
            (link, now.at[other], self._steps(name, partner))
            for link, partner in self._partners[name]
            for other in self.roles.members(unit, partner)
            if other in now.at
        ]
        together = self._is_connected and now.limit[0] == -2
        known = {} if request.needs.whole else self._known(now, unit)
        whole = (needs.gpus for one, _ in to_come if (needs := self._requests[one].needs).whole)
        wanted = sum(whole) if together else 0
        allowed &= self.homes(now).get(name, allowed)
        bits = [bit for bit in now.left if bit & allowed]
        if together and talks:
            bits = [bit for bit in bits if bit == talks[0][1][0]]
        for alike in self._classes if not (together and talks) else ():
            if bit := next((one for one in alike if one & allowed and one not in now.left), 0):
                bits.append(bit)
        for bit in bits:
            left = now.left.get(bit) or self._whole(bit)
            if left.cpu_milli < request.cpu_milli or left.memory_bytes < request.memory_bytes:
                continue
            if left.mask.bit_count() < wanted:
                continue
            node = self._snapshot.at(bit)
            crowd = node.deployments.get(name, 0) + now.crowd.get((bit, name), 0)
            if request.needs.whole:
                sets = self._sets_on(node, left.mask & node.free_mask(request.needs), request.needs)
            else:
                sets = self._single_on(node, left, request.needs, known.get(bit, ()))
            now.seen += len(sets)
            for slowness, loss, gpus in sets:
                worst, cost = NONE, (0, _FASTEST + slowness, 0, 0)
                for link, place, counts in talks:
                    way, steps = self._route(link.via, (bit, gpus), place)
                    level = way.level, way.slowness
                    there = self._snapshot.at(place[0]), place[1]
                    if level > now.limit or (self._floors and not meets(link, way, (node, gpus), there)):
                        break
                    worst = max(worst, level)
                    cost = plus(cost, (way.level + 2, 0, _FASTEST + way.slowness, steps * counts))
                else:
                    free = left.mask.bit_count()
                    found.append(Option(worst, cost, crowd, loss, free, bit, gpus))
        found.sort()
        return found

    def _sets_on(self, node: Node, mask: int, needs: Needs) -> list[tuple[int, tuple[int, ...], Gpus]]:
        """Sets of free GPUs that are good enough: slowness, what others lose by it, and the GPUs."""
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

    def _single_on(
        self, node: Node, left: Left, needs: Needs, known: Collection[int]
    ) -> list[tuple[int, tuple[int, ...], Gpus]]:
        """The same where a MIG instance or a share of a GPU is asked for: the fullest GPUs with room for it first.

        Args:
            node: the node.
            left: what is left of it.
            needs: what is asked for.
            known: GPUs that are like no others, as replicas are there that others may come to talk to.
        """
        topology = node.topology
        if needs.profile:
            slots = left.mask & sum(1 << slot for slot in node.instances_for(needs))
            return [(0, (), gpus) for gpus in self._picks(topology, slots, 1)]
        share = needs.share_of(node.gpu_memory_bytes)
        if share is None:
            return []
        alike: dict[object, tuple[int, tuple[int, ...], Gpus]] = {}
        for gpu, rest in left.rests:
            if rest >= share and _has_room(node, gpu, needs):
                kind = next(i for i, kind in enumerate(self._kinds_of(topology)) if kind >> gpu & 1)
                alike.setdefault(gpu if gpu in known else (kind, rest), (0, (-1, rest), (gpu,)))
        whole = self._sets_on(node, left.mask & node.free_mask(needs), Needs(1))
        return sorted(alike.values()) + whole

    def _known(self, now: Partial, unit: int) -> dict[Bits, list[int]]:
        """Node -> the GPUs there on which replicas of a unit are, or such as stand."""
        found: dict[Bits, list[int]] = {}
        for member, (bit, gpus) in now.at.items():
            if member in self._stands or self.roles.unit_of(member) == unit:
                found.setdefault(bit, []).extend(gpus)
        return found

    def _kinds_of(self, topology: Topology) -> list[int]:
        """The GPUs of a machine as bit masks of such as can change places."""
        key = id(topology)
        if key not in self._kinds:
            gpus = range(len(topology))
            ways = tuple(tuple((topology.link(a, b), topology.pcie_path(a, b)) for b in gpus) for a in gpus)
            near = [(topology.numa[gpu], topology.nearest_nic[gpu], gpu * self._exact_gpus) for gpu in gpus]
            self._kinds[key] = [sum(1 << gpu for gpu in kind) for kind in twins_of(ways, near)]
        return self._kinds[key]

    def _picks(self, topology: Topology, mask: int, count: int) -> Iterator[Gpus]:
        """The sets of so many free GPUs; of those that differ in twins alone, the lowest."""
        gpus = range(len(topology))
        pools = [[gpu for gpu in gpus if (mask & kind) >> gpu & 1] for kind in self._kinds_of(topology)]

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
            if one[0] == other[0] and one[1] != other[1]:
                steps = sum(PATH_ORDER[a.topology.pcie_path(*pair)] for pair in product(one[1], other[1]))
            self._routes[key] = route(self._snapshot.near, via, (a, one[1]), (b, other[1])), steps
        return self._routes[key]

    def least(self, member: Member, before: Sequence[Member]) -> Cost:
        """No place for a replica costs less, beside others of its unit."""
        name, needs = member[0], self._requests[member[0]].needs
        if needs.gpus == 1:
            self._fastest_sets[name] = 0
        elif name not in self._fastest_sets:
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
            other_needs = self._requests[partner].needs
            slowness, steps = self._fastest_way(link.via, needs.shared and other_needs.shared)
            pairs = needs.gpus * other_needs.gpus * self._steps(name, partner)
            times = sum(other == partner for other, _ in before)
            cost = plus(cost, (0, 0, _FASTEST + slowness, steps * pairs), times)
        return cost

    def _steps(self, name: str, partner: str) -> bool:
        """Whether the steps between GPUs of two roles count: no whole GPU is to be shared for them alone."""
        return self._requests[name].needs.whole and self._requests[partner].needs.whole

    def _fastest_way(self, via: Via, shared: bool) -> tuple[int, int]:
        """No route on a node is faster, and no two GPUs are nearer to each other by PCIe.

        Args:
            via: what the transport can use.
            shared: both ends may be on one GPU.
        """
        key = via, shared
        if key not in self._fastest_ways:
            machines = {
                id(node.topology): node.topology for node in self._nodes(sum(c[0] for c in self._classes))
            }
            ways = [
                (on_node(machine, via, (a,), (b,)).slowness, PATH_ORDER[machine.pcie_path(a, b)])
                for machine in machines.values()
                for b in range(len(machine))
                for a in range(b + shared)
            ]
            slowness, steps = (min(each) for each in zip(*ways, strict=True)) if ways else (-_FASTEST, 0)
            self._fastest_ways[key] = slowness, steps
        return self._fastest_ways[key]

    def _all_talk(self) -> bool:
        """Whether links join all roles, directly or over others."""
        reached = {*[*self.roles.counts][:1]}
        for _ in self.roles.counts:
            reached |= {other for name in reached for _, other in self._partners[name]}
        return reached == self.roles.counts.keys()

    def standing_of(self, unit: int) -> list[Member]:
        """What stands of a unit."""
        return [member for member in self._stands if self.roles.unit_of(member) == unit]

    def homes(self, now: Partial) -> dict[str, Bits]:
        """The node of each deployment that names GPUs, which are all of one node, once a replica of it is there."""
        if not self._named:
            return {}
        return {name: bit for (name, _), (bit, _) in now.at.items() if name in self._named}

    def begin(self, limit: Level) -> Partial:
        """What stands, and the nodes where it does; no route of what is placed is to be slower."""
        return Partial(limit, dict(self._touched), self.placed())

    def placed(self) -> dict[Member, tuple[Bits, Gpus]]:
        """What stands."""
        return dict(self._stands)

    def taken(self, name: str, left: Left | None, option: Option) -> Left:
        """A node once a replica is there."""
        request, left = self._requests[name], left or self._whole(option.bit)
        rests = left.rests
        if request.needs.shared:
            [gpu], share = option.gpus, request.needs.share_of(self._snapshot.at(option.bit).gpu_memory_bytes)
            rests = tuple(sorted(({**dict(rests), gpu: dict(rests).get(gpu, WHOLE) - (share or 0)}).items()))
        return Left(
            left.mask & ~sum(1 << gpu for gpu in option.gpus),
            rests,
            left.cpu_milli - request.cpu_milli,
            left.memory_bytes - request.memory_bytes,
        )

    def units(self, todo: Sequence[Member]) -> list[int]:
        """The unit of each."""
        return [self.roles.unit_of(member) for member in todo]


def _smallness(needs: Needs) -> tuple[int, bool, int]:
    """Sorts what is asked for, the largest first."""
    return -needs.gpus, not needs.whole, -needs.share


def _has_room(node: Node, gpu: int, needs: Needs) -> bool:
    """Whether a GPU that is shared will do by its name, and by how much free memory it has."""
    named = node.named_mask(needs) >> gpu & 1
    return bool(named) and node.free_memory.get(gpu, 0) >= needs.free_memory_bytes


def _usable(node: Node, needs: Needs) -> Hashable:
    """What of a node will do for a replica."""
    if needs.profile:
        return tuple(sorted(node.instances_for(needs)))
    if needs.whole:
        return node.free_mask(needs)
    memory = node.gpu_memory_bytes if needs.memory_bytes else None
    return node.free_mask(needs), memory, tuple(sorted(node.shared_with_room(needs, 1)))


def _each(bits: Bits) -> Iterator[Bits]:
    while bits:
        bit = bits & -bits
        bits ^= bit
        yield bit
