"""Plans against brute force, with every feature at once: shares, MIG, constraints, several sets, egress, policies.

``ORACLE_EXAMPLES=20000`` makes it a long run.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.explanation import explain
from placement.core.planner import Change, plan, steps
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.score import GIB, WHOLE, Needs, Within
from placement.core.snapshot import GPU_DOMAIN_LABEL, Node, Policy, Snapshot
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology
from placement.errors import Unplaceable
from tests.properties.oracle import Oracle, Piece, Remote, State, cuts, is_named, pieces_of, speed

EXAMPLES = int(os.environ.get("ORACLE_EXAMPLES", "0"))


def examples(usually: int) -> settings:
    """So many in the suite, and as many as are asked for in a long run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=EXAMPLES or usually, deadline=None, suppress_health_check=slow)


def _row() -> Topology:
    """NV1 - NV2 - NV1 in a row: the fastest pair is two that others need."""
    links = [[UNKNOWN_LINK] * 4 for _ in range(4)]
    for a, b, nvlinks in [(0, 1, 1), (1, 2, 2), (2, 3, 1), (0, 2, 0), (1, 3, 0), (0, 3, 0)]:
        links[a][b] = links[b][a] = Link(Path.NVLINK, nvlinks) if nvlinks else Link(Path.SYS)
    return Topology(tuple(map(tuple, links)), numa=((0,), (0,), (1,), (1,)), model="Tesla V100-SXM2-32GB")


def _part(name: str, gpus: Sequence[int]) -> Topology:
    """Some GPUs of a machine of the catalogue."""
    whole = topologies.load(name)
    links = tuple(tuple(whole.links[a][b] for b in gpus) for a in gpus)
    return Topology(links, numa=tuple(whole.numa[gpu] for gpu in gpus), model=whole.model)


MACHINES = [topologies.load(name) for name in ("a100-pcie-4x", "hgx-a100-4gpu", "l40s-4x")]
MACHINES += [
    _row(),
    _part("dgx-1v", range(4)),
    _part("dgx-1v", (0, 1, 2, 6)),
    _part("dgx-1v", (0, 3, 4, 5, 7)),
]
MACHINES += [_part("a100-pcie-4x", (0,)), _part("a100-pcie-4x", (0, 2)), Topology.unknown(3)]
SMALL, LARGE = "1g.10gb", "3g.40gb"
ZONE, RACK = "ray.io/availability-zone", "rack"
EGRESS = ("egress", "egress_openai", "egress_gemini")
NAMES = ("node-0", "id-1", "10.0.0.2", "node-3")
MODES = ("whole", "share", "memory", "mig", "stages", "parts", "larger")
"""What a replica may ask for."""


def cluster(chance: Random, mode: str) -> Snapshot:
    """Up to four nodes of one machine or of several, more or less busy, on which what is asked for is likely."""
    shared = chance.random() < (1 if mode in ("share", "memory") else 0.2)
    cut = chance.random() < (1 if mode == "mig" else 0.1)
    labelled = chance.random() < (1 if mode in ("parts", "larger") else 0.5)
    egress = chance.random() < (1 if mode == "remote" else 0.1)
    seen, sized = chance.random() < 0.5, chance.random() < 0.4
    palette = chance.choices(MACHINES, k=chance.randint(1, 2))
    several = mode in ("stages", "parts", "larger")
    gpu_states: list[str | int] = ["busy", *["free"] * chance.choice((5, 10) if several else (1, 2, 5))]
    gpu_states += [250, 500, 750] if shared else []
    gpu_states += [SMALL, LARGE, "?", "busy " + SMALL] if cut else []
    if mode == "mig":
        gpu_states = chance.sample([*gpu_states, SMALL, LARGE], k=3)
    usual = chance.choices((None, 10, 70, 70), k=5)
    made: list[tuple[Topology, list[str | int], dict[str, Any]]] = []
    for i in range(chance.randint(1, 4)):
        if i and chance.random() < 0.3:  # one like another, but for which GPUs are in which state
            machine, states, facts = chance.choice(made)
            states = chance.sample(states, k=len(states))
        else:
            machine = chance.choice([*palette, *palette, Topology.unknown(0)] if egress else palette)
            states = chance.choices(gpu_states, k=len(machine))
            facts = {"cpu_milli": 64_000, "memory_bytes": 512 * GIB}
            facts["gpu_memory_bytes"] = chance.choice([None, 24 * GIB, 80 * GIB, 80 * GIB])
            facts["problem"] = chance.choice([*[None] * 8, "is draining"])
            if seen:
                gibs = usual if chance.random() < 0.7 else chance.choices(usual, k=len(usual))
                facts["free_memory"] = {gpu: gib * GIB for gpu, gib in enumerate(gibs[: len(machine)]) if gib}
            if labelled:
                facts |= description(chance)
            if sized:
                facts["cpu_milli"] = chance.choice([0, 2000, 4000, 9000])
                facts["memory_bytes"] = chance.choice([8, 64]) * GIB
            if egress:
                units = {resource: chance.choice([None, 0, 1, 2, 5]) for resource in EGRESS}
                facts["egress"] = {resource: left for resource, left in units.items() if left is not None}
                facts["serving"] = counted(chance.choice(((), (("openai", "k"),))))
        made.append((machine, states, facts))
    nodes = [
        Node(f"id-{i}", f"node-{i}", f"10.0.0.{i}", machine, **gpu_fields(states), **facts)
        for i, (machine, states, facts) in enumerate(made)
    ]
    return Snapshot(chance.sample(nodes, k=len(nodes)))


