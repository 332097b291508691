"""How a deployment is written to the ledger and read from it.

The ledger (:mod:`placement.runtime.ledger`) has the keys and the history of versions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from placement.core.lifecycle import State
from placement.runtime import groups, ledger
from placement.runtime.deployment_state import DeploymentState, Replica
from placement.runtime.results import NodeAssignment
from placement.wire.deployment import Deployment

RECORDED = (
    "replica_index", "node", "node_name", "gpus", "bundle_indices", "ranks", "share", "shares", "mig", "cpus_per_gpu",
    "memory_bytes_per_gpu", "ray_gpus", "bandwidth_gb_per_s", "sorted_bandwidth_gb_per_s",
    "upper_bandwidth_gb_per_s", "ray_upper_bandwidth_gb_per_s",
    "weakest_link", "ray_bandwidth_gb_per_s", "ray_weakest_link", "egress_resource", "egress_units", "cpus",
    "memory_bytes", "set_size", "affinities", "bandwidth_measured",
)  # fmt: skip


def save(state: DeploymentState) -> None:
    """Writes a deployment to the ledger."""
    ledger.save(state.name, to_record(state), version_for(state))


def version_for(state: DeploymentState) -> int:
    """The version of a deployment's record: 3, or 4 if a replica has several shares."""
    declared = (state.deployment, *state.earlier.values())
    return ledger.VERSION if any(one.needs.amounts for one in declared) else 3


def to_record(state: DeploymentState) -> dict[str, Any]:
    """The record of a deployment, JSON-ready. It has only references to API keys."""
    replicas = [
        {
            "order": one.order,
            "group": part.placement_group.id.hex(),
            "generation": one.generation,
            **{name: getattr(part, name) for name in RECORDED},
        }
        for _, one in sorted(state.replicas.items())
        for part in one.parts
    ]
    return {
        **_declaration(state.deployment),
        "generation": state.generation,
        "earlier": {str(generation): _declaration(one) for generation, one in state.earlier.items()},
        "replicas": replicas,
        "releasing": state.releasing,
        "declared_at": state.declared_at,
        "waiting_since": state.waiting_since,
        "owner": None if state.owner is None else dict(state.owner),
        "expires_at": state.expires_at,
        "given_up": state.given_up,
    }


def from_record(record: Mapping[str, Any]) -> DeploymentState:
    """Reads a record of the ledger, of this version or an earlier one."""
    deployment = Deployment.recorded(record["deployment"], record.get("runtime"))
    generation = record.get("generation", 1)
    earlier = {
        int(number): Deployment.recorded(one["deployment"], one.get("runtime"))
        for number, one in record.get("earlier", {}).items()
    }
    parts: dict[int, list[NodeAssignment]] = {}
    orders: dict[int, tuple[str, int]] = {}
    for replica in record["replicas"]:
        assignment = NodeAssignment(
            placement_group=groups.group_from_hex(replica["group"]),
            **{name: replica[name] for name in RECORDED if name in replica},
        )
        parts.setdefault(assignment.replica_index, []).append(assignment)
        orders[assignment.replica_index] = replica["order"], replica.get("generation", generation)
    found = {
        index: Replica(order, tuple(sorted(parts[index], key=lambda a: a.ranks)), of)
        for index, (order, of) in orders.items()
    }
    state = DeploymentState(
        deployment,
        generation,
        earlier,
        found,
        {
            **dict.fromkeys(range(deployment.replicas), State.PENDING),
            **dict.fromkeys(found, State.PLACED),
        },
        releasing=record.get("releasing", False),
        declared_at=record.get("declared_at") or time.time(),
        waiting_since=record.get("waiting_since"),
        owner=record.get("owner"),
        expires_at=record.get("expires_at"),
        given_up=record.get("given_up", False),
    )
    why = dict.fromkeys(state.unfinished(), "not tried since the service restarted")
    return replace(state, reasons=why) if state.is_lease else state.pending(why, time.time())


def _declaration(one: Deployment) -> dict[str, Any]:
    declared = one.model_dump(mode="json", exclude_none=True, exclude_defaults=False)
    return {"deployment": declared, "runtime": one.runtime_name}
