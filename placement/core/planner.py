"""Which nodes a deployment's replicas go to: ``plan(snapshot, request) -> Plan | Unplaceable``.

Rules, in order:

1. A replica's GPUs lie on one node; those of a larger one on several, one tensor-parallel group on one node
   or in one NVLink domain (:mod:`placement.core.gangs`); those of a placement group laid out bundle by bundle as its
   strategy says (:mod:`placement.core.bundles`). Where GPUs are named, all replicas are on one node that has them all.
   A remote replica's capacity lies on one egress node, the CPUs and the memory of a CPU replica on one node.
2. All replicas are placed, or none.
3. A node without a set of GPUs as close together, or as fast, as the request demands is excluded.
4. A GPU replica goes where the best set on offer is fastest; among equals, to the node with the fewest
   replicas of the same deployment, then to the one where other requests lose least by it (large sets stay whole),
   then to the one with the fewest free GPUs. Fractions fill the fullest shared GPU that still
   fits. (:class:`~placement.core.policy.Policy` has other orders to choose from.)
5. A remote replica goes to the node with the fewest replicas of the same deployment, in the domain with the
   fewest where it spreads over a label; among equals, to nodes named in ``egress_preference``, then to nodes
   that already serve the same (provider, API key) so that they can share a rate limiter, then to the one with
   the most capacity left. Its units come from the node's own resource for the provider, or, where that has too
   few left, from the general one.
6. A CPU replica goes to a node without GPUs if one has room, under every policy; among equals, to the one with the
   fewest replicas of the same deployment, then to the one with the fewest CPUs free, so that large requests keep room.
   On a node with GPUs it takes CPUs that these can spare, and leaves ``spared_milli`` for each GPU that is free; the
   node with the fewest free GPUs goes first.
7. The last key is the node's name and id: the same input always gives the same plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import or_

from placement.core import bundles, gangs
from placement.core.explanation import Sifted, sift
from placement.core.limits import eligible, limits_without_gpus, roomy, short_of
from placement.core.node import Node
from placement.core.offers import Bits, rank_of
from placement.core.policy import Policy
from placement.core.refusal import refusal_of
from placement.core.replicas import Crowd, Placed, Plan, PlannedReplica, in_parts, take
from placement.core.request import Request, Strategy, Told
from placement.core.score import Score, slowest_group
from placement.core.snapshot import Snapshot
from placement.errors import NotEnoughGpus, Unplaceable


def plan(snapshot: Snapshot, request: Request) -> Plan | Unplaceable:
    """Chooses a node for each replica of ``request``.

    Returns:
        The plan, or why there is none. Both are answers; nothing is raised.
    """
    return advance(snapshot, request)[0].outcome


@dataclass(frozen=True)
class Step:
    """The outcome of one request.

    Attributes:
        request: what was asked; for a refusal, with the replicas planned before it as standing.
        outcome: its plan, or why there is none.
        seen: the cluster before its first replica was planned; for a refusal, before the refused replica.
    """

    request: Request
    outcome: Plan | Unplaceable
    seen: Snapshot


def steps(snapshot: Snapshot, requests: Iterable[Request]) -> Iterator[Step]:
    """Plans several deployments, each on top of the ones before. Ends after the first refusal."""
    for request in requests:
        step, snapshot = advance(snapshot, request)
        yield step
        if isinstance(step.outcome, Unplaceable):
            return


def vacate(
    snapshot: Snapshot,
    replicas: Sequence[PlannedReplica],
    deployment: str = "",
    called: tuple[str, str] | None = None,
) -> Snapshot:
    """The snapshot without these replicas. Nodes that no longer exist are skipped.

    Args:
        snapshot: the cluster.
        replicas: the replicas to remove.
        deployment: their deployment.
        called: what they call, as (provider, key), if they are remote.
    """
    changed: dict[str, Node] = {}
    for replica in replicas:
        if not snapshot.bit(replica.node_id):
            continue
        node = changed.get(replica.node_id) or snapshot.node(replica.node_id)
        if replica.egress_resource is None:
            node = replace(
                node.before(replica.taken, replica.profile),
                cpu_milli=node.cpu_milli + replica.cpu_milli,
                memory_bytes=node.memory_bytes + replica.memory_bytes,
                holders=node.holders_without(deployment, replica.gpus),
            )
        elif replica.egress_resource in node.egress:
            left = node.egress[replica.egress_resource] + replica.egress_units
            node = replace(node, egress={**node.egress, replica.egress_resource: left})
        changed[replica.node_id] = node.occupied(-1, deployment, called)
    return snapshot.changed(changed.values()) if changed else snapshot


def advance(snapshot: Snapshot, request: Request) -> tuple[Step, Snapshot]:
    """The outcome of a request, and the snapshot after it: with the plan carried out, or unchanged.

    Either way the request is then part of the mix.
    """
    found = attempt(snapshot, request)
    if isinstance(found, Shortfall):
        return found.step(), snapshot.changed((), snapshot.mix.plus(request))
    return found


class _Cause:
    """Why there is no room for a request. Computed only when needed, as it costs more than a plan."""

    def __init__(
        self,
        snapshot: Snapshot,
        request: Request,
        planned: Sequence[PlannedReplica],
        changed: Mapping[Bits, Node],
    ) -> None:
        self._snapshot, self._request = snapshot, request
        self._planned, self._changed = planned, changed

    @cached_property
    def fitting(self) -> Counter[str]:
        """The places of the replicas that fit."""
        first_parts = {replica.replica_index: replica.node_id for replica in reversed(self._planned)}
        return Counter(first_parts.values())

    @cached_property
    def seen(self) -> Snapshot:
        """The cluster before the replica that does not fit was planned."""
        if not self._changed:
            return self._snapshot
        return self._snapshot.changed(_occupied(self._request, self._planned, self._changed))

    @cached_property
    def sifted(self) -> Sifted:
        """Which nodes were excluded for it, and why."""
        return sift(self.seen, self.asked(self._request))

    def asked(self, request: Request) -> Request:
        """A request after the replicas that fit have been planned."""
        return replace(request, standing=Counter(request.standing) + self.fitting)


@dataclass(frozen=True)
class Shortfall:
    """No room for all replicas of a request.

    Attributes:
        request: what was asked, divided if it is larger than a node.
        fitting: how many replicas fit.
        cause: why the next one does not.
    """

    request: Request
    fitting: int
    cause: _Cause

    def step(self) -> Step:
        """The refusal."""
        refused = self.cause.asked(self.request)
        why = refusal_of(refused, refused.replicas[self.fitting], self.cause.sifted)
        return Step(refused, why, self.cause.seen)

    def of(self, other: Request) -> Shortfall:
        """The same for another deployment with an equal request."""
        request = replace(
            self.request, deployment=other.deployment, replicas=other.replicas, standing=other.standing
        )
        return Shortfall(request, self.fitting, self.cause)


@dataclass(frozen=True)
class Withheld(Shortfall):
    """A member of a group that got no place: it has none even if there is room for it alone."""

    refusal: Unplaceable

    def step(self) -> Step:
        """The refusal."""
        return Step(self.request, self.refusal, self.cause.seen)


def attempt(snapshot: Snapshot, request: Request) -> tuple[Step, Snapshot] | Shortfall:
    """Plans a request; returns the plan with the snapshot after it, or that there is no room."""
    if request.told is not None:
        return _as_told(snapshot, request, request.told)
    place = _place_local if request.provider is None else _place_remote
    asked = request
    request, (planned, changed) = place(snapshot, request)
    fitting = len({replica.replica_index for replica in planned})
    if fitting < len(request.replicas):
        return Shortfall(request, fitting, _Cause(snapshot, request, planned, changed))
    outcome = Plan(request.deployment, tuple(planned), request.needs.gpus)
    mix = snapshot.mix.plus(asked)
    return Step(request, outcome, snapshot), snapshot.changed(_occupied(request, planned, changed), mix)


def _as_told(snapshot: Snapshot, request: Request, told: Told) -> tuple[Step, Snapshot] | Shortfall:
    """Places replicas as the plan of their group says."""

    def withheld(why: Unplaceable) -> Withheld:
        return Withheld(request, 0, _Cause(snapshot, request, (), {}), why)

    if told.refusal is not None and request.replicas:
        return withheld(told.refusal)
    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    short = short_of(request)
    for index in request.replicas:
        sets: list[PlannedReplica] = []
        for place in told.places.get(index, ()):
            bit = snapshot.bit(place.node_id)
            node = changed.get(bit) or (snapshot.at(bit) if bit else None)
            choice = node.choice_of(request.needs, place.gpus) if node else None
            if node is None or choice is None or (short and short(node)):
                return withheld(
                    _gone(request, index, f"GPUs {list(place.gpus)}, which are not free any more")
                )
            part, changed[bit] = take(index, node, choice, request)
            sets.append(part)
        if not sets:
            return withheld(_gone(request, index, "no place"))
        planned += in_parts(sets)
    plan = Plan(request.deployment, tuple(planned), request.needs.gpus)
    mix = snapshot.mix.plus(request)
    return Step(request, plan, snapshot), snapshot.changed(_occupied(request, planned, changed), mix)


def _gone(request: Request, index: int, where: str) -> Unplaceable:
    why = f"its group was planned with {where} for replica {index}"
    return NotEnoughGpus(request.deployment, why, {}, "the group is planned again in a moment")


def _occupied(
    request: Request, planned: Sequence[PlannedReplica], changed: Mapping[Bits, Node]
) -> Iterator[Node]:
    """The changed nodes, with the replicas of this request counted."""
    more = Counter(replica.node_id for replica in planned)
    return (node.occupied(more[node.id], request.deployment, request.calls) for node in changed.values())


def _place_local(snapshot: Snapshot, request: Request) -> tuple[Request, Placed]:
    """Places as many replicas as fit; the request is divided if it is larger than a node."""
    place = _place_on_one_node if request.needs.named else _place_among
    return place(snapshot, request, eligible(snapshot, request))


def _place_on_one_node(snapshot: Snapshot, request: Request, nodes: Bits) -> tuple[Request, Placed]:
    """The same for named GPUs: on the nodes with room for the most replicas, the one that is best by the policy."""
    wanted = len(request.replicas) * request.stages
    ranked = []
    for bit in (snapshot.bit(node.id) for node in snapshot.nodes):
        if bit & nodes and (rank := rank_of(snapshot.at(bit), request.needs, request.policy)) is not None:
            ranked.append((-min(wanted, snapshot.at(bit).copies(request.needs)), rank, bit))
    # The GPUs are given, so what is left to others does not matter.
    asked = replace(request, policy=Policy.TOPOLOGY)
    found: list[Placed] = [([], {})]
    for room, _, bit in sorted(ranked):
        found.append(_place_among(snapshot, asked, bit)[1])
        # The speed of the best set says nothing about the replica's other sets.
        is_best = request.stages == 1 and len(found[-1][0]) == len(request.replicas)
        # A node may have the GPUs, but not the CPUs or the memory.
        if is_best or (-room < wanted and len(found[-1][0]) == -room // request.stages):
            break
    return request, max(found, key=lambda placed: (len(placed[0]), _slowest(snapshot, request, placed)))


def _slowest(snapshot: Snapshot, request: Request, placed: Placed) -> Score:
    """How good the slowest set of the replicas is."""
    sets = [(snapshot.node(one.node_id).topology, one.gpus) for one in placed[0]]
    scores = [slowest_group(topology, gpus, request.needs.gpus) for topology, gpus in sets]
    return min(scores, default=Score(0.0))


def _place_among(snapshot: Snapshot, request: Request, nodes: Bits) -> tuple[Request, Placed]:
    """The same, on some of the nodes."""
    if request.bundles:
        if request.strategy is Strategy.PACK and (one := bundles.on_one_node(request)) is not None:
            placed = _place_singly(snapshot, one, eligible(snapshot, one) & roomy(snapshot, one))
            if placed[0]:
                return one, placed
        return bundles.place(snapshot, request, nodes)
    # That policy counts CPUs by itself, but not the CPUs to leave for free GPUs.
    look = request.policy is not Policy.FRAGMENTATION or request.spared_milli
    allowed = nodes & roomy(snapshot, request) if look else nodes
    if request.on_cpus:
        return request, _place_singly(snapshot, request, allowed)
    if request.stages == request.parts == 1:
        placed = _place_singly(snapshot, request, allowed)
        if len(placed[0]) == len(request.replicas):
            return request, placed
        if request.needs.floor:  # the best set for one may break two sets that others need
            placed = max(placed, gangs.place(snapshot, request, allowed), key=lambda found: len(found[0]))
    else:
        placed = gangs.place(snapshot, request, allowed)
    best = request, placed
    for cut in gangs.splits(snapshot, request, nodes):
        placed = gangs.place(snapshot, cut, nodes & roomy(snapshot, cut))
        if len({replica.replica_index for replica in placed[0]}) == len(request.replicas):
            return cut, placed
        if best[0] is request:
            best = cut, placed
    return best


def _place_singly(snapshot: Snapshot, request: Request, allowed: Bits) -> Placed:
    """Places each replica on the node that is best for it, one after the other."""
    if request.policy is Policy.FRAGMENTATION:
        return _place_kindly(snapshot, request, allowed)
    needs, policy = request.needs, request.policy
    offers = snapshot.offers(needs, policy).copy()
    crowd = Crowd(snapshot, request, allowed)
    short = short_of(request)
    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    shared: dict[Bits, tuple[int, ...]] = {}
    for index in request.replicas:
        bit = offers.best(crowd.preference())
        if not bit:
            break
        node = changed.get(bit) or snapshot.at(bit)
        taken = node.choose(needs, shared.get(bit, ()))
        assert taken is not None
        replica, after = take(index, node, taken, request)
        planned.append(replica)
        changed[bit] = after
        offers.move(bit, rank_of(node, needs, policy), rank_of(after, needs, policy))
        crowd.add(bit)
        shared[bit] = (*shared.get(bit, ()), *taken.gpus)
        if short and short(after):
            crowd.close(bit)
    return planned, changed


def _place_kindly(snapshot: Snapshot, request: Request, allowed: Bits) -> Placed:
    """The same, each where all kinds of requests keep the most room."""
    from placement.core.room import room_of  # importing numpy takes longer than most plans

    room, mix = room_of(snapshot), snapshot.mix.plus(request)
    crowd = Crowd(snapshot, request, allowed)
    short = short_of(request) if request.spared_milli else None
    with_gpus = snapshot.usable if request.on_cpus else 0
    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    try:
        for index in request.replicas:
            wanted = crowd.open()
            if with_gpus:  # nodes without GPUs come first
                apart = [bits & ~with_gpus for bits in wanted] + [bits & with_gpus for bits in wanted]
                wanted = [bits for bits in apart if bits]
            found = room.choose(request, mix, wanted, crowd.on)
            if found is None:
                break
            bit, taken = found
            replica, changed[bit] = take(index, changed.get(bit) or snapshot.at(bit), taken, request)
            planned.append(replica)
            room.update(bit, changed[bit])
            crowd.add(bit)
            if short and short(changed[bit]):
                crowd.close(bit)
    finally:
        for bit in changed:
            room.update(bit, snapshot.at(bit))
    return planned, changed


def _place_remote(snapshot: Snapshot, request: Request) -> tuple[Request, Placed]:
    """Places as many remote replicas as there is capacity for."""
    provider = request.provider or ""
    identity = request.calls
    asked = limits_without_gpus(request)
    named = None if request.egress_nodes is None else snapshot.named(request.egress_nodes)
    candidates: dict[Bits, Node] = {}
    for node in snapshot.nodes:
        if node.problem is None and node.egress_for(provider):
            bit = snapshot.bit(node.id)
            if (named is None or named & bit) and not any(objection(node) for _, objection in asked):
                candidates[bit] = node
    crowd = Crowd(snapshot, request, reduce(or_, candidates, 0))
    preferred = request.egress_preference

    def rank(bit: Bits) -> tuple[int, int, bool, int, Bits]:
        node = candidates[bit]
        preference = next((i for i, name in enumerate(preferred) if node.named(name)), len(preferred))
        left = sum(node.egress_for(provider).values())
        serves = bit in changed or identity in node.serving
        return (crowd.on(bit), preference, not serves, -left, bit)

    planned: list[PlannedReplica] = []
    changed: dict[Bits, Node] = {}
    for index in request.replicas:
        fitting = [bit for bit, node in candidates.items() if node.egress_resource(provider, request.egress)]
        open_to = next((bits for bits in crowd.open() if any(bits & bit for bit in fitting)), 0)
        if not open_to:
            break
        bit = min((bit for bit in fitting if bit & open_to), key=rank)
        node = candidates[bit]
        resource = node.egress_resource(provider, request.egress) or ""
        planned.append(PlannedReplica(index, node.id, egress_resource=resource, egress_units=request.egress))
        candidates[bit] = changed[bit] = replace(
            node,
            egress={**node.egress, resource: node.egress[resource] - request.egress},
        )
        crowd.add(bit)
    return request, (planned, changed)