def gpu_fields(states: Sequence[str | int]) -> dict[str, Any]:
    """What a node holds, from what each of its GPUs is: free, busy, shared, or an instance."""
    of = dict(enumerate(states))
    profiles = {gpu: str(state).removeprefix("busy ") for gpu, state in of.items()}
    return {
        "free": frozenset(gpu for gpu, state in of.items() if state == "free"),
        "rests": {gpu: state for gpu, state in of.items() if isinstance(state, int)},
        "slots": {gpu: profile for gpu, profile in profiles.items() if profile in (SMALL, LARGE, "?")},
        "instances": {gpu: state for gpu, state in of.items() if state in (SMALL, LARGE, "?")},
    }


def counted(items: Sequence[Any]) -> Any:
    """What is on a node, once each."""
    return frozenset(items) if isinstance(Node("", "").deployments, frozenset) else dict.fromkeys(items, 1)


def description(chance: Random) -> dict[str, Any]:
    """What a node is called, and who is on it."""
    values = {
        ZONE: chance.choice([None, "a", "a", "b"]),
        RACK: chance.choice([None, "1", "2"]),
        GPU_DOMAIN_LABEL: chance.choice([None, "x", "x", "x", "y"]),
    }
    return {
        "labels": {label: value for label, value in values.items() if value is not None},
        "accelerators": frozenset(chance.choice(((), ("A100",), ("A100", "A100-80G")))),
        "compute_capability": chance.choice([None, (7, 0), (8, 0)]),
        "deployments": counted([name for name in "xy" if chance.random() < 0.5]),
    }


def limits(chance: Random) -> dict[str, Any]:
    """Constraints on nodes: mostly none, now and then several."""
    conditions = ("a", "!a", "in(a, 1)", "!in(b, 2)", "1")
    choices: dict[str, Any] = {
        "gpu_nodes": tuple(chance.sample(NAMES, k=chance.randint(1, 3))),
        "labels": {chance.choice((ZONE, RACK)): chance.choice(conditions)},
        "accelerators": chance.choice((("A100",), ("A100-80G", "H100"))),
        "compute_capability": chance.choice(((7, 5), (8, 0))),
        "apart_from": ("x",),
        "near_to": ("y",),
        "spread_label": chance.choice((ZONE, RACK)),
    }
    found = {
        name: choices[name] for name in chance.sample(sorted(choices), k=chance.choice((0, 0, 0, 0, 1, 1, 2)))
    }
    if "spread_label" in found:
        found["max_per_domain"] = chance.choice((1, 2))
    return found


def standing(chance: Random) -> dict[str, int]:
    """Where replicas of the same deployment are already; also on a node that is no more."""
    return {node: chance.choice((1, 2)) for node in ("id-0", "id-1", "gone") if chance.random() < 0.2}


