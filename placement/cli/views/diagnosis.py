"""The findings of ``placement doctor``: first what is wrong, with what to do; then what is right, a line per node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.padding import Padding
from rich.text import Text

STYLES = {"failed": "red", "warning": "yellow", "skipped": "dim", "ok": "green"}


def diagnosis_view(findings: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A paragraph for each finding that is not ok; then the others by node; then how many there are."""
    parts: list[Any] = []
    for state in ("failed", "warning", "skipped"):
        for one in findings:
            if one["state"] == state:
                where = f"{one['node']}: " if one["node"] else ""
                parts.append(
                    Text.assemble((f"{state:8}", STYLES[state]), f"{where}{one['check']}: {one['said']}")
                )
                if one["fix"]:
                    parts.append(Padding(Text(f"-> {one['fix']}"), (0, 0, 0, 8), expand=False))
    for name in dict.fromkeys(one["node"] for one in findings if one["state"] == "ok"):
        well = [one for one in findings if one["state"] == "ok" and one["node"] == name]
        said = "; ".join(f"{one['check']}: {one['said']}" for one in well)
        parts.append(Text.assemble((f"{'ok':8}", STYLES["ok"]), f"{name}: " if name else "", said))
    counts = {state: sum(one["state"] == state for one in findings) for state in STYLES}
    parts.append(Text(", ".join(f"{count} {state}" for state, count in counts.items() if count)))
    return parts
