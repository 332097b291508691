"""``placement.serve.install`` where there is no room for long, or the service hangs or is gone: replicas start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray

import placement
from placement import Client, ServiceNotRunning
from placement.runtime.embedded import EmbeddedCluster
from tests.engines import serving
from tests.engines.serving import (
    INSTALL,
    NODES,
    Unchanged,
    controllers_log,
    groups_of_serve,
    known,
    replicas,
    serve,
    serve_on,
)
from tests.integration.conftest import settled
from tests.integration.test_place import another_user

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    by_serves_own_configuration = {
        "runtime_env": {"env_vars": INSTALL | {"PLACEMENT_SERVE_WAIT_SECONDS": "2"}}
    }
    with serve_on(NODES, {}, controller_options=by_serves_own_configuration) as running:
        yield running


@pytest.fixture
def neighbours(cluster: EmbeddedCluster) -> Iterator[None]:
    """Other Ray users have GPU 0 of each node. After the test, nothing else is held."""
    with serving.neighbours():
        yield


def gpus_of_a_new_replica() -> tuple[int, ...]:
    handle = serve.run(Unchanged.bind("a"), name="app", route_prefix=None)
    [replica] = replicas(handle, 1, "a")
    return replica.gpus


def test_without_room_for_long_the_group_pends_as_rays_own_with_one_warning(neighbours: None) -> None:
    others = [another_user("pcie", 3), another_user("pcie-b", 3)]
    with ThreadPoolExecutor(1) as beside:
        gpus = beside.submit(gpus_of_a_new_replica)
        assert settled(lambda: list(groups_of_serve().values()) == ["PENDING"])
        assert known() == []
        ray.kill(others.pop())
        assert gpus.result(120) == (1, 2), "Ray's choice"
    assert settled(lambda: Client().status()["totals"]["other"] == 2 + 3 + 2), "with the replica's"
    assert controllers_log().count("Ray's own, on whatever GPUs Ray gives") == 1
    ray.kill(others.pop())


def test_a_service_that_hangs_is_not_waited_for_and_used_again_once_it_answers(neighbours: None) -> None:
    service = placement.start()  # install() has it started as well
    pid = ray.get(service.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        assert gpus_of_a_new_replica() == (1, 2), "Ray's choice"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (
        "has not answered within 5 s: for placement group SERVE_REPLICA::app#Unchanged#" in controllers_log()
    )
    assert settled(lambda: Client().status()["deployments"] == [])

    def is_exact_again() -> bool:
        serve.delete("app")
        return gpus_of_a_new_replica() == (2, 3)

    assert settled(is_exact_again, 240)


def test_without_a_service_the_replica_starts_and_the_warning_names_the_fix(neighbours: None) -> None:
    service = placement.start()
    ray.get(service.stop_agents.remote())
    ray.kill(service, no_restart=True)

    def is_gone() -> bool:
        try:
            placement.connect()
        except ServiceNotRunning:
            return True
        return False

    assert settled(is_gone)
    assert gpus_of_a_new_replica() == (1, 2), "Ray's choice"
    assert "start it with `placement up`" in controllers_log()
    assert "once it finds room: no placement service" in controllers_log()
