"""Why nodes were excluded for a request: counted, stage by stage, always in the same words.

A stage is a question about each node; a node that fails it is excluded with the stage's reason and not asked any
further. The same stages explain a plan (``placement plan --explain``) and a refusal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from placement.core import gangs
from placement.core.advice import (
    adding,
    asking_for_fewer,
    asking_for_wider,
    how_apart,
    how_slow,
    in_stages,
    most_free,
    others_hold,
    releasing,
    size_miss,
)
from placement.core.at_best import floor_miss
from placement.core.bundles import ELSEWHERE, OTHERS
from placement.core.limits import (
    NAMED,
    Objection,
    limits,
    limits_without_gpus,
    outside,
    short_of,
    too_small,
)
from placement.core.needs import GIB, Within
from placement.core.node import UNIT, Node
from placement.core.request import Request, Strategy
from placement.core.snapshot import Snapshot
from placement.core.wording import (
    any_of,
    cpus,
    describe,
    describe_cpus,
    gb_per_s,
    gpu_names,
    layout_of,
)
from placement.errors import counted


@dataclass(frozen=True)
class Stage:
    """One question.

    Attributes:
        name: its topic (``"free GPUs"``).
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
        stages: the questions, up to the last one before which a node was left.
        nearest_miss: the excluded node that came closest, and what it lacks; empty if there is none.
        advice: what would make room; empty if there is room.
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


class _Sieve:
    """The nodes that are left after each stage."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.left = list(nodes)
        self.dropped: list[Node] = []
        self.stages: list[Stage] = []

    @cached_property
    def largest(self) -> int:
        """GPUs of the largest node among those dropped last. Asked once all stages are done."""
        return max((node.whole_gpus for node in self.dropped), default=0)

    def put(self, name: str, objection: Objection) -> bool:
        """Drops the nodes with an objection; returns whether any is left."""
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
    """Which nodes are excluded for the next replica of ``request``, and why."""
    sieve, miss, advice, _ = sift(snapshot, request)
    return Explanation(len(snapshot.nodes), tuple(sieve.stages), miss, advice)


Sifted = tuple[_Sieve, str, str, str]
"""The sieve, the nearest miss, the advice, and the stage at which no node was left (empty if some are left)."""

AT_BEST = "floor, all free"
"""The stage for a floor that no node reaches, even with all its GPUs free."""

HAS_NO_GPUS = "has no GPUs"
"""The reason for a node without GPUs."""

_REPAIR = "run `placement status` and repair the nodes it names, or add a node"


def no_egress(provider: str) -> str:
    """The reason for a node that may not call the provider."""
    return f"has no egress resource for {provider}"


def sift(snapshot: Snapshot, request: Request) -> Sifted:
    """The same, independent of the deployment's name."""
    if request.on_cpus:
        return _sift_cpus(snapshot, request)
    return _sift_gpus(snapshot, request) if request.provider is None else _sift_egress(snapshot, request)


