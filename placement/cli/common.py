"""What commands share: options, the connection to the service, questions, and what is printed."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from placement.cli import streams

GOES_ON = (
    "the placement service goes on; `placement status` shows what is placed, `placement release` releases it"
)


def with_address(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--address``."""
    text = "HOST:PORT of the head; without it RAY_ADDRESS, else the cluster on this machine."
    return click.option("--address", metavar="HOST:PORT", help=text)(command)


def with_json(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--json``."""
    text = "Print JSON to stdout and nothing else; an error is the last line of stderr, as JSON."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def with_files(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the files of deployments, and how folders among them are read."""
    text = "For a folder, read the files of its subfolders too."
    command = click.option("-R", "--recursive", is_flag=True, help=text)(command)
    path = click.Path(path_type=Path, allow_dash=True)
    return click.argument("files", nargs=-1, required=True, metavar="FILE...", type=path)(command)


def with_picture(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds ``--picture``; ``what`` is its help."""

    def is_svg(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and path.suffix.lower() != ".svg":
            raise click.UsageError(f"--picture: {path.name!r} does not end in .svg; name it so")
        return path

    path = click.Path(path_type=Path, dir_okay=False)
    return click.option("--picture", type=path, metavar="FILE.svg", help=what, callback=is_svg)


def draw(svg: str, path: Path) -> None:
    """Writes the file that ``--picture`` names."""
    with writing("--picture", path):
        path.write_text(svg, encoding="utf-8")


class Seconds(click.FloatRange):
    """A number of seconds, at least ``min``; ``inf`` for no limit."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Reads it."""
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail("nan is no number of seconds", param, ctx)
        return seconds


@contextmanager
def cluster(address: str | None) -> Iterator[str]:
    """A connection to a Ray cluster; yields its address.

    Raises:
        ClusterUnreachable: nothing answers there.
    """
    from placement.runtime import connection

    on_sigterm = signal.getsignal(signal.SIGTERM)
    with connection.cluster(address) as found:
        # When Ray connects it sets a handler of its own, which exits with 15 and prints nothing.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        yield found


@contextmanager
def service(address: str | None) -> Iterator[Any]:
    """The handle of the placement service.

    Raises:
        ClusterUnreachable, ServiceNotRunning: there is none.
    """
    from placement.runtime import connection

    with cluster(address):
        yield connection.connect()


def ask(reference: Any, tell: Callable[[], None] | None = None) -> Any:
    """The answer of a call to the service; ``tell`` is called now and then until it is there.

    Raises:
        PlacementError: what the service raised.
    """
    from placement.runtime import connection

    return connection.ask(reference, tell)


def asker() -> dict[str, str]:
    """Who asks, for the history. The job of a command owns nothing, since it ends with the command."""
    from placement.runtime import connection

    said = connection.caller()
    return {"driver" if name == "job" else name: value for name, value in said.items()}


def members(service: Any, names: Iterable[str]) -> list[str]:
    """The deployments that names mean, each once; a group's name means its members.

    Raises:
        UnknownDeployment: a name means none.
    """
    return list(dict.fromkeys(one for name in names for one in ask(service.members.remote(name))))


@contextmanager
def noted(kind: type[BaseException], note: str) -> Iterator[None]:
    """Adds a note to the exception that ends the block."""
    try:
        yield
    except kind as error:
        error.add_note(note)
        raise


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """A block that writes the file that an option names.

    Raises:
        click.UsageError: it cannot be.
    """
    try:
        yield
    except OSError as error:
        raise click.UsageError(
            f"{option}: {path} cannot be written: {error.strerror}; check the path"
        ) from None


def agreed(what: str, instead: str, as_json: bool) -> bool:
    """Asks on a terminal whether something may be done.

    Args:
        what: ``"release 2 deployments"``.
        instead: what to add where nobody can be asked: ``"add --yes"``.
        as_json: the output is JSON, so that nobody is asked.

    Raises:
        click.UsageError: nobody can be asked.
    """
    if as_json or not sys.stdin.isatty():
        raise click.UsageError(f"this would {what}, and nobody can be asked; {instead}")
    return click.confirm(f"{what[:1].upper()}{what[1:]}?", err=True)


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(text, err=True)


def say(text: str) -> None:
    """One line on stdout."""
    click.echo(text, file=streams.out())


def dump(value: Any) -> None:
    """A JSON document on stdout."""
    say(json.dumps(value, indent=2, allow_nan=False))


def show(*renderables: Any) -> None:
    """Rich renderables on stdout."""
    click.echo(_drawn(*renderables), file=streams.out(), nl=False, color=True)


def page(*renderables: Any) -> None:
    """The same, a screen at a time where stdout is a terminal and that is more than one: with ``PAGER``, else less."""
    from placement.cli.views.console import console

    screen, text = console(), _drawn(*renderables)
    is_read = screen.is_terminal and sys.stdin.isatty() and not screen.is_dumb_terminal
    if not is_read or text.count("\n") < screen.height or not _paged(text):
        click.echo(text, file=streams.out(), nl=False, color=True)


def _drawn(*renderables: Any) -> str:
    """What rich makes of them; where it is not for a terminal, without spaces at the ends of lines."""
    from placement.cli.views.console import console

    screen = console()
    with screen.capture() as captured:
        for renderable in renderables:
            # If a text asks not to be broken, rich forgets that when it prints it.
            is_one_line = getattr(renderable, "no_wrap", None) is True
            screen.print(renderable, crop=False, soft_wrap=is_one_line)
    text = captured.get()
    return text if screen.is_terminal else "\n".join(line.rstrip(" ") for line in text.split("\n"))


def _paged(text: str) -> bool:
    """Whether a pager showed it."""
    command = shlex.split(os.environ.get("PAGER", "less"))
    if not command:
        return False
    # Options of less: colours, no paging if it fits on the screen, and keep the text at the end.
    env = {"LESS": "FRX", **os.environ}
    try:
        pager = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=streams.out(), env=env, encoding="utf-8"
        )
    except OSError:
        return False
    assert pager.stdin is not None
    with suppress(BrokenPipeError), pager.stdin:  # the user may quit it before all is written
        pager.stdin.write(text)
    while True:
        with suppress(KeyboardInterrupt):  # Ctrl-C is meant for the pager
            pager.wait()
            return True
