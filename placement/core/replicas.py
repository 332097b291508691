"""The parts of a plan: replicas with their places, and the nodes after them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

from placement.core.needs import WHOLE
from placement.core.node import Choice, Node
from placement.core.offers import Bits
from placement.core.request import Request
from placement.core.snapshot import Snapshot


@dataclass(frozen=True)
class PlannedReplica:
    """What one replica takes on one node: GPUs, egress units, or only CPUs.

    A replica over several nodes is several of these with the same ``replica_index``.

    Attributes:
        gpus: in the order of ``ranks``.
        ranks: which ranks of the replica run here; empty if all do, in order.
        set_size: GPUs of each of the replica's sets; 0 if all of its GPUs are one set.
        share: thousandths of each GPU.
        shares: the same for each GPU, if they differ; else empty.
        profile: the profile of the MIG instance in ``gpus``; empty for a GPU.
        cpu_milli, memory_bytes: CPUs (thousandths) and memory that it takes, beside GPUs or without.
    """

    replica_index: int
    node_id: str
    gpus: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    share: int = WHOLE
    profile: str = ""
    cpu_milli: int = 0
    memory_bytes: int = 0
    egress_resource: str | None = None
    egress_units: int = 0
    set_size: int = 0
    shares: tuple[int, ...] = ()

    @property
    def taken(self) -> dict[int, int]:
        """GPU -> thousandths of it."""
        return dict(zip(self.gpus, self.shares or (self.share,) * len(self.gpus), strict=True))


@dataclass(frozen=True)
class Plan:
    """A decision about places. It reserves nothing.

    Attributes:
        replicas: by index; a replica over several nodes has an entry for each node.
        set_size: GPUs of each of a replica's sets.
    """

    deployment: str
    replicas: tuple[PlannedReplica, ...]
    set_size: int = 0


Placed = tuple[list[PlannedReplica], dict[Bits, Node]]
"""Replicas that found a place, and the nodes after them."""


def take(index: int, node: Node, taken: Choice, request: Request) -> tuple[PlannedReplica, Node]:
    """The replica that takes this on a node, and the node afterwards."""
    planned = PlannedReplica(
        index,
        node.id,
        taken.gpus,
        share=taken.share,
        shares=taken.shares,
        profile=node.instances[taken.gpus[0]] if request.needs.profile else "",
        cpu_milli=request.cpu_milli,
        memory_bytes=request.memory_bytes,
    )
    after = node.after(
        taken,
        cpu_milli=node.cpu_milli - request.cpu_milli,
        memory_bytes=node.memory_bytes - request.memory_bytes,
        holders=node.holders_with(request.deployment, taken.gpus),
    )
    return planned, after


def in_parts(sets: Sequence[PlannedReplica]) -> list[PlannedReplica]:
    """A replica of these sets, in rank order: all that it takes on a node as one part."""
    if len(sets) == 1:
        return [*sets]
    size = len(sets[0].gpus)
    parts: dict[str, PlannedReplica] = {}
    for position, one in enumerate(sets):
        before = parts.get(one.node_id) or replace(one, gpus=(), cpu_milli=0, memory_bytes=0)
        parts[one.node_id] = replace(
            before,
            gpus=(*before.gpus, *one.gpus),
            ranks=(*before.ranks, *range(position * size, (position + 1) * size)),
            set_size=size,
            cpu_milli=before.cpu_milli + one.cpu_milli,
            memory_bytes=before.memory_bytes + one.memory_bytes,
        )
    return list(parts.values())


class Crowd:
    """How many replicas of one deployment are on each node and, if it spreads, in each domain.

    Args:
        snapshot: the cluster.
        request: what is placed.
        allowed: the nodes it may go to.
    """

    def __init__(self, snapshot: Snapshot, request: Request, allowed: Bits) -> None:
        self._allowed = allowed
        self._levels: list[Bits] = [allowed]
        self._level_of: dict[Bits, int] = {}
        self._domain_of: dict[Bits, str] = {}
        self._domains: dict[str, Bits] = {}
        self._in_domain: Counter[str] = Counter()
        self._most = request.max_per_domain
        if request.spread_label is not None:
            self._domains = snapshot.domains(request.spread_label)
            for node in snapshot.nodes:
                if request.spread_label in node.labels:
                    self._domain_of[snapshot.bit(node.id)] = node.labels[request.spread_label]
        for node_id, replicas in sorted(request.standing.items()):
            bit = snapshot.bit(node_id)
            for _ in range(replicas if bit else 0):
                self.add(bit)

    def add(self, bit: Bits) -> None:
        """Counts one more replica on a node."""
        old = self._level_of.get(bit, 0)
        self._level_of[bit] = old + 1
        if len(self._levels) == old + 1:
            self._levels.append(0)
        if self._levels[old] & bit:
            self._levels[old] &= ~bit
            self._levels[old + 1] |= bit
        if (domain := self._domain_of.get(bit)) is not None:
            self._in_domain[domain] += 1
            if self._most and self._in_domain[domain] >= self._most:
                self.close(self._domains[domain])

    def on(self, bit: Bits) -> int:
        """How many replicas are on a node."""
        return self._level_of.get(bit, 0)

    def domains(self) -> list[list[Bits]]:
        """The domains that may take more replicas, as sets of nodes: the fewest replicas first."""
        by_count: dict[int, list[Bits]] = {}
        for domain, bits in self._domains.items():
            count = self._in_domain[domain]
            if not self._most or count < self._most:
                by_count.setdefault(count, []).append(bits & self._allowed)
        return [domains for _, domains in sorted(by_count.items())]

    def open_domains(self) -> list[tuple[Bits, int | None]]:
        """The domains that may take more replicas, and how many; all nodes, and no limit, without domains."""
        if not self._domains:
            return [(self._allowed, None)]
        left = {
            domain: self._most - self._in_domain[domain] if self._most else None for domain in self._domains
        }
        return [
            (self._domains[domain] & self._allowed, most)
            for domain, most in left.items()
            if most is None or most > 0
        ]

    def close(self, bits: Bits) -> None:
        """Excludes these nodes from now on."""
        self._levels = [level & ~bits for level in self._levels]

    def open(self) -> list[Bits]:
        """The nodes as sets: the fewest replicas in the domain first."""
        anywhere = 0
        for level in self._levels:
            anywhere |= level
        if not self._domains:
            return [anywhere]
        return [anywhere & reduce(or_, domains) for domains in self.domains()]

    def preference(self) -> list[Bits]:
        """The nodes as sets: the fewest replicas in the domain first, then the fewest on the node."""
        if not self._domains:
            return self._levels
        by_count: dict[int, Bits] = {}
        for domain, bits in self._domains.items():
            count = self._in_domain[domain]
            by_count[count] = by_count.get(count, 0) | bits
        return [level & bits for _, bits in sorted(by_count.items()) for level in self._levels]
