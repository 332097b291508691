"""Text files as people have them: UTF-8 or, from PowerShell and Excel, UTF-16; with a byte order mark or without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from placement.errors import InvalidDeployment


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        InvalidDeployment: it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidDeployment(str(path), (f"cannot be read: {error.strerror}; check the path",)) from None
    return decoded(content, str(path))


def read_input(file: Path) -> str:
    """The same, of stdin where the file is ``-``."""
    return decoded(sys.stdin.buffer.read(), "-") if file == Path("-") else read_text(file)


def decoded(content: bytes, source: str) -> str:
    """The text that some bytes are, without a byte order mark.

    Raises:
        InvalidDeployment: they are no text.
    """
    try:
        text = content.decode(json.detect_encoding(content)).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise InvalidDeployment(source, ("cannot be read: it is not UTF-8 text; save it as UTF-8",)) from None
    if "\0" in text:
        raise InvalidDeployment(source, ("cannot be read: it is not text; check the path",))
    return text


def printable(text: str) -> str:
    """A text shortened for a one-line message."""
    return "".join(one if one.isprintable() else "?" for one in text)
