"""Tables of where replicas are or would be, and why not; and what happened to them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.text import Text

from placement.cli.views.console import (
    FittedTable,
    few,
    left_out_line,
    padded,
    replicas_text,
    shortened,
)
from placement.core.topology import ordinals
from placement.errors import counted


class AssignmentsTable:
    """One row for each replica and node: its place, what it holds, its bandwidth, and what Ray alone would give.

    Where it is too wide for a terminal, what Ray would give is broken between words, then names lose their middle, then
    the last columns are left out.

    Args:
        deployments: results, or plans.
        title: above the table.
        places: deployment -> its place in the queue, if any replica waits there.
    """

    def __init__(
        self, deployments: Iterable[Mapping[str, Any]], title: str, places: Mapping[str, int] | None = None
    ) -> None:
        listed = list(deployments)
        self._title = title
        self._notes = [*resorted_lines(listed), *waiting_lines(listed, places or {})]
        self._beside_ray = any(a.get("ray_gpus") for one in listed for a in one["assignments"])
        self._rows = [row for one in listed for row in self._rows_of(one)]

    def _rows_of(self, deployment: Mapping[str, Any]) -> Iterator[list[str]]:
        parts = Counter(a["replica_index"] for a in deployment["assignments"])
        for a in deployment["assignments"]:
            ranks = f", ranks {ordinals(a['ranks'])}" if parts[a["replica_index"]] > 1 else ""
            yield [
                deployment["deployment"],
                str(a["replica_index"]),
                a["node_name"],
                holds(a) + ranks,
                bandwidth_text(
                    a["bandwidth_gb_per_s"],
                    a["weakest_link"],
                    a.get("upper_bandwidth_gb_per_s"),
                    a.get("bandwidth_measured", False),
                ),
                *([ray_alone(a)] if self._beside_ray else []),
            ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it. By hand, as rich's table takes seconds for thousands of replicas."""
        if self._rows:
            yield Text(self._title, style="italic")
            yield Text()
            yield from self._lines(options.max_width)
            yield Text()
        for line in self._notes:
            yield Padding(Text(line), (0, 0, 0, 1), expand=False)

    def _lines(self, width: int) -> Iterator[Text]:
        headings = [*HEADINGS, "Ray alone"] if self._beside_ray else HEADINGS
        natural = [max(map(cell_len, column)) for column in zip(headings, *self._rows, strict=True)]
        shown = len(natural)
        while _over(widths := _narrowed(natural[:shown], width), width) and shown > len(KEPT_HEADINGS):
            shown -= 1
        broken = shown > len(HEADINGS)

        def line(cells: Sequence[str], style: str = "") -> Text:
            text = GAP.join(padded(cell, width) for cell, width in zip(cells, widths, strict=True))
            return Text(f" {text.rstrip()}", style=style, no_wrap=True, overflow="ellipsis")

        yield line(headings[:shown], "bold")
        yield Text(" " + "─" * (sum(widths) + len(GAP) * (len(widths) - 1)), no_wrap=True, overflow="crop")
        for row in self._rows:
            cells = [shortened(row[0], widths[0]), row[1], shortened(row[2], widths[2]), *row[3:shown]]
            if not broken:
                yield line(cells)
                continue
            for number, part in enumerate(textwrap.wrap(cells[-1], widths[-1]) or [""]):
                yield line([*([""] * (len(cells) - 1) if number else cells[:-1]), part])
        if left_out := headings[shown:]:
            yield left_out_line(left_out)


def _narrowed(widths: Sequence[int], width: int) -> list[int]:
    """The columns' widths where there are so many columns of the terminal, as near to that as they may come."""
    widths = [*widths]
    if len(widths) > len(HEADINGS):  # what Ray would give is broken between words
        widths[-1] -= min(_over(widths, width), widths[-1] - min(widths[-1], NARROW))
    least = NARROW if len(widths) > len(KEPT_HEADINGS) else NARROWEST
    floors = {0: max(least, len(HEADINGS[0])), 2: least}
    while _over(widths, width) and (wider := [one for one in floors if widths[one] > floors[one]]):
        widths[max(wider, key=widths.__getitem__)] -= 1
    return widths


def _over(widths: Sequence[int], width: int) -> int:
    """By how much a table of such columns is too wide."""
    return max(0, sum(widths) + len(GAP) * (len(widths) - 1) + 2 - width)


