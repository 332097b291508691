"""The possible places of a group's replicas beside others, and their cost; see :mod:`placement.core.roles`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from operator import or_
from typing import NamedTuple

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.limits import eligible
from placement.core.needs import WHOLE, Needs
from placement.core.node import Node
from placement.core.offers import Bits
from placement.core.request import Place, Request
from placement.core.role_sets import Left, Sets, usable
from placement.core.routes import (
    Gpus,
    Located,
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
from placement.core.topology import PATH_ORDER
from placement.errors import BelowFloor, Unplaceable

Cost = tuple[int, int, int, int, int]
"""Routes within replicas that leave a node, by how far, and so of the others; slowness of the sets, and of the routes;
steps of PCIe between GPUs that talk.

Each at least 0: of speeds, what is missing to :data:`_FASTEST`. Steps are those of whole GPUs.
"""

NOTHING: Cost = (0, 0, 0, 0, 0)
_FASTEST = 1 << 32
"""MB/s; faster than any link."""


def plus(one: Cost, other: Cost, times: int = 1) -> Cost:
    """The cost of both, of the other so many times."""
    a, b, c, d, e = other
    return (
        one[0] + times * a,
        one[1] + times * b,
        one[2] + times * c,
        one[3] + times * d,
        one[4] + times * e,
    )


Piece = tuple[str, int, int]
"""A tensor-parallel group of a replica: its deployment, the replica's index there, and its own in the replica."""

_INSIDE = RoleLink(("", ""), Via.NVLINK)
"""The tensor-parallel groups of a replica talk to each other."""

Level = tuple[int, int]
"""Level and slowness of a route, for comparison."""

_ANY: Level = (1 << 30, 0)
_ON_ONE_NODE: Level = (-2, 0)

