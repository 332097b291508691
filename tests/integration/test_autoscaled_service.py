"""The service on a cluster without a GPU node: what waits brings the right nodes, is placed exactly, and they go."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from tests.cloud.cloud import cloud, host_of
from tests.cloud.seen import coming, demanded, machines, open_groups
from tests.integration.conftest import settled
from tests.integration.test_place import ranks_gpus

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

DGX = {"name": "dgx", "model": "m", "gpus": 8, "within": "nvlink", "replicas": 2}
L40S = {"name": "l40s", "model": "m", "gpus": 4, "constraints": {"accelerators": ["L40S"]}}
PAIR = {"name": "pair", "model": "m", "gpus": 2, "constraints": {"accelerators": ["L40S"]}}
NEVER = {"name": "never", "model": "m", "gpus": 2, "constraints": {"accelerators": ["B200"]}}


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    # On a busy machine a placement takes some seconds, in which nobody uses the new node.
    with (
        tempfile.TemporaryDirectory(prefix="placement-") as folder,
        cloud(Path(folder), idle_seconds=12.0) as address,
    ):
        ray.init(address, _node_ip_address=host_of(address), log_to_driver=False, logging_level="ERROR")
        try:
            yield placement.start(idle_seconds=1.0, node_types=Path(folder) / "cluster.yaml")
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def nothing_left(service: Any) -> Iterator[None]:
    yield
    ray.get(service.release_all.remote(), timeout=120)
    assert settled(lambda: not open_groups() and not demanded()), open_groups()
    assert settled(lambda: not machines() and not coming(), 90), (machines(), coming())


def status(service: Any) -> dict[str, Any]:
    return ray.get(service.status.remote(), timeout=60)


def asked(service: Any) -> dict[str, str]:
    """Deployment -> what became of what it asks of the autoscaler."""
    return {row["deployment"]: row["state"] for row in status(service)["demand"]}


def reason(service: Any, name: str, replica: int = 0) -> str:
    """Why a replica waits."""
    return ray.get(service.get.remote(name)).pending.get(replica, "")


def most_complaints() -> int:
    """How often the autoscaler has said on the console of every driver that nothing can hold one and the same group.

    It does in each of its rounds, here each second, until the group is withdrawn.
    """
    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    said = (folder / "logs" / "events" / "event_AUTOSCALER.log").read_text()
    return max(Counter(re.findall(r"No available node types .*?detail=(\w+)", said)).values())


def test_from_no_gpu_node_the_right_nodes_come_and_the_exact_gpus_are_placed(service: Any) -> None:
    """Of the first type there is one node at most."""
    for one in (DGX, L40S):
        result = ray.get(service.apply.remote(one))
        assert [] == result.assignments
        assert f"; autoscaler: asked for a node with {one['gpus']} GPUs" in result.pending[0]
    assert "ray.io/accelerator-type" in result.pending[0]
    placed = {}

    def all_placed() -> bool:
        found = [a for name in ("dgx", "l40s") for a in ray.get(service.get.remote(name)).assignments]
        placed.update({a.node: a for a in found})
        return len(placed) == 2

    assert settled(all_placed, 120), status(service)["demand"]
    for assignment in placed.values():
        assert assignment.gpus == ranks_gpus(assignment)
    types = machines()
    assert {"gpu8": 8, "gpu4": 4} == {types[node]: len(one.gpus) for node, one in placed.items()}
    assert 2 == len(types), "nothing more has come"
    (left,) = ray.get(service.get.remote("dgx")).pending
    assert settled(lambda: "its maximum is reached" in reason(service, "dgx", left)), reason(
        service, "dgx", left
    )
    (row,) = status(service)["demand"]
    assert ("dgx", left, "infeasible", "a node with 8 GPUs") == (
        row["deployment"], row["replica"], row["state"], row["asked"],
    )  # fmt: skip
    assert settled(lambda: not demanded()), "it is withdrawn"
    assert {} == {name: state for name, state in open_groups().items() if state == "PENDING"}
    assert most_complaints() <= 3
    assert [] == coming()


def test_a_call_that_waits_brings_its_nodes_and_a_group_one_for_all_that_its_floor_binds(
    service: Any,
) -> None:
    others = {**L40S, "gpus": 3, "replicas": 2}
    placed = ray.get(service.place.remote(others, wait_seconds=100.0), timeout=120).assignments
    assert dict.fromkeys((a.node for a in placed), "gpu4") == machines()
    assert [a.gpus for a in placed] == [ranks_gpus(a) for a in placed]
    assert settled(lambda: not asked(service))
    # One GPU is left on each, and the two of the group are to be on one node.
    of_either = placement.PlacementConstraints(accelerators=("L40S", "H100"))
    link = placement.GroupLink(between=("p", "d"), via="pcie", within="node")
    group = placement.Group(name="pd", members={"p": 1, "d": 1}, links=[link])
    wanted = group.of([placement.Deployment(name=n, model="m", constraints=of_either) for n in "pd"])
    for result in ray.get(service.apply_all.remote(wanted)):
        assert "asks for within = 'node'" in result.pending[0]
        assert (
            "; autoscaler: asked for a node with 2 GPUs and ray.io/accelerator-type in(" in result.pending[0]
        )
        assert result.pending[0].endswith(" for replicas of 'pd' that talk")
    assert settled(lambda: not reason(service, "p") and not reason(service, "d"), 120), status(service)[
        "demand"
    ]
    parts = [a for name in "pd" for a in ray.get(service.get.remote(name)).assignments]
    assert ["gpu8"] == [machines()[node] for node in {part.node for part in parts}]
    assert [part.gpus for part in parts] == [ranks_gpus(part) for part in parts]
    assert parts[0].gpus != parts[1].gpus
    assert settled(lambda: not asked(service))


def test_cpu_replicas_bring_a_node_without_gpus(service: Any) -> None:
    wanted = {"name": "router", "model": "m", "runtime": "python", "cpus": 0.5, "replicas": 2}
    result = ray.get(service.place.remote(wanted, wait_seconds=100.0), timeout=120)
    assert {a.node for a in result.assignments} == machines().keys()
    assert ["egress"] == list(machines().values())
    assert settled(lambda: not asked(service))


def test_what_is_released_while_its_node_boots_is_no_longer_asked_for(service: Any) -> None:
    ray.get(service.apply.remote(PAIR))
    assert settled(lambda: bool(coming())), status(service)["demand"]
    ray.get(service.release.remote("pair"))
    assert settled(lambda: demanded() == 0 and not open_groups()), open_groups()
    assert {} == asked(service)


DRIVER = """
import sys, threading
import placement, ray
address, node_address, owned, call = sys.argv[1:]
import json
ray.init(address, _node_ip_address=node_address, log_to_driver=False, logging_level="ERROR")
client = placement.Client()
client.apply({**json.loads(owned), "owner": "job"})
threading.Thread(target=client.place, args=(json.loads(call),), kwargs={"wait_seconds": 600.0}).start()
"""


def test_what_waits_for_a_job_that_dies_is_no_longer_asked_for(service: Any) -> None:
    address = ray.get_runtime_context().gcs_address
    call = {**NEVER, "name": "call", "gpus": 1}
    arguments = [address, host_of(address), json.dumps(NEVER), json.dumps(call)]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments])
    try:
        assert settled(lambda: asked(service) == {"never": "asked", "call": "asked"}), status(service)
        assert settled(lambda: demanded() == 2)
    finally:
        driver.kill()
        driver.wait(30)
    assert settled(lambda: demanded() == 0 and not open_groups()), open_groups()
    assert ({}, []) == (asked(service), status(service)["deployments"])


def test_what_the_cloud_refuses_is_told(service: Any) -> None:
    ray.get(service.apply.remote(NEVER))
    assert settled(lambda: "the cloud refuses node type never" in reason(service, "never")), status(service)[
        "demand"
    ]
    ray.get(service.release.remote("never"))
    assert settled(lambda: demanded() == 0 and not open_groups()), open_groups()
    assert {} == asked(service)


def test_what_no_node_type_can_hold_is_told_as_the_reason_and_withdrawn(service: Any) -> None:
    ray.get(service.apply.remote({"name": "vast", "model": "m", "gpus": 16, "tensor_parallel": 16}))
    assert settled(lambda: asked(service) == {"vast": "infeasible"}), status(service)["demand"]
    assert {} == open_groups()
    assert settled(lambda: "or its maximum is reached" in reason(service, "vast")), reason(service, "vast")
    assert most_complaints() <= 3


def test_a_service_that_is_killed_asks_for_nothing_and_asks_anew_when_it_is_back(service: Any) -> None:
    ray.get(service.apply.remote(NEVER))
    assert settled(lambda: demanded() == 1), status(service)["demand"]
    (before,) = open_groups()
    os.kill(ray.get(service.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)
    assert settled(lambda: before not in open_groups())
    assert settled(lambda: len(open_groups()) == demanded() == 1), open_groups()
    assert before not in open_groups()