def gpu_request(chance: Random, mode: str) -> Request:
    """A request for GPUs: whole ones, a share, an instance, or several sets."""
    fields = limits(chance)
    needs: dict[str, Any] = {"gpus": 1}
    if mode == "share":
        needs["share"] = chance.choice((100, 250, 300, 500, 750))
    elif mode == "memory":
        needs["memory_bytes"] = chance.choice((6, 20, 24, 50, 80, 100)) * GIB
    elif mode == "mig":
        needs["profile"] = chance.choice((SMALL, LARGE))
    else:
        needs["gpus"] = chance.choice((1, 1, 2, 2, 2, 3, 4) if mode == "whole" else (1, 2, 2, 2))
        if mode == "stages":
            fields["stages"] = chance.choice((2, 2, 3))
        elif mode == "parts":
            fields["parts"] = 2
            fields["stages"] = chance.choice((1, 1, 2))
        elif mode == "larger":
            needs["gpus"] = chance.choice((2, 4, 6, 8))
            fields["divisible"] = chance.random() < 0.7
        if needs["gpus"] > 1:
            needs["within"] = chance.choice([Within.NODE, Within.NODE, *Within])
            needs["min_bandwidth_gb_per_s"] = chance.choice((0.0, 0.0, 15.0, 24.0, 50.0))
    if chance.random() < (0.5 if mode == "mig" else 0.2):
        needs["free_memory_bytes"] = 40 * GIB
    if chance.random() < 0.5:
        fields["cpu_milli"] = chance.choice((500, 1000)) * needs["gpus"]
        fields["memory_bytes"] = chance.choice((0, 4, 6)) * GIB * needs["gpus"]
    return Request(
        "d",
        tuple(range(chance.choice((1, 1, 2, 3)))),
        Needs(**needs),
        policy=chance.choice([*Policy, Policy.FRAGMENTATION]),
        standing=standing(chance),
        **fields,
    )


def remote_request(chance: Random) -> Request:
    """A request for egress units."""
    return Request(
        "d",
        tuple(range(chance.randint(1, 4))),
        provider="openai",
        key=chance.choice(("k", "other")),
        egress=chance.choice((1, 1, 2, 3)),
        egress_nodes=chance.choice((None, tuple(chance.sample(NAMES, k=2)))),
        egress_preference=tuple(chance.sample(NAMES, k=chance.randint(0, 2))),
        standing=standing(chance),
    )


SEEDS = st.integers(0, 2**32)
"""Drawn one by one, most of what a case is made of would be of the simplest."""


def case(mode: str, seed: int) -> tuple[Snapshot, Request]:
    """A cluster and a request, the same for a seed."""
    chance = Random(f"{mode} {seed}")
    snapshot = cluster(chance, mode)
    request = remote_request(chance) if mode == "remote" else gpu_request(chance, mode)
    for node in snapshot.nodes:
        note(shown(node))
    note(str(request))
    return snapshot, request


def shown(node: Node) -> str:
    """A node without the links of its GPUs."""
    fields = {name: getattr(node, name) for name in Node.__dataclass_fields__ if name != "topology"}
    return f"{len(node.topology)} x {node.topology.model} {fields}"


# -- existence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@examples(60)
@given(seed=SEEDS)
def test_replicas_are_placed_exactly_when_they_can_be_and_as_the_rules_say(mode: str, seed: int) -> None:
    judge(*case(mode, seed))


@examples(60)
@given(seed=SEEDS)
def test_so_are_remote_replicas(seed: int) -> None:
    judge_remote(*case("remote", seed))


def judge(snapshot: Snapshot, request: Request) -> None:
    oracles = [Oracle(snapshot, cut) for cut in cuts(snapshot, request)]
    outcome = planned(snapshot, request)
    if isinstance(outcome, Plan):
        first = next((one for one in oracles if one.exists()), None)
        assert first is not None, "nothing was found by trying all"
        check(first, snapshot, outcome)
    else:
        assert not any(one.exists() for one in oracles)
        check_refusal(snapshot, request, outcome)


def judge_remote(snapshot: Snapshot, request: Request) -> None:
    oracle = Remote(snapshot, request)
    outcome = planned(snapshot, request)
    assert isinstance(outcome, Plan) == oracle.exists()
    if isinstance(outcome, Plan):
        check_remote(oracle, outcome)
    else:
        check_refusal(snapshot, request, outcome)


