"""Shares of GPUs on real nodes, each verified from inside a worker, also while another Ray user comes and goes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

import placement
from placement import NodeAssignment
from placement.runtime.embedded import SimulatedNode
from placement.runtime.probing import another_user
from tests.integration.conftest import worker_at

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    zones = {"zone": "a"}, {"zone": "b"}, {"zone": "c"}
    return [
        SimulatedNode("pcie", topology="a100-pcie-4x", labels=zones[0]),
        SimulatedNode("l40s", topology="l40s-4x", labels=zones[1]),
        SimulatedNode("t4", topology="t4-4x", labels=zones[2]),
    ]


def seen(assignment: NodeAssignment) -> list[int]:
    """Which GPU a worker in the replica's bundle got."""
    return [int(gpu) for gpu in worker_at(assignment.actor_options(0)).gpus]


def place(
    service: Any, name: str, constraints: dict[str, Any] | None = None, **fields: Any
) -> list[NodeAssignment]:
    wanted = {"name": name, "model": "m", **fields}
    result = ray.get(service.place.remote(wanted, constraints))
    for assignment in result.assignments:
        assert seen(assignment) == assignment.gpus[:1]
    return result.assignments


PCIE = {"gpu_nodes": ["pcie"]}


def test_eight_quarters_are_packed_on_two_gpus_among_whole_ones(service: Any) -> None:
    neighbour = another_user("pcie")  # has GPU 0, one half of a bridge
    try:
        first = place(service, "first", PCIE, gpus=0.25)
        assert first[0].gpus == [1], "the other half of the bridge, which nobody can use for a pair"
        whole = place(service, "pair", PCIE, gpus=2)
        assert (whole[0].gpus, whole[0].weakest_link) == ([2, 3], "NV12")
        more = place(service, "more", PCIE, gpus=0.25, replicas=3)
        assert [a.gpus for a in more] == [[1], [1], [1]]
        ray.get(service.release.remote("pair"))
        rest = place(service, "rest", PCIE, gpus=0.25, replicas=4)
        assert [a.gpus for a in rest] == [[2]] * 4
        assert all(a.actor_options()["num_gpus"] == 0.25 for a in rest)
    finally:
        neighbour.leave()


def test_the_policy_fragmentation_steers_to_the_gpu_that_others_miss_least(service: Any) -> None:
    limits = {"gpu_nodes": ["t4"]}
    for name, share in (("small", 0.4), ("half", 0.5)):
        place(service, name, limits, gpus=share)
    [two, _] = place(service, "wide", limits, gpus=0.7, replicas=2)
    assert two.gpus == [1], "0.4 and 0.5 share GPU 0"
    # 0.3 is free on two GPUs, 0.1 on another. Ray and the plain policy take the smallest rest that is enough.
    fits = place(service, "fits", limits, gpus=0.3, policy="fragmentation")
    assert fits[0].gpus[0] in (1, 2)
    # No rest is enough: one more GPU is shared.
    more = place(service, "more", limits, gpus=0.5, policy="fragmentation")
    assert more[0].gpus == [3]
    # Of 0.5 and 0.3 that are free, the halves that stand want the one, nobody the other.
    last = place(service, "last", limits, gpus=0.2, policy="fragmentation")
    assert last[0].gpus != more[0].gpus
    for name in ("small", "half", "wide", "fits", "more", "last"):
        ray.get(service.release.remote(name))


@contextmanager
def churn(node: str) -> Iterator[None]:
    """Another Ray user takes a GPU on a node and frees it, over and over."""
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            another_user(node).leave()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_quarters_while_another_user_takes_and_frees_gpus(service: Any) -> None:
    with churn("pcie"):
        held: dict[tuple[str, int], float] = {}
        for step in range(6):
            for assignment in place(service, f"q{step}", PCIE, gpus=0.25):
                key = assignment.node, assignment.gpus[0]
                held[key] = held.get(key, 0.0) + assignment.share
        assert max(held.values()) <= 1
        status = ray.get(service.status.remote())
        assert {d["state"] for d in status["deployments"]} == {"placed"}


def test_memory_is_another_way_to_ask(service: Any) -> None:
    [assignment] = place(service, "small", PCIE, gpu_memory_gib=20)
    assert assignment.share == 0.25
    with pytest.raises(placement.NotEnoughGpus, match="the largest GPU has 80 GiB"):
        place(service, "large", None, gpu_memory_gib=100)


def test_a_spread_over_three_zones_with_a_maximum_of_one(service: Any) -> None:
    limits = {"spread": {"label": "zone", "max": 1}}
    replicas = place(service, "apart", limits, gpus=2, replicas=3)
    assert sorted(a.node_name for a in replicas) == ["l40s", "pcie", "t4"]
    with pytest.raises(placement.Unplaceable, match="every zone with room has 1 replica already"):
        ray.get(service.place.remote({"name": "too-many", "model": "m", "gpus": 1, "replicas": 4}, limits))


def test_a_spread_while_another_user_takes_and_frees_gpus_in_one_of_the_zones(service: Any) -> None:
    limits = {"spread": {"label": "zone", "max": 1}}
    with churn("t4"):
        for turn in range(3):
            replicas = place(service, f"apart{turn}", limits, gpus=2, replicas=3)
            assert sorted(a.node_name for a in replicas) == ["l40s", "pcie", "t4"]
            ray.get(service.release.remote(f"apart{turn}"))


@pytest.mark.parametrize(
    ("limits", "node"),
    [
        ({"accelerators": ["L40S"]}, "l40s"),
        ({"node_labels": {"zone": "!in(a, b)"}}, "t4"),
        ({"min_compute_capability": "8.9"}, "l40s"),
    ],
)
def test_constraints_choose_the_node(service: Any, limits: dict[str, Any], node: str) -> None:
    [assignment] = place(service, "one", limits, gpus=2)
    assert assignment.node_name == node


def test_cpus_and_memory_per_gpu_are_held_in_the_bundles(service: Any) -> None:
    limits = {"gpu_nodes": ["t4"], "cpus_per_gpu": 1, "memory_gib_per_gpu": 0.01}
    [assignment] = place(service, "cpu", limits, gpus=2)
    options = assignment.actor_options(1)
    assert (options["num_cpus"], options["memory"]) == (1, 10737418)
    with pytest.raises(placement.Unplaceable, match="has less than 1 CPU free"):
        ray.get(service.place.remote({"name": "cpu2", "model": "m", "gpus": 1}, limits))


def test_apart_and_near(service: Any) -> None:
    [first] = place(service, "first", {"gpu_nodes": ["l40s"]}, gpus=1)
    [near] = place(service, "near", {"near_to": ["first"]}, gpus=1)
    [apart] = place(service, "apart", {"apart_from": ["first"]}, gpus=1)
    assert near.node == first.node != apart.node
