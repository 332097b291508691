"""The dry run: what applying deployments would do. The same for a live cluster and for one in a file."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter, itemgetter
from typing import Any, Literal

from placement.core.bundles import summed
from placement.core.explanation import Explanation, explain
from placement.core.mix import Mix
from placement.core.needs import WHOLE
from placement.core.node import Node
from placement.core.planner import Step
from placement.core.policy import Policy
from placement.core.reconcile import Decision, Desired, Drop, Observed, Reserve, Wait, outcome, reconcile
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Bundle, Request, Resources, Strategy
from placement.core.roles import tell
from placement.core.score import slowest_group
from placement.core.snapshot import Snapshot
from placement.core.topology import ordinals
from placement.errors import GroupStands, UnknownGpu, UnknownNode, Unplaceable
from placement.wire.cluster import HeldDeployment
from placement.wire.deployment import Deployment, PlacementConstraints
from placement.wire.groups import groups_of, links_of, located, together

SPARED_MILLI = 1000
"""CPUs that CPU replicas leave to each free GPU of their node, thousandths: verl, OpenRLHF, slime, SkyRL and Ray Data
ask one beside a GPU, and a GPU that has none beside it is of no use to them."""


@dataclass(frozen=True)
class PlannedAssignment:
    """Where a replica would go. ``gpus`` is a prediction: other Ray users may take or free some meanwhile.

    Attributes:
        bandwidth_gb_per_s: all-reduce bus bandwidth between the GPUs, GB/s per direction, measured or predicted;
            ``None`` for fewer than two GPUs, or where nothing was measured and a link is unknown. The least that it can
            be, where the host's processors or peer-to-peer are not known.
        upper_bandwidth_gb_per_s: the most that it can be then; ``None`` where nothing that decides it is unknown.
        bandwidth_measured: whether it was measured.
        weakest_link: slowest link between two of them as ``nvidia-smi topo -m`` names it.
        share: how much of the GPU, 1 for whole ones.
        mig: profile of the MIG instance that ``gpus`` is; empty for GPUs.
        ranks: which ranks of the replica are here, in the order of ``gpus``; empty where all are.
        egress_resource, egress_units: what a remote replica takes.
        cpus, memory_bytes: what a CPU replica takes.
        set_size: GPUs of each tensor-parallel group that the replica is made of; 0 where all of its GPUs are one.
        sorted_bandwidth_gb_per_s: the same where an engine sorts the node's GPUs and cuts its groups from these, as
            vLLM does: less than ``bandwidth_gb_per_s`` where no groups that such an engine keeps are as fast.
    """

    replica_index: int
    node: str
    node_name: str
    gpus: list[int]
    bandwidth_gb_per_s: float | None = None
    weakest_link: str | None = None
    share: float = 1.0
    mig: str = ""
    ranks: list[int] = field(default_factory=list)
    egress_resource: str | None = None
    egress_units: int = 0
    cpus: float = 0.0
    memory_bytes: int = 0
    set_size: int = 0
    sorted_bandwidth_gb_per_s: float | None = None
    upper_bandwidth_gb_per_s: float | None = None
    bandwidth_measured: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The planned assignment as JSON-ready values."""
        return dict(vars(self))


