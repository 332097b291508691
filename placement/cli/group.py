"""How all commands of ``placement`` fail: one line or JSON on stderr, and an exit code."""

from __future__ import annotations

import errno
import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import click

from placement import errors
from placement.cli import streams

DONE, REFUSED, BAD_INPUT, NO_SERVICE = 0, 1, 2, 3
_AS_JSON, _SIGNAL = "placement.as_json", "placement.signal"
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.InvalidDeployment, BAD_INPUT),
    (errors.InvalidClusterFile, BAD_INPUT),
    (errors.InvalidMeasurement, BAD_INPUT),
    (errors.UnknownTopology, BAD_INPUT),
    (errors.MatrixError, BAD_INPUT),
    (errors.ClusterUnreachable, NO_SERVICE),
    (errors.ServiceNotRunning, NO_SERVICE),
    (errors.PlacementError, REFUSED),
)


def exit_code(kind: type[errors.PlacementError]) -> int:
    """The exit code of a command that fails with such an error."""
    return next(code for base, code in _EXIT_CODES if issubclass(kind, base))


class NotDone(Exception):
    """The command did not reach its goal, though nothing was refused.

    Args:
        code: its code for programs, as docs/errors.md lists it.
        message: what was not reached, and what to do next.
        fields: its further fields for programs.
    """

    def __init__(self, code: str, message: str, fields: Mapping[str, Any]) -> None:
        super().__init__(code, message, dict(fields))
        self.code, self.message, self.fields = code, message, dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """As :meth:`placement.errors.PlacementError.to_dict`."""
        return {"code": self.code, "type": type(self).__name__, "message": self.message, **self.fields}


class OptionalNumber(click.Option):
    """An option whose value may be left out: ``--wait``, ``--wait 30``.

    Args:
        unsaid: its value if only the option is given.
    """

    def __init__(self, *args: Any, unsaid: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unsaid = unsaid


class Command(click.Command):
    """A command whose stdout only it can write to; SIGTERM ends it as Ctrl-C does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Adds the number to each option that was given without one."""
        unsaid = {
            name: option.unsaid
            for option in self.params
            if isinstance(option, OptionalNumber)
            for name in option.opts
        }
        given = []
        for number, arg in enumerate(args):
            if arg == "--":
                given += args[number:]
                break
            left_out = arg in unsaid and not _is_number(args[number + 1 : number + 2])
            given.append(f"{arg}={unsaid[arg]}" if left_out else arg)
        return super().parse_args(ctx, given)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it."""
        with streams.kept_apart(), _sigterm_interrupts(ctx):
            return super().invoke(ctx)


class Commands(click.Group):
    """Turns errors into one line on stderr, or JSON where that was asked for, and an exit code."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs it; a full disk, or a closed stream, is reported as such and not as a defect."""
        streams.open_closed()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not streams.is_full(error):
                raise
            streams.give_up()
            what = f"cannot write the output: {error.strerror}; make room, or write it elsewhere"
            told = {"code": "output", "type": type(error).__name__, "message": what}
            _tell_error(_asks_json(kwargs.get("args") or sys.argv), told)
            sys.exit(REFUSED)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Records whether JSON is asked for, as that must be known even if the arguments cannot be parsed."""
        ctx.meta[_AS_JSON] = _asks_json(args)
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
        except NotDone as error:
            _tell_error(as_json, error.to_dict(), error)
            ctx.exit(REFUSED)
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


def _is_number(args: Sequence[str]) -> bool:
    try:
        return bool(args) and float(args[0]) is not None
    except ValueError:
        return False


def _asks_json(args: Sequence[str]) -> bool:
    """Whether the arguments ask for JSON, before the command parses them."""
    short = {"-ojson", "--output=json", "--json"}
    return not short.isdisjoint(args) or any(pair in _PAIRS for pair in pairwise(args))


_PAIRS = {("-o", "json"), ("--output", "json")}


def _usage(error: click.UsageError) -> dict[str, Any]:
    return {"code": "usage", "type": type(error).__name__, "message": error.format_message()}


def _tell_error(
    as_json: bool, told: dict[str, Any], error: BaseException | None = None, prefix: str = "error: "
) -> None:
    """One line of JSON, so that it differs from what Ray may have printed before; or the message with its notes."""
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
