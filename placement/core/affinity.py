"""What is near a GPU: its share of the CPUs, its NUMA node, the network cards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypedDict

from placement.core.topology import Nic, NumaNode, Path, Topology, ordinals

_NEAR = (Path.PIX, Path.PXB, Path.PHB, Path.NODE)
"""The paths to a near card, best first. A card on another NUMA node is not near."""


class Affinity(TypedDict, total=False):
    """What is near one GPU. Unknown or missing things are left out.

    Attributes:
        cpus: CPUs of its own, as Linux writes them (``0-3,64-67``): they belong to no other GPU of the node.
        numa_node: the NUMA node whose memory is nearest.
        ports: the working RDMA ports of the nearest cards that have any: ``mlx5_0:1``.
        interfaces: the working network interfaces of the nearest cards that have any: ``eth0``.
    """

    cpus: str
    numa_node: int
    ports: list[str]
    interfaces: list[str]


def affinities(topology: Topology, gpus: Iterable[int]) -> list[Affinity]:
    """What is near each of these GPUs; empty if nothing is known of any."""
    found = [_affinity(topology, gpu) for gpu in gpus]
    return found if any(found) else []


def _affinity(topology: Topology, gpu: int) -> Affinity:
    found = Affinity()
    near = [node for node in topology.numa_nodes if node.number in topology.numa[gpu] and node.cores]
    if near:
        found["numa_node"] = near[0].number
    if cpus := [cpu for node in near for core in _share(topology, node, gpu) for cpu in core]:
        found["cpus"] = ordinals(cpus)
    if ports := _nearest(topology, gpu, lambda nic: nic.ports):
        found["ports"] = ports
    if interfaces := _nearest(topology, gpu, lambda nic: nic.interfaces):
        found["interfaces"] = interfaces
    return found


def _share(topology: Topology, node: NumaNode, gpu: int) -> tuple[tuple[int, ...], ...]:
    """A GPU's share of the cores of a NUMA node near it. With fewer cores than GPUs there, no GPU gets any."""
    sharing = [other for other, numa in enumerate(topology.numa) if node.number in numa]
    cores, parts, part = len(node.cores), len(sharing), sharing.index(gpu)
    return node.cores[part * cores // parts : (part + 1) * cores // parts] if cores >= parts else ()


def _nearest(topology: Topology, gpu: int, names: Callable[[Nic], tuple[str, ...]]) -> list[str]:
    """The names (of ports, or of interfaces) of the nearest cards that have any, if these cards are near."""
    for path in _NEAR:
        if found := [name for nic in topology.nics if nic.paths[gpu] is path for name in names(nic)]:
            return found
    return []
