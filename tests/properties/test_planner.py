"""The planner against brute force on small clusters, and what must hold after every step."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.needs import Needs, Within
from placement.core.node import Node
from placement.core.planner import plan, vacate
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology

MACHINES = [topologies.load(name) for name in ("a100-pcie-4x", "l40s-4x", "hgx-a100-4gpu", "dgx-1v")]
MACHINES.append(Topology.unknown(3))


@st.composite
def clusters(draw: st.DrawFn) -> Snapshot:
    nodes = []
    for i in range(draw(st.integers(1, 4))):
        machine = draw(st.sampled_from(MACHINES))
        free = draw(st.frozensets(st.integers(0, len(machine) - 1)))
        problem = draw(st.sampled_from([None, None, None, "is ill"]))
        nodes.append(Node(f"id-{i}", f"node-{i}", topology=machine, free=free, problem=problem))
    return Snapshot(draw(st.permutations(nodes)))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    gpus = draw(st.integers(1, 4))
    floor = draw(st.sampled_from([0.0, 0.0, 19.95, 50.0])) if gpus > 1 else 0.0
    return Request(
        "d",
        tuple(range(draw(st.integers(1, 4)))),
        Needs(gpus, draw(st.sampled_from(Within)), floor),
        gpu_nodes=draw(st.sampled_from([None, None, ("node-0", "node-2")])),
    )


def near_enough(node: Node, gpus: tuple[int, ...], request: Request) -> bool:
    return (
        node.shape.best(sum(1 << gpu for gpu in gpus), len(gpus), request.needs.within) is not None
        and score(node.topology, gpus).bandwidth_gb_per_s >= request.needs.min_bandwidth_gb_per_s
    )


def exists(free: dict[str, frozenset[int]], nodes: dict[str, Node], request: Request, replicas: int) -> bool:
    """Whether any placement of all replicas exists, by trying all."""
    if not replicas:
        return True
    for node_id, left in free.items():
        for gpus in combinations(sorted(left), request.needs.gpus):
            if near_enough(nodes[node_id], gpus, request) and exists(
                free | {node_id: left - set(gpus)}, nodes, request, replicas - 1
            ):
                return True
    return False


def allowed(snapshot: Snapshot, request: Request) -> dict[str, Node]:
    return {
        node.id: node
        for node in snapshot.nodes
        if node.problem is None and (request.gpu_nodes is None or node.name in request.gpu_nodes)
    }


@settings(max_examples=150, deadline=None)
@given(clusters(), requests())
def test_one_replica_is_placed_exactly_when_it_can_be_and_on_the_fastest_set(
    snapshot: Snapshot, request: Request
) -> None:
    request = Request(**{**vars(request), "replicas": (0,)})
    nodes = allowed(snapshot, request)
    outcome = plan(snapshot, request)
    assert isinstance(outcome, Plan) == exists(
        {node.id: node.free for node in nodes.values()}, nodes, request, 1
    )
    if isinstance(outcome, Plan):
        [replica] = outcome.replicas
        reached = score(snapshot.node(replica.node_id).topology, replica.gpus)
        assert reached == max(
            score(node.topology, gpus)
            for node in nodes.values()
            for gpus in combinations(sorted(node.free), request.needs.gpus)
            if near_enough(node, gpus, request)
        )


@settings(max_examples=200, deadline=None)
@given(clusters(), requests())
def test_all_replicas_are_placed_exactly_when_they_can_be(snapshot: Snapshot, request: Request) -> None:
    nodes = allowed(snapshot, request)
    outcome = plan(snapshot, request)
    free = {node.id: node.free for node in nodes.values()}
    assert isinstance(outcome, Plan) == exists(free, nodes, request, len(request.replicas))


def test_the_best_set_is_left_alone_where_two_others_are_needed() -> None:
    # NV1 - NV2 - NV1 in a row: the pair in the middle is the fastest, and the ends are not joined
    links = [[UNKNOWN_LINK] * 4 for _ in range(4)]
    for a, b, link in [
        (0, 1, "NV1"),
        (1, 2, "NV2"),
        (2, 3, "NV1"),
        (0, 2, "SYS"),
        (1, 3, "SYS"),
        (0, 3, "SYS"),
    ]:
        links[a][b] = links[b][a] = Link(Path.NVLINK, int(link[2:])) if "NV" in link else Link(Path.SYS)
    row = Snapshot(
        (Node("id", "row", topology=Topology(tuple(map(tuple, links))), free=frozenset(range(4))),)
    )
    one, two = (Request("d", tuple(range(n)), Needs(2, Within.NVLINK)) for n in (1, 2))
    assert [replica.gpus for replica in plan(row, one).replicas] == [(1, 2)]  # type: ignore[union-attr]
    assert [replica.gpus for replica in plan(row, two).replicas] == [(0, 1), (2, 3)]  # type: ignore[union-attr]


@settings(max_examples=100, deadline=None)
@given(clusters(), st.lists(st.one_of(requests(), st.integers(0, 9)), max_size=12))
def test_after_every_step_free_and_held_add_up_and_nothing_is_held_twice(
    start: Snapshot, steps: list[Request | int]
) -> None:
    snapshot = start
    standing: list[tuple[PlannedReplica, ...]] = []
    for step in steps:
        if isinstance(step, int):
            if standing:
                snapshot = vacate(snapshot, standing.pop(step % len(standing)))
        else:
            outcome = plan(snapshot, step)
            assert outcome == plan(Snapshot(snapshot.nodes[::-1]), step) or not isinstance(outcome, Plan)
            if isinstance(outcome, Plan):
                assert len(outcome.replicas) == len(step.replicas)
                for replica in outcome.replicas:
                    node = snapshot.node(replica.node_id)
                    assert set(replica.gpus) <= node.free
                    assert near_enough(node, replica.gpus, step)
                    free = node.free - set(replica.gpus)
                    snapshot = snapshot.changed([Node(**{**_fields(node), "free": free})])
                standing.append(outcome.replicas)
        for node in start.nodes:
            held = [
                gpu
                for group in standing
                for replica in group
                if replica.node_id == node.id
                for gpu in replica.gpus
            ]
            assert len(held) == len(set(held))
            assert snapshot.node(node.id).free | set(held) == node.free
            assert not snapshot.node(node.id).free & set(held)


def _fields(node: Node) -> dict[str, Any]:
    return {name: getattr(node, name) for name in Node.__dataclass_fields__}
