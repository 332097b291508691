"""The planner's snapshot that is kept up to date is what it would be if it were made anew."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.limits import eligible
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.planner import plan
from placement.core.policy import Policy
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.runtime import view
from placement.runtime.claims import Tally
from placement.runtime.discovery import NodeInfo, node_state
from placement.runtime.orders import GpuHardware, hardware_of
from placement.runtime.view import ClusterView, overlaid

NEAR = ("zone", "rack")
MACHINES = [
    hardware_of(topologies.facts("a100-pcie-4x"), 4),
    hardware_of(None, 4),
    replace(hardware_of(topologies.facts("a100-pcie-4x"), 4), lost=frozenset({1})),
    hardware_of(topologies.facts("a100-mig-4x"), 13),
    replace(hardware_of(topologies.facts("a100-pcie-4x"), 4), capability=(9, 0)),
]
REQUESTS = [
    Request("d", (0,), Needs(1)),
    Request("d", (0, 1), Needs(2), standing=Counter({"n1": 1})),
    Request("d", (0,), Needs(1, share=250)),
    Request("d", (0,), Needs(1), policy=Policy.PACK, accelerators=("A100",)),
    Request("d", (0,), Needs(1), policy=Policy.FRAGMENTATION),
    Request("d", (0,), Needs(1), labels={"rack": "r1"}, apart_from=("a",)),
    Request("d", (0,), Needs(1), compute_capability=(8, 5)),
    Request("d", (0,), Needs(2), gpu_nodes=("n0", "n3")),
    Request("d", (0, 1), Needs(1), provider="openai", key="k", egress=3),
]


@dataclass
class Cluster:
    """What is the case, and the view that is told of changes."""

    infos: dict[str, NodeInfo] = field(default_factory=dict)
    machines: dict[str, GpuHardware] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    foreign: dict[str, frozenset[int]] = field(default_factory=dict)
    available: dict[str, Mapping[str, float]] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()
    lagging: dict[float, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.view = ClusterView(NEAR, self.hardware, self.tally, self.others, self.lags)

    def hardware(self, info: NodeInfo) -> GpuHardware:
        return self.machines.get(info.id, MACHINES[1])

    def tally(self, node_id: str) -> Tally:
        return self.tallies.get(node_id, Tally())

    def others(self, node_id: str) -> frozenset[int]:
        return self.foreign.get(node_id, frozenset())

    def lags(self, seconds: float) -> frozenset[str]:
        return self.lagging.get(seconds, frozenset())

    def tell(self) -> None:
        """Has the view hear what is alive and what is free."""
        self.view.update_nodes(list(self.infos.values()), self.draining)
        self.view.update_available(self.available)

    def anew(self, lag_seconds: float, believed: frozenset[str]) -> Snapshot:
        lagging = self.lags(lag_seconds) - believed
        return Snapshot(
            (
                node_state(
                    info,
                    self.hardware(info),
                    None if info.id in lagging else self.available.get(info.id, {}),
                    self.tally(info.id),
                    self.others(info.id),
                    info.id in self.draining,
                )
                for info in self.infos.values()
            ),
            NEAR,
        )


def change(cluster: Cluster, dice: random.Random) -> None:
    """Something happens to one node, and the view is told of what it could not see by itself."""
    node = f"n{dice.randrange(5)}"
    info = cluster.infos.get(node)
    gpus = dice.sample(range(4), dice.randrange(4))
    match dice.randrange(9):
        case 0 if info is not None:
            del cluster.infos[node]
        case 0 | 1:
            labels = {"zone": "z", "rack": f"r{dice.randrange(2)}"} if dice.random() < 0.7 else {}
            egress = {"egress": 10, "egress_openai": 4} if dice.random() < 0.5 else {}
            name = f"n{9 - int(node[1:])}" if dice.random() < 0.3 else node
            cluster.infos[node] = NodeInfo(node, name, "a", 4, labels, egress, 8000, 1 << 30)
        case 2:
            cluster.machines[node] = dice.choice(MACHINES)
            cluster.view.touch([node])
        case 3 | 4:
            tally = Tally(gpus=set(gpus[:2]), claimed_gpus=set(gpus[2:]), cpu_milli=1000 * len(gpus))
            tally.deployments.update({"a": len(gpus)} if gpus else {})
            tally.egress["egress"] = dice.randrange(12)
            tally.serving["openai", "k"] = dice.randrange(2)
            if gpus and dice.random() < 0.5:
                tally.shares[gpus[0]] = dice.choice((250, 1000))
            cluster.tallies[node] = tally
            cluster.view.touch([node])
        case 5:
            cluster.foreign[node] = frozenset(gpus)
            cluster.view.touch([node])
        case 6:
            cluster.available = {**cluster.available, node: free(dice)}
            if dice.random() < 0.1:
                del cluster.available[node]
        case 7:
            cluster.draining ^= {node}
        case 8:
            seconds = dice.choice((0.25, 2.0))
            cluster.lagging[seconds] = cluster.lags(seconds) ^ {node}


def free(dice: random.Random) -> dict[str, float]:
    return {
        "GPU": dice.choice((0.0, 1.0, 1.75, 3.0, 4.0)),
        "CPU": dice.choice((0.5, 8.0)),
        "memory": float(1 << 30),
        "egress": dice.choice((0.0, 5.0, 10.0)),
        "egress_openai": dice.choice((1.0, 4.0)),
        "object_store_memory": dice.random(),
    }


def outcome(snapshot: Snapshot, request: Request) -> Any:
    """What is planned; of a refusal, what it says."""
    found = plan(snapshot, request)
    return str(found) if isinstance(found, Exception) else found


def same(one: Snapshot, other: Snapshot) -> None:
    """In every field, and in all that is worked out of them."""
    assert one.nodes == other.nodes
    assert (one.usable, one.regions, one.near) == (other.usable, other.regions, other.near)
    assert [one.named([name]) for name in ["n0", "n1", "n2", "n9", "a"]] == [
        other.named([name]) for name in ["n0", "n1", "n2", "n9", "a"]
    ]
    for request in REQUESTS:
        if request.provider is None:
            assert eligible(one, request) == eligible(other, request)
            ours, theirs = (who.offers(request.needs, request.policy) for who in (one, other))
            assert vars(ours) == vars(theirs)
        assert outcome(one, request) == outcome(other, request)


@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 6), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_it_is_what_it_would_be_made_anew(dice: random.Random, changes: list[int]) -> None:
    cluster = Cluster()
    for number in range(3):
        node = f"n{number}"
        cluster.infos[node] = NodeInfo(node, node, "a", 4, {"zone": "z"}, {"egress": 10}, 8000, 1 << 30)
        cluster.available[node] = free(dice)
    for count in changes:
        for _ in range(count):
            change(cluster, dice)
        cluster.tell()
        lag = dice.choice((0.25, 2.0))
        believed = frozenset(dice.sample(["n0", "n1", "n2"], dice.randrange(3)))
        snapshot, anew = cluster.view.snapshot(lag, believed), cluster.anew(lag, believed)
        if dice.random() < 0.5:
            outcome(snapshot, dice.choice(REQUESTS))  # some is worked out of it, for those who come after
        full = {f"n{dice.randrange(6)}": dice.randrange(3)} if dice.random() < 0.4 else {}
        avoided = {f"n{dice.randrange(6)}"} if dice.random() < 0.4 else set()
        same(overlaid(snapshot, full, avoided), anew_overlaid(anew, full, avoided))
        same(snapshot, anew)


def anew_overlaid(anew: Snapshot, full: Mapping[str, int], avoided: set[str]) -> Snapshot:
    def shown(node: Node) -> Node:
        if node.id in full:
            gpus, slots = sorted(node.free)[: full[node.id]], sorted(node.instances)[: full[node.id]]
            instances = {slot: node.instances[slot] for slot in slots}
            node = replace(node, free=frozenset(gpus), instances=instances, rests={})
        return replace(node, problem=node.problem or "is avoided") if node.id in avoided else node

    return Snapshot(map(shown, anew.nodes), NEAR)


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes that were worked out, in order."""
    done: list[str] = []

    def counting(info: NodeInfo, *args: Any) -> Node:
        done.append(info.id)
        return node_state(info, *args)

    monkeypatch.setattr(view, "node_state", counting)
    return done


