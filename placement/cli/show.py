"""``placement status`` and ``placement events``."""

from __future__ import annotations

import json
from typing import Any

import click

from placement.cli import common
from placement.cli.group import Command


@click.command(cls=Command, epilog="\b\nExample:\n  placement status --json")
@common.with_address
@common.with_json
def status(address: str | None, as_json: bool) -> None:
    """Shows each node with its GPUs and who sits where, and each deployment."""
    with common.service(address) as service:
        report = common.ask(service.status.remote())
    if as_json:
        common.dump(report)
    else:
        from placement.cli.render import status_view

        common.show(*status_view(report))


@click.command(cls=Command, epilog="\b\nExample:\n  placement events llama-70b --follow")
@click.argument("name")
@click.option("--follow", is_flag=True, help="Go on until interrupted, and show what happens as it does.")
@common.with_address
@common.with_json
def events(name: str, follow: bool, address: str | None, as_json: bool) -> None:
    """Shows what happened to the replicas of a deployment: where they are, which were lost, why some are pending.

    With --follow, --json prints one object a line.
    """
    from placement.cli.render import event_line

    def show(one: dict[str, Any]) -> None:
        if as_json:
            common.say(json.dumps(one, allow_nan=False))
        else:
            common.show(event_line(one))

    with common.service(address) as service:
        found = common.ask(service.events.remote(name))
        if as_json and not follow:
            common.dump({"deployment": name, "events": found})
            return
        while True:
            for one in found:
                show(one)
            if not follow:
                return
            since = found[-1]["number"] if found else 0
            found = []
            while not found:
                found = common.ask(service.watch.remote(name, since))
