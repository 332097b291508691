"""``placement topology --picture``: what is drawn, and that nobody has to guess at it."""

from __future__ import annotations

import asyncio
import re
from itertools import combinations
from pathlib import Path as File
from typing import Any
from xml.etree import ElementTree

import pytest

from placement import topologies
from placement.cli.topology import _recorded
from placement.cli.views.cluster_picture import cluster_picture
from placement.cli.views.picture import picture
from placement.cli.views.svg import text_width
from placement.core.matrix import render_matrix
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology
from tests.cli import fake_service
from tests.cli.test_commands import run
from tests.dashboard.recorded import NO_ROOM, Recorded
from tests.topologies.test_machines import MACHINES, READ

SVG = "{http://www.w3.org/2000/svg}"


def report(shape: Topology, name: str = "a") -> dict[str, Any]:
    return {
        "name": name, "gpu_model": shape.model, "matrix": render_matrix(shape), "facts": None,
    }  # fmt: skip


def texts(svg: str) -> list[str]:
    return [str(one.text) for one in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def boxes(svg: str) -> list[tuple[str, float, float, float, float]]:
    """Each text, and the box that it takes: left, top, right, bottom."""
    found = []
    root = ElementTree.fromstring(svg)
    texts = [(part, one) for part in root for one in part.iter(f"{SVG}text")]
    for part, one in texts:
        moved = re.findall(r"[\d.]+", part.get("transform", "")) if part.tag == f"{SVG}g" else (0, 0)
        x, y = map(float, moved)
        size, left = float(one.attrib["font-size"]), x + float(one.attrib["x"])
        wide, base = text_width(str(one.text), size), y + float(one.attrib["y"])
        if "transform" in one.attrib:
            found.append((str(one.text), left - size, base - wide, left, base))
            continue
        left -= {"middle": wide / 2, "end": wide}.get(one.attrib["text-anchor"], 0)
        found.append((str(one.text), left, base - 0.75 * size, left + wide, base + 0.1 * size))
    return found


def assert_apart(shown: list[tuple[str, float, float, float, float]], width: float, height: float) -> None:
    """No text leaves the picture, and none covers another."""
    for text, left, top, right, bottom in shown:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height, text
    for (one, l1, t1, r1, b1), (other, l2, t2, r2, b2) in combinations(shown, 2):
        assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1, (one, other)


def every_machine() -> list[Any]:
    catalogue = [pytest.param(_recorded(name, None, None), id=name) for name in topologies.names()]
    pasted = [
        pytest.param(_recorded(None, file, "NVIDIA GPU"), id=file.stem)
        for file in (MACHINES / f"{name}.txt" for name, *_ in READ)
    ]
    return catalogue + pasted


@pytest.mark.parametrize("machine", every_machine())
def test_every_machine_is_drawn_whole_and_no_text_covers_another(machine: dict[str, Any]) -> None:
    svg = picture([machine])
    assert svg == picture([machine])
    root = ElementTree.fromstring(svg)
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    assert_apart(boxes(svg), width, height)
    whole = machine["gpu_count"] - sum(
        bool(one["mig_profile"]) for one in (machine["facts"] or {}).get("gpus", ())
    )
    assert sum(text.startswith("GPU ") for text in texts(svg)) == whole


def test_links_switches_cards_and_nodes_are_named() -> None:
    shown = texts(picture([_recorded("dgx-1v", None, None)]))
    assert shown[:2] == [
        "dgx-1v",
        "8 x Tesla V100-SXM2-32GB  ·  processors: Intel Xeon E5-2698 v4  ·  PCIe 3.0 x16"
        "  ·  peer-to-peer over PCIe: not known",
    ]
    assert [shown.count(text) for text in ("NV1", "NV2", "PCIe switch", "NVSwitch")] == [8, 8, 5, 0]
    assert {"mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3", "CPUs 0-19,40-59", "3.0 x16", "GPU 7"} <= {*shown}
    switched = texts(picture([_recorded("dgx-a100", None, None)]))
    assert [switched.count(text) for text in ("NV12", "NVSwitch", "PCIe switch")] == [8, 1, 5]
    assert {"NUMA node 3", "near no GPU", "mlx5_11"} <= {*switched}


def test_instances_are_drawn_in_their_gpu() -> None:
    shown = texts(picture([_recorded("a100-mig-4x", None, None)]))
    assert {"MIG, slots 0-6", "MIG, slots 7-10", "GPU 11", "GPU 12", "NV12"} <= {*shown}
    assert [shown.count(profile) for profile in ("1g.10gb", "2g.20gb", "3g.40gb")] == [9, 1, 1]


def test_what_is_not_known_is_said_and_not_drawn() -> None:
    shown = texts(picture([report(Topology.unknown(2))]))
    assert {"2 GPUs  ·  processors: not known  ·  PCIe lanes: not known", "PCIe not known"} <= {*shown}
    assert not {"PCIe switch", "PCIe host bridge", "NVSwitch"} & {*shown}
    hidden = texts(picture([_recorded("dgx-2", None, None)]))
    assert "PCIe, not known in detail" in hidden and "PCIe host bridge" not in hidden


def test_machines_that_are_alike_are_drawn_once_with_their_names() -> None:
    pair = Topology(((UNKNOWN_LINK, Link(Path.PIX)), (Link(Path.PIX), UNKNOWN_LINK)))
    alone = Topology(((UNKNOWN_LINK,),))
    shown = texts(picture([report(pair, "b<&>"), report(alone, "c"), report(pair, "a\x00")]))
    assert [text for text in shown if text in ("b<&>, a?", "c", "GPU 0", "GPU 1")] == [
        "b<&>, a?",
        "GPU 0",
        "GPU 1",
        "c",
        "GPU 0",
    ]


def test_the_command_writes_the_picture(tmp_path: File) -> None:
    file = tmp_path / "topology.svg"
    printed = run("topology", "--name", "l40s-4x", "--picture", str(file))
    assert printed.exit_code == 0 and "4 x NVIDIA L40S" in printed.output
    assert file.read_text("utf-8") == picture([_recorded("l40s-4x", None, None)])
    refused = run("topology", "--name", "l40s-4x", "--picture", str(tmp_path / "a.png"))
    assert refused.exit_code == 2 and "--picture: 'a.png' does not end in .svg; name it so" in refused.stderr
    missing = run("topology", "--name", "l40s-4x", "--picture", str(tmp_path / "no" / "a.svg"))
    assert missing.exit_code == 2 and "cannot be written: No such file or directory" in missing.stderr


@pytest.mark.parametrize("nodes", [1, 4, 10, 60])
def test_a_cluster_is_drawn_whole_and_no_text_covers_another(nodes: int) -> None:
    status = asyncio.run(Recorded(nodes).read(0))["status"]
    svg = cluster_picture(status)
    assert svg == cluster_picture(status)
    root = ElementTree.fromstring(svg)
    assert_apart(boxes(svg), *(float(root.attrib[side]) for side in ("width", "height")))
    shown = texts(svg)
    assert {node["name"] for node in status["nodes"]} <= {*shown}
    assert f"llama-405b, replica 0 pending: {NO_ROOM}" in shown
    if nodes == 4:
        assert shown[:2] == [
            "20 GPUs on 3 nodes: 17 held, 2 free, 1 of other Ray users; 1 node without GPUs",
            "6 deployments with 11 replicas, 1 pending",
        ]
        assert {"reranker/0", "25%", "egress_openai: 8 of 32 requests", "died 30s ago", "other user"} <= {
            *shown
        }
        assert "qwen2.5-32b-0  2/2, 230 GB/s, NV12" in shown


def test_status_draws_what_it_shows(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    report = asyncio.run(Recorded(4).read(0))["status"]
    fake_service.use(monkeypatch, fake_service.FakeService(status=report))
    file = tmp_path / "cluster.svg"
    printed = fake_service.run("status", "--picture", str(file))
    assert printed.exit_code == 0 and "3 nodes" in printed.output
    assert file.read_text("utf-8") == cluster_picture(report)
    refused = fake_service.run("status", "--watch", "--picture", str(file))
    assert refused.exit_code == 2 and "leave out --watch" in refused.stderr
