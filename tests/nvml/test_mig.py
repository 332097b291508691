"""MIG instances through the real pynvml: what they are, the holes between them, and every call failing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pynvml
import pytest

from placement import topologies
from placement.core.topology import Path
from placement.wire.facts import GpuFacts, MigFacts, NodeFacts
from placement.wire.slots import in_ray_order
from tests import fake_nvml

Read = Callable[[str], NodeFacts]

NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 3, 4, 13, 15, 999
A100 = "NVIDIA A100-SXM4-80GB"

# Four GPUs, the first cut up: `nvidia-smi -L` in https://github.com/influxdata/telegraf/issues/5812 (comment of
# 2023-08-04). What that does not print: the memory is the nominal one less 512 MiB, as of the 2g.20gb in
# https://github.com/XuehaiPan/nvitop/pull/8, the ids are made up.
RECORDED_GPUS = (
    "GPU-513536b6-7d19-9063-b049-1e69664bb298",
    "GPU-d8594bd4-0fc3-8595-e355-7c98138f3b95",
    "GPU-5e375e7e-b41f-155b-dcdc-534524c356fc",
    "GPU-69ec2344-ebac-b028-f88f-452abb3d7f11",
)
RECORDED_INSTANCES = (
    "MIG-ce861fb0-a248-58ce-a9a8-f9adbc22a66a",
    "MIG-a45882f0-9215-5733-a0c1-49286ab31cb5",
    "MIG-f00d722c-f4e1-52c9-aa31-750441ae1bfe",
    "MIG-930574a9-d43a-5d2b-95da-3e68384c8d6b",
)
RECORDED = "\n".join(
    [
        "gpus 4",
        *(f"uuid {gpu} {uuid}\nname {gpu} {A100}" for gpu, uuid in enumerate(RECORDED_GPUS)),
        *(f"capability {gpu} 8 0\nmemory {gpu} {80 << 30} 0 0\nmig {gpu} {int(not gpu)}" for gpu in range(4)),
        *(
            f"instance 0 {index} {index + 3} 0 {19968 << 20} {13 << 20} 1 1 {uuid} {A100} MIG 1g.20gb"
            for index, uuid in enumerate(RECORDED_INSTANCES)
        ),
        "",
    ]
)

CUT_UP = topologies.describe("a100-mig-4x").instances
"""GPU 0 is 7 x 1g.10gb; GPU 1 is 3g.40gb, 2g.20gb and 2 x 1g.10gb; GPUs 2 and 3 are whole."""
MACHINE = fake_nvml.describe(topologies.load("a100-pcie-4x"), instances=CUT_UP)
TOKENS = ",".join(
    token
    for gpu in range(4)
    for token in (
        [fake_nvml.mig_uuid(gpu, index) for index in range(len(CUT_UP[gpu]))]
        if gpu in CUT_UP
        else [fake_nvml.uuid(gpu)]
    )
)
"""CUDA_VISIBLE_DEVICES with all that can be had of the machine."""

CALLS: Mapping[str, Mapping[str, object]] = {
    "nvmlDeviceGetUUID": {"uuid": None},
    # The attributes tell the profile as well, and the memory; either version of the memory tells the same.
    "nvmlDeviceGetName": {},
    "nvmlDeviceGetAttributes_v2": {},
    "nvmlDeviceGetMemoryInfo": {},
    "nvmlDeviceGetMemoryInfo_v2": {},
    "nvmlDeviceGetGpuInstanceId": {"gpu_instance_id": None},
    "nvmlDeviceGetComputeInstanceId": {"compute_instance_id": None},
}
"""Call on an instance -> the facts that are unknown where it fails."""


def on_instances(call: str, error: int) -> str:
    return "".join(f"fail {call} {error} {gpu} {i}\n" for gpu in CUT_UP for i in range(len(CUT_UP[gpu])))


def instances(facts: NodeFacts) -> list[tuple[int, str | None]]:
    return [(one.parent, one.profile) for one in facts.instances]


def test_a_recorded_machine_offers_its_instances_and_its_whole_gpus(read_machine: Read) -> None:
    facts = read_machine(RECORDED)
    assert [(False, gpu == 0) for gpu in range(4)] == [(one.lost, one.mig_enabled) for one in facts.gpus]
    assert facts.instances[2] == MigFacts(
        parent=0,
        uuid="MIG-f00d722c-f4e1-52c9-aa31-750441ae1bfe",
        profile="1g.20gb",
        memory_total_bytes=19968 << 20,
        memory_used_bytes=13 << 20,
        gpu_instance_id=5,
        compute_instance_id=0,
    )
    assert (RECORDED_INSTANCES, None) == (tuple(one.uuid for one in facts.instances), facts.problem)

    slots = in_ray_order(facts, 5, ",".join([RECORDED_GPUS[2], *RECORDED_INSTANCES]))
    assert [None, *["1g.20gb"] * 4] == [slot.instance for slot in slots.gpus]
    assert {A100} == {slot.name for slot in slots.gpus}
    assert None is slots.problem


def test_a_reading_in_rays_order_agrees_with_the_catalogue(read_machine: Read) -> None:
    recorded = topologies.facts("a100-mig-4x")
    facts = in_ray_order(read_machine(MACHINE), 13, TOKENS)
    for field in ("ordinal", "name", "mig_enabled", "mig_profile", "numa_nodes", "cpus", "nvswitch_links"):
        assert [getattr(gpu, field) for gpu in recorded.gpus] == [getattr(gpu, field) for gpu in facts.gpus]
    assert fake_nvml.as_matrix(recorded.topology()) == fake_nvml.as_matrix(facts.topology())
    assert [fake_nvml.instance_bytes(gpu.mig_profile) for gpu in facts.gpus if gpu.mig_profile] == [
        gpu.memory_total_bytes for gpu in facts.gpus[:11]
    ]


def test_the_tables_have_every_call_that_a_reading_makes(read_machine: Read) -> None:
    healthy = fake_nvml.describe(topologies.load("a100-pcie-4x"))
    faults = "fail nvmlDeviceGetMemoryInfo_v2 3\n"
    read_machine(healthy + faults)
    without = set(pynvml._nvmlGetFunctionPointer_cache)
    read_machine(MACHINE + faults)
    more = set(pynvml._nvmlGetFunctionPointer_cache) - without
    assert more <= set(CALLS) | {"nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigDeviceHandleByIndex"}
    assert set(CALLS) <= without | more


@pytest.mark.parametrize("error", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_on_all_instances_hides_only_what_it_tells(
    call: str, error: int, read_machine: Read
) -> None:
    healthy = read_machine(MACHINE)
    expected = [one.model_copy(update=dict(CALLS[call])) for one in healthy.instances]

    facts = read_machine(MACHINE + on_instances(call, error))

    assert expected == [one.model_copy(update={"errors": ()}) for one in facts.instances]
    assert (healthy.gpus, healthy.pairs) == (facts.gpus, facts.pairs)
    quiet = error in (NOT_SUPPORTED, FUNCTION_NOT_FOUND) or call == "nvmlDeviceGetMemoryInfo_v2"
    quiet = quiet or call == "nvmlDeviceGetMemoryInfo"  # not asked: the newer one answers
    assert quiet == (facts.problem is None)
    assert quiet == all(one.errors == () for one in facts.instances)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_on_one_instance_hides_it_there_only(call: str, read_machine: Read) -> None:
    healthy = read_machine(MACHINE)
    facts = read_machine(MACHINE + f"fail {call} {UNKNOWN} 1 2\n")
    hit = len(CUT_UP[0]) + 2
    assert healthy.instances[:hit] == facts.instances[:hit]
    assert healthy.instances[hit + 1 :] == facts.instances[hit + 1 :]
    assert healthy.instances[hit].model_copy(update=dict(CALLS[call])) == facts.instances[hit].model_copy(
        update={"errors": ()}
    )


def test_an_error_of_an_instance_is_reported_there_and_under_its_gpu_for_the_node(read_machine: Read) -> None:
    facts = read_machine(MACHINE + f"fail nvmlDeviceGetUUID {UNKNOWN} 1 2\n")
    said = "nvmlDeviceGetUUID: Unknown Error (NVML error 999)"
    assert [(1, (said,))] == [(one.parent, one.errors) for one in facts.instances if one.errors]
    assert () == facts.gpus[1].errors
    assert (
        "NVML answered in part: Unknown Error (NVML error 999): nvmlDeviceGetUUID on GPU 1" == facts.problem
    )


@pytest.mark.parametrize("error", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN])
@pytest.mark.parametrize("call", ["nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigDeviceHandleByIndex"])
def test_instances_that_cannot_be_listed_hide_no_other(call: str, error: int, read_machine: Read) -> None:
    healthy = read_machine(MACHINE)
    facts = read_machine(MACHINE + f"fail {call} {error} 0\n")
    assert healthy.instances[7:] == facts.instances
    assert healthy.gpus == tuple(one.model_copy(update={"errors": ()}) for one in facts.gpus)
    assert (error in (NOT_SUPPORTED, FUNCTION_NOT_FOUND)) == (facts.gpus[0].errors == ())


def test_there_are_holes_among_the_indices(read_machine: Read) -> None:
    lines = MACHINE.splitlines()
    left = [line for line in lines if not line.startswith(("instance 0 0", "instance 0 3", "instance 1 1"))]
    facts = read_machine("\n".join(left) + "\n")
    profiles = [(0, "1g.10gb")] * 5 + [(1, "3g.40gb"), (1, "1g.10gb"), (1, "1g.10gb")]
    assert (profiles, None) == (instances(facts), facts.problem)
    assert [fake_nvml.mig_uuid(0, index) for index in (1, 2, 4, 5, 6)] == [
        one.uuid for one in facts.instances[:5]
    ]


def test_a_lost_gpu_takes_only_its_own_instances_along(read_machine: Read) -> None:
    healthy = read_machine(MACHINE)
    facts = read_machine(MACHINE + f"fail nvmlDeviceGetHandleByIndex_v2 {GPU_IS_LOST} 0\n")
    assert [0] == [one.ordinal for one in facts.gpus if one.lost]
    assert (healthy.instances[7:], healthy.gpus[1:]) == (facts.instances, facts.gpus[1:])
    slots = in_ray_order(facts, 13, TOKENS)
    # What nobody could read is no whole GPU: its token says so.
    assert ["?"] * 7 + ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb", None, None] == [
        slot.instance for slot in slots.gpus
    ]


def test_the_memory_of_a_cut_up_gpu_may_be_for_the_privileged_only(read_machine: Read) -> None:
    one = (
        f"fail nvmlDeviceGetMemoryInfo {NO_PERMISSION} 0\nfail nvmlDeviceGetMemoryInfo_v2 {NO_PERMISSION} 0\n"
    )
    alone = fake_nvml.describe(topologies.load("a10-4x"), one, instances={0: ()})
    facts = read_machine(alone)
    assert ((None, None), None) == (
        (facts.gpus[0].memory_total_bytes, facts.gpus[0].memory_used_bytes),
        facts.problem,
    )


def test_an_instance_whose_memory_cannot_be_asked_for_has_that_of_its_attributes(read_machine: Read) -> None:
    faults = on_instances("nvmlDeviceGetMemoryInfo", 3) + on_instances("nvmlDeviceGetMemoryInfo_v2", 3)
    facts = read_machine(MACHINE + faults)
    assert [(9728 << 20, None)] * 7 == [
        (one.memory_total_bytes, one.memory_used_bytes) for one in facts.instances[:7]
    ]


@pytest.mark.parametrize(
    ("total_gib", "line", "profile"),
    [
        # bytes, compute slices of the instance and of its GPU instance; all without a profile in the name
        (80, f"{9728 << 20} 0 1 1", "1g.10gb"),
        (80, f"{19968 << 20} 0 2 2", "2g.20gb"),
        (80, f"{19968 << 20} 0 1 1", "1g.20gb"),
        (80, f"{40448 << 20} 0 1 3", "1c.3g.40gb"),
        (40, f"{4864 << 20} 0 1 1", "1g.5gb"),
        (40, f"{20096 << 20} 0 3 3", "3g.20gb"),
    ],
)
def test_an_old_driver_names_no_profile_and_it_follows_from_the_attributes(
    total_gib: int, line: str, profile: str, read_machine: Read
) -> None:
    gpu = f"gpus 1\nname 0 {A100}\nmemory 0 {total_gib << 30} 0 0\nmig 0 1\n"
    facts = read_machine(f"{gpu}instance 0 4 1 0 {line} MIG-GPU-a/1/0 {A100}\n")
    assert [(0, profile)] == instances(facts)


def test_a_profile_that_nothing_tells_is_unknown_and_the_slot_no_whole_gpu(read_machine: Read) -> None:
    both = on_instances("nvmlDeviceGetName", UNKNOWN) + on_instances("nvmlDeviceGetAttributes_v2", UNKNOWN)
    facts = read_machine(MACHINE + both)
    assert {None} == {one.profile for one in facts.instances}
    assert ["?"] * 11 + [None] * 2 == [slot.instance for slot in in_ray_order(facts, 13, TOKENS).gpus]


def test_with_mig_off_no_instance_is_asked_for(read_machine: Read) -> None:
    facts = read_machine(MACHINE.replace("mig 0 1", "mig 0 0").replace("mig 1 1", "mig 1 0"))
    assert () == facts.instances
    assert [None] * 4 == [gpu.instance for gpu in facts.gpus]


def test_instances_have_no_links_and_the_whole_gpus_keep_theirs(read_machine: Read) -> None:
    facts = in_ray_order(read_machine(MACHINE), 13, TOKENS)
    shape = facts.topology()
    assert [(11, 12, Path.NVLINK)] == [
        (a, b, shape.link(a, b).path)
        for a in range(13)
        for b in range(a + 1, 13)
        if shape.link(a, b).path is not Path.UNKNOWN
    ]
    assert isinstance(facts.gpus[3], GpuFacts)
