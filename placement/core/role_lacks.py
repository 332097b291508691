"""What new nodes a waiting group needs, as far as that is known of nodes that do not exist yet.

Of a new node neither the links between its GPUs nor, mostly, its labels are known. So replicas that the links' floors
bind to each other, a *region*, are asked for on one node; or, where no node is that large and the floors are about
labels, on several. A replica that no floor binds to others is a region by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise, product

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import Within
from placement.core.reconcile import Desired, Observed
from placement.core.request import Lack, Request
from placement.core.role_places import Piece, Places
from placement.core.role_search import fits
from placement.core.roles import missing
from placement.core.routes import RoleLink, Roles, Via
from placement.core.snapshot import Snapshot

ONE_NODE = ""
"""Stands for a label of which no two nodes share a value."""


def lacks(
    snapshot: Snapshot, roles: Roles, members: Mapping[str, tuple[Desired, Mapping[int, Observed]]]
) -> tuple[Lack, ...]:
    """The regions for which there is no place beside the others, of which as many as possible have one.

    Args:
        snapshot: the cluster.
        roles: the group.
        members: deployment -> its declaration, and its existing replicas.
    """
    snapshot, requests, standing = missing(snapshot, members)
    places = Places(snapshot, roles, requests, standing)
    if not places.todo:
        return ()
    has_nvlink = places.without_nvlink() is None
    pieces = [*places.placed(), *places.todo]
    bonds = _bonds(places, requests, pieces, has_nvlink)
    regions = _joined(pieces, chain.from_iterable(bonds.values()))
    regions = [region for region in regions if not region.isdisjoint(places.todo)]
    lacking = _without_place(places, regions)
    if not has_nvlink and not lacking:  # a single node with NVLink makes links over it possible
        lacking = [max(regions, key=len)]
    near = {label: _joined(pieces, [*bonds[ONE_NODE], *pairs]) for label, pairs in bonds.items()}
    return tuple(_lack(snapshot, places, requests, region, near) for region in lacking)


def _bonds(
    places: Places, requests: Mapping[str, Request], pieces: Sequence[Piece], has_nvlink: bool
) -> dict[str, list[tuple[Piece, Piece]]]:
    """Label -> the pairs of which the nodes must share its value."""
    by_name: dict[str, list[Piece]] = {name: [] for name in requests}
    for piece in pieces:
        by_name[piece[0]].append(piece)
    # Named GPUs are of one node for all replicas.
    named = [pairwise(by_name[name]) for name, request in requests.items() if request.needs.named]
    bonds = {ONE_NODE: [*chain.from_iterable(named)]}
    for link in places.roles.links:
        one, other = link.between
        for label in _labels(link, has_nvlink):
            bonds.setdefault(label, []).extend(
                pair
                for pair in product(by_name[one], by_name[other])
                if places.unit_of(pair[0]) == places.unit_of(pair[1])
            )
    return bonds


def _labels(link: RoleLink, has_nvlink: bool) -> Iterator[str]:
    """The labels whose values the nodes of two replicas must share by the floor of their link."""
    fast = link.min_gb_per_s > 0 or link.within in (Within.NVLINK, Within.SWITCH)
    if link.on_one_node:
        yield ONE_NODE
    elif fast or (link.via is Via.NVLINK and not has_nvlink):
        yield GPU_DOMAIN_LABEL
    if link.within and link.within not in [*Within]:
        yield link.within


def _joined(pieces: Iterable[Piece], pairs: Iterable[tuple[Piece, Piece]]) -> list[set[Piece]]:
    """The sets of pieces that pairs join, directly or over others."""
    found = {piece: {piece} for piece in pieces}
    for one, other in pairs:
        if found[one] is not found[other]:
            found[one] |= found[other]
            found |= dict.fromkeys(found[other], found[one])
    return [*{id(several): several for several in found.values()}.values()]


def _without_place(places: Places, regions: Sequence[set[Piece]]) -> list[set[Piece]]:
    """The regions for which there is no place; those of which something is placed come first."""
    kinds: dict[object, list[set[Piece]]] = {}
    for region in regions:
        fresh = region.isdisjoint(places.placed())
        names = tuple(sorted(Counter(name for name, *_ in region).items()))
        kinds.setdefault(names if fresh else "", []).append(region)
    had: set[Piece] = set()
    lacking: list[set[Piece]] = []
    for kind, alike in kinds.items():
        while alike:
            count = _fitting(places, had, alike)
            had = had.union(*alike[:count])
            lacking += alike[count:] if kind else alike[count : count + 1]
            alike = [] if kind else alike[count + 1 :]
    return lacking


def _fitting(places: Places, had: set[Piece], regions: Sequence[set[Piece]]) -> int:
    """How many of the regions, from the first, have places beside some others."""

    def no_place(last: int) -> bool:
        wanted = had.union(*regions[: last + 1])
        return not fits(places, [piece for piece in places.todo if piece in wanted])

    return bisect_left(range(len(regions)), True, key=no_place)


def _lack(
    snapshot: Snapshot,
    places: Places,
    requests: Mapping[str, Request],
    region: set[Piece],
    near: Mapping[str, Sequence[set[Piece]]],
) -> Lack:
    """What a region lacks; ``near`` are, by label, the pieces whose nodes share its value."""
    new = [piece for piece in places.todo if piece in region]
    name, index, _ = new[0]
    labels: dict[str, str] = {}
    for label, several in near.items():
        bound = set().union(*(one for one in several if not one.isdisjoint(new)))
        for piece, (bit, _) in places.placed().items():
            node = snapshot.at(bit)
            if piece in bound and label not in node.labels:
                why = f"{piece[0]}/{piece[1]} is on {node.name}, and no new node is as near as the links' floors ask"
                return Lack(places.roles.name, (name, index), why=why)
            if piece in bound:
                labels[label] = node.labels[label]
    homes = [home.intersection(new) for home in near[ONE_NODE] if not home.isdisjoint(new)]
    return Lack(
        places.roles.name,
        (name, index),
        tuple(tuple(_counted(requests, home)) for home in homes),
        tuple(sorted(labels.items())),
    )


def _counted(requests: Mapping[str, Request], pieces: Iterable[Piece]) -> Iterator[tuple[Request, int]]:
    for name, count in sorted(Counter(name for name, *_ in pieces).items()):
        yield requests[name], count
