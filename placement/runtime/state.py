"""What is declared and what is there: the service's only memory.

Of each deployment there is one :class:`DeploymentState`, which never changes: a change is a new one, put in its place.
So who reads needs no lock. Claims, what is put in, and the index by node are guarded by :attr:`ServiceState.lock`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from placement.core.lifecycle import Event, State, after
from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.runtime import groups, ledger
from placement.runtime.orders import Holding
from placement.runtime.results import NodeAssignment, PlacementResult
from placement.wire.deployment import Deployment
from placement.wire.held import HeldDeployment, HeldReplica

RECORDED = (
    "replica_index", "node", "node_name", "gpus", "bundle_indices", "ranks", "share", "mig", "cpus_per_gpu",
    "memory_bytes_per_gpu", "ray_gpus", "bandwidth_gb_per_s", "sorted_bandwidth_gb_per_s",
    "upper_bandwidth_gb_per_s", "ray_upper_bandwidth_gb_per_s",
    "weakest_link", "ray_bandwidth_gb_per_s", "ray_weakest_link", "egress_resource", "egress_units", "cpus",
    "memory_bytes", "set_size", "affinities", "bandwidth_measured",
)  # fmt: skip

Owner = Mapping[str, str]
"""Whose end ends a deployment: ``kind`` is ``caller``, ``job`` or ``actor``; the rest says which."""


@dataclass(frozen=True)
class Replica:
    """One replica that is there.

    Attributes:
        order: the name that begins its group's name.
        parts: one for each of its nodes, by rank.
        generation: that of the declaration it was placed under.
    """

    order: str
    parts: tuple[NodeAssignment, ...]
    generation: int = 1

    def planned(self) -> tuple[PlannedReplica, ...]:
        """Its parts in the planner's terms."""
        return tuple(held_replica(part).planned() for part in self.parts)

    @property
    def nodes(self) -> frozenset[str]:
        """The ids of its nodes."""
        return frozenset(part.node for part in self.parts)

    @property
    def group_id(self) -> str:
        """Of its placement group, hex."""
        return str(self.parts[0].placement_group.id.hex())


