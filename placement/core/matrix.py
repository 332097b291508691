"""Reads and writes the output of ``nvidia-smi topo -m``.

It is read as printed, or as people paste it: columns separated by tabs or blanks, a Markdown table, a legend below;
:mod:`placement.core.pasted` removes what was added on the way. The affinity columns differ between drivers
(none, CPU Affinity, NUMA Affinity, GPU NUMA ID, in any order); missing ones are unknown. Every other column is a
network card. A GPU's row has all of them, so the cards' own rows, which people often cut off, are not read.

A GPU's row must be complete: if a cell is missing and neither tabs nor position show which, the text is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from placement.core.pasted import NOT_AVAILABLE, NVLINKS, SELF, Line, Pasted, find_matrix, shortened
from placement.core.topology import UNKNOWN_LINK, Link, Nic, Path, Topology, ordinals
from placement.errors import MatrixError

_GPU = re.compile(r"GPU\d+")
_CPU, _NUMA, _ID = _AFFINITIES = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")
_AFFINITY = {
    _ID: r"GPU\s+NUMA\s+ID",
    _CPU: r"CPU(?:\s*Affinity|(?!\w))",
    _NUMA: r"NUMA(?:\s*(?:Affinity|Node|ID)|(?!\w))",
}
_AFFINITY_NAME = re.compile("|".join(_AFFINITY.values()), re.IGNORECASE)
_COLUMN = re.compile(rf"{_AFFINITY_NAME.pattern}|\S+", re.IGNORECASE)
_PARTED = re.compile(
    rf"{_AFFINITY_NAME.pattern}|\S+?(?=\s|$|CPU\s*Affinity|NUMA\s*Affinity|(?<=\d)(?:NIC|GPU|mlx)\d)",
    re.IGNORECASE,
)
"""The same for names without blanks between them: ``NIC11NIC12``."""

_PATHS = {path.value: Link(path) for path in Path if path is not Path.NVLINK} | {"SOC": Link(Path.SYS)}
"""Drivers before about 2016 printed SOC for SYS."""

_MOST_CPUS = 65536
"""Refuses ``0-999999999`` before it is expanded. Linux has at most 8192 CPUs."""

_TAB = 8
"""The width of a tab on a terminal."""


@dataclass(frozen=True)
class Reading:
    """A matrix, and what could not be read although the GPUs' part is complete."""

    topology: Topology
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Row:
    """One GPU's row: the cells by column name."""

    line: int
    cells: Mapping[str, str]


def parse_matrix(text: str) -> Topology:
    """The GPUs and the links between them and to the network cards, from the output of ``nvidia-smi topo -m``.

    CPU and NUMA affinities are read where they are printed; the model is not printed. Network cards are
    named like their columns, even if a legend below gives ``NIC0`` another name.

    Raises:
        MatrixError: the text has no matrix, or a damaged or partial one, or two; names the line.
    """
    return read_matrix(text).topology


def read_matrix(text: str) -> Reading:
    """The same, and what had to be ignored.

    Raises:
        MatrixError: as :func:`parse_matrix`.
    """
    matrix = find_matrix(text)
    columns, rows, notes = _read(matrix)
    start = matrix.header.number
    gpus = [name for name in columns if _GPU.fullmatch(name)]
    nics = [name for name in columns if name and name not in (*gpus, *_AFFINITIES)]
    ordered = [rows[name] for name in gpus]
    paths = [[_path(row, gpu, nic) for nic in nics] for gpu, row in enumerate(ordered)]
    try:
        cards = tuple(
            Nic(name, tuple(column)) for name, column in zip(nics, zip(*paths, strict=True), strict=True)
        )
    except ValueError as error:
        raise MatrixError(start, str(error)) from None
    topology = Topology(
        links=_links(ordered),
        numa=tuple(_numbers(row, _NUMA) for row in ordered),
        cpus=tuple(_numbers(row, _CPU) for row in ordered),
        nics=cards,
    )
    return Reading(topology, notes)


