"""``placement measure``: measures the real bandwidth of sets of GPUs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from placement.cli import common
from placement.cli.group import Command
from placement.cli.progress import Progress
from placement.errors import (
    CannotMeasure,
    InvalidMeasurement,
    PlacementError,
    ReservationFailed,
    Unplaceable,
    counted,
)

if TYPE_CHECKING:
    from placement.runtime.measuring import Target
    from placement.wire.measurements import Measurement


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement measure --node gpu-a\n  placement measure --sets all-sizes --max-seconds 900\n"
    "  placement measure --import nccl-tests.txt --node gpu-a\n  placement measure --export rates.json\n"
    "  placement measure --forget --node gpu-a",
)
@click.option("--node", help="Only this node: its id, name or address.")
@click.option(
    "--sets",
    type=click.Choice(["pairs", "all-sizes"]),
    default="pairs",
    show_default=True,
    help="All pairs of free GPUs; or also, of each larger size, one of each kind of interchangeable sets.",
)
@click.option(
    "--max-seconds",
    type=common.Seconds(min=1),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="No new set is started after this time; inf for no limit. A set takes 1 to 5 s.",
)
@click.option(
    "--import",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Measure nothing: keep the rates of this file, written by --export or by nccl-tests' all_reduce_perf; "
    "- for stdin.",
)
@click.option(
    "--export",
    "export",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Measure nothing: write the kept rates, of all hosts or of --node; - for stdout.",
)
@click.option(
    "--forget",
    is_flag=True,
    help="Measure nothing: forget the kept rates, of all hosts or of --node. GPUs are chosen by predictions again, or "
    "by the rates of other nodes of the make. --json prints the forgotten rates, for --import.",
)
@common.with_address
@common.with_json
def measure(
    node: str | None,
    sets: str,
    max_seconds: float,
    file: Path | None,
    export: Path | None,
    forget: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Measures a real all-reduce between free GPUs. Shows the measured rate beside the predicted one.

    It holds all free GPUs of a node meanwhile, like a placement, and gives them back however it ends; one node after
    the other. The nodes need PyTorch. The rates are kept: from then on GPUs of that node, and of others of its make,
    are chosen by them, and `placement status` names pairs that reach less than half of their prediction.
    """
    from placement.wire.text import read_input

    if sum((file is not None, export is not None, forget)) > 1:
        raise click.UsageError("--import, --export and --forget exclude each other; give one of them")
    text = None if file is None else read_input(file)
    with common.service(address) as service:
        if export is not None:
            _export(service, node, export)
            return
        if forget:
            _forget(service, node, as_json)
            return
        if text is not None:
            report = _import(service, node, text, str(file))
        else:
            report = _measure(service, node, sets == "pairs", max_seconds, shows=not as_json)
    if as_json:
        common.dump(report)
        return
    from placement.cli.views.measured import measured_view

    common.show(*measured_view(report))


def _targets(service: Any, node: str | None) -> list[Target]:
    """The GPU nodes, or only this one; their GPUs are read again.

    Raises:
        UnknownNode: no GPU node has that id, name or address.
    """
    from placement.runtime import measuring

    return measuring.targets(common.ask(service.topology.remote(node)), common.ask(service.snapshot.remote()))


def _measure(
    service: Any, node: str | None, pairs_only: bool, max_seconds: float, shows: bool
) -> dict[str, Any]:
    """Measures the node, or each that has two GPUs free.

    Raises:
        CannotMeasure, Unplaceable, ReservationFailed: no node could be measured.
    """
    from placement.runtime import measuring
    from placement.runtime.client import Client

    client = Client(service)
    until = time.monotonic() + max_seconds
    targets = _targets(service, node)
    if not targets:
        common.note("the cluster has no GPU nodes")
    outcomes: list[dict[str, Any]] = []
    first: PlacementError | None = None
    for target in targets:
        if time.monotonic() >= until:
            common.note(f"{target.name}: not measured, the time is over")
            continue
        try:
            with Progress(f"measuring {target.name}", shows) as progress:
                found = measuring.measure(client, target, pairs_only, until, progress.note)
        except (CannotMeasure, Unplaceable, ReservationFailed) as error:
            first = first or error
            common.note(str(error))
            continue
        outcomes.append(found.to_dict())
    if not outcomes and first is not None:
        raise first
    return {"nodes": outcomes}


def _import(service: Any, node: str | None, text: str, source: str) -> dict[str, Any]:
    """Makes the service keep the rates of a file.

    Raises:
        InvalidMeasurement: it is not such a file, or not of that node.
    """
    from placement.runtime import measuring
    from placement.wire.measurements import read_measurements

    if text.lstrip().startswith("{"):
        measurements: Sequence[Measurement] = read_measurements(text, source)
    else:
        measurements = _of_nccl_tests(text, source, _targets(service, node), node)
    kept = [one.model_dump(mode="json") for one in measurements]
    common.ask(service.record_measurements.remote(kept))
    return {"nodes": [measuring.as_report(one) for one in measurements]}


def _of_nccl_tests(text: str, source: str, targets: Sequence[Target], node: str | None) -> list[Measurement]:
    """The rates that nccl-tests printed, for the named node, or the node that has the printed host name."""
    from placement.wire.measurements import MeasuredRate, gpus_of, parse_nccl_tests

    rates: dict[str, list[MeasuredRate]] = {}
    by_name = {one.name: one for one in targets}
    for run in parse_nccl_tests(text, source):
        target = targets[0] if node is not None else by_name.get(run.host)
        if target is None:
            raise InvalidMeasurement(
                source, f"no GPU node is called {run.host!r}, as it says; name it with --node"
            )
        rates.setdefault(target.name, []).append(
            MeasuredRate(
                gpus=gpus_of(run, target.bus_ids, len(target.uuids), source),
                gb_per_s=run.gb_per_s,
                message_bytes=run.message_bytes,
                library=run.library,
            )
        )
    return [by_name[name].measurement(found) for name, found in rates.items()]


def _forget(service: Any, node: str | None, as_json: bool) -> None:
    """Makes the service forget measured rates.

    Raises:
        CannotMeasure: nothing was measured on the node.
    """
    found = common.ask(service.forget_measurements.remote(node))
    if node is not None and not found:
        raise CannotMeasure(node, "nothing was measured there; --export - shows what is kept")
    if as_json:
        common.dump({"version": 1, "measurements": found})
    for one in () if as_json else found:
        common.say(f"{one['host']}: forgot {counted(len(one['rates']), 'set')} of GPUs")
    if not found:
        common.note("nothing was measured on any host")


def _export(service: Any, node: str | None, file: Path) -> None:
    """Writes the kept rates.

    Raises:
        CannotMeasure: nothing was measured on the node.
    """
    kept = common.ask(service.measurements.remote())
    if node is not None:
        kept = [one for one in kept if one["host"] == node]
        if not kept:
            raise CannotMeasure(node, "nothing was measured there; leave out --export to do so")
    text = json.dumps({"version": 1, "measurements": kept}, indent=2)
    if file == Path("-"):
        common.say(text)
    else:
        with common.writing("--export", file):
            file.write_text(text + "\n", "utf-8")
        common.note(f"wrote what was measured on {len(kept)} hosts to {file}")
