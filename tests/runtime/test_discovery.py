"""What the planner believes of a node, from books that lag and from what the node actor saw last."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray.util.accelerators import accelerators

from placement import topologies
from placement.cli.simulate import cluster_of
from placement.core.needs import WHOLE, Needs
from placement.core.node import Choice
from placement.core.planner import plan
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.runtime import discovery
from placement.runtime.claims import Tally
from placement.runtime.discovery import ACCELERATOR_LABEL, TOPOLOGY_LABEL, NodeInfo, node_state
from placement.runtime.orders import GpuHardware, hardware_of
from placement.wire.accelerators import accelerator_type
from placement.wire.facts import GpuFacts, NodeFacts
from placement.wire.slots import in_ray_order

NODE = NodeInfo("id", "gpu-a", "10.0.0.1", gpu_count=8, egress={"egress": 10})


@pytest.mark.parametrize(
    ("case", "in_books", "standing", "claimed", "foreign", "free"),
    [
        ("nobody is there", 8, (), (), (), (0, 1, 2, 3, 4, 5, 6, 7)),
        ("what stands is not free", 6, (2, 3), (), (), (0, 1, 4, 5, 6, 7)),
        ("nor what is claimed and not reserved yet", 8, (), (0, 1), (), (2, 3, 4, 5, 6, 7)),
        ("nor what is claimed and just reserved", 6, (), (0, 1), (), (2, 3, 4, 5, 6, 7)),
        ("others took two nobody has located: the lowest", 6, (), (), (), (2, 3, 4, 5, 6, 7)),
        ("others hold two that were located", 6, (), (), (4, 5), (0, 1, 2, 3, 6, 7)),
        ("and gave one back since", 7, (), (), (4, 5), (0, 1, 2, 3, 4, 6, 7)),
        ("and took one more since", 5, (), (), (4, 5), (1, 2, 3, 6, 7)),
        ("a claim beside a located other", 7, (), (0, 1), (4,), (2, 3, 5, 6, 7)),
        ("the books lag behind our own change", None, (0, 1), (), (4,), (2, 3, 5, 6, 7)),
        ("a share of a GPU makes it not whole", 7.5, (), (), (), (1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_free_gpus(
    case: str,
    in_books: float | None,
    standing: tuple[int, ...],
    claimed: tuple[int, ...],
    foreign: tuple[int, ...],
    free: tuple[int, ...],
) -> None:
    available = None if in_books is None else {"GPU": in_books, "egress": 10.0}
    tally = Tally(gpus=set(standing), claimed_gpus=set(claimed))
    assert sorted(
        node_state(NODE, GpuHardware(Topology.unknown(8)), available, tally, frozenset(foreign)).free
    ) == list(free), case


def test_a_lost_gpu_is_not_free() -> None:
    facts = NodeFacts(
        source="nvml", gpus=(GpuFacts(ordinal=0, uuid="a"), GpuFacts(ordinal=1, errors=("lost",)))
    )
    node = NodeInfo("id", "a", "", gpu_count=2)
    assert node_state(node, hardware_of(facts, 2), {"GPU": 2.0}, Tally(), frozenset()).free == {0}


def lost_one() -> GpuHardware:
    """Four bridged GPUs, of which the driver cannot reach GPU 2."""
    facts = topologies.facts("a100-pcie-4x")
    lost = GpuFacts(ordinal=2, errors=("GPU is lost",))
    gpus = (*facts.gpus[:2], lost, facts.gpus[3])
    return hardware_of(facts.model_copy(update={"source": "nvml", "gpus": gpus}), 4)


def test_a_lost_gpu_spoils_nothing_of_its_node() -> None:
    machine = lost_one()
    node = node_state(NodeInfo("id", "a", "", 4), machine, {"GPU": 4.0}, Tally(), frozenset())
    assert (machine.topology.model, machine.capability) == ("NVIDIA A100 80GB PCIe", (8, 0))
    assert (node.gpu_memory_bytes, "A100" in node.accelerators) == (80 << 30, True)
    assert (node.free, node.whole_gpus, node.profiles) == ({0, 1, 3}, 3, frozenset())


def test_a_node_with_a_lost_gpu_is_paired_with_nodes_of_its_model() -> None:
    whole = hardware_of(topologies.facts("a100-pcie-4x"), 4)
    infos = [NodeInfo(name, name, "", 4) for name in ("a", "b")]
    snapshot = Snapshot(
        node_state(info, machine, {"GPU": 4.0}, Tally(), frozenset())
        for info, machine in zip(infos, (lost_one(), whole), strict=True)
    )
    outcome = plan(snapshot, Request("d", (0,), Needs(2), stages=3))
    assert isinstance(outcome, Plan), outcome
    assert [(part.node_id, part.gpus) for part in outcome.replicas] == [("a", (0, 1)), ("b", (0, 1, 2, 3))]


def test_of_a_shared_gpu_no_more_is_free_than_is_free_of_the_node() -> None:
    """Another user's fraction lies where Ray packs it: on the GPU that we share."""
    tally = Tally(gpus={3}, shares=Counter({3: 500}))
    for available, rests in (({"GPU": 3.5}, {3: 500}), ({"GPU": 0.25}, {3: 250}), ({}, {}), (None, {3: 500})):
        info = NodeInfo("id", "a", "", 4)
        node = node_state(info, GpuHardware(Topology.unknown(4)), available, tally, frozenset())
        assert node.rests == rests


def test_no_share_is_planned_on_a_lost_gpu() -> None:
    """GPU 2 is shared, and was lost since."""
    tally = Tally(gpus={2})
    tally.shares[2] = 250
    machine = lost_one()
    node = node_state(NodeInfo("id", "a", "", 4), machine, {"GPU": 3.75}, tally, frozenset())
    assert node.rests == {}
    assert node.choose(Needs(1, share=250)) == Choice((3,), 250, 750)
    assert machine.node((), {2: 750}).choose(Needs(1, share=250)) is None


