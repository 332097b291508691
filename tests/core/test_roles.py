"""Groups of roles: how near those that talk are placed, checked against trying everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from random import Random
from typing import Any

import pytest

from placement import topologies
from placement.core import role_search
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import Needs, Within
from placement.core.node import Node
from placement.core.request import Place, Request
from placement.core.roles import GroupPlan, plan
from placement.core.routes import Member, RoleLink, Roles, Route, Via, joined, meets, on_node, route
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import Lanes, Link, Path, Topology
from placement.errors import BelowFloor, NotEnoughGpus, Unplaceable
from tests.properties.cases import MACHINES

NVLINK, PCIE, NETWORK = Via.NVLINK, Via.PCIE, Via.NETWORK


def a3_highgpu() -> Topology:
    """8 H100 on NVSwitch, GPUs 0-3 on PCI root 0 and 4-7 on root 1, as in ai-dynamo/dynamo#10171."""
    root = [gpu // 4 for gpu in range(8)]
    return Topology(
        links=((Link(Path.NVLINK, 18),) * 8,) * 8,
        model="NVIDIA H100 80GB HBM3",
        below=tuple(tuple(Path.PHB if root[a] == root[b] else Path.SYS for b in range(8)) for a in range(8)),
    )


def node(name: str, machine: str | Topology = "dgx-h100", free: Any = None, **labels: str) -> Node:
    topology = topologies.load(machine) if isinstance(machine, str) else machine
    gpus = range(len(topology)) if free is None else free
    return Node(f"id-{name}", name, topology=topology, free=frozenset(gpus), labels=labels)


def request(name: str, replicas: int, gpus: int = 1, **needs: Any) -> Request:
    return Request(name, tuple(range(replicas)), Needs(gpus, **needs))


def prefill_decode(
    units: int = 2, decodes: int = 2, gpus: tuple[int, int] = (1, 1), **link: Any
) -> tuple[Roles, dict[str, Request]]:
    """Units of a prefill replica and some decode replicas."""
    fields: dict[str, Any] = {"via": PCIE, **link}
    roles = Roles(
        "pd", {"prefill": 1, "decode": decodes}, units, (RoleLink(("prefill", "decode"), **fields),)
    )
    return roles, {
        "prefill": request("prefill", units, gpus[0]),
        "decode": request("decode", units * decodes, gpus[1]),
    }


def placed(
    snapshot: Snapshot, group: tuple[Roles, dict[str, Request]]
) -> dict[Member, tuple[str, tuple[int, ...]]]:
    found = plan(snapshot, *group)
    assert isinstance(found, GroupPlan), found
    assert not found.bounded
    return {member: (place.node_id[3:], place.gpus) for member, place in sorted(found.places.items())}


@pytest.mark.parametrize("via", [PCIE, NVLINK])
def test_each_pci_root_gets_one_prefill_with_its_decodes(via: Via) -> None:
    # Lowest-numbered first, both prefills are on root 0: half the throughput, thirty times the latency.
    where = placed(Snapshot([node("a3", a3_highgpu())]), prefill_decode(via=via))
    units = [
        {
            gpu // 4
            for (name, index), (_, gpus) in where.items()
            for gpu in gpus
            if index // (1 if name == "prefill" else 2) == unit
        }
        for unit in range(2)
    ]
    assert sorted(map(sorted, units)) == [[0], [1]]


def test_another_users_gpu_does_not_part_a_unit() -> None:
    # Root 0 has 2 left: the units would be 1 + 2 and 2 + 1 over the roots; one stays whole, and the other is on SYS.
    snapshot = Snapshot(
        [node("a3", a3_highgpu(), free=(0, 1, 4, 5, 6, 7)), node("b", a3_highgpu(), free=(1, 2, 3))]
    )
    where = placed(snapshot, prefill_decode())
    assert {"a3", "b"} == {name for name, _ in where.values()}
    assert all(gpus[0] >= 4 for name, gpus in where.values() if name == "a3")


def test_roles_with_larger_sets_share_a_numa_node() -> None:
    where = placed(Snapshot([node("h")]), prefill_decode(decodes=1, gpus=(2, 2)))
    assert {("prefill", 0): (0, 1), ("decode", 0): (2, 3), ("prefill", 1): (4, 5), ("decode", 1): (6, 7)} == {
        member: gpus for member, (_, gpus) in where.items()
    }


def test_over_nvlink_those_that_talk_are_joined_by_it() -> None:
    # Bridged in pairs: a draft model beside its target is on the other half of the bridge.
    roles = Roles("spec", {"target": 1, "draft": 1}, 2, (RoleLink(("target", "draft"), NVLINK),))
    snapshot = Snapshot([node("pcie", "a100-pcie-4x")])
    where = placed(snapshot, (roles, {"target": request("target", 2), "draft": request("draft", 2)}))
    pairs = [sorted(gpu for name in ("target", "draft") for gpu in where[name, i][1]) for i in range(2)]
    assert [[0, 1], [2, 3]] == sorted(pairs)


def test_over_the_network_those_with_a_near_card_are_taken() -> None:
    links = ((Link(Path.SYS),) * 4,) * 4
    from placement.core.topology import Nic

    machine = Topology(links, nics=(Nic("mlx5_0", (Path.SYS, Path.PIX, Path.SYS, Path.PIX)),))
    where = placed(Snapshot([node("n", machine)]), prefill_decode(1, 1, via=NETWORK))
    assert [(1,), (3,)] == sorted(gpus for _, gpus in where.values())


def test_a_unit_larger_than_a_node_lies_in_one_rack() -> None:
    racks = [node(f"n{i}", rack=rack) for i, rack in enumerate("aabbb")]
    racks[0] = replace(racks[0], free=frozenset(range(4)))
    snapshot = Snapshot(racks, near=("rack",))
    where = placed(snapshot, prefill_decode(1, 2, gpus=(8, 8), via=NVLINK))
    assert {"n2", "n3", "n4"} == {name for name, _ in where.values()}


def test_nodes_of_one_nvlink_domain_are_joined_by_nvlink() -> None:
    domains = {"a": "x", "b": "y", "c": "y"}
    trays = [node(name, "gb200-tray", **{GPU_DOMAIN_LABEL: domain}) for name, domain in domains.items()]
    group = prefill_decode(1, 1, gpus=(4, 4), via=NVLINK, within="nvlink")
    where = placed(Snapshot(trays), group)
    assert {"b", "c"} == {name for name, _ in where.values()}
    ends = [(trays[1], (0, 1, 2, 3)), (trays[2], (0, 1, 2, 3))]
    over = route((), NVLINK, *ends)
    assert (-1, Path.NVLINK) == (over.level, over.path)
    assert over.gb_per_s and over.gb_per_s > 500
    assert str(route((), PCIE, *ends)) == "network"


def test_what_stands_is_placed_beside() -> None:
    roles, requests = prefill_decode(units=1)
    requests["decode"] = replace(requests["decode"], replicas=(1,))
    requests["prefill"] = replace(requests["prefill"], replicas=())
    standing = {("prefill", 0): Place("id-h", (5,)), ("decode", 0): Place("id-h", (0,))}
    snapshot = Snapshot([node("h", free=(1, 2, 3, 7)), node("i")])
    found = plan(snapshot, roles, requests, standing)
    assert isinstance(found, GroupPlan)
    assert {("decode", 1): Place("id-h", (7,))} == found.places


def test_all_or_none_and_the_one_that_alone_has_no_room_says_why() -> None:
    found = plan(Snapshot([node("h", free=range(3))]), *prefill_decode(units=1, decodes=4))
    assert isinstance(found, NotEnoughGpus)
    assert "'decode'" in str(found)


def test_together_they_have_no_room() -> None:
    found = plan(Snapshot([node("h", free=range(5))]), *prefill_decode())
    assert str(found) == (
        "cannot place 'pd': there is room for each of prefill and decode, but not for all of them together (6 GPUs); "
        "free GPUs, add a node, or ask for fewer units"
    )


def test_a_floor_that_cannot_be_met_names_the_two_and_their_route() -> None:
    snapshot = Snapshot([node("h", free=(0, 1, 4))])
    found = plan(snapshot, *prefill_decode(units=1, within="numa", min_gb_per_s=10.0))
    assert isinstance(found, BelowFloor)
    assert str(found) == (
        "cannot place 'pd': the route between prefill/0 on GPU 0 of h and decode/1 on GPU 4 of h would be SYS, "
        "21.5 GB/s, and their link via 'pcie' asks for within = 'numa' and min_bandwidth_gb_per_s = 10; "
        "lower that floor, or free GPUs that are nearer to each other"
    )


def test_via_nvlink_where_no_node_has_it() -> None:
    found = plan(Snapshot([node("l", "l40s-4x")]), *prefill_decode(units=1, via=NVLINK))
    assert isinstance(found, BelowFloor)
    assert "no node that they may go to is known to have NVLink" in str(found)
    assert "set its via to 'pcie'" in str(found)


@pytest.mark.parametrize(
    ("link", "fits"),
    [
        ({"within": "node"}, True),
        ({"within": "numa"}, True),
        ({"within": "switch"}, False),
        ({"within": "switch", "via": NVLINK}, True),
        ({"within": "nvlink", "via": NVLINK, "min_gb_per_s": 300.0}, True),
        ({"min_gb_per_s": 29.0}, True),
        ({"min_gb_per_s": 30.0}, False),
        ({"within": "rack"}, True),
        ({"within": "zone"}, False),
        ({"within": "rack", "via": NETWORK}, True),
    ],
)
def test_floors(link: dict[str, Any], fits: bool) -> None:
    found = plan(Snapshot([node("h", rack="r")]), *prefill_decode(**link))
    assert fits is isinstance(found, GroupPlan)


@pytest.mark.parametrize("via", [NVLINK, PCIE])
@pytest.mark.parametrize("cpu", ["AMD EPYC 7502", "AMD EPYC 9654", "Intel(R) Xeon(R) Gold 6230R", None])
@pytest.mark.parametrize("peer", [True, False, None])
def test_a_route_carries_what_a_collective_of_the_two_reaches(
    via: Via, cpu: str | None, peer: bool | None
) -> None:
    """Two GPUs below each of two switches at one host bridge, and two at another; one has half its lanes."""
    paths = [Path.PIX, Path.PHB, Path.NODE, Path.SYS]
    near = [[next(i for i in range(4) if a >> i + 1 == b >> i + 1) for b in range(8)] for a in range(8)]
    machine = Topology(
        tuple(tuple(Link(paths[level], peer=peer) for level in row) for row in near),
        model="NVIDIA A10",
        lanes=(Lanes(4, 8), *(Lanes(4),) * 7),
        cpu=cpu,
    )
    for a, b in combinations(range(8), 2):
        assert on_node(machine, via, (a,), (b,)).gb_per_s == score(machine, (a, b)).bandwidth_gb_per_s


@pytest.mark.parametrize(
    ("below", "gb_per_s"), [(Path.PIX, 48.0), (Path.PXB, 45.6), (Path.NODE, 29.714), (Path.SYS, 21.517)]
)
def test_below_nvlink_a_route_over_pcie_is_that_of_gpus_that_reach_each_other(
    below: Path, gb_per_s: float
) -> None:
    link = Link(Path.NVLINK, 18)
    machine = Topology(((link,) * 2,) * 2, model="NVIDIA H100 80GB HBM3", below=((below,) * 2,) * 2)
    found = on_node(machine, PCIE, (0,), (1,))
    assert (found.name, found.gb_per_s) == (str(below), gb_per_s)
    assert on_node(machine, NVLINK, (0,), (1,)).gb_per_s == 370.8


def test_a_search_that_is_cut_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role_search, "STEPS", 1)
    busy = [node(f"n{i}", "dgx-1v", free=Random(i).sample(range(8), 5)) for i in range(4)]
    found = plan(Snapshot(busy), *prefill_decode(4, 2, via=NVLINK))
    assert isinstance(found, GroupPlan)
    assert found.bounded
    assert len(found.places) == 12


