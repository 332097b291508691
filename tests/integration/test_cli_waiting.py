"""The command line where things wait: files with more than there is room for, changed, pruned, waited for."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from placement.runtime.embedded import EmbeddedCluster, SimulatedNode
from tests.integration.conftest import settled
from tests.integration.test_cli import SCRIPT, Run, data, refused
from tests.integration.test_cli import run as run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    """Eight GPUs."""
    return [SimulatedNode("hgx", topology="dgx-h100")]


@pytest.fixture(autouse=True)
def nothing_placed(run: Run) -> Iterator[None]:
    assert run("up").returncode == 0
    yield
    assert run("release", "--all", "--yes").returncode == 0


def declare(folder: Path, name: str, **fields: Any) -> str:
    """A file of one deployment."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"deployments": [{"name": name, "model": "m", **fields}]}))
    return str(path)


def states(run: Run) -> dict[str, str]:
    return {one["name"]: one["state"] for one in data(run("list", "--json"))["deployments"]}


def test_what_finds_no_room_waits_until_there_is_some(run: Run, tmp_path: Path) -> None:
    declare(tmp_path, "a", gpus=4), declare(tmp_path, "b", gpus=4, replicas=2)
    applied = run("apply", str(tmp_path))
    assert 0 == applied.returncode, applied.stderr
    assert "+ a: new, 1 replica on hgx" in applied.stdout
    assert "replica 1 would wait: " in applied.stdout
    assert "replica 1 is pending, next in the queue: " in applied.stdout
    assert {"a": "placed", "b": "pending"} == states(run)
    [waits] = data(run("list", "--state", "pending", "--json"))["deployments"]
    assert ("b", 1, 2, 1) == tuple(waits[key] for key in ("name", "placed", "replicas", "queue_position"))
    assert 1 == run("wait", "b", "--timeout", "0.5").returncode
    assert 0 == run("release", "a").returncode
    assert 0 == run("wait", "b", "--timeout", "60").returncode
    assert {"b": "placed"} == states(run)


def test_a_wait_shows_each_change_and_ends_with_the_last(run: Run, address: str, tmp_path: Path) -> None:
    assert run("apply", declare(tmp_path, "a", gpus=8)).returncode == 0
    command = [str(SCRIPT), "apply", declare(tmp_path, "b", gpus=8), "--wait", "--address", address]
    apply = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert settled(lambda: "b" in states(run))
    assert apply.poll() is None
    assert run("release", "a").returncode == 0
    out, err = apply.communicate(timeout=60)
    assert 0 == apply.returncode, err
    assert "b replica 0 placed: " in err
    assert "GPU 0-7" in out


def test_a_wait_that_is_not_enough_or_is_stopped_leaves_the_declaration(
    run: Run, address: str, tmp_path: Path
) -> None:
    assert run("apply", declare(tmp_path, "a", gpus=8)).returncode == 0
    file = declare(tmp_path, "b", gpus=8)
    short = run("apply", file, "--wait", "0.5", "--json")
    assert 1 == short.returncode
    assert ["b"] == [one["deployment"] for one in json.loads(short.stdout)["deployments"]]
    assert "pending" == json.loads(short.stderr.splitlines()[-1])["error"]["code"]
    command = [str(SCRIPT), "wait", "b", "--address", address]
    wait = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        wait.communicate(timeout=8)
    wait.send_signal(signal.SIGINT)
    _, err = wait.communicate(timeout=60)
    assert 130 == wait.returncode
    assert "interrupted; the deployment goes on waiting" in err
    assert {"a": "placed", "b": "pending"} == states(run)


def test_atomic_refuses_all_of_it(run: Run, tmp_path: Path) -> None:
    declare(tmp_path, "a", gpus=8), declare(tmp_path, "b", gpus=8)
    for command in ("plan", "apply"):
        assert "not_enough_gpus" == refused(run(command, str(tmp_path), "--atomic", "--json"), 1)["code"]
    assert {} == states(run)
    assert 0 == run("plan", str(tmp_path)).returncode


def test_what_can_never_be_placed_waits_says_so_and_is_refused_if_it_is_atomic(
    run: Run, tmp_path: Path
) -> None:
    file = declare(tmp_path, "big", gpus=8, replicas=3)
    never = "the whole cluster has 8 GPUs, and its 3 replicas need 24: waiting does not help all of them unless nodes"
    assert f"{never} join" in " ".join(run("apply", file).stdout.split())
    [waits] = data(run("status", "--deployment", "big", "--json"))["deployments"]
    assert ["1", "2"] == [index for index, reason in waits["pending"].items() if never in reason]
    refused = run("apply", file, "--atomic")
    assert 1 == refused.returncode
    assert "; big goes on waiting as it did before" in refused.stderr
    assert (
        "released big: 1 replica; 2 more waited for room, and left the queue\n"
        == run("release", "big").stdout
    )
    slow = run("apply", declare(tmp_path, "fast", gpus=4, min_bandwidth_gb_per_s=9000)).stdout
    assert "no node that it may use has such a set even with all its GPUs free; at best hgx" in " ".join(
        slow.split()
    )
    assert (
        "released fast: it waited for room, and is no longer in the queue\n" == run("release", "fast").stdout
    )


