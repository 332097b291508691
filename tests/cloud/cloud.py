"""Starts a head with Ray's own autoscaler and a cloud of loopback machines, and ends all of it by process id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from placement.runtime.embedded import Network, free_port

FOLDER = Path(__file__).parent


@contextmanager
def cloud(folder: Path, version: int = 2, idle_seconds: float = 6.0) -> Iterator[str]:
    """A head at the address that this yields; machines come when the autoscaler wants them.

    Args:
        folder: for the configuration and Ray's session; its path must be short.
        version: of the autoscaler; 0 is a head to which nobody gave a configuration.
        idle_seconds: after how long a machine that nobody uses goes.
    """
    network = Network()
    host = f"{network.prefix}.1"
    address = f"{host}:{free_port(host)}"
    config = yaml.safe_load((FOLDER / "cluster.yaml").read_text())
    config["provider"]["gcs_address"] = address
    config["idle_timeout_minutes"] = idle_seconds / 60
    (folder / "cluster.yaml").write_text(yaml.safe_dump(config))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parents[1])]),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_autoscaler_v2": "1" if version == 2 else "0",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port(host)),
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"]
    command += [f"--node-ip-address={host}", f"--port={address.rsplit(':', 1)[1]}"]
    command += ["--num-cpus=0", "--num-gpus=0", "--include-dashboard=false", "--object-store-memory=80000000"]
    command += [f"--ray-client-server-port={free_port(host)}"]
    if version:
        # What `ray up` gives to its head: without its instance id the autoscaler takes it for nobody's machine.
        env |= {"RAY_CLOUD_INSTANCE_ID": "loopback-0", "RAY_NODE_TYPE_NAME": "head"}
        command += [f"--autoscaling-config={folder / 'cluster.yaml'}"]
    log = (folder / "head.log").open("wb")
    head = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while _closed(address):
            assert head.poll() is None and time.monotonic() < end, (folder / "head.log").read_text()
            time.sleep(0.05)
        yield address
    finally:
        head.send_signal(signal.SIGTERM)  # the autoscaler first: nothing more comes
        head.wait(180)
        log.close()
        for pid in _processes_of(address):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        network.close()


def _processes_of(address: str) -> Iterator[int]:
    """What runs with this cluster's address on its command line: raylets of machines, and whatever they started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if address.encode() in (folder / "cmdline").read_bytes():
                yield int(folder.name)


def host_of(address: str) -> str:
    """Of ``host:port``."""
    return address.rsplit(":", 1)[0]


def _closed(address: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host_of(address), int(address.rsplit(":", 1)[1]))) != 0
