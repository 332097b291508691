"""``placement demo`` as a user runs it: to its end, and interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import settled

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
COMMAND = [str(Path(sys.executable).with_name("placement")), "demo"]


MARK = f"STARTED_BY_TEST={uuid.uuid4()}"
"""In the environment of the demo, and of every process that it starts."""
ENV = os.environ | dict([MARK.split("=")])


def its_processes() -> set[int]:
    """Every process of a demo on this machine."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if MARK.encode() in (folder / "environ").read_bytes():
                    found.add(int(folder.name))
    return found


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    yield
    assert settled(lambda: not its_processes()), its_processes()


def test_it_places_the_example_and_every_worker_is_where_it_was_promised() -> None:
    done = subprocess.run([*COMMAND, "--json"], env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["workers"], report["matching"], report["all_free"]) == (22, 22, True)
    assert len(report["deployments"]) == 10
    (qwen,) = next(d["assignments"] for d in report["deployments"] if d["deployment"] == "qwen-32b")
    # With GPU 0 taken, Ray alone would straddle the two bridges of the PCIe node.
    assert (qwen["node_name"], qwen["gpus"], qwen["ray_gpus"]) == ("pcie", [2, 3], [1, 2])
    assert qwen["bandwidth_gb_per_s"] > 10 * qwen["ray_bandwidth_gb_per_s"]
    for step in ("starting a head", "placing 10 deployments", "releasing everything", "stopping the cluster"):
        assert step in done.stderr


@pytest.mark.parametrize("moment", ["starting a head", "placing 10 deployments"])
def test_ctrl_c_cleans_up(moment: str) -> None:
    demo = subprocess.Popen(
        COMMAND, env=ENV, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    )
    assert demo.stderr is not None
    seen = b""
    assert its_processes()
    while moment.encode() not in seen:
        more = os.read(demo.stderr.fileno(), 4096)
        assert more, seen.decode()  # else it has ended
        seen += more
    # A terminal sends it to the whole group.
    os.killpg(demo.pid, signal.SIGINT)
    rest = demo.stderr.read()
    assert demo.wait(timeout=60) == 130, (seen + rest).decode()
    assert b"interrupted" in rest
    assert b"Traceback" not in rest


@pytest.fixture
def kept_apart() -> Iterator[dict[str, str]]:
    """An environment in which no demo is kept yet, and none is left."""
    folder = tempfile.mkdtemp(prefix="kept-")  # a short name, since Ray's sockets are below it
    env = ENV | {"RAY_TMPDIR": folder}
    yield env
    subprocess.run([*COMMAND, "--stop"], env=env, timeout=240, check=True)
    shutil.rmtree(folder)


def told(env: dict[str, str], *args: str) -> Any:
    done = subprocess.run([*COMMAND, *args, "--json"], env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_one_that_is_kept_outlives_its_terminal_until_it_is_told_to_end(kept_apart: dict[str, str]) -> None:
    leader, follower = pty.openpty()
    demo = subprocess.Popen(
        [*COMMAND, "--keep"],
        env=kept_apart,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # the last process that had the terminal has ended
        while more := os.read(leader, 4096):
            shown += more
    os.close(leader)
    assert demo.wait(timeout=60) == 0, shown.decode()
    assert b"22 of 22 workers" in shown and b"placement demo --stop" in shown, shown.decode()

    kept = told(kept_apart, "--keep")
    assert f"export RAY_ADDRESS={kept['address']}".encode() in shown, (
        "it is found, and none is started beside it"
    )
    command = [COMMAND[0], "status", "--address", kept["address"], "--json"]
    status = json.loads(subprocess.run(command, env=kept_apart, stdout=subprocess.PIPE, check=True).stdout)
    assert {one["state"] for one in status["deployments"]} == {"placed"}
    assert (status["totals"]["deployments"], status["totals"]["gpus"]) == (10, 20)

    assert told(kept_apart, "--stop") == {"stopped": True}
    assert settled(lambda: not its_processes()), its_processes()
    assert told(kept_apart, "--stop") == {"stopped": False}
