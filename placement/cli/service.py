"""``placement up`` and ``placement down``: the service itself."""

from __future__ import annotations

import math
import sys
from typing import Any

import click

from placement import __version__, errors
from placement.cli import common
from placement.cli.group import REFUSED, Command
from placement.cli.release import what_ends
from placement.errors import counted


@click.command(cls=Command, epilog="\b\nExample:\n  placement up --address 127.0.0.1:6379")
@common.with_address
@click.option(
    "--near",
    metavar="LABELS",
    help="Node labels that make nodes near each other, widest first: zone,block,rack.",
)
@click.option(
    "--idle-seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    help="After a node has held nothing for this long its node actor ends, so that an autoscaler can remove the node; "
    "60 if left out. With inf the actor stays, and the next placement on that node need not start one.",
)
@click.option(
    "--node-types",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="The cluster configuration of `ray up`: refusals for lack of room then name the node types that would help.",
)
@click.option(
    "--history-days",
    metavar="DAYS",
    type=click.FloatRange(min=0, min_open=True),
    help="How long events and decisions are kept; 30 if left out.",
)
@click.option(
    "--history-mib",
    metavar="MIB",
    type=click.FloatRange(min=0.125),
    help="How much of Ray's store they may take, in MiB; 8 if left out. The oldest are dropped.",
)
@common.with_json
def up(
    address: str | None,
    near: str | None,
    node_types: str | None,
    as_json: bool,
    **numbers: float | None,
) -> None:
    """Starts the service, or finds it running. The service stays when this command ends.

    A running service is not changed. If it has another version, or other settings than those given here, the command
    refuses.
    """
    from placement.runtime import bootstrap, connection
    from placement.wire.node_types import node_types as read_node_types

    options: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    for name, value in options.items():
        if math.isnan(value):
            raise click.UsageError(
                f"--{name.replace('_', '-')}: nan is no number; use 30, for example, or inf"
            )
    if near:
        options["near"] = [label.strip() for label in near.split(",") if label.strip()]
    asked = dict(options)
    if node_types is not None:
        options["node_types"] = read_node_types(node_types)
        asked["node_types"] = [one.name for one in options["node_types"]]
    with (
        common.cluster(address) as found,
        common.noted(KeyboardInterrupt, "`placement up` again finds what it started"),
    ):
        try:
            connection.connect()
            said = "runs already"
        except errors.ServiceNotRunning:
            said = "is started"
            if not as_json:
                common.note("starting the placement service ...")
        # Also if it was found: it may be restarting, and this waits until it answers.
        service = bootstrap.start(**options)
        _require_same(service, found, asked)
        status = common.ask(service.status.remote())
    if as_json:
        common.dump(status)
        return
    nodes = status["nodes"]
    gpus = sum(node["gpu_count"] for node in nodes)
    with_gpus = sum(1 for node in nodes if node["gpu_count"])
    egress = sum(1 for node in nodes if node["egress"])
    there = f"{counted(gpus, 'GPU')} on {counted(with_gpus, 'node')}, {counted(egress, 'egress node')}"
    common.say(f"the placement service {said}: {there}")
    for node in nodes:
        if node["problem"]:
            common.note(f"note: {node['name']}: {node['problem']}")


def _require_same(service: Any, address: str, options: dict[str, Any]) -> None:
    """Checks that the running service has the version and settings that were asked for."""
    # First the version: another version may not report its settings.
    asked: dict[str, Any] = {"version": __version__}
    runs = {"version": common.ask(service.ping.remote())}
    if asked == runs and options:
        asked, runs = options, common.ask(service.settings.remote())

    differences = {
        name: (_setting(runs[name]), _setting(wanted))
        for name, wanted in asked.items()
        if runs[name] != wanted
    }
    if differences:
        raise errors.ServiceDiffers(address, differences)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value) or "(none)"
    return value if isinstance(value, str) else f"{value:g}"


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement down\n  placement down --yes\n  placement down --keep-placements",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--keep-placements", is_flag=True, help="Leave everything placed; the next `placement up` finds it."
)
@common.with_address
@common.with_json
def down(yes: bool, keep_placements: bool, address: str | None, as_json: bool) -> None:
    """Releases everything and stops the service.

    Asks before it releases, since the workers of all deployments end. If there is no terminal, and with --json, give
    --yes.
    """
    from placement.runtime import bootstrap, connection

    with common.cluster(address) as found:
        if not yes and not keep_placements:
            ends = what_ends(common.ask(connection.connect().status.remote()))
            what = f"{ends}, and stop the placement service on the Ray cluster at {found}"
            if not common.agreed(what, "add --yes, or --keep-placements to leave them", as_json):
                common.note("nothing is changed")
                sys.exit(REFUSED)
        with common.noted(
            KeyboardInterrupt, "releases that have begun go on; run `placement down` again for the rest"
        ):
            released = bootstrap.stop(keep_placements)
    if as_json:
        common.dump({"released": released})
    else:
        what = f"; released {', '.join(released)}" if released else ""
        common.say(f"the placement service is stopped{what}")
