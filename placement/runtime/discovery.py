"""What the cluster has, from Ray's own resources and labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import ray

from placement import topologies
from placement.core.snapshot import Node
from placement.core.topology import Topology
from placement.errors import UnknownTopology
from placement.runtime.books import Tally
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
    topology: Topology,
    available: Mapping[str, float] | None,
    tally: Tally,
    foreign: frozenset[int],
) -> Node:
    """One node as the planner sees it.

    Args:
        info: the node.
        facts: what its GPUs report, ``None`` while unknown.
        topology: how they are linked, as far as is known.
        available: resource -> free amount in Ray's books; ``None`` while they lag behind our own last change.
        tally: what this service holds and claims there.
        foreign: GPUs that other Ray users held when the node actor last looked.
    """
    not_ours = frozenset(range(info.gpu_count)) - tally.gpus
    foreign &= not_ours
    if available is not None:
        free_in_books = int(available.get("GPU", 0.0) + 1e-6)
        unseen = len(not_ours) - free_in_books - len(foreign)
        if unseen < 0:  # somebody gave GPUs back since
            foreign = frozenset(sorted(foreign)[-unseen:])
        else:  # or took some: Ray gives the lowest-numbered. Some of them may be our own claims, just reserved.
            untouched = sorted(not_ours - foreign - tally.claimed_gpus)
            foreign |= frozenset(untouched[: max(0, unseen - len(tally.claimed_gpus))])
    egress = {}
    for name, total in info.egress.items():
        egress[name] = total - tally.egress[name]
        if available is not None:
            egress[name] = min(egress[name], int(available.get(name, 0.0) + 1e-6))
    lost = facts.lost() if facts is not None else frozenset()
    return Node(
        id=info.id,
        name=info.name,
        address=info.address,
        topology=topology,
        free=not_ours - foreign - tally.claimed_gpus - lost,
        egress=egress,
        serving=frozenset(tally.serving),
        problem=info.label_problem(),
    )
