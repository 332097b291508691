"""The service on a cluster without a GPU node: what waits brings the right nodes, is placed exactly, and they go."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from tests.cloud.cloud import HEAD_ADDRESS, cloud
from tests.cloud.seen import coming, demanded, machines, open_groups
from tests.integration.conftest import settled
from tests.integration.test_place import ranks_gpus

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

DGX = {"name": "dgx", "model": "m", "gpus": 8, "within": "nvlink", "constraints": {"accelerators": ["H100"]}}
PAIR = {"name": "pair", "model": "m", "gpus": 2, "constraints": {"accelerators": ["L40S"]}}
NEVER = {"name": "never", "model": "m", "gpus": 2, "constraints": {"accelerators": ["B200"]}}


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    with tempfile.TemporaryDirectory(prefix="placement-") as folder, cloud(Path(folder)) as address:
        ray.init(address, _node_ip_address=HEAD_ADDRESS, log_to_driver=False, logging_level="ERROR")
        try:
            yield placement.start(idle_seconds=2.0)
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def nothing_left(service: Any) -> Iterator[None]:
    yield
    ray.get(service.release_all.remote())
    assert settled(lambda: not open_groups() and not demanded()), open_groups()
    assert settled(lambda: not machines() and not coming(), 90), (machines(), coming())


def status(service: Any) -> dict[str, Any]:
    return ray.get(service.status.remote(), timeout=60)


def asked(service: Any) -> dict[str, str]:
    """Deployment -> what became of what it asks of the autoscaler."""
    return {row["deployment"]: row["state"] for row in status(service)["demand"]}


def test_two_deployments_bring_a_node_each_and_have_their_gpus(service: Any) -> None:
    for one in (DGX, PAIR):
        result = ray.get(service.apply.remote(one))
        assert ([], [0]) == (result.assignments, list(result.pending))
    types = {}
    for one, gpus in ((DGX, 8), (PAIR, 2)):
        result = ray.get(service.wait.remote(one["name"], 120.0), timeout=150)
        (assignment,) = result.assignments
        assert gpus == len(assignment.gpus)
        assert assignment.gpus == ranks_gpus(assignment)
        types[assignment.node] = one["name"]
    names = {"gpu8": "dgx", "gpu4": "pair"}
    assert types == {node: names[kind] for node, kind in machines().items()}, "nothing more has come"
    assert {} == asked(service)
    assert [] == coming()


def test_what_is_released_while_it_waits_is_no_longer_asked_for(service: Any) -> None:
    ray.get(service.apply.remote(NEVER))
    assert settled(lambda: asked(service) == {"never": "asked"} and demanded() == 1, 30), status(service)[
        "demand"
    ]
    ray.get(service.release.remote("never"))
    assert settled(lambda: demanded() == 0 and not open_groups()), open_groups()
    assert {} == asked(service)


def test_what_no_node_type_can_hold_is_told_as_the_reason(service: Any) -> None:
    ray.get(service.apply.remote({"name": "vast", "model": "m", "gpus": 16, "tensor_parallel": 16}))
    assert settled(lambda: asked(service) == {"vast": "infeasible"}, 30), status(service)["demand"]
    assert {} == open_groups()

    def reason() -> str:
        (one,) = status(service)["deployments"]
        return one["replicas"][0]["reason"]

    assert settled(lambda: "or its maximum is reached" in reason(), 30), reason()


def test_a_service_that_is_killed_asks_for_nothing_and_asks_anew_when_it_is_back(service: Any) -> None:
    ray.get(service.apply.remote(NEVER))
    assert settled(lambda: demanded() == 1, 30), status(service)["demand"]
    (before,) = open_groups()
    os.kill(ray.get(service.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
    assert settled(lambda: before not in open_groups())
    assert settled(lambda: len(open_groups()) == demanded() == 1, 60), open_groups()
    assert before not in open_groups()