@dataclass(frozen=True)
class PlacementPlan:
    """A dry run: what placing would do now. Nothing is reserved.

    Attributes:
        deployment: its name.
        assignments: one for each replica and node, by replica index; also of those that wait to be replaced.
        standing: whether the deployment is placed already, just so.
        pending: replicas that would wait for a place -> why.
        runtime: what it runs on.
        runtime_from: who says so: ``declared``, ``runtime_config`` or ``by the model's name``.
        change: ``new``: nothing of that name stands; ``unchanged``: nothing would happen; else ``changed``.
        placed: replicas that would get a place and have none.
        unchanged: those that would stay as they are.
        replaced: those that would get another place, which ends the workers in the one they have.
        removed: those that are there and not wanted any more.
        differs: names of the declared fields that differ from what is declared now.
        group: the group that it is a member of.
        links: what path those of the group's links would get that name it first: ``unit``, ``between``, ``via``,
            ``route``, ``gb_per_s`` (``None`` if not known), and the two ``gpus`` on the slowest way.
        bounded: the search for the group's places was cut off; there may be better ones.
    """

    deployment: str
    assignments: list[PlannedAssignment]
    standing: bool = False
    pending: dict[int, str] = field(default_factory=dict)
    runtime: str = ""
    runtime_from: str = ""
    change: Literal["new", "unchanged", "changed"] = "new"
    placed: list[int] = field(default_factory=list)
    unchanged: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    group: str | None = None
    links: list[dict[str, Any]] = field(default_factory=list)
    bounded: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        of_group = {"group": self.group, "links": self.links, "bounded": self.bounded} if self.group else {}
        return {
            "deployment": self.deployment,
            "standing": self.standing,
            "change": self.change,
            "placed": self.placed,
            "unchanged": self.unchanged,
            "replaced": self.replaced,
            "removed": self.removed,
            "differs": self.differs,
            "runtime": self.runtime,
            "runtime_from": self.runtime_from,
            "assignments": [a.to_dict() for a in self.assignments],
            "pending": {str(index): reason for index, reason in self.pending.items()},
            **of_group,
        }


@dataclass(frozen=True)
class ExplainedPlan:
    """A plan or a refusal, and what became of every node on the way.

    Attributes:
        deployment: its name.
        plan: where its replicas would go, if they fit.
        refusal: why not, if they do not.
        explanation: stage by stage, how many nodes were excluded and why: for the first replica that is
            not there yet, or for the one that was refused.
        error: the refusal with its code and fields.
    """

    deployment: str
    plan: PlacementPlan | None
    refusal: str | None
    explanation: Explanation
    error: Unplaceable | None = None

    def to_dict(self) -> dict[str, Any]:
        """Both as JSON-ready values."""
        return {
            "deployment": self.deployment,
            "plan": self.plan.to_dict() if self.plan else None,
            "refusal": self.refusal,
            "explanation": self.explanation.to_dict(),
            "error": self.error.to_dict() if self.error else None,
        }


def plan_deployments(
    snapshot: Snapshot,
    held: Mapping[str, HeldDeployment],
    wanted: Sequence[Deployment],
    atomic: bool = False,
) -> list[PlacementPlan]:
    """What applying ``wanted`` would do to a cluster on which ``held`` stand.

    Args:
        snapshot: the cluster.
        held: what stands, by name.
        wanted: what is declared anew.
        atomic: all of it, or nothing; else replicas that find no place are ``pending``.

    Raises:
        Unplaceable: if ``atomic``: one of them does not fit on top of those before it.
        UnknownNode: its constraints name a node that is not there.
        InvalidDeployment: a group lacks a member.
        GroupStands: a group is placed, and what is declared anew would move what is placed.
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
        held: what stands, by name.
        wanted: what is declared anew.
        atomic: the first deployment that does not fit is refused, which is an answer here, and ends the list; else
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


def desired_of(wanted: Deployment, others: Iterable[Deployment] = (), releasing: bool = False) -> Desired:
    """A declaration in the planner's terms; of ``others``, some may keep away from it.

    Nodes that its constraints name need not be there: :func:`request_of` says whether they are.
    """
    gang = wanted.gang or wanted.group is not None
    return Desired(request_unchecked(wanted, range(wanted.replicas), {}, others), gang, releasing)


def observed_of(held: HeldDeployment) -> dict[int, Observed]:
    """The replicas of a deployment in the planner's terms, each with what was declared when it was placed."""
    requests = {number: request_unchecked(one, (), {}) for number, one in held.earlier.items()}
    requests[0] = request_unchecked(held.deployment, (), {})
    found: dict[int, Observed] = {}
    for one in sorted(held.replicas, key=attrgetter("replica_index", "ranks")):
        before = found.get(one.replica_index)
        parts = (*(before.parts if before else ()), one.planned())
        found[one.replica_index] = Observed(parts, requests[one.generation])
    return found


