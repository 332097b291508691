"""The bandwidth of a collective over a set of GPUs: the rates of links, and the rings that they allow.

The predicted figure is the *bus bandwidth* of a large all-reduce, as nccl-tests reports it: GB/s (10^9 bytes)
per GPU and direction, comparable between sets of different sizes.

**The model.** NCCL moves a large all-reduce in rings through all GPUs, or, on NVSwitch since Hopper, by
reductions inside the switch (NVLS). So for a set of *k* GPUs:

- *NVSwitch*: each GPU has ``links x rate`` to any peer. Rings reach exactly that. NVLS moves
  ``(k + 1) / k`` of the data per direction instead of ``2 (k - 1) / k``, at an efficiency of its own, so that
  it reports ``links x rate x efficiency x 2 (k - 1) / (k + 1)``. The better of the two counts; only rings if NVLS is
  off.
- *Direct NVLinks*: every undirected ring over NVLinks through all *k*, edge-disjoint from the others, carries
  ``rate`` in each of its two directions: ``2 x rings x rate``; between two GPUs ``links x rate``. A set
  can be joined by NVLinks and have no such ring: 48 of the 70 sets of four of a DGX-1V are like that.
- *Otherwise* one ring over NVLink and PCIe, as fast as its slowest hop: the best such ring. A hop between GPUs that do
  not reach each other's memory goes through the host's, and shared links to the host count as well: see
  :func:`staged_mb_per_s`.

If something about a machine is unknown (its processors, whether its GPUs have peer-to-peer, whether NVLS is on), the
figure is a range: the lower end is that of the slowest host that it may be, without either; the upper end that of the
fastest, with both.

**The figures** (MB/s, so that sums are exact). NVLink: what NCCL charges per link (``src/graph/topo.h`` of
NVIDIA/nccl: SM60 18, SM70 20, SM86 12, SM90 20.6, SM100 40.1 GB/s), but 19.2 on A100 (SM80 20), whose SMs
limit 12 links to about 230 GB/s (NVIDIA/nccl-tests issue 149). NVLS efficiency 0.85 on Hopper, 0.74 on
Blackwell (``src/graph/tuning.cc`` of the same). PCIe: 12 GB/s for sixteen lanes of the third generation and
twice that in each later one (topo.h). Hosts: fitted to published results.

Comparison with published figures, and those that it misses: ``docs/bandwidth.md``, ``tests/core/test_bandwidth.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from placement.core.topology import Lanes, Link, Path

_LANES_X16 = {1: 3_200, 2: 6_400, 3: 12_000, 4: 24_000, 5: 48_000, 6: 96_000}
"""The rate of sixteen lanes of each generation: NCCL's 12 GB/s for the third (``topo.h``), others in proportion."""


BELOW_ONE_SWITCH = (Path.PIX, Path.PXB)
"""Paths between GPUs that share one link to the host."""


@dataclass(frozen=True)
class Host:
    """How fast GPUs copy through the memory of a host, MB/s; the time on the PCIe lanes is added.

    Attributes:
        near: between GPUs of one NUMA node.
        far: between NUMA nodes.
        peer: what two GPUs reach peer-to-peer between NUMA nodes, if NCCL allows it: on AMD, if there are no
            more than two (``ncclTopoCheckP2p`` in ``src/graph/paths.cc`` of NVIDIA/nccl 2.30); 0 where it does not.
        bridged: whether GPUs below one host bridge share its bandwidth.
    """

    near: int
    far: int
    peer: int = 0
    bridged: bool = False


_ZEN_2 = Host(4_450, 1_440, peer=18_300, bridged=True)
"""EPYC of Zen 2 and 3, which have one I/O die: 3090 (3.6, 1.4), 4090 (3.4, between NUMA nodes of a socket)."""

_XEON = Host(9_500, 9_500)
"""Xeon Scalable of the first two generations: V100S (5.6, 5.5)."""

_ZEN_4 = Host(78_000, 39_000, peer=39_000)
"""EPYC of Zen 4 and 5: 4090 (18.5 within a socket, 16.4 across), 5090 (28.8, 22.2), RTX PRO 6000 (30, 22.2)."""

_XEON_4 = Host(78_000, 39_000)
"""Xeon Scalable of the fourth generation and later, as fast: 5090 on Xeon 8480+ (35, 28: NVIDIA/nccl issue 1639)."""

_HOSTS: tuple[tuple[str, Host, Host], ...] = (
    (r"EPYC (?:[89]\w{2}[45]|9V\d+)|Genoa|Bergamo|Siena|Turin|Threadripper PRO [79]", _ZEN_4, _ZEN_4),
    (r"EPYC 7\w{2}[23]|Rome|Milan|Threadripper PRO [35]", _ZEN_2, _ZEN_2),
    (r"Xeon\D* [3-9][12]\d\d\D*|Skylake|Cascade", _XEON, _XEON),
    # No figure is published for the third generation: it is taken as between the one before and the one after.
    (r"Xeon\D* [3-9]3\d\d\D*|Ice Lake", _XEON, _XEON_4),
    (r"Xeon\D* (?:[3-9][45]|6[5-9])\d\d\D*|Sapphire|Emerald|Granite", _XEON_4, _XEON_4),
)
"""Product names of processors, and the hosts between which they are; the same host twice if they were measured."""


