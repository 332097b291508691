"""How good a set of GPUs is, and the best set among those that are free.

All that can be asked of machines of one shape is worked out once, on first use, and shared by every node of
that shape: the predicted bandwidth of every set (:mod:`placement.core.bandwidth`) and what every rest still
has on offer. Choosing is then a look at a table.

GPUs that can change places without any difference are *twins*. Sets that take equally many of each group
of twins are equally good, and leave equally much, so that counts are searched instead of sets: 9 instead of 256
for an NVSwitch board. Such counts, a *pick*, are packed into one integer, a field per group with one bit to
spare, so that taking a pick out of another is one subtraction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache, lru_cache
from itertools import combinations, groupby
from typing import NamedTuple

from placement.core.bandwidth import (
    BELOW_ONE_SWITCH,
    Generation,
    Host,
    generation,
    has_switch,
    hop_mb_per_s,
    hosts_of,
    lanes_mb_per_s,
    nvlink_rings,
    pair_mb_per_s,
    staged_mb_per_s,
    switch_mb_per_s,
)
from placement.core.measured import Rates, is_suspect
from placement.core.topology import (
    PATH_ORDER,
    UNKNOWN_LINK,
    Lanes,
    Link,
    MeasuredRates,
    Path,
    Topology,
    components,
)

Links = tuple[tuple[Link, ...], ...]

Pick = int
"""How many GPUs of each group of twins, packed."""

WHOLE = 1000
"""A whole GPU, in thousandths."""

ANY_PROFILE = "any"
"""Asks for a MIG instance of whatever profile: one that is named by its UUID."""

GpuName = int | str
"""What somebody calls a GPU: its ordinal on the node, or the UUID of the GPU or of the MIG instance."""

GIB = 1 << 30

LEFTOVER_SIZES = (8, 4, 2)
"""What others are most likely to ask for: replicas come in powers of two, as tensor parallelism does."""

MAX_PICKS = 1 << 16
"""Machines with more picks (17 GPUs and more, no two of them alike) are not tabulated."""

_OVER_PCIE = (*BELOW_ONE_SWITCH, Path.PHB, Path.NODE, Path.SYS)
_BELOW_ONE_BRIDGE = (*BELOW_ONE_SWITCH, Path.PHB)


class Within(StrEnum):
    """How far apart the GPUs of one replica may be, narrowest first."""

    NVLINK = "nvlink"
    """A collective over them runs on NVLink alone."""
    SWITCH = "switch"
    """... on NVLink and PCIe switches (PIX, PXB), past no host bridge."""
    NUMA = "numa"
    """They share a NUMA node, and it is known."""
    NODE = "node"
    """They are on one node, as they always are."""


@dataclass(frozen=True, order=True)
class Score:
    """How good a set of GPUs is. Orderable: a greater score is a better set.

    Attributes:
        bandwidth_gb_per_s: bus bandwidth of a large all-reduce over the set, GB/s (10^9 bytes) per
            GPU and direction, as nccl-tests reports it: measured or predicted; infinite for fewer than two GPUs.
        weakest: the slowest link between two of them; not part of the order.
        weakest_pair: that pair (its lowest ordinals, if several tie); not part of the order.
        upper_gb_per_s: what it may be at most, where something that decides it is not known: the host's processors,
            whether the GPUs have peer-to-peer, or whether the NVSwitch reduces (NVLS); ``bandwidth_gb_per_s`` is the
            least then. ``None`` where nothing is missing. Not part of the order.
        measured: whether the bandwidth was measured, on the set or one alike; not part of the order.
    """

    bandwidth_gb_per_s: float
    weakest: Link | None = field(default=None, compare=False)
    weakest_pair: tuple[int, int] | None = field(default=None, compare=False)
    upper_gb_per_s: float | None = field(default=None, compare=False)
    measured: bool = field(default=False, compare=False)

    @property
    def link_name(self) -> str | None:
        """The weakest link as ``nvidia-smi topo -m`` prints it, ``"?"`` if unknown; ``None`` for a single GPU."""
        return None if self.weakest is None else str(self.weakest)

    @property
    def known_gb_per_s(self) -> float | None:
        """The bandwidth where it was measured or every link is known: for people, who would take a guess for a fact."""
        unknown = self.weakest is None or (self.weakest == UNKNOWN_LINK and not self.measured)
        return None if unknown else self.bandwidth_gb_per_s

    @property
    def known_upper_gb_per_s(self) -> float | None:
        """:attr:`upper_gb_per_s` where every link is known."""
        return None if self.known_gb_per_s is None else self.upper_gb_per_s


class Needs(NamedTuple):
    """What one replica needs of a node's GPUs.

    Attributes:
        gpus: how many GPUs.
        within: how close together.
        min_bandwidth_gb_per_s: the least predicted bandwidth between them that will do.
        share: thousandths of one GPU, where it is not a whole one.
        memory_bytes: another way to ask for a share: as much of one GPU as has this much memory; 0 if not asked.
        free_memory_bytes: the least memory that NVML must show as free on each GPU.
        profile: a MIG instance of this profile instead of a GPU; empty if not asked.
        named: only these GPUs, which are to be on the node, all of them; empty for any.
    """

    gpus: int
    within: Within = Within.NODE
    min_bandwidth_gb_per_s: float = 0.0
    share: int = WHOLE
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    profile: str = ""
    named: tuple[GpuName, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether whole GPUs are asked for."""
        return self.share == WHOLE and not self.memory_bytes and not self.profile

    @property
    def slowest(self) -> int:
        """The greatest :attr:`Offer.slowness` that will do."""
        return -round(self.min_bandwidth_gb_per_s * 1000) if self.gpus > 1 else 0

    @property
    def floor(self) -> bool:
        """Whether some sets of this size will not do."""
        return self.within is not Within.NODE or self.slowest < 0

    def share_of(self, gpu_memory_bytes: int | None) -> int | None:
        """Thousandths of a GPU of that size; ``None`` if it is too small, or of unknown size and that matters."""
        if not self.memory_bytes:
            return self.share
        if not gpu_memory_bytes or self.memory_bytes > gpu_memory_bytes:
            return None
        return -(-self.memory_bytes * WHOLE // gpu_memory_bytes)

    def least_share(self, gpu_memory_bytes: Iterable[int | None]) -> int:
        """Thousandths of the largest GPU among these sizes; a whole one if none will do."""
        shares = map(self.share_of, gpu_memory_bytes)
        return min((share for share in shares if share is not None), default=WHOLE)


NO_GPUS = Needs(0)
"""What a remote replica needs of GPUs, and one on CPUs."""


class Hop(NamedTuple):
    """One hop of a ring: what it carries, MB/s, or, where it goes through the host's memory, what that carries.

    The other one is 0.
    """

    direct: int
    host: int


class Offer(NamedTuple):
    """What a node's free GPUs hold for a request. Sorts from the most to the least welcome.

    Attributes:
        slowness: minus the predicted bandwidth of the best set, MB/s; 0 for a single GPU.
        loss: how much less the others are then offered: the best bandwidth for 8, 4 and 2 GPUs, MB/s.
        rest: thousandths that stay free on a GPU that is shared.
        free: how many GPUs are free before.
    """

    slowness: int
    loss: tuple[int, ...]
    rest: int
    free: int


def score(topology: Topology, gpus: Collection[int]) -> Score:
    """How good ``gpus`` are together."""
    ordered = sorted(gpus)
    if len(ordered) < 2:
        return Score(math.inf)
    shape = shape_of(topology)
    _, pair = min((shape.hops[a][b], (a, b)) for a, b in combinations(ordered, 2))
    measured = shape.measured_mb_per_s(ordered) is not None
    least = shape.mb_per_s(ordered)
    most = least if measured else _at_best(_Same(topology)).mb_per_s(ordered)
    upper = most / 1000 if most > least else None
    return Score(least / 1000, topology.link(*pair), pair, upper, measured)


def suspect_pairs(topology: Topology) -> list[tuple[tuple[int, ...], int, int]]:
    """The pairs that were measured at less than half of what is predicted: GPUs, measured and predicted MB/s."""
    pairs = [(gpus, rate) for gpus, rate in topology.measured if len(gpus) == 2]
    if not pairs:
        return []
    predicted = shape_of(topology).predicted
    found = [(gpus, rate, predicted.mb_per_s(gpus)) for gpus, rate in pairs]
    return [one for one in found if is_suspect(*one[1:])]


def slowest_group(topology: Topology, gpus: Sequence[int], size: int) -> Score:
    """How good the slowest of the tensor-parallel groups is that GPUs in rank order are cut into.

    Of ``sorted(gpus)`` it is what an engine gets that sorts the GPUs of a node; see ``docs/rank-order.md``.

    Args:
        topology: how they are linked.
        gpus: in rank order.
        size: of each group; 0 if all are one.
    """
    size = size or max(1, len(gpus))
    scores = [score(topology, gpus[i : i + size]) for i in range(0, max(1, len(gpus)), size)]
    slowest = min(scores)
    upper = min(one.upper_gb_per_s or one.bandwidth_gb_per_s for one in scores)
    return replace(slowest, upper_gb_per_s=upper if upper > slowest.bandwidth_gb_per_s else None)


def ray_set(free: Collection[int], count: int) -> tuple[int, ...] | None:
    """The GPUs that Ray alone would give: it goes through its slots in ascending order.

    That is ``NodeResourceInstanceSet::TryAllocate`` in Ray's ``resource_instance_set.cc``.

    Returns:
        Ordinals, ascending, or ``None`` if fewer than ``count`` are free.
    """
    lowest = tuple(sorted(set(free))[:count])
    return lowest if len(lowest) == count else None


def best_set(
    topology: Topology, free: Collection[int], count: int, within: Within = Within.NODE
) -> tuple[int, ...] | None:
    """The best ``count`` of the ``free`` GPUs.

    In this order:

    1. the highest :class:`Score`;
    2. what leaves the other free GPUs best off: the best bandwidth that they still offer to a request for 8
       GPUs, then the sum over all their sets of 8; then the same for 4, and for 2;
    3. what is worth most when it is given back: the same measure, of the set itself, so that GPUs which
       belong together come and go together;
    4. the nearest network card of the GPU that is farthest from one; then the fewest NUMA nodes;
    5. the lowest ordinals, which is what Ray gives of itself, so that nothing need be steered.

    The same answer every time, and exact: as good as any set by trying all. (On machines of more than 16
    GPUs among which hardly two are alike it is a good one.)

    Returns:
        Ordinals, ascending, or ``None`` if there are no ``count`` free GPUs ``within`` such a distance.

    Raises:
        ValueError: ``count`` is negative, or the topology has no such GPU.
    """
    if count < 0:
        raise ValueError(f"cannot choose {count} GPUs")
    mask = 0
    for gpu in free:
        if not 0 <= gpu < len(topology):
            raise ValueError(f"GPU {gpu} is free, but the topology has {len(topology)} GPUs")
        mask |= 1 << gpu
    return shape_of(topology).best(mask, count, within)


def choose(topology: Topology, free: Collection[int], needs: Needs, more: int = 0) -> tuple[int, ...] | None:
    """The best set that meets ``needs`` and, if that can be had, leaves room for as many ``more`` like it.

    Returns:
        Ordinals, ascending, or ``None`` if no free set meets them.
    """
    best = best_set(topology, free, needs.gpus, needs.within)
    shape = shape_of(topology)
    if best is None or (needs.gpus > 1 and -shape.mb_per_s(best) > needs.slowest):
        return None
    if more and needs.floor:
        mask = sum(1 << gpu for gpu in free)
        rest = mask & ~sum(1 << gpu for gpu in best)
        if len(shape.packed(rest, needs)) < more:
            together = shape.packed(mask, needs)
            if len(together) > more:
                return together[0]
    return best


def shape_of(topology: Topology) -> Shape:
    """The tables of a machine's shape; built on first use, within milliseconds (8 GPUs) or a second (16)."""
    return _shape_of(_Same(topology))


class Shape:
    """Machines that nothing but their names tells apart. Get one from :func:`shape_of`.

    Attributes:
        hops: per pair of GPUs, what one hop of a ring carries, MB/s.
        twins: the groups of GPUs that can change places without any difference.
        in_order: each group's ordinals come after those of the groups before, so that of equally good sets the
            lowest is the same pick wherever as many of each group are free.
        predicted: the same machine, if nothing had been measured; itself if nothing was.

    Args:
        host: what they copy through.
        peer: whether GPUs have peer-to-peer over PCIe of which that is not known.
    """

    def __init__(
        self,
        links: Links,
        numa: Sequence[tuple[int, ...]],
        nearest_nic: Sequence[Path],
        gpu: Generation,
        lanes: Sequence[Lanes | None],
        host: Host,
        peer: bool,
        measured: MeasuredRates = (),
    ) -> None:
        self.predicted: Shape = (
            _shape(links, numa, nearest_nic, gpu, lanes, host, peer, ()) if measured else self
        )
        self._rates = Rates(measured, links, lanes, self.predicted.mb_per_s) if measured else None
        self._links, self._numa, self._gpu, self._host, self._peer = links, numa, gpu, host, peer
        self._switch = has_switch(links, gpu)
        self._lanes = [lanes_mb_per_s(one or Lanes(gpu.pcie)) for one in lanes]
        everyone = range(len(links))
        self._uplink = _group_of(components(everyone, lambda a, b: links[a][b].path in BELOW_ONE_SWITCH))
        self._bridge = _group_of(components(everyone, lambda a, b: links[a][b].path in _BELOW_ONE_BRIDGE))
        self._hops = [[self._hop(a, b) for b in everyone] for a in everyone]
        self.hops = [[self._pair(a, b) for b in everyone] for a in everyone]
        self._nic = [PATH_ORDER[path] for path in nearest_nic]
        self.twins = twins_of(links, list(zip(numa, self._nic, self._lanes, strict=True)))
        if self._rates is not None:
            self.twins = self._rates.split(self.twins)
        self.in_order = [gpu for twins in self.twins for gpu in twins] == list(range(len(links)))
        self._chosen: dict[tuple[int, int, Within], tuple[int, ...] | None] = {}
        self._offered: dict[tuple[int, int, Within], Offer | None] = {}

        self._units: list[Pick] = []
        self._fields: list[Pick] = []
        self._kind_masks: list[int] = []
        self._spare: Pick = 0
        bit = 0
        for kind in self.twins:
            self._units.append(1 << bit)
            self._fields.append(((1 << len(kind).bit_length()) - 1) << bit)
            bit += len(kind).bit_length() + 1
            self._spare |= 1 << (bit - 1)
            self._kind_masks.append(sum(1 << gpu for gpu in kind))

        self.tabulated = math.prod(len(kind) + 1 for kind in self.twins) <= MAX_PICKS
        if self.tabulated:
            self._tabulate()

    # -- asking ----------------------------------------------------------------------------------

    def mb_per_s(self, gpus: Sequence[int]) -> int:
        """The bus bandwidth of two or more GPUs: measured, else predicted."""
        if self.tabulated:
            return self._bandwidth[self._pick(sum(1 << gpu for gpu in gpus))]
        return self.measured_mb_per_s(gpus) or self._at_least(gpus)

    def measured_mb_per_s(self, gpus: Sequence[int]) -> int | None:
        """What was measured of two or more GPUs, or of others that are alike; ``None`` if nothing was."""
        return None if self._rates is None else self._rates.of(tuple(sorted(gpus)))

    def slownesses(self, count: int) -> list[int]:
        """The :attr:`Offer.slowness` that sets of so many GPUs can have, the fastest first."""
        if count < 2:
            return [0]
        if self.tabulated:
            picks = [equal[0] for equal in self._fastest_first[count]] if count <= len(self._links) else []
            return [-self._bandwidth[pick] for pick in picks]
        pairs = list(combinations(range(len(self._links)), 2))
        links = {self._links[a][b].nvlinks for a, b in pairs} - {0} if self._switch else set()
        hops = {self._hops[a][b] for a, b in pairs}
        speeds = {hop.direct for hop in hops} - {0}
        speeds |= {speed for hop in hops if hop.host for speed in self._all_staged(hop.host, count)}
        if count == 2:
            speeds = {self.hops[a][b] for a, b in pairs}
        speeds |= {switch_mb_per_s(each, count, self._gpu) for each in links}
        if self._rates is not None:
            speeds |= self._rates.all_of(count)
        return sorted(-speed for speed in speeds)

    def best(self, mask: int, count: int, within: Within = Within.NODE) -> tuple[int, ...] | None:
        """:func:`best_set`, with the free GPUs as a bit mask."""
        key = (mask, count, within)
        try:
            return self._chosen[key]
        except KeyError:
            if len(self._chosen) >= MAX_PICKS:
                self._chosen.clear()
            found = self._chosen[key] = self._search(mask, count, within)
            return found

    def offer(self, mask: int, count: int, within: Within = Within.NODE) -> Offer | None:
        """What taking :meth:`best` gives, and what it costs the others; ``None`` if there is no such set."""
        key = (mask, count, within)
        try:
            return self._offered[key]
        except KeyError:
            if len(self._offered) >= MAX_PICKS:
                self._offered.clear()
            gpus = self.best(mask, count, within)
            found = None
            if gpus is not None:
                speed = self.mb_per_s(gpus) if count > 1 else 0
                found = Offer(-speed, self.loss(mask, gpus), 0, mask.bit_count())
            self._offered[key] = found
            return found

    def loss(self, mask: int, gpus: Iterable[int]) -> tuple[int, ...]:
        """How much less the free GPUs offer to others once these are taken: :attr:`Offer.loss`."""
        rest = mask & ~sum(1 << gpu for gpu in gpus)
        return tuple(a - b for a, b in zip(self.on_offer(mask), self.on_offer(rest), strict=True))

    def packed(self, mask: int, needs: Needs) -> list[tuple[int, ...]]:
        """As many disjoint sets that meet ``needs`` as the free GPUs hold, the fastest first."""
        if not self.tabulated:
            return self._packed_greedily(mask, needs)
        fitting = (
            [
                pick
                for equally_fast in self._fastest_first[needs.gpus]
                for pick in equally_fast
                if needs.within in self._reach[pick] and -self._bandwidth[pick] <= needs.slowest
            ]
            if needs.gpus <= len(self._links)
            else []
        )
        spare = self._spare

        @cache
        def most(pool: Pick) -> tuple[int, tuple[Pick, ...]]:
            """The most picks out of a pool, and which."""
            limit = sum(self._counts(pool)) // needs.gpus
            if not limit:
                return 0, ()
            unit, bits = next(
                (unit, bits) for unit, bits in zip(self._units, self._fields, strict=True) if pool & bits
            )
            best: tuple[int, tuple[Pick, ...]] = (0, ())
            for pick in fitting:  # that takes a GPU of the first group; or none does
                if pick & bits and ((pool | spare) - pick) & spare == spare:
                    count, picks = most(pool - pick)
                    if count + 1 > best[0]:
                        best = count + 1, (pick, *picks)
                        if best[0] == limit:
                            return best
            without = most(pool - unit)
            return without if without[0] > best[0] else best

        sets = []
        for pick in most(self._pick(mask))[1]:
            gpus = self._lowest(pick, mask)
            mask &= ~sum(1 << gpu for gpu in gpus)
            sets.append(gpus)
        return sorted(sets, key=lambda gpus: (self._slowness_of(gpus), gpus))

    def disjoint(
        self, mask: int, needs: Needs, slowest: int
    ) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Disjoint sets of which none is slower: the best one after the other, and as many as there are."""
        best: list[tuple[int, ...]] = []
        rest = mask
        while gpus := self.best(rest, needs.gpus, needs.within):
            if self._slowness_of(gpus) > slowest:
                break
            best.append(gpus)
            rest &= ~sum(1 << gpu for gpu in gpus)
        if len(best) == mask.bit_count() // needs.gpus:
            return best, best
        return best, self.packed(mask, needs._replace(min_bandwidth_gb_per_s=-slowest / 1000))

    def several(self, mask: int, needs: Needs, count: int) -> list[tuple[int, ...]] | None:
        """So many disjoint sets in rank order, the slowest as fast as can be; ``None`` if there are fewer."""
        for slowest in self.slownesses(needs.gpus):
            if slowest <= needs.slowest:
                for sets in self.disjoint(mask, needs, slowest):
                    if len(sets) >= count:
                        return self.in_rank_order(sets[:count], needs, mask)
        return None

    def in_rank_order(
        self, sets: Sequence[tuple[int, ...]], needs: Needs, others: int = 0
    ) -> list[tuple[int, ...]]:
        """As many sets, in rank order: ascending chunks of their GPUs if that makes the slowest no slower.

        Such chunks are what an engine makes of a node's GPUs that sorts them; see ``docs/rank-order.md``. They are
        the same GPUs cut anew; else, if there are any, chunks of GPUs in ``others``, a mask; else the sets as they
        are. The search is exact, as the chunk that ends first leaves most to the next.
        """
        slowest = max(map(self._slowness_of, sets))

        def apart(mask: int) -> list[tuple[int, ...]]:
            found: list[tuple[int, ...]] = []
            window = 0
            for gpu in range(mask.bit_length()):
                window |= mask & 1 << gpu
                best = self.best(window, needs.gpus, needs.within)
                if best and self._slowness_of(best) <= slowest:
                    found.append(best)
                    window = 0
            return found[: len(sets)]

        for mask in (sum(1 << gpu for gpus in sets for gpu in gpus), others):
            if len(found := apart(mask)) == len(sets):
                return found
        return sorted(sets)

    def _slowness_of(self, gpus: Sequence[int]) -> int:
        """The :attr:`Offer.slowness` of a set."""
        return -self.mb_per_s(gpus) if len(gpus) > 1 else 0

    def on_offer(self, mask: int) -> tuple[int, ...]:
        """The best bandwidth that free GPUs offer to a request for 8, 4 and 2 of them, MB/s."""
        return self._left[self._pick(mask)][::2] if self.tabulated else (0,) * len(LEFTOVER_SIZES)

    def _search(self, mask: int, count: int, within: Within) -> tuple[int, ...] | None:
        if mask.bit_count() < count:
            return None
        if not self.tabulated:
            return self._greedy(mask, count, within)
        pool, spare, left, near = self._pick(mask), self._spare, self._left, self._near
        guarded = pool | spare
        for equally_fast in self._fastest_first[count]:
            picks = [pick for pick in equally_fast if (guarded - pick) & spare == spare]
            if within is not Within.NODE:
                picks = [pick for pick in picks if within in self._reach[pick]]
            if picks:
                break
        else:
            return None
        if len(picks) > 1:
            kindest = max((left[pool - pick], left[pick]) for pick in picks)
            picks = [pick for pick in picks if (left[pool - pick], left[pick]) == kindest]
            nearest = min(near[pick] for pick in picks)
            picks = [pick for pick in picks if near[pick] == nearest]
        return min(self._lowest(pick, mask) for pick in picks)

    def _pick(self, mask: int) -> Pick:
        return sum(
            (mask & kind).bit_count() * unit for kind, unit in zip(self._kind_masks, self._units, strict=True)
        )

    def _counts(self, pick: Pick) -> Iterator[int]:
        for bits, unit in zip(self._fields, self._units, strict=True):
            yield (pick & bits) // unit

    def _lowest(self, pick: Pick, mask: int) -> tuple[int, ...]:
        """The lowest free GPUs that a pick can mean."""
        gpus: list[int] = []
        for kind, count in zip(self.twins, self._counts(pick), strict=True):
            if count:
                gpus += [gpu for gpu in kind if mask >> gpu & 1][:count]
        return tuple(sorted(gpus))

    # -- tabulating ------------------------------------------------------------------------------

    def _tabulate(self) -> None:
        """Fills the tables: per pick its bandwidth, its reach, its nearness and what it offers as a rest."""
        most = len(self._links)
        self._picks: list[list[Pick]] = [[] for _ in range(most + 1)]
        self._picks[0] = [0]
        for kind, unit in zip(self.twins, self._units, strict=True):
            for count in range(most, 0, -1):
                for taken in range(1, min(len(kind), count) + 1):
                    self._picks[count] += [pick + taken * unit for pick in self._picks[count - taken]]

        members = {pick: self._lowest(pick, -1) for picks in self._picks for pick in picks}
        ring = self._best_ring(members)
        on_nvlink = self._closed(lambda a, b: self._links[a][b].nvlinks > 0)
        past_no_host = self._closed(lambda a, b: self._links[a][b].path in (Path.NVLINK, *BELOW_ONE_SWITCH))
        self._bandwidth: dict[Pick, int] = {}
        self._reach: dict[Pick, frozenset[Within]] = {}
        self._near: dict[Pick, tuple[int, int]] = {}
        for pick, gpus in members.items():
            numa = {self._numa[gpu] for gpu in gpus}
            self._near[pick] = max((self._nic[gpu] for gpu in gpus), default=0), len(numa)
            nvlink = len(gpus) < 2 or pick in on_nvlink
            self._bandwidth[pick] = 0
            if len(gpus) > 1:
                self._bandwidth[pick] = ring[pick]
                if nvlink:
                    self._bandwidth[pick] = max(self._bandwidth[pick], self._over_nvlink(gpus))
                self._bandwidth[pick] = self.measured_mb_per_s(gpus) or self._bandwidth[pick]
            reach = {
                Within.NODE: True,
                Within.NVLINK: nvlink,
                Within.SWITCH: len(gpus) < 2 or pick in past_no_host,
                Within.NUMA: len(numa) == 1 and () not in numa,
            }
            self._reach[pick] = frozenset(distance for distance, kept in reach.items() if kept)
        self._left = self._what_rests_offer()
        self._fastest_first = [
            [list(equal) for _, equal in groupby(sorted(picks, key=self._slowness), self._slowness)]
            for picks in self._picks
        ]

    def _slowness(self, pick: Pick) -> int:
        return -self._bandwidth[pick]

    def _over_nvlink(self, gpus: Sequence[int]) -> int:
        """The bandwidth of GPUs that have a ring over NVLink."""
        fewest = min(self._links[a][b].nvlinks for a, b in combinations(gpus, 2))
        if self._switch and fewest:
            return switch_mb_per_s(fewest, len(gpus), self._gpu)
        if len(gpus) == 2:
            return fewest * self._gpu.nvlink_mb_per_s
        return 2 * nvlink_rings(self._links, gpus) * self._gpu.nvlink_mb_per_s

    def _hop(self, a: int, b: int) -> Hop:
        """A hop between two GPUs, whatever else shares its way."""
        link, gpu = self._links[a][b], self._gpu
        if link.path in (Path.NVLINK, Path.UNKNOWN):
            return Hop(hop_mb_per_s(link, gpu), 0)
        if link.path in BELOW_ONE_SWITCH and self._reaches(link):
            return Hop(min(hop_mb_per_s(link, gpu), self._lanes[a], self._lanes[b]), 0)
        return Hop(0, self._host.far if link.path is Path.SYS else self._host.near)

    def _reaches(self, link: Link) -> bool:
        """Whether two GPUs have peer-to-peer over PCIe."""
        return self._peer if link.peer is None else link.peer

    def _pair(self, a: int, b: int) -> int:
        """What two GPUs reach that are alone."""
        lanes = min(self._lanes[a], self._lanes[b])
        one, other = self._uplink[a], self._uplink[b]
        shared = (1, 2) if one == other else (2 if self._bridge[one] == self._bridge[other] else 1, 1)
        return pair_mb_per_s(self._links[a][b], self._gpu, lanes, self._host, self._peer, shared)

    def _staged(self, gpus: Sequence[int], host: int) -> int:
        """What a ring through all of them carries whose slowest hop goes through the host's memory."""
        islands = components(gpus, lambda a, b: self._hops[a][b].direct > 0)
        uplinks = Counter(self._uplink[island[0]] for island in islands)
        bridges = Counter(self._bridge[uplink] for uplink in uplinks)
        bridge = max(bridges.values()) if self._host.bridged else 1
        lanes = min(self._lanes[gpu] for gpu in gpus)
        return staged_mb_per_s(host, lanes, len(gpus), bridge, max(uplinks.values()))

    def _all_staged(self, host: int, count: int) -> set[int]:
        """All that rings of so many GPUs can carry whose slowest hop goes through the host's memory."""
        return {
            staged_mb_per_s(host, lanes, count, bridge, uplink)
            for lanes in set(self._lanes)
            for bridge in range(1, count + 1 if self._host.bridged else 2)
            for uplink in range(1, count + 1)
        }

    def _best_ring(self, members: Mapping[Pick, Sequence[int]]) -> dict[Pick, int]:
        """Per pick of two or more, what the best ring through it carries, MB/s."""
        hops = {self._hops[a][b] for a, b in self._pairs()}
        found = dict.fromkeys((pick for picks in self._picks[2:] for pick in picks), 0)
        # A ring is as fast as the slowest of its direct hops, and of those through the host: all pairs of bounds.
        directs = sorted({hop.direct for hop in hops} - {0})
        for host in sorted({hop.host for hop in hops} | {0}):
            through = {hop for hop in hops if host and hop.host >= host}
            staged: dict[Pick, int] = {}
            for direct in [*directs, 0] if host else directs:
                usable = through | {hop for hop in hops if direct and hop.direct >= direct}
                closed = self._closed(lambda a, b: self._hops[a][b] in usable)  # noqa: B023
                for pick in closed:
                    if host and pick not in staged:
                        staged[pick] = self._staged(members[pick], host)
                    rates = [rate for rate in (direct, staged.get(pick)) if rate]
                    found[pick] = max(found[pick], min(rates))
        for a, b in self._pairs():
            found[self._pick(1 << a | 1 << b)] = self.hops[a][b]
        return found

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """One pair of GPUs for each two groups, and within each group."""
        for i, kind in enumerate(self.twins):
            if len(kind) > 1:
                yield kind[0], kind[1]
            for other in self.twins[:i]:
                yield kind[0], other[0]

    def _closed(self, joined) -> set[Pick]:  # type: ignore[no-untyped-def]
        """The picks of two or more GPUs with a ring in the graph of ``joined`` pairs (two GPUs: an edge).

        By dynamic programming (Held and Karp): at which groups can a path end that starts in the pick's
        first group and goes through all of it? The ring closes if one of them is joined to the start.
        """
        near = [0] * len(self.twins)
        for i, kind in enumerate(self.twins):
            if len(kind) > 1 and joined(kind[0], kind[1]):
                near[i] |= 1 << i
            for j, other in enumerate(self.twins[:i]):
                if joined(kind[0], other[0]):
                    near[i] |= 1 << j
                    near[j] |= 1 << i
        fields = list(zip(range(len(self.twins)), self._units, self._fields, strict=True))
        closed: set[Pick] = set()
        ends: dict[Pick, int] = {unit: 1 << i for i, unit in enumerate(self._units)}
        for picks in self._picks[2:]:
            longer: dict[Pick, int] = {}
            for pick in picks:
                here, start = 0, -1
                for i, unit, bits in fields:
                    if pick & bits:
                        if start < 0:
                            start = i
                            if pick & bits == unit:
                                continue  # the only one of its group is the start itself
                        if ends.get(pick - unit, 0) & near[i]:
                            here |= 1 << i
                if here:
                    longer[pick] = here
                    if here & near[start]:
                        closed.add(pick)
            ends = longer
        return closed

    def _what_rests_offer(self) -> dict[Pick, tuple[int, ...]]:
        """Per pick, as a rest: the best bandwidth and the sum of all, for sets of 8, of 4 and of 2 GPUs."""
        best: dict[Pick, tuple[int, ...]] = {}
        for count, picks in enumerate(self._picks):
            for pick in picks:
                row: list[int] = []
                smaller = [
                    (best[pick - unit], taken)
                    for unit, taken in zip(self._units, self._counts(pick), strict=True)
                    if taken
                ]
                for i, size in enumerate(LEFTOVER_SIZES):
                    if count < size:
                        row += [0, 0]
                    elif count == size:
                        row += [self._bandwidth[pick]] * 2
                    else:
                        # A set of `size` lies in `count - size` of the rests that are one GPU smaller.
                        total = sum(rest[2 * i + 1] * taken for rest, taken in smaller)
                        row += [max(rest[2 * i] for rest, _ in smaller), total // (count - size)]
                best[pick] = tuple(row)
        return best

    # -- without tables --------------------------------------------------------------------------

    def _at_least(self, gpus: Sequence[int]) -> int:
        fewest = min(self._links[a][b].nvlinks for a, b in combinations(gpus, 2))
        if self._switch and fewest:
            return switch_mb_per_s(fewest, len(gpus), self._gpu)
        if len(gpus) == 2:
            return self.hops[gpus[0]][gpus[1]]
        hops = {self._hops[a][b] for a, b in combinations(gpus, 2)}
        rates = {hop.direct or self._staged(gpus, hop.host) for hop in hops}
        return min(rates)

    def _greedy(self, mask: int, count: int, within: Within) -> tuple[int, ...] | None:
        """Grows a set from each free GPU by whoever is joined best, and takes the best of them."""
        free = [gpu for gpu in range(mask.bit_length()) if mask >> gpu & 1]
        joined = self.hops
        if self._rates is not None:
            joined = [[*row] for row in joined]
            for a, b in combinations(free, 2):
                joined[a][b] = joined[b][a] = self.measured_mb_per_s((a, b)) or joined[a][b]
        found: list[tuple[int, tuple[int, ...]]] = []
        for seed in free:
            gpus = [seed]
            while len(gpus) < count:
                others = [gpu for gpu in free if gpu not in gpus and self._reachable([*gpus, gpu], within)]
                if not others:
                    break
                gpus.append(max(others, key=lambda gpu: (min(joined[gpu][one] for one in gpus), -gpu)))
            if len(gpus) == count:
                speed = self.mb_per_s(gpus) if count > 1 else 0
                found.append((-speed, tuple(sorted(gpus))))
        if not count:
            return ()
        return min(found)[1] if found else None

    def _packed_greedily(self, mask: int, needs: Needs) -> list[tuple[int, ...]]:
        sets: list[tuple[int, ...]] = []
        while gpus := self._greedy(mask, needs.gpus, needs.within):
            if needs.gpus > 1 and -self.mb_per_s(gpus) > needs.slowest:
                break
            sets.append(gpus)
            mask &= ~sum(1 << gpu for gpu in gpus)
        return sets

    def _reachable(self, gpus: Sequence[int], within: Within) -> bool:
        if within is Within.NUMA:
            return len({self._numa[gpu] for gpu in gpus} | {()}) == 2
        links = [self._links[a][b].path for a, b in combinations(gpus, 2)]
        farthest = {Within.NVLINK: Path.NVLINK, Within.SWITCH: Path.PXB}.get(within, Path.UNKNOWN)
        return all(PATH_ORDER[path] <= PATH_ORDER[farthest] for path in links)


def twins_of(links: Sequence[Sequence[object]], places: Sequence[object]) -> list[list[int]]:
    """The GPUs, ascending, grouped so that two of a group can change places and nothing changes."""
    kinds: list[list[int]] = []
    for gpu, place in enumerate(places):
        for kind in kinds:
            twin = kind[0]
            others = (other for other in range(len(places)) if other not in (gpu, twin))
            if place == places[twin] and all(links[gpu][other] == links[twin][other] for other in others):
                kind.append(gpu)
                break
        else:
            kinds.append([gpu])
    return kinds


def _group_of(groups: Iterable[Sequence[int]]) -> dict[int, int]:
    """GPU -> the lowest one of its group."""
    return {gpu: group[0] for group in groups for gpu in group}


class _Same:
    """A topology compared by identity: hashing its n x n links takes longer than an answer.

    It holds the topology, so that no other one can get the same identity while this is a key.
    """

    __slots__ = ("topology",)

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def __hash__(self) -> int:
        return id(self.topology)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.topology is other.topology


@lru_cache(maxsize=4096)
def _shape_of(same: _Same) -> Shape:
    """The shape at the worst that is possible."""
    return _at(same.topology, 0)


@lru_cache(maxsize=4096)
def _at_best(same: _Same) -> Shape:
    """The shape at the best that is possible; the same one where nothing is unknown that matters."""
    return _at(same.topology, 1)


def _at(machine: Topology, best: int) -> Shape:
    gpu = generation(machine.model)
    if not (bool(best) if machine.nvls is None else machine.nvls) and has_switch(machine.links, gpu):
        gpu = replace(gpu, nvls_percent=0)
    hosts = hosts_of(machine.cpu, gpu.pcie)
    asked = any(link.peer is None for row in machine.links for link in row if link.path in _OVER_PCIE)
    return _shape(
        machine.links,
        machine.numa,
        machine.nearest_nic,
        gpu,
        machine.lanes,
        hosts[best],
        bool(best) and asked,
        () if best else machine.measured,
    )


_shape = lru_cache(maxsize=512)(Shape)
