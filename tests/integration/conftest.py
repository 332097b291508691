"""Real clusters of simulated nodes, one for each module, and what must hold when it ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from filelock import FileLock
from ray.util.placement_group import placement_group_table

from placement.runtime.embedded import EmbeddedCluster, SimulatedNode, embedded_cluster, free_port

pytestmark = pytest.mark.integration


def settled(condition: Callable[[], Any], seconds: float = 60.0) -> bool:
    """Whether the condition comes true. Ray's books follow the truth by up to 0.1 s and workers take time to die; on a
    machine that others keep busy all of it takes many times as long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def left_over() -> dict[str, Any]:
    """What is not free, and which groups are not removed; empty when all is given back."""
    total, free = ray.cluster_resources(), ray.available_resources()
    watched = [name for name in total if name == "GPU" or name == "egress" or name.startswith("egress_")]
    short = {
        name: (total[name], free.get(name, 0.0)) for name in watched if free.get(name, 0.0) != total[name]
    }
    groups = {gid: row["state"] for gid, row in placement_group_table().items() if row["state"] != "REMOVED"}
    return short | groups


class Worker(NamedTuple):
    """What a worker says: on which node it is, its GPUs as Ray names them, and what CUDA will see."""

    node: str
    gpus: list[str]
    visible: str | None


# Ray otherwise ends the process after a task that had a GPU, and starts another, which takes a second.
@ray.remote(max_calls=0)
def _worker() -> Worker:
    context = ray.get_runtime_context()
    gpus = [str(gpu) for gpu in context.get_accelerator_ids()["GPU"]]
    return Worker(context.get_node_id(), gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def worker_at(options: dict[str, Any]) -> Worker:
    """What a worker says that is started with these options, as a placement gives them.

    One process serves several, one after the other: each takes another bundle, and gets the GPUs of that.
    """
    return Worker(*ray.get(_worker.options(**options).remote()))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder; a file in it is the name of a point at which the process that comes there ends."""
    folder = tmp_path_factory.mktemp("faults")
    os.environ["PLACEMENT_FAULTS"] = str(folder)
    yield folder
    del os.environ["PLACEMENT_FAULTS"]


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    """Which nodes a module's cluster has; modules override it."""
    return [
        SimulatedNode("dgx", topology="dgx-1v"),
        SimulatedNode("pcie", topology="a100-pcie-4x"),
        SimulatedNode("egress-a", resources={"egress_openai": 32, "egress_anthropic": 16}),
        SimulatedNode("egress-b", resources={"egress": 32}),
    ]


@pytest.fixture(scope="module")
def cluster(cluster_nodes: list[SimulatedNode]) -> Iterator[EmbeddedCluster]:
    """A cluster with this process as a driver on its head."""
    with embedded_cluster(cluster_nodes) as running:
        yield running


@pytest.fixture(scope="module")
def address(cluster: EmbeddedCluster) -> str:
    """Its address."""
    return cluster.address


@pytest.fixture(scope="module")
def service(address: str) -> Iterator[Any]:
    """The running service. At the end everything must be free again."""
    import placement

    handle = placement.start()
    yield handle
    ray.get(handle.release_all.remote(), timeout=120)
    assert settled(lambda: not left_over()), left_over()


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the service every GPU and every egress unit is free, and no group is left."""
    yield
    if "service" in request.fixturenames:
        handle = request.getfixturevalue("service")
        ray.get(handle.release_all.remote(), timeout=120)
        assert settled(lambda: not left_over()), left_over()


@pytest.fixture
def ray_client(cluster: EmbeddedCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The cluster's address for Ray's client, ``ray://``, which is started at first; one test at a time has one.

    Ray seeks a free port from 23000 up for the process that stands for a client, and that process takes it seconds
    later: two clusters beside each other would choose the same, and one of the clients would be told that it failed.
    """
    head = cluster._cluster.head_node
    host = cluster.address.split(":")[0]
    beside = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else None
    with FileLock((beside or tmp_path_factory.getbasetemp()) / "ray-client.lock", timeout=240):
        if head._ray_params.ray_client_server_port is None:
            head._ray_params.ray_client_server_port = free_port(host)
            head.start_ray_client_server()
        port = head._ray_params.ray_client_server_port
        assert settled(lambda: is_listening(host, port))
        yield f"ray://{host}:{port}"


def is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def session_files(address: str) -> Callable[[], list[Path]]:
    """Every file of this cluster's session folder, logs included."""
    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    return lambda: [path for path in folder.rglob("*") if path.is_file()]
