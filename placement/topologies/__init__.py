"""A catalogue of real machines, for simulated nodes, dry runs and tests.

Each is data: the machine's output of ``nvidia-smi topo -m`` (``<name>.txt``), and a few facts that the
matrix does not have (``catalogue.toml``), with their source. Nothing is read before it is asked for.

For a machine with MIG instances the matrix shows the GPUs, but everything here shows Ray's slots: the GPUs in order,
with the MIG instances in the place of their GPU.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files

from placement.core.matrix import parse_matrix
from placement.core.topology import Path, Topology
from placement.errors import UnknownTopology
from placement.wire.facts import GpuFacts, MigFacts, NicFacts, NodeFacts, PairFacts
from placement.wire.slots import in_slots


@dataclass(frozen=True)
class Entry:
    """One machine.

    Attributes:
        name: the value of a node's label ``placement/topology``.
        title: what it is, in one line.
        gpu: product name of its GPUs, as NVML gives it.
        memory_gib: nominal memory per GPU, GiB.
        compute_capability: major, minor.
        source: the source of the matrix, and what it leaves open.
        cpu: product name of the processors; ``None`` if the source does not have it.
        lanes: PCIe generation and width of each GPU's link; ``None`` if the source does not have it.
        peer: whether GPUs that no NVLink joins have peer-to-peer over PCIe; ``None`` if the source does not have it.
        instances: GPU with MIG on -> the profiles of its MIG instances.
    """

    name: str
    title: str
    gpu: str
    memory_gib: int
    compute_capability: tuple[int, int]
    source: str
    cpu: str | None = None
    lanes: tuple[int, int] | None = None
    peer: bool | None = None
    instances: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def names() -> tuple[str, ...]:
    """All machines, in the catalogue's order."""
    return tuple(_entries())


def describe(name: str) -> Entry:
    """The facts of one machine.

    Raises:
        UnknownTopology: the catalogue has no such name.
    """
    entries = _entries()
    if name not in entries:
        raise UnknownTopology(name, tuple(entries))
    return entries[name]


@cache
def load(name: str) -> Topology:
    """The links of one machine.

    Raises:
        UnknownTopology: the catalogue has no such name.
    """
    return facts(name).topology()


@cache
def facts(name: str) -> NodeFacts:
    """The facts that a node of this kind would report; what only a real GPU has (UUID, memory in use) is unknown.

    Raises:
        UnknownTopology: the catalogue has no such name.
    """
    entry, shape = describe(name), _matrix(name)
    count = len(shape)
    machine = NodeFacts(
        source="catalogue",
        catalogue_name=name,
        gpus=tuple(
            GpuFacts(
                ordinal=gpu,
                name=entry.gpu,
                memory_total_bytes=entry.memory_gib << 30,
                compute_capability=entry.compute_capability,
                pcie_generation=entry.lanes[0] if entry.lanes else None,
                pcie_width=entry.lanes[1] if entry.lanes else None,
                numa_nodes=shape.numa[gpu],
                cpus=shape.cpus[gpu],
                # A switch offers all links of a GPU to each peer.
                nvswitch_links=max(link.nvlinks for link in shape.links[gpu]) if shape.nvswitch else 0,
                mig_enabled=gpu in entry.instances if entry.instances else None,
            )
            for gpu in range(count)
        ),
        instances=tuple(
            MigFacts(parent=gpu, profile=profile, memory_total_bytes=_nominal_bytes(profile))
            for gpu, profiles in sorted(entry.instances.items())
            for profile in profiles
        ),
        pairs=tuple(_pair(shape, a, b, entry.peer) for a in range(count) for b in range(a + 1, count)),
        nics=tuple(NicFacts(name=nic.name, paths=nic.paths) for nic in shape.nics),
        cpu=entry.cpu,
        # The default of NCCL and the driver; see placement/nvml/fabric.py.
        nvls=True if shape.nvswitch and entry.compute_capability >= (9, 0) else None,
    )
    slots: list[GpuFacts | MigFacts] = []
    for gpu in machine.gpus:
        slots += [one for one in machine.instances if one.parent == gpu.ordinal] or [gpu]
    return in_slots(machine, slots)


@cache
def _matrix(name: str) -> Topology:
    return replace(parse_matrix(_text(f"{name}.txt")), model=describe(name).gpu)


def _nominal_bytes(profile: str) -> int:
    """``1g.10gb`` has 10 GiB; NVML reports a little less."""
    return int(profile.rpartition(".")[2].removesuffix("gb")) << 30


def _pair(shape: Topology, a: int, b: int, peer: bool | None) -> PairFacts:
    link = shape.link(a, b)
    # NVLink hides the PCIe path in the matrix.
    ancestor = Path.UNKNOWN if link.path is Path.NVLINK else link.path
    return PairFacts(
        a=a, b=b, common_ancestor=ancestor, nvlinks=link.nvlinks, peer_read=peer, peer_write=peer
    )


@cache
def _entries() -> dict[str, Entry]:
    tables = tomllib.loads(_text("catalogue.toml"))
    entries = {}
    for name, table in tables.items():
        table["compute_capability"] = tuple(table["compute_capability"])
        table["lanes"] = tuple(table["lanes"]) if "lanes" in table else None
        table["instances"] = {int(gpu): tuple(cut) for gpu, cut in table.get("instances", {}).items()}
        entries[name] = Entry(name=name, **table)
    return entries


def _text(file: str) -> str:
    return files(__name__).joinpath(file).read_text(encoding="utf-8")
