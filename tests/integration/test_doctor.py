"""``placement doctor`` on real nodes: steering is tried, and nothing stays held; also beside others and a hung node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from placement import topologies
from placement.runtime import doctor, groups
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode, embedded_cluster
from placement.runtime.probing import another_user
from tests import fake_nvml
from tests.integration.conftest import left_over, settled

pytestmark = pytest.mark.integration

PAIRS = topologies.load("a100-pcie-4x")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedCluster]:
    folder = tmp_path_factory.mktemp("nvml")
    library, machine = fake_nvml.build(folder), folder / "machine.txt"
    machine.write_text(fake_nvml.describe(PAIRS))
    env = fake_nvml.environment(library, machine)
    by_uuid = ",".join(fake_nvml.uuid(gpu) for gpu in (2, 0, 3, 1))
    nodes = [
        SimulatedNode("ordered", gpus=4, env={**env, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        SimulatedNode("uuids", gpus=4, env={**env, "CUDA_VISIBLE_DEVICES": by_uuid}),
        SimulatedNode("unordered", gpus=4, env=env),
        SimulatedNode("recorded", topology="a100-pcie-4x"),
        SimulatedNode("egress", resources={"egress": 8, "egress-openai": 1}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_health_check_failure_threshold", "100")  # a node that hangs is not taken for dead
        with embedded_cluster(nodes) as running:
            yield running


def examine(address: str, *options: str) -> tuple[int, dict[tuple[str | None, str], dict[str, Any]], str]:
    """Exit code, findings by node and check, and stderr of the command, beside this driver."""
    command = [
        str(Path(sys.executable).with_name("placement")),
        "doctor",
        "--address",
        address,
        "--json",
        "--timeout",
        "240",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    findings = {(one["node"], one["check"]): one for one in told["findings"]}
    assert told["ok"] == all(one["state"] != "failed" for one in findings.values())
    return done.returncode, findings, done.stderr


def holds() -> list[str]:
    """Names of the groups that are there for a moment."""
    return [group.name for group in groups.live_groups(lambda name: name.startswith(groups.HOLD)).values()]


def test_each_node_is_examined_and_steered_without_a_service(address: str) -> None:
    other = another_user("ordered")  # it has GPU 0
    try:
        code, found, _ = examine(address)
    finally:
        other.leave()
    assert {key: one["state"] for key, one in found.items() if one["state"] != "ok"} == {
        (None, "service"): "warning",
        ("unordered", "device order"): "failed",
        ("egress", "egress"): "warning",  # the one that is misspelt comes last
    }
    assert code == 1
    for node in ("ordered", "uuids", "unordered", "recorded"):
        assert found[node, "steering"]["said"] == "GPU 3 was wanted and given", found[node, "steering"]
    version = f"placement {placement.__version__}, Ray {ray.__version__}, Python "
    assert found["egress", "versions"]["said"].startswith(version)
    assert found["uuids", "topology"]["said"] == f"4 x {PAIRS.model}, islands 0,2 + 1,3"
    assert found["uuids", "device order"]["said"] == "CUDA_VISIBLE_DEVICES names GPUs by UUID"
    assert "export CUDA_DEVICE_ORDER=PCI_BUS_ID" in found["unordered", "device order"]["fix"]
    assert found["recorded", "topology"]["said"].startswith("a100-pcie-4x of the catalogue")
    assert settled(lambda: not left_over()), left_over()


def test_beside_the_service_and_those_who_place(service: Any, address: str) -> None:
    """The trial is one more user of the nodes: whoever places meanwhile gets what is promised."""
    stop = threading.Event()
    placed: list[list[str]] = []

    def go_on() -> None:
        while not stop.is_set():
            wanted = {"name": "pair", "model": "m", "gpus": 2, "replicas": 2}
            result = ray.get(service.place.remote(wanted, {"gpu_nodes": ["recorded"]}, 240.0))
            placed.append([a.weakest_link for a in result.assignments])
            ray.get(service.release.remote("pair"))

    placing = threading.Thread(target=go_on)
    placing.start()
    try:
        code, found, _ = examine(address)
    finally:
        stop.set()
        placing.join()
    assert code == 1  # of the node without the variable
    assert found[None, "service"]["said"] == f"runs, version {placement.__version__}"
    for node in ("ordered", "uuids", "unordered"):
        assert found[node, "steering"]["state"] == "ok", found[node, "steering"]
    # There all GPUs come and go: it was had, or none was free.
    assert found["recorded", "steering"]["state"] in ("ok", "skipped"), found["recorded", "steering"]
    assert placed
    assert {link for links in placed for link in links} == {"NV12"}


def test_a_node_without_a_free_gpu_is_not_tried(service: Any, address: str) -> None:
    ray.get(service.place.remote({"name": "all", "model": "m", "gpus": 4}, {"gpu_nodes": ["recorded"]}))
    assert examine(address)[1]["recorded", "steering"]["state"] == "skipped"


@contextmanager
def stopped(cluster: EmbeddedCluster, name: str) -> Iterator[None]:
    """Stops a node's raylet, as if the machine hung."""
    [raylet] = cluster._nodes[name].all_processes["raylet"]
    os.kill(raylet.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(raylet.process.pid, signal.SIGCONT)


def test_a_node_that_hangs_is_told_and_left_alone(cluster: EmbeddedCluster) -> None:
    with stopped(cluster, "uuids"):
        found = doctor.findings(90.0)
    by_check = {(one.node, one.check): one for one in found}
    assert by_check["uuids", "answer"].said.startswith("no answer within ")
    assert ("uuids", "steering") not in by_check
    assert {by_check[node, "steering"].state for node in ("ordered", "unordered", "recorded")} == {"ok"}
    assert settled(lambda: not left_over()), left_over()


def test_nothing_stays_held_where_it_is_killed(address: str) -> None:
    command = [str(Path(sys.executable).with_name("placement")), "doctor", "--address", address]
    seen: list[str] = []
    for _ in range(5):  # each hold is there for some milliseconds
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not seen:
            seen = holds()
        process.kill()
        process.wait()
        if seen:
            break
    assert seen
    assert settled(lambda: not holds())
    assert settled(lambda: not left_over()), left_over()


def test_through_a_ray_client(ray_client: str) -> None:
    code, found, _ = examine(ray_client)
    assert code == 1
    assert found["recorded", "steering"]["state"] == "ok"
