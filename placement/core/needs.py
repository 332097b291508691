"""What one replica needs of a node's GPUs."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

WHOLE = 1000
"""A whole GPU, in thousandths."""

ANY_PROFILE = "any"
"""Asks for a MIG instance of any profile: one that is named by its UUID."""

GpuName = int | str
"""The name of a GPU: its ordinal on the node, or the UUID of the GPU or of the MIG instance."""

GIB = 1 << 30


class Within(StrEnum):
    """How far apart the GPUs of one replica may be, narrowest first."""

    NVLINK = "nvlink"
    """A collective over them runs on NVLink alone."""
    SWITCH = "switch"
    """... on NVLink and PCIe switches (PIX, PXB), past no host bridge."""
    NUMA = "numa"
    """They share a NUMA node, and it is known."""
    NODE = "node"
    """They are on one node; this is always so."""


class Needs(NamedTuple):
    """What one replica needs of a node's GPUs.

    Attributes:
        gpus: how many GPUs.
        within: how close together.
        min_bandwidth_gb_per_s: the least bandwidth between them.
        share: thousandths of one GPU, if not a whole one.
        memory_bytes: another way to ask for a share: as much of one GPU as has this much memory; 0 if not asked.
        free_memory_bytes: the least memory that NVML must report as free on each GPU.
        profile: a MIG instance of this profile instead of a GPU; empty if not asked.
        named: only these GPUs, all of which must be on the node; empty for any.
        amounts: shares, or whole GPUs and shares, that are reserved at once: thousandths of a GPU, in the order in
            which Ray reserves them; else empty. ``gpus`` are then those that are whole, and floors are about these.
    """

    gpus: int
    within: Within = Within.NODE
    min_bandwidth_gb_per_s: float = 0.0
    share: int = WHOLE
    memory_bytes: int = 0
    free_memory_bytes: int = 0
    profile: str = ""
    named: tuple[GpuName, ...] = ()
    amounts: tuple[int, ...] = ()

    @property
    def any(self) -> bool:
        """Whether GPUs are asked for at all, or shares of them."""
        return self.gpus > 0 or bool(self.amounts)

    @property
    def whole(self) -> bool:
        """Whether whole GPUs are asked for, and nothing else."""
        return self.share == WHOLE and not self.memory_bytes and not self.profile and not self.amounts

    @property
    def shared(self) -> bool:
        """Whether a share of a GPU is asked for."""
        return not self.whole and not self.profile

    @property
    def slowest(self) -> int:
        """The greatest :attr:`~placement.core.shape.Offer.slowness` that meets the floor."""
        return -round(self.min_bandwidth_gb_per_s * 1000) if self.gpus > 1 else 0

    @property
    def floor(self) -> bool:
        """Whether some sets of this size may not meet the floors."""
        return self.within is not Within.NODE or self.slowest < 0

    def share_of(self, gpu_memory_bytes: int | None) -> int | None:
        """Thousandths of a GPU of that size; ``None`` if it is too small, or of unknown size and that matters."""
        if not self.memory_bytes:
            return self.share
        if not gpu_memory_bytes or self.memory_bytes > gpu_memory_bytes:
            return None
        return -(-self.memory_bytes * WHOLE // gpu_memory_bytes)

    def least_share(self, gpu_memory_bytes: Iterable[int | None]) -> int:
        """Thousandths of the largest GPU among these sizes; a whole GPU if none is large enough."""
        shares = map(self.share_of, gpu_memory_bytes)
        return min((share for share in shares if share is not None), default=WHOLE)


NO_GPUS = Needs(0)
"""The needs of a remote replica and of a CPU replica: no GPUs."""
