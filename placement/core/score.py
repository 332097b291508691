"""How good a set of GPUs is, and the best set among those that are free.

A set is as fast as its slowest pair: collectives run in rings, and a ring waits for its slowest edge (two
bridged A100 PCIe cards reach 208 GB/s of all-reduce bus bandwidth, a third one across sockets makes it 20:
NVIDIA/nccl-tests issue 178). So the weakest link counts first, the sum over all pairs second.

Rates are kept in whole MB/s inside: sums of them are exact, so that equal sets compare as equal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache

from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology

# -- What a pair of GPUs can carry, MB/s in one direction ----------------------------------------------------

_PCIE_X16 = {3: 12_000, 4: 24_000, 5: 48_000}
"""What NCCL charges for sixteen lanes of each PCIe generation (src/graph/topo.h), 3/4 of the raw rate."""

_PERCENT_OF_PCIE = {Path.PIX: 100, Path.PXB: 95, Path.PHB: 70, Path.NODE: 65, Path.SYS: 60}
"""What is left of it on each path. Only the order is certain: NCCL by default uses peer-to-peer below the
host bridge and stages through host memory above it, so PHB and NODE are charged about a third. A guess."""

_BETWEEN_SOCKETS = 10_000
"""What NCCL charges for the link between two Intel sockets since Skylake (src/graph/topo.h). AMD's and newer
Intel's carry more, but a topology does not tell which CPU it is."""

_UNKNOWN = 5_000
"""A pair nobody could look at: what GPUs do through host memory where the driver has no peer-to-peer (two
2080 Ti on one switch copy 5.7 GB/s). Below every path that is known."""

_GENERATIONS: tuple[tuple[str, int, int], ...] = (
    # product name, PCIe generation, MB/s per NVLink (of no effect where the model has none)
    (r"P100", 3, 20_000),
    (r"V100|GV100|Titan V|Titan RTX|RTX 20\d\d|Quadro RTX|GTX|T4|P4|P40|K80|M60", 3, 25_000),
    (r"RTX 30\d\d|RTX A\d\d00|A40|A10|A16|A2", 4, 14_062),
    (r"A100|A800|A30", 4, 25_000),
    (r"H100|H200|H800|H20|GH200", 5, 25_000),
    (r"G?B[123]00|RTX 50\d\d|RTX PRO \d\d00", 5, 50_000),
)
"""Per NVLink 20 GB/s in the first generation (P100), 25 in the second to fourth, 50 in the fifth (Blackwell),
and 14.062 on the four-link bridges of GA102 (RTX 3090, A6000, A40), as `nvidia-smi nvlink -s` prints it.
From network/README.md of stas00/ml-engineering and NVIDIA's data sheets."""

_DEFAULT_GENERATION = (4, 25_000)
"""For a model that is not listed, or a node of several models: PCIe 4.0, and the most common NVLink rate."""


@lru_cache(maxsize=256)
def _generation(model: str | None) -> tuple[int, int]:
    """PCIe generation and MB/s per NVLink of a product name."""
    for names, pcie, nvlink in _GENERATIONS:
        if model and re.search(rf"(?<![A-Z0-9])(?:{names})(?![0-9])", model, re.IGNORECASE):
            return pcie, nvlink
    return _DEFAULT_GENERATION


@lru_cache(maxsize=4096)
def _mb_per_s(link: Link, model: str | None) -> int:
    """Strictly ordered as :class:`Path` is, whatever the model, and increasing in the number of NVLinks."""
    pcie_generation, per_nvlink = _generation(model)
    pcie = _PCIE_X16[pcie_generation]
    if link.path is Path.NVLINK:
        # One slow link (a degraded bridge on PCIe 5.0) still counts above PCIe: NCCL takes it first, and
        # it leaves the way through the CPU to others.
        return max(link.nvlinks * per_nvlink, pcie + link.nvlinks)
    if link.path is Path.UNKNOWN:
        return _UNKNOWN
    through = pcie * _PERCENT_OF_PCIE[link.path] // 100
    return min(through, _BETWEEN_SOCKETS) if link.path is Path.SYS else through


