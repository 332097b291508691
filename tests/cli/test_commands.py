"""The command line without a cluster: help, bad input, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from placement import topologies
from placement.cli.main import main

NOBODY = ["--address", "127.0.0.9:1"]


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    placement {name}" in result.output
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name} is not explained"
    assert "--json" in result.output


def test_help_is_instant_and_lists_the_exit_codes() -> None:
    code = (
        "import sys\nfrom placement.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('ray', 'pydantic', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    for line in ("0    done", "1    refused", "2    bad input", "3    no Ray cluster", "130  interrupted"):
        assert line in done.stdout


@pytest.mark.parametrize("command", ["apply", "plan"])
def test_a_bad_file_is_refused_before_any_cluster_is_asked(command: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("deployments: [{name: a, model: m, gpus: 0}, {name: a, model: '', replica: 2}]")
    result = run(command, str(file), *NOBODY)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "deployment 1 (a): gpus: 0 is too small; use at least 1" in result.stderr
    assert "deployment 2 (a): unknown field 'replica'" in result.stderr
    missing = run(command, str(tmp_path / "none.toml"), *NOBODY)
    assert missing.exit_code == 2
    assert "cannot be read: No such file or directory; check the path" in missing.stderr


@pytest.mark.parametrize("args", [["up"], ["status"], ["topology"], ["release", "x"], ["down"]])
def test_no_cluster_at_the_address_is_said_at_once(args: list[str]) -> None:
    result = run(*args, *NOBODY)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "error: no Ray cluster at 127.0.0.9:1 (Connection refused); start one with" in result.stderr


def test_an_address_that_is_none_is_said() -> None:
    result = run("status", "--address", "nonsense")
    assert result.exit_code == 3
    assert "no Ray cluster at nonsense (not of the form HOST:PORT)" in result.stderr


def test_errors_are_json_too_where_json_is_asked_for() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("placement")), "status", "--json", *NOBODY],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert json.loads(done.stderr)["error"]["type"] == "ClusterUnreachable"


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (["topology", "--name", "a", "--node", "b"], "UsageError"),
        (["status", "--nope"], "NoSuchOption"),
        (["apply"], "MissingParameter"),
    ],
)
def test_misuse_is_json_too_where_json_is_asked_for(args: list[str], kind: str) -> None:
    result = run(*args, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert json.loads(result.stderr)["error"]["type"] == kind
    assert run(*args).stderr.startswith("Usage: ")


def test_a_catalogue_machine_is_drawn_without_a_cluster() -> None:
    result = run("topology", "--name", "a100-pcie-4x")
    assert result.exit_code == 0
    assert "NVLink islands: [0-1]  [2-3]" in result.output
    report = json.loads(run("topology", "--name", "dgx-1v", "--json").output)
    assert report["nodes"][0]["gpu_count"] == 8


def test_an_unknown_machine_is_refused_with_the_known_ones() -> None:
    result = run("topology", "--name", "dgx-9")
    assert result.exit_code == 2
    assert f"unknown topology 'dgx-9'; use one of: {', '.join(topologies.names())}" in result.stderr


def test_a_matrix_file_is_drawn_or_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "matrix.txt"
    file.write_text("\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tNV4\t X \n")
    assert "NVLink islands: [0-1]" in run("topology", "--file", str(file)).output
    file.write_text("\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tSYS\t X \n")
    refused = run("topology", "--file", str(file))
    assert refused.exit_code == 2
    assert "error: line " in refused.stderr
    assert run("topology", "--file", str(tmp_path / "none")).exit_code == 2


def test_options_that_exclude_each_other_are_refused() -> None:
    result = run("topology", "--name", "dgx-1v", "--node", "a")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr
