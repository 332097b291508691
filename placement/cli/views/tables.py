"""Reports as people want to see them. Pure: JSON-ready values in, rich renderables out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from placement.cli import streams
from placement.core.matrix import parse_matrix
from placement.core.topology import Topology, ordinals
from placement.errors import counted

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_red", "bright_cyan", "bright_green")


def console() -> Console:
    """Where everything is printed; 100 columns where it is not a terminal."""
    out = streams.out()
    return Console(file=out, width=None if out.isatty() else 100, highlight=False)


def colour(names: Sequence[str], name: str) -> str:
    """A colour that stays with a deployment throughout a report."""
    return COLOURS[sorted(names).index(name) % len(COLOURS)]


def assignments_table(deployments: Iterable[Mapping[str, Any]], title: str) -> Table:
    """One row for each replica and node: where it is, on what, how fast that is, and what Ray alone would give."""
    listed = list(deployments)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("deployment", "replica", "node", "holds", "all-reduce"):
        table.add_column(heading, no_wrap=True)
    beside_ray = any(a.get("ray_gpus") for deployment in listed for a in deployment["assignments"])
    if beside_ray:
        table.add_column("Ray alone")
    for deployment in listed:
        parts = Counter(a["replica_index"] for a in deployment["assignments"])
        for a in deployment["assignments"]:
            ranks = f", ranks {ordinals(a['ranks'])}" if parts[a["replica_index"]] > 1 else ""
            table.add_row(
                deployment["deployment"],
                str(a["replica_index"]),
                a["node_name"],
                _holds(a) + ranks,
                bandwidth_text(a["bandwidth_gb_per_s"], a["weakest_link"]),
                *([ray_alone(a)] if beside_ray else []),
            )
    waiting = [
        f"{deployment['deployment']}: replica {index} is pending: {reason}"
        for deployment in listed
        for index, reason in deployment.get("pending", {}).items()
    ]
    if waiting:
        table.caption, table.caption_justify = Text("\n".join(waiting)), "left"
    return table


def _holds(a: Mapping[str, Any]) -> str:
    """``GPU 0-3``, ``0.25 of GPU 1``, ``MIG 1g.10gb, slot 4``, ``16 x egress_openai``."""
    if a["egress_resource"]:
        return f"{a['egress_units']} x {a['egress_resource']}"
    if a["mig"]:
        return f"MIG {a['mig']}, slot {ordinals(a['gpus'])}"
    share = f"{a['share']:g} of " if a["share"] < 1 else ""
    return f"{share}GPU {ordinals(a['gpus'])}"


def bandwidth_text(gb_per_s: float | None, weakest_link: str | None) -> str:
    """``230 GB/s, NV12``; empty for a single GPU."""
    if weakest_link is None:
        return ""
    return "unknown" if gb_per_s is None else f"{gb_per_s:.3g} GB/s, {weakest_link}"


def slowdown(assignment: Mapping[str, Any]) -> str:
    """How much slower Ray's own choice would have been."""
    ours, theirs = assignment["bandwidth_gb_per_s"], assignment.get("ray_bandwidth_gb_per_s")
    if not ours or not theirs or ours <= theirs:
        return "the same"
    ratio = ours / theirs
    return f"{ratio:.0f}x slower" if ratio >= 10 else f"{ratio:.1f}x slower"


def ray_alone(assignment: Mapping[str, Any]) -> str:
    """What Ray's own choice would have been, and how much slower it is."""
    ray_gpus = assignment.get("ray_gpus") or []
    if not ray_gpus or list(ray_gpus) == list(assignment["gpus"]):
        return "the same" if ray_gpus else ""
    text = f"{'slot' if assignment['mig'] else 'GPU'} {ordinals(ray_gpus)}"
    if (slower := slowdown(assignment)) != "the same":
        text += f", {assignment['ray_bandwidth_gb_per_s']:.3g} GB/s: {slower}"
    return text


