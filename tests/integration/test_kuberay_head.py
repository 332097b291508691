"""The command of the head in ``deploy/kuberay``, run as its container does: it starts the service, or finds it.

A loopback address stands for the pod, and the operator is not here: what it appends is written down in
``tests/test_kuberay.py``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from placement.runtime.embedded import Network, free_port
from tests.integration.conftest import settled
from tests.test_kuberay import HEADS, as_kuberay_runs_it, ray_container

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

HEAD = HEADS["RayCluster/head"]
PID = """
import os, placement, ray
from placement.runtime.connection import cluster
with cluster():
    print(ray.get(placement.connect().__ray_call__.remote(lambda self: os.getpid())))
"""


class Pod:
    """A container as a process of this machine, with the environment that KubeRay gives it."""

    def __init__(self, host: str, folder: Path) -> None:
        address = f"{host}:{free_port(host)}"
        self.log = folder / "log"
        self._env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        port = address.split(":")[1]
        # Nothing listens on every address of this machine, or runs that is not needed. For an agent whose ports are
        # not given, the raylet waits for 15 s, which a machine with other work may exceed, and ends.
        agents = ("dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent")
        ports = " ".join(f"--{name}-port={free_port(host)}" for name in agents)
        start = (
            f"ray start --head --block --num-cpus=0 --num-gpus=0 --node-ip-address={host} --port={port} "
            f"--ray-client-server-port={free_port(host)} --object-store-memory=80000000 --no-monitor "
            f"--include-dashboard=false --include-log-monitor=false {ports}"
        )
        with self.log.open("w") as output:
            self._process = subprocess.Popen(
                ["bash", "-c", "--", as_kuberay_runs_it(HEAD, start)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=self._env,
                start_new_session=True,
            )  # fmt: skip

    def run(self, *command: str) -> str:
        """What a command says that is run in it, once all that it has begun has ended."""
        done = subprocess.run(command, capture_output=True, text=True, env=self._env, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)


@pytest.fixture
def pod() -> Iterator[Pod]:
    network, folder = Network(), Path(tempfile.mkdtemp(prefix="r-"))  # short: Ray's sockets are in it
    started = Pod(f"{network.prefix}.2", folder)
    yield started
    started.end()
    network.close()
    shutil.rmtree(folder, ignore_errors=True)


def test_the_command_of_the_head_starts_the_service_and_run_again_finds_it(pod: Pod) -> None:
    started = "the placement service is started: 0 GPUs on 0 nodes, 0 egress nodes\n"
    assert settled(lambda: started in pod.log.read_text(), 300), pod.log.read_text()
    first = pod.run(sys.executable, "-c", PID)
    [command] = ray_container(HEAD)["command"]
    for _ in range(2):  # a container's restart, a job's entrypoint
        again = pod.run("bash", "-c", "--", command)
        assert again == "the placement service runs already: 0 GPUs on 0 nodes, 0 egress nodes\n"
    assert pod.run(sys.executable, "-c", PID) == first
    assert "runs already" not in pod.log.read_text(), "it was started once"
