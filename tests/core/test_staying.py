"""What stays when a deployment is declared anew: what holds what is asked for, and meets the limits that changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from placement import topologies
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import GIB, Needs, Within
from placement.core.node import Node
from placement.core.replicas import PlannedReplica
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.staying import staying
from placement.core.topology import Topology


def node(name: str, machine: str | int = "dgx-h100", **fields: Any) -> Node:
    shape = Topology.unknown(machine) if isinstance(machine, int) else topologies.load(machine)
    return Node(id=name, name=name, topology=shape, **fields)


H100 = node("h", accelerators=frozenset({"H100"}), compute_capability=(9, 0), labels={"zone": "a"})
PCIE = node("p", "a100-pcie-4x", accelerators=frozenset({"A100"}), labels={"zone": "b"})
BLANK = node("u", 8)
CLUSTER = Snapshot((H100, PCIE, BLANK))


def request(gpus: int = 4, **fields: Any) -> Request:
    needs = {name: fields.pop(name) for name in Needs._fields if name in fields}
    if "memory_beside" in fields:
        fields["memory_bytes"] = fields.pop("memory_beside")
    return Request("d", (), Needs(gpus, **needs), **fields)


def on(where: str, *gpus: int, **fields: Any) -> tuple[PlannedReplica, ...]:
    return (PlannedReplica(0, where, gpus, **fields),)


def stays(
    parts: tuple[PlannedReplica, ...], before: Request, after: Request, cluster: Snapshot = CLUSTER
) -> bool:
    return staying(cluster, {0: parts}, before, after) == [0]


@pytest.mark.parametrize(
    ("case", "where", "gpus", "fields", "expected"),
    [
        ("an accelerator that it has", "h", 4, {"accelerators": ("H100",)}, True),
        ("an accelerator that it lacks", "h", 4, {"accelerators": ("A100",)}, False),
        ("nobody knows its accelerator", "u", 4, {"accelerators": ("A100",)}, True),
        ("a floor that it meets", "h", 4, {"min_bandwidth_gb_per_s": 100.0}, True),
        ("a floor that it misses", "p", 4, {"min_bandwidth_gb_per_s": 100.0}, False),
        ("a floor on a pair that meets it", "p", 2, {"min_bandwidth_gb_per_s": 100.0}, True),
        ("nobody knows how fast it is", "u", 4, {"min_bandwidth_gb_per_s": 100.0}, True),
        ("within nvlink", "h", 4, {"within": Within.NVLINK}, True),
        ("not within nvlink", "p", 4, {"within": Within.NVLINK}, False),
        ("within a NUMA node", "h", 4, {"within": Within.NUMA}, True),
        ("over two NUMA nodes", "p", 4, {"within": Within.NUMA}, False),
        ("nobody knows within what", "u", 4, {"within": Within.NVLINK}, True),
        ("a capability that it has", "h", 4, {"compute_capability": (9, 0)}, True),
        ("a capability that it lacks", "h", 4, {"compute_capability": (10, 0)}, False),
        ("nobody knows its capability", "p", 4, {"compute_capability": (10, 0)}, True),
        ("a label that it has", "h", 4, {"labels": {"zone": "in(a, c)"}}, True),
        ("a label that it lacks", "h", 4, {"labels": {"zone": "!a"}}, False),
        ("a node that is named", "h", 4, {"gpu_nodes": ("h",)}, True),
        ("a node that is not", "h", 4, {"gpu_nodes": ("p",)}, False),
        ("egress is not for GPUs", "h", 4, {"egress_nodes": ("p",), "egress_preference": ("p",)}, True),
        ("free memory is for placing", "h", 4, {"free_memory_bytes": 70 * GIB}, True),
        ("apart from who is not there", "h", 4, {"apart_from": ("x",)}, True),
        ("near to who is not there", "h", 4, {"near_to": ("x",)}, False),
        ("a spread over labels that it has", "h", 4, {"spread_label": "zone", "max_per_domain": 1}, True),
        ("a spread over labels that it lacks", "h", 4, {"spread_label": "rack", "max_per_domain": 1}, False),
        ("CPUs beside", "h", 4, {"cpu_milli": 4000}, False),
        ("memory beside", "h", 4, {"memory_beside": GIB}, False),
        ("a MIG instance", "h", 1, {"profile": "1g.10gb"}, False),
        ("a share", "h", 1, {"share": 500}, False),
        ("two groups on one node", "h", 4, {"gpus": 2, "stages": 2}, True),
        ("a policy", "h", 4, {"policy": "spread"}, True),
        ("more GPUs", "h", 4, {"gpus": 8}, False),
    ],
)  # fmt: skip
def test_what_is_added_moves_only_what_does_not_meet_it(
    case: str, where: str, gpus: int, fields: dict[str, Any], expected: bool
) -> None:
    before, after = request(gpus), request(**{"gpus": gpus, **fields})
    held = on(where, *range(gpus))
    assert stays(held, before, after) is expected, case
    if fields.keys() <= {"min_bandwidth_gb_per_s", "within", "accelerators", "gpu_nodes", "labels"}:
        assert stays(held, after, before), "a limit that is gone moves nobody"
    if "gpus" not in fields:
        assert stays(held, after, after), "a limit that did not change moves nobody"


def test_groups_of_one_size_must_lie_together_but_a_whole_may_be_cut_by_need() -> None:
    small = Snapshot((node("a", 4), node("b", 4)))
    cut = (
        PlannedReplica(0, "a", (0, 1, 2, 3), ranks=(0, 1, 2, 3)),
        PlannedReplica(0, "b", (0, 1, 2, 3), ranks=(4, 5, 6, 7)),
    )
    whole, together, staged = request(8, divisible=True), request(8), request(4, stages=2)
    assert not stays(cut, whole, together, small), "tensor_parallel = 8 is 8 GPUs on one node"
    assert stays(cut, staged, whole, small), "no node has 8, and it is cut as it would be"
    assert stays(cut, whole, staged, small)
    assert stays(cut, whole, request(2, stages=4), small)
    assert not stays(cut, staged, whole, Snapshot((*small.nodes, BLANK))), "there is a node with 8"
    assert stays(on("u", *range(8)), whole, together), "8 on one node are 8 on one node"
    uneven = (
        PlannedReplica(0, "a", (0, 1, 2), ranks=(0, 1, 2)),
        PlannedReplica(0, "b", (0,), ranks=(3,)),
    )
    assert not stays(uneven, request(4, divisible=True), request(2, stages=2), small)
    rack = Snapshot(replace(one, labels={GPU_DOMAIN_LABEL: "r"}) for one in small.nodes)
    assert stays(cut, whole, together, rack), "one NVLink domain holds 8 together"
    apart = Snapshot(replace(one, labels={GPU_DOMAIN_LABEL: one.name}) for one in small.nodes)
    assert not stays(cut, whole, together, apart)


def test_a_floor_is_asked_of_each_group() -> None:
    pairs, mixed = on("p", 0, 1, 2, 3), on("p", 0, 2, 1, 3)
    before, after = request(2, stages=2), request(2, stages=2, min_bandwidth_gb_per_s=100.0)
    assert (stays(pairs, before, after), stays(mixed, before, after)) == (True, False)


def test_a_share_by_memory_is_the_same_share() -> None:
    of_80 = Snapshot((replace(H100, gpu_memory_bytes=80 * GIB),))
    held = on("h", 0, share=250)
    before = request(1, share=250)
    assert stays(held, before, request(1, memory_bytes=20 * GIB), of_80)
    assert not stays(held, before, request(1, memory_bytes=40 * GIB), of_80)
    assert stays(held, before, request(1, memory_bytes=40 * GIB)), "nobody knows how large it is"
    assert stays(held, request(1, memory_bytes=20 * GIB), before, of_80)


def test_remote_replicas_stay_while_they_call_the_same_with_as_many_units() -> None:
    snapshot = Snapshot((node("e", 0, egress={"egress": 4}),))
    held = (PlannedReplica(0, "e", egress_resource="egress", egress_units=4),)
    before = Request("d", (), provider="openai", key="k", egress=4)
    for fields, expected in (
        ({"egress_preference": ("e",)}, True),
        ({"egress_nodes": ("e",)}, True),
        ({"egress_nodes": ("x",)}, False),
        ({"gpu_nodes": ("x",), "accelerators": ("H100",)}, True),
        ({"labels": {"zone": "a"}}, False),
        ({"egress": 2}, False),
        ({"key": "other"}, False),
        ({"provider": "anthropic"}, False),
        ({"provider": None, "key": None}, False),
    ):
        assert stays(held, before, replace(before, **fields), snapshot) is expected, fields


def test_only_as_many_stay_in_a_domain_as_may() -> None:
    replicas = {i: (PlannedReplica(i, name, (i,)),) for i, name in enumerate("hhpp")}
    assert staying(CLUSTER, replicas, request(1), request(1, spread_label="zone", max_per_domain=1)) == [0, 2]
    assert staying(CLUSTER, replicas, request(1), request(1, spread_label="zone", max_per_domain=2)) == [
        0,
        1,
        2,
        3,
    ]


def test_only_the_replicas_move_that_do_not_meet_it() -> None:
    replicas = {0: on("h", 0, 1), 1: on("p", 0, 1), 2: on("h", 2, 3)}
    assert staying(CLUSTER, replicas, request(2), request(2, accelerators=("H100",))) == [0, 2]
    crowded = Snapshot((replace(H100, deployments={"x": 1}), PCIE))
    assert staying(crowded, replicas, request(2), request(2, apart_from=("x",))) == [1]
    assert staying(crowded, replicas, request(2), request(2, near_to=("x",))) == [0, 2]


def test_what_is_on_a_node_that_is_no_more_stays_until_it_is_noticed() -> None:
    assert stays(on("gone", 0, 1, 2, 3), request(4), request(4, accelerators=("H100",), within=Within.NVLINK))


def test_a_replica_that_has_a_part_without_gpus_holds_no_share() -> None:
    """As a file may say."""
    parts = (*on("h"), *on("p", 0, share=500))
    assert not stays(parts, request(1, share=250), request(1, share=500))


def test_gpus_whose_numa_node_nobody_knows_stay_where_they_are() -> None:
    shape = topologies.load("a100-pcie-4x")
    blind = Node("b", "b", topology=replace(shape, numa=((),) * len(shape)))
    within = replace(request(), needs=Needs(4, within=Within.NUMA))
    assert stays(on("b", 0, 1, 2, 3), request(), within, Snapshot((blind,)))
