"""``placement demo``: what placement does, shown on an embedded cluster of simulated nodes."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.resources import files
from typing import Any

import click
from rich import box
from rich.table import Table

from placement.cli import streams
from placement.cli.views.console import console
from placement.cli.views.nodes import cluster_map
from placement.cli.views.tables import bandwidth_text, slowdown
from placement.core.topology import ordinals
from placement.runtime import bootstrap, connection
from placement.runtime.embedded import SimulatedNode, embedded_cluster
from placement.runtime.probing import another_user, everything_is_free, gpus_seen_by_workers
from placement.wire.files import parse_deployments

NODES = (
    SimulatedNode("dgx", topology="dgx-1v"),
    SimulatedNode("hgx", topology="dgx-h100"),
    SimulatedNode("pcie", topology="a100-pcie-4x"),
    SimulatedNode("egress-a", resources={"egress_openai": 32, "egress_anthropic": 16, "egress_gemini": 16}),
    SimulatedNode("egress-b", resources={"egress": 32}),
)
EXAMPLE = "deployments.toml"


def run(as_json: bool) -> int:
    """Runs the demo.

    Returns:
        The exit code: 0 if every worker got the GPU of its replica's result, and everything was given back.
    """
    deployments = parse_deployments(files("placement.cli").joinpath(EXAMPLE).read_text(), ".toml", EXAMPLE)
    with ExitStack() as stack:
        with (
            _step("starting a head, 3 GPU nodes and 2 egress nodes (real Ray, counted GPUs)") as tell,
            _uninterrupted() as let_through,
        ):

            def next_node(name: str) -> None:
                let_through()
                tell(name)

            cluster = embedded_cluster(NODES, progress=next_node)
            cluster.__enter__()
            stack.callback(_stop, cluster)
        report = _show(deployments)
    if as_json:
        click.echo(json.dumps(report, indent=2, allow_nan=False), file=streams.out())
    else:
        _tell(report)
    return 0 if report["matching"] == report["workers"] and report["all_free"] else 1


def _stop(cluster: AbstractContextManager[Any]) -> None:
    with _step("stopping the cluster"), _uninterrupted():
        cluster.__exit__(None, None, None)


def _show(deployments: list[Any]) -> dict[str, Any]:
    with _step("starting the placement service"):
        service = bootstrap.start()
    with _step("another Ray user takes a GPU of node pcie: Ray gives GPU 0"):
        neighbour = another_user("pcie")
    with _step(f"placing {len(deployments)} deployments of {EXAMPLE}"):
        results = connection.ask(service.apply_all.remote(deployments))
        status = connection.ask(service.status.remote())
    with _step("asking a real worker in every bundle which GPU it got") as tell:
        seen = [row for result in results for row in gpus_seen_by_workers(result, tell)]
    with _step("releasing everything"):
        connection.ask(service.release_all.remote())
        neighbour.leave()
        all_free = everything_is_free()
    return {
        "status": status,
        "deployments": [result.to_dict() for result in results],
        "seen_by_workers": seen,
        "workers": len(seen),
        "matching": sum(row["got"] == row["promised"] for row in seen),
        "all_free": all_free,
    }


def _tell(report: dict[str, Any]) -> None:
    out = console()
    out.print("\nWhere each replica is; a bracket is an NVLink island, llama-70b/1 is replica 1 of llama-70b")
    out.print(cluster_map(report["status"]))
    out.print(_beside_ray(report["deployments"]))
    out.print(" * the lowest-numbered free GPUs at that moment, which is what Ray gives without placement\n")
    matching, workers = report["matching"], report["workers"]
    for row in report["seen_by_workers"]:
        if row["got"] != row["promised"]:
            out.print(f"[bold red]MISMATCH[/] {row}")
    verdict = "all as promised" if matching == workers else "NOT as promised"
    out.print(f"{matching} of {workers} workers got the GPU or egress node of their replica: {verdict}")
    out.print(
        "afterwards every GPU and egress unit was free" if report["all_free"] else "NOT everything came back"
    )


def _beside_ray(deployments: list[dict[str, Any]]) -> Table:
    """Each replica of several GPUs beside what Ray alone would have given it at that moment."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
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
def _uninterrupted() -> Iterator[Callable[[], None]]:
    """Delays Ctrl-C and SIGTERM until the end of the block, or until the function that it yields is called.

    Ray cannot stop a node whose start was interrupted, and an interrupted clean-up leaves processes behind.
    """
    held_back: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: held_back.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }

    def let_through() -> None:
        if held_back:
            number = held_back.pop()
            handler = before[signal.Signals(number)]
            if callable(handler):
                handler(number, None)

    try:
        yield let_through
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    let_through()


@contextmanager
def _step(text: str) -> Iterator[Any]:
    """A progress line on stderr: what is being done, and how long it took."""
    start = time.monotonic()
    live = sys.stderr.isatty()
    click.echo(f"{text} ...", err=True, nl=False)

    def tell(detail: str) -> None:
        if live:
            click.echo(f"\r\033[K{text} ... {detail}", err=True, nl=False)

    try:
        yield tell
    except BaseException:
        click.echo("", err=True)
        raise
    click.echo(f"\r\033[K{text}: " if live else " ", err=True, nl=False)
    click.echo(f"{time.monotonic() - start:.1f} s", err=True)
