"""Placement groups laid out bundle by bundle: each strategy means what it means in Ray, on the best GPUs of a node."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations, product

import pytest

from placement import topologies
from placement.core.bundles import ELSEWHERE, OTHERS, summed
from placement.core.labels import meets
from placement.core.needs import Needs, Within
from placement.core.node import Node
from placement.core.planner import plan
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Bundle, Request, Strategy
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import BelowFloor, NoGpuNodes, NotEnoughGpus, Unplaceable

PACK, SPREAD, STRICT_SPREAD = Strategy.PACK, Strategy.SPREAD, Strategy.STRICT_SPREAD
PAIRS = "a100-pcie-4x"
"""Four GPUs, bridged in pairs: 0-1 and 2-3."""


def node(name: str, machine: str | int = 4, free: str = "", cpus: int = 8, **labels: str) -> Node:
    shape = Topology.unknown(machine) if isinstance(machine, int) else topologies.load(machine)
    gpus = frozenset(map(int, free)) if free else frozenset(range(len(shape)))
    return Node(f"id-{name}", name, topology=shape, free=gpus, labels=labels, cpu_milli=cpus * 1000)


def with_resource(node: Node, amount: int) -> Node:
    return replace(node, resources={"nvlink": amount})


def request(
    strategy: Strategy, *bundles: Bundle | int, domain: str | None = None, **needs: object
) -> Request:
    """What the wire asks for: bundles of so many GPUs with a CPU for each, or as they are given."""
    each = tuple(Bundle(one, one * 1000) if isinstance(one, int) else one for one in bundles)
    return Request(
        "d",
        (0,),
        Needs(sum(one.gpus for one in each), **needs),  # type: ignore[arg-type]
        cpu_milli=sum(one.cpu_milli for one in each),
        bundles=each,
        strategy=strategy,
        domain_label=domain,
        resources=summed(one.resources for one in each),
    )


def where(outcome: Plan | Unplaceable) -> dict[str, tuple[str, list[int]]]:
    """Node -> its GPUs, and which ranks are there; all of them, where that is left open."""
    assert isinstance(outcome, Plan), outcome
    return {one.node_id[3:]: ("".join(map(str, one.gpus)), list(one.ranks)) for one in outcome.replicas}


@pytest.mark.parametrize(
    ("case", "nodes", "asked", "expected"),
    [
        (
            "packed on the one node whose free pair is bridged",
            [node("a", PAIRS, "12"), node("b", PAIRS, "123")],
            request(PACK, 1, 1),
            {"b": ("23", [])},
        ),
        (
            "packed on as few nodes as can be, the fullest use first, unequal parts",
            [node("a", PAIRS, "23"), node("b", PAIRS), node("c", PAIRS, "0")],
            request(PACK, *[1] * 5),
            {"b": ("0123", [0, 1, 2, 3]), "c": ("0", [4])},
        ),
        (
            "the last of several nodes gives its bridged pair",
            [node("a", PAIRS), node("b", PAIRS, "123")],
            request(PACK, *[1] * 6),
            {"a": ("0123", [0, 1, 2, 3]), "b": ("23", [4, 5])},
        ),
        (
            "spread over distinct nodes, each the best pair",
            [node("a", PAIRS), node("b", PAIRS, "123")],
            request(SPREAD, 2, 2),
            {"b": ("23", [0, 1]), "a": ("01", [2, 3])},
        ),
        (
            "spread over what there is, where there are not enough nodes",
            [node("a"), node("b", free="0")],
            request(SPREAD, 1, 1, 1),
            {"b": ("0", [0]), "a": ("01", [1, 2])},
        ),
        (
            "on nodes of their own: who can go anywhere leaves room for who cannot",
            [node("a", free="01", zone="x"), node("b")],
            request(STRICT_SPREAD, Bundle(1), Bundle(1, labels=(("zone", "x"),))),
            {"a": ("0", [1]), "b": ("0", [0])},
        ),
        (
            "packed around a lack of CPUs",
            [node("a", cpus=1), node("b", cpus=3)],
            request(PACK, 1, 1, 1, 1),
            {"b": ("012", [0, 1, 2]), "a": ("0", [3])},
        ),
        (
            "a large bundle comes before small ones, whatever its place",
            [node("a", free="012"), node("b", free="01")],
            request(PACK, 1, 1, 3),
            {"a": ("012", [2, 3, 4]), "b": ("01", [0, 1])},
        ),
        (
            "within NVLink, pair by pair",
            [node("a", PAIRS, "013"), node("b", PAIRS, "023")],
            request(PACK, 1, 1, 1, 1, within=Within.NVLINK),
            {"a": ("01", [0, 1]), "b": ("23", [2, 3])},
        ),
        (
            "in one domain: the one that has room for all, though another has the better node",
            [node("a", free="01", zone="x"), node("b", free="01", zone="x"), node("c", zone="y"), node("d")],
            request(PACK, 1, 1, 1, 1, domain="zone"),
            {"c": ("0123", [])},
        ),
        (
            "over the nodes of one domain, the fewest",
            [node("a", zone="x"), node("b", "dgx-1v", "012", zone="y"), node("c", free="01", zone="x"), node("d")],
            request(PACK, *[1] * 6, domain="zone"),
            {"a": ("0123", [0, 1, 2, 3]), "c": ("01", [4, 5])},
        ),
        (
            "spread over the nodes of one domain, the most",
            [node("a", zone="x"), node("b", zone="y"), node("c", zone="y"), node("d"), node("e")],
            request(SPREAD, 1, 1, 1, domain="zone"),
            {"b": ("01", [0, 2]), "c": ("0", [1])},
        ),
        (
            "where their custom resource is",
            [node("a"), with_resource(node("b"), 15), with_resource(node("c"), 10)],
            request(PACK, *[Bundle(1, resources=(("nvlink", 10),))] * 2),
            {"b": ("0", [0]), "c": ("0", [1])},
        ),
        (
            "a bundle without GPUs is Ray's to place",
            [node("a")],
            request(PACK, Bundle(0, 1000), Bundle(2)),
            {"a": ("01", [])},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bundles_go_where_the_strategy_says(
    case: str, nodes: list[Node], asked: Request, expected: dict[str, tuple[str, list[int]]]
) -> None:
    assert where(plan(Snapshot(nodes), asked)) == expected


@pytest.mark.parametrize(
    ("case", "nodes", "asked", "kind", "summary", "excluded"),
    [
        (
            "more bundles than nodes",
            [node("a"), node("b")],
            request(STRICT_SPREAD, 1, 1, 1),
            NotEnoughGpus,
            "a bundle of 1 GPU finds no node of its own",
            {OTHERS: 2},
        ),
        (
            "no node with so many",
            [node("a"), node("b", free="0")],
            request(SPREAD, 1, 3, 3),
            NotEnoughGpus,
            "replica 0 needs 3 GPUs free on one node; at best b has 1 of its 4 GPUs free: GPU 0",
            {OTHERS: 1, "has fewer than 3 GPUs free": 1},
        ),
        (
            "too few GPUs in all",
            [node("a", free="0"), node("b", free="01")],
            request(PACK, 1, 1, 1, 1),
            NotEnoughGpus,
            "a bundle of 1 GPU finds no room on what the other bundles leave",
            {OTHERS: 2},
        ),
        (
            "not as close together",
            [node("a", PAIRS, "02"), node("b", PAIRS, "13")],
            request(SPREAD, 2, 2, within=Within.NVLINK),
            BelowFloor,
            "replica 0 needs 2 GPUs within 'nvlink'; at best a has 2 free GPUs, but in NVLink islands of 1 + 1",
            {"has no 2 free GPUs within 'nvlink'": 2},
        ),
        (
            "each domain has room for some",
            [node("a", zone="x"), node("b", free="01", zone="y"), node("c")],
            request(PACK, *[1] * 5, domain="zone"),
            NotEnoughGpus,
            "a bundle of 1 GPU finds no room on what the other bundles leave",
            {"has no label zone": 1, OTHERS: 1, ELSEWHERE: 1},
        ),
        (
            "no node is in a domain",
            [node("a")],
            request(PACK, 1, 1, domain="zone"),
            NoGpuNodes,
            "no GPU node may be used",
            {"has no label zone": 1},
        ),
        (
            "too little of a custom resource",
            [node("a"), with_resource(node("b"), 5)],
            request(PACK, Bundle(1, resources=(("nvlink", 10),)), 1),
            Unplaceable,
            "replica 0 finds no node: none has 0.001 nvlink free",
            {"has less than 0.001 nvlink free": 2},
        ),
        (
            "too few CPUs",
            [node("a", cpus=1)],
            request(PACK, 2, 1),
            Unplaceable,
            "replica 0 finds no node: a has 1 CPUs and 0 GiB free",
            {"has fewer than 2 CPUs free": 1},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_refusal_tells_of_the_bundle_that_finds_no_node(
    case: str,
    nodes: list[Node],
    asked: Request,
    kind: type[Unplaceable],
    summary: str,
    excluded: dict[str, int],
) -> None:
    refused = plan(Snapshot(nodes), asked)
    assert isinstance(refused, Unplaceable)
    assert (type(refused), refused.summary, refused.excluded) == (kind, summary, excluded)


def by_bundle(asked: Request, parts: tuple[PlannedReplica, ...]) -> list[str]:
    """The node of each bundle that has GPUs. All GPUs of a bundle are on one."""
    ranks = {
        rank: part.node_id
        for part in parts
        for rank in part.ranks or range(sum(one.gpus for one in asked.bundles))
    }
    assert sorted(ranks) == list(range(sum(one.gpus for one in asked.bundles)))
    found, rank = [], 0
    for bundle in asked.bundles:
        [on] = {ranks[i] for i in range(rank, rank + bundle.gpus)}
        rank += bundle.gpus
        found.append(on)
    return found


def holds(node: Node, bundles: list[Bundle]) -> bool:
    """Whether a node has room for bundles, without floors."""
    return (
        sum(one.gpus for one in bundles) <= len(node.free)
        and sum(one.cpu_milli for one in bundles) <= node.cpu_milli
        and sum(amount for one in bundles for _, amount in one.resources) <= node.resources.get("nvlink", 0)
        and all(meets(node.labels, *label) for one in bundles for label in one.labels)
    )


@pytest.mark.parametrize("seed", range(150))
def test_bundles_are_placed_exactly_when_they_can_be(seed: int) -> None:
    """Against all ways to place them, of small cases; what PACK does not find, no bundles alike could."""
    some = random.Random(seed)
    nodes = [
        with_resource(
            node(
                f"n{i}",
                some.choice((PAIRS, "dgx-1v", 4)),
                "".join(sorted(some.sample("0123", some.randint(1, 4)))),
                some.randint(1, 6),
                zone=some.choice("xy"),
            ),
            some.choice((10, 20, 40)),
        )
        for i in range(some.randint(1, 3))
    ]
    size, labels = some.randint(1, 2), ((("zone", "x"),), ())
    resources = some.choice(((), (("nvlink", 10),)))
    alike = [Bundle(size, 1000, resources=resources) for _ in range(some.randint(1, 4))]
    mixed = [Bundle(some.randint(1, 3), 1000, 0, some.choice(labels)) for _ in range(some.randint(1, 3))]
    strategy = some.choice([PACK, SPREAD, STRICT_SPREAD])
    bundles = mixed if strategy is STRICT_SPREAD else alike
    domain = some.choice((None, "zone"))
    outcome = plan(Snapshot(nodes), request(strategy, *bundles, domain=domain))

    def in_one_domain(chosen: Iterable[Node]) -> bool:
        return domain is None or len({one.labels[domain] for one in chosen}) == 1

    if strategy is STRICT_SPREAD:
        possible = any(
            in_one_domain(chosen)
            and all(holds(on, [bundle]) for on, bundle in zip(chosen, bundles, strict=True))
            for chosen in permutations(nodes, len(bundles))
        )
    else:
        ways = [
            Counter(chosen)
            for chosen in product(range(len(nodes)), repeat=len(bundles))
            if all(holds(nodes[i], alike[:count]) for i, count in Counter(chosen).items())
            and in_one_domain(nodes[i] for i in chosen)
        ]
        possible = bool(ways)
    assert isinstance(outcome, Plan) == possible
    if not isinstance(outcome, Plan):
        return
    on = by_bundle(request(strategy, *bundles), outcome.replicas)
    there = {one.id: one for one in nodes}
    assert in_one_domain(there[part.node_id] for part in outcome.replicas)
    for part in outcome.replicas:
        there_too = [bundle for bundle, at in zip(bundles, on, strict=True) if at == part.node_id]
        assert holds(there[part.node_id], there_too)
        assert set(part.gpus) <= there[part.node_id].free and list(part.gpus) == sorted(set(part.gpus))
        best = there[part.node_id].best(Needs(len(part.gpus)))
        assert best is not None
        topology = there[part.node_id].topology
        assert score(topology, part.gpus) == score(topology, best)
    if strategy is STRICT_SPREAD:
        assert len(set(on)) == len(on)
    else:
        counts = [len(way) for way in ways]
        assert len(set(on)) == (min(counts) if strategy is PACK else max(counts))
