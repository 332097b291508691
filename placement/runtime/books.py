"""What this service holds: deployments that stand, and claims of placements under way.

Not thread-safe by itself; the service guards it with one lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from placement.core.planner import PlannedReplica
from placement.core.snapshot import Snapshot
from placement.runtime import groups, ledger
from placement.runtime.discovery import NodeInfo, node_state
from placement.runtime.results import NodeAssignment, PlacementResult
from placement.wire.deployment import Deployment
from placement.wire.facts import NodeFacts

RECORDED = (
    "replica_index", "node", "node_name", "gpus", "bundle_indices", "ray_gpus", "weakest_link",
    "weakest_gb_per_s", "ray_weakest_gb_per_s", "egress_resource", "egress_units",
)  # fmt: skip


@dataclass
class Standing:
    """A deployment that is placed: its declaration, its replicas, and the name of each one's group."""

    deployment: Deployment
    replicas: dict[int, NodeAssignment] = field(default_factory=dict)
    orders: dict[int, str] = field(default_factory=dict)

    def result(self) -> PlacementResult:
        """What callers get."""
        return PlacementResult(self.deployment.name, [self.replicas[i] for i in sorted(self.replicas)])

    def nodes(self) -> Counter[str]:
        """Node id -> replicas there."""
        return Counter(assignment.node for assignment in self.replicas.values())

    def save(self) -> None:
        """Writes this deployment to the ledger."""
        replicas = [
            {
                "order": self.orders[index],
                "group": assignment.placement_group.id.hex(),
                **{name: getattr(assignment, name) for name in RECORDED},
            }
            for index, assignment in sorted(self.replicas.items())
        ]
        ledger.save(
            self.deployment.name, self.deployment.model_dump(mode="json", exclude_none=True), replicas
        )

    @classmethod
    def load(cls, record: Mapping[str, Any]) -> Standing:
        """Reads a record of the ledger."""
        standing = cls(Deployment.model_validate(record["deployment"]))
        for replica in record["replicas"]:
            index = replica["replica_index"]
            standing.orders[index] = replica["order"]
            standing.replicas[index] = NodeAssignment(
                placement_group=groups.group_from_hex(replica["group"]),
                **{name: replica[name] for name in RECORDED},
            )
        return standing


@dataclass(frozen=True)
class Claim:
    """Replicas that are about to be reserved, so that nobody else plans with the same room."""

    deployment: Deployment
    replicas: tuple[PlannedReplica, ...]


class Books:
    """All standing deployments and open claims."""

    def __init__(self) -> None:
        self.standing: dict[str, Standing] = {}
        self.claims: list[Claim] = []

    def names(self) -> tuple[str, ...]:
        """Names of the deployments that stand, in order."""
        return tuple(sorted(self.standing))

    def assignments(self) -> Iterator[tuple[Standing, NodeAssignment]]:
        """Every replica that stands."""
        for name in self.names():
            standing = self.standing[name]
            for index in sorted(standing.replicas):
                yield standing, standing.replicas[index]

    def holdings(self, node_id: str) -> list[tuple[str, list[int]]]:
        """(order name, GPUs) of the replicas that stand on a node."""
        return [
            (standing.orders[a.replica_index], a.gpus)
            for standing, a in self.assignments()
            if a.node == node_id and a.gpus
        ]

    def snapshot(
        self,
        nodes: Iterable[NodeInfo],
        facts: Mapping[str, NodeFacts],
        foreign: Mapping[str, frozenset[int]],
        available: Mapping[str, Mapping[str, float]],
        ignoring: str | None = None,
        full: Mapping[str, int] | None = None,
    ) -> Snapshot:
        """The cluster as the planner sees it.

        Args:
            nodes: what is alive.
            facts: node id -> what its GPUs report, where known.
            foreign: node id -> GPUs that other Ray users held when the node actor last looked.
            available: node id -> resource -> free amount in Ray's books.
            ignoring: a deployment to be counted as if it were released.
            full: node id -> most GPUs that may be planned there, after it refused.
        """
        gpus: dict[str, set[int]] = {}
        egress: dict[str, Counter[str]] = {}
        serving: dict[str, set[tuple[str, str]]] = {}
        returned: dict[str, Counter[str]] = {}

        def take(node: str, who: Deployment, ordinals: Iterable[int], resource: str | None) -> None:
            gpus.setdefault(node, set()).update(ordinals)
            if resource is not None:
                egress.setdefault(node, Counter())[resource] += who.egress_per_replica
                serving.setdefault(node, set()).add((who.provider or "", who.key_fingerprint or ""))

        for standing, assignment in self.assignments():
            if standing.deployment.name == ignoring:
                back = returned.setdefault(assignment.node, Counter())
                back["GPU"] += len(assignment.gpus)
                if assignment.egress_resource is not None:
                    back[assignment.egress_resource] += assignment.egress_units
            else:
                take(assignment.node, standing.deployment, assignment.gpus, assignment.egress_resource)
        for claim in self.claims:
            for replica in claim.replicas:
                take(replica.node_id, claim.deployment, replica.gpus, replica.egress_resource)

        states = []
        for info in nodes:
            free = Counter({name: amount for name, amount in available.get(info.id, {}).items()})
            free.update(returned.get(info.id, Counter()))
            if full is not None and info.id in full:
                free["GPU"] = min(free["GPU"], full[info.id])
            states.append(
                node_state(
                    info,
                    facts.get(info.id),
                    free,
                    gpus.get(info.id, set()),
                    foreign.get(info.id, frozenset()),
                    egress.get(info.id, {}),
                    serving.get(info.id, set()),
                )
            )
        return Snapshot(tuple(states))
