"""``placement doctor``: checks whether this cluster meets what placement relies on."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from placement.cli import common
from placement.cli.group import REFUSED, Command
from placement.cli.progress import Progress


@click.command(cls=Command, epilog="\b\nExample:\n  placement doctor\n  placement doctor --timeout 20 --json")
@click.option(
    "--timeout",
    "seconds",
    type=common.Seconds(min=4, max=3600),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="How long the command may take. A node that has not answered in half of that time is skipped.",
)
@common.with_address
@common.with_json
def doctor(seconds: float, address: str | None, as_json: bool) -> None:
    """Checks each node, and says what to do. It looks at versions, NVML and driver, device order, labels, egress and
    steering.

    Steering is really tested: on each GPU node with a free GPU, Ray is made to give the last free one, which is given
    back at once. Others may use the cluster meanwhile. Nothing stays held, however the command ends. The service need
    not run. Exits with 1 if a check failed.
    """
    with common.cluster(address):
        from placement.runtime import connection, diagnosis
        from placement.runtime import doctor as examination

        with Progress(f"examining the nodes, for {seconds:g} s at most", not as_json):
            findings = connection.in_cluster(examination.findings, seconds)
    failed = diagnosis.has_failed(findings)
    if as_json:
        common.dump({"ok": not failed, "findings": [asdict(one) for one in findings]})
    else:
        from placement.cli.views.diagnosis import diagnosis_view

        common.show(*diagnosis_view([asdict(one) for one in findings]))
    if failed:
        sys.exit(REFUSED)
