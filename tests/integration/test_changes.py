"""Declarations that change on a real cluster: workers whose replica still satisfies them live on, and a file can be
applied when a node has died."""

from __future__ import annotations

import getpass
import os
import time
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from placement import Client, PlacementResult
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode
from tests.integration.conftest import settled

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode("hgx", topology="dgx-h100"),
        SimulatedNode("pcie-a", topology="a100-pcie-4x", resources={"egress": 8}),
        SimulatedNode("pcie-b", topology="a100-pcie-4x", resources={"egress": 8}),
    ]


@ray.remote
class Engine:
    """A worker; it lives as long as its replica."""

    def pid(self) -> int:
        return os.getpid()


def engines(result: PlacementResult) -> list[Any]:
    started = [Engine.options(**a.actor_options()).remote() for a in result.assignments]
    ray.get([engine.pid.remote() for engine in started])
    return started


def is_dead(engine: Any) -> bool:
    try:
        ray.get(engine.pid.remote())
    except RayActorError:
        return True
    return False


def groups(result: PlacementResult) -> dict[int, str]:
    return {a.replica_index: a.placement_group.id.hex() for a in result.assignments}


def events(service: Any, name: str) -> list[tuple[int | None, str, str]]:
    found = ray.get(service.events.remote(name))
    assert [one["number"] for one in found] == sorted({one["number"] for one in found})
    return [(one["replica"], one["state"], one["text"]) for one in found]


def test_workers_live_on_where_their_replica_satisfies_the_new_declaration(
    cluster: EmbeddedCluster, service: Any
) -> None:
    llama = {"name": "llama", "model": "m", "gpus": 4}
    placed = ray.get(service.apply.remote(llama))
    [engine] = engines(placed)
    pid = ray.get(engine.pid.remote())
    for change in (
        {"constraints": {"accelerators": ["H100"]}},
        {"min_bandwidth_gb_per_s": 100.0},
        {"tensor_parallel": 4},
        {"constraints": {}, "within": "nvlink"},
        {"model": "another", "budget": {"usd_per_day": 7.0}},
    ):
        [plan] = ray.get(service.plan_all.remote([{**llama, **change}]))
        result = ray.get(service.apply.remote({**llama, **change}))
        assert plan.standing and groups(result) == groups(placed), change
        assert ray.get(engine.pid.remote()) == pid
    assert (result.model, result.budget.usd_per_day) == ("another", 7.0)
    told = events(service, "llama")
    assert [state for _, state, _ in told] == ["placed"] + ["changed"] * 5
    assert told[-1][2] == "model, within, budget, constraints"

    client = Client(service)
    moved = client.apply({**llama, "constraints": {"accelerators": ["A100"]}})
    assert moved.assignments[0].node_name in ("pcie-a", "pcie-b")
    assert settled(lambda: is_dead(engine))

    assert client.apply({**llama, "constraints": {"accelerators": ["A100"]}}) == moved
    kept = [*client.history(["llama"])]
    decisions = [(one["call"], one["state"]) for one in kept if one["kind"] == "decision"]
    assert decisions == [("apply", "placed")] * 7, "the last one changed nothing"
    assert kept[-1]["caller"].items() >= {"pid": str(os.getpid()), "user": getpass.getuser()}.items()
    assert kept[-1]["caller"]["job"] == ray.get_runtime_context().get_job_id()
    assert kept[-1]["caller"]["address"] == cluster.address.split(":")[0]
    where = moved.assignments[0]
    assert f"replica 0 on {where.node_name} GPUs {where.gpus}" in kept[-1]["text"]


def test_who_watches_misses_nothing_while_the_service_is_killed(service: Any) -> None:
    """What happens right after a death is told, too, and nothing twice."""
    client = Client(service)
    for name in ("one", "two"):
        client.place({"name": name, "model": "m"})
    client.release("one")
    first = client.events("one")[0]["number"]
    known = client.watch(first - 1, ["one", "two"])
    assert [(event["deployment"], event["state"]) for event in known] == [
        ("one", "placed"),
        ("two", "placed"),
        ("one", "released"),
    ]
    time.sleep(1)
    ray.kill(service, no_restart=False)
    told, seen = list[Any](), known[0]["number"]
    while len(told) < 3:
        told += client.watch(seen, ["one", "two"])
        seen = told[-1]["number"] if told else seen
    assert told[:2] == known[1:]
    assert [(event["deployment"], event["state"]) for event in told[2:]] == [("two", "restarted")]
    client.release("two")


