"""The command line against a running cluster, as a user has it: one process for each command."""

from __future__ import annotations

import getpass
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from placement import errors
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode
from tests.integration.conftest import left_over, settled

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
SCRIPT = Path(sys.executable).with_name("placement")
EXAMPLE = Path(__file__).parents[2] / "examples" / "deployments.toml"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode("dgx", topology="dgx-1v"),
        SimulatedNode("hgx", topology="dgx-h100"),
        SimulatedNode("egress-a", resources={"egress_openai": 64, "egress_gemini": 16}),
        SimulatedNode("egress-b", resources={"egress": 64}),
    ]


@pytest.fixture(scope="module")
def run(address: str) -> Run:
    """Runs ``placement ARGS --address ...``."""

    def run(*args: str, at: str = address, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPT), *args, "--address", at]
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, **env},
        )

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
    text = run("status", PYTHONPROFILEIMPORTTIME="1")
    assert text.returncode == 0
    assert "placement.runtime.connection" in text.stderr
    assert "placement.runtime.service" not in text.stderr, "the handle does not bring it"
    for word in ("dgx", "hgx", "egress-a", "llama-70b", "whisper", "gpt-4o"):
        assert word in text.stdout

    assert run("release", "whisper").returncode == 0
    unknown = run("release", "whisper")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "no deployment 'whisper'; there are: claude, embed" in unknown.stderr

    assert run("down", "--yes").returncode == 0
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


def test_what_does_not_fit_changes_nothing_where_all_or_nothing_is_asked_for(
    run: Run, tmp_path: Path
) -> None:
    assert run("up").returncode == 0
    file = tmp_path / "two.yaml"
    file.write_text("deployments: [{name: fits, model: m}, {name: does-not, model: m, gpus: 11}]")
    refused = run("apply", str(file), "--atomic")
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
    kept = data(run("events", "stays", "--all", "--since", "1h", "--json"))["events"]
    assert [one["state"] for one in kept] == ["placed", "placed", "restarted"]
    assert kept[1]["caller"]["user"] == getpass.getuser() and kept[1]["call"] == "apply_all"
    assert [one["state"] for one in data(run("events", "--all", "--json"))["events"]].count("stopped") >= 1
    said = run("logs", "--lines", "1000")
    assert "kind=decision deployment=stays state=placed call=apply_all" in said.stdout, said.stderr
    assert run("down", "--yes").returncode == 0
    assert settled(lambda: not left_over()), left_over()


def deployments(tmp_path: Path, *fields: str) -> str:
    """A file of deployments with these fields."""
    file = tmp_path / "d.yaml"
    file.write_text("deployments: [" + ", ".join(f"{{model: m, {one}}}" for one in fields) + "]")
    return str(file)


def placed(run: Run) -> list[str]:
    return [one["name"] for one in data(run("status", "--json"))["deployments"]]


def refused(done: subprocess.CompletedProcess[str], exits: int) -> dict[str, Any]:
    """The error of a command with ``--json`` that failed."""
    assert (exits, "") == (done.returncode, done.stdout), done.stderr
    return dict(json.loads(done.stderr.splitlines()[-1])["error"])


def test_a_refusal_is_the_same_in_json_from_the_command_line_and_from_python(
    run: Run, tmp_path: Path
) -> None:
    assert run("up").returncode == 0
    file = deployments(tmp_path, "name: large, gpus: 17")
    applied = refused(run("apply", file, "--atomic", "--json"), 1)
    assert ("not_enough_gpus", "large", 17) == tuple(applied[x] for x in ("code", "deployment", "requested"))
    assert applied == refused(run("plan", file, "--atomic", "--json"), 1)
    explained = run("plan", file, "--json", "--explain")
    assert 1 == explained.returncode
    assert applied == json.loads(explained.stdout)["deployments"][0]["error"]
    assert {"error": applied} == json.loads(explained.stderr.splitlines()[-1])
    large = {"name": "large", "model": "m", "gpus": 17}
    with pytest.raises(errors.NotEnoughGpus) as raised:
        ray.get(placement.connect().place.remote(large))
    assert applied == raised.value.to_dict()
    assert "not_enough_gpus" == raised.value.code


