"""The head's GCS is killed and started again, then its whole machine is lost, with Ray's tables in a real Redis."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import ray
from ray.cluster_utils import Cluster

import placement
from placement.runtime.discovery import TOPOLOGY_LABEL
from placement.runtime.embedded import Network, free_port
from tests.chaos import recovered
from tests.integration.conftest import settled
from tests.integration.test_place import Worker, ranks_gpus

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]

SMALL = {"num_cpus": 2, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port("127.0.0.1")
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
def start_head(redis: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Cluster]]:
    """Starts a head, at the same address every time, and connects to it. All are stopped at the end."""
    changed = {
        "RAY_REDIS_ADDRESS": redis,
        "HOME": str(tmp_path_factory.mktemp("home")),
        # Nodes ask for the head again every second.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "60",
    }
    network = Network()
    port = free_port(f"{network.prefix}.2")

    with ExitStack() as stack:
        stack.callback(network.close)
        stack.enter_context(mock.patch.dict(os.environ, changed))

        def start() -> Cluster:
            running = Cluster()
            stack.callback(running.shutdown)
            running.add_node(
                node_ip_address=f"{network.prefix}.2",
                node_name="head",
                num_gpus=0,
                include_dashboard=False,
                gcs_server_port=port,
                **SMALL,
            )
            return running

        yield start
        ray.shutdown()


@pytest.fixture(scope="module")
def cluster(start_head: Callable[[], Cluster]) -> Cluster:
    """A head and two GPU nodes."""
    running = start_head()
    for number in (3, 4):
        running.add_node(
            node_ip_address=f"{host_of(running).rpartition('.')[0]}.{number}",
            node_name=f"gpu-{number}",
            num_gpus=4,
            labels={TOPOLOGY_LABEL: "a100-pcie-4x"},
            **SMALL,
        )
    running.wait_for_nodes()
    connect(running)
    return running


def host_of(cluster: Cluster) -> str:
    return str(cluster.address).split(":")[0]


def connect(cluster: Cluster) -> None:
    ray.init(address=cluster.address, _node_ip_address=host_of(cluster), log_to_driver=False)


def confirmed(result: Any) -> list[tuple[str, list[int]]]:
    for assignment in result.assignments:
        if assignment.gpus:
            assert ranks_gpus(assignment) == assignment.gpus
    return [(a.node_name, a.gpus) for a in result.assignments]


def test_what_stood_stands_after_the_gcs_has_come_back(cluster: Cluster) -> None:
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
    back = time.monotonic()

    assert settled(lambda: len([n for n in ray.nodes() if n["Alive"]]) == 3)
    service = placement.connect()
    for name, before in places.items():
        assert confirmed(ray.get(service.get.remote(name), timeout=60)) == before
    new = ray.get(service.place.remote({"name": "new", "model": "m", "gpus": 0.5}), timeout=60)
    assert confirmed(new)
    recovered("the GCS is killed and starts again", time.monotonic() - back)

    # The service itself dies, and finds all of it in the ledger.
    ray.kill(service, no_restart=False)
    assert confirmed(ray.get(service.get.remote("gang"), timeout=60)) == places["gang"]
    for name in ("pair", "gang", "new"):
        ray.get(service.release.remote(name), timeout=60)
    assert settled(lambda: ray.available_resources().get("GPU") == 8)


def test_what_stood_stands_after_the_heads_machine_is_lost(
    cluster: Cluster, start_head: Callable[[], Cluster]
) -> None:
    """All of the head's processes are killed, the service among them; a new head takes its address."""
    service = placement.connect()
    pair = ray.get(service.place.remote({"name": "pair", "model": "m", "gpus": 2}))
    gang = ray.get(
        service.place.remote({"name": "gang", "model": "m", "tensor_parallel": 2, "pipeline_parallel": 2})
    )
    places = {"pair": confirmed(pair), "gang": confirmed(gang)}
    served = {"name": "serving", "namespace": "user"}
    options = pair.assignments[0].actor_options()
    ray.get(Worker.options(lifetime="detached", **served, **options).remote().gpus.remote())
    kept = [*placement.Client().history()]
    time.sleep(1)  # what happened in the last second before a death may be missing
    ray.shutdown()

    for processes in cluster.head_node.all_processes.values():
        for process in processes:
            process.process.send_signal(signal.SIGKILL)
    time.sleep(2)
    new_head = start_head()
    back = time.monotonic()

    connect(new_head)
    assert settled(lambda: len([n for n in ray.nodes() if n["Alive"] and n["NodeName"] != "head"]) == 2)
    service = placement.connect()
    for name, before in places.items():
        assert [
            (a.node_name, a.gpus) for a in ray.get(service.get.remote(name), timeout=90).assignments
        ] == before
    worker = ray.get_actor(**served)
    assert ray.get(worker.gpus.remote(), timeout=60) == places["pair"][0][1][:1]  # it never stopped
    new = ray.get(service.place.remote({"name": "new", "model": "m", "gpus": 0.5}), timeout=60)
    assert confirmed(new)
    recovered("the head's machine is lost, and a new head starts", time.monotonic() - back)
    later = [*placement.Client().history()]
    assert later[: len(kept)] == kept and {"pair", "gang"} <= {one["deployment"] for one in kept}
    assert [one["state"] for one in later[len(kept) :] if one["kind"] == "service"] == ["started"]

    ray.kill(worker)
    for name in ("pair", "gang", "new"):
        ray.get(service.release.remote(name), timeout=60)
    assert settled(lambda: ray.available_resources().get("GPU") == 8)
