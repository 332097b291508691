"""Dry run = apply: sequences of changes on a model cluster, with every feature at once.

What a plan says is carried out here by hand, field by field, and compared with what the planner makes of it.
``ORACLE_EXAMPLES=20000`` makes it a long run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import given, note

from placement import topologies
from placement.core.needs import WHOLE, Within
from placement.core.node import Node
from placement.core.planner import advance, plan, steps, vacate
from placement.core.policy import Policy
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import Unplaceable
from placement.wire.cluster import ClusterFile
from placement.wire.deployment import Deployment
from placement.wire.dry_run import plan_deployments, plan_in_order
from placement.wire.held import HeldDeployment, HeldReplica
from placement.wire.plans import PlacementPlan
from placement.wire.requests import request_of
from tests.properties.cases import (
    EVERYTHING,
    LARGE,
    MODES,
    RACK,
    SEEDS,
    SMALL,
    ZONE,
    cluster,
    examples,
    held_as,
    offered,
    request_of_kind,
)  # fmt: skip
from tests.properties.oracle import OnCpus, Oracle, is_named, may_be_beside, oracles, pieces_of, will_do

NAMES = ("a", "b", "c", "x")

Held = tuple[Request, tuple[PlannedReplica, ...]]
"""A deployment that stands in the planner's terms."""


# -- carrying out by hand ----------------------------------------------------------------------------


def carried_out(
    nodes: Iterable[Node],
    replicas: Iterable[PlannedReplica],
    name: str,
    calls: tuple[str, str] | None,
    times: int,
) -> list[Node]:
    """The nodes once these replicas are there (``times`` is 1) or gone (-1)."""
    found = {node.id: node for node in nodes}
    for one in replicas:
        if one.node_id not in found:
            continue
        node = found[one.node_id]
        fields: dict[str, Any] = {"deployments": counted(node.deployments, name, times)}
        if one.egress_resource is not None:
            left = node.egress[one.egress_resource] - times * one.egress_units
            fields["egress"] = {**node.egress, one.egress_resource: left}
            fields["serving"] = counted(node.serving, calls, times)
        elif one.profile:
            taken = dict.fromkeys(one.gpus, one.profile)
            others = {slot: profile for slot, profile in node.instances.items() if slot not in taken}
            assert times < 0 or len(others) == len(node.instances) - 1
            fields["instances"] = others if times > 0 else {**others, **taken}
        else:
            rests = {**dict.fromkeys(node.free, WHOLE), **node.rests}
            for gpu in one.gpus:
                rests[gpu] = rests.get(gpu, 0) - times * one.share
                assert 0 <= rests[gpu] <= WHOLE, "more than there is"
            fields["free"] = frozenset(gpu for gpu, rest in rests.items() if rest == WHOLE)
            # A GPU that is shared out to the last bit is one that is shared; one that is taken whole is not.
            shared = {
                gpu
                for gpu, rest in rests.items()
                if rest < WHOLE and (gpu in node.rests or one.share < WHOLE)
            }
            fields["rests"] = {gpu: rests[gpu] for gpu in shared if gpu in node.rests or gpu in one.gpus}
        holders = {gpu: [*names] for gpu, names in node.holders.items()}
        for gpu in one.gpus:
            names = holders.setdefault(gpu, [])
            if times > 0 or name in names:
                (names.append if times > 0 else names.remove)(name)
        fields["holders"] = {gpu: tuple(sorted(names)) for gpu, names in holders.items() if names}
        fields["cpu_milli"] = node.cpu_milli - times * one.cpu_milli
        fields["memory_bytes"] = node.memory_bytes - times * one.memory_bytes
        found[one.node_id] = replace(node, **fields)
    return list(found.values())


def counted(counts: Mapping[Any, int], key: Any, more: int) -> dict[Any, int]:
    """The counts with one more or less, without what there is none of."""
    return dict(+(Counter(counts) + Counter({key: 1}) if more > 0 else Counter(counts) - Counter({key: 1})))


def same(snapshot: Snapshot, nodes: Iterable[Node]) -> bool:
    """Whether a snapshot has just these nodes."""
    return list(snapshot.nodes) == sorted(nodes, key=lambda node: (node.name, node.id))


def with_draining(chance: Random, nodes: Sequence[Node]) -> list[Node]:
    """The nodes, of which one begins to drain, and the others do not."""
    drains = chance.choice(nodes).id
    return [replace(node, problem="is draining" if node.id == drains else None) for node in nodes]


# -- in the planner's terms --------------------------------------------------------------------------


