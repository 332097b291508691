"""How long work goes, in one line on stderr: on a terminal, and where it lasts more than a second."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time

import click

AFTER_SECONDS, EVERY_SECONDS = 1.0, 0.2


def is_shown() -> bool:
    """Whether stderr is a terminal on which a line can be written anew."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def rewrite(text: str, tail: str = "") -> None:
    """Writes the line anew; ``text`` is cut where there is no room for it and its tail. Empty erases the line."""
    from rich.cells import cell_len, chop_cells

    # One line, whatever is in a node's name.
    text = "".join(one for one in text if one.isprintable())
    room = max(shutil.get_terminal_size().columns - 1 - cell_len(tail), 1)
    click.echo(f"\r\033[K{next(iter(chop_cells(text, room)), '')}{tail}", err=True, nl=False)


class Progress:
    """Shows what is being done, and for how long, until the end of the block; then the line is gone.

    Args:
        text: what is being done.
        shows: nothing is shown without it: with ``--json``.
    """

    def __init__(self, text: str, shows: bool = True) -> None:
        self.is_shown = shows and is_shown()
        self._text, self._began = text, time.monotonic()
        self._over, self._writing, self._written = threading.Event(), threading.Lock(), False

    def __enter__(self) -> Progress:
        if self.is_shown:
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._erase()

    def say(self, text: str) -> None:
        """Tells what is being done now."""
        self._text = text

    def note(self, text: str) -> None:
        """A line on stderr that stays, above this one."""
        self._erase()
        click.echo(text, err=True)

    def _run(self) -> None:
        wait = AFTER_SECONDS
        while not self._over.wait(wait):
            with self._writing:
                if not self._over.is_set():
                    rewrite(self._text, f" ({time.monotonic() - self._began:.0f} s)")
                    self._written = True
            wait = EVERY_SECONDS

    def _erase(self) -> None:
        with self._writing:
            if self._written:
                rewrite("")
                self._written = False
