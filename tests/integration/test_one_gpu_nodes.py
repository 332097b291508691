"""A cluster of nodes with one GPU each: a replica of two lies on two of them, each rank verified from a worker."""

from __future__ import annotations

from typing import Any

import pytest
import ray

import placement
from placement.runtime.embedded import SimulatedNode
from tests.integration.test_multi_node import place, verify

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    domain = {"ray.io/gpu-domain": "rack"}
    return [
        SimulatedNode("spark-1", gpus=1),
        SimulatedNode("spark-2", gpus=1),
        SimulatedNode("tray-1", gpus=1, labels=domain),
        SimulatedNode("tray-2", gpus=1, labels=domain),
    ]


@pytest.mark.parametrize("asked", [{"gpus": 2}, {"pipeline_parallel": 2}])
def test_a_replica_of_two_gpus_lies_on_two_nodes(service: Any, asked: dict[str, int]) -> None:
    limits = {"gpu_nodes": ["spark-1", "spark-2"]}
    result = place(service, "two", **asked, constraints=limits)
    verify(result, 0, 2)
    assert [(a.node_name, a.gpus, a.ranks) for a in result.assignments] == [
        ("spark-1", [0], [0]),
        ("spark-2", [0], [1]),
    ]
    assert ray.get(service.get.remote("two")).to_dict() == result.to_dict()


def test_a_tensor_parallel_group_lies_in_the_nvlink_domain_or_is_refused_with_what_works(
    service: Any,
) -> None:
    result = place(service, "pair", tensor_parallel=2)
    verify(result, 0, 2)
    assert [a.node_name for a in result.assignments] == ["tray-1", "tray-2"]
    limits = {"gpu_nodes": ["spark-1", "spark-2"]}
    with pytest.raises(placement.NotEnoughGpus, match="ask for pipeline_parallel = 2 instead"):
        place(service, "apart", tensor_parallel=2, constraints=limits)


def test_a_floor_is_not_lost_by_a_cut(service: Any) -> None:
    limits = {"gpu_nodes": ["spark-1", "spark-2"]}
    with pytest.raises(
        placement.NotEnoughGpus, match="leave within out, since links between nodes are not known"
    ):
        place(service, "floor", gpus=2, within="nvlink", constraints=limits)