def differing(before: Deployment, after: Deployment) -> list[str]:
    """Names of the declared fields in which two declarations differ."""
    was, is_now = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [name for name in is_now if was[name] != is_now[name]]


def request_of(
    wanted: Deployment,
    missing: Iterable[int],
    standing: Mapping[str, int],
    snapshot: Snapshot,
    mending: bool = False,
    others: Iterable[Deployment] = (),
) -> Request:
    """A deployment's replicas ``missing``, in the planner's terms; of ``others``, some may keep away from it.

    Raises:
        UnknownNode: its constraints name a node that is not there; while ``mending``, only such nodes, since a
            node that it named may be the one that died.
        UnknownGpu: they name a GPU that no node has.
    """
    limits = wanted.constraints or PlacementConstraints()
    for limit in ("gpu_nodes", "egress_nodes", "egress_preference", "cpu_nodes"):
        names = getattr(limits, limit) or ()
        for name in names:
            if not snapshot.named([name]) and not (mending and snapshot.named(names)):
                known = tuple(node.name for node in snapshot.nodes)
                raise UnknownNode(f"constraints.{limit}", name, known)
    having = [node for node in snapshot.nodes if len(node.topology)]
    for gpu in limits.gpus or ():
        if having and not mending and all(node.slot_of(gpu) is None for node in having):
            raise UnknownGpu("constraints.gpus", gpu, _gpus_like(having, gpu))
    return request_unchecked(wanted, missing, standing, others)


def _gpus_like(nodes: Iterable[Node], name: int | str) -> tuple[str, ...]:
    """The GPUs that there are, each with its node, in the way in which one is named."""
    if isinstance(name, str):
        alike = [(uuid, node) for node in nodes for uuid in node.uuids.values() if uuid[:4] == name[:4]]
        return tuple(f"{uuid} ({node.name})" for uuid, node in alike)
    return tuple(f"{ordinals(range(len(node.topology)))} ({node.name})" for node in nodes)


def request_unchecked(
    wanted: Deployment,
    missing: Iterable[int],
    standing: Mapping[str, int],
    others: Iterable[Deployment] = (),
) -> Request:
    """The same, whether the nodes that it names are there or not."""
    limits = wanted.constraints or PlacementConstraints()
    labels, bundles, resources = limits.node_labels, tuple[Bundle, ...](), _NO_RESOURCES
    cpu_milli = wanted.cpu_milli or wanted.cpu_milli_per_gpu * wanted.needs.gpus
    memory_bytes = wanted.memory_bytes or wanted.memory_bytes_per_gpu * wanted.needs.gpus
    if (layout := wanted.placement_group) is not None:
        bundles = tuple(layout.planned())
        cpu_milli, memory_bytes = (
            sum(one.cpu_milli for one in bundles),
            sum(one.memory_bytes for one in bundles),
        )
        resources = summed(one.resources for one in bundles)
        if layout.on_one_node or limits.gpus:
            labels, bundles = {key: value for one in bundles for key, value in one.labels}, ()
    return Request(
        deployment=wanted.name,
        replicas=tuple(missing),
        needs=wanted.needs,
        policy=wanted.policy,
        provider=wanted.provider,
        key=wanted.key_fingerprint,
        egress=wanted.egress_per_replica,
        gpu_nodes=limits.gpu_nodes,
        egress_nodes=limits.egress_nodes,
        egress_preference=limits.egress_preference,
        cpu_nodes=limits.cpu_nodes,
        labels=labels,
        accelerators=limits.accelerators or (),
        compute_capability=limits.compute_capability,
        cpu_milli=cpu_milli,
        memory_bytes=memory_bytes,
        spared_milli=SPARED_MILLI if wanted.cpus is not None else 0,
        stages=wanted.stages,
        divisible=wanted.divisible,
        apart_from=limits.apart_from,
        near_to=limits.near_to,
        kept_away_by=tuple(
            dict.fromkeys(  # one that is being changed is among them as it stands and as it is to be
                one.name
                for one in others
                if one.constraints and wanted.name in one.constraints.apart_from and one.name != wanted.name
            )
        ),
        spread_label=limits.spread.label if limits.spread else None,
        max_per_domain=limits.spread.max if limits.spread else 0,
        standing=dict(standing),
        bundles=bundles,
        strategy=layout.strategy if layout and bundles else Strategy.STRICT_PACK,
        domain_label=layout.domain_label if layout else None,
        resources=resources,
    )


