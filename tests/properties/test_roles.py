"""Groups of roles against trying everything: whole GPUs, shares, MIG instances and named GPUs, beside what stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice, product
from random import Random

import pytest

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import GIB, WHOLE, Needs, Within
from placement.core.node import Choice, Node
from placement.core.request import Place, Request
from placement.core.roles import GroupPlan, plan
from placement.core.routes import Member, RoleLink, Roles, Route, Via, joined, meets
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import Link, Path, Topology
from placement.errors import Unplaceable
from tests.properties.cases import LARGE, MACHINES, SMALL

Where = dict[Member, tuple[Node, tuple[int, ...]]]

MOST = 5_000
"""Cases with more ways than this are passed over."""


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


def everything(nodes: list[Node], members: list[Member], requests: dict[str, Request]) -> Iterator[Where]:
    """All ways to place replicas."""
    if not members:
        yield {}
        return
    (name, index), *rest = members
    request = requests[name]
    for i, one in enumerate(nodes):
        if one.cpu_milli < request.cpu_milli:
            continue
        for choice in choices(one, request.needs):
            after = one.after(choice, cpu_milli=one.cpu_milli - request.cpu_milli)
            for others in everything([*nodes[:i], after, *nodes[i + 1 :]], rest, requests):
                yield {(name, index): (one, choice.gpus), **others}


def cost(
    roles: Roles, requests: dict[str, Request], where: Where, stands: Where | None = None
) -> tuple[object, ...] | None:
    """What :mod:`placement.core.roles` promises to keep small, in its order; ``None`` if it may not be so.

    Of what stands already only the routes count that lead to others.
    """
    new = where.keys()
    where = {**where, **(stands or {})}
    homes = {
        name: {node.id for (of, _), (node, _) in where.items() if of == name}
        for name, request in requests.items()
        if request.needs.named
    }
    if any(len(home) > 1 for home in homes.values()):
        return None
    found = [one for one in joined(roles, ("rack",), where) if one.one in new or one.other in new]
    if not all(meets(one.link, one.route, where[one.one], where[one.other]) for one in found):
        return None
    order = list(Path)
    return (
        max((one.route for one in found), default=Route(-9, 0, Path.UNKNOWN, "", None, (0, 0))),
        sum(one.route.level + 2 for one in found),
        -sum(
            round(score(n.topology, gpus).bandwidth_gb_per_s * 1000)
            for n, gpus in (where[member] for member in new)
            if len(gpus) > 1
        ),
        sum(one.route.slowness for one in found),
        sum(
            order.index(where[one.one][0].topology.pcie_path(a, b))
            for one in found
            if where[one.one][0].id == where[one.other][0].id
            and all(requests[name].needs.whole for name in one.link.between)
            for a, b in product(where[one.one][1], where[one.other][1])
        ),
    )


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


def case(chance: Random, mixed: bool) -> tuple[Snapshot, Roles, dict[str, Request]]:
    """A small cluster and a small group."""
    numas = ((0,), (0,), (1,), (1,))
    switched = Topology(((Link(Path.NVLINK, 12),) * 4,) * 4, numa=numas, model="NVIDIA A100-SXM4-80GB")
    palette = chance.choices([*MACHINES, switched, switched], k=2)
    nodes = [machine(chance, f"n{i}", palette, mixed) for i in range(chance.randint(1, 3))]
    names = ["p", "d", "x"][: chance.randint(1, 3)]
    counts = {name: chance.choice((1, 1, 2)) for name in names}
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
    requests = {
        name: Request(
            name,
            tuple(range(units * counts[name])),
            needs(chance, mixed),
            cpu_milli=chance.choice((0, 1000)) if mixed else 0,
        )
        for name in names
    }
    return Snapshot(nodes, near=("rack",)), Roles("g", counts, units, links), requests


def check(
    snapshot: Snapshot,
    roles: Roles,
    requests: dict[str, Request],
    standing: dict[Member, Place] | None = None,
) -> GroupPlan | None:
    """No other places are better; ``None`` if there are too many, or none."""
    members = [(name, index) for name, one in requests.items() for index in one.replicas]
    ways = [*islice(everything(list(snapshot.nodes), members, requests), MOST + 1)]
    if len(ways) > MOST:
        return None
    nodes = {one.id: one for one in snapshot.nodes}
    stands = {member: (nodes[place.node_id], place.gpus) for member, place in (standing or {}).items()}
    costs = [cost(roles, requests, where, stands) for where in ways]
    best = min((one for one in costs if one is not None), default=None)
    found = plan(snapshot, roles, requests, standing)
    if isinstance(found, Unplaceable):
        no_nvlink = "known to have NVLink" in str(found)
        assert best is None or no_nvlink, (found, best)
        return None
    where = {member: (nodes[place.node_id], place.gpus) for member, place in found.places.items()}
    assert {*members} == where.keys()
    assert best == cost(roles, requests, where, stands)
    chosen = {member: (place.node_id, place.gpus) for member, place in found.places.items()}
    assert any(chosen == {member: (node.id, gpus) for member, (node, gpus) in way.items()} for way in ways)
    assert not found.bounded
    return found


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(150))
def test_no_other_places_are_better(seed: int, mixed: bool) -> None:
    check(*case(Random(seed), mixed))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(120))
def test_nothing_better_can_stand_beside_what_stands(seed: int, mixed: bool) -> None:
    chance = Random(seed)
    snapshot, roles, requests = case(chance, mixed)
    anyhow = replace(roles, links=())
    first = plan(snapshot, anyhow, requests)
    if isinstance(first, Unplaceable):
        return
    standing = {member: place for member, place in first.places.items() if chance.random() < 0.5}
    nodes = {one.id: one for one in snapshot.nodes}
    for (name, _), place in standing.items():
        one, asked = nodes[place.node_id], requests[name]
        choice = one.choice_of(asked.needs, place.gpus)
        assert choice is not None
        nodes[place.node_id] = one.after(choice, cpu_milli=one.cpu_milli - asked.cpu_milli)
    left = {
        name: replace(one, replicas=tuple(i for i in one.replicas if (name, i) not in standing))
        for name, one in requests.items()
    }
    check(Snapshot(nodes.values(), near=("rack",)), roles, left, standing)