def render_matrix(topology: Topology) -> str:
    """The matrix as ``nvidia-smi topo -m`` prints it, tab-separated.

    An unknown link is ``?``, an unknown affinity ``N/A``. :func:`parse_matrix` reads it back unchanged.
    """
    gpus = [f"GPU{i}" for i in range(len(topology))]
    nics = topology.nics
    lines = ["\t".join(["", *gpus, *(nic.name for nic in nics), _CPU, _NUMA])]
    for a, name in enumerate(gpus):
        links = [f" {SELF} " if a == b else str(link) for b, link in enumerate(topology.links[a])]
        near = [ordinals(topology.cpus[a]) or NOT_AVAILABLE, ordinals(topology.numa[a]) or NOT_AVAILABLE]
        lines.append("\t".join([name, *links, *(nic.paths[a] for nic in nics), *near]))
    for nic in nics:
        # The links between two network cards are not kept: nothing uses them.
        others = [f" {SELF} " if other is nic else Path.UNKNOWN for other in nics]
        lines.append("\t".join([nic.name, *nic.paths, *others]))
    return "\n".join(lines) + "\n"


def _read(matrix: Pasted) -> tuple[list[str], dict[str, _Row], tuple[str, ...]]:
    """The columns, the rows by name, and what was ignored."""
    header = matrix.header
    if header.is_table:
        columns = _table_cells(header)
        # Without a bar at the ends, the rows' names have no bar before them either.
        columns = [_column_name(name) for name in (columns if "" in columns else ["", *columns])]
        _check_columns(columns, header.number)
        return columns, _rows(columns, matrix, lambda row: _table_row(columns, row)), ()
    plain = _names(_COLUMN, header)
    parted = _names(_PARTED, header)
    found = [(one, [_cells(one, header, row) for row in matrix.rows]) for one in (plain, parted)]
    sound = (one for one, rows in found if all(cells is not None and _is_sound(cells) for cells in rows))
    fitting = (one for one, rows in found if None not in rows)
    columns = next(sound, next(fitting, plain))
    notes: tuple[str, ...] = ()
    if columns is plain and (left_out := _without_nics(plain, matrix.rows)) is not None:
        columns, cells_of = left_out
        named, there = len(plain) - len(columns), len(matrix.rows[0].body.split()) - 1 - len(columns)
        notes = (
            f"the network cards are ignored, since their names are not separated: {named} of them for {there} columns",
        )
    else:
        cells_of = partial(_cells, columns, header)
    _check_columns(columns, header.number)
    return columns, _rows(columns, matrix, cells_of), notes


def _check_columns(columns: Sequence[str], number: int) -> None:
    gpus = [name for name in columns if _GPU.fullmatch(name)]
    if not gpus or gpus != [f"GPU{i}" for i in range(len(gpus))]:
        named = shortened(", ".join(gpus or filter(None, columns)), 200)
        raise MatrixError(number, f"the GPU columns are {named}, not GPU0, GPU1, ... in order")
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise MatrixError(number, f"column {shortened(twice[0])!r} is there twice")


def _rows(
    columns: Sequence[str], matrix: Pasted, cells_of: Callable[[Line], dict[str, str] | None]
) -> dict[str, _Row]:
    """The rows of all GPUs by name."""
    gpus = [name for name in columns if _GPU.fullmatch(name)]
    rows: dict[str, _Row] = {}
    for row in matrix.rows:
        label = _label(columns, row)
        if label is None:
            continue
        cells = cells_of(row)
        if cells is None:
            found = len(_table_cells(row) if matrix.header.is_table else row.body.split()) - 1
            expected = sum(name != "" for name in columns)
            raise MatrixError(row.number, f"row {shortened(label)} has {found} cells for {expected} columns")
        if label not in gpus:
            raise MatrixError(row.number, f"row {shortened(label)} has no column")
        if label in rows:
            raise MatrixError(row.number, f"row {label} is there already, in line {rows[label].line}")
        rows[label] = _Row(row.number, cells)
    missing = [name for name in gpus if name not in rows]
    if missing:
        last = max((row.line for row in rows.values()), default=matrix.header.number)
        raise MatrixError(last, f"the rows of {shortened(', '.join(missing), 200)} are missing")
    return rows