def planned(snapshot: Snapshot, request: Request) -> Plan | Unplaceable:
    """What ``plan`` says, which must say it again, and leave the snapshot as it was."""
    before = offered(snapshot)
    outcome = plan(snapshot, request)
    assert offered(snapshot) == before
    again = plan(Snapshot(snapshot.nodes[::-1], snapshot.near), request)
    assert str(again) == str(outcome) == str(plan(snapshot, request))
    return outcome


def offered(snapshot: Snapshot) -> object:
    """All that a snapshot says. What it has worked out by now must be what a fresh one works out."""
    fresh = Snapshot(snapshot.nodes, snapshot.near)
    for (needs, policy), known in snapshot._offers.items():
        assert known._nodes == fresh.offers(needs, policy)._nodes
    if snapshot.room is not None:
        assert snapshot.room._nodes == list(snapshot.nodes)
    nodes = [
        [copy.copy(getattr(node, field)) for field in Node.__dataclass_fields__] for node in snapshot.nodes
    ]
    return nodes, dict(snapshot.mix.kinds)


def check(oracle: Oracle, snapshot: Snapshot, outcome: Plan) -> None:
    """That a plan is valid, and as good as it is said to be."""
    request = oracle.request
    state = oracle.start()
    sets = request.stages * request.parts
    assert outcome.deployment == request.deployment
    assert outcome.set_size == request.needs.gpus
    by_index: dict[int, list[PlannedReplica]] = {}
    for replica in outcome.replicas:
        by_index.setdefault(replica.replica_index, []).append(replica)
    assert list(by_index) == list(request.replicas)
    on_node = Counter(request.standing)
    packed = request.needs.floor and len(request.replicas) > 1
    for parts in by_index.values():
        assert len({part.node_id for part in parts}) == len(parts)
        pieces = pieces_of(snapshot, parts, request.needs.gpus)
        assert len(pieces) == sets
        check_amounts(oracle, parts, pieces)
        if sorted(pieces) not in [sorted(way) for way in oracle.ways(state)]:
            raise AssertionError(f"{pieces} is no valid place")
        if not packed:
            (check_best_set if sets == 1 else check_best_sets)(oracle, state, on_node, pieces)
        state = oracle.take(state, pieces)
        on_node[snapshot.nodes[pieces[0][0]].id] += 1


def check_amounts(oracle: Oracle, parts: Iterable[PlannedReplica], pieces: Sequence[Piece]) -> None:
    """That a replica's parts say how much they take of each node."""
    request = oracle.request
    for part in parts:
        [node] = [node for node in oracle.nodes if node.id == part.node_id]
        sets = sum(oracle.nodes[position] is node for position, _ in pieces)
        assert part.share == oracle.share(node)
        assert part.profile == request.needs.profile
        assert (part.cpu_milli, part.memory_bytes) == (sets * request.cpu_milli, sets * request.memory_bytes)
        assert (part.egress_resource, part.egress_units) == (None, 0)


def check_best_set(oracle: Oracle, state: State, on_node: Counter[str], pieces: list[Piece]) -> None:
    """That the first keys of the policy are as good as any way has them."""
    request, nodes = oracle.request, oracle.nodes
    [(position, gpus)] = pieces
    counts = dict(state.replicas)

    def slowness(i: int, gpus: tuple[int, ...]) -> float:
        return -speed(nodes[i].topology, gpus)

    def crowd(i: int) -> tuple[int, int]:
        return counts.get(oracle.domain(nodes[i]) or "", 0), on_node[nodes[i].id]

    def free(i: int) -> int:
        rests = dict(state.left[i].rests)
        return sum(rest == WHOLE for rest in rests.values())

    def leaves(i: int, gpus: tuple[int, ...]) -> tuple[bool, int]:
        """Whether it is on a GPU that is shared already, and how much is left there."""
        share = oracle.share(nodes[i]) or 0
        rest = dict(state.left[i].rests)[gpus[0]]
        return (rest == WHOLE, rest - share) if share < WHOLE else (True, 0)

    shared = not request.needs.whole and not request.needs.profile
    counted = not request.needs.free_memory_bytes and not request.needs.profile

    def key(i: int, gpus: tuple[int, ...]) -> tuple[object, ...]:
        match request.policy:
            case Policy.TOPOLOGY if shared:
                return leaves(i, gpus)
            case Policy.TOPOLOGY:
                return slowness(i, gpus), *((*crowd(i),) if request.needs.whole else ())
            case Policy.FRAGMENTATION:
                return crowd(i)[0], slowness(i, gpus)
            case Policy.PACK if counted:
                return (free(i),)
            case Policy.LEAST_LOADED if counted:
                return -free(i), *crowd(i)
            case Policy.SPREAD:
                return *crowd(i), slowness(i, gpus)
            case _:
                return ()

    best = min(key(i, gpus) for way in oracle.ways(state) for i, gpus in way)
    assert key(position, gpus) == best


