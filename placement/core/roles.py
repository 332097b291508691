"""Groups of roles: deployments whose replicas talk to each other, planned as one.

A group consists of *units*, each with a given number of replicas of every *role*: one prefill replica with two decode
replicas, four times. Roles that talk are joined by a :class:`~placement.core.routes.RoleLink`: within a unit each
replica of the one talks to each replica of the other. All units are placed, or none; in this order,

1. the slowest route between two that talk is as good as possible: on one node the fastest, then in one NVLink
   domain, then in the narrowest region by the operator's labels (:class:`~placement.core.routes.Route`);
2. as few routes as possible leave a node;
3. the sets of GPUs of the replicas, each as predicted for its own all-reduce, are fastest in sum;
4. all routes are fastest in sum;
5. all pairs of GPUs that talk are nearest in sum by PCIe, even if NVLink joins them: one switch, one root, one NUMA
   node.

Among equals, one replica after the other goes to the node with the fewest of its deployment, then to the set that costs
others least, to the node with the fewest free GPUs, and the lowest ordinals.

The choice is exact unless a round of the search is cut off, after :data:`~placement.core.role_search.STEPS` places,
which :attr:`GroupPlan.bounded` says. Of interchangeable GPUs, and nodes, only one is tried; and
the search ends as soon as every unit has its lower bound of cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from placement.core import planner
from placement.core.limits import eligible
from placement.core.reconcile import Desired, Observed
from placement.core.request import Place, Request, Told
from placement.core.role_places import Places
from placement.core.role_search import solve
from placement.core.routes import Member, Roles, joined, meets
from placement.core.snapshot import Snapshot
from placement.core.topology import ordinals
from placement.errors import BelowFloor, NotEnoughGpus, Unplaceable, counted


@dataclass(frozen=True)
class GroupPlan:
    """Where the replicas of a group go.

    Attributes:
        places: of the replicas that had none.
        bounded: the search was cut off; there may be better places.
    """

    places: Mapping[Member, Place]
    bounded: bool = False


def plan(
    snapshot: Snapshot,
    roles: Roles,
    requests: Mapping[str, Request],
    standing: Mapping[Member, Place] | None = None,
) -> GroupPlan | Unplaceable:
    """Places all replicas of a group that have no place, or none.

    Args:
        snapshot: the cluster.
        roles: the group.
        requests: deployment -> its request; its ``replicas`` are those to place. Whole GPUs, and each
            replica on one node.
        standing: the replicas that stay where they are.

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
                member: Place(snapshot.at(bit).id, gpus)
                for member, (bit, gpus) in found.at.items()
                if member in places.missing
            },
            places.bounded,
        )
    refusal = _refusal(snapshot, roles, requests, standing or {})
    return refusal.advised("the search was cut off, so that there may be room") if places.bounded else refusal


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
    requests: dict[str, Request] = {}
    standing: dict[Member, Place] = {}
    for name, (desired, observed) in members.items():
        wanted = desired.request.replicas
        there = {
            index: one.parts
            for index, one in observed.items()
            if not one.gone and all(snapshot.bit(part.node_id) for part in one.parts)
        }
        gone = [part for index, one in observed.items() if index not in there for part in one.parts]
        snapshot = planner.vacate(snapshot, gone, name)
        standing |= {
            (name, index): Place(part.node_id, part.gpus)
            for index, parts in there.items()
            if index in wanted
            for part in parts
        }
        requests[name] = replace(
            desired.request, replicas=tuple(i for i in wanted if i not in there), standing={}, told=None
        )
    found = plan(snapshot, roles, requests, standing)
    told: dict[str, Told] = {}
    for name in members:
        if isinstance(found, Unplaceable):
            told[name] = Told(refusal=found)
        else:
            places = {index: place for (of, index), place in found.places.items() if of == name}
            told[name] = Told(places, bounded=found.bounded)
    return {
        name: replace(desired, request=replace(desired.request, told=told[name]), gang=True)
        for name, (desired, _) in members.items()
    }


def still_free(snapshot: Snapshot, told: Mapping[str, Desired]) -> bool:
    """Whether places that were chosen before are still free.

    Args:
        snapshot: the cluster as it is now.
        told: what :func:`tell` returned.
    """
    for desired in told.values():
        places = desired.request.told.places if desired.request.told else {}
        request = replace(desired.request, replicas=tuple(sorted(places)))
        allowed = eligible(snapshot, request)
        step, snapshot = planner.advance(snapshot, request)
        if isinstance(step.outcome, Unplaceable):
            return False
        if not all(snapshot.bit(place.node_id) & allowed for place in places.values()):
            return False
    return True


def _refusal(
    snapshot: Snapshot, roles: Roles, requests: Mapping[str, Request], standing: Mapping[Member, Place]
) -> Unplaceable:
    """The refusal of a group."""
    for request in requests.values():
        if request.replicas and isinstance(alone := planner.plan(snapshot, request), Unplaceable):
            return alone
    places = Places(snapshot, roles, requests, standing, floors=False)
    found = solve(places, places.todo)
    if found is None:
        gpus = sum(len(request.replicas) * request.needs.gpus for request in requests.values())
        names = " and ".join(name for name, request in requests.items() if request.replicas)
        return NotEnoughGpus(
            roles.name,
            f"there is room for each of {names}, but not for all of them together ({counted(gpus, 'GPU')})",
            {},
            "free GPUs, add a node, or ask for fewer units",
            gpus,
            max((node.whole_gpus for node in snapshot.nodes), default=0),
        )
    located = {member: (snapshot.at(bit), gpus) for member, (bit, gpus) in found.at.items()}
    for link, one, other, best in joined(roles, snapshot.near, located):
        if not meets(link, best, located[one], located[other]):
            asked = f"within = {link.within!r}" if link.within else ""
            asked += " and " * bool(link.within and link.min_gb_per_s)
            asked += f"min_bandwidth_gb_per_s = {link.min_gb_per_s:g}" if link.min_gb_per_s else ""
            ends = (
                f"{name}/{index} on GPU {ordinals(located[name, index][1])} of {located[name, index][0].name}"
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
