"""What a healthy machine's NVML says, as facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from placement import topologies
from placement.core.matrix import parse_matrix
from placement.core.topology import Lanes, Link, Path
from placement.wire.facts import GpuFacts, NodeFacts, PairFacts
from tests import fake_nvml

Read = Callable[[str], NodeFacts]


WHOLE = [name for name in topologies.names() if not topologies.describe(name).instances]
"""Machines that are not cut up; for the others see test_mig.py."""

TWO_GPUS = """
driver 580.95.05
gpus 2
uuid 0 GPU-a
name 0 NVIDIA A100 80GB PCIe
pci 0 10000 e1 1f
capability 0 8 0
memory 0 85899345920 1073741824 3221225472
numa 0 0 5 64
cpus 0 0 1 63 64 8191
mig 0 1
pcie 0 4 8
uuid 1 GPU-b
name 1 NVIDIA A100 80GB PCIe
pci 1 0 a 0
capability 1 8 0
ancestor 0 1 40
peer 0 1 0 3
"""

QUAD = parse_matrix("""
        GPU0  GPU1  GPU2  GPU3
GPU0     X    NV2   NV1   SYS
GPU1    NV2    X    SYS   NV1
GPU2    NV1   SYS    X    NV2
GPU3    SYS   NV1   NV2    X
""")
FOUR_ON_A_SWITCH = "\n".join(["gpus 4", *(f"pci {gpu} 0 {gpu + 1} 0" for gpu in range(4))]) + "\n"


@pytest.mark.parametrize("name", WHOLE)
def test_every_recorded_machine_reads_as_what_its_matrix_says(name: str, read_machine: Read) -> None:
    recorded = replace(topologies.load(name), nics=())  # NVML does not tell them
    capability = topologies.describe(name).compute_capability
    facts = read_machine(fake_nvml.describe(recorded, capability=capability))
    assert fake_nvml.as_matrix(recorded) == fake_nvml.as_matrix(facts.topology())
    assert (recorded.model, None) == (facts.topology().model, facts.problem)


@pytest.mark.parametrize("name", WHOLE)
def test_a_reading_agrees_with_the_catalogue_on_every_fact_that_both_know(
    name: str, read_machine: Read
) -> None:
    recorded = topologies.facts(name)
    capability = topologies.describe(name).compute_capability
    facts = read_machine(fake_nvml.describe(topologies.load(name), capability=capability))
    for field in ("name", "compute_capability", "numa_nodes", "cpus", "nvswitch_links"):
        assert [getattr(gpu, field) for gpu in recorded.gpus] == [getattr(gpu, field) for gpu in facts.gpus]
    assert [pair.nvlinks for pair in recorded.pairs] == [pair.nvlinks for pair in facts.pairs]


def test_all_facts_of_two_gpus(read_machine: Read) -> None:
    facts = read_machine(TWO_GPUS)
    first, second = facts.gpus
    assert first == GpuFacts(
        ordinal=0,
        uuid="GPU-a",
        name="NVIDIA A100 80GB PCIe",
        memory_total_bytes=80 << 30,
        memory_used_bytes=4 << 30,
        compute_capability=(8, 0),
        pci_bus_id="10000:e1:1f.0",
        numa_nodes=(0, 5, 64),
        cpus=(0, 1, 63, 64, 8191),
        mig_enabled=True,
        pcie_generation=4,
        pcie_width=8,
        nvswitch_links=0,
    )
    assert second == GpuFacts(
        ordinal=1,
        uuid="GPU-b",
        name="NVIDIA A100 80GB PCIe",
        compute_capability=(8, 0),
        pci_bus_id="0000:0a:00.0",
        nvswitch_links=0,
    )
    assert (
        PairFacts(a=0, b=1, common_ancestor=Path.NODE, nvlinks=0, peer_read=True, peer_write=False),
    ) == facts.pairs
    assert ("nvml", "580.95.05", None) == (facts.source, facts.driver_version, facts.problem)
    topology = facts.topology()
    assert topology.link(0, 1) == Link(Path.NODE, peer=False), "writes are not allowed"
    assert topology.lanes == (Lanes(4, 8), None)


@pytest.mark.parametrize(
    ("reads", "writes", "peer"),
    [(0, 0, True), (0, 3, False), (3, 0, False), (6, 0, None), (0, 6, None), (6, 6, None), (6, 3, False)],
)
def test_peer_to_peer_is_known_only_if_both_ways_are(
    reads: int, writes: int, peer: bool | None, read_machine: Read
) -> None:
    """NVML's own codes: 0 allowed, 3 the GPU does not support it, 6 unknown."""
    facts = read_machine(f"gpus 2\nancestor 0 1 10\npeer 0 1 {reads} {writes}\n")
    assert facts.topology().link(0, 1) == Link(Path.PIX, peer=peer)


