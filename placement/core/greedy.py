"""Good sets of GPUs on a machine that is too large for tables: grown by the GPU with the best links."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from placement.core.interconnect import Interconnect
from placement.core.measured import Rates
from placement.core.needs import Needs, Within
from placement.core.topology import PATH_ORDER, Path


class Greedy:
    """The search on a machine.

    Args:
        interconnect: its links.
        numa: the NUMA nodes of each GPU.
        rates: measured rates, if there are any.
    """

    def __init__(
        self, interconnect: Interconnect, numa: Sequence[tuple[int, ...]], rates: Rates | None
    ) -> None:
        self._interconnect, self._numa, self._rates = interconnect, numa, rates

    def mb_per_s(self, gpus: Sequence[int]) -> int:
        """The bus bandwidth of two or more GPUs: measured, else the lower end of the prediction."""
        measured = self._rates.of(tuple(sorted(gpus))) if self._rates is not None else None
        return measured or self._interconnect.at_least(gpus)

    def slownesses(self, count: int) -> list[int]:
        """The slownesses that sets of two or more GPUs can have, the fastest first."""
        speeds = self._interconnect.speeds_of(count)
        if self._rates is not None:
            speeds |= self._rates.all_of(count)
        return sorted(-speed for speed in speeds)

    def best(self, mask: int, count: int, within: Within) -> tuple[int, ...] | None:
        """Grows a set from each free GPU by the GPU with the best links, and takes the best set."""
        free = [gpu for gpu in range(mask.bit_length()) if mask >> gpu & 1]
        joined = self._interconnect.pairs
        if self._rates is not None:
            joined = [[*row] for row in joined]
            for a, b in combinations(free, 2):
                joined[a][b] = joined[b][a] = self._rates.of((a, b)) or joined[a][b]
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

    def packed(self, mask: int, needs: Needs) -> list[tuple[int, ...]]:
        """Disjoint sets that meet ``needs``, one after the other."""
        sets: list[tuple[int, ...]] = []
        while gpus := self.best(mask, needs.gpus, needs.within):
            if needs.gpus > 1 and -self.mb_per_s(gpus) > needs.slowest:
                break
            sets.append(gpus)
            mask &= ~sum(1 << gpu for gpu in gpus)
        return sets

    def _reachable(self, gpus: Sequence[int], within: Within) -> bool:
        if within is Within.NUMA:
            return len({self._numa[gpu] for gpu in gpus} | {()}) == 2
        links = [self._interconnect.links[a][b].path for a, b in combinations(gpus, 2)]
        farthest = {Within.NVLINK: Path.NVLINK, Within.SWITCH: Path.PXB}.get(within, Path.UNKNOWN)
        return all(PATH_ORDER[path] <= PATH_ORDER[farthest] for path in links)
