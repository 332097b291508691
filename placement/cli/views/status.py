"""What ``placement status`` shows, and ``placement list``: how much there is, what waits, nodes, deployments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from placement.cli.views.console import FittedTable, age_text, owner_text, replicas_text
from placement.cli.views.nodes import cluster_map
from placement.cli.views.tables import assignments_table, links_view, runtimes_note, taken
from placement.errors import counted

MOST_REPLICAS = 40
"""How many rows of replicas are shown if no single deployment was asked for."""
MOST_WAITING = 20
"""How many lines of the queue are shown."""
STYLES = {"placed": "green", "pending": "yellow", "lost": "bold red", "releasing": "dim"}

Deployment = Mapping[str, Any]


def status_view(report: Mapping[str, Any], of_one: bool = False) -> list[RenderableType]:
    """How much there is, and what waits; then the nodes, then the deployments.

    Args:
        report: the service's report.
        of_one: one deployment was asked for, so that its replicas are shown however many they are.
    """
    deployments = report["deployments"]
    parts: list[RenderableType] = [totals_text(report), *waiting_view(report), cluster_map(report)]
    if deployments:
        parts.append(deployments_table(deployments, title="deployments", owners=False))
        if of_one or sum(len(one["assignments"]) for one in deployments) <= MOST_REPLICAS:
            rows = [{"deployment": one["name"], "assignments": one["assignments"]} for one in deployments]
            parts += ["", assignments_table(rows, title="replicas")]
        else:
            parts.append(Text("`placement status --deployment NAME` shows its replicas", style="dim"))
        for group in report.get("groups", []):
            parts += [*links_view(group["links"][:MOST_REPLICAS], group["name"]), ""]
        parts.append(runtimes_note(deployments))
    else:
        parts.append("nothing is placed; try `placement apply FILE`")
    parts += [Text(one["problem"], style="bold red") for one in report.get("unreadable", [])]
    return parts


def totals_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The sums of a report; counted here if an older service does not report them."""
    if report.get("totals"):
        return dict(report["totals"])
    states = Counter(gpu["state"] for node in report["nodes"] for gpu in node["gpus"])
    return {
        "gpus": sum(node["gpu_count"] for node in report["nodes"]),
        **{state: states[state] for state in ("free", "held", "other", "unknown")},
        "nodes": len(report["nodes"]),
        "gpu_nodes": sum(node["gpu_count"] > 0 for node in report["nodes"]),
        "deployments": len(report["deployments"]),
        "replicas": sum(one["replicas"] for one in report["deployments"]),
        "pending": sum(len(one.get("pending", {})) for one in report["deployments"]),
    }


def totals_text(report: Mapping[str, Any]) -> Text:
    """``160 GPUs on 20 nodes: 96 held, 64 free; 1 node without GPUs``, ``14 deployments with 60 replicas``."""
    sums = totals_of(report)

    def number(key: str) -> str:
        return f"{sums.get(key, 0):g}"

    def many(key: str, noun: str) -> str:
        return counted(int(sums.get(key, 0)), noun)

    used = [f"{number('held')} held", f"{number('free')} free"]
    used += [f"{number('other')} of other Ray users"] * bool(sums.get("other"))
    used += [f"{number('unknown')} unknown"] * bool(sums.get("unknown"))
    sums.setdefault("gpu_nodes", sums.get("nodes", 0))  # an older service does not report it
    without = int(sums.get("nodes", 0) - sums["gpu_nodes"])
    text = Text(f"{many('gpus', 'GPU')} on {many('gpu_nodes', 'node')}: {', '.join(used)}")
    text.append(f"; {counted(without, 'node')} without GPUs\n" if without else "\n")
    text.append(f"{many('deployments', 'deployment')} with {many('replicas', 'replica')}")
    if sums.get("pending"):
        text.append(f", {number('pending')} pending", style=STYLES["pending"])
    return text