def without_limits(request: Request) -> Request:
    """The request to any node."""
    return replace(
        request,
        gpu_nodes=None,
        cpu_nodes=None,
        labels={},
        accelerators=(),
        compute_capability=None,
        spread_label=None,
    )


def next_request(chance: Random, standing: Mapping[str, Held]) -> Request | None:
    """A deployment that does not stand yet, apart from or near to some that may; ``None`` if all stand."""
    names = [name for name in NAMES if name not in standing]
    if not names:
        return None
    mode = chance.choice((*MODES, "remote", "cpus"))
    request = request_of_kind(chance, mode)
    request = replace(request, replicas=request.replicas[:2])
    name = chance.choice(names)
    if chance.random() < 0.6:
        request = without_limits(request)
    apart = tuple(other for other in (*NAMES, "y") if other != name and chance.random() < 0.1)
    near = tuple(other for other in standing if other not in apart and chance.random() < 0.15)
    kept_away_by = tuple(other for other, (asked, _) in standing.items() if name in asked.apart_from)
    return replace(
        request, deployment=name, apart_from=apart, near_to=near, kept_away_by=kept_away_by, standing={}
    )


@examples(120)
@given(seed=SEEDS)
def test_a_snapshot_goes_through_changes_as_the_cluster_does(seed: int) -> None:
    chance = Random(f"changes {seed}")
    start = snapshot = cluster(chance, EVERYTHING)
    nodes, standing = list(start.nodes), dict[str, Held]()
    for _ in range(chance.randint(2, 8)):
        if chance.random() < 0.1:
            nodes = with_draining(chance, nodes)
            snapshot = Snapshot(nodes, snapshot.near, snapshot.mix)
        request = next_request(chance, standing)
        if request is None or (standing and chance.random() < 0.3):
            name = chance.choice(sorted(standing))
            asked, replicas = standing.pop(name)
            snapshot = vacate(snapshot, replicas, name, asked.calls)
            nodes = carried_out(nodes, replicas, name, asked.calls, -1)
        else:
            note(str(request))
            afresh = Snapshot(nodes, snapshot.near, snapshot.mix)
            step, snapshot = advance(snapshot, request)
            assert str(step.outcome) == str(plan(afresh, request)), "what it has worked out is out of date"
            if isinstance(step.outcome, Plan):
                name, replicas = request.deployment, step.outcome.replicas
                before = {node.id: node for node in nodes}
                assert all(may_be_beside(before[replica.node_id], request) for replica in replicas)
                standing[name] = request, replicas
                nodes = carried_out(nodes, replicas, name, request.calls, 1)
        assert same(snapshot, nodes)
        offered(snapshot)
    for name, (asked, replicas) in standing.items():
        snapshot = vacate(snapshot, replicas, name, asked.calls)
    assert same(snapshot, [replace(node, problem=snapshot.node(node.id).problem) for node in start.nodes])


@examples(60)
@given(seed=SEEDS)
def test_steps_are_plans_one_after_the_other(seed: int) -> None:
    chance = Random(f"steps {seed}")
    start = cluster(chance, EVERYTHING)
    standing: dict[str, Held] = {}
    requests = []
    for _ in range(chance.randint(1, 4)):
        request = next_request(chance, standing)
        if request is not None:
            standing[request.deployment] = request, ()
            requests.append(request)
    nodes, mix = list(start.nodes), start.mix
    before = offered(start)
    for request, step in zip(requests, steps(start, requests), strict=False):
        alone = plan(Snapshot(nodes, start.near, mix), request)
        assert str(step.outcome) == str(alone)
        if isinstance(alone, Unplaceable):
            break
        nodes = carried_out(nodes, alone.replicas, request.deployment, request.calls, 1)
        mix = mix.plus(request)
    assert offered(start) == before


# -- as users declare it -----------------------------------------------------------------------------


