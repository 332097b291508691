"""The steps that docs/engines.md has for SGLang, TensorRT-LLM and Triton, up to which GPUs their processes have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement import placement_group
from placement.runtime.embedded import SimulatedNode
from tests.integration.conftest import worker_at
from tests.integration.test_place import another_user, node_id

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode(name, topology="a100-pcie-4x") for name in ("pcie", "pcie-b")]


@pytest.fixture
def neighbours(service: Any) -> Iterator[list[PlacementGroup]]:
    """Another Ray user has GPU 0 of each node. The groups of the test are removed after it."""
    users, groups = [another_user("pcie"), another_user("pcie-b")], list[PlacementGroup]()
    yield groups
    for group in groups:
        remove_placement_group(group)
    for user in users:
        ray.kill(user)


def inside(group: PlacementGroup, bundle: int, capture: bool = False) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=capture
    )


@ray.remote(num_cpus=0)
class Engine:
    """Starts its ranks in the placement group in which it runs."""

    def __init__(self, bundle_of_rank: list[int]) -> None:
        group = get_current_placement_group()
        at = [inside(group, bundle) for bundle in bundle_of_rank]
        self.ranks = [Rank.options(scheduling_strategy=one).remote() for one in at]

    def where(self) -> list[tuple[str, int]]:
        return ray.get([rank.where.remote() for rank in self.ranks])


@ray.remote(num_cpus=0, num_gpus=1)
class Rank:
    def where(self) -> tuple[str, int]:
        context = ray.get_runtime_context()
        return context.get_node_id(), int(context.get_accelerator_ids()["GPU"][0])


def test_sglang_on_two_nodes_has_one_bundle_for_each(neighbours: list[PlacementGroup]) -> None:
    group = placement_group(
        [{"GPU": 2, "CPU": 1}] * 2, strategy="STRICT_SPREAD", within="nvlink", wait_seconds=0
    )
    neighbours.append(group)
    engine = Engine.options(scheduling_strategy=inside(group, 0, capture=True)).remote([0, 0, 1, 1])
    ranks = ray.get(engine.where.remote())
    nodes = [worker_at({"scheduling_strategy": inside(group, i), "num_gpus": 0}).node for i in (0, 1)]
    assert {*nodes} == {node_id("pcie"), node_id("pcie-b")}
    assert [node for node, _ in ranks] == [nodes[0]] * 2 + [nodes[1]] * 2
    assert [sorted(gpu for node, gpu in ranks if node == one) for one in nodes] == [[2, 3], [2, 3]]


def test_tensorrt_llm_has_one_bundle_for_each_rank_in_ascending_order(
    neighbours: list[PlacementGroup],
) -> None:
    group = placement_group(
        [{"GPU": 1, "CPU": 0.5}] * 2, strategy="STRICT_PACK", within="nvlink", wait_seconds=0
    )
    neighbours.append(group)
    engine = Engine.options(scheduling_strategy=inside(group, 0, capture=True)).remote([0, 1])
    assert [gpu for _, gpu in ray.get(engine.where.remote())] == [2, 3]


@ray.remote
class Server:
    """Starts a server that is no Ray program."""

    def sees(self) -> str:
        code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def test_triton_sees_the_gpus_of_its_one_bundle(neighbours: list[PlacementGroup]) -> None:
    group = placement_group([{"GPU": 2, "CPU": 1}], within="nvlink", wait_seconds=0)
    neighbours.append(group)
    server = Server.options(num_gpus=2, num_cpus=1, scheduling_strategy=inside(group, 0)).remote()
    assert ray.get(server.sees.remote()) == "2,3"
