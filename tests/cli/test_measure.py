"""``placement measure``: files in and out, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from placement import topologies
from placement.cli.views.measured import measured_lines, measured_view
from placement.core.node import Node
from placement.core.snapshot import Snapshot
from placement.errors import UnknownNode
from placement.runtime.measuring import Target, targets
from placement.wire.cluster import ClusterFile
from placement.wire.machine import Machine
from placement.wire.measurements import as_file
from tests.cli.fake_service import FakeService, run, use
from tests.wire.test_measurements import COLUMNS, HEADER, LARGE, measurement

BRIDGED = topologies.load("a100-pcie-4x")
FACTS = topologies.facts("a100-pcie-4x").model_dump(mode="json")


def snapshot() -> dict[str, Any]:
    node = Node("id-a", "gpu-a", topology=BRIDGED, free=frozenset({1, 2, 3}), uuids={0: "GPU-0"})
    other = Node("id-b", "gpu-b", topology=BRIDGED, free=frozenset(range(4)))
    return ClusterFile.of(Snapshot([node, other]), ()).model_dump(mode="json")


def a_service(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> FakeService:
    reports = [{"id": "id-a", "facts": FACTS}, {"id": "id-b", "facts": FACTS}]
    found = FakeService(
        topology=lambda node: [one for one in reports if node in (None, one["id"])],
        snapshot=snapshot(),
        record_measurements=None,
        **answers,
    )
    use(monkeypatch, found)
    return found


def test_a_target_is_what_the_service_says_of_a_node() -> None:
    [target] = targets([{"id": "id-a", "facts": None}], snapshot())
    assert (target.name, target.free, target.uuids) == ("gpu-a", (1, 2, 3), ("GPU-0", None, None, None))
    assert target.machine == Machine.make(BRIDGED)
    assert isinstance(target, Target) and target.facts.source == "none"


def kept(service: FakeService) -> Any:
    [((measurements,), _)] = service.asked("record_measurements")
    return measurements


@pytest.mark.parametrize("args", [(), ("--node", "id-b")])
def test_what_nccl_tests_printed_is_kept_of_the_host_or_the_node(
    args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = a_service(monkeypatch)
    file = tmp_path / "nccl.txt"
    file.write_text(HEADER + COLUMNS + LARGE)
    result = run("measure", "--import", str(file), *args, "--json")
    assert result.exit_code == 0, result.stderr
    [one] = kept(service)
    assert one["host"] == ("gpu-b" if args else "gpu-a")
    [rate] = one["rates"]
    assert (rate["gpus"], rate["gb_per_s"], rate["message_bytes"]) == ([0, 1], 207.29, 1 << 30)
    [node] = json.loads(result.stdout)["nodes"]
    [told] = node["sets"]
    assert (told["gb_per_s"], told["predicted_gb_per_s"], told["suspect"]) == (207.29, 230.4, False)


def test_a_host_that_is_no_node_has_to_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service = a_service(monkeypatch)
    (tmp_path / "nccl.txt").write_text(HEADER.replace("on gpu-a", "on laptop") + COLUMNS + LARGE)
    result = run("measure", "--import", str(tmp_path / "nccl.txt"))
    assert (result.exit_code, service.asked("record_measurements")) == (2, [])
    assert "no GPU node is called 'laptop', as it says; name it with --node" in result.stderr


def test_what_was_exported_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = str(tmp_path / "rates.json")
    told = as_file([measurement(), measurement(host="gpu-b", uuids=(None,) * 4)])["measurements"]
    service = a_service(monkeypatch, measurements=told)
    assert run("measure", "--export", file).exit_code == 0
    assert json.loads(Path(file).read_text())["measurements"] == told
    assert run("measure", "--import", file).exit_code == 0
    assert [one["host"] for one in kept(service)] == ["gpu-a", "gpu-b"]
    alone = run("measure", "--export", "-", "--node", "gpu-b")
    assert [one["host"] for one in json.loads(alone.stdout)["measurements"]] == ["gpu-b"]
    lost = run("measure", "--export", str(tmp_path / "nowhere" / "rates.json"))
    assert (lost.exit_code, lost.stdout) == (2, "")
    assert "--export: " in lost.stderr and "cannot be written: No such file or directory" in lost.stderr
    nothing = run("measure", "--export", "-", "--node", "gpu-c")
    assert (nothing.exit_code, nothing.stdout) == (1, "")
    assert "cannot measure node 'gpu-c': nothing was measured there" in nothing.stderr


def test_what_was_measured_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    told = as_file([measurement()])["measurements"]
    service = a_service(monkeypatch, forget_measurements=lambda node: told if node in (None, "gpu-a") else [])
    said = run("measure", "--forget", "--node", "gpu-a")
    assert (said.exit_code, said.stdout) == (0, "gpu-a: forgot 1 set of GPUs\n")
    assert json.loads(run("measure", "--forget", "--json").stdout) == {"version": 1, "measurements": told}
    assert [args for args, _ in service.asked("forget_measurements")] == [("gpu-a",), (None,)]
    nothing = run("measure", "--forget", "--node", "gpu-c")
    assert (nothing.exit_code, nothing.stdout) == (1, "")
    assert "cannot measure node 'gpu-c': nothing was measured there" in nothing.stderr
    both = run("measure", "--forget", "--export", "-")
    assert both.exit_code == 2 and "--import, --export and --forget exclude each other" in both.stderr


def test_a_node_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    service = a_service(monkeypatch)
    service.answers["topology"] = UnknownNode("--node", "x", ("gpu-a",))
    result = run("measure", "--node", "x")
    assert result.exit_code == 1 and "'x'" in result.stderr


def text(*renderables: Any) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as captured:
        console.print(*renderables, sep="\n")
    return captured.get()


SLOW = {"gpus": [0, 1], "gb_per_s": 11.9, "predicted_gb_per_s": 230.4, "suspect": True, "own": True}
FAST = {"gpus": [2, 3], "gb_per_s": 212.0, "predicted_gb_per_s": 230.4, "suspect": False, "own": True}


def test_measured_stands_beside_predicted() -> None:
    failed = [{"gpus": [0, 2], "problem": "no all-reduce within 60 s"}]
    node = {"node": "gpu-a", "sets": [SLOW, FAST], "failed": failed, "left_out": 3}
    lines = [" ".join(line.split()) for line in text(*measured_view({"nodes": [node]})).splitlines()]
    assert "0-1 11.9 230 5 % suspect" in lines
    assert "2-3 212 230 92 %" in lines
    assert "0,2 failed no all-reduce within 60 s" in lines
    assert "no time for 3 sets more: --max-seconds" in lines


def test_topology_sums_up_what_was_measured() -> None:
    assert [str(line) for line in measured_lines([SLOW, FAST])] == [
        "measured: 2 sets of 2 GPUs, 11.9 to 212 GB/s; predicted 230",
        "suspect: GPU 0-1: 11.9 of 230 GB/s",
    ]
    [line] = measured_lines([FAST | {"own": False}])
    assert "measured, on other nodes of this make: 1 set of 2 GPUs, 212 GB/s; predicted 230" == str(line)
