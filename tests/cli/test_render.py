"""What people see, from hand-made reports."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from placement.cli import render


def text(*renderables: Any) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def gpu(
    ordinal: int, state: str = "free", deployment: str | None = None, replica: int | None = None
) -> dict[str, Any]:
    return {"ordinal": ordinal, "state": state, "deployment": deployment, "replica": replica}


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
    }  # fmt: skip
    return empty | fields


def test_a_node_is_drawn_island_by_island_with_who_sits_where() -> None:
    gpus = [gpu(0, "other"), gpu(1), gpu(2, "held", "qwen", 0), gpu(3, "held", "qwen", 0)]
    report = {
        "nodes": [node(gpu_count=4, gpu_model="A100", islands=[[0, 1], [2, 3]], gpus=gpus)],
        "deployments": [{"name": "qwen", "assignments": []}],
    }
    assert text(render.cluster_map(report)).splitlines() == [
        " a   4 x A100, NVLink islands of 2 + 2",
        "     [ 0 (another Ray user)   1 free ]",
        "     [ 2-3 qwen/0 ]",
    ]


def test_lone_gpus_share_a_line_and_what_is_unknown_is_said() -> None:
    pcie = node(gpu_count=2, islands=[[0], [1]], gpus=[gpu(0), gpu(1)])
    unknown = node(
        gpu_count=2, topology_known=False, gpus=[gpu(0), gpu(1)], others_unlocated=1, problem="no driver"
    )
    shown = text(render.cluster_map({"nodes": [pcie, unknown], "deployments": []}))
    assert "2 x GPU, PCIe only" in shown
    assert "[ 0-1 free ]" in shown
    assert "topology unknown, other Ray users hold 1 more" in shown
    assert "no driver" in shown


def test_an_egress_node_shows_who_takes_how_much() -> None:
    held = assignment(egress_resource="egress", egress_units=4)
    report = {
        "nodes": [node(egress=[{"resource": "egress", "total": 10, "held": 4}])],
        "deployments": [{"name": "gpt", "assignments": [held]}],
    }
    assert text(render.cluster_map(report)).splitlines() == [
        " a   egress node",
        "     egress: 4 of 10 requests  gpt/0 (4)",
    ]


def test_rays_own_choice_stands_beside_ours() -> None:
    ours = assignment(
        gpus=[2, 3],
        ray_gpus=[1, 2],
        weakest_link="NV12",
        bandwidth_gb_per_s=230.4,
        ray_bandwidth_gb_per_s=19.92,
    )
    assert render.ray_alone(ours) == "GPU 1-2, 19.9 GB/s: 12x slower"
    assert render.ray_alone(ours | {"gpus": [1, 2]}) == "the same"
    assert render.ray_alone(assignment()) == ""
    assert render.bandwidth_text(230.4, "NV12") == "230 GB/s, NV12"
    assert (render.bandwidth_text(None, "?"), render.bandwidth_text(None, None)) == ("unknown", "")
