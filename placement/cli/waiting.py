"""``placement wait``, and how ``placement apply --wait`` waits: until nothing of a deployment is pending."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import click

from placement import errors
from placement.cli import common
from placement.cli.group import Command, NotDone
from placement.errors import counted

WAITS_ON = (
    "what is declared stays, and waits on; `placement wait` waits for it, `placement release` takes it back"
)
WATCH_SECONDS = 30.0
"""So long one question to the service may take."""

Results = dict[str, dict[str, Any]]
"""Deployment -> its result as JSON has it."""


@click.command(cls=Command, epilog="\b\nExample:\n  placement wait llama-70b --timeout 600")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--timeout",
    type=common.Seconds(min=0),
    default=math.inf,
    metavar="SECONDS",
    help="How long at most; without it, as long as it takes.",
)
@common.with_address
@common.with_json
def wait(names: tuple[str, ...], timeout: float, address: str | None, as_json: bool) -> None:
    """Waits until all replicas of deployments are placed. Exits with 1 if they are not in time."""
    with common.service(address) as service:
        for name in dict.fromkeys(names):
            common.ask(service.get.remote(name))  # which must be known, or it would be waited for in vain
        results = until_placed(service, names, timeout, not as_json)
    if as_json:
        common.dump({"deployments": [*results.values()]})
    else:
        from placement.cli.views.tables import assignments_table

        common.show(assignments_table(results.values(), title="placed"))
    require_placed(names, results, timeout)


def until_placed(service: Any, names: Iterable[str], seconds: float, tells: bool) -> Results:
    """Waits until nothing of some deployments is pending, or the time is over.

    Args:
        service: the handle.
        names: of the deployments.
        seconds: how long at most.
        tells: shows on stderr how it goes.

    Returns:
        The results of those that stand by then.
    """
    with common.noted(KeyboardInterrupt, WAITS_ON), _Progress(tells) as progress:
        end = time.monotonic() + seconds
        waiting = list(dict.fromkeys(names))
        results: Results = {}
        changed, seen = set(waiting), 0
        while True:
            for name in [name for name in waiting if name in changed]:
                try:
                    results[name] = common.ask(service.get.remote(name)).to_dict()
                except errors.UnknownDeployment:
                    results.pop(name, None)
                if name not in results or not results[name]["pending"]:
                    waiting.remove(name)
            left = end - time.monotonic()
            if not waiting or left <= 0:
                return results
            progress.say(results)
            timeout = min(left, WATCH_SECONDS)
            happened = common.ask(service.watch.remote(since=seen, names=[*waiting], timeout_seconds=timeout))
            for event in happened if seen else ():
                progress.happened(event)
            seen = max((event["number"] for event in happened), default=seen)
            changed = {event["deployment"] for event in happened} or set(waiting)


def require_placed(names: Iterable[str], results: Results, seconds: float) -> None:
    """That all replicas of all of them are placed.

    Raises:
        NotDone: they are not.
    """
    pending = {name: one["pending"] for name, one in results.items() if one["pending"]}
    gone = [name for name in dict.fromkeys(names) if name not in results]
    if not pending and not gone:
        return
    said = []
    if pending:
        each = ", ".join(f"{counted(len(one), 'replica')} of {name}" for name, one in pending.items())
        within = "" if math.isinf(seconds) else f" after {seconds:g} s"
        said.append(f"still pending{within}: {each}; {WAITS_ON}")
    if gone:
        said.append(f"released, or given up, meanwhile: {', '.join(gone)}; `placement events NAME` says why")
    raise NotDone("pending", "; ".join(said), {"pending": pending, "gone": gone})


class _Progress:
    """How waiting goes, on stderr: one line that is written anew on a terminal, elsewhere one for each event."""

    def __init__(self, tells: bool) -> None:
        self._lines = tells and not sys.stderr.isatty()
        self._anew = tells and sys.stderr.isatty()
        self._since = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._anew:
            click.echo("\r\033[K", err=True, nl=False)

    def happened(self, event: Mapping[str, Any]) -> None:
        """Tells an event."""
        if self._lines:
            who = "" if event["replica"] is None else f" replica {event['replica']}"
            common.note(f"{event['deployment']}{who} {event['state']}: {event['text']}".rstrip(": "))

    def say(self, results: Results) -> None:
        """Tells what is pending."""
        if not self._anew:
            return
        import shutil

        pending = [(name, *one) for name, result in results.items() for one in result["pending"].items()]
        waited = time.monotonic() - self._since
        text = f"{counted(len(pending), 'replica')} pending, {waited:.0f} s; "
        text += f"{pending[0][0]}/{pending[0][1]}: {pending[0][2]}" if pending else ""
        click.echo(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", err=True, nl=False)
