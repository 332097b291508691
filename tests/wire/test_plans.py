"""What applying would do, whatever stands and in whichever order it is declared."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from placement import topologies
from placement.core.node import Node
from placement.core.planner import plan
from placement.core.replicas import Plan
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import NotEnoughGpus, UnknownNode, Unplaceable
from placement.wire.cluster import ClusterFile
from placement.wire.deployment import Deployment
from placement.wire.dry_run import explain_deployments, plan_deployments, plan_in_order
from placement.wire.held import HeldDeployment, HeldReplica
from placement.wire.requests import request_of


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
        plans = plan_deployments(file.snapshot(), file.held(), wanted, atomic=True)
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
    changed = one("a", 3, budget={"usd_per_day": 1})
    for wanted in (one("a", 3), changed):
        [plan] = plan_deployments(file.snapshot(), file.held(), [wanted])
        assert [a.replica_index for a in plan.assignments] == [0, 1]
        assert (list(plan.pending), plan.standing) == ([2], False)
        assert "cannot place 'a'" in plan.pending[2]
        assert plan.to_dict()["pending"] == {"2": plan.pending[2]}
        with pytest.raises(NotEnoughGpus):
            plan_deployments(file.snapshot(), file.held(), [wanted], atomic=True)
    for atomic in (True, False):
        [explained] = explain_deployments(file.snapshot(), file.held(), [one("a", 3)], atomic)
        assert (explained.refusal is not None) == atomic
        assert explained.explanation.excluded == {"has no GPU free": 1}
    with pytest.raises(NotEnoughGpus):
        plan_deployments(file.snapshot(), file.held(), [one("a", 4)], atomic=True)
    [plan] = plan_deployments(file.snapshot(), file.held(), [one("a", 4)])
    assert (plan.unchanged, list(plan.pending), plan.change) == ([0, 1], [2, 3], "changed")


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
    wide = replace(H100, cpu_milli=64_000)
    [plan] = plan_deployments(Snapshot((wide,)), {"llama": held}, [after], atomic=True)
    assert (plan.unchanged, plan.replaced, plan.change) == (([0], []) if stays else ([], [0])) + ("changed",)
    if stays:
        assert (plan.standing, plan.assignments[0].gpus) == (True, [0, 1, 2, 3])
        back = HeldDeployment(deployment=after, replicas=held.replicas)
        [plan] = plan_deployments(Snapshot((wide,)), {"llama": back}, [before], atomic=True)
        assert plan.unchanged == [0]


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


# -- what waits ----------------------------------------------------------------------------------------


def test_what_finds_no_room_is_pending_and_the_others_are_placed() -> None:
    file = Cluster("x", "y").file()
    plans = plan_deployments(file.snapshot(), {}, [one("a", 3), one("b", 2), one("c", 2, gang=True)])
    assert [(plan.placed, list(plan.pending)) for plan in plans] == [
        ([0, 1, 2], []),
        ([0], [1]),
        ([], [0, 1]),
    ]
    assert "cannot place 'b': replica 1 needs 1 GPU free" in plans[1].pending[1]
    assert all(plan.change == "new" and not plan.standing for plan in plans)
    explained = explain_deployments(file.snapshot(), {}, [one("a", 3), one("b", 2)], atomic=False)
    assert [(each.refusal, each.plan) for each in explained] == [(None, plans[0]), (None, plans[1])]
    assert explained[1].explanation.excluded == {"has no GPU free": 2}


def test_who_is_near_to_another_is_planned_after_it_where_that_leaves_fewer_pending() -> None:
    file = Cluster("x", "y", gpus=1).file()
    for order in itertools.permutations((apart("b", "a"), only("a", "y"))):
        plans = plan_in_order(file.snapshot(), {}, order)
        assert not any(plan.pending for _, plan in plans)
    waits = plan_in_order(file.snapshot(), {}, [near("c", "d"), near("d", "c")])
    assert [list(plan.pending) for _, plan in waits] == [[0], [0]]


def outdated() -> tuple[Cluster, Deployment]:
    """Two replicas of one GPU, declared anew with two: there is room for one of them, in place of the old."""
    cluster = Cluster("x", "y")
    cluster.place(one("a", 2), ("x", 0), ("y", 0))
    cluster.nodes["y"].clear()
    return cluster, one("a", 2, gpus=2)


def test_a_replica_that_cannot_be_replaced_stays_and_is_pending() -> None:
    cluster, wanted = outdated()
    file = cluster.file()
    [plan] = plan_deployments(file.snapshot(), file.held(), [wanted])
    assert (plan.replaced, list(plan.pending), plan.unchanged) == ([0], [1], [])
    assert [(a.replica_index, a.node, a.gpus) for a in plan.assignments] == [(0, "x", [0, 1]), (1, "y", [0])]
    assert (plan.change, plan.differs, plan.standing) == ("changed", ["gpus"], False)
    with pytest.raises(NotEnoughGpus):
        plan_deployments(file.snapshot(), file.held(), [wanted], atomic=True)


def test_what_waits_to_be_replaced_is_of_an_earlier_generation_also_in_a_file() -> None:
    cluster, wanted = outdated()
    before = cluster.held["a"]
    new = [replica.planned() for replica in before.replicas[:1]]
    cluster.held["a"] = before.becomes(wanted, [replace(new[0], gpus=(0, 1))], {1})
    cluster.nodes["x"].clear()
    file = ClusterFile.model_validate_json(cluster.file().model_dump_json())
    held = file.held()["a"]
    assert [(replica.replica_index, replica.generation) for replica in held.replicas] == [(0, 0), (1, 1)]
    assert [held.declared(replica).needs.gpus for replica in held.replicas] == [2, 1]
    [plan] = plan_deployments(file.snapshot(), file.held(), [wanted])
    assert (plan.unchanged, list(plan.pending), plan.change, plan.differs) == ([0], [1], "unchanged", [])
    with pytest.raises(Unplaceable):
        plan_deployments(file.snapshot(), file.held(), [wanted], atomic=True)
    # Declared as it was at first, it is the other one that is to be replaced, and that makes room.
    [back] = plan_deployments(file.snapshot(), file.held(), [before.deployment])
    assert (back.unchanged, back.replaced, back.pending) == ([1], [0], {})
    again = held.becomes(one("a", 2, gpus=4), [], {0, 1})
    assert [(replica.replica_index, replica.generation) for replica in again.replicas] == [(0, 2), (1, 1)]
    assert {number: declared.needs.gpus for number, declared in again.earlier.items()} == {2: 2, 1: 1}


def test_a_file_must_know_what_was_declared_when_a_replica_was_placed() -> None:
    held = {
        "deployment": {"name": "a", "model": "m"},
        "replicas": [{"replica_index": 0, "node": "x", "gpus": [0], "generation": 3}],
    }
    with pytest.raises(ValidationError, match="a replica is of generation 3, which earlier does not have"):
        HeldDeployment.model_validate(held)


def test_what_was_lost_with_its_node_is_placed_anew_or_waits() -> None:
    cluster = Cluster("x")
    cluster.place(one("a", 3), ("x", 0))
    dead = HeldReplica(replica_index=1, node="dead", gpus=(0,))
    cluster.held["a"] = cluster.held["a"].model_copy(update={"replicas": (*cluster.held["a"].replicas, dead)})
    file = cluster.file()
    [plan] = plan_deployments(file.snapshot(), file.held(), [one("a", 3)])
    assert (plan.unchanged, plan.placed, list(plan.pending)) == ([0], [1], [2])
    assert [a.node for a in plan.assignments] == ["x", "x"]
    assert plan.replaced == plan.removed == []
    with pytest.raises(Unplaceable, match="replica 2 .* its 3 replicas need 3"):
        plan_deployments(file.snapshot(), file.held(), [one("a", 3)], atomic=True)


def test_a_plan_says_what_differs_and_what_becomes_of_each_replica() -> None:
    cluster = Cluster("x", "y", "z")
    cluster.place(one("a", 3), ("x", 0), ("y", 0), ("y", 1))
    file = cluster.file()
    [plan] = plan_deployments(file.snapshot(), file.held(), [only("a", "x", "z", replicas=2)])
    assert (plan.unchanged, plan.replaced, plan.removed, plan.placed) == ([0], [1], [2], [])
    assert (plan.change, plan.differs) == ("changed", ["replicas", "constraints"])
    [same] = plan_deployments(file.snapshot(), file.held(), [one("a", 3)])
    assert (same.change, same.unchanged, same.differs, same.standing) == ("unchanged", [0, 1, 2], [], True)
    shown = plan.to_dict()
    assert {key: shown[key] for key in ("change", "placed", "unchanged", "replaced", "removed", "differs")} == {
        "change": "changed", "placed": [], "unchanged": [0], "replaced": [1], "removed": [2],
        "differs": ["replicas", "constraints"],
    }  # fmt: skip
