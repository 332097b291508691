"""``--json`` is only JSON: whatever a command says, whoever else prints, however it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from placement import topologies
from placement.cli import streams
from placement.cli.main import Commands, exit_code, main
from placement.core.matrix import render_matrix
from tests.test_public_api import ERRORS

NOBODY = ["--address", "127.0.0.9:1"]
SCRIPT = str(Path(sys.executable).with_name("placement"))


def run(*args: str, command: click.Command = main) -> Result:
    return CliRunner().invoke(command, list(args))


def told(result: Result) -> dict[str, Any]:
    """The error of a command that failed: all it said."""
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    [(key, error)] = json.loads(line).items()
    assert key == "error"
    return dict(error)


FAILING = [
    (["demo", "extra"], 2, "usage"),
    (["up", *NOBODY], 3, "cluster_unreachable"),
    (["up", "--idle-seconds", "nan"], 2, "usage"),
    (["up", "--history-days", "nan"], 2, "usage"),
    (["up", "--history-mib", "0"], 2, "usage"),
    (["up", "--node-types", "nowhere.yaml", *NOBODY], 2, "invalid_deployment"),
    (["doctor", *NOBODY], 3, "cluster_unreachable"),
    (["doctor", "--timeout", "1"], 2, "usage"),
    (["apply", "no.toml"], 2, "invalid_deployment"),
    (["apply", "no.toml", "--wait"], 2, "invalid_deployment"),
    (["apply", "--wait", "nan", "no.toml"], 2, "usage"),
    (["apply", "no-such-folder", "-R"], 2, "invalid_deployment"),
    (["wait", "a", *NOBODY], 3, "cluster_unreachable"),
    (["wait", "a", "--timeout", "soon"], 2, "usage"),
    (["plan", "no.toml"], 2, "invalid_deployment"),
    (["diff", "no.toml"], 2, "invalid_deployment"),
    (["plan", "no.toml", "--explain"], 2, "invalid_deployment"),
    (["plan", "no.toml", "--file", "no.json", *NOBODY], 2, "usage"),
    (["snapshot", *NOBODY], 3, "cluster_unreachable"),
    (["simulate", "no.toml", "--cluster", "dgx-h100=1"], 2, "invalid_deployment"),
    (["simulate", "no.toml", "--cluster", "dgx-9=1"], 2, "unknown_topology"),
    (["simulate", "no.toml", "--cluster", "no.json"], 2, "invalid_cluster_file"),
    (["simulate", "no.toml", "--cluster", "dgx-h100=1", "--picture", "a.gif"], 2, "usage"),
    (["status", "--address", "nonsense"], 3, "cluster_unreachable"),
    (["status", "--watch", *NOBODY], 3, "cluster_unreachable"),
    (["status", "--state", "gone"], 2, "usage"),
    (["list", *NOBODY], 3, "cluster_unreachable"),
    (["get", "a", *NOBODY], 3, "cluster_unreachable"),
    (["get"], 2, "usage"),
    (["events", *NOBODY], 3, "cluster_unreachable"),
    (["events", "llama", *NOBODY], 3, "cluster_unreachable"),
    (["events", "llama", "--follow", *NOBODY], 3, "cluster_unreachable"),
    (["events", "--all", "--since", "2h", *NOBODY], 3, "cluster_unreachable"),
    (["events", "--since", "yesterday"], 2, "usage"),
    (["logs", *NOBODY], 3, "cluster_unreachable"),
    (["logs", "--lines", "-1"], 2, "usage"),
    (["topology", *NOBODY], 3, "cluster_unreachable"),
    (["topology", "--file", "no.txt"], 2, "invalid_deployment"),
    (["topology", "--file", "pyproject.toml"], 2, "invalid_matrix"),
    (["dashboard", "--port", "0", *NOBODY], 3, "cluster_unreachable"),
    (["dashboard", "--host", "192.0.2.1", "--port", "0", *NOBODY], 2, "usage"),
    (["status", "--watch", "--picture", "a.svg"], 2, "usage"),
    (["metrics", "graphite"], 2, "usage"),
    (["measure", *NOBODY], 3, "cluster_unreachable"),
    (["measure", "--import", "no.txt"], 2, "invalid_deployment"),
    (["measure", "--import", "a", "--export", "b"], 2, "usage"),
    (["release", "a", *NOBODY], 3, "cluster_unreachable"),
    (["release"], 2, "usage"),
    (["release", "--all", "a"], 2, "usage"),
    (["release", "--all", "--yes", *NOBODY], 3, "cluster_unreachable"),
    (["renew", "a", *NOBODY], 3, "cluster_unreachable"),
    (["down", *NOBODY], 3, "cluster_unreachable"),
    (["down", "--yes", *NOBODY], 3, "cluster_unreachable"),
    (["nothing"], 2, "usage"),
    (["--nothing", "status"], 2, "usage"),
    ([], 2, "usage"),
]


@pytest.mark.parametrize(
    ("args", "exits", "code"), FAILING, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_command_that_fails_says_so_in_json_with_a_code(
    args: list[str], exits: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    result = run(*args, "--json")
    error = told(result)
    assert (exits, code) == (result.exit_code, error["code"])
    assert error["message"] and error["type"]


@pytest.mark.parametrize("how", [["-o", "json"], ["--output", "json"], ["-ojson"], ["--output=json"]])
def test_output_as_json_is_asked_for_in_other_ways_too(how: list[str]) -> None:
    for command in (["get", "a"], ["list"]):
        result = run(*command, *how, *NOBODY)
        assert (3, "cluster_unreachable") == (result.exit_code, told(result)["code"])
    assert "error: no Ray cluster" in run("get", "a", "-o", "yaml", *NOBODY).stderr


def test_every_command_is_failed_above_and_with_an_option_that_it_lacks() -> None:
    assert set(main.commands) == {args[0] for args, *_ in FAILING if args and args[0] in main.commands}
    for name in main.commands:
        result = run(name, "--json", "--nothing")
        assert (2, "usage", "NoSuchOption") == (result.exit_code, told(result)["code"], told(result)["type"])


@click.group(cls=Commands)
def failing() -> None:
    """Commands that end as those of ``placement`` may."""


@failing.command()
@click.argument("how")
@click.option("--json", "as_json", is_flag=True)
def fail(how: str, as_json: bool) -> None:
    if how.isdigit():
        raise ERRORS[int(how)]
    if how.startswith("SIG"):
        signal.raise_signal(signal.Signals[how])
    streams.out().write("begun\n")
    raise RuntimeError(how)


@pytest.mark.parametrize("which", range(len(ERRORS)), ids=lambda i: type(ERRORS[i]).__name__)
def test_every_error_is_told_with_all_its_fields_and_its_exit_code(which: int) -> None:
    result = run("fail", "--json", str(which), command=failing)
    assert ERRORS[which].to_dict() == told(result)
    assert exit_code(type(ERRORS[which])) == result.exit_code
    plain = run("fail", str(which), command=failing)
    assert (result.exit_code, "", f"error: {ERRORS[which]}\n") == (
        plain.exit_code,
        plain.stdout,
        plain.stderr,
    )


@pytest.mark.parametrize(("how", "exits"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_command_that_is_stopped_says_so_in_json(how: str, exits: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    result = run("fail", "--json", how, command=failing)
    assert (exits, "interrupted") == (result.exit_code, told(result)["code"])
    plain = run("fail", how, command=failing)
    assert (exits, "", "interrupted\n") == (plain.exit_code, plain.stdout, plain.stderr)
    assert before == signal.getsignal(signal.SIGTERM)


def test_what_nobody_foresaw_is_told_in_json_with_its_traceback() -> None:
    result = run("fail", "--json", "broken", command=failing)
    error = json.loads(result.stderr)["error"]
    assert (1, "unexpected", "RuntimeError", "broken") == (
        result.exit_code, error["code"], error["type"], error["message"],
    )  # fmt: skip
    assert "raise RuntimeError(how)" in error["traceback"]
    assert isinstance(run("fail", "broken", command=failing).exception, RuntimeError)


NOISY = """
import os, subprocess, sys, click
from placement import errors
from placement.cli import common, main, streams

