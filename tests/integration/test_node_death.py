"""Nodes that die or drain: what they held is placed anew elsewhere, or waits, and the others are not touched."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from placement.runtime.embedded import EmbeddedCluster, SimulatedNode
from tests.chaos import recovered
from tests.integration.conftest import left_over, settled
from tests.integration.test_place import ranks_gpus

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    gpu = [SimulatedNode(f"gpu-{name}", topology="a100-pcie-4x", labels={"rack": "r"}) for name in "abcd"]
    return [
        *gpu,
        SimulatedNode("out-a", resources={"egress": 8}),
        SimulatedNode("out-b", resources={"egress": 8}),
    ]


def kill(cluster: EmbeddedCluster, name: str, how: int = signal.SIGTERM) -> None:
    """Ends a node's raylet, and waits until Ray has noticed."""
    began = time.monotonic()
    cluster.kill(name, how)
    assert settled(lambda: name not in alive())
    if how == signal.SIGKILL:
        recovered("(Ray notices that a raylet was killed)", time.monotonic() - began)


def moved(fault: str, condition: Callable[[], bool]) -> None:
    """Waits until it holds, after a node was lost."""
    began = time.monotonic()
    assert settled(condition)
    recovered(fault, time.monotonic() - began)


def alive() -> set[str]:
    return {node["NodeName"] for node in ray.nodes() if node["Alive"]}


def places(service: Any, name: str) -> list[tuple[str, list[int]]]:
    """Node and GPUs of each assignment; a worker in each has confirmed them."""
    result = ray.get(service.get.remote(name))
    for assignment in result.assignments:
        if assignment.gpus:
            assert ranks_gpus(assignment) == assignment.gpus
    return [(a.node_name, a.gpus) for a in result.assignments]


def states(service: Any) -> dict[str, str]:
    return {one["name"]: one["state"] for one in ray.get(service.status.remote())["deployments"]}


@pytest.fixture
def watched(service: Any) -> Iterator[list[dict[str, Any]]]:
    """What a driver that waits for changes of ``pair`` hears."""
    heard: list[dict[str, Any]] = []
    stop = threading.Event()

    def listen() -> None:
        since = 0
        while not stop.is_set():
            for one in ray.get(service.watch.remote("pair", since, 1.0)):
                heard.append(one)
                since = one["number"]

    thread = threading.Thread(target=listen)
    thread.start()
    yield heard
    stop.set()
    thread.join()


def place(service: Any, name: str, nodes: list[str] | None = None, **fields: Any) -> None:
    constraints = {"constraints": {"gpu_nodes": nodes}} if nodes else {}
    ray.get(service.place.remote({"name": name, "model": "m", **fields, **constraints}))


def test_replicas_on_a_node_that_dies_are_placed_elsewhere_or_wait(
    cluster: EmbeddedCluster, service: Any, watched: list[dict[str, Any]]
) -> None:
    place(service, "pair", ["gpu-a", "gpu-b"], gpus=2, replicas=2)
    place(service, "bystander", ["gpu-b"], gpus=1)
    place(service, "shares", ["gpu-a", "gpu-c"], gpus=0.5, replicas=2)
    place(service, "remote", runtime="openai", serving={"max_concurrent": 4})
    before = places(service, "bystander")
    assert sorted(node for node, _ in places(service, "pair")) == ["gpu-a", "gpu-b"]
    seen = ray.get(service.events.remote("pair"))
    assert [(one["replica"], one["state"]) for one in seen] == [(0, "placed"), (1, "placed")]

    kill(cluster, "gpu-a", signal.SIGKILL)
    # gpu-b has one GPU left: the pair waits, and says so; the shares have room on gpu-c.
    moved("a GPU node dies", lambda: states(service) == {
        "pair": "pending", "bystander": "placed", "shares": "placed", "remote": "placed",
    })  # fmt: skip
    assert settled(lambda: "GPUs free" in str(ray.get(service.get.remote("pair")).pending))
    result = ray.get(service.get.remote("pair"))
    assert len(result.assignments) == 1
    [reason] = result.pending.values()
    assert "needs 2 GPUs free on one node" in reason
    assert {node for node, _ in places(service, "shares")} == {"gpu-c"}
    assert places(service, "bystander") == before

    ray.get(service.release.remote("bystander"))
    moved("room comes for what is pending", lambda: states(service)["pair"] == "placed")
    assert [node for node, _ in places(service, "pair")] == ["gpu-b", "gpu-b"]
    assert settled(lambda: len(watched) >= 5)
    lost = next(one["replica"] for one in watched if one["state"] == "lost")
    assert [one["state"] for one in watched if one["replica"] == lost] == [
        "placed",
        "lost",
        "pending",
        "placed",
    ]
    assert next(one["text"] for one in watched if one["state"] == "lost") == "node gpu-a died"


def test_a_replica_over_several_nodes_moves_whole(cluster: EmbeddedCluster, service: Any) -> None:
    place(service, "blocker", ["gpu-d"], gpus=1)
    place(service, "gang", tensor_parallel=4, pipeline_parallel=2)
    assert [node for node, _ in places(service, "gang")] == ["gpu-b", "gpu-c"]
    group = ray.get(service.get.remote("gang")).assignments[0].placement_group.id.hex()
    kill(cluster, "gpu-c")
    moved(
        "a node of a replica over several dies, and there is no room",
        lambda: ray.get(service.events.remote("gang"))[-1]["state"] == "pending",
    )
    assert states(service)["gang"] == "pending"
    # what was left of it on gpu-b is free again
    assert settled(lambda: ray.available_resources()["GPU"] == 7), left_over()
    ray.get(service.release.remote("blocker"))
    moved("room comes for what is pending", lambda: states(service)["gang"] == "placed")
    assert [node for node, _ in places(service, "gang")] == ["gpu-b", "gpu-d"]
    assert ray.get(service.get.remote("gang")).assignments[0].placement_group.id.hex() != group
    told = [one["state"] for one in ray.get(service.events.remote("gang")) if one["replica"] == 0]
    assert told == ["placed", "lost", "pending", "placed"]


def test_a_remote_replica_moves_to_another_egress_node(cluster: EmbeddedCluster, service: Any) -> None:
    place(service, "remote", runtime="openai", serving={"max_concurrent": 4}, replicas=2)
    assert sorted(node for node, _ in places(service, "remote")) == ["out-a", "out-b"]
    kill(cluster, "out-a")
    moved(
        "an egress node dies",
        lambda: states(service)["remote"] == "placed" and len(places(service, "remote")) == 2,
    )
    assert [node for node, _ in places(service, "remote")] == ["out-b", "out-b"]


def test_a_draining_node_gets_nothing_new(service: Any) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    [node] = [node for node in ray.nodes() if node["NodeName"] == "gpu-d" and node["Alive"]]
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    place(service, "before", ["gpu-d"], gpus=1)
    accepted, _ = client.drain_node(
        node["NodeID"],
        DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "a spot instance is taken back",
        int(time.time() * 1000) + 600_000,
    )
    assert accepted
    time.sleep(1.5)  # the service looks once a second
    place(service, "after", gpus=1)
    assert [node for node, _ in places(service, "after")] == ["gpu-b"]
    kept = ray.get(service.get.remote("before")).assignments  # Ray starts no more workers there
    assert [a.node_name for a in kept] == ["gpu-d"]
    with pytest.raises(Exception, match="is draining"):
        place(service, "only", ["gpu-d"], gpus=1)
