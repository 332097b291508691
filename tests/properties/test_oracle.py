"""Plans against brute force, all features at once: shares, MIG, constraints, several sets, egress, CPUs, policies.

``ORACLE_EXAMPLES=20000`` makes it a long run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from unittest import mock

import pytest
from hypothesis import given

from placement import topologies
from placement.core.explanation import explain
from placement.core.needs import ANY_PROFILE, GIB, WHOLE, Needs
from placement.core.node import Node
from placement.core.planner import plan, steps, vacate
from placement.core.policy import Policy
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.room import Room, room_of
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import NoGpuNodes, Unplaceable
from tests.properties.cases import MODES, SEEDS, case, examples, offered
from tests.properties.oracle import OnCpus, Oracle, Piece, Remote, State, is_named, oracles, pieces_of, speed

# -- existence ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@examples(100)
@given(seed=SEEDS)
def test_replicas_are_placed_exactly_when_they_can_be_and_as_the_rules_say(mode: str, seed: int) -> None:
    judge(*case(mode, seed))


@examples(100)
@given(seed=SEEDS)
def test_so_are_remote_replicas(seed: int) -> None:
    judge_remote(*case("remote", seed))


@examples(200)
@given(seed=SEEDS)
def test_so_are_cpu_replicas(seed: int) -> None:
    snapshot, request = case("cpus", seed)
    oracle, outcome = OnCpus(snapshot, request), planned(snapshot, request)
    assert isinstance(outcome, Plan) == oracle.exists()
    if isinstance(outcome, Plan):
        check_on_cpus(oracle, outcome)
    else:
        check_refusal(snapshot, request, outcome)


def judge(snapshot: Snapshot, request: Request) -> None:
    outcome = planned(snapshot, request)
    if isinstance(outcome, Plan):
        there = [one for one in oracles(snapshot, request) if one.exists()]
        homes = {snapshot.nodes[one.home].id: one for one in there if one.home is not None}
        first = homes.get(outcome.replicas[0].node_id) if homes else next(iter(there), None)
        assert first is not None, "nothing was found by trying all"
        check(first, snapshot, outcome)
        if homes:
            check_home(first, there)
    else:
        assert not any(one.exists() for one in oracles(snapshot, request))
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


def check_home(chosen: Oracle, there: Sequence[Oracle]) -> None:
    """That of the nodes which have room for all on the GPUs that are named, the policy has no better one."""
    request = chosen.request
    whole = request.needs.whole and request.policy in (Policy.TOPOLOGY, Policy.FRAGMENTATION)
    if whole and len(request.replicas) == 1:
        speeds = [one.fastest(one.start()) for one in there]
        assert chosen.fastest(chosen.start()) == max(speed for speed in speeds if speed is not None)
    free = {one: len(one.nodes[one.allowed[0]].free) for one in there}
    if request.stages == 1 and request.needs.whole:
        assert request.policy is not Policy.PACK or free[chosen] == min(free.values())
        assert request.policy is not Policy.LEAST_LOADED or free[chosen] == max(free.values())


def check_amounts(oracle: Oracle, parts: Iterable[PlannedReplica], pieces: Sequence[Piece]) -> None:
    """That a replica's parts say how much they take of each node."""
    request = oracle.request
    for part in parts:
        [node] = [node for node in oracle.nodes if node.id == part.node_id]
        sets = sum(oracle.nodes[position] is node for position, _ in pieces)
        assert part.share == oracle.share(node)
        asked = request.needs.profile
        assert part.profile == (node.slots[part.gpus[0]] if asked == ANY_PROFILE else asked)
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
        """Whether it is on a whole GPU (the one that others miss least is taken), else how much is left there."""
        share = oracle.share(nodes[i]) or 0
        rest = dict(state.left[i].rests)[gpus[0]]
        return (True, 0) if rest == WHOLE else (False, rest - share)

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
            case Policy.ROUND_ROBIN if (
                len(request.replicas) == 1
            ):  # the order of nodes is that of their names
                return *crowd(i), sum(nodes[i].deployments.values()), i
            case Policy.ROUND_ROBIN:
                return crowd(i)
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


