"""The ``status`` of one node: the replicas on each GPU, what others hold, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from placement.core.score import suspect_pairs
from placement.core.topology import Topology, ordinals
from placement.errors import counted
from placement.runtime.discovery import DeadNode, NodeInfo
from placement.runtime.results import NodeAssignment
from placement.wire.facts import NodeFacts


class Held:
    """What is held on one node.

    Attributes:
        occupants: GPU -> the replicas on it.
        units: egress resource -> units.
        cpus: of CPU replicas.
    """

    def __init__(self) -> None:
        self.occupants: dict[int, list[dict[str, Any]]] = {}
        self.units: dict[str, int] = {}
        self.cpus = 0.0

    def add(self, name: str, a: NodeAssignment) -> None:
        """Counts what one replica holds here."""
        for gpu, share in a.taken.items():
            who = {"deployment": name, "replica": a.replica_index, "share": share}
            self.occupants.setdefault(gpu, []).append(who)
        if a.egress_resource is not None:
            self.units[a.egress_resource] = self.units.get(a.egress_resource, 0) + a.egress_units
        self.cpus += a.cpus


def node_status(
    info: NodeInfo,
    facts: NodeFacts | None,
    topology: Topology,
    held: Held,
    foreign: frozenset[int] = frozenset(),
    available: Mapping[str, float] | None = None,
    draining: bool = False,
) -> dict[str, Any]:
    """A node that is alive, with the replicas on each GPU; JSON-ready.

    Args:
        info: the node.
        facts: the facts of its GPUs, if reported.
        topology: the topology used for them.
        held: what is held on it.
        foreign: GPUs that other Ray users held when its actor last looked.
        available: resource -> the free amount in Ray's records, if known.
        draining: the node is draining.
    """
    occupants = held.occupants
    ours = sum(who["share"] for together in occupants.values() for who in together)
    located = sorted(foreign - occupants.keys())
    others = len(located)
    if available is not None:
        others = max(0, math.ceil(info.gpu_count - available.get("GPU", 0.0) - ours - 1e-6))
        located = located[:others]
    uuids = facts.uuids if facts is not None else {}
    instances = {gpu.ordinal: gpu.instance for gpu in facts.gpus} if facts is not None else {}
    lost = {gpu.ordinal: ", ".join(gpu.errors) for gpu in facts.gpus if gpu.lost} if facts is not None else {}
    suspects = suspect_pairs(topology)
    problems = [*problems_of(facts), _suspicion(suspects)]
    gpus = []
    for ordinal in range(info.gpu_count):
        here = occupants.get(ordinal, [])
        unused = "unknown" if ordinal in lost else "free"
        state = "held" if here else "other" if ordinal in located else unused
        gpus.append(_gpu(ordinal, state, here, instances.get(ordinal), lost.get(ordinal), uuids.get(ordinal)))
    return {
        "id": info.id,
        "name": info.name,
        "address": info.address,
        "state": "draining" if draining else "alive",
        "dead_seconds": None,
        "gpu_count": info.gpu_count,
        "gpu_model": topology.model,
        "topology": info.topology_name or (facts.source if facts is not None else None),
        "topology_known": topology.known,
        "nvswitch": topology.nvswitch,
        "islands": [list(island) for island in topology.islands] if topology.known else [],
        "gpus": gpus,
        "others_unlocated": others - len(located),
        "egress": [
            {"resource": name, "total": total, "held": held.units.get(name, 0)}
            for name, total in info.egress.items()
        ],
        "cpus": {"total": info.cpu_milli / 1000, "held": round(held.cpus, 3)},
        "suspects": [_suspect(*one) for one in suspects],
        "problem": info.label_problem() or "; ".join(filter(None, problems)) or None,
    }


def _suspect(gpus: Sequence[int], measured: int, predicted: int) -> dict[str, Any]:
    """A pair that reaches less than half of its prediction."""
    return {"gpus": list(gpus), "gb_per_s": measured / 1000, "predicted_gb_per_s": predicted / 1000}


def _suspicion(suspects: Sequence[tuple[Sequence[int], int, int]]) -> str | None:
    """``suspect: GPU 2 and 3 measured at 11.9 of 230 GB/s``, for the worst of several."""
    if not suspects:
        return None
    (a, b), measured, predicted = min(suspects, key=lambda one: one[1] / one[2])
    more = f", and {counted(len(suspects) - 1, 'pair')} more" if len(suspects) > 1 else ""
    rates = f"{measured / 1000:.3g} of {predicted / 1000:.3g} GB/s"
    return f"suspect: GPU {a} and {b} measured at {rates}{more}; see `placement topology`"


def dead_node_status(dead: DeadNode, held: Held, at: float) -> dict[str, Any]:
    """A node that died, with the replicas that have not found another place yet."""
    info = dead.info
    return {
        "id": info.id,
        "name": info.name,
        "address": info.address,
        "state": "dead",
        "dead_seconds": max(0.0, at - dead.at),
        "gpu_count": info.gpu_count,
        "gpu_model": None,
        "topology": info.topology_name,
        "topology_known": False,
        "nvswitch": False,
        "islands": [],
        "gpus": [_gpu(gpu, "dead", held.occupants.get(gpu, []), None, None) for gpu in range(info.gpu_count)],
        "others_unlocated": 0,
        "egress": [],
        "cpus": {"total": info.cpu_milli / 1000, "held": round(held.cpus, 3)},
        "suspects": [],
        "problem": "the node died",
    }


def _gpu(
    ordinal: int,
    state: str,
    occupants: list[dict[str, Any]],
    mig: str | None,
    problem: str | None,
    uuid: str | None = None,
) -> dict[str, Any]:
    first = occupants[0] if occupants else {"deployment": None, "replica": None}
    return {
        "ordinal": ordinal,
        "uuid": uuid,
        "state": state,
        "deployment": first["deployment"],
        "replica": first["replica"],
        "occupants": occupants,
        "mig": mig,
        "problem": problem,
    }


def problems_of(facts: NodeFacts | None) -> tuple[str | None, str | None]:
    """What is wrong with a node's GPUs, and which of them are never assigned."""
    lost = sorted(facts.lost()) if facts is not None else []
    unused = f"nothing is placed on GPU {ordinals(lost)}" if lost else None
    return (facts.problem if facts is not None else None), unused
