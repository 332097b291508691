"""What is known of one node's GPUs: the message that the NVML reader sends to the rest of the code."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from pydantic import Field

from placement.core.node import UNKNOWN_PROFILE
from placement.core.topology import UNKNOWN_LINK, Lanes, Link, Nic, NumaNode, Path, Topology
from placement.wire.base import Model

Source = Literal["nvml", "catalogue", "none"]
Fabric = Literal["not started", "in progress", "failed", "completed", "limited capacity", "unhealthy"]
"""How far a GPU is registered with the fabric of its NVSwitch; after ``completed``, the fabric's health."""


LinkState = Literal["inactive", "active", "sleep", "traffic disabled"]
"""The state of an NVLink."""
LINK_UP: tuple[LinkState, ...] = ("active", "sleep")
"""The states of a link that can carry traffic: traffic wakes a link that sleeps."""


class NvLinkFacts(Model):
    """One NVLink of a GPU. ``None`` is unknown."""

    state: LinkState | None = None
    mb_per_s: int | None = Field(
        default=None, description="signalling rate per direction, MB/s; none while it is down"
    )


class GpuFacts(Model):
    """One GPU. ``None`` is "unknown or not supported", never zero."""

    ordinal: int = Field(ge=0, description="NVML index within this reading, in PCI bus order")
    uuid: str | None = None
    name: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    compute_capability: tuple[int, int] | None = Field(default=None, description="major, minor")
    pci_bus_id: str | None = Field(default=None, description="as sysfs writes it: 0000:1b:00.0")
    minor_number: int | None = Field(default=None, description="that of /dev/nvidia<number>")
    pcie_generation: int | None = Field(
        default=None,
        description="the highest generation that card and slot support; the current one drops when idle",
    )
    pcie_width: int | None = Field(default=None, description="lanes in use")
    numa_nodes: tuple[int, ...] = Field(default=(), description="NUMA nodes near the GPU; empty if unknown")
    cpus: tuple[int, ...] = Field(default=(), description="CPUs near the GPU; empty if unknown")
    mig_enabled: bool | None = None
    mig_profile: str | None = Field(
        default=None, description="profile (1g.10gb) if this slot is a MIG instance"
    )
    nvlink_version: str | None = Field(default=None, description="4.0; None if unknown or it has no NVLink")
    nvlinks: tuple[NvLinkFacts, ...] | None = Field(
        default=None, description="its NVLinks by number, up or down; None if unknown, empty if it has none"
    )
    nvswitch_links: int | None = Field(
        default=None, description="NVLinks of this GPU that end in an NVSwitch"
    )
    fabric: Fabric | None = Field(
        default=None, description="whether it can use its NVSwitch; None if unknown"
    )
    vgpu: bool | None = Field(default=None, description="it is a virtual GPU of a virtual machine")
    errors: tuple[str, ...] = Field(default=(), description="NVML calls that failed on this GPU, and how")

    @property
    def lanes(self) -> Lanes | None:
        """Its PCIe link, if both numbers are known."""
        return (
            Lanes(self.pcie_generation, self.pcie_width) if self.pcie_generation and self.pcie_width else None
        )

    @property
    def lost(self) -> bool:
        """The driver cannot reach the GPU or does not show it, or it cannot be distinguished from another."""
        return self.uuid is None and bool(self.errors)

    @property
    def instance(self) -> str | None:
        """Profile of the MIG instance that a program on this slot gets, ``"?"`` if unknown; ``None``: all of a GPU.

        With MIG on, a program that is given the whole GPU gets one of its instances, too.
        """
        return self.mig_profile or (UNKNOWN_PROFILE if self.mig_enabled else None)


class MigFacts(Model):
    """One MIG instance of a GPU. ``None`` is "unknown or not supported", never zero."""

    parent: int = Field(ge=0, description="ordinal of its GPU within this reading")
    uuid: str | None = None
    profile: str | None = Field(default=None, description="compute slices and memory: 1g.10gb, 1c.3g.40gb")
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    gpu_instance_id: int | None = None
    compute_instance_id: int | None = None
    errors: tuple[str, ...] = Field(
        default=(), description="NVML calls that failed on this instance, and how"
    )


class PairFacts(Model):
    """Two GPUs of one node, ``a < b``."""

    a: int
    b: int
    common_ancestor: Path = Field(default=Path.UNKNOWN, description="PCIe path, even if NVLink joins them")
    nvlinks: int | None = Field(default=None, description="active NVLinks between the two; None if unknown")
    peer_read: bool | None = Field(default=None, description="driver allows peer-to-peer reads")
    peer_write: bool | None = Field(default=None, description="driver allows peer-to-peer writes")
    redirected: bool | None = Field(
        default=None, description="ACS redirects their traffic below one switch through the root complex"
    )

    @property
    def link(self) -> Link:
        """The cell that ``nvidia-smi topo -m`` prints for the pair."""
        if self.nvlinks:
            return Link(Path.NVLINK, self.nvlinks)
        return (
            UNKNOWN_LINK
            if self.common_ancestor is Path.UNKNOWN
            else Link(self.common_ancestor, peer=self.peer)
        )

    @property
    def peer(self) -> bool | None:
        """Whether the driver allows both, and ACS does not redirect them; ``None`` if the driver does not report it.

        Only root can see what ACS does: if that is unknown, the driver's report counts.
        """
        allowed = (self.peer_read, self.peer_write, not self.redirected)
        return False if False in allowed else None if None in allowed else True


