"""Simulates a workload: deployments arrive and leave, and the planner places them. No Ray, no clock.

A deployment that finds no place when it arrives is refused and does not arrive again (a loss system): queues
would hide what a policy costs.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from placement.core.limits import open_to
from placement.core.mix import Kind
from placement.core.needs import WHOLE
from placement.core.planner import advance, vacate
from placement.core.reconcile import Desired
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.roles import tell
from placement.core.routes import Located, Member, Roles, joined
from placement.core.snapshot import Snapshot
from placement.errors import Unplaceable


@dataclass(frozen=True)
class Arrival:
    """A deployment that arrives, and leaves after ``stays_seconds``; ``None`` means never.

    Attributes:
        roles: the group whose members arrive together; then ``others`` are the requests of the other members.
    """

    at_seconds: float
    request: Request
    stays_seconds: float | None = None
    roles: Roles | None = None
    others: tuple[Request, ...] = ()

    @property
    def requests(self) -> tuple[Request, ...]:
        """All that is asked for."""
        return self.request, *self.others


@dataclass(frozen=True)
class Moment:
    """The cluster at one time. GPUs are counted in parts where they are shared; MIG instances are not counted.

    Attributes:
        arrived_gpus: asked for so far, by all arrivals.
        asked_gpus: asked for by arrivals that would not have left yet.
        allocated_gpus: held.
        free_gpus: free, parts of GPUs included.
        fragmented_gpus: how many of these an average request of the arrived mix could not use:
            all free GPUs of a node that cannot hold it, else the parts that are too small for it. This is
            the measure of Weng et al., "Beware of Fragmentation", USENIX ATC 2023, section 3.
    """

    at_seconds: float
    arrived_gpus: float
    asked_gpus: float
    allocated_gpus: float
    free_gpus: float
    fragmented_gpus: float


@dataclass
class Report:
    """The result of a simulation.

    Attributes:
        gpus: of the cluster.
        moments: in order; not one for every event.
        placed, refused: how many deployments.
        reasons: the last reason of a refusal -> how many deployments it refused.
        bandwidth: for each replica with sets of two or more GPUs: its bandwidth divided by that of the best
            set on any node that it may go to, if that node were empty.
        routes: slowest route between two replicas of a group that talk -> how many groups had it.
    """

    gpus: int
    moments: list[Moment] = field(default_factory=list)
    placed: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    bandwidth: list[float] = field(default_factory=list)
    routes: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready values."""
        routes = {"routes": dict(self.routes.most_common())} if self.routes else {}
        return {
            **routes,
            "gpus": self.gpus,
            "placed": self.placed,
            "refused": self.refused,
            "refusals": dict(self.reasons.most_common()),
            "bandwidth_of_best_mean": fmean(self.bandwidth) if self.bandwidth else None,
            "bandwidth_of_best_worst": min(self.bandwidth, default=None),
            "moments": [vars(moment) for moment in self.moments],
        }


def simulate(
    snapshot: Snapshot,
    arrivals: Sequence[Arrival],
    moments: int = 200,
    progress: Callable[[int], None] = lambda arrived: None,
) -> Report:
    """Places what arrives, in order, and frees what leaves. At the same time, departures come before arrivals.

    Args:
        snapshot: the cluster at the beginning.
        arrivals: in any order.
        moments: how many are reported at most, evenly spread over the arrivals.
        progress: called now and then with the number of arrivals so far.
    """
    return _Simulation(snapshot, arrivals, moments).run(progress)


