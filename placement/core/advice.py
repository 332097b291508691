"""Advice: what would make room for a refused request, and which node came closest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from placement.core import gangs
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.limits import roomy
from placement.core.needs import GIB, WHOLE, GpuName, Needs, Within
from placement.core.node import Node
from placement.core.request import Request
from placement.core.score import score
from placement.core.shares import least_gpus
from placement.core.snapshot import Snapshot
from placement.core.topology import Path, Topology, components
from placement.core.wording import any_of, describe, gpu_names, reached, sets_of
from placement.errors import counted


def releasing(snapshot: Snapshot, request: Request, nodes: Sequence[Node]) -> str:
    """``release something``, if one more replica would fit once all other deployments were gone."""
    if request.needs.named and request.stages > 1:
        helps = any(gangs.has_room_emptied(snapshot, request, snapshot.bit(node.id)) for node in nodes)
    elif request.stages > 1 or request.parts > 1:
        helps = gangs.has_room_emptied(snapshot, request, snapshot.select(nodes))
    else:
        helps = any(node.emptied().copies(request.needs) > request.standing.get(node.id, 0) for node in nodes)
    return "release something" if helps else ""


def others_hold(request: Request, nodes: Sequence[Node]) -> bool:
    """Whether other deployments or users hold GPUs of the nodes, as far as is known."""
    held = 0
    for node in nodes:
        mask = node.named_mask(request.needs)
        held += WHOLE * sum(mask >> gpu & 1 for gpu in node.held) - sum(node.rests.values())
    share = max(request.needs.share_of(node.gpu_memory_bytes) or WHOLE for node in nodes)
    each = (sum(request.needs.amounts) or share * request.needs.gpus) * request.stages * request.parts
    return held > each * sum(request.standing.get(node.id, 0) for node in nodes)


def adding(request: Request, groups: int) -> str:
    """Which nodes to add for ``groups`` more groups."""
    if request.stages * request.parts == 1:
        return f"add a node with {describe(request.needs)}"
    where = f" in one {GPU_DOMAIN_LABEL}" if request.parts > 1 else ""
    return f"add nodes with room for {sets_of(groups * request.parts, request.needs, 'more ')}{where}"


def asking_for_fewer(request: Request, some: bool) -> str:
    """What to ask for less of, if ``some`` of it is there."""
    fewer = ["replicas"] if sum(request.standing.values()) else []
    if some and request.needs.whole and request.needs.gpus * request.stages * request.parts > 1:
        fewer.append("GPUs")
    asked = [f"ask for fewer {' or '.join(fewer)}"] if fewer else []
    if some and not request.needs.whole and not request.needs.profile:
        asked.append("ask for smaller shares" if request.needs.amounts else "ask for a smaller share")
    return " or ".join(asked)


def in_stages(snapshot: Snapshot, request: Request, nodes: Sequence[Node]) -> str:
    """The pipeline stages into which a replica could be cut so that it fits, if there are any."""
    needs = request.needs
    if not needs.whole:
        return ""
    whole = replace(request, needs=needs._replace(gpus=needs.gpus * request.parts), parts=1)
    largest = max(node.whole_gpus for node in nodes)
    for size in range(min(largest, whole.needs.gpus - 1), 0, -1):
        if whole.needs.gpus % size == 0 and (size > 1 or not needs.floor):
            cut = gangs.in_stages(whole, size)
            if gangs.groups_free(snapshot, cut, snapshot.select(nodes) & roomy(snapshot, cut)) >= cut.stages:
                tensor = f"tensor_parallel = {size} and " if size > 1 else ""
                return f"ask for {tensor}pipeline_parallel = {cut.stages} instead"
    return ""


def size_miss(snapshot: Snapshot, nodes: Sequence[Node], request: Request) -> tuple[str, str]:
    """For nodes that are all too small: how large the largest is, and what would help."""
    needs = request.needs
    known = ", ".join(sorted({profile for node in nodes for profile in node.profiles}))
    if needs.profile:
        advice = f"ask for one of: {known}" if known else "start a node with MIG instances"
        return "no node has one", advice
    if not any(node.whole_gpus for node in nodes):
        instead = f"ask for a MIG instance (mig: one of {known}), or " if known else ""
        miss = "all GPUs have MIG on, and only their instances can be used" if known else "no GPU can be used"
        return miss, f"{instead}add a node with {describe(needs)}"
    if needs.memory_bytes:
        most = max((node.gpu_memory_bytes or 0 for node in nodes), default=0)
        if not most:
            return "the memory of the GPUs cannot be read", "ask for a share: gpus = 0.5, for example"
        return f"the largest GPU has {most / GIB:g} GiB", "ask for less gpu_memory_gib, or add a larger GPU"
    most = max(node.whole_gpus for node in nodes)
    floors = {"within": needs.within is not Within.NODE, "min_bandwidth_gb_per_s": needs.slowest < 0}
    floor = " and ".join(name for name, asked in floors.items() if asked)
    without = replace(request, needs=Needs(needs.gpus, free_memory_bytes=needs.free_memory_bytes))
    instead = in_stages(snapshot, request, nodes)
    if not instead and floor and (cut := in_stages(snapshot, without, nodes)):
        instead = (
            f"leave {floor} out, since links between nodes are not known"
            if request.divisible
            else (f"{cut}, without {floor}, since links between nodes are not known")
        )
    each = "replica" if request.stages == 1 else "tensor-parallel group"
    fewer = f"ask for at most {counted(most, 'GPU')} per {each}" if most > 1 or not floor else ""
    return f"the largest node has {most}", any_of(instead, fewer, f"add a node with {least_gpus(needs)}")


def most_free(nodes: Sequence[Node], needs: Needs) -> str:
    """``gpu-a has 3 of its 8 GPUs free: GPU 0-2``: the node with the most."""
    if needs.named:
        most = max(nodes, key=lambda node: (len(node.free) + len(node.instances), node.id))
        free = len(most.free) + len(most.instances)
        taken = ", ".join(filter(None, (_taken(most, name) for name in needs.named)))
        text = f"{most.name} has {free or 'none'} of them free" + (f": {taken}" if taken else "")
    elif needs.profile:
        most = max(nodes, key=lambda node: (list(node.instances.values()).count(needs.profile), node.id))
        free = list(most.instances.values()).count(needs.profile)
        text = (
            f"{most.name} has {free or 'none'} of its {list(most.slots.values()).count(needs.profile)} free"
        )
    else:
        most = max(nodes, key=lambda node: (len(node.free), node.id))
        free = len(most.free)
        text = f"{most.name} has {free or 'none'} of its {counted(most.whole_gpus, 'GPU')} free"
        text += f": {gpu_names(most.free)}" if free else ""
    if free and needs.free_memory_bytes:
        unused = max(most.free_memory.get(gpu, 0) for gpu in most.free | most.instances.keys())
        text += f", with {unused / GIB:.3g} GiB unused at most"
    return text


def _taken(node: Node, name: GpuName) -> str:
    """``GPU 2 is held by 'whisper'``; empty if all of it is free."""
    slot = node.slot_of(name)
    if slot is None or slot in node.free or slot in node.instances:
        return ""
    names = " and ".join(map(repr, dict.fromkeys(node.holders.get(slot, ()))))
    rest = f", {node.rests[slot] / WHOLE:g} of it is left" if node.rests.get(slot) else ""
    return f"{gpu_names([name])} is held by {names or 'another Ray user'}{rest}"


def how_apart(node: Node, count: int, within: Within, noun: str = "free GPUs") -> str:
    """``gpu-a has 4 free GPUs, but in NVLink islands of 2 + 2``."""
    has = f"{node.name} has {len(node.free)} {noun}, but"
    groups = _groups(node, within)
    if max(map(len, groups)) >= count:  # joined by NVLinks, but without a ring: a mesh
        return f"{has} no {count} of them form an NVLink ring"
    if within is Within.NUMA and not any(node.topology.numa):
        return f"{has} its NUMA nodes are unknown"
    kind = {Within.NVLINK: "NVLink islands", Within.SWITCH: "PCIe switches", Within.NUMA: "NUMA nodes"}[
        within
    ]
    return f"{has} in {kind} of {' + '.join(str(len(group)) for group in groups)}"


def _groups(node: Node, within: Within) -> list[tuple[int, ...]]:
    """The free GPUs by island, by PCIe switch or by NUMA node."""
    topology: Topology = node.topology
    close = {Path.NVLINK, Path.PIX, Path.PXB}

    def joined(a: int, b: int) -> bool:
        if within is Within.NUMA:
            return bool(topology.numa[a]) and topology.numa[a] == topology.numa[b]
        path = topology.link(a, b).path
        return path is Path.NVLINK or (within is Within.SWITCH and path in close)

    return components(sorted(node.free), joined)


def asking_for_wider(nearest: Node, needs: Needs) -> str:
    """``ask for within: node (...)``: the nearest distance that a node offers, and its bandwidth."""
    best = score(nearest.topology, nearest.best(needs._replace(within=Within.NODE)) or ())
    looser = [other.value for other in Within if nearest.offer(needs._replace(within=other)) is not None]
    return f"ask for within: {looser[0]} ({reached(best)}, weakest link {best.link_name}, on {nearest.name})"


def how_slow(node: Node, needs: Needs) -> str:
    """``gpu-a has 2 free GPUs that reach 20 GB/s (weakest link SYS)``."""
    best = score(node.topology, node.best(needs) or ())
    speed = f"{reached(best)} (weakest link {best.link_name})"
    return f"{node.name} has {needs.gpus} free GPUs that reach {speed}"
