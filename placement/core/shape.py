"""What the free GPUs of a machine offer: the best set of them, several at once, and what taking it costs others.

All answers about machines of one shape are computed once, on first use, and shared by every node of
that shape: the bandwidth of every set (:mod:`placement.core.bandwidth`) and what the remaining GPUs still offer
(:mod:`placement.core.tables`). Choosing is then a table lookup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import combinations, compress
from typing import NamedTuple

from placement.core.bandwidth import BELOW_ONE_SWITCH, Generation, Host, generation, has_switch, hosts_of
from placement.core.greedy import Greedy
from placement.core.interconnect import Interconnect, Links
from placement.core.measured import Rates
from placement.core.needs import Needs, Within
from placement.core.tables import LEFTOVER_SIZES, Tables
from placement.core.topology import PATH_ORDER, Lanes, MeasuredRates, Path, Topology
from placement.core.twins import Pick, Picks, twins_of

MAX_PICKS = 1 << 16
"""Machines with more picks (17 GPUs and more, no two of them interchangeable) have no tables."""

_OVER_PCIE = (*BELOW_ONE_SWITCH, Path.PHB, Path.NODE, Path.SYS)


class Offer(NamedTuple):
    """What a node's free GPUs offer to a request. Sorts from the best to the worst.

    Attributes:
        slowness: minus the predicted bandwidth of the best set, MB/s; 0 for a single GPU.
        loss: how much less is then offered to others: the best bandwidth for 8, 4 and 2 GPUs, MB/s.
        rest: thousandths that stay free on a GPU that is shared.
        free: how many GPUs are free before.
    """

    slowness: int
    loss: tuple[int, ...]
    rest: int
    free: int


def shape_of(topology: Topology) -> Shape:
    """The tables of a machine's shape; built on first use, within milliseconds (8 GPUs) or a second (16)."""
    return _shape_of(_Same(topology))


def shape_at_best(topology: Topology) -> Shape:
    """The same for the best machine that it may be, if something that decides the bandwidth is unknown."""
    return _at_best(_Same(topology))


