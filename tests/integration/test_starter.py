"""Whoever starts the service: it runs as the nodes were started, not as its starter does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import placement
from placement.runtime import bootstrap
from placement.runtime.connection import NAMESPACE
from placement.runtime.embedded import SimulatedNode
from placement.runtime.node_agent import agent_name
from placement.runtime.probing import another_user, gpus_seen_by_workers
from tests.integration.conftest import left_over, settled

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

DRIVER = """
import json, logging, sys
import ray
address, env = sys.argv[1], json.loads(sys.argv[2])
own = {} if address.startswith("ray://") else {"_node_ip_address": address.split(":")[0]}
ray.init(address, runtime_env=env, log_to_driver=False, logging_level=logging.ERROR, **own)
import placement
placement.start()
"""


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode("four", gpus=4)]


@pytest.fixture(autouse=True)
def no_service(address: str) -> Iterator[None]:
    """Each test has the service started by somebody else."""
    yield
    bootstrap.stop()
    assert settled(lambda: not left_over()), left_over()


def start_elsewhere(address: str, runtime_env: dict[str, Any], **environ: str) -> None:
    """Has the service started by a driver of its own, which then ends."""
    command = [sys.executable, "-c", DRIVER, address, json.dumps(runtime_env)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ})
    assert done.returncode == 0, done.stderr


def surroundings(actor: Any) -> dict[str, Any]:
    """What an actor runs in."""

    def look(_: Any) -> dict[str, Any]:  # by value: what an actor can import is the question
        import os
        import secrets

        import ray

        return {
            "runtime_env": dict(ray.get_runtime_context().runtime_env),
            "group": ray.util.get_current_placement_group(),
            "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "marks": sorted(name for name in os.environ if name.startswith("STARTER_")),
            "shadowed": hasattr(secrets, "shadow"),
        }

    found: dict[str, Any] = ray.get(actor.__ray_call__.remote(look))
    return found


CLEAN: dict[str, Any] = {"runtime_env": {}, "group": None, "devices": None, "marks": [], "shadowed": False}


def the_agent() -> Any:
    [node] = [row["NodeID"] for row in ray.nodes() if row["NodeName"] == "four" and row["Alive"]]
    return ray.get_actor(agent_name(node), namespace=NAMESPACE)


def inherits_nothing() -> None:
    """The service, and the node actor that it makes, are as if nobody in particular had started it."""
    service = placement.connect()
    result = ray.get(service.place.remote({"name": "pair", "model": "m", "gpus": 2}))
    assert result.assignments[0].gpus == [0, 1]
    assert [surroundings(actor) for actor in (service, the_agent())] == [CLEAN, CLEAN]
    ray.get(service.release.remote("pair"))


@pytest.mark.parametrize("devices", ["0", "0,1,2,3"])
def test_gpus_are_those_promised_whatever_the_starter_sees(address: str, devices: str) -> None:
    """Another user holds GPU 0. Two deployments of a driver without an environment, asked for by real workers."""
    start_elsewhere(address, {"env_vars": {"CUDA_VISIBLE_DEVICES": devices, "STARTER_MARK": "1"}})
    service = placement.connect()
    other = another_user("four")
    try:
        for name, gpus in (("one", [1]), ("two", [2])):
            result = ray.get(service.place.remote({"name": name, "model": "m"}))
            assert [one["got"]["gpus"] for one in gpus_seen_by_workers(result)] == [gpus]
            assert result.assignments[0].gpus == gpus
        ray.get(service.release_all.remote(), timeout=120)
    finally:
        other.leave()
    inherits_nothing()


def test_what_the_starters_own_process_has_is_not_the_services(address: str) -> None:
    start_elsewhere(
        address, {}, CUDA_VISIBLE_DEVICES="3", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="1", STARTER_MARK="1"
    )
    inherits_nothing()


@pytest.mark.parametrize("field", ["working_dir", "py_modules"])
def test_code_of_the_starter_is_not_the_services(address: str, field: str, tmp_path: Path) -> None:
    (tmp_path / "secrets.py").write_text("shadow = True\nfrom random import SystemRandom\n")
    start_elsewhere(address, {field: str(tmp_path) if field == "working_dir" else [str(tmp_path)]})
    inherits_nothing()


def test_a_ray_client_with_an_environment_may_start_it(ray_client: str) -> None:
    env = {"env_vars": {"CUDA_VISIBLE_DEVICES": "1", "STARTER_MARK": "1"}}
    start_elsewhere(ray_client, env)
    inherits_nothing()


@ray.remote(num_cpus=0)
class Starter:
    def start(self) -> None:
        placement.start()


def test_an_actor_with_an_environment_may_start_it(address: str) -> None:
    starter = Starter.options(
        runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": "1", "STARTER_MARK": "1"}}
    ).remote()
    ray.get(starter.start.remote())
    ray.kill(starter)
    inherits_nothing()


@pytest.mark.parametrize("runtime_env", [{}, {"env_vars": {"STARTER_MARK": "1"}}])
def test_it_starts_from_inside_a_placement_group_and_outlives_it(
    address: str, runtime_env: dict[str, Any]
) -> None:
    group = placement_group([{"CPU": 1}])
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    starter = Starter.options(scheduling_strategy=inside, runtime_env=runtime_env).remote()
    ray.get(starter.start.remote())
    remove_placement_group(group)
    inherits_nothing()


def test_actors_that_are_made_anew_inherit_nothing_either(address: str) -> None:
    start_elsewhere(address, {"env_vars": {"CUDA_VISIBLE_DEVICES": "0", "STARTER_MARK": "1"}})
    inherits_nothing()
    ray.kill(the_agent())
    ray.kill(placement.connect(), no_restart=False)
    inherits_nothing()


def test_a_starter_with_an_environment_finds_the_service_that_runs(address: str) -> None:
    running = placement.start()
    start_elsewhere(address, {"env_vars": {"STARTER_MARK": "1"}})
    assert placement.connect() == running
    inherits_nothing()
