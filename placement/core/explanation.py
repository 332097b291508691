"""Why a request goes to some nodes and not to others: counted, stage by stage, always in the same words.

A stage is a question put to each node in turn; a node that fails it gets the stage's reason and is asked no
more. The same stages explain a plan (``placement plan --explain``) and a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from placement.core import gangs
from placement.core.labels import meets
from placement.core.mix import Kind
from placement.core.request import Request
from placement.core.score import GIB, NO_GPUS, WHOLE, Needs, Within, score
from placement.core.snapshot import GPU_DOMAIN_LABEL, Bits, Node, Snapshot
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
    name, count = request.deployment, request.needs.gpus
    sieve, miss, advice, stage = _sift(snapshot, request)
    excluded = Explanation(0, tuple(sieve.stages)).excluded
    excluded.pop(_NO_GPUS, None)
    largest = max((node.whole_gpus for node in sieve.dropped), default=0)
    what = describe(request.needs)
    if stage == "size":
        summary = f"{what} per replica, but {miss}"
        return NotEnoughGpus(name, summary, excluded, advice, count, largest)
    if stage == "free GPUs":
        summary = f"replica {index} needs {what} free on one node; at best {miss}"
        return NotEnoughGpus(name, summary, excluded, advice, count, largest)
    if stage == "within":
        summary = f"replica {index} needs {what} within {request.needs.within.value!r}; at best {miss}"
        return BelowFloor(name, summary, excluded, advice)
    if stage == "bandwidth":
        floor = _gb(request.needs.min_bandwidth_gb_per_s)
        return BelowFloor(name, f"replica {index} needs {what} at {floor}; at best {miss}", excluded, advice)
    if stage == "groups":
        return NotEnoughGpus(name, f"replica {index} {miss}", excluded, advice, count, largest)
    if stage in ("CPUs and memory", "spread"):
        return Unplaceable(name, f"replica {index} finds no node: {miss}", excluded, advice)
    summary = "the cluster has no GPU node" if stage == "GPU nodes" else "no GPU node may be used"
    return NoGpuNodes(name, summary, excluded, advice)


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
        f"no node may call out to {provider}" if stage == "egress nodes" else "no egress node may be used"
    )
    return NoEgressNodes(name, summary, excluded, advice, provider)


Sifted = tuple[_Sieve, str, str, str]
"""The sieve, the nearest miss, the advice, and the stage at which no node was left (empty if some are)."""

_NO_GPUS = "has no GPUs"


def _no_egress(provider: str) -> str:
    return f"has no egress resource for {provider}"


def _sift(snapshot: Snapshot, request: Request) -> Sifted:
    return _sift_gpus(snapshot, request) if request.provider is None else _sift_egress(snapshot, request)


def describe(needs: Needs) -> str:
    """``4 GPUs``, ``0.25 of a GPU``, ``20 GiB of a GPU``, ``a MIG instance 1g.10gb``."""
    if needs.profile:
        return f"a MIG instance {needs.profile}"
    if needs.memory_bytes:
        return f"{needs.memory_bytes / GIB:g} GiB of a GPU"
    if needs.share < WHOLE:
        return f"{needs.share / WHOLE:g} of a GPU"
    return "1 GPU" if needs.gpus == 1 else f"{needs.gpus} GPUs"


def limits(request: Request) -> list[tuple[str, Objection]]:
    """The questions about what a node is, as far as the request asks: (stage, objection)."""
    return _lasting_limits(Kind.of(request)) + _passing_limits(request)


def _passing_limits(request: Request) -> list[tuple[str, Objection]]:
    """Those that depend on where others are, and the spread."""
    asked = neighbour_limits(request)
    if request.spread_label is not None:
        label = request.spread_label
        asked.append(("spread label", lambda node: None if label in node.labels else f"has no label {label}"))
    return asked


def neighbour_limits(request: Request) -> list[tuple[str, Objection]]:
    """Those about who else is on a node: of GPU replicas and remote ones alike."""
    apart = [(f"apart from {other}", _shared_with(other)) for other in request.apart_from]
    kept = [(f"{other} keeps apart", _kept_by(other)) for other in request.kept_away_by]
    near = [(f"near to {other}", _not_shared_with(other)) for other in request.near_to]
    return [*apart, *kept, *near]


def _lasting_limits(kind: Kind) -> list[tuple[str, Objection]]:
    """Those whose answers stay the same, whatever is placed."""
    asked: list[tuple[str, Objection]] = []
    for key, condition in kind.labels:
        asked.append((f"label {key}", _unlike(key, condition)))
    if kind.accelerators:
        named = ", ".join(kind.accelerators)
        asked.append(
            (
                "accelerator",
                lambda node: (
                    None if node.accelerators & set(kind.accelerators) else f"its GPUs are not {named}"
                ),
            )
        )
    least = kind.compute_capability
    if least is not None:
        reason = f"compute capability below {least[0]}.{least[1]}, or unknown"
        asked.append(
            (
                "compute capability",
                lambda node: None if (node.compute_capability or (0, 0)) >= least else reason,
            )
        )
    return asked


def short_of(request: Request) -> Objection | None:
    """The question about CPUs and memory, if the request takes any."""
    cpu, memory = request.cpu_milli, request.memory_bytes
    if not cpu and not memory:
        return None

    def objection(node: Node) -> str | None:
        if node.cpu_milli < cpu:
            return f"has fewer than {cpu / 1000:g} CPUs free"
        return f"has less than {memory / GIB:g} GiB of memory free" if node.memory_bytes < memory else None

    return objection


def eligible(snapshot: Snapshot, request: Request) -> Bits:
    """The nodes that nothing but a lack of room excludes."""
    return open_to(snapshot, Kind.of(request)) & _unobjected(snapshot, _passing_limits(request))


def open_to(snapshot: Snapshot, kind: Kind) -> Bits:
    """The nodes that a kind of request may go to, whatever is placed there."""
    limited = kind._replace(needs=NO_GPUS)
    if limited not in snapshot.open_to:
        allowed = (
            snapshot.usable if kind.gpu_nodes is None else snapshot.usable & snapshot.named(kind.gpu_nodes)
        )
        snapshot.open_to[limited] = allowed & _unobjected(snapshot, _lasting_limits(kind))
    return snapshot.open_to[limited]


def _unobjected(snapshot: Snapshot, asked: list[tuple[str, Objection]]) -> Bits:
    """The nodes to which nothing is objected; where nothing is asked, all that are usable."""
    if not asked:
        return snapshot.usable
    return snapshot.select(
        node for node in snapshot.nodes if not any(objection(node) for _, objection in asked)
    )


def roomy(snapshot: Snapshot, request: Request) -> Bits:
    """The nodes with the CPUs and the memory for one set of GPUs."""
    short = short_of(request)
    return snapshot.usable if short is None else snapshot.select(n for n in snapshot.nodes if not short(n))


def _unlike(key: str, condition: str) -> Objection:
    reason = f"label {key} is not {condition!r}"
    return lambda node: None if meets(node.labels, key, condition) else reason


def _shared_with(other: str) -> Objection:
    return lambda node: f"has a replica of {other!r}" if other in node.deployments else None


def _kept_by(other: str) -> Objection:
    reason = f"has a replica of {other!r}, which is to be apart from this one"
    return lambda node: reason if other in node.deployments else None


def _not_shared_with(other: str) -> Objection:
    return lambda node: None if other in node.deployments else f"has no replica of {other!r}"


def _sift_gpus(snapshot: Snapshot, request: Request) -> Sifted:
    needs = request.needs
    count, what = needs.gpus, describe(needs)
    sieve = _Sieve(snapshot.nodes)
    if not sieve.put("GPU nodes", lambda node: None if len(node.topology) else _NO_GPUS):
        return sieve, "", "start one with `ray start --num-gpus=N`", "GPU nodes"
    if not sieve.put("constraints", _outside("gpu_nodes", request.gpu_nodes)):
        return sieve, "", "widen constraints.gpu_nodes", "constraints"
    if not sieve.put("health", lambda node: node.problem):
        return sieve, "", "run `placement topology` and repair the nodes it names", "health"
    for stage, objection in limits(request):
        if not sieve.put(stage, objection):
            return sieve, "", f"loosen the constraint ({stage}), or add a node that meets it", stage
    if not sieve.put("size", lambda node: _too_small(node, needs)):
        return sieve, *_size_miss(sieve.dropped, needs), "size"

    free_only = needs._replace(within=Within.NODE)
    reason = (
        f"has no {what.removeprefix('a ')} free" if not needs.whole else f"has fewer than {count} GPUs free"
    )
    if needs.free_memory_bytes:
        reason += f" with {needs.free_memory_bytes / GIB:g} GiB unused"
    if not sieve.put("free GPUs", lambda node: None if node.offer(free_only) else reason):
        advice = f"release something, add a node with {what}, or ask for fewer replicas or GPUs"
        return sieve, _most_free(sieve.dropped, needs), advice, "free GPUs"
    short = _most_free(sieve.dropped, needs) if sieve.dropped else ""

    if needs.within is not Within.NODE:
        reason = f"has no {count} free GPUs within {needs.within.value!r}"
        if not sieve.put("within", lambda node: None if node.offer(needs) else reason):
            nearest = min(sieve.dropped, key=lambda node: (node.offer(free_only) or (), node.name))
            return sieve, _apart(nearest, count, needs.within), _wider(nearest, needs), "within"
        short = _apart(sieve.dropped[0], count, needs.within) if sieve.dropped else short

    if needs.slowest < 0:
        floor = _gb(needs.min_bandwidth_gb_per_s)
        reason = f"its best {count} free GPUs reach less than {floor}"

        def too_slow(node: Node) -> str | None:
            offer = node.offer(needs)
            return reason if offer is None or offer.slowness > needs.slowest else None

        met = sieve.put("bandwidth", too_slow)
        if sieve.dropped:
            nearest = min(sieve.dropped, key=lambda node: (node.offer(needs) or (), node.name))
            short = _too_slow(nearest, needs)
            reached = -(nearest.offer(needs) or (0,))[0] / 1000
        if not met:
            advice = f"lower min_bandwidth_gb_per_s to {reached:g}, release something, or add a faster node"
            return sieve, short, advice, "bandwidth"

    too_little = short_of(request)
    if too_little is not None and not sieve.put("CPUs and memory", too_little):
        most = max(sieve.dropped, key=lambda node: (node.cpu_milli, node.memory_bytes, node.name))
        miss = f"{most.name} has {most.cpu_milli / 1000:g} CPUs and {most.memory_bytes / GIB:.3g} GiB free"
        return sieve, miss, "ask for less CPU or memory per GPU, or release something", "CPUs and memory"
    if request.max_per_domain:
        full = _full_domains(snapshot, request)
        label = request.spread_label or ""
        reason = f"its {label} has {request.max_per_domain} of its replicas already"
        if not sieve.put("spread", lambda node: reason if node.labels.get(label) in full else None):
            miss = f"every {label} with room has {request.max_per_domain} replicas already"
            return sieve, miss, f"raise constraints.spread.max, or add a node with another {label}", "spread"
    if request.stages > 1 or request.parts > 1:
        free = gangs.groups_free(snapshot, request, snapshot.select(sieve.left))
        where = (
            f"over {request.parts} nodes of one {GPU_DOMAIN_LABEL}" if request.parts > 1 else "on one node"
        )
        if free < request.stages:
            each = f"{count * request.parts} GPUs" if request.parts > 1 else what
            miss = f"needs {request.stages} x {each}, each {where}, all of one GPU model; there is room for {free}"
            return sieve, miss, f"release something, or add nodes with {what} free", "groups"
    return sieve, short, "", ""


def _full_domains(snapshot: Snapshot, request: Request) -> set[str]:
    """Values of the spread label under which no more replicas may go."""
    counts: Counter[str] = Counter()
    for node in snapshot.nodes:
        value = node.labels.get(request.spread_label or "")
        if value is not None:
            counts[value] += request.standing.get(node.id, 0)
    return {value for value, count in counts.items() if count >= request.max_per_domain}


def _too_small(node: Node, needs: Needs) -> str | None:
    """Why a node could not even take such a replica if all of it were free."""
    if needs.profile:
        return None if needs.profile in node.profiles else f"has no MIG instances {needs.profile}"
    if not node.whole_gpus:
        return "has MIG instances only"
    if needs.memory_bytes and needs.share_of(node.gpu_memory_bytes) is None:
        return f"its GPUs have less than {needs.memory_bytes / GIB:g} GiB, or nobody knows"
    return f"has fewer than {needs.gpus} GPUs" if node.whole_gpus < needs.gpus else None


def _size_miss(nodes: Sequence[Node], needs: Needs) -> tuple[str, str]:
    known = ", ".join(sorted({profile for node in nodes for profile in node.profiles}))
    if needs.profile:
        advice = f"ask for one of: {known}" if known else "start a node with MIG instances"
        return "no node has one", advice
    if not any(node.whole_gpus for node in nodes):
        instead = f"ask for a MIG instance (mig: one of {known}), or " if known else ""
        return "the GPUs are all cut up into MIG instances", f"{instead}add a node with {describe(needs)}"
    if needs.memory_bytes:
        most = max((node.gpu_memory_bytes or 0 for node in nodes), default=0)
        return f"the largest GPU has {most / GIB:g} GiB", "ask for less gpu_memory_gib, or add a larger GPU"
    most = max(node.whole_gpus for node in nodes)
    return (
        f"the largest node has {most}",
        f"ask for at most {most} GPUs per replica, or add a node with {needs.gpus}",
    )


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
    for stage, objection in neighbour_limits(request):
        if not sieve.put(stage, objection):
            return sieve, "", f"loosen the constraint ({stage}), or add a node that meets it", stage

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


def _most_free(nodes: Sequence[Node], needs: Needs) -> str:
    if needs.profile:
        most = max(nodes, key=lambda node: (list(node.slots.values()).count(needs.profile), node.id))
        return f"{most.name} has none of its {list(most.slots.values()).count(needs.profile)} free"
    most = max(nodes, key=lambda node: (len(node.free), node.id))
    free = f"{len(most.free)} ({ordinals(tuple(most.free))})" if most.free else "none"
    return f"{most.name} has {free} of its {most.whole_gpus} GPUs free"


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


def _wider(nearest: Node, needs: Needs) -> str:
    reached = score(nearest.topology, nearest.best(needs._replace(within=Within.NODE)) or ())
    looser = [other.value for other in Within if nearest.offer(needs._replace(within=other)) is not None]
    return (
        f"release something, add a node that has them, or ask for within: {looser[0]} "
        f"({_gb(reached.bandwidth_gb_per_s)}, weakest link {reached.link_name}, on {nearest.name})"
    )


def _too_slow(node: Node, needs: Needs) -> str:
    best = score(node.topology, node.best(needs) or ())
    speed = _gb(best.bandwidth_gb_per_s)
    return f"{node.name} has {needs.gpus} free GPUs that reach {speed} (weakest link {best.link_name})"


def _gb(bandwidth: float) -> str:
    return f"{bandwidth:g} GB/s"
