"""Nodes without a topology label: the node actor reads NVML, here through the fake library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from placement import topologies
from placement.runtime.embedded import SimulatedNode, embedded_cluster
from placement.runtime.probing import another_user
from tests import fake_nvml
from tests.integration.conftest import worker_at

pytestmark = pytest.mark.integration
PAIRS = topologies.load("a100-pcie-4x")
OVERRIDE = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Ray then empties CUDA_VISIBLE_DEVICES in actors without a GPU, as the node actor is."""
DGX1 = topologies.load("dgx-1v")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("nvml")
    library = fake_nvml.build(folder)

    def env(name: str, *lines: str) -> dict[str, str]:
        machine: Path = folder / f"{name}.txt"
        shape = {"pairs": PAIRS, "dgx": DGX1}[name.split("-")[0]]
        machine.write_text(fake_nvml.describe(shape, *lines))
        return fake_nvml.environment(library, machine)

    # Half of a DGX-1V, by CUDA_VISIBLE_DEVICES in an order of its own: slots 0 to 3 are GPUs 7, 5, 6, 4.
    some = {**env("dgx-some"), "CUDA_VISIBLE_DEVICES": "7,5,6,4"}
    by_uuid = ",".join(fake_nvml.uuid(gpu) for gpu in (2, 0, 3, 1))
    nodes = [
        SimulatedNode("pairs", gpus=4, env=env("pairs")),
        SimulatedNode("some", gpus=4, env=some),
        SimulatedNode("uuids", gpus=4, env={**env("pairs-uuids"), "CUDA_VISIBLE_DEVICES": by_uuid}),
        SimulatedNode("lost", gpus=4, env=env("pairs-lost", "fail nvmlDeviceGetHandleByIndex_v2 15 1")),
        SimulatedNode("without", gpus=2),
        SimulatedNode("more", gpus=6, env=env("pairs-more")),
        SimulatedNode("twice", gpus=4, env={**env("pairs-twice"), "CUDA_VISIBLE_DEVICES": "2,0,3,0"}),
        SimulatedNode("zero", gpus=4, env={**env("pairs-zero"), "CUDA_VISIBLE_DEVICES": by_uuid, **OVERRIDE}),
        SimulatedNode("zero-without", gpus=2, env={"CUDA_VISIBLE_DEVICES": "3, 1", **OVERRIDE}),
    ]
    with embedded_cluster(nodes) as running:
        yield running.address


def topology(service: Any, node: str) -> dict[str, Any]:
    (report,) = ray.get(service.topology.remote(node))
    return report


def status(service: Any, node: str) -> dict[str, Any]:
    [report] = [one for one in ray.get(service.status.remote())["nodes"] if one["name"] == node]
    return report


def states(service: Any, node: str) -> list[str]:
    topology(service, node)  # or it may not have said yet what its GPUs are
    return [gpu["state"] for gpu in status(service, node)["gpus"]]


def place(service: Any, node: str, gpus: int) -> Any:
    wanted = {"name": f"on-{node}", "model": "m", "gpus": gpus}
    return ray.get(service.place.remote(wanted, {"gpu_nodes": [node]})).assignments[0]


def ids(assignment: Any) -> list[str]:
    return [worker_at(assignment.actor_options(rank)).gpus[0] for rank in range(len(assignment.gpus))]


def test_what_nvml_says_is_the_nodes_topology(service: Any) -> None:
    report = topology(service, "pairs")
    assert report["facts"]["source"] == "nvml"
    assert report["islands"] == [[0, 1], [2, 3]]
    assert [gpu["uuid"] for gpu in report["facts"]["gpus"]] == [fake_nvml.uuid(gpu) for gpu in range(4)]
    assert {gpu["memory_used_bytes"] for gpu in report["facts"]["gpus"]} == {
        fake_nvml.USED + fake_nvml.RESERVED
    }
    assert report["problem"] is None


def test_replicas_are_placed_by_it(service: Any) -> None:
    one = ray.get(service.place.remote({"name": "one", "model": "m"}, {"gpu_nodes": ["pairs"]})).assignments[
        0
    ]
    pair = place(service, "pairs", 2)
    assert (one.gpus, pair.gpus, pair.weakest_link) == ([0], [2, 3], "NV12")