def runtimes_note(deployments: Iterable[Mapping[str, Any]]) -> Text:
    """What each deployment runs on: one line for each way to say so, as a column would make the tables too wide."""
    said: dict[str, dict[str, list[str]]] = {}
    for one in deployments:
        if "runtime_from" not in one:  # an older service does not say
            continue
        name = one.get("deployment") or one["name"]
        said.setdefault(one["runtime_from"], {}).setdefault(one["runtime"], []).append(name)
    lines = []
    for source, runtimes in sorted(said.items()):
        each = "; ".join(f"{runtime} for {', '.join(names)}" for runtime, names in sorted(runtimes.items()))
        lines.append(f"runtime {source}: {each}")
    return Text("\n".join(lines))


def explanation_view(explained: Mapping[str, Any]) -> list[Any]:
    """Stage by stage, how many nodes were left and what excluded the others."""
    why = explained["explanation"]
    table = Table(
        title=f"{explained['deployment']}: {counted(why['nodes'], 'node')}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("stage", "left", "excluded"):
        table.add_column(heading, justify="right" if heading == "left" else "left")
    for stage in why["stages"]:
        reasons = "\n".join(f"{count}: {reason}" for reason, count in stage["excluded"].items())
        table.add_row(stage["name"], str(stage["kept"]), reasons)
    parts: list[Any] = [table]
    if why["nearest_miss"]:
        parts.append(Text(f"nearest miss: {why['nearest_miss']}"))
    if why["advice"]:
        parts.append(Text(f"what would help: {why['advice']}"))
    return parts


def status_view(report: Mapping[str, Any]) -> list[Any]:
    """The nodes, then the deployments."""
    parts: list[Any] = [cluster_map(report)]
    if report["deployments"]:
        rows = [{"deployment": d["name"], "assignments": d["assignments"]} for d in report["deployments"]]
        parts.append(assignments_table(rows, title="deployments"))
        parts.append(runtimes_note(report["deployments"]))
        lost = [f"{d['name']} ({d['state']})" for d in report["deployments"] if d["state"] != "placed"]
        if lost:
            parts.append(Text(f"not whole: {', '.join(lost)}", style="bold red"))
        for d in report["deployments"]:
            for replica, reason in d.get("pending", {}).items():
                parts.append(Text(f"{d['name']} replica {replica}: {reason}"))
    else:
        parts.append("nothing is placed; try `placement apply FILE`")
    parts += [Text(one["problem"], style="bold red") for one in report.get("unreadable", [])]
    return parts


def cluster_map(report: Mapping[str, Any]) -> Table:
    """Each node with its GPUs, one bracket for each NVLink island or MIG profile, and who sits where."""
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
    profiles = _by_profile({gpu["ordinal"]: gpu["mig"] for gpu in node["gpus"] if not gpu.get("problem")})
    whole = len(profiles.pop(None, ()))
    lost = len(_lost(node))
    parts = [f"{whole} x {node['gpu_model'] or 'GPU'}"] if whole or not (profiles or lost) else []
    if whole > 1 or not (profiles or lost):
        parts.append(_how_linked(node))
    if profiles:
        cut = "MIG " + ", ".join(f"{len(slots)} x {profile}" for profile, slots in profiles.items())
        parts.append(cut if whole else f"{cut} of {node['gpu_model'] or 'GPUs'}")
    if lost:
        parts.append(f"{lost} x ?")
    if node["others_unlocated"]:
        parts.append(f"other Ray users hold {node['others_unlocated']} more, on ordinals not looked up yet")
    return Text(", ".join(parts), style="dim")


def _how_linked(node: Mapping[str, Any]) -> str:
    if not node["topology_known"]:
        return "topology unknown"
    if node["nvswitch"]:
        return "NVSwitch"
    sizes = [len(island) for island in _whole_islands(node)]
    if max(sizes) == 1:
        return "PCIe only"
    return f"NVLink islands of {' + '.join(map(str, sizes))}" if len(sizes) > 1 else "one NVLink island"


def _by_profile(instances: Mapping[int, str | None]) -> dict[str | None, list[int]]:
    """Profile -> the slots that are such MIG instances; ``None`` -> the whole GPUs."""
    found: dict[str | None, list[int]] = {}
    for slot, profile in instances.items():
        found.setdefault(profile, []).append(slot)
    return found


def _lost(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The GPUs on which nothing is placed, since nobody can tell what they are."""
    return [gpu for gpu in node["gpus"] if gpu.get("problem")]


def _whole_islands(node: Mapping[str, Any]) -> list[list[int]]:
    """The NVLink islands of the whole GPUs; they are one where the topology is unknown."""
    whole = [gpu["ordinal"] for gpu in node["gpus"] if gpu["mig"] is None and not gpu.get("problem")]
    islands = [[gpu for gpu in island if gpu in whole] for island in node["islands"] or [whole]]
    return [island for island in islands if island]


def _islands(node: Mapping[str, Any], names: Sequence[str]) -> list[Text]:
    """One line for each island with more than one GPU, lone GPUs share a line; then MIG profiles; then lost GPUs."""
    islands = _whole_islands(node)
    if islands and max(len(island) for island in islands) == 1:
        islands = [[gpu for island in islands for gpu in island]]
    lines = [_bracket([node["gpus"][ordinal] for ordinal in island], names) for island in islands]
    profiles = _by_profile({gpu["ordinal"]: gpu["mig"] for gpu in node["gpus"] if not gpu.get("problem")})
    for profile, slots in profiles.items():
        if profile is not None:
            lines.append(_bracket([node["gpus"][slot] for slot in slots], names, f"{profile}: "))
    lost = _lost(node)
    return [*lines, _bracket(lost, names)] if lost else lines


def _bracket(gpus: Iterable[Mapping[str, Any]], names: Sequence[str], title: str = "") -> Text:
    """``[ 0 free   1-2 qwen/0 ]``; equally used GPUs side by side are told together."""
    line = Text(f"[ {title}")
    for position, ((state, occupants), alike) in enumerate(groupby(gpus, key=_use)):
        line.append("   " if position else "")
        line.append(f"{ordinals([gpu['ordinal'] for gpu in alike])} ", style="dim")
        if state != "held":
            line.append({"other": "(another Ray user)", "free": "free", "unknown": "?"}[state], style="dim")
        for number, (deployment, replica, share) in enumerate(occupants):
            line.append(", " if number else "")
            part = f" {share:g}" if share < 1 else ""
            line.append(f"{deployment}/{replica}{part}", style=colour(names, deployment))
        rest = 1 - sum(share for *_, share in occupants)
        if occupants and rest > 1e-6:
            line.append(f", {rest:g} left", style="dim")
    line.append(" ]")
    return line


def _use(gpu: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, int, float], ...]]:
    who = ((one["deployment"], one["replica"], one["share"]) for one in gpu["occupants"])
    return gpu["state"], tuple(who)


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
    """One machine: what it is, its islands, its links, what is near, and what each GPU says of itself."""
    facts = report["facts"] or {}
    heading = Text(report["name"], style="bold")
    source = {"nvml": "read with NVML", "catalogue": "catalogue", "none": "nothing could be read"}
    said = source.get(facts.get("source", ""), "")
    if facts.get("age_seconds") is not None:
        said += f", {facts['age_seconds']:.0f} s ago"
    gpus = facts.get("gpus", ())
    lost = [gpu["ordinal"] for gpu in gpus if gpu["uuid"] is None and gpu["errors"]]
    instances = {gpu["ordinal"]: _instance(gpu) for gpu in gpus if gpu["ordinal"] not in lost}
    profiles = _by_profile(instances if gpus else dict.fromkeys(range(report["gpu_count"])))
    whole = profiles.pop(None, [])
    heading.append(f"  {_how_many(report, len(whole), len(lost))}{', ' + said if said else ''}", style="dim")
    parts: list[Any] = [heading]
    if report["known"]:
        islands = "  ".join(f"[{ordinals(island)}]" for island in report["islands"] if island[0] in whole)
        parts.append(f"{'NVSwitch' if report['nvswitch'] else 'NVLink islands'}: {islands}")
    if report["known"] or (report["gpu_count"] == 1 and whole):
        parts.append(_links(parse_matrix(report["matrix"]), whole))
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


def _links(shape: Topology, gpus: Sequence[int]) -> Table:
    """One row for each GPU. Network cards would be a dozen columns more, so only the nearest are named."""
    # Sixteen GPUs fit into 100 columns, just.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1 if len(gpus) <= 8 else 0, 0, 0))
    table.add_column("GPU", no_wrap=True)
    for gpu in gpus:
        table.add_column(str(gpu), no_wrap=True)
    for heading in ("NUMA", "CPUs", *(["nearest NIC"] if shape.nics else [])):
        table.add_column(heading, overflow="fold")
    for gpu in gpus:
        links = ["X" if other == gpu else str(shape.link(gpu, other)) for other in gpus]
        near = [ordinals(shape.numa[gpu]) or "?", ordinals(shape.cpus[gpu]) or "?"]
        table.add_row(str(gpu), *links, *near, *([_nearest_nic(shape, gpu)] if shape.nics else []))
    return table


def _nearest_nic(shape: Topology, gpu: int) -> str:
    """``PIX mlx5_0``, ``PXB NIC0 and 3 more``."""
    path = shape.nearest_nic[gpu]
    first, *more = [nic.name for nic in shape.nics if nic.paths[gpu] is path]
    return f"{path} {first}" + (f" and {len(more)} more" if more else "")


def _gpus(gpus: Iterable[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("GPU", "name", "PCI", "memory used", "compute", "MIG", "UUID"):
        table.add_column(heading, no_wrap=True)
    for gpu in gpus:
        used, total = gpu["memory_used_bytes"], gpu["memory_total_bytes"]
        memory = "?" if used is None or total is None else f"{used / 2**30:.1f} of {total / 2**30:.0f} GiB"
        capability = gpu["compute_capability"]
        mig = gpu["mig_profile"] or {True: "on", False: "off", None: "?"}[gpu["mig_enabled"]]
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


def simulation_view(reports: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """What became of a workload under each policy: the sums, the course, and why deployments were refused."""
    names = list(reports)
    sums = Table(box=box.SIMPLE_HEAD, title="simulated", title_justify="left", title_style="bold")
    sums.add_column("")
    for name in names:
        sums.add_column(name, justify="right")

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

    course = Table(box=box.SIMPLE_HEAD, title="over time, GPUs", title_justify="left", title_style="bold")
    course.add_column("hours", justify="right")
    course.add_column("asked for", justify="right")
    for name in names:
        course.add_column(f"allocated\n{name}", justify="right")
        course.add_column("fragmented", justify="right")
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
        refused = Table(
            box=box.SIMPLE_HEAD, title="refused, by the last reason that left no node", title_justify="left"
        )
        refused.add_column("reason")
        for name in names:
            refused.add_column(name, justify="right")
        for reason in sorted(
            reasons, key=lambda one: (-max(r["refusals"].get(one, 0) for r in reports.values()), one)
        ):
            counts = [str(report["refusals"].get(reason, 0)) for report in reports.values()]
            refused.add_row(Text(reason), *counts)
        shown.append(refused)
    return shown


def _part(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def event_line(event: Mapping[str, Any]) -> Text:
    """One thing that happened to a deployment."""
    at = datetime.fromtimestamp(event["at"]).strftime("%Y-%m-%d %H:%M:%S")
    who = "" if event["replica"] is None else f"replica {event['replica']}"
    return Text(f"{at}  {who:12} {event['state']:10} {event['text']}".rstrip())
