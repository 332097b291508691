"""``placement demo`` as a user runs it: to its end, and interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

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
