"""Standard output for what a command has to say, and for nothing else.

Ray prints on the driver's stdout what it hears of raylets (``(raylet) Raylet is terminated``), also with
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
    """Has a stream that was closed (``>&-``) read or write nothing; what is opened next would take its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def is_full(error: OSError) -> bool:
    """Whether standard output could not take what was printed, and not a file of that name."""
    return error.errno in _FULL and error.filename is None


def give_up() -> None:
    """Has what is still to be printed go nowhere, so that nothing fails again at the end."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def out() -> TextIO:
    """Where a command prints."""
    return _kept or sys.stdout


@contextmanager
def kept_apart() -> Iterator[None]:
    """Until the end of the block only :func:`out` is stdout; what anybody else writes there goes to stderr."""
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
    # Below Python, too: of a process that was started, or of a library in C++.
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
