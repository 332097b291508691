"""Each node with its GPUs, one bracket for each NVLink island or MIG profile, and the replicas on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from placement.cli.views.brackets import Part, bracket, filled
from placement.cli.views.console import age_text, colours, host_list, padded, shortened
from placement.core.topology import ordinals
from placement.errors import counted

MOST_NODES = 40
"""With more nodes each has one line."""
ALIKE = 4
"""This many nodes of one kind on which nothing is placed are shown in one line."""

Node = Mapping[str, Any]


class ClusterMap:
    """The nodes of a report, as wide as the console is.

    With few of them each island of GPUs has a bracket of its own; with many each node has a line. Nodes of one kind on
    which nothing is placed come last, together.

    Args:
        report: the service's report.
    """

    def __init__(self, report: Mapping[str, Any]) -> None:
        self._report = report
        self._colours = colours(one["name"] for one in report["deployments"])
        self._nodes = [
            node
            for node in report["nodes"]
            if node["gpu_count"] or node["egress"] or _cpus_held(node) or died_text(node)
        ]
        self._on_cpus: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        self._egress: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
        for one in report["deployments"]:
            for a in one["assignments"]:
                if a.get("egress_resource"):
                    here = self._egress.setdefault((a["node"], a["egress_resource"]), [])
                    here.append((one["name"], a))
                if a.get("cpus"):
                    self._on_cpus.setdefault(a["node"], []).append((one["name"], a))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it."""
        width = options.max_width
        busy, idle = idle_apart(self._nodes)
        lines = self._compact(busy, width) if len(busy) > MOST_NODES else self._large(busy, idle, width)
        yield Text()
        for line in [*lines, *self._groups(idle, width)]:
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line
        yield Text()

    # -- few nodes: islands -----------------------------------------------------------------------

    def _large(self, nodes: Sequence[Node], idle: Mapping[Any, Sequence[Node]], width: int) -> Iterator[Text]:
        """A name, and beside it, or where that is too narrow below it, what the node has."""
        longest = max((cell_len(node["name"]) for node in nodes), default=0)
        beside = longest <= max(16, width // 5)
        indent = longest + 4 if beside else 5
        for node in nodes:
            style = "dim" if died_text(node) else ""
            name = Text(" ").append(shortened(node["name"], width - 2), style=style or "bold")
            body = self._body(node, width - indent)
            if not beside:
                yield name
            for number, line in enumerate(body):
                line.style = style or line.style
                start = name if beside and not number else Text()
                yield start.append(" " * (indent - start.cell_len)).append_text(line)
            if beside and not body:
                yield name

    def _body(self, node: Node, width: int) -> list[Text]:
        """The lines of a node."""
        if died_text(node):
            lines = [Text(died_text(node), style="dim")]
            held = [gpu for gpu in node["gpus"] if gpu["occupants"]]
            return lines + (bracket(held, width, self._colours) if held else [])
        lines = []
        if node["gpu_count"]:
            lines += wrapped(gpu_heading(node), width, "dim")
            for title, gpus in gpu_sets(node):
                lines += bracket(gpus, width, self._colours, title)
        else:
            lines.append(Text("egress node" if node["egress"] else "CPU node", style="dim"))
        for egress in node["egress"]:
            told = f"{egress['resource']}: {egress['held']} of {egress['total']} requests"
            here = self._egress.get((node["id"], egress["resource"]), ())
            lines += filled(self._parts(told, here, "egress_units", width), width, "  ")
        if _cpus_held(node):
            told, here = cpus_told(node), self._on_cpus.get(node["id"], ())
            lines += filled(self._parts(told, here, "cpus", width), width, "  ")
        if node.get("state") == "draining":
            lines.append(Text("draining", style="yellow"))
        return lines + wrapped(node["problem"] or "", width, "red")

    def _parts(
        self, told: str, here: Iterable[tuple[str, Mapping[str, Any]]], holds: str, width: int
    ) -> Iterator[Part]:
        """The line of a resource, with each replica that holds some of it."""
        yield "", Text(told)
        for name, a in here:
            tail = f"/{a['replica_index']} ({a[holds]:g})"
            short = shortened(name, max(width - len(tail) - 2, 8))
            yield "  ", Text(short + tail, style=self._colours[name])

    # -- many: a line each ------------------------------------------------------------------------

    def _compact(self, nodes: Sequence[Node], width: int) -> Iterator[Text]:
        """Nodes of one kind below a heading, a line for each."""
        kinds: dict[str, list[Node]] = {}
        for node in nodes:
            without = "egress node" if node["egress"] else "CPU node"
            heading = gpu_heading(node) if node["gpu_count"] else without
            kinds.setdefault("dead" if died_text(node) else heading, []).append(node)
        for kind, alike in kinds.items():
            yield Text(shortened(f" {kind}: {counted(len(alike), 'node')}", width), style="bold")
            longest = min(max(cell_len(node["name"]) for node in alike), width // 2)
            for node in alike:
                line = Text("   ").append(padded(shortened(node["name"], longest), longest) + "  ")
                line.append(self._free(node))
                line = _cut(line, self._who(node), width)
                line.style = "dim" if died_text(node) else ""
                yield line
                for more in () if died_text(node) else wrapped(node["problem"] or "", width - 5, "red"):
                    yield Text("     ").append_text(more)

    def _free(self, node: Node) -> Text:
        if died_text(node):
            return Text(died_text(node), style="dim")
        if not node["gpu_count"]:
            said = [f"{e['held']} of {e['total']} {e['resource']}" for e in node["egress"]]
            return Text("; ".join(said + [cpus_told(node)] * bool(_cpus_held(node))))
        free = sum(gpu["state"] == "free" for gpu in node["gpus"])
        draining = ", draining" if node.get("state") == "draining" else ""
        return Text(f"{free} free".rjust(7) + draining, style="" if free else "dim")

    def _who(self, node: Node) -> list[Text]:
        """Each deployment on a node, with its replicas there."""
        found: dict[str, set[int]] = {}
        for gpu in node["gpus"]:
            for one in gpu["occupants"]:
                found.setdefault(one["deployment"], set()).add(one["replica"])
        for egress in node["egress"]:
            for name, a in self._egress.get((node["id"], egress["resource"]), ()):
                found.setdefault(name, set()).add(a["replica_index"])
        for name, a in self._on_cpus.get(node["id"], ()):
            found.setdefault(name, set()).add(a["replica_index"])
        said = [
            Text(f"{shortened(name, 40)}/{ordinals(sorted(replicas))}", style=self._colours.get(name, ""))
            for name, replicas in found.items()
        ]
        for state, what in (("other", "of other Ray users"), ("unknown", "unknown")):
            count = sum(gpu["state"] == state for gpu in node["gpus"])
            count += node["others_unlocated"] if state == "other" else 0
            said += [Text(f"{count} {what}", style="dim")] * bool(count)
        return said

    # -- nothing placed on them -------------------------------------------------------------------

    def _groups(self, idle: Mapping[Any, Sequence[Node]], width: int) -> Iterator[Text]:
        for alike in idle.values():
            names = host_list([node["name"] for node in alike], width - 1)
            yield Text(" ").append(names, style="bold")
            for line in wrapped(idle_text(alike), width - 5, "dim"):
                yield Text("     ").append_text(line)


def cluster_map(report: Mapping[str, Any]) -> ClusterMap:
    """The nodes of a report."""
    return ClusterMap(report)


def idle_apart(nodes: Sequence[Node]) -> tuple[list[Node], dict[Any, list[Node]]]:
    """The nodes to show one by one, and the others, of which there are several alike, by kind."""
    kinds: dict[Any, list[Node]] = {}
    for node in nodes:
        if _idle(node):
            egress = tuple((one["resource"], one["total"]) for one in node["egress"])
            kinds.setdefault((gpu_heading(node) if node["gpu_count"] else "", egress), []).append(node)
    groups = {kind: alike for kind, alike in kinds.items() if len(alike) >= ALIKE}
    together = {id(node) for alike in groups.values() for node in alike}
    return [node for node in nodes if id(node) not in together], groups


def idle_text(alike: Sequence[Node], width: int = 0) -> str:
    """``40 nodes, nothing is placed on them; each has 8 x H100, NVSwitch``; with a width also their names."""
    first = alike[0]
    said = [gpu_heading(first)] if first["gpu_count"] else []
    said += [f"{one['total']} requests of {one['resource']}" for one in first["egress"]]
    names = f"{host_list([node['name'] for node in alike], width // 2)}: " if width else ""
    return f"{names}{len(alike)} nodes, nothing is placed on them; each has {', '.join(said)}"


def _idle(node: Node) -> bool:
    used = (
        node["problem"]
        or node["others_unlocated"]
        or died_text(node)
        or any(e["held"] for e in node["egress"])
        or _cpus_held(node)
    )
    return not used and all(gpu["state"] == "free" for gpu in node["gpus"])


def _cpus_held(node: Node) -> float:
    """CPUs that CPU replicas hold there; an older service does not report them."""
    held: float = node.get("cpus", {}).get("held", 0)
    return held


def cpus_told(node: Node) -> str:
    """``CPUs: 6 of 16``."""
    return f"CPUs: {node['cpus']['held']:g} of {node['cpus']['total']:g}"


def died_text(node: Node) -> str:
    """``died 40s ago``; empty for a node that is alive."""
    if node.get("state") != "dead":
        return ""
    since = node.get("dead_seconds")
    return "died" if since is None else f"died {age_text(since)} ago"


def _cut(line: Text, who: Sequence[Text], width: int) -> Text:
    """A line with as many parts as fit, and how many more there are."""
    for number, one in enumerate(who):
        gap = "  " if number == 0 else ", "
        left = len(who) - number - 1
        more = f", {left} more" if left else ""
        if line.cell_len + len(gap) + one.cell_len + len(more) > width:
            return line.append(
                f"{gap}{left + 1} more" if number else f"{gap}{counted(left + 1, 'deployment')}"
            )
        line.append(gap).append_text(one)
    return line


def wrapped(text: str, width: int, style: str) -> list[Text]:
    """A text in lines, broken between words."""
    import textwrap

    return [Text(line, style=style) for line in textwrap.wrap(text, max(width, 20))]


def gpu_heading(node: Node) -> str:
    """``8 x NVIDIA H100 80GB HBM3, NVSwitch``."""
    profiles = by_profile({gpu["ordinal"]: gpu["mig"] for gpu in node["gpus"] if not gpu.get("problem")})
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
    return ", ".join(parts)


def _how_linked(node: Node) -> str:
    if not node["topology_known"]:
        return "topology unknown"
    if node["nvswitch"]:
        return "NVSwitch"
    sizes = [len(island) for island in _whole_islands(node)]
    if max(sizes) == 1:
        return "PCIe only"
    return f"NVLink islands of {' + '.join(map(str, sizes))}" if len(sizes) > 1 else "one NVLink island"


def by_profile(instances: Mapping[int, str | None]) -> dict[str | None, list[int]]:
    """Profile -> the slots that are such MIG instances; ``None`` -> the whole GPUs."""
    found: dict[str | None, list[int]] = {}
    for slot, profile in instances.items():
        found.setdefault(profile, []).append(slot)
    return found


def _lost(node: Node) -> list[Mapping[str, Any]]:
    """The GPUs that are never assigned, since they cannot be identified."""
    return [gpu for gpu in node["gpus"] if gpu.get("problem")]


def _whole_islands(node: Node) -> list[list[int]]:
    """The NVLink islands of the whole GPUs; a single one if the topology is unknown."""
    whole = [gpu["ordinal"] for gpu in node["gpus"] if gpu["mig"] is None and not gpu.get("problem")]
    islands = [[gpu for gpu in island if gpu in whole] for island in node["islands"] or [whole]]
    return [island for island in islands if island]


def gpu_sets(node: Node) -> Iterable[tuple[str, list[Mapping[str, Any]]]]:
    """Each island with more than one GPU, lone GPUs together; then MIG profiles; then lost GPUs."""
    islands = _whole_islands(node)
    if islands and max(len(island) for island in islands) == 1:
        islands = [[gpu for island in islands for gpu in island]]
    for island in islands:
        yield "", [node["gpus"][ordinal] for ordinal in island]
    profiles = by_profile({gpu["ordinal"]: gpu["mig"] for gpu in node["gpus"] if not gpu.get("problem")})
    for profile, slots in profiles.items():
        if profile is not None:
            yield f"{profile}: ", [node["gpus"][slot] for slot in slots]
    lost = _lost(node)
    if lost:
        yield "", lost
