"""GPUs in brackets: ``[ 0 free   1-2 qwen/0 ]``, in as many lines as they need, broken between GPUs only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.text import Text

from placement.cli.views.console import shortened
from placement.core.topology import ordinals

BETWEEN_GPUS, BETWEEN_OCCUPANTS = "   ", ", "
Gpu = Mapping[str, Any]
Part = tuple[str, Text]
"""A text that is not broken, and the separator before it."""


def bracket(gpus: Sequence[Gpu], width: int, colours: Mapping[str, str], title: str = "") -> list[Text]:
    """One bracket; neighbouring GPUs with the same use are shown together.

    If that is too long for a line, neighbouring replicas of one GPU each are shown together too; then it is broken
    between GPUs, and names lose their middle.

    Args:
        gpus: as a report has them.
        width: columns of a line.
        colours: of deployments.
        title: what they are, where it is not plain GPUs (``"1g.10gb: "``).
    """
    for together in (False, True):
        whole = Text(f"[ {title}")
        for gap, part in _parts(gpus, colours, together, width):
            whole.append(gap).append_text(part)
        whole.append(" ]")
        if whole.cell_len <= width:
            return [whole]
    parts = list(_parts(gpus, colours, True, width - 4))
    parts[0] = ("", Text(f"[ {title}").append_text(parts[0][1]))
    parts[-1] = (parts[-1][0], parts[-1][1].append(" ]"))
    return filled(parts, width, indent="  ")


def filled(parts: Iterable[Part], width: int, indent: str = "") -> list[Text]:
    """The parts in lines, as many in each line as fit.

    Args:
        parts: each with the separator before it.
        width: columns of a line.
        indent: of each line but the first.
    """
    lines: list[Text] = []
    for gap, part in parts:
        if lines and lines[-1].cell_len + len(gap) + part.cell_len < width:  # one column is left for a comma
            lines[-1].append(gap).append_text(part)
            continue
        if lines:
            lines[-1].append(gap.rstrip())
        lines.append(Text(indent if lines else "").append_text(part))
    return lines


def _parts(gpus: Sequence[Gpu], colours: Mapping[str, str], together: bool, width: int) -> Iterator[Part]:
    """The contents of a bracket, with separators; ``together`` joins replicas in a row."""
    gap = ""
    for run in _runs(gpus, together):
        state, occupants = _use(run[0])
        part = Text().append(f"{ordinals([gpu['ordinal'] for gpu in run])} ", style="dim")
        if not occupants:
            said = {"other": "(another Ray user)", "unknown": "?"}.get(state, state)
            yield gap, part.append(said, style="dim")
        for number, (name, replica, share) in enumerate(occupants):
            if number:
                gap, part = BETWEEN_OCCUPANTS, Text()
            last = run[-1]["occupants"][0]["replica"]
            which = f"{replica}-{last}" if last != replica and len(occupants) == 1 else str(replica)
            tail = f"/{which}" + (f" {share:g}" if share < 1 else "")
            room = max(width - part.cell_len - len(tail) - 2, 8)
            yield gap, part.append(shortened(name, room) + tail, style=colours.get(name, ""))
        rest = 1 - sum(share for *_, share in occupants)
        if occupants and rest > 1e-6:
            yield BETWEEN_OCCUPANTS, Text(f"{rest:g} left", style="dim")
        gap = BETWEEN_GPUS


def _runs(gpus: Sequence[Gpu], together: bool) -> list[list[Gpu]]:
    """Neighbouring GPUs with the same use; with ``together`` also replicas of one GPU each in a row."""
    runs = [list(alike) for _, alike in groupby(gpus, key=_use)]
    if not together:
        return runs
    joined: list[list[Gpu]] = []
    for run in runs:
        if joined and _next_replica(joined[-1], run):
            joined[-1] += run
        else:
            joined.append(run)
    return joined


def _next_replica(before: Sequence[Gpu], run: Sequence[Gpu]) -> bool:
    """Whether a run is the GPU of the next replica after those of ``before``, all with one GPU each."""
    last, first = before[-1]["occupants"], run[0]["occupants"]
    if len(run) > 1 or len(last) != 1 or len(first) != 1:
        return False
    replicas = {gpu["occupants"][0]["replica"] for gpu in before}
    same = (last[0]["deployment"], last[0]["share"]) == (first[0]["deployment"], first[0]["share"])
    return same and len(replicas) == len(before) and first[0]["replica"] == last[0]["replica"] + 1


def _use(gpu: Gpu) -> tuple[str, tuple[tuple[str, int, float], ...]]:
    who = ((one["deployment"], one["replica"], one["share"]) for one in gpu["occupants"])
    return gpu["state"], tuple(who)
