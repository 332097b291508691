"""What is asked of a node's actor, and the names by which it is known again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement import Deployment, topologies
from placement.core.replicas import PlannedReplica
from placement.core.topology import Topology
from placement.runtime.orders import (
    GpuHardware,
    Order,
    Refusal,
    Refused,
    deployment_of,
    hardware_of,
    order_name,
    order_of,
    order_of_group,
)
from placement.wire.facts import GpuFacts, NodeFacts


def deployment(**fields: object) -> Deployment:
    return Deployment(name="d", model="m", runtime="vllm", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "beside"),
    [
        ({}, {}),
        ({"cpus_per_gpu": 1.5}, {"CPU": 1.5}),
        ({"memory_gib_per_gpu": 8}, {"memory": 8 << 30}),
        ({"cpus_per_gpu": 4, "memory_gib_per_gpu": 0.5}, {"CPU": 4.0, "memory": 1 << 29}),
    ],
)
def test_an_order_names_what_each_bundle_takes_beside_its_gpu(
    fields: dict[str, object], beside: dict[str, float]
) -> None:
    declared = deployment(gpus=2, constraints=fields)
    assert order_of("o", declared) == Order("o", declared.needs, "d", beside)


def test_an_order_for_one_set_of_several_asks_for_its_gpus_only() -> None:
    declared = deployment(gpus=8, within="nvlink")
    assert order_of("o", declared, set_size=4).needs == declared.needs._replace(gpus=4)
    assert order_of("o", declared).needs.gpus == 8


@pytest.mark.parametrize(
    ("policy", "planned", "expected"),
    [
        ("fragmentation", PlannedReplica(0, "n", (3,), share=250), 3),
        ("fragmentation", PlannedReplica(0, "n", (3,)), None),
        ("fragmentation", None, None),
        ("topology", PlannedReplica(0, "n", (3,), share=250), None),
    ],
)
def test_the_gpu_of_the_plan_is_handed_on_where_the_policy_needs_just_that_one(
    policy: str, planned: PlannedReplica | None, expected: int | None
) -> None:
    declared = deployment(gpus=0.25, policy=policy)
    assert order_of("o", declared, planned=planned).planned == expected


def test_a_member_of_a_group_is_given_the_gpus_of_the_plan() -> None:
    member = deployment(gpus=2, group={"name": "g", "members": {"d": 1}})
    assert order_of("o", member, planned=PlannedReplica(0, "n", (4, 6))).needs.named == (4, 6)
    assert order_of("o", deployment(gpus=2), planned=PlannedReplica(0, "n", (4, 6))).needs.named == ()


def test_a_group_tells_its_order_and_an_order_its_deployment() -> None:
    first, second = (order_name("placement:0123abcd:", "llama-3.1", 12) for _ in range(2))
    assert first != second
    assert first.startswith("placement:0123abcd:llama-3.1:12:")
    assert order_of_group(f"{first}:7:2") == order_of_group(first) == first
    assert deployment_of(first) == "llama-3.1"


def test_a_refusal_told_of_a_node_keeps_what_the_node_knew_better() -> None:
    refused = Refused("too few", 3, True)
    assert refused.at("id", "name", 5) == Refusal("id", "name", 3, "too few", True, 5)
    assert refused.at("id", "name") == Refusal("id", "name", 3, "too few", True, None)
    assert replace(refused, at_most=0).at("id", "name", 5).at_most == 0


def test_a_machine_as_the_planner_sees_it() -> None:
    machine = GpuHardware(
        Topology.unknown(5), lost=frozenset({0, 3}), instances={2: "1g.10gb", 3: "1g.10gb"},
        gpu_memory_bytes=80 << 30, free_memory={1: 7},
    )  # fmt: skip
    node = machine.node({0, 1, 2, 3}, {4: 250})
    assert (node.free, node.rests, node.instances) == ({1}, {4: 250}, {2: "1g.10gb"})
    assert (node.slots, node.gpu_memory_bytes, node.free_memory) == (machine.instances, 80 << 30, {1: 7})
    assert node.topology == Topology.unknown(5)


def test_a_machine_of_which_nothing_is_known() -> None:
    assert (
        hardware_of(None, 3) == hardware_of(NodeFacts(source="none"), 3) == GpuHardware(Topology.unknown(3))
    )


def test_a_machine_of_which_much_is_known() -> None:
    facts = topologies.facts("dgx-h100")
    machine = hardware_of(facts, 8)
    assert (machine.topology, machine.lost) == (facts.topology(), facts.lost())
    assert machine.capability == facts.compute_capability == (9, 0)
    assert machine.gpu_memory_bytes == facts.gpu_memory_bytes == 80 << 30


def test_unused_memory_is_known_where_both_figures_are() -> None:
    gpus = (
        GpuFacts(ordinal=0, memory_total_bytes=80, memory_used_bytes=30),
        GpuFacts(ordinal=1, memory_total_bytes=80),
        GpuFacts(ordinal=2, memory_used_bytes=30),
        GpuFacts(ordinal=3, memory_total_bytes=80, memory_used_bytes=0),
    )
    assert hardware_of(NodeFacts(source="nvml", gpus=gpus), 4).free_memory == {0: 50, 3: 80}
