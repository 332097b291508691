"""Reports as people want to see them. Pure: JSON-ready values in, rich renderables out."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from placement.core.topology import ordinals

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_red", "bright_cyan", "bright_green")


@cache
def console() -> Console:
    """Where everything is printed; 100 columns where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def colour(names: Sequence[str], name: str) -> str:
    """A colour that stays with a deployment throughout a report."""
    return COLOURS[sorted(names).index(name) % len(COLOURS)]


def assignments_table(deployments: Iterable[Mapping[str, Any]], title: str) -> Table:
    """One row for each replica: where it is, on what, over which link, and what Ray alone would have given."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("deployment", "replica", "node", "holds", "weakest link", "Ray alone"):
        table.add_column(heading, no_wrap=heading != "Ray alone")
    for deployment in deployments:
        for a in deployment["assignments"]:
            if a["egress_resource"]:
                holds = f"{a['egress_units']} x {a['egress_resource']}"
            else:
                holds = f"GPU {ordinals(a['gpus'])}"
            table.add_row(
                deployment["deployment"],
                str(a["replica_index"]),
                a["node_name"],
                holds,
                link_text(a["weakest_link"], a["weakest_gb_per_s"]),
                ray_alone(a),
            )
    return table


def link_text(link: str | None, gb_per_s: float | None) -> str:
    """``NV12, 300 GB/s``; empty for a single GPU."""
    if link is None:
        return ""
    return "unknown" if gb_per_s is None else f"{link}, {gb_per_s:g} GB/s"


def ray_alone(assignment: Mapping[str, Any]) -> str:
    """What Ray's own choice would have been, and how much slower its weakest link is."""
    ray_gpus = assignment.get("ray_gpus") or []
    if not ray_gpus or list(ray_gpus) == list(assignment["gpus"]):
        return "the same" if ray_gpus else ""
    text = f"GPU {ordinals(ray_gpus)}"
    ours, theirs = assignment["weakest_gb_per_s"], assignment.get("ray_weakest_gb_per_s")
    if ours and theirs and ours > theirs:
        text += f", {theirs:g} GB/s: {ours / theirs:.0f}x slower"
    return text


def status_view(report: Mapping[str, Any]) -> list[Any]:
    """The nodes, then the deployments."""
    parts: list[Any] = [cluster_map(report)]
    if report["deployments"]:
        rows = [{"deployment": d["name"], "assignments": d["assignments"]} for d in report["deployments"]]
        parts.append(assignments_table(rows, title="deployments"))
        lost = [f"{d['name']} ({d['state']})" for d in report["deployments"] if d["state"] != "placed"]
        if lost:
            parts.append(Text(f"not whole: {', '.join(lost)}", style="bold red"))
    else:
        parts.append("nothing is placed; try `placement apply FILE`")
    return parts


def cluster_map(report: Mapping[str, Any]) -> Table:
    """Each node with its GPUs, one bracket for each NVLink island, and who sits where."""
    names = [deployment["name"] for deployment in report["deployments"]]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column("node", no_wrap=True)
    table.add_column("what")
    for node in report["nodes"]:
        if node["gpu_count"]:
            table.add_row(Text(node["name"], style="bold"), _gpu_heading(node))
            for line in _islands(node, names):
                table.add_row("", line)
        elif node["egress"]:
            table.add_row(Text(node["name"], style="bold"), Text("egress node", style="dim"))
        for egress in node["egress"]:
            table.add_row("", _egress(node["id"], egress, report["deployments"], names))
        if node["problem"]:
            table.add_row("", Text(node["problem"], style="red"))
    return table


def _gpu_heading(node: Mapping[str, Any]) -> Text:
    parts = [f"{node['gpu_count']} x {node['gpu_model'] or 'GPU'}"]
    if not node["topology_known"]:
        parts.append("topology unknown")
    elif node["nvswitch"]:
        parts.append("NVSwitch")
    else:
        sizes = [len(island) for island in node["islands"]]
        islands = (
            f"NVLink islands of {' + '.join(map(str, sizes))}" if len(sizes) > 1 else "one NVLink island"
        )
        parts.append(islands if max(sizes) > 1 else "PCIe only")
    if node["others_unlocated"]:
        parts.append(f"other Ray users hold {node['others_unlocated']} more, on ordinals not looked up yet")
    return Text(", ".join(parts), style="dim")


