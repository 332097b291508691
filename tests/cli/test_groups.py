"""What people see of groups: in plans, in what was applied, and in status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from placement import topologies
from placement.cli.views.status import status_view
from placement.core.node import Node
from placement.core.snapshot import Snapshot
from placement.wire.cluster import ClusterFile
from tests.cli.fake_service import FakeService, report, run, standing, use
from tests.cli.test_render import text

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "groups.toml")
LINK = {
    "unit": 0, "between": ["prefill/0", "decode/1"], "via": "pcie", "route": "NODE", "gb_per_s": 29.714, "gpus": [0, 2],
}  # fmt: skip


def cluster(path: Path, gpus: int) -> str:
    node = Node("a", "h", topology=topologies.load("dgx-h100"), free=frozenset(range(gpus)))
    other = Node("b", "i", topology=topologies.load("dgx-h100"), free=frozenset(range(8)))
    path.write_text(ClusterFile.of(Snapshot([node, other]), ()).model_dump_json())
    return str(path)


def test_a_plan_shows_the_route_of_each_two_that_talk(tmp_path: Path) -> None:
    args = ["plan", "--file", cluster(tmp_path / "c.json", 8), EXAMPLE]
    shown = run(*args)
    assert 0 == shown.exit_code, shown.output
    assert "group qwen, slowest route of each two that talk" in shown.stdout
    assert " prefill/0 - decode/1: NODE, 29.7 GB/s via pcie" in shown.stdout
    assert 8 == shown.stdout.count("NODE, 29.7 GB/s")
    told = json.loads(run(*args, "--json").stdout)["deployments"]
    assert ["qwen", "qwen"] == [one["group"] for one in told]
    assert LINK == told[0]["links"][1]


def test_a_plan_says_why_all_of_a_group_waits(tmp_path: Path) -> None:
    args = ["plan", "--file", cluster(tmp_path / "c.json", 4), EXAMPLE]
    shown = run(*args)
    assert 0 == shown.exit_code, shown.output
    assert "replicas 0-7 are pending" in " ".join(shown.stdout.split()) or "0-7" in shown.stdout
    assert "slowest route" not in shown.stdout
    refused = run(*args, "--atomic", "--json")
    assert (1, "below_floor", "qwen") == (
        refused.exit_code,
        *(json.loads(refused.stderr)["error"][field] for field in ("code", "deployment")),
    )


def test_status_shows_the_routes_of_a_group() -> None:
    group = {
        "name": "qwen",
        "state": "placed",
        "units": 4,
        "members": {"prefill": 1, "decode": 2},
        "links": [LINK],
    }
    one = {
        "name": "prefill", "model": "m", "runtime": "vllm", "runtime_from": "declared", "replicas": 1,
        "state": "placed", "assignments": [], "pending": {},
    }  # fmt: skip
    shown = text(*status_view({**report(), "deployments": [one], "groups": [group]}))
    assert " prefill/0 - decode/1: NODE, 29.7 GB/s via pcie" in shown


def test_members_that_cannot_be_planned_are_asked_about_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from placement.errors import UnknownNode

    refusal = UnknownNode("constraints.gpu_nodes", "x", ("a",))
    service = FakeService(plan_all=refusal)
    use(monkeypatch, service)
    shown = run("plan", EXAMPLE)
    assert 1 == shown.exit_code
    assert [2, 2] == [len(args[0]) for args, _ in service.asked("plan_all")]
    assert [] == service.asked("plan")


def test_members_of_one_group_are_released_once(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [standing(name, group="qwen") for name in ("prefill", "decode")]
    service = FakeService(status={**report(*members), "groups": [{"name": "qwen"}]}, release=3)
    use(monkeypatch, service)
    shown = run("release", "decode", "prefill")
    assert (0, "released decode: 3 replicas\n") == (shown.exit_code, shown.stdout)
    assert 0 == run("release", "qwen").exit_code
    assert [("decode",), ("qwen",)] == [args for args, _ in service.asked("release")]
