"""The bandwidth between the GPUs of one machine, from the links between them and what these share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from placement.core.bandwidth import (
    BELOW_ONE_SWITCH,
    Generation,
    Host,
    has_switch,
    hop_mb_per_s,
    lanes_mb_per_s,
    nvlink_rings,
    pair_mb_per_s,
    staged_mb_per_s,
    switch_mb_per_s,
)
from placement.core.topology import Lanes, Link, Path, components

Links = tuple[tuple[Link, ...], ...]

_BELOW_ONE_BRIDGE = (*BELOW_ONE_SWITCH, Path.PHB)


class Hop(NamedTuple):
    """One hop of a ring: its direct rate, MB/s, or the rate of the host's memory if it goes through that.

    The other one is 0.
    """

    direct: int
    host: int


class Interconnect:
    """The links of a machine, and the bandwidth of sets of its GPUs.

    Args:
        links: between each two GPUs.
        gpu: their generation.
        lanes: of each GPU.
        host: what they copy through.
        peer: whether GPUs have peer-to-peer over PCIe if that is unknown.

    Attributes:
        links: as given.
        hops: per pair of GPUs, a hop of a ring, without regard to what shares its path.
        pairs: per pair of GPUs, the bandwidth of a set of the two, MB/s.
        lanes_mb_per_s: the rate of each GPU's PCIe lanes, MB/s.
    """

    def __init__(
        self, links: Links, gpu: Generation, lanes: Sequence[Lanes | None], host: Host, peer: bool
    ) -> None:
        self.links, self._gpu, self._host, self._peer = links, gpu, host, peer
        self._switch = has_switch(links, gpu)
        self.lanes_mb_per_s = [lanes_mb_per_s(one, gpu) for one in lanes]
        everyone = range(len(links))
        self._uplink = _group_of(components(everyone, lambda a, b: links[a][b].path in BELOW_ONE_SWITCH))
        self._bridge = _group_of(components(everyone, lambda a, b: links[a][b].path in _BELOW_ONE_BRIDGE))
        self.hops = [[self._hop(a, b) for b in everyone] for a in everyone]
        self.pairs = [[self._pair(a, b) for b in everyone] for a in everyone]

    def on_nvlink(self, gpus: Sequence[int]) -> int:
        """The bandwidth of GPUs that have a ring over NVLink."""
        fewest = min(self.links[a][b].nvlinks for a, b in combinations(gpus, 2))
        if self._switch and fewest:
            return switch_mb_per_s(fewest, len(gpus), self._gpu)
        if len(gpus) == 2:
            return fewest * self._gpu.nvlink_mb_per_s
        return 2 * nvlink_rings(self.links, gpus) * self._gpu.nvlink_mb_per_s

    def _hop(self, a: int, b: int) -> Hop:
        """A hop between two GPUs, without regard to what shares its path."""
        link, gpu = self.links[a][b], self._gpu
        if link.path in (Path.NVLINK, Path.UNKNOWN):
            return Hop(hop_mb_per_s(link, gpu), 0)
        if link.path in BELOW_ONE_SWITCH and self._reaches(link):
            return Hop(min(hop_mb_per_s(link, gpu), self.lanes_mb_per_s[a], self.lanes_mb_per_s[b]), 0)
        return Hop(0, self._host.far if link.path is Path.SYS else self._host.near)

    def _reaches(self, link: Link) -> bool:
        """Whether two GPUs have peer-to-peer over PCIe."""
        return self._peer if link.peer is None else link.peer

    def _pair(self, a: int, b: int) -> int:
        """The bandwidth of a set of two GPUs."""
        lanes = min(self.lanes_mb_per_s[a], self.lanes_mb_per_s[b])
        one, other = self._uplink[a], self._uplink[b]
        shared = (1, 2) if one == other else (2 if self._bridge[one] == self._bridge[other] else 1, 1)
        return pair_mb_per_s(self.links[a][b], self._gpu, lanes, self._host, self._peer, shared)

    def staged(self, gpus: Sequence[int], host: int) -> int:
        """The rate of a ring through all of them whose slowest hop goes through the host's memory."""
        islands = components(gpus, lambda a, b: self.hops[a][b].direct > 0)
        uplinks = Counter(self._uplink[island[0]] for island in islands)
        bridges = Counter(self._bridge[uplink] for uplink in uplinks)
        bridge = max(bridges.values()) if self._host.bridged else 1
        lanes = min(self.lanes_mb_per_s[gpu] for gpu in gpus)
        return staged_mb_per_s(host, lanes, len(gpus), bridge, max(uplinks.values()))

    def _all_staged(self, host: int, count: int) -> set[int]:
        """All rates that rings of ``count`` GPUs can have whose slowest hop goes through the host's memory."""
        return {
            staged_mb_per_s(host, lanes, count, bridge, uplink)
            for lanes in set(self.lanes_mb_per_s)
            for bridge in range(1, count + 1 if self._host.bridged else 2)
            for uplink in range(1, count + 1)
        }

    def speeds_of(self, count: int) -> set[int]:
        """All values that :meth:`at_least` may return for ``count`` GPUs."""
        pairs = list(combinations(range(len(self.links)), 2))
        links = {self.links[a][b].nvlinks for a, b in pairs} - {0} if self._switch else set()
        hops = {self.hops[a][b] for a, b in pairs}
        speeds = {hop.direct for hop in hops} - {0}
        speeds |= {speed for hop in hops if hop.host for speed in self._all_staged(hop.host, count)}
        if count == 2:
            speeds = {self.pairs[a][b] for a, b in pairs}
        return speeds | {switch_mb_per_s(each, count, self._gpu) for each in links}

    def at_least(self, gpus: Sequence[int]) -> int:
        """What two or more GPUs reach with any order of the ring."""
        fewest = min(self.links[a][b].nvlinks for a, b in combinations(gpus, 2))
        if self._switch and fewest:
            return switch_mb_per_s(fewest, len(gpus), self._gpu)
        if len(gpus) == 2:
            return self.pairs[gpus[0]][gpus[1]]
        hops = {self.hops[a][b] for a, b in combinations(gpus, 2)}
        rates = {hop.direct or self.staged(gpus, hop.host) for hop in hops}
        return min(rates)


def _group_of(groups: Iterable[Sequence[int]]) -> dict[int, int]:
    """GPU -> the lowest one of its group."""
    return {gpu: group[0] for group in groups for gpu in group}
