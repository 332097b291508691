"""What this service holds: deployments that stand, and claims of placements under way.

Not thread-safe by itself: the service guards claims, and what is entered or dropped, with one lock; readers take
copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from placement.core.lifecycle import Event, State, after
from placement.core.replicas import PlannedReplica
from placement.core.score import WHOLE
from placement.runtime import groups, ledger
from placement.runtime.orders import Holding
from placement.runtime.results import NodeAssignment, PlacementResult
from placement.wire.cluster import HeldDeployment, HeldReplica
from placement.wire.deployment import Deployment

T = TypeVar("T")

RECORDED = (
    "replica_index", "node", "node_name", "gpus", "bundle_indices", "ranks", "share", "mig", "cpus_per_gpu",
    "memory_bytes_per_gpu", "ray_gpus", "bandwidth_gb_per_s",
    "weakest_link", "ray_bandwidth_gb_per_s", "ray_weakest_link", "egress_resource", "egress_units", "set_size",
)  # fmt: skip


@dataclass
class Standing:
    """A deployment: its declaration, its replicas by node, and the name of each one's group.

    Attributes:
        states: replica -> where it is in its life.
        reasons: replica that is pending -> why.
        releasing: all of it is to go, whatever happens.
        claims: what was reserved of it and is in no record yet.
    """

    deployment: Deployment
    replicas: dict[int, tuple[NodeAssignment, ...]] = field(default_factory=dict)
    orders: dict[int, str] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    releasing: bool = False
    claims: list[Claim] = field(default_factory=list)

    def copy(self) -> Standing:
        """The same, to be changed on its own."""
        return self.only(self.states, self.deployment)

    def only(self, indices: Collection[int], deployment: Deployment) -> Standing:
        """What is known of some of the replicas, to be changed on its own; with another declaration."""

        def some(known: Mapping[int, T]) -> dict[int, T]:
            return {index: known[index] for index in indices if index in known}

        return Standing(
            deployment, some(self.replicas), some(self.orders), some(self.states), some(self.reasons)
        )

    def happen(self, index: int, event: Event) -> State | None:
        """Notes an event of a replica.

        Raises:
            IllegalTransition: it cannot happen now; nothing is changed.
        """
        state = after(index, self.states.get(index), event)
        if state is None:
            del self.states[index]
        else:
            self.states[index] = state
        return state

    def missing(self) -> list[int]:
        """The replicas that are wanted and hold nothing."""
        return [index for index in range(self.deployment.replicas) if index not in self.replicas]

    def result(self) -> PlacementResult:
        """What callers get."""
        one = self.deployment
        return PlacementResult(
            one.name,
            self.assignments(),
            dict(self.reasons),
            one.model,
            one.runtime_name,
            one.runtime_config,
            one.serving,
            one.budget,
        )

    def held(self) -> HeldDeployment:
        """The same as plans and snapshots see it."""
        replicas = tuple(map(held_replica, self.assignments()))
        return HeldDeployment(deployment=self.deployment, replicas=replicas, releasing=self.releasing)

    def assignments(self) -> list[NodeAssignment]:
        """All of them, by replica and rank."""
        return [a for _, parts in sorted(self.replicas.items()) for a in parts]

    def add(self, order: str, assignment: NodeAssignment) -> None:
        """Notes a replica, or one node's part of it."""
        index = assignment.replica_index
        parts = (*self.replicas.get(index, ()), assignment)
        self.replicas[index] = tuple(sorted(parts, key=lambda a: a.ranks))
        self.orders[index] = order

    def nodes(self) -> Counter[str]:
        """Node id -> replicas that begin there."""
        return Counter(parts[0].node for parts in list(self.replicas.values()))

    def save(self) -> None:
        """Writes this deployment to the ledger."""
        replicas = [
            {
                "order": self.orders[assignment.replica_index],
                "group": assignment.placement_group.id.hex(),
                **{name: getattr(assignment, name) for name in RECORDED},
            }
            for assignment in self.assignments()
        ]
        declared = self.deployment.model_dump(mode="json", exclude_none=True)
        runtime = self.deployment.runtime_name
        ledger.save(self.deployment.name, declared, replicas, self.releasing, runtime)

    @classmethod
    def load(cls, record: Mapping[str, Any]) -> Standing:
        """Reads a record of the ledger."""
        standing = cls(Deployment.recorded(record["deployment"], record.get("runtime")))
        standing.releasing = record.get("releasing", False)
        for replica in record["replicas"]:
            assignment = NodeAssignment(
                placement_group=groups.group_from_hex(replica["group"]),
                **{name: replica[name] for name in RECORDED if name in replica},
            )
            standing.add(replica["order"], assignment)
        standing.states = dict.fromkeys(standing.replicas, State.PLACED)
        standing.states |= dict.fromkeys(standing.missing(), State.PENDING)
        standing.reasons = dict.fromkeys(standing.missing(), "not tried since the service restarted")
        return standing


