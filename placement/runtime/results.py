"""What a placement hands back: assignments that hold live Ray placement groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@dataclass(frozen=True)
class NodeAssignment:
    """One replica on one node, and the placement group that holds its GPUs or its egress capacity.

    Attributes:
        replica_index: which replica, from 0.
        node: Ray's node id, hex.
        gpus: GPU ordinals on that node, ascending; rank ``r`` runs on ``gpus[r]``. Empty for a remote replica.
        placement_group: the Ray placement group; bundle ``bundle_indices[r]`` holds ``gpus[r]``.
        bundle_indices: the bundles of this assignment.
        node_name: what people call the node.
        ray_gpus: what Ray alone would have given at that moment: the lowest-numbered free GPUs.
        weakest_link: slowest link between two of the GPUs as ``nvidia-smi topo -m`` names it; ``None``
            for fewer than two GPUs, ``"?"`` where the topology is unknown.
        weakest_gb_per_s, ray_weakest_gb_per_s: estimated GB/s per direction of that link, and of the
            slowest link among ``ray_gpus``; ``None`` where there is none or nothing is known.
        egress_resource, egress_units: what a remote replica holds.
    """

    replica_index: int
    node: str
    gpus: list[int]
    placement_group: PlacementGroup
    bundle_indices: list[int]
    node_name: str = ""
    ray_gpus: list[int] = field(default_factory=list)
    weakest_link: str | None = None
    weakest_gb_per_s: float | None = None
    ray_weakest_gb_per_s: float | None = None
    egress_resource: str | None = None
    egress_units: int = 0

    def actor_options(self, rank: int = 0) -> dict[str, Any]:
        """Options that start rank ``rank`` of this replica on its own GPU: ``Engine.options(**a.actor_options(0))``.

        A remote replica has the one rank 0, which takes the replica's egress units.

        Raises:
            IndexError: the replica has no such rank.
        """
        if not 0 <= rank < len(self.bundle_indices):
            raise IndexError(
                f"replica {self.replica_index} has ranks 0 to {len(self.bundle_indices) - 1}, not {rank}"
            )
        strategy = PlacementGroupSchedulingStrategy(
            self.placement_group, placement_group_bundle_index=self.bundle_indices[rank]
        )
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": strategy}
        if self.egress_resource is None:
            options["num_gpus"] = 1
        else:
            options["resources"] = {self.egress_resource: self.egress_units}
        return options

    def to_dict(self) -> dict[str, Any]:
        """The assignment as JSON-ready values; the group by its id."""
        return {
            "replica_index": self.replica_index,
            "node": self.node,
            "node_name": self.node_name,
            "gpus": list(self.gpus),
            "placement_group": self.placement_group.id.hex(),
            "bundle_indices": list(self.bundle_indices),
            "ray_gpus": list(self.ray_gpus),
            "weakest_link": self.weakest_link,
            "weakest_gb_per_s": self.weakest_gb_per_s,
            "ray_weakest_gb_per_s": self.ray_weakest_gb_per_s,
            "egress_resource": self.egress_resource,
            "egress_units": self.egress_units,
        }


@dataclass(frozen=True)
class PlacementResult:
    """A deployment and where its replicas are: one assignment per replica, by replica index."""

    deployment: str
    assignments: list[NodeAssignment]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values."""
        return {"deployment": self.deployment, "assignments": [a.to_dict() for a in self.assignments]}


@dataclass(frozen=True)
class PlannedAssignment:
    """Where a replica would go. ``gpus`` is a prediction: other Ray users may take or free some meanwhile."""

    replica_index: int
    node: str
    node_name: str
    gpus: list[int]
    weakest_link: str | None = None
    weakest_gb_per_s: float | None = None
    egress_resource: str | None = None
    egress_units: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The planned assignment as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class PlacementPlan:
    """A dry run: what placing would do now. Nothing is reserved.

    Attributes:
        deployment: its name.
        assignments: one for each replica, by replica index.
        standing: whether the deployment is placed already, just so.
    """

    deployment: str
    assignments: list[PlannedAssignment]
    standing: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        assignments = [a.to_dict() for a in self.assignments]
        return {"deployment": self.deployment, "standing": self.standing, "assignments": assignments}
