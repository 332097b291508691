"""Words for requests: in refusals, in explanations and in the reasons why something waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import ANY_PROFILE, GIB, WHOLE, GpuName, Needs
from placement.core.request import Request
from placement.core.score import Score
from placement.core.topology import ordinals
from placement.errors import counted

MOST_KINDS = 4
"""Shares of more sizes are not named one by one."""


def gpu_names(names: Iterable[GpuName]) -> str:
    """``GPU 2-3``, ``GPU-1db5...``: named GPUs."""
    named = [*names]
    slots = tuple(name for name in named if isinstance(name, int))
    texts = [f"GPU {ordinals(slots)}"] if slots else []
    return ", ".join([*texts, *(name for name in named if isinstance(name, str))])


def describe(needs: Needs) -> str:
    """``4 GPUs``, ``0.25 of a GPU``, ``2 GPUs and 2 x 0.5 of a GPU``, ``20 GiB of a GPU``, ``a MIG instance``."""
    if needs.amounts:
        kinds = Counter(amount for amount in needs.amounts if amount < WHOLE)
        parts = [
            f"{f'{count} x ' if count > 1 else ''}{share / WHOLE:g} of a GPU"
            for share, count in kinds.items()
        ]
        if len(kinds) > MOST_KINDS:
            least, most = min(kinds) / WHOLE, max(kinds) / WHOLE
            parts = [f"{kinds.total()} shares of a GPU, {least:g} to {most:g}"]
        return " and ".join([*([counted(needs.gpus, "GPU")] if needs.gpus else []), *parts])
    if needs.profile == ANY_PROFILE:
        return "a MIG instance"
    if needs.profile:
        return f"a MIG instance {needs.profile}"
    if needs.memory_bytes:
        return f"{needs.memory_bytes / GIB:g} GiB of a GPU"
    if needs.share < WHOLE:
        return f"{needs.share / WHOLE:g} of a GPU"
    return counted(needs.gpus, "GPU")


def cpus(milli: int) -> str:
    """``1.5 CPUs``."""
    return f"{milli / 1000:g} CPU" + "s" * (milli != 1000)


def describe_cpus(request: Request) -> str:
    """``4 CPUs and 8 GiB of memory``: what a replica takes beside its GPUs, or without any; empty for nothing."""
    amounts = [cpus(request.cpu_milli)] if request.cpu_milli else []
    if request.memory_bytes:
        amounts.append(f"{request.memory_bytes / GIB:.3g} GiB of memory")
    return " and ".join(amounts)


def sets_of(count: int, needs: Needs, more: str = "") -> str:
    """``3 sets of 4 GPUs``, ``3 more sets of 4 GPUs``; ``3 GPUs`` if a set is one GPU."""
    thing = "GPU" if needs.gpus == 1 else "set"
    named = f"{count} {more}{thing}" + ("" if count == 1 else "s")
    return named if needs.gpus == 1 else f"{named} of {counted(needs.gpus, 'GPU')}"


def layout_of(request: Request) -> str:
    """``2 x 8 GPUs, each on one node, all of one GPU model``."""
    each, where = describe(request.needs), "on one node"
    if request.parts > 1:
        each = counted(request.needs.gpus * request.parts, "GPU")
        where = f"over {request.parts} nodes of one {GPU_DOMAIN_LABEL}"
    alike = (
        "one GPU model"
        if request.spread_label is None
        else f"one GPU model and in one {request.spread_label}"
    )
    return f"{request.stages} x {each}, each {where}, all of {alike}"


def gb_per_s(bandwidth: float) -> str:
    """``200 GB/s``."""
    return f"{bandwidth:g} GB/s"


def reached(best: Score) -> str:
    """``200 GB/s``, or ``between 5 and 25 GB/s`` if an input of the prediction is unknown."""
    if best.upper_gb_per_s is None:
        return gb_per_s(best.bandwidth_gb_per_s)
    return f"between {best.bandwidth_gb_per_s:g} and {gb_per_s(best.upper_gb_per_s)}"


def any_of(*options: str) -> str:
    """``a, b, or c``, of those that are not empty."""
    *others, last = filter(None, options)
    return ", ".join([*others, f"or {last}"]) if others else last
