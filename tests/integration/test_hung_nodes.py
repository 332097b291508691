"""A node's actor is stopped: what needs that node waits or leaves, nothing else does, and it is all put right after."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

import placement
from placement.runtime.agents import UNREACHABLE_SECONDS
from placement.runtime.connection import NAMESPACE
from placement.runtime.embedded import SimulatedNode
from placement.runtime.node_agent import agent_name
from tests.integration.conftest import left_over, settled
from tests.integration.test_place import node_id, ranks_gpus

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

REFUSED = placement.Unplaceable, placement.ReservationFailed


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode(name, topology="a100-pcie-4x") for name in "abc"]


@pytest.fixture
def warm(service: Any) -> None:
    """Every node's actor, and its probe, has answered before."""
    for name in "abc":
        place(service, f"warm-{name}", name)
        ray.get(service.release.remote(f"warm-{name}"))


def asked(service: Any, name: str, *nodes: str, gpus: int = 1, replicas: int = 1) -> Any:
    limits = {"constraints": {"gpu_nodes": list(nodes)}} if nodes else {}
    return service.place.remote({"name": name, "model": "m", "gpus": gpus, "replicas": replicas, **limits})


def place(service: Any, name: str, *nodes: str, **wanted: int) -> list[str]:
    """Places it and returns the nodes; a worker in each replica has confirmed its GPUs."""
    result = ray.get(asked(service, name, *nodes, **wanted))
    assert [ranks_gpus(a) for a in result.assignments] == [a.gpus for a in result.assignments]
    return [a.node_name for a in result.assignments]


def is_open(*calls: Any) -> bool:
    """Whether none of them has been answered yet."""
    return not ray.wait(list(calls), timeout=0)[0]


@contextmanager
def stopped(name: str) -> Iterator[Callable[[], None]]:
    """Stops a node's actor with SIGSTOP; it goes on when told so, and at the end."""
    actor = ray.get_actor(agent_name(node_id(name)), namespace=NAMESPACE)
    process = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
    os.kill(process, signal.SIGSTOP)

    def go_on() -> None:
        os.kill(process, signal.SIGCONT)

    try:
        yield go_on
    finally:
        go_on()


def free_on(name: str) -> float:
    available: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return available.get(node_id(name), {}).get("GPU", 0.0)


def test_what_does_not_need_a_node_that_hangs_goes_on_and_nothing_is_left_over_after(
    service: Any, warm: None
) -> None:
    place(service, "on-b", "b")
    assert sorted(place(service, "both", "a", "b", gpus=3, replicas=2)) == ["a", "b"]
    with stopped("a") as go_on:
        began = time.monotonic()
        stuck = asked(service, "stuck", "a")
        behind = [asked(service, f"behind-{i}", "a") for i in range(3)]
        # As long as nobody knows that it hangs, others may come there, too; they leave for another node.
        assert place(service, "elsewhere") != ["a"]
        for attempt in range(3):
            assert place(service, f"at-once-{attempt}", "c") == ["c"]
        ray.get(service.status.remote())
        assert ray.get(service.release.remote("on-b")) == 1
        # It needs that node's actor only to spare others a disturbance.
        assert ray.get(service.release.remote("both")) == 2
        if time.monotonic() - began < UNREACHABLE_SECONDS:  # on a machine that is overrun it may take longer
            assert is_open(stuck), "all of that was done while the first one waited"
        for call in (stuck, *behind):
            with pytest.raises(REFUSED):
                ray.get(call, timeout=120)
        assert settled(lambda: free_on("a") == 4)
        go_on()
        # What it was asked for it may do now. Nobody waits for it: it is found, and removed.
        names = {d["name"] for d in ray.get(service.status.remote())["deployments"]}
        assert names == {"elsewhere", *(f"at-once-{attempt}" for attempt in range(3))}
    ray.get(service.release_all.remote(), timeout=120)
    assert settled(lambda: not left_over()), left_over()
    assert place(service, "whole", "a", gpus=4) == ["a"]
    assert place(service, "pair", "b", gpus=2) == ["b"]


def test_what_waits_for_a_node_that_only_paused_is_placed_there(service: Any, warm: None) -> None:
    with stopped("a") as go_on:
        stuck = asked(service, "stuck", "a", gpus=2)
        assert place(service, "other", "c") == ["c"]
        assert is_open(stuck)
        go_on()
        assert [a.node_name for a in ray.get(stuck).assignments] == ["a"]
    assert place(service, "rest", "a", gpus=2) == ["a"]


def test_a_release_finds_out_that_a_node_hangs_and_does_without_it(service: Any, warm: None) -> None:
    place(service, "on-a", "a", gpus=2)
    place(service, "on-b", "b", gpus=2)
    with stopped("a"):
        stuck = service.release.remote("on-a")
        assert ray.get(service.release.remote("on-b")) == 1
        assert place(service, "next", "b", gpus=4) == ["b"]
        assert is_open(stuck)
        assert ray.get(stuck) == 1
        assert settled(lambda: free_on("a") == 4)
    assert place(service, "again", "a", gpus=4) == ["a"]
