"""What a healthy machine's NVML says, as facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from placement import topologies
from placement.core.matrix import parse_matrix
from placement.core.topology import Lanes, Link, Path, Topology
from placement.wire.facts import GpuFacts, NodeFacts, NvLinkFacts, PairFacts
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
minor 0 3
uuid 1 GPU-b
name 1 NVIDIA A100 80GB PCIe
pci 1 0 a 0
capability 1 8 0
virtual 1 2
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
        minor_number=3,
        nvlinks=(),
        nvswitch_links=0,
        vgpu=False,
    )
    assert second == GpuFacts(
        ordinal=1,
        uuid="GPU-b",
        name="NVIDIA A100 80GB PCIe",
        compute_capability=(8, 0),
        pci_bus_id="0000:0a:00.0",
        nvlinks=(),
        nvswitch_links=0,
        vgpu=True,
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


PAIR = "gpus 2\npci 0 0 1 0\npci 1 0 2 0\nancestor 0 1 30\n"


@pytest.mark.parametrize(
    ("capability", "version", "said"), [((8, 6), 5, "3.1"), ((9, 0), 6, "4.0"), ((8, 0), 77, None)]
)
def test_each_link_of_a_gpu_has_a_state_and_a_speed(
    capability: tuple[int, int], version: int, said: str | None, read_machine: Read
) -> None:
    lines = [
        f"capability {gpu} {capability[0]} {capability[1]}\nnvlink {gpu} {version} 14062" for gpu in (0, 1)
    ]
    facts = read_machine("\n".join([PAIR, "idle 0 1\nidle 1 1\nlinks 0 1 3", *lines]))
    up, down = NvLinkFacts(state="active", mb_per_s=14_062), NvLinkFacts(state="inactive")
    assert [(gpu.nvlinks, gpu.nvlink_version) for gpu in facts.gpus] == [((down, up, up, up), said)] * 2
    assert facts.topology().link(0, 1) == Link(Path.NVLINK, 3)


def test_the_speed_of_the_seventh_link_is_told_by_another_field(read_machine: Read) -> None:
    facts = read_machine(PAIR + "capability 0 8 0\nlinks 0 1 8\nnvlink 0 4 25781\nnvlink 1 4 25781\n")
    assert {(len(gpu.nvlinks or ()), *{one.mb_per_s for one in gpu.nvlinks or ()}) for gpu in facts.gpus} == {
        (8, 25_781)
    }


DGX_1V = topologies.load("dgx-1v")
CARDS = parse_matrix("\n".join(["GPU0 GPU1", "GPU0 X NV4", "GPU1 NV4 X"]))


@pytest.mark.parametrize(
    ("case", "wiring", "capability", "lines", "down"),
    [
        ("a bridge that is sound", CARDS, (8, 0), ["idle 0 8", "idle 1 8"], ""),
        ("a bridge with a bad link", "links 0 1 3", (8, 6), ["idle 0 1", "idle 1 1"], "3 of GPU 0, 3 of GPU 1"),
        ("one of Turing", "links 0 1 1", (7, 5), ["idle 0 1", "idle 1 1"], "1 of GPU 0, 1 of GPU 1"),
        ("cards without a bridge", "", (8, 6), ["idle 0 4", "idle 1 4"], ""),
        ("part of a mesh, passed through", "links 0 1 2", (7, 0), ["idle 0 4", "idle 1 4"], ""),
        ("links that do not tell", "links 0 1 3", (8, 6), ["idle 0 1", "fail nvmlDeviceGetNvLinkState 999 0"], ""),
        ("not joined to a switch", "switch 0 18", (9, 0), ["idle 1 18"], "0-17 of GPU 1"),
        ("cut up", "switch 0 18", (9, 0), ["idle 1 18", "mig 1 1"], ""),
    ],
)  # fmt: skip
def test_a_link_that_is_down_is_named_where_it_should_be_up(
    case: str,
    wiring: str | Topology,
    capability: tuple[int, int],
    lines: list[str],
    down: str,
    read_machine: Read,
) -> None:
    told = (
        fake_nvml.describe(wiring, *lines, capability=capability)
        if isinstance(wiring, Topology)
        else "\n".join(
            [PAIR, *(f"capability {n} {capability[0]} {capability[1]}" for n in (0, 1)), wiring, *lines]
        )
    )
    problem = read_machine(told).problem or ""
    assert ("are down" in problem) == bool(down), case
    assert f"are down: {down};" in problem or not down, case


def test_a_link_of_a_mesh_that_is_down_is_missing_and_named(read_machine: Read) -> None:
    """GPUs 0 and 3 of a DGX-1V have two links, one of which is down at both ends."""
    whole = fake_nvml.describe(DGX_1V, capability=(7, 0))
    links = DGX_1V.link(0, 3).nvlinks
    broken = whole.replace(f"links 0 3 {links}", f"links 0 3 {links - 1}") + "idle 0 1\nidle 3 1\n"
    sound, facts = read_machine(whole), read_machine(broken)
    assert links == 2 and sound.problem is None
    assert facts.topology().link(0, 3) == Link(Path.NVLINK, 1)
    assert facts.problem == (
        "NVLinks are down: 5 of GPU 0, 5 of GPU 3; see `nvidia-smi nvlink --status`, and Xid 74 in the kernel's log"
    )


H100 = fake_nvml.describe(replace(topologies.load("dgx-h100"), nics=()), capability=(9, 0))
SOUND = "".join(f"fabric {gpu} 3 0 1\n" for gpu in range(8))


@pytest.mark.parametrize(
    ("case", "lines", "environment", "nvls"),
    [
        ("all is sound", SOUND, {}, True),
        ("told to do what it does anyway", SOUND, {"NCCL_NVLS_ENABLE": "2"}, True),
        ("told what is no number", SOUND, {"NCCL_NVLS_ENABLE": "off"}, True),
        ("off in the environment", SOUND, {"NCCL_NVLS_ENABLE": "0"}, False),
        ("off, whatever the fabric's state", "", {"NCCL_NVLS_ENABLE": "0x0"}, False),
        ("a driver older than CUDA 12.1", SOUND + "driver 525.147.05\n", {}, False),
        ("the first driver that does", SOUND + "driver 530.30.02\n", {}, True),
        (
            "a driver that does not tell its version",
            SOUND + "fail nvmlSystemGetDriverVersion 999\n",
            {},
            None,
        ),
        ("the fabric's state is not told", "", {}, None),
        ("the fabric is impaired", SOUND + "fabric 3 3 0 3\n", {}, None),
        ("a GPU is not registered", SOUND + "fabric 3 2 0 0\n", {}, None),
        ("virtual GPUs", SOUND + "virtual 3 2\n", {}, None),
        ("passed through to a virtual machine", SOUND + "virtual 3 1\n", {}, True),
        ("nobody tells", SOUND + "fail nvmlDeviceGetVirtualizationMode 999 3\n", {}, None),
    ],
)
def test_whether_the_switch_reduces(
    case: str,
    lines: str,
    environment: dict[str, str],
    nvls: bool | None,
    read_machine: Read,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: FilePath,
) -> None:
    monkeypatch.setenv("NCCL_CONF_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    facts = read_machine(H100 + lines)
    assert (facts.nvls, facts.topology().nvls) == (nvls, nvls), case


@pytest.mark.parametrize(
    ("file", "variable", "nvls"),
    [
        ("NCCL_DEBUG=INFO\nNCCL_NVLS_ENABLE=0\n", None, False),
        ("NCCL_NVLS_ENABLE=0\n", "1", True),
        ("NCCL_NVLS_ENABLE=1\nNCCL_NVLS_ENABLE=0\n", None, True),
        ("# NCCL_NVLS_ENABLE=0\n", None, True),
    ],
)
def test_nccls_own_file_counts_where_the_environment_says_nothing(
    file: str,
    variable: str | None,
    nvls: bool,
    read_machine: Read,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: FilePath,
) -> None:
    (tmp_path / "nccl.conf").write_text(file)
    monkeypatch.setenv("NCCL_CONF_FILE", str(tmp_path / "nccl.conf"))
    monkeypatch.setenv("NCCL_NVLS_ENABLE", variable or "")
    assert read_machine(H100 + SOUND).nvls is nvls


def test_switches_before_hopper_do_not_reduce(read_machine: Read) -> None:
    machine = replace(topologies.load("dgx-a100"), nics=())
    assert read_machine(fake_nvml.describe(machine) + SOUND).nvls is None
