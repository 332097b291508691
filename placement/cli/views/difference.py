"""The difference between what files declare and what is placed, a line for each deployment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from placement.cli.views.console import few, replicas_text
from placement.errors import counted

NEW, SAME, CHANGED, REPLACED, REMOVED, REFUSED = "+", "=", "~", "-/+", "-", "!"
STYLES = {
    NEW: "green",
    SAME: "dim",
    CHANGED: "yellow",
    REPLACED: "bold red",
    REMOVED: "red",
    REFUSED: "bold red",
}
Workers = Mapping[str, Mapping[int, int]]
"""Deployment -> replica -> how many workers it has room for, of what is placed."""


def difference_lines(
    plans: Iterable[Mapping[str, Any]],
    workers: Workers,
    pruned: Sequence[str] = (),
    failures: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[RenderableType]:
    """What applying would do.

    Args:
        plans: as ``PlacementPlan.to_dict`` has them.
        workers: what is placed.
        pruned: deployments that would be released.
        failures: deployment -> the error for which it could not be applied.
    """
    lines: list[RenderableType] = []
    for plan in plans:
        sign, what = _told(plan, workers.get(plan["deployment"]))
        lines.append(_line(sign, f"{plan['deployment']}: {what}"))
        lines += [Padding(Text(line), (0, 0, 0, 6), expand=False) for line in _waits(plan)]
    for name, error in (failures or {}).items():
        lines.append(_line(REFUSED, f"{name}: {error['message']}"))
    for name in pruned:
        ends = sum(workers.get(name, {}).values())
        lines.append(_line(REMOVED, f"{name}: released{_ends(ends)}"))
    return lines


def sign_of(plan: Mapping[str, Any], stands: bool) -> str:
    """``+`` new, ``=`` unchanged, ``~`` changed, ``-/+`` replaced: running workers end.

    Args:
        plan: as ``PlacementPlan.to_dict`` has it.
        stands: whether the deployment exists, for an older service that does not report what is new.
    """
    change = plan.get("change")
    if change is None:
        change = "unchanged" if plan["standing"] else "changed" if stands else "new"
    if change == "changed":
        return REPLACED if plan.get("replaced") else CHANGED
    return NEW if change == "new" else SAME


def differs(plans: Iterable[Mapping[str, Any]], workers: Workers) -> bool:
    """Whether applying would change anything."""
    return any(sign_of(plan, plan["deployment"] in workers) != SAME for plan in plans)


def unmanaged_line(names: Sequence[str]) -> str:
    """Which deployments no file names."""
    if not names:
        return ""
    return f"not in these files, left alone: {few(names)}; --prune releases them"


def workers_of(deployments: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, int]]:
    """What is placed, from a status report: how many workers each replica has room for."""
    found: dict[str, dict[int, int]] = {}
    for one in deployments:
        replicas = found.setdefault(one["name"], {})
        for a in one["assignments"]:
            room = len(a.get("bundle_indices") or a["gpus"]) or 1
            replicas[a["replica_index"]] = replicas.get(a["replica_index"], 0) + room
    return found


def _line(sign: str, text: str) -> Text:
    return Text(f"{sign:>3} ", style=STYLES[sign]).append(text)


def _told(plan: Mapping[str, Any], stands: Mapping[int, int] | None) -> tuple[str, str]:
    """The sign, and what it means in words."""
    sign = sign_of(plan, stands is not None)
    replicas = {a["replica_index"] for a in plan["assignments"]}
    replaced, removed = plan.get("replaced") or [], plan.get("removed") or []
    total = len(replicas | {int(index) for index in plan.get("pending", {})})
    if sign == NEW:
        return sign, f"new, {counted(total, 'replica')}{_where(plan)}"
    if sign == SAME:
        placed = plan.get("placed") or []
        more = f", {replicas_text(placed)} would get a place{_where(plan, placed)}" if placed else ""
        return sign, f"unchanged{more}"
    fields = f"{', '.join(plan['differs'])}: " if plan.get("differs") else ""
    parts = []
    if replaced:
        parts.append(f"{replicas_text(replaced)} replaced{_where(plan, replaced)}")
    added = [index for index in plan.get("placed") or [] if index not in replaced]
    if added:
        parts.append(f"{replicas_text(added)} placed{_where(plan, added)}")
    if removed:
        parts.append(f"{replicas_text(removed)} released")
    # A replica that waits to be replaced stays until then.
    ended = {*replaced, *removed} - {int(index) for index in plan.get("pending", {})}
    ends = sum((stands or {}).get(index, 0) for index in ended)
    return sign, f"{fields}{'; '.join(parts) or 'changed in place'}{_ends(ends)}"


def _ends(workers: int) -> str:
    return f"; ends {counted(workers, 'running worker')}" if workers else ""


def _where(plan: Mapping[str, Any], indices: Iterable[int] | None = None) -> str:
    """`` on gpu-a, gpu-b``."""
    wanted = None if indices is None else set(indices)
    chosen = [a for a in plan["assignments"] if wanted is None or a["replica_index"] in wanted]
    names = list(dict.fromkeys(a["node_name"] for a in chosen))
    if not names:
        return ""
    return f" on {', '.join(names[:3])}" + (
        f" and {counted(len(names) - 3, 'more node')}" if len(names) > 3 else ""
    )


def _waits(plan: Mapping[str, Any]) -> list[str]:
    """What would wait, and why."""
    reasons: dict[str, list[int]] = {}
    for index, reason in plan.get("pending", {}).items():
        reasons.setdefault(reason, []).append(int(index))
    return [f"{replicas_text(indices)} would wait: {reason}" for reason, indices in reasons.items()]
