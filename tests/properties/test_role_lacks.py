"""What a waiting group lacks: with such nodes it is placed; where none is asked for, none would help."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random

import pytest
from pydantic import ValidationError

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import GIB
from placement.core.node import Node
from placement.core.reconcile import Desired, Observed
from placement.core.replicas import PlannedReplica
from placement.core.request import Lack, Request
from placement.core.role_lacks import lacks
from placement.core.roles import GroupPlan, plan, refusal_of, tell
from placement.core.routes import RoleLink, Roles
from placement.core.snapshot import Snapshot
from placement.core.topology import Link, Path, Topology
from placement.runtime.needs import _together
from placement.wire.groups import GroupLink
from tests.properties.test_roles import case

Members = dict[str, tuple[Desired, dict[int, Observed]]]

MODEL = "NVIDIA A100-SXM4-80GB"
IDEAL = {"rack": "z", GPU_DOMAIN_LABEL: "z"}


def ideal(name: str, wanted: tuple[tuple[Request, int], ...], labels: Mapping[str, str]) -> Node:
    """A node with so much, all of it as near as can be."""
    count = int(_together(wanted)[0])
    slots = [one.needs.profile for one, times in wanted for _ in range(times) if one.needs.profile]
    if any(one.needs.named for one, _ in wanted):  # the named GPUs come first
        count += len(slots)
    instances = dict(enumerate(slots, count - len(slots)))
    links = ((Link(Path.NVLINK, 12),) * count,) * count
    topology = Topology(links, numa=((0,),) * count, model=MODEL)
    return Node(
        name,
        name,
        topology=topology,
        free=frozenset(range(count)) - instances.keys(),
        slots=instances,
        instances=instances,
        gpu_memory_bytes=80 * GIB,
        cpu_milli=100_000,
        labels={**IDEAL, **labels},
    )


def with_them(nodes: Iterable[Node], several: Sequence[Lack], times: int = 1) -> Snapshot:
    """Nodes, and such as are lacking."""
    new = [
        ideal(f"new-{i}-{j}-{k}", home, dict(lack.labels))
        for i, lack in enumerate(several)
        for j, home in enumerate(lack.nodes)
        for k in range(times)
    ]
    return Snapshot([*nodes, *new], near=("rack",))


def declarable(link: RoleLink) -> bool:
    """Whether a group may be declared with it."""
    floors = {"within": link.within or None, "min_bandwidth_gb_per_s": link.min_gb_per_s or None}
    with suppress(ValidationError):
        GroupLink.model_validate({"between": link.between, "via": link.via, **floors})
        return True
    return False


def waiting(chance: Random, kind: str, stands: float) -> tuple[Snapshot, Roles, Members]:
    """A group on a small cluster; some of it is placed already."""
    snapshot, roles, requests = case(chance, kind)
    roles = replace(roles, links=tuple(filter(declarable, roles.links)))
    if kind == "several":  # the sets of a replica are of one model, and a new node may be of another
        alike = [replace(one, topology=replace(one.topology, model=MODEL)) for one in snapshot.nodes]
        snapshot = Snapshot(alike, near=("rack",))
    first = plan(snapshot, roles, requests) if stands else None
    nodes, members = {one.id: one for one in snapshot.nodes}, dict[str, tuple[Desired, dict[int, Observed]]]()
    for name, request in requests.items():
        there: dict[int, Observed] = {}
        for index in request.replicas if isinstance(first, GroupPlan) else ():
            if chance.random() > stands:
                continue
            parts = []
            assert isinstance(first, GroupPlan)
            for place in first.places[name, index]:
                one = nodes[place.node_id]
                choice = one.choice_of(request.needs, place.gpus)
                assert choice is not None
                nodes[one.id] = one.after(choice, cpu_milli=one.cpu_milli - request.cpu_milli)
                parts.append(PlannedReplica(index, one.id, place.gpus))
            there[index] = Observed(tuple(parts), request)
        members[name] = Desired(request), there
    if stands:  # others take most of the rest
        for one in nodes.values():
            free = frozenset(gpu for gpu in one.free if chance.random() < 0.3)
            nodes[one.id] = replace(one, free=free, rests={}, instances={})
    return Snapshot(nodes.values(), near=("rack",)), roles, members


@pytest.mark.parametrize("stands", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["whole", "mixed", "several"])
def test_with_the_nodes_that_it_lacks_it_is_placed(kind: str, stands: float) -> None:
    seen = Counter[str]()
    for seed in range(80):
        snapshot, roles, members = waiting(Random(seed), kind, stands)
        if refusal_of(tell(snapshot, roles, members)) is None:
            assert not lacks(snapshot, roles, members)
            continue
        several = lacks(snapshot, roles, members)
        assert several, seed
        everything = tuple(
            (one.request, len(one.request.replicas) * one.request.stages) for one, _ in members.values()
        )
        all_of_it = Lack("g", several[0].first, (everything,))
        alone = {name: (desired, dict[int, Observed]()) for name, (desired, _) in members.items()}
        if refusal_of(tell(with_them([], [all_of_it]), roles, alone)) is not None:
            continue  # no machine has such links
        if any(one.why for one in several):
            # Whatever comes, what stands has nothing near enough.
            later = refusal_of(tell(with_them(snapshot.nodes, [all_of_it], 3), roles, members))
            assert later is not None, seed
            seen["no node helps"] += 1
            continue
        later = refusal_of(tell(with_them(snapshot.nodes, several), roles, members))
        assert later is None, (seed, later)
        seen["placed"] += 1
    assert seen["placed"] > 20 and (not stands or seen["no node helps"])
