"""The search for the places of a group: depth first, replica after replica; see :mod:`placement.core.roles`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

STEPS = 20_000
"""So many places one round of the search looks at, and then it only goes on as it would if each first choice were the
best; there are a few rounds. Some tenths of a second each."""

MOST_SETS = 3_000
"""So many sets of GPUs of one node are looked at for one replica; the slowest are left out."""

Cost = tuple[int, int, int, int]
"""Routes that leave a node, by how far; slowness of the sets, and of the routes; steps of PCIe between GPUs that talk.

Each at least 0: of speeds, what is missing to :data:`_FASTEST`.
"""

_NOTHING: Cost = (0, 0, 0, 0)
_FASTEST = 1 << 32
"""MB/s; faster than anything."""


def _plus(one: Cost, other: Cost, times: int = 1) -> Cost:
    a, b, c, d = other
    return one[0] + times * a, one[1] + times * b, one[2] + times * c, one[3] + times * d


Level = tuple[int, int]
"""Level and slowness of a route, to be compared."""

_ANY: Level = (1 << 30, 0)
_NONE: Level = (-3, -_FASTEST)


class _Left(NamedTuple):
    """What is left of a node: free GPUs as a bit mask, CPUs and memory."""

    mask: int
    cpu_milli: int
    memory_bytes: int


class _Option(NamedTuple):
    """A place for a replica. Sorts from the most to the least welcome."""

    worst: Level
    cost: Cost
    crowd: int
    loss: tuple[int, ...]
    free: int
    bit: Bits
    gpus: Gpus


class _Found(NamedTuple):
    """Places for some replicas.

    Attributes:
        worst: the slowest route between two that talk.
        at: where all are, also those that stand.
    """

    worst: Level
    cost: Cost
    at: dict[Member, tuple[Bits, Gpus]]


class Search:
    """The places that a group may have.

    Args:
        snapshot, roles, requests, standing: as in :func:`placement.core.roles.plan`.
        floors: whether those of the links count.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        roles: Roles,
        requests: Mapping[str, Request],
        standing: Mapping[Member, Place],
        floors: bool = True,
    ) -> None:
        self._snapshot, self._roles, self._requests, self._floors = snapshot, roles, requests, floors
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
        self._touched: dict[Bits, _Left] = {bit: self._whole(bit) for bit, _ in self._stands.values()}

    def without_nvlink(self) -> Unplaceable | None:
        """Why a transport over NVLink cannot be had at all, if that is so."""
        for link in self._roles.links:
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
                    self._roles.name,
                    f"the link between {names} is via 'nvlink', and no node that they may go to is known to have "
                    "NVLink",
                    {"has no NVLink": len(nodes)},
                    "set its via to 'pcie' or 'network', whichever their transport uses, or add a node with NVLink",
                )
        return None

    def solve(self, todo: Sequence[Member]) -> _Found | None:
        """The best places for some of the replicas, by whole units; ``None`` if there are none."""
        if not todo:
            return _Found(_NONE, _NOTHING, self.placed())
        stood = {self._roles.unit_of(member) for member in self._stands}
        fresh = [member for member in todo if self._roles.unit_of(member) not in stood]
        unit = [one for one in fresh if self._roles.unit_of(one) == self._roles.unit_of(fresh[0])]
        several = 0 < len(unit) < len(todo)
        best: _Found | None = None
        least = _NONE
        if several:  # no unit of several can do better than one does alone
            alone = self.solve(unit)
            if alone is None:
                return None
            least = alone.worst
            best = _Run(self, todo, least).first()
        if best is None:
            best = _Run(self, todo, _ANY).first()
            while best is not None and best.worst > least:
                better = _Run(self, todo, (best.worst[0], best.worst[1] - 1)).first()
                if better is None:
                    break
                best = better
        if best is None:
            return None
        bound = _NOTHING
        if several and not self.bounded:
            alone = _Run(self, unit, best.worst).best()
            bound = alone.cost if alone is not None and not self.bounded else _NOTHING
        return _Run(self, todo, best.worst, bound, stood).best() or best

    # -- what the search asks of nodes -----------------------------------------------------------

    def _nodes(self, bits: Bits) -> Iterator[Node]:
        return (self._snapshot.at(bit) for bit in _each(bits))

    def _whole(self, bit: Bits) -> _Left:
        node = self._snapshot.at(bit)
        return _Left(node.mask, node.cpu_milli, node.memory_bytes)

    def _alike(self) -> list[list[Bits]]:
        """The nodes that may be used, in classes of which any may stand for any other."""
        labels = {*self._snapshot.near, GPU_DOMAIN_LABEL, *(link.within for link in self._roles.links)}
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

    def options(self, run: _Run, member: Member) -> list[_Option]:
        """The places that a replica may have now, the most welcome first."""
        name = member[0]
        request, allowed, found = self._requests[name], self._allowed[name], []
        unit = self._roles.unit_of(member)
        talks = [
            (link, run.at[other])
            for link, partner in self._partners[name]
            for other in self._roles.members(unit, partner)
            if other in run.at
        ]
        together = self._is_connected and run.limit[0] == -2
        wanted = run.gpus_to_come() if together else 0
        bits = [bit for bit in run.left if bit & allowed]
        if together and talks:
            bits = [bit for bit in bits if bit == talks[0][1][0]]
        for alike in self._classes if not (together and talks) else ():
            if alike[0] & allowed and (bit := next((one for one in alike if one not in run.left), 0)):
                bits.append(bit)
        for bit in bits:
            left = run.left.get(bit) or self._whole(bit)
            if left.cpu_milli < request.cpu_milli or left.memory_bytes < request.memory_bytes:
                continue
            if left.mask.bit_count() < wanted:
                continue
            node = self._snapshot.at(bit)
            crowd = node.deployments.get(name, 0) + run.crowd.get((bit, name), 0)
            mask = left.mask if not self._exact_gpus else left.mask & node.free_mask(request.needs)
            sets = self._sets_on(node, mask, request.needs)
            run.seen += len(sets)
            for slowness, loss, gpus in sets:
                worst, cost = _NONE, (0, _FASTEST + slowness, 0, 0)
                for link, place in talks:
                    way, steps = self._route(link.via, (bit, gpus), place)
                    level = way.level, way.slowness
                    there = self._snapshot.at(place[0]), place[1]
                    if level > run.limit or (self._floors and not meets(link, way, (node, gpus), there)):
                        break
                    worst = max(worst, level)
                    cost = _plus(cost, (way.level + 2, 0, _FASTEST + way.slowness, steps))
                else:
                    free = mask.bit_count()
                    found.append(_Option(worst, cost, crowd, loss, free, bit, gpus))
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

    def _picks(self, topology: Topology, mask: int, count: int) -> Iterator[Gpus]:
        """The sets of so many free GPUs; of those that differ in twins alone, the lowest."""
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
        """No place for a replica costs less, beside others of its unit."""
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
            cost = _plus(cost, (0, 0, _FASTEST + slowness, steps * pairs), times)
        return cost

    def _fastest_way(self, via: Via) -> tuple[int, int]:
        """No route on a node is faster, and no two GPUs are nearer to each other by PCIe."""
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
        """Whether links join all roles, directly or over others."""
        reached = {*[*self._roles.counts][:1]}
        for _ in self._roles.counts:
            reached |= {other for name in reached for _, other in self._partners[name]}
        return reached == self._roles.counts.keys()

    def gpus(self, members: Iterable[Member]) -> int:
        """GPUs of some replicas."""
        return sum(self._requests[name].needs.gpus for name, _ in members)

    def standing_of(self, unit: int) -> list[Member]:
        """What stands of a unit."""
        return [member for member in self._stands if self._roles.unit_of(member) == unit]

    def start(self) -> dict[Bits, _Left]:
        """The nodes that are not like others, as they are to begin with."""
        return dict(self._touched)

    def placed(self) -> dict[Member, tuple[Bits, Gpus]]:
        """What stands."""
        return dict(self._stands)

    def taken(self, name: str, left: _Left | None, option: _Option) -> _Left:
        """A node once a replica is there."""
        request, left = self._requests[name], left or self._whole(option.bit)
        return _Left(
            left.mask & ~sum(1 << gpu for gpu in option.gpus),
            left.cpu_milli - request.cpu_milli,
            left.memory_bytes - request.memory_bytes,
        )

    def units(self, todo: Sequence[Member]) -> list[int]:
        """The unit of each."""
        return [self._roles.unit_of(member) for member in todo]


