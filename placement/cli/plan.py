"""``placement plan`` and ``placement snapshot``."""

from __future__ import annotations

from pathlib import Path

import click

from placement.cli import common
from placement.cli.group import Command


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement plan deployments.toml\n"
    "  placement snapshot > cluster.json\n  placement plan --file cluster.json --explain deployments.toml",
)
@click.argument("deployments", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--file",
    "cluster",
    type=click.Path(path_type=Path),
    help="Plan for the cluster that `placement snapshot` wrote here. Needs no Ray and no cluster.",
)
@click.option("--explain", is_flag=True, help="Also say, stage by stage, what excluded how many nodes.")
@common.with_address
@common.with_json
def plan(deployments: Path, cluster: Path | None, explain: bool, address: str | None, as_json: bool) -> None:
    """Shows what applying FILE would do now. Reserves nothing."""
    from placement.wire.files import load_deployments

    if cluster is not None and address is not None:
        raise click.UsageError("--file and --address exclude each other; give one of them")
    wanted = load_deployments(deployments)
    if cluster is not None:
        from placement.wire.cluster import load_cluster
        from placement.wire.plans import explain_deployments, plan_deployments

        known = load_cluster(cluster)
        snapshot, held = known.snapshot(), known.held()
        explained = explain_deployments(snapshot, held, wanted) if explain else []
        plans = [] if explain else plan_deployments(snapshot, held, wanted)
    else:
        with common.service(address) as service:
            explained = common.ask(service.explain_all.remote(wanted)) if explain else []
            plans = [] if explain else common.ask(service.plan_all.remote(wanted))

    refusal = explained[-1].error if explained else None
    plans = plans or [one.plan for one in explained if one.plan is not None]
    if as_json:
        listed = explained if explain else plans
        common.dump({"deployments": [one.to_dict() for one in listed]})
    else:
        from placement.cli.render import assignments_table, explanation_view, runtimes_note

        for one in explained:
            common.show(*explanation_view(one.to_dict()))
        if plans:
            rows = [one.to_dict() for one in plans]
            common.show(assignments_table(rows, title="planned, nothing is reserved"), runtimes_note(rows))
    if refusal is not None:
        raise refusal


@click.command(cls=Command, epilog="\b\nExample:\n  placement snapshot > cluster.json")
@common.with_address
@common.with_json
def snapshot(address: str | None, as_json: bool) -> None:
    """Prints the cluster as the planner sees it, as JSON for `placement plan --file`. Holds no secret."""
    with common.service(address) as service:
        common.dump(common.ask(service.snapshot.remote()))