GAP = "   "
KEPT_HEADINGS = ["deployment", "replica", "node", "holds"]
HEADINGS = [*KEPT_HEADINGS, "all-reduce"]
NARROW, NARROWEST = 12, 4
"""Columns that names and what Ray would give have at least, before a column is left out; and after."""


def assignments_table(
    deployments: Iterable[Mapping[str, Any]], title: str, places: Mapping[str, int] | None = None
) -> AssignmentsTable:
    """The replicas of deployments; below them those that are slower with engines that sort GPUs, and what waits."""
    return AssignmentsTable(deployments, title, places)


def waiting_lines(deployments: Iterable[Mapping[str, Any]], places: Mapping[str, int]) -> list[str]:
    """Pending replicas, why, and their place in the queue: a line for each reason of a deployment."""
    lines = []
    for one in deployments:
        reasons: dict[str, list[int]] = {}
        for index, reason in one.get("pending", {}).items():
            reasons.setdefault(reason, []).append(int(index))
        place = places.get(one["deployment"])
        where = f", {place_text(place)}" if place else ""
        for reason, indices in reasons.items():
            verb = "is" if len(indices) == 1 else "are"
            lines.append(f"{one['deployment']}: {replicas_text(indices)} {verb} pending{where}: {reason}")
    return lines


