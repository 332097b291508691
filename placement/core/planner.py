"""Which nodes a deployment's replicas go to: ``plan(snapshot, request) -> Plan | Unplaceable``.

Rules, in order:

1. A replica's GPUs lie on one node; a remote replica's capacity lies on one egress node.
2. All replicas are placed, or none.
3. A node is left out that has no set of GPUs as close together, or as fast, as the request demands.
4. A GPU replica goes where the best set on offer is fastest; among equals, to the node with the fewest
   replicas of the same deployment, then to the one where others lose least by it (large sets stay whole),
   then to the one with the fewest free GPUs. A share of a GPU goes on one that is shared already, where
   it leaves the least. (:class:`~placement.core.snapshot.Policy` has other orders to choose from.)
5. A remote replica goes to the node with the fewest replicas of the same deployment; among equals, to
   nodes named in ``egress_preference``, then to nodes that already serve the same (provider, API key) so
   that they can share a rate limiter, then to the one with the most capacity left.
6. The last key is the node's name and id: the same input gives the same plan, to the letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from placement.core.explanation import limits, refuse, short_of
from placement.core.request import Request
from placement.core.score import WHOLE, score
from placement.core.snapshot import Bits, Node, Snapshot, Take, rank_of
from placement.errors import Unplaceable


@dataclass(frozen=True)
class PlannedReplica:
    """One replica's node and what it takes there: GPUs, or egress units.

    Attributes:
        share: thousandths of each GPU.
        profile: that of the MIG instance which ``gpus`` is; empty for a GPU.
        cpu_milli, memory_bytes: CPUs (thousandths) and memory that it takes as well.
    """

    replica_index: int
    node_id: str
    gpus: tuple[int, ...] = ()
    share: int = WHOLE
    profile: str = ""
    cpu_milli: int = 0
    memory_bytes: int = 0
    egress_resource: str | None = None
    egress_units: int = 0


@dataclass(frozen=True)
class Plan:
    """A decision. Nothing is reserved by it."""

    deployment: str
    replicas: tuple[PlannedReplica, ...]


@dataclass(frozen=True)
class Change:
    """A deployment to be brought about.

    Attributes:
        request: what is missing.
        leaving: what it holds already and gives up.
        in_place: whether the new may take the room of what leaves, if there is none beside it.
    """

    request: Request
    leaving: tuple[PlannedReplica, ...] = ()
    in_place: bool = False


def plan(snapshot: Snapshot, request: Request) -> Plan | Unplaceable:
    """Chooses a node for each replica of ``request``.

    Returns:
        The plan, or why there is none. Nothing is raised: both are answers.
    """
    return _plan(snapshot, request)[0].outcome


@dataclass(frozen=True)
class Step:
    """What became of one change.

    Attributes:
        request: what was asked; for a refusal with what had been planned until then as standing.
        outcome: its plan, or why there is none.
        seen: the cluster as its first replica found it; as the refused replica found it, if one was.
    """

    request: Request
    outcome: Plan | Unplaceable
    seen: Snapshot


def steps(snapshot: Snapshot, changes: Iterable[Change]) -> Iterator[Step]:
    """Plans several deployments, each on top of the ones before. Ends after the first refusal."""
    for change in changes:
        step, later = _plan(snapshot, change.request)
        if isinstance(step.outcome, Plan):
            snapshot = vacate(later, change.leaving)
        elif change.in_place:
            step, snapshot = _plan(vacate(snapshot, change.leaving), change.request)
        yield step
        if isinstance(step.outcome, Unplaceable):
            return


def vacate(snapshot: Snapshot, replicas: Sequence[PlannedReplica]) -> Snapshot:
    """The snapshot as it is once these replicas have gone. Nodes that are no more are passed over."""
    changed: dict[str, Node] = {}
    for replica in replicas:
        if not snapshot.bit(replica.node_id):
            continue
        node = changed.get(replica.node_id) or snapshot.node(replica.node_id)
        if replica.egress_resource is None:
            node = node.before(replica.gpus, replica.share, replica.profile)
            if replica.cpu_milli or replica.memory_bytes:
                node = replace(
                    node,
                    cpu_milli=node.cpu_milli + replica.cpu_milli,
                    memory_bytes=node.memory_bytes + replica.memory_bytes,
                )
        elif replica.egress_resource in node.egress:
            left = node.egress[replica.egress_resource] + replica.egress_units
            node = replace(node, egress={**node.egress, replica.egress_resource: left})
        changed[replica.node_id] = node
    return snapshot.changed(changed.values()) if changed else snapshot


Placed = tuple[list[PlannedReplica], dict[Bits, Node]]
"""Replicas that found a place, and the nodes as they are then."""


def _plan(snapshot: Snapshot, request: Request) -> tuple[Step, Snapshot]:
    """What becomes of a request, and the snapshot as it is once the plan has been carried out."""
    place = _place_local if request.provider is None else _place_remote
    planned, changed = place(snapshot, request)
    later = snapshot.changed(changed.values()) if changed else snapshot
    if len(planned) == len(request.replicas):
        return Step(request, Plan(request.deployment, tuple(planned)), snapshot), later
    standing = Counter(request.standing) + Counter(replica.node_id for replica in planned)
    refused = replace(request, standing=standing)
    return Step(refused, refuse(later, refused, request.replicas[len(planned)]), later), later


def _place_local(snapshot: Snapshot, request: Request) -> Placed:
    """Places as many replicas as there is room for."""
    needs, policy = request.needs, request.policy
    offers = snapshot.offers(needs, policy).copy()
    allowed = _allowed(snapshot, request)
    crowd = _Crowd(snapshot, request, allowed)
    short = short_of(request)
    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    shared: dict[Bits, tuple[int, ...]] = {}
    for index in request.replicas:
        bit = offers.best(crowd.preference())
        if not bit:
            break
        node = changed.get(bit) or snapshot.at(bit)
        taken = node.take(needs, shared.get(bit, ()))
        assert taken is not None
        planned.append(_planned(index, node, taken, request))
        changed[bit] = after = _after(node, taken, request)
        offers.move(bit, rank_of(node, needs, policy), rank_of(after, needs, policy))
        crowd.add(bit)
        shared[bit] = (*shared.get(bit, ()), *taken.gpus)
        if short and short(after):
            crowd.close(bit)
    if len(planned) < len(request.replicas) and needs.floor:
        return _pack(snapshot, request, allowed) or (planned, changed)
    return planned, changed


def _allowed(snapshot: Snapshot, request: Request) -> Bits:
    """The nodes that nothing but a lack of free GPUs excludes."""
    allowed = snapshot.usable
    if request.gpu_nodes is not None:
        allowed &= snapshot.named(request.gpu_nodes)
    objections = [objection for _, objection in limits(request)]
    if short := short_of(request):
        objections.append(short)
    if objections:
        allowed &= snapshot.select(
            node for node in snapshot.nodes if not any(objection(node) for objection in objections)
        )
    return allowed


def _planned(index: int, node: Node, taken: Take, request: Request) -> PlannedReplica:
    return PlannedReplica(
        index,
        node.id,
        taken.gpus,
        taken.share,
        request.needs.profile,
        request.cpu_milli,
        request.memory_bytes,
    )


def _after(node: Node, taken: Take, request: Request) -> Node:
    """The node once a replica has taken its GPUs, its CPUs and its memory there."""
    return replace(
        node.after(taken),
        cpu_milli=node.cpu_milli - request.cpu_milli,
        memory_bytes=node.memory_bytes - request.memory_bytes,
        deployments=node.deployments | {request.deployment},
    )


class _Crowd:
    """How many replicas of one deployment sit on each node and, where it spreads, in each domain."""

    def __init__(self, snapshot: Snapshot, request: Request, allowed: Bits) -> None:
        self._levels: list[Bits] = [allowed]
        self._level_of: dict[Bits, int] = {}
        self._domain_of: dict[Bits, str] = {}
        self._domains: dict[str, Bits] = {}
        self._in_domain: Counter[str] = Counter()
        self._most = request.max_per_domain
        if request.spread_label is not None:
            members: dict[str, list[Node]] = {}
            for node in snapshot.nodes:
                value = node.labels.get(request.spread_label)
                if value is not None:
                    members.setdefault(value, []).append(node)
                    self._domain_of[snapshot.bit(node.id)] = value
            self._domains = {value: snapshot.select(nodes) for value, nodes in sorted(members.items())}
        for node_id, replicas in sorted(request.standing.items()):
            bit = snapshot.bit(node_id)
            for _ in range(replicas if bit else 0):
                self.add(bit)

    def add(self, bit: Bits) -> None:
        """Notes one replica more on a node."""
        old = self._level_of.get(bit, 0)
        self._level_of[bit] = old + 1
        if len(self._levels) == old + 1:
            self._levels.append(0)
        if self._levels[old] & bit:
            self._levels[old] &= ~bit
            self._levels[old + 1] |= bit
        if (domain := self._domain_of.get(bit)) is not None:
            self._in_domain[domain] += 1
            if self._most and self._in_domain[domain] >= self._most:
                self.close(self._domains[domain])

    def close(self, bits: Bits) -> None:
        """Takes no more replicas on these nodes."""
        self._levels = [level & ~bits for level in self._levels]

    def preference(self) -> list[Bits]:
        """The nodes in sets: the fewest replicas in the domain first, then the fewest on the node."""
        if not self._domains:
            return self._levels
        by_count: dict[int, Bits] = {}
        for domain, bits in self._domains.items():
            count = self._in_domain[domain]
            by_count[count] = by_count.get(count, 0) | bits
        return [level & bits for _, bits in sorted(by_count.items()) for level in self._levels]


def _pack(snapshot: Snapshot, request: Request, allowed: Bits) -> Placed | None:
    """All replicas, if they fit at all: the best set for one may be two that others need.

    Only sets that a floor excludes make this needed: otherwise any GPUs will do for the rest.
    """
    if request.max_per_domain or request.cpu_milli or request.memory_bytes:
        return None  # what is left over is then bounded otherwise, and greed has to do
    found = []
    for node in snapshot.nodes:
        if snapshot.bit(node.id) & allowed:
            for turn, gpus in enumerate(node.shape.packed(node.free_mask(request.needs), request.needs)):
                found.append((-score(node.topology, gpus).bandwidth_gb_per_s, turn, node.name, node.id, gpus))
    if len(found) < len(request.replicas):
        return None
    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    for index, (*_, node_id, gpus) in zip(request.replicas, sorted(found), strict=False):
        bit = snapshot.bit(node_id)
        node = changed.get(bit) or snapshot.at(bit)
        taken = Take(gpus, WHOLE, 0)
        changed[bit] = _after(node, taken, request)
        planned.append(_planned(index, node, taken, request))
    return planned, changed


def _place_remote(snapshot: Snapshot, request: Request) -> Placed:
    """Places as many replicas as there is capacity for."""
    provider = request.provider or ""
    identity = (provider, request.key or "")
    named = None if request.egress_nodes is None else snapshot.named(request.egress_nodes)
    candidates: dict[Bits, Node] = {}
    for node in snapshot.nodes:
        if node.egress and node.egress_resource(provider):
            bit = snapshot.bit(node.id)
            if named is None or named & bit:
                candidates[bit] = node
    standing = Counter(request.standing)
    preferred = request.egress_preference

    def left(node: Node) -> int:
        return node.egress[node.egress_resource(provider) or ""]

    def rank(bit: Bits) -> tuple[int, int, bool, int, Bits]:
        node = candidates[bit]
        preference = next((i for i, name in enumerate(preferred) if node.named(name)), len(preferred))
        return (standing[node.id], preference, identity not in node.serving, -left(node), bit)

    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    for index in request.replicas:
        roomy = [bit for bit, node in candidates.items() if left(node) >= request.egress]
        if not roomy:
            break
        bit = min(roomy, key=rank)
        node = candidates[bit]
        resource = node.egress_resource(provider) or ""
        planned.append(PlannedReplica(index, node.id, egress_resource=resource, egress_units=request.egress))
        candidates[bit] = changed[bit] = replace(
            node,
            egress={**node.egress, resource: node.egress[resource] - request.egress},
            serving=node.serving | {identity},
        )
        standing[node.id] += 1
    return planned, changed
