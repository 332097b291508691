"""What the cluster has and holds at one moment. Immutable; a plan is a function of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from placement.core.topology import Topology


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        id: Ray's node id, hex.
        name: what people call it (Ray's node name, else its address).
        topology: its GPUs; no GPUs on a pure egress node.
        free: GPU ordinals believed free. Exact unless other Ray users hold GPUs here; the node actor
            finds out when it reserves.
        egress: resource name (``egress`` or ``egress_<provider>``) -> concurrent requests still free.
        serving: (provider, key fingerprint) of the remote replicas that sit here.
        problem: why nothing may be placed here, if so.
    """

    id: str
    name: str
    address: str = ""
    topology: Topology = field(default_factory=lambda: Topology.unknown(0))
    free: frozenset[int] = frozenset()
    egress: Mapping[str, int] = field(default_factory=dict)
    serving: frozenset[tuple[str, str]] = frozenset()
    problem: str | None = None

    def named(self, name: str) -> bool:
        """Whether ``name`` is this node's id, name or address."""
        return name in (self.id, self.name, self.address)

    def egress_resource(self, provider: str) -> str | None:
        """The resource that a replica calling ``provider`` takes here: its own before the general one."""
        return next((r for r in (f"egress_{provider}", "egress") if r in self.egress), None)


@dataclass(frozen=True)
class Snapshot:
    """All nodes that are alive, ordered by id."""

    nodes: tuple[Node, ...]

    def node(self, node_id: str) -> Node:
        """The node of that id.

        Raises:
            KeyError: there is none.
        """
        for node in self.nodes:
            if node.id == node_id:
                return node
        raise KeyError(node_id)

    def with_node(self, changed: Node) -> Snapshot:
        """The same cluster with one node replaced."""
        return replace(self, nodes=tuple(changed if node.id == changed.id else node for node in self.nodes))
