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


def test_a_slot_that_a_working_nvml_does_not_show_is_lost(reading: NodeFacts) -> None:
    assert in_ray_order(reading, 6, None).lost() == {4, 5}
    assert in_ray_order(reading, 3, "0,GPU-none,2").lost() == {1}
    assert in_ray_order(reading, 2, "MIG-none,1").lost() == {0}
    assert in_ray_order(reading, 4, None).lost() == frozenset()


def test_an_nvml_that_shows_no_gpu_at_all_works_too(reading: NodeFacts) -> None:
    empty = NodeFacts(source="nvml")
    facts = in_ray_order(empty, 2, None)
    assert (facts.lost(), facts.problem) == ({0, 1}, "Ray has 2 GPUs here, NVML shows 0 of them")


@pytest.mark.parametrize("devices", [None, "0,1", "GPU-0aaa,GPU-1aaa", "MIG-1,0"])
def test_without_nvml_no_slot_is_lost(devices: str | None) -> None:
    assert in_ray_order(NodeFacts(source="none", problem="no driver"), 2, devices).lost() == frozenset()


@pytest.mark.parametrize(
    ("devices", "listed", "lost"),
    [
        ("0,0,1", "0", {0, 1}),
        ("2,0,1,0", "0", {1, 3}),
        ("0, 0,1,1", "0,1", {0, 1, 2, 3}),
        ("GPU-3aaa,1,GPU-3aaa", "GPU-3aaa", {0, 2}),
        ("GPU-3aaa,1,GPU-3", "GPU-3aaa,GPU-3", {0, 2}),  # two ways to name one GPU
        ("3,1,GPU-3aaa", "3,GPU-3aaa", {0, 2}),
        ("0,9,9", "9", {1, 2}),
    ],
)
def test_a_gpu_that_is_named_twice_is_given_to_nobody_and_is_named_as_the_cause(
    reading: NodeFacts, devices: str, listed: str, lost: set[int]
) -> None:
    facts = in_ray_order(reading, devices.count(",") + 1, devices)
    assert facts.lost() == lost
    assert facts.problem is not None
    assert facts.problem.split(";")[0] == (
        f"CUDA_VISIBLE_DEVICES at `ray start` names a GPU more than once ({listed}): name each once"
    )


def test_a_token_twice_is_seen_without_nvml() -> None:
    facts = in_ray_order(NodeFacts(source="none", problem="no driver"), 3, "0,1,0")
    assert facts.lost() == {0, 2}
    assert facts.problem == (
        "CUDA_VISIBLE_DEVICES at `ray start` names a GPU more than once (0): name each once; no driver"
    )


def test_tokens_beyond_those_that_ray_has_do_no_harm(reading: NodeFacts) -> None:
    facts = in_ray_order(reading, 2, "0,1,1,0")
    assert (facts.lost(), facts.problem) == (frozenset(), None)


def test_what_is_lost_says_nothing_of_the_others(reading: NodeFacts) -> None:
    """Its model, its memory and its capability are those of the GPUs that are there."""
    facts = in_ray_order(reading, 6, None)
    assert facts.topology().model == "NVIDIA A100 80GB PCIe"
    assert facts.gpu_memory_bytes == 80 << 30
    assert facts.compute_capability == (8, 0)
    lost = reading.gpus[2].model_copy(
        update={"uuid": None, "name": None, "memory_total_bytes": None, "errors": ("GPU is lost",)}
    )
    one_lost = reading.model_copy(update={"gpus": (*reading.gpus[:2], lost, reading.gpus[3])})
    assert one_lost.topology().model == "NVIDIA A100 80GB PCIe"
    assert one_lost.gpu_memory_bytes == 80 << 30


def test_models_that_differ_are_still_no_model(reading: NodeFacts) -> None:
    for name in ("NVIDIA H100 PCIe", None):
        other = reading.gpus[2].model_copy(update={"name": name})
        gpus = (*reading.gpus[:2], other, reading.gpus[3])
        assert reading.model_copy(update={"gpus": gpus}).topology().model is None


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
