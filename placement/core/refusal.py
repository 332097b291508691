"""The error for a replica that finds no place, made from the reasons that excluded the nodes."""

from __future__ import annotations

from placement.core.explanation import AT_BEST, HAS_NO_GPUS, Explanation, Sifted, no_egress
from placement.core.limits import NAMED
from placement.core.needs import Within
from placement.core.request import Request
from placement.core.shares import least_gpus
from placement.core.wording import describe, describe_cpus, gb_per_s, gpu_names, layout_of, sets_of
from placement.errors import (
    BelowFloor,
    NoCpuNodes,
    NoEgressNodes,
    NoGpuNodes,
    NotEnoughEgress,
    NotEnoughGpus,
    Unplaceable,
)


def refusal_of(request: Request, index: int, sifted: Sifted) -> Unplaceable:
    """The error for replica ``index``, made from the reasons that excluded the nodes."""
    # A refusal must name the stage at which no node was left, and what would help; otherwise the planner has a defect.
    assert sifted[3] and sifted[2] and not sifted[0].stages[-1].kept, (request, sifted[0].stages)
    if request.on_cpus:
        return _refuse_cpus(request, index, sifted)
    return (_refuse_gpus if request.provider is None else _refuse_egress)(request, index, sifted)


def _refuse_gpus(request: Request, index: int, sifted: Sifted) -> Unplaceable:
    name, needs = request.deployment, request.needs
    sieve, miss, advice, stage = sifted
    excluded = Explanation(0, tuple(sieve.stages)).excluded
    excluded.pop(HAS_NO_GPUS, None)
    largest = sieve.largest
    sets = request.stages * request.parts
    count, what = least_gpus(needs) * sets, describe(needs) if sets == 1 else sets_of(sets, needs)
    if needs.named:
        what += f" of {gpu_names(needs.named)}"
    if stage == "size":
        per = "replica" if sets == 1 else "tensor-parallel group"
        summary = f"{describe(needs)} per {per}, but {miss}"
        return NotEnoughGpus(name, summary, excluded, advice, count, largest)
    if stage == "free GPUs":
        one_set = sets == 1 or needs.named
        wanted = f"{what} free on one node" if one_set else f"{layout_of(request)}; not one is free"
        return NotEnoughGpus(
            name, f"replica {index} needs {wanted}; at best {miss}", excluded, advice, count, largest
        )
    if stage == AT_BEST:
        within = f" within {needs.within.value!r}" if needs.within is not Within.NODE else ""
        at = f" at {gb_per_s(needs.min_bandwidth_gb_per_s)}" if needs.slowest < 0 else ""
        summary = f"replica {index} needs {what}{within}{at}, and no node that it may use has such a set even with all "
        return BelowFloor(name, f"{summary}its GPUs free; at best {miss}", excluded, advice)
    if stage == "within":
        summary = f"replica {index} needs {what} within {needs.within.value!r}; at best {miss}"
        return BelowFloor(name, summary, excluded, advice)
    if stage == "bandwidth":
        floor = gb_per_s(needs.min_bandwidth_gb_per_s)
        return BelowFloor(name, f"replica {index} needs {what} at {floor}; at best {miss}", excluded, advice)
    if stage == "other bundles":
        return NotEnoughGpus(name, miss, excluded, advice, count, largest)
    if stage == "groups":
        return NotEnoughGpus(name, f"replica {index} needs {miss}", excluded, advice, count, largest)
    if stage == NAMED:
        return NoGpuNodes(name, f"no node has {gpu_names(needs.named)} for it", excluded, advice)
    if stage in ("CPUs and memory", "spread"):
        return Unplaceable(name, f"replica {index} finds no node: {miss}", excluded, advice)
    summary = "the cluster has no GPU node" if stage == "GPU nodes" else "no GPU node may be used"
    return NoGpuNodes(name, summary, excluded, advice)


def _refuse_egress(request: Request, index: int, sifted: Sifted) -> Unplaceable:
    name, provider = request.deployment, request.provider or ""
    sieve, miss, advice, stage = sifted
    excluded = Explanation(0, tuple(sieve.stages)).excluded
    excluded.pop(no_egress(provider), None)
    if stage == "egress capacity":
        requests = "1 concurrent request" if request.egress == 1 else f"{request.egress} concurrent requests"
        summary = f"replica {index} needs {requests} to {provider} on one node; at best {miss}"
        return NotEnoughEgress(name, summary, excluded, advice)
    if stage == "spread":
        return Unplaceable(name, f"replica {index} finds no node: {miss}", excluded, advice)
    summary = (
        f"no node may call out to {provider}" if stage == "egress nodes" else "no egress node may be used"
    )
    return NoEgressNodes(name, summary, excluded, advice, provider)


def _refuse_cpus(request: Request, index: int, sifted: Sifted) -> Unplaceable:
    sieve, miss, advice, stage = sifted
    excluded = Explanation(0, tuple(sieve.stages)).excluded
    if stage == "spread":
        summary = f"replica {index} finds no node: {miss}"
        return Unplaceable(request.deployment, summary, excluded, advice)
    summary = "the cluster has no node" if stage == "nodes" else "no node may be used"
    if stage == "CPUs and memory":
        summary = f"replica {index} needs {describe_cpus(request)} on one node; at best {miss}"
    return NoCpuNodes(request.deployment, summary, excluded, advice)
