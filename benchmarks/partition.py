"""A yardstick: the choice by partitions, as NVIDIA describes the best-effort policy of its go-gpuallocator.

Written from that description, not from its code. A pair of GPUs scores 100 for each NVLink between them, or
else by its PCIe path: the nearer, the more. All ways to divide the free GPUs into sets of the requested size
are tried (one set is smaller where they do not divide evenly). Of the division whose sets have the highest
scores in all, the best set of the requested size is taken; of equals, the first found.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from itertools import combinations

from placement.core.topology import Link, Path, Topology

PATH_SCORES = {Path.PIX: 50, Path.PXB: 40, Path.PHB: 30, Path.NODE: 20, Path.SYS: 10}

MOST_PARTITIONS = 10_000
"""More are not tried: 16 free GPUs divide into pairs in two million ways."""

Set = tuple[int, ...]


def pair_score(link: Link) -> int:
    """What a pair of GPUs is worth. (A matrix hides the PCIe path below NVLink, so that it adds nothing.)"""
    return 100 * link.nvlinks or PATH_SCORES.get(link.path, 0)


def set_score(topology: Topology, gpus: Collection[int]) -> int:
    """What a set is worth: the sum over its pairs."""
    return sum(pair_score(topology.link(a, b)) for a, b in combinations(gpus, 2))


def count_partitions(free: int, size: int) -> int:
    """How many ways there are to divide so many GPUs into sets of ``size``, and a smaller one for the rest."""
    sets, rest = divmod(free, size)
    whole = free - rest
    return (
        math.comb(free, rest) * math.factorial(whole) // (math.factorial(size) ** sets * math.factorial(sets))
    )


def partitions(free: Set, size: int) -> Iterator[list[Set]]:
    """All those ways. Those that keep the lowest GPUs together come first."""
    if not free:
        yield []
        return
    first, others = free[0], free[1:]
    rest = len(free) % size
    starts = list(combinations(others, size - 1)) if len(free) >= size else []
    if rest:
        starts += combinations(others, rest - 1)
    for start in sorted(starts, key=lambda start: (*start, *(math.inf,) * (size - 1 - len(start)))):
        left = tuple(gpu for gpu in others if gpu not in start)
        for sets in partitions(left, size):
            yield [(first, *start), *sets]


def best_set(topology: Topology, free: Collection[int], size: int) -> Set | None:
    """The GPUs that the policy chooses, or ``None`` if fewer are free.

    Raises:
        OverflowError: there are more than :data:`MOST_PARTITIONS` to try.
    """
    if len(free) < size:
        return None
    if count_partitions(len(free), size) > MOST_PARTITIONS:
        raise OverflowError(f"{len(free)} GPUs divide into sets of {size} in too many ways")
    scores: dict[Set, int] = {}

    def worth(gpus: Set) -> int:
        if gpus not in scores:
            scores[gpus] = set_score(topology, gpus)
        return scores[gpus]

    best = max(partitions(tuple(sorted(free)), size), key=lambda sets: sum(map(worth, sets)))
    return max((gpus for gpus in best if len(gpus) == size), key=worth)
