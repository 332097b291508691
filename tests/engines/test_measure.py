"""``placement measure`` for real: torch.distributed among the GPUs of a node, here on gloo through the CPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from placement import Client
from placement.runtime.embedded import SimulatedNode
from tests.integration.conftest import left_over, settled
from tests.integration.test_cli import SCRIPT

pytest.importorskip("torch")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 600
"""Workers that import torch, all at once, take minutes on a busy machine."""


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode("pcie", topology="a100-pcie-4x")]


@contextmanager
def measuring(address: str, folder: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """``placement measure ARGS`` under way; what it says goes to files of the folder."""
    command = [str(SCRIPT), "measure", "--json", "--address", address, *args]
    with (folder / "out").open("w") as out, (folder / "said").open("w") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=said, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def measured(address: str, folder: Path, *args: str) -> dict[str, Any]:
    """What it says of the one node."""
    with measuring(address, folder, *args) as process:
        assert process.wait(PATIENCE_SECONDS) == 0, (folder / "said").read_text()
    [node] = json.loads((folder / "out").read_text())["nodes"]
    return dict(node)


def test_free_gpus_are_measured_and_choices_go_by_it(service: Any, address: str, tmp_path: Path) -> None:
    client = Client(service)
    told = measured(address, tmp_path, "--sets", "all-sizes")
    sets = [tuple(one["gpus"]) for one in told["sets"]]
    assert sets[:6] == [(0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3)]
    assert {len(gpus) for gpus in sets[6:]} == {3, 4}
    assert (told["node"], told["failed"], told["left_out"]) == ("pcie", [], 0)
    for one in told["sets"]:
        assert one["gb_per_s"] > 0 and one["library"].startswith("gloo of torch ")
        assert one["message_bytes"] == 1 << 22
    assert "pcie 1/8: GPU 0 1: " in (tmp_path / "said").read_text()

    assert settled(lambda: not left_over()), left_over()
    pair = {"name": "pair", "model": "m", "runtime": "vllm", "gpus": 2}
    [planned] = client.plan(pair).assignments
    [placed] = client.place(pair).assignments
    assert (placed.gpus, placed.bandwidth_gb_per_s) == (planned.gpus, planned.bandwidth_gb_per_s)
    assert placed.bandwidth_measured and planned.bandwidth_measured

    others = measured(address, tmp_path, "--max-seconds", "1")
    free = sorted({0, 1, 2, 3} - set(placed.gpus))
    assert [one["gpus"] for one in others["sets"]] in ([], [free]), "what is held is left alone"
    assert len(others["sets"]) + others["left_out"] == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_the_gpus_are_given_back(
    how: signal.Signals, service: Any, address: str, tmp_path: Path
) -> None:
    with measuring(address, tmp_path) as process:
        assert settled(lambda: "pcie 1/6" in (tmp_path / "said").read_text(), PATIENCE_SECONDS)
        assert left_over()["GPU"] == (4.0, 0.0)
        os.kill(process.pid, how)
        exits = process.wait(120)
    assert exits == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    assert settled(lambda: not left_over()), left_over()
    assert settled(lambda: Client(service).status()["deployments"] == [])
