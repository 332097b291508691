"""Measured rates beside predicted ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.text import Text

from placement.cli.views.console import FittedTable
from placement.core.topology import ordinals
from placement.errors import counted


def measured_view(report: Mapping[str, Any]) -> list[Any]:
    """A table for each node: its sets with the measured and predicted rates, and what is wrong with them."""
    parts: list[Any] = []
    for node in report["nodes"]:
        parts += _node(node)
    return parts


def _node(node: Mapping[str, Any]) -> Iterator[Any]:
    table = FittedTable(title=f"{node['node']}, all-reduce in GB/s", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("GPUs", no_wrap=True)
    for heading in ("measured", "predicted", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for one in node["sets"]:
        measured, predicted = one["gb_per_s"], one["predicted_gb_per_s"]
        table.add_row(
            ordinals(one["gpus"]),
            f"{measured:.3g}",
            f"{predicted:.3g}",
            f"{100 * measured / predicted:.0f} %",
            Text("suspect", style="red") if one["suspect"] else "",
        )
    for one in node.get("failed", ()):
        table.add_row(ordinals(one["gpus"]), "failed", "", "", Text(one["problem"], style="red"))
    yield table
    if left_out := node.get("left_out"):
        yield f"no time for {counted(left_out, 'set')} more: --max-seconds"


def measured_lines(measured: Sequence[Mapping[str, Any]]) -> list[Text]:
    """For ``topology``: a line for each size of sets, and one for each pair that is suspect."""
    sizes: dict[int, list[Mapping[str, Any]]] = {}
    for one in measured:
        sizes.setdefault(len(one["gpus"]), []).append(one)
    lines = []
    for size, sets in sorted(sizes.items()):
        figures = [_range([one[key] for one in sets]) for key in ("gb_per_s", "predicted_gb_per_s")]
        elsewhere = "" if any(one["own"] for one in sets) else ", on other nodes of this make"
        lines.append(
            Text(
                f"measured{elsewhere}: {counted(len(sets), 'set')} of {size} GPUs, {figures[0]} GB/s; "
                f"predicted {figures[1]}"
            )
        )
    for one in measured:
        if one["suspect"]:
            said = (
                f"GPU {ordinals(one['gpus'])}: {one['gb_per_s']:.3g} of {one['predicted_gb_per_s']:.3g} GB/s"
            )
            lines.append(Text(f"suspect: {said}", style="red"))
    return lines


def _range(figures: Sequence[float]) -> str:
    """``230``, ``19.9 to 230``."""
    least, most = f"{min(figures):.3g}", f"{max(figures):.3g}"
    return least if least == most else f"{least} to {most}"
