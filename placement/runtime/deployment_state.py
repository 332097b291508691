"""One deployment: its declaration, and its replicas.

A :class:`DeploymentState` never changes: a change is a new one, put in its place (see :mod:`placement.runtime.state`).
So reading needs no lock.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from placement.core.lifecycle import Event, State, after
from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.runtime.orders import Holding
from placement.runtime.results import NodeAssignment, PlacementResult
from placement.wire.deployment import Deployment
from placement.wire.held import HeldDeployment, HeldReplica

Owner = Mapping[str, str]
"""The owner of a deployment: ``kind`` is ``caller``, ``job`` or ``actor``; the other fields say which."""


@dataclass(frozen=True)
class Replica:
    """One replica that holds something.

    Attributes:
        order: the name that begins its group's name.
        parts: one for each of its nodes, by rank.
        generation: that of the declaration by which it was placed.
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
        """The id of its placement group, hex."""
        return str(self.parts[0].placement_group.id.hex())


@dataclass(frozen=True)
class DeploymentState:
    """One deployment: its declaration, and its replicas.

    Attributes:
        deployment: the current declaration.
        generation: how many different declarations it has had.
        earlier: generation -> declaration, for earlier declarations that placed replicas which are still there.
        replicas: index -> the replica that holds something.
        states: index -> the replica's state, for all that are declared or hold something.
        reasons: index -> why a replica waits.
        releasing: it is being released; this is carried out, whatever fails.
        declared_at: when it was first declared, seconds since 1970.
        waiting_since: since when replicas have waited for room; ``None`` if none waits.
        owner: with whom it ends; ``None`` for no owner.
        expires_at: when it ends unless it is renewed; ``None`` for never.
        given_up: waiting replicas are no longer tried: the deadline is over.
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
        """Whether its owner created its placement groups: lost replicas are then not placed again."""
        return self.owner is not None and self.owner.get("kind") == "caller"

    @property
    def ends_by_itself(self) -> bool:
        """Whether it has an owner, or a time, or waits with a deadline."""
        waits = self.waiting_since is not None and self.deployment.deadline_seconds is not None
        return self.owner is not None or self.expires_at is not None or waits

    @property
    def outdated(self) -> list[int]:
        """The replicas to be replaced: placed by an earlier declaration, and not satisfying the current one."""
        return sorted(i for i, one in self.replicas.items() if one.generation != self.generation)

    def missing(self) -> list[int]:
        """The replicas that are declared and hold nothing."""
        return [index for index in range(self.deployment.replicas) if index not in self.replicas]

    def unfinished(self) -> list[int]:
        """The replicas that are missing or to be replaced."""
        return sorted({*self.missing(), *self.outdated})

    def placed_under(self, replica: Replica) -> Deployment:
        """The declaration by which a replica was placed."""
        return self.earlier.get(replica.generation, self.deployment)

    def assignments(self) -> list[NodeAssignment]:
        """All of them, by replica and rank."""
        return [part for _, one in sorted(self.replicas.items()) for part in one.parts]

    def nodes(self) -> Counter[str]:
        """Node id -> number of replicas whose first part is there."""
        return Counter(one.parts[0].node for one in self.replicas.values())

    def result(self) -> PlacementResult:
        """The result for callers."""
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
        """The same in the form of plans and snapshots."""
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
        """The same with a new declaration."""
        if wanted == self.deployment:
            return self
        earlier = {**self.earlier, self.generation: self.deployment}
        states = dict.fromkeys(range(wanted.replicas), State.PENDING)
        states |= {i: state for i, state in self.states.items() if i in self.replicas or i in states}
        generation, shape = self.generation + 1, wanted.shape()
        alike = {
            g for g, one in earlier.items() if one.shape() == shape
        }  # replicas are not affected by these fields
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
        """The same, declared once more without a change: with this owner, its time starting again, nothing given up."""
        expires_at = expiry(self.deployment)
        if (self.owner, self.expires_at, self.given_up) == (owner, expires_at, False):
            return self
        since = None if self.given_up else self.waiting_since
        return replace(self, owner=owner, expires_at=expires_at, given_up=False, waiting_since=since)

    def kept(self, indices: Iterable[int]) -> DeploymentState:
        """The same with replicas that satisfy the current declaration counted as its own."""
        kept = {
            index: replace(self.replicas[index], generation=self.generation)
            for index in indices
            if index in self.replicas
        }
        reasons = {i: reason for i, reason in self.reasons.items() if i not in kept}
        return replace(self, replicas={**self.replicas, **kept}, reasons=reasons)._tidied()

    def with_replica(self, index: int, order: str, parts: Iterable[NodeAssignment]) -> DeploymentState:
        """The same with a newly reserved replica, which replaces the one with its index."""
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
        """The same after some replicas were given back; those that are declared are then missing."""
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
        """The same after a replica was lost with a node, or its placement group; its rest was given back."""
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
        """The same with exactly these replicas waiting, and why."""
        states = {
            index: State.PENDING if index in reasons and index not in self.replicas else state
            for index, state in self.states.items()
        }
        since = (self.waiting_since if self.waiting_since is not None else now) if reasons else None
        return replace(self, states=states, reasons=dict(sorted(reasons.items())), waiting_since=since)

    def _tidied(self) -> DeploymentState:
        """Without declarations that no replica has any more, and without ``waiting_since`` if nothing waits."""
        used = {one.generation for one in self.replicas.values()} - {self.generation}
        since = self.waiting_since if self.reasons else None
        if used == self.earlier.keys() and since == self.waiting_since:
            return self
        earlier = {g: one for g, one in self.earlier.items() if g in used}
        return replace(self, earlier=earlier, waiting_since=since)


def expiry(wanted: Deployment) -> float | None:
    """When a deployment that is declared now ends unless it is renewed, in seconds since 1970; ``None`` for never."""
    return None if wanted.ttl_seconds is None else time.time() + wanted.ttl_seconds


def holding_of(deployment: str, a: NodeAssignment) -> Holding:
    """An assignment in the form of its node's actor."""
    return Holding(deployment, {gpu: round(part * WHOLE) for gpu, part in a.taken.items()})


def held_replica(a: NodeAssignment, generation: int = 0) -> HeldReplica:
    """An assignment in the form of plans and snapshots; ``generation`` for one to be replaced."""
    # Several ranks may have shares of one GPU: it holds fewer GPUs than it has ranks.
    amounts = a.taken if a.shares or (a.share < 1 and len(a.gpus) > 1) else {}
    return HeldReplica.model_construct(
        replica_index=a.replica_index,
        node=a.node,
        gpus=tuple(amounts or a.gpus),
        ranks=tuple(a.ranks) if a.gpus else (),
        share=WHOLE if amounts else round(a.share * WHOLE),
        shares=tuple(round(part * WHOLE) for part in amounts.values()),
        profile=a.mig,
        cpu_milli=round(a.cpus * 1000) or round(a.cpus_per_gpu * 1000) * len(a.gpus),
        memory_bytes=a.memory_bytes or a.memory_bytes_per_gpu * len(a.gpus),
        egress_resource=a.egress_resource,
        egress_units=a.egress_units,
        set_size=a.set_size,
        generation=generation,
    )


def _after(index: int, state: State | None, *events: Event) -> State:
    for event in events:
        state = after(index, state, event)
    return State.RELEASING if state is None else state
