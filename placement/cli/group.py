"""What all commands of ``placement`` have in common when they fail: one line or JSON on stderr, and an exit code."""

from __future__ import annotations

import errno
import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from placement import errors
from placement.cli import streams

DONE, REFUSED, BAD_INPUT, NO_SERVICE = 0, 1, 2, 3
_AS_JSON, _SIGNAL = "placement.as_json", "placement.signal"
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.InvalidDeployment, BAD_INPUT),
    (errors.InvalidClusterFile, BAD_INPUT),
    (errors.UnknownTopology, BAD_INPUT),
    (errors.MatrixError, BAD_INPUT),
    (errors.ClusterUnreachable, NO_SERVICE),
    (errors.ServiceNotRunning, NO_SERVICE),
    (errors.PlacementError, REFUSED),
)


def exit_code(kind: type[errors.PlacementError]) -> int:
    """What a command that fails with such an error exits with."""
    return next(code for base, code in _EXIT_CODES if issubclass(kind, base))


class Command(click.Command):
    """A command that alone prints to stdout; SIGTERM ends it as Ctrl-C does."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it."""
        with streams.kept_apart(), _sigterm_interrupts(ctx):
            return super().invoke(ctx)


class Commands(click.Group):
    """Turns errors into one line on stderr, or JSON where ``--json`` was given, and an exit code."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs; a full disk, or a closed stream, is no fault of the program."""
        streams.open_closed()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not streams.is_full(error):
                raise
            streams.give_up()
            what = f"cannot write the output: {error.strerror}; make room, or write it elsewhere"
            told = {"code": "output", "type": type(error).__name__, "message": what}
            _tell_error("--json" in (kwargs.get("args") or sys.argv), told)
            sys.exit(REFUSED)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Notes whether JSON is asked for, since a command that fails to parse cannot say so."""
        ctx.meta[_AS_JSON] = "--json" in args
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if not ctx.meta[_AS_JSON]:
                raise
            _tell_error(True, _usage(error))
            ctx.exit(BAD_INPUT)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        as_json = ctx.meta[_AS_JSON]
        try:
            return super().invoke(ctx)
        except errors.PlacementError as error:
            _tell_error(as_json, error.to_dict(), error)
            ctx.exit(exit_code(type(error)))
        except click.UsageError as error:
            if not as_json:
                raise
            _tell_error(as_json, _usage(error))
            ctx.exit(BAD_INPUT)
        except (KeyboardInterrupt, click.Abort) as error:
            told = {"code": "interrupted", "type": "KeyboardInterrupt", "message": "interrupted"}
            _tell_error(as_json, told, error, prefix="")
            ctx.exit(128 + ctx.meta.get(_SIGNAL, signal.SIGINT))
        except Exception as error:
            of_output = isinstance(error, OSError) and (error.errno == errno.EPIPE or streams.is_full(error))
            if not as_json or of_output or isinstance(error, click.exceptions.Exit):
                raise
            told = {"code": "unexpected", "type": type(error).__name__, "message": str(error)}
            _tell_error(as_json, {**told, "traceback": traceback.format_exc()}, error)
            ctx.exit(REFUSED)


def _usage(error: click.UsageError) -> dict[str, Any]:
    return {"code": "usage", "type": type(error).__name__, "message": error.format_message()}


def _tell_error(
    as_json: bool, told: dict[str, Any], error: BaseException | None = None, prefix: str = "error: "
) -> None:
    """One line of JSON, so that it can be told from what Ray may have said before; or the message with its notes."""
    message = "; ".join([told["message"], *getattr(error, "__notes__", ())])
    click.echo(json.dumps({"error": {**told, "message": message}}) if as_json else prefix + message, err=True)


@contextmanager
def _sigterm_interrupts(ctx: click.Context) -> Iterator[None]:
    def interrupt(number: int, _: object) -> None:
        ctx.meta[_SIGNAL] = number
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
