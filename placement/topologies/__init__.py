"""A catalogue of real machines, for simulated nodes, dry runs and tests.

Each is data: what the machine printed for ``nvidia-smi topo -m`` (``<name>.txt``), and a few facts that the
matrix does not tell (``catalogue.toml``), with their source. Nothing is read before it is asked for.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from placement.core.matrix import parse_matrix
from placement.core.topology import Path, Topology
from placement.errors import UnknownTopology
from placement.wire.facts import GpuFacts, NicFacts, NodeFacts, PairFacts


@dataclass(frozen=True)
class Entry:
    """One machine.

    Attributes:
        name: what a node's label ``placement/topology`` says.
        title: what it is, in one line.
        gpu: product name of its GPUs, as NVML gives it.
        memory_gib: nominal memory per GPU, GiB.
        compute_capability: major, minor.
        source: where the matrix is from, and what it leaves open.
    """

    name: str
    title: str
    gpu: str
    memory_gib: int
    compute_capability: tuple[int, int]
    source: str


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
    entry = describe(name)
    return replace(parse_matrix(_text(f"{name}.txt")), model=entry.gpu)


@cache
def facts(name: str) -> NodeFacts:
    """What a node of this kind would report; what only a living GPU has (UUID, memory in use) is unknown.

    Raises:
        UnknownTopology: the catalogue has no such name.
    """
    entry, shape = describe(name), load(name)
    count = len(shape)
    return NodeFacts(
        source="catalogue",
        catalogue_name=name,
        gpus=tuple(
            GpuFacts(
                ordinal=gpu,
                name=entry.gpu,
                memory_total_bytes=entry.memory_gib << 30,
                compute_capability=entry.compute_capability,
                numa_nodes=shape.numa[gpu],
                cpus=shape.cpus[gpu],
                # A switch offers each peer all the links that a GPU has.
                nvswitch_links=max(link.nvlinks for link in shape.links[gpu]) if shape.nvswitch else 0,
            )
            for gpu in range(count)
        ),
        pairs=tuple(_pair(shape, a, b) for a in range(count) for b in range(a + 1, count)),
        nics=tuple(NicFacts(name=nic.name, paths=nic.paths) for nic in shape.nics),
    )


def _pair(shape: Topology, a: int, b: int) -> PairFacts:
    link = shape.link(a, b)
    # Where there is NVLink, the matrix hides the PCIe path below it.
    ancestor = Path.UNKNOWN if link.path is Path.NVLINK else link.path
    return PairFacts(a=a, b=b, common_ancestor=ancestor, nvlinks=link.nvlinks)


@cache
def _entries() -> dict[str, Entry]:
    tables = tomllib.loads(_text("catalogue.toml"))
    return {
        name: Entry(name=name, **(table | {"compute_capability": tuple(table["compute_capability"])}))
        for name, table in tables.items()
    }


def _text(file: str) -> str:
    return files(__name__).joinpath(file).read_text(encoding="utf-8")
