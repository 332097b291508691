"""``placement.serve.replica_group``: a Serve replica makes its own group, and waits for room."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray

from deploy.kuberay import app as kuberay_app
from examples import serve_app
from placement.runtime.embedded import EmbeddedCluster
from placement.serve import replica_group
from tests.engines import serving
from tests.engines.serving import (
    NODES,
    QUICK,
    Replica,
    known,
    names_of_nodes,
    ranks_in,
    replicas,
    serve,
    serve_on,
    waiting,
)
from tests.integration.conftest import settled
from tests.integration.test_place import another_user

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, **QUICK)
class Own:
    """A replica that has no GPU itself; its workers are in its group."""

    async def __init__(self, version: str) -> None:  # type: ignore[misc]
        self.version = version
        self.ranks = ranks_in(await replica_group([{"GPU": 1}] * 2, within="nvlink"))
        self.where = await asyncio.gather(*(rank.where.remote() for rank in self.ranks))

    def __call__(self) -> Replica:
        nodes, gpus = zip(*self.where, strict=True)
        return Replica(os.getpid(), self.version, nodes, gpus)


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    with serve_on(NODES, {}) as running:
        yield running


@pytest.fixture
def neighbours(service: Any) -> Iterator[None]:
    """Other Ray users have GPU 0 of each node. After the test, nothing else is held, nor known to be."""
    with serving.neighbours():
        yield
    assert settled(lambda: not known()), known()


def run(version: str = "a", **options: Any) -> Any:
    return serving.run(Own, version, **options)


def places(found: set[Replica]) -> list[tuple[str, tuple[int, ...]]]:
    name = names_of_nodes()
    return sorted((name(one.nodes[0]), one.gpus) for one in found)


BOTH = [("pcie", (2, 3)), ("pcie-b", (2, 3))]


def test_scaling_up_and_down(neighbours: None) -> None:
    [first] = replicas(run(), 1, "a")
    assert first.gpus == (2, 3)
    [name] = known()
    assert name.startswith("app-Own-")
    assert places(replicas(run(num_replicas=2), 2, "a")) == BOTH
    replicas(run(num_replicas=1), 1, "a")
    assert settled(lambda: len(known()) == 1)


def test_a_replica_that_is_killed_frees_its_gpus_and_comes_back_on_the_best(neighbours: None) -> None:
    handle = run()
    [first] = replicas(handle, 1, "a")
    os.kill(first.pid, signal.SIGKILL)
    [second] = replicas(handle, 1, "a")
    assert second.pid != first.pid and second.gpus == (2, 3)
    assert settled(lambda: len(known()) == 1)


def test_a_rolling_update_without_room_waits_for_the_pairs_of_the_old_replicas(neighbours: None) -> None:
    assert places(replicas(run("a", num_replicas=2), 2, "a")) == BOTH
    assert places(replicas(run("b", num_replicas=2), 2, "b")) == BOTH


def test_it_waits_for_room_and_gets_the_best(neighbours: None) -> None:
    others = [another_user("pcie", 3), another_user("pcie-b", 3)]
    with ThreadPoolExecutor(1) as beside:
        handle = beside.submit(run)
        assert settled(lambda: waiting() == 1)
        assert str(serve.status().applications["app"].status) == "ApplicationStatus.DEPLOYING"
        ray.kill(others.pop())
        assert places(replicas(handle.result(120), 1, "a")) == BOTH[1:]
    ray.kill(others.pop())


def test_the_example_that_makes_its_own_group(neighbours: None) -> None:
    handle = serve.run(serve_app.own_group, name="app", route_prefix=None)
    assert handle.remote().result(timeout_s=120) == [2, 3]


def test_the_application_for_kuberay_places_its_workers_one_by_one(neighbours: None) -> None:
    handle = serve.run(kuberay_app.app, name="app", route_prefix=None)
    said = handle.remote(None).result(timeout_s=120)
    assert said["placed"] == said["workers"] == [2, 3]