def _islands(node: Mapping[str, Any], names: Sequence[str]) -> list[Text]:
    """One line for each island with more than one GPU; lone GPUs share a line."""
    islands = node["islands"] or [[gpu["ordinal"] for gpu in node["gpus"]]]
    if max(len(island) for island in islands) == 1:
        islands = [[gpu for island in islands for gpu in island]]
    lines = []
    for island in islands:
        line = Text("[ ")
        occupants = groupby((node["gpus"][ordinal] for ordinal in island), key=_occupant)
        for position, ((state, deployment, replica), gpus) in enumerate(occupants):
            line.append("   " if position else "")
            line.append(f"{ordinals([gpu['ordinal'] for gpu in gpus])} ", style="dim")
            if state == "held":
                line.append(f"{deployment}/{replica}", style=colour(names, deployment))
            else:
                line.append({"other": "(another Ray user)", "free": "free"}[state], style="dim")
        line.append(" ]")
        lines.append(line)
    return lines


def _occupant(gpu: Mapping[str, Any]) -> tuple[str, str, int]:
    return gpu["state"], gpu["deployment"] or "", gpu["replica"] or 0


def _egress(
    node_id: str, egress: Mapping[str, Any], deployments: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> Text:
    line = Text(f"{egress['resource']}: {egress['held']} of {egress['total']} requests")
    for deployment in deployments:
        for a in deployment["assignments"]:
            if a["node"] == node_id and a["egress_resource"] == egress["resource"]:
                line.append("  ")
                tag = f"{deployment['name']}/{a['replica_index']} ({a['egress_units']})"
                line.append(tag, style=colour(names, deployment["name"]))
    return line


def topology_view(report: Mapping[str, Any]) -> list[Any]:
    """One machine: what it is, its islands, its matrix, and what each GPU says of itself."""
    facts = report["facts"] or {}
    heading = Text(report["name"], style="bold")
    source = {"nvml": "read with NVML", "catalogue": "catalogue", "none": "nothing could be read"}
    said = source.get(facts.get("source", ""), "")
    if facts.get("age_seconds") is not None:
        said += f", {facts['age_seconds']:.0f} s ago"
    heading.append(f"  {report['gpu_count']} GPUs{', ' + said if said else ''}", style="dim")
    parts: list[Any] = [heading]
    if report["known"]:
        islands = "  ".join(f"[{ordinals(island)}]" for island in report["islands"])
        parts.append(f"{'NVSwitch' if report['nvswitch'] else 'NVLink islands'}: {islands}")
        parts.append(_matrix(report["matrix"]))
    for problem in dict.fromkeys((report["problem"], facts.get("problem"))):
        if problem:
            parts.append(Text(problem, style="red"))
    if facts.get("gpus") and facts.get("source") == "nvml":
        parts.append(_gpus(facts["gpus"]))
    return parts


def _matrix(text: str) -> Table:
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for cell in rows[0]:
        table.add_column(cell.strip(), no_wrap=True)
    for row in rows[1:]:
        table.add_row(*(cell.strip() for cell in row))
    return table


def _gpus(gpus: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("GPU", "name", "PCI", "memory used", "compute", "MIG", "UUID"):
        table.add_column(heading, no_wrap=True)
    for gpu in gpus:
        used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
        memory = "?" if used is None or total is None else f"{used / 2**30:.1f} of {total / 2**30:.0f} GiB"
        capability = gpu["compute_capability"]
        mig = {True: "on", False: "off", None: "?"}[gpu["mig_enabled"]]
        table.add_row(
            str(gpu["ordinal"]),
            gpu["name"] or "?",
            gpu["pci_bus_id"] or "?",
            memory,
            f"{capability[0]}.{capability[1]}" if capability else "?",
            mig,
            gpu["uuid"] or ("lost" if gpu["errors"] else "?"),
        )
    return table
