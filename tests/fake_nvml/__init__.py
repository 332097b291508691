"""A fake ``libnvidia-ml.so.1``, for the real pynvml to load: it plays a machine that a text file describes.

The file's lines are explained at the top of ``fake_nvml.c``. A process loads it if ``LD_LIBRARY_PATH`` names its
directory before the process starts: :func:`environment`.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path as FilePath

from placement.core.topology import Path, Topology

LIBRARY = "libnvidia-ml.so.1"
DRIVER = "580.95.05"
TOTAL, RESERVED, USED = 80 << 30, 1 << 30, 3 << 30
INSTANCE_USED = 13 << 20
"""What an idle 2g.20gb of an A100-SXM4-80GB showed: https://github.com/XuehaiPan/nvitop/pull/8."""

_LEVELS = {Path.PIX: 10, Path.PXB: 20, Path.PHB: 30, Path.NODE: 40, Path.SYS: 50}


def build(directory: FilePath) -> FilePath:
    """Compiles the library into ``directory`` and returns its path."""
    library = directory / LIBRARY
    source = FilePath(__file__).with_name("fake_nvml.c")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = ["cc", *flags, f"-Wl,-soname,{LIBRARY}", "-o", str(library), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError("the NVML tests compile a small C library: install a C compiler (cc)") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return library


def environment(library: FilePath, machine: FilePath) -> dict[str, str]:
    """The variables under which a new process sees ``machine``, a file, through ``library``; and no ``/proc``."""
    return {
        "LD_LIBRARY_PATH": str(library.parent),
        "FAKE_NVML_MACHINE": str(machine),
        "PLACEMENT_HOST_ROOT": str(machine.with_name("host")),
    }


def uuid(gpu: int) -> str:
    """The UUID that :func:`describe` gives to a GPU."""
    return f"GPU-00000000-0000-0000-0000-{gpu:012d}"


def bus_id(gpu: int) -> str:
    """The PCI address that :func:`describe` gives to a GPU, as sysfs writes it."""
    return f"0000:{0x1B + 8 * gpu:02x}:00.0"


def mig_uuid(gpu: int, index: int) -> str:
    """The UUID that :func:`describe` gives to a MIG instance."""
    return f"MIG-00000000-0000-{gpu:04d}-0000-{index:012d}"


def instance_bytes(profile: str) -> int:
    """The memory of an instance on an A100 with 80 GB: 19968 MiB for 20gb, and so on (nvitop, as above)."""
    return (int(profile.partition("g.")[2].removesuffix("gb")) * 1024 - 512) << 20


def instance_line(gpu: int, index: int, profile: str, name: str, gpu_instance: int) -> str:
    """The line for one MIG instance that is a GPU instance as a whole."""
    slices = profile[0]
    return (
        f"instance {gpu} {index} {gpu_instance} 0 {instance_bytes(profile)} {INSTANCE_USED} {slices} {slices} "
        f"{mig_uuid(gpu, index)} {name}"
    )


def describe(
    topology: Topology,
    *more: str,
    capability: tuple[int, int] = (8, 0),
    mig: int | None = 0,
    peer: tuple[int, int] = (0, 0),
    instances: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """The description of a machine with these links, and ``more`` lines: faults, for example.

    NVLinks that the matrix shows lead to a switch where :attr:`Topology.nvswitch`, else straight to the other
    GPU. The PCIe level below NVLink, which no matrix shows, is NODE within a NUMA node and SYS else.

    ``instances`` are GPU -> the profiles of its MIG instances, in the order of their indices.
    """
    cut_up = instances or {}
    gpus = range(len(topology))
    lines = [f"driver {DRIVER}", f"gpus {len(topology)}"]
    for gpu in gpus:
        lines += [
            f"uuid {gpu} {uuid(gpu)}",
            f"name {gpu} {topology.model or 'NVIDIA Something'}",
            f"pci {gpu} 0 {0x1B + 8 * gpu:x} 0",
            f"memory {gpu} {TOTAL} {RESERVED} {USED}",
            f"capability {gpu} {capability[0]} {capability[1]}",
            f"numa {gpu} {_spaced(topology.numa[gpu])}",
            f"cpus {gpu} {_spaced(topology.cpus[gpu])}",
        ]
        if lanes := topology.lanes[gpu]:
            lines.append(f"pcie {gpu} {lanes.generation} {lanes.width}")
        if mig is not None:
            lines.append(f"mig {gpu} {1 if gpu in cut_up else mig}")
        # Ids are distinct on each GPU, whatever the size.
        ids = Counter({"4": 1, "3": 1, "2": 3, "1": 7})
        for index, profile in enumerate(cut_up.get(gpu, ())):
            name = f"{topology.model or 'NVIDIA Something'} MIG {profile}"
            lines.append(instance_line(gpu, index, profile, name, ids[profile[0]]))
            ids[profile[0]] += 1
        if topology.nvswitch:
            lines.append(f"switch {gpu} {max(link.nvlinks for link in topology.links[gpu])}")
    for a in gpus:
        for b in gpus[a + 1 :]:
            link = topology.link(a, b)
            level = link.path
            if link.path is Path.NVLINK:
                level = Path.NODE if topology.numa[a] == topology.numa[b] else Path.SYS
                if not topology.nvswitch:
                    lines.append(f"links {a} {b} {link.nvlinks}")
            if level in _LEVELS:
                lines.append(f"ancestor {a} {b} {_LEVELS[level]}")
            lines.append(f"peer {a} {b} {peer[0]} {peer[1]}")
    return "\n".join([*lines, *more]) + "\n"


def as_matrix(topology: Topology) -> Topology:
    """What ``nvidia-smi topo -m`` would tell of a machine: no PCIe below NVLink, no peer-to-peer, no lanes, no NVLS."""
    links = tuple(tuple(replace(link, peer=None) for link in row) for row in topology.links)
    return replace(topology, links=links, below=(), lanes=(), cpu=None, nvls=None)


def _spaced(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