def _names(pattern: re.Pattern[str], header: Line) -> list[str]:
    return [_column_name(name) for name in pattern.findall(header.body)]


def _column_name(name: str) -> str:
    """A column's name; affinity columns get the names of newer drivers."""
    whole = (known for known, pattern in _AFFINITY.items() if re.fullmatch(pattern, name, re.IGNORECASE))
    return next(whole, name)


def _table_cells(line: Line) -> list[str]:
    return [
        " ".join(cell.split()) for cell in line.body.strip().removeprefix("|").removesuffix("|").split("|")
    ]


def _table_row(columns: Sequence[str], row: Line) -> dict[str, str] | None:
    cells = _table_cells(row)
    return dict(zip(columns, cells, strict=True)) if len(cells) == len(columns) else None


def _label(columns: Sequence[str], row: Line) -> str | None:
    """The name of a GPU's row; ``None`` for any other line."""
    in_table = dict(zip(columns, _table_cells(row), strict=False)).get("", "")
    label = in_table if "" in columns else row.body.split()[0]
    return label if _GPU.fullmatch(label) else None


def _cells(columns: Sequence[str], header: Line, row: Line) -> dict[str, str] | None:
    """The cells of a row by column; an affinity is empty if tabs or position show that. ``None`` if they do not fit."""
    cells = row.body.split()[1:]
    if len(cells) == len(columns):
        return dict(zip(columns, cells, strict=True))
    links = next((i for i, name in enumerate(columns) if name in _AFFINITIES), len(columns))
    affinities = columns[links:]
    if not set(affinities) <= set(_AFFINITIES) or len(cells) >= len(columns):
        return None
    for found in (_by_tabs(row, links, affinities), _by_place(header, row, links, affinities)):
        row_cells = found and dict(zip(columns, found, strict=True))
        if row_cells and _is_sound(row_cells):
            return row_cells
    return None


def _by_tabs(row: Line, links: int, affinities: Sequence[str]) -> list[str] | None:
    """The cells by tabs, even if a terminal turned these into blanks."""
    tabbed = row.body if "\t" in row.body else _with_tabs(row)
    if tabbed is None:
        return None
    _, *cells = (cell.strip() for cell in tabbed.split("\t"))
    found, rest = cells[:links], cells[links:]
    for i in range(len(affinities)):
        # Before a missing value one more tab is printed, for alignment.
        if i and len(rest) > len(affinities) - i and rest[:2] == ["", NOT_AVAILABLE]:
            rest = rest[1:]
        if not rest:
            return None
        found.append(rest.pop(0))
    return None if any(rest) or len(found) != links + len(affinities) else found


def _with_tabs(row: Line) -> str | None:
    """A row in which blanks are tabs again; ``None`` if they cannot be tabs."""
    for origin in (0, row.start):
        label, *cells = re.finditer(r"\S+", row.body)
        text, end = label[0], row.start + label.end() - origin
        for cell in cells:
            # The X of a GPU itself is printed with a blank before and after it.
            own = cell[0] == SELF
            begin = row.start + cell.start() - own - origin
            tabs = begin // _TAB - end // _TAB
            if begin % _TAB or tabs < 1:
                break
            text += "\t" * tabs + cell[0]
            end = row.start + cell.end() + own - origin
        else:
            return text
    return None


