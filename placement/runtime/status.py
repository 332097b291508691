"""The ``status`` of the cluster: totals, nodes, and deployments with the state of each replica; JSON-ready."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from placement.core.lifecycle import State
from placement.core.node import Node
from placement.core.replicas import PlannedReplica
from placement.errors import UnknownNode, UnreadableRecord
from placement.runtime.discovery import DeadNode, NodeInfo
from placement.runtime.ledger import Record
from placement.runtime.membership import meant_by
from placement.runtime.node_status import Held, dead_node_status, node_status
from placement.runtime.orders import GpuHardware
from placement.runtime.results import NodeAssignment
from placement.wire.deployment import Deployment
from placement.wire.facts import NodeFacts
from placement.wire.groups import Group, links_of, located

SHOWN_STATES = ("placed", "pending", "lost", "releasing")
"""The shown states of a replica: it holds its GPUs, waits for room, lost its node, or is being released."""


class KnownDeployment(Protocol):
    """The state of one deployment. It is never changed."""

    @property
    def deployment(self) -> Deployment:
        """Its declaration."""

    @property
    def generation(self) -> int:
        """How many different declarations it has had."""

    @property
    def states(self) -> Mapping[int, State]:
        """Replica -> its state."""

    @property
    def reasons(self) -> Mapping[int, str]:
        """Waiting replica -> why it waits."""

    @property
    def outdated(self) -> Collection[int]:
        """The replicas that were placed by an earlier generation and are to be replaced."""

    @property
    def releasing(self) -> bool:
        """Whether it is being released."""

    @property
    def declared_at(self) -> float:
        """When it was first declared, in seconds since the epoch."""

    @property
    def owner(self) -> Mapping[str, Any] | None:
        """Its owner; JSON-ready."""

    def assignments(self) -> Sequence[NodeAssignment]:
        """What it holds, by replica and rank."""


@dataclass(frozen=True)
class Observed:
    """All inputs of ``status``, at one moment. It is read without a lock, as nothing in it is ever changed.

    Attributes:
        nodes: the nodes that are alive.
        deployments: name -> its state.
        hardware: the hardware of a node's GPUs.
        facts: node id -> the facts of its GPUs; of this and ``foreign`` only single entries are read.
        foreign: node id -> GPUs that other Ray users held when its actor last looked.
        available: node id -> resource -> the free amount in Ray's records; without nodes whose records may not show the
            service's last change.
        unreadable: name -> a record that this version cannot read.
        draining: nodes that are draining.
        dead: nodes that died recently.
        queue: the deployments that wait for room, next first.
        demand: what the autoscaler was asked for; JSON-ready.
        at: that moment, in seconds since the epoch.
        near: labels that have the same value on nodes near each other, widest first.
    """

    nodes: Sequence[NodeInfo]
    deployments: Mapping[str, KnownDeployment]
    hardware: Callable[[NodeInfo], GpuHardware]
    facts: Mapping[str, NodeFacts]
    foreign: Mapping[str, frozenset[int]] = field(default_factory=dict)
    available: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unreadable: Mapping[str, Record] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()
    dead: Sequence[DeadNode] = ()
    queue: Sequence[str] = ()
    demand: Sequence[Mapping[str, Any]] = ()
    at: float = field(default_factory=time.time)
    near: Sequence[str] = ()


def cluster_status(
    seen: Observed, node: str | None = None, deployment: str | None = None, state: str | None = None
) -> dict[str, Any]:
    """Totals of the cluster, nodes with their GPUs and the replicas on them, and deployments with their replicas.

    Deployments with waiting replicas come first, in the order of the queue. Filters select the deployments with
    a replica that matches all filters, and the nodes of these replicas; ``node`` selects only that node.

    Args:
        seen: the inputs.
        node: id, name or address of a node.
        deployment: name of a deployment, or of a group.
        state: a shown state of a replica, one of :data:`SHOWN_STATES`.

    Raises:
        UnknownNode: no node has that id, name or address, alive or dead.
        UnknownDeployment: there is neither of that name, not even an unreadable record.
        ValueError: there is no such state.
    """
    if state is not None and state not in SHOWN_STATES:
        raise ValueError(f"no replica is ever {state!r}: choose one of {', '.join(SHOWN_STATES)}")
    wanted = None if deployment is None else set(meant_by(deployment, seen.deployments, seen.unreadable))
    everywhere = [*seen.nodes, *(one.info for one in seen.dead)]
    at = None if node is None else {info.id for info in everywhere if info.named(node)}
    if node is not None and not at:
        raise UnknownNode("--node", node, tuple(info.name for info in everywhere))

    alive = {info.id for info in seen.nodes}
    places = {name: place for place, name in enumerate(seen.queue, start=1)}
    deployments, pending, replicas, used = [], 0, 0, set[str]()
    held: dict[str, Held] = defaultdict(Held)
    for name, one in sorted(seen.deployments.items()):
        assignments = one.assignments()
        for a in assignments:
            held[a.node].add(name, a)
        shown = _deployment(name, one, assignments, alive, places.get(name), seen.at)
        pending += sum(each["state"] == "pending" for each in shown["replica_states"])
        replicas += shown["replicas"]
        if wanted is not None and name not in wanted:
            continue
        if at is None and state is None:
            matches, nodes = True, {a.node for a in assignments} if deployment is not None else set()
        else:
            matches, nodes = _matching(shown, at, state)
        if matches:
            used |= nodes
            deployments.append(shown)
    last = len(places) + 1
    deployments.sort(key=lambda shown: (shown["state"] != "pending", shown["queue_position"] or last))

    gpus = dict.fromkeys(("gpus", "free", "held", "other", "unknown"), 0)
    listed = []
    for info in seen.nodes:
        told = node_status(
            info,
            seen.facts.get(info.id),
            seen.hardware(info).topology,
            held[info.id],
            seen.foreign.get(info.id, frozenset()),
            seen.available.get(info.id),
            info.id in seen.draining,
        )
        free = gpus["free"]
        for gpu in told["gpus"]:
            gpus[gpu["state"]] += 1
        unlocated = min(told["others_unlocated"], gpus["free"] - free)
        gpus["gpus"] += info.gpu_count
        gpus["free"] -= unlocated
        gpus["other"] += unlocated
        listed.append(told)
    listed += [
        dead_node_status(one, held[one.info.id], seen.at) for one in seen.dead if one.info.id not in alive
    ]
    filtered = (node, deployment, state) != (None, None, None)
    listed_names = {shown["name"] for shown in deployments} if filtered else None
    if at is None and filtered:
        at = used
    return {
        "totals": {
            **gpus,
            "nodes": len(seen.nodes),
            "gpu_nodes": sum(info.gpu_count > 0 for info in seen.nodes),
            "deployments": len(seen.deployments),
            "replicas": replicas,
            "pending": pending,
        },
        "demand": [row for row in seen.demand if listed_names is None or row["deployment"] in listed_names],
        "nodes": [told for told in listed if at is None or told["id"] in at],
        "deployments": deployments,
        "groups": _groups(seen, deployments),
        "unreadable": [
            {"name": name, "problem": str(UnreadableRecord(name, record.problem, record.newer))}
            for name, record in sorted(seen.unreadable.items())
            if wanted is None or name in wanted
        ],
    }


def _groups(seen: Observed, shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups of which any member is shown, each with its state and the routes of its links."""
    states: dict[str, dict[str, str]] = {}
    declared: dict[str, Group] = {}
    for one in shown:
        if (group := seen.deployments[one["name"]].deployment.group) is not None:
            declared[group.name] = group
            states.setdefault(group.name, {})[one["name"]] = one["state"]
    found = []
    for name, group in sorted(declared.items()):
        members = {each: seen.deployments[each] for each in group.members if each in seen.deployments}
        nodes = {
            info.id: Node(info.id, info.name, topology=seen.hardware(info).topology, labels=info.labels)
            for info in seen.nodes
            if any(a.node == info.id for one in members.values() for a in one.assignments())
        }
        parts = {
            each: [PlannedReplica(a.replica_index, a.node, tuple(a.gpus)) for a in one.assignments()]
            for each, one in members.items()
        }
        worst = next(
            (state for state in ("releasing", "lost", "pending") if state in states[name].values()), "placed"
        )
        found.append(
            {
                "name": name,
                "state": worst,
                "units": group.units,
                "members": dict(group.members),
                "links": links_of(group, seen.near, located(nodes, parts)),
            }
        )
    return found