def test_what_is_given_back_on_a_lost_gpu_is_not_free() -> None:
    node = node_state(NodeInfo("id", "a", "", 4), lost_one(), {"GPU": 4.0}, Tally(), frozenset())
    assert node.before({1: WHOLE, 2: WHOLE}, "").free == {0, 1, 3}
    assert node.before({2: 250}, "") == node


def test_gpus_that_ray_has_and_nvml_does_not_show_are_never_free() -> None:
    facts = topologies.facts("a100-pcie-4x")
    gpus = tuple(gpu.model_copy(update={"uuid": f"GPU-{gpu.ordinal}"}) for gpu in facts.gpus)
    reading = facts.model_copy(update={"source": "nvml", "gpus": gpus})
    machine = hardware_of(in_ray_order(reading, 8, None), 8)
    node = node_state(NodeInfo("id", "a", "", 8), machine, {"GPU": 8.0}, Tally(), frozenset())
    assert (node.free, node.whole_gpus) == ({0, 1, 2, 3}, 4)
    assert node.choose(Needs(5)) is None


def test_free_egress_is_the_less_of_what_the_books_and_we_know() -> None:
    def left(in_books: float | None, ours: int) -> int:
        tally = Tally()
        tally.egress["egress"] = ours
        available = None if in_books is None else {"egress": in_books}
        return node_state(NODE, GpuHardware(Topology.unknown(8)), available, tally, frozenset()).egress[
            "egress"
        ]

    assert [left(10, 4), left(5, 4), left(None, 4)] == [6, 5, 6]


@pytest.mark.parametrize(
    ("name", "gpus", "problem"),
    [
        (None, 8, None),
        ("dgx-1v", 8, None),
        (
            "dgx-1v",
            4,
            "label placement/topology of node a: dgx-1v has 8 GPUs, the node 4; correct one of them",
        ),
        (
            "dgx-9",
            8,
            "label placement/topology of node a: unknown topology 'dgx-9'; use one of: ",
        ),
    ],
)
def test_a_wrong_topology_label_is_named_with_its_value_and_the_fix(
    name: str | None, gpus: int, problem: str | None
) -> None:
    node = NodeInfo("id", "a", "", gpus, labels={TOPOLOGY_LABEL: name} if name else {})
    said = node.label_problem()
    assert said == problem if problem is None else said is not None and said.startswith(problem)


def test_all_accelerator_types_of_a_node_count(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "NodeID": "id",
        "NodeManagerAddress": "10.0.0.1",
        "Alive": True,
        "Labels": {ACCELERATOR_LABEL: "A100-SXM"},
        "Resources": {
            "GPU": 8.0,
            "accelerator_type:A100": 1.0,
            "accelerator_type:A100-80G": 1.0,
            "accelerator_type:T4_group_0_0123": 1.0,
        },
    }
    monkeypatch.setattr(discovery.ray, "nodes", lambda: [row])
    [info] = discovery.live_nodes()
    assert {"A100", "A100-80G"} == info.accelerators
    node = node_state(info, GpuHardware(Topology.unknown(8)), {"GPU": 8.0}, Tally(), frozenset())
    assert {"A100", "A100-80G", "A100-SXM"} == node.accelerators


@pytest.mark.parametrize("name", topologies.names())
def test_a_simulated_node_goes_by_the_name_that_ray_gives_its_gpus(name: str) -> None:
    info = NodeInfo("id", "a", "", len(topologies.load(name)), labels={TOPOLOGY_LABEL: name})
    node = node_state(info, hardware_of(topologies.facts(name), info.gpu_count), None, Tally(), frozenset())
    product = topologies.describe(name).gpu
    assert NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(product) in node.accelerators
    assert node.accelerators == cluster_of(f"{name}=1").nodes[0].accelerators


def test_ray_names_every_type_of_its_own_as_we_do() -> None:
    for name, kind in vars(accelerators).items():
        if name.startswith("NVIDIA_") and name not in ("NVIDIA_A100_40G", "NVIDIA_A100_80G"):
            product = f"NVIDIA {kind.replace('-', ' ')}"
            of_ray = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(product)
            assert (kind, kind) == (accelerator_type(product), of_ray)


def test_nodes_that_have_not_changed_are_the_same_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [NodeInfo("a", "a", "", 4, {"rack": "r"}), NodeInfo("b", "b", "", 4)]
    monkeypatch.setattr(discovery, "live_nodes", lambda: [replace(info) for info in read])
    nodes = discovery.NodeView()
    first = nodes.now()
    assert nodes.now() is first and nodes.lately() is first
    read[0] = NodeInfo("a", "a", "", 4, {"rack": "s"})
    read.append(NodeInfo("c", "c", "", 4))
    second = nodes.now()
    assert second == read and second[1] is first[1] and len(first) == 2
    del read[0]
    assert nodes.now() == read


def test_nodes_that_died_are_known_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    alive = [NodeInfo(name, name, "", 4) for name in "abc"]
    monkeypatch.setattr(discovery, "live_nodes", lambda: list(alive))
    monkeypatch.setattr(discovery.time, "time", lambda: now)
    nodes = discovery.NodeView()
    nodes.now()
    gone = alive.pop(0)
    nodes.now()
    now += discovery.DEAD_SECONDS - 1
    assert nodes.dead() == [discovery.DeadNode(gone, 1000.0)]
    other = alive.pop(0)
    nodes.now()
    nodes.now()
    assert [one.info for one in nodes.dead()] == [other, gone]
    now += 1
    assert [one.info for one in nodes.dead()] == [other]
