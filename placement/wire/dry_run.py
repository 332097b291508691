"""The dry run: what applying deployments would do. The same for a live cluster and for one in a file."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from placement.core.explanation import explain
from placement.core.mix import Mix
from placement.core.needs import WHOLE
from placement.core.planner import Step
from placement.core.policy import Policy
from placement.core.reconcile import Decision, Desired, Drop, Observed, Reserve, Wait, outcome, reconcile
from placement.core.replicas import Plan, PlannedReplica
from placement.core.roles import tell
from placement.core.score import slowest_group
from placement.core.snapshot import Snapshot
from placement.errors import UnknownGpu, UnknownNode, Unplaceable
from placement.wire.constraints import PlacementConstraints
from placement.wire.deployment import Deployment
from placement.wire.groups import groups_of, links_of, located, together
from placement.wire.held import HeldDeployment
from placement.wire.plans import ExplainedPlan, PlacementPlan, PlannedAssignment
from placement.wire.requests import (
    desired_of,
    differing,
    mix_of,
    observed_of,
    request_of,
    require_same_places,
)


def plan_deployments(
    snapshot: Snapshot,
    held: Mapping[str, HeldDeployment],
    wanted: Sequence[Deployment],
    atomic: bool = False,
) -> list[PlacementPlan]:
    """What applying ``wanted`` would do to a cluster on which ``held`` are placed.

    Args:
        snapshot: the cluster.
        held: the placed deployments, by name.
        wanted: the new declarations.
        atomic: all or nothing; else replicas that find no place are ``pending``.

    Raises:
        Unplaceable: if ``atomic``: one of them does not fit on top of those before it.
        UnknownNode: its constraints name a node that is not there.
        InvalidDeployment: a group lacks a member.
        GroupStands: a group is placed, and its new declaration would move placed replicas.
    """
    plans = plan_in_order(snapshot, held, wanted, atomic)
    return [plan for _, plan in sorted(plans, key=itemgetter(0))]


def plan_in_order(
    snapshot: Snapshot,
    held: Mapping[str, HeldDeployment],
    wanted: Sequence[Deployment],
    atomic: bool = False,
) -> list[tuple[int, PlacementPlan]]:
    """The same, in the order in which to apply them; each with its position in ``wanted``."""
    done = _planned(snapshot, held, wanted, atomic)
    if done and done[-1].refusal:
        raise done[-1].refusal
    links = _links(snapshot, done)
    return [(one.position, _preview(snapshot, one, links)) for one in done]


def explain_deployments(
    snapshot: Snapshot,
    held: Mapping[str, HeldDeployment],
    wanted: Sequence[Deployment],
    atomic: bool = True,
) -> list[ExplainedPlan]:
    """The same, explained.

    Args:
        snapshot: the cluster.
        held: the placed deployments, by name.
        wanted: the new declarations.
        atomic: the first deployment that does not fit is refused, which is the last entry of the list; else
            it is a plan with what is ``pending``.

    Raises:
        UnknownNode: as :func:`plan_deployments`.
    """
    explained = []
    all_done = _planned(snapshot, held, wanted, atomic)
    links = _links(snapshot, all_done)
    for done in all_done:
        step, name = done.step, done.deployment.name
        why = explain(step.seen, step.request)
        if done.refusal is not None:
            refusal = str(done.refusal)
            explained.append((len(wanted), ExplainedPlan(name, None, refusal, why, done.refusal)))
        else:
            explained.append((done.position, ExplainedPlan(name, _preview(snapshot, done, links), None, why)))
    return [one for _, one in sorted(explained, key=itemgetter(0))]


@dataclass(frozen=True)
class _Done:
    """The outcome for one of the wanted deployments.

    Attributes:
        position: its place among them.
        before: what is placed of it.
        observed, there: its replicas before and after.
        step: what was planned for it, or refused.
    """

    position: int
    deployment: Deployment
    before: HeldDeployment | None
    observed: Mapping[int, Observed]
    there: Mapping[int, Observed]
    decision: Decision
    step: Step

    @property
    def refusal(self) -> Unplaceable | None:
        """Why nothing is done; ``None`` if something is."""
        return self.decision.refusal

    @property
    def pending(self) -> dict[int, str]:
        """The replicas that wait -> why."""
        waits = [action for action in self.decision.actions if isinstance(action, Wait)]
        return {index: str(action.refusal) for action in waits for index in action.indices}

    def held(self) -> HeldDeployment:
        """What is placed afterwards."""
        outdated = self.pending.keys() & self.there.keys()
        new = [part for i, one in self.there.items() if i not in outdated for part in one.parts]
        if self.before is None:
            return HeldDeployment.of(self.deployment, new)
        return self.before.becomes(self.deployment, new, outdated)


def _planned(
    snapshot: Snapshot, held: Mapping[str, HeldDeployment], wanted: Sequence[Deployment], atomic: bool
) -> list[_Done]:
    """The outcome for each, in the order in which to apply them; a refusal is the last.

    One that is ``near_to`` another comes after it. If not all find room in that order, one that is ``apart_from``
    another comes after it, too, as the other may make room. If that is no better, they are taken in the given order.
    """
    groups_of(wanted)
    first = together(wanted, _order(wanted, apart=False))
    done = list(_carry_out(snapshot, held, wanted, first, atomic))
    tried = [first]
    for order in (_order(wanted, apart=True), list(range(len(wanted)))):
        if not any(_without_room(done)):
            break
        order = together(wanted, order)
        if order not in tried:
            tried.append(order)
            with contextlib.suppress(UnknownNode, UnknownGpu):
                again = list(_carry_out(snapshot, held, wanted, order, atomic))
                done = again if _without_room(again) < _without_room(done) else done
    return done


def _without_room(done: Sequence[_Done]) -> tuple[bool, int]:
    """How much found no place: whether one is refused, and how many replicas wait."""
    return bool(done and done[-1].refusal), sum(len(one.pending) for one in done)


def _order(wanted: Sequence[Deployment], apart: bool) -> list[int]:
    """Positions in an order in which a deployment comes after those that it names in ``near_to`` (and ``apart_from``).

    If they name each other in a cycle, ``near_to`` counts more than ``apart_from``, and the given order counts most.
    """
    names = Counter(one.name for one in wanted)
    ways = [[_named(one, way) for one in wanted] for way in (apart, False)]
    left = list(range(len(wanted)))
    order = []
    while left:
        free = (i for named in ways for i in left if names.keys().isdisjoint(named[i]))
        order.append(next(free, left[0]))
        left.remove(order[-1])
        names -= Counter([wanted[order[-1]].name])  # drops a name that has no replicas left
    return order


def _named(one: Deployment, apart: bool) -> set[str]:
    """The deployments that one names in ``near_to`` or ``apart_from``."""
    limits = one.constraints or PlacementConstraints()
    return {*limits.near_to, *(limits.apart_from if apart else ())}


def _carry_out(
    snapshot: Snapshot,
    held: Mapping[str, HeldDeployment],
    wanted: Sequence[Deployment],
    order: Iterable[int],
    atomic: bool,
) -> Iterator[_Done]:
    """Plans each after the ones before it; ends with the first refusal."""
    standing = _Standing(snapshot, held)
    told: dict[str, Desired] = {}
    for position in order:
        one = wanted[position]
        before = standing.held.get(one.name)
        observed = observed_of(before) if before else {}
        if before is not None and before.releasing:
            gone = desired_of(before.deployment, releasing=True)
            snapshot, before, observed = reconcile(gone, observed, snapshot).snapshot, None, {}
            standing.drop(one.name)
        same = before is not None and before.deployment.shape() == one.shape()
        if before is None or not same or one.replicas > before.deployment.replicas:
            request_of(one, (), {}, snapshot)
        if before is not None and one.group is None:
            require_same_places(before.deployment, one, bool(before.replicas))
        if one.group is not None and one.name not in told:
            told |= _tell(snapshot, standing, [other for other in wanted if other.group == one.group])
        desired = told.get(one.name) or desired_of(one, standing.keeping_apart())
        decision = reconcile(desired, observed, standing.with_mix(snapshot, one), atomic=atomic)
        there = outcome(desired, observed, decision.actions)
        step = decision.step
        if step is None:
            none = replace(desired.request, replicas=(), standing=_begin(there))
            step = Step(none, Plan(one.name, ()), snapshot)
        done = _Done(position, one, before, observed, there, decision, step)
        yield done
        if decision.refusal is not None:
            return
        snapshot = decision.snapshot
        standing.enter(done.held())


def _tell(snapshot: Snapshot, standing: _Standing, members: Sequence[Deployment]) -> dict[str, Desired]:
    """The members of a group, each with the places of its replicas.

    Raises:
        GroupStands: placed replicas would have to move.
    """
    held = {one.name: standing.held.get(one.name) for one in members}
    there = {name: one for name, one in held.items() if one is not None and not one.releasing}
    group_placed = any(one.replicas for one in there.values())
    declared = {}
    for one in members:
        before = there.get(one.name)
        if before is not None:
            require_same_places(before.deployment, one, bool(before.replicas), group_placed)
        declared[one.name] = (
            desired_of(one, standing.keeping_apart()),
            observed_of(before) if before is not None else {},
        )
    assert members[0].group is not None
    return tell(snapshot, members[0].group.planned(), declared)


def _links(snapshot: Snapshot, done: Sequence[_Done]) -> dict[str, list[dict[str, Any]]]:
    """Deployment -> the routes of those links of its group that name it first."""
    found: dict[str, list[dict[str, Any]]] = {}
    nodes = {node.id: node for node in snapshot.nodes}
    for group in {one.group.name: one.group for each in done if (one := each.deployment).group}.values():
        members = [one for one in done if one.deployment.group == group]
        parts = {
            one.deployment.name: [part for there in one.there.values() for part in there.parts]
            for one in members
        }
        for link in links_of(group, snapshot.near, located(nodes, parts)):
            found.setdefault(link["between"][0].rpartition("/")[0], []).append(link)
    return found


def _keeping_apart(held: HeldDeployment) -> list[Deployment]:
    """The placed declarations that name others in ``apart_from``."""
    return [one for one in (held.deployment, *held.earlier.values()) if _named(one, apart=True)]


class _Standing:
    """What is placed, while one deployment after the other is applied.

    Attributes:
        held: the deployments, by name.
        apart: name -> declarations that others may have to keep away from: the current one, and those by which
            replicas were placed that are to be replaced.
    """

    def __init__(self, snapshot: Snapshot, held: Mapping[str, HeldDeployment]) -> None:
        self.held = dict(held)
        self.apart = {name: apart for name, one in held.items() if (apart := _keeping_apart(one))}
        self._snapshot = snapshot
        self._mix: Mix | None = None

    def enter(self, one: HeldDeployment) -> None:
        """Records a deployment that is new, or has changed."""
        name, before = one.deployment.name, self.held.get(one.deployment.name)
        if before is None and self._mix is not None:
            self._mix = mix_of(self._snapshot, [one.deployment], self._mix)
        elif before is not None and before.deployment is not one.deployment:
            self._mix = None
        self.drop(name)
        self.held[name] = one
        if apart := _keeping_apart(one):
            self.apart[name] = apart

    def drop(self, name: str) -> None:
        """Records one that is gone."""
        self.held.pop(name, None)
        self.apart.pop(name, None)

    def keeping_apart(self) -> list[Deployment]:
        """The declarations of all that others may have to keep away from."""
        return [one for several in self.apart.values() for one in several]

    def with_mix(self, snapshot: Snapshot, one: Deployment) -> Snapshot:
        """The snapshot with the mix of all requests, if the policy of a deployment needs it."""
        if one.policy is not Policy.FRAGMENTATION:
            return snapshot
        if self._mix is None:
            self._mix = mix_of(self._snapshot, (held.deployment for held in self.held.values()))
        return snapshot.changed((), self._mix)


def _begin(replicas: Mapping[int, Observed]) -> Counter[str]:
    """Node id -> number of replicas whose first part is there."""
    return Counter(one.parts[0].node_id for one in replicas.values())


def _preview(snapshot: Snapshot, done: _Done, links: Mapping[str, list[dict[str, Any]]]) -> PlacementPlan:
    wanted, before, pending = done.deployment, done.before, done.pending
    lost = {action.index for action in done.decision.actions if isinstance(action, Drop)}
    new = {
        part.replica_index
        for action in done.decision.actions
        if isinstance(action, Reserve)
        for part in action.plan.replicas
    }
    stood = done.observed.keys() - lost
    placed, replaced = sorted(new - stood), sorted(new & stood)
    removed = sorted(stood - done.there.keys())
    differs = differing(before.deployment, wanted) if before else []
    happens = bool(differs or placed or replaced or removed)
    return PlacementPlan(
        wanted.name,
        [_assignment(snapshot, part, one) for one in done.there.values() for part in one.parts],
        standing=not placed and not replaced and not pending,
        pending=pending,
        runtime=wanted.runtime_name,
        runtime_from=wanted.runtime_from,
        change="new" if before is None else "changed" if happens else "unchanged",
        placed=placed,
        unchanged=sorted(done.there.keys() - new - pending.keys()),
        replaced=replaced,
        removed=removed,
        differs=differs,
        group=wanted.group.name if wanted.group else None,
        links=links.get(wanted.name, []),
        bounded=done.step.request.told is not None and done.step.request.told.bounded,
    )


def _assignment(snapshot: Snapshot, part: PlannedReplica, of: Observed) -> PlannedAssignment:
    node = snapshot.node(part.node_id)
    alone = not part.gpus and part.egress_resource is None
    # A replica from before sets were recorded may be divided in another way than is asked for.
    size = part.set_size or (of.request.needs.gpus if part.ranks else 0)
    whole = [gpu for gpu, share in part.taken.items() if share == WHOLE] if part.shares else part.gpus
    size = 0 if part.shares else size
    value = slowest_group(node.topology, whole, size)
    return PlannedAssignment(
        part.replica_index,
        node.id,
        node.name,
        list(part.gpus),
        value.known_gb_per_s,
        value.link_name,
        part.share / WHOLE,
        part.profile,
        list(part.ranks),
        part.egress_resource,
        part.egress_units,
        part.cpu_milli / 1000 if alone else 0.0,
        part.memory_bytes if alone else 0,
        part.set_size,
        slowest_group(node.topology, sorted(whole), size).known_gb_per_s,
        value.known_upper_gb_per_s,
        value.measured,
        [share / WHOLE for share in part.shares],
    )
