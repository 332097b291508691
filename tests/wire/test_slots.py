"""A machine's reading in the order of Ray's slots."""

from __future__ import annotations

import pytest

from placement import topologies
from placement.wire.facts import MigFacts, NodeFacts
from placement.wire.slots import in_ray_order

PAIRS = topologies.load("a100-pcie-4x")


@pytest.fixture
def reading() -> NodeFacts:
    """Four GPUs in two bridged pairs, with UUIDs."""
    facts = topologies.facts("a100-pcie-4x")
    gpus = tuple(gpu.model_copy(update={"uuid": f"GPU-{gpu.ordinal}aaa"}) for gpu in facts.gpus)
    return facts.model_copy(update={"source": "nvml", "gpus": gpus})


def uuids(facts: NodeFacts) -> list[str | None]:
    return [gpu.uuid for gpu in facts.gpus]


def test_slots_are_nvml_indices_where_nothing_is_set(reading: NodeFacts) -> None:
    assert in_ray_order(reading, 4, None) == reading
    assert in_ray_order(reading, 4, "") == reading


@pytest.mark.parametrize("devices", ["3,1,0", "GPU-3aaa, GPU-1, GPU-0a"])
def test_slots_follow_the_visible_devices(reading: NodeFacts, devices: str) -> None:
    facts = in_ray_order(reading, 3, devices)
    assert uuids(facts) == ["GPU-3aaa", "GPU-1aaa", "GPU-0aaa"]
    assert [gpu.ordinal for gpu in facts.gpus] == [0, 1, 2]
    assert facts.topology().islands == ((0,), (1, 2))


def test_ray_may_have_fewer_gpus_than_the_machine(reading: NodeFacts) -> None:
    assert in_ray_order(reading, 2, None).topology().islands == ((0, 1),)


def test_ray_may_claim_more_than_nvml_shows(reading: NodeFacts) -> None:
    facts = in_ray_order(reading, 6, None)
    assert uuids(facts)[4:] == [None, None]
    assert facts.problem == "Ray has 6 GPUs here, NVML shows 4 of them"
    assert facts.topology().islands == ((0, 1), (2, 3), (4,), (5,))


@pytest.mark.parametrize("devices", ["9", "GPU-none", "GPU-", "MIG-1"])
def test_a_token_that_names_no_gpu_is_a_gpu_of_which_nothing_is_known(
    reading: NodeFacts, devices: str
) -> None:
    facts = in_ray_order(reading, 1, devices)
    assert uuids(facts) == [None]
    assert facts.problem == "Ray has 1 GPUs here, NVML shows 0 of them"


def test_without_nvml_the_gpus_are_there_and_nothing_is_known_of_them() -> None:
    facts = in_ray_order(NodeFacts(source="none", problem="no driver"), 2, None)
    assert (len(facts.gpus), facts.topology().known, facts.problem) == (2, False, "no driver")


@pytest.fixture
def cut_up(reading: NodeFacts) -> NodeFacts:
    """The same machine with GPU 1 in three instances, of which the last is of an unknown size."""
    instances = tuple(
        MigFacts(
            parent=1,
            uuid=f"MIG-{i}bbb",
            profile=profile,
            memory_total_bytes=10 << 30,
            gpu_instance_id=7 + i,
            compute_instance_id=0,
        )
        for i, profile in enumerate(["1g.10gb", "2g.20gb", None])
    )
    gpus = tuple(gpu.model_copy(update={"mig_enabled": gpu.ordinal == 1}) for gpu in reading.gpus)
    return reading.model_copy(update={"gpus": gpus, "instances": instances})


def test_a_slot_may_be_a_mig_instance(cut_up: NodeFacts) -> None:
    facts = in_ray_order(cut_up, 4, "GPU-2aaa,MIG-1,MIG-0bbb,GPU-3aaa")
    assert uuids(facts) == ["GPU-2aaa", "MIG-1bbb", "MIG-0bbb", "GPU-3aaa"]
    assert [gpu.instance for gpu in facts.gpus] == [None, "2g.20gb", "1g.10gb", None]
    one = facts.gpus[1]
    assert (one.ordinal, one.memory_total_bytes, one.name) == (1, 10 << 30, "NVIDIA A100 80GB PCIe")
    assert (one.numa_nodes, one.mig_enabled, facts.problem) == ((0,), True, None)
    assert facts.topology().islands == ((0, 3), (1,), (2,))


@pytest.mark.parametrize("token", ["MIG-GPU-1aaa/8/0", "MIG-GPU-1/8/0"])
def test_a_slot_may_be_named_as_before_r470(cut_up: NodeFacts, token: str) -> None:
    assert uuids(in_ray_order(cut_up, 1, token)) == ["MIG-1bbb"]


@pytest.mark.parametrize(
    "token", ["MIG-", "MIG-none", "MIG-GPU-1aaa/8/1", "MIG-GPU-2aaa/8/0", "MIG-GPU-1aaa/8", "MIG-2bbb"]
)
def test_what_is_said_to_be_an_instance_is_never_a_whole_gpu(cut_up: NodeFacts, token: str) -> None:
    for reading in (cut_up, NodeFacts(source="none", problem="no driver")):
        [slot] = in_ray_order(reading, 1, token).gpus
        assert slot.instance == "?"


def test_a_gpu_that_is_cut_up_is_no_whole_gpu_and_has_no_links(cut_up: NodeFacts) -> None:
    facts = in_ray_order(cut_up, 4, None)
    assert [gpu.instance for gpu in facts.gpus] == [None, "?", None, None]
    assert facts.problem == (
        "MIG is on on GPU 1, and Ray has it as a whole: nothing is placed there; "
        "name its instances in CUDA_VISIBLE_DEVICES at `ray start`"
    )
    assert facts.topology().islands == ((0,), (1,), (2, 3))