_NO_RESOURCES: Resources = ()


def mix_of(snapshot: Snapshot, deployments: Iterable[Deployment], mix: Mix | None = None) -> Mix:
    """What is asked for by these deployments beside the ``mix``.

    Those whose constraints name a node that is no more do not count.
    """
    mix = mix or Mix()
    for one in deployments:
        with contextlib.suppress(UnknownNode, UnknownGpu):
            mix = mix.plus(request_of(one, range(one.replicas), {}, snapshot))
    return mix


@dataclass(frozen=True)
class _Done:
    """What became of one of the deployments that are wanted.

    Attributes:
        position: its place among them.
        before: what stands of it.
        observed, there: its replicas as they are, and as they are then.
        step: what was planned of it, or refused.
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
        """Why nothing is done, if so."""
        return self.decision.refusal

    @property
    def pending(self) -> dict[int, str]:
        """The replicas that wait -> why."""
        waits = [action for action in self.decision.actions if isinstance(action, Wait)]
        return {index: str(action.refusal) for action in waits for index in action.indices}

    def held(self) -> HeldDeployment:
        """What stands then."""
        outdated = self.pending.keys() & self.there.keys()
        new = [part for i, one in self.there.items() if i not in outdated for part in one.parts]
        if self.before is None:
            return HeldDeployment.of(self.deployment, new)
        return self.before.becomes(self.deployment, new, outdated)


def _planned(
    snapshot: Snapshot, held: Mapping[str, HeldDeployment], wanted: Sequence[Deployment], atomic: bool
) -> list[_Done]:
    """What becomes of each, in the order in which to apply them; a refusal is the last.

    One that is to be near another comes after it. If not all find room so, one that is to be apart from another comes
    after it, too, as the other may make room; and if it is no better then, they are taken as they are given.
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
    """How much has found no place: whether one is refused, and how many replicas wait."""
    return bool(done and done[-1].refusal), sum(len(one.pending) for one in done)


def _order(wanted: Sequence[Deployment], apart: bool) -> list[int]:
    """Positions, so that who names another by ``near_to``, and ``apart_from`` if so wished, comes after it.

    Where they name each other in a circle, ``near_to`` counts more, and the given order most.
    """
    names = Counter(one.name for one in wanted)
    ways = [[_named(one, way) for one in wanted] for way in (apart, False)]
    left = list(range(len(wanted)))
    order = []
    while left:
        free = (i for named in ways for i in left if names.keys().isdisjoint(named[i]))
        order.append(next(free, left[0]))
        left.remove(order[-1])
        names -= Counter([wanted[order[-1]].name])  # drops a name of which none is left
    return order


def _named(one: Deployment, apart: bool) -> set[str]:
    """The deployments that one wants to be near to, or apart from."""
    limits = one.constraints or PlacementConstraints()
    return {*limits.near_to, *(limits.apart_from if apart else ())}


def _carry_out(
    snapshot: Snapshot,
    held: Mapping[str, HeldDeployment],
    wanted: Sequence[Deployment],
    order: Iterable[int],
    atomic: bool,
) -> Iterator[_Done]:
    """Each on top of the ones before; ends with the first refusal."""
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
        decision = reconcile(
            desired,
            observed,
            standing.with_mix(snapshot, one),
            atomic=atomic,
            may_wait=_waiting(before, one, same) if before and atomic else (),
        )
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
    """The members of a group, each told where its replicas go.

    Raises:
        GroupStands: what is placed of it would have to move.
    """
    declared = {}
    for one in members:
        before = standing.held.get(one.name)
        if before is not None and before.releasing:
            before = None
        if before is not None:
            require_same_places(before.deployment, one, bool(before.replicas))
        declared[one.name] = (
            desired_of(one, standing.keeping_apart()),
            observed_of(before) if before is not None else {},
        )
    assert members[0].group is not None
    return tell(snapshot, members[0].group.planned(), declared)


