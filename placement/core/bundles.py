"""Replicas that are one placement group laid out bundle by bundle: which node each bundle goes to, and which GPUs.

The strategies mean what they mean in Ray. ``STRICT_SPREAD`` finds a node for each bundle whenever that is possible;
``SPREAD`` does the same, and shares nodes if it is not possible; ``PACK`` takes the best single node that holds all,
else fills node after node, first the node that takes most. The GPUs that a replica has on one node are one set, the
best that is free: its bundles get them in ascending order, as Ray gives them. Shares are dealt as Ray deals them
(:mod:`placement.core.shares`).

A bundle without GPUs is not planned: Ray finds a place for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain, groupby

from placement.core.labels import meets
from placement.core.needs import WHOLE, Needs, Within
from placement.core.node import Node
from placement.core.offers import Bits, rank_of
from placement.core.policy import Rank
from placement.core.replicas import Placed, PlannedReplica, take
from placement.core.request import Bundle, Request, Resources, Strategy, amounts_of
from placement.core.snapshot import Snapshot

OTHERS = "has other bundles of the group"
ELSEWHERE = "is in another domain than other bundles of the group"
"""Why a node is excluded for a bundle that finds no node."""

Layout = dict[Bits, list[int]]
"""Node -> the bundles on it, by index."""


def summed(several: Iterable[Resources]) -> Resources:
    """Custom resources, all together."""
    total: Counter[str] = Counter()
    for resources in several:
        total.update(dict(resources))
    return tuple(sorted(total.items()))


def on_one_node(request: Request) -> Request | None:
    """The request with all bundles together on one node; ``None`` if their labels ask for different nodes."""
    labels = dict(request.labels)
    for key, condition in {label for bundle in request.bundles for label in bundle.labels}:
        if labels.setdefault(key, condition) != condition:
            return None
    return replace(request, labels=labels, bundles=(), strategy=Strategy.STRICT_PACK)


def place(snapshot: Snapshot, request: Request, allowed: Bits) -> tuple[Request, Placed]:
    """Places the one replica of a request whose bundles may lie on several nodes.

    Returns:
        The request, and the replica's places. If there is no room: the request of the first bundle that finds no node,
        and the nodes in that state.
    """
    domains = [allowed]
    if request.domain_label is not None:
        domains = [bits & allowed for bits in snapshot.domains(request.domain_label).values()]
    rooms = [_Room(snapshot, request, bits) for bits in domains if bits] or [_Room(snapshot, request, 0)]
    tried = [(room, *(room.spread() if request.strategy in _SPREAD else room.pack())) for room in rooms]
    found = [(room, layout) for room, layout, stuck in tried if stuck is None]
    if not found:
        return _refused(snapshot, request, allowed, tried)
    room, layout = min(found, key=lambda one: one[0].cost(one[1]))
    [index] = request.replicas
    first_rank = [0, *accumulate(bundle.gpus or bool(bundle.share) for bundle in request.bundles)]
    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    for bit, bundles in layout.items():
        together, node = room.together(bundles), snapshot.at(bit)
        taken = node.choose(together.needs)
        assert taken is not None
        part, changed[bit] = take(index, node, taken._replace(gpus=tuple(sorted(taken.gpus))), together)
        if len(layout) > 1:
            ranks = (rank for i in sorted(bundles) for rank in range(first_rank[i], first_rank[i + 1]))
            set_size = 0 if part.shares else len(part.gpus)
            part = replace(part, ranks=tuple(ranks), set_size=set_size)
        planned.append(part)
    return request, (sorted(planned, key=lambda part: part.ranks), changed)


def _refused(
    snapshot: Snapshot, request: Request, allowed: Bits, tried: Sequence[tuple[_Room, Layout, int | None]]
) -> tuple[Request, Placed]:
    """The first bundle that finds no node, in the domain with most room; and the nodes in that state."""
    room, layout, stuck = max(tried, key=lambda one: sum(map(len, one[1].values())))
    assert stuck is not None
    problems: dict[Bits, str] = {}
    # If no node would do even without the other bundles, these are not the reason.
    if anywhere := _Room(snapshot, request, allowed).nodes_for(stuck):
        problems = dict.fromkeys(set(anywhere) - set(room.nodes), ELSEWHERE) | dict.fromkeys(layout, OTHERS)
    return room.alone(stuck), (
        [],
        {bit: replace(snapshot.at(bit), problem=why) for bit, why in problems.items()},
    )


_SPREAD = (Strategy.SPREAD, Strategy.STRICT_SPREAD)

_Fill = tuple[int, Rank, tuple[int, ...]]
"""What a node takes: minus its GPUs (thousandths), its rank, how many bundles of each kind. Sorts the best first."""


class _Room:
    """For which bundles each node has room."""

    def __init__(self, snapshot: Snapshot, request: Request, allowed: Bits) -> None:
        self._snapshot, self._request = snapshot, request
        self.nodes = [bit for node in snapshot.nodes if (bit := snapshot.bit(node.id)) & allowed]
        self._known: dict[tuple[Bits, Needs], Rank | None] = {}
        self._ranked: dict[Bundle, list[Bits]] = {}
        self._fills: dict[tuple[Bits, tuple[int, ...], tuple[int, ...]], _Fill | None] = {}
        bundles = request.bundles
        # As in Ray: the bundle that is hardest to place comes first.
        self._order = sorted(
            (i for i, bundle in enumerate(bundles) if bundle.gpus or bundle.share),
            key=lambda i: (
                -bundles[i].gpus,
                -bundles[i].share,
                -bundles[i].cpu_milli,
                -bundles[i].memory_bytes,
                bundles[i].labels,
                i,
            ),
        )

    def cost(self, layout: Layout) -> tuple[object, ...]:
        """Sorts the layouts in several domains, the best first.

        By how few nodes they take, or how many if they are to be spread; then by the worst of these nodes; then the
        fullest domain.
        """
        nodes = -len(layout) if self._request.strategy in _SPREAD else len(layout)
        ranks = [rank for bit, bundles in layout.items() if (rank := self._rank(bit, bundles)) is not None]
        return nodes, max(ranks), sum(len(self._snapshot.at(bit).free) for bit in self.nodes), self.nodes

    def together(self, bundles: Iterable[int]) -> Request:
        """The request of some bundles as one replica on one node, without their labels."""
        needs, cpu_milli, memory_bytes, resources = self._total(bundles)
        return replace(
            self._request,
            needs=needs,
            cpu_milli=cpu_milli,
            memory_bytes=memory_bytes,
            resources=resources,
            bundles=(),
            strategy=Strategy.STRICT_PACK,
        )

    def alone(self, bundle: int) -> Request:
        """The request of one bundle."""
        labels = {**self._request.labels, **dict(self._request.bundles[bundle].labels)}
        return replace(self.together((bundle,)), labels=labels, strategy=self._request.strategy)

    def spread(self) -> tuple[Layout, int | None]:
        """The bundles, each on a node of its own, as far as possible; and the first that finds no node."""
        node_of: dict[int, Bits] = {}
        holder: dict[Bits, int] = {}
        stuck = next((i for i in self._order if not self._find_own(i, node_of, holder)), None)
        if stuck is None or self._request.strategy is Strategy.STRICT_SPREAD:
            return {bit: [i] for bit, i in holder.items()}, stuck
        layout: Layout = {}
        for i in self._order:
            ranked = [
                (len(there), rank, bit)
                for bit in self.nodes
                if (rank := self._rank(bit, [*(there := layout.get(bit, [])), i])) is not None
            ]
            if not ranked:
                return layout, i
            layout.setdefault(min(ranked)[2], []).append(i)
        return layout, None

    def _find_own(self, bundle: int, node_of: dict[int, Bits], holder: dict[Bits, int]) -> bool:
        """Finds a free node for a bundle; others may move (an augmenting path). Returns whether it did."""
        comes: dict[Bits, int] = {}
        waiting = deque([bundle])
        while waiting:
            one = waiting.popleft()
            for bit in self.nodes_for(one):
                if bit in comes:
                    continue
                comes[bit] = one
                if bit in holder:
                    waiting.append(holder[bit])
                    continue
                while True:
                    one = comes[bit]
                    left = node_of.get(one)
                    node_of[one], holder[bit] = bit, one
                    if left is None:
                        return True
                    bit = left
        return False

    def nodes_for(self, bundle: int) -> list[Bits]:
        """The nodes with room for a bundle, the best first."""
        key = self._request.bundles[bundle]
        if key not in self._ranked:
            ranks = [(rank, bit) for bit in self.nodes if (rank := self._rank(bit, [bundle])) is not None]
            self._ranked[key] = [bit for _, bit in sorted(ranks)]
        return self._ranked[key]

    def pack(self) -> tuple[Layout, int | None]:
        """The bundles on as few nodes as possible; and the first that finds no node."""
        layout: Layout = {}
        left = {kind: list(alike) for kind, alike in groupby(self._order, self._request.bundles.__getitem__)}
        while any(left.values()):
            fills = []
            for bit in self.nodes:
                if bit not in layout and (found := self._fill(bit, left)) is not None:
                    fills.append((*found[:2], bit, found[2]))
            if not fills:
                return layout, min(chain(*left.values()), key=self._order.index)
            *_, bit, counts = min(fills)
            layout[bit] = [i for kind, count in zip(left, counts, strict=True) for i in left[kind][:count]]
            left = {kind: alike[count:] for (kind, alike), count in zip(left.items(), counts, strict=True)}
        return layout, None

    def _fill(self, bit: Bits, left: Mapping[Bundle, Sequence[int]]) -> _Fill | None:
        """How many bundles of each remaining kind a node takes, the largest first; ``None`` if it takes none."""
        node = self._snapshot.at(bit)
        free = WHOLE * len(node.free)
        rests = free + sum(node.rests.values())
        most = tuple(
            min(len(alike), rests // kind.share if kind.share else free // (WHOLE * kind.gpus))
            for kind, alike in left.items()
        )
        # Which of equal bundles are left matters only where Ray's order of shares does.
        key = bit, most, tuple(map(len, left.values())) if self._request.needs.amounts else ()
        if key not in self._fills:
            taken: list[int] = []
            counts: list[int] = []
            for alike, count in zip(left.values(), most, strict=True):
                counts.append(self._most(bit, taken, alike[:count]))
                taken += alike[: counts[-1]]
            bundles = map(self._request.bundles.__getitem__, taken)
            amount = sum(WHOLE * bundle.gpus + bundle.share for bundle in bundles)
            rank = self._rank(bit, taken) if taken else None
            self._fills[key] = None if rank is None else (-amount, rank, tuple(counts))
        return self._fills[key]

    def _most(self, bit: Bits, taken: Sequence[int], alike: Sequence[int]) -> int:
        """How many of some equal bundles a node takes beside others."""

        def too_many(others: int) -> bool:
            return self._rank(bit, [*taken, *alike[: others + 1]]) is None

        if alike and self._request.bundles[alike[0]].share:  # there may be thousands
            return bisect_left(range(len(alike)), True, key=too_many)
        return next((others for others in range(len(alike)) if too_many(others)), len(alike))

    def _total(self, bundles: Iterable[int]) -> tuple[Needs, int, int, Resources]:
        """What some bundles need of a node: GPUs, CPUs (thousandths), memory and custom resources."""
        several = [self._request.bundles[i] for i in sorted(bundles)]
        gpus = sum(bundle.gpus for bundle in several)
        amounts = amounts_of(several)
        needs = self._request.needs._replace(gpus=gpus, amounts=amounts)
        if gpus <= 1:  # a floor is about links, and there is none
            needs = needs._replace(within=Within.NODE, min_bandwidth_gb_per_s=0.0)
        cpu_milli, memory_bytes = (
            sum(one.cpu_milli for one in several),
            sum(one.memory_bytes for one in several),
        )
        return needs, cpu_milli, memory_bytes, summed(one.resources for one in several)

    def _rank(self, bit: Bits, bundles: Sequence[int]) -> Rank | None:
        """The node's rank for these bundles together; ``None`` if it has no room for them."""
        node = self._snapshot.at(bit)
        if not all(meets(node.labels, *one) for i in bundles for one in self._request.bundles[i].labels):
            return None
        needs, cpu_milli, memory_bytes, resources = self._total(bundles)
        if node.cpu_milli < cpu_milli or node.memory_bytes < memory_bytes:
            return None
        if any(node.resources.get(resource, 0) < amount for resource, amount in resources):
            return None
        if (bit, needs) not in self._known:
            self._known[bit, needs] = rank_of(node, needs, self._request.policy)
        return self._known[bit, needs]