class _Run:
    """One search: depth first, replica after replica, the most welcome place first.

    Args:
        search: the places.
        todo: the replicas, unit by unit.
        limit: no route is slower.
        bound: the least that a unit costs of which nothing stands.
        stood: the units of which something does.

    Attributes:
        limit: as given.
        left: what is left of the nodes that are not like others any more.
        at: where replicas are.
        crowd: (node, deployment) -> how many replicas have been placed there.
        seen: how many places have been looked at.
    """

    def __init__(
        self,
        search: Search,
        todo: Sequence[Member],
        limit: Level,
        bound: Cost = _NOTHING,
        stood: Iterable[int] = (),
    ) -> None:
        self._search, self._todo, self.limit = search, todo, limit
        units, known, ends = search.units(todo), set(stood), len(todo)
        self._begins = [units.index(unit) for unit in units]
        self._ends = [len(units) - units[::-1].index(unit) for unit in units]
        self._least = [_NOTHING] * (ends + 1)
        """All replicas from one on cost no less than this."""
        for i in range(ends - 1, -1, -1):
            before = [*search.standing_of(units[i]), *todo[self._begins[i] : i]]
            self._least[i] = _plus(self._least[i + 1], search.least(todo[i], before))
            if i == self._begins[i] and units[i] not in known:
                self._least[i] = max(self._least[i], _plus(self._least[self._ends[i]], bound))
        self.left, self.at = search.start(), search.placed()
        self.crowd: dict[tuple[Bits, str], int] = {}
        self._states: dict[object, Cost] = {}
        self._found: _Found | None = None
        self._any = False
        self._now = 0
        self.seen = 0

    def gpus_to_come(self) -> int:
        """GPUs of the replica that is being placed, and of those of its unit that come after it."""
        return self._search.gpus(self._todo[self._now : self._ends[self._now]])

    def first(self) -> _Found | None:
        """Any places."""
        self._any = True
        return self.best()

    def best(self) -> _Found | None:
        """The places that cost least."""
        self._dive(0, _NONE, _NOTHING)
        return self._found

    def _dive(self, i: int, worst: Level, cost: Cost) -> bool:
        """Places what is left from one replica on; whether nothing better can come."""
        if i == len(self._todo):
            self._found = _Found(worst, cost, dict(self.at))
            return self._any or cost <= self._least[0]
        member = self._todo[i]
        name = member[0]
        unit = sorted((one, self.at[one, index]) for one, index in self._todo[self._begins[i] : i])
        state = i, tuple(unit), tuple(sorted(self.left.items()))
        if state in self._states and (self._any or self._states[state] <= cost):
            return False
        self._states[state] = cost
        self._now = i
        for turn, option in enumerate(self._search.options(self, member)):
            later = _plus(cost, option.cost)
            if self._found is not None and _plus(later, self._least[i + 1]) >= self._found.cost:
                continue
            if turn and self.seen > STEPS:
                self._search.bounded = True
                return True
            bit, before = option.bit, self.left.get(option.bit)
            self.left[bit] = self._search.taken(name, before, option)
            self.at[member] = bit, option.gpus
            self.crowd[bit, name] = self.crowd.get((bit, name), 0) + 1
            done = self._dive(i + 1, max(worst, option.worst), later)
            self.crowd[bit, name] -= 1
            del self.at[member]
            if before is None:
                del self.left[bit]
            else:
                self.left[bit] = before
            if done:
                return True
        return False


def _each(bits: Bits) -> Iterator[Bits]:
    while bits:
        bit = bits & -bits
        bits ^= bit
        yield bit
