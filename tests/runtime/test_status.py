"""What ``status`` reports of one node: who sits on which GPU, and what others hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from placement import Deployment, Group, topologies
from placement.core.lifecycle import State
from placement.errors import UnknownDeployment, UnknownNode
from placement.runtime.discovery import DeadNode, NodeInfo
from placement.runtime.ledger import Record
from placement.runtime.orders import hardware_of
from placement.runtime.results import NodeAssignment
from placement.runtime.status import Observed, cluster_status
from placement.runtime.topology_report import topology_report
from placement.wire.facts import NodeFacts
from placement.wire.slots import in_ray_order


@dataclass
class Known:
    """What is known of one deployment."""

    deployment: Deployment
    held: list[NodeAssignment] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    generation: int = 1
    outdated: tuple[int, ...] = ()
    releasing: bool = False
    declared_at: float = 0.0
    owner: dict[str, str] | None = None

    def assignments(self) -> list[NodeAssignment]:
        return self.held


def held(index: int, node: str, gpu: int, share: float = 1.0) -> NodeAssignment:
    return NodeAssignment(index, node, [gpu], _NO_GROUP, [0], node, share)


def known(**deployments: list[tuple[int, float]]) -> dict[str, Known]:
    """Deployment -> the (GPU, share) of each replica, all on node n."""
    return {
        name: Known(
            Deployment(name=name, model="m", replicas=len(replicas)),
            [held(index, "n", gpu, share) for index, (gpu, share) in enumerate(replicas)],
        )
        for name, replicas in deployments.items()
    }


_NO_GROUP: Any = SimpleNamespace(id=SimpleNamespace(hex=lambda: "00"))


def observed(nodes: list[NodeInfo], deployments: Mapping[str, Known], **more: Any) -> Observed:
    facts = more.setdefault("facts", {})
    return Observed(nodes, deployments, lambda info: hardware_of(facts.get(info.id), info.gpu_count), **more)


def node(
    deployments: dict[str, Known],
    available: float | None,
    foreign: frozenset[int] = frozenset(),
    gpus: int = 4,
    topology: str = "",
) -> dict[str, Any]:
    facts = {"n": topologies.facts(topology)} if topology else {}
    free = {} if available is None else {"n": {"GPU": available}}
    info = NodeInfo("n", "n", "a", gpus)
    seen = observed([info], deployments, facts=facts, foreign={"n": foreign}, available=free)
    told: dict[str, Any] = cluster_status(seen)["nodes"][0]
    return told


@pytest.mark.parametrize(
    ("available", "foreign", "others", "unlocated"),
    [
        # held: half and a quarter of GPU 0, all of GPU 1
        (2.25, frozenset(), [], 0),
        (1.25, frozenset(), [], 1),
        (1.25, frozenset({3}), [3], 0),
        (2.25, frozenset({3}), [], 0),  # given back since
        (1.65, frozenset(), [], 1),  # others share, too
        (0.25, frozenset({2}), [2], 1),
        (None, frozenset({3}), [3], 0),  # the books lag behind our own last change
    ],
)
def test_what_others_hold_is_counted_beside_shares(
    available: float | None, foreign: frozenset[int], others: list[int], unlocated: int
) -> None:
    report = node(known(a=[(0, 0.5), (1, 1.0)], b=[(0, 0.25)]), available, foreign)
    assert [gpu["ordinal"] for gpu in report["gpus"] if gpu["state"] == "other"] == others
    assert report["others_unlocated"] == unlocated


def test_a_shared_gpu_lists_all_its_occupants() -> None:
    report = node(known(a=[(0, 0.5), (1, 1.0)], b=[(0, 0.25)]), 2.25)
    assert report["gpus"][0]["occupants"] == [
        {"deployment": "a", "replica": 0, "share": 0.5},
        {"deployment": "b", "replica": 0, "share": 0.25},
    ]
    assert [(gpu["state"], gpu["deployment"], gpu["replica"]) for gpu in report["gpus"]] == [
        ("held", "a", 0),
        ("held", "a", 1),
        ("free", None, None),
        ("free", None, None),
    ]


def test_several_shares_of_a_group_are_told_by_gpu() -> None:
    deployments = known(a=[(1, 0.25)])
    part = NodeAssignment(0, "n", [1, 2, 1], _NO_GROUP, [0, 1, 2], "n", shares=[0.5, 1.0, 0.25])
    deployments["g"] = Known(Deployment(name="g", model="m"), [part])
    report = node(deployments, 2.0)
    assert [(gpu["state"], [one["share"] for one in gpu["occupants"]]) for gpu in report["gpus"]] == [
        ("free", []), ("held", [0.25, 0.75]), ("held", [1.0]), ("free", []),
    ]  # fmt: skip


def test_tenths_add_up() -> None:
    report = node(known(a=[(0, 0.1)] * 10), 3.0)
    assert (len(report["gpus"][0]["occupants"]), report["others_unlocated"]) == (10, 0)


def test_instances_are_reported_by_their_profile() -> None:
    report = node(known(a=[(7, 1.0)]), 12.0, gpus=13, topology="a100-mig-4x")
    profiles = [gpu["mig"] for gpu in report["gpus"]]
    assert profiles == ["1g.10gb"] * 7 + ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb", None, None]
    assert report["gpus"][7]["deployment"] == "a"


def test_what_a_deployment_runs_on_is_reported_and_who_says_so() -> None:
    deployments = {}
    said: dict[str, dict[str, Any]] = {
        "a": {"model": "gpt-5"},
        "b": {"model": "gpt-5", "runtime": "vllm"},
        "c": {"model": "m", "runtime_config": {"runtime": "ort"}},
    }
    for name, fields in said.items():
        deployments[name] = Known(Deployment.model_validate({"name": name, **fields}))
    report = cluster_status(observed([], deployments))
    assert [(one["runtime"], one["runtime_from"]) for one in report["deployments"]] == [
        ("openai", "by the model's name"),
        ("vllm", "declared"),
        ("ort", "runtime_config"),
    ]


def test_gpus_of_which_nobody_can_tell_what_they_are_are_no_free_ones() -> None:
    facts = in_ray_order(reading("a100-pcie-4x"), 6, None)
    info = NodeInfo("n", "n", "a", 6)
    seen = observed([info], known(a=[(4, 1.0)]), facts={"n": facts}, available={"n": {"GPU": 5.0}})
    [report] = cluster_status(seen)["nodes"]
    assert [gpu["state"] for gpu in report["gpus"]] == ["free"] * 4 + ["held", "unknown"]
    assert [gpu["problem"] for gpu in report["gpus"]] == [None] * 4 + ["NVML does not show it"] * 2
    said = "Ray has 6 GPUs here, NVML shows 4 of them"
    assert report["problem"] == f"{said}; nothing is placed on GPU 4-5"
    assert report["gpu_model"] == "NVIDIA A100 80GB PCIe"
    shown = topology_report(info, facts)
    assert (shown["problem"], shown["facts"]["problem"]) == ("nothing is placed on GPU 4-5", said)


def reading(machine: str) -> NodeFacts:
    """What NVML says on such a machine."""
    facts = topologies.facts(machine)
    gpus = tuple(gpu.model_copy(update={"uuid": f"GPU-{gpu.ordinal}"}) for gpu in facts.gpus)
    return facts.model_copy(update={"source": "nvml", "gpus": gpus})


def cluster() -> Observed:
    """Two nodes, one that died, and deployments in all states there are."""
    nodes = [NodeInfo(name, f"node-{name}", f"10.0.0.{name}", 4) for name in ("1", "2", "3")]
    deployments = {
        "placed": Known(
            Deployment(name="placed", model="m", replicas=2),
            [held(0, "1", 0), held(1, "2", 0)],
            {0: State.PLACED, 1: State.PLACED},
            generation=3,
            declared_at=940.0,
            owner={"kind": "job", "id": "j"},
        ),
        "waits": Known(
            Deployment(name="waits", model="m", replicas=3),
            [held(0, "1", 1)],
            {0: State.PLACED, 1: State.PENDING, 2: State.RESERVING},
            {1: "no room", 2: "no room"},
        ),
        "first": Known(Deployment(name="first", model="m"), [], {0: State.PENDING}, {0: "no room"}),
        "lost": Known(
            Deployment(name="lost", model="m", replicas=2),
            [held(0, "2", 1), held(1, "3", 2)],
            {0: State.PLACED, 1: State.PLACED},
        ),
        "changed": Known(
            Deployment(name="changed", model="m"),
            [held(0, "1", 2)],
            {0: State.PLACED},
            {0: "no room"},
            2,
            (0,),
        ),
        "going": Known(
            Deployment(name="going", model="m"), [held(0, "2", 3)], {0: State.RELEASING}, releasing=True
        ),
    }
    return observed(
        nodes[:2],
        deployments,
        available={"1": {"GPU": 0.0}, "2": {"GPU": 1.0}},
        unreadable={"broken": Record("broken", None, "of a later version", newer=True)},
        draining=frozenset({"2"}),
        dead=[DeadNode(nodes[2], 970.0)],
        queue=["first", "waits", "changed"],
        demand=[{"deployment": name, "asked": "a node with 4 GPUs"} for name in ("first", "waits", "a call")],
        at=1000.0,
    )


def test_the_whole_comes_first_and_then_what_waits() -> None:
    report = cluster_status(cluster())
    assert next(iter(report)) == "totals"
    assert report["totals"] == {
        "gpus": 8, "free": 1, "held": 6, "other": 1, "unknown": 0,
        "nodes": 2, "gpu_nodes": 2, "deployments": 6, "replicas": 10, "pending": 3,
    }  # fmt: skip
    assert [(one["name"], one["queue_position"], one["state"]) for one in report["deployments"]] == [
        ("first", 1, "pending"),
        ("waits", 2, "pending"),
        ("changed", 3, "pending"),
        ("going", None, "releasing"),
        ("lost", None, "lost"),
        ("placed", None, "placed"),
    ]
    assert [row["deployment"] for row in report["demand"]] == ["first", "waits", "a call"]
    assert [one["name"] for one in report["unreadable"]] == ["broken"]


def test_each_replica_is_told_with_its_own_state_and_reason() -> None:
    shown = {one["name"]: one for one in cluster_status(cluster())["deployments"]}
    states = {
        name: [(one["index"], one["state"], one["reason"]) for one in told["replica_states"]]
        for name, told in shown.items()
    }
    assert states == {
        "first": [(0, "pending", "no room")],
        "waits": [(0, "placed", None), (1, "pending", "no room"), (2, "pending", "no room")],
        "changed": [(0, "placed", "no room")],
        "going": [(0, "releasing", None)],
        "lost": [(0, "placed", None), (1, "lost", None)],
        "placed": [(0, "placed", None), (1, "placed", None)],
    }
    assert shown["changed"]["outdated"] == [0]
    told = shown["placed"]
    assert (told["generation"], told["age_seconds"]) == (3, 60.0)
    assert (told["owner"], told["replicas"]) == ({"kind": "job", "id": "j"}, 2)


def test_a_node_that_died_is_shown_with_what_it_held_and_counts_no_more() -> None:
    nodes = cluster_status(cluster())["nodes"]
    assert [(one["name"], one["state"], one["dead_seconds"]) for one in nodes] == [
        ("node-1", "alive", None),
        ("node-2", "draining", None),
        ("node-3", "dead", 30.0),
    ]
    assert {gpu["state"] for gpu in nodes[2]["gpus"]} == {"dead"}
    assert [gpu["deployment"] for gpu in nodes[2]["gpus"]] == [None, None, "lost", None]
    assert set(nodes[0]) == set(nodes[2])


@pytest.mark.parametrize(
    ("filters", "deployments", "nodes"),
    [
        ({"node": "node-1"}, "waits changed placed", "1"),
        ({"node": "10.0.0.3"}, "lost", "3"),
        ({"deployment": "placed"}, "placed", "1 2"),
        ({"deployment": "first"}, "first", ""),
        ({"deployment": "broken"}, "", ""),
        ({"state": "pending"}, "first waits", ""),
        ({"state": "lost"}, "lost", "3"),
        ({"state": "releasing"}, "going", "2"),
        ({"state": "placed", "node": "2"}, "lost placed", "2"),
        ({"state": "placed", "deployment": "waits"}, "waits", "1"),
        ({"state": "lost", "deployment": "placed"}, "", ""),
    ],
)
def test_filters_leave_who_matches_and_where_it_is(
    filters: dict[str, str], deployments: str, nodes: str
) -> None:
    report = cluster_status(cluster(), **filters)
    assert [one["name"] for one in report["deployments"]] == deployments.split()
    assert [one["id"] for one in report["nodes"]] == nodes.split()
    assert {row["deployment"] for row in report["demand"]} == {"first", "waits"} & set(deployments.split())
    assert report["totals"] == cluster_status(cluster())["totals"]
    assert len(report["unreadable"]) == (filters.get("deployment") in (None, "broken"))


def test_a_group_is_asked_for_by_its_name() -> None:
    group = Group(name="g", members={"a": 1, "b": 1})
    nodes = [NodeInfo(name, f"node-{name}", f"10.0.0.{name}", 4) for name in ("1", "2", "3")]
    members = group.of([Deployment(name=name, model="m") for name in "ab"])
    deployments = {
        one.name: Known(one, [held(0, node, 0)], {0: State.PLACED})
        for one, node in zip((*members, Deployment(name="c", model="m")), "123", strict=True)
    }
    report = cluster_status(observed(nodes, deployments), deployment="g")
    assert ["a", "b"] == [one["name"] for one in report["deployments"]]
    assert ["1", "2"] == [one["id"] for one in report["nodes"]]
    assert ["g"] == [one["name"] for one in report["groups"]]


def test_what_is_not_there_cannot_be_asked_for() -> None:
    with pytest.raises(UnknownNode, match="node-9.*node-1, node-2, node-3"):
        cluster_status(cluster(), node="node-9")
    with pytest.raises(UnknownDeployment, match="other"):
        cluster_status(cluster(), deployment="other")
    nodes = [NodeInfo("1", "node-1", "10.0.0.1", 4)]
    members = Group(name="g", members={"a": 1, "b": 1}).of(
        [Deployment(name=name, model="m") for name in "ab"]
    )
    grouped = {one.name: Known(one, [held(0, "1", 0)], {0: State.PLACED}) for one in members}
    with pytest.raises(UnknownDeployment) as refused:
        cluster_status(observed(nodes, grouped), deployment="gg")
    assert "no deployment 'gg' (did you mean g?); there are: a, b, g" == str(refused.value)
    many = UnknownDeployment("llama-7b", (*(f"d{i}" for i in range(20)), "llama-70b"))
    shown = ", ".join(f"d{i}" for i in range(8))
    assert f"no deployment 'llama-7b' (did you mean llama-70b?); there are: {shown}, and 13 more" == str(many)
    assert "no deployment 'a'; there are: none" == str(UnknownDeployment("a", ()))
    with pytest.raises(ValueError, match="placed, pending, lost, releasing"):
        cluster_status(cluster(), state="running")


class Counted(dict[str, Known]):
    """Says how often somebody went through all of it."""

    times = 0

    def items(self) -> Any:
        self.times += 1
        return super().items()

    def __iter__(self) -> Iterator[str]:
        self.times += 1
        return super().__iter__()


def test_deployments_are_gone_through_once_however_many_nodes_there_are() -> None:
    for count in (1, 50):
        nodes = [NodeInfo(f"n{i}", f"n{i}", "a", 4, egress={"egress": 1}) for i in range(count)]
        deployments = Counted(known(a=[(0, 0.5), (1, 1.0)], b=[(0, 0.25)]))
        cluster_status(observed(nodes, deployments))
        assert deployments.times == 1, "what each of them holds"