@dataclass(frozen=True)
class Claim:
    """Replicas that are about to be reserved, so that nobody else plans with the same room.

    ``set_size``: how many GPUs each set of a replica that is made of several has.
    """

    deployment: Deployment
    replicas: tuple[PlannedReplica, ...]
    set_size: int = 0


@dataclass
class Tally:
    """What this service holds and claims on one node.

    Attributes:
        gpus, claimed_gpus: whole GPUs (and MIG instances) of replicas that stand, and of those about to be
            reserved; a GPU of which a share stands is in ``gpus``.
        shares: GPU -> thousandths in use by both, of GPUs that are shared.
        egress: resource -> units of both.
        serving: (provider, key fingerprint) -> replicas of both.
        deployments: name -> replicas of both.
        cpu_milli, memory_bytes: CPUs (thousandths) and memory of both.
    """

    gpus: set[int] = field(default_factory=set)
    claimed_gpus: set[int] = field(default_factory=set)
    shares: Counter[int] = field(default_factory=Counter)
    egress: Counter[str] = field(default_factory=Counter)
    serving: Counter[tuple[str, str]] = field(default_factory=Counter)
    deployments: Counter[str] = field(default_factory=Counter)
    cpu_milli: int = 0
    memory_bytes: int = 0

    def add(self, deployment: Deployment, replica: PlannedReplica) -> None:
        """Counts one replica, but for its whole GPUs."""
        self.deployments[deployment.name] += 1
        self.cpu_milli += replica.cpu_milli
        self.memory_bytes += replica.memory_bytes
        if replica.share < WHOLE:
            self.shares[replica.gpus[0]] += replica.share
        if replica.egress_resource is not None:
            self.egress[replica.egress_resource] += deployment.egress_per_replica
            self.serving[deployment.provider or "", deployment.key_fingerprint or ""] += 1


class Books:
    """All standing deployments and open claims."""

    def __init__(self) -> None:
        self.standing: dict[str, Standing] = {}
        self.unreadable: dict[str, ledger.Record] = {}
        self.claims: list[Claim] = []

    def claim(self, claim: Claim) -> Claim:
        """Opens a claim."""
        self.claims.append(claim)
        return claim

    def settle(self, claims: Iterable[Claim]) -> None:
        """Closes claims: what they were for stands now, or was given back."""
        for claim in claims:
            self.claims.remove(claim)

    def names(self) -> tuple[str, ...]:
        """Names of the deployments that stand, in order."""
        return tuple(sorted(self.standing))

    def assignments(self) -> Iterator[tuple[Standing, NodeAssignment]]:
        """Every replica that stands."""
        for name in self.names():
            standing = self.standing.get(name)
            if standing is None:
                continue
            # Sorted copies: a release under way removes replicas without holding the lock.
            for assignment in standing.assignments():
                yield standing, assignment

    def holdings(self, node_id: str) -> dict[str, Holding]:
        """Order name -> what stands on a node."""
        return {
            standing.orders.get(a.replica_index, ""): holding_of(standing.deployment.name, a)
            for standing, a in self.assignments()
            if a.node == node_id and a.gpus
        }

    def held(self) -> dict[str, HeldDeployment]:
        """What stands, by name, as plans and snapshots see it."""
        return {name: self.standing[name].held() for name in self.names()}

    def declared(self) -> list[Deployment]:
        """What stands, or is about to, by its declaration."""
        standing = [one.deployment for one in self.standing.values()]
        return standing + [claim.deployment for claim in self.claims]

    def tallies(self) -> dict[str, Tally]:
        """Node id -> what this service holds there, and is about to."""
        found: dict[str, Tally] = {}
        for standing, assignment in self.assignments():
            tally = found.setdefault(assignment.node, Tally())
            tally.gpus.update(assignment.gpus)
            tally.add(standing.deployment, held_replica(assignment).planned())
        for claim in self.claims:
            for replica in claim.replicas:
                tally = found.setdefault(replica.node_id, Tally())
                tally.claimed_gpus.update(set(replica.gpus) - tally.gpus)
                tally.add(claim.deployment, replica)
        return found


def holding_of(deployment: str, a: NodeAssignment) -> Holding:
    """An assignment as its node's actor knows it."""
    return Holding(deployment, tuple(a.gpus), round(a.share * WHOLE))


def held_replica(a: NodeAssignment) -> HeldReplica:
    """An assignment as plans and snapshots see it."""
    return HeldReplica(
        replica_index=a.replica_index,
        node=a.node,
        gpus=tuple(a.gpus),
        ranks=tuple(a.ranks) if a.gpus else (),
        share=round(a.share * WHOLE),
        profile=a.mig,
        cpu_milli=round(a.cpus_per_gpu * 1000) * len(a.gpus),
        memory_bytes=a.memory_bytes_per_gpu * len(a.gpus),
        egress_resource=a.egress_resource,
        egress_units=a.egress_units,
        set_size=a.set_size,
    )
