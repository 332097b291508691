"""One machine: what it is, its islands, its links, what is near, and what each GPU reports."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from rich import box
from rich.text import Text

from placement.cli.views.console import FittedTable
from placement.cli.views.measured import measured_lines
from placement.cli.views.nodes import by_profile
from placement.core.bandwidth import generation
from placement.core.matrix import parse_matrix
from placement.core.topology import Lanes, Topology, ordinals
from placement.errors import counted
from placement.wire.facts import LINK_UP, NodeFacts


def topology_view(report: Mapping[str, Any]) -> list[Any]:
    """One machine: what it is, its islands, its links, what is near, and what each GPU reports."""
    facts = report["facts"] or {}
    heading = Text(report["name"], style="bold")
    source = {"nvml": "read with NVML", "catalogue": "catalogue", "none": "nothing could be read"}
    said = source.get(facts.get("source", ""), "")
    if facts.get("age_seconds") is not None:
        said += f", {facts['age_seconds']:.0f} s ago"
    gpus = facts.get("gpus", ())
    lost = [gpu["ordinal"] for gpu in gpus if gpu["uuid"] is None and gpu["errors"]]
    instances = {gpu["ordinal"]: _instance(gpu) for gpu in gpus if gpu["ordinal"] not in lost}
    profiles = by_profile(instances if gpus else dict.fromkeys(range(report["gpu_count"])))
    whole = profiles.pop(None, [])
    heading.append(f"  {_how_many(report, len(whole), len(lost))}{', ' + said if said else ''}", style="dim")
    parts: list[Any] = [heading]
    if report["known"]:
        islands = "  ".join(f"[{ordinals(island)}]" for island in report["islands"] if island[0] in whole)
        shape = shape_in(report)
        parts.append(f"{'NVSwitch' if report['nvswitch'] else 'NVLink islands'}: {islands}")
        parts.append(Text("  ·  ".join(host_texts(shape, whole)), style="dim"))
    parts += [Text(line, style="dim") for line in nvlink_lines(gpus)]
    if report["known"] or (report["gpu_count"] == 1 and whole):
        parts.append(_links(shape_in(report), whole))
    parts += measured_lines(report.get("measured", ()))
    for profile, slots in profiles.items():
        parts.append(f"MIG {profile}: {'slot' if len(slots) == 1 else 'slots'} {ordinals(slots)}")
    if lost:
        parts.append(f"?: {'slot' if len(lost) == 1 else 'slots'} {ordinals(lost)}")
    for problem in dict.fromkeys((report["problem"], facts.get("problem"))):
        if problem:
            parts.append(Text(problem, style="red"))
    if facts.get("gpus") and facts.get("source") == "nvml":
        parts.append(_gpus(facts["gpus"]))
    return parts


def shape_in(report: Mapping[str, Any]) -> Topology:
    """The machine of a report: as it was read if the report has that, else by its matrix."""
    if report["facts"] and report["facts"]["gpus"]:
        return NodeFacts.model_validate(report["facts"]).topology()
    return replace(parse_matrix(report["matrix"]), model=report["gpu_model"])


def cpu_of(shape: Topology) -> str | None:
    """The processors' product name without its marks: ``Intel Xeon Platinum 8480C``."""
    return (
        " ".join(re.sub(r"\((?:R|TM)\)|\bCPU\b|@.*", " ", shape.cpu, flags=re.IGNORECASE).split())
        if shape.cpu
        else None
    )


def lanes_text(lanes: Lanes | None) -> str:
    """``4.0 x16``: generation and width; ``?`` where unknown."""
    return f"{lanes.generation}.0 x{lanes.width}" if lanes else "?"


def host_texts(shape: Topology, gpus: Sequence[int]) -> list[str]:
    """Facts other than links: the processors, the GPUs' PCIe lanes if all have the same, peer-to-peer, NVLS."""
    said = [f"processors: {cpu_of(shape) or 'not known'}"]
    lanes = {shape.lanes[gpu] for gpu in gpus}
    if len(lanes) == 1:
        (each,) = lanes
        said.append(f"PCIe {lanes_text(each)}" if each else "PCIe lanes: not known")
    if shape.nvswitch and generation(shape.model).nvls_percent:
        said.append(f"NVLS: { ({True: 'on', False: 'off', None: 'not known'}[shape.nvls]) }")
    pairs = [link.peer for a, b in combinations(gpus, 2) if not (link := shape.link(a, b)).nvlinks]
    if pairs:
        with_it, unknown = pairs.count(True), pairs.count(None)
        peer = "not known" if unknown == len(pairs) else "yes" if with_it == len(pairs) else "no"
        if 0 < with_it < len(pairs):
            peer = f"{with_it} of {counted(len(pairs), 'pair')}"
        said.append(
            f"peer-to-peer over PCIe: {peer}{f', {unknown} not known' if 0 < unknown < len(pairs) else ''}"
        )
    return said