def test_many_units_on_many_nodes_are_placed_without_being_cut_off() -> None:
    nodes = [node(f"n{i:03}", rack=f"r{i // 8}") for i in range(200)]
    found = plan(Snapshot(nodes, near=("rack",)), *prefill_decode(units=40, decodes=3))
    assert isinstance(found, GroupPlan)
    assert not found.bounded
    located = {member: (nodes[int(place.node_id[4:])], place.gpus) for member, place in found.places.items()}
    assert {"NODE"} == {one.route.name for one in joined(prefill_decode(40, 3)[0], ("rack",), located)}


# -- against trying everything -----------------------------------------------------------------------

Where = dict[Member, tuple[Node, tuple[int, ...]]]


def everything(nodes: list[Node], members: list[Member], requests: dict[str, Request]) -> Iterator[Where]:
    """All ways to place replicas on free GPUs."""
    if not members:
        yield {}
        return
    (name, index), *rest = members
    needs = requests[name].needs
    for i, one in enumerate(nodes):
        for gpus in combinations(sorted(one.free), needs.gpus):
            if (
                len(gpus) > 1
                and one.shape.best(sum(1 << gpu for gpu in gpus), len(gpus), needs.within) is None
            ):
                continue
            left = [*nodes[:i], replace(one, free=one.free - {*gpus}), *nodes[i + 1 :]]
            for others in everything(left, rest, requests):
                yield {(name, index): (one, gpus), **others}


