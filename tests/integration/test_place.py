"""Placing, changing and releasing on a real cluster, with real workers in the result."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import placement
from placement import Deployment, NodeAssignment, PlacementConstraints
from tests.integration.conftest import left_over, settled, worker_at

pytestmark = pytest.mark.integration

PAGE = Path(__file__).parents[2] / "docs" / "python-client.md"


@ray.remote
class Worker:
    """One rank; also another Ray user's process."""

    def gpus(self) -> list[int]:
        return [int(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"]]

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def variables(self, names: list[str]) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in names}


def ranks_gpus(assignment: NodeAssignment) -> list[int]:
    """What a worker at each rank says it got."""
    got = [worker_at(assignment.actor_options(rank)) for rank in range(len(assignment.gpus))]
    assert {one.node for one in got} == {assignment.node}
    assert all(len(one.gpus) == 1 for one in got)
    return [int(one.gpus[0]) for one in got]


def node_id(name: str) -> str:
    return next(node["NodeID"] for node in ray.nodes() if node["NodeName"] == name)


def another_user(node: str, gpus: int = 1) -> Any:
    """Somebody who asks plain Ray for GPUs of a node; returns once they are held."""
    pinned = NodeAffinitySchedulingStrategy(node_id(node), soft=False)
    worker = Worker.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=pinned).remote()
    ray.get(worker.gpus.remote())
    return worker


def test_the_workers_of_every_replica_get_exactly_the_gpus_of_the_result(service: Any) -> None:
    result = ray.get(
        service.place.remote(Deployment(name="llama", model="meta-llama/Llama-3.1-70B", gpus=4, replicas=2))
    )
    assert [a.replica_index for a in result.assignments] == [0, 1]
    for assignment in result.assignments:
        workers = [Worker.options(**assignment.actor_options(rank)).remote() for rank in range(4)]
        all_at_once = ray.get([worker.gpus.remote() for worker in workers])
        assert all_at_once == [[gpu] for gpu in assignment.gpus]
        for worker in workers:
            ray.kill(worker)
        assert ranks_gpus(assignment) == assignment.gpus
    taken = [(a.node, gpu) for a in result.assignments for gpu in a.gpus]
    assert len(set(taken)) == 8


def test_with_gpu_0_busy_a_pair_stays_on_one_bridge(service: Any) -> None:
    """Ray alone would give 1 and 2, two halves of two bridged pairs."""
    neighbour = another_user("pcie")
    try:
        here = PlacementConstraints(gpu_nodes=("pcie",))
        result = ray.get(service.place.remote({"name": "pair", "model": "m", "gpus": 2}, here))
        (assignment,) = result.assignments
        assert (assignment.gpus, assignment.ray_gpus) == ([2, 3], [1, 2])
        assert assignment.weakest_link == "NV12"
        assert ranks_gpus(assignment) == [2, 3]
    finally:
        ray.kill(neighbour)


def test_several_runs_are_steered_around(service: Any) -> None:
    """On a DGX-1V with GPU 0 busy the best pair needs several fillers and holds."""
    neighbour = another_user("dgx")
    try:
        here = PlacementConstraints(gpu_nodes=("dgx",))
        result = ray.get(service.place.remote({"name": "pair", "model": "m", "gpus": 2}, here))
        (assignment,) = result.assignments
        assert assignment.weakest_link == "NV2"
        assert ranks_gpus(assignment) == assignment.gpus
    finally:
        ray.kill(neighbour)


