"""Ray's GPU slots on one node: which GPU or MIG instance each slot is."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from placement.core.topology import Path, ordinals
from placement.wire.facts import GpuFacts, MigFacts, NodeFacts, PairFacts

_MIG = "MIG-"
_OLD_MIG = re.compile(r"MIG-(?P<gpu>GPU-[^/]+)/(?P<gi>\d+)/(?P<ci>\d+)")
"""A MIG instance as drivers before R470 name it, and CUDA still takes it: its GPU and its two ids."""


def visible_tokens(visible_devices: str | None) -> list[str] | None:
    """The tokens of CUDA_VISIBLE_DEVICES in their order, as Ray counts them; ``None`` where it is unset or empty."""
    return [token.strip() for token in visible_devices.split(",")] if visible_devices else None


def in_ray_order(facts: NodeFacts, gpu_count: int, visible_devices: str | None) -> NodeFacts:
    """A reading reduced to the GPUs that Ray has, in the order of Ray's slots.

    NVML sees all GPUs of the machine. Ray has as many as ``ray start`` was told or found, or those of
    CUDA_VISIBLE_DEVICES, in its order. A token there is an NVML index (which CUDA shares if
    CUDA_DEVICE_ORDER=PCI_BUS_ID), or the UUID of a GPU or of a MIG instance, or the beginning of one.

    Nothing may be placed on a slot that a working NVML does not show, nor on several slots that are the same GPU, which
    Ray would give to several users.

    Args:
        facts: the reading of NVML.
        gpu_count: GPUs that Ray has on the node.
        visible_devices: CUDA_VISIBLE_DEVICES as it was at ``ray start``.
    """
    tokens = visible_tokens(visible_devices)
    found = facts.gpus if tokens is None else [_named(facts, token) for token in tokens]
    shown = [*found[:gpu_count], *[None] * (gpu_count - len(found))]
    names = [*(tokens or ()), *[""] * gpu_count][:gpu_count]
    repeated = _repeated(shown, names)
    problems = [_repetition(names, repeated), _problem(facts, shown), facts.problem]
    ordered = in_slots(facts, [None if slot in repeated else one for slot, one in enumerate(shown)])
    gpus = []
    for slot, (gpu, one, name) in enumerate(zip(ordered.gpus, shown, names, strict=True)):
        if slot in repeated:
            gpu = gpu.model_copy(update={"errors": ("CUDA_VISIBLE_DEVICES names it more than once",)})
        elif one is None and facts.source == "nvml":
            gpu = gpu.model_copy(update={"errors": ("NVML does not show it",)})
        # Whatever NVML reports, a slot whose token names an instance is no whole GPU.
        gpus.append(gpu.model_copy(update={"mig_enabled": True}) if name.startswith(_MIG) else gpu)
    problem = "; ".join(filter(None, problems)) or None
    return ordered.model_copy(update={"gpus": tuple(gpus), "problem": problem})


def in_slots(facts: NodeFacts, shown: Sequence[GpuFacts | MigFacts | None]) -> NodeFacts:
    """A reading with only these GPUs and MIG instances, in this order; ``None`` is a slot that cannot be identified.

    A slot that is a MIG instance has the instance's UUID and memory and all else of its GPU, but no links:
    neither NVLink nor PCIe peer access leads to an instance, not even from the same GPU. Where MIG is on, a
    program that is given the GPU itself gets one of its instances, so that it has no links either.
    """
    slot_of = {
        one.ordinal: slot
        for slot, one in enumerate(shown)
        if isinstance(one, GpuFacts) and one.instance is None
    }
    pairs = []
    for pair in facts.pairs:
        if pair.a in slot_of and pair.b in slot_of:
            a, b = sorted((slot_of[pair.a], slot_of[pair.b]))
            pairs.append(PairFacts(**{**dict(pair), "a": a, "b": b}))
    gpu_of = [
        one.parent if isinstance(one, MigFacts) else None if one is None else one.ordinal for one in shown
    ]
    nics = tuple(
        nic.model_copy(
            update={"paths": tuple(Path.UNKNOWN if gpu is None else nic.paths[gpu] for gpu in gpu_of)}
        )
        for nic in facts.nics
    )
    gpus = tuple(_in_slot(facts, slot, one) for slot, one in enumerate(shown))
    return facts.model_copy(update={"gpus": gpus, "pairs": tuple(pairs), "nics": nics})


def _repeated(shown: Sequence[GpuFacts | MigFacts | None], names: Sequence[str]) -> set[int]:
    """The slots that are the same GPU or instance as another one, by the token or by what it names."""
    slots: dict[object, list[int]] = {}
    for slot, (one, name) in enumerate(zip(shown, names, strict=True)):
        if name:
            slots.setdefault(name if one is None else id(one), []).append(slot)
    return {slot for same in slots.values() if len(same) > 1 for slot in same}


def _repetition(names: Sequence[str], repeated: Collection[int]) -> str | None:
    if not repeated:
        return None
    listed = ",".join(dict.fromkeys(names[slot] for slot in sorted(repeated)))
    return f"CUDA_VISIBLE_DEVICES at `ray start` names a GPU more than once ({listed}): name each once"


def _problem(facts: NodeFacts, shown: Sequence[GpuFacts | MigFacts | None]) -> str | None:
    if facts.source != "nvml":
        return None
    if None in shown:
        count = len(shown) - shown.count(None)
        return f"Ray has {len(shown)} GPUs here, NVML shows {count} of them"
    cut_up = [one.ordinal for one in shown if isinstance(one, GpuFacts) and one.instance is not None]
    if not cut_up:
        return None
    return (
        f"MIG is on on GPU {ordinals(cut_up)}, and Ray has it as a whole: nothing is placed there; "
        "name its instances in CUDA_VISIBLE_DEVICES at `ray start`"
    )


def _named(facts: NodeFacts, token: str) -> GpuFacts | MigFacts | None:
    """What a token of CUDA_VISIBLE_DEVICES names, if it names exactly one."""
    if token.isdigit():
        return facts.gpus[int(token)] if int(token) < len(facts.gpus) else None
    known: tuple[GpuFacts | MigFacts, ...] = (*facts.gpus, *facts.instances)
    named = [one for one in known if (one.uuid or "").startswith(token)]
    if old := _OLD_MIG.fullmatch(token):
        ids = int(old["gi"]), int(old["ci"])
        named = named or [
            one
            for one in facts.instances
            if (one.gpu_instance_id, one.compute_instance_id) == ids
            and (facts.gpus[one.parent].uuid or "").startswith(old["gpu"])
        ]
    return named[0] if len(named) == 1 else None


def _in_slot(facts: NodeFacts, slot: int, one: GpuFacts | MigFacts | None) -> GpuFacts:
    if one is None:
        return GpuFacts(ordinal=slot)
    if isinstance(one, GpuFacts):
        return one.model_copy(update={"ordinal": slot})
    return facts.gpus[one.parent].model_copy(
        update={
            "ordinal": slot,
            "uuid": one.uuid,
            "memory_total_bytes": one.memory_total_bytes,
            "memory_used_bytes": one.memory_used_bytes,
            "mig_enabled": True,
            "mig_profile": one.profile,
            "nvlink_version": None,
            "nvlinks": None,
            "nvswitch_links": None,
            "errors": one.errors,
        }
    )
