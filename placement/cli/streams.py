"""Keeps standard output for the command's own output.

Ray prints messages about raylets on the driver's stdout (``(raylet) Raylet is terminated``), even with
``log_to_driver=False``: ``listen_error_messages`` in ray/_private/worker.py. That goes to stderr.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_kept: TextIO | None = None

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def open_closed() -> None:
    """Opens a stream that was closed (``>&-``) on the null device; the next opened file would take its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def is_full(error: OSError) -> bool:
    """Whether the error is about standard output, and not about a file that an option names."""
    return error.errno in _FULL and error.filename is None


def give_up() -> None:
    """Discards what is still to be printed, so that flushing at the end does not fail again."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def out() -> TextIO:
    """Where a command prints."""
    return _kept or sys.stdout


@contextmanager
def kept_apart() -> Iterator[None]:
    """Until the end of the block only :func:`out` writes to stdout; what other code writes there goes to stderr."""
    global _kept
    before = sys.stdout
    if before is None:  # it was closed
        yield
        return
    try:
        real, errors = before.fileno(), sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # replaced by a file in memory
        real, errors = -1, -1
    if real < 0:
        _kept, sys.stdout = before, sys.stderr
        try:
            yield
        finally:
            _kept, sys.stdout = None, before
        return
    # Also below Python: child processes, and libraries in C++.
    before.flush()
    with open(os.dup(real), "w", encoding=before.encoding, errors=before.errors) as _kept:
        os.dup2(errors, real)
        sys.stdout = sys.stderr
        try:
            yield
        finally:
            sys.stdout = before
            os.dup2(_kept.fileno(), real)
            _kept = None
