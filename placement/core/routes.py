"""Roles that talk, and the routes between their replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from typing import Any, NamedTuple

from placement.core.bandwidth import (
    BELOW_ONE_SWITCH,
    generation,
    hop_mb_per_s,
    hosts_of,
    lanes_mb_per_s,
    pair_mb_per_s,
)
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import Within
from placement.core.node import Node
from placement.core.topology import PATH_ORDER, Link, Path, Topology

Gpus = tuple[int, ...]

Member = tuple[str, int]
"""A replica of a group: its deployment, and its index there."""


class Via(StrEnum):
    """What the transport between two roles can use."""

    NVLINK = "nvlink"
    """NVLink where there is one, else PCIe; between nodes NVLink in one NVLink domain, else the network."""
    PCIE = "pcie"
    """PCIe, even where there is NVLink; between nodes the network."""
    NETWORK = "network"
    """Network cards, even on one node."""


ON_ONE_GPU = -(1 << 31)
"""Slowness of the route between shares of one GPU: nothing is faster."""


@dataclass(frozen=True)
class RoleLink:
    """Two roles talk.

    Attributes:
        between: their deployments.
        via: what their transport can use.
        within: how far apart they may be: a :class:`~placement.core.needs.Within`, or a node label that must have the
            same value on their nodes; empty for no limit.
        min_gb_per_s: the least that the route between any two of their GPUs must carry, GB/s per direction.
    """

    between: tuple[str, str]
    via: Via
    within: str = ""
    min_gb_per_s: float = 0.0

    @property
    def on_one_node(self) -> bool:
        """Whether only replicas on one node can meet its floor; of two nodes, an NVLink domain may."""
        if self.within in (Within.NUMA, Within.NODE):
            return True
        return self.via is not Via.NVLINK and (self.within == Within.SWITCH or self.min_gb_per_s > 0)


@dataclass(frozen=True)
class Roles:
    """A group as it is declared.

    Attributes:
        counts: deployment -> its replicas in each unit.
        units: how many there are. Unit *u* has the replicas *u* x count to (*u* + 1) x count - 1 of each.
    """

    name: str
    counts: Mapping[str, int]
    units: int = 1
    links: tuple[RoleLink, ...] = ()

    def unit_of(self, member: Member) -> int:
        """The unit of a replica."""
        return member[1] // self.counts[member[0]]

    def members(self, unit: int, name: str) -> list[Member]:
        """The replicas of a deployment in a unit."""
        count = self.counts[name]
        return [(name, index) for index in range(unit * count, (unit + 1) * count)]


@dataclass(frozen=True, order=True)
class Route:
    """The slowest path between the GPUs of two replicas. A smaller route is better.

    Attributes:
        level: -2 on one node, -1 between nodes of one NVLink domain; else of the narrowest region that holds both
            nodes, 0 for the narrowest label.
        slowness: minus what it carries per direction, MB/s, at least; over the network, what the PCIe path to the
            nearest network card carries, since nothing is known of the network.
        path: what it leads over; over the network, the path from a GPU to its nearest card; unknown on one GPU.
        name: as people say it: ``NV18``, ``PHB``, ``one GPU``, ``network, one rack``.
        gb_per_s: what it carries, GB/s (10^9 bytes) per direction; ``None`` where that is not known.
        pair: the two GPUs.
    """

    level: int
    slowness: int
    path: Path = field(compare=False)
    name: str = field(compare=False)
    gb_per_s: float | None = field(compare=False)
    pair: tuple[int, int] = field(compare=False)

    def __str__(self) -> str:
        """``NV18, 371 GB/s``; ``network, one rack``."""
        return self.name if self.gb_per_s is None else f"{self.name}, {self.gb_per_s:.3g} GB/s"


class Joined(NamedTuple):
    """Two replicas that talk, and their route."""

    link: RoleLink
    one: Member
    other: Member
    route: Route

    def to_dict(self, unit: int) -> dict[str, Any]:
        """The same as JSON-ready values."""
        return {
            "unit": unit,
            "between": [f"{name}/{index}" for name, index in (self.one, self.other)],
            "via": str(self.link.via),
            "route": self.route.name,
            "gb_per_s": self.route.gb_per_s,
            "gpus": list(self.route.pair),
        }


Located = tuple[Node, Gpus]
"""Where a replica is, or the part of it on one node."""


def route(near: Sequence[str], via: Via, one: Located, other: Located) -> Route:
    """The slowest path between the GPUs of two replicas.

    Args:
        near: labels that have the same value on nodes near each other, widest first.
        via: what their transport can use.
        one: a node and GPUs there.
        other: the others.
    """
    (a, gpus), (b, others) = one, other
    if a.id == b.id:
        return on_node(a.topology, via, gpus, others)
    domain = a.labels.get(GPU_DOMAIN_LABEL)
    if via is Via.NVLINK and domain is not None and domain == b.labels.get(GPU_DOMAIN_LABEL):
        ends = [(fastest_nvlink(a, g), fastest_nvlink(b, h), (g, h)) for g, h in product(gpus, others)]
        slowest, pair = min((min(x, y), pair) for x, y, pair in ends)
        if slowest:
            name = f"NVLink, {GPU_DOMAIN_LABEL} {domain}"
            return Route(-1, -slowest, Path.NVLINK, name, slowest / 1000, pair)
    level = next(
        (
            len(near) - widest
            for widest in range(len(near), 0, -1)
            if near[widest - 1] in a.labels
            and all(a.labels.get(key) == b.labels.get(key) for key in near[:widest])
        ),
        len(near),
    )
    where = f", one {near[len(near) - 1 - level]}" if level < len(near) else ""
    slowness, path, pair = _over_cards(a.topology, gpus, b.topology, others)
    return Route(level, slowness, path, f"network{where}", None, pair)


def on_node(topology: Topology, via: Via, gpus: Gpus, others: Gpus) -> Route:
    """The same on one node: the bandwidth of a set of two GPUs, the lower end of a range."""
    kind = generation(topology.model)
    host, _ = hosts_of(topology.cpu, kind.pcie)

    def way(pair: tuple[int, int]) -> Link:
        link = topology.link(*pair)
        if link.path is not Path.NVLINK or via is Via.NVLINK:
            return link if link.path is not Path.UNKNOWN else Link(topology.pcie_path(*pair))
        # GPUs that NVLink joins reach each other's memory.
        return Link(topology.pcie_path(*pair), peer=True)

    def speed(pair: tuple[int, int]) -> int:
        return pair_mb_per_s(way(pair), kind, min(_lanes(topology, gpu) for gpu in pair), host)

    if via is Via.NETWORK:
        slowness, path, pair = _over_cards(topology, gpus, topology, others)
        return Route(-2, slowness, path, f"network, {path} to the card", None, pair)
    if gpus == others:
        return Route(-2, ON_ONE_GPU, Path.UNKNOWN, "one GPU", None, (gpus[0], gpus[0]))
    slowness, pair = max(
        ((-speed(pair), pair) for pair in product(gpus, others)),
        key=lambda found: (found[0], [-gpu for gpu in found[1]]),
    )
    link = way(pair)
    known = link.path is not Path.UNKNOWN
    return Route(-2, slowness, link.path, str(link), -slowness / 1000 if known else None, pair)


def fastest_nvlink(node: Node, gpu: int) -> int:
    """The bandwidth of a GPU's NVLinks to one peer, or into the switch, MB/s; 0 if it has none."""
    best = max(node.topology.links[gpu], key=lambda link: link.nvlinks)
    return hop_mb_per_s(best, generation(node.topology.model)) if best.nvlinks else 0


