"""How good a set of GPUs is, and the best set among the free GPUs."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from placement.core.measured import is_suspect
from placement.core.needs import Needs, Within
from placement.core.shape import shape_at_best, shape_of
from placement.core.topology import UNKNOWN_LINK, Link, Topology


@dataclass(frozen=True, order=True)
class Score:
    """How good a set of GPUs is. Orderable: a greater score is a better set.

    Attributes:
        bandwidth_gb_per_s: bus bandwidth of a large all-reduce over the set, GB/s (10^9 bytes) per
            GPU and direction, as nccl-tests reports it: measured or predicted; infinite for fewer than two GPUs.
        weakest: the slowest link between two of them; not part of the order.
        weakest_pair: that pair (its lowest ordinals, if several tie); not part of the order.
        upper_gb_per_s: the upper end of the bandwidth, if something that decides it is unknown: the host's processors,
            whether the GPUs have peer-to-peer, or whether the NVSwitch reduces (NVLS); ``bandwidth_gb_per_s`` is then
            the lower end. ``None`` if nothing is unknown. Not part of the order.
        measured: whether the bandwidth was measured, on the set or on one alike; not part of the order.
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
        """The bandwidth if measured or if every link is known, else ``None``: users would take a guess as a fact."""
        unknown = self.weakest is None or (self.weakest == UNKNOWN_LINK and not self.measured)
        return None if unknown else self.bandwidth_gb_per_s

    @property
    def known_upper_gb_per_s(self) -> float | None:
        """:attr:`upper_gb_per_s` if every link is known."""
        return None if self.known_gb_per_s is None else self.upper_gb_per_s


def score(topology: Topology, gpus: Collection[int]) -> Score:
    """How good ``gpus`` are together."""
    ordered = sorted(gpus)
    if len(ordered) < 2:
        return Score(math.inf)
    shape = shape_of(topology)
    _, pair = min((shape.hops[a][b], (a, b)) for a, b in combinations(ordered, 2))
    measured = shape.measured_mb_per_s(ordered) is not None
    least = shape.mb_per_s(ordered)
    most = least if measured else shape.at_most(ordered, shape_at_best(topology).mb_per_s(ordered))
    upper = most / 1000 if most > least else None
    return Score(least / 1000, topology.link(*pair), pair, upper, measured)


def suspect_pairs(topology: Topology) -> list[tuple[tuple[int, ...], int, int]]:
    """The pairs that were measured at less than half of their prediction: GPUs, measured and predicted MB/s."""
    pairs = [(gpus, rate) for gpus, rate in topology.measured if len(gpus) == 2]
    if not pairs:
        return []
    predicted = shape_of(topology).predicted
    found = [(gpus, rate, predicted.mb_per_s(gpus)) for gpus, rate in pairs]
    return [one for one in found if is_suspect(*one[1:])]


def slowest_group(topology: Topology, gpus: Sequence[int], size: int) -> Score:
    """How good the slowest tensor-parallel group is, if GPUs in rank order are cut into groups.

    For ``sorted(gpus)`` it is what an engine gets that sorts the GPUs of a node; see ``docs/rank-order.md``.

    Args:
        topology: how they are linked.
        gpus: in rank order.
        size: GPUs of each group; 0 if all are one group.
    """
    size = size or max(1, len(gpus))
    scores = [score(topology, gpus[i : i + size]) for i in range(0, max(1, len(gpus)), size)]
    slowest = min(scores)
    upper = min(one.upper_gb_per_s or one.bandwidth_gb_per_s for one in scores)
    return replace(slowest, upper_gb_per_s=upper if upper > slowest.bandwidth_gb_per_s else None)


def ray_set(free: Collection[int], count: int) -> tuple[int, ...] | None:
    """The GPUs that Ray alone would give: it takes free slots in ascending order.

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
    2. the set that leaves most to others: the best bandwidth that the other free GPUs still offer to a request for 8
       GPUs, then the sum over all their sets of 8; then the same for 4, and for 2;
    3. the set that is worth most when it is given back: the same measure, of the set itself, so that GPUs which
       belong together come and go together;
    4. the nearest network card of the GPU that is farthest from one; then the fewest NUMA nodes;
    5. the lowest ordinals, which Ray gives anyway, so that nothing need be steered.

    The answer is always the same, and exact: as good as by trying all sets. (On machines of more than 16
    GPUs of which hardly two are interchangeable it is good, but not exact.)

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
    """The best set that meets ``needs`` and, if possible, leaves room for ``more`` sets like it.

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
