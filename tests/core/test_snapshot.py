"""The cluster as sets of nodes."""

from __future__ import annotations

from dataclasses import replace

from placement import topologies
from placement.core.needs import Needs, Within
from placement.core.node import Node
from placement.core.policy import Policy
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology

FOUR = Topology.unknown(4)
BRIDGED = topologies.load("a100-pcie-4x")


def gpus(name: str, free: int, machine: Topology = FOUR) -> Node:
    return Node(name, name, topology=machine, free=frozenset(range(free)))


def labelled(name: str, **labels: str) -> Node:
    return Node(f"id-{name}", name, f"10.0.0.{name}", topology=FOUR, labels=labels)


CLUSTER = Snapshot(
    [
        labelled("1", rack="r1", host="h"), labelled("2", rack="r1"), labelled("3", rack="r2"), labelled("4"),
        Node("id-5", "5"), replace(labelled("6", rack="r2"), problem="is ill"),
    ],
    near=("rack", "host"),
)  # fmt: skip


def test_nodes_are_sets_by_name_label_and_use() -> None:
    assert [node.name for node in CLUSTER.nodes] == list("123456")
    assert CLUSTER.usable == 0b001111
    assert CLUSTER.domains("rack") == {"r1": 0b000011, "r2": 0b100100}
    assert CLUSTER.domains("nothing") == {}
    assert CLUSTER.named(["id-1", "3", "10.0.0.4", "nobody"]) == 0b001101
    assert [CLUSTER.bit(node_id) for node_id in ("id-1", "id-6", "id-7")] == [1, 32, 0]
    assert CLUSTER.at(0b100) is CLUSTER.node("id-3") is CLUSTER.nodes[2]
    assert CLUSTER.select([]) == 0
    many = Snapshot([Node(f"{i:02}", f"{i:02}") for i in range(17)])
    assert many.select(many.nodes) == (1 << 17) - 1
    assert many.select([many.nodes[8], many.nodes[16]]) == 1 << 8 | 1 << 16


def test_a_name_that_two_nodes_share_means_both() -> None:
    twins = Snapshot([Node("1", "same", "a"), Node("2", "same", "b"), Node("3", "other", "b")])
    assert (twins.named(["same"]), twins.named(["b"])) == (
        twins.bit("1") | twins.bit("2"),
        twins.bit("2") | twins.bit("3"),
    )


def test_regions_are_the_nodes_that_share_a_label_and_all_wider_ones() -> None:
    assert CLUSTER.regions == [(0, 0b000001), (1, 0b000011), (1, 0b100100), (2, 0b111111)]
    split = Snapshot(
        [labelled("1", rack="a", host="h"), labelled("2", rack="b", host="h")], near=("rack", "host")
    )
    assert split.regions == [(0, 0b01), (0, 0b10), (2, 0b11)], "one host name in two racks is two hosts"


def test_a_snapshot_that_changed_answers_as_one_made_anew() -> None:
    kinds = [Needs(1), Needs(2), Needs(1, share=300), Needs(2, Within.NVLINK)]
    before = Snapshot([gpus("a", 4, BRIDGED), gpus("b", 4), gpus("c", 1)], near=("rack",))
    asked = [(needs, policy) for needs in kinds for policy in Policy]
    for needs, policy in asked:
        before.offers(needs, policy)
    assert before.usable == 0b111
    nodes = [replace(before.node("a"), free=frozenset({1, 3})), replace(before.node("c"), free=frozenset())]
    after, anew = before.changed(nodes), Snapshot([*nodes, before.node("b")])
    for needs, policy in asked:
        for wanted in range(8):
            assert after.offers(needs, policy).best([wanted]) == anew.offers(needs, policy).best([wanted])
    assert (after.usable, after.near, after.nodes) == (anew.usable, ("rack",), anew.nodes)
    assert before.offers(Needs(1), Policy.PACK).best([0b100]) == 0b100, "the old one stays as it was"
