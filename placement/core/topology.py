"""How the GPUs of one node are joined: links, islands, NUMA nodes. Immutable and hashable.

A topology holds what ``nvidia-smi topo -m`` shows. There NVLink hides the PCIe path of a pair, and so
it does here: a pair is joined by *n* NVLinks, by a PCIe path, or by an unknown link.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property


class Path(StrEnum):
    """The path between a pair of GPUs, best first. Names and meaning are those of ``nvidia-smi topo -m``."""

    NVLINK = "NV"
    """One or more NVLinks, direct or through NVSwitch."""
    PIX = "PIX"
    """At most a single PCIe bridge."""
    PXB = "PXB"
    """Several PCIe bridges, without the host bridge."""
    PHB = "PHB"
    """A PCIe host bridge, typically the CPU."""
    NODE = "NODE"
    """The interconnect between host bridges within one NUMA node."""
    SYS = "SYS"
    """The interconnect between NUMA nodes (UPI, xGMI)."""
    UNKNOWN = "?"
    """Unknown. Never treated as fast, and never as absent."""


PATH_ORDER = {path: order for order, path in enumerate(Path)}
"""A path -> its position, the best first."""


@dataclass(frozen=True, slots=True)
class Link:
    """What joins two GPUs: a path, and the number of NVLinks where the path is NVLink.

    Attributes:
        path: the kind of path.
        nvlinks: how many NVLinks, direct or through NVSwitch.
        peer: whether one can read and write the other's memory over PCIe without the host's; ``None`` if unknown.
            False if the driver forbids it, or if requests are redirected through the root complex (ACS).

    Raises:
        ValueError: NVLinks were counted on another path, or none on an NVLink path.
    """

    path: Path
    nvlinks: int = 0
    peer: bool | None = None

    def __post_init__(self) -> None:
        if (self.path is Path.NVLINK) != (self.nvlinks > 0):
            raise ValueError(f"a link over {self.path.name} cannot have {self.nvlinks} NVLinks")

    def __str__(self) -> str:
        """The cell of ``nvidia-smi topo -m``: ``NV12``, ``PHB``."""
        return f"NV{self.nvlinks}" if self.path is Path.NVLINK else self.path.value


UNKNOWN_LINK = Link(Path.UNKNOWN)

NIC_NAME = re.compile(r"(?!(?:GPU\d+|X)$)[\w.:-]+", re.ASCII)
"""One word that ``nvidia-smi topo -m`` does not use for something else."""


@dataclass(frozen=True, slots=True)
class Nic:
    """A network card, and how near it is to each GPU.

    Attributes:
        name: the name of its column: ``"mlx5_0"``; newer drivers print ``"NIC0"``.
        paths: ``paths[g]`` leads from GPU ``g`` to the card.
        ports: its working RDMA ports: ``"mlx5_0:1"``; empty if unknown.
        interfaces: its working network interfaces: ``"eth0"``; empty if unknown.

    Raises:
        ValueError: the name is not a single word, or a path is NVLink.
    """

    name: str
    paths: tuple[Path, ...]
    ports: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not NIC_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} cannot be the name of a network card")
        if Path.NVLINK in self.paths:
            raise ValueError(f"no NVLink leads to network card {self.name}")


@dataclass(frozen=True, slots=True)
class NumaNode:
    """A NUMA node of the host.

    Attributes:
        number: its number in Linux.
        cores: the CPUs of each of its cores that may be used, ascending; empty if unknown, or if it has none.
        memory_bytes: its memory, ``None`` where unknown.
        socket: the processor that it belongs to, ``None`` if unknown.
    """

    number: int
    cores: tuple[tuple[int, ...], ...] = ()
    memory_bytes: int | None = None
    socket: int | None = None


@dataclass(frozen=True, slots=True)
class Lanes:
    """A GPU's PCIe link.

    Attributes:
        generation: the highest that card and slot support; the current one drops when the GPU is idle.
        width: how many lanes it has.
    """

    generation: int
    width: int = 16


MeasuredRates = tuple[tuple[tuple[int, ...], int], ...]
"""Sets of GPUs, ascending, each with the bus bandwidth of a large all-reduce that was measured on it, MB/s."""

MAX_NVLINKS_PER_GPU = 18
"""Most NVLinks on one GPU so far: 18 on H100, H200, B200 (NVIDIA data sheets)."""


@dataclass(frozen=True)
class Topology:
    """The GPUs of one node and the link between each two of them.

    Attributes:
        links: an ``n`` x ``n`` symmetric matrix; ``links[a][b]`` joins ordinals ``a`` and ``b``.
            The diagonal is :data:`UNKNOWN_LINK` and is never read.
        numa: per GPU its NUMA nodes, ascending; empty where unknown.
        cpus: per GPU the CPUs near it, ascending; empty where unknown.
        nics: the network cards; empty where unknown.
        model: product name shared by the GPUs (``"NVIDIA H100 80GB HBM3"``), ``None`` where unknown.
            Ignored by ``==``: two machines of one shape are one topology.
        below: ``below[a][b]`` is the PCIe path of two GPUs, even if NVLink hides it in ``links``; empty if
            that was not read (NVML reports it, ``nvidia-smi topo -m`` does not).
        lanes: per GPU its PCIe link, ``None`` where unknown.
        cpu: product name of the host's processors (``"AMD EPYC 7502"``), ``None`` where unknown.
        numa_nodes: the NUMA nodes of the host; empty where unknown.
        measured: measured rates, from this machine or others of its make; empty if there are none.
        nvls: whether collectives reduce inside the NVSwitch (NVLS), ``None`` where unknown. It matters only on an
            NVSwitch of Hopper and later.

    Raises:
        ValueError: the matrix is not square or not symmetric, a list has another length, two network
            cards have one name, or a measured entry is no set of its GPUs, or no rate.
    """

    links: tuple[tuple[Link, ...], ...]
    numa: tuple[tuple[int, ...], ...] = ()
    cpus: tuple[tuple[int, ...], ...] = ()
    nics: tuple[Nic, ...] = ()
    model: str | None = field(default=None, compare=False)
    below: tuple[tuple[Path, ...], ...] = ()
    lanes: tuple[Lanes | None, ...] = ()
    cpu: str | None = None
    numa_nodes: tuple[NumaNode, ...] = ()
    measured: MeasuredRates = ()
    nvls: bool | None = None

    def __post_init__(self) -> None:
        count = len(self.links)
        for name, unknown in (("numa", ()), ("cpus", ()), ("lanes", None)):
            values = getattr(self, name)
            if not values:
                object.__setattr__(self, name, (unknown,) * count)
            elif len(values) != count:
                raise ValueError(f"{name} describes {len(values)} GPUs, the matrix {count}")
        for nic in self.nics:
            if len(nic.paths) != count:
                raise ValueError(f"{nic.name} has paths to {len(nic.paths)} GPUs, the matrix has {count}")
        if len({nic.name for nic in self.nics}) != len(self.nics):
            raise ValueError(f"network cards share a name: {', '.join(nic.name for nic in self.nics)}")
        if self.below and [len(row) for row in self.below] != [count] * count:
            raise ValueError(f"below is not a matrix of {count} x {count}")
        if len({gpus for gpus, _ in self.measured}) != len(self.measured):
            raise ValueError("measured has a set of GPUs twice")
        for gpus, rate in self.measured:
            if len(gpus) < 2 or list(gpus) != sorted(set(gpus)) or not 0 <= gpus[0] <= gpus[-1] < count:
                raise ValueError(
                    f"measured has {gpus}, which is no ascending set of two or more of {count} GPUs"
                )
            if rate <= 0:
                raise ValueError(f"measured has {rate} MB/s for {gpus}; a rate is more than 0")
        for a, row in enumerate(self.links):
            if len(row) != count:
                raise ValueError(f"row {a} has {len(row)} links, expected {count}")
            for b in range(a):
                if row[b] != self.links[b][a]:
                    raise ValueError(f"GPU {a} to {b} is {row[b]}, but {b} to {a} is {self.links[b][a]}")

    @classmethod
    def unknown(cls, count: int) -> Topology:
        """``count`` GPUs of which nothing is known (no NVML, no label)."""
        return cls(links=((UNKNOWN_LINK,) * count,) * count)

    def __len__(self) -> int:
        """How many GPUs the node has."""
        return len(self.links)

    def link(self, a: int, b: int) -> Link:
        """The link between ordinals ``a`` and ``b``."""
        return self.links[a][b]

    def pcie_path(self, a: int, b: int) -> Path:
        """The PCIe path between two GPUs, even if NVLink joins them; :attr:`Path.UNKNOWN` if unknown.

        If NVLink hides it and :attr:`below` does not have it, an upper bound follows from what is near both: PCIe is a
        tree, so that two GPUs are no farther from each other than the farther of them is from any network card, and
        GPUs of one NUMA node are no farther apart than :attr:`Path.NODE`.
        """
        path = self.links[a][b].path
        if path not in (Path.NVLINK, Path.UNKNOWN):
            return path
        if self.below and self.below[a][b] is not Path.UNKNOWN:
            return self.below[a][b]
        nearest = tuple(Path).index
        found = [max(nic.paths[a], nic.paths[b], key=nearest) for nic in self.nics]
        if self.numa[a] and self.numa[b]:
            found.append(Path.SYS if set(self.numa[a]).isdisjoint(self.numa[b]) else Path.NODE)
        return min(found, key=nearest, default=Path.UNKNOWN)

    @cached_property
    def known(self) -> bool:
        """Whether any link is known."""
        return any(link != UNKNOWN_LINK for row in self.links for link in row)

    @cached_property
    def nearest_nic(self) -> tuple[Path, ...]:
        """Per GPU the best path to any network card; :attr:`Path.UNKNOWN` where none is known."""
        best_first = tuple(Path)
        return tuple(
            min((nic.paths[gpu] for nic in self.nics), key=best_first.index, default=Path.UNKNOWN)
            for gpu in range(len(self))
        )

    @cached_property
    def nvswitch(self) -> bool:
        """Whether the GPUs meet in an NVSwitch.

        A switch offers every peer the whole link count of a GPU, so that a row adds up to more
        links than a GPU has. A direct mesh never does.
        """
        return any(sum(link.nvlinks for link in row) > MAX_NVLINKS_PER_GPU for row in self.links)

    @cached_property
    def islands(self) -> tuple[tuple[int, ...], ...]:
        """GPUs joined by NVLink, directly or through others, each island ascending; a lone GPU is its own island."""
        return tuple(components(range(len(self)), lambda a, b: self.links[a][b].nvlinks > 0))

    def island_of(self, ordinal: int) -> int:
        """Index into :attr:`islands` of the island that holds ``ordinal``."""
        return next(i for i, island in enumerate(self.islands) if ordinal in island)


def components(items: Iterable[int], joined: Callable[[int, int], bool]) -> list[tuple[int, ...]]:
    """The groups that are joined, directly or through others, each ascending."""
    found: list[tuple[int, ...]] = []
    left = list(items)
    while left:
        group, frontier = [], [left.pop(0)]
        while frontier:
            here = frontier.pop()
            group.append(here)
            near = [other for other in left if joined(here, other)]
            left = [other for other in left if other not in near]
            frontier += near
        found.append(tuple(sorted(group)))
    return found


def ordinals(gpus: Sequence[int]) -> str:
    """Ordinals as people write them: ``0-3``, ``0,2,5-7``."""
    runs: list[list[int]] = []
    for gpu in sorted(gpus):
        if runs and gpu == runs[-1][-1] + 1:
            runs[-1].append(gpu)
        else:
            runs.append([gpu])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
