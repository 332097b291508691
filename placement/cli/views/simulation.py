"""The results of a workload under each policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.text import Text

from placement.cli.views.console import FittedTable


def simulation_view(reports: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What became of a workload under each policy: the sums, the course, and why deployments were refused."""
    names = list(reports)
    sums = FittedTable(box=box.SIMPLE_HEAD, title="simulated", title_justify="left", title_style="bold")
    sums.add_column("")
    for name in names:
        sums.add_column(name, justify="right", no_wrap=True)

    def row(label: str, value: Callable[[Mapping[str, Any]], str]) -> None:
        sums.add_row(label, *(value(reports[name]) for name in names))

    def mean(report: Mapping[str, Any], field: str) -> str:
        values = [moment[field] for moment in report["moments"]]
        average = sum(values) / len(values)
        return f"{average:.1f} ({_part(average / report['gpus'] if report['gpus'] else None)})"

    row("GPUs", lambda report: str(report["gpus"]))
    row("deployments placed", lambda report: str(report["placed"]))
    row("deployments refused", lambda report: str(report["refused"]))
    row("allocated GPUs, mean", lambda report: mean(report, "allocated_gpus"))
    row("fragmented GPUs, mean", lambda report: mean(report, "fragmented_gpus"))
    row("bandwidth of the best possible, mean", lambda report: _part(report["bandwidth_of_best_mean"]))
    row("bandwidth of the best possible, worst", lambda report: _part(report["bandwidth_of_best_worst"]))

    for route in dict.fromkeys(route for report in reports.values() for route in report.get("routes", ())):
        of_route = (str(reports[name].get("routes", {}).get(route, 0)) for name in names)
        sums.add_row(f"groups whose slowest route is {route}", *of_route)

    course = FittedTable(
        box=box.SIMPLE_HEAD, title="over time, GPUs", title_justify="left", title_style="bold"
    )
    course.add_column("hours", justify="right", no_wrap=True)
    course.add_column("asked for", justify="right", no_wrap=True)
    for name in names:
        course.add_column(f"allocated\n{name}", justify="right", no_wrap=True)
        course.add_column("fragmented", justify="right", no_wrap=True)
    moments = reports[names[0]]["moments"]
    for i in sorted({len(moments) * tenth // 10 for tenth in range(10)} | {len(moments) - 1}):
        cells = [f"{moments[i]['at_seconds'] / 3600:.2f}", f"{moments[i]['asked_gpus']:.1f}"]
        for name in names:
            moment = reports[name]["moments"][i]
            cells += [f"{moment['allocated_gpus']:.1f}", f"{moment['fragmented_gpus']:.1f}"]
        course.add_row(*cells)

    shown: list[Any] = [sums, course]
    reasons = {reason for report in reports.values() for reason in report["refusals"]}
    if reasons:
        refused = FittedTable(
            box=box.SIMPLE_HEAD, title="refused, by the last reason that left no node", title_justify="left"
        )
        refused.add_column("reason")
        for name in names:
            refused.add_column(name, justify="right", no_wrap=True)
        for reason in sorted(
            reasons, key=lambda one: (-max(r["refusals"].get(one, 0) for r in reports.values()), one)
        ):
            counts = [str(report["refusals"].get(reason, 0)) for report in reports.values()]
            refused.add_row(Text(reason), *counts)
        shown.append(refused)
    return shown


def _part(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
