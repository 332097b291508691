"""What the cluster has, from Ray's own resources and labels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import ray

from placement import topologies
from placement.core.snapshot import Node
from placement.core.topology import Topology
from placement.errors import UnknownTopology
from placement.wire.facts import NodeFacts

TOPOLOGY_LABEL = "placement/topology"
"""A node with this label has the topology of that catalogue entry (a simulated node)."""


@dataclass(frozen=True)
class NodeInfo:
    """A node that is alive, as Ray describes it.

    Attributes:
        egress: resource name (``egress``, ``egress_<provider>``) -> concurrent requests the node may carry.
    """

    id: str
    name: str
    address: str
    gpu_count: int
    labels: Mapping[str, str] = field(default_factory=dict)
    egress: Mapping[str, int] = field(default_factory=dict)

    @property
    def topology_name(self) -> str | None:
        """The catalogue entry that the node is labelled with."""
        return self.labels.get(TOPOLOGY_LABEL)

    def label_problem(self) -> str | None:
        """What is wrong with the topology label, if anything."""
        if self.topology_name is None or not self.gpu_count:
            return None
        where = f"label {TOPOLOGY_LABEL} of node {self.name}"
        try:
            gpus = len(topologies.load(self.topology_name))
        except UnknownTopology as error:
            return str(UnknownTopology(error.name, error.known, where))
        if gpus != self.gpu_count:
            return f"{where}: {self.topology_name} has {gpus} GPUs, the node {self.gpu_count}; correct one of them"
        return None


def live_nodes() -> list[NodeInfo]:
    """All nodes that are alive, ordered by name and id."""
    found = []
    for row in ray.nodes():
        if not row["Alive"]:
            continue
        resources = row["Resources"]
        found.append(
            NodeInfo(
                id=row["NodeID"],
                name=row.get("NodeName") or row["NodeManagerAddress"],
                address=row["NodeManagerAddress"],
                gpu_count=int(resources.get("GPU", 0)),
                labels=dict(row.get("Labels") or {}),
                egress={
                    name: int(amount)
                    for name, amount in sorted(resources.items())
                    if (name == "egress" or name.startswith("egress_")) and "_group_" not in name
                },
            )
        )
    return sorted(found, key=lambda node: (node.name, node.id))


def node_state(
    info: NodeInfo,
    facts: NodeFacts | None,
    available: Mapping[str, float],
    held_gpus: Collection[int],
    foreign_gpus: Collection[int],
    held_egress: Mapping[str, int],
    serving: Collection[tuple[str, str]],
) -> Node:
    """One node as the planner sees it.

    Args:
        info: the node.
        facts: what its GPUs report, ``None`` while unknown.
        available: resource -> free amount in Ray's books, up to 0.1 s old.
        held_gpus: GPUs that this service holds or is about to take there.
        foreign_gpus: GPUs that other Ray users held when the node actor last looked.
        held_egress: resource -> units that this service holds or is about to take there.
        serving: (provider, key fingerprint) of the remote replicas there.
    """
    lost = facts.lost() if facts is not None else frozenset()
    not_held = set(range(info.gpu_count)) - set(held_gpus)
    count = min(int(available.get("GPU", 0.0) + 1e-6), len(not_held))
    free = sorted(not_held - set(foreign_gpus))
    if len(free) < count:  # somebody gave GPUs back since the node actor looked
        free = sorted(set(free) | set(sorted(not_held & set(foreign_gpus))[: count - len(free)]))
    # Somebody took more since: Ray gives the lowest-numbered ones.
    free = free[len(free) - count :]
    return Node(
        id=info.id,
        name=info.name,
        address=info.address,
        topology=facts.topology() if facts is not None and facts.gpus else Topology.unknown(info.gpu_count),
        free=frozenset(free) - lost,
        egress={
            name: min(int(available.get(name, 0.0) + 1e-6), total - held_egress.get(name, 0))
            for name, total in info.egress.items()
        },
        serving=frozenset(serving),
        problem=info.label_problem(),
    )