@pytest.fixture
def cluster() -> Cluster:
    found = Cluster()
    for number in range(6):
        node = f"n{number}"
        found.infos[node] = NodeInfo(node, node, "a", 4)
        found.available[node] = {"GPU": 4.0}
    found.tell()
    return found


def test_only_what_changed_is_worked_out(cluster: Cluster, worked_out: list[str]) -> None:
    cluster.view.snapshot()
    assert sorted(worked_out) == sorted(cluster.infos)
    worked_out.clear()

    cluster.available = {node: {"GPU": 4.0, "object_store_memory": 1.0} for node in cluster.infos}
    cluster.tell()
    cluster.view.snapshot()
    assert worked_out == [], "nothing that matters here has changed"

    cluster.available["n3"] = {"GPU": 3.0}
    cluster.tell()
    cluster.view.snapshot()
    assert worked_out == ["n3"]
    worked_out.clear()

    cluster.lagging = {0.25: frozenset({"n1"}), 2.0: frozenset({"n1", "n2"})}
    for lag, believed, expected in (
        (0.25, (), ["n1"]),
        (0.25, (), []),
        (2.0, (), ["n2"]),
        (2.0, ("n1",), ["n1"]),
        (0.25, (), ["n1", "n2"]),
    ):
        cluster.view.snapshot(lag, believed)
        assert sorted(worked_out) == expected, (lag, believed)
        worked_out.clear()

    cluster.infos["n9"] = NodeInfo("n9", "n9", "a", 4)
    del cluster.infos["n0"]
    cluster.tell()
    assert [node.id for node in cluster.view.snapshot().nodes] == ["n1", "n2", "n3", "n4", "n5", "n9"]
    assert worked_out == ["n9"]


