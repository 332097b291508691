"""What the documentation shows, done: its Python on one cluster, the tutorial as a stranger types it, the demo."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

import placement
from placement.runtime.embedded import Network, SimulatedNode, free_port
from tests.documents import BLOCKS, ROOT, Block
from tests.integration.conftest import left_over, settled
from tests.test_docs import environment, shown

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode(name, topology="dgx-h100", cpus=16) for name in ("a", "b")]


@ray.remote(num_cpus=0)
class Engine:
    """The reader's own."""


def end_all(client: placement.Client) -> None:
    client.release_all()
    for group_id, row in placement_group_table().items():  # those of this driver
        if row["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))
    assert settled(lambda: not left_over()), left_over()


RUN = [block for block in BLOCKS if block.mark == "run"]
PAGES = [list(blocks) for _, blocks in groupby(RUN, lambda block: block.page)]


@pytest.mark.parametrize("blocks", PAGES, ids=lambda blocks: blocks[0].page)
def test_the_python_of_a_page_runs_as_it_stands(
    service: Any, blocks: list[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = placement.Client()
    names = {
        "ray": ray, "placement": placement, "client": client, "Engine": Engine, "model": "org/m",
        "Deployment": placement.Deployment,
    }  # fmt: skip
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: None)  # this process is connected
    for block in blocks:
        before = set(placement_group_table())
        exec(compile(block.code, str(block), "exec"), names)
        assert set(placement_group_table()) > before, f"{block} placed nothing"
        end_all(client)


# -- the tutorial ----------------------------------------------------------------------------------

PATIENT = {"RAY_raylet_start_wait_time_s": "200"}
"""For an overrun machine."""
TUTORIAL = [block for block in BLOCKS if block.page == "docs/tutorial.md"]


@pytest.fixture
def laptop() -> Iterator[dict[str, str]]:
    """The cluster that the tutorial starts, by its own command, at an address apart; what finds it is in the result."""
    [start] = [
        command for block in TUTORIAL for command in block.commands if command.startswith("ray start --head")
    ]
    network = Network()
    host = f"{network.prefix}.2"
    address = f"{host}:{free_port(host)}"
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        env = {"HOME": folder, "RAY_AUTH_MODE": "disabled", **PATIENT}
        apart = f"--block --node-ip-address={host} --port={address.rpartition(':')[2]} --temp-dir={folder}"
        command = shlex.split(f"{start} {apart} --include-dashboard=false --disable-usage-stats")
        ray_itself = subprocess.Popen(
            command, env=environment() | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert ray_itself.stdout is not None
        said = []
        for line in ray_itself.stdout:
            said.append(line)
            if "--block" in line:
                break
        else:
            pytest.fail("".join(said))
        yield {**env, "RAY_ADDRESS": address}
        ray_itself.terminate()
        ray_itself.wait()
        network.close()


def masked(text: str) -> list[str]:
    """Its lines without what differs each time: dates, ages, durations, and who of equals came first."""
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text)
    text = re.sub(r"\b(\d+(\.\d+)? ?[smh] ?)+\b", "TIME", text)
    text = re.sub(r"\b(whisper|mistral-7b|embed)/\d", "ONE", text)
    # The first is said if the wait began before its end, the second by an overrun machine, until the node has answered.
    text = re.sub(
        r"^(big replica 0 placed|note: laptop: the node actor does not answer).*\n", "", text, flags=re.M
    )
    return re.sub(r" +|─+", " ", text).splitlines()


def test_the_tutorial_shows_what_a_stranger_sees(laptop: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    port = str(free_port("127.0.0.1"))
    server = None
    for block in TUTORIAL:
        if block.mark.startswith("file: "):
            (tmp_path / block.mark[6:]).write_text(block.code)
        if block.mark != "compared: tutorial":
            continue
        commands = [command.replace("8000", port) for command in block.commands]
        words = shlex.split(commands[0])
        if words[0] == "python":
            server = serving(words, tmp_path, laptop)
            assert server.stdout is not None
            found = f"$ {commands[0]}\n{server.stdout.readline()}"
        elif words[0] == "curl":
            assert server is not None
            with urllib.request.urlopen(words[2], words[4].encode(), timeout=60) as answer:
                found = f"$ {commands[0]}\n{answer.read().decode()}"
            server.terminate()
            server.wait()
        else:
            found = shown(commands, tmp_path, laptop)
        assert masked(block.code) == masked(found.replace(port, "8000")), str(block)


def serving(command: list[str], folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    """The server of the tutorial, once it says where it answers."""
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_the_demo_prints_what_the_tutorial_shows(tmp_path: Path) -> None:
    [block] = [block for block in BLOCKS if block.mark == "compared: demo"]
    assert masked(block.code) == masked(shown(block.commands, tmp_path, PATIENT))
