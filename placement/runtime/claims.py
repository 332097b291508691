"""What is about to be reserved, and the sum of claims and holdings on a node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.wire.deployment import Deployment


@dataclass(frozen=True, eq=False)
class Claim:
    """Replicas that are about to be reserved, so that no other plan uses the same room.

    ``set_size``: GPUs of each set, for replicas of several sets.
    """

    deployment: Deployment
    replicas: tuple[PlannedReplica, ...]
    set_size: int = 0


@dataclass
class Tally:
    """What this service holds and claims on one node.

    Attributes:
        gpus, claimed_gpus: whole GPUs (and MIG instances) of placed replicas, and of those about to be
            reserved; a GPU of which a share is held is in ``gpus``.
        shares: GPU -> thousandths in use by both, of GPUs that are shared.
        egress: resource -> units of both.
        serving: (provider, key fingerprint) -> replicas of both.
        deployments: name -> replicas of both.
        holders: GPU -> deployments of both that have all or some of it, one for each replica.
        cpu_milli, memory_bytes: CPUs (thousandths) and memory of both.
    """

    gpus: set[int] = field(default_factory=set)
    claimed_gpus: set[int] = field(default_factory=set)
    shares: Counter[int] = field(default_factory=Counter)
    egress: Counter[str] = field(default_factory=Counter)
    serving: Counter[tuple[str, str]] = field(default_factory=Counter)
    deployments: Counter[str] = field(default_factory=Counter)
    holders: dict[int, list[str]] = field(default_factory=dict)
    cpu_milli: int = 0
    memory_bytes: int = 0

    def add(self, deployment: Deployment, replica: PlannedReplica) -> None:
        """Counts one replica, except its whole GPUs."""
        self.deployments[deployment.name] += 1
        for gpu in replica.gpus:
            self.holders.setdefault(gpu, []).append(deployment.name)
        self.cpu_milli += replica.cpu_milli
        self.memory_bytes += replica.memory_bytes
        for gpu, share in replica.taken.items():
            if share < WHOLE:
                self.shares[gpu] += share
        if replica.egress_resource is not None:
            self.egress[replica.egress_resource] += replica.egress_units
            self.serving[deployment.provider or "", deployment.key_fingerprint or ""] += 1