def cost(
    roles: Roles, near: tuple[str, ...], where: Where, stands: Where | None = None
) -> tuple[object, ...] | None:
    """What the module's docstring promises to keep small, in its order; ``None`` if a floor is not met.

    Of what stands already only the routes count that lead to others.
    """
    new = where.keys()
    where = {**where, **(stands or {})}
    found = [one for one in joined(roles, near, where) if one.one in new or one.other in new]
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
            for a, b in product(where[one.one][1], where[one.other][1])
        ),
    )


def case(chance: Random) -> tuple[Snapshot, Roles, dict[str, Request]]:
    """A small cluster and a small group."""
    numas = ((0,), (0,), (1,), (1,))
    switched = Topology(((Link(Path.NVLINK, 12),) * 4,) * 4, numa=numas, model="NVIDIA A100-SXM4-80GB")
    palette = chance.choices([*MACHINES, switched, switched], k=2)
    nodes = []
    for i in range(chance.randint(1, 3)):
        machine = chance.choice(palette)
        free = [gpu for gpu in range(len(machine)) if chance.random() < 0.8][:4]
        labels = {"rack": chance.choice("ab")} if chance.random() < 0.7 else {}
        labels |= {GPU_DOMAIN_LABEL: "d"} if chance.random() < 0.3 else {}
        nodes.append(node(f"n{i}", machine, free, **labels))
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
    sizes = {name: chance.choice((1, 1, 1, 2)) for name in names}
    near = {
        name: chance.choice((Within.NODE, Within.NUMA)) if sizes[name] > 1 else Within.NODE for name in names
    }
    requests = {name: request(name, units * counts[name], sizes[name], within=near[name]) for name in names}
    return Snapshot(nodes, near=("rack",)), Roles("g", counts, units, links), requests


