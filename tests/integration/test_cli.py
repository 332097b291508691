"""The command line against a running cluster, as a user has it: one process for each command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from placement.runtime.embedded import SimulatedNode, embedded_cluster
from tests.integration.conftest import left_over, settled

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
SCRIPT = Path(sys.executable).with_name("placement")
EXAMPLE = Path(__file__).parents[2] / "examples" / "deployments.toml"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    nodes = [
        SimulatedNode("dgx", topology="dgx-1v"),
        SimulatedNode("hgx", topology="dgx-h100"),
        SimulatedNode("egress-a", resources={"egress_openai": 64, "egress_gemini": 16}),
        SimulatedNode("egress-b", resources={"egress": 64}),
    ]
    with embedded_cluster(nodes) as running:
        yield running.address


@pytest.fixture(scope="module")
def run(address: str) -> Run:
    """Runs ``placement ARGS --address ...``."""

    def run(*args: str, at: str = address, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPT), *args, "--address", at]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})

    return run


def data(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_a_whole_life(run: Run) -> None:
    before = run("status")
    assert (before.returncode, before.stdout) == (3, "")
    assert "no placement service on the Ray cluster" in before.stderr
    assert "placement up" in before.stderr

    assert run("up").returncode == 0
    assert run("up").returncode == 0, "starting again changes nothing"

    planned = data(run("plan", str(EXAMPLE), "--json"))
    assert not left_over(), "a plan reserves nothing"
    applied = data(run("apply", str(EXAMPLE), "--json"))
    names = [one["deployment"] for one in applied["deployments"]]
    assert names == [one["deployment"] for one in planned["deployments"]]
    assert (names[0], len(names)) == ("llama-70b", 10)

    status = data(run("status", "--json"))
    held = [gpu for node in status["nodes"] for gpu in node["gpus"] if gpu["state"] == "held"]
    assert len(held) == 16
    text = run("status")
    assert text.returncode == 0
    for word in ("dgx", "hgx", "egress-a", "llama-70b", "whisper", "gpt-4o"):
        assert word in text.stdout

    assert run("release", "whisper").returncode == 0
    unknown = run("release", "whisper")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "no deployment 'whisper' is placed; placed: claude, embed" in unknown.stderr

    assert run("down").returncode == 0
    assert settled(lambda: not left_over()), left_over()
    assert run("status").returncode == 3


def test_topology_draws_a_node(run: Run) -> None:
    assert run("up").returncode == 0
    text = run("topology", "--node", "dgx")
    assert text.returncode == 0
    assert "NV2" in text.stdout
    reports = data(run("topology", "--json"))
    assert [node["name"] for node in reports["nodes"]] == ["dgx", "hgx"]
    unknown = run("topology", "--node", "nowhere")
    assert unknown.returncode == 1
    assert "--node: no node 'nowhere'; use one of: dgx, hgx" in unknown.stderr


def test_what_does_not_fit_changes_nothing(run: Run, tmp_path: Path) -> None:
    assert run("up").returncode == 0
    file = tmp_path / "two.yaml"
    file.write_text("deployments: [{name: fits, model: m}, {name: does-not, model: m, gpus: 11}]")
    refused = run("apply", str(file))
    assert refused.returncode == 1
    assert "cannot place 'does-not': 11 GPUs per replica, but the largest node has 8" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert data(run("status", "--json"))["deployments"] == []


def test_a_planted_key_is_not_repeated(run: Run, tmp_path: Path) -> None:
    assert run("up").returncode == 0
    file = tmp_path / "gpt.yaml"
    file.write_text(
        "deployments: [{name: gpt, model: gpt-4o, runtime_config: {api_key: {from_env: PLANTED}}}]"
    )
    applied = run("apply", str(file), PLANTED="sk-planted-77")
    assert applied.returncode == 0, applied.stderr
    shown = [applied, run("status", "--json", PLANTED="sk-planted-77"), run("release", "gpt")]
    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    logs = [path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()]
    assert [
        text for text in [one.stdout + one.stderr for one in shown] + logs if "sk-planted-77" in text
    ] == []


def test_placements_can_outlive_the_service(run: Run, tmp_path: Path) -> None:
    assert run("up").returncode == 0
    file = tmp_path / "one.yaml"
    file.write_text("deployments: [{name: stays, model: m, gpus: 2}]")
    before = data(run("apply", str(file), "--json"))
    assert run("down", "--keep-placements").returncode == 0
    assert run("up").returncode == 0
    assert data(run("apply", str(file), "--json")) == before
    assert run("down").returncode == 0
    assert settled(lambda: not left_over()), left_over()
