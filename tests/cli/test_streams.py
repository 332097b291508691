"""A full disk and closed streams end a command with one line, not with a traceback."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

COMMAND = f"{shlex.quote(sys.executable)} -m placement.cli.main"
SAYS = "cannot write the output: No space left on device; make room, or write it elsewhere"


def run(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"exec {COMMAND} {line}"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("command", ["topology --name dgx-a100", "--help"])
def test_a_full_disk_is_told_in_one_line(command: str) -> None:
    ended = run(f"{command} > /dev/full")
    assert (1, f"error: {SAYS}\n") == (ended.returncode, ended.stderr)


def test_a_full_disk_is_told_as_json_where_that_is_asked_for() -> None:
    ended = run("topology --name dgx-a100 --json > /dev/full")
    [line] = ended.stderr.splitlines()
    assert (1, "output", SAYS) == (ended.returncode, *map(json.loads(line)["error"].get, ("code", "message")))


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("topology --name dgx-a100 >&-", 0, ""),
        ("topology --name nosuch >&-", 2, "error: unknown topology 'nosuch'"),
        ("topology --file - <&-", 2, "error: no header line that names GPU0"),
    ],
)
def test_a_closed_stream_takes_and_gives_nothing(command: str, code: int, says: str) -> None:
    ended = run(command)
    assert (code, says) == (ended.returncode, ended.stderr[: len(says)])
    assert "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) <= 1
