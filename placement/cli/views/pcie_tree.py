"""The PCIe tree of a machine's GPUs and network cards, derived from the paths between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from placement.core.topology import PATH_ORDER, Path, Topology, components

SLICES = 7
"""Compute slices of a GPU with MIG on (NVIDIA's MIG user guide)."""


@dataclass(frozen=True)
class Gpu:
    """A whole GPU, or one with MIG instances: its slots, and the profiles of its instances."""

    slots: tuple[int, ...]
    profiles: tuple[str, ...] = ()

    @property
    def slices(self) -> int:
        """How many slices it has."""
        return max(SLICES, sum(map(slices_of, self.profiles)))


@dataclass
class Place:
    """A PCIe switch, a host bridge or a NUMA node: the GPUs or smaller places below it, and the network cards there.

    Attributes:
        inner: the GPUs or smaller places.
        level: the longest path within it.
        cards: names of the network cards at this level, and not nearer to any GPU.
        told: whether the paths within it are known, and not only an upper bound of them.
        left, right: where it is drawn.
    """

    inner: list[Any]
    level: Path
    cards: list[str] = field(default_factory=list)
    told: bool = True
    left: float = 0
    right: float = 0

    def slots(self) -> list[int]:
        """Of all that is in it."""
        return [slot for one in self.inner for slot in (one.slots() if isinstance(one, Place) else one.slots)]


def gpus_of(shape: Topology, facts: Mapping[str, Any]) -> list[Gpu]:
    """The GPUs in order; slots that are instances of one GPU together."""
    shown = facts.get("gpus") or ()
    parents = [one["parent"] for one in facts.get("instances") or ()]
    found: dict[object, list[tuple[int, str]]] = {}
    for slot in range(len(shape)):
        one = shown[slot] if slot < len(shown) else {}
        profile = one.get("mig_profile") or ("?" if one.get("mig_enabled") else "")
        parent = parents.pop(0) if profile and parents else None
        key = ("GPU", one.get("pci_bus_id") or parent) if profile else slot
        found.setdefault(slot if key == ("GPU", None) else key, []).append((slot, profile))
    return [
        Gpu(tuple(slot for slot, _ in slots), tuple(profile for _, profile in slots if profile))
        for slots in found.values()
    ]


def pcie_tree(shape: Topology, every: Sequence[Gpu]) -> tuple[list[Place], list[str]]:
    """The NUMA nodes with all that is in them, and the network cards that are in none."""
    path = {(a, b): shape.pcie_path(a, b) for a in range(len(shape)) for b in range(len(shape)) if a != b}
    numa_known = all(shape.numa)

    def near(one: Gpu, other: Gpu, level: Path) -> bool:
        a, b = one.slots[0], other.slots[0]
        if level is Path.NODE and numa_known:
            return shape.numa[a] == shape.numa[b]
        return PATH_ORDER[path[a, b]] <= PATH_ORDER[level]

    def split(gpus: Sequence[Gpu], level: Path) -> list[list[Gpu]]:
        found = components(range(len(gpus)), lambda i, j: near(gpus[i], gpus[j], level))
        return [[gpus[i] for i in group] for group in found]

    left = {nic.name: nic for nic in shape.nics}

    def cards(gpus: Sequence[Gpu], level: Path) -> list[str]:
        slots = [slot for gpu in gpus for slot in gpu.slots]
        here = [
            name
            for name, nic in left.items()
            if min(PATH_ORDER[nic.paths[slot]] for slot in slots) <= PATH_ORDER[level]
        ]
        for name in here:
            del left[name]
        return here

    groups = (
        split(every, Path.NODE)
        if numa_known or any(one is not Path.UNKNOWN for one in path.values())
        else [list(every)]
    )
    places = []
    for group in groups:
        bridges = []
        for below in split(group, Path.PHB):
            switches = []
            for gpus in split(below, Path.PXB):
                beside = cards(gpus, Path.PXB)
                switches.append(Place(list(gpus), Path.PXB, beside))
            bridges.append(Place(switches, Path.PHB, cards(below, Path.PHB)))
        told = all(_told(shape, one.slots[0], other.slots[0]) for one, other in combinations(group, 2))
        places.append(Place(bridges, Path.NODE, cards(group, Path.NODE), told))
    return places, list(left)


def _told(shape: Topology, a: int, b: int) -> bool:
    """Whether the PCIe path between two GPUs is known, and not only an upper bound of it.

    PCIe is a tree: if one GPU is nearer to a network card than the other, they are as far apart as the other is from
    the card.
    """
    told = shape.links[a][b].path, shape.below[a][b] if shape.below else Path.UNKNOWN
    return (
        any(path not in (Path.NVLINK, Path.UNKNOWN) for path in told)
        or any(nic.paths[a] is not nic.paths[b] for nic in shape.nics)
        or PATH_ORDER[shape.pcie_path(a, b)] <= PATH_ORDER[Path.PHB]
    )


def slices_of(profile: str) -> int:
    """Compute slices of a profile: 3 of ``1c.3g.40gb``; 1 where it is not known."""
    return next(
        (int(part[:-1]) for part in profile.split(".") if part[:-1].isdecimal() and part[-1] == "g"), 1
    )
