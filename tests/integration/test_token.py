"""Ray's token authentication: the command line works with the token, and says what is wrong without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from placement.runtime.embedded import Network, free_port
from tests.dashboard.running import dashboard

pytestmark = pytest.mark.integration

BIN = Path(sys.executable).parent
TOKEN = "a3" * 32


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a head with authentication on, and the environment of those who have the token."""
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text(TOKEN)
    hidden = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    network = Network()
    host = f"{network.prefix}.2"
    port = free_port(host)
    labels = "placement/topology=l40s-4x"
    command = ["start", "--head", "--block", f"--node-ip-address={host}", f"--port={port}", "--num-gpus=4"]
    command += [
        f"--labels={labels}",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--object-store-memory=80000000",
    ]
    process = subprocess.Popen(
        [BIN / "ray", *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    try:
        # It says so once all of it is up. Its port answers before; who connects by then is refused by Ray 2.54.
        assert any("--block" in line for line in process.stdout)
        yield f"{host}:{port}", env
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)  # it gives each of its processes time to end
        network.close()


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "placement", *arguments], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def answered(url: str, token: str = "") -> int:
    """The status of the page's answer."""
    cookies = urllib.request.HTTPCookieProcessor()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), cookies)
    try:
        with direct.open(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_up_apply_and_status_work_with_the_token_and_not_without(
    head: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, env = head
    (tmp_path / "d.toml").write_text('[[deployments]]\nname = "d"\nmodel = "m"\ngpus = 2\n')
    for arguments, says in (
        (["up"], "is started: 4 GPUs"),
        (["apply", str(tmp_path / "d.toml")], "placed"),
        (["status"], "d"),
        (["events", "d"], "placed"),
    ):
        done = run(env, *arguments, "--address", address)
        assert (done.returncode, says in done.stdout) == (0, True), (arguments, done.stdout, done.stderr)
        assert TOKEN not in done.stdout + done.stderr
    (tmp_path / "wrong").write_text("b4" * 32)
    for changed in ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}, {"RAY_AUTH_MODE": "disabled"}):
        done = run({**env, **changed}, "status", "--address", address)
        assert done.returncode == 3, (changed, done.stdout, done.stderr)
        assert f"error: no Ray cluster at {address}" in done.stderr
    with dashboard(address, env) as url:
        page, _, key = url.partition("?token=")
        assert key and TOKEN not in url
        assert [answered(page), answered(url), answered(page, TOKEN), answered(page, "b4" * 32)] == [
            401,
            200,
            200,
            401,
        ]
    done = run(env, "down", "--yes", "--address", address)
    assert (done.returncode, "released d" in done.stdout) == (0, True), done.stderr
