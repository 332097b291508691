"""The dry run: what applying deployments would do. The same for a live cluster and for one in a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from placement.core.explanation import Explanation, explain
from placement.core.mix import Mix
from placement.core.planner import Change, Step, steps
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.score import WHOLE, Score, score
from placement.core.snapshot import Node, Snapshot
from placement.errors import UnknownNode, Unplaceable
from placement.wire.cluster import HeldDeployment, HeldReplica
from placement.wire.deployment import Deployment, PlacementConstraints


@dataclass(frozen=True)
class PlannedAssignment:
    """Where a replica would go. ``gpus`` is a prediction: other Ray users may take or free some meanwhile.

    Attributes:
        bandwidth_gb_per_s: predicted all-reduce bus bandwidth between the GPUs, GB/s per direction; ``None``
            for fewer than two GPUs, or where a link is unknown.
        weakest_link: slowest link between two of them as ``nvidia-smi topo -m`` names it.
        share: how much of the GPU, 1 for whole ones.
        mig: profile of the MIG instance that ``gpus`` is; empty for GPUs.
        ranks: which ranks of the replica are here, in the order of ``gpus``; empty where all are.
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

    def to_dict(self) -> dict[str, Any]:
        """The planned assignment as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class PlacementPlan:
    """A dry run: what placing would do now. Nothing is reserved.

    Attributes:
        deployment: its name.
        assignments: one for each replica and node, by replica index.
        standing: whether the deployment is placed already, just so.
    """

    deployment: str
    assignments: list[PlannedAssignment]
    standing: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        assignments = [a.to_dict() for a in self.assignments]
        return {"deployment": self.deployment, "standing": self.standing, "assignments": assignments}


@dataclass(frozen=True)
class ExplainedPlan:
    """A plan or a refusal, and what became of every node on the way.

    Attributes:
        deployment: its name.
        plan: where its replicas would go, if they fit.
        refusal: why not, if they do not.
        explanation: stage by stage, how many nodes were excluded and why: for the first replica that is
            not there yet, or for the one that was refused.
    """

    deployment: str
    plan: PlacementPlan | None
    refusal: str | None
    explanation: Explanation

    def to_dict(self) -> dict[str, Any]:
        """Both as JSON-ready values."""
        return {
            "deployment": self.deployment,
            "plan": self.plan.to_dict() if self.plan else None,
            "refusal": self.refusal,
            "explanation": self.explanation.to_dict(),
        }


def plan_deployments(
    snapshot: Snapshot, held: Mapping[str, HeldDeployment], wanted: Sequence[Deployment]
) -> list[PlacementPlan]:
    """What applying ``wanted``, in order, would do to a cluster on which ``held`` stand.

    Raises:
        Unplaceable: one of them does not fit on top of those before it.
        UnknownNode: its constraints name a node that is not there.
    """
    plans = []
    for step, keep in _steps(snapshot, held, wanted):
        if isinstance(step.outcome, Unplaceable):
            raise step.outcome
        plans.append(_preview(snapshot, step.outcome, keep))
    return plans


def explain_deployments(
    snapshot: Snapshot, held: Mapping[str, HeldDeployment], wanted: Sequence[Deployment]
) -> list[ExplainedPlan]:
    """The same, explained; ends with the first deployment that does not fit.

    Raises:
        UnknownNode: as :func:`plan_deployments`.
    """
    explained = []
    for step, keep in _steps(snapshot, held, wanted):
        why = explain(step.seen, step.request)
        name = step.request.deployment
        if isinstance(step.outcome, Unplaceable):
            explained.append(ExplainedPlan(name, None, str(step.outcome), why))
        else:
            explained.append(ExplainedPlan(name, _preview(snapshot, step.outcome, keep), None, why))
    return explained


def request_of(
    wanted: Deployment,
    missing: Iterable[int],
    standing: Mapping[str, int],
    snapshot: Snapshot,
    mending: bool = False,
) -> Request:
    """A deployment's replicas ``missing``, in the planner's terms.

    Raises:
        UnknownNode: its constraints name a node that is not there; while ``mending``, only such nodes, since a
            node that it named may be the one that died.
    """
    limits = wanted.constraints or PlacementConstraints()
    for limit in ("gpu_nodes", "egress_nodes", "egress_preference"):
        names = getattr(limits, limit) or ()
        for name in names:
            if not snapshot.named([name]) and not (mending and snapshot.named(names)):
                known = tuple(node.name for node in snapshot.nodes)
                raise UnknownNode(f"constraints.{limit}", name, known)
    return Request(
        deployment=wanted.name,
        replicas=tuple(missing),
        needs=wanted.needs,
        policy=wanted.policy,
        provider=wanted.provider,
        key=wanted.key_fingerprint,
        egress=wanted.egress_per_replica,
        gpu_nodes=limits.gpu_nodes,
        egress_nodes=limits.egress_nodes,
        egress_preference=limits.egress_preference,
        labels=limits.node_labels,
        accelerators=limits.accelerators or (),
        compute_capability=limits.compute_capability,
        cpu_milli=wanted.cpu_milli_per_gpu * wanted.needs.gpus,
        memory_bytes=wanted.memory_bytes_per_gpu * wanted.needs.gpus,
        stages=wanted.stages,
        divisible=wanted.tensor_parallel is None and wanted.pipeline_parallel is None,
        apart_from=limits.apart_from,
        near_to=limits.near_to,
        spread_label=limits.spread.label if limits.spread else None,
        max_per_domain=limits.spread.max if limits.spread else 0,
        standing=dict(standing),
    )


def mix_of(snapshot: Snapshot, deployments: Iterable[Deployment]) -> Mix:
    """What is asked for by these deployments; those whose constraints name a node that is no more do not count."""
    mix = Mix()
    for one in deployments:
        with contextlib.suppress(UnknownNode):
            mix = mix.plus(request_of(one, range(one.replicas), {}, snapshot))
    return mix


def _steps(
    snapshot: Snapshot, held: Mapping[str, HeldDeployment], wanted: Sequence[Deployment]
) -> Iterator[tuple[Step, dict[int, list[HeldReplica]]]]:
    """Each deployment's step, and the replicas that stay as they are."""
    snapshot = snapshot.changed((), mix_of(snapshot, (one.deployment for one in held.values())))
    parts = [_change(snapshot, held.get(one.name), one) for one in wanted]
    yield from zip(
        steps(snapshot, [change for change, _ in parts]), [keep for _, keep in parts], strict=False
    )


