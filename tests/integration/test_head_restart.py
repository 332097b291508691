"""The head's GCS and its raylet are killed and started again, with their tables in a real Redis."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import placement
from placement.runtime.discovery import TOPOLOGY_LABEL
from tests.integration.conftest import settled
from tests.integration.test_place import ranks_gpus

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]

SMALL = {"num_cpus": 2, "object_store_memory": 80_000_000}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--save",
        "",
        "--appendonly",
        "no",
    ]
    server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
    try:
        assert settled(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture(scope="module")
def cluster(redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    changed = {
        "RAY_REDIS_ADDRESS": redis,
        "HOME": str(tmp_path_factory.mktemp("home")),
        # Nodes ask for the head again every second.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "60",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    running = Cluster()
    try:
        running.add_node(
            node_ip_address="127.0.0.2", node_name="head", num_gpus=0, include_dashboard=False, **SMALL
        )
        for number in (3, 4):
            running.add_node(
                node_ip_address=f"127.0.0.{number}",
                node_name=f"gpu-{number}",
                num_gpus=4,
                labels={TOPOLOGY_LABEL: "a100-pcie-4x"},
                **SMALL,
            )
        running.wait_for_nodes()
        ray.init(address=running.address, _node_ip_address="127.0.0.2", log_to_driver=False)
        yield running
    finally:
        ray.shutdown()
        running.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def confirmed(result: Any) -> list[tuple[str, list[int]]]:
    for assignment in result.assignments:
        if assignment.gpus:
            assert ranks_gpus(assignment) == assignment.gpus
    return [(a.node_name, a.gpus) for a in result.assignments]


def test_what_stood_stands_after_the_head_has_come_back(cluster: Cluster, tmp_path: Path) -> None:
    service = placement.start()
    pair = ray.get(service.place.remote({"name": "pair", "model": "m", "gpus": 2}))
    gang = ray.get(
        service.place.remote({"name": "gang", "model": "m", "tensor_parallel": 2, "pipeline_parallel": 2})
    )
    places = {"pair": confirmed(pair), "gang": confirmed(gang)}

    head = cluster.head_node
    head.kill_gcs_server()
    time.sleep(2)
    head.start_gcs_server()

    assert settled(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 3, 60)
    service = placement.connect()
    for name, before in places.items():
        assert confirmed(ray.get(service.get.remote(name), timeout=60)) == before
    new = ray.get(service.place.remote({"name": "new", "model": "m", "gpus": 0.5}), timeout=60)
    assert confirmed(new)

    # The service itself dies, and finds all of it in the ledger.
    ray.kill(service, no_restart=False)
    assert confirmed(ray.get(service.get.remote("gang"), timeout=60)) == places["gang"]
    for name in ("pair", "gang", "new"):
        ray.get(service.release.remote(name), timeout=60)
    assert settled(lambda: ray.available_resources().get("GPU") == 8, 20)