def pair_bandwidth(topology: Topology, a: int, b: int) -> float:
    """What ordinals ``a`` and ``b`` can exchange, GB/s (10^9 bytes) per direction.

    An estimate for comparing sets, not a measurement; the tables above say where each figure is from. It is
    strictly ordered for GPUs of one model: NVLink > PIX > PXB > PHB > NODE > SYS > unknown.
    """
    return _mb_per_s(topology.link(a, b), topology.model) / 1000


# -- How good a set is ---------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Score:
    """How good a set of GPUs is. Orderable: a greater score is a better set.

    Attributes:
        weakest_gb_per_s: the slowest pair, GB/s per direction; infinite for fewer than two GPUs.
        total_gb_per_s: the sum over all pairs, GB/s per direction.
        weakest: the link of the slowest pair (its lowest ordinals, if several tie); not part of the order.
        weakest_pair: that pair; not part of the order.
    """

    weakest_gb_per_s: float
    total_gb_per_s: float
    weakest: Link | None = field(default=None, compare=False)
    weakest_pair: tuple[int, int] | None = field(default=None, compare=False)

    @property
    def link_name(self) -> str | None:
        """The weakest link as ``nvidia-smi topo -m`` prints it, ``"?"`` if unknown; ``None`` for a single GPU."""
        return None if self.weakest is None else str(self.weakest)

    @property
    def known_gb_per_s(self) -> float | None:
        """The slowest pair's GB/s where something is known of it: for people, who would take a guess for a fact."""
        return None if self.weakest in (None, UNKNOWN_LINK) else self.weakest_gb_per_s


def score(topology: Topology, gpus: Collection[int]) -> Score:
    """How good ``gpus`` are together."""
    rates = _rates_of(topology)
    ordered = sorted(gpus)
    pairs = [(rates.mb_per_s[a][b], (a, b)) for i, a in enumerate(ordered) for b in ordered[i + 1 :]]
    if not pairs:
        return Score(math.inf, 0.0)
    weakest, pair = min(pairs)
    return Score(weakest / 1000, sum(rate for rate, _ in pairs) / 1000, topology.link(*pair), pair)


# -- Which set to take ---------------------------------------------------------------------------------------

_LEFTOVER_SIZES = (8, 4, 2)
"""What others are most likely to ask for: replicas come in powers of two, as tensor parallelism does."""


def ray_set(free: Collection[int], count: int) -> tuple[int, ...] | None:
    """The GPUs that Ray alone would give: it goes through its slots in ascending order.

    That is ``NodeResourceInstanceSet::TryAllocate`` in Ray's ``resource_instance_set.cc``.

    Returns:
        Ordinals, ascending, or ``None`` if fewer than ``count`` are free.
    """
    lowest = tuple(sorted(set(free))[:count])
    return lowest if len(lowest) == count else None