@lru_cache(maxsize=256)
def hosts_of(cpu: str | None, pcie: int) -> tuple[Host, Host]:
    """The slowest and the fastest host that these processors may be; twice the same if they are known.

    For unknown processors: the slowest host that was measured with cards of that PCIe generation, and the
    fastest of all.

    Args:
        cpu: product name of the processors, ``None`` where unknown.
        pcie: generation of the GPUs.
    """
    for names, slowest, fastest in _HOSTS:
        if cpu and re.search(names, cpu, re.IGNORECASE):
            return slowest, fastest
    return _XEON if pcie <= 3 else _ZEN_2 if pcie == 4 else _XEON_4, _ZEN_4


def lanes_mb_per_s(lanes: Lanes | None, gpu: Generation) -> int:
    """The rate of a GPU's PCIe link per direction; the full rate of its generation if the link is unknown."""
    lanes = lanes or Lanes(gpu.pcie)
    return _LANES_X16[min(max(lanes.generation, 1), 6)] * lanes.width // 16


def staged_mb_per_s(host_mb_per_s: int, lanes_mb_per_s: int, count: int, bridge: int, uplink: int) -> int:
    """The bandwidth of a ring whose hops go through the host's memory.

    A byte takes time in the host and then on the lanes: ``bridge / host + uplink / lanes``, where
    ``bridge`` and ``uplink`` of the ring's GPUs share a host bridge, and an uplink. Longer rings overlap better:
    ``1 + 0.23 (1 - 2 / k)``. The form of the formula follows from what is shared; 0.23 and the hosts' figures are
    fitted to 40 published results on 10 machines, two of which are off by more than 15 % (see ``docs/bandwidth.md``).

    Args:
        host_mb_per_s: of :class:`Host`, near or far.
        lanes_mb_per_s: of the GPU with the slowest link.
        count: how many GPUs.
        bridge: how many of them, at most, are below one host bridge.
        uplink: how many of them, at most, send through one switch's link to the host.
    """
    per_mille = 1000 + 230 * (count - 2) // count
    return (
        per_mille
        * host_mb_per_s
        * lanes_mb_per_s
        // (1000 * (bridge * lanes_mb_per_s + uplink * host_mb_per_s))
    )


_UNKNOWN = 100
"""The rate of a pair with an unknown link: slower than every known path on the slowest host."""


@dataclass(frozen=True)
class Generation:
    """The properties of a GPU model.

    Attributes:
        pcie: its PCIe generation.
        nvlink_mb_per_s: what a collective gets from one NVLink, per direction.
        nvlinks: how many NVLinks a GPU has. Peers that add up to more meet in an NVSwitch.
        nvls_percent: efficiency of reductions inside NVSwitch; 0 if it has none.
    """

    pcie: int
    nvlink_mb_per_s: int
    nvlinks: int
    nvls_percent: int = 0


_GENERATIONS: tuple[tuple[str, Generation], ...] = (
    (r"P100|GP100", Generation(3, 18_000, 4)),
    (r"V100|GV100|Titan V|Titan RTX|RTX 20\d\d|Quadro RTX|GTX|T4|P4|P40|K80|M60", Generation(3, 20_000, 6)),
    (r"RTX 30\d\d|RTX A\d\d00|A40|A10|A16|A2", Generation(4, 12_000, 4)),
    (r"A100|A800|A30", Generation(4, 19_200, 12)),
    (r"H100|H200|H800|H20|GH200", Generation(5, 20_600, 18, 85)),
    (r"G?B[123]00", Generation(5, 40_100, 18, 74)),
    (r"RTX 50\d\d|RTX PRO \d\d00", Generation(5, 40_100, 0)),
)

_DEFAULT = Generation(4, 20_000, 18)
"""For a model that is not listed, or a node of several models."""


@lru_cache(maxsize=256)
def generation(model: str | None) -> Generation:
    """The generation of a product name, as NVML gives it."""
    for names, found in _GENERATIONS:
        if model and re.search(rf"(?<![A-Z0-9])(?:{names})(?![0-9])", model, re.IGNORECASE):
            return found
    return _DEFAULT


def has_switch(links: Sequence[Sequence[Link]], gpu: Generation) -> bool:
    """Whether the GPUs meet in an NVSwitch: it offers all links of a GPU to every peer; a mesh divides them."""
    return any(sum(link.nvlinks for link in row) > gpu.nvlinks for row in links)


