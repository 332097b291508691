"""Which nodes a deployment's replicas go to: ``plan(snapshot, request) -> Plan | Unplaceable``.

Rules, in order:

1. A replica's GPUs lie on one node; a remote replica's capacity lies on one egress node.
2. All replicas are placed, or none.
3. A node is left out that has no set of GPUs as close together, or as fast, as the request demands.
4. A GPU replica goes where the best set on offer is fastest; among equals, to the node with the fewest
   replicas of the same deployment, then to the one where others lose least by it (large sets stay whole),
   then to the one with the fewest free GPUs.
5. A remote replica goes to the node with the fewest replicas of the same deployment; among equals, to
   nodes named in ``egress_preference``, then to nodes that already serve the same (provider, API key) so
   that they can share a rate limiter, then to the one with the most capacity left.
6. The last key is the node's name and id: the same input gives the same plan, to the letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from placement.core.explanation import refuse
from placement.core.request import Request
from placement.core.score import score
from placement.core.snapshot import Bits, Node, Snapshot
from placement.errors import Unplaceable


@dataclass(frozen=True)
class PlannedReplica:
    """One replica's node, the GPU set on offer there, or the egress resource and units it takes."""

    replica_index: int
    node_id: str
    gpus: tuple[int, ...] = ()
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
    return _plan(snapshot, request)[0]


@dataclass(frozen=True)
class Step:
    """What became of one change.

    Attributes:
        outcome: its plan, or why there is none.
        seen: the cluster as its first replica found it; as the refused replica found it, if one was.
    """

    change: Change
    outcome: Plan | Unplaceable
    seen: Snapshot


def steps(snapshot: Snapshot, changes: Iterable[Change]) -> Iterator[Step]:
    """Plans several deployments, each on top of the ones before. Ends after the first refusal."""
    for change in changes:
        seen = snapshot
        outcome, later = _plan(seen, change.request)
        if isinstance(outcome, Plan):
            snapshot = vacate(later, change.leaving)
        elif change.in_place:
            seen = vacate(seen, change.leaving)
            outcome, snapshot = _plan(seen, change.request)
            later = snapshot
        refused = isinstance(outcome, Unplaceable)
        yield Step(change, outcome, later if refused else seen)
        if refused:
            return


def vacate(snapshot: Snapshot, replicas: Sequence[PlannedReplica]) -> Snapshot:
    """The snapshot as it is once these replicas have gone. Nodes that are no more are passed over."""
    changed: dict[str, Node] = {}
    for replica in replicas:
        if not snapshot.bit(replica.node_id):
            continue
        node = changed.get(replica.node_id) or snapshot.node(replica.node_id)
        if replica.egress_resource is None:
            node = replace(node, free=node.free | set(replica.gpus))
        elif replica.egress_resource in node.egress:
            left = node.egress[replica.egress_resource] + replica.egress_units
            node = replace(node, egress={**node.egress, replica.egress_resource: left})
        changed[replica.node_id] = node
    return snapshot.changed(changed.values()) if changed else snapshot


Placed = tuple[list[PlannedReplica], dict[Bits, Node]]
"""Replicas that found a place, and the nodes as they are then."""


def _plan(snapshot: Snapshot, request: Request) -> tuple[Plan | Unplaceable, Snapshot]:
    """The plan, and the snapshot as it is once it has been carried out, as far as it could be."""
    place = _place_local if request.provider is None else _place_remote
    planned, changed = place(snapshot, request)
    later = snapshot.changed(changed.values()) if changed else snapshot
    if len(planned) < len(request.replicas):
        return refuse(later, request, request.replicas[len(planned)]), later
    return Plan(request.deployment, tuple(planned)), later


def _place_local(snapshot: Snapshot, request: Request) -> Placed:
    """Places as many replicas as there is room for."""
    count, within, slowest = request.gpus, request.within, request.needs.slowest
    offers = snapshot.offers(count, within).copy()
    allowed = snapshot.usable
    if request.gpu_nodes is not None:
        allowed &= snapshot.named(request.gpu_nodes)
    # level[n]: the allowed nodes with n replicas of this deployment
    levels: list[Bits] = [allowed]
    levels_of: dict[Bits, int] = {}
    for node_id, replicas in sorted(request.standing.items()):
        _raise(levels, levels_of, snapshot.bit(node_id) & allowed, replicas)

    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    for index in request.replicas:
        best = offers.best(levels, slowest)
        if best is None:
            break
        offer, bit = best
        node = changed.get(bit) or snapshot.at(bit)
        gpus = node.best(count, within) or ()
        planned.append(PlannedReplica(index, node.id, gpus))
        changed[bit] = after = replace(node, free=node.free.difference(gpus))
        offers.move(bit, offer, after.offer(count, within))
        _raise(levels, levels_of, bit, 1)
    if len(planned) < len(request.replicas) and request.needs.floor:
        return _pack(snapshot, request, allowed) or (planned, changed)
    return planned, changed


def _pack(snapshot: Snapshot, request: Request, allowed: Bits) -> Placed | None:
    """All replicas, if they fit at all: the best set for one may be two that others need.

    Only sets that a floor excludes make this needed: otherwise any GPUs will do for the rest.
    """
    found = []
    for node in snapshot.nodes:
        if snapshot.bit(node.id) & allowed:
            for turn, gpus in enumerate(node.shape.packed(node.mask, request.needs)):
                found.append((-score(node.topology, gpus).bandwidth_gb_per_s, turn, node.name, node.id, gpus))
    if len(found) < len(request.replicas):
        return None
    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    for index, (*_, node_id, gpus) in zip(request.replicas, sorted(found), strict=False):
        bit = snapshot.bit(node_id)
        node = changed.get(bit) or snapshot.at(bit)
        changed[bit] = replace(node, free=node.free.difference(gpus))
        planned.append(PlannedReplica(index, node_id, gpus))
    return planned, changed


def _raise(levels: list[Bits], levels_of: dict[Bits, int], bit: Bits, by: int) -> None:
    """Moves a node up: it has ``by`` more replicas of the deployment."""
    if not bit or not by:
        return
    old = levels_of.get(bit, 0)
    new = levels_of[bit] = old + by
    levels[old] &= ~bit
    levels += [0] * (new + 1 - len(levels))
    levels[new] |= bit


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
        planned.append(PlannedReplica(index, node.id, (), resource, request.egress))
        candidates[bit] = changed[bit] = replace(
            node,
            egress={**node.egress, resource: node.egress[resource] - request.egress},
            serving=node.serving | {identity},
        )
        standing[node.id] += 1
    return planned, changed