@main.main.command()
@click.option("--json", is_flag=True)
def noisy(json):
    print("(raylet) printed")
    os.write(1, b"written by a library\\n")
    subprocess.run(["echo", "said by a child"])
    common.dump({"answer": 42})
    print("(raylet) printed again")
    if sys.argv[2:] == ["refused"]:
        raise errors.ServiceNotRunning("here")

sys.argv[1] == "noisy" or sys.exit("?")
main.main(["noisy", "--json"])
"""


@pytest.mark.parametrize("how", ["", "refused"])
def test_what_others_print_goes_to_stderr_and_an_error_is_its_last_line(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISY, "noisy", *[how] * bool(how)], capture_output=True, text=True
    )
    assert {"answer": 42} == json.loads(done.stdout)
    noise = {"(raylet) printed", "written by a library", "said by a child", "(raylet) printed again"}
    assert noise <= set(done.stderr.splitlines())
    if how:
        assert "service_not_running" == json.loads(done.stderr.splitlines()[-1])["error"]["code"]
    assert (3 if how else 0) == done.returncode


def test_a_reader_that_goes_away_is_no_error_of_ours() -> None:
    command = [SCRIPT, "topology", "--name", "dgx-a100", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (1, "") == (done.returncode, done.stderr)


def test_a_refused_plan_is_explained_in_json_with_its_code(tmp_path: Path) -> None:
    node = {"id": "a", "name": "gpu-a", "machine": "pairs", "free": [0, 1, 2, 3]}
    machine = {"matrix": render_matrix(topologies.load("a100-pcie-4x"))}
    (tmp_path / "cluster.json").write_text(json.dumps({"machines": {"pairs": machine}, "nodes": [node]}))
    (tmp_path / "d.toml").write_text('[[deployments]]\nname = "d"\nmodel = "m"\ngpus = 5\n')
    args = ["plan", "--file", str(tmp_path / "cluster.json"), str(tmp_path / "d.toml"), "--explain"]
    plain, result = run(*args), run(*args, "--json")
    assert (1, 1) == (plain.exit_code, result.exit_code)
    [explained] = json.loads(result.stdout)["deployments"]
    assert explained["plan"] is None
    assert ("not_enough_gpus", "d", 5) == tuple(
        explained["error"][field] for field in ("code", "deployment", "requested")
    )
    assert explained["refusal"] == explained["error"]["message"]
    assert explained["explanation"]["stages"]
    assert {"error": explained["error"]} == json.loads(result.stderr)
    assert f"error: {explained['refusal']}" == plain.stderr.splitlines()[-1]
    unexplained = run(*args[:-1], "--atomic", "--json")
    assert (1, explained["error"]) == (unexplained.exit_code, told(unexplained))


def examples() -> list[str]:
    """Every command in an example of a help text."""
    lines = []
    for command in [main, *main.commands.values()]:
        text = (command.epilog or "").partition("Example:\n")[2]
        lines += [part.strip() for line in text.splitlines() for part in line.split("|")]
    return [line.partition(">")[0] for line in lines if line.startswith("placement ")]


@pytest.mark.parametrize("example", examples())
def test_every_example_in_the_help_can_be_typed_so(example: str) -> None:
    _, name, *args = shlex.split(example)
    main.commands[name].make_context(name, args)


def test_the_errors_of_the_command_line_are_in_the_table_too() -> None:
    table = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    for code, exits in (("usage", "2"), ("interrupted", "130, 143"), ("unexpected", "1"), ("pending", "1")):
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{code}` |")]
        assert exits == row.split("|")[3].strip()