def check_on_cpus(oracle: OnCpus, outcome: Plan) -> None:
    """That each replica has room, and is on the node that the rules name."""
    request, nodes, left, domains = oracle.request, oracle.nodes, oracle.start(), oracle.domains()
    assert [replica.replica_index for replica in outcome.replicas] == list(request.replicas)
    on_node = Counter(request.standing)

    def key(i: int) -> tuple[object, ...]:
        node, crowd = nodes[i], (domains[oracle.domain(i)], on_node[nodes[i].id])
        has_gpus, cpus = len(node.topology) > 0, left[i][0]
        free = len(node.free) + sum(profile != "?" for profile in node.instances.values())
        match request.policy:
            case Policy.PACK:
                return has_gpus, cpus, *crowd, i
            case Policy.LEAST_LOADED:
                return has_gpus, -cpus, *crowd, i
            case Policy.ROUND_ROBIN:
                return has_gpus, *crowd, sum(node.deployments.values()), i
            case (
                Policy.FRAGMENTATION
            ):  # nothing else is asked for, so that no node is worth more than another
                return has_gpus, *crowd
            case _:
                return has_gpus, *crowd, free if has_gpus else cpus, i

    for replica in outcome.replicas:
        [position] = [i for i, node in enumerate(nodes) if node.id == replica.node_id]
        ways = oracle.ways(left, domains)
        assert position in ways
        assert key(position) == min(map(key, ways))
        assert replica == PlannedReplica(
            replica.replica_index,
            replica.node_id,
            cpu_milli=request.cpu_milli,
            memory_bytes=request.memory_bytes,
        )
        left, domains = oracle.take(left, domains, position)
        on_node[replica.node_id] += 1


# -- refusals ----------------------------------------------------------------------------------------


def check_refusal(snapshot: Snapshot, request: Request, refusal: Unplaceable) -> None:
    """That it counts every node, names what dropped the last one, and says what would help."""
    assert refusal.deployment == request.deployment
    assert refusal.advice
    assert refusal.summary
    assert all(count > 0 for count in refusal.excluded.values())
    [step] = steps(snapshot, [request])
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


# -- what the oracle found, by name ------------------------------------------------------------------


def test_the_slowest_of_several_sets_on_one_node_is_as_fast_as_can_be() -> None:
    free = frozenset((0, 1, 2, 6))
    [replica] = placed(
        Snapshot([Node("id", "dgx", topology=topologies.load("dgx-1v"), free=free)]),
        Request("d", (0,), Needs(2), stages=2),
    )
    assert [set(replica.gpus[:2]), set(replica.gpus[2:])] == [{0, 1}, {2, 6}]


def test_a_share_by_memory_goes_on_a_gpu_that_is_shared_already() -> None:
    one = Topology.unknown(1)
    whole = Node("a", "a", topology=one, free=frozenset({0}), gpu_memory_bytes=24 * GIB)
    shared = Node("b", "b", topology=one, rests={0: 500}, gpu_memory_bytes=80 * GIB)
    [replica] = placed(Snapshot([whole, shared]), Request("d", (0,), Needs(1, memory_bytes=20 * GIB)))
    assert replica.node_id == "b"


def test_what_leaves_a_node_that_drains_is_no_reason_to_go_there() -> None:
    drains = Node("id", "n", topology=Topology.unknown(2), free=frozenset({1}), problem="is draining")
    snapshot, request = Snapshot([drains]), Request("d", (0,), Needs(1))
    assert isinstance(plan(snapshot, request), NoGpuNodes)
    later = vacate(snapshot, [PlannedReplica(0, "id", (0,))], "d")
    offered(later)
    assert isinstance(plan(later, request), NoGpuNodes)


def test_an_exception_leaves_the_room_as_it_was() -> None:
    nodes = [Node(name, name, topology=Topology.unknown(2), free=frozenset({0, 1})) for name in "ab"]
    snapshot = Snapshot(nodes)
    request = Request("d", (0, 1, 2), Needs(1), policy=Policy.FRAGMENTATION)
    before, room = offered(snapshot), room_of(snapshot)
    found = [room.choose(request, snapshot.mix.plus(request), [3], lambda bit: 0), RuntimeError]
    with mock.patch.object(Room, "choose", side_effect=found), pytest.raises(RuntimeError):
        plan(snapshot, request)
    assert offered(snapshot) == before
    assert plan(snapshot, request) == plan(Snapshot(nodes), request)


def placed(snapshot: Snapshot, request: Request) -> tuple[PlannedReplica, ...]:
    outcome = plan(snapshot, request)
    assert isinstance(outcome, Plan), outcome
    return outcome.replicas
