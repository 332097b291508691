"""Options for the workers and the engine of a replica."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from placement.core.affinity import Affinity
from placement.runtime.results import NodeAssignment, PlacementResult

GROUP: Any = SimpleNamespace(id=SimpleNamespace(hex=lambda: "00"))
PAGE = Path(__file__).parents[2] / "docs" / "python-client.md"


def over_two_nodes() -> PlacementResult:
    """Rank 0 is on the node that is listed second."""
    parts = [
        NodeAssignment(0, "a", [4, 5], GROUP, [2, 3], ranks=[2, 3], cpus_per_gpu=2.0),
        NodeAssignment(0, "b", [1, 0], GROUP, [1, 0], ranks=[1, 0], cpus_per_gpu=2.0),
    ]
    return PlacementResult("d", parts)


def test_an_engine_takes_nothing_of_its_group_and_is_on_the_assignments_node() -> None:
    for part in over_two_nodes().assignments:
        options = part.engine_options()
        strategy = options.pop("scheduling_strategy")
        assert options == {"num_cpus": 0, "num_gpus": 0}, (
            "whatever the bundles hold: Ray would ask for a CPU else"
        )
        assert strategy.placement_group is GROUP
        assert strategy.placement_group_bundle_index in part.bundle_indices
        assert strategy.placement_group_capture_child_tasks is True


def test_the_engine_of_a_replica_is_where_its_rank_0_is() -> None:
    result = over_two_nodes()
    strategy = result.engine_options(0)["scheduling_strategy"]
    assert strategy.placement_group_bundle_index in result.assignments[1].bundle_indices
    with pytest.raises(IndexError, match="d has no replica 1"):
        result.engine_options(1)


def test_the_environment_has_the_bundles_in_rank_order_whichever_node_they_are_on() -> None:
    result = over_two_nodes()
    engine = {
        "VLLM_RAY_BUNDLE_INDICES": "0,1,2,3", "VLLM_RAY_PER_WORKER_GPUS": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }  # fmt: skip
    assert result.environment(0) == engine
    assert result.environment(0, 3) == engine | {"RANK": "3", "WORLD_SIZE": "4"}
    with pytest.raises(IndexError, match="d has no replica 1"):
        result.environment(1)
    with pytest.raises(IndexError, match="d has no rank 4 of a replica 0"):
        result.environment(0, 4)


def test_ranks_that_do_not_go_by_ascending_gpu_name_their_bundles_in_their_order() -> None:
    part = NodeAssignment(0, "a", [1, 5, 2, 3], GROUP, [0, 3, 1, 2])
    assert PlacementResult("d", [part]).environment(0)["VLLM_RAY_BUNDLE_INDICES"] == "0,3,1,2"


def test_a_share_says_how_much_of_a_gpu_a_worker_takes_and_a_remote_replica_nothing_of_gpus() -> None:
    share = NodeAssignment(0, "a", [1], GROUP, [0], share=0.25)
    remote = NodeAssignment(1, "a", [], GROUP, [0], egress_resource="egress", egress_units=8)
    result = PlacementResult("d", [share, remote])
    assert result.environment(0)["VLLM_RAY_PER_WORKER_GPUS"] == "0.25"
    assert result.environment(1) == {}


def test_each_rank_of_a_mixture_takes_its_own_share() -> None:
    part = NodeAssignment(0, "a", [1, 2, 3, 1], GROUP, [0, 1, 1, 2], shares=[0.5, 1.0, 1.0, 0.25])
    result = PlacementResult("d", [part])
    assert [result.actor_options(0, rank)["num_gpus"] for rank in range(4)] == [0.5, 1, 1, 0.25]
    assert [part.share_of(rank) for rank in range(4)] == [0.5, 1.0, 1.0, 0.25]
    assert (part.taken, part.to_dict()["shares"]) == ({1: 0.75, 2: 1.0, 3: 1.0}, [0.5, 1.0, 1.0, 0.25])
    variables = result.environment(0)
    assert variables["VLLM_RAY_BUNDLE_INDICES"] == "0,1,1,2"
    assert "VLLM_RAY_PER_WORKER_GPUS" not in variables, "which is one number for all"
    halves = NodeAssignment(0, "a", [1, 1], GROUP, [0, 1], share=0.5)
    assert (halves.taken, PlacementResult("d", [halves]).environment(0)["VLLM_RAY_PER_WORKER_GPUS"]) == (
        {1: 1.0},
        "0.5",
    )


def test_ranks_of_one_replica_may_have_whole_gpus_on_one_node_and_a_share_on_another() -> None:
    parts = [
        NodeAssignment(0, "a", [0, 1], GROUP, [0, 0], ranks=[0, 1]),
        NodeAssignment(0, "b", [3], GROUP, [1], ranks=[2], share=0.25),
    ]
    result = PlacementResult("d", parts)
    assert [result.actor_options(0, rank)["num_gpus"] for rank in range(3)] == [1, 1, 0.25]
    assert "VLLM_RAY_PER_WORKER_GPUS" not in result.environment(0)


def test_a_worker_of_a_cpu_replica_takes_its_cpus_and_memory_and_no_gpu() -> None:
    part = NodeAssignment(0, "a", [], GROUP, [0], cpus=2.5, memory_bytes=7)
    options = part.actor_options()
    assert options.pop("scheduling_strategy").placement_group is GROUP
    assert options == {"num_cpus": 2.5, "memory": 7}
    result = PlacementResult("d", [part])
    assert result.actor_options(0, 0).keys() == {"num_cpus", "memory", "scheduling_strategy"}
    assert result.engine_options(0)["num_cpus"] == 0
    assert result.environment(0) == {"CUDA_VISIBLE_DEVICES": ""}
    with pytest.raises(IndexError, match="replica 0 has ranks 0 to 0, not 1"):
        part.actor_options(1)
    assert (part.to_dict()["cpus"], part.to_dict()["memory_bytes"]) == (2.5, 7)


NEAR: list[Affinity] = [
    {"cpus": "0-1", "numa_node": 0, "ports": ["mlx5_0:1"]},
    {"cpus": "2-3", "numa_node": 0, "ports": ["mlx5_1:1", "mlx5_0:1"]},
]
FAR: list[Affinity] = [{"cpus": "0-7", "numa_node": 1, "ports": ["mlx5_7:1"]}, {}]


def near(*ranks: int, affinities: list[Affinity], node: str = "a", of: int = 2) -> NodeAssignment:
    """One assignment of a replica of so many ranks."""
    group: Any = SimpleNamespace(id=None, bundle_count=of)
    return NodeAssignment(
        0, node, [4, 5], group, list(ranks), node_name=node, ranks=list(ranks), affinities=affinities
    )


def test_a_worker_is_told_what_is_near_its_gpu_and_its_node_what_is_near_any() -> None:
    part = near(0, 1, affinities=NEAR)
    told = {rank: PlacementResult("d", [part]).environment(0, rank) for rank in (0, 1)}
    assert [told[rank]["PLACEMENT_CPUS"] for rank in (0, 1)] == ["0-1", "2-3"]
    assert [told[rank]["PLACEMENT_NUMA_NODE"] for rank in (0, 1)] == ["0", "0"]
    assert [told[rank]["UCX_NET_DEVICES"] for rank in (0, 1)] == ["mlx5_0:1", "mlx5_1:1,mlx5_0:1"]
    assert {told[rank]["NCCL_IB_HCA"] for rank in (0, 1)} == {"=mlx5_0:1,mlx5_1:1"}
    assert told[1] == part.environment(1), "an assignment that is all of its replica"
    assert "NCCL_SOCKET_IFNAME" not in told[0]
    assert not any(
        "PLACEMENT" in name or "NCCL" in name for name in PlacementResult("d", [part]).environment(0)
    )


def test_what_nccl_is_told_is_the_same_for_a_node_and_as_many_on_each() -> None:
    one, same, other = (
        near(*ranks, affinities=affinities, node=node, of=4)
        for ranks, affinities, node in (
            ((0, 1), FAR, "a"), ((2, 3), NEAR[:1] * 2, "b"), ((2, 3), NEAR, "b"),
        )
    )  # fmt: skip
    even = PlacementResult("d", [one, same])
    assert [even.environment(0, rank)["NCCL_IB_HCA"] for rank in range(4)] == [
        "=mlx5_7:1", "=mlx5_7:1", "=mlx5_0:1", "=mlx5_0:1",
    ]  # fmt: skip
    uneven = PlacementResult("d", [one, other])
    assert [name for name in uneven.environment(0, 2) if name.startswith("NCCL")] == []
    assert uneven.environment(0, 3)["UCX_NET_DEVICES"] == "mlx5_1:1,mlx5_0:1", "each for itself"
    unknown = PlacementResult("d", [one, near(2, 3, affinities=[], node="b", of=4)])
    assert [name for name in unknown.environment(0, 0) if name.startswith("NCCL")] == []
    assert other.environment(1) == {
        "VLLM_RAY_PER_WORKER_GPUS": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "PLACEMENT_CPUS": "2-3",
        "PLACEMENT_NUMA_NODE": "0", "UCX_NET_DEVICES": "mlx5_1:1,mlx5_0:1",
    }, "a part of a replica does not know the rest"  # fmt: skip


def test_interfaces_are_for_nccl_where_no_rdma_is_near() -> None:
    plain: list[Affinity] = [{"interfaces": ["eth0"]}, {"interfaces": ["eth1"]}]
    told = near(0, 1, affinities=plain).environment()
    assert told["NCCL_SOCKET_IFNAME"] == "=eth0,eth1"
    assert "UCX_NET_DEVICES" not in told and "PLACEMENT_CPUS" not in told
    with_rdma = near(0, 1, affinities=[plain[0], NEAR[0]]).environment()
    assert (with_rdma["NCCL_IB_HCA"], "NCCL_SOCKET_IFNAME" in with_rdma) == ("=mlx5_0:1", False)


def test_without_facts_nothing_is_told_and_a_rank_that_is_not_there_is_refused() -> None:
    part = near(0, 1, affinities=[])
    assert part.environment(1) == PlacementResult("d", [part]).environment(0, 1)
    assert part.environment(1).keys() == {
        "VLLM_RAY_BUNDLE_INDICES", "VLLM_RAY_PER_WORKER_GPUS", "CUDA_DEVICE_ORDER", "RANK", "WORLD_SIZE",
    }  # fmt: skip
    with pytest.raises(IndexError, match="replica 0 has ranks 0 to 1, not 2"):
        part.environment(2)


def test_the_page_starts_an_engine_with_options_that_there_are() -> None:
    [said] = re.findall(
        r"Start them with\s+`Engine\.options\(\*\*(a\.engine_options\(\))\)\.remote\(\)`", PAGE.read_text()
    )
    result = over_two_nodes()
    assert eval(said, {"a": result.assignments[0]})["num_cpus"] == 0
    assert "`result.engine_options(replica)`" in PAGE.read_text()
    assert eval("result.engine_options(replica)", {"result": result, "replica": 0})["num_gpus"] == 0
