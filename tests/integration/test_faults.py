"""The service and the node actors are killed at every step of a reservation: all of it is placed, or nothing at all."""

from __future__ import annotations

import os
import time
from pathlib import Path
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
    return [
        SimulatedNode("pcie", topology="a100-pcie-4x", labels={"rack": "r"}),
        SimulatedNode("pcie-b", topology="a100-pcie-4x", labels={"rack": "r"}),
        SimulatedNode("egress", resources={"egress": 8}),
    ]


@pytest.fixture(scope="module")
def cluster(faults: Path, cluster: EmbeddedCluster) -> EmbeddedCluster:
    """The cluster, started with the variable set."""
    return cluster


PAIR = {"gpus": 2, "constraints": {"gpu_nodes": ["pcie"]}}
SHARE = {"gpus": 0.25, "constraints": {"gpu_nodes": ["pcie"]}}
GANG = {"tensor_parallel": 4, "pipeline_parallel": 2}
REMOTE = {"model": "gpt-4o", "serving": {"max_concurrent": 3}}

SERVICE = ("service.planned", "service.reserved", "service.kept")
NODE = ("agent.steered", "agent.created")
STEPS: list[Any] = [
    *((PAIR, step) for step in (*SERVICE, "service.ordered", *NODE, "agent.verified")),
    *((SHARE, step) for step in (*SERVICE, "service.ordered", *NODE)),
    *(
        (GANG, f"service.{step}")
        for step in ("planned", "prepared", "group_created", "confirmed", "reserved", "kept")
    ),
    *((GANG, f"agent.{step}") for step in ("prepared", "confirmed")),
    *((REMOTE, step) for step in (*SERVICE, "service.egress_created")),
]


@pytest.mark.parametrize(("wanted", "step"), STEPS, ids=[f"{next(iter(w))}-{s}" for w, s in STEPS])
def test_killed_at_a_step_it_is_placed_and_recorded_all_the_same(
    service: Any, faults: Path, wanted: dict[str, Any], step: str
) -> None:
    (faults / step).touch()
    declared = {"name": "cut", "model": "m", **wanted}
    call = service.place.remote(declared)
    assert settled(lambda: not (faults / step).exists()), "nobody came there"
    died = time.monotonic()
    result = ray.get(call, timeout=60)
    took = time.monotonic() - died
    assert sorted({a.replica_index for a in result.assignments}) == [0]
    for assignment in result.assignments:
        if assignment.gpus:
            assert ranks_gpus(assignment) == assignment.gpus
    assert ray.get(service.get.remote("cut")).to_dict() == result.to_dict()
    # and nothing else is held
    held = sum(a.share * len(a.gpus) for a in result.assignments)
    total = ray.cluster_resources()["GPU"]
    assert settled(lambda: abs(ray.available_resources().get("GPU", 0.0) - (total - held)) < 1e-6), (
        left_over()
    )
    recovered(
        f"the {'service' if step.startswith('service') else 'node actor'} is killed while placing", took
    )
    assert ray.get(service.release.remote("cut")) == 1


@pytest.mark.parametrize("step", ["service.releasing", "service.given_back", "service.ended"])
def test_a_release_that_is_cut_off_is_brought_to_its_end(service: Any, faults: Path, step: str) -> None:
    ray.get(service.place.remote({"name": "cut", "model": "m", **PAIR}))
    (faults / step).touch()
    call = service.release.remote("cut")
    assert settled(lambda: not (faults / step).exists()), "nobody came there"
    died = time.monotonic()
    assert ray.get(call, timeout=60) == 1
    recovered("the service is killed while releasing", time.monotonic() - died)
    assert settled(lambda: not left_over()), left_over()
    assert ray.get(service.status.remote())["deployments"] == []


@pytest.mark.parametrize(
    ("before", "after"),
    [({"gpus": 2, "replicas": 2}, {"gpus": 2, "replicas": 1}), ({"gpus": 4}, {"gpus": 2})],
    ids=["fewer replicas", "another shape in the same place"],
)
def test_an_apply_that_is_cut_off_after_giving_back_is_brought_to_its_end(
    service: Any, faults: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    step = "service.given_back"
    there = {"model": "m", "constraints": {"gpu_nodes": ["pcie"]}}
    ray.get(service.place.remote({"name": "cut", **there, **before}))
    (faults / step).touch()
    call = service.apply.remote({"name": "cut", **there, **after})
    assert settled(lambda: not (faults / step).exists()), "nobody came there"
    died = time.monotonic()
    result = ray.get(call, timeout=60)
    recovered("the service is killed while applying a change", time.monotonic() - died)
    assert [(a.replica_index, len(a.gpus)) for a in result.assignments] == [(0, 2)]
    # What was given back can be had.
    rest = ray.get(service.place.remote({"name": "rest", "gpus": 2, **there}))
    assert sorted(gpu for one in (result, rest) for a in one.assignments for gpu in a.gpus) == [0, 1, 2, 3]
    for name in ("cut", "rest"):
        ray.get(service.release.remote(name))


@pytest.mark.parametrize("step", ["service.ordered", "service.group_created", "agent.created"])
def test_what_nobody_asks_for_again_leaves_nothing_behind(service: Any, faults: Path, step: str) -> None:
    """The caller dies with the service: nobody sends the call again."""
    (faults / step).touch()

    @ray.remote(num_cpus=0, max_calls=1, max_retries=0)
    def caller(wanted: dict[str, Any]) -> None:
        import placement

        placement.connect().place.remote(wanted)
        deadline = time.monotonic() + 20
        while (faults / step).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os._exit(1)

    wanted = GANG if step == "service.group_created" else PAIR
    with pytest.raises(ray.exceptions.RayError):
        ray.get(caller.remote({"name": "orphan", "model": "m", **wanted}))
    assert not (faults / step).exists()

    def whole() -> bool:
        """Either it was placed and recorded after all, or nothing of it is there."""
        standing = {d["name"]: d["state"] for d in ray.get(service.status.remote())["deployments"]}
        return standing == {"orphan": "placed"} if standing else not left_over()

    died = time.monotonic()
    assert settled(whole), left_over()
    recovered("the caller dies with the service or node actor", time.monotonic() - died)
    if ray.get(service.status.remote())["deployments"]:
        ray.get(service.release.remote("orphan"))


def test_the_ledger_is_what_stands_after_a_restart(service: Any, faults: Path) -> None:
    before = {}
    for name, wanted in (("pair", PAIR), ("share", SHARE), ("remote", REMOTE)):
        before[name] = ray.get(service.place.remote({"name": name, "model": "m", **wanted})).to_dict()
    ray.kill(service, no_restart=False)
    after = {name: ray.get(service.get.remote(name), timeout=60).to_dict() for name in before}
    assert before == after
