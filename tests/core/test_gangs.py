"""Replicas made of several sets of GPUs: where they go, and that they are placed exactly when they can be."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import Needs, Within
from placement.core.node import Node
from placement.core.planner import plan, vacate
from placement.core.policy import Policy
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology
from placement.errors import NotEnoughGpus


def node(name: str, machine: str | int = 8, free: int = 8, **labels: str) -> Node:
    shape = Topology.unknown(machine) if isinstance(machine, int) else topologies.load(machine)
    gpus = frozenset(range(min(free, len(shape))))
    return Node(f"id-{name}", name, topology=shape, free=gpus, labels=labels)


def request(gpus: int, stages: int = 1, replicas: int = 1, **fields: object) -> Request:
    return Request("d", tuple(range(replicas)), Needs(gpus), stages=stages, **fields)  # type: ignore[arg-type]


def where(outcome: object) -> list[tuple[int, str, tuple[int, ...], tuple[int, ...]]]:
    assert isinstance(outcome, Plan), outcome
    return [(r.replica_index, r.node_id[3:], r.gpus, r.ranks) for r in outcome.replicas]


ALL = tuple(range(8))
FIRST, SECOND = tuple(range(8)), tuple(range(8, 16))


def test_each_group_is_on_one_node_and_the_ranks_follow() -> None:
    snapshot = Snapshot([node("a"), node("b")])
    assert where(plan(snapshot, request(8, stages=2))) == [(0, "a", ALL, FIRST), (0, "b", ALL, SECOND)]


def test_both_stages_share_a_node_that_has_room() -> None:
    snapshot = Snapshot([node("a", free=4), node("b")])
    [(_, name, gpus, ranks)] = where(plan(snapshot, request(4, stages=2)))
    assert (name, gpus, ranks) == ("b", ALL, ALL)


def test_stages_are_near_each_other() -> None:
    racks = [node(f"n{i}", rack=rack, block="x") for i, rack in enumerate(["a", "b", "c", "b"])]
    assert [name for _, name, *_ in where(plan(Snapshot(racks), request(8, stages=2)))] == ["n1", "n3"]
    hosts = [node(f"n{i}", host=host) for i, host in enumerate("pqp")]
    chosen = where(plan(Snapshot(hosts, near=("host",)), request(8, stages=2)))
    assert [name for _, name, *_ in chosen] == ["n0", "n2"]


def test_the_faster_groups_come_before_the_nearer_nodes() -> None:
    nodes = [node("a", "l40s-4x", rack="x"), node("b", "l40s-4x", rack="x")]
    nodes += [node("c", "hgx-a100-4gpu", rack="y"), node("d", "hgx-a100-4gpu", rack="z")]
    assert [name for _, name, *_ in where(plan(Snapshot(nodes), request(4, stages=2)))] == ["c", "d"]


def test_all_gpus_of_a_replica_are_of_one_model() -> None:
    nodes = [node("a", "dgx-1v"), node("b", "dgx-h100"), node("c", "dgx-1v")]
    assert [name for _, name, *_ in where(plan(Snapshot(nodes), request(8, stages=2)))] == ["a", "c"]
    assert not isinstance(plan(Snapshot(nodes[:2]), request(8, stages=2)), Plan)


def test_a_replica_larger_than_every_node_is_cut() -> None:
    snapshot = Snapshot([node("a"), node("b", free=7), node("c")])
    cut = where(plan(snapshot, request(16, divisible=True)))
    assert cut == [(0, "a", ALL, FIRST), (0, "c", ALL, SECOND)]
    assert isinstance(plan(snapshot, request(16)), NotEnoughGpus), "tensor parallelism stays on a node"
    busy = Snapshot([node("a", free=7), node("b", free=5), node("c", free=4)])
    assert [len(gpus) for _, _, gpus, _ in where(plan(busy, request(12, divisible=True)))] == [4, 4, 4]


def test_a_set_that_is_cut_has_its_cpus_and_memory_with_its_gpus() -> None:
    fields = {"cpu_milli": 8000, "memory_bytes": 64}
    nodes = [replace(node(name), **fields) for name in "ab"]  # type: ignore[arg-type]
    cut = plan(Snapshot(nodes), request(16, divisible=True, cpu_milli=16000, memory_bytes=128))
    assert isinstance(cut, Plan), cut
    assert [(part.cpu_milli, part.memory_bytes) for part in cut.replicas] == [(8000, 64)] * 2


@pytest.mark.parametrize(("policy", "names"), [(Policy.TOPOLOGY, "ab"), (Policy.LEAST_LOADED, "bc")])
def test_of_nodes_with_equal_sets_the_policy_decides(policy: Policy, names: str) -> None:
    nodes = [node(name, free=free) for name, free in zip("abc", (4, 5, 6), strict=True)]
    chosen = where(plan(Snapshot(nodes), request(4, stages=2, policy=policy)))
    assert sorted(name for _, name, *_ in chosen) == [*names]


def test_a_group_may_span_the_nodes_of_one_nvlink_domain() -> None:
    domains: list[dict[str, Any]] = [{GPU_DOMAIN_LABEL: f"r{one}"} for one in "01011"]
    trays = [node(f"t{i}", "gb200-tray", **domain) for i, domain in enumerate(domains)]
    chosen = where(plan(Snapshot(trays), request(8)))
    assert [(name, ranks) for _, name, _, ranks in chosen] == [("t0", (0, 1, 2, 3)), ("t2", (4, 5, 6, 7))]
    assert [name for _, name, *_ in where(plan(Snapshot(trays), request(12)))] == ["t1", "t3", "t4"]
    refused = plan(Snapshot(trays), request(16))
    assert isinstance(refused, NotEnoughGpus)
    assert (
        "needs 1 x 16 GPUs, each over 4 nodes of one ray.io/gpu-domain, all of one GPU model; there is room for 0"
        in str(refused)
    )


def test_a_refusal_counts_the_groups_that_there_is_room_for() -> None:
    refused = plan(Snapshot([node("a"), node("b", free=7)]), request(8, stages=2))
    assert isinstance(refused, NotEnoughGpus)
    assert "replica 0 needs 2 x 8 GPUs, each on one node, all of one GPU model; there is room for 1" in str(
        refused
    )
    assert "1 node: has fewer than 8 GPUs free" in str(refused)


def test_a_replica_lies_in_one_domain_of_the_label_it_spreads_over() -> None:
    nodes = [node(f"{zone}{i}", zone=zone) for zone in "abc" for i in range(2)]
    spread = request(8, stages=2, replicas=3, spread_label="zone", max_per_domain=1)
    zones = Counter((index, name[0]) for index, name, *_ in where(plan(Snapshot(nodes), spread)))
    assert zones == {(0, "a"): 2, (1, "b"): 2, (2, "c"): 2}
    four = request(8, stages=2, replicas=4, spread_label="zone", max_per_domain=1)
    assert not isinstance(plan(Snapshot(nodes), four), Plan)


def test_cpus_bound_the_sets_of_a_node() -> None:
    small = Node("id-s", "s", topology=Topology.unknown(8), free=frozenset(range(8)), cpu_milli=4000)
    assert isinstance(plan(Snapshot([small]), request(2, stages=2, cpu_milli=2000)), Plan)
    assert not isinstance(plan(Snapshot([small]), request(2, stages=3, cpu_milli=2000)), Plan)


def test_the_parts_of_a_group_are_as_fast_as_can_be() -> None:
    trays = [
        Node(f"id-{i}", f"t{i}", topology=topologies.load("a100-pcie-4x"), free=frozenset(free),
             labels={GPU_DOMAIN_LABEL: "r"})
        for i, free in enumerate([{1, 3}, {2, 3}, {0, 1, 2}])
    ]  # fmt: skip
    outcome = plan(Snapshot(trays), request(2, parts=2))
    assert isinstance(outcome, Plan)
    assert [(r.node_id, r.gpus) for r in outcome.replicas] == [("id-1", (2, 3)), ("id-2", (0, 1))]
    assert [score(trays[1].topology, r.gpus).bandwidth_gb_per_s for r in outcome.replicas] == [230.4, 230.4]


def row() -> Topology:
    """NV1 - NV2 - NV1: the fastest pair is in the way of two that are faster than the rest."""
    links = [[UNKNOWN_LINK if a == b else Link(Path.SYS) for b in range(4)] for a in range(4)]
    for a, nvlinks in enumerate((1, 2, 1)):
        links[a][a + 1] = links[a + 1][a] = Link(Path.NVLINK, nvlinks)
    return Topology(tuple(map(tuple, links)), model="row")


def test_two_sets_of_a_node_are_such_that_the_slower_is_fast() -> None:
    node = Node("id-a", "a", topology=row(), free=frozenset(range(4)))
    assert where(plan(Snapshot([node]), request(2, stages=2))) == [(0, "a", (0, 1, 2, 3), (0, 1, 2, 3))]
    assert where(plan(Snapshot([node]), request(2)))[0][2] == (1, 2)
    assert node.shape.several(0b1111, Needs(2), 2) == [(0, 1), (2, 3)]
    assert node.shape.several(0b1111, Needs(2), 1) == [(1, 2)]
    assert node.shape.several(0b0111, Needs(2), 2) is None


def test_both_stages_on_one_node_are_nearer_than_on_two_of_a_rack() -> None:
    nodes = [node("a", 4, rack="x"), node("b", 4, rack="x"), node("c", 8)]
    assert [name for _, name, *_ in where(plan(Snapshot(nodes), request(4, stages=2)))] == ["c"]


def test_a_refusal_says_how_much_room_there_is_in_one_domain_of_the_spread() -> None:
    nodes = [node("a", 4, zone="a"), node("b", 4, zone="b")]
    refused = plan(Snapshot(nodes), request(4, stages=2, spread_label="zone", max_per_domain=1))
    assert isinstance(refused, NotEnoughGpus)
    assert refused.excluded == {"has room for a part of the replica": 2}
    assert str(refused) == (
        "cannot place 'd': replica 0 needs 2 x 4 GPUs, each on one node, all of one GPU model and in one zone; there "
        "is room for 1 (2 nodes: has room for a part of the replica); add nodes with room for 1 more set of 4 GPUs, "
        "or ask for fewer GPUs"
    )
    assert (refused.requested, refused.largest_node) == (8, 4)


def test_of_nodes_as_fast_one_is_taken_on_which_ranks_go_by_ascending_gpu() -> None:
    """Both have two pairs with NV2: one as 0,4 and 2,3, which an engine that sorts cuts into 0,2 and 3,4."""
    machine = topologies.load("dgx-1v")
    crossed, straight = frozenset({0, 2, 3, 4}), frozenset({0, 3, 4, 7})
    for racks in ("xx", "xy"):
        nodes = [
            Node(f"id-{name}", name, topology=machine, free=free, labels={"rack": rack})
            for name, free, rack in zip("ab", (crossed, straight), racks, strict=True)
        ]
        first, second = where(plan(Snapshot(nodes, near=("rack",)), request(2, stages=2, replicas=2)))
        assert (first[1:3], second[1:3]) == (("b", (0, 3, 4, 7)), ("a", (0, 4, 2, 3))), racks


def test_the_order_of_ranks_is_no_reason_to_leave_the_next_replica_without_room() -> None:
    """0,1 and 5,6 are in order, and no two pairs are then left."""
    pairs = [(0, 1), (1, 2), (0, 3), (1, 4), (0, 5), (5, 6), (3, 7), (4, 7), (6, 7)]
    links = [[UNKNOWN_LINK if a == b else Link(Path.SYS) for b in range(8)] for a in range(8)]
    for a, b in pairs:
        links[a][b] = links[b][a] = Link(Path.NVLINK, 1)
    alone = Node("id-a", "a", topology=Topology(tuple(map(tuple, links))), free=frozenset(range(8)))
    close = Request("d", (0, 1), Needs(2, Within.NVLINK), stages=2)
    gpus = [gpus for *_, gpus, _ in where(plan(Snapshot([alone]), close))]
    assert gpus == [(0, 3, 1, 2), (4, 7, 5, 6)]
    only = Request("d", (0,), Needs(2, Within.NVLINK), stages=2)
    assert where(plan(Snapshot([alone]), only))[0][2] == (0, 1, 5, 6)


def test_nodes_of_one_name_do_not_share_their_ranks() -> None:
    nodes = [
        Node(f"id-{i}", "same", topology=Topology.unknown(4), free=frozenset(range(4))) for i in range(2)
    ]
    first, second = where(plan(Snapshot(nodes), request(2, stages=4)))
    assert (first[2:], second[2:]) == (((0, 1, 2, 3), (0, 1, 2, 3)), ((0, 1, 2, 3), (4, 5, 6, 7)))


MACHINES = [topologies.load(name) for name in ("a100-pcie-4x", "l40s-4x")] + [row(), Topology.unknown(3)]


@st.composite
def clusters(draw: st.DrawFn) -> Snapshot:
    nodes = []
    for i in range(draw(st.integers(1, 4))):
        machine = draw(st.sampled_from(MACHINES))
        free = draw(st.frozensets(st.integers(0, len(machine) - 1)))
        labels = {"rack": draw(st.sampled_from("xy")), "zone": draw(st.sampled_from("ab"))}
        if draw(st.booleans()):
            labels[GPU_DOMAIN_LABEL] = draw(st.sampled_from("pq"))
        nodes.append(Node(f"id-{i}", f"node-{i}", topology=machine, free=free, labels=labels))
    return Snapshot(nodes)


def exists(
    free: dict[str, frozenset[int]], nodes: dict[str, Node], wanted: Request, groups: int, model: object = ()
) -> bool:
    """Whether any placement exists for so many groups, the first of them on one model, by trying all."""
    if not groups:
        return True
    if groups % wanted.stages == 0:
        models = {one.topology.model for one in nodes.values()}
        return any(_exists(free, nodes, wanted, groups, model) for model in models)
    return _exists(free, nodes, wanted, groups, model)


def _exists(
    free: dict[str, frozenset[int]], nodes: dict[str, Node], wanted: Request, groups: int, model: object
) -> bool:
    needs = wanted.needs
    domains = {one.labels.get(GPU_DOMAIN_LABEL) for one in nodes.values()} - {None}
    for domain in sorted(map(str, domains)) if wanted.parts > 1 else [None]:
        inside = [n for n in nodes.values() if domain is None or n.labels.get(GPU_DOMAIN_LABEL) == domain]
        inside = [n for n in inside if n.topology.model == model]
        sets = [
            (n.id, gpus)
            for n in inside
            for gpus in combinations(sorted(free[n.id]), needs.gpus)
            if n.shape.best(sum(1 << gpu for gpu in gpus), needs.gpus, needs.within) is not None
        ]
        for parts in combinations(sets, wanted.parts):
            left = dict(free)
            for node_id, gpus in parts:
                if not set(gpus) <= left[node_id]:
                    break
                left[node_id] -= set(gpus)
            else:
                if exists(left, nodes, wanted, groups - 1, model):
                    return True
    return False


@settings(max_examples=150, deadline=None)
@given(
    clusters(), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 1, 2]),
    st.sampled_from([Within.NODE, Within.NODE, Within.NVLINK, Within.NUMA]),
)  # fmt: skip
def test_replicas_are_placed_exactly_when_they_can_be(
    snapshot: Snapshot, gpus: int, stages: int, replicas: int, parts: int, within: Within
) -> None:
    wanted = Request("d", tuple(range(replicas)), Needs(gpus, within), stages=stages, parts=parts)
    if stages == parts == 1:
        return  # the planner's own tests
    outcome = plan(snapshot, wanted)
    nodes = {one.id: one for one in snapshot.nodes}
    free = {one.id: one.free for one in snapshot.nodes}
    assert isinstance(outcome, Plan) == exists(free, nodes, wanted, stages * replicas)
    if isinstance(outcome, Plan):
        check(snapshot, wanted, outcome.replicas)


def ways(snapshot: Snapshot, wanted: Request) -> Iterator[tuple[tuple[str, tuple[int, ...]], ...]]:
    """Every way to place one replica: (node, GPUs) of each of its sets."""
    nodes = {one.id: one for one in snapshot.nodes}
    sets = [
        (one.id, gpus)
        for one in snapshot.nodes
        if wanted.parts == 1 or GPU_DOMAIN_LABEL in one.labels
        if wanted.spread_label is None or wanted.spread_label in one.labels
        for gpus in combinations(sorted(one.free), wanted.needs.gpus)
        if one.shape.best(sum(1 << gpu for gpu in gpus), len(gpus), wanted.needs.within) is not None
        and slowness(one, gpus) <= wanted.needs.slowest
    ]

    def alike(one: Node) -> tuple[str | None, ...]:
        return one.topology.model, one.labels.get(wanted.spread_label or "")

    def longer(start: int, chosen: tuple[tuple[str, tuple[int, ...]], ...]) -> Iterator[Any]:
        if len(chosen) == wanted.stages * wanted.parts:
            inside = Counter(nodes[node_id].labels.get(GPU_DOMAIN_LABEL) for node_id, _ in chosen)
            if wanted.parts == 1 or all(count % wanted.parts == 0 for count in inside.values()):
                yield chosen
            return
        for i in range(start, len(sets)):
            node_id, gpus = sets[i]
            apart = all(node_id != other or not set(gpus) & set(taken) for other, taken in chosen)
            if apart and (not chosen or alike(nodes[node_id]) == alike(nodes[chosen[0][0]])):
                yield from longer(i + 1, (*chosen, sets[i]))

    yield from longer(0, ())


def slowness(one: Node, gpus: tuple[int, ...]) -> int:
    return -one.shape.mb_per_s(gpus) if len(gpus) > 1 else 0


def goodness(snapshot: Snapshot, chosen: Iterable[tuple[str, tuple[int, ...]]]) -> tuple[int, int, int]:
    """How slow the slowest set is, how far apart the nodes are, and how many they are."""
    sets = list(chosen)
    nodes = {node_id for node_id, _ in sets}
    region = snapshot.select(map(snapshot.node, nodes))
    level = min(level for level, bits in snapshot.regions if bits & region == region)
    slowest = max(slowness(snapshot.node(node_id), gpus) for node_id, gpus in sets)
    return slowest, -1 if len(nodes) == 1 else level, len(nodes)


def small(dice: random.Random) -> Snapshot:
    nodes = []
    for i in range(dice.randint(1, 4)):
        machine = dice.choice(MACHINES[: dice.randint(1, 4)])
        free = frozenset(gpu for gpu in range(len(machine)) if dice.random() < 0.75)
        labels = {"rack": "xy", "zone": "ab", GPU_DOMAIN_LABEL: "pq"}
        labels = {key: dice.choice(values) for key, values in labels.items() if dice.random() < 0.8}
        nodes.append(Node(f"id-{i}", f"node-{i}", topology=machine, free=free, labels=labels))
    return Snapshot(nodes)


def test_no_way_is_faster_or_as_fast_and_nearer_or_on_fewer_nodes() -> None:
    placed = 0
    for seed in range(
        500
    ):  # by the seed: a case takes a millisecond, and it takes many to meet the rare ones
        dice = random.Random(seed)
        snapshot, gpus = small(dice), dice.choice((1, 2, 2, 3))
        within, floor = dice.choice((Within.NODE, Within.NODE, Within.NVLINK)), dice.choice((0.0, 0.0, 20.0))
        wanted = Request(
            "d",
            (0,),
            Needs(gpus, within, floor) if gpus > 1 else Needs(1),
            stages=dice.randint(1, 3),
            parts=dice.choice((1, 2)),
            spread_label=dice.choice((None, "zone")),
        )
        if wanted.stages == wanted.parts == 1:
            continue  # the planner's own tests
        outcome = plan(snapshot, wanted)
        best = min((goodness(snapshot, way) for way in ways(snapshot, wanted)), default=None)
        assert isinstance(outcome, Plan) == (best is not None), seed
        if isinstance(outcome, Plan):
            placed += 1
            sets = [
                (r.node_id, r.gpus[i : i + gpus])
                for r in outcome.replicas
                for i in range(0, len(r.gpus), gpus)
            ]
            assert goodness(snapshot, sets) == best, seed
    assert placed > 100


def check(snapshot: Snapshot, wanted: Request, parts: tuple[PlannedReplica, ...]) -> None:
    taken: Counter[tuple[str, int]] = Counter((p.node_id, gpu) for p in parts for gpu in p.gpus)
    assert set(taken.values()) <= {1}
    assert all(gpu in snapshot.node(node_id).free for node_id, gpu in taken)
    size = wanted.needs.gpus
    for index in wanted.replicas:
        ranks = sorted(rank for p in parts if p.replica_index == index for rank in p.ranks)
        assert ranks == list(range(size * wanted.stages * wanted.parts))
    emptied = snapshot.changed(
        Node(**{**vars_of(one), "free": one.free - {gpu for n, gpu in taken if n == one.id}})
        for one in snapshot.nodes
    )
    assert [one.free for one in vacate(emptied, parts).nodes] == [one.free for one in snapshot.nodes]


def vars_of(one: Node) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Node.__dataclass_fields__}


@pytest.mark.parametrize("stages", [1, 2])
def test_the_same_again(stages: int) -> None:
    nodes = [node(f"n{i}", "dgx-1v", rack="ab"[i % 2]) for i in range(4)]
    assert plan(Snapshot(nodes), request(4, stages, 2)) == plan(Snapshot(nodes[::-1]), request(4, stages, 2))


@pytest.mark.parametrize("fields", [{"divisible": True}, {"divisible": True, "domain": "d"}])
def test_a_floor_is_never_met_by_sets_of_one_gpu(fields: dict[str, object]) -> None:
    """They have no links but those of an NVLink domain, of which the rate is not known."""
    labels = {GPU_DOMAIN_LABEL: str(fields["domain"])} if "domain" in fields else {}
    lone = [node(f"n{i}", machine=1, free=1, **labels) for i in range(4)]
    pairs = [node(f"p{i}", machine="rtx-3090-2x", free=2, **labels) for i in range(2)]
    for needs in (Needs(4, within=Within.NVLINK), Needs(4, min_bandwidth_gb_per_s=1.0)):
        wanted = Request("d", (0,), needs, divisible=True)
        on_nvlink = "domain" in fields and needs.within is Within.NVLINK
        assert isinstance(plan(Snapshot(lone), wanted), Plan) is on_nvlink
        placed = plan(Snapshot([*lone, *pairs]), wanted)
        assert [(name, gpus) for _, name, gpus, _ in where(placed)] == [("p0", (0, 1)), ("p1", (0, 1))]
