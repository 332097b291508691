"""The ``topology`` report of one node's GPUs: the facts, the measured rates, and the matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from placement.core.matrix import render_matrix
from placement.core.measured import beside_predicted
from placement.core.shape import shape_of
from placement.core.topology import Topology
from placement.runtime.discovery import NodeInfo
from placement.runtime.node_status import problems_of
from placement.wire.facts import NodeFacts
from placement.wire.measurements import Measurement


def measured_report(topology: Topology, own: Measurement | None) -> list[dict[str, Any]]:
    """The measured rates that a node uses, beside the predicted ones; its own rates with their details."""
    predicted = shape_of(topology).predicted
    of = {one.gpus: one for one in own.rates} if own is not None else {}
    found = []
    for gpus, rate in topology.measured:
        told = (
            of[gpus].model_dump(mode="json") if gpus in of else {"gpus": list(gpus), "gb_per_s": rate / 1000}
        )
        found.append({**told, **beside_predicted(rate, predicted.mb_per_s(gpus)), "own": gpus in of})
    return found


def topology_report(
    info: NodeInfo, facts: NodeFacts | None, measured: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """One GPU node: the facts, the islands, and the matrix as ``nvidia-smi topo -m`` prints it.

    With the measured rates: see :func:`measured_report`.
    """
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
        "problem": info.label_problem() or problems_of(facts)[1],
        "facts": facts.model_dump(mode="json") if facts is not None else None,
        "measured": list(measured),
    }