def _over_cards(
    one: Topology, gpus: Gpus, other: Topology, others: Gpus
) -> tuple[int, Path, tuple[int, int]]:
    """The slowness of the path over two GPUs' network cards, the kind of path at its slower end, and the GPUs."""
    here, there = _to_card(one, gpus), _to_card(other, others)
    slowness, path, _ = max(here, there, key=lambda end: (end[0], PATH_ORDER[end[1]]))
    return slowness, path, (here[2], there[2])


def _to_card(topology: Topology, gpus: Gpus) -> tuple[int, Path, int]:
    """The GPU that is farthest from a network card: the slowness of that path, and its kind.

    Below a switch a card reaches a GPU's memory directly, as in NCCL (``ncclTopoCheckGdr`` in ``src/graph/paths.cc``);
    past a host bridge the data goes through the host's memory.
    """
    gpu = max(gpus, key=lambda gpu: (PATH_ORDER[topology.nearest_nic[gpu]], -gpu))
    path = topology.nearest_nic[gpu]
    kind = generation(topology.model)
    host, _ = hosts_of(topology.cpu, kind.pcie)
    way = Link(Path.NODE if path is Path.PHB else path, peer=path in BELOW_ONE_SWITCH)
    return -pair_mb_per_s(way, kind, _lanes(topology, gpu), host), path, gpu


def _lanes(topology: Topology, gpu: int) -> int:
    return lanes_mb_per_s(topology.lanes[gpu], generation(topology.model))


def meets(link: RoleLink, found: Route, one: Located, other: Located) -> bool:
    """Whether the route between two replicas is as near, and as fast, as their link asks for."""
    if found.slowness == ON_ONE_GPU and link.within in ("", *Within):
        return True
    if link.min_gb_per_s and (found.gb_per_s is None or found.gb_per_s < link.min_gb_per_s):
        return False
    (a, gpus), (b, others) = one, other
    on_node, on_nvlink = found.level == -2, found.path is Path.NVLINK
    match link.within:
        case "":
            return True
        case Within.NVLINK:
            return on_nvlink
        case Within.SWITCH:
            return on_nvlink or (on_node and PATH_ORDER[found.path] <= PATH_ORDER[Path.PXB])
        case Within.NUMA:
            return on_node and len({a.topology.numa[gpu] for gpu in (*gpus, *others)} | {()}) == 2
        case Within.NODE:
            return on_node
        case label:
            return label in a.labels and a.labels[label] == b.labels.get(label)


def joined(roles: Roles, near: Sequence[str], placed: Mapping[Member, Sequence[Located]]) -> list[Joined]:
    """All that talk of those that are placed, by unit and link. ``placed`` has the parts of each."""
    return [
        Joined(
            link,
            one,
            other,
            max(route(near, link.via, *parts) for parts in product(placed[one], placed[other])),
        )
        for unit in range(roles.units)
        for link in roles.links
        for one, other in product(*(roles.members(unit, name) for name in link.between))
        if one in placed and other in placed
    ]