def waiting_view(report: Mapping[str, Any]) -> list[RenderableType]:
    """Pending replicas, in the order of the queue, with the reasons; and what the autoscaler was asked for."""
    rows = []
    for one in report["deployments"]:
        place = one.get("queue_position")
        last = len(report["deployments"]) + 1
        for (state, reason), indices in not_placed(one).items():
            what = f"{replicas_text(indices)} {state}" if one["replicas"] > 1 else state
            rows.append((last if place is None else place, one["name"], min(indices), state, what, reason))
        if one.get("outdated"):
            kept = "as declared before, until there is room for what is declared now"
            rows.append((last, one["name"], -1, "outdated", replicas_text(one["outdated"]), kept))
    parts: list[RenderableType] = []
    if rows:
        parts.append(Text("\nwaiting, next first", style="bold"))
        for place, name, _, state, what, reason in sorted(rows)[:MOST_WAITING]:
            number = f"{place}. " if place <= len(report["deployments"]) and state == "pending" else ""
            line = Text(number, style="dim").append(name, style=STYLES.get(state, "yellow"))
            parts.append(_indented(line.append(f", {what}: {reason}" if reason else f", {what}")))
    if len(rows) > MOST_WAITING:
        more = f"and {len(rows) - MOST_WAITING} more; `placement list --state pending` shows them"
        parts.append(_indented(Text(more, style="dim")))
    if asked := report.get("demand"):
        parts.append(Text("\nasked of the autoscaler", style="bold"))
        lines = demand_lines(asked)
        parts += [_indented(Text(line)) for line in lines[:MOST_WAITING]]
        if len(lines) > MOST_WAITING:
            parts.append(_indented(Text(f"and {len(lines) - MOST_WAITING} more", style="dim")))
    return parts


def _indented(text: Text) -> RenderableType:
    return Padding(text, (0, 0, 0, 1), expand=False)


def demand_lines(demand: Iterable[Mapping[str, Any]]) -> list[str]:
    """What was asked of the autoscaler: ``b/1, 8 x H100 on one node: asked, 12s: a node is being started``."""
    lines = []
    for one in demand:
        since = f", {age_text(one['seconds'])}" if one.get("seconds") is not None else ""
        again = (
            f"; again in {age_text(one['again_in_seconds'])}"
            if one.get("again_in_seconds") is not None
            else ""
        )
        what = f", {one['asked']}" if one.get("asked") else ""
        why = f": {one['reason']}" if one.get("reason") else ""
        lines.append(f"{one['deployment']}/{one['replica']}{what}: {one['state']}{since}{why}{again}")
    return list(dict.fromkeys(lines))


def not_placed(one: Deployment) -> dict[tuple[str, str], list[int]]:
    """(State, reason) -> the replicas of a deployment that are so; those that are placed are left out."""
    found: dict[tuple[str, str], list[int]] = {}
    for replica in _replicas(one):
        if replica["state"] != "placed":
            found.setdefault((replica["state"], replica.get("reason") or ""), []).append(replica["index"])
    if not found:
        for index, reason in one.get("pending", {}).items():
            found.setdefault(("pending", reason), []).append(int(index))
    return found


def _replicas(one: Deployment) -> list[Mapping[str, Any]]:
    """The state of each replica; empty if an older service does not report it."""
    return list(one.get("replica_states") or ())


def summary(one: Deployment) -> dict[str, Any]:
    """A deployment in one row, as ``placement list --json`` has it."""
    return {
        "name": one["name"],
        "state": one["state"],
        "placed": len({a["replica_index"] for a in one["assignments"]}),
        "replicas": one["replicas"],
        "gpus": round(sum(sum(taken(a).values()) for a in one["assignments"]), 6),
        "egress": sum(a.get("egress_units", 0) for a in one["assignments"]),
        "cpus": round(sum(a.get("cpus", 0) for a in one["assignments"]), 3),
        "nodes": sorted({a["node_name"] for a in one["assignments"]}),
        "age_seconds": one.get("age_seconds"),
        "owner": one.get("owner"),
        "generation": one.get("generation"),
        "queue_position": one.get("queue_position"),
    }


def deployments_table(
    deployments: Iterable[Deployment], title: str | None = None, owners: bool = True
) -> FittedTable:
    """One row for each deployment. Names are never cut, so that they can be copied.

    Args:
        deployments: of a report.
        title: above it.
        owners: whether they are shown where all are detached.
    """
    rows = [summary(one) for one in deployments]
    table = FittedTable(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style=""
    )
    aged = any(row["age_seconds"] is not None for row in rows)
    owned = owners or any(owner_text(row["owner"]) != "detached" for row in rows)
    table.add_column("deployment", overflow="fold", min_width=10)
    table.add_column("placed", justify="right", no_wrap=True)
    table.add_column("GPUs", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    if aged:
        table.add_column("age", justify="right", no_wrap=True)
    if owned:
        table.add_column("owner", no_wrap=True)
    table.padding = (0, 2, 0, 0)
    for row in rows:
        place = f" #{row['queue_position']}" if row["queue_position"] else ""
        table.add_row(
            Text(row["name"]),
            f"{row['placed']}/{row['replicas']}",
            f"{row['gpus']:g}" if row["gpus"] or not (row["egress"] or row["cpus"]) else "-",
            Text(row["state"] + place, style=STYLES.get(row["state"], "")),
            *([age_text(row["age_seconds"])] if aged else []),
            *([owner_text(row["owner"])] if owned else []),
        )
    return table
