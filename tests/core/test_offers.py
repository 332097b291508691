"""Which nodes are how welcome to a request, by policy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement import topologies
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.offers import Offers
from placement.core.planner import plan
from placement.core.policy import Policy
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology

FOUR = Topology.unknown(4)
BRIDGED = topologies.load("a100-pcie-4x")


def nodes_of(policy: Policy, nodes: list[Node], replicas: int, needs: Needs, **fields: object) -> list[str]:
    request = Request("d", tuple(range(replicas)), needs, policy=policy, **fields)  # type: ignore[arg-type]
    outcome = plan(Snapshot(nodes), request)
    assert isinstance(outcome, Plan)
    return [replica.node_id for replica in outcome.replicas]


def gpus(name: str, free: int, machine: Topology = FOUR) -> Node:
    return Node(name, name, topology=machine, free=frozenset(range(free)))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy.TOPOLOGY, ["a", "b", "c", "b"]),  # a keeps a pair
        (Policy.PACK, ["b", "b", "a", "a"]),
        (Policy.SPREAD, ["a", "b", "c", "b"]),
        (Policy.ROUND_ROBIN, ["a", "b", "c", "a"]),
        (Policy.LEAST_LOADED, ["c", "a", "c", "b"]),
    ],
)
def test_the_order_of_nodes_by_policy(policy: Policy, expected: list[str]) -> None:
    assert nodes_of(policy, [gpus("a", 3), gpus("b", 2), gpus("c", 4)], 4, Needs(1)) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy.TOPOLOGY, "c-fast"),
        (Policy.FRAGMENTATION, "c-fast"),
        (Policy.PACK, "b-full"),
        (Policy.SPREAD, "c-fast"),
        (Policy.ROUND_ROBIN, "a-slow"),
        (Policy.LEAST_LOADED, "d-empty"),
    ],
)
def test_speed_counts_first_only_where_the_policy_says_so(policy: Policy, expected: str) -> None:
    nodes = [
        gpus("a-slow", 4, topologies.load("l40s-4x")),
        gpus("b-full", 2, topologies.load("l40s-4x")),
        gpus("c-fast", 4, BRIDGED),
        gpus("d-empty", 8, topologies.load("rtx-4090-8x")),
    ]
    assert nodes_of(policy, nodes, 1, Needs(2)) == [expected]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy.TOPOLOGY, "a"),
        (Policy.PACK, "a"),
        (Policy.SPREAD, "b"),
        (Policy.ROUND_ROBIN, "b"),
        (Policy.LEAST_LOADED, "b"),
    ],
)
def test_a_share_goes_where_others_miss_it_least_before_it_spreads(policy: Policy, expected: str) -> None:
    nodes = [replace(gpus("a", 2), rests={2: 300}), replace(gpus("b", 3), rests={3: 500})]
    assert nodes_of(policy, nodes, 1, Needs(1, share=300), standing={"a": 1}) == [expected]


def test_a_floor_on_bandwidth_excludes_what_is_slower_and_nothing_else() -> None:
    nodes = [gpus("a", 4, topologies.load("l40s-4x")), gpus("b", 2, BRIDGED)]
    snapshot = Snapshot(nodes)
    for floor, expected in ((0.0, 2), (3.75, 2), (3.76, 1), (230.4, 1), (230.5, 0)):
        offers = snapshot.offers(Needs(2, min_bandwidth_gb_per_s=floor), Policy.TOPOLOGY)
        assert (offers.best([1]) > 0) + (offers.best([2]) > 0) == expected, floor


# -- offers ------------------------------------------------------------------------------------------

FAST, SLOW = ((0,), (1,)), ((5,), (0,))
FAST_AND_DEAR = ((0,), (9,))


def test_the_best_offer_is_the_first_node_of_the_best_rank_that_is_wanted() -> None:
    offers = Offers({SLOW: 0b1000, FAST: 0b0110, FAST_AND_DEAR: 0b0001})
    assert offers.best([0b1111]) == 0b0010
    assert offers.best([0b1101]) == 0b0100
    assert offers.best([0b1001]) == 0b0001
    assert offers.best([0b1000]) == 0b1000
    assert offers.best([0b10000]) == offers.best([]) == 0
    assert offers.best([0b1001, 0b0110]) == 0b0001, "within equal speed the preference goes before the loss"
    assert offers.best([0b1000, 0b0110]) == 0b0010, "but speed before the preference"


def test_a_node_that_moves_is_found_under_its_new_rank_only() -> None:
    offers = Offers({FAST: 0b0011, SLOW: 0b0100})
    kept = offers.copy()
    offers.move(0b0001, FAST, SLOW)
    assert [offers.best([bit]) for bit in (1, 2, 4)] == [1, 2, 4]
    assert offers.best([0b0101]) == 0b0001
    offers.move(0b0010, FAST, None)
    assert (offers.best([0b0010]), offers.best([0b0111])) == (0, 0b0001)
    offers.move(0b0010, None, FAST_AND_DEAR)
    assert offers.best([0b0111]) == 0b0010
    offers.move(0b0010, FAST_AND_DEAR, FAST_AND_DEAR)
    assert offers.best([0b0111]) == 0b0010
    offers.move(0b1000, None, None)
    assert offers.best([0b1000]) == 0
    assert kept.best([0b0111]) == 0b0001, "a copy stays as it was"
