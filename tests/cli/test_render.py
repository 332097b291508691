"""What people see, from hand-made reports."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from rich.console import Console

from placement import topologies
from placement.cli.views import machine, nodes, tables
from placement.core.matrix import render_matrix
from placement.wire.facts import NodeFacts, NvLinkFacts


def text(*renderables: Any) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def gpu(
    ordinal: int, state: str = "free", *occupants: tuple[str, int, float], mig: str | None = None
) -> dict[str, Any]:
    who = [{"deployment": name, "replica": replica, "share": share} for name, replica, share in occupants]
    first = who[0] if who else {"deployment": None, "replica": None}
    return {
        "ordinal": ordinal, "state": state, "deployment": first["deployment"], "replica": first["replica"],
        "occupants": who, "mig": mig,
    }  # fmt: skip


def node(**fields: Any) -> dict[str, Any]:
    empty = {
        "id": "id-a", "name": "a", "gpu_count": 0, "gpu_model": None, "topology_known": True, "nvswitch": False,
        "islands": [], "gpus": [], "others_unlocated": 0, "egress": [], "problem": None,
    }  # fmt: skip
    return empty | fields


def assignment(**fields: Any) -> dict[str, Any]:
    empty = {
        "replica_index": 0, "node": "id-a", "node_name": "a", "gpus": [], "ray_gpus": [], "weakest_link": None,
        "bandwidth_gb_per_s": None, "ray_bandwidth_gb_per_s": None, "egress_resource": None, "egress_units": 0,
        "share": 1.0, "mig": "",
    }  # fmt: skip
    return empty | fields


def test_a_node_is_drawn_island_by_island_with_who_sits_where() -> None:
    gpus = [gpu(0, "other"), gpu(1), gpu(2, "held", ("qwen", 0, 1)), gpu(3, "held", ("qwen", 0, 1))]
    report = {
        "nodes": [node(gpu_count=4, gpu_model="A100", islands=[[0, 1], [2, 3]], gpus=gpus)],
        "deployments": [{"name": "qwen", "assignments": []}],
    }
    assert text(nodes.cluster_map(report)).splitlines() == [
        " a   4 x A100, NVLink islands of 2 + 2",
        "     [ 0 (another Ray user)   1 free ]",
        "     [ 2-3 qwen/0 ]",
    ]


def test_lone_gpus_share_a_line_and_what_is_unknown_is_said() -> None:
    pcie = node(gpu_count=2, islands=[[0], [1]], gpus=[gpu(0), gpu(1)])
    unknown = node(
        gpu_count=2, topology_known=False, gpus=[gpu(0), gpu(1)], others_unlocated=1, problem="no driver"
    )
    shown = text(nodes.cluster_map({"nodes": [pcie, unknown], "deployments": []}))
    assert "2 x GPU, PCIe only" in shown
    assert "[ 0-1 free ]" in shown
    assert "topology unknown, other Ray users hold 1 more" in shown
    assert "no driver" in shown


def test_a_shared_gpu_names_all_who_share_it_and_what_is_left() -> None:
    gpus = [
        gpu(0, "held", ("embed", 0, 0.25), ("embed", 1, 0.25), ("rank", 0, 0.4)),
        gpu(1, "held", ("embed", 2, 0.5), ("embed", 3, 0.5)),
    ]
    names: list[dict[str, Any]] = [{"name": name, "assignments": []} for name in ("embed", "rank")]
    shown = text(nodes.cluster_map({"nodes": [node(gpu_count=2, gpus=gpus)], "deployments": names}))
    assert "[ 0 embed/0 0.25, embed/1 0.25, rank/0 0.4, 0.1 left   1 embed/2 0.5, embed/3 0.5 ]" in shown


def test_instances_stand_by_profile_beside_the_whole_gpus() -> None:
    gpus = [
        gpu(0),
        gpu(1, mig="1g.10gb"),
        gpu(2, "held", ("small", 0, 1), mig="1g.10gb"),
        gpu(3, "other", mig="3g.40gb"),
        gpu(4),
        gpu(5, mig="1g.10gb"),
    ]
    islands = [[0, 4], [1], [2], [3], [5]]
    report = {
        "nodes": [node(gpu_count=6, gpu_model="A100", islands=islands, gpus=gpus)],
        "deployments": [{"name": "small", "assignments": []}],
    }
    assert text(nodes.cluster_map(report)).splitlines() == [
        " a   2 x A100, one NVLink island, MIG 3 x 1g.10gb, 1 x 3g.40gb",
        "     [ 0,4 free ]",
        "     [ 1g.10gb: 1 free   2 small/0   5 free ]",
        "     [ 3g.40gb: 3 (another Ray user) ]",
    ]


def test_a_node_of_instances_only_says_so() -> None:
    gpus = [gpu(0, mig="1g.10gb"), gpu(1, mig="1g.10gb")]
    one = node(gpu_count=2, gpu_model="A100", topology_known=False, gpus=gpus)
    assert text(nodes.cluster_map({"nodes": [one], "deployments": []})).splitlines() == [
        " a   MIG 2 x 1g.10gb of A100",
        "     [ 1g.10gb: 0-1 free ]",
    ]


def test_gpus_that_nobody_can_tell_stand_apart() -> None:
    gpus = [gpu(0), gpu(1), gpu(2, "unknown"), gpu(3, "held", ("old", 0, 1))]
    for one in gpus[2:]:
        one["problem"] = "NVML does not show it"
    report = {
        "nodes": [node(gpu_count=4, gpu_model="A100", islands=[[0, 1], [2], [3]], gpus=gpus)],
        "deployments": [{"name": "old", "assignments": []}],
    }
    assert text(nodes.cluster_map(report)).splitlines() == [
        " a   2 x A100, one NVLink island, 2 x ?",
        "     [ 0-1 free ]",
        "     [ 2 ?   3 old/0 ]",
    ]


def test_a_node_of_which_no_gpu_can_be_told_is_drawn() -> None:
    gpus = [gpu(0, "unknown"), gpu(1, "unknown")]
    for one in gpus:
        one["problem"] = "NVML does not show it"
    one = node(gpu_count=2, topology_known=False, gpus=gpus)
    assert text(nodes.cluster_map({"nodes": [one], "deployments": []})).splitlines() == [
        " a   2 x ?",
        "     [ 0-1 ? ]",
    ]


def machine_lines(name: str, facts: NodeFacts, problem: str | None = None) -> list[str]:
    """What ``topology`` shows of a node without an NVSwitch of which this was read."""
    shape = facts.topology()
    report = {
        "name": name, "gpu_count": len(shape), "gpu_model": shape.model, "known": True, "nvswitch": False,
        "islands": [list(island) for island in shape.islands], "matrix": render_matrix(shape),
        "problem": problem, "facts": facts.model_dump(mode="json"),
    }  # fmt: skip
    return text(*machine.topology_view(report)).splitlines()


def test_a_machine_tells_lanes_where_they_differ_and_who_has_peer_to_peer() -> None:
    facts = topologies.facts("l40s-4x")
    lanes = ((4, 16), (4, 8), (None, None), (4, 16))
    gpus = [
        gpu.model_copy(update={"pcie_generation": generation, "pcie_width": width})
        for gpu, (generation, width) in zip(facts.gpus, lanes, strict=True)
    ]
    told = [(True, True), (False, True), (None, True), (True, None), (True, True), (None, None)]
    pairs = [
        pair.model_copy(update={"peer_read": read, "peer_write": write})
        for pair, (read, write) in zip(facts.pairs, told, strict=True)
    ]
    facts = facts.model_copy(update={"gpus": tuple(gpus), "pairs": tuple(pairs), "cpu": "AMD EPYC 9654"})
    lines = machine_lines("a", facts)
    assert lines[2] == "processors: AMD EPYC 9654  ·  peer-to-peer over PCIe: 2 of 6 pairs, 3 not known"
    assert lines[3].split()[:6] == ["GPU", "0", "1", "2", "3", "PCIe"]
    assert [line.split()[5] for line in lines[5:9]] == ["4.0", "4.0", "?", "4.0"]
    assert "4.0 x8" in lines[6]


def test_a_machine_tells_its_links_and_whether_its_switch_reduces() -> None:
    def links(up: int, down: int, speed: int | None = 26_562) -> tuple[NvLinkFacts, ...]:
        return (*[NvLinkFacts(state="active", mb_per_s=speed)] * up, *[NvLinkFacts(state="inactive")] * down)

    facts = topologies.facts("hgx-h100-4gpu")
    told = {0: links(18, 0), 1: links(17, 1), 2: links(18, 0), 3: (*links(17, 0, None), NvLinkFacts())}
    gpus = [
        gpu.model_copy(
            update={"nvlinks": told[gpu.ordinal], "minor_number": 3 - gpu.ordinal, "nvlink_version": "4.0"}
        )
        for gpu in facts.gpus
    ]
    gpus[3] = gpus[3].model_copy(update={"nvlink_version": None, "minor_number": None})
    facts = facts.model_copy(update={"source": "nvml", "gpus": tuple(gpus)})
    lines = machine_lines("a", facts)
    assert lines[3:6] == [
        "NVLink 4.0: 18 of 18 links up, 26.6 GB/s each, GPU 0,2",
        "NVLink 4.0: 17 of 18 links up, 26.6 GB/s each, GPU 1",
        "NVLink ?: ? of 18 links up, GPU 3",
    ]
    assert [line.split()[:2] for line in lines[-4:]] == [["0", "3"], ["1", "2"], ["2", "1"], ["3", "?"]]


@pytest.mark.parametrize(
    ("name", "nvls", "said"),
    [
        ("dgx-h100", True, "NVLS: on"),
        ("dgx-h100", False, "NVLS: off"),
        ("dgx-h100", None, "NVLS: not known"),
        ("dgx-a100", None, None),
        ("h100-pcie-2x", None, None),
    ],
)
def test_nvls_is_told_where_a_switch_could_reduce(name: str, nvls: bool | None, said: str | None) -> None:
    told = machine.host_texts(replace(topologies.load(name), nvls=nvls), (0, 1))
    assert [one for one in told if one.startswith("NVLS")] == ([said] if said else [])


def test_a_machine_lists_the_slots_that_nobody_can_tell() -> None:
    facts = topologies.facts("a100-pcie-4x")
    lost = facts.gpus[3].model_copy(update={"name": None, "errors": ("GPU is lost",)})
    facts = facts.model_copy(update={"gpus": (*facts.gpus[:3], lost)})
    lines = machine_lines("a", facts, "nothing is placed on GPU 3")
    assert lines[0] == "a  3 x NVIDIA A100 80GB PCIe and 1 x ?, catalogue"
    assert lines[-2:] == ["?: slot 3", "nothing is placed on GPU 3"]


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({"gpus": [0, 1, 2, 3]}, "GPU 0-3"),
        ({"gpus": [1], "share": 0.25}, "0.25 of GPU 1"),
        ({"gpus": [1, 1], "share": 0.25}, "0.5 of GPU 1"),
        ({"gpus": [1, 2, 3, 1], "shares": [0.5, 1.0, 1.0, 0.25]}, "GPU 2-3, 0.75 of GPU 1"),
        ({"gpus": [0, 3], "shares": [0.5, 0.25]}, "0.5 of GPU 0, 0.25 of GPU 3"),
        ({"gpus": [0, 3, 0], "shares": [0.5, 1.0, 0.5]}, "GPU 0,3"),
        ({"gpus": [4], "mig": "1g.10gb"}, "MIG 1g.10gb, slot 4"),
        ({"egress_resource": "egress_openai", "egress_units": 16}, "16 x egress_openai"),
        ({"cpus": 2.5, "memory_bytes": 4 << 30}, "2.5 CPUs, 4 GiB"),
        ({"cpus": 1.0, "memory_bytes": 0}, "1 CPU"),
    ],
)
def test_a_replica_says_what_it_holds(fields: dict[str, Any], holds: str) -> None:
    row = {"deployment": "d", "assignments": [assignment(**fields)]}
    assert holds in text(tables.assignments_table([row], title="placed"))


def test_a_machine_with_instances_lists_them_and_links_only_the_whole_gpus() -> None:
    lines = machine_lines("a100-mig-4x", topologies.facts("a100-mig-4x"))
    assert lines[:2] == [
        "a100-mig-4x  2 x NVIDIA A100 80GB PCIe and 11 MIG instances, catalogue",
        "NVLink islands: [11-12]",
    ]
    assert [line.split()[:3] for line in lines[-5:-3]] == [["11", "X", "NV12"], ["12", "NV12", "X"]]
    assert lines[-3:] == ["MIG 1g.10gb: slots 0-6,9-10", "MIG 3g.40gb: slot 7", "MIG 2g.20gb: slot 8"]


def test_an_egress_node_shows_who_takes_how_much() -> None:
    held = assignment(egress_resource="egress", egress_units=4)
    report = {
        "nodes": [node(egress=[{"resource": "egress", "total": 10, "held": 4}])],
        "deployments": [{"name": "gpt", "assignments": [held]}],
    }
    assert text(nodes.cluster_map(report)).splitlines() == [
        " a   egress node",
        "     egress: 4 of 10 requests  gpt/0 (4)",
    ]


def test_a_node_shows_who_takes_its_cpus() -> None:
    held = [assignment(node=name, cpus=2.5, memory_bytes=0, replica_index=i) for i, name in enumerate("abc")]
    egress = [{"resource": "egress", "total": 1, "held": 0}]
    gpus = {"gpu_count": 1, "gpu_model": "T4", "islands": [[0]], "gpus": [gpu(0)]}
    report = {
        "nodes": [
            node(id="a", name="a", cpus={"total": 8.0, "held": 2.5}),
            node(id="b", name="b", cpus={"total": 8, "held": 2.5}, egress=egress),
            node(id="c", name="c", cpus={"total": 8, "held": 2.5}, **gpus),
            node(id="d", name="d", cpus={"total": 8, "held": 0}),
        ],
        "deployments": [{"name": "embed", "assignments": held}],
    }  # fmt: skip
    assert text(nodes.cluster_map(report)).splitlines() == [
        " a   CPU node",
        "     CPUs: 2.5 of 8  embed/0 (2.5)",
        " b   egress node",
        "     egress: 0 of 1 requests",
        "     CPUs: 2.5 of 8  embed/1 (2.5)",
        " c   1 x T4, PCIe only",
        "     [ 0 free ]",
        "     CPUs: 2.5 of 8  embed/2 (2.5)",
    ]
    report["nodes"] *= 20  # with many, a line each
    said = text(nodes.cluster_map(report))
    assert "CPU node: 20 nodes" in said
    assert "CPUs: 2.5 of 8  embed/0" in said


def test_rays_own_choice_stands_beside_ours() -> None:
    ours = assignment(
        gpus=[2, 3],
        ray_gpus=[1, 2],
        weakest_link="NV12",
        bandwidth_gb_per_s=230.4,
        ray_bandwidth_gb_per_s=19.92,
    )
    assert tables.ray_alone(ours) == "GPU 1-2, 19.9 GB/s: 12x slower"
    ranged = ours | {"ray_bandwidth_gb_per_s": 1.36, "ray_upper_bandwidth_gb_per_s": 19.2}
    assert tables.ray_alone(ranged) == "GPU 1-2, 1.36 to 19.2 GB/s: at least 12x slower"
    both = ranged | {"bandwidth_gb_per_s": 3.75, "upper_bandwidth_gb_per_s": 19.2}
    assert tables.slowdown(both) == "perhaps slower"
    assert tables.ray_alone(ours | {"gpus": [1, 2]}) == "the same"
    assert tables.ray_alone(assignment()) == ""
    assert tables.bandwidth_text(230.4, "NV12") == "230 GB/s, NV12"
    assert tables.bandwidth_text(4.039, "NODE", 19.747) == "4.04 to 19.7 GB/s, NODE"
    assert (tables.bandwidth_text(None, "?"), tables.bandwidth_text(None, None)) == ("unknown", "")


def test_a_replica_over_several_nodes_has_a_line_for_each_with_its_ranks() -> None:
    parts = [
        assignment(node_name="a", gpus=[0, 1], ranks=[0, 1]),
        assignment(node_name="b", gpus=[2, 3], ranks=[2, 3]),
        assignment(replica_index=1, node_name="c", gpus=[0, 1, 2, 3], ranks=[0, 1, 2, 3]),
    ]
    shown = text(tables.assignments_table([{"deployment": "big", "assignments": parts}], "placed"))
    assert [line.split(maxsplit=3)[3].strip() for line in shown.splitlines() if " big " in line] == [
        "GPU 0-1, ranks 0-1",
        "GPU 2-3, ranks 2-3",
        "GPU 0-3",
    ]


def test_what_waits_for_a_place_is_told_below_the_table() -> None:
    waiting = {"deployment": "d", "assignments": [assignment()], "pending": {"1": "node a died"}}
    *_, last = text(tables.assignments_table([waiting], "placed")).splitlines()
    assert last.strip() == "d: replica 1 is pending: node a died"


def test_an_event_has_a_date() -> None:
    event = {"at": 1_700_000_000.0, "replica": 0, "state": "released", "text": ""}
    date = datetime.fromtimestamp(1_700_000_000.0).strftime("%Y-%m-%d %H:%M:%S")
    assert str(tables.event_line(event)) == f"{date}  replica 0    released"


def test_what_an_engine_that_sorts_gpus_loses_is_said_below_the_table() -> None:
    pairs = assignment(gpus=[1, 5, 2, 3, 4, 7], set_size=2, weakest_link="NV2", bandwidth_gb_per_s=40.0)
    rows = [
        {"deployment": "llama", "assignments": [pairs | {"sorted_bandwidth_gb_per_s": 9.96}]},
        {"deployment": "kept", "assignments": [pairs | {"sorted_bandwidth_gb_per_s": 40.0}]},
        {"deployment": "old", "assignments": [pairs]},
    ]
    shown = text(tables.assignments_table(rows, title="placed")).splitlines()
    assert [" ".join(line.split()) for line in shown[-2:]] == [
        "llama: replica 0 on a has groups 1,5 and 2-3 and 4,7; an engine that sorts GPUs, as vLLM does,",
        "reaches 9.96 GB/s instead of 40",
    ]