def declaration(chance: Random, name: str, snapshot: Snapshot) -> Deployment:
    """A deployment as a user writes it."""
    kind = chance.choice(("whole", "whole", "share", "memory", "mig", "groups", "larger", "remote", "cpus"))
    fields: dict[str, Any] = {"name": name, "model": "m", "replicas": chance.choice((1, 1, 2, 3))}
    limits: dict[str, Any] = {}
    names = [node.name for node in snapshot.nodes]
    several = 1
    if kind == "remote":
        fields |= {"runtime": "openai", "serving": {"max_concurrent": chance.choice((1, 2))}}
        if chance.random() < 0.3:
            limits["egress_preference"] = chance.sample(names, k=1)
    elif kind == "cpus":
        fields |= chance.choice(({"cpus": 0.5}, {"cpus": 1}, {"cpus": 2, "memory_gib": 4}))
    elif kind == "whole":
        fields["gpus"] = several = chance.choice((1, 1, 2, 2, 4))
    elif kind == "share":
        fields["gpus"] = chance.choice((0.25, 0.5, 0.3))
    elif kind == "memory":
        fields["gpu_memory_gib"] = chance.choice((6, 20, 50))
    elif kind == "mig":
        fields["mig"] = chance.choice((SMALL, LARGE))
    elif kind == "groups":
        several = chance.choice((1, 2))
        fields |= {"tensor_parallel": several, "pipeline_parallel": chance.choice((1, 2, 2, 3))}
    else:
        fields["gpus"] = several = chance.choice((4, 6, 8))
    if several > 1 and chance.random() < 0.3:
        fields |= chance.choice(
            ({"within": "nvlink"}, {"within": Within.SWITCH}, {"min_bandwidth_gb_per_s": 24.0})
        )
    fields["policy"] = chance.choice([Policy.TOPOLOGY, *Policy])
    if kind != "remote":
        choices: dict[str, Any] = {
            "cpu_nodes" if kind == "cpus" else "gpu_nodes": chance.sample(
                names, k=chance.randint(1, len(names))
            ),
            "node_labels": {chance.choice((ZONE, RACK)): chance.choice(("a", "!a", "in(a, 1)"))},
            "accelerators": ["A100"],
            "min_compute_capability": "7.5",
            "min_free_gpu_memory_gib": 40,
            "cpus_per_gpu": 1,
            "memory_gib_per_gpu": 4,
            "spread": {"label": ZONE, "max": chance.choice((1, 2))},
        }
        picked = chance.sample(sorted(choices), k=chance.choice((0, 0, 0, 0, 1, 2)))
        limits |= {field: choices[field] for field in picked}
        if kind != "cpus" and chance.random() < 0.2 and (gpus := gpus_of(chance, snapshot, fields)):
            limits["gpus"] = gpus
    others = [other for other in NAMES if other != name]
    if chance.random() < 0.2:
        limits["apart_from"] = [others.pop(chance.randrange(len(others)))]
    if chance.random() < 0.1:
        limits["near_to"] = [chance.choice(others)]
    if limits:
        fields["constraints"] = limits
    return Deployment.model_validate(fields)


def gpus_of(chance: Random, snapshot: Snapshot, fields: Mapping[str, Any]) -> list[int | str]:
    """GPUs of a node, as many as a deployment needs, or more; none, if it has fewer."""
    node = chance.choice(snapshot.nodes)
    gpus = max(1, fields.get("gpus", fields.get("tensor_parallel", 1) * fields.get("pipeline_parallel", 1)))
    needed, slots = fields["replicas"] * int(gpus), [*range(len(node.topology))]
    if needed > len(slots):
        return []
    chosen = chance.sample(slots, k=chance.randint(needed, len(slots)))
    by_uuid = chance.choice((0.0, 1.0)) if node.uuids and "mig" not in fields else 0.0
    return [node.uuids[gpu] if chance.random() < by_uuid else gpu for gpu in chosen]


