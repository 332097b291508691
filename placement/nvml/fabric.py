"""What the state of NVLinks and NVSwitch means for a node: what cannot be used, and whether NVLS is on."""

from __future__ import annotations

from collections.abc import Sequence

from placement.core.topology import ordinals
from placement.wire.facts import LINK_UP, Fabric, GpuFacts, PairFacts

NO_FABRIC: tuple[Fabric, ...] = ("not started", "in progress", "failed")
"""Fabric states in which a GPU cannot use its NVSwitch, although each of its links is up."""
_NVLS_DRIVER, _NVLS_CAPABILITY = 530, (9, 0)
"""The first driver of CUDA 12.1, which NVLS needs (``src/transport/nvls.cc`` of NVIDIA/nccl), and Hopper."""


def fabric_problem(gpus: Sequence[GpuFacts]) -> str:
    """Which GPUs cannot use their NVSwitch, or only in part, and what to check; empty if there are none."""
    found: dict[Fabric, list[int]] = {}
    for gpu in gpus:
        if gpu.fabric is not None and gpu.fabric != "completed":
            found.setdefault(gpu.fabric, []).append(gpu.ordinal)
    return "; ".join(
        f"NVSwitch {'cannot be used' if state in NO_FABRIC else 'is impaired'} on GPU {ordinals(ours)}, "
        f"since the state of its fabric is {state!r}: look at nvidia-fabricmanager there"
        for state, ours in found.items()
    )


def links_down(gpus: Sequence[GpuFacts], pairs: Sequence[PairFacts]) -> str:
    """Which NVLinks are down that should be up, and what to check; empty if there are none.

    A link that is down is no fault in itself: a card without a bridge has such links, and so has a part of a mesh that
    is passed through to a virtual machine. It should be up if another GPU of the model has more links up (and the
    GPU has any, or they meet in a switch), or if it belongs to a bridge. A bridge is four links from Ampere on
    (NVIDIA's product brief of the A100 PCIe: three bridges, twelve links), all two of Turing.
    """
    up = {
        gpu.ordinal: sum(link.state in LINK_UP for link in gpu.nvlinks)
        for gpu in gpus
        if gpu.nvlinks and not gpu.mig_enabled and all(link.state for link in gpu.nvlinks)
    }
    found = []
    for gpu in gpus:
        if gpu.ordinal not in up or gpu.nvlinks is None:
            continue
        fellows = [one for one in gpus if one.ordinal in up and one.name == gpu.name]
        fewer = up[gpu.ordinal] < max(up[one.ordinal] for one in fellows)
        switched = any(one.nvswitch_links for one in fellows)
        bridge = _bridge(gpu.compute_capability)
        joined = [pair.nvlinks or 0 for pair in pairs if gpu.ordinal in (pair.a, pair.b)]
        partly = not switched and any(count % bridge for count in joined)
        down = [n for n, link in enumerate(gpu.nvlinks) if link.state not in LINK_UP]
        if down and ((fewer and (up[gpu.ordinal] or switched)) or partly):
            found.append(f"{ordinals(down)} of GPU {gpu.ordinal}")
    return (
        f"NVLinks are down: {', '.join(found)}; see `nvidia-smi nvlink --status`, and Xid 74 in the kernel's log"
        if found
        else ""
    )


def _bridge(capability: tuple[int, int] | None) -> int:
    """How many links a bridge between two cards has; 1 if unknown."""
    return 1 if capability is None or capability < (7, 5) else 2 if capability == (7, 5) else 4


def has_nvls(gpus: Sequence[GpuFacts], driver: str | None, enabled: int | None) -> bool | None:
    """Whether NCCL reduces inside the NVSwitch (NVLS); ``None`` if unknown, or without such a switch.

    NCCL's own conditions (``ncclNvlsInit`` in ``src/transport/nvls.cc``) exclude ``NCCL_NVLS_ENABLE=0``, and
    drivers older than CUDA 12.1. The GPUs must also be registered with the switch's fabric
    (NVIDIA/TensorRT-LLM#16595), which must be healthy (pytorch/pytorch#177472). A virtual GPU has it only with unified
    memory on (NVIDIA AI Enterprise, "NVLink Multicast"), which cannot be read.

    Args:
        gpus: those of the node.
        driver: its version.
        enabled: NCCL's setting, ``None`` if there is none.
    """
    switched = [gpu for gpu in gpus if gpu.nvswitch_links and not gpu.mig_enabled]
    if not switched or any((gpu.compute_capability or (0, 0)) < _NVLS_CAPABILITY for gpu in switched):
        return None
    major = int(driver.partition(".")[0]) if driver and driver.partition(".")[0].isdigit() else None
    if enabled == 0 or (major is not None and major < _NVLS_DRIVER):
        return False
    sound = all(gpu.fabric == "completed" and gpu.vgpu is False for gpu in switched)
    return True if sound and major is not None else None
