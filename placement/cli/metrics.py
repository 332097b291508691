"""``placement metrics``: the service's metrics, and the files for Grafana and Prometheus that use them."""

from __future__ import annotations

from dataclasses import asdict

import click

from placement import monitoring
from placement.cli import common
from placement.cli.group import Command


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement metrics\n  placement metrics grafana > placement.json\n"
    "  placement metrics alerts > placement_alerts.yaml",
)
@click.argument("what", required=False, metavar="[grafana|alerts]", type=click.Choice(("grafana", "alerts")))
@common.with_json
def metrics(what: str | None, as_json: bool) -> None:
    """Prints the metrics, a Grafana dashboard, or alert rules. Without an argument it lists the metrics.

    Needs no cluster. Rules are YAML, or JSON with --json, which Prometheus reads as well.
    """
    if what == "grafana":
        common.say(monitoring.dashboard().rstrip())
    elif what == "alerts" and as_json:
        import yaml

        common.dump(yaml.safe_load(monitoring.alerts()))
    elif what == "alerts":
        common.say(monitoring.alerts().rstrip())
    elif as_json:
        common.dump({"metrics": [{**asdict(one), "name": one.exported} for one in monitoring.METRICS]})
    else:
        from rich import box

        from placement.cli.views.console import FittedTable

        table = FittedTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("metric", "type", "meaning"):
            table.add_column(heading, overflow="fold")
        for one in monitoring.METRICS:
            table.add_row("\n  ".join((one.exported, *one.labels)), one.kind, one.meaning.replace("`", ""))
        common.show(table)