def test_names_are_all_checked_before_any_is_released(run: Run, tmp_path: Path) -> None:
    assert run("up").returncode == 0
    assert run("apply", deployments(tmp_path, "name: a", "name: b")).returncode == 0
    wrong = run("release", "a", "nosuch", "neither", "b")
    assert (1, "") == (wrong.returncode, wrong.stdout)
    said = "error: no deployment 'nosuch'; there are: a, b; nor is there one named 'neither'; nothing was released"
    assert said == wrong.stderr.splitlines()[-1]
    assert "unknown_deployment" == refused(run("release", "--json", "nosuch"), 1)["code"]
    assert ["a", "b"] == placed(run)
    assert {"released": {"a": 1, "b": 1}} == data(run("release", "a", "b", "a", "--json"))


def test_up_says_where_what_runs_is_not_what_is_asked_for(run: Run, tmp_path: Path) -> None:
    assert run("down", "--yes").returncode in (0, 3)
    assert run("up", "--near", "zone,rack", "--idle-seconds", "30").returncode == 0
    for same in ([], ["--near", "zone, rack"], ["--idle-seconds", "30", "--near", "zone,rack"]):
        assert run("up", *same).returncode == 0
    other = run("up", "--near", "block", "--idle-seconds", "inf")
    assert (1, "") == (other.returncode, other.stdout)
    assert "runs already, with idle_seconds 30, not inf, near zone,rack, not block; nothing" in other.stderr
    told = refused(run("up", "--json", "--near", "block"), 1)
    assert ("service_differs", {"near": ["zone,rack", "block"]}) == (told["code"], told["differences"])

    # As if another version of the package were installed here.
    shutil.copytree(Path(placement.__file__).parent, tmp_path / "placement")
    package = tmp_path / "placement" / "__init__.py"
    package.write_text(package.read_text().replace(placement.__version__, "9.9.9"))
    newer = run("up", PYTHONPATH=str(tmp_path))
    assert (1, "") == (newer.returncode, newer.stdout)
    assert (
        f"with version {placement.__version__}, not 9.9.9; nothing is changed; restart it with"
        in newer.stderr
    )
    # What it says to do helps.
    assert run("down", "--keep-placements").returncode == 0
    assert run("up", "--near", "block").returncode == 0
    assert run("down", "--yes").returncode == 0


def test_down_asks_first(run: Run, address: str, tmp_path: Path) -> None:
    assert run("up").returncode == 0
    assert run("apply", deployments(tmp_path, "name: a, replicas: 2", "name: b")).returncode == 0
    said = (
        "elease 2 deployments with 3 replicas, ending their workers, and stop the placement service on the Ray "
        f"cluster at {address}"
    )
    for more in ([], ["--json"]):
        unasked = run("down", *more)
        assert (2, "") == (unasked.returncode, unasked.stdout)
        assert said in unasked.stderr and "add --yes, or --keep-placements" in unasked.stderr

    def answered(answer: str) -> subprocess.CompletedProcess[str]:
        leader, follower = pty.openpty()
        os.write(leader, f"{answer}\n".encode())
        command = [str(SCRIPT), "down", "--address", address]
        try:
            return subprocess.run(command, stdin=follower, capture_output=True, text=True, timeout=120)
        finally:
            os.close(leader)
            os.close(follower)

    no = answered("n")
    assert (1, "") == (no.returncode, no.stdout)
    assert f"R{said}? [y/N]: " in no.stderr and "nothing is changed" in no.stderr
    assert ["a", "b"] == placed(run)
    yes = answered("y")
    assert (0, "the placement service is stopped; released a, b\n") == (yes.returncode, yes.stdout), (
        yes.stderr
    )
    assert settled(lambda: not left_over()), left_over()