def _deployment(
    name: str,
    one: KnownDeployment,
    assignments: Sequence[NodeAssignment],
    alive: Collection[str],
    place: int | None,
    at: float,
) -> dict[str, Any]:
    deployment, outdated = one.deployment, sorted(one.outdated)
    lives: dict[int, bool] = {}
    for a in assignments:
        lives[a.replica_index] = lives.get(a.replica_index, True) and a.node in alive
    indices = sorted({*range(deployment.replicas), *one.states, *lives})
    states = [_shown(one.states.get(index), lives.get(index), one.releasing) for index in indices]
    if one.releasing:
        state = "releasing"
    elif "lost" in states:
        state = "lost"
    else:
        state = "pending" if "pending" in states or outdated else "placed"
    return {
        "name": name,
        "model": deployment.model,
        "runtime": deployment.runtime_name,
        "runtime_from": deployment.runtime_from,
        "transport": deployment.transport,
        "replicas": deployment.replicas,
        "state": state,
        "generation": one.generation,
        "age_seconds": max(0.0, at - one.declared_at),
        "owner": None if one.owner is None else dict(one.owner),
        "queue_position": place,
        "pending": {str(index): reason for index, reason in sorted(one.reasons.items())},
        "outdated": outdated,
        "group": deployment.group.name if deployment.group is not None else None,
        "replica_states": [
            {"index": index, "state": state, "reason": one.reasons.get(index)}
            for index, state in zip(indices, states, strict=True)
        ],
        "assignments": [a.to_dict() for a in assignments],
    }


def _shown(state: State | None, lives: bool | None, releasing: bool) -> str:
    """The shown state of a replica; ``lives``: whether all nodes on which it holds something are alive."""
    if releasing or state is State.RELEASING:
        return "releasing"
    if lives is not None:
        return "placed" if lives else "lost"
    return "lost" if state is State.LOST else "pending"


def _matching(
    shown: Mapping[str, Any], at: Collection[str] | None, state: str | None
) -> tuple[bool, set[str]]:
    """Whether any replica of a deployment is in such a state, on one of these nodes; and the nodes of such replicas."""
    of_state = {one["index"] for one in shown["replica_states"] if state in (None, one["state"])}
    held = {
        a["node"]
        for a in shown["assignments"]
        if a["replica_index"] in of_state and (at is None or a["node"] in at)
    }
    return bool(of_state if at is None else held), held
