"""Why a request goes to some nodes and not to others: counted, stage by stage, always in the same words.

A stage is a question put to each node in turn; a node that fails it gets the stage's reason and is asked no
more. The same stages explain a plan (``placement plan --explain``) and a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from placement.core import gangs
from placement.core.bundles import ELSEWHERE, OTHERS
from placement.core.labels import meets
from placement.core.mix import Kind
from placement.core.request import Request, Strategy
from placement.core.score import ANY_PROFILE, GIB, NO_GPUS, WHOLE, GpuName, Needs, Score, Within, score
from placement.core.snapshot import GPU_DOMAIN_LABEL, UNIT, UNKNOWN_PROFILE, Bits, Node, Snapshot
from placement.core.topology import Path, Topology, components, ordinals
from placement.errors import (
    BelowFloor,
    NoCpuNodes,
    NoEgressNodes,
    NoGpuNodes,
    NotEnoughEgress,
    NotEnoughGpus,
    Unplaceable,
    counted,
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

    @cached_property
    def largest(self) -> int:
        """GPUs of the largest of the nodes that were dropped last. Asked once all stages are put."""
        return max((node.whole_gpus for node in self.dropped), default=0)

    def put(self, name: str, objection: Objection) -> bool:
        """Drops the nodes with an objection; says whether any is left."""
        if not self.left and self.stages:
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
    sieve, miss, advice, _ = sift(snapshot, request)
    return Explanation(len(snapshot.nodes), tuple(sieve.stages), miss, advice)


def refusal_of(request: Request, index: int, sifted: Sifted) -> Unplaceable:
    """Why replica ``index`` finds no place, by what became of the nodes for it."""
    # A refusal names the stage at which no node was left, and what would help: else the planner is at fault.
    assert sifted[3] and sifted[2] and not sifted[0].stages[-1].kept, (request, sifted[0].stages)
    if request.on_cpus:
        return _refuse_cpus(request, index, sifted)
    return (_refuse_gpus if request.provider is None else _refuse_egress)(request, index, sifted)


def _refuse_gpus(request: Request, index: int, sifted: Sifted) -> Unplaceable:
    name, needs = request.deployment, request.needs
    sieve, miss, advice, stage = sifted
    excluded = Explanation(0, tuple(sieve.stages)).excluded
    excluded.pop(_NO_GPUS, None)
    largest = sieve.largest
    sets = request.stages * request.parts
    count, what = needs.gpus * sets, describe(needs) if sets == 1 else _sets(sets, needs)
    if needs.named:
        what += f" of {gpu_names(needs.named)}"
    if stage == "size":
        per = "replica" if sets == 1 else "tensor-parallel group"
        summary = f"{describe(needs)} per {per}, but {miss}"
        return NotEnoughGpus(name, summary, excluded, advice, count, largest)
    if stage == "free GPUs":
        one_set = sets == 1 or needs.named
        wanted = f"{what} free on one node" if one_set else f"{_layout(request)}; not one is free"
        return NotEnoughGpus(
            name, f"replica {index} needs {wanted}; at best {miss}", excluded, advice, count, largest
        )
    if stage == "within":
        summary = f"replica {index} needs {what} within {needs.within.value!r}; at best {miss}"
        return BelowFloor(name, summary, excluded, advice)
    if stage == "bandwidth":
        floor = _gb(needs.min_bandwidth_gb_per_s)
        return BelowFloor(name, f"replica {index} needs {what} at {floor}; at best {miss}", excluded, advice)
    if stage == "other bundles":
        return NotEnoughGpus(name, miss, excluded, advice, count, largest)
    if stage == "groups":
        return NotEnoughGpus(name, f"replica {index} needs {miss}", excluded, advice, count, largest)
    if stage == _NAMED:
        return NoGpuNodes(name, f"no node has {gpu_names(needs.named)} for it", excluded, advice)
    if stage in ("CPUs and memory", "spread"):
        return Unplaceable(name, f"replica {index} finds no node: {miss}", excluded, advice)
    summary = "the cluster has no GPU node" if stage == "GPU nodes" else "no GPU node may be used"
    return NoGpuNodes(name, summary, excluded, advice)


def _refuse_egress(request: Request, index: int, sifted: Sifted) -> Unplaceable:
    name, provider = request.deployment, request.provider or ""
    sieve, miss, advice, stage = sifted
    excluded = Explanation(0, tuple(sieve.stages)).excluded
    excluded.pop(_no_egress(provider), None)
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


Sifted = tuple[_Sieve, str, str, str]
"""The sieve, the nearest miss, the advice, and the stage at which no node was left (empty if some are)."""

_NO_GPUS = "has no GPUs"

_REPAIR = "run `placement status` and repair the nodes it names, or add a node"


def _no_egress(provider: str) -> str:
    return f"has no egress resource for {provider}"


def sift(snapshot: Snapshot, request: Request) -> Sifted:
    """What became of every node for the next replica of ``request``, whatever the deployment is called."""
    if request.on_cpus:
        return _sift_cpus(snapshot, request)
    return _sift_gpus(snapshot, request) if request.provider is None else _sift_egress(snapshot, request)


_NAMED = "named GPUs"
"""The stage at which nodes are left out that do not have the GPUs that are named."""


def gpu_names(names: Iterable[GpuName]) -> str:
    """``GPU 2-3``, ``GPU-1db5...``, as people call them."""
    named = [*names]
    slots = tuple(name for name in named if isinstance(name, int))
    texts = [f"GPU {ordinals(slots)}"] if slots else []
    return ", ".join([*texts, *(name for name in named if isinstance(name, str))])


def describe(needs: Needs) -> str:
    """``4 GPUs``, ``0.25 of a GPU``, ``20 GiB of a GPU``, ``a MIG instance 1g.10gb``."""
    if needs.profile == ANY_PROFILE:
        return "a MIG instance"
    if needs.profile:
        return f"a MIG instance {needs.profile}"
    if needs.memory_bytes:
        return f"{needs.memory_bytes / GIB:g} GiB of a GPU"
    if needs.share < WHOLE:
        return f"{needs.share / WHOLE:g} of a GPU"
    return counted(needs.gpus, "GPU")


def _cpus(milli: int) -> str:
    return f"{milli / 1000:g} CPU" + "s" * (milli != 1000)


def describe_cpus(request: Request) -> str:
    """``4 CPUs and 8 GiB of memory``: what a replica takes beside its GPUs, or without any; empty for nothing."""
    amounts = [_cpus(request.cpu_milli)] if request.cpu_milli else []
    if request.memory_bytes:
        amounts.append(f"{request.memory_bytes / GIB:.3g} GiB of memory")
    return " and ".join(amounts)


def _sets(count: int, needs: Needs, more: str = "") -> str:
    """``3 sets of 4 GPUs``, ``3 more sets of 4 GPUs``; ``3 GPUs``, where a set is one."""
    thing = "GPU" if needs.gpus == 1 else "set"
    named = f"{count} {more}{thing}" + ("" if count == 1 else "s")
    return named if needs.gpus == 1 else f"{named} of {counted(needs.gpus, 'GPU')}"


def _layout(request: Request) -> str:
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


def limits(request: Request) -> list[tuple[str, Objection]]:
    """The questions about what a node is, as far as the request asks: (stage, objection)."""
    return _lasting_limits(Kind.of(request)) + _passing_limits(request)


def limits_without_gpus(request: Request) -> list[tuple[str, Objection]]:
    """The same for a remote or a CPU replica, which no limit on GPUs concerns."""
    return _label_limits(request.labels.items()) + _passing_limits(request)


def _passing_limits(request: Request) -> list[tuple[str, Objection]]:
    """Those that depend on where others are, and the spread."""
    asked: list[tuple[str, Objection]] = []
    if request.needs.named and (home := {id for id, count in request.standing.items() if count}):
        asked.append(
            (_NAMED, lambda node: None if node.id in home else "other replicas have GPUs of another node")
        )
    asked += [(f"apart from {other}", _shared_with(other)) for other in request.apart_from]
    asked += [(f"{other} keeps apart", _kept_by(other)) for other in request.kept_away_by]
    asked += [(f"near to {other}", _not_shared_with(other)) for other in request.near_to]
    for stage, label in (("spread label", request.spread_label), ("domain label", request.domain_label)):
        if label is not None:
            asked.append((stage, _without_label(label)))
    return asked


def _without_label(label: str) -> Objection:
    return lambda node: None if label in node.labels else f"has no label {label}"


def _label_limits(labels: Iterable[tuple[str, str]]) -> list[tuple[str, Objection]]:
    return [(f"label {key}", _unlike(key, condition)) for key, condition in labels]


def _lasting_limits(kind: Kind) -> list[tuple[str, Objection]]:
    """Those whose answers stay the same, whatever is placed."""
    asked = _label_limits(kind.labels)
    if kind.needs.named:
        asked.append((_NAMED, _without_named(kind.needs)))
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
    """The question about CPUs and memory, if the request takes any.

    On a node with free GPUs a CPU replica takes only CPUs that these can spare.
    """
    cpu, memory, spared = request.cpu_milli, request.memory_bytes, request.spared_milli
    resources = request.resources
    if not cpu and not memory and not resources:
        return None

    def objection(node: Node) -> str | None:
        if spared and cpu <= node.cpu_milli < cpu + spared * node.free_slots:
            return f"has not {_cpus(cpu)} to spare beside its free GPUs"
        if node.cpu_milli < cpu:
            return (
                f"has less than {cpu / 1000:g} CPU free"
                if cpu <= 1000
                else f"has fewer than {cpu / 1000:g} CPUs free"
            )
        if node.memory_bytes < memory:
            return f"has less than {memory / GIB:g} GiB of memory free"
        less = (
            f"{amount / UNIT:g} {name}" for name, amount in resources if node.resources.get(name, 0) < amount
        )
        return next((f"has less than {one} free" for one in less), None)

    return objection


def eligible(snapshot: Snapshot, request: Request) -> Bits:
    """The nodes that nothing but a lack of room excludes."""
    if request.on_cpus:
        return _eligible_for_cpus(snapshot, request)
    return open_to(snapshot, Kind.of(request)) & _unobjected(snapshot, _passing_limits(request))


def _eligible_for_cpus(snapshot: Snapshot, request: Request) -> Bits:
    asked, (_, names) = limits_without_gpus(request), request.only_nodes
    sound = (node for node in snapshot.nodes if node.problem is None)
    allowed = snapshot.select(node for node in sound if not any(objection(node) for _, objection in asked))
    return allowed if names is None else allowed & snapshot.named(names)


def open_to(snapshot: Snapshot, kind: Kind) -> Bits:
    """The nodes that a kind of request may go to, whatever is placed there."""
    named = kind.needs.named
    limited = kind._replace(needs=NO_GPUS._replace(named=named, profile=kind.needs.profile if named else ""))
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


_ALL: Bits = -1
"""All nodes, however many there are."""


def roomy(snapshot: Snapshot, request: Request) -> Bits:
    """The nodes with the CPUs and the memory for one set of GPUs, or for one CPU replica."""
    short = short_of(request)
    return _ALL if short is None else snapshot.select(n for n in snapshot.nodes if not short(n))


def _unlike(key: str, condition: str) -> Objection:
    reason = f"label {key} is not {condition!r}"
    return lambda node: None if meets(node.labels, key, condition) else reason


def _without_named(needs: Needs) -> Objection:
    """Whether a node lacks a GPU that is named, or has it in another way than it is asked for."""

    def objection(node: Node) -> str | None:
        for name in needs.named:
            slot = node.slot_of(name)
            if slot is None:
                return f"has no {gpu_names([name])}"
            profile = node.slots.get(slot)
            if profile == UNKNOWN_PROFILE:
                return f"its {gpu_names([name])} cannot be used"
            if profile is None and needs.profile:
                return f"its {gpu_names([name])} is no MIG instance"
            if profile is not None and needs.profile not in (profile, ANY_PROFILE):
                return f"its {gpu_names([name])} is a MIG instance {profile}"
        return None

    return objection


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
    sieve = _Sieve([_only_named(node, needs) for node in snapshot.nodes] if needs.named else snapshot.nodes)
    if not sieve.put("GPU nodes", lambda node: None if len(node.topology) else _NO_GPUS):
        return sieve, "", "start one with `ray start --num-gpus=N`", "GPU nodes"
    if not sieve.put("constraints", _outside("gpu_nodes", request.gpu_nodes)):
        return sieve, "", "widen constraints.gpu_nodes", "constraints"
    of_others = (OTHERS, ELSEWHERE)
    if not sieve.put("health", lambda node: None if node.problem in of_others else node.problem):
        return sieve, "", _REPAIR, "health"
    for stage, objection in limits(request):
        if not sieve.put(stage, objection):
            advice = f"loosen the constraint ({stage}), or add a node that meets it"
            if stage == _NAMED:
                advice = "name GPUs of one node; `placement status --json` shows which there are"
            return sieve, "", advice, stage
    in_the_way = any(node.problem in of_others for node in sieve.left)
    if in_the_way and not sieve.put(
        "other bundles", lambda node: node.problem if node.problem in of_others else None
    ):
        apart = request.strategy is Strategy.STRICT_SPREAD
        miss = "no node of its own" if apart else "no room on what the other bundles leave"
        advice = _any_of(
            "use strategy SPREAD or PACK" if apart else _release(snapshot, request, sieve.nodes),
            "ask for fewer bundles",
            _add(request, 1),
        )
        return sieve, f"a bundle of {what} finds {miss}", advice, "other bundles"
    permitted = list(sieve.left)
    if not sieve.put("size", lambda node: _too_small(node, needs)):
        return sieve, *_size_miss(snapshot, sieve.dropped, request), "size"

    candidates = list(sieve.left)
    free_only = needs._replace(within=Within.NODE)
    reason = f"has fewer than {count} GPUs free"
    if needs.named:
        few = "none" if count == 1 else f"fewer than {count}"
        reason = f"has {few} of {gpu_names(needs.named)} free"
    elif not needs.whole or count == 1:
        reason = f"has no {'GPU' if needs.whole else what.removeprefix('a ')} free"
    if needs.free_memory_bytes:
        reason += f" with {needs.free_memory_bytes / GIB:g} GiB unused"
    if not sieve.put("free GPUs", lambda node: None if node.offer(free_only) else reason):
        used = "" if _others_hold(request, candidates) else needs.free_memory_bytes
        advice = _any_of(
            _release(snapshot, request, candidates),
            "end what uses GPU memory without holding a GPU" if used else "",
            "name other GPUs" if needs.named else _add(request, request.stages),
            _fewer(request, any(node.free or (node.rests and not needs.whole) for node in candidates)),
        )
        return sieve, _most_free(sieve.dropped, needs), advice, "free GPUs"
    short = _most_free(sieve.dropped, needs) if sieve.dropped else ""

    if needs.within is not Within.NODE:
        reason = f"has no {count} free GPUs within {needs.within.value!r}"
        if not sieve.put("within", lambda node: None if node.offer(needs) else reason):
            nearest = min(sieve.dropped, key=lambda node: (node.offer(free_only) or (), node.name))
            advice = _any_of(
                _release(snapshot, request, candidates),
                "add a node that has them"
                if request.stages * request.parts == 1
                else "add nodes that have them",
                _wider(nearest, needs),
            )
            return sieve, _apart(nearest, count, needs.within), advice, "within"
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
            advice = _any_of(
                f"lower min_bandwidth_gb_per_s to {reached:g}",
                _release(snapshot, request, candidates),
                "add a faster node" if request.stages * request.parts == 1 else "add faster nodes",
            )
            return sieve, short, advice, "bandwidth"

    too_little = short_of(request)
    if too_little is not None and not sieve.put("CPUs and memory", too_little):
        most = max(sieve.dropped, key=lambda node: (node.cpu_milli, node.memory_bytes, node.name))
        miss = f"{most.name} has {most.cpu_milli / 1000:g} CPUs and {most.memory_bytes / GIB:.3g} GiB free"
        for name, amount in request.resources:
            if all(node.resources.get(name, 0) < amount for node in sieve.dropped):
                miss = f"none has {amount / UNIT:g} {name} free"
        advice = _any_of(
            f"ask for less CPU or memory{' or custom resources' if request.resources else ''} per GPU",
            "release something" if _others_hold(request, candidates) else "",
            "add a node that has more",
        )
        return sieve, miss, advice, "CPUs and memory"
    if request.max_per_domain:
        full = _full_domains(snapshot, request)
        label = request.spread_label or ""
        if not sieve.put(*_spread_stage(request, full)):
            others = [node for node in candidates if node.labels.get(label) not in full]
            advice = _any_of(
                "raise constraints.spread.max",
                _release(snapshot, request, others),
                f"add a node with another {label}",
            )
            return sieve, _spread_miss(request), advice, "spread"
    if request.stages > 1 or request.parts > 1:
        places = [snapshot.bit(node.id) for node in sieve.left]  # named GPUs are those of one node
        places = places if needs.named else [snapshot.select(sieve.left)]
        free = max(gangs.groups_free(snapshot, request, place) for place in places)
        enough = free >= request.stages
        partly = "has room for a part of the replica"
        if not sieve.put("groups", lambda node: None if enough else partly):
            advice = _any_of(
                _release(snapshot, request, candidates),
                "name other GPUs" if needs.named else _add(request, request.stages - free),
                "" if needs.named else _in_stages(snapshot, request, permitted),
                _fewer(request, True),
            )
            return sieve, f"{_layout(request)}; there is room for {free}", advice, "groups"
    return sieve, short, "", ""


def _only_named(node: Node, needs: Needs) -> Node:
    """A node as one sees it who looks at the GPUs that are named, and no others."""
    mask = node.named_mask(needs)
    return replace(
        node,
        free=frozenset(gpu for gpu in node.free if mask >> gpu & 1),
        rests={gpu: rest for gpu, rest in node.rests.items() if mask >> gpu & 1},
        instances={slot: profile for slot, profile in node.instances.items() if mask >> slot & 1},
    )


def _release(snapshot: Snapshot, request: Request, nodes: Sequence[Node]) -> str:
    """``release something``, if there would be room for one more replica on the nodes once all others had gone."""
    if request.needs.named and request.stages > 1:
        helps = any(gangs.has_room_emptied(snapshot, request, snapshot.bit(node.id)) for node in nodes)
    elif request.stages > 1 or request.parts > 1:
        helps = gangs.has_room_emptied(snapshot, request, snapshot.select(nodes))
    else:
        helps = any(node.emptied().copies(request.needs) > request.standing.get(node.id, 0) for node in nodes)
    return "release something" if helps else ""


def _others_hold(request: Request, nodes: Sequence[Node]) -> bool:
    """Whether anything but this deployment holds GPUs of the nodes, as far as can be told."""
    held = 0
    for node in nodes:
        mask = node.named_mask(request.needs)
        held += WHOLE * sum(mask >> gpu & 1 for gpu in node.held) - sum(node.rests.values())
    share = max(request.needs.share_of(node.gpu_memory_bytes) or WHOLE for node in nodes)
    each = share * request.needs.gpus * request.stages * request.parts
    return held > each * sum(request.standing.get(node.id, 0) for node in nodes)


def _add(request: Request, groups: int) -> str:
    """What nodes to add for so many groups more."""
    if request.stages * request.parts == 1:
        return f"add a node with {describe(request.needs)}"
    where = f" in one {GPU_DOMAIN_LABEL}" if request.parts > 1 else ""
    return f"add nodes with room for {_sets(groups * request.parts, request.needs, 'more ')}{where}"


def _fewer(request: Request, some: bool) -> str:
    """What less to ask for, if ``some`` of it is there."""
    fewer = ["replicas"] if sum(request.standing.values()) else []
    if some and request.needs.whole and request.needs.gpus * request.stages * request.parts > 1:
        fewer.append("GPUs")
    asked = [f"ask for fewer {' or '.join(fewer)}"] if fewer else []
    if some and not request.needs.whole and not request.needs.profile:
        asked.append("ask for a smaller share")
    return " or ".join(asked)


def _in_stages(snapshot: Snapshot, request: Request, nodes: Sequence[Node]) -> str:
    """Which pipeline stages a replica could be cut into so that there is room for it, if there are any."""
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
        return "has MIG instances only" if node.profiles else "has no GPU that can be used"
    if needs.memory_bytes and node.gpu_memory_bytes is None:
        return "the memory of its GPUs cannot be read"
    if needs.memory_bytes and needs.share_of(node.gpu_memory_bytes) is None:
        return f"its GPUs have less than {needs.memory_bytes / GIB:g} GiB"
    return f"has fewer than {needs.gpus} GPUs" if node.whole_gpus < needs.gpus else None


def _size_miss(snapshot: Snapshot, nodes: Sequence[Node], request: Request) -> tuple[str, str]:
    needs = request.needs
    known = ", ".join(sorted({profile for node in nodes for profile in node.profiles}))
    if needs.profile:
        advice = f"ask for one of: {known}" if known else "start a node with MIG instances"
        return "no node has one", advice
    if not any(node.whole_gpus for node in nodes):
        instead = f"ask for a MIG instance (mig: one of {known}), or " if known else ""
        miss = "the GPUs are all cut up into MIG instances" if known else "no GPU can be used"
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
    instead = _in_stages(snapshot, request, nodes)
    if not instead and floor and (cut := _in_stages(snapshot, without, nodes)):
        instead = (
            f"leave {floor} out, since links between nodes are not known"
            if request.divisible
            else (f"{cut}, without {floor}, since links between nodes are not known")
        )
    each = "replica" if request.stages == 1 else "tensor-parallel group"
    fewer = f"ask for at most {counted(most, 'GPU')} per {each}" if most > 1 or not floor else ""
    return f"the largest node has {most}", _any_of(instead, fewer, f"add a node with {needs.gpus}")


def _sift_egress(snapshot: Snapshot, request: Request) -> Sifted:
    provider, units = request.provider or "", request.egress
    resource = f"egress_{provider}"
    sieve = _Sieve(snapshot.nodes)
    if not sieve.put(
        "egress nodes", lambda node: None if node.egress_for(provider) else _no_egress(provider)
    ):
        advice = f"start one with `ray start --resources='{{\"{resource}\": 64}}'`"
        return sieve, "", advice, "egress nodes"
    if stopped := _not_permitted(sieve, request):
        return stopped

    def left(node: Node) -> int:
        return max(node.egress_for(provider).values())

    def short(node: Node) -> str | None:
        if node.egress_resource(provider, units):
            return None
        if sum(node.egress_for(provider).values()) >= units:
            return f"has no {units} egress units free in one resource"
        return "has no egress unit free" if units == 1 else f"has fewer than {units} egress units free"

    met = sieve.put("egress capacity", short)
    miss = ""
    if sieve.dropped:
        most = max(sieve.dropped, key=lambda node: (left(node), node.id))
        miss = f"{most.name} has {max(0, left(most))} free"
    if not met:
        advice = _any_of(
            "lower serving.max_concurrent" if any(left(node) > 0 for node in sieve.dropped) else "",
            "release something" if any(node.serving for node in sieve.dropped) else "",
            f"raise {resource} on a node",
        )
        return sieve, miss, advice, "egress capacity"
    return _spread_too_far(snapshot, sieve, request, "an egress node") or (sieve, miss, "", "")


def _sift_cpus(snapshot: Snapshot, request: Request) -> Sifted:
    sieve, what = _Sieve(snapshot.nodes), describe_cpus(request)
    if not sieve.put("nodes", lambda node: None):
        return sieve, "", "start one with `ray start --num-cpus=N`", "nodes"
    if stopped := _not_permitted(sieve, request):
        return stopped
    candidates = list(sieve.left)
    short = short_of(request)
    met = sieve.put("CPUs and memory", lambda node: None if short is None else short(node))
    miss = ""
    if sieve.dropped:

        def spare(node: Node) -> int:
            return max(0, node.cpu_milli - request.spared_milli * node.free_slots)

        most = max(sieve.dropped, key=lambda node: (spare(node), node.memory_bytes, node.name))
        has = _cpus(most.cpu_milli)
        if spare(most) < most.cpu_milli:
            has = f"{spare(most) / 1000:g} of its {has} to spare beside its free GPUs,"
        miss = f"{most.name} has {has} and {most.memory_bytes / GIB:.3g} GiB free"
    if not met:
        others = any(node.replicas > request.standing.get(node.id, 0) for node in candidates)
        advice = _any_of(
            "ask for fewer cpus" + (" or less memory_gib" if request.memory_bytes else ""),
            "release something" if others else "",
            f"add a node with {what}",
        )
        return sieve, miss, advice, "CPUs and memory"
    return _spread_too_far(snapshot, sieve, request, "a node") or (sieve, miss, "", "")


def _not_permitted(sieve: _Sieve, request: Request) -> Sifted | None:
    """What excludes the last node for a replica without GPUs before room is looked at, if that does."""
    field, names = request.only_nodes
    if not sieve.put("constraints", _outside(field, names)):
        return sieve, "", f"widen constraints.{field}", "constraints"
    if not sieve.put("health", lambda node: node.problem):
        return sieve, "", _REPAIR, "health"
    for stage, objection in limits_without_gpus(request):
        if not sieve.put(stage, objection):
            return sieve, "", f"loosen the constraint ({stage}), or add a node that meets it", stage
    return None


def _spread_too_far(snapshot: Snapshot, sieve: _Sieve, request: Request, a_node: str) -> Sifted | None:
    """The same at the question whether a domain has too many replicas already."""
    if not request.max_per_domain or sieve.put(*_spread_stage(request, _full_domains(snapshot, request))):
        return None
    advice = _any_of("raise constraints.spread.max", f"add {a_node} with another {request.spread_label}")
    return sieve, _spread_miss(request), advice, "spread"


def _spread_stage(request: Request, full: Collection[str]) -> tuple[str, Objection]:
    label = request.spread_label or ""
    reason = f"its {label} has {request.max_per_domain} of its replicas already"
    return "spread", lambda node: reason if node.labels.get(label) in full else None


def _spread_miss(request: Request) -> str:
    return f"every {request.spread_label} with room has {counted(request.max_per_domain, 'replica')} already"


def _any_of(*options: str) -> str:
    """``a, b, or c``, of those that are not empty."""
    *others, last = filter(None, options)
    return ", ".join([*others, f"or {last}"]) if others else last


def _outside(field_name: str, allowed: tuple[str, ...] | None) -> Objection:
    def objection(node: Node) -> str | None:
        if allowed is None or any(node.named(name) for name in allowed):
            return None
        return f"not in constraints.{field_name}"

    return objection


def _most_free(nodes: Sequence[Node], needs: Needs) -> str:
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
        which = f"{free} ({ordinals(tuple(most.free))})" if free else "none"
        text = f"{most.name} has {which} of its {counted(most.whole_gpus, 'GPU')} free"
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

    return components(sorted(node.free), joined)


def _wider(nearest: Node, needs: Needs) -> str:
    reached = score(nearest.topology, nearest.best(needs._replace(within=Within.NODE)) or ())
    looser = [other.value for other in Within if nearest.offer(needs._replace(within=other)) is not None]
    return (
        f"ask for within: {looser[0]} "
        f"({_reached(reached)}, weakest link {reached.link_name}, on {nearest.name})"
    )


def _too_slow(node: Node, needs: Needs) -> str:
    best = score(node.topology, node.best(needs) or ())
    return (
        f"{node.name} has {needs.gpus} free GPUs that reach {_reached(best)} (weakest link {best.link_name})"
    )


def _reached(best: Score) -> str:
    if best.upper_gb_per_s is None:
        return _gb(best.bandwidth_gb_per_s)
    return f"between {best.bandwidth_gb_per_s:g} and {_gb(best.upper_gb_per_s)}"


def _gb(bandwidth: float) -> str:
    return f"{bandwidth:g} GB/s"
