"""What applying would do, whatever stands and in whichever order it is declared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from placement import topologies
from placement.core.planner import plan
from placement.core.replicas import Plan
from placement.core.snapshot import Node, Snapshot
from placement.core.topology import Topology
from placement.errors import NotEnoughGpus, UnknownNode, Unplaceable
from placement.wire.cluster import ClusterFile, HeldDeployment, HeldReplica
from placement.wire.deployment import Deployment
from placement.wire.plans import difference, explain_deployments, plan_deployments, plan_in_order, request_of


def one(name: str, replicas: int = 1, **fields: Any) -> Deployment:
    return Deployment(name=name, model="m", replicas=replicas, **fields)


def apart(name: str, *others: str, **fields: Any) -> Deployment:
    return one(name, constraints={"apart_from": others}, **fields)


def near(name: str, *others: str, **fields: Any) -> Deployment:
    return one(name, constraints={"near_to": others}, **fields)


def only(name: str, *nodes: str, **fields: Any) -> Deployment:
    return one(name, constraints={"gpu_nodes": nodes}, **fields)


class Cluster:
    """Nodes of two GPUs, and what was planned for them as if it were done."""

    def __init__(self, *names: str, gpus: int = 2) -> None:
        self.nodes = {name: set(range(gpus)) for name in names}
        self.gpus = gpus
        self.held: dict[str, HeldDeployment] = {}

    def file(self) -> ClusterFile:
        nodes = []
        for name, free in self.nodes.items():
            here = {d for d, held in self.held.items() if any(r.node == name for r in held.replicas)}
            shape = Topology.unknown(self.gpus)
            nodes.append(
                Node(name, name, topology=shape, free=frozenset(free), deployments=dict.fromkeys(here, 1))
            )
        return ClusterFile.of(Snapshot(nodes), self.held.values())

    def plan(self, *wanted: Deployment) -> dict[str, list[tuple[str, int]]]:
        file = self.file()
        plans = plan_deployments(file.snapshot(), file.held(), wanted)
        assert [plan.deployment for plan in plans] == [one.name for one in wanted]
        return {
            plan.deployment: [(a.node, gpu) for a in plan.assignments for gpu in a.gpus] for plan in plans
        }

    def place(self, deployment: Deployment, *gpus: tuple[str, int]) -> None:
        for node, gpu in gpus:
            self.nodes[node].remove(gpu)
        replicas = (
            HeldReplica(replica_index=i, node=node, gpus=(gpu,)) for i, (node, gpu) in enumerate(gpus)
        )
        self.held[deployment.name] = HeldDeployment(deployment=deployment, replicas=tuple(replicas))


def nodes_of(places: Sequence[tuple[str, int]]) -> set[str]:
    return {node for node, _ in places}


def test_what_moves_away_leaves_its_node_to_what_is_apart_from_it() -> None:
    cluster = Cluster("x", "y")
    cluster.place(one("a"), ("x", 0))
    for order in itertools.permutations(
        (only("a", "y"), one("b", constraints={"gpu_nodes": ("x",), "apart_from": ("a",)}))
    ):
        assert cluster.plan(*order) == {"a": [("y", 0)], "b": [("x", 0)]}


def test_of_two_replicas_one_may_leave_and_the_other_still_keeps_apart() -> None:
    cluster = Cluster("x", "y")
    cluster.place(one("a", 2), ("x", 0), ("x", 1))
    assert cluster.plan(one("a"), apart("b", "a")) == {"a": [("x", 0)], "b": [("y", 0)]}


def test_apart_holds_both_ways_with_what_stands_and_with_what_is_in_the_same_file() -> None:
    cluster = Cluster("x", "y")
    cluster.place(apart("b", "a"), ("x", 0))
    assert nodes_of(cluster.plan(one("a", 2))["a"]) == {"y"}
    for order in itertools.permutations((apart("b", "a"), one("a", 2), one("c"))):
        planned = Cluster("x", "y", "z").plan(*order)
        assert not nodes_of(planned["a"]) & nodes_of(planned["b"]), order
    with pytest.raises(Unplaceable, match="has a replica of 'b', which is to be apart from this one"):
        cluster.plan(only("a", "x"))


def test_near_to_one_that_comes_later_in_the_file_is_planned_after_it() -> None:
    for order in itertools.permutations((near("c", "b"), near("b", "a"), only("a", "y"))):
        file = Cluster("x", "y", gpus=3).file()
        planned = plan_in_order(file.snapshot(), {}, order)
        assert [order[position].name for position, _ in planned] == ["a", "b", "c"]
        assert {a.node for _, plan in planned for a in plan.assignments} == {"y"}
    with pytest.raises(Unplaceable, match="has no replica of 'b'"):
        Cluster("x").plan(near("a", "b"), near("b", "a"))


def test_two_that_name_each_other_are_apart_in_the_given_order() -> None:
    planned = Cluster("x", "y").plan(apart("a", "b"), apart("b", "a"))
    assert planned == {"a": [("x", 0)], "b": [("y", 0)]}


def test_a_name_that_comes_twice_is_what_it_was_last() -> None:
    file = Cluster("x").file()
    plans = plan_deployments(file.snapshot(), {}, [one("a", 2), one("a", 1), one("b")])
    assert [[a.gpus for a in plan.assignments] for plan in plans] == [[[0], [1]], [[0]], [[1]]]


def pending() -> Cluster:
    """Of three replicas one has no place, since its node died."""
    cluster = Cluster("x")
    cluster.place(one("a", 3), ("x", 0), ("x", 1))
    return cluster


def test_what_is_pending_and_does_not_fit_is_no_reason_to_refuse_the_rest() -> None:
    file = pending().file()
    for wanted in (one("a", 3), one("a", 3, budget={"usd_per_day": 1})):
        [plan] = plan_deployments(file.snapshot(), file.held(), [wanted])
        assert [a.replica_index for a in plan.assignments] == [0, 1]
        assert (list(plan.pending), plan.standing) == ([2], False)
        assert "cannot place 'a'" in plan.pending[2]
        assert plan.to_dict()["pending"] == {"2": plan.pending[2]}
    [explained] = explain_deployments(file.snapshot(), file.held(), [one("a", 3)])
    assert explained.refusal is None
    assert explained.explanation.excluded == {"has no GPU free": 1}
    with pytest.raises(NotEnoughGpus):
        plan_deployments(file.snapshot(), file.held(), [one("a", 4)])


def test_what_is_pending_takes_the_room_that_others_of_the_file_leave() -> None:
    cluster = Cluster("x")
    cluster.place(one("b"), ("x", 0))
    cluster.place(one("a", 2), ("x", 1))
    shrunk = cluster.file()
    assert plan_deployments(shrunk.snapshot(), shrunk.held(), [one("a", 2)])[0].pending
    moved = [one("b", gpus=0.5), one("a", 2)]
    plans = plan_deployments(shrunk.snapshot(), shrunk.held(), moved)
    assert (len(plans[1].assignments), list(plans[1].pending)) == (1, [1])
    cluster.nodes["y"] = {0}
    grown = cluster.file()
    [plan] = plan_deployments(grown.snapshot(), grown.held(), [one("a", 2)])
    assert [(a.node, a.gpus) for a in plan.assignments] == [("x", [1]), ("y", [0])]
    assert not plan.pending


def test_a_dead_node_among_those_that_are_named_is_no_reason_to_refuse_what_stands() -> None:
    cluster = Cluster("x")
    cluster.place(only("a", "x", "dead", replicas=2), ("x", 0))
    changed = only("a", "x", "dead", replicas=2, budget={"usd_per_day": 1})
    assert cluster.plan(changed) == {"a": [("x", 0), ("x", 1)]}
    with pytest.raises(UnknownNode):
        cluster.plan(only("a", "x", "typo", replicas=2))
    with pytest.raises(UnknownNode):
        cluster.plan(only("a", "x", "dead", replicas=3))


H100 = Node(
    "h",
    "h",
    topology=topologies.load("dgx-h100"),
    free=frozenset({4, 5, 6, 7}),
    accelerators=frozenset({"H100"}),
)


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        ({"constraints": {"accelerators": ["H100"]}}, True),
        ({"min_bandwidth_gb_per_s": 100.0}, True),
        ({"constraints": {}}, True),
        ({"constraints": {"egress_preference": ["h"]}}, True),
        ({"within": "node"}, True),
        ({"tensor_parallel": 4}, True),
        ({"gpus": None, "tensor_parallel": 4}, True),
        ({"gpus": None, "tensor_parallel": 2, "pipeline_parallel": 2}, True),
        ({"budget": {"usd_per_day": 5}}, True),
        ({"model": "other"}, True),
        ({"gpus": 2}, False),
        ({"constraints": {"cpus_per_gpu": 1}}, False),
    ],
)  # fmt: skip
def test_what_satisfies_the_new_declaration_is_kept(change: dict[str, Any], stays: bool) -> None:
    before = one("llama", gpus=4)
    held = HeldDeployment(
        deployment=before, replicas=(HeldReplica(replica_index=0, node="h", gpus=(0, 1, 2, 3)),)
    )
    after = Deployment(**{"name": "llama", "model": "m", "gpus": 4, **change})
    found = difference(Snapshot((H100,)), held, after)
    assert (list(found.keep), found.must, found.may) == (([0], (), ()) if stays else ([], (0,), ()))
    if stays:
        [plan] = plan_deployments(Snapshot((H100,)), {"llama": held}, [after])
        assert (plan.standing, plan.assignments[0].gpus) == (True, [0, 1, 2, 3])
        back = HeldDeployment(deployment=after, replicas=held.replicas)
        assert list(difference(Snapshot((H100,)), back, before).keep) == [0]


def test_only_those_are_replaced_that_do_not_satisfy_it() -> None:
    cluster = Cluster("x", "y")
    cluster.place(one("a", 2), ("x", 0), ("y", 0))
    assert cluster.plan(only("a", "y", replicas=2)) == {"a": [("y", 1), ("y", 0)]}


def test_what_is_about_to_go_is_no_part_of_what_stands() -> None:
    cluster = Cluster("x", gpus=1)
    cluster.place(one("a"), ("x", 0))
    cluster.held["a"] = cluster.held["a"].model_copy(update={"releasing": True})
    assert cluster.plan(one("a", gpus=0.5)) == {"a": [("x", 0)]}


def test_what_stands_is_shown_as_fast_as_it_was_planned_however_it_was_cut() -> None:
    """8 GPUs within NVLink, where there are bridged pairs only: four sets of two, each at 230 GB/s."""
    machine, wanted = topologies.load("a100-pcie-4x"), one("b", gpus=8, within="nvlink")
    nodes = [Node(f"id-{i}", f"n{i}", topology=machine, free=frozenset(range(4))) for i in range(2)]
    request = request_of(wanted, range(1), {}, Snapshot(nodes))
    planned = plan(Snapshot(nodes), request)
    assert isinstance(planned, Plan)
    held = HeldDeployment(deployment=wanted, replicas=tuple(map(HeldReplica.of, planned.replicas)))
    taken = Snapshot([Node(node.id, node.name, topology=machine) for node in nodes])
    file = ClusterFile.model_validate_json(ClusterFile.of(taken, [held]).model_dump_json())
    for snapshot, stands in ((Snapshot(nodes), {}), (file.snapshot(), file.held())):
        [shown] = plan_deployments(snapshot, stands, [wanted])
        assert shown.standing is bool(stands)
        assert [round(a.bandwidth_gb_per_s or 0) for a in shown.assignments] == [230, 230]