@ray.remote
class Engine:
    """Makes its own workers in the group that it runs in, as vLLM does: one in each bundle, and one just so."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def workers_gpus(self, bundles: list[int]) -> tuple[list[list[int]], list[int]]:
        group = ray.util.get_current_placement_group()
        workers = []
        for bundle in bundles:
            there = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            workers.append(Worker.options(num_cpus=0, num_gpus=1, scheduling_strategy=there).remote())
        each = ray.get([worker.gpus.remote() for worker in workers])
        for worker in workers:
            ray.kill(worker)
        own = Worker.options(num_cpus=0, num_gpus=1).remote()
        found = ray.get(own.gpus.remote())
        ray.kill(own)
        return each, found


@pytest.mark.parametrize("limits", [{}, {"cpus_per_gpu": 0.5}])
def test_an_engine_that_makes_its_own_workers_gets_exactly_the_gpus(
    service: Any, limits: dict[str, float]
) -> None:
    """Started as docs/python-client.md says. Ray alone would give the pair 1 and 2."""
    neighbour = another_user("pcie")
    wanted = {"name": "engine", "model": "m", "gpus": 2, "constraints": {"gpu_nodes": ["pcie"], **limits}}
    try:
        (a,) = ray.get(service.place.remote(wanted)).assignments
        [said] = re.findall(r"`(Engine\.options\([^`]*)`", PAGE.read_text())
        engine = eval(said, {"Engine": Engine, "a": a})
        each, own = ray.get(engine.workers_gpus.remote(a.bundle_indices), timeout=60)
        assert (a.gpus, each) == ([2, 3], [[2], [3]])
        assert own in each, "what names no group is in this one, too"
        assert ray.get(engine.node.remote()) == a.node
        ray.kill(engine)
    finally:
        ray.kill(neighbour)


def test_constraints_that_are_given_beside_a_deployment_are_checked_with_it(service: Any) -> None:
    wanted = Deployment(name="itself", model="m")
    for given in ({"near_to": ["itself"]}, PlacementConstraints(apart_from=("itself",))):
        for call in (service.place, service.apply, service.plan):
            with pytest.raises(placement.InvalidDeployment, match="names 'itself' itself"):
                ray.get(call.remote(wanted, given))
    assert ray.get(service.status.remote())["deployments"] == []


def test_placing_the_same_again_returns_what_stands(service: Any) -> None:
    wanted = Deployment(name="same", model="m", gpus=2)
    first = ray.get(service.place.remote(wanted))
    assert ray.get(service.place.remote(wanted)).to_dict() == first.to_dict()


def test_another_shape_under_the_same_name_is_a_conflict_and_changes_nothing(service: Any) -> None:
    first = ray.get(service.place.remote({"name": "shape", "model": "m", "gpus": 2}))
    with pytest.raises(placement.DeploymentConflict, match="gpus 2 -> 4"):
        ray.get(service.place.remote({"name": "shape", "model": "m", "gpus": 4}))
    assert ray.get(service.get.remote("shape")).to_dict() == first.to_dict()


def test_what_does_not_fit_is_refused_with_reasons_and_nothing_stays_reserved(service: Any) -> None:
    with pytest.raises(placement.NotEnoughGpus, match="largest node has 8"):
        ray.get(service.place.remote({"name": "huge", "model": "m", "gpus": 11}))
    with pytest.raises(placement.NotEnoughGpus, match="replica 3 needs 4 GPUs free"):
        ray.get(service.place.remote({"name": "many", "model": "m", "gpus": 4, "replicas": 4}))
    assert settled(lambda: not left_over()), left_over()
    with pytest.raises(placement.UnknownDeployment, match="there are: none"):
        ray.get(service.get.remote("many"))


def test_apply_adds_and_removes_replicas_and_keeps_the_rest(service: Any) -> None:
    two = ray.get(service.apply.remote({"name": "grow", "model": "m", "gpus": 1, "replicas": 2}))
    four = ray.get(service.apply.remote({"name": "grow", "model": "m", "gpus": 1, "replicas": 4}))
    one = ray.get(service.apply.remote({"name": "grow", "model": "other", "gpus": 1, "replicas": 1}))
    assert [a.to_dict() for a in four.assignments[:2]] == [a.to_dict() for a in two.assignments]
    assert [a.to_dict() for a in one.assignments] == [two.assignments[0].to_dict()]


def test_apply_with_another_shape_replaces_the_replicas(service: Any) -> None:
    ray.get(service.apply.remote({"name": "reshape", "model": "m", "gpus": 4, "replicas": 3}))
    result = ray.get(service.apply.remote({"name": "reshape", "model": "m", "gpus": 2, "replicas": 6}))
    assert [len(a.gpus) for a in result.assignments] == [2] * 6
    assert settled(lambda: ray.available_resources().get("GPU", 0) == 0)


def test_a_shape_that_cannot_be_had_leaves_the_old_one_standing(service: Any) -> None:
    before = ray.get(service.apply.remote({"name": "keep", "model": "m", "gpus": 4, "replicas": 2}))
    with pytest.raises(placement.NotEnoughGpus):
        ray.get(service.apply.remote({"name": "keep", "model": "m", "gpus": 8, "replicas": 2}, atomic=True))
    assert ray.get(service.get.remote("keep")).to_dict() == before.to_dict()


def test_one_deployment_that_cannot_fit_keeps_a_whole_file_from_being_applied(service: Any) -> None:
    several = [{"name": "fits", "model": "m", "gpus": 2}, {"name": "does-not", "model": "m", "gpus": 9}]
    with pytest.raises(placement.NotEnoughGpus):
        ray.get(service.apply_all.remote(several, atomic=True))
    assert ray.get(service.status.remote())["deployments"] == []


def test_a_file_may_shrink_one_deployment_to_make_room_for_the_next(service: Any) -> None:
    ray.get(service.apply.remote({"name": "wide", "model": "m", "gpus": 4, "replicas": 3}))
    file = [
        {"name": "wide", "model": "m", "gpus": 4},
        {"name": "new", "model": "m", "gpus": 4, "replicas": 2},
    ]
    wide, new = ray.get(service.apply_all.remote(file))
    assert (len(wide.assignments), len(new.assignments)) == (1, 2)


def test_a_plan_reserves_nothing_and_is_what_placing_then_does(service: Any) -> None:
    wanted = {"name": "dry", "model": "m", "gpus": 2, "replicas": 2}
    planned = ray.get(service.plan.remote(wanted))
    assert not left_over()
    placed = ray.get(service.place.remote(wanted))
    assert [(a.node, a.gpus) for a in planned.assignments] == [(a.node, a.gpus) for a in placed.assignments]


def test_gpus_just_released_can_be_placed_on_at_once(service: Any) -> None:
    for _ in range(3):
        result = ray.get(service.place.remote({"name": "again", "model": "m", "gpus": 8}))
        assert result.assignments[0].gpus == list(range(8))
        assert ray.get(service.release.remote("again")) == 1


def test_different_deployments_are_placed_side_by_side(service: Any) -> None:
    wanted = [{"name": f"d{i}", "model": "m", "gpus": 1} for i in range(8)]
    results = ray.get([service.place.remote(one) for one in wanted])
    taken = [(a.node, gpu) for result in results for a in result.assignments for gpu in a.gpus]
    assert len(set(taken)) == 8


def test_the_same_deployment_asked_for_twice_at_once_is_placed_once(service: Any) -> None:
    wanted = {"name": "twice", "model": "m", "gpus": 2}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: ray.get(service.place.remote(wanted)).to_dict(), range(2))
    assert first == second


def test_unknown_nodes_and_bad_fields_are_named(service: Any) -> None:
    with pytest.raises(
        placement.UnknownNode, match=r"constraints.gpu_nodes: no node 'nowhere'; use one of: dgx"
    ):
        ray.get(service.place.remote({"name": "x", "model": "m"}, {"gpu_nodes": ["nowhere"]}))
    with pytest.raises(placement.InvalidDeployment, match="gpus: 1.5 GPUs is more than one and not whole"):
        ray.get(service.place.remote({"name": "x", "model": "m", "gpus": 1.5}))
    with pytest.raises(placement.InvalidDeployment, match="unknown field 'gpu'"):
        ray.get(service.place.remote({"name": "x", "model": "m", "gpu": 1}))
    with pytest.raises(
        placement.NotEnoughGpus, match="1 node: has fewer than 4 GPUs free|largest node has 4"
    ):
        ray.get(service.place.remote({"name": "x", "model": "m", "gpus": 5}, {"gpu_nodes": ["pcie"]}))


def test_starting_again_finds_the_same_service(service: Any) -> None:
    assert placement.start() == placement.connect() == service


def test_a_restarted_service_knows_what_stands(service: Any) -> None:
    before = ray.get(
        service.place.remote({"name": "stays", "model": "m", "gpus": 2, "replicas": 2})
    ).to_dict()
    ray.kill(service, no_restart=False)
    assert ray.get(placement.connect().get.remote("stays")).to_dict() == before
    other = ray.get(service.place.remote({"name": "other", "model": "m", "gpus": 4}))
    assert ranks_gpus(other.assignments[0]) == other.assignments[0].gpus


def test_cpus_that_another_user_holds_send_a_replica_to_another_node(service: Any) -> None:
    """Also just after something was placed there, when what the service knows itself is newer than Ray's books."""
    pinned = NodeAffinitySchedulingStrategy(node_id("dgx"), soft=False)
    user = Worker.options(num_cpus=2, scheduling_strategy=pinned).remote()
    ray.get(user.node.remote())
    ray.get(service.place.remote({"name": "a", "model": "m", "constraints": {"gpu_nodes": ["dgx"]}}))
    result = ray.get(
        service.place.remote({"name": "b", "model": "m", "gpus": 4, "constraints": {"cpus_per_gpu": 0.5}}),
        timeout=60,
    )
    assert {a.node_name for a in result.assignments} == {"pcie"}
    ray.kill(user)