VIRTUAL = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: {}\nmodel name\t: {}\n\n"
EPYC = VIRTUAL.format("AuthenticAMD", 23, 49, "AMD EPYC 7502 32-Core Processor")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (EPYC + EPYC, "AMD EPYC 7502 32-Core Processor, Rome"),
        (VIRTUAL.format("AuthenticAMD", 25, 17, "AMD EPYC"), "AMD EPYC, Genoa"),
        (VIRTUAL.format("AuthenticAMD", 25, 1, "AMD EPYC-Milan Processor"), "AMD EPYC-Milan Processor"),
        (
            VIRTUAL.format("GenuineIntel", 6, 85, "Intel(R) Xeon(R) CPU @ 2.00GHz"),
            "Intel(R) Xeon(R) CPU @ 2.00GHz, Skylake",
        ),
        (VIRTUAL.format("AuthenticAMD", 99, 1, "AMD EPYC"), "AMD EPYC"),
        (EPYC + "processor: 1\nmodel name: Intel Xeon\n", None),
        ("processor : 0\nBogoMIPS : 50.00\n", None),  # Arm tells no name
        (None, None),
    ],
)
def test_the_hosts_processors_are_named_where_linux_tells(
    text: str | None, name: str | None, machine: FilePath, read_machine: Read
) -> None:
    if text is not None:
        (folder := machine.with_name("host") / "proc").mkdir(parents=True)
        (folder / "cpuinfo").write_text(text)
    facts = read_machine("driver 1\ngpus 1\n")
    assert (facts.cpu, facts.topology().cpu) == (name, name)


def test_a_driver_without_gpus_is_a_reading_of_none(read_machine: Read) -> None:
    assert NodeFacts(source="nvml", driver_version="580.95.05") == read_machine("driver 580.95.05\ngpus 0\n")


@pytest.mark.parametrize(
    ("level", "path"),
    [
        (0, Path.PIX),
        (10, Path.PIX),
        (20, Path.PXB),
        (30, Path.PHB),
        (40, Path.NODE),
        (50, Path.SYS),
        (77, Path.UNKNOWN),
    ],
)
def test_common_ancestors_are_the_paths_of_the_matrix(level: int, path: Path, read_machine: Read) -> None:
    (pair,) = read_machine(f"gpus 2\nancestor 0 1 {level}\n").pairs
    assert path == pair.common_ancestor


@pytest.mark.parametrize(
    ("status", "allowed"),
    [(0, True), (1, False), (2, False), (3, False), (4, False), (5, False), (6, None)],
)
def test_only_ok_allows_peer_access_and_unknown_says_nothing(
    status: int, allowed: bool | None, read_machine: Read
) -> None:
    (pair,) = read_machine(f"gpus 2\npeer 0 1 {status} 0\n").pairs
    assert (allowed, True) == (pair.peer_read, pair.peer_write)


def test_the_level_below_nvlink_is_read_too(read_machine: Read) -> None:
    (pair,) = read_machine("gpus 2\npci 0 0 1 0\npci 1 0 2 0\nlinks 0 1 4\nancestor 0 1 30\n").pairs
    assert (4, Path.PHB) == (pair.nvlinks, pair.common_ancestor)


def test_gpus_of_several_models_have_no_common_one(read_machine: Read) -> None:
    facts = read_machine("gpus 2\nname 0 NVIDIA GeForce RTX 5090\nname 1 NVIDIA GeForce RTX 4090\n")
    assert facts.topology().model is None


def test_a_switch_whose_address_is_hidden_is_still_a_switch(read_machine: Read) -> None:
    # Virtual machines: no kind, and FFFFFFFF:FF:FF.0 as the address.
    recorded = replace(topologies.load("dgx-a100"), nics=())
    # Without field 147, the switch can only be concluded.
    facts = read_machine(fake_nvml.describe(recorded, "hidden", "fail field147 3"))
    assert fake_nvml.as_matrix(recorded) == fake_nvml.as_matrix(facts.topology())


def test_a_gpu_with_fewer_live_links_to_the_switch_limits_its_pairs(read_machine: Read) -> None:
    facts = read_machine(FOUR_ON_A_SWITCH + "switch 0 18\nswitch 1 17\nidle 1 1\nswitch 2 18\nswitch 3 18\n")
    assert [18, 17, 18, 18] == [gpu.nvswitch_links for gpu in facts.gpus]
    assert {(0, 1): 17, (0, 2): 18, (0, 3): 18, (1, 2): 17, (1, 3): 17, (2, 3): 18} == {
        (pair.a, pair.b): pair.nvlinks for pair in facts.pairs
    }


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_links_that_are_down_do_not_count(capability: tuple[int, int], read_machine: Read) -> None:
    down = (f"idle {gpu} {1 + gpu}" for gpu in range(4))
    facts = read_machine(fake_nvml.describe(QUAD, *down, capability=capability))
    assert [2, 1, 0, 0, 1, 2] == [pair.nvlinks for pair in facts.pairs]


def test_links_to_a_gpu_that_this_container_may_not_see_count_for_nobody(read_machine: Read) -> None:
    # GPUs 0 and 3 of the quad: their links lead to GPUs 1 and 2, of which NVML tells only the addresses.
    whole = fake_nvml.describe(QUAD)
    facts = read_machine(
        whole + "fail nvmlDeviceGetHandleByIndex_v2 4 1\nfail nvmlDeviceGetHandleByIndex_v2 4 2\n"
    )
    assert {(0, 3): 0} == {(p.a, p.b): p.nvlinks for p in facts.pairs if (p.a, p.b) == (0, 3)}


def test_from_hopper_on_a_field_tells_the_state_of_a_link(read_machine: Read) -> None:
    # The older call is deprecated there; a library without it still tells everything.
    facts = read_machine(fake_nvml.describe(QUAD, "fail nvmlDeviceGetNvLinkState 13", capability=(9, 0)))
    assert fake_nvml.as_matrix(facts.topology()) == QUAD