def test_slots_follow_cuda_visible_devices_by_index(service: Any) -> None:
    """Slots 0 to 3 are GPUs 7, 5, 6, 4. The best pair of those by NVLink, 5 and 6, is slots 1 and 2."""
    report = topology(service, "some")
    assert [gpu["uuid"] for gpu in report["facts"]["gpus"]] == [fake_nvml.uuid(gpu) for gpu in (7, 5, 6, 4)]
    assignment = place(service, "some", 2)
    physical = [(7, 5, 6, 4)[slot] for slot in assignment.gpus]
    assert DGX1.link(*physical).nvlinks == 2
    assert ids(assignment) == [str(gpu) for gpu in physical]


def test_slots_follow_cuda_visible_devices_by_uuid(service: Any) -> None:
    """Slots 0 to 3 are GPUs 2, 0, 3, 1, so that the bridged pairs are slots (0, 2) and (1, 3)."""
    assert topology(service, "uuids")["islands"] == [[0, 2], [1, 3]]
    assignment = place(service, "uuids", 2)
    assert assignment.gpus == [0, 2]
    assert ids(assignment) == [fake_nvml.uuid(2), fake_nvml.uuid(3)]


def test_a_lost_gpu_hides_no_other(service: Any) -> None:
    report = topology(service, "lost")
    assert [gpu["uuid"] is not None for gpu in report["facts"]["gpus"]] == [True, False, True, True]
    assert [2, 3] in report["islands"]
    assert place(service, "lost", 2).gpus == [2, 3]
    assert status(service, "lost")["gpu_model"] == PAIRS.model
    assert states(service, "lost") == ["free", "unknown", "held", "held"]


def test_slots_that_nvml_does_not_show_are_never_used(service: Any) -> None:
    assert states(service, "more") == ["free"] * 4 + ["unknown"] * 2
    assert status(service, "more")["problem"] == (
        "Ray has 6 GPUs here, NVML shows 4 of them; nothing is placed on GPU 4-5"
    )
    with pytest.raises(placement.NotEnoughGpus, match="the largest node has 4"):
        place(service, "more", 5)
    wanted = {"name": "ones", "model": "m", "replicas": 4}
    result = ray.get(service.place.remote(wanted, {"gpu_nodes": ["more"]}))
    assert sorted(a.gpus[0] for a in result.assignments) == [0, 1, 2, 3]
    with pytest.raises(placement.NotEnoughGpus, match="more has none of its 4 GPUs free"):
        place(service, "more", 1)


def test_a_gpu_that_is_named_twice_is_not_used_and_is_named(service: Any) -> None:
    """Slots 1 and 3 are GPU 0, so that whoever has one of them uses the other's GPU."""
    assert states(service, "twice") == ["free", "unknown", "free", "unknown"]
    assert "names a GPU more than once (0): name each once" in status(service, "twice")["problem"]
    assert ids(place(service, "twice", 2)) == ["2", "3"]
    ray.get(service.release.remote("on-twice"))
    with pytest.raises(placement.NotEnoughGpus):
        place(service, "twice", 3)


def test_tokens_are_those_of_ray_start_where_ray_empties_them_for_actors(service: Any) -> None:
    assert topology(service, "zero")["islands"] == [[0, 2], [1, 3]]
    other = another_user("zero")
    try:
        assignment = place(service, "zero", 2)
        assert (assignment.gpus, ids(assignment)) == ([1, 3], [fake_nvml.uuid(0), fake_nvml.uuid(1)])
    finally:
        other.leave()


def test_and_also_without_nvml(service: Any) -> None:
    other = another_user("zero-without")
    try:
        assignment = place(service, "zero-without", 1)
        assert (assignment.gpus, [one.strip() for one in ids(assignment)]) == ([1], ["1"])
    finally:
        other.leave()


def test_without_nvml_ordinals_are_ascending_and_never_twice(service: Any) -> None:
    report = topology(service, "without")
    assert (report["known"], report["facts"]["source"]) == (False, "none")
    result = ray.get(
        service.place.remote({"name": "w", "model": "m", "replicas": 2}, {"gpu_nodes": ["without"]})
    )
    assert [a.gpus for a in result.assignments] == [[0], [1]]
