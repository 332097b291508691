"""What Linux says of the machine around the GPUs, and each fact that is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as FilePath

import pytest

from placement import topologies
from placement.core.score import score
from placement.core.topology import Link, NumaNode, Path, Topology
from placement.nvml.host import Host
from placement.wire.facts import NicFacts, NodeFacts, NumaFacts
from tests import fake_nvml
from tests.fake_host import ACS_OFF, ACS_ON, FakeHost, acs, port, switch, two_sockets

Read = Callable[[str], NodeFacts]

QUAD = Topology(
    tuple(
        tuple(Link(Path.PIX if a // 2 == b // 2 else Path.SYS, peer=True) for b in range(4)) for a in range(4)
    ),
    numa=((0,), (0,), (1,), (1,)),
)
"""Two switches with two GPUs each, and a socket for each switch."""
MACHINE = fake_nvml.describe(QUAD)


@pytest.fixture
def host(machine: FilePath) -> FakeHost:
    return two_sockets(machine.with_name("host"), map(fake_nvml.bus_id, range(4)))


def test_all_facts_of_a_host(host: FakeHost, read_machine: Read) -> None:
    facts = read_machine(MACHINE)
    near, far = Path.PIX, Path.SYS
    assert facts.nics == (
        NicFacts(
            name="mlx5_0",
            paths=(near, near, far, far),
            pci_bus_id="0000:70:00.0",
            numa_node=0,
            ports=("mlx5_0:1",),
            interfaces=("ens0",),
        ),
        NicFacts(
            name="mlx5_1",
            paths=(far, far, near, near),
            pci_bus_id="0000:71:00.0",
            numa_node=1,
            ports=("mlx5_1:1",),
            interfaces=("ens1",),
        ),
    )
    assert facts.numa_nodes == (
        NumaFacts(number=0, socket=0, cores=((0, 8), (1, 9), (2, 10), (3, 11)), memory_bytes=64 << 30),
        NumaFacts(number=1, socket=1, cores=((4, 12), (5, 13), (6, 14), (7, 15)), memory_bytes=32 << 30),
    )
    assert {(pair.a, pair.b): pair.redirected for pair in facts.pairs if pair.redirected is not None} == {
        (0, 1): False, (2, 3): False,
    }  # fmt: skip
    topology = facts.topology()
    assert [(nic.name, nic.ports, nic.interfaces) for nic in topology.nics] == [
        ("mlx5_0", ("mlx5_0:1",), ("ens0",)), ("mlx5_1", ("mlx5_1:1",), ("ens1",)),
    ]  # fmt: skip
    assert topology.nearest_nic == (near,) * 4
    assert topology.numa_nodes[1] == NumaNode(1, ((4, 12), (5, 13), (6, 14), (7, 15)), 32 << 30, 1)
    assert facts.problem is None


def without(*paths: str) -> Callable[[FakeHost], None]:
    def change(host: FakeHost) -> None:
        for path in paths:
            host.drop(path)

    return change


CARD = f"sys/devices/{switch(0)}/0000:60:08.0/0000:70:00.0"


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        pytest.param(without("sys", "proc", "dev"), {"nics", "numa_nodes", "pairs"}, id="all"),
        pytest.param(without("sys/class"), {"nics"}, id="no classes"),
        pytest.param(without("sys/devices/system/node"), {"numa_nodes"}, id="no NUMA nodes"),
        pytest.param(without("sys/devices/system/node/node1/meminfo"), {"numa_nodes"}, id="no memory"),
        pytest.param(without("sys/devices/system/node/node1/cpulist"), {"numa_nodes"}, id="no CPUs"),
        pytest.param(without("sys/devices/system/cpu"), {"numa_nodes"}, id="no sockets and cores"),
        pytest.param(without("sys/class/infiniband_verbs"), {"nics"}, id="no verbs"),
        pytest.param(without("dev"), {"nics"}, id="no device files for verbs"),
        pytest.param(without("proc/net/route"), {"nics"}, id="no routes"),
        pytest.param(without(f"{CARD}/net"), {"nics"}, id="no interfaces"),
        pytest.param(without(f"{CARD}/infiniband/mlx5_0/ports"), {"nics"}, id="no ports"),
        pytest.param(without(f"{CARD}/infiniband/mlx5_0/device"), {"nics"}, id="no card"),
        pytest.param(without(f"sys/devices/{switch(0)}/{port(0)}/config"), {"pairs"}, id="no ACS"),
        pytest.param(without(f"sys/bus/pci/devices/{fake_nvml.bus_id(0)}"), {"nics", "pairs"}, id="no GPU"),
        pytest.param(without("proc/self/status", "sys/devices/system/node/node0/power"), set(), id="no cpuset"),
    ],
)  # fmt: skip
def test_a_fact_that_is_missing_hides_no_other(
    change: Callable[[FakeHost], None], differs: set[str], host: FakeHost, read_machine: Read
) -> None:
    whole = dict(read_machine(MACHINE))
    host.write("sys/devices/system/node/node0/power", "no NUMA node")
    change(host)
    found = dict(read_machine(MACHINE))
    assert {field for field in whole if whole[field] != found[field]} == differs


def test_what_is_missing_is_unknown_and_never_zero(host: FakeHost, read_machine: Read) -> None:
    host.drop("sys/devices/system/node/node1/meminfo")
    host.drop("sys/devices/system/cpu/cpu4/topology/physical_package_id")
    host.drop("sys/devices/system/cpu/cpu5/topology/thread_siblings_list")
    host.drop(f"sys/bus/pci/devices/{fake_nvml.bus_id(0)}")
    host.drop("dev")
    facts = read_machine(MACHINE)
    assert facts.numa_nodes[1].memory_bytes is None
    assert facts.numa_nodes[1].cores == ((4, 12), (5,), (5, 13), (6, 14), (7, 15))
    assert facts.nics[0].paths == (Path.UNKNOWN, Path.PIX, Path.SYS, Path.SYS)
    assert [nic.ports for nic in facts.nics] == [(), ()]


def test_a_container_tells_of_the_cpus_that_it_may_use(host: FakeHost, read_machine: Read) -> None:
    host.allow("2-4,10")
    assert [node.cores for node in read_machine(MACHINE).numa_nodes] == [((2, 10), (3,)), ((4,),)]


def test_a_gpu_is_near_the_numa_node_that_linux_tells_where_nvml_does_not(
    host: FakeHost, read_machine: Read
) -> None:
    facts = read_machine(MACHINE + "fail nvmlDeviceGetMemoryAffinity 3\n")
    assert [gpu.numa_nodes for gpu in facts.gpus] == [(0,), (0,), (1,), (1,)]


A, B = "0000:10:01.0", "0000:20:00.0"
"""A root port, and the port of a switch towards it."""


@pytest.mark.parametrize(
    ("gpu", "card", "path"),
    [
        (f"pci0000:10/{A}/{B}/0000:30:00.0/G", f"pci0000:10/{A}/{B}/0000:30:01.0/C", Path.PIX),
        (f"pci0000:10/{A}/G", f"pci0000:10/{A}/C", Path.PIX),
        (
            f"pci0000:10/{A}/{B}/0000:30:00.0/0000:40:00.0/0000:50:00.0/G",
            f"pci0000:10/{A}/{B}/0000:30:00.0/0000:40:00.0/0000:50:01.0/C",
            Path.PIX,
        ),
        (
            f"pci0000:10/{A}/{B}/0000:30:00.0/0000:40:00.0/0000:50:00.0/G",
            f"pci0000:10/{A}/{B}/0000:30:01.0/C",
            Path.PXB,
        ),
        (f"pci0000:10/{A}/{B}/0000:30:00.0/G", f"pci0000:10/{A}/C", Path.PXB),
        (f"pci0000:10/{A}/G", "pci0000:10/0000:10:02.0/C", Path.PHB),
        ("pci0000:10/G", "pci0000:10/C", Path.PHB),
        (f"pci0000:10/{A}/G", "pci0000:20/0000:20:01.0/C", Path.NODE),
        ("LNXSYSTM:00/VMBUS:00/a/pci0001:00/G", "LNXSYSTM:00/VMBUS:00/b/pci0001:00/C", Path.NODE),
    ],
)
def test_paths_are_those_of_the_matrix(
    gpu: str, card: str, path: Path, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    far, unknown = (Path.SYS, Path.UNKNOWN) if path is Path.NODE else (path, path)
    addresses = "0000:e0:00.0", "0000:f0:00.0"

    def found(numa: int, only_node: bool = False) -> set[Path]:
        """From a GPU on NUMA node 0 to a card on that NUMA node, and back."""
        fake = FakeHost(tmp_path / f"{numa}{only_node}")
        monkeypatch.setenv("PLACEMENT_HOST_ROOT", str(fake.root))
        fake.device(gpu.replace("G", addresses[0]), 0)
        fake.device(card.replace("C", addresses[1]), numa)
        if only_node:
            fake.numa_node(0, "0-1")
        host = Host()
        one, other = map(host.device, addresses)
        return {host.path(one, other), host.path(other, one)}

    assert found(numa=0) == {path}
    assert found(numa=1) == {far}
    assert found(numa=-1) == {unknown}
    assert found(numa=-1, only_node=True) == {path}


@pytest.mark.parametrize(
    ("control", "redirected", "peer"),
    [(ACS_ON, True, False), (0b0100, True, False), (0b1000, True, False), (ACS_OFF, False, True), (None, False, True)],
)  # fmt: skip
@pytest.mark.parametrize("gpu", [2, 3])
def test_acs_on_the_way_turns_peer_to_peer_off(
    control: int | None, redirected: bool, peer: bool, gpu: int, host: FakeHost, read_machine: Read
) -> None:
    host.bridge(f"{switch(1)}/{port(gpu)}", acs(control))
    facts = read_machine(MACHINE)
    assert [(pair.redirected, pair.peer) for pair in facts.pairs] == [
        (False, True), *[(None, True)] * 4, (redirected, peer),
    ]  # fmt: skip
    topology = facts.topology()
    assert topology.link(2, 3) == Link(Path.PIX, peer=peer)
    assert (score(topology, (0, 1)) == score(topology, (2, 3))) is peer


@pytest.mark.parametrize("config", [acs(ACS_ON)[:64], acs(ACS_ON)[:256], b"\xff" * 4096, b""])
def test_acs_that_only_root_may_see_is_unknown(config: bytes, host: FakeHost, read_machine: Read) -> None:
    for gpu in range(4):
        host.bridge(f"{switch(gpu // 2)}/{port(gpu)}", config)
    facts = read_machine(MACHINE)
    assert [pair.redirected for pair in facts.pairs] == [None] * 6
    assert facts.topology().link(0, 1) == Link(Path.PIX, peer=True), "as the driver says"


def test_capabilities_that_go_round_in_circles_end(host: FakeHost, read_machine: Read) -> None:
    space = bytearray(acs(None))
    space[0x100:0x104] = (0x0001 | 1 << 16 | 0x100 << 20).to_bytes(4, "little")
    for gpu in (0, 1):
        host.bridge(f"{switch(0)}/{port(gpu)}", bytes(space))
    assert read_machine(MACHINE).pairs[0].redirected is False


def test_of_cards_without_rdma_the_ethernet_interfaces_are_told(host: FakeHost, read_machine: Read) -> None:
    host.drop("sys/class/infiniband")
    assert [(nic.name, nic.ports, nic.interfaces) for nic in read_machine(MACHINE).nics] == [
        ("ens0", (), ("ens0",)), ("ens1", (), ("ens1",)),
    ]  # fmt: skip


def test_only_cards_count_and_only_what_carries_packets(host: FakeHost, read_machine: Read) -> None:
    host.drop("sys/class/infiniband")
    virtio = host.device("pci0000:10/0000:10:05.0", 0)
    host.net("eth0", f"{virtio}/virtio2")
    usb = host.device("pci0000:10/0000:10:06.0", 0)
    host.net("eth1", f"{usb}/usb1/1-1")
    host.net("GPU7", virtio)
    host.write("sys/devices/virtual/net/lo/operstate", "unknown\n")
    host.link("sys/class/net/lo", "sys/devices/virtual/net/lo")
    host.write(f"{CARD}/net/ens0/operstate", "down\n")
    host.routes("ens0", "eth0")
    nics = read_machine(MACHINE).nics
    assert {nic.name: nic.interfaces for nic in nics} == {"ens0": (), "ens1": (), "eth0": ("eth0",)}
    assert next(nic for nic in nics if nic.name == "eth0").paths == (Path.PHB, Path.PHB, Path.SYS, Path.SYS)


def test_cards_are_in_the_order_of_their_numbers(host: FakeHost, read_machine: Read) -> None:
    for number in (10, 2):
        host.rdma(f"mlx5_{number}", host.device(f"pci0000:10/0000:10:0{number % 9}.0", 0), state="1: DOWN")
    nics = read_machine(MACHINE).nics
    assert [nic.name for nic in nics] == ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_10"]
    assert [nic.ports for nic in nics[2:]] == [(), ()]


H100 = topologies.load("dgx-h100")


@pytest.mark.parametrize(
    ("line", "fabric", "usable", "problem"),
    [
        ("3 0 1", "completed", True, None),
        ("3 0 0", "completed", True, None),
        ("0 0 0", None, True, None),
        ("1 0 0", "not started", False, "cannot be used"),
        ("2 0 0", "in progress", False, "cannot be used"),
        ("3 999 1", "failed", False, "cannot be used"),
        ("3 0 2", "unhealthy", True, "is impaired"),
        ("3 0 3", "limited capacity", True, "is impaired"),
    ],
)  # fmt: skip
def test_an_nvswitch_is_there_once_its_fabric_is(
    line: str, fabric: str | None, usable: bool, problem: str | None, read_machine: Read
) -> None:
    others = [f"fabric {gpu} 3 0 1" for gpu in range(8) if gpu != 3]
    facts = read_machine(fake_nvml.describe(H100, *others, f"fabric 3 {line}", capability=(9, 0)))
    assert [gpu.fabric for gpu in facts.gpus] == ["completed"] * 3 + [fabric] + ["completed"] * 4
    said = f"NVSwitch {problem} on GPU 3, since the state of its fabric is {fabric!r}: look at nvidia-fabricmanager"
    assert facts.problem == (problem and f"{said} there")
    assert {gpu.nvswitch_links for gpu in facts.gpus} == {18}, "the links are up"
    through = {pair.nvlinks for pair in facts.pairs if 3 in (pair.a, pair.b)}
    assert through == ({18} if usable else {0})
    assert {pair.nvlinks for pair in facts.pairs if 3 not in (pair.a, pair.b)} == {18}


@pytest.mark.parametrize(
    ("fault", "fabric"), [("fabric_v3 25", "in progress"), ("nvmlDeviceGetGpuFabricInfoV 13", None)]
)
def test_older_drivers_tell_the_state_without_the_health_or_nothing(
    fault: str, fabric: str | None, read_machine: Read
) -> None:
    facts = read_machine(
        fake_nvml.describe(H100, *(f"fabric {gpu} 2 0 2" for gpu in range(8)), f"fail {fault}")
    )
    assert {gpu.fabric for gpu in facts.gpus} == {fabric}
    assert [gpu.errors for gpu in facts.gpus] == [()] * 8


def test_a_gpu_without_links_to_a_switch_has_no_fabric(read_machine: Read) -> None:
    facts = read_machine("gpus 1\nfabric 0 1 0 0\n")
    assert (facts.gpus[0].fabric, facts.problem) == (None, None)