@dataclass(frozen=True)
class DeploymentState:
    """One deployment: what is declared of it, and what is there.

    Attributes:
        deployment: as it is declared now.
        generation: how often it was declared with a difference.
        earlier: generation -> declaration, of those under which replicas were placed that are still there.
        replicas: index -> what is there.
        states: index -> where a replica is in its life, of all that are declared or there.
        reasons: index -> why a replica waits.
        releasing: all of it is to go, whatever happens.
        declared_at: when it was first declared, seconds since 1970.
        waiting_since: since when replicas of it have waited for room; ``None`` if none does.
        owner: whose end ends it; ``None`` for nobody's.
        expires_at: when it ends unless it is renewed; ``None`` for never.
        given_up: what waits is not tried any more: its deadline is over.
    """

    deployment: Deployment
    generation: int = 1
    earlier: Mapping[int, Deployment] = field(default_factory=dict)
    replicas: Mapping[int, Replica] = field(default_factory=dict)
    states: Mapping[int, State] = field(default_factory=dict)
    reasons: Mapping[int, str] = field(default_factory=dict)
    releasing: bool = False
    declared_at: float = field(default_factory=time.time)
    waiting_since: float | None = None
    owner: Owner | None = None
    expires_at: float | None = None
    given_up: bool = False

    @property
    def name(self) -> str:
        """The deployment's name."""
        return self.deployment.name

    @property
    def is_lease(self) -> bool:
        """Whether its groups are its owner's own: what is gone of it is not placed anew."""
        return self.owner is not None and self.owner.get("kind") == "caller"

    @property
    def ends_by_itself(self) -> bool:
        """Whether it has an owner, or a time, or waits with a deadline."""
        waits = self.waiting_since is not None and self.deployment.deadline_seconds is not None
        return self.owner is not None or self.expires_at is not None or waits

    @property
    def outdated(self) -> list[int]:
        """The replicas that are to be replaced: placed under an earlier declaration, which they do not satisfy now."""
        return sorted(i for i, one in self.replicas.items() if one.generation != self.generation)

    def missing(self) -> list[int]:
        """The replicas that are declared and hold nothing."""
        return [index for index in range(self.deployment.replicas) if index not in self.replicas]

    def unfinished(self) -> list[int]:
        """The replicas that are missing or to be replaced."""
        return sorted({*self.missing(), *self.outdated})

    def placed_under(self, replica: Replica) -> Deployment:
        """The declaration under which a replica was placed."""
        return self.earlier.get(replica.generation, self.deployment)

    def assignments(self) -> list[NodeAssignment]:
        """All of them, by replica and rank."""
        return [part for _, one in sorted(self.replicas.items()) for part in one.parts]

    def nodes(self) -> Counter[str]:
        """Node id -> replicas that begin there."""
        return Counter(one.parts[0].node for one in self.replicas.values())

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
        held = []
        for _, one in sorted(self.replicas.items()):
            generation = 0 if one.generation == self.generation else one.generation
            held += [held_replica(part, generation) for part in one.parts]
        return HeldDeployment.model_construct(
            deployment=self.deployment,
            replicas=tuple(held),
            releasing=self.releasing,
            earlier=dict(self.earlier),
        )

    # -- changes: each is a new state ----------------------------------------------------------------

    def declared(self, wanted: Deployment) -> DeploymentState:
        """The same, declared anew."""
        if wanted == self.deployment:
            return self
        earlier = {**self.earlier, self.generation: self.deployment}
        states = dict.fromkeys(range(wanted.replicas), State.PENDING)
        states |= {i: state for i, state in self.states.items() if i in self.replicas or i in states}
        generation, shape = self.generation + 1, wanted.shape()
        alike = {
            g for g, one in earlier.items() if one.shape() == shape
        }  # replicas of these are not concerned
        replicas = {
            index: replace(one, generation=generation) if one.generation in alike else one
            for index, one in self.replicas.items()
        }
        waits = {i for i in states if i not in replicas or replicas[i].generation != generation}
        return replace(
            self,
            deployment=wanted,
            generation=generation,
            replicas=replicas,
            earlier=earlier,
            states=states,
            reasons={i: reason for i, reason in self.reasons.items() if i in waits},
            expires_at=expiry(wanted),
            given_up=False,
            waiting_since=None if self.given_up else self.waiting_since,
        )._tidied()

    def renewed(self, owner: Owner | None) -> DeploymentState:
        """The same, asked for once more: by this owner, with all its time before it, and nothing given up."""
        expires_at = expiry(self.deployment)
        if (self.owner, self.expires_at, self.given_up) == (owner, expires_at, False):
            return self
        since = None if self.given_up else self.waiting_since
        return replace(self, owner=owner, expires_at=expires_at, given_up=False, waiting_since=since)

    def kept(self, indices: Iterable[int]) -> DeploymentState:
        """The same with replicas that satisfy the present declaration counted as its own."""
        kept = {
            index: replace(self.replicas[index], generation=self.generation)
            for index in indices
            if index in self.replicas
        }
        reasons = {i: reason for i, reason in self.reasons.items() if i not in kept}
        return replace(self, replicas={**self.replicas, **kept}, reasons=reasons)._tidied()

    def with_replica(self, index: int, order: str, parts: Iterable[NodeAssignment]) -> DeploymentState:
        """The same with a replica that was just reserved, in the place of what had its index."""
        one = Replica(order, tuple(sorted(parts, key=lambda a: a.ranks)), self.generation)
        before = None if index in self.replicas else self.states.get(index)
        reasons = {i: reason for i, reason in self.reasons.items() if i != index}
        return replace(
            self,
            replicas={**self.replicas, index: one},
            states={**self.states, index: _after(index, before, Event.RESERVE, Event.RESERVED)},
            reasons=reasons,
        )._tidied()

    def without(self, indices: Collection[int]) -> DeploymentState:
        """The same once what some replicas held was given back; those that are declared are missing then."""
        states = {}
        for index, state in self.states.items():
            if index not in indices:
                states[index] = state
                continue
            if state is not State.RELEASING:
                state = _after(index, state, Event.RELEASE)
            _after(index, state, Event.RELEASED)
            if index < self.deployment.replicas and not self.releasing:
                states[index] = State.PENDING
        return self._only(states, indices)

    def lost(self, index: int, partly: bool, reason: str) -> DeploymentState:
        """The same once a replica was lost with a node, or its group: the rest of it was given back."""
        events = (Event.PART_LOST, Event.LOST) if partly else (Event.LOST,)
        states = {**self.states, index: _after(index, self.states.get(index), *events)}
        if index >= self.deployment.replicas:
            del states[index]
            return self._only(states, (index,))
        since = None if self.is_lease else self.waiting_since or time.time()
        later = self._only(states, (index,))
        return replace(later, reasons={**later.reasons, index: reason}, waiting_since=since)

    def _only(self, states: Mapping[int, State], gone: Collection[int]) -> DeploymentState:
        return replace(
            self,
            replicas={index: one for index, one in self.replicas.items() if index not in gone},
            states=states,
            reasons={index: reason for index, reason in self.reasons.items() if index in states},
        )._tidied()

    def pending(self, reasons: Mapping[int, str], now: float) -> DeploymentState:
        """The same with replicas that wait, and why; no others do."""
        states = {
            index: State.PENDING if index in reasons and index not in self.replicas else state
            for index, state in self.states.items()
        }
        since = (self.waiting_since if self.waiting_since is not None else now) if reasons else None
        return replace(self, states=states, reasons=dict(sorted(reasons.items())), waiting_since=since)

    def _tidied(self) -> DeploymentState:
        """Without the declarations that no replica is of any more; it waits since never if nothing of it waits."""
        used = {one.generation for one in self.replicas.values()} - {self.generation}
        since = self.waiting_since if self.reasons else None
        if used == self.earlier.keys() and since == self.waiting_since:
            return self
        earlier = {g: one for g, one in self.earlier.items() if g in used}
        return replace(self, earlier=earlier, waiting_since=since)

    # -- in the ledger -------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes this deployment to the ledger."""
        ledger.save(self.name, self.to_record())

    def to_record(self) -> dict[str, Any]:
        """What the ledger keeps, JSON-ready. Of API keys it has references only."""
        replicas = [
            {
                "order": one.order,
                "group": part.placement_group.id.hex(),
                "generation": one.generation,
                **{name: getattr(part, name) for name in RECORDED},
            }
            for _, one in sorted(self.replicas.items())
            for part in one.parts
        ]
        return {
            **_declaration(self.deployment),
            "generation": self.generation,
            "earlier": {str(generation): _declaration(one) for generation, one in self.earlier.items()},
            "replicas": replicas,
            "releasing": self.releasing,
            "declared_at": self.declared_at,
            "waiting_since": self.waiting_since,
            "owner": None if self.owner is None else dict(self.owner),
            "expires_at": self.expires_at,
            "given_up": self.given_up,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DeploymentState:
        """Reads a record of the ledger, of this version or an earlier one."""
        deployment = Deployment.recorded(record["deployment"], record.get("runtime"))
        generation = record.get("generation", 1)
        earlier = {
            int(number): Deployment.recorded(one["deployment"], one.get("runtime"))
            for number, one in record.get("earlier", {}).items()
        }
        parts: dict[int, list[NodeAssignment]] = {}
        orders: dict[int, tuple[str, int]] = {}
        for replica in record["replicas"]:
            assignment = NodeAssignment(
                placement_group=groups.group_from_hex(replica["group"]),
                **{name: replica[name] for name in RECORDED if name in replica},
            )
            parts.setdefault(assignment.replica_index, []).append(assignment)
            orders[assignment.replica_index] = replica["order"], replica.get("generation", generation)
        found = {
            index: Replica(order, tuple(sorted(parts[index], key=lambda a: a.ranks)), of)
            for index, (order, of) in orders.items()
        }
        state = cls(
            deployment,
            generation,
            earlier,
            found,
            {
                **dict.fromkeys(range(deployment.replicas), State.PENDING),
                **dict.fromkeys(found, State.PLACED),
            },
            releasing=record.get("releasing", False),
            declared_at=record.get("declared_at") or time.time(),
            waiting_since=record.get("waiting_since"),
            owner=record.get("owner"),
            expires_at=record.get("expires_at"),
            given_up=record.get("given_up", False),
        )
        why = dict.fromkeys(state.unfinished(), "not tried since the service restarted")
        return replace(state, reasons=why) if state.is_lease else state.pending(why, time.time())


def expiry(wanted: Deployment) -> float | None:
    """When a deployment ends, if it is declared now and nobody renews it, in seconds since 1970; ``None`` for never."""
    return None if wanted.ttl_seconds is None else time.time() + wanted.ttl_seconds


def _declaration(one: Deployment) -> dict[str, Any]:
    declared = one.model_dump(mode="json", exclude_none=True, exclude_defaults=False)
    return {"deployment": declared, "runtime": one.runtime_name}


def _after(index: int, state: State | None, *events: Event) -> State:
    for event in events:
        state = after(index, state, event)
    return State.RELEASING if state is None else state


@dataclass(frozen=True, eq=False)
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
        """Counts one replica, but for its whole GPUs."""
        self.deployments[deployment.name] += 1
        for gpu in replica.gpus:
            self.holders.setdefault(gpu, []).append(deployment.name)
        self.cpu_milli += replica.cpu_milli
        self.memory_bytes += replica.memory_bytes
        if replica.share < WHOLE:
            self.shares[replica.gpus[0]] += replica.share
        if replica.egress_resource is not None:
            self.egress[replica.egress_resource] += replica.egress_units
            self.serving[deployment.provider or "", deployment.key_fingerprint or ""] += 1


class ServiceState:
    """All deployments, open claims, and which node holds what.

    Args:
        changed: called under the lock with the nodes of which something was taken, given back or claimed.

    Attributes:
        lock: guards claims, what is put in or dropped, and planning, so that two plans never use the same room.
        deployments: name -> state; read it without the lock, put in by :meth:`put`.
        unreadable: name -> record of the ledger that this version cannot read.
        queue_version: grows with each change of something that waits.
    """

    def __init__(self, changed: Callable[[Iterable[str]], None] = lambda nodes: None) -> None:
        self.lock = threading.RLock()
        self.deployments: dict[str, DeploymentState] = {}
        self.unreadable: dict[str, ledger.Record] = {}
        self.claims: list[Claim] = []
        self._changed = changed
        self._by_node: dict[str, dict[tuple[str, int], list[NodeAssignment]]] = {}
        self._claims_on: dict[str, list[tuple[Claim, PlannedReplica]]] = {}
        self._keeping_apart: dict[str, list[Deployment]] = {}
        self._queue: set[str] = set()
        self.queue_version = 0
        self._temporary: set[str] = set()

    def put(self, state: DeploymentState) -> None:
        """Has this be what is known of its deployment."""
        with self.lock:
            self._unindex(state.name)
            self.deployments[state.name] = state
            # What is to be replaced stays under its own declaration until it is.
            declared = (state.deployment, *state.earlier.values())
            if apart := [one for one in declared if one.constraints and one.constraints.apart_from]:
                self._keeping_apart[state.name] = apart
            if state.releasing or (state.unfinished() and not state.given_up and not state.is_lease):
                self._queue.add(state.name)
                self.queue_version += 1
            if state.ends_by_itself:
                self._temporary.add(state.name)
            for index, one in state.replicas.items():
                for part in one.parts:
                    on_node = self._by_node.setdefault(part.node, {})
                    on_node.setdefault((state.name, index), []).append(part)
            self._changed({part.node for part in state.assignments()})

    def drop(self, name: str) -> None:
        """Forgets a deployment."""
        with self.lock:
            self._unindex(name)
            self.deployments.pop(name, None)

    def _unindex(self, name: str) -> None:
        self._keeping_apart.pop(name, None)
        if name in self._queue:
            self._queue.discard(name)
            self.queue_version += 1
        self._temporary.discard(name)
        known = self.deployments.get(name)
        if known is None:
            return
        for index, one in known.replicas.items():
            for part in one.parts:
                on_node = self._by_node[part.node]
                on_node.pop((name, index), None)
                if not on_node:
                    del self._by_node[part.node]
        self._changed({part.node for part in known.assignments()})

    def claim(self, claim: Claim) -> Claim:
        """Opens a claim."""
        with self.lock:
            self.claims.append(claim)
            for replica in claim.replicas:
                self._claims_on.setdefault(replica.node_id, []).append((claim, replica))
            self._changed({replica.node_id for replica in claim.replicas})
        return claim

    def close(self, claims: Iterable[Claim]) -> None:
        """Closes claims: what they were for is in a state now, or was given back."""
        with self.lock:
            for claim in claims:
                self.claims.remove(claim)
                for node in {replica.node_id for replica in claim.replicas}:
                    left = [one for one in self._claims_on[node] if one[0] is not claim]
                    if left:
                        self._claims_on[node] = left
                    else:
                        del self._claims_on[node]
                self._changed({replica.node_id for replica in claim.replicas})

    def get(self, name: str) -> DeploymentState | None:
        """What is known of a deployment."""
        return self.deployments.get(name)

    def names(self) -> tuple[str, ...]:
        """The names of all deployments, in order."""
        return tuple(sorted(self.deployments.copy()))

    def all(self) -> list[DeploymentState]:
        """All deployments, by name."""
        return [one for _, one in sorted(self.deployments.copy().items())]

    def assignments(self) -> Iterator[tuple[DeploymentState, NodeAssignment]]:
        """Every replica that is there."""
        for one in self.all():
            for assignment in one.assignments():
                yield one, assignment

    def holdings(self, node_id: str) -> dict[str, Holding]:
        """Order name -> what is held on a node."""
        found = {}
        with self.lock:
            for (name, index), parts in self._by_node.get(node_id, {}).items():
                order = self.deployments[name].replicas[index].order
                for part in parts:
                    if part.gpus:
                        found[order] = holding_of(name, part)
        return found

    def holds(self, node_id: str) -> bool:
        """Whether anything is held on a node."""
        return node_id in self._by_node

    def on_node(self, node_id: str) -> list[tuple[str, NodeAssignment]]:
        """What is held on a node, with the deployment that holds it."""
        with self.lock:
            return [
                (name, part) for (name, _), parts in self._by_node.get(node_id, {}).items() for part in parts
            ]

    def nodes(self) -> frozenset[str]:
        """The nodes on which anything is held."""
        return frozenset(self._by_node.copy())

    def queue(self) -> list[str]:
        """Names of what waits for room, or to be released; who waits longest comes first."""
        waiting = [one for name in self._queue.copy() if (one := self.deployments.get(name))]
        return [one.name for one in sorted(waiting, key=lambda one: (one.waiting_since or 0.0, one.name))]

    def temporary(self) -> list[DeploymentState]:
        """What may end, or be given up, by itself."""
        return [one for name in sorted(self._temporary.copy()) if (one := self.deployments.get(name))]

    def held(self) -> dict[str, HeldDeployment]:
        """What is there, by name, as plans and snapshots see it."""
        return {one.name: one.held() for one in self.all()}

    def keeping_apart(self, name: str) -> list[Deployment]:
        """What is declared, or about to be, that asks to be apart from a deployment."""
        with self.lock:
            declared = [one for several in self._keeping_apart.values() for one in several]
            declared += [claim.deployment for claim in self.claims]
        return [
            one
            for one in declared
            if one.constraints is not None and name in one.constraints.apart_from and one.name != name
        ]

    def tally(self, node_id: str) -> Tally:
        """What this service holds on a node, and is about to. Under the lock."""
        tally = Tally()
        for (name, index), parts in self._by_node.get(node_id, {}).items():
            state = self.deployments[name]
            deployment = state.placed_under(state.replicas[index])
            for part in parts:
                tally.gpus.update(part.gpus)
                tally.add(deployment, held_replica(part).planned())
        for claim, replica in self._claims_on.get(node_id, ()):
            tally.claimed_gpus.update(set(replica.gpus) - tally.gpus)
            tally.add(claim.deployment, replica)
        return tally


def holding_of(deployment: str, a: NodeAssignment) -> Holding:
    """An assignment as its node's actor knows it."""
    return Holding(deployment, tuple(a.gpus), round(a.share * WHOLE))


def held_replica(a: NodeAssignment, generation: int = 0) -> HeldReplica:
    """An assignment as plans and snapshots see it; ``generation`` of one that is to be replaced."""
    return HeldReplica.model_construct(
        replica_index=a.replica_index,
        node=a.node,
        gpus=tuple(a.gpus),
        ranks=tuple(a.ranks) if a.gpus else (),
        share=round(a.share * WHOLE),
        profile=a.mig,
        cpu_milli=round(a.cpus * 1000) or round(a.cpus_per_gpu * 1000) * len(a.gpus),
        memory_bytes=a.memory_bytes or a.memory_bytes_per_gpu * len(a.gpus),
        egress_resource=a.egress_resource,
        egress_units=a.egress_units,
        set_size=a.set_size,
        generation=generation,
    )
