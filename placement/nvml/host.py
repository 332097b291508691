"""What Linux reports, without root, of the machine around the GPUs: NUMA nodes, network cards, ACS, processors.

It is read from ``/proc``, ``/sys`` and ``/dev/infiniband``, or from these below ``PLACEMENT_HOST_ROOT``. What is
missing, as in a container with a restricted ``/sys``, is unknown: ``None``, ``()``, ``Path.UNKNOWN``. Nothing here
fails.

PCIe is a tree, and a device's real path in ``/sys/devices`` follows it: the host bridge (``pci0000:17``), then
bridge after bridge (a root port; a switch's port towards the host and one towards the device), then the device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path as FilePath

from placement.core.topology import NIC_NAME, Path
from placement.wire.facts import NicFacts, NumaFacts

# Linux: arch/x86/include/asm/intel-family.h, and for AMD arch/x86/kernel/cpu/amd.c.
_INTEL, _AMD = "GenuineIntel", "AuthenticAMD"
_FAMILIES = (
    ("Haswell", _INTEL, "6", "63"),
    ("Broadwell", _INTEL, "6", "79"),
    ("Skylake", _INTEL, "6", "85"),  # and Cascade Lake
    ("Ice Lake", _INTEL, "6", "106"),
    ("Sapphire Rapids", _INTEL, "6", "143"),
    ("Emerald Rapids", _INTEL, "6", "207"),
    ("Granite Rapids", _INTEL, "6", "173"),
    ("Rome", _AMD, "23", "49"),
    ("Milan", _AMD, "25", "1"),
    ("Genoa", _AMD, "25", "17"),
    ("Bergamo", _AMD, "25", "160"),
    ("Turin", _AMD, "26", "2"),
    ("Turin", _AMD, "26", "17"),
)

_HOST_BRIDGE = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}")
_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_VIRTIO = re.compile(r"virtio\d+")

# PCI Express Base Specification, 7.7.11: the capability, and in its control register what sends requests and
# completions between devices to the root complex. Linux has them in include/uapi/linux/pci_regs.h.
_CONFIG_BYTES, _FIRST_EXTENDED = 4096, 0x100
_ACS_ID, _ACS_CONTROL, _ACS_REDIRECTS = 0x000D, 6, 0b1100

_RUNS = re.compile(r"(\d+)|(\D+)", re.ASCII)
_MOST_CPUS = 8192  # NR_CPUS of Linux's Kconfig


@dataclass(frozen=True)
class Device:
    """A PCI device.

    Attributes:
        folder: its real path in ``/sys/devices``.
        chain: the names on the path to it: host bridge, bridges, itself.
        numa: its NUMA node; ``None`` if unknown.
    """

    folder: FilePath
    chain: tuple[str, ...]
    numa: int | None


class Host:
    """One reading of a machine. Files are read when they are first asked for."""

    def __init__(self) -> None:
        self._root = FilePath(os.environ.get("PLACEMENT_HOST_ROOT") or "/")
        self._sys = self._root / "sys"
        self._acs: dict[FilePath, bool | None] = {}

    @cached_property
    def cpu(self) -> str | None:
        """The processors' product name, and their family; ``None`` if they differ or have none.

        A virtual machine's name is often only "AMD EPYC"; family and model then say more.
        """
        told: dict[str, set[str]] = {}
        for row in _text(self._root / "proc/cpuinfo").splitlines():
            key, _, value = row.partition(":")
            told.setdefault(key.strip(), set()).add(value.strip())
        keys = ("vendor_id", "cpu family", "model")
        found = next(
            (
                name
                for name, *numbers in _FAMILIES
                if numbers == [",".join(told.get(key, ())) for key in keys]
            ),
            None,
        )
        names = told.get("model name", set())
        if len(names) != 1:
            return None
        [name] = names
        return f"{name}, {found}" if found and found.lower() not in name.lower() else name

    @cached_property
    def numa_nodes(self) -> tuple[NumaFacts, ...]:
        """The NUMA nodes, with those of their CPUs that this process may use."""
        found = []
        for folder in _numbered(self._sys / "devices/system/node", "node"):
            cpus = set(_numbers(_text(folder / "cpulist")))
            if self._allowed is not None:
                cpus &= self._allowed
            cores = {tuple(sorted(cpus & {cpu, *self._siblings(cpu)})) for cpu in cpus}
            packages = {_number(_text(self._cpu(cpu) / "physical_package_id")) for cpu in cpus}
            memory = re.search(r"MemTotal:\s+(\d+) kB", _text(folder / "meminfo"))
            found.append(
                NumaFacts(
                    number=int(folder.name.removeprefix("node")),
                    socket=packages.pop() if len(packages) == 1 else None,
                    cores=tuple(sorted(cores)),
                    memory_bytes=int(memory[1]) << 10 if memory else None,
                )
            )
        return tuple(found)

    def device(self, address: str | None, numa: Sequence[int] = ()) -> Device | None:
        """The device at a PCI address (``0000:1b:00.0``), if Linux shows it.

        Args:
            address: where it is.
            numa: its NUMA nodes from another source, used if Linux does not report them.
        """
        found = address and self._at(self._sys / "bus/pci/devices" / address)
        if not found:
            return None
        if found.numa is None and numa:
            return replace(found, numa=numa[0])
        return found

    def path(self, a: Device | None, b: Device | None) -> Path:
        """The path between two devices, in the terms of ``nvidia-smi topo -m``.

        A switch is two bridges in a row, so devices on one switch are two steps below their common bridge.
        """
        if a is None or b is None:
            return Path.UNKNOWN
        common = _common(a, b)
        if common > 1:
            return Path.PIX if max(len(a.chain), len(b.chain)) - common <= 2 else Path.PXB
        if common == 1:
            return Path.PHB
        if a.numa is None or b.numa is None:
            return Path.UNKNOWN
        return Path.NODE if a.numa == b.numa else Path.SYS

    def redirected(self, a: Device | None, b: Device | None) -> bool | None:
        """Whether ACS redirects traffic between two devices below one root port through the root complex.

        ``None`` if unknown, as for all users except root: they see only 64 bytes of a bridge's configuration.
        Also ``None`` if they have no common bridge, as all traffic then goes through the root complex anyway.
        """
        if a is None or b is None or (common := _common(a, b)) < 2:
            return None
        bridges = {
            folder
            for device in (a, b)
            for folder in [*device.folder.parents][: len(device.chain) - common - 1]
        }
        for folder in bridges - self._acs.keys():
            self._acs[folder] = _redirects(folder / "config")
        states = {self._acs[folder] for folder in bridges}
        return True if True in states else None if None in states or not states else False

    def nics(self, gpus: Sequence[Device | None]) -> tuple[NicFacts, ...]:
        """The network cards: the RDMA devices, as in ``nvidia-smi topo -m``, or else the Ethernet cards."""
        rdma = self._cards("infiniband")
        found = []
        for name, card in rdma or self._cards("net"):
            net = _names(card.folder / "net") if rdma else [name]
            found.append(
                NicFacts(
                    name=name,
                    paths=tuple(self.path(gpu, card) for gpu in gpus),
                    pci_bus_id=card.chain[-1],
                    numa_node=card.numa,
                    ports=self._ports(name) if rdma else (),
                    interfaces=tuple(one for one in net if self._carries(one)),
                )
            )
        return tuple(found)

    def _cards(self, kind: str) -> list[tuple[str, Device]]:
        """Names of a class of ``/sys/class`` that are PCI cards, and the cards; ``mlx5_2`` before ``mlx5_10``."""
        names = [name for name in _names(self._sys / "class" / kind) if NIC_NAME.fullmatch(name)]
        found = [(name, self._at(self._sys / "class" / kind / name / "device")) for name in names]
        return [(name, card) for name, card in found if card is not None]

    def _ports(self, name: str) -> tuple[str, ...]:
        """The ports of an RDMA device that are up, if this process may use it: ``mlx5_0:1``."""
        verbs = self._sys / "class/infiniband_verbs"
        mine = [one for one in _names(verbs) if _text(verbs / one / "ibdev").strip() == name]
        if not any((self._root / "dev/infiniband" / one).exists() for one in mine):
            return ()
        ports = self._sys / "class/infiniband" / name / "ports"
        return tuple(
            f"{name}:{port}" for port in _names(ports) if "ACTIVE" in _text(ports / port / "state").split()
        )

    def _carries(self, interface: str) -> bool:
        """Whether an interface is up, and the network that this process sees is reached over it."""
        state = _text(self._sys / "class/net" / interface / "operstate").strip()
        return state == "up" and interface in self._routed

    @cached_property
    def _routed(self) -> frozenset[str]:
        rows = _text(self._root / "proc/net/route").splitlines()[1:]
        return frozenset(row.split()[0] for row in rows if row.split())

    @cached_property
    def _allowed(self) -> frozenset[int] | None:
        told = re.search(r"^Cpus_allowed_list:\s*(\S+)", _text(self._root / "proc/self/status"), re.MULTILINE)
        return frozenset(_numbers(told[1])) if told else None

    def _cpu(self, cpu: int) -> FilePath:
        return self._sys / f"devices/system/cpu/cpu{cpu}/topology"

    def _siblings(self, cpu: int) -> tuple[int, ...]:
        """The threads of the CPU's core."""
        return _numbers(_text(self._cpu(cpu) / "thread_siblings_list"))

    def _at(self, link: FilePath) -> Device | None:
        """The PCI device that a link of ``/sys`` leads to; for a virtio device its card."""
        folder = FilePath(os.path.realpath(link))
        if _VIRTIO.fullmatch(folder.name):
            folder = folder.parent
        parts = folder.parts
        bridge = next((i for i, part in enumerate(parts) if _HOST_BRIDGE.fullmatch(part)), None)
        if bridge is None or not _ADDRESS.fullmatch(parts[-1]) or not folder.is_dir():
            return None
        numa = _number(_text(folder / "numa_node"))
        if numa is None and len(self.numa_nodes) == 1:
            numa = self.numa_nodes[0].number
        return Device(folder, ("/".join(parts[: bridge + 1]), *parts[bridge + 1 :]), numa)


