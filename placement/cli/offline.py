"""``placement demo`` and ``placement simulate``: without a cluster of one's own."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from placement.cli import common
from placement.cli.group import Command

POLICIES = ("topology", "fragmentation", "pack", "spread", "round_robin", "least_loaded")
"""The policies of :class:`placement.core.policy.Policy`; a test compares the two."""


@click.command(
    cls=Command, epilog="\b\nExample:\n  placement demo\n  placement demo --keep\n  placement demo --stop"
)
@click.option(
    "--keep",
    is_flag=True,
    help="Leave the cluster for trying, with what is placed on it, and say how to use it; finds one that was left.",
)
@click.option("--stop", is_flag=True, help="End the cluster that --keep left, and no other.")
@common.with_json
def demo(keep: bool, stop: bool, as_json: bool) -> None:
    """Places a mixed set of models on a simulated cluster of its own. Needs no GPU; takes about a minute."""
    if keep and stop:
        raise click.UsageError("--keep and --stop exclude each other; give one of them")
    from placement.cli import demo as demonstration

    if stop:
        demonstration.stop(as_json)
    else:
        sys.exit(demonstration.keep(as_json) if keep else demonstration.run(as_json))


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement simulate examples/workloads/mix.toml --cluster dgx-h100=8,l40s-4x=16\n"
    "  placement simulate mix.toml --cluster cluster.json --policy topology --policy fragmentation --picture gpus.svg\n"
    "  placement simulate openb_pod_list_default.csv --cluster openb_node_list_gpu_node.csv --policy fragmentation",
)
@click.argument("workload", type=click.Path(path_type=Path))
@click.option(
    "--cluster",
    required=True,
    metavar="WHAT",
    help="A file of `placement snapshot` (.json), an openb node list (.csv), or machines of the catalogue by number "
    "(dgx-h100=4,l40s-4x=8), with 16 CPUs and 128 GiB beside each GPU.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(POLICIES),
    help="The policy to use instead of each deployment's own. Give several to compare them.",
)
@click.option("--seed", default=0, show_default=True, help="Of a mix: the same seed gives the same arrivals.")
@click.option("--arrivals", type=click.IntRange(min=1), help="Replay only this many arrivals.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Draw the GPUs over time here: .svg or .png."
)
@common.with_json
def simulate(
    workload: Path,
    cluster: str,
    policies: tuple[str, ...],
    seed: int,
    arrivals: int | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Replays WORKLOAD on a cluster and shows the result. Needs no Ray and reserves nothing.

    WORKLOAD is a mix (.toml, .yaml), a trace (.csv with arrive_seconds, depart_seconds and fields of a
    deployment), or a pod list of the openb trace (.csv). A deployment that fits nowhere when it arrives is refused and
    does not arrive again.
    """
    from placement.cli import simulate as simulation

    if picture is not None:
        simulation.check_picture(picture)
    reports = simulation.run(workload, cluster, policies, seed, arrivals, show=not as_json)
    if picture is not None:
        simulation.draw(reports, picture)
    if as_json:
        common.dump(
            {"simulations": [{"policy": name, **report.to_dict()} for name, report in reports.items()]}
        )
        return
    from placement.cli.views.simulation import simulation_view

    common.show(*simulation_view({name: report.to_dict() for name, report in reports.items()}))
    if picture is not None:
        common.note(f"drawn: {picture}")
