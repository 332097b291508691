"""A plan as users see it: where replicas would go, what would change, and which nodes were excluded and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from placement.core.explanation import Explanation
from placement.errors import Unplaceable


@dataclass(frozen=True)
class PlannedAssignment:
    """Where a replica would go. ``gpus`` is a prediction: other Ray users may take or free some meanwhile.

    Attributes:
        bandwidth_gb_per_s: all-reduce bus bandwidth between the GPUs, GB/s per direction, measured or predicted;
            ``None`` for fewer than two GPUs, or if nothing was measured and a link is unknown. The lower end of the
            range, if the host's processors or peer-to-peer are unknown.
        upper_bandwidth_gb_per_s: the upper end of the range; ``None`` if nothing that decides it is unknown.
        bandwidth_measured: whether it was measured.
        weakest_link: slowest link between two of them as ``nvidia-smi topo -m`` names it.
        share: how much of the GPU, 1 for whole ones.
        shares: how much of each of ``gpus``, if that differs; else empty.
        mig: profile of the MIG instance that ``gpus`` is; empty for GPUs.
        ranks: which ranks of the replica are here, in the order of ``gpus``; empty if all are.
        egress_resource, egress_units: what a remote replica takes.
        cpus, memory_bytes: what a CPU replica takes.
        set_size: GPUs of each tensor-parallel group of the replica; 0 if all of its GPUs are one group.
        sorted_bandwidth_gb_per_s: the bandwidth if an engine sorts the node's GPUs and cuts its groups from these, as
            vLLM does. It is less than ``bandwidth_gb_per_s`` if sorting changes the groups to slower ones.
    """

    replica_index: int
    node: str
    node_name: str
    gpus: list[int]
    bandwidth_gb_per_s: float | None = None
    weakest_link: str | None = None
    share: float = 1.0
    mig: str = ""
    ranks: list[int] = field(default_factory=list)
    egress_resource: str | None = None
    egress_units: int = 0
    cpus: float = 0.0
    memory_bytes: int = 0
    set_size: int = 0
    sorted_bandwidth_gb_per_s: float | None = None
    upper_bandwidth_gb_per_s: float | None = None
    bandwidth_measured: bool = False
    shares: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The planned assignment as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class PlacementPlan:
    """A dry run: what placing would do now. Nothing is reserved.

    Attributes:
        deployment: its name.
        assignments: one for each replica and node, by replica index; also of those that wait to be replaced.
        standing: whether the deployment is placed already, exactly like this.
        pending: replicas that would wait for a place -> why.
        runtime: what it runs on.
        runtime_from: where the runtime comes from: ``declared``, ``runtime_config`` or ``by the model's name``.
        change: ``new``: no deployment of that name exists; ``unchanged``: nothing would happen; else ``changed``.
        placed: replicas that would get a place and have none.
        unchanged: those that would stay as they are.
        replaced: those that would get another place, which ends the workers in the one they have.
        removed: those that are there and no longer wanted.
        differs: names of the declared fields that differ from what is declared now.
        group: the group that it is a member of.
        links: the routes of those of the group's links that name it first: ``unit``, ``between``, ``via``,
            ``route``, ``gb_per_s`` (``None`` if not known), and the two ``gpus`` of the slowest path.
        bounded: the search for the group's places was cut off; there may be better ones.
    """

    deployment: str
    assignments: list[PlannedAssignment]
    standing: bool = False
    pending: dict[int, str] = field(default_factory=dict)
    runtime: str = ""
    runtime_from: str = ""
    change: Literal["new", "unchanged", "changed"] = "new"
    placed: list[int] = field(default_factory=list)
    unchanged: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    group: str | None = None
    links: list[dict[str, Any]] = field(default_factory=list)
    bounded: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        of_group = {"group": self.group, "links": self.links, "bounded": self.bounded} if self.group else {}
        return {
            "deployment": self.deployment,
            "standing": self.standing,
            "change": self.change,
            "placed": self.placed,
            "unchanged": self.unchanged,
            "replaced": self.replaced,
            "removed": self.removed,
            "differs": self.differs,
            "runtime": self.runtime,
            "runtime_from": self.runtime_from,
            "assignments": [a.to_dict() for a in self.assignments],
            "pending": {str(index): reason for index, reason in self.pending.items()},
            **of_group,
        }


@dataclass(frozen=True)
class ExplainedPlan:
    """A plan or a refusal, and which nodes were excluded and why.

    Attributes:
        deployment: its name.
        plan: where its replicas would go, if they fit.
        refusal: why not, if they do not.
        explanation: stage by stage, how many nodes were excluded and why: for the first replica that has
            no place yet, or for the one that was refused.
        error: the refusal with its code and fields.
    """

    deployment: str
    plan: PlacementPlan | None
    refusal: str | None
    explanation: Explanation
    error: Unplaceable | None = None

    def to_dict(self) -> dict[str, Any]:
        """Both as JSON-ready values."""
        return {
            "deployment": self.deployment,
            "plan": self.plan.to_dict() if self.plan else None,
            "refusal": self.refusal,
            "explanation": self.explanation.to_dict(),
            "error": self.error.to_dict() if self.error else None,
        }
