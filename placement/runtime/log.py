"""The service's log: a line an event or decision, and what else is worth a line, in a file beside Ray's own logs.

A line is ``TIME LEVEL key=value ...``. A value with anything but letters, digits and ``_.:/@+-`` is a JSON string, so
that no name can break a line. A thread writes the file, so that nobody waits for the disk.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener, RotatingFileHandler
from pathlib import Path
from queue import Queue
from typing import Any

NAME = "placement.log"
MOST_BYTES, OLDER = 16 * 1024 * 1024, 3
"""How large the file gets before it is renamed to ``placement.log.1``, and how many such are kept."""
MOST_QUEUED = 10_000
MOST_READ = 1024 * 1024

_PLAIN = re.compile(r"[\w.:/@+-]+", re.ASCII)

logger = logging.getLogger(__name__)


def begin(folder: str) -> None:
    """Has all that this package logs in this process go to the file, and warnings also to stderr, as without it."""
    try:
        file = RotatingFileHandler(
            Path(folder, NAME), maxBytes=MOST_BYTES, backupCount=OLDER, encoding="ascii"
        )
    except OSError as error:
        logger.warning("there is no log file: %s", error)
        return
    file.setFormatter(_Lines())
    lines: Queue[logging.LogRecord] = Queue(MOST_QUEUED)
    QueueListener(lines, file).start()
    stderr = logging.StreamHandler()
    stderr.setLevel(logging.WARNING)
    package = logging.getLogger("placement")
    package.setLevel(logging.INFO)
    package.handlers = [QueueHandler(lines), stderr]


def tell(entry: Mapping[str, Any]) -> None:
    """Logs an entry of the history."""
    if logger.isEnabledFor(logging.INFO):
        fields = {key: value for key, value in entry.items() if key not in ("at", "caller", "text")}
        caller = entry.get("caller", {})
        fields |= {f"by_{key}": caller.get(key) for key in ("user", "job", "address")}
        logger.info(pairs({**fields, "text": entry["text"]}), extra={"at": entry["at"]})


def pairs(fields: Mapping[str, Any]) -> str:
    """``key=value ...``, without those that are ``None`` or empty."""
    return " ".join(f"{key}={_value(value)}" for key, value in fields.items() if value not in (None, ""))


def _value(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class _Lines(logging.Formatter):
    """One line each, also of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(getattr(record, "at", record.created), UTC)
        said = record.getMessage()
        if not hasattr(record, "at"):
            said = pairs({"logger": record.name, "text": said})
        return f"{at.isoformat(timespec='milliseconds')} {record.levelname} {said}"


def read(folder: str, count: int, cursor: str = "") -> dict[str, Any]:
    """Lines of the log.

    Args:
        folder: where the file is.
        count: how many of the last lines, if there is no cursor.
        cursor: what was answered with the lines before; then those that follow, a part at a time.

    Returns:
        ``lines``, and the ``cursor`` of what follows.
    """
    files = [Path(folder, NAME), *(Path(folder, f"{NAME}.{number}") for number in range(1, OLDER + 1))]
    there = [file for file in files if file.exists()]
    if cursor:
        return _following(there, cursor)
    lines: list[str] = []
    for file in there:
        with file.open("rb") as opened:
            inode, text = os.fstat(opened.fileno()).st_ino, _whole_lines(opened.read())
        cursor = cursor or f"{inode}:{len(text)}"
        lines = (text.decode().splitlines() + lines)[-count:] if count else []
        if len(lines) == count:
            break
    return {"lines": lines, "cursor": cursor}


def _following(files: list[Path], cursor: str) -> dict[str, Any]:
    inode, offset = map(int, cursor.split(":"))
    known = [file.stat().st_ino for file in files]
    lines = []
    if inode not in known and files:
        lines.append("... the lines before are gone: the log was renewed meanwhile")
        inode, offset = known[-1], 0
    for file in reversed(files[: known.index(inode) + 1] if files else []):
        with file.open("rb") as opened:
            if (current := os.fstat(opened.fileno()).st_ino) != inode:
                inode, offset = current, 0
            opened.seek(offset)
            text = _whole_lines(opened.read(MOST_READ))
        offset += len(text)
        if text:
            lines += text.decode().splitlines()
            break
    return {"lines": lines, "cursor": f"{inode}:{offset}"}


def _whole_lines(text: bytes) -> bytes:
    """Without the last line, if that is being written."""
    return text[: text.rfind(b"\n") + 1]
