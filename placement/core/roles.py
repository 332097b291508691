"""Groups of roles: deployments whose replicas talk to each other, planned as one.

A group consists of *units*, each with a given number of replicas of every *role*: one prefill replica with two decode
replicas, four times. Roles that talk are joined by a :class:`~placement.core.routes.RoleLink`: within a unit each
replica of the one talks to each replica of the other. All units are placed, or none; in this order,

1. the slowest route between two that talk is as good as possible: on one node the fastest, then in one NVLink
   domain, then in the narrowest region by the operator's labels (:class:`~placement.core.routes.Route`);
2. of the routes within replicas that are made of several tensor-parallel groups as few as can be leave a node;
3. so it is with all others;
4. the sets of GPUs of these groups, each as predicted for its own all-reduce, are fastest in sum;
5. all routes are fastest in sum;
6. all pairs of whole GPUs that talk are nearest in sum by PCIe, also below NVLink: on one switch, one root, one NUMA
   node.

Among equals, one replica after the other goes where the fewest of its deployment are, then to the set that costs
others least, to the node with the fewest free GPUs, and the lowest ordinals; a share of a GPU to one that is shared
already, the fullest. The route of a share, or of a MIG instance, is that of its GPU.

The choice is exact unless a round of the search is cut off, after :data:`~placement.core.role_search.STEPS` places,
which :attr:`GroupPlan.bounded` says. Of interchangeable GPUs, and nodes, only one is tried; and
the search ends as soon as every unit has its lower bound of cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

from placement.core import gangs, planner
from placement.core.at_best import capacity
from placement.core.limits import eligible
from placement.core.needs import Needs
from placement.core.reconcile import Desired, Observed
from placement.core.replicas import Plan
from placement.core.request import Place, Request, Told
from placement.core.role_places import Places
from placement.core.role_search import solve
from placement.core.routes import Gpus, Located, Member, Roles, joined, meets
from placement.core.snapshot import Snapshot
from placement.core.topology import ordinals
from placement.core.wording import describe
from placement.errors import BelowFloor, NotEnoughGpus, Unplaceable, counted


@dataclass(frozen=True)
class GroupPlan:
    """Where the replicas of a group go.

    Attributes:
        places: of those that had none; of each the places of its tensor-parallel groups, in rank order.
        bounded: the search was cut off; there may be a better way.
    """

    places: Mapping[Member, tuple[Place, ...]]
    bounded: bool = False


def plan(
    snapshot: Snapshot,
    roles: Roles,
    requests: Mapping[str, Request],
    standing: Mapping[Member, Sequence[Place]] | None = None,
) -> GroupPlan | Unplaceable:
    """Places all replicas of a group that have no place, or none.

    Args:
        snapshot: the cluster.
        roles: the group.
        requests: deployment -> what is asked for; its ``replicas`` are those to place, each tensor-parallel group on
            one node.
        standing: the replicas that stay where they are, with the places of their tensor-parallel groups.

    Returns:
        The places, or why there are none. If one deployment alone has no room, it is that deployment's refusal;
        else it is the group's, and names the two replicas and their route if a link's floor is not met.
    """
    places = Places(snapshot, roles, requests, standing or {})
    if (lacking := places.without_nvlink()) is not None:
        return lacking
    if (found := solve(places, places.todo)) is not None:
        return GroupPlan(
            {
                (name, index): _in_rank_order(snapshot, requests[name].needs, parts)
                for (name, index), parts in places.located(found.at).items()
                if index in requests[name].replicas
            },
            places.bounded,
        )
    refusal = _refusal(snapshot, roles, requests, standing or {})
    if lacks := _lacks(snapshot, refusal.deployment, requests, standing or {}):
        refusal = refusal.advised(lacks)
    return refusal.advised("the search was cut off, so that there may be room") if places.bounded else refusal


def _in_rank_order(snapshot: Snapshot, needs: Needs, sets: Sequence[Located]) -> tuple[Place, ...]:
    """The places of the sets of a replica: near nodes one after the other, those of a node as its actor cuts them."""
    by_node: dict[str, list[Gpus]] = {}
    for node, gpus in sorted(sets, key=lambda one: (gangs.nearness(snapshot, one[0]), one[1])):
        by_node.setdefault(node.id, []).append(gpus)
    places: list[Place] = []
    for node_id, each in by_node.items():
        shape, mask = snapshot.node(node_id).shape, sum(1 << gpu for gpus in each for gpu in gpus)
        several = shape.several(mask, needs, len(each)) if len(each) > 1 else None
        places += [Place(node_id, gpus) for gpus in several or each]
    return tuple(places)


def missing(
    snapshot: Snapshot, members: Mapping[str, tuple[Desired, Mapping[int, Observed]]]
) -> tuple[Snapshot, dict[str, Request], dict[Member, list[Place]]]:
    """The cluster without the lost replicas of a group, what those that are missing ask for, and where the others are.

    Args:
        snapshot: the cluster.
        members: deployment -> its declaration, and its existing replicas.
    """
    requests: dict[str, Request] = {}
    standing: dict[Member, list[Place]] = {}
    for name, (desired, observed) in members.items():
        wanted, size = desired.request.replicas, desired.request.needs.gpus
        there = {
            index: one.parts
            for index, one in observed.items()
            if not one.gone and all(snapshot.bit(part.node_id) for part in one.parts)
        }
        gone = [part for index, one in observed.items() if index not in there for part in one.parts]
        snapshot = planner.vacate(snapshot, gone, name)
        standing |= {
            (name, index): [
                Place(part.node_id, part.gpus[i : i + size])
                for part in parts
                for i in range(0, len(part.gpus), size)
            ]
            for index, parts in there.items()
            if index in wanted
        }
        requests[name] = replace(
            desired.request, replicas=tuple(i for i in wanted if i not in there), standing={}, told=None
        )
    return snapshot, requests, standing


def tell(
    snapshot: Snapshot, roles: Roles, members: Mapping[str, tuple[Desired, Mapping[int, Observed]]]
) -> dict[str, Desired]:
    """The members of a group, each with the places of its missing replicas, or with the refusal of the group.

    Replicas that are there stay, even if their unit lost others: the missing ones are placed near them, all or none.

    Args:
        snapshot: the cluster.
        roles: the group.
        members: deployment -> its declaration, and its existing replicas.
    """
    snapshot, requests, standing = missing(snapshot, members)
    found = plan(snapshot, roles, requests, standing)
    told: dict[str, Told] = {}
    for name in members:
        if isinstance(found, Unplaceable):
            told[name] = Told(refusal=found)
        else:
            chosen = {index: places for (of, index), places in found.places.items() if of == name}
            told[name] = Told(chosen, bounded=found.bounded)
    return {
        name: replace(desired, request=replace(desired.request, told=told[name]), gang=True)
        for name, (desired, _) in members.items()
    }


def refusal_of(told: Mapping[str, Desired]) -> Unplaceable | None:
    """Why a group is placed nowhere, by what :func:`tell` returned; ``None`` if it has places."""
    refusals = (desired.request.told.refusal for desired in told.values() if desired.request.told)
    return next((one for one in refusals if one is not None), None)


def as_told(snapshot: Snapshot, told: Mapping[str, Desired]) -> dict[str, Plan] | None:
    """What the members of a group take in the places that were chosen; ``None`` if these cannot be had any more.

    Args:
        snapshot: the cluster as it is now.
        told: what :func:`tell` returned.
    """
    plans: dict[str, Plan] = {}
    for name, desired in told.items():
        places = desired.request.told.places if desired.request.told else {}
        request = replace(desired.request, replicas=tuple(sorted(places)))
        allowed = eligible(snapshot, request)
        step, snapshot = planner.advance(snapshot, request)
        if isinstance(step.outcome, Unplaceable):
            return None
        if not all(snapshot.bit(one.node_id) & allowed for one in chain.from_iterable(places.values())):
            return None
        plans[name] = step.outcome
    return plans


def _refusal(
    snapshot: Snapshot,
    roles: Roles,
    requests: Mapping[str, Request],
    standing: Mapping[Member, Sequence[Place]],
) -> Unplaceable:
    """Why there is no place for a group."""
    for name, request in requests.items():
        alone = planner.advance(snapshot, request)[0]
        if isinstance(alone.outcome, Unplaceable):
            return alone.outcome
        if alone.request.parts > 1:
            gpus, largest = request.needs.gpus, max(node.whole_gpus for node in snapshot.nodes)
            return NotEnoughGpus(
                name,
                f"no node has {gpus} GPUs, and a tensor-parallel group of a member of {roles.name!r} is on one node",
                {},
                f"set tensor_parallel to {largest} or less, and pipeline_parallel",
                gpus,
                largest,
            )
    places = Places(snapshot, roles, requests, standing, floors=False)
    found = solve(places, places.todo)
    if found is None:
        lacking = [(len(one.replicas) * one.stages, one.needs) for one in requests.values() if one.replicas]
        gpus = sum(count * needs.gpus for count, needs in lacking)
        what = counted(gpus, "GPU")
        if not all(needs.whole for _, needs in lacking):
            what = ", ".join(f"{count} x {describe(needs)}" for count, needs in lacking)
        names = " and ".join(name for name, request in requests.items() if request.replicas)
        return NotEnoughGpus(
            roles.name,
            f"there is room for each of {names}, but not for all of them together ({what})",
            {},
            "free GPUs, add a node, or ask for fewer units",
            gpus,
            max((node.whole_gpus for node in snapshot.nodes), default=0),
        )
    located = places.located(found.at)
    for link, one, other, best in joined(roles, snapshot.near, located):
        if not all(meets(link, best, *parts) for parts in product(located[one], located[other])):
            asked = f"within = {link.within!r}" if link.within else ""
            asked += " and " * bool(link.within and link.min_gb_per_s)
            asked += f"min_bandwidth_gb_per_s = {link.min_gb_per_s:g}" if link.min_gb_per_s else ""
            ends = (
                f"{name}/{index} on "
                + ", ".join(f"GPU {ordinals(gpus)} of {node.name}" for node, gpus in located[name, index])
                for name, index in (one, other)
            )
            return BelowFloor(
                roles.name,
                f"the route between {' and '.join(ends)} would be {best}, and their link via {str(link.via)!r} "
                f"asks for {asked}",
                {},
                "lower that floor, or free GPUs that are nearer to each other",
            )
    return Unplaceable(
        roles.name, "its search was cut off before it came to an end", {}, "ask for fewer units"
    )


def _lacks(
    snapshot: Snapshot,
    refused: str,
    requests: Mapping[str, Request],
    standing: Mapping[Member, Sequence[Place]],
) -> str:
    """Why a group can never be placed on the nodes that are there; empty if it may, or if the refusal says it."""
    asked = sum(len(sets) * requests[name].needs.gpus for (name, _), sets in standing.items())
    asked += sum(len(one.replicas) * one.stages * one.needs.gpus for one in requests.values())
    gpus = sum(node.whole_gpus for node in snapshot.nodes)
    if asked > gpus and all(one.needs.whole for one in requests.values()):
        has = f"the whole cluster has {counted(gpus, 'GPU')}, and the group needs {asked}"
        return f"{has}: waiting does not help unless nodes join"
    if refused not in requests:
        return ""
    request = requests[refused]
    wanted = len(request.replicas) + sum(name == refused for name, _ in standing)
    return capacity(snapshot, request).lacks(request, wanted, gang=True)