def test_of_several_replicas_only_those_move_that_must(service: Any) -> None:
    pair = {"name": "pair", "model": "m", "gpus": 4, "replicas": 3, "policy": "spread"}
    before = ray.get(service.apply.remote(pair))
    assert sorted(a.node_name for a in before.assignments) == ["hgx", "pcie-a", "pcie-b"]
    workers = engines(before)
    stays = [a.node_name != "pcie-b" for a in before.assignments]
    after = ray.get(service.apply.remote({**pair, "constraints": {"gpu_nodes": ["hgx", "pcie-a"]}}))
    assert sorted(a.node_name for a in after.assignments) == ["hgx", "hgx", "pcie-a"]
    assert [groups(before)[i] == groups(after)[i] for i in range(3)] == stays
    assert settled(lambda: [not is_dead(worker) for worker in workers] == stays)


def test_egress_that_is_replaced_in_its_place_is_not_called_refused(service: Any) -> None:
    remote = {"name": "gpt", "model": "gpt-4o", "replicas": 2}
    ray.get(service.apply.remote({**remote, "serving": {"max_concurrent": 5}}))
    ray.get(service.apply.remote({**remote, "serving": {"max_concurrent": 6}}))
    assert [state for _, state, _ in events(service, "gpt")] == [
        *["placed", "placed", "released", "released", "placed", "placed"],
        "changed",
    ]


def test_apart_holds_both_ways_and_in_any_order_of_a_file(service: Any) -> None:
    b = {"name": "b", "model": "m", "constraints": {"apart_from": ["a", "r"]}}
    a: dict[str, Any] = {
        "name": "a",
        "model": "m",
        "gpus": 4,
        "replicas": 2,
        "constraints": {"gpu_nodes": ["pcie-a", "pcie-b"]},
    }
    r = {"name": "r", "model": "gpt-4o", "constraints": {"egress_nodes": ["pcie-a", "pcie-b"]}}
    c: dict[str, Any] = {"name": "c", "model": "m", "constraints": {"near_to": ["b"]}}
    for file in ([c, b, a, r], [r, a, b, c]):
        planned = ray.get(service.plan_all.remote(file))
        results = ray.get(service.apply_all.remote(file))
        assert [one.deployment for one in results] == [one["name"] for one in file]
        where = {one.deployment: {x.node_name for x in one.assignments} for one in results}
        assert where == {one.deployment: {x.node_name for x in one.assignments} for one in planned}
        assert (where["b"], where["c"]) == ({"hgx"}, {"hgx"})
        ray.get(service.release_all.remote(), timeout=120)
    assert ray.get(service.place.remote(b)).assignments[0].node_name  # b stands first, and a keeps away
    beside = {x.node for x in ray.get(service.get.remote("b")).assignments}
    placed = ray.get(service.place.remote({"name": "a", "model": "m", "gpus": 2, "replicas": 2}))
    assert not beside & {x.node for x in placed.assignments}


def test_a_file_can_be_applied_when_a_node_has_died(cluster: EmbeddedCluster, service: Any) -> None:
    """The last test here: a node is gone then."""
    big = {
        "name": "big",
        "model": "m",
        "gpus": 4,
        "replicas": 2,
        "constraints": {"gpu_nodes": ["pcie-a", "pcie-b"]},
    }
    small = {"name": "small", "model": "m", "replicas": 3, "constraints": {"gpu_nodes": ["hgx"]}}
    placed = ray.get(service.apply_all.remote([big, small]))
    workers = dict(zip([a.node_name for a in placed[0].assignments], engines(placed[0]), strict=True))
    cluster.kill("pcie-b")
    assert settled(lambda: ray.get(service.get.remote("big")).pending)
    [lost] = ray.get(service.get.remote("big")).pending

    file = [{**big, "budget": {"usd_per_day": 1.0}}, {**small, "replicas": 1}]
    planned = ray.get(service.plan_all.remote(file))
    first, second = ray.get(service.apply_all.remote(file))
    assert [list(one.pending) for one in (*planned, first, second)] == [[lost], [], [lost], []]
    assert (first.budget.usd_per_day, len(first.assignments), len(second.assignments)) == (1.0, 1, 1)
    assert not is_dead(workers["pcie-a"])
    with pytest.raises(Exception, match="cannot place 'big'"):
        ray.get(
            service.apply_all.remote(
                [{**file[0], "replicas": 4, "constraints": {"gpu_nodes": ["pcie-a"]}}], atomic=True
            )
        )

    anywhere = ray.get(service.apply.remote({**file[0], "constraints": {"gpu_nodes": ["pcie-a", "hgx"]}}))
    assert (sorted(a.node_name for a in anywhere.assignments), anywhere.pending) == (["hgx", "pcie-a"], {})
    assert not is_dead(workers["pcie-a"])
    one = ray.get(
        service.apply.remote({**file[0], "replicas": 1, "constraints": {"gpu_nodes": ["hgx", "pcie-a"]}})
    )
    assert [a.replica_index for a in one.assignments] == [0]