def _sift_gpus(snapshot: Snapshot, request: Request) -> Sifted:
    needs = request.needs
    count, what = needs.gpus, describe(needs)
    sieve = _Sieve([node.only_named(needs) for node in snapshot.nodes])
    if not sieve.put("GPU nodes", lambda node: None if len(node.topology) else HAS_NO_GPUS):
        return sieve, "", "start one with `ray start --num-gpus=N`", "GPU nodes"
    if not sieve.put("constraints", outside("gpu_nodes", request.gpu_nodes)):
        return sieve, "", "widen constraints.gpu_nodes", "constraints"
    of_others = (OTHERS, ELSEWHERE)
    if not sieve.put("health", lambda node: None if node.problem in of_others else node.problem):
        return sieve, "", _REPAIR, "health"
    for stage, objection in limits(request):
        if not sieve.put(stage, objection):
            advice = f"loosen the constraint ({stage}), or add a node that meets it"
            if stage == NAMED:
                advice = "name GPUs of one node; `placement status --json` shows which there are"
            return sieve, "", advice, stage
    in_the_way = any(node.problem in of_others for node in sieve.left)
    if in_the_way and not sieve.put(
        "other bundles", lambda node: node.problem if node.problem in of_others else None
    ):
        apart = request.strategy is Strategy.STRICT_SPREAD
        miss = "no node of its own" if apart else "no room on what the other bundles leave"
        advice = any_of(
            "use strategy SPREAD or PACK" if apart else releasing(snapshot, request, sieve.nodes),
            "ask for fewer bundles",
            adding(request, 1),
        )
        return sieve, f"a bundle of {what} finds {miss}", advice, "other bundles"
    permitted = list(sieve.left)
    if not sieve.put("size", lambda node: too_small(node, needs)):
        return sieve, *size_miss(snapshot, sieve.dropped, request), "size"

    candidates = list(sieve.left)
    if needs.floor and (never := floor_miss(snapshot, request, candidates)) is not None:
        floor = (
            f"within {needs.within.value!r}"
            if never.within
            else f"at {gb_per_s(needs.min_bandwidth_gb_per_s)}"
        )
        sieve.put(AT_BEST, lambda node: f"has no {count} GPUs {floor}, free or not")
        return sieve, never.nearest, never.advice, AT_BEST
    free_only = needs._replace(within=Within.NODE)
    reason = f"has fewer than {count} GPUs free"
    if needs.named:
        few = "none" if count == 1 else f"fewer than {count}"
        reason = f"has {few} of {gpu_names(needs.named)} free"
    elif needs.amounts:
        reason = f"has no {what} free"
    elif not needs.whole or count == 1:
        reason = f"has no {'GPU' if needs.whole else what.removeprefix('a ')} free"
    if needs.free_memory_bytes:
        reason += f" with {needs.free_memory_bytes / GIB:g} GiB unused"
    if not sieve.put("free GPUs", lambda node: None if node.offer(free_only) else reason):
        used = "" if others_hold(request, candidates) else needs.free_memory_bytes
        advice = any_of(
            releasing(snapshot, request, candidates),
            "end what uses GPU memory without holding a GPU" if used else "",
            "name other GPUs" if needs.named else adding(request, request.stages),
            asking_for_fewer(
                request, any(node.free or (node.rests and not needs.whole) for node in candidates)
            ),
        )
        return sieve, most_free(sieve.dropped, needs), advice, "free GPUs"
    short = most_free(sieve.dropped, needs) if sieve.dropped else ""

    if needs.within is not Within.NODE:
        reason = f"has no {count} free GPUs within {needs.within.value!r}"
        if not sieve.put("within", lambda node: None if node.offer(needs) else reason):
            nearest = min(sieve.dropped, key=lambda node: (node.offer(free_only) or (), node.name))
            advice = any_of(
                releasing(snapshot, request, candidates),
                "add a node that has them"
                if request.stages * request.parts == 1
                else "add nodes that have them",
                asking_for_wider(nearest, needs),
            )
            return sieve, how_apart(nearest, count, needs.within), advice, "within"
        short = how_apart(sieve.dropped[0], count, needs.within) if sieve.dropped else short

    if needs.slowest < 0:
        floor = gb_per_s(needs.min_bandwidth_gb_per_s)
        reason = f"its best {count} free GPUs reach less than {floor}"

        def too_slow(node: Node) -> str | None:
            offer = node.offer(needs)
            return reason if offer is None or offer.slowness > needs.slowest else None

        met = sieve.put("bandwidth", too_slow)
        if sieve.dropped:
            nearest = min(sieve.dropped, key=lambda node: (node.offer(needs) or (), node.name))
            short = how_slow(nearest, needs)
            reached = -(nearest.offer(needs) or (0,))[0] / 1000
        if not met:
            advice = any_of(
                f"lower min_bandwidth_gb_per_s to {reached:g}",
                releasing(snapshot, request, candidates),
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
        advice = any_of(
            f"ask for less CPU or memory{' or custom resources' if request.resources else ''} per GPU",
            "release something" if others_hold(request, candidates) else "",
            "add a node that has more",
        )
        return sieve, miss, advice, "CPUs and memory"
    if request.max_per_domain:
        full = _full_domains(snapshot, request)
        label = request.spread_label or ""
        if not sieve.put(*_spread_stage(request, full)):
            others = [node for node in candidates if node.labels.get(label) not in full]
            advice = any_of(
                "raise constraints.spread.max",
                releasing(snapshot, request, others),
                f"add a node with another {label}",
            )
            return sieve, _spread_miss(request), advice, "spread"
    if request.stages > 1 or request.parts > 1:
        places = [snapshot.bit(node.id) for node in sieve.left]  # all named GPUs are on one node
        places = places if needs.named else [snapshot.select(sieve.left)]
        free = max(gangs.groups_free(snapshot, request, place) for place in places)
        enough = free >= request.stages
        partly = "has room for a part of the replica"
        if not sieve.put("groups", lambda node: None if enough else partly):
            advice = any_of(
                releasing(snapshot, request, candidates),
                "name other GPUs" if needs.named else adding(request, request.stages - free),
                "" if needs.named else in_stages(snapshot, request, permitted),
                asking_for_fewer(request, True),
            )
            return sieve, f"{layout_of(request)}; there is room for {free}", advice, "groups"
    return sieve, short, "", ""


def _full_domains(snapshot: Snapshot, request: Request) -> set[str]:
    """Values of the spread label whose nodes may take no more replicas."""
    counts: Counter[str] = Counter()
    for node in snapshot.nodes:
        value = node.labels.get(request.spread_label or "")
        if value is not None:
            counts[value] += request.standing.get(node.id, 0)
    return {value for value, count in counts.items() if count >= request.max_per_domain}


def _sift_egress(snapshot: Snapshot, request: Request) -> Sifted:
    provider, units = request.provider or "", request.egress
    resource = f"egress_{provider}"
    sieve = _Sieve(snapshot.nodes)
    if not sieve.put("egress nodes", lambda node: None if node.egress_for(provider) else no_egress(provider)):
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
        advice = any_of(
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
        has = cpus(most.cpu_milli)
        if spare(most) < most.cpu_milli:
            has = f"{spare(most) / 1000:g} of its {has} to spare beside its free GPUs,"
        miss = f"{most.name} has {has} and {most.memory_bytes / GIB:.3g} GiB free"
    if not met:
        others = any(node.replicas > request.standing.get(node.id, 0) for node in candidates)
        advice = any_of(
            "ask for fewer cpus" + (" or less memory_gib" if request.memory_bytes else ""),
            "release something" if others else "",
            f"add a node with {what}",
        )
        return sieve, miss, advice, "CPUs and memory"
    return _spread_too_far(snapshot, sieve, request, "a node") or (sieve, miss, "", "")


def _not_permitted(sieve: _Sieve, request: Request) -> Sifted | None:
    """The refusal of a replica without GPUs, if limits exclude all nodes before their room is checked."""
    field, names = request.only_nodes
    if not sieve.put("constraints", outside(field, names)):
        return sieve, "", f"widen constraints.{field}", "constraints"
    if not sieve.put("health", lambda node: node.problem):
        return sieve, "", _REPAIR, "health"
    for stage, objection in limits_without_gpus(request):
        if not sieve.put(stage, objection):
            return sieve, "", f"loosen the constraint ({stage}), or add a node that meets it", stage
    return None


def _spread_too_far(snapshot: Snapshot, sieve: _Sieve, request: Request, a_node: str) -> Sifted | None:
    """The same for the stage that excludes domains with too many replicas."""
    if not request.max_per_domain or sieve.put(*_spread_stage(request, _full_domains(snapshot, request))):
        return None
    advice = any_of("raise constraints.spread.max", f"add {a_node} with another {request.spread_label}")
    return sieve, _spread_miss(request), advice, "spread"


def _spread_stage(request: Request, full: Collection[str]) -> tuple[str, Objection]:
    label = request.spread_label or ""
    reason = f"its {label} has {request.max_per_domain} of its replicas already"
    return "spread", lambda node: reason if node.labels.get(label) in full else None


def _spread_miss(request: Request) -> str:
    return f"every {request.spread_label} with room has {counted(request.max_per_domain, 'replica')} already"
