"""Why a request goes to some nodes and not to others: counted, stage by stage, always in the same words.

A stage is a question put to each node in turn; a node that fails it gets the stage's reason and is asked no
more. The same stages explain a plan (``placement plan --explain``) and a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from placement.core.request import Request
from placement.core.score import Within, score
from placement.core.snapshot import Node, Snapshot
from placement.core.topology import Path, Topology, _components, ordinals
from placement.errors import (
    BelowFloor,
    NoEgressNodes,
    NoGpuNodes,
    NotEnoughEgress,
    NotEnoughGpus,
    Unplaceable,
)


@dataclass(frozen=True)
class Stage:
    """One question.

    Attributes:
        name: what it is about (``"free GPUs"``).
        kept: how many nodes passed.
        excluded: reason -> how many nodes it excluded.
    """

    name: str
    kept: int
    excluded: dict[str, int]


@dataclass(frozen=True)
class Explanation:
    """The stages, in order.

    Attributes:
        nodes: how many nodes there are.
        stages: the questions, up to the last one that still had a node to ask.
        nearest_miss: the excluded node that came closest to having room, and what it lacks, if one did.
        advice: what would make room where there is none; empty where there is.
    """

    nodes: int
    stages: tuple[Stage, ...]
    nearest_miss: str = ""
    advice: str = ""

    @property
    def excluded(self) -> dict[str, int]:
        """Reason -> how many nodes it excluded, over all stages."""
        return {reason: count for stage in self.stages for reason, count in stage.excluded.items()}

    def to_dict(self) -> dict[str, object]:
        """The explanation as JSON-ready values."""
        stages = [vars(stage) for stage in self.stages]
        return {
            "nodes": self.nodes,
            "stages": stages,
            "nearest_miss": self.nearest_miss,
            "advice": self.advice,
        }


Objection = Callable[[Node], str | None]


class _Sieve:
    """Nodes, put to one stage after another."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.left = list(nodes)
        self.dropped: list[Node] = []
        self.stages: list[Stage] = []

    def put(self, name: str, objection: Objection) -> bool:
        """Drops the nodes with an objection; says whether any is left."""
        if not self.left:
            return False
        kept: list[Node] = []
        self.dropped = []
        reasons: Counter[str] = Counter()
        for node in self.left:
            reason = objection(node)
            if reason is None:
                kept.append(node)
            else:
                self.dropped.append(node)
                reasons[reason] += 1
        self.left = kept
        self.stages.append(Stage(name, len(kept), dict(sorted(reasons.items()))))
        return bool(kept)


def explain(snapshot: Snapshot, request: Request) -> Explanation:
    """What became of every node for the next replica of ``request``."""
    sieve, miss, advice, _ = _sift(snapshot, request)
    return Explanation(len(snapshot.nodes), tuple(sieve.stages), miss, advice)


def refuse(snapshot: Snapshot, request: Request, index: int) -> Unplaceable:
    """Why replica ``index`` finds no place."""
    return (_refuse_gpus if request.provider is None else _refuse_egress)(snapshot, request, index)


def _refuse_gpus(snapshot: Snapshot, request: Request, index: int) -> Unplaceable:
    name, count = request.deployment, request.gpus
    sieve, miss, advice, stage = _sift(snapshot, request)
    excluded = Explanation(0, tuple(sieve.stages)).excluded
    excluded.pop(_NO_GPUS, None)
    largest = max((len(node.topology) for node in sieve.dropped), default=0)
    if stage in ("GPU nodes", "constraints", "health"):
        summary = "the cluster has no GPU node" if stage == "GPU nodes" else "no GPU node may be used"
        return NoGpuNodes(name, summary, excluded, advice)
    if stage == "size":
        summary = f"{count} GPUs per replica, but the largest node has {largest}"
        return NotEnoughGpus(name, summary, excluded, advice, count, largest)
    if stage == "free GPUs":
        summary = f"replica {index} needs {count} free GPUs on one node; at best {miss}"
        return NotEnoughGpus(name, summary, excluded, advice, count, largest)
    asked = (
        f"within {request.within.value!r}"
        if stage == "within"
        else f"at {_gb(request.min_bandwidth_gb_per_s)}"
    )
    return BelowFloor(name, f"replica {index} needs {count} GPUs {asked}; at best {miss}", excluded, advice)


def _refuse_egress(snapshot: Snapshot, request: Request, index: int) -> Unplaceable:
    name, provider = request.deployment, request.provider or ""
    sieve, miss, advice, stage = _sift(snapshot, request)
    excluded = Explanation(0, tuple(sieve.stages)).excluded
    excluded.pop(_no_egress(provider), None)
    if stage == "egress capacity":
        summary = (
            f"replica {index} needs {request.egress} concurrent requests to {provider} on one node; "
            f"at best {miss}"
        )
        return NotEnoughEgress(name, summary, excluded, advice)
    summary = (
        "no egress node may be used" if stage == "constraints" else f"no node may call out to {provider}"
    )
    return NoEgressNodes(name, summary, excluded, advice, provider)


Sifted = tuple[_Sieve, str, str, str]
"""The sieve, the nearest miss, the advice, and the stage at which no node was left (empty if some are)."""

_NO_GPUS = "has no GPUs"


def _no_egress(provider: str) -> str:
    return f"has no egress resource for {provider}"


def _sift(snapshot: Snapshot, request: Request) -> Sifted:
    return _sift_gpus(snapshot, request) if request.provider is None else _sift_egress(snapshot, request)


