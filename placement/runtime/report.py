"""The service's state as JSON-ready values, for ``status`` and ``topology``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from placement.core.matrix import render_matrix
from placement.core.topology import Topology, ordinals
from placement.errors import UnreadableRecord
from placement.runtime.state import ServiceState as Books
from placement.runtime.discovery import NodeInfo
from placement.runtime.fleet import Fleet
from placement.wire.facts import NodeFacts


def status_report(
    nodes: Iterable[NodeInfo],
    books: Books,
    fleet: Fleet,
    available: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Nodes with their GPUs and who sits where, and deployments with their replicas.

    Args:
        nodes: what is alive.
        books: what stands.
        fleet: what is known of the GPUs.
        available: node id -> resource -> free amount in Ray's books; without nodes of which these lag behind our own
            last change.
    """
    listed = list(nodes)
    alive = {info.id for info in listed}
    deployments = []
    for name in books.names():
        standing = books.standing.get(name)
        if standing is None:
            continue
        deployment = standing.deployment
        assignments = standing.result().assignments
        deployments.append(
            {
                "name": name,
                "model": deployment.model,
                "runtime": deployment.runtime_name,
                "runtime_from": deployment.runtime_from,
                "transport": deployment.transport,
                "replicas": deployment.replicas,
                "state": _state(
                    deployment.replicas,
                    [all(a.node in alive for a in parts) for parts in list(standing.replicas.values())],
                ),
                "pending": {str(index): reason for index, reason in sorted(standing.reasons.items())},
                "assignments": [a.to_dict() for a in assignments],
            }
        )
    return {
        "nodes": [_node(info, books, fleet, available.get(info.id)) for info in listed],
        "deployments": deployments,
        "unreadable": [
            {"name": name, "problem": str(UnreadableRecord(name, record.problem, record.newer))}
            for name, record in sorted(books.unreadable.items())
        ],
    }


def _state(wanted: int, alive: list[bool]) -> str:
    if not all(alive):
        return "lost"
    return "placed" if len(alive) == wanted else "pending"


def _node(
    info: NodeInfo, books: Books, fleet: Fleet, available: Mapping[str, float] | None
) -> dict[str, Any]:
    facts = fleet.machines.facts.get(info.id)
    topology = facts.topology() if facts is not None and facts.gpus else Topology.unknown(info.gpu_count)
    occupants: dict[int, list[dict[str, Any]]] = {}
    for standing, a in books.assignments():
        for gpu in a.gpus if a.node == info.id else ():
            who = {"deployment": standing.deployment.name, "replica": a.replica_index, "share": a.share}
            occupants.setdefault(gpu, []).append(who)
    units: dict[str, int] = {}
    for _, a in books.assignments():
        if a.node == info.id and a.egress_resource is not None:
            units[a.egress_resource] = units.get(a.egress_resource, 0) + a.egress_units
    ours = sum(who["share"] for together in occupants.values() for who in together)
    located = sorted(fleet.foreign.get(info.id, frozenset()) - occupants.keys())
    others = len(located)
    if available is not None:
        others = max(0, math.ceil(info.gpu_count - available.get("GPU", 0.0) - ours - 1e-6))
        located = located[:others]
    instances = {gpu.ordinal: gpu.instance for gpu in facts.gpus} if facts is not None else {}
    lost = {gpu.ordinal: ", ".join(gpu.errors) for gpu in facts.gpus if gpu.lost} if facts is not None else {}
    gpus = []
    for ordinal in range(info.gpu_count):
        here = occupants.get(ordinal, [])
        first = here[0] if here else {"deployment": None, "replica": None}
        unused = "unknown" if ordinal in lost else "free"
        gpus.append(
            {
                "ordinal": ordinal,
                "state": "held" if here else "other" if ordinal in located else unused,
                "deployment": first["deployment"],
                "replica": first["replica"],
                "occupants": here,
                "mig": instances.get(ordinal),
                "problem": lost.get(ordinal),
            }
        )
    return {
        "id": info.id,
        "name": info.name,
        "address": info.address,
        "gpu_count": info.gpu_count,
        "gpu_model": topology.model,
        "topology": info.topology_name or (facts.source if facts is not None else None),
        "topology_known": topology.known,
        "nvswitch": topology.nvswitch,
        "islands": [list(island) for island in topology.islands] if topology.known else [],
        "gpus": gpus,
        "others_unlocated": others - len(located),
        "egress": [
            {"resource": name, "total": total, "held": units.get(name, 0)}
            for name, total in info.egress.items()
        ],
        "problem": info.label_problem() or "; ".join(filter(None, _problems(facts))) or None,
    }


def _problems(facts: NodeFacts | None) -> tuple[str | None, str | None]:
    """What is wrong with a node's GPUs, and which of them are not used."""
    lost = sorted(facts.lost()) if facts is not None else []
    unused = f"nothing is placed on GPU {ordinals(lost)}" if lost else None
    return (facts.problem if facts is not None else None), unused


def topology_report(info: NodeInfo, facts: NodeFacts | None) -> dict[str, Any]:
    """One GPU node: what was read, the islands, and the matrix as ``nvidia-smi topo -m`` prints it."""
    shape = facts.topology() if facts is not None and facts.gpus else Topology.unknown(info.gpu_count)
    return {
        "id": info.id,
        "name": info.name,
        "address": info.address,
        "gpu_count": info.gpu_count,
        "gpu_model": shape.model,
        "topology": info.topology_name,
        "known": shape.known,
        "nvswitch": shape.nvswitch,
        "islands": [list(island) for island in shape.islands] if shape.known else [],
        "matrix": render_matrix(shape),
        "problem": info.label_problem() or _problems(facts)[1],
        "facts": facts.model_dump(mode="json") if facts is not None else None,
    }
