"""``placement measure`` on a real cluster: rates that are read in are kept, and choices go by them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from placement import Client, Deployment, errors
from placement.runtime.embedded import SimulatedNode
from tests.integration.conftest import settled
from tests.integration.test_cli import Run, data, run
from tests.wire.test_measurements import COLUMNS, HEADER, LARGE

__all__ = ["run"]

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode(name, topology="a100-pcie-4x") for name in ("pcie", "pcie-b")]


def pair(client: Client, name: str, **fields: Any) -> tuple[list[int], float | None, bool]:
    """Where a pair is placed, how fast it is, and whether that was measured."""
    result = client.place(Deployment(name=name, model="m", runtime="vllm", gpus=2, **fields))
    [a] = result.assignments
    return a.gpus, a.bandwidth_gb_per_s, a.bandwidth_measured


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is here: tests/engines")
def test_without_a_collective_library_it_says_what_to_install_and_holds_nothing(
    service: Any, run: Run
) -> None:
    done = run("measure", "--node", "pcie", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert (error["code"], error["node"]) == (errors.NoCollectiveLibrary.code, "pcie")
    assert "`pip install torch` in their Python" in error["message"]
    assert Client(service).status()["deployments"] == []


def test_choices_go_by_rates_that_were_read_in_also_after_a_restart(
    service: Any, run: Run, tmp_path: Path
) -> None:
    client = Client(service)
    on = {"constraints": {"gpu_nodes": ["pcie"]}}
    assert pair(client, "before", **on) == ([0, 1], 230.4, False)
    client.release("before")

    file = tmp_path / "nccl-tests.txt"
    slow = LARGE.replace("207.29  207.29", " 12.00   12.00")
    other = HEADER.replace("device  0", "device  2").replace("device  1", "device  3")
    file.write_text(HEADER + COLUMNS + slow + other + COLUMNS + LARGE)
    told = data(run("measure", "--import", str(file), "--node", "pcie", "--json"))
    assert [(one["gpus"], one["suspect"]) for one in told["nodes"][0]["sets"]] == [
        ([0, 1], True),
        ([2, 3], False),
    ]

    pid = ray.get(service.__ray_call__.remote(lambda self: os.getpid()))
    for restarted in (False, True):
        if restarted:
            os.kill(pid, signal.SIGKILL)
            assert settled(lambda: _answers())
        assert pair(client, "here", **on) == ([2, 3], 207.29, True)
        assert pair(client, "alike", constraints={"gpu_nodes": ["pcie-b"]}) == ([0, 1], 207.29, True)
        [node] = client.status(node="pcie")["nodes"]
        assert node["suspects"] == [{"gpus": [0, 1], "gb_per_s": 12.0, "predicted_gb_per_s": 230.4}]
        assert "suspect: GPU 0 and 1 measured at 12 of 230 GB/s" in run("status", "--node", "pcie").stdout
        client.release_all()

    with pytest.raises(errors.BelowFloor):
        client.place(Deployment(name="floor", model="m", runtime="vllm", gpus=4, min_bandwidth_gb_per_s=100))
    lines = run("topology", "--node", "pcie").stdout
    assert "measured: 2 sets of 2 GPUs, 12 to 207 GB/s; predicted 230" in lines
    kept = json.loads(run("measure", "--export", "-").stdout)["measurements"]
    assert [(one["host"], len(one["rates"])) for one in kept] == [("pcie", 2)]

    assert client.forget_measurements("pcie") == kept
    assert pair(client, "again", **on) == ([0, 1], 230.4, False)
    assert client.status(node="pcie")["nodes"][0]["suspects"] == []
    assert "nothing was measured on any host" in run("measure", "--forget").stderr


def _answers() -> bool:
    try:
        return bool(Client(placement.connect()).ping())
    except (errors.PlacementError, ray.exceptions.RayError):
        return False
