"""``placement status``, ``list`` and ``get``: what stands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from placement.cli import common, streams
from placement.cli.group import Command, OptionalNumber

STATES = ("placed", "pending", "lost", "releasing")
EVERY_SECONDS = 2.0


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--node`` and ``--state``."""
    command = click.option("--state", type=click.Choice(STATES), help="Only deployments in this state.")(
        command
    )
    return click.option("--node", help="Only this node, and what is on it: its id, name or address.")(command)


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement status\n  placement status --deployment llama-70b --watch\n"
    "  placement status --picture cluster.svg\n  placement status --json",
)
@_filters
@click.option("--deployment", metavar="NAME", help="Only this deployment, or group, and its nodes.")
@click.option(
    "--watch",
    cls=OptionalNumber,
    unsaid=EVERY_SECONDS,
    type=common.Seconds(min=0.1),
    metavar="[SECONDS]",
    help=f"Show it again every SECONDS, {EVERY_SECONDS:g} if left out, until interrupted.",
)
@common.with_picture(
    "Also draws a picture, for a slide: each node, its NVLink islands, and the replicas on them."
)
@common.with_address
@common.with_json
def status(
    node: str | None,
    state: str | None,
    deployment: str | None,
    watch: float | None,
    picture: Path | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Shows the free GPUs, what waits, each node, each deployment. Nodes are drawn with the replicas on them.

    On a terminal it is shown with PAGER, else less. With --watch, --json prints one report per line.
    """
    if picture is not None and watch is not None:
        raise click.UsageError("--picture draws one moment; leave out --watch")
    with common.service(address) as service:

        def look() -> dict[str, Any]:
            return _report(service, node=node, state=state, deployment=deployment)

        if watch is not None:
            _watch(look, watch, deployment is not None, as_json)
        report = look()
    if picture is not None:
        from placement.cli.views.cluster_picture import cluster_picture

        common.draw(cluster_picture(report), picture)
    if as_json:
        common.dump(report)
    else:
        from placement.cli.views.status import status_view

        common.page(*status_view(report, of_one=deployment is not None))


def _report(service: Any, **filters: str | None) -> dict[str, Any]:
    """The service's report, with only what the filters select."""
    given = {name: value for name, value in filters.items() if value is not None}
    report: dict[str, Any] = common.ask(service.status.remote(**given))
    return report


def _watch(look: Callable[[], dict[str, Any]], seconds: float, of_one: bool, as_json: bool) -> None:
    """Shows a report again and again, until interrupted."""
    from rich.console import Group
    from rich.live import Live

    from placement.cli.views.console import console
    from placement.cli.views.status import status_view

    if as_json or not streams.out().isatty():
        while True:
            report = look()
            if as_json:
                common.say(json.dumps(report, allow_nan=False))
            else:
                common.show(*status_view(report, of_one))
            time.sleep(seconds)
    with Live(console=console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(Group(*status_view(look(), of_one)), refresh=True)
            time.sleep(seconds)


@click.command("list", cls=Command, epilog="\b\nExample:\n  placement list --state pending")
@_filters
@click.option("-o", "--output", type=click.Choice(["json"]), help="Same as --json.")
@common.with_address
@common.with_json
def list_(
    node: str | None, state: str | None, output: str | None, address: str | None, as_json: bool
) -> None:
    """Lists deployments, one a line. Says how many replicas are placed of how many, GPUs, state, age and owner."""
    from placement.cli.views.status import deployments_table, summary

    with common.service(address) as service:
        report = _report(service, node=node, state=state)
    if as_json or output:
        common.dump({"deployments": [summary(one) for one in report["deployments"]]})
    elif report["deployments"]:
        common.page(deployments_table(report["deployments"]))
    else:
        common.say("no deployments" + (" like that" if node or state else ""))


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement get llama-70b\n  placement get llama-70b whisper -o yaml > deployments.yaml",
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["yaml", "json"]),
    help="As YAML that can be applied again, with the places as comments; or as --json.",
)
@common.with_address
@common.with_json
def get(names: tuple[str, ...], output: str | None, address: str | None, as_json: bool) -> None:
    """Shows what is declared of NAME, and where its replicas are. NAME is a deployment or a group."""
    from placement.cli.views.declared import declared_view, declared_yaml

    with common.service(address) as service:
        found = [common.ask(service.describe.remote(name)) for name in common.members(service, names)]
    if as_json or output == "json":
        common.dump({"deployments": found})
    elif output == "yaml":
        common.say(declared_yaml(found).rstrip())
    else:
        for one in found:
            common.show(*declared_view(one))
