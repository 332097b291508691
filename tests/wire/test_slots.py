"""A machine's reading in the order of Ray's slots."""

from __future__ import annotations

import pytest

from placement import topologies
from placement.wire.facts import NodeFacts
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