NONE: Level = (-3, -_FASTEST)
"""Better than any route: the value if there is none."""


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
        left: what is left of the nodes that are not like others any more.
        at: where the pieces of replicas are.
        crowd: (node, deployment) -> how many replicas have been placed there.
        seen: how many places have been considered.
    """

    limit: Level
    left: dict[Bits, Left]
    at: dict[Piece, tuple[Bits, Gpus]]
    crowd: dict[tuple[Bits, str], int] = field(default_factory=dict)
    seen: int = 0


class Places:
    """The places that the replicas of a group may have.

    Args:
        snapshot, roles, requests, standing: as in :func:`placement.core.roles.plan`.
        floors: whether the links' floors count.

    Attributes:
        roles: as given.
        todo: the pieces that have no place, in the order in which to place them, unit by unit.
        cut_off: a round of the search was.
        farthest: no route that the links' floors allow is slower.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        roles: Roles,
        requests: Mapping[str, Request],
        standing: Mapping[Member, Sequence[Place]],
        floors: bool = True,
    ) -> None:
        self._snapshot, self.roles, self._requests, self._floors = snapshot, roles, requests, floors
        self._allowed = {name: eligible(snapshot, request) for name, request in requests.items()}
        self._anywhere = reduce(or_, self._allowed.values(), 0)
        self._stands: dict[Piece, tuple[Bits, Gpus]] = {
            (*member, i): (bit, place.gpus)
            for member, places in standing.items()
            for i, place in enumerate(places)
            if (bit := snapshot.bit(place.node_id))
        }
        self._partners: dict[str, list[tuple[RoleLink, str]]] = {name: [] for name in roles.counts}
        for link in roles.links:
            one, other = link.between
            self._partners[one].append((link, other))
            self._partners[other].append((link, one))
        largest_first = sorted(roles.counts, key=lambda name: _smallness(requests[name].needs))
        missing = {(name, index) for name, request in requests.items() for index in request.replicas}
        self.todo: list[Piece] = [
            (*member, i)
            for unit in range(roles.units)
            for name in largest_first
            for member in roles.members(unit, name)
            if member in missing
            for i in range(requests[name].stages)
        ]
        self.cut_off = False
        self._is_connected = self._all_talk()
        bound = floors and self._is_connected and all(link.on_one_node for link in roles.links)
        self.farthest = _ON_ONE_NODE if bound and roles.links else _ANY
        self._fastest_sets: dict[str, int] = {}
        self._fastest_ways: dict[tuple[Via, bool], tuple[int, int]] = {}
        self._named = [name for name, request in requests.items() if request.needs.named]
        self._sets = Sets(any(one.needs.free_memory_bytes or one.needs.named for one in requests.values()))
        self._routes: dict[tuple[Via, Bits, Gpus, Bits, Gpus], tuple[Route, int]] = {}
        self._classes = self._alike()
        self._touched: dict[Bits, Left] = {bit: self._whole(bit) for bit, _ in self._stands.values()}

    @property
    def bounded(self) -> bool:
        """Whether something was left out that might be better."""
        return self.cut_off or self._sets.bounded

    def may_fit(self, todo: Sequence[Piece]) -> bool:
        """Whether there are enough whole GPUs for these pieces, on whichever nodes; quick."""
        free = [node.free_mask(Needs(1)).bit_count() for node in self._nodes(self._anywhere)]
        at_once: Counter[object] = Counter()
        for piece in todo:
            needs = self._requests[piece[0]].needs
            at_once[self.unit_of(piece) if self.farthest == _ON_ONE_NODE else piece] += (
                needs.gpus * needs.whole
            )
        sizes = [size for size in at_once.values() if size]
        return all(
            sum(each >= size for each in sizes) <= sum(gpus // size for gpus in free) for size in {*sizes}
        ) and sum(sizes) <= sum(free)

    def without_nvlink(self) -> Unplaceable | None:
        """Why a link via NVLink is impossible on all nodes; ``None`` if it is possible."""
        for link in self.roles.links:
            if link.via is not Via.NVLINK or not self.todo:
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
        """The nodes that may be used, in classes of interchangeable nodes."""
        labels = {*self._snapshot.near, GPU_DOMAIN_LABEL, *(link.within for link in self.roles.links)}
        takes = any(request.cpu_milli or request.memory_bytes for request in self._requests.values())
        classes: dict[object, list[Bits]] = {}
        for bit in _each(self._anywhere):
            node = self._snapshot.at(bit)
            key = (
                id(node.topology),
                tuple(
                    (
                        bool(bit & self._allowed[name]),
                        usable(node, request.needs),
                        node.deployments.get(name, 0),
                    )
                    for name, request in self._requests.items()
                ),
                (node.cpu_milli, node.memory_bytes) if takes else (),
                tuple(node.labels.get(label) for label in sorted(labels)),
            )
            classes.setdefault(key, []).append(bit)
        return list(classes.values())

    def options(self, now: Partial, piece: Piece, to_come: Sequence[Piece]) -> list[Option]:
        """The places that a piece may have now, the most welcome first.

        Args:
            now: where others are.
            piece: the piece.
            to_come: it, and those of its unit that come after it.
        """
        name = piece[0]
        request, allowed, found = self._requests[name], self._allowed[name], []
        unit = self.unit_of(piece)
        talks = [
            (link, now.at[other], self._steps(name, partner))
            for link, partner in self._partners[name]
            for member in self.roles.members(unit, partner)
            for i in range(self._requests[partner].stages)
            if (other := (*member, i)) in now.at
        ]
        talks += [(_INSIDE, now.at[*piece[:2], i], True) for i in range(piece[2])]
        model = self._snapshot.at(talks[-1][1][0]).topology.model if piece[2] else None
        together = self._is_connected and now.limit[0] == -2
        known = {} if request.needs.whole else self._known(now, unit)
        whole = (needs.gpus for one, *_ in to_come if (needs := self._requests[one].needs).whole)
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
            if piece[2] and node.topology.model != model:
                continue
            crowd = node.deployments.get(name, 0) + now.crowd.get((bit, name), 0)
            sets = self._sets.of(node, left, request.needs, known.get(bit, ()))
            now.seen += len(sets)
            for slowness, loss, gpus in sets:
                worst, cost = NONE, (0, 0, _FASTEST + slowness, 0, 0)
                for link, place, counts in talks:
                    way, steps = self._route(link.via, (bit, gpus), place)
                    level = way.level, way.slowness
                    there = self._snapshot.at(place[0]), place[1]
                    if level > now.limit or (self._floors and not meets(link, way, (node, gpus), there)):
                        break
                    worst = max(worst, level)
                    away = way.level + 2
                    leaves = (away, 0) if link is _INSIDE else (0, away)
                    cost = plus(cost, (*leaves, 0, _FASTEST + way.slowness, steps * counts))
                else:
                    free = left.mask.bit_count()
                    found.append(Option(worst, cost, crowd, loss, free, bit, gpus))
        found.sort()
        return found

    def _known(self, now: Partial, unit: int) -> dict[Bits, list[int]]:
        """Node -> the GPUs there on which replicas of a unit are, or such as stand."""
        found: dict[Bits, list[int]] = {}
        for piece, (bit, gpus) in now.at.items():
            if piece in self._stands or self.unit_of(piece) == unit:
                found.setdefault(bit, []).extend(gpus)
        return found

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

    def least(self, piece: Piece, before: Sequence[Piece]) -> Cost:
        """No place for a piece costs less, beside others of its unit."""
        name, needs = piece[0], self._requests[piece[0]].needs
        if needs.gpus == 1:
            self._fastest_sets[name] = 0
        elif name not in self._fastest_sets:
            sets = [
                found[0][0]
                for alike in self._classes
                if alike[0] & self._allowed[name]
                and (
                    found := self._sets.whole(
                        node := self._snapshot.at(alike[0]), node.free_mask(needs), needs
                    )
                )
            ]
            self._fastest_sets[name] = min(sets, default=-_FASTEST)
        cost: Cost = (0, 0, _FASTEST + self._fastest_sets[name], 0, 0)
        for link, partner in self._partners[name]:
            other_needs = self._requests[partner].needs
            slowness, steps = self._fastest_way(link.via, needs.shared and other_needs.shared)
            pairs = needs.gpus * other_needs.gpus * self._steps(name, partner)
            times = sum(other == partner for other, *_ in before)
            cost = plus(cost, (0, 0, 0, _FASTEST + slowness, steps * pairs), times)
        if piece[2]:
            slowness, steps = self._fastest_way(Via.NVLINK, False)
            cost = plus(cost, (0, 0, 0, _FASTEST + slowness, steps * needs.gpus**2), piece[2])
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
        """Whether links join all replicas of a unit, directly or over others."""
        if [*self.roles.counts.values()] == [1]:
            return True
        reached = {*[*self.roles.counts][:1]}
        for _ in self.roles.counts:
            reached |= {other for name in reached for _, other in self._partners[name]}
        return reached == self.roles.counts.keys() and len(reached) > 1

    def unit_of(self, piece: Piece) -> int:
        """The unit of a piece."""
        return self.roles.unit_of(piece[:2])

    def standing_of(self, unit: int) -> list[Piece]:
        """What stands of a unit."""
        return [piece for piece in self._stands if self.unit_of(piece) == unit]

    def homes(self, now: Partial) -> dict[str, Bits]:
        """The node of each deployment that names GPUs, which are all of one node, once a replica of it is there."""
        if not self._named:
            return {}
        return {piece[0]: bit for piece, (bit, _) in now.at.items() if piece[0] in self._named}

    def begin(self, limit: Level) -> Partial:
        """The placed replicas and their nodes; no new route may be slower than ``limit``."""
        return Partial(limit, dict(self._touched), self.placed())

    def placed(self) -> dict[Piece, tuple[Bits, Gpus]]:
        """What stands."""
        return dict(self._stands)

    def taken(self, name: str, left: Left | None, option: Option) -> Left:
        """A node after a replica was placed there."""
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

    def located(self, at: Mapping[Piece, tuple[Bits, Gpus]]) -> dict[Member, list[Located]]:
        """The replicas that have these places, each with those of all its pieces."""
        found: dict[Member, list[Located]] = {}
        for piece, (bit, gpus) in at.items():
            found.setdefault(piece[:2], []).append((self._snapshot.at(bit), gpus))
        return found


def _smallness(needs: Needs) -> tuple[int, bool, int]:
    """Sorts what is asked for, the largest first."""
    return -needs.gpus, not needs.whole, -needs.share


def _each(bits: Bits) -> Iterator[Bits]:
    while bits:
        bit = bits & -bits
        bits ^= bit
        yield bit