class Model:
    """A cluster to which plans are applied by hand."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.near = snapshot.near
        self.nodes = list(snapshot.nodes)
        self.held: dict[str, HeldDeployment] = {}

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.nodes, self.near)

    def apply(self, deployment: Deployment, planned: PlacementPlan) -> None:
        """Has what stands of a deployment be as planned."""
        before = self.held.get(deployment.name)
        self.release(deployment.name)
        held = self.held[deployment.name] = held_as(deployment, planned, before)
        self._carry_out(held, 1)

    def release(self, name: str) -> None:
        """Has nothing of a deployment stand."""
        if name in self.held:
            self._carry_out(self.held.pop(name), -1)

    def _carry_out(self, held: HeldDeployment, times: int) -> None:
        for one in held.replicas:
            calls = held.declared(one).calls
            self.nodes = carried_out(self.nodes, [one.planned()], held.deployment.name, calls, times)

    def plan(self, wanted: Sequence[Deployment], atomic: bool = True) -> list[PlacementPlan] | Unplaceable:
        try:
            return plan_deployments(self.snapshot, self.held, wanted, atomic)
        except Unplaceable as refusal:
            return refusal


@examples(120)
@given(seed=SEEDS)
def test_applying_one_by_one_is_what_a_dry_run_of_all_says(seed: int) -> None:
    chance = Random(f"declared {seed}")
    start = cluster(chance, EVERYTHING)
    model, atomic = Model(start), chance.random() < 0.5
    for _ in range(chance.randint(1, 3)):
        if chance.random() < 0.2:
            model.nodes = with_draining(chance, model.nodes)
        names = chance.sample(NAMES, k=chance.randint(1, 3))
        wanted: list[Deployment] = []
        for name in names:
            drawn = [declaration(chance, name, start) for _ in range(4)]
            fitting = [one for one in drawn if not isinstance(model.plan([*wanted, one]), Unplaceable)]
            wanted.append((fitting or drawn)[0])
        for one in wanted:
            note(str(one.model_dump(mode="json", exclude_defaults=True)))
        before = model.snapshot
        together = model.plan(wanted, atomic)
        if isinstance(together, Unplaceable):
            assert atomic
            assert together.advice
            assert not one_by_one(model, wanted), "refused together, though one by one it works"
            continue
        assert [one.deployment for one in together] == names
        for position, promised in plan_in_order(before, model.held, wanted, atomic):
            assert promised == together[position]
            alone = model.plan([wanted[position]], atomic)
            assert alone == [promised], "one by one it is otherwise"
            if satisfies(model, wanted[position]):
                stood = model.held[wanted[position].name]
                stay = [where(one) for one in stood.replicas if one.replica_index < wanted[position].replicas]
                now = [where(one) for one in held_as(wanted[position], promised).replicas]
                assert all(one in now for one in stay), "needlessly replaced"
            assert_counted(promised, wanted[position], model.held.get(wanted[position].name))
            model.apply(wanted[position], promised)
            assert_in_order(model)
        again = model.plan(wanted, atomic)
        assert not isinstance(again, Unplaceable), again
        if not any(
            one.pending for one in together
        ):  # else what came later may be what one of them waited for
            assert all(one.standing for one in again), "the same again changes something"
            assert all(one.change == "unchanged" for one in again)
            assert [one.assignments for one in again] == [one.assignments for one in together]
        file = ClusterFile.of(model.snapshot, model.held.values())
        read = ClusterFile.model_validate_json(file.model_dump_json())
        assert plan_deployments(read.snapshot(), read.held(), wanted, atomic) == again
        if chance.random() < 0.5:
            model.release(chance.choice(names))
    for name in list(model.held):
        model.release(name)
    problems = {node.id: node.problem for node in model.nodes}
    assert same(model.snapshot, [replace(node, problem=problems[node.id]) for node in start.nodes])


def where(one: HeldReplica) -> tuple[object, ...]:
    """Which replica is where."""
    return one.replica_index, one.node, one.gpus, one.egress_resource


def satisfies(model: Model, wanted: Deployment) -> bool:
    """Whether what stands of a deployment is a valid placement of what is declared now."""
    held = model.held.get(wanted.name)
    if held is None:
        return False
    replicas = [one.planned() for one in held.replicas if one.replica_index < wanted.replicas]
    without = Model(model.snapshot)
    without.held = dict(model.held)
    without.release(wanted.name)
    others = [one.deployment for one in without.held.values()]
    by_index: dict[int, list[PlannedReplica]] = {}
    for one in replicas:
        by_index.setdefault(one.replica_index, []).append(one)
    snapshot = without.snapshot
    # A node that drains keeps what it has.
    snapshot = Snapshot([replace(node, problem=None) for node in snapshot.nodes], snapshot.near)
    request = request_of(wanted, by_index, {}, snapshot, others=others)
    if request.provider is not None:
        return held.deployment.calls == wanted.calls and all(
            one.egress_units == request.egress
            and may_be_beside(snapshot.node(one.node_id), request)
            and (request.egress_nodes is None or is_named(snapshot.node(one.node_id), request.egress_nodes))
            for one in replicas
        )
    if request.on_cpus:
        return held.deployment.cpus is not None and are_on_cpus(OnCpus(snapshot, request), replicas)
    if held.deployment.remote:
        return False
    return any(is_placement(one, snapshot, by_index) for one in oracles(snapshot, request))


def are_on_cpus(oracle: OnCpus, replicas: Iterable[PlannedReplica]) -> bool:
    """Whether these are a valid placement of replicas on CPUs alone."""
    request, left, domains = oracle.request, oracle.start(), oracle.domains()
    for one in replicas:
        [position] = [i for i, node in enumerate(oracle.nodes) if node.id == one.node_id]
        takes = (one.gpus, one.egress_resource, one.cpu_milli, one.memory_bytes)
        if takes != ((), None, request.cpu_milli, request.memory_bytes):
            return False
        if position not in oracle.ways(left, domains):
            return False
        left, domains = oracle.take(left, domains, position)
    return True


def is_placement(oracle: Oracle, snapshot: Snapshot, replicas: Mapping[int, list[PlannedReplica]]) -> bool:
    """Whether these are a valid placement of replicas."""
    request, state = oracle.request, oracle.start()
    size = request.needs.gpus
    for parts in replicas.values():
        gpus = sum(len(part.gpus) for part in parts)
        if gpus != size * request.stages * request.parts:
            return False
        ranked = [replace(part, ranks=part.ranks or tuple(range(gpus))) for part in parts]
        if any(not will_do(part.profile or None, request.needs) or len(part.gpus) % size for part in parts):
            return False
        pieces = pieces_of(snapshot, ranked, size)
        sets = Counter(position for position, _ in pieces)
        for part in parts:
            position = snapshot.nodes.index(snapshot.node(part.node_id))
            takes = (part.share, part.cpu_milli, part.memory_bytes)
            each = (request.cpu_milli * sets[position], request.memory_bytes * sets[position])
            if takes != (oracle.share(snapshot.nodes[position]), *each):
                return False
        if sorted(pieces) not in [sorted(way) for way in oracle.ways(state)]:
            return False
        state = oracle.take(state, pieces)
    return True


def one_by_one(model: Model, wanted: Sequence[Deployment]) -> bool:
    """Whether all can be applied in the order in which they are given. The model stays as it is."""
    trial = Model(model.snapshot)
    trial.held = dict(model.held)
    for one in wanted:
        planned = trial.plan([one])
        if isinstance(planned, Unplaceable):
            return False
        trial.apply(one, planned[0])
    return True


def assert_counted(planned: PlacementPlan, wanted: Deployment, before: HeldDeployment | None) -> None:
    """That each replica is in the list of what becomes of it, and in no other."""
    stood = {one.replica_index for one in before.replicas} if before else set()
    there = {one.replica_index for one in planned.assignments}
    lists = [planned.placed, planned.unchanged, planned.replaced, [*planned.pending]]
    assert sorted(index for indices in lists for index in indices) == list(range(wanted.replicas))
    assert there == set(range(wanted.replicas)) - (planned.pending.keys() - stood)
    assert stood.isdisjoint(planned.placed)
    assert stood.issuperset([*planned.unchanged, *planned.replaced])
    assert set(planned.removed) == {index for index in stood if index >= wanted.replicas}
    assert (planned.change == "new") == (before is None)
    assert bool(planned.differs) == (before is not None and before.deployment != wanted)


def assert_in_order(model: Model) -> None:
    """That no replica is beside whom it is to be apart from, unless it waits to be replaced."""
    where = {name: {replica.node for replica in held.replicas} for name, held in model.held.items()}
    for name, held in model.held.items():
        indices = {replica.replica_index for replica in held.replicas}
        assert indices <= set(range(held.deployment.replicas))
        limits = held.deployment.constraints
        here = {replica.node for replica in held.replicas if not replica.generation}
        for other in limits.apart_from if limits else ():
            assert not here & where.get(other, set()), f"{name} beside {other}"


def test_a_dry_run_of_what_stands_shows_its_own_bandwidth() -> None:
    machine = topologies.load("a100-pcie-4x")
    free = [Node(name, name, topology=machine, free=frozenset(range(4))) for name in "ab"]
    model = Model(Snapshot(free))
    deployment = Deployment(name="d", model="m", gpus=8, within=Within.NVLINK)
    [first] = plan_deployments(model.snapshot, {}, [deployment])
    model.apply(deployment, first)
    [again] = plan_deployments(model.snapshot, model.held, [deployment])
    assert [one.bandwidth_gb_per_s for one in first.assignments] == [230.4, 230.4]
    assert again == replace(first, standing=True, change="unchanged", placed=[], unchanged=[0])


def test_what_leaves_a_node_that_drains_does_not_end_a_dry_run() -> None:
    node = Node("id", "n", topology=Topology.unknown(2), free=frozenset({0, 1}))
    model = Model(Snapshot([node]))
    deployment = Deployment(name="a", model="m", gpus=1)
    [first] = plan_deployments(model.snapshot, {}, [deployment])
    model.apply(deployment, first)
    model.nodes = [replace(one, problem="is draining") for one in model.nodes]
    assert isinstance(model.plan([Deployment(name="a", model="m", gpus=0.5)]), Unplaceable)
