"""What excludes a node for a request: limits on the node, and a lack of CPUs, memory or custom resources.

Each limit is a question; an :data:`Objection` answers with the reason. The planner asks which nodes are left
(:func:`eligible`); an explanation asks how many each reason excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from placement.core.labels import meets
from placement.core.mix import Kind
from placement.core.needs import ANY_PROFILE, GIB, NO_GPUS, Needs
from placement.core.node import UNIT, UNKNOWN_PROFILE, Node
from placement.core.offers import Bits
from placement.core.request import Request
from placement.core.shares import least_gpus
from placement.core.snapshot import Snapshot
from placement.core.wording import cpus, gpu_names

Objection = Callable[[Node], str | None]
"""Why a node is excluded; ``None`` if it is not."""

NAMED = "named GPUs"
"""The stage that excludes nodes without the named GPUs."""


def limits(request: Request) -> list[tuple[str, Objection]]:
    """The questions about a node's properties that the request asks: (stage, objection)."""
    return _lasting_limits(Kind.of(request)) + _passing_limits(request)


def limits_without_gpus(request: Request) -> list[tuple[str, Objection]]:
    """The same for a remote or a CPU replica, for which limits on GPUs do not count."""
    return _label_limits(request.labels.items()) + _passing_limits(request)


def _passing_limits(request: Request) -> list[tuple[str, Objection]]:
    """The limits that depend on where other replicas are, and the spread."""
    asked: list[tuple[str, Objection]] = []
    if request.needs.named and (home := {id for id, count in request.standing.items() if count}):
        asked.append(
            (NAMED, lambda node: None if node.id in home else "other replicas have GPUs of another node")
        )
    asked += [(f"apart from {other}", _shared_with(other)) for other in request.apart_from]
    asked += [(f"{other} keeps apart", _kept_by(other)) for other in request.kept_away_by]
    asked += [(f"near to {other}", _not_shared_with(other)) for other in request.near_to]
    asked += [(stage, _without_label(label)) for stage, label in _labels_asked(request).items()]
    return asked


def _labels_asked(request: Request) -> dict[str, str]:
    """The labels that a node must have, whatever their values, by stage."""
    asked = {"spread label": request.spread_label, "domain label": request.domain_label}
    return {stage: label for stage, label in asked.items() if label is not None}


def _without_label(label: str) -> Objection:
    return lambda node: None if label in node.labels else f"has no label {label}"


def _label_limits(labels: Iterable[tuple[str, str]]) -> list[tuple[str, Objection]]:
    return [(f"label {key}", _unlike(key, condition)) for key, condition in labels]


def _lasting_limits(kind: Kind) -> list[tuple[str, Objection]]:
    """The limits whose answers do not depend on what is placed."""
    asked = _label_limits(kind.labels)
    if kind.needs.named:
        asked.append((NAMED, _without_named(kind.needs)))
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
    """The question about CPUs and memory, if the request needs any.

    On a node with free GPUs a CPU replica leaves a CPU for each of them.
    """
    cpu, memory, spared = request.cpu_milli, request.memory_bytes, request.spared_milli
    resources = request.resources
    if not cpu and not memory and not resources:
        return None

    def objection(node: Node) -> str | None:
        if spared and cpu <= node.cpu_milli < cpu + spared * node.free_slots:
            return f"has not {cpus(cpu)} to spare beside its free GPUs"
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
    """The nodes that no limit excludes, with or without room."""
    if request.on_cpus:
        return _eligible_for_cpus(snapshot, request)
    return open_to(snapshot, Kind.of(request)) & _unobjected(snapshot, _passing_limits(request))


def _eligible_for_cpus(snapshot: Snapshot, request: Request) -> Bits:
    asked, (_, names) = limits_without_gpus(request), request.only_nodes
    sound = (node for node in snapshot.nodes if node.problem is None)
    allowed = snapshot.select(node for node in sound if not any(objection(node) for _, objection in asked))
    return allowed if names is None else allowed & snapshot.named(names)


def open_to(snapshot: Snapshot, kind: Kind) -> Bits:
    """The nodes that a kind of request may go to, without regard to what is placed there."""
    named = kind.needs.named
    limited = kind._replace(needs=NO_GPUS._replace(named=named, profile=kind.needs.profile if named else ""))
    if limited not in snapshot.open_to:
        allowed = (
            snapshot.usable if kind.gpu_nodes is None else snapshot.usable & snapshot.named(kind.gpu_nodes)
        )
        snapshot.open_to[limited] = allowed & _unobjected(snapshot, _lasting_limits(kind))
    return snapshot.open_to[limited]


def _unobjected(snapshot: Snapshot, asked: list[tuple[str, Objection]]) -> Bits:
    """The nodes without an objection; if nothing is asked, all usable nodes."""
    if not asked:
        return snapshot.usable
    return snapshot.select(
        node for node in snapshot.nodes if not any(objection(node) for _, objection in asked)
    )


def allowed(snapshot: Snapshot, request: Request) -> list[Node]:
    """The nodes with GPUs to which the constraints let a request go, whether or not they may be used now."""
    asked = [outside("gpu_nodes", request.gpu_nodes), *map(_without_label, _labels_asked(request).values())]
    asked += [objection for _, objection in _lasting_limits(Kind.of(request))]
    return [n for n in snapshot.nodes if len(n.topology) and not any(objection(n) for objection in asked)]


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
    """Why a node cannot give a named GPU: it lacks it, or it is a MIG instance and not a GPU, or the reverse."""

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


def too_small(node: Node, needs: Needs) -> str | None:
    """Why a node could not hold such a replica even if all of it were free."""
    if needs.profile:
        return None if needs.profile in node.profiles else f"has no MIG instances {needs.profile}"
    if not node.whole_gpus:
        return "has MIG instances only" if node.profiles else "has no GPU that can be used"
    if needs.memory_bytes and node.gpu_memory_bytes is None:
        return "the memory of its GPUs cannot be read"
    if needs.memory_bytes and needs.share_of(node.gpu_memory_bytes) is None:
        return f"its GPUs have less than {needs.memory_bytes / GIB:g} GiB"
    least = least_gpus(needs)
    return f"has fewer than {least} GPUs" if node.whole_gpus < least else None


def outside(field_name: str, allowed: tuple[str, ...] | None) -> Objection:
    """The question whether a constraint names the node."""

    def objection(node: Node) -> str | None:
        if allowed is None or any(node.named(name) for name in allowed):
            return None
        return f"not in constraints.{field_name}"

    return objection
