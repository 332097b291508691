"""Replicas over several nodes: one placement group, each rank verified from inside a worker."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

import placement
from placement import PlacementResult
from placement.runtime.embedded import SimulatedNode
from placement.runtime.probing import another_user
from placement.wire.files import load_deployments
from tests.integration.conftest import worker_at
from tests.integration.test_place import Worker

pytestmark = pytest.mark.integration

RACKS = {"one": "a", "two": "b", "three": "a", "pcie": "b"}


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode(
            name,
            topology="a100-pcie-4x" if name == "pcie" else "hgx-a100-4gpu",
            labels={"rack": rack},
        )
        for name, rack in RACKS.items()
    ]


def verify(result: PlacementResult, replica: int, size: int) -> None:
    """Starts a worker at each rank, by both ways to ask for it, and compares what it got."""
    parts = result.replica(replica)
    assert len({a.placement_group.id.hex() for a in parts}) == 1
    assert sorted(rank for a in parts for rank in a.ranks) == list(range(size))
    for a in parts:
        for i, rank in enumerate(a.ranks):
            by_rank = result.actor_options(replica, rank)
            assert by_rank["scheduling_strategy"].placement_group_bundle_index == a.bundle_indices[i]
            assert worker_at(by_rank)[:2] == (a.node, [str(a.gpus[i])])


def place(service: Any, name: str, **fields: Any) -> PlacementResult:
    return ray.get(service.place.remote({"name": name, "model": "m", **fields}))


def test_a_replica_of_two_times_four_lies_in_one_rack_with_its_bundles_in_rank_order(service: Any) -> None:
    result = place(service, "big", tensor_parallel=4, pipeline_parallel=2)
    verify(result, 0, 8)
    first, second = result.assignments
    assert {RACKS[first.node_name], RACKS[second.node_name]} == {"a"}
    assert (first.ranks, second.ranks) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert (first.bundle_indices, second.bundle_indices) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert {first.weakest_link, second.weakest_link} == {"NV4"}
    nodes = placement_group_table(first.placement_group)["bundles_to_node_id"]
    assert [nodes[i] for i in range(8)] == [first.node] * 4 + [second.node] * 4
    status = ray.get(service.status.remote())
    assert [d["state"] for d in status["deployments"]] == ["placed"]
    assert ray.get(service.get.remote("big")).to_dict() == result.to_dict()


def test_the_engine_of_a_replica_over_several_nodes_starts_where_rank_0_is(service: Any) -> None:
    result = place(service, "engine", tensor_parallel=4, pipeline_parallel=2)
    engine = Worker.options(**result.engine_options(0)).remote()
    assert ray.get(engine.node.remote()) == next(a.node for a in result.assignments if 0 in a.ranks)
    for a in result.assignments:
        other = Worker.options(**a.engine_options()).remote()
        assert ray.get(other.node.remote()) == a.node
        ray.kill(other)
    verify(result, 0, 8)  # all of the group is still free
    ray.kill(engine)


def test_parts_are_steered_around_what_others_hold(service: Any) -> None:
    neighbours = [another_user("one"), another_user("two")]  # each has GPU 0
    limits = {"gpu_nodes": ["one", "two"]}
    try:
        result = place(service, "pairs", tensor_parallel=2, pipeline_parallel=2, constraints=limits)
        verify(result, 0, 4)
        assert [a.node_name for a in result.assignments] == ["one", "two"]
        assert all(len(a.gpus) == 2 and 0 not in a.gpus for a in result.assignments)
    finally:
        for neighbour in neighbours:
            neighbour.leave()


def test_more_gpus_than_any_node_has_are_cut_into_equal_parts(service: Any) -> None:
    result = place(service, "twelve", gpus=12)
    verify(result, 0, 12)
    assert sorted(a.node_name for a in result.assignments) == ["one", "three", "two"]


def test_the_example_is_placed_whole(service: Any) -> None:
    example = Path(__file__).parents[2] / "examples" / "shared_and_large.toml"
    results = {r.deployment: r for r in ray.get(service.apply_all.remote(load_deployments(example)))}
    verify(results["llama-405b"], 0, 8)
    assert len({(a.node, *a.gpus) for a in results["embed"].assignments}) == 2, "eight quarters on two GPUs"
    assert len({a.node for a in results["qwen-7b"].assignments}) == 2, "those that are left"


def test_all_of_it_or_nothing(service: Any) -> None:
    place(service, "small", gpus=1, constraints={"gpu_nodes": ["pcie"]})
    with pytest.raises(
        placement.NotEnoughGpus,
        match=r"needs 4 x 4 GPUs, each on one node, all of one GPU model; there is room for 3",
    ):
        place(service, "large", tensor_parallel=4, pipeline_parallel=4)
    with pytest.raises(placement.NotEnoughGpus):
        place(service, "eight", tensor_parallel=8)
    assert [d["name"] for d in ray.get(service.status.remote())["deployments"]] == ["small"]


def test_replicas_are_added_and_taken_away(service: Any) -> None:
    wanted = {"name": "grow", "model": "m", "tensor_parallel": 2, "pipeline_parallel": 3}
    one = ray.get(service.apply.remote(wanted))
    two = ray.get(service.apply.remote(wanted | {"replicas": 2}))
    assert [a.to_dict() for a in two.replica(0)] == [a.to_dict() for a in one.assignments]
    verify(two, 1, 6)
    less = ray.get(service.apply.remote(wanted | {"replicas": 1}))
    assert less.to_dict() == one.to_dict()
    assert ray.get(service.release.remote("grow")) == 1


def test_while_another_user_takes_and_frees_gpus(service: Any) -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            another_user("pcie").leave()
            another_user("two").leave()

    thread = threading.Thread(target=churn)
    thread.start()
    placed = 0
    try:
        for step in range(8):
            try:
                result = place(service, f"c{step}", tensor_parallel=2, pipeline_parallel=4)
            except (placement.Unplaceable, placement.ReservationFailed):
                continue
            placed += 1
            verify(result, 0, 8)
            ray.get(service.release.remote(f"c{step}"))
    finally:
        stop.set()
        thread.join()
    assert placed >= 4