def test_a_node_that_is_slow_holds_up_nobody_elsewhere(service: Any, tmp_path: Path) -> None:
    """Its actor is busy for as long as the others take, a look at the state included."""
    ray.get(service.status.remote())
    busy = ray.get_actor(f"node:{node_id('dgx')}", namespace="placement")
    done = tmp_path / "done"
    waiting = busy.__ray_call__.remote(_wait_for, str(done))
    slow = service.place.remote({"name": "slow", "model": "m", "constraints": {"gpu_nodes": ["dgx"]}})
    quick = [{"name": f"quick-{i}", "model": "m", "constraints": {"gpu_nodes": ["pcie"]}} for i in range(4)]
    ray.get([service.place.remote(one) for one in quick], timeout=60)
    assert len(ray.get(service.status.remote(), timeout=60)["deployments"]) == 4
    assert ray.wait([slow], timeout=0) == ([], [slow])
    done.touch()
    ray.get([waiting, slow], timeout=60)


def _wait_for(actor: Any, path: str) -> None:
    end = time.monotonic() + 120
    while not Path(path).exists() and time.monotonic() < end:
        time.sleep(0.01)


def test_an_engine_has_the_order_of_its_ranks_where_they_do_not_go_by_ascending_gpu(
    service: Any, address: str
) -> None:
    neighbour = another_user("dgx")
    wanted = {"name": "pairs", "model": "m", "tensor_parallel": 2, "pipeline_parallel": 3}
    result = ray.get(service.place.remote(wanted | {"constraints": {"gpu_nodes": ["dgx"]}}))
    [a] = result.assignments
    assert (a.gpus, a.bundle_indices) == ([1, 5, 2, 3, 4, 7], [0, 4, 1, 2, 3, 5])
    assert (a.bandwidth_gb_per_s, a.sorted_bandwidth_gb_per_s) == (40.0, 5.302)
    environment = result.environment(0)
    assert environment["RAY_ADDRESS"] == address
    engine = Worker.options(**result.engine_options(0), runtime_env={"env_vars": environment}).remote()
    assert ray.get(engine.variables.remote([*environment])) == environment
    got = []
    for index in environment["VLLM_RAY_BUNDLE_INDICES"].split(","):
        bundle = PlacementGroupSchedulingStrategy(a.placement_group, placement_group_bundle_index=int(index))
        got += worker_at({"num_cpus": 0, "num_gpus": 1, "scheduling_strategy": bundle}).gpus
    assert got == ["1", "5", "2", "3", "4", "7"]
    for worker in (engine, neighbour):
        ray.kill(worker)