class _Simulation:
    def __init__(self, snapshot: Snapshot, arrivals: Sequence[Arrival], moments: int) -> None:
        self.snapshot = snapshot
        self.arrivals = sorted(arrivals, key=lambda arrival: arrival.at_seconds)
        self.every = max(1, -(-len(arrivals) // moments))
        self.report = Report(sum(node.whole_gpus for node in snapshot.nodes))
        self.arrived = self.asked = self.allocated = 0.0
        self.leaving: list[tuple[float, int, float, list[tuple[Request, tuple[PlannedReplica, ...]]]]] = []
        self.apart: Counter[tuple[str, str]] = Counter()
        self.hopeless: dict[Hashable, str] = {}
        self.best: dict[Hashable, int] = {}

    def run(self, progress: Callable[[int], None]) -> Report:
        for turn, arrival in enumerate(self.arrivals, start=1):
            while self.leaving and self.leaving[0][0] <= arrival.at_seconds:
                self.leave()
            self.arrive(turn, arrival)
            if turn % self.every == 0 or turn == len(self.arrivals):
                self.report.moments.append(self.moment(arrival.at_seconds))
                progress(turn)
        return self.report

    def arrive(self, turn: int, arrival: Arrival) -> None:
        amount = sum(gpus_asked(self.snapshot, request) for request in arrival.requests)
        self.arrived += amount
        self.asked += amount
        if arrival.roles is None:
            planned = [(arrival.request, self.place(self.kept_away(arrival.request)))]
        else:
            planned = self.place_group(arrival.roles, [*map(self.kept_away, arrival.requests)])
        if arrival.stays_seconds is not None:
            at = arrival.at_seconds + arrival.stays_seconds
            heapq.heappush(self.leaving, (at, turn, amount, planned))

    def kept_away(self, request: Request) -> Request:
        """The request, with the deployments that keep away from it."""
        if not self.apart:
            return request
        keep_away = (name for name, other in +self.apart if other == request.deployment)
        return replace(request, kept_away_by=tuple(keep_away))

    def place_group(
        self, roles: Roles, requests: Sequence[Request]
    ) -> list[tuple[Request, tuple[PlannedReplica, ...]]]:
        """The same for all members of a group."""
        alike = [(one.likeness, len(one.replicas)) for one in requests]
        key = None if any(one.likeness is None for one in requests) else (roles.name, *alike)
        if key is not None and key in self.hopeless:
            for one in requests:
                self.refuse(self.hopeless[key])
                self.snapshot = self.snapshot.changed((), self.snapshot.mix.plus(one))
            return [(one, ()) for one in requests]
        told = tell(self.snapshot, roles, {one.deployment: (Desired(one), {}) for one in requests})
        placed = [(one, self.place(told[one.deployment].request)) for one in requests]
        refused = told[requests[0].deployment].request.told
        if key is not None and refused is not None and refused.refusal is not None:
            self.hopeless[key] = _reason(refused.refusal)
        nodes = {node.id: node for node in self.snapshot.nodes}
        located: dict[Member, list[Located]] = {}
        for one, parts in placed:
            for part in parts:
                there = nodes[part.node_id], part.gpus
                located.setdefault((one.deployment, part.replica_index), []).append(there)
        routes = [one.route for one in joined(roles, self.snapshot.near, located)]
        if routes:
            self.report.routes[str(max(routes))] += 1
        return placed

    def place(self, request: Request) -> tuple[PlannedReplica, ...]:
        """What it holds from now on; empty if it is refused."""
        alike = request.likeness
        key = None if alike is None else (alike, len(request.replicas))
        # Between two departures room only shrinks, so a refused request stays refused.
        if key is not None and key in self.hopeless:
            self.refuse(self.hopeless[key])
            self.snapshot = self.snapshot.changed((), self.snapshot.mix.plus(request))
            return ()
        step, self.snapshot = advance(self.snapshot, request)
        if isinstance(step.outcome, Unplaceable):
            reason = _reason(step.outcome)
            if key is not None:
                self.hopeless[key] = reason
            self.refuse(reason)
            return ()
        self.report.placed += 1
        self.apart.update((request.deployment, other) for other in request.apart_from)
        self.measure(step.request, step.outcome)
        for replica in step.outcome.replicas:
            self.allocated += _gpus(replica)
        return step.outcome.replicas

    def refuse(self, reason: str) -> None:
        self.report.refused += 1
        self.report.reasons[reason] += 1

    def leave(self) -> None:
        _, _, amount, several = heapq.heappop(self.leaving)
        self.asked -= amount
        for request, replicas in several:
            if not replicas:
                continue
            self.hopeless.clear()
            self.snapshot = vacate(self.snapshot, replicas, request.deployment, request.calls)
            self.apart.subtract((request.deployment, other) for other in request.apart_from)
            for replica in replicas:
                self.allocated -= _gpus(replica)

    def measure(self, request: Request, plan: Plan) -> None:
        """Records which part of the best possible bandwidth each replica has."""
        size = request.needs.gpus
        if size < 2:
            return
        kind = Kind.of(request)
        if kind not in self.best:
            allowed = open_to(self.snapshot, kind)
            nodes = (node for i, node in enumerate(self.snapshot.nodes) if allowed >> i & 1)
            shapes = {node.shape: len(node.topology) for node in nodes}
            sets = (
                (shape, shape.best((1 << gpus) - 1, size, request.needs.within))
                for shape, gpus in shapes.items()
            )
            self.best[kind] = max((shape.mb_per_s(gpus) for shape, gpus in sets if gpus), default=0)
        reached: dict[int, int] = {}
        for replica in plan.replicas:
            shape, gpus = self.snapshot.node(replica.node_id).shape, replica.gpus
            for i in range(0, len(gpus), size):
                speed = shape.mb_per_s(gpus[i : i + size])
                reached[replica.replica_index] = min(speed, reached.get(replica.replica_index, speed))
        if self.best[kind]:
            self.report.bandwidth += [speed / self.best[kind] for speed in reached.values()]

    def moment(self, at_seconds: float) -> Moment:
        free, fragmented = fragmentation(self.snapshot)
        return Moment(at_seconds, self.arrived, self.asked, max(self.allocated, 0.0), free, fragmented)


def gpus_asked(snapshot: Snapshot, request: Request) -> float:
    """GPUs that a request asks for, parts of GPUs as parts; none for MIG instances and remote replicas."""
    needs = request.needs
    if request.provider is not None or needs.profile:
        return 0.0
    share = needs.share
    if needs.memory_bytes:
        share = needs.least_share({node.gpu_memory_bytes for node in snapshot.nodes})
    return (
        len(request.replicas)
        * request.stages
        * request.parts
        * (sum(needs.amounts) or needs.gpus * share)
        / WHOLE
    )


def fragmentation(snapshot: Snapshot) -> tuple[float, float]:
    """Free GPUs, and how many of them an average request of the snapshot's mix could not use.

    Requests for MIG instances are not counted; floors on distance are ignored.
    """
    nodes = snapshot.nodes
    widest = max((len(node.topology) for node in nodes), default=0)
    rests = np.zeros((len(nodes), widest))
    for row, node in enumerate(nodes):
        if node.problem is None:
            rests[row, list(node.free)] = WHOLE
            rests[row, list(node.rests)] = list(node.rests.values())
    free = rests.sum(axis=1)
    cpu = np.array([node.cpu_milli for node in nodes])
    memory = np.array([node.memory_bytes for node in nodes])
    kinds = {kind: asked for kind, asked in snapshot.mix.kinds.items() if not kind.needs.profile}
    total = sum(asked.sets for asked in kinds.values())
    lost = 0.0
    for kind, asked in kinds.items():
        allowed = open_to(snapshot, kind)
        needs = kind.needs
        shares = (
            [needs.share_of(node.gpu_memory_bytes) or WHOLE + 1 for node in nodes]
            if needs.memory_bytes
            else None
        )
        least = np.array(shares)[:, None] if shares else needs.share
        usable = np.where(rests >= least, rests, 0)
        fits = (usable > 0).sum(axis=1) >= needs.gpus
        fits &= (cpu >= asked.cpu_milli / asked.sets) & (memory >= asked.memory_bytes / asked.sets)
        fits &= np.array([bool(allowed >> row & 1) for row in range(len(nodes))])
        lost += asked.sets * float((free - np.where(fits, usable.sum(axis=1), 0)).sum())
    return float(free.sum()) / WHOLE, lost / total / WHOLE if total else 0.0


def _reason(refusal: Unplaceable) -> str:
    """The last reason that left no node."""
    return list(refusal.excluded)[-1] if refusal.excluded else refusal.summary


def _gpus(replica: PlannedReplica) -> float:
    return 0.0 if replica.profile else sum(replica.taken.values()) / WHOLE
