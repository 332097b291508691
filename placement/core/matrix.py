"""Reading and writing what ``nvidia-smi topo -m`` prints.

Read as printed, or as people paste it: columns parted by tabs or by blanks, colour codes, a Markdown table,
a legend below. The affinity columns differ between drivers (none, CPU Affinity, NUMA Affinity, GPU NUMA ID,
in any order); what is not there is unknown. Every other column is a network card. A GPU's row tells all of
them, so the cards' own rows, which people like to cut off, are not read.

A GPU's row must be whole: where a cell is missing nobody can tell which, so the text is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement.core.topology import UNKNOWN_LINK, Link, Nic, Path, Topology, ordinals
from placement.errors import MatrixError

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_GPU = re.compile(r"GPU\d+")
_CPU, _NUMA, _ = _AFFINITIES = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")
_COLUMN = re.compile("|".join([*(name.replace(" ", r"\s+") for name in _AFFINITIES), r"\S+"]))

_SELF = "X"
_PATHS = {path.value: Link(path) for path in Path if path is not Path.NVLINK} | {"SOC": Link(Path.SYS)}
"""SOC is what drivers before 2016 or so printed for SYS."""

_MOST_CPUS = 65536
"""Refuses ``0-999999999`` before it is spelt out. Linux knows at most 8192 CPUs."""


@dataclass(frozen=True)
class _Row:
    """One GPU's row: the cells by column name."""

    line: int
    cells: Mapping[str, str]


def parse_matrix(text: str) -> Topology:
    """The GPUs, the links between them and to the network cards, out of the output of ``nvidia-smi topo -m``.

    CPU and NUMA affinities are taken over where they are printed; the model is not printed. Network cards are
    called what their columns are called, also where a legend below gives ``NIC0`` another name.

    Raises:
        MatrixError: the text has no matrix, or a damaged or partial one; names the line.
    """
    lines = [_COLOUR.sub("", line).rstrip("\r") for line in text.lstrip("\ufeff").split("\n")]
    start = next((i for i, line in enumerate(lines) if _is_header(line)), None)
    if start is None:
        orphan = next((i for i, line in enumerate(lines) if _is_row(line)), -1)
        raise MatrixError(orphan + 1, "no header line that names GPU0")
    columns = _header_cells(lines[start])
    gpus = [name for name in columns if _GPU.fullmatch(name)]
    if gpus != [f"GPU{i}" for i in range(len(gpus))]:
        raise MatrixError(start + 1, f"the GPU columns are {', '.join(gpus)}, not GPU0, GPU1, ... in order")
    nics = [name for name in columns if name and name not in (*gpus, *_AFFINITIES)]
    twice = [name for name in columns if columns.count(name) > 1]
    if twice:
        raise MatrixError(start + 1, f"column {twice[0]!r} is there twice")

    rows: dict[str, _Row] = {}
    for number, line in enumerate(lines[start + 1 :], start + 2):
        if line.lstrip().startswith("Legend"):
            break
        found = _cells_of_row(columns, line, number)
        if found is None:
            continue
        label, cells = found
        if label not in gpus:
            raise MatrixError(number, f"row {label} has no column")
        if label in rows:
            raise MatrixError(number, f"row {label} is there already, in line {rows[label].line}")
        rows[label] = _Row(number, cells)
    missing = [name for name in gpus if name not in rows]
    if missing:
        last = max((row.line for row in rows.values()), default=start + 1)
        raise MatrixError(last, f"the rows of {', '.join(missing)} are missing")

    ordered = [rows[name] for name in gpus]
    paths = [[_path(row, gpu, nic) for nic in nics] for gpu, row in enumerate(ordered)]
    try:
        cards = tuple(
            Nic(name, tuple(column)) for name, column in zip(nics, zip(*paths, strict=True), strict=True)
        )
    except ValueError as error:
        raise MatrixError(start + 1, str(error)) from None
    return Topology(
        links=_links(ordered),
        numa=tuple(_numbers(row, _NUMA) for row in ordered),
        cpus=tuple(_numbers(row, _CPU) for row in ordered),
        nics=cards,
    )