def test_what_was_found_out_about_a_kind_of_request_is_kept(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked, and whatever else was asked in between: only nodes that changed are ranked anew."""
    asked: list[str] = []
    offer = Node.offer
    monkeypatch.setattr(Node, "offer", lambda node, needs: asked.append(node.id) or offer(node, needs))
    first, second = Request("d", (0,), Needs(1)), Request("e", (0,), Needs(2))
    plan(overlaid(cluster.view.snapshot(), {}, {"n1"}), first)
    assert set(asked) == set(cluster.infos)
    plan(cluster.view.snapshot(), second)
    for number in range(3):
        cluster.tallies["n4"] = Tally(gpus={number})
        cluster.view.touch(["n4"])
        plan(cluster.view.snapshot(), second)
    asked.clear()
    plan(cluster.view.snapshot(), first)
    assert set(asked) <= {"n0", "n4"}, "n0 is where it goes"


def test_a_snapshot_that_was_handed_out_stays_as_it_is(cluster: Cluster) -> None:
    before = cluster.view.snapshot()
    request = Request("d", (0,), Needs(4), policy=Policy.FRAGMENTATION)
    cluster.tallies["n0"] = Tally(gpus={0, 1, 2, 3})
    cluster.view.touch(["n0"])
    after = cluster.view.snapshot()
    assert [before.node("n0").free, after.node("n0").free] == [{0, 1, 2, 3}, frozenset()]
    for policy in (Policy.TOPOLOGY, Policy.FRAGMENTATION):
        chosen = [plan(one, replace(request, policy=policy)) for one in (before, after, before)]
        assert [one.replicas[0].node_id for one in chosen] == ["n0", "n1", "n0"]  # type: ignore[union-attr]


@pytest.mark.parametrize("resource", ["GPU", "CPU", "memory", "egress", "egress_openai"])
def test_all_that_counts_of_what_ray_says_is_free_is_followed(resource: str) -> None:
    full = {"GPU": 4.0, "CPU": 8.0, "memory": float(1 << 30), "egress": 10.0, "egress_openai": 4.0}
    info = NodeInfo("n", "n", "a", 4, {}, {"egress": 10, "egress_openai": 4}, 8000, 1 << 30)
    cluster = Cluster(infos={"n": info}, available={"n": full})
    cluster.tell()
    before = cluster.view.snapshot()
    cluster.available = {"n": {**full, resource: 1.0}}
    cluster.tell()
    after = cluster.view.snapshot()
    assert after.nodes != before.nodes
    same(after, cluster.anew(0.25, frozenset()))