def nccl_number(name: str) -> int | None:
    """NCCL's setting in a worker here: from the environment, which Ray passes on, or from NCCL's own files.

    The first one found counts, as in ``src/misc/param.cc`` of NVIDIA/nccl. ``None`` if there is none, or if it is no
    number, which NCCL ignores.
    """
    files = (os.environ.get("NCCL_CONF_FILE") or "~/.nccl.conf", "/etc/nccl.conf")
    rows = [row for file in files for row in _text(FilePath(os.path.expanduser(file))).splitlines()]
    told = [value for key, _, value in (row.partition("=") for row in rows) if key == name]
    try:
        return int(os.environ.get(name) or told[0], 0)
    except (IndexError, ValueError):
        return None


def _common(a: Device, b: Device) -> int:
    """How many names the paths to two devices have in common at the beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a.chain, b.chain, strict=False)))


def _redirects(config: FilePath) -> bool | None:
    """Whether a bridge's ACS redirects peer-to-peer requests or completions; ``None`` if it cannot be read."""
    try:
        space = config.read_bytes()
    except OSError:
        return None
    if len(space) < _CONFIG_BYTES or space.startswith(b"\xff\xff"):
        # A device that does not answer reads as all ones.
        return None
    at, seen = _FIRST_EXTENDED, set[int]()
    while at >= _FIRST_EXTENDED and at not in seen:
        seen.add(at)
        header = int.from_bytes(space[at : at + 4], "little")
        if header & 0xFFFF == _ACS_ID:
            control = int.from_bytes(space[at + _ACS_CONTROL : at + _ACS_CONTROL + 2], "little")
            return bool(control & _ACS_REDIRECTS)
        at = header >> 20
    return False


def _names(folder: FilePath) -> list[str]:
    """The entries of a folder, in numeric order; empty if it cannot be read."""
    try:
        found = os.listdir(folder)
    except OSError:
        return []
    return sorted(found, key=lambda name: [(bool(n), int(n or 0), rest) for n, rest in _RUNS.findall(name)])


def _numbered(folder: FilePath, prefix: str) -> list[FilePath]:
    return [folder / name for name in _names(folder) if re.fullmatch(rf"{prefix}\d+", name)]


def _text(file: FilePath) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """A number that is not negative: Linux writes -1 for unknown."""
    return int(text) if re.fullmatch(r"\d+\s*", text, re.ASCII) else None


def _numbers(text: str) -> tuple[int, ...]:
    """A list as Linux writes it, ``0-3,8``; empty if it is not one."""
    found: list[int] = []
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part, re.ASCII)
        if match is None or int(match[2] or match[1]) >= _MOST_CPUS:
            return ()
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)