def require_same_places(before: Deployment, wanted: Deployment, placed: bool) -> None:
    """Sees to it that no replica of a group need move, or be parted from it, when it is declared anew.

    Args:
        before: what is declared.
        wanted: what is to be.
        placed: whether any replica of it is.

    Raises:
        GroupStands: it would have to.
    """
    was, is_now = before.group, wanted.group
    if was is None and (is_now is None or not placed):
        return
    name = (is_now or was or wanted).name
    if was is None:
        raise GroupStands(name, wanted.name, "it is placed, and was no member of the group")
    if is_now is None:
        raise GroupStands(name, wanted.name, "it is declared without the group")
    if was.model_copy(update={"units": is_now.units}) != is_now:
        raise GroupStands(
            was.name, wanted.name, "the group has another name, other members or other links now"
        )
    if placed and before.shape() != wanted.shape():
        fields = ", ".join(field for field in differing(before, wanted) if field not in ("group", "replicas"))
        raise GroupStands(name, wanted.name, f"its replicas would have to move ({fields})")


def _links(snapshot: Snapshot, done: Sequence[_Done]) -> dict[str, list[dict[str, Any]]]:
    """Deployment -> what path those links of its group would get that name it first."""
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


def _waiting(before: HeldDeployment, wanted: Deployment, same: bool) -> set[int]:
    """The replicas that wait already: for a place, or, if the same is asked for as before, to be replaced."""
    placed = {one.replica_index for one in before.replicas if not (same and one.generation)}
    return set(range(min(before.deployment.replicas, wanted.replicas))) - placed


def _keeping_apart(held: HeldDeployment) -> list[Deployment]:
    """The declarations of what stands that name others to be apart from."""
    return [one for one in (held.deployment, *held.earlier.values()) if _named(one, apart=True)]


class _Standing:
    """What stands, as one after the other is applied.

    Attributes:
        held: all of it, by name.
        apart: name -> declarations that others may have to keep away from: the present one, and those under which
            replicas stand that are to be replaced.
    """

    def __init__(self, snapshot: Snapshot, held: Mapping[str, HeldDeployment]) -> None:
        self.held = dict(held)
        self.apart = {name: apart for name, one in held.items() if (apart := _keeping_apart(one))}
        self._snapshot = snapshot
        self._mix: Mix | None = None

    def enter(self, one: HeldDeployment) -> None:
        """Notes a deployment that is new, or has changed."""
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
        """Notes one that is gone."""
        self.held.pop(name, None)
        self.apart.pop(name, None)

    def keeping_apart(self) -> list[Deployment]:
        """The declarations of all that others may have to keep away from."""
        return [one for several in self.apart.values() for one in several]

    def with_mix(self, snapshot: Snapshot, one: Deployment) -> Snapshot:
        """The snapshot that knows what else is asked for, where that matters to the policy of a deployment."""
        if one.policy is not Policy.FRAGMENTATION:
            return snapshot
        if self._mix is None:
            self._mix = mix_of(self._snapshot, (held.deployment for held in self.held.values()))
        return snapshot.changed((), self._mix)


def _begin(replicas: Mapping[int, Observed]) -> Counter[str]:
    """Node id -> replicas that begin there."""
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
    # What stood before there was a record of its sets may have been cut in another way than is asked for.
    size = part.set_size or (of.request.needs.gpus if part.ranks else 0)
    value = slowest_group(node.topology, part.gpus, size)
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
        slowest_group(node.topology, sorted(part.gpus), size).known_gb_per_s,
        value.known_upper_gb_per_s,
        value.measured,
    )
