"""A make-believe ``/sys``, ``/proc`` and ``/dev``: files as Linux has them, below ``PLACEMENT_HOST_ROOT``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

CONFIG_BYTES = 4096
ACS_ON, ACS_OFF = 0b1111101, 0b0000001
"""What Linux sets where an IOMMU is to keep devices apart, and what is left once redirection is turned off."""


def acs(control: int | None) -> bytes:
    """The configuration of a bridge as root reads it: a capability, and after it ACS, or none if that is ``None``."""
    space = bytearray(CONFIG_BYTES)
    space[0:2] = (0x10B5).to_bytes(2, "little")
    after = 0x148 if control is not None else 0
    space[0x100:0x104] = (0x0001 | 1 << 16 | after << 20).to_bytes(4, "little")
    if control is not None:
        space[0x148:0x14C] = (0x000D | 1 << 16).to_bytes(4, "little")
        space[0x14E:0x150] = control.to_bytes(2, "little")
    return bytes(space)


class FakeHost:
    """Builds the tree in a folder, which need not be there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str | bytes) -> None:
        """Writes one file."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    def drop(self, path: str) -> None:
        """Takes one file, link or folder away."""
        where = self.root / path
        shutil.rmtree(where) if where.is_dir() and not where.is_symlink() else where.unlink()

    def link(self, path: str, to: str) -> None:
        """A relative link, as they all are in ``/sys``."""
        where = self.root / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.symlink_to(os.path.relpath(self.root / to, where.parent))

    def allow(self, cpus: str) -> None:
        """The CPUs that this process may use."""
        self.write("proc/self/status", f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\n")

    def numa_node(self, number: int, cpus: str, memory_kib: int = 1 << 20) -> None:
        """A NUMA node."""
        folder = f"sys/devices/system/node/node{number}"
        self.write(f"{folder}/cpulist", f"{cpus}\n")
        self.write(f"{folder}/meminfo", f"Node {number} MemTotal:       {memory_kib} kB\n")

    def cpu(self, number: int, siblings: str, socket: int) -> None:
        """A CPU, the threads of its core and its processor."""
        folder = f"sys/devices/system/cpu/cpu{number}/topology"
        self.write(f"{folder}/thread_siblings_list", f"{siblings}\n")
        self.write(f"{folder}/physical_package_id", f"{socket}\n")

    def device(self, way: str, numa: int = -1) -> str:
        """A device, by the way to it: ``pci0000:17/0000:17:01.0/0000:18:00.0``. Returns its folder."""
        folder = f"sys/devices/{way}"
        self.write(f"{folder}/numa_node", f"{numa}\n")
        self.link(f"sys/bus/pci/devices/{way.rpartition('/')[2]}", folder)
        return folder

    def bridge(self, way: str, config: bytes) -> None:
        """The configuration of a bridge, as much of it as this process may read."""
        self.write(f"sys/devices/{way}/config", config)

    def rdma(self, name: str, device: str, net: Iterable[str] = (), state: str = "4: ACTIVE") -> None:
        """An RDMA device of one port on the card in that folder."""
        for one in net:
            self.net(one, device)
        self.write(f"{device}/infiniband/{name}/ports/1/state", f"{state}\n")
        self.link(f"{device}/infiniband/{name}/device", device)
        self.link(f"sys/class/infiniband/{name}", f"{device}/infiniband/{name}")
        number = len(os.listdir(self.root / "sys/class/infiniband")) - 1
        self.write(f"sys/class/infiniband_verbs/uverbs{number}/ibdev", f"{name}\n")
        self.write(f"dev/infiniband/uverbs{number}", "")

    def net(self, name: str, device: str, state: str = "up") -> None:
        """A network interface of the device in that folder."""
        self.write(f"{device}/net/{name}/operstate", f"{state}\n")
        self.link(f"{device}/net/{name}/device", device)
        self.link(f"sys/class/net/{name}", f"{device}/net/{name}")

    def routes(self, *interfaces: str) -> None:
        """The networks that are reached, each over one of these interfaces."""
        rows = [f"{name}\t0000FEA9\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0" for name in interfaces]
        self.write("proc/net/route", "\n".join(["Iface\tDestination\tGateway \tFlags", *rows]) + "\n")


def two_sockets(root: Path, gpus: Iterable[str]) -> FakeHost:
    """Two sockets with four cores of two threads each; below each a PCIe switch with two of four GPUs and a card.

    The GPUs are at the addresses ``gpus``; mlx5_0 is beside the first two, mlx5_1 beside the others.
    """
    host = FakeHost(root)
    for cpu in range(16):
        core = cpu % 8
        host.cpu(cpu, f"{core},{core + 8}", core // 4)
    host.numa_node(0, "0-3,8-11", 64 << 20)
    host.numa_node(1, "4-7,12-15", 32 << 20)
    host.allow("0-15")
    for index, address in enumerate(gpus):
        host.device(f"{switch(index // 2)}/{port(index)}/{address}", index // 2)
    for socket in (0, 1):
        card = host.device(
            f"{switch(socket)}/0000:{0x60 + socket:02x}:08.0/0000:{0x70 + socket:02x}:00.0", socket
        )
        host.rdma(f"mlx5_{socket}", card, [f"ens{socket}"])
        host.bridge(switch(socket), acs(None))
    for index in range(4):
        host.bridge(f"{switch(index // 2)}/{port(index)}", acs(ACS_OFF))
    host.routes("ens0", "ens1")
    return host


def switch(socket: int) -> str:
    """The way to the switch of a socket."""
    return f"pci0000:{0x10 + socket:02x}/0000:{0x10 + socket:02x}:01.0/0000:{0x20 + socket:02x}:00.0"


def port(index: int) -> str:
    """The switch's port above a GPU."""
    return f"0000:{0x60 + index // 2:02x}:{index % 2:02x}.0"