def _change(
    snapshot: Snapshot, standing: HeldDeployment | None, one: Deployment
) -> tuple[Change, dict[int, list[HeldReplica]]]:
    """What is to be done for a deployment, and the replicas that stay."""
    stands: dict[int, list[HeldReplica]] = {}
    for replica in standing.replicas if standing else ():
        stands.setdefault(replica.replica_index, []).append(replica)
    same_shape = standing is not None and standing.deployment.shape() == one.shape()
    keep = {i: parts for i, parts in stands.items() if i < one.replicas} if same_shape else {}
    on_nodes: dict[str, int] = {}
    for parts in keep.values():
        on_nodes[parts[0].node] = on_nodes.get(parts[0].node, 0) + 1
    missing = [index for index in range(one.replicas) if index not in keep]
    leaving = tuple(part.planned() for index, parts in stands.items() if index not in keep for part in parts)
    request = request_of(one, missing, on_nodes, snapshot)
    # What is surplus is given back if there is no room beside it, as what is replaced is.
    return Change(request, leaving, in_place=bool(leaving)), keep


def _preview(snapshot: Snapshot, outcome: Plan, keep: Mapping[int, list[HeldReplica]]) -> PlacementPlan:
    planned = [part.planned() for parts in keep.values() for part in parts]
    assignments = []
    for replica in sorted([*planned, *outcome.replicas], key=lambda r: (r.replica_index, r.ranks)):
        if not snapshot.bit(replica.node_id):  # it stands on a node that is no more
            assignments.append(
                PlannedAssignment(
                    replica.replica_index, replica.node_id, replica.node_id[:12], list(replica.gpus)
                )
            )
            continue
        node = snapshot.node(replica.node_id)
        value = _slowest_set(node, replica, outcome.set_size)
        assignments.append(
            PlannedAssignment(
                replica.replica_index,
                node.id,
                node.name,
                list(replica.gpus),
                value.known_gb_per_s,
                value.link_name,
                replica.share / WHOLE,
                replica.profile,
                list(replica.ranks),
                replica.egress_resource,
                replica.egress_units,
            )
        )
    return PlacementPlan(outcome.deployment, assignments, standing=not outcome.replicas)


def _slowest_set(node: Node, replica: PlannedReplica, size: int) -> Score:
    """The score of the slowest of the sets of GPUs that a replica has on a node."""
    gpus = replica.gpus
    if not replica.ranks or not 0 < size < len(gpus):
        return score(node.topology, gpus)
    return min(score(node.topology, gpus[i : i + size]) for i in range(0, len(gpus), size))
