"""The console, its colours, and how texts that are too long are shortened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from placement.cli import streams
from placement.core.topology import ordinals

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "bright_red", "bright_cyan", "bright_green")
WITHOUT_END = 10_000
"""Columns where it is not a terminal: what reads it there reads lines and names in full."""


def console() -> Console:
    """Where everything is printed."""
    out = streams.out()
    return Console(file=out, width=None if out.isatty() else WITHOUT_END, highlight=False)


def colours(names: Iterable[str]) -> dict[str, str]:
    """Name -> a colour that stays with a deployment throughout a report."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sorted(set(names)))}


def left_out_line(headings: Sequence[str]) -> Text:
    """That columns of a table were left out, and how to see them."""
    columns = f"{len(headings)} column{'s' * (len(headings) > 1)}"
    said = f"{columns} left out: {', '.join(headings)}; a wider terminal or --json shows "
    return Text(said + ("it" if len(headings) == 1 else "them"), style="dim")


FOLDED = 10
"""Columns of the terminal that one has at least whose words may be broken."""


class FittedTable(Table):
    """A table that leaves out columns, the last first, where they do not fit, and says which."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it."""
        columns, kept = self.columns, list(self.columns)
        try:
            while len(kept) > 1 and self._least_width(console, kept) > options.max_width:
                kept.pop()
            self.columns = kept
            yield from super().__rich_console__(console, options)
        finally:
            self.columns = columns
        if left_out := columns[len(kept) :]:
            yield left_out_line([" ".join(str(column.header).split()) or "notes" for column in left_out])

    def _least_width(self, console: Console, columns: list[Any]) -> int:
        """In how many columns of the terminal these fit, where nothing that may not be broken is cut."""
        self.columns = columns
        anywhere = console.options.update(max_width=WITHOUT_END)
        width = Measurement.get(console, anywhere, self).maximum
        for column in columns:
            if not column.no_wrap:
                sizes = [Measurement.get(console, anywhere, cell) for cell in (column.header, *column.cells)]
                least = column.min_width or max(size.minimum for size in sizes)
                least = min(least, FOLDED) if column.overflow == "fold" else least
                width -= max(0, max(size.maximum for size in sizes) - least)
        return width


def shortened(name: str, width: int) -> str:
    """A name in so many columns: the middle is left out, as names differ at their ends."""
    if cell_len(name) <= width:
        return name
    head = max(width // 2, 1)
    tail = max(width - head - 1, 0)
    end = chop_cells(name[::-1], tail)[0][::-1] if tail else ""
    return f"{chop_cells(name, head)[0]}…{end}"


def padded(text: str, width: int) -> str:
    """A text in so many columns of the terminal; names may have characters that take two."""
    return text + " " * (width - cell_len(text))


def few(names: Sequence[str], most: int = 12) -> str:
    """Names side by side; of many the first, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def replicas_text(indices: Sequence[int]) -> str:
    """``replica 3``, ``replicas 0-2,5``."""
    return f"{'replica' if len(indices) == 1 else 'replicas'} {ordinals(indices)}"


def host_list(names: Sequence[str], width: int) -> str:
    """Names of nodes as Slurm writes them: ``gpu-[001-019,024]``; if that is too long, the first and how many more."""
    numbered: dict[tuple[str, int, str], list[int]] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is None:
            numbered[name, 0, ""] = []
        else:
            numbered.setdefault((match[1], len(match[2]), match[3]), []).append(int(match[2]))
    parts: list[tuple[str, int]] = []
    for (prefix, digits, suffix), found in numbered.items():
        if not digits:
            parts.append((prefix, 1))
            continue
        ranges = re.sub(r"\d+", lambda one, digits=digits: one[0].zfill(digits), ordinals(found))  # type: ignore[misc]
        parts.append((f"{prefix}{ranges if len(found) == 1 else f'[{ranges}]'}{suffix}", len(found)))
    text = ", ".join(part for part, _ in parts)
    if cell_len(text) <= width:
        return text
    total = sum(count for _, count in parts)
    return f"{shortened(names[0], max(width - 15, 8))} and {total - 1} more"


_NUMBERED = re.compile(r"(.*?)(\d{1,9})(\D*)")


def age_text(seconds: float | None) -> str:
    """``45s``, ``12m``, ``5h``, ``3d``; empty where unknown."""
    if seconds is None:
        return ""
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(max(seconds, 0))}s"


def owner_text(owner: Any) -> str:
    """``detached``, ``job 01000000``: the owner of a deployment."""
    if not isinstance(owner, Mapping):
        return str(owner or "detached")
    kind = str(owner.get("kind", ""))
    who = owner.get("actor") or owner.get("job") or ""
    return f"{kind} {shortened(str(who), 12)}".strip()
