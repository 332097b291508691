"""The bandwidth of every set of a machine's GPUs, and what all remaining GPUs still offer: computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from placement.core.bandwidth import BELOW_ONE_SWITCH
from placement.core.interconnect import Interconnect
from placement.core.measured import Gpus, Rates
from placement.core.needs import Within
from placement.core.topology import Path
from placement.core.twins import Pick, Picks

LEFTOVER_SIZES = (8, 4, 2)
"""The sizes that others most likely ask for: powers of two, as in tensor parallelism."""


class Tables:
    """The tables of a machine.

    Args:
        interconnect: its links.
        picks: its GPUs, grouped by which are interchangeable.
        numa: the NUMA nodes of each GPU.
        nic: how far each is from the nearest network card.
        rates: measured rates, if there are any.
        predicted: the tables of the same machine without measured rates.

    Attributes:
        bandwidth: the bus bandwidth of a pick, MB/s; 0 for fewer than two GPUs.
        reach: the distances that a pick keeps within.
        near: how far its farthest GPU is from a network card, and on how many NUMA nodes they are.
        left: what a pick offers if it is left over: the best bandwidth and the sum of all, for sets of 8, of 4 and of 2
            GPUs.
        fastest_first: the picks of so many GPUs, those that are equally fast together.
    """

    def __init__(
        self,
        interconnect: Interconnect,
        picks: Picks,
        numa: Sequence[tuple[int, ...]],
        nic: Sequence[int],
        rates: Rates | None = None,
        predicted: Tables | None = None,
    ) -> None:
        self._interconnect, self._picks = interconnect, picks
        most = len(interconnect.links)
        self._of_size: list[list[Pick]] = [[] for _ in range(most + 1)]
        self._of_size[0] = [0]
        for kind, unit in zip(picks.twins, picks.units, strict=True):
            for count in range(most, 0, -1):
                for taken in range(1, min(len(kind), count) + 1):
                    self._of_size[count] += [pick + taken * unit for pick in self._of_size[count - taken]]

        members = {pick: picks.lowest(pick, -1) for several in self._of_size for pick in several}
        self.bandwidth: dict[Pick, int] = {}
        self.reach: dict[Pick, frozenset[Within]] = {}
        self.near: dict[Pick, tuple[int, int]] = {}
        if rates is None or predicted is None:
            self._predict(members, numa, nic)
        else:
            self._take_over(members, rates, predicted)
        self.left = self._what_rests_offer()
        self.fastest_first = [
            [list(equal) for _, equal in groupby(sorted(picks, key=self._slowness), self._slowness)]
            for picks in self._of_size
        ]

    def _predict(
        self, members: Mapping[Pick, Gpus], numa: Sequence[tuple[int, ...]], nic: Sequence[int]
    ) -> None:
        """Fills the first three tables, if nothing was measured."""
        links = self._interconnect.links
        ring = self._best_ring(members)
        on_nvlink = self._closed(lambda a, b: links[a][b].nvlinks > 0)
        past_no_host = self._closed(lambda a, b: links[a][b].path in (Path.NVLINK, *BELOW_ONE_SWITCH))
        for pick, gpus in members.items():
            nodes = {numa[gpu] for gpu in gpus}
            self.near[pick] = max((nic[gpu] for gpu in gpus), default=0), len(nodes)
            nvlink = len(gpus) < 2 or pick in on_nvlink
            self.bandwidth[pick] = 0
            if len(gpus) > 1:
                self.bandwidth[pick] = ring[pick]
                if nvlink:
                    self.bandwidth[pick] = max(self.bandwidth[pick], self._interconnect.on_nvlink(gpus))
            reach = {
                Within.NODE: True,
                Within.NVLINK: nvlink,
                Within.SWITCH: len(gpus) < 2 or pick in past_no_host,
                Within.NUMA: len(nodes) == 1 and () not in nodes,
            }
            self.reach[pick] = frozenset(distance for distance, kept in reach.items() if kept)

    def _take_over(self, members: Mapping[Pick, Gpus], rates: Rates, predicted: Tables) -> None:
        """Fills them with the predictions, replaced by measured rates where there are any."""
        for pick, gpus in members.items():
            same = predicted._picks.of(sum(1 << gpu for gpu in gpus))
            self.near[pick], self.reach[pick] = predicted.near[same], predicted.reach[same]
            self.bandwidth[pick] = predicted.bandwidth[same]
            if len(gpus) > 1:
                self.bandwidth[pick] = rates.of(gpus) or rates.at_most(gpus, self.bandwidth[pick])

    def _slowness(self, pick: Pick) -> int:
        return -self.bandwidth[pick]

    def _best_ring(self, members: Mapping[Pick, Sequence[int]]) -> dict[Pick, int]:
        """Per pick of two or more, the rate of the best ring through it, MB/s."""
        hops = {self._interconnect.hops[a][b] for a, b in self._pairs()}
        found = dict.fromkeys((pick for picks in self._of_size[2:] for pick in picks), 0)
        # A ring is as fast as its slowest direct hop and its slowest hop through the host: try all pairs of bounds.
        directs = sorted({hop.direct for hop in hops} - {0})
        for host in sorted({hop.host for hop in hops} | {0}):
            through = {hop for hop in hops if host and hop.host >= host}
            staged: dict[Pick, int] = {}
            for direct in [*directs, 0] if host else directs:
                usable = through | {hop for hop in hops if direct and hop.direct >= direct}
                closed = self._closed(lambda a, b: self._interconnect.hops[a][b] in usable)  # noqa: B023
                for pick in closed:
                    if host and pick not in staged:
                        staged[pick] = self._interconnect.staged(members[pick], host)
                    rates = [rate for rate in (direct, staged.get(pick)) if rate]
                    found[pick] = max(found[pick], min(rates))
        for a, b in self._pairs():
            found[self._picks.of(1 << a | 1 << b)] = self._interconnect.pairs[a][b]
        return found

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """One pair of GPUs for each two groups, and within each group."""
        for i, kind in enumerate(self._picks.twins):
            if len(kind) > 1:
                yield kind[0], kind[1]
            for other in self._picks.twins[:i]:
                yield kind[0], other[0]

    def _closed(self, joined) -> set[Pick]:  # type: ignore[no-untyped-def]
        """The picks of two or more GPUs with a ring in the graph of ``joined`` pairs (two GPUs: an edge).

        By dynamic programming (Held and Karp): at which groups can a path end that starts in the pick's
        first group and goes through all of it? The ring closes if one of them is joined to the start.
        """
        near = [0] * len(self._picks.twins)
        for i, kind in enumerate(self._picks.twins):
            if len(kind) > 1 and joined(kind[0], kind[1]):
                near[i] |= 1 << i
            for j, other in enumerate(self._picks.twins[:i]):
                if joined(kind[0], other[0]):
                    near[i] |= 1 << j
                    near[j] |= 1 << i
        fields = list(zip(range(len(self._picks.twins)), self._picks.units, self._picks.fields, strict=True))
        closed: set[Pick] = set()
        ends: dict[Pick, int] = {unit: 1 << i for i, unit in enumerate(self._picks.units)}
        for picks in self._of_size[2:]:
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
        """Per pick, what it offers if left over: the best bandwidth and the sum, for sets of 8, of 4 and of 2 GPUs."""
        best: dict[Pick, tuple[int, ...]] = {}
        for count, picks in enumerate(self._of_size):
            for pick in picks:
                row: list[int] = []
                smaller = [
                    (best[pick - unit], taken)
                    for unit, taken in zip(self._picks.units, self._picks.counts(pick), strict=True)
                    if taken
                ]
                for i, size in enumerate(LEFTOVER_SIZES):
                    if count < size:
                        row += [0, 0]
                    elif count == size:
                        row += [self.bandwidth[pick]] * 2
                    else:
                        # A set of `size` is contained in `count - size` of the picks that are one GPU smaller.
                        total = sum(rest[2 * i + 1] * taken for rest, taken in smaller)
                        row += [max(rest[2 * i] for rest, _ in smaller), total // (count - size)]
                best[pick] = tuple(row)
        return best
