"""``placement events`` and ``placement logs``: what happened, and why."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import click

from placement.cli import common
from placement.cli.group import Command

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
POLL_SECONDS = 0.5
"""How often what is followed is asked for anew."""

Since = tuple[int, float]
"""The number of an event, and a time in seconds since 1970; 0 for any."""


class _Since(click.ParamType[Since]):
    """``1764144000123``, the number of an event; or ``2h``, so long ago."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Since:
        """Reads it."""
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\d{1,18})([smhd]?)", value, re.ASCII)
        if found is None:
            self.fail(
                f"{value!r} is neither an event's number nor a time such as 90s, 30m, 2h or 7d", param, ctx
            )
        amount, unit = int(found[1]), found[2]
        return (0, max(0.0, time.time() - amount * UNITS[unit])) if unit else (amount, 0.0)


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement events llama-70b --follow\n  placement events --all --since 2h\n"
    "  placement events --since 1764144000000 --json",
)
@click.argument("name", required=False)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="All that is kept: also decisions, with who asked and why, and of before the service last started.",
)
@click.option(
    "--since",
    type=_Since(),
    default=(0, 0.0),
    metavar="NUMBER|TIME",
    help="Only those after the event of this number, or of the last 90s, 30m, 2h or 7d.",
)
@click.option("--follow", is_flag=True, help="Go on until interrupted, and show what happens as it does.")
@common.with_address
@common.with_json
def events(
    name: str | None, everything: bool, since: Since, follow: bool, address: str | None, as_json: bool
) -> None:
    """Shows what happened to replicas. Says where they are, which were lost, why some are pending: of all, of one
    deployment NAME, or of the members of a group NAME.

    With --follow, --json prints one object a line.
    """
    from placement.cli.views.tables import event_line

    names = None if name is None else [name]
    with common.service(address) as service:
        found = (_history if everything else _events)(service, names, since, follow)
        if follow:
            for one in found:
                if as_json:
                    common.say(json.dumps(one, allow_nan=False))
                else:
                    common.show(event_line(one, of_all=name != one["deployment"]))
        elif as_json:
            common.dump({"deployment": name, "events": list(found)})
        else:
            common.page(*(event_line(one, of_all=name != one["deployment"]) for one in found))


def _events(service: Any, names: list[str] | None, since: Since, follow: bool) -> Iterator[dict[str, Any]]:
    """The last events; who follows them from a number on misses none."""
    from placement.runtime.client_base import heard_of

    seen, earliest = since
    found = [] if follow and seen else common.ask(service.events.remote(names[0] if names else None, seen))
    while True:
        yield from (one for one in found if one["at"] >= earliest)
        if not follow:
            return
        names = heard_of(names, found)
        seen = found[-1]["number"] if found else seen
        found = common.ask(service.watch.remote(since=seen, names=names))


def _history(service: Any, names: list[str] | None, since: Since, follow: bool) -> Iterator[dict[str, Any]]:
    """Events and decisions that are kept."""
    from placement.runtime.client_base import heard_of

    seen, earliest = since
    while True:
        page = common.ask(service.history.remote(seen, names, earliest))
        yield from page["entries"]
        names = heard_of(names, page["entries"])
        seen = page["last"]
        if skipped := page["skipped"]:
            common.note(f"note: entries that another version wrote are left out: {skipped}")
        if page["more"]:
            continue
        if not follow:
            return
        time.sleep(POLL_SECONDS)


@click.command(cls=Command, epilog="\b\nExample:\n  placement logs\n  placement logs --lines 1000 --follow")
@click.option(
    "--lines",
    type=click.IntRange(0, 10_000),
    metavar="NUMBER",
    default=100,
    show_default=True,
    help="How many of the last lines.",
)
@click.option("--follow", is_flag=True, help="Go on until interrupted, and show what is written as it is.")
@common.with_address
@common.with_json
def logs(lines: int, follow: bool, address: str | None, as_json: bool) -> None:
    """Prints the service's log. It has a line for each event and decision, and warnings. Works from anywhere in the
    cluster.

    With --follow, --json prints one object a line.
    """
    with common.service(address) as service:
        page = common.ask(service.log.remote(lines))
        if as_json and not follow:
            common.dump({"lines": page["lines"]})
            return
        while True:
            for line in page["lines"]:
                common.say(json.dumps({"line": line}) if as_json else line)
            if not follow:
                return
            if not page["lines"]:
                time.sleep(POLL_SECONDS)
            page = common.ask(service.log.remote(0, page["cursor"]))
