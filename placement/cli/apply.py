"""``placement apply``."""

from __future__ import annotations

from pathlib import Path

import click

from placement.cli import common
from placement.cli.group import Command
from placement.errors import counted


@click.command(cls=Command, epilog="\b\nExample:\n  placement apply deployments.toml")
@click.argument("file", type=click.Path(path_type=Path))
@common.with_address
@common.with_json
def apply(file: Path, address: str | None, as_json: bool) -> None:
    """Makes what stands be as FILE (TOML or YAML) declares: all of it, or nothing is changed.

    Deployments that FILE does not name are left alone.
    """
    from placement.wire.files import load_deployments

    deployments = load_deployments(file)
    with common.service(address) as service:
        if not as_json:
            common.note(f"placing {counted(len(deployments), 'deployment')} ...")
        with common.noted(KeyboardInterrupt, common.GOES_ON):
            results = common.ask(service.apply_all.remote(deployments))
        report = {"deployments": [result.to_dict() for result in results]}
    if as_json:
        common.dump(report)
    else:
        from placement.cli.render import assignments_table

        common.show(assignments_table(report["deployments"], title="placed"))