def render_matrix(topology: Topology) -> str:
    """The matrix as ``nvidia-smi topo -m`` prints it, tab-separated.

    An unknown link is ``?``, an unknown affinity ``N/A``. :func:`parse_matrix` reads it back unchanged.
    """
    gpus = [f"GPU{i}" for i in range(len(topology))]
    nics = topology.nics
    lines = ["\t".join(["", *gpus, *(nic.name for nic in nics), _CPU, _NUMA])]
    for a, name in enumerate(gpus):
        links = [f" {_SELF} " if a == b else str(link) for b, link in enumerate(topology.links[a])]
        near = [ordinals(topology.cpus[a]) or "N/A", ordinals(topology.numa[a]) or "N/A"]
        lines.append("\t".join([name, *links, *(nic.paths[a] for nic in nics), *near]))
    for nic in nics:
        # What is between two network cards is not kept: nothing is placed by it.
        others = [f" {_SELF} " if other is nic else Path.UNKNOWN for other in nics]
        lines.append("\t".join([nic.name, *nic.paths, *others]))
    return "\n".join(lines) + "\n"


def _is_table(line: str) -> bool:
    return line.lstrip().startswith("|")


def _table_cells(line: str) -> list[str]:
    return [" ".join(cell.split()) for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def _header_cells(line: str) -> list[str]:
    """The names of the columns; of a Markdown table also the empty one above the rows' names."""
    if _is_table(line):
        return _table_cells(line)
    return [" ".join(name.split()) for name in _COLUMN.findall(line)]


def _is_header(line: str) -> bool:
    names = _header_cells(line)
    # Elsewhere than in a table the first column is a GPU's: prose that mentions one is no header.
    first = names if _is_table(line) else names[:1]
    return any(map(_GPU.fullmatch, first)) and _SELF not in names


def _is_row(line: str) -> bool:
    """Whether a line looks like a GPU's row, where no header tells the columns."""
    label, *cells = line.replace("|", " ").split() or [""]
    return _GPU.fullmatch(label) is not None and _SELF in cells


def _cells_of_row(columns: Sequence[str], line: str, number: int) -> tuple[str, dict[str, str]] | None:
    """The name of a GPU's row and its cells by column; ``None`` for any other line."""
    if _is_table(line):
        names, cells = list(columns), _table_cells(line)
        label = dict(zip(names, cells, strict=False)).get("", "")
    else:
        names, cells = ["", *columns], line.split()
        label = cells[0] if cells else ""
    if not _GPU.fullmatch(label):
        return None
    if len(cells) != len(names):
        raise MatrixError(number, f"row {label} has {len(cells) - 1} cells for {len(names) - 1} columns")
    return label, dict(zip(names, cells, strict=True))


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
        if cell != _SELF:
            raise MatrixError(row.line, f"GPU{a} to itself is {cell!r}, not {_SELF}")
        return UNKNOWN_LINK
    if cell in _PATHS:
        return _PATHS[cell]
    if re.fullmatch(r"NV[1-9]\d*", cell):
        return Link(Path.NVLINK, int(cell[2:]))
    raise MatrixError(row.line, f"GPU{a} to GPU{b} is {cell!r}, which is no link")


def _path(row: _Row, gpu: int, nic: str) -> Path:
    """How a GPU reaches a network card."""
    cell = row.cells[nic]
    if cell not in _PATHS:
        raise MatrixError(row.line, f"GPU{gpu} to {nic} is {cell!r}, which is no path")
    return _PATHS[cell].path


def _numbers(row: _Row, column: str) -> tuple[int, ...]:
    """A list as the kernel writes it: ``0,5-11``. Empty where the column is missing or not available."""
    text = row.cells.get(column, "")
    if text in ("", "N/A"):
        return ()
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= _MOST_CPUS:
            raise MatrixError(row.line, f"{column} is {text!r}; expected a list such as 0,5-11")
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))
