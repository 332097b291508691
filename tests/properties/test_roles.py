"""Groups of roles against trying everything: whole GPUs, shares, MIG instances and named GPUs, beside what stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, count, product
from random import Random

import pytest

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import GIB, WHOLE, Needs, Within
from placement.core.node import Choice, Node
from placement.core.request import Place, Request
from placement.core.role_places import Piece
from placement.core.roles import GroupPlan, plan
from placement.core.routes import Located, Member, RoleLink, Roles, Route, Via, meets, route
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import Lanes, Link, Path, Topology
from placement.errors import Unplaceable
from tests.properties.cases import LARGE, MACHINES, SMALL

Where = dict[Piece, Located]

MOST = 10_000
"""Cases in which more is to be tried than this are passed over."""


class TooMany(Exception):
    """There are more ways than a test has time for."""


def choices(node: Node, needs: Needs) -> Iterator[Choice]:
    """What a replica may take on a node."""
    named = {node.slot_of(name) for name in needs.named} if needs.named else {*range(len(node.topology))}
    will_do = [gpu for gpu in named if gpu is not None]
    if None in named or any(gpu in node.slots for gpu in named if needs.named and not needs.profile):
        return
    if needs.profile:
        yield from (
            Choice((slot,), WHOLE, 0) for slot in will_do if node.instances.get(slot) == needs.profile
        )
    elif needs.whole:
        for gpus in combinations(sorted(node.free.intersection(will_do)), needs.gpus):
            if node.shape.best(sum(1 << gpu for gpu in gpus), len(gpus), needs.within) is not None:
                yield Choice(gpus, WHOLE, 0)
    elif (share := needs.share_of(node.gpu_memory_bytes)) is not None:
        for gpu in will_do:
            if (rest := WHOLE if gpu in node.free else node.rests.get(gpu, 0)) >= share:
                yield Choice((gpu,), share, rest - share)


def everything(
    nodes: list[Node], pieces: list[Piece], requests: dict[str, Request], tried: Iterator[int]
) -> Iterator[Where]:
    """All ways to place the tensor-parallel groups of replicas.

    Raises:
        TooMany: ``tried`` came to :data:`MOST`.
    """
    if next(tried) == MOST:
        raise TooMany
    if not pieces:
        yield {}
        return
    piece, *rest = pieces
    request = requests[piece[0]]
    for i, one in enumerate(nodes):
        if one.cpu_milli < request.cpu_milli:
            continue
        for choice in choices(one, request.needs):
            after = one.after(choice, cpu_milli=one.cpu_milli - request.cpu_milli)
            for others in everything([*nodes[:i], after, *nodes[i + 1 :]], rest, requests, tried):
                yield {piece: (one, choice.gpus), **others}


def cost(
    roles: Roles, requests: dict[str, Request], where: Where, stands: Where | None = None
) -> tuple[Route, int, int, int, int, int] | None:
    """What :mod:`placement.core.roles` promises to keep small, in its order; ``None`` if it may not be so.

    Of what stands already only the routes count that lead to others.
    """
    new = where.keys()
    where = {**where, **(stands or {})}
    for name, request in requests.items():
        there = {piece: node for piece, (node, _) in where.items() if piece[0] == name}
        if request.needs.named and len({node.id for node in there.values()}) > 1:
            return None
        if any(len({there[p].topology.model for p in there if p[1] == i}) > 1 for _, i, _ in there):
            return None
    talk = [
        (link, one, other)
        for link in roles.links
        for one, other in product(*([p for p in where if p[0] == name] for name in link.between))
        if roles.unit_of(one[:2]) == roles.unit_of(other[:2])
    ]
    inside = RoleLink(("", ""), Via.NVLINK)
    talk += [(inside, one, other) for one, other in combinations(where, 2) if one[:2] == other[:2]]
    found = [
        (one, other, link, route(("rack",), link.via, where[one], where[other]))
        for link, one, other in talk
        if one in new or other in new
    ]
    if not all(meets(link, way, where[one], where[other]) for one, other, link, way in found):
        return None
    order = list(Path)
    ways = [way for *_, way in found]
    return (
        max(ways, default=Route(-9, 0, Path.UNKNOWN, "", None, (0, 0))),
        sum(way.level + 2 for _, _, link, way in found if link is inside),
        sum(way.level + 2 for _, _, link, way in found if link is not inside),
        -sum(
            round(score(n.topology, gpus).bandwidth_gb_per_s * 1000)
            for n, gpus in (where[piece] for piece in new)
            if len(gpus) > 1
        ),
        sum(way.slowness for way in ways),
        sum(
            order.index(where[one][0].topology.pcie_path(a, b))
            for one, other, *_ in found
            if where[one][0].id == where[other][0].id
            and all(requests[name].needs.whole for name, *_ in (one, other))
            for a, b in product(where[one][1], where[other][1])
        ),
    )


def recut(where: Where) -> bool:
    """Whether several tensor-parallel groups of a replica are on one node, whose actor says which GPUs each has."""
    on_nodes = [(*piece[:2], node.id) for piece, (node, gpus) in where.items() if len(gpus) > 1]
    return len(on_nodes) > len({*on_nodes})


def machine(chance: Random, name: str, palette: list[Topology], mixed: bool) -> Node:
    """A node with a few free GPUs; if mixed, some of the others are shared, or cut up."""
    topology = chance.choice(palette)
    gpus = range(len(topology))
    free = [gpu for gpu in gpus if chance.random() < 0.8][:4]
    labels = {"rack": chance.choice("ab")} if chance.random() < 0.7 else {}
    labels |= {GPU_DOMAIN_LABEL: "d"} if chance.random() < 0.3 else {}
    node = Node(f"id-{name}", name, topology=topology, free=frozenset(free), labels=labels)
    if not mixed:
        return node
    others = chance.choice((("shared",), ("shared", SMALL), (SMALL, SMALL, LARGE), ("held",)))
    kinds = {gpu: chance.choice(("free", "free", *others)) for gpu in free}
    slots = {gpu: kind for gpu, kind in kinds.items() if kind in (SMALL, LARGE)}
    return replace(
        node,
        free=frozenset(gpu for gpu in free if kinds[gpu] == "free"),
        rests={gpu: chance.choice((250, 250, 500, 750)) for gpu in free if kinds[gpu] == "shared"},
        slots=slots,
        instances=slots,
        gpu_memory_bytes=chance.choice((40, 80)) * GIB,
        cpu_milli=chance.choice((2000, 9000, 9000)),
    )


def needs(chance: Random, mixed: bool) -> Needs:
    """What a role needs."""
    kind = chance.choice(("whole", "whole", "share", "share", "memory", "mig", "named")) if mixed else "whole"
    match kind:
        case "share":
            return Needs(1, share=chance.choice((250, 250, 500, 600)))
        case "memory":
            return Needs(1, memory_bytes=chance.choice((10, 20, 50)) * GIB)
        case "mig":
            return Needs(1, profile=chance.choice((SMALL, SMALL, LARGE)))
        case "named":
            return Needs(1, named=(0, 1, 2)[: chance.randint(1, 3)], share=chance.choice((WHOLE, 250)))
    gpus = chance.choice((1, 1, 1, 2))
    return Needs(gpus, chance.choice((Within.NODE, Within.NUMA)) if gpus > 1 else Within.NODE)


def case(chance: Random, kind: str) -> tuple[Snapshot, Roles, dict[str, Request]]:
    """A small cluster and a small group: of ``whole`` GPUs, ``mixed``, or over ``several`` nodes."""
    mixed = kind == "mixed" or (kind == "several" and chance.random() < 0.3)
    numas = ((0,), (0,), (1,), (1,))
    switched = Topology(((Link(Path.NVLINK, 12),) * 4,) * 4, numa=numas, model="NVIDIA A100-SXM4-80GB")
    narrow = Topology(MACHINES[2].links, model=MACHINES[2].model, lanes=(Lanes(4, 8), *(Lanes(4),) * 3))
    palette = chance.choices([*MACHINES, narrow, switched, switched], k=2)
    nodes = [
        machine(chance, f"n{i}", palette, mixed) for i in range(chance.randint(1 + (kind == "several"), 3))
    ]
    several = kind == "several"
    names = ["p", "d", "x"][: chance.randint(1, 2 if several else 3)]
    counts = {name: 1 if several else chance.choice((1, 1, 2)) for name in names}
    units = chance.randint(1, 2) if sum(counts.values()) < 4 else 1
    links = tuple(
        RoleLink(
            pair,
            chance.choice(list(Via)),
            chance.choice(("", "", "", "node", "numa", "switch", "nvlink", "rack")),
            chance.choice((0.0, 0.0, 0.0, 10.0, 30.0)),
        )
        for pair in combinations(names, 2)
        if chance.random() < 0.8
    )
    requests = {}
    for name in names:
        asked = needs(chance, mixed)
        stages = chance.choice((1, 2, 2, 3)) if several and asked.whole else 1
        cpu_milli = chance.choice((0, 1000)) if mixed else 0
        replicas = tuple(range(units * counts[name]))
        requests[name] = Request(name, replicas, asked, stages, cpu_milli=cpu_milli)
    return Snapshot(nodes, near=("rack",)), Roles("g", counts, units, links), requests


def located(nodes: dict[str, Node], places: Mapping[Member, Sequence[Place]]) -> Where:
    """The nodes and GPUs of these places."""
    return {
        (*member, i): (nodes[place.node_id], place.gpus)
        for member, several in places.items()
        for i, place in enumerate(several)
    }


def check(
    snapshot: Snapshot,
    roles: Roles,
    requests: dict[str, Request],
    standing: dict[Member, tuple[Place, ...]] | None = None,
) -> GroupPlan | None:
    """No other places are better; ``None`` if there are too many, or none."""
    pieces = [
        (name, index, i)
        for name, one in requests.items()
        for index in one.replicas
        for i in range(one.stages)
    ]
    try:
        ways = [*everything(list(snapshot.nodes), pieces, requests, count())]
    except TooMany:
        return None
    nodes = {one.id: one for one in snapshot.nodes}
    stands = located(nodes, standing or {})
    costs = [cost(roles, requests, where, stands) for where in ways]
    best = min((one for one in costs if one is not None), default=None)
    found = plan(snapshot, roles, requests, standing)
    if isinstance(found, Unplaceable):
        no_nvlink = "known to have NVLink" in str(found)
        assert best is None or no_nvlink, (found, best)
        return None
    where = located(nodes, found.places)
    assert {*pieces} == where.keys()
    reached = cost(roles, requests, where, stands)
    assert best is not None and reached is not None
    if recut(where):
        assert (best[0].level, *best[1:3]) == (reached[0].level, *reached[1:3])
    else:
        assert best == reached
    chosen = {piece: (node.id, gpus) for piece, (node, gpus) in where.items()}
    assert any(chosen == {piece: (node.id, gpus) for piece, (node, gpus) in way.items()} for way in ways)
    assert not found.bounded
    return found


@pytest.mark.parametrize("kind", ["whole", "mixed", "several"])
@pytest.mark.parametrize("seed", range(100))
def test_no_other_places_are_better(seed: int, kind: str) -> None:
    check(*case(Random(seed), kind))


@pytest.mark.parametrize("kind", ["whole", "mixed", "several"])
@pytest.mark.parametrize("seed", range(80))
def test_nothing_better_can_stand_beside_what_stands(seed: int, kind: str) -> None:
    chance = Random(seed)
    snapshot, roles, requests = case(chance, kind)
    anyhow = replace(roles, links=())
    first = plan(snapshot, anyhow, requests)
    if isinstance(first, Unplaceable):
        return
    standing = {member: place for member, place in first.places.items() if chance.random() < 0.5}
    nodes = {one.id: one for one in snapshot.nodes}
    for (name, _, _), (node, gpus) in located(nodes, standing).items():
        one, asked = nodes[node.id], requests[name]
        choice = one.choice_of(asked.needs, gpus)
        assert choice is not None
        nodes[one.id] = one.after(choice, cpu_milli=one.cpu_milli - asked.cpu_milli)
    left = {
        name: replace(one, replicas=tuple(i for i in one.replicas if (name, i) not in standing))
        for name, one in requests.items()
    }
    check(Snapshot(nodes.values(), near=("rack",)), roles, left, standing)