def hop_mb_per_s(link: Link, gpu: Generation) -> int:
    """The rate of one hop per direction between two GPUs that reach each other's memory: by NVLink, or below a switch.

    It is strictly ordered like the paths, and increases with the number of NVLinks.
    """
    pcie = _LANES_X16[gpu.pcie]
    if link.path is Path.NVLINK:
        # A single slow link (a degraded bridge on PCIe 5.0) still counts above PCIe: NCCL takes it first.
        return max(link.nvlinks * gpu.nvlink_mb_per_s, pcie + link.nvlinks)
    return {Path.PIX: pcie, Path.PXB: pcie * 95 // 100, Path.UNKNOWN: _UNKNOWN}[link.path]


def pair_mb_per_s(
    link: Link,
    gpu: Generation,
    lanes_mb_per_s: int,
    host: Host,
    peer: bool = False,
    shared: tuple[int, int] | None = None,
) -> int:
    """The bandwidth of a set of two GPUs, per direction: a collective of the two, or a copy from one to the other.

    Args:
        link: what joins them.
        gpu: their model.
        lanes_mb_per_s: of the one with the slower PCIe link.
        host: what they copy through.
        peer: whether they have peer-to-peer over PCIe, if the link does not know.
        shared: how many of them share a host bridge, and an uplink; derived from their path if not given.
    """
    if link.path in (Path.NVLINK, Path.UNKNOWN):
        return hop_mb_per_s(link, gpu)
    direct = peer if link.peer is None else link.peer
    switched = link.path in BELOW_ONE_SWITCH
    if direct and switched:
        return min(hop_mb_per_s(link, gpu), lanes_mb_per_s)
    if direct and host.peer:
        return min(lanes_mb_per_s, host.peer) if link.path is Path.SYS else lanes_mb_per_s
    bridge, uplink = shared or (2 if link.path is Path.PHB else 1, 2 if switched else 1)
    between = host.far if link.path is Path.SYS else host.near
    return staged_mb_per_s(between, lanes_mb_per_s, 2, bridge if host.bridged else 1, uplink)


def switch_mb_per_s(links: int, count: int, gpu: Generation) -> int:
    """The bandwidth of ``count`` GPUs on an NVSwitch with ``links`` NVLinks each: the better of rings and NVLS."""
    rings = links * gpu.nvlink_mb_per_s
    nvls = rings * gpu.nvls_percent * 2 * (count - 1) // (100 * (count + 1))
    return max(rings, nvls)


_RING_SEARCH_STEPS = 200
"""The limit of the search for rings. On every existing machine the search ends by itself, after 50 at most."""


def nvlink_rings(links: Sequence[Sequence[Link]], gpus: Sequence[int]) -> int:
    """Most edge-disjoint undirected rings over direct NVLinks through all ``gpus`` (three or more).

    Exact on real machines. On a dense mesh of many GPUs, which does not exist, the search may stop early and
    return fewer than there are.
    """
    size = len(gpus)
    room = {
        (a, b): links[gpus[a]][gpus[b]].nvlinks
        for a in range(size)
        for b in range(a + 1, size)
        if links[gpus[a]][gpus[b]].nvlinks
    }
    degree = [sum(count for pair, count in room.items() if gpu in pair) for gpu in range(size)]
    most = min(*(count // 2 for count in degree), sum(room.values()) // size)
    if most == 0:
        return 0
    rings = _rings(size, room)
    steps = _RING_SEARCH_STEPS

    def pack(first: int, limit: int) -> int:
        """The most rings out of ``rings[first:]`` with the links that are left, up to ``limit``."""
        nonlocal steps
        best = 0
        for index in range(first, len(rings)):
            if best >= limit or steps <= 0:
                break
            steps -= 1
            ring = rings[index]
            fits = min(room[edge] for edge in ring)
            for times in range(min(fits, limit), 0, -1):
                for edge in ring:
                    room[edge] -= times
                best = max(best, times + pack(index + 1, limit - times))
                for edge in ring:
                    room[edge] += times
                if best >= limit or steps <= 0:
                    break
        return best

    return pack(0, most)


def _rings(size: int, edges: dict[tuple[int, int], int]) -> list[list[tuple[int, int]]]:
    """The undirected rings through GPUs 0 to ``size`` - 1 over ``edges``, as lists of edges."""
    near: list[list[int]] = [[] for _ in range(size)]
    for a, b in edges:
        near[a].append(b)
        near[b].append(a)
    found: list[list[tuple[int, int]]] = []
    path = [0]

    def extend() -> None:
        here = path[-1]
        if len(path) == size:
            if path[1] < here and 0 in near[here]:  # each ring once, not once per direction
                hops = zip(path, [*path[1:], 0], strict=True)
                found.append([(min(hop), max(hop)) for hop in hops])
            return
        for there in near[here]:
            if there not in path and len(found) < _RING_SEARCH_STEPS:
                path.append(there)
                extend()
                path.pop()

    extend()
    return found