def resorted_lines(deployments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which tensor-parallel groups change if an engine sorts a node's GPUs, and the bandwidth that it then loses."""
    lines = []
    for one in deployments:
        for a in one["assignments"]:
            ours, theirs = a["bandwidth_gb_per_s"], a.get("sorted_bandwidth_gb_per_s")
            if not ours or not theirs or theirs >= ours:
                continue
            gpus, size = a["gpus"], a["set_size"] or len(a["gpus"])
            groups = " and ".join(ordinals(gpus[i : i + size]) for i in range(0, len(gpus), size))
            lines.append(
                f"{one['deployment']}: replica {a['replica_index']} on {a['node_name']} has groups {groups}; an engine "
                f"that sorts GPUs, as vLLM does, reaches {theirs:.3g} GB/s instead of {ours:.3g}"
            )
    return lines


def links_view(links: Sequence[Mapping[str, Any]], group: str, bounded: bool = False) -> list[Any]:
    """The route between each two replicas of a group that talk; a line for each.

    Args:
        links: as ``wire.groups.links_of`` has them.
        group: its name.
        bounded: the search for the places was cut off.
    """
    lines = []
    for one in links:
        speed = "" if one["gb_per_s"] is None else f", {one['gb_per_s']:.3g} GB/s"
        via = "" if one["route"].startswith("network") and one["via"] == "network" else f" via {one['via']}"
        lines.append(f"{' - '.join(one['between'])}: {one['route']}{speed}{via}")
    note = " (the search was cut off: there may be better places)" if bounded else ""
    title = Text(f"group {group}, slowest route of each two that talk{note}", style="italic")
    return [title, *(Padding(Text(line), (0, 0, 0, 1), expand=False) for line in lines)] if lines else []


def place_text(place: int) -> str:
    """``next in the queue``, ``place 3 in the queue``."""
    return "next in the queue" if place == 1 else f"place {place} in the queue"


def holds(a: Mapping[str, Any]) -> str:
    """``GPU 0-3``, ``GPU 0, 0.25 of GPU 1``, ``MIG 1g.10gb, slot 4``, ``16 x egress_openai``, ``4 CPUs``."""
    if cpus := a.get("cpus"):  # an older service does not report it
        memory = f", {a['memory_bytes'] / 2**30:.3g} GiB" if a["memory_bytes"] else ""
        return f"{cpus:g} CPU{'s' * (cpus != 1)}{memory}"
    if a["egress_resource"]:
        return f"{a['egress_units']} x {a['egress_resource']}"
    if a["mig"]:
        return f"MIG {a['mig']}, slot {ordinals(a['gpus'])}"
    parts: dict[float, list[int]] = {}
    for gpu, part in taken(a).items():
        parts.setdefault(part, []).append(gpu)
    return ", ".join(
        f"{f'{part:g} of ' if part < 1 else ''}GPU {ordinals(gpus)}"
        for part, gpus in sorted(parts.items(), reverse=True)
    )


def whole_gpus(a: Mapping[str, Any]) -> list[int]:
    """The GPUs of the ranks that have whole ones; all, if all ranks have the same share."""
    shares = a.get("shares")
    return (
        [gpu for gpu, share in zip(a["gpus"], shares, strict=True) if share == 1] if shares else [*a["gpus"]]
    )


def taken(a: Mapping[str, Any]) -> dict[int, float]:
    """GPU -> the part of it that a replica has on a node."""
    parts: Counter[int] = Counter()
    for gpu, share in zip(a["gpus"], a.get("shares") or [a.get("share", 1.0)] * len(a["gpus"]), strict=True):
        parts[gpu] += round(share * 1000)
    return {gpu: part / 1000 for gpu, part in sorted(parts.items())}


def bandwidth_text(
    gb_per_s: float | None, weakest_link: str | None, upper: float | None = None, measured: bool = False
) -> str:
    """``230 GB/s, NV12``, ``225 GB/s measured, NV12``, ``4.04 to 19.7 GB/s, NODE`` if only a range is known; empty
    for a single GPU.
    """
    if weakest_link is None:
        return ""
    if gb_per_s is None:
        return "unknown"
    return f"{_range(gb_per_s, upper)} GB/s{' measured' * measured}, {weakest_link}"


def _range(least: float, most: float | None) -> str:
    return f"{least:.3g}" if most is None else f"{least:.3g} to {most:.3g}"


def slowdown(assignment: Mapping[str, Any]) -> str:
    """How much slower Ray's own choice would have been, at least."""
    ours, theirs = assignment["bandwidth_gb_per_s"], assignment.get("ray_bandwidth_gb_per_s")
    if not ours or not theirs or ours <= theirs:
        return "the same"
    ratio = ours / theirs
    if upper := assignment.get("ray_upper_bandwidth_gb_per_s"):
        ratio = min(ratio, (assignment.get("upper_bandwidth_gb_per_s") or ours) / upper)
        if ratio <= 1:
            return "perhaps slower"
    slower = f"{ratio:.0f}x slower" if ratio >= 10 else f"{ratio:.1f}x slower"
    return f"at least {slower}" if upper else slower


def ray_alone(assignment: Mapping[str, Any]) -> str:
    """What Ray's own choice would have been, and how much slower it is."""
    ray_gpus = assignment.get("ray_gpus") or []
    if not ray_gpus or list(ray_gpus) == whole_gpus(assignment):
        return "the same" if ray_gpus else ""
    text = f"{'slot' if assignment['mig'] else 'GPU'} {ordinals(ray_gpus)}"
    if (slower := slowdown(assignment)) != "the same":
        theirs = assignment["ray_bandwidth_gb_per_s"], assignment.get("ray_upper_bandwidth_gb_per_s")
        text += f", {_range(*theirs)} GB/s: {slower}"
    return text


def runtimes_note(deployments: Iterable[Mapping[str, Any]]) -> Text:
    """The runtime of each deployment: one line for each source, as a column would make the tables too wide."""
    said: dict[str, dict[str, list[str]]] = {}
    for one in deployments:
        if "runtime_from" not in one:  # an older service does not report it
            continue
        name = one.get("deployment") or one["name"]
        said.setdefault(one["runtime_from"], {}).setdefault(one["runtime"], []).append(name)
    lines = []
    for source, runtimes in sorted(said.items()):
        each = "; ".join(f"{runtime} for {few(names, 5)}" for runtime, names in sorted(runtimes.items()))
        lines.append(f"runtime {source}: {each}")
    return Text("\n".join(lines))


def explanation_view(explained: Mapping[str, Any]) -> list[Any]:
    """Stage by stage, how many nodes were left and why the others were excluded."""
    why = explained["explanation"]
    table = FittedTable(
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


def event_line(event: Mapping[str, Any], of_all: bool = False) -> Text:
    """One thing that happened to a deployment, or a decision; ``of_all`` says about which."""
    at = datetime.fromtimestamp(event["at"]).strftime("%Y-%m-%d %H:%M:%S")
    who = event.get("call") or ("" if event["replica"] is None else f"replica {event['replica']}")
    name = f"{event['deployment']:20} " if of_all else ""
    caller = event.get("caller", {})
    known = {"user": "{}", "address": "at {}", "job": "in job {}"}
    by = " ".join(form.format(caller[key]) for key, form in known.items() if key in caller)
    said = f"{event['text']} (asked by {by})" if by else event["text"]
    line = f"{at}  {name}{who:12} {event['state']:10} {said}".rstrip()
    # What was refused, and who asked, may be called anything. One line each, for grep; a terminal breaks it.
    return Text("".join(one if one.isprintable() else " " for one in line), no_wrap=True)