def _by_place(header: Line, row: Line, links: int, affinities: Sequence[str]) -> list[str] | None:
    """The cells of a table drawn with blanks, in which each affinity begins right below its name."""
    names = [match.start() for match in _AFFINITY_NAME.finditer(header.text)][-len(affinities) :]
    words = list(re.finditer(r"\S+", row.text))
    first = next((i for i, word in enumerate(words) if word.start() >= row.start), 0) + 1
    at = {word.start(): word[0] for word in words[first + links :]}
    # A last cell that is missing may have been cut off.
    if len(names) != len(affinities) or not names or names[-1] not in at or not at.keys() <= set(names):
        return None
    return [word[0] for word in words[first : first + links]] + [at.get(name, "") for name in names]


def _is_sound(cells: Mapping[str, str]) -> bool:
    """Whether the columns of links hold links, and no other columns do."""
    return all(
        (cell == SELF or cell in _PATHS or NVLINKS.fullmatch(cell) is not None) == (name not in _AFFINITIES)
        for name, cell in cells.items()
    )


def _without_nics(
    columns: Sequence[str], rows: Sequence[Line]
) -> tuple[list[str], Callable[[Line], dict[str, str] | None]] | None:
    """The columns other than the network cards', and how to read them, if only the cards' names are not separated.

    All rows must agree on how many more cells there are than names, and the GPUs must come first, the affinities last.
    """
    gpus = next((i for i, name in enumerate(columns) if not _GPU.fullmatch(name)), len(columns))
    last = next((i for i, name in enumerate(columns) if name in _AFFINITIES), len(columns))
    counts = {len(row.body.split()) - 1 for row in rows}
    if (
        gpus == last
        or len(counts) != 1
        or min(counts) <= len(columns)
        or any(map(_GPU.fullmatch, columns[gpus:]))
    ):
        return None
    kept = [*columns[:gpus], *columns[last:]]

    def cells_of(row: Line) -> dict[str, str] | None:
        cells = row.body.split()[1:]
        end = len(cells) - (len(columns) - last)
        if not all(map(_PATHS.__contains__, cells[gpus:end])):
            return None
        return dict(zip(kept, cells[:gpus] + cells[end:], strict=True))

    return kept, cells_of


def _links(rows: Sequence[_Row]) -> tuple[tuple[Link, ...], ...]:
    """The links between the GPUs, whose rows are in order."""
    matrix: list[tuple[Link, ...]] = []
    for a, row in enumerate(rows):
        links = tuple(_link(row, a, b) for b in range(len(rows)))
        for b, link in enumerate(links[:a]):
            if link != matrix[b][a]:
                raise MatrixError(row.line, f"GPU{a} to GPU{b} is {link}, back it is {matrix[b][a]}")
        matrix.append(links)
    return tuple(matrix)


def _link(row: _Row, a: int, b: int) -> Link:
    cell = row.cells.get(f"GPU{b}", "")
    if a == b:
        if cell != SELF:
            raise MatrixError(row.line, f"GPU{a} to itself is {shortened(cell)!r}, not {SELF}")
        return UNKNOWN_LINK
    if cell in _PATHS:
        return _PATHS[cell]
    if NVLINKS.fullmatch(cell):
        return Link(Path.NVLINK, int(cell[2:]))
    raise MatrixError(row.line, f"GPU{a} to GPU{b} is {shortened(cell)!r}, which is no link")


def _path(row: _Row, gpu: int, nic: str) -> Path:
    """How a GPU reaches a network card."""
    cell = row.cells[nic]
    if cell not in _PATHS:
        raise MatrixError(row.line, f"GPU{gpu} to {shortened(nic)} is {shortened(cell)!r}, which is no path")
    return _PATHS[cell].path


def _numbers(row: _Row, column: str) -> tuple[int, ...]:
    """A list as the kernel writes it: ``0,5-11``. Empty where the column is missing or not available."""
    text = row.cells.get(column, "")
    if text in ("", NOT_AVAILABLE):
        return ()
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= _MOST_CPUS:
            raise MatrixError(row.line, f"{column} is {shortened(text)!r}; expected a list such as 0,5-11")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))
