"""Replicas on CPUs alone, on real raylets: where they go, what they hold, who ends them, and when a node dies."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

import placement
from placement import Client
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode
from placement.wire.cluster import ClusterFile
from placement.wire.dry_run import plan_deployments
from placement.wire.files import load_deployments, parse_model
from tests.integration.conftest import left_over, settled
from tests.integration.test_cli import Run
from tests.integration.test_cli import run as run
from tests.integration.test_leases import Driver

pytestmark = pytest.mark.integration

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpus.toml"
FREE = {"cpu-a": 8.0, "cpu-b": 8.0, "gpu": 12.0, "head": 2.0}
"""CPUs of the nodes; the GPU node has four GPUs."""


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode("cpu-a", cpus=8),
        SimulatedNode("cpu-b", cpus=8),
        SimulatedNode("gpu", topology="a100-pcie-4x", cpus=12),
    ]


def on_cpus(name: str, cpus: float = 3, **fields: Any) -> dict[str, Any]:
    return {"name": name, "model": "m", "runtime": "python", "cpus": cpus, **fields}


def nodes_of(result: placement.PlacementResult) -> list[str]:
    return [a.node_name for a in result.assignments]


def free_cpus() -> dict[str, float]:
    """Node -> CPUs that Ray's books show as free."""
    free = ray._private.state.available_resources_per_node()
    return {row["NodeName"]: free[row["NodeID"]].get("CPU", 0.0) for row in ray.nodes() if row["Alive"]}