@contextmanager
def node_actors_stopped() -> Iterator[None]:
    """So that nothing can be placed for as long."""
    rows = ray._private.state.actors().values()
    pids = [
        row["Pid"]
        for row in rows
        if row["ActorClassName"] == "NodePlacementActor" and row["State"] == "ALIVE"
    ]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("how", "exits", "more"), [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--json"])]
)
def test_an_apply_that_is_stopped_says_that_the_service_goes_on(
    how: int, exits: int, more: list[str], run: Run, address: str, tmp_path: Path
) -> None:
    service = placement.start()
    # Twelve GPUs, so that both nodes have an actor.
    ray.get(service.place.remote({"name": "a", "model": "m", "gpus": 2, "replicas": 6}))
    ray.get(service.release.remote("a"))
    file = deployments(tmp_path, "name: a, gpus: 2, replicas: 6")
    command = [str(SCRIPT), "apply", file, "--address", address, *more]
    with node_actors_stopped():
        apply = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert settled(lambda: busy() or apply.poll() is not None)
        apply.send_signal(how)
        out, err = apply.communicate(timeout=60)
    assert exits == apply.returncode, err
    assert out == "" if more else out.split()[:2] == ["+", "a:"], "what would change was said before"
    said = (
        "interrupted; the placement service goes on; `placement status` shows what is placed, "
        "`placement release` releases it"
    )
    last = err.splitlines()[-1]
    assert said == (json.loads(last)["error"]["message"] if more else last)
    assert settled(
        lambda: [one["state"] for one in ray.get(service.status.remote())["deployments"]] == ["placed"], 30
    )
    assert 6 == ray.get(service.release.remote("a"))


def busy() -> bool:
    """Whether GPUs are held, or about to be taken."""
    nodes = ray.get(placement.connect().snapshot.remote())["nodes"]
    return sum(len(node.get("free", ())) for node in nodes) < 16


def test_whoever_follows_is_told_that_the_service_was_stopped(run: Run, address: str, tmp_path: Path) -> None:
    assert run("up").returncode == 0
    assert run("apply", deployments(tmp_path, "name: a")).returncode == 0
    command = [str(SCRIPT), "events", "a", "--follow", "--json", "--address", address]
    follow = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert follow.stdout is not None and follow.stderr is not None
    assert "placed" == json.loads(follow.stdout.readline())["state"]
    assert run("down", "--yes").returncode == 0
    told = [json.loads(line) for line in follow.stdout]
    err = follow.stderr.read()
    assert 3 == follow.wait(timeout=60), err
    assert "service_not_running" == json.loads(err.splitlines()[-1])["error"]["code"]
    assert told and "replica" in told[0]


def test_what_ray_says_of_a_dead_raylet_is_not_among_the_json(
    run: Run, cluster: EmbeddedCluster, tmp_path: Path
) -> None:
    assert run("up").returncode == 0
    cluster.add(SimulatedNode("doomed", topology="l40s-4x"))
    cluster.wait()
    file = deployments(tmp_path, "name: dies, constraints: {gpu_nodes: [doomed]}")
    assert run("apply", file).returncode == 0
    command = [str(SCRIPT), "events", "dies", "--follow", "--json", "--address", cluster.address]
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        follow = subprocess.Popen(command, stdout=stdout, stderr=stderr)
    assert settled(lambda: "placed" in out.read_text())
    cluster.kill("doomed")
    assert settled(lambda: "node doomed died" in out.read_text()), out.read_text() + err.read_text()
    assert settled(lambda: "(raylet" in out.read_text() + err.read_text())
    follow.send_signal(signal.SIGINT)
    assert 130 == follow.wait(timeout=60)
    states = [json.loads(line)["state"] for line in out.read_text().splitlines()]
    assert ["placed", "lost"] == states[:2]
    assert "(raylet" in err.read_text()
    assert run("release", "dies").returncode == 0
