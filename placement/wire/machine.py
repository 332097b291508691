"""A make of GPU node: what its topology is, and what was measured on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field, PositiveInt

from placement.core.matrix import parse_matrix, render_matrix
from placement.core.topology import Lanes, Path, Topology
from placement.wire.base import Model
from placement.wire.facts import NumaFacts

GbPerSecond = Annotated[float, Field(ge=0.001, le=1_000_000)]
"""A rate in GB/s: at least 1 MB/s, the resolution at which rates are compared."""


def mb_per_s(gb_per_s: float) -> int:
    """The same in MB/s."""
    return round(gb_per_s * 1000)


_PEERS = {True: "Y", False: "N", None: "?"}


class NicNames(Model):
    """The names that programs use for a network card of the matrix."""

    name: str
    ports: tuple[str, ...] = Field(default=(), description="its RDMA ports that work")
    interfaces: tuple[str, ...] = Field(default=(), description="its network interfaces that work")


class Machine(Model):
    """A make of GPU node, written once for all nodes of that make."""

    matrix: str = Field(description="the output of `nvidia-smi topo -m`")
    model: str | None = Field(default=None, description="product name of the GPUs")
    below: tuple[tuple[Path, ...], ...] = Field(
        default=(),
        description="PCIe paths, even between GPUs that NVLink joins, if known: a row for each GPU",
    )
    cpu: str | None = Field(default=None, description="product name of the processors")
    pcie: tuple[tuple[PositiveInt, PositiveInt] | None, ...] = Field(
        default=(), description="per GPU its PCIe generation and number of lanes; empty if unknown"
    )
    peers: tuple[str, ...] = Field(
        default=(),
        description="whether peer-to-peer works over PCIe: per GPU a letter for each GPU, Y, N or ?; empty if unknown",
    )
    numa_nodes: tuple[NumaFacts, ...] = Field(
        default=(), description="the NUMA nodes of the host; empty if unknown"
    )
    nics: tuple[NicNames, ...] = Field(
        default=(), description="the names of the network cards of which they are known"
    )
    nvls: bool | None = Field(
        default=None, description="whether collectives reduce inside the NVSwitch; none if unknown"
    )
    measured: tuple[tuple[tuple[int, ...], GbPerSecond], ...] = Field(
        default=(),
        description="sets of GPUs with the all-reduce bus bandwidth that was measured on them, GB/s; empty if none was",
    )

    @classmethod
    def make(cls, topology: Topology) -> Machine:
        """What machines of one make have in common: all fields except the measured rates."""
        return cls.of(replace(topology, measured=()))

    @classmethod
    def of(cls, topology: Topology) -> Machine:
        """The fields of such a machine in a file."""
        peers = tuple("".join(_PEERS[link.peer] for link in row) for row in topology.links)
        pcie = tuple((one.generation, one.width) if one else None for one in topology.lanes)
        return cls(
            matrix=render_matrix(topology),
            model=topology.model,
            cpu=topology.cpu,
            pcie=pcie if any(pcie) else (),
            peers=peers if {"Y", "N"} & set("".join(peers)) else (),
            below=topology.below,
            numa_nodes=tuple(map(NumaFacts.of, topology.numa_nodes)),
            nics=tuple(
                NicNames(name=nic.name, ports=nic.ports, interfaces=nic.interfaces)
                for nic in topology.nics
                if nic.ports or nic.interfaces
            ),
            nvls=topology.nvls,
            measured=tuple((gpus, rate / 1000) for gpus, rate in topology.measured),
        )

    def topology(self) -> Topology:
        """The machine.

        Raises:
            MatrixError: the matrix cannot be read.
            ValueError: another field describes another number of GPUs, or has an invalid value.
        """
        read = parse_matrix(self.matrix)
        links = read.links
        if self.peers:
            if {len(self.peers), *map(len, self.peers)} != {len(read)} or set("".join(self.peers)) - {
                *_PEERS.values()
            }:
                raise ValueError(
                    f"peers must be {len(read)} rows of {len(read)} letters Y, N or ?, as the matrix has GPUs"
                )
            told = {letter: peer for peer, letter in _PEERS.items()}
            links = tuple(
                tuple(replace(link, peer=told[letter]) for link, letter in zip(row, letters, strict=True))
                for row, letters in zip(links, self.peers, strict=True)
            )
        if self.pcie and len(self.pcie) != len(read):
            raise ValueError(f"pcie describes {len(self.pcie)} GPUs, the matrix {len(read)}")
        lanes = tuple(Lanes(*one) if one else None for one in self.pcie)
        names = {nic.name: nic for nic in self.nics}
        if unknown := names.keys() - {nic.name for nic in read.nics}:
            raise ValueError(f"nics names {min(unknown)}, which is no network card of the matrix")
        nics = tuple(
            replace(nic, ports=names[nic.name].ports, interfaces=names[nic.name].interfaces)
            if nic.name in names
            else nic
            for nic in read.nics
        )
        return replace(
            read,
            links=links,
            model=self.model,
            cpu=self.cpu,
            lanes=lanes,
            below=self.below,
            nics=nics,
            numa_nodes=tuple(one.node for one in self.numa_nodes),
            nvls=self.nvls,
            measured=tuple((gpus, mb_per_s(rate)) for gpus, rate in self.measured),
        )
