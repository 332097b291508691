"""Groups of roles: how near those that talk are placed."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random
from typing import Any

import pytest

from placement import topologies
from placement.core import role_search
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.request import Place, Request
from placement.core.roles import GroupPlan, plan
from placement.core.routes import Member, RoleLink, Roles, Via, joined, on_node, route
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import Lanes, Link, Path, Topology
from placement.errors import BelowFloor, NotEnoughGpus

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
    return {member: (place.node_id[3:], place.gpus) for member, (place,) in sorted(found.places.items())}


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
    standing = {("prefill", 0): [Place("id-h", (5,))], ("decode", 0): [Place("id-h", (0,))]}
    snapshot = Snapshot([node("h", free=(1, 2, 3, 7)), node("i")])
    found = plan(snapshot, roles, requests, standing)
    assert isinstance(found, GroupPlan)
    assert {("decode", 1): (Place("id-h", (7,)),)} == found.places


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


def test_a_group_that_the_whole_cluster_cannot_hold_says_so() -> None:
    says = "; the whole cluster has 8 GPUs, and the group needs 9: waiting does not help unless nodes join"
    roles, requests = prefill_decode(units=3)
    left = {name: replace(one, replicas=one.replicas[2:]) for name, one in requests.items()}
    stands = {(name, i): [Place("id-h", (i + 2 * (name == "decode"),))] for name in requests for i in (0, 1)}
    for free, asked, standing in ((8, requests, {}), (3, requests, {}), (4, left, stands)):
        found = plan(Snapshot([node("h", free=range(8 - free, 8))]), roles, asked, standing)
        assert isinstance(found, NotEnoughGpus) and str(found).endswith(says), found
    few = plan(Snapshot([node("h", free=range(3)), node("i", free=())]), roles, requests)
    assert isinstance(few, NotEnoughGpus) and "waiting" not in few.advice
    labelled = {**requests, "decode": replace(requests["decode"], labels={"zone": "a"})}
    nodes = [node("h", zone="a", free=range(3)), node("i"), node("j", "a100-pcie-4x", zone="a")]
    assert isinstance(found := plan(Snapshot(nodes[1:]), roles, labelled), NotEnoughGpus)
    assert found.advice.endswith(
        "; the nodes that it may use have 4 GPUs, and its 6 replicas need 6: waiting does not help unless nodes join"
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


def speculative(units: int, target: Needs, draft: Needs, **link: object) -> tuple[Roles, dict[str, Request]]:
    """Units of a target model and its draft model."""
    fields = {"via": NVLINK, **link}
    roles = Roles("sd", {"target": 1, "draft": 1}, units, (RoleLink(("target", "draft"), **fields),))  # type: ignore[arg-type]
    replicas = tuple(range(units))
    return roles, {
        "target": Request("target", replicas, target),
        "draft": Request("draft", replicas, draft),
    }


QUARTER = Needs(1, share=250)


def test_a_share_lies_beside_whom_it_talks_to() -> None:
    # Bridged in pairs: 0 and 1, 2 and 3. GPU 0 is full; the rest of GPU 1 would be the fullest.
    bridged = replace(node("b", "a100-pcie-4x", free=(2, 3)), rests={1: 250})
    assert {("target", 0): ("b", (2,)), ("draft", 0): ("b", (3,))} == placed(
        Snapshot([bridged]), speculative(1, Needs(1), QUARTER)
    )


def test_shares_are_on_one_gpu_where_all_routes_are_equal() -> None:
    where = placed(Snapshot([node("h")]), speculative(3, Needs(2), QUARTER))
    assert 1 == len({gpus for (name, _), (_, gpus) in where.items() if name == "draft"})
    shared = replace(node("h", free=range(7)), rests={7: 750})
    where = placed(Snapshot([shared]), speculative(3, Needs(2), QUARTER))
    assert {(7,)} == {gpus for (name, _), (_, gpus) in where.items() if name == "draft"}


@pytest.mark.parametrize("via", [NVLINK, PCIE])
@pytest.mark.parametrize("within", ["", "switch", "numa", "node"])
def test_shares_that_talk_are_on_one_gpu_which_meets_any_floor(via: Via, within: str) -> None:
    group = speculative(2, Needs(1, share=700), QUARTER, via=via, within=within, min_gb_per_s=1000.0)
    where = placed(Snapshot([node("h")]), group)
    assert all(where["target", unit] == where["draft", unit] for unit in range(2))
    assert where["target", 0] != where["target", 1]


def test_a_mig_instance_lies_on_the_numa_node_of_whom_it_talks_to() -> None:
    links = ((Link(Path.UNKNOWN),) * 4,) * 4
    machine = Topology(links, numa=((0,), (1,), (0,), (1,)))
    cut_up = replace(
        node("m", machine, free=(1,)),
        slots={2: "1g.10gb", 3: "1g.10gb"},
        instances={2: "1g.10gb", 3: "1g.10gb"},
    )
    group = speculative(1, Needs(1), Needs(1, profile="1g.10gb"), via=PCIE, within="numa")
    assert (3,) == placed(Snapshot([cut_up]), group)["draft", 0][1]


def test_gpus_that_are_named_are_taken_all_on_one_node() -> None:
    roles, requests = prefill_decode(units=2, decodes=1)
    requests["prefill"] = request("prefill", 2, named=(5, 2))
    where = placed(Snapshot([node("h"), node("i")]), (roles, requests))
    assert [(2,), (5,)] == sorted(where["prefill", unit][1] for unit in range(2))
    assert 1 == len({where["prefill", unit][0] for unit in range(2)})


def train_and_roll_out(stages: int, gpus: int = 8, **link: object) -> tuple[Roles, dict[str, Request]]:
    """A trainer of several pipeline stages, and a rollout replica."""
    roles = Roles("rl", {"train": 1, "roll": 1}, 1, (RoleLink(("train", "roll"), NVLINK, **link),))  # type: ignore[arg-type]
    return roles, {
        "train": Request("train", (0,), Needs(gpus), stages=stages),
        "roll": Request("roll", (0,), Needs(8)),
    }


def test_a_replica_larger_than_a_node_and_whom_it_talks_to_are_in_one_rack() -> None:
    nodes = [node(f"n{i}", rack=rack) for i, rack in enumerate("aabbbcc")]
    found = plan(Snapshot(nodes, near=("rack",)), *train_and_roll_out(2))
    assert isinstance(found, GroupPlan)
    assert not found.bounded
    all_gpus = tuple(range(8))
    assert {
        ("train", 0): (Place("id-n2", all_gpus), Place("id-n3", all_gpus)),
        ("roll", 0): (Place("id-n4", all_gpus),),
    } == found.places


def test_a_replica_of_several_groups_is_on_one_node_where_it_can_be_and_of_one_model() -> None:
    snapshot = Snapshot([node("h0"), node("h1", free=range(4, 8)), node("h2"), node("v", "dgx-1v")])
    found = plan(snapshot, *train_and_roll_out(2, 4))
    assert isinstance(found, GroupPlan)
    train = found.places["train", 0]
    assert [(0, 1, 2, 3), (4, 5, 6, 7)] == [place.gpus for place in train]
    assert 1 == len({place.node_id for place in train})
    halves = [node("h1", free=range(4)), node("h2"), node("v", "dgx-1v", free=range(4))]
    found = plan(Snapshot(halves), *train_and_roll_out(2, 4))
    assert isinstance(found, NotEnoughGpus)  # half on an H100, half on a V100 is no place


def test_a_floor_holds_for_all_parts_of_a_replica() -> None:
    nodes = [node(f"n{i}", rack=rack) for i, rack in enumerate("aab")]
    found = plan(Snapshot(nodes, near=("rack",)), *train_and_roll_out(2, within="rack"))
    assert isinstance(found, BelowFloor)
    assert "train/0 on GPU 0-7 of n0, GPU 0-7 of n1" in str(found)


def test_a_tensor_parallel_group_larger_than_a_node_is_refused_though_a_domain_would_hold_it() -> None:
    trays = [node(name, "gb200-tray", **{GPU_DOMAIN_LABEL: "d"}) for name in "abcde"]
    roles, requests = train_and_roll_out(1, 8)
    requests["roll"] = request("roll", 1, 4)
    found = plan(Snapshot(trays), roles, requests)
    assert isinstance(found, NotEnoughGpus)
    assert "no node has 8 GPUs" in str(found)
    assert "set tensor_parallel to 4 or less, and pipeline_parallel" in str(found)
    requests["train"] = replace(requests["train"], needs=Needs(4), stages=2)
    found = plan(Snapshot(trays), roles, requests)
    assert isinstance(found, GroupPlan)
    assert 2 == len(found.places["train", 0])


def test_together_shares_have_no_room() -> None:
    found = plan(Snapshot([node("h", free=(0,))]), *speculative(1, Needs(1), QUARTER))
    assert "not for all of them together (1 x 1 GPU, 1 x 0.25 of a GPU)" in str(found)


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
    located = {
        member: [(nodes[int(place.node_id[4:])], place.gpus)] for member, (place,) in found.places.items()
    }
    assert {"NODE"} == {one.route.name for one in joined(prefill_decode(40, 3)[0], ("rack",), located)}