def best_set(topology: Topology, free: Collection[int], count: int) -> tuple[int, ...] | None:
    """The best ``count`` of the ``free`` GPUs.

    In this order:

    1. the highest :class:`Score`: the weakest link, then the sum;
    2. what leaves the other free GPUs best off: the highest score that they still offer to a request for
       8, then for 4, then for 2 GPUs;
    3. the lowest ordinals, which is what Ray gives of itself, so that nothing need be steered.

    Exact, and the same answer every time. Answers are cached per machine.

    Returns:
        Ordinals, ascending, or ``None`` if fewer than ``count`` are free.

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
    return _best_set(_rates_of(topology), mask, count)


Pick = tuple[int, ...]
"""How many GPUs of each kind; kinds are the groups of :func:`_twins`."""


@lru_cache(maxsize=16384)
def _best_set(rates: _Rates, mask: int, count: int) -> tuple[int, ...] | None:
    free = [gpu for gpu in range(mask.bit_length()) if mask >> gpu & 1]
    if len(free) < count:
        return None
    kinds = _twins(rates, free)
    value = cache(_valuation(rates, kinds))

    @cache
    def on_offer(pool: Pick, size: int) -> tuple[float, int]:
        return max(map(value, _picks(pool, size)))

    pool = tuple(map(len, kinds))

    def left(pick: Pick) -> list[tuple[float, int]]:
        rest = tuple(have - taken for have, taken in zip(pool, pick, strict=True))
        return [on_offer(rest, size) for size in _LEFTOVER_SIZES if size <= sum(rest)]

    def lowest(pick: Pick) -> tuple[int, ...]:
        return tuple(sorted(gpu for kind, take in zip(kinds, pick, strict=True) for gpu in kind[:take]))

    fastest = on_offer(pool, count)
    tied = [(left(pick), lowest(pick)) for pick in _picks(pool, count) if value(pick) == fastest]
    kindest = max(leaves for leaves, _ in tied)
    return min(gpus for leaves, gpus in tied if leaves == kindest)


def _twins(rates: _Rates, gpus: Sequence[int]) -> list[list[int]]:
    """The GPUs, ascending, grouped so that two of a group can change places and nothing changes.

    Sets that take equally many of each group are equally good, and leave equally much. So counts are
    searched instead of sets: 1 instead of 12,870 for half of an NVSwitch machine with 16 GPUs.
    """
    kinds: list[list[int]] = []
    for gpu in gpus:
        row = rates.mb_per_s[gpu]
        for kind in kinds:
            twin = rates.mb_per_s[kind[0]]
            if all(row[other] == twin[other] for other in gpus if other not in (gpu, kind[0])):
                kind.append(gpu)
                break
        else:
            kinds.append([gpu])
    return kinds


def _valuation(rates: _Rates, kinds: Sequence[Sequence[int]]) -> Callable[[Pick], tuple[float, int]]:
    """The function from a pick to its weakest rate and its total."""
    within = [rates.mb_per_s[kind[0]][kind[-1]] for kind in kinds]
    between = [[rates.mb_per_s[one[0]][other[0]] for other in kinds] for one in kinds]

    def value(pick: Pick) -> tuple[float, int]:
        weakest, total = math.inf, 0
        for i, take in enumerate(pick):
            if take > 1:
                weakest = min(weakest, within[i])
                total += take * (take - 1) // 2 * within[i]
            for j in range(i) if take else ():
                if pick[j]:
                    weakest = min(weakest, between[i][j])
                    total += take * pick[j] * between[i][j]
        return weakest, total

    return value


def _picks(pool: Pick, size: int) -> Iterator[Pick]:
    """Every way to take ``size`` GPUs out of a pool."""
    if not pool:
        yield ()
        return
    have, others = pool[0], pool[1:]
    for take in range(max(0, size - sum(others)), min(have, size) + 1):
        for rest in _picks(others, size - take):
            yield (take, *rest)


# -- The rates of one machine, computed once -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rates:
    """All pairs of one machine, MB/s. Compared by identity, so that it is a cheap key of a cache."""

    mb_per_s: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=256)
def _rates(links: tuple[tuple[Link, ...], ...], model: str | None) -> _Rates:
    # Not by topology: the model counts here, and a topology's equality leaves it out.
    return _Rates(tuple(tuple(_mb_per_s(link, model) for link in row) for row in links))


class _Same:
    """A topology compared by identity: hashing its n x n links takes longer than a cached answer.

    It holds the topology, so that no other one can get the same identity while this is a key.
    """

    __slots__ = ("topology",)

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def __hash__(self) -> int:
        return id(self.topology)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.topology is other.topology


@lru_cache(maxsize=256)
def _rates_of_same(same: _Same) -> _Rates:
    return _rates(same.topology.links, same.topology.model)


def _rates_of(topology: Topology) -> _Rates:
    return _rates_of_same(_Same(topology))
