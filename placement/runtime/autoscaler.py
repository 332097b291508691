"""The only module that talks to Ray's autoscaler: pending placement groups, and its report about them.

Measured with Ray 2.60's autoscaler v2; the callers rely on it:

- It takes a pending group literally: one bundle of 8 GPUs starts a node type with 8 and none with 4; label
  selectors choose the type. The node joins 1.4 to 3 s later if the cloud takes no time.
- A selector ``ray.io/node-id: !in(...)`` with all existing nodes keeps the group off them, so that it takes nothing
  that others could use. A thousand ids cost 6 ms once, and 60 kB in each of the autoscaler's rounds.
- A group without a lifetime ends 13 ms after the actor whose process created it, however that ended.
- It lists what no node type can hold now among its infeasible requests, and Ray prints a line about it
  on the console of every driver in each round.
- Autoscaler v1 ignores labels.

``request_resources`` is never used: it is one request for the whole cluster, and the last caller overwrites it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from placement.runtime.groups import available_resources, group_from_hex
from placement.runtime.needs import Way
from placement.runtime.ray_internals import NodeStatus, autoscaler_status, is_second_autoscaler, scheduling

GCS_SECONDS = 5
"""Longest wait for one answer of the GCS about the autoscaler."""

FAILED_SECONDS = 60.0
"""How long a machine that the cloud refused is reported."""

NO_AUTOSCALER = "the cluster has no autoscaler"

OLD_AUTOSCALER = (
    "the cluster runs autoscaler v1, which ignores labels: "
    "start the head with RAY_enable_autoscaler_v2=1 in its environment"
)


@dataclass(frozen=True)
class Group:
    """Ray's state of a placement group.

    Attributes:
        state: ``"PENDING"``, ``"PREPARED"``, ``"CREATED"``, ``"RESCHEDULING"`` or ``"REMOVED"``.
        nodes: node id -> resource -> amount that it holds there.
        attempt: how often Ray has tried to reserve it.
        idle: no attempt is under way.
        hopeless: no node could hold it, so Ray does not try.
    """

    state: str
    nodes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    attempt: int = 0
    idle: bool = True
    hopeless: bool = False


@dataclass(frozen=True)
class SeenNode:
    """A node as the autoscaler sees it: its labels, and its total resources."""

    labels: Mapping[str, str]
    total: Mapping[str, float]


@dataclass(frozen=True)
class Heard:
    """The autoscaler's report.

    Attributes:
        problem: why it cannot be asked; empty if it can.
        infeasible: ids of groups that no node type can hold now.
        refused: node types of which the cloud has recently refused a machine.
        nodes: node id -> node.
    """

    problem: str = ""
    infeasible: frozenset[str] = frozenset()
    refused: tuple[str, ...] = ()
    nodes: Mapping[str, SeenNode] = field(default_factory=dict)


class Cluster(Protocol):
    """The calls to Ray. Each may raise, and may hang for as long as the GCS does."""

    def hear(self) -> Heard:
        """The autoscaler's report."""

    def create(self, name: str, way: Way, labels: Mapping[str, str]) -> str:
        """Creates a group that ends with this process, and returns its id."""

    def look(self, group: str) -> Group:
        """Ray's state of a group."""

    def remove(self, group: str) -> None:
        """Removes it."""

    def free(self) -> Mapping[str, Mapping[str, float]]:
        """Node id -> resource -> what is free in Ray's records."""


class RayCluster:
    """Ray's GCS and its autoscaler."""

    def hear(self) -> Heard:
        """See :meth:`Cluster.hear`."""
        reply = autoscaler_status(GCS_SECONDS)
        # `ray up` and KubeRay give each node the id of its machine; `ray start` by hand runs an autoscaler
        # too, but one that starts no nodes.
        states = reply.cluster_resource_state.node_states
        if not any(node.instance_id or node.ray_node_type_name for node in states):
            return Heard(NO_AUTOSCALER)
        if not is_second_autoscaler(GCS_SECONDS):
            return Heard(OLD_AUTOSCALER)
        if not reply.HasField("autoscaling_state"):
            return Heard("the autoscaler has not reported yet")
        state = reply.autoscaling_state
        late = time.time() - FAILED_SECONDS
        return Heard(
            infeasible=frozenset(
                gang.details.split(":", 1)[0] for gang in state.infeasible_gang_resource_requests
            ),
            refused=tuple(
                sorted(
                    {one.ray_node_type_name for one in state.failed_instance_requests if one.failed_ts > late}
                )
            ),
            nodes={
                node.node_id.hex(): SeenNode(dict(node.labels), dict(node.total_resources))
                for node in states
                if node.status != NodeStatus.DEAD
            },
        )

    def create(self, name: str, way: Way, labels: Mapping[str, str]) -> str:
        """See :meth:`Cluster.create`."""
        group = placement_group(
            [dict(bundle) for bundle in way.bundles],
            strategy="PACK",  # for one bundle nothing is stricter
            name=name,
            bundle_label_selector=[dict(labels)] * len(way.bundles),
        )
        return str(group.id.hex())

    def look(self, group: str) -> Group:
        """See :meth:`Cluster.look`."""
        row = placement_group_table(group_from_hex(group))
        if not row:
            return Group("REMOVED")
        how = scheduling(row)
        nodes: dict[str, dict[str, float]] = {}
        for bundle, node in row["bundles_to_node_id"].items():
            if node:
                held = nodes.setdefault(node, {})
                for resource, amount in row["bundles"][bundle].items():
                    held[resource] = held.get(resource, 0.0) + amount
        return Group(
            row["state"],
            nodes,
            how.attempt,
            idle=how.state in ("NO_RESOURCES", "INFEASIBLE"),
            hopeless=row["state"] == "PENDING" and how.state == "INFEASIBLE",
        )

    def remove(self, group: str) -> None:
        """See :meth:`Cluster.remove`."""
        remove_placement_group(group_from_hex(group))

    def free(self) -> Mapping[str, Mapping[str, float]]:
        """See :meth:`Cluster.free`."""
        return available_resources()
