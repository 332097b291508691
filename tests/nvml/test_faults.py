"""Every NVML call failing, one by one: what it would have told is unknown, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import pynvml
import pytest

from placement import topologies
from placement.core.topology import Lanes, Path
from placement.wire.facts import GpuFacts, NodeFacts, NvLinkFacts
from tests import fake_nvml

Read = Callable[[str], NodeFacts]

NOT_SUPPORTED, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN = 3, 13, 15, 999

MACHINES = ("dgx-1v", "dgx-2", "dgx-a100", "dgx-h100", "a100-pcie-4x", "rtx-4090-8x")
DIRECT = ("dgx-1v", "a100-pcie-4x")
"""Machines whose GPUs are linked straight, not through a switch."""


@dataclass(frozen=True)
class Lost:
    """What is unknown after a call failed on all GPUs.

    Attributes:
        gpu, pair: fact -> what stands for unknown there, or a function of what is known of it else.
        old: facts of GPUs that are unknown only before Hopper, where no field tells them.
        node: facts of the node.
        direct: facts of pairs that are unknown only on machines with straight links.
    """

    gpu: Mapping[str, object] | None = None
    pair: Mapping[str, object] | None = None
    direct: Mapping[str, object] | None = None
    old: Mapping[str, object] | None = None
    node: Mapping[str, object] | None = None


def no_speeds(links: tuple[NvLinkFacts, ...]) -> tuple[NvLinkFacts, ...]:
    return tuple(one.model_copy(update={"mb_per_s": None}) for one in links)


def no_states(links: tuple[NvLinkFacts, ...]) -> tuple[NvLinkFacts, ...]:
    return tuple(one.model_copy(update={"state": None}) for one in links)


CALLS = {
    "nvmlDeviceGetUUID": Lost(gpu={"uuid": None}),
    "nvmlDeviceGetName": Lost(gpu={"name": None}),
    # Either version tells the same.
    "nvmlDeviceGetMemoryInfo": Lost(),
    "nvmlDeviceGetMemoryInfo_v2": Lost(),
    "nvmlDeviceGetCudaComputeCapability": Lost(gpu={"compute_capability": None}, node={"nvls": None}),
    # A straight link names its far end by address: without addresses it leads nowhere.
    "nvmlDeviceGetPciInfo_v3": Lost(gpu={"pci_bus_id": None}, direct={"nvlinks": None}),
    "nvmlDeviceGetMinorNumber": Lost(gpu={"minor_number": None}),
    "nvmlDeviceGetMaxPcieLinkGeneration": Lost(gpu={"pcie_generation": None}),
    "nvmlDeviceGetCurrPcieLinkWidth": Lost(gpu={"pcie_width": None}),
    "nvmlDeviceGetMemoryAffinity": Lost(gpu={"numa_nodes": ()}),
    "nvmlDeviceGetCpuAffinity": Lost(gpu={"cpus": ()}),
    "nvmlDeviceGetMigMode": Lost(gpu={"mig_enabled": None}),
    "nvmlDeviceGetTopologyCommonAncestor": Lost(pair={"common_ancestor": Path.UNKNOWN}),
    "nvmlDeviceGetP2PStatus": Lost(pair={"peer_read": None, "peer_write": None}),
    # Links to a switch are counted by field 147 as well.
    "nvmlDeviceGetNvLinkState": Lost(direct={"nvlinks": None}, old={"nvlinks": no_states}),
    "nvmlDeviceGetNvLinkVersion": Lost(old={"nvlink_version": None}),
    "nvmlDeviceGetNvLinkRemotePciInfo_v2": Lost(direct={"nvlinks": None}),
    # The far end's address tells whether it is a GPU, field 147 whether it is a switch.
    "nvmlDeviceGetNvLinkRemoteDeviceType": Lost(),
    "nvmlDeviceGetFieldValues": Lost(gpu={"nvlinks": no_speeds}),
    "nvmlDeviceGetGpuFabricInfoV": Lost(gpu={"fabric": None}, node={"nvls": None}),
    "nvmlDeviceGetVirtualizationMode": Lost(gpu={"vgpu": None}, node={"nvls": None}),
}
NODE_CALLS = {
    "nvmlInitWithFlags",
    "nvmlShutdown",
    "nvmlSystemGetDriverVersion",
    "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2",
}


@cache
def description(name: str) -> str:
    recorded = topologies.load(name)
    machine = replace(recorded, lanes=(Lanes(4),) * len(recorded))
    fabric = [f"fabric {gpu} 3 0 1" for gpu in range(len(machine)) if machine.nvswitch]
    more = [line for gpu in range(len(machine)) for line in (f"minor {gpu} {gpu}", f"nvlink {gpu} 4 25781")]
    capability = topologies.describe(name).compute_capability
    return fake_nvml.describe(machine, *fabric, *more, capability=capability, peer=(0, 1))


def lost_facts(lost: Lost, gpu: GpuFacts, name: str) -> dict[str, object]:
    """What is unknown of a GPU."""
    old = topologies.describe(name).compute_capability < (9, 0)
    facts = dict(lost.gpu or {}) | dict((lost.old if old else None) or {})
    return {fact: left(getattr(gpu, fact)) if callable(left) else left for fact, left in facts.items()}


def without_errors(facts: NodeFacts) -> NodeFacts:
    """The facts alone, without the report of what failed."""
    gpus = tuple(gpu.model_copy(update={"errors": ()}) for gpu in facts.gpus)
    return facts.model_copy(update={"gpus": gpus, "problem": None})


def test_the_table_has_every_call_that_a_reading_makes(read_machine: Read) -> None:
    for name in MACHINES:
        read_machine(description(name) + "fail nvmlDeviceGetMemoryInfo_v2 3\n")
    assert set(CALLS) | NODE_CALLS == set(pynvml._nvmlGetFunctionPointer_cache)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("error", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, UNKNOWN])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_on_all_gpus_hides_only_what_it_tells(
    call: str, error: int, name: str, read_machine: Read
) -> None:
    healthy = read_machine(description(name))
    lost = CALLS[call]
    pair = dict(lost.pair or {})
    if name in DIRECT:
        pair |= lost.direct or {}
    if (call, name) == ("nvmlDeviceGetNvLinkState", "rtx-4090-8x") and error != NOT_SUPPORTED:
        # NOT_SUPPORTED is what GPUs without NVLink say; with any other error there may be some.
        pair |= {"nvlinks": None}
    expected = healthy.model_copy(
        update={
            "gpus": tuple(one.model_copy(update=lost_facts(lost, one, name)) for one in healthy.gpus),
            "pairs": tuple(one.model_copy(update=pair) for one in healthy.pairs),
            **(lost.node or {}),
        }
    )

    facts = read_machine(description(name) + f"fail {call} {error}\n")

    assert expected == without_errors(facts)
    if error in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):
        assert healthy.problem is facts.problem is None
        assert all(one.errors == () for one in facts.gpus)


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_on_one_gpu_hides_it_there_only(call: str, name: str, read_machine: Read) -> None:
    healthy = read_machine(description(name))
    lost = CALLS[call]
    # Whatever the links of one GPU are, the other ends of them tell it too.
    pair = dict(lost.pair or {})
    expected = healthy.model_copy(
        update={
            "gpus": tuple(
                one.model_copy(update=lost_facts(lost, one, name) if one.ordinal == 2 else {})
                for one in healthy.gpus
            ),
            "pairs": tuple(
                one.model_copy(update=pair if 2 in (one.a, one.b) else {}) for one in healthy.pairs
            ),
            **(lost.node or {}),
        }
    )

    facts = read_machine(description(name) + f"fail {call} {GPU_IS_LOST} 2\n")

    assert expected == without_errors(facts)
    assert [()] == sorted({one.errors for one in facts.gpus if one.ordinal != 2})


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("error", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN])
def test_no_handle_for_one_gpu_hides_no_other(error: int, name: str, read_machine: Read) -> None:
    healthy = read_machine(description(name))
    facts = read_machine(description(name) + f"fail nvmlDeviceGetHandleByIndex_v2 {error} 2\n")
    assert_only_gpu_2_is_lost(healthy, facts)


@pytest.mark.parametrize("name", MACHINES)
def test_a_lost_gpu_that_still_has_a_handle_hides_no_other(name: str, read_machine: Read) -> None:
    healthy = read_machine(description(name))
    facts = read_machine(description(name) + "".join(f"fail {call} {GPU_IS_LOST} 2\n" for call in CALLS))
    assert_only_gpu_2_is_lost(healthy, facts)


def assert_only_gpu_2_is_lost(healthy: NodeFacts, facts: NodeFacts) -> None:
    assert [2] == [one.ordinal for one in facts.gpus if one.lost]
    lost = facts.gpus[2]
    assert GpuFacts(ordinal=2, errors=lost.errors) == lost
    assert [one for one in healthy.gpus if one.ordinal != 2] == [one for one in facts.gpus if one != lost]
    apart = [(one.a, one.b) for one in healthy.pairs if 2 not in (one.a, one.b)]
    assert [one for one in healthy.pairs if (one.a, one.b) in apart] == [
        one for one in facts.pairs if (one.a, one.b) in apart
    ]
    for one in facts.pairs:
        if (one.a, one.b) not in apart:
            assert (Path.UNKNOWN, None, None) == (one.common_ancestor, one.peer_read, one.peer_write)
            assert not one.nvlinks
    assert facts.problem is not None
    assert "GPU 2" in facts.problem


@pytest.mark.parametrize("error", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, UNKNOWN])
def test_an_unknown_driver_version_hides_no_gpu(error: int, read_machine: Read) -> None:
    healthy = read_machine(description("dgx-1v"))
    facts = read_machine(description("dgx-1v") + f"fail nvmlSystemGetDriverVersion {error}\n")
    assert healthy.model_copy(update={"driver_version": None}) == without_errors(facts)


def test_memory_is_unknown_only_when_both_versions_fail(read_machine: Read) -> None:
    faults = "fail nvmlDeviceGetMemoryInfo 3\nfail nvmlDeviceGetMemoryInfo_v2 3\n"
    facts = read_machine(description("dgx-1v") + faults)
    assert {(None, None)} == {(one.memory_total_bytes, one.memory_used_bytes) for one in facts.gpus}


def test_links_to_a_switch_are_unknown_not_absent_when_nothing_tells_them(read_machine: Read) -> None:
    faults = "fail nvmlDeviceGetFieldValues 999\nfail nvmlDeviceGetNvLinkRemoteDeviceType 999\n"
    facts = read_machine(description("dgx-a100") + faults)
    assert {None} == {one.nvswitch_links for one in facts.gpus} == {one.nvlinks for one in facts.pairs}
    # The PCIe level below is all that is known then.
    assert {Path.NODE, Path.SYS} == {one.link.path for one in facts.pairs}


def test_real_errors_are_reported_on_the_gpu_and_for_the_node(read_machine: Read) -> None:
    facts = read_machine(
        description("rtx-4090-8x")
        + "fail nvmlDeviceGetName 15 2\nfail nvmlDeviceGetUUID 15 5\nfail nvmlDeviceGetP2PStatus 999 3\n"
    )
    assert ("nvmlDeviceGetName: GPU is lost (NVML error 15)",) == facts.gpus[2].errors
    assert ("nvmlDeviceGetUUID: GPU is lost (NVML error 15)",) == facts.gpus[5].errors
    assert facts.problem == (
        "NVML answered in part: "
        "GPU is lost (NVML error 15): nvmlDeviceGetName on GPU 2, nvmlDeviceGetUUID on GPU 5; "
        "Unknown Error (NVML error 999): nvmlDeviceGetP2PStatus on GPU 3"
    )


def test_an_error_that_pynvml_does_not_know_is_told_in_the_librarys_words(read_machine: Read) -> None:
    facts = read_machine(description("rtx-4090-8x") + "fail nvmlDeviceGetName 4242 0\n")
    expected = "nvmlDeviceGetName: an error that only the library knows (NVML error 4242)"
    assert (expected,) == facts.gpus[0].errors


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (9, "NVML does not start: Driver Not Loaded (NVML error 9)"),
        (13, "NVML does not start: Function Not Found (NVML error 13)"),
        (18, "NVML does not start: RM has detected an NVML/RM version mismatch (NVML error 18)"),
        (999, "NVML does not start: Unknown Error (NVML error 999)"),
    ],
)
def test_an_nvml_that_does_not_start_is_no_source(error: int, words: str, read_machine: Read) -> None:
    facts = read_machine(description("dgx-1v") + f"fail nvmlInitWithFlags {error}\n")
    assert NodeFacts(source="none", problem=words) == facts


@pytest.mark.parametrize("error", [NOT_SUPPORTED, FUNCTION_NOT_FOUND, GPU_IS_LOST, UNKNOWN])
def test_an_nvml_that_cannot_count_is_no_source(error: int, read_machine: Read) -> None:
    facts = read_machine(description("dgx-1v") + f"fail nvmlDeviceGetCount_v2 {error}\n")
    assert ("none", fake_nvml.DRIVER, ()) == (facts.source, facts.driver_version, facts.gpus)
    assert facts.problem is not None
    assert facts.problem.startswith("NVML cannot count the GPUs: ")


def test_an_nvml_that_does_not_stop_changes_nothing(read_machine: Read) -> None:
    healthy = read_machine(description("dgx-1v"))
    assert healthy == read_machine(description("dgx-1v") + "fail nvmlShutdown 999\n")


def test_straight_links_are_unknown_not_to_a_switch_when_nothing_tells_their_ends(read_machine: Read) -> None:
    faults = (
        "fail field147 999\n"
        "fail nvmlDeviceGetNvLinkRemoteDeviceType 999\n"
        "fail nvmlDeviceGetNvLinkRemotePciInfo_v2 999\n"
    )
    facts = read_machine(description("dgx-1v") + faults)
    assert {None} == {one.nvswitch_links for one in facts.gpus} == {one.nvlinks for one in facts.pairs}


def test_a_gpu_without_nvlink_has_none_to_a_lost_one_either(read_machine: Read) -> None:
    facts = read_machine(description("rtx-4090-8x") + f"fail nvmlDeviceGetHandleByIndex_v2 {GPU_IS_LOST} 2\n")
    assert {0} == {one.nvlinks for one in facts.pairs}