def check_best_sets(oracle: Oracle, state: State, on_node: Counter[str], pieces: list[Piece]) -> None:
    """The fewest replicas in its domain; then the slowest set as fast as can be; then the nearest, fewest nodes."""
    request, nodes = oracle.request, oracle.nodes
    positions = list(oracle.allowed)
    counts = dict(state.replicas)
    if request.spread_label is not None:
        by_count: dict[int, list[list[int]]] = {}
        for domain, count in counts.items():
            members = [i for i in positions if oracle.domain(nodes[i]) == domain]
            by_count.setdefault(count, []).append(members)
        fewest = min(
            count
            for count, domains in by_count.items()
            if any(oracle.possible(state, members, 0.0) for members in domains)
        )
        assert counts[oracle.domain(nodes[pieces[0][0]]) or ""] == fewest
        positions = [i for members in by_count[fewest] for i in members]
    slowest = min(speed(nodes[i].topology, gpus) for i, gpus in pieces)
    assert slowest == oracle.fastest(state, positions)
    if request.parts == 1 and request.policy not in (Policy.SPREAD, Policy.ROUND_ROBIN):
        chosen = {i for i, _ in pieces}
        assert (oracle.level(chosen), len(chosen)) == oracle.nearest(state, positions, slowest)


def check_remote(oracle: Remote, outcome: Plan) -> None:
    """That each replica is on the node that the rules name, and takes the provider's own units before the general."""
    request, nodes, left = oracle.request, oracle.nodes, oracle.start()
    assert [replica.replica_index for replica in outcome.replicas] == list(request.replicas)
    on_node = Counter(request.standing)
    serving = {node.id for node in nodes if ("openai", request.key) in node.serving}

    def key(i: int) -> tuple[int, int, bool]:
        named = [turn for turn, name in enumerate(request.egress_preference) if is_named(nodes[i], [name])]
        return on_node[nodes[i].id], min(named, default=len(nodes)), nodes[i].id not in serving

    for replica in outcome.replicas:
        roomy = {i for (i, _), units in left.items() if units >= request.egress}
        [position] = [i for i, node in enumerate(nodes) if node.id == replica.node_id]
        assert position in roomy
        assert key(position) == min(map(key, roomy))
        own = left.get((position, "egress_openai"), 0) >= request.egress
        assert replica.egress_resource == ("egress_openai" if own else "egress")
        assert replica.egress_units == request.egress
        assert (replica.gpus, replica.cpu_milli, replica.memory_bytes) == ((), 0, 0)
        left[position, replica.egress_resource] -= request.egress
        on_node[replica.node_id] += 1
        serving.add(replica.node_id)


# -- refusals ----------------------------------------------------------------------------------------


def check_refusal(snapshot: Snapshot, request: Request, refusal: Unplaceable) -> None:
    """That it counts every node, names what dropped the last one, and says what would help."""
    assert refusal.deployment == request.deployment
    assert refusal.advice
    assert refusal.summary
    assert all(count > 0 for count in refusal.excluded.values())
    [step] = steps(snapshot, [Change(request)])
    assert str(step.outcome) == str(refusal)
    why = explain(step.seen, step.request)
    assert why.advice == refusal.advice
    assert why.nodes == len(snapshot.nodes)
    left = why.nodes
    for stage in why.stages:
        assert left > 0
        assert left == stage.kept + sum(stage.excluded.values())
        left = stage.kept
    assert left == 0, "no stage dropped the last node"
    assert sum(refusal.excluded.values()) <= len(snapshot.nodes)