@ray.remote
class Worker:
    def here(self) -> tuple[str, dict[str, float], list[int]]:
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_assigned_resources(), ray.get_gpu_ids()

    def visible_gpus(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_replicas_share_nodes_spread_and_hold_their_cpus_and_memory(service: Any) -> None:
    result = ray.get(service.place.remote(on_cpus("embed", replicas=4, memory_gib=0.25)))
    assert Counter(nodes_of(result)) == {"cpu-a": 2, "cpu-b": 2}
    assert settled(lambda: free_cpus() == FREE | {"cpu-a": 2.0, "cpu-b": 2.0}), free_cpus()
    for a in result.assignments:
        assert (a.gpus, a.cpus, a.memory_bytes) == ([], 3.0, 1 << 28)
        row = placement_group_table(a.placement_group)
        assert (row["bundles"], row["bundles_to_node_id"]) == (
            {0: {"CPU": 3.0, "memory": float(1 << 28)}},
            {0: a.node},
        )
    workers = [Worker.options(**result.actor_options(i, 0)).remote() for i in range(4)]
    for a, (node, held, gpus) in zip(
        result.assignments, ray.get([worker.here.remote() for worker in workers]), strict=True
    ):
        assert (node, gpus) == (a.node, [])
        assert {resource: held[resource] for resource in ("CPU", "memory")} == {"CPU": 3.0, "memory": 1 << 28}


def test_gpu_nodes_give_what_their_free_gpus_can_spare(service: Any) -> None:
    result = ray.get(service.place.remote(on_cpus("large", 4, replicas=6)))
    assert Counter(nodes_of(result)) == {"cpu-a": 2, "cpu-b": 2, "gpu": 2}
    beside = next(a.replica_index for a in result.assignments if a.node_name == "gpu")
    worker = Worker.options(
        **result.actor_options(beside, 0), runtime_env={"env_vars": result.environment(beside)}
    ).remote()
    assert ray.get(worker.visible_gpus.remote()) == "", "it cannot use GPUs that are others'"
    with pytest.raises(
        placement.NoCpuNodes,
        match="at best head has 2 CPUs .* 1 node: has not 4 CPUs to spare beside its free GPUs",
    ):
        ray.get(service.place.remote(on_cpus("more", 4)))
    pair = ray.get(
        service.place.remote({"name": "pair", "model": "m", "gpus": 4, "constraints": {"cpus_per_gpu": 1}})
    )
    assert nodes_of(pair) == ["gpu"], "each of its GPUs still has a CPU beside it"


def test_what_waits_is_placed_when_there_is_room_and_shown_meanwhile(
    service: Any, run: Run, tmp_path: Path
) -> None:
    ray.get(service.apply.remote(on_cpus("first", 7, replicas=2)))
    waits = ray.get(service.apply.remote(on_cpus("second", 6, replicas=2)))
    assert nodes_of(waits) == ["gpu"]
    assert "replica 1 needs 6 CPUs on one node; at best" in waits.pending[1]

    def told(*command: str) -> str:
        done = run(*command)
        assert done.returncode in (0, 1), done.stderr
        return done.stdout

    assert "CPUs: 7 of 8  first/" in told("status")
    assert "6 CPUs" in told("status", "--deployment", "second")
    assert [one["cpus"] for one in json.loads(told("list", "-o", "json"))["deployments"]] == [6, 14]
    # On the snapshot of it, in a file, the same is planned as by the service, with the same explanation.
    file = ClusterFile.model_validate_json(json.dumps(ray.get(service.snapshot.remote())))
    wanted = parse_model(placement.Deployment, on_cpus("third", 1.5, replicas=2), "")
    [planned] = plan_deployments(file.snapshot(), file.held(), [wanted])
    assert planned.to_dict() == ray.get(service.plan.remote(wanted, atomic=True)).to_dict()
    assert [(a.node_name, a.cpus) for a in planned.assignments] == [("head", 1.5), ("gpu", 1.5)]
    wanted_file = tmp_path / "third.toml"
    wanted_file.write_text('[[deployments]]\nname = "third"\nmodel = "m"\ncpus = 1.5\nreplicas = 2\n')
    explained = told("plan", "--explain", str(wanted_file))
    assert "CPUs and memory" in explained and "1.5 CPUs" in explained
    assert "third: new, 2 replicas on head, gpu" in told("diff", str(wanted_file))

    ray.get(service.release.remote("first"))
    assert settled(lambda: not ray.get(service.get.remote("second")).pending)
    smaller = ray.get(service.apply.remote(on_cpus("second", 2, replicas=2)))
    assert [a.cpus for a in smaller.assignments] == [2.0, 2.0], "declared anew, it is placed anew"


def test_what_a_caller_owns_ends_with_it(service: Any, address: str) -> None:
    driver = Driver(address)
    try:
        told = driver.place(on_cpus("lease", 5, replicas=2, owner="caller"))
        assert sorted(a["node_name"] for a in told["assignments"]) == ["cpu-a", "cpu-b"]
        assert Client(service).describe("lease")["owner"]["kind"] == "caller"
        assert settled(lambda: free_cpus() == FREE | {"cpu-a": 3.0, "cpu-b": 3.0}), free_cpus()
    finally:
        driver.kill()
    assert settled(lambda: free_cpus() == FREE), free_cpus()
    assert settled(lambda: not ray.get(service.status.remote())["deployments"])


def test_a_lease_of_time_ends_by_itself(service: Any) -> None:
    ray.get(service.apply.remote(on_cpus("short", ttl_seconds=1)))
    assert settled(lambda: not ray.get(service.status.remote())["deployments"])
    assert settled(lambda: free_cpus() == FREE), free_cpus()


def test_the_example_is_placed(service: Any) -> None:
    results = {one.deployment: one for one in ray.get(service.apply_all.remote(load_deployments(EXAMPLE)))}
    assert not any(one.pending for one in results.values())
    assert sorted(nodes_of(results["embed"])) == ["cpu-a", "cpu-b"]
    assert set(nodes_of(results["tokenizer"])) == {"cpu-a", "cpu-b"}
    [router] = results["router"].assignments
    assert (router.node_name, router.cpus) == ("head", 1.0), "the fullest that has room"


def test_replicas_on_a_node_that_dies_are_placed_elsewhere_or_wait(
    cluster: EmbeddedCluster, service: Any
) -> None:
    """The last one: the node does not come back."""
    before = ray.get(service.place.remote(on_cpus("embed", 4, replicas=3)))
    assert Counter(nodes_of(before)) == {"cpu-a": 2, "cpu-b": 1}
    ray.get(service.place.remote(on_cpus("large", 6, constraints={"cpu_nodes": ["gpu"]})))
    cluster.kill("cpu-a", signal.SIGKILL)

    def left() -> tuple[Counter[str], list[int]]:
        now = ray.get(service.get.remote("embed"))
        return Counter(nodes_of(now)), sorted(now.pending)

    assert settled(lambda: left()[0] == {"cpu-b": 2} and len(left()[1]) == 1), left()
    ray.get(service.release.remote("large"))
    assert settled(lambda: left() == ({"cpu-b": 2, "gpu": 1}, [])), left()
    for a in ray.get(service.get.remote("embed")).assignments:
        node, held, _ = ray.get(Worker.options(**a.actor_options()).remote().here.remote())
        assert (node, held["CPU"]) == (a.node, 4.0)
    ray.get(service.release_all.remote())
    assert settled(lambda: not left_over()), left_over()