class NicFacts(Model):
    """One network card of a node."""

    name: str = Field(description="the name of its column in `nvidia-smi topo -m`")
    paths: tuple[Path, ...] = Field(description="PCIe path from each GPU, in order")
    pci_bus_id: str | None = Field(default=None, description="as sysfs writes it: 0000:1b:00.0")
    numa_node: int | None = None
    ports: tuple[str, ...] = Field(
        default=(), description="RDMA ports that are active and may be used by this process: mlx5_0:1"
    )
    interfaces: tuple[str, ...] = Field(
        default=(), description="network interfaces that are up and have a route"
    )


class NumaFacts(Model):
    """One NUMA node of the host."""

    number: int = Field(ge=0)
    socket: int | None = Field(default=None, description="the processor (socket) that it belongs to")
    cores: tuple[tuple[int, ...], ...] = Field(
        default=(),
        description="CPUs of each core that Ray's processes may use; empty if unknown or none",
    )
    memory_bytes: int | None = None

    @classmethod
    def of(cls, node: NumaNode) -> NumaFacts:
        """The model of a machine's NUMA node."""
        return cls(number=node.number, socket=node.socket, cores=node.cores, memory_bytes=node.memory_bytes)

    @property
    def node(self) -> NumaNode:
        """The same as the type of :mod:`placement.core`."""
        return NumaNode(self.number, self.cores, self.memory_bytes, self.socket)


class NodeFacts(Model):
    """One reading of one node's GPUs."""

    source: Source = Field(description="nvml: read now; catalogue: a recorded machine; none: nothing to read")
    catalogue_name: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    instances: tuple[MigFacts, ...] = Field(
        default=(), description="MIG instances of all GPUs; also empty if NVML could not list them"
    )
    pairs: tuple[PairFacts, ...] = ()
    nics: tuple[NicFacts, ...] = Field(default=(), description="empty if unknown")
    numa_nodes: tuple[NumaFacts, ...] = Field(default=(), description="empty if unknown")
    driver_version: str | None = None
    cpu: str | None = Field(default=None, description="product name of the host's processors")
    nvls: bool | None = Field(
        default=None,
        description="whether NCCL reduces inside the NVSwitch; None if unknown, or without such a switch",
    )
    age_seconds: float | None = Field(
        default=None, description="how old the reading is, set when it is returned"
    )
    problem: str | None = Field(
        default=None, description="why the newest reading failed or is incomplete; empty if it is neither"
    )

    def lost(self) -> frozenset[int]:
        """Ordinals of the GPUs that are lost. Nothing is placed on them; the others stay usable."""
        return frozenset(gpu.ordinal for gpu in self.gpus if gpu.lost)

    @property
    def slots(self) -> dict[int, str]:
        """Slot that is a MIG instance -> its profile."""
        return {gpu.ordinal: gpu.instance for gpu in self.gpus if gpu.instance is not None}

    @property
    def uuids(self) -> dict[int, str]:
        """Slot -> UUID of the GPU, or of the MIG instance, as far as it is known."""
        return {gpu.ordinal: gpu.uuid for gpu in self.gpus if gpu.uuid is not None}

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Memory of one whole GPU, the smallest if they differ; ``None`` if that of any is unknown."""
        totals = [gpu.memory_total_bytes for gpu in self.gpus if gpu.instance is None and not gpu.lost]
        return min((total for total in totals if total), default=None) if all(totals) else None

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """The lowest of the GPUs; ``None`` if unknown."""
        return min((gpu.compute_capability for gpu in self.gpus if gpu.compute_capability), default=None)

    def topology(self) -> Topology:
        """The reading as a :class:`~placement.core.topology.Topology`; the same object for equal machines."""
        places = tuple((gpu.numa_nodes, gpu.cpus, gpu.lanes) for gpu in self.gpus)
        names = frozenset(gpu.name for gpu in self.gpus if not gpu.lost)
        return _topology(self.pairs, self.nics, places, names, self.cpu, self.numa_nodes, self.nvls)


@lru_cache(maxsize=256)
def _topology(
    pairs: tuple[PairFacts, ...],
    nics: tuple[NicFacts, ...],
    places: tuple[tuple[tuple[int, ...], tuple[int, ...], Lanes | None], ...],
    names: frozenset[str | None],
    cpu: str | None,
    numa_nodes: tuple[NumaFacts, ...],
    nvls: bool | None,
) -> Topology:
    matrix = [[UNKNOWN_LINK] * len(places) for _ in places]
    below = [[Path.UNKNOWN] * len(places) for _ in places]
    for pair in pairs:
        matrix[pair.a][pair.b] = matrix[pair.b][pair.a] = pair.link
        below[pair.a][pair.b] = below[pair.b][pair.a] = pair.common_ancestor
    hidden = any(pair.nvlinks and pair.common_ancestor is not Path.UNKNOWN for pair in pairs)
    [model] = names if len(names) == 1 else [None]
    return Topology(
        links=tuple(map(tuple, matrix)),
        numa=tuple(numa for numa, _, _ in places),
        cpus=tuple(cpus for _, cpus, _ in places),
        nics=tuple(Nic(nic.name, nic.paths, nic.ports, nic.interfaces) for nic in nics),
        model=model,
        below=tuple(map(tuple, below)) if hidden else (),
        lanes=tuple(lanes for _, _, lanes in places),
        cpu=cpu,
        numa_nodes=tuple(one.node for one in numa_nodes),
        nvls=nvls,
    )