class Shape:
    """Machines that differ only in their names. Get one from :func:`shape_of`.

    Attributes:
        hops: per pair of GPUs, the rate of one hop of a ring, MB/s.
        twins: the groups of interchangeable GPUs.
        in_order: each group's ordinals come after those of the groups before, so that of equally good sets the
            lowest is the same pick wherever as many of each group are free.
        predicted: the same machine without measured rates; itself if it has none.

    Args:
        host: what they copy through.
        peer: whether GPUs have peer-to-peer over PCIe if that is unknown.
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
        self._rates = (
            Rates(measured, links, lanes, self.predicted.mb_per_s, has_switch(links, gpu))
            if measured
            else None
        )
        interconnect = Interconnect(links, gpu, lanes, host, peer)
        self.hops = interconnect.pairs
        nic = [PATH_ORDER[path] for path in nearest_nic]
        self.twins = twins_of(links, list(zip(numa, nic, interconnect.lanes_mb_per_s, strict=True)))
        if self._rates is not None:
            self.twins = self._rates.split(self.twins)
        self.in_order = [gpu for twins in self.twins for gpu in twins] == list(range(len(links)))
        self._chosen: dict[tuple[int, int, Within], tuple[int, ...] | None] = {}
        self._offered: dict[tuple[int, int, Within], Offer | None] = {}
        self._mixed: dict[tuple[int, tuple[bool, ...], Within], tuple[int, ...] | None] = {}
        self._picks = Picks(self.twins)
        self._greedy = Greedy(interconnect, numa, self._rates)
        self._tables: Tables | None = None
        if math.prod(len(kind) + 1 for kind in self.twins) <= MAX_PICKS:
            self._tables = Tables(interconnect, self._picks, numa, nic, self._rates, self.predicted._tables)

    @property
    def tabulated(self) -> bool:
        """Whether it has tables. Only machines of more than 16 GPUs, hardly two interchangeable, have none."""
        return self._tables is not None

    def mb_per_s(self, gpus: Sequence[int]) -> int:
        """The bus bandwidth of two or more GPUs: measured, else predicted."""
        if self._tables is not None:
            return self._tables.bandwidth[self._picks.of(sum(1 << gpu for gpu in gpus))]
        return self._greedy.mb_per_s(gpus)

    def measured_mb_per_s(self, gpus: Sequence[int]) -> int | None:
        """The measured rate of two or more GPUs, or of a set alike; ``None`` if there is none."""
        return None if self._rates is None else self._rates.of(tuple(sorted(gpus)))

    def at_most(self, gpus: Sequence[int], predicted_mb_per_s: int) -> int:
        """The predicted rate of two or more GPUs, limited by the bounds of their suspect pairs."""
        if self._rates is None or self._tables is None:
            return predicted_mb_per_s
        return self._rates.at_most(tuple(sorted(gpus)), predicted_mb_per_s)

    def slownesses(self, count: int) -> list[int]:
        """The values of :attr:`Offer.slowness` that sets of ``count`` GPUs can have, the fastest first."""
        if count < 2:
            return [0]
        if self._tables is None:
            return self._greedy.slownesses(count)
        picks = [equal[0] for equal in self._tables.fastest_first[count]] if count <= len(self.hops) else []
        return [-self._tables.bandwidth[pick] for pick in picks]

    def best(self, mask: int, count: int, within: Within = Within.NODE) -> tuple[int, ...] | None:
        """:func:`placement.core.score.best_set`, with the free GPUs as a bit mask."""
        key = (mask, count, within)
        try:
            return self._chosen[key]
        except KeyError:
            if len(self._chosen) >= MAX_PICKS:
                self._chosen.clear()
            found = self._chosen[key] = self._search(mask, count, within)
            return found

    def mixed(self, mask: int, whole: tuple[bool, ...], within: Within) -> tuple[int, ...] | None:
        """The best free GPUs of which some, by their order, are used as one set: ``whole`` says which.

        The set is the fastest; then the cost to others is least. With fewer than two GPUs in the set, all are the
        fastest set together; also where there are more than :data:`MAX_PICKS` ways.

        Returns:
            Ordinals, ascending; ``None`` if there are too few, or no such set is ``within`` the distance.
        """
        key = (mask, whole, within)
        if key not in self._mixed:
            if len(self._mixed) >= MAX_PICKS:
                self._mixed.clear()
            self._mixed[key] = self._search_mixed(mask, whole, within)
        return self._mixed[key]

    def _search_mixed(self, mask: int, whole: tuple[bool, ...], within: Within) -> tuple[int, ...] | None:
        count, size = len(whole), sum(whole)
        if not count:
            return ()
        if size < 2:
            return self.best(mask, count)
        if size == count or math.comb(mask.bit_count(), count) > MAX_PICKS:
            return self.best(mask, count, within)
        kind = {gpu: number for number, twins in enumerate(self.twins) for gpu in twins}
        alike: dict[tuple[int, ...], tuple[int, ...]] = {}
        for gpus in combinations((gpu for gpu in range(mask.bit_length()) if mask >> gpu & 1), count):
            alike.setdefault(tuple(kind[gpu] for gpu in gpus), gpus)  # of interchangeable ones the lowest
        fastest: list[tuple[int, ...]] = []
        speed = -1
        for gpus in alike.values():
            chosen = tuple(compress(gpus, whole))
            reached = self.mb_per_s(chosen)
            if reached < speed or not self.best(sum(1 << gpu for gpu in chosen), size, within):
                continue
            fastest = [*fastest, gpus] if reached == speed else [gpus]
            speed = reached
        return min(fastest, key=lambda gpus: (self.loss(mask, gpus), gpus), default=None)

    def offer(self, mask: int, count: int, within: Within = Within.NODE) -> Offer | None:
        """The offer of :meth:`best`, with its cost to others; ``None`` if there is no such set."""
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
        tables = self._tables
        if tables is None:
            return self._greedy.packed(mask, needs)
        fitting = (
            [
                pick
                for equally_fast in tables.fastest_first[needs.gpus]
                for pick in equally_fast
                if needs.within in tables.reach[pick] and -tables.bandwidth[pick] <= needs.slowest
            ]
            if needs.gpus <= len(self.hops)
            else []
        )
        spare = self._picks.spare

        @cache
        def most(pool: Pick) -> tuple[int, tuple[Pick, ...]]:
            """The most picks out of a pool, and which."""
            limit = sum(self._picks.counts(pool)) // needs.gpus
            if not limit:
                return 0, ()
            unit, bits = next(
                (unit, bits)
                for unit, bits in zip(self._picks.units, self._picks.fields, strict=True)
                if pool & bits
            )
            best: tuple[int, tuple[Pick, ...]] = (0, ())
            for pick in fitting:  # a pick that takes a GPU of the first group; or no pick does
                if pick & bits and ((pool | spare) - pick) & spare == spare:
                    count, picks = most(pool - pick)
                    if count + 1 > best[0]:
                        best = count + 1, (pick, *picks)
                        if best[0] == limit:
                            return best
            without = most(pool - unit)
            return without if without[0] > best[0] else best

        sets = []
        for pick in most(self._picks.of(mask))[1]:
            gpus = self._picks.lowest(pick, mask)
            mask &= ~sum(1 << gpu for gpu in gpus)
            sets.append(gpus)
        return sorted(sets, key=lambda gpus: (self._slowness_of(gpus), gpus))

    def disjoint(
        self, mask: int, needs: Needs, slowest: int
    ) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Disjoint sets that are no slower: the best one after the other; as many as there are."""
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
        """Disjoint sets in rank order, the slowest as fast as possible; ``None`` if there are too few."""
        for slowest in self.slownesses(needs.gpus):
            if slowest <= needs.slowest:
                for sets in self.disjoint(mask, needs, slowest):
                    if len(sets) >= count:
                        return self.in_rank_order(sets[:count], needs, mask)
        return None

    def in_rank_order(
        self, sets: Sequence[tuple[int, ...]], needs: Needs, others: int = 0
    ) -> list[tuple[int, ...]]:
        """The same number of sets in rank order: ascending chunks of their GPUs if the slowest gets no slower.

        An engine that sorts a node's GPUs uses such chunks; see ``docs/rank-order.md``. They are
        the same GPUs cut in another way; else, if there are any, chunks of GPUs in ``others``, a mask; else the sets as
        they are. The search is exact, as the chunk that ends first leaves most to the next.
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
        if self._tables is None:
            return (0,) * len(LEFTOVER_SIZES)
        return self._tables.left[self._picks.of(mask)][::2]

    def _search(self, mask: int, count: int, within: Within) -> tuple[int, ...] | None:
        if mask.bit_count() < count:
            return None
        tables = self._tables
        if tables is None:
            return self._greedy.best(mask, count, within)
        pool, spare, left, near = self._picks.of(mask), self._picks.spare, tables.left, tables.near
        guarded = pool | spare
        for equally_fast in tables.fastest_first[count]:
            picks = [pick for pick in equally_fast if (guarded - pick) & spare == spare]
            if within is not Within.NODE:
                picks = [pick for pick in picks if within in tables.reach[pick]]
            if picks:
                break
        else:
            return None
        if len(picks) > 1:
            kindest = max((left[pool - pick], left[pick]) for pick in picks)
            picks = [pick for pick in picks if (left[pool - pick], left[pick]) == kindest]
            nearest = min(near[pick] for pick in picks)
            picks = [pick for pick in picks if near[pick] == nearest]
        return min(self._picks.lowest(pick, mask) for pick in picks)


class _Same:
    """A topology compared by identity: hashing its n x n links takes longer than an answer.

    It keeps the topology alive, so that no other one can get the same identity while this is a key.
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
    """The shape of the worst machine that this may be."""
    return _at(same.topology, 0)


@lru_cache(maxsize=4096)
def _at_best(same: _Same) -> Shape:
    """The shape of the best machine that this may be; the same shape if nothing relevant is unknown."""
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
