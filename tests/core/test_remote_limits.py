"""Limits on nodes hold for remote replicas as they do for GPUs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from placement.core.explanation import explain
from placement.core.node import Node
from placement.core.planner import plan
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.staying import staying
from placement.errors import NoEgressNodes, Unplaceable


def node(name: str, egress: int = 16, **labels: str) -> Node:
    return Node(name, name, egress={"egress": egress}, labels=labels)


CLUSTER = Snapshot([node("a", zone="1"), node("b", zone="1"), node("c", 64, zone="2"), node("d", 64)])


def remote(replicas: int, **fields: object) -> Request:
    return replace(Request("d", tuple(range(replicas)), provider="openai", key="k", egress=4), **fields)  # type: ignore[arg-type]


def where(request: Request) -> Counter[str]:
    planned = plan(CLUSTER, request)
    assert isinstance(planned, Plan), planned
    return Counter(replica.node_id for replica in planned.replicas)


@pytest.mark.parametrize(
    ("labels", "nodes"),
    [({"zone": "1"}, {"a", "b"}), ({"zone": "!1"}, {"c", "d"}), ({"zone": "in(2, 3)"}, {"c"})],
)
def test_a_remote_replica_goes_to_nodes_with_the_labels(labels: dict[str, str], nodes: set[str]) -> None:
    assert set(where(remote(4, labels=labels))) == nodes


def test_remote_replicas_spread_over_a_label() -> None:
    assert where(remote(4, spread_label="zone", max_per_domain=2)) == {"a": 1, "b": 1, "c": 2}
    # Two stand in zone 1 already: the next ones go to the other until it has as many.
    standing = {"a": 1, "b": 1}
    assert where(remote(2, spread_label="zone", max_per_domain=9, standing=standing)) == {"c": 2}


def test_a_refusal_counts_what_excluded_egress_nodes() -> None:
    refused = plan(CLUSTER, remote(5, spread_label="zone", max_per_domain=2))
    assert type(refused) is Unplaceable  # there are egress nodes, and capacity
    assert refused.summary == "replica 4 finds no node: every zone with room has 2 replicas already"
    assert refused.excluded == {"has no label zone": 1, "its zone has 2 of its replicas already": 3}
    assert refused.advice == "raise constraints.spread.max, or add an egress node with another zone"
    nowhere = plan(CLUSTER, remote(1, labels={"zone": "7"}))
    assert isinstance(nowhere, NoEgressNodes)
    assert nowhere.excluded == {"label zone is not '7'": 4}
    stages = [stage.name for stage in explain(CLUSTER, remote(1, labels={"zone": "1"})).stages]
    assert stages == ["egress nodes", "constraints", "health", "label zone", "egress capacity"]


def test_a_remote_replica_moves_just_where_its_node_lacks_a_label_that_is_asked_for_now() -> None:
    stands = {
        i: (PlannedReplica(i, name, egress_resource="egress", egress_units=4),) for i, name in enumerate("ac")
    }
    assert staying(CLUSTER, stands, remote(2), remote(2, labels={"zone": "1"})) == [0]
    assert staying(CLUSTER, stands, remote(2), remote(2, accelerators=("H100",))) == [0, 1]


def test_a_replica_of_the_same_request_serves_its_key_too() -> None:
    """One stands on a, the next goes to b; then both serve the key, and b has more capacity left."""
    key = {("openai", "k"): 1}
    nodes = [Node("a", "a", egress={"egress": 16}, serving=key), Node("b", "b", egress={"egress": 64})]
    planned = plan(Snapshot(nodes), remote(2, standing={"a": 1}))
    assert isinstance(planned, Plan)
    assert [replica.node_id for replica in planned.replicas] == ["b", "b"]