def nvlink_lines(gpus: Iterable[Mapping[str, Any]]) -> list[str]:
    """``NVLink 4.0: 17 of 18 links up, 26.6 GB/s each, GPU 1``: one text for GPUs with equal links, if known."""
    alike: dict[str, list[int]] = {}
    for gpu in gpus:
        links = gpu.get("nvlinks") or ()
        states = [link["state"] for link in links]
        up = sum(state in LINK_UP for state in states)
        said = (
            f"NVLink {gpu['nvlink_version'] or '?'}: {'?' if None in states else up} of {len(links)} links up"
        )
        if speeds := sorted({link["mb_per_s"] for link in links} - {None}):
            said += f", {' or '.join(f'{speed / 1000:.3g}' for speed in speeds)} GB/s each"
        if links:
            alike.setdefault(said, []).append(gpu["ordinal"])
    return [f"{said}, GPU {ordinals(ours)}" for said, ours in alike.items()]


def _instance(gpu: Mapping[str, Any]) -> str | None:
    """The profile of the MIG instance that a slot is, ``?`` if unknown; ``None`` for a whole GPU."""
    profile: str | None = gpu["mig_profile"]
    return profile or ("?" if gpu["mig_enabled"] else None)


def _how_many(report: Mapping[str, Any], whole: int, lost: int) -> str:
    """``4 x NVIDIA L40S``, ``1 GPU``, ``2 x NVIDIA A100 80GB PCIe and 11 MIG instances``."""
    parts = []
    if whole:
        model = report.get("gpu_model")
        parts.append(f"{whole} x {model}" if model else "1 GPU" if whole == 1 else f"{whole} GPUs")
    if cut := report["gpu_count"] - whole - lost:
        parts.append("1 MIG instance" if cut == 1 else f"{cut} MIG instances")
    if lost:
        parts.append(f"{lost} x ?")
    return " and ".join(parts)


def _links(shape: Topology, gpus: Sequence[int]) -> FittedTable:
    """One row for each GPU. Network cards would be a dozen columns more, so only the nearest are named."""
    # Sixteen GPUs fit into 100 columns, just.
    table = FittedTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1 if len(gpus) <= 8 else 0, 0, 0))
    table.add_column("GPU", no_wrap=True)
    for gpu in gpus:
        table.add_column(str(gpu), no_wrap=True)
    lanes = len({shape.lanes[gpu] for gpu in gpus}) > 1
    for heading in (*(["PCIe"] if lanes else []), "NUMA", "CPUs", *(["nearest NIC"] if shape.nics else [])):
        table.add_column(heading, overflow="fold", no_wrap=heading == "PCIe")
    for gpu in gpus:
        links = ["X" if other == gpu else str(shape.link(gpu, other)) for other in gpus]
        near = [lanes_text(shape.lanes[gpu])] if lanes else []
        near += [ordinals(shape.numa[gpu]) or "?", ordinals(shape.cpus[gpu]) or "?"]
        table.add_row(str(gpu), *links, *near, *([_nearest_nic(shape, gpu)] if shape.nics else []))
    return table


def _nearest_nic(shape: Topology, gpu: int) -> str:
    """``PIX mlx5_0``, ``PXB NIC0 and 3 more``."""
    path = shape.nearest_nic[gpu]
    first, *more = [nic.name for nic in shape.nics if nic.paths[gpu] is path]
    return f"{path} {first}" + (f" and {len(more)} more" if more else "")


def _gpus(gpus: Iterable[Mapping[str, Any]]) -> FittedTable:
    table = FittedTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("GPU", "minor", "name", "PCI", "memory used", "compute", "MIG", "UUID"):
        table.add_column(heading, no_wrap=True)
    for gpu in gpus:
        used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
        memory = "?" if used is None or total is None else f"{used / 2**30:.1f} of {total / 2**30:.0f} GiB"
        capability = gpu["compute_capability"]
        mig = gpu["mig_profile"] or {True: "on", False: "off", None: "?"}[gpu["mig_enabled"]]
        table.add_row(
            str(gpu["ordinal"]),
            "?" if gpu["minor_number"] is None else str(gpu["minor_number"]),
            gpu["name"] or "?",
            gpu["pci_bus_id"] or "?",
            memory,
            f"{capability[0]}.{capability[1]}" if capability else "?",
            mig,
            gpu["uuid"] or ("lost" if gpu["errors"] else "?"),
        )
    return table
