"""``placement demo``: the main job, on a cluster of simulated nodes, which may stay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.resources import files
from typing import Any

import click
from rich import box

from placement.cli import common, demo_cluster, progress
from placement.cli.views.console import FittedTable
from placement.cli.views.nodes import cluster_map
from placement.cli.views.tables import bandwidth_text, slowdown
from placement.core.topology import ordinals
from placement.runtime import bootstrap, connection
from placement.runtime.probing import another_user, everything_is_free, gpus_seen_by_workers
from placement.wire.files import parse_deployments

EXAMPLE = "deployments.toml"
STARTING = "starting a head, 3 GPU nodes and 2 egress nodes (real Ray, counted GPUs)"


def run(as_json: bool) -> int:
    """Runs the demo.

    Returns:
        The exit code: 0 if every worker got the GPU of its replica's result, and everything was given back.
    """
    with ExitStack() as stack:
        with _step(STARTING) as tell:
            stack.enter_context(demo_cluster.started(tell, ending=_step("stopping the cluster")))
        report = _place()
        with _step("releasing everything"):
            connection.ask(bootstrap.connect().release_all.remote())
            report["all_free"] = everything_is_free()
    _show(report, as_json)
    if not as_json:
        came_back = "afterwards every GPU and egress unit was free"
        common.say(came_back if report["all_free"] else "NOT everything came back")
    return 0 if report["matching"] == report["workers"] and report["all_free"] else 1


def keep(as_json: bool) -> int:
    """Runs the demo up to its placing, and leaves the cluster with what is placed; or finds it as it was left.

    Returns:
        The exit code: 0 if every worker got the GPU that its replica was promised.

    Raises:
        NotDone: the cluster could not be started, or does not answer.
    """
    with progress.Progress("a demo is there; waiting for it to answer", not as_json):
        kept = demo_cluster.kept()
    report: dict[str, Any] = {"workers": 0, "matching": 0}
    if kept is None:
        with ExitStack() as stack:
            with _step(STARTING) as tell:
                kept = demo_cluster.keep(tell)
                stack.callback(_stop_again)
            with common.cluster(kept.address):
                report = _place()
            stack.pop_all()
        _show(report | {"address": kept.address, "pid": kept.pid}, as_json)
    elif as_json:
        common.dump({"address": kept.address, "pid": kept.pid})
    if not as_json:
        common.say(HOW_TO.format("stays" if report["workers"] else "is there already", kept.address))
    return 0 if report["matching"] == report["workers"] else 1


HOW_TO = """
This cluster {}, with what is placed on it. GPU 0 of node pcie is free by now. To try it:

  export RAY_ADDRESS={}
  placement status
  placement dashboard
  placement release llama-70b
  placement apply FILE

`placement demo --stop` ends it, and nothing else."""


def stop(as_json: bool) -> None:
    """Ends the cluster that was left, if there is one.

    Raises:
        NotDone: it does not end.
    """
    with progress.Progress("stopping the demo's cluster", not as_json):
        stopped = demo_cluster.stop()
    if as_json:
        common.dump({"stopped": stopped})
    else:
        common.say("the demo's cluster is stopped" if stopped else "no demo's cluster is there to stop")


def _stop_again() -> None:
    with _step("stopping the cluster"):
        demo_cluster.stop()


def _place() -> dict[str, Any]:
    """Places the example beside another Ray user, on the connected cluster, and asks workers where they are."""
    deployments = parse_deployments(files("placement.cli").joinpath(EXAMPLE).read_text(), ".toml", EXAMPLE)
    with _step("starting the placement service"):
        service = bootstrap.start()
    with _step("another Ray user takes a GPU of node pcie: Ray gives GPU 0"):
        neighbour = another_user("pcie")
    with _step(f"placing {len(deployments)} deployments of {EXAMPLE}"):
        results = connection.ask(service.apply_all.remote(deployments))
        status = connection.ask(service.status.remote())
    with _step("asking a real worker in every bundle which GPU it got") as tell:
        seen = [row for result in results for row in gpus_seen_by_workers(result, tell)]
    neighbour.leave()
    return {
        "status": status,
        "deployments": [result.to_dict() for result in results],
        "seen_by_workers": seen,
        "workers": len(seen),
        "matching": sum(row["got"] == row["promised"] for row in seen),
    }


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        common.dump(report)
    else:
        _tell(report)


def _tell(report: dict[str, Any]) -> None:
    matching, workers = report["matching"], report["workers"]
    verdict = "all as promised" if matching == workers else "NOT as promised"
    common.show(
        "\nWhere each replica is; a bracket is an NVLink island, llama-70b/1 is replica 1 of llama-70b",
        cluster_map(report["status"]),
        _beside_ray(report["deployments"]),
        " * the lowest-numbered free GPUs at that moment, which is what Ray gives without placement\n",
        *(
            f"[bold red]MISMATCH[/] {row}"
            for row in report["seen_by_workers"]
            if row["got"] != row["promised"]
        ),
        f"{matching} of {workers} workers got the GPU or egress node of their replica: {verdict}",
    )


def _beside_ray(deployments: list[dict[str, Any]]) -> FittedTable:
    """Each replica of several GPUs beside what Ray alone would have given it at that moment."""
    table = FittedTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("replica", "node", "placement", "all-reduce", "Ray alone*", "all-reduce", ""):
        table.add_column(heading, no_wrap=True)
    for deployment in deployments:
        for a in deployment["assignments"]:
            if len(a["gpus"]) < 2:
                continue
            table.add_row(
                f"{deployment['deployment']}/{a['replica_index']}",
                a["node_name"],
                f"GPU {ordinals(a['gpus'])}",
                bandwidth_text(a["bandwidth_gb_per_s"], a["weakest_link"], a["upper_bandwidth_gb_per_s"]),
                f"GPU {ordinals(a['ray_gpus'])}",
                bandwidth_text(
                    a["ray_bandwidth_gb_per_s"], a["ray_weakest_link"], a["ray_upper_bandwidth_gb_per_s"]
                ),
                slowdown(a),
            )
    return table


@contextmanager
def _step(text: str) -> Iterator[Any]:
    """A progress line on stderr: what is being done, and how long it took."""
    start = time.monotonic()
    live = progress.is_shown()

    def tell(detail: str) -> None:
        if live:
            progress.rewrite(f"{text} ...", detail and f" {detail}")

    if live:
        tell("")
    else:
        click.echo(f"{text} ...", err=True, nl=False)

    try:
        yield tell
    except BaseException:
        click.echo("", err=True)
        raise
    took = f" {time.monotonic() - start:.1f} s"
    if live:
        progress.rewrite(f"{text}:", took)
    click.echo("" if live else took, err=True)