def test_one_that_cannot_be_applied_does_not_stop_the_others(run: Run, tmp_path: Path) -> None:
    declare(tmp_path, "a", constraints={"gpu_nodes": ["nowhere"]}), declare(tmp_path, "b")
    done = run("apply", str(tmp_path), "--json")
    assert 1 == done.returncode
    shown = json.loads(done.stdout)
    assert ["b"] == [one["deployment"] for one in shown["deployments"]]
    assert "unknown_node" == shown["failures"]["a"]["code"]
    assert "partly_applied" == json.loads(done.stderr.splitlines()[-1])["error"]["code"]
    assert {"b": "placed"} == states(run)


def test_what_is_in_no_file_is_mentioned_and_pruned_only_on_demand(run: Run, tmp_path: Path) -> None:
    old, new = declare(tmp_path, "old", gpus=8), declare(tmp_path, "new", gpus=8)
    assert run("apply", old).returncode == 0
    assert 1 == run("diff", new).returncode
    assert "not in these files, left alone: old" in run("diff", new).stderr
    assert 2 == run("apply", new, "--prune").returncode
    assert {"old": "placed"} == states(run)
    pruned = data(run("apply", new, "--prune", "--yes", "--json"))
    assert ["old"] == pruned["released"]
    assert 0 == run("wait", "new").returncode  # on a busy machine the GPUs come free a moment after
    assert 0 == run("diff", new).returncode


def test_a_change_is_shown_before_it_is_made(run: Run, tmp_path: Path) -> None:
    assert run("apply", declare(tmp_path, "a", gpus=2, replicas=2)).returncode == 0
    grown = run("apply", declare(tmp_path, "a", gpus=2, replicas=3))
    assert "~ a: replicas: replica 2 placed on hgx" in grown.stdout
    replaced = run("diff", declare(tmp_path, "a", gpus=1, replicas=3))
    assert 1 == replaced.returncode
    assert "-/+ a: gpus: replicas 0-2 replaced on hgx; ends 6 running workers" in replaced.stdout


def test_what_get_prints_can_be_applied_again(run: Run, tmp_path: Path) -> None:
    assert run("apply", declare(tmp_path, "a", gpus=2, constraints={"gpu_nodes": ["hgx"]})).returncode == 0
    again = tmp_path / "again.yaml"
    again.write_text(run("get", "a", "-o", "yaml").stdout)
    assert 0 == run("diff", str(again)).returncode
    [described] = data(run("get", "a", "--json"))["deployments"]
    assert ("placed", None, 2) == (
        described["state"],
        described["owner"],
        described["deployment"]["gpus"],
    )


def test_events_of_all_deployments_have_numbers_that_go_on(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("apply", declare(tmp_path, name)).returncode == 0
    events = data(run("events", "--json"))["events"]
    assert {"a", "b"} <= {one["deployment"] for one in events}
    assert [] == data(run("events", "--since", str(events[-1]["number"]), "--json"))["events"]


def test_status_is_filtered(run: Run, cluster: EmbeddedCluster, tmp_path: Path) -> None:
    assert run("apply", declare(tmp_path, "a"), declare(tmp_path, "b", gpus=8)).returncode == 0
    assert ["b"] == [
        one["name"] for one in data(run("status", "--state", "pending", "--json"))["deployments"]
    ]
    assert ["a"] == [one["name"] for one in data(run("status", "--deployment", "a", "--json"))["deployments"]]
    assert ["a"] == [one["name"] for one in data(run("status", "--node", "hgx", "--json"))["deployments"]]
    shown = run("status").stdout
    assert shown.index("waiting, next first") < shown.index("NVSwitch")


def test_what_is_given_up_ends_the_wait(run: Run, tmp_path: Path) -> None:
    file = declare(tmp_path, "a", gpus=8, replicas=2, deadline_seconds=2)
    done = run("apply", file, "--wait", "60", "--json")
    assert 1 == done.returncode
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert ("pending", {}) == (error["code"], error["pending"])
    assert error["given_up"]["a"]["1"].startswith("given up: ")
    assert 1 == run("wait", "a").returncode