def _sift_gpus(snapshot: Snapshot, request: Request) -> Sifted:
    count, within = request.gpus, request.within
    sieve = _Sieve(snapshot.nodes)
    if not sieve.put("GPU nodes", lambda node: None if len(node.topology) else _NO_GPUS):
        return sieve, "", "start one with `ray start --num-gpus=N`", "GPU nodes"
    if not sieve.put("constraints", _outside("gpu_nodes", request.gpu_nodes)):
        return sieve, "", "widen constraints.gpu_nodes", "constraints"
    if not sieve.put("health", lambda node: node.problem):
        return sieve, "", "run `placement topology` and repair the nodes it names", "health"

    if not sieve.put(
        "size", lambda node: f"has fewer than {count} GPUs" if len(node.topology) < count else None
    ):
        largest = max(sieve.dropped, key=lambda node: len(node.topology))
        most = len(largest.topology)
        advice = f"ask for at most {most} GPUs per replica, or add a node with {count}"
        return sieve, f"{largest.name} has {most} GPUs", advice, "size"

    if not sieve.put(
        "free GPUs", lambda node: f"has fewer than {count} GPUs free" if len(node.free) < count else None
    ):
        advice = f"release something, add a node with {count} GPUs, or ask for fewer replicas or GPUs"
        return sieve, _most_free(sieve.dropped), advice, "free GPUs"
    short = _most_free(sieve.dropped) if sieve.dropped else ""

    if within is not Within.NODE:
        reason = f"has no {count} free GPUs within {within.value!r}"
        if not sieve.put("within", lambda node: None if node.offer(count, within) else reason):
            nearest = min(sieve.dropped, key=lambda node: (node.offer(count) or (), node.name))
            return sieve, _apart(nearest, count, within), _wider(within, nearest, count), "within"
        short = _apart(sieve.dropped[0], count, within) if sieve.dropped else short

    if request.needs.slowest < 0:
        floor = _gb(request.min_bandwidth_gb_per_s)
        reason = f"its best {count} free GPUs reach less than {floor}"

        def too_slow(node: Node) -> str | None:
            offer = node.offer(count, within)
            return reason if offer is None or offer.slowness > request.needs.slowest else None

        met = sieve.put("bandwidth", too_slow)
        if sieve.dropped:
            nearest = min(sieve.dropped, key=lambda node: (node.offer(count, within) or (), node.name))
            short = _too_slow(nearest, count, within)
        if not met:
            reached = -(nearest.offer(count, within) or (0,))[0] / 1000
            advice = f"lower min_bandwidth_gb_per_s to {reached:g}, release something, or add a faster node"
            return sieve, short, advice, "bandwidth"
    return sieve, short, "", ""


def _sift_egress(snapshot: Snapshot, request: Request) -> Sifted:
    provider = request.provider or ""
    resource = f"egress_{provider}"
    sieve = _Sieve(snapshot.nodes)
    if not sieve.put(
        "egress nodes", lambda node: None if node.egress_resource(provider) else _no_egress(provider)
    ):
        advice = f"start one with `ray start --resources='{{\"{resource}\": 64}}'`"
        return sieve, "", advice, "egress nodes"
    if not sieve.put("constraints", _outside("egress_nodes", request.egress_nodes)):
        return sieve, "", "widen constraints.egress_nodes", "constraints"

    def left(node: Node) -> int:
        return node.egress[node.egress_resource(provider) or ""]

    reason = f"has fewer than {request.egress} egress units free"
    met = sieve.put("egress capacity", lambda node: reason if left(node) < request.egress else None)
    miss = ""
    if sieve.dropped:
        most = max(sieve.dropped, key=lambda node: (left(node), node.id))
        miss = f"{most.name} has {left(most)} free"
    if not met:
        advice = f"lower serving.max_concurrent, release something, or raise {resource} on a node"
        return sieve, miss, advice, "egress capacity"
    return sieve, miss, "", ""


def _outside(field_name: str, allowed: tuple[str, ...] | None) -> Objection:
    def objection(node: Node) -> str | None:
        if allowed is None or any(node.named(name) for name in allowed):
            return None
        return f"not in constraints.{field_name}"

    return objection


def _most_free(nodes: Sequence[Node]) -> str:
    most = max(nodes, key=lambda node: (len(node.free), node.id))
    free = f"{len(most.free)} ({ordinals(tuple(most.free))})" if most.free else "none"
    return f"{most.name} has {free} of its {len(most.topology)} GPUs free"


def _apart(node: Node, count: int, within: Within) -> str:
    """``gpu-a has 4 free GPUs, but in NVLink islands of 2 + 2``."""
    has = f"{node.name} has {len(node.free)} free GPUs, but"
    groups = _groups(node, within)
    if max(map(len, groups)) >= count:  # joined, and yet no ring: a mesh
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

    return _components(sorted(node.free), joined)


def _wider(within: Within, nearest: Node, count: int) -> str:
    reached = score(nearest.topology, nearest.best(count) or ())
    link = reached.link_name or "?"
    looser = [other.value for other in Within if nearest.offer(count, other) is not None]
    return (
        f"release something, add a node that has them, or ask for within: {looser[0]} "
        f"({_gb(reached.bandwidth_gb_per_s)}, weakest link {link}, on {nearest.name})"
    )


def _too_slow(node: Node, count: int, within: Within) -> str:
    best = score(node.topology, node.best(count, within) or ())
    speed = _gb(best.bandwidth_gb_per_s)
    return f"{node.name} has {count} free GPUs that reach {speed} (weakest link {best.link_name})"


def _gb(bandwidth: float) -> str:
    return f"{bandwidth:g} GB/s"