@pytest.mark.parametrize("seed", range(150))
def test_no_other_places_are_better(seed: int) -> None:
    snapshot, roles, requests = case(Random(seed))
    members = [(name, index) for name, one in requests.items() for index in one.replicas]
    found = plan(snapshot, roles, requests)
    free, ways = sum(len(one.free) for one in snapshot.nodes), 1
    for name, _ in members:
        ways, free = (
            ways * math.comb(max(0, free), requests[name].needs.gpus),
            free - requests[name].needs.gpus,
        )
    if ways > 6_000:  # too many for a test; of one GPU each, it is four on nine
        return
    costs = [
        cost(roles, snapshot.near, where) for where in everything(list(snapshot.nodes), members, requests)
    ]
    best = min((one for one in costs if one is not None), default=None)
    if isinstance(found, Unplaceable):
        no_nvlink = "known to have NVLink" in str(found)
        assert best is None or no_nvlink, (found, best)
        return
    nodes = {one.id: one for one in snapshot.nodes}
    where = {member: (nodes[place.node_id], place.gpus) for member, place in found.places.items()}
    taken = [(place.node_id, gpu) for place in found.places.values() for gpu in place.gpus]
    assert len(taken) == len(set(taken))
    assert members == sorted(where, key=members.index)
    assert best == cost(roles, snapshot.near, where)
    assert not found.bounded


@pytest.mark.parametrize("seed", range(120))
def test_nothing_better_can_stand_beside_what_stands(seed: int) -> None:
    chance = Random(seed)
    snapshot, roles, requests = case(chance)
    first = plan(
        snapshot, roles, {name: replace(one, needs=Needs(one.needs.gpus)) for name, one in requests.items()}
    )
    if isinstance(first, Unplaceable):
        return
    standing = {member: place for member, place in first.places.items() if chance.random() < 0.5}
    held = {(place.node_id, gpu) for place in standing.values() for gpu in place.gpus}
    nodes = [
        replace(one, free=frozenset(gpu for gpu in one.free if (one.id, gpu) not in held))
        for one in snapshot.nodes
    ]
    missing = [member for member in first.places if member not in standing]
    left = {
        name: replace(one, replicas=tuple(i for i in one.replicas if (name, i) in missing))
        for name, one in requests.items()
    }
    found = plan(Snapshot(nodes, near=("rack",)), roles, left, standing)
    by_id = {one.id: one for one in nodes}
    stands = {member: (by_id[place.node_id], place.gpus) for member, place in standing.items()}
    costs = [cost(roles, ("rack",), where, stands) for where in everything(nodes, missing, left)]
    best = min((one for one in costs if one is not None), default=None)
    if isinstance(found, Unplaceable):
        assert best is None, (found, best)
        return
    where = {member: (by_id[place.node_id], place.gpus) for member, place in found.places.items()}
    assert set(missing) == where.keys()
    assert best == cost(roles, ("rack",), where, stands)
