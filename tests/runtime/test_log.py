"""The service's log: a line is a line, whatever is in it, and who reads on misses none."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from placement.runtime import history, log

BAD = 'a\nb\r\x1b[2J\x85\u2028 "quoted" ='


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """The file of this process's log."""
    package = logging.getLogger("placement")
    before = package.handlers, package.level
    log.begin(str(tmp_path))
    yield tmp_path / log.NAME
    package.handlers, package.level = before


def written(file: Path, count: int) -> list[str]:
    """So many lines, once the thread has written them."""
    while len(lines := file.read_text().splitlines()) < count:
        pass  # the test's time limit ends it
    return lines


def test_a_line_for_each_entry_with_who_asked_and_one_for_all_else(file: Path) -> None:
    caller = {"user": BAD + "\ud800", "job": "0a000000"}
    log.tell(history.entry(7, 0.5, "decision", BAD, "placed", BAD, call="place", caller=caller, seconds=0.01))
    try:
        raise ValueError(BAD)
    except ValueError:
        logging.getLogger("placement.runtime.clock").exception("it failed: %s", BAD)
    logging.getLogger("another").warning("is not in it")
    decision, failure = written(file, 2)
    at, level, *words = shlex.split(decision)
    assert (at, level) == ("1970-01-01T00:00:00.500+00:00", "INFO")
    fields = dict(word.split("=", 1) for word in words)
    assert (fields["number"], fields["call"], fields["state"], fields["by_job"]) == (
        "7",
        "place",
        "placed",
        "0a000000",
    )
    assert list(fields)[-1] == "text" and "replica" not in fields
    assert "ERROR logger=placement.runtime.clock text=" in failure and "Traceback" in failure
    assert file.read_bytes().isascii()


def test_no_folder_is_no_reason_not_to_start(caplog: pytest.LogCaptureFixture) -> None:
    log.begin("/nowhere/at/all")
    assert "there is no log file" in caplog.text


def test_the_last_lines_and_those_that_follow_each_once(tmp_path: Path) -> None:
    file, older = tmp_path / log.NAME, tmp_path / f"{log.NAME}.1"
    assert log.read(str(tmp_path), 10) == {"lines": [], "cursor": ""}
    older.write_text("a\nb\n")
    file.write_text("c\nd\nhalf")
    assert log.read(str(tmp_path), 3)["lines"] == ["b", "c", "d"]
    assert log.read(str(tmp_path), 0)["lines"] == []
    page = log.read(str(tmp_path), 1)
    assert page["lines"] == ["d"]
    with file.open("a") as opened:
        opened.write(" a line\ne\n")
    older.unlink()
    file.rename(older)
    file.write_text("f\n")
    read = list[str]()
    while (page := log.read(str(tmp_path), 0, page["cursor"]))["lines"]:
        read += page["lines"]
    assert read == ["half a line", "e", "f"]
    assert log.read(str(tmp_path), 0, page["cursor"]) == page


def test_lines_that_are_gone_are_said_to_be(tmp_path: Path) -> None:
    (tmp_path / log.NAME).write_text("z\n")
    first, *rest = log.read(str(tmp_path), 0, "1:0")["lines"]
    assert "are gone" in first and rest == ["z"]
