"""Finds the one matrix in a pasted text, and removes prefixes of lines and text before and after it.

It removes what was added between ``nvidia-smi`` and the file: colours, quote marks, HTML, a prefix on every line
(``srun -l``, ``kubectl logs``, ``docker compose``, syslog). If a text is something else, the error says what.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from placement.core.topology import Path
from placement.errors import MatrixError

SELF = "X"
NOT_AVAILABLE = "N/A"
NVLINKS = re.compile(r"NV[1-9]\d?")
"""The cell of a pair joined by NVLinks. 18 are the most so far."""

_MARKS = re.compile(
    r"(?:\x1b|\^\[|\u241b)\[[0-9;?]*[A-Za-z]"  # a colour, or its escape shown as text (cat -v)
    r"|\[[0-9;]*m"  # one that lost its ESC on the way
    r"|</?(?:pre|code|span|div|p|br)\b[^<>]*>"
    r"|\*\*|[`\u200b-\u200d\u2060\ufeff]",
    re.IGNORECASE,
)
_QUOTE = re.compile(r"\s*(?:> ?)+")
_AS_ASCII = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-") | dict.fromkeys("│┃║", "|")
)

_GPU = re.compile(r"(?<![\w.-])GPU\d+")
_HEADER = re.compile(r"GPU0(?![\d:,.=])")
_ROW = re.compile(r"GPU\d+(?=[\s|]|$)")
_LEGEND = re.compile(r"(?:^|[\s|:>])Legend\b")
_P2P = {"OK", "CNS", "GNS", "TNS", "NS", "DR", "U"}
"""The cells of ``nvidia-smi topo -p2p``: allowed, or why not."""
_CELL = re.compile(
    "|".join(
        [
            SELF,
            re.escape(NOT_AVAILABLE),
            *(re.escape(path) for path in Path),
            "SOC",
            *_P2P,
            r"NV\w*",
            r"[\d,-]+",
        ]
    )
)
_NEAR = 64
"""How many lines after its header a row may come, with other programs' lines in between."""
_NAME = re.compile(r"CPU|NUMA|Affinity|GPU|ID|(?:GPU|NIC)\d+|mlx\S+")

_ERROR = re.compile(
    r"nvidia-smi has failed|no devices were found|failed to |unable to |not found|not recognized|no such file"
    r"|couldn't communicate|permission|version mismatch|unknown error|is lost|invalid combination"
    r"|connection refused|timed out",
    re.IGNORECASE,
)
_OTHERS = (
    (r"ROCm System Management|\brocm-smi|between two GPUs|\bXGMI\b", "rocm-smi prints; AMD's matrices are not read"),
    (r"\bamd-smi|ACCESS TABLE", "amd-smi prints; AMD's matrices are not read"),
    (r"\bxpu-smi|\bGPU 0/0\b", "xpu-smi prints; Intel's matrices are not read"),
    (r"\bnpu-smi|\bNPU0\b", "npu-smi prints; Huawei's matrices are not read"),
    (r"\bNVSMI LOG\b", "`nvidia-smi -q` prints, which has no matrix"),
    (r"^[\s|]*NVIDIA-SMI \d", "`nvidia-smi` prints, which has no matrix"),
    (r"GPU \d+: [^\n]*\(UUID: ", "`nvidia-smi -L` prints, which has no matrix"),
    (r"Link \d+: [^\n]*GB/s", "`nvidia-smi nvlink` prints, which has no matrix"),
    (r"<system version=", "NCCL writes as its topology, which is not read"),
    (r"^\s*Architecture:|NUMA node0 CPU", "lscpu prints, which has no matrix"),
    (r"available: \d+ nodes", "numactl prints, which has no matrix"),
    (r"GPU0[^\n]*\\n", "a program writes for a string, with \\n for a new line; print the text itself"),
    (r"GPU0[\"' ]*[,;]", "a spreadsheet writes; blanks or tabs stand between a matrix's cells, not commas"),
    (r"<t[hd]\b[^<>]*>", "a page of HTML holds; copy the text that it shows"),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a matrix.

    Attributes:
        number: of the line in the text, from 1.
        text: the line, cleaned.
        start: where the matrix's part of it begins, after a prefix.
    """

    number: int
    text: str
    start: int

    @property
    def body(self) -> str:
        """The matrix's part."""
        return self.text[self.start :]

    @property
    def prefix(self) -> str:
        """The prefix before that."""
        return self.text[: self.start]

    @property
    def is_table(self) -> bool:
        """Whether it is a row of a Markdown table. One or two bars are a quote mark, or a frame."""
        return self.body.lstrip().startswith("|") and self.body.count("|") > 2


@dataclass(frozen=True)
class Pasted:
    """A header line and the rows of GPUs below it, in order."""

    header: Line
    rows: tuple[Line, ...]


def find_matrix(text: str) -> Pasted:
    """The one matrix in a text.

    Raises:
        MatrixError: there is none (with what the text is instead), or there are two, or its lines are wrapped.
    """
    lines = _cleaned(text)
    headers = list(_headers(lines))
    found = [
        Pasted(header, _rows(header, lines[header.number : _end(header, headers[i:], len(lines))]))
        for i, header in enumerate(headers, 1)
    ]
    matrices = [one for one in found if any(SELF in _words(row.body) for row in one.rows)]
    of_peers = [one for one in matrices if any(_P2P & {*_words(row.body)} for row in one.rows)]
    matrices = [one for one in matrices if one not in of_peers]
    if not matrices:
        _refuse_others(lines)
    if of_peers and not matrices:
        what = "whether GPUs may reach each other, not over what"
        raise MatrixError(of_peers[0].header.number, f"`nvidia-smi topo -p2p` printed this; it says {what}")
    if len(matrices) > 1:
        first, second = (one.header.number for one in matrices[:2])
        raise MatrixError(
            second, f"a second matrix begins here, the first in line {first}; give one machine at a time"
        )
    if matrices or found:
        one = (matrices or found)[0]
        _refuse_wrapped(one, lines)
        return one
    for number, line in enumerate(lines, 1):
        label, *cells = _words(line[match.start() :] if (match := _GPU.search(line)) else line) or [""]
        if _ROW.fullmatch(label) and SELF in cells:
            raise MatrixError(number, "no header line that names GPU0")
    raise MatrixError(0, "no header line that names GPU0")


def _cleaned(text: str) -> list[str]:
    plain = html.unescape(_MARKS.sub("", text)).translate(_AS_ASCII)
    lines = [
        _QUOTE.sub("", line, count=1) if line.lstrip().startswith(">") else line for line in _lines(plain)
    ]
    return [
        line if line.count("|") > 2 or not line.lstrip().startswith("|") else line.replace("|", " ")
        for line in lines
    ]


def _lines(text: str) -> list[str]:
    return re.split(r"\r*\n|\r", text)


def _words(line: str) -> list[str]:
    return line.replace("|", " ").split()


def _headers(lines: Sequence[str]) -> Iterator[Line]:
    """Lines that look like the header of a matrix; after a prefix only if a row below has the same prefix."""
    other: Line | None = None
    seen = False
    for number, line in enumerate(lines, 1):
        match = _GPU.search(line)
        if match is None or any(map(_CELL.fullmatch, _words(line[match.start() :]))):
            continue
        lead = line[: match.start()]
        is_table = Line(number, line, 0).is_table
        header = Line(number, line, 0 if is_table else len(lead.rstrip()))
        if lead.strip() and not is_table and not _rows(header, lines[number : number + _NEAR]):
            continue
        if _HEADER.match(line, match.start()) or (is_table and "GPU0" in _words(line)):
            seen = True
            yield header
        elif other is None and not lead.strip(" |"):
            other = header
    if not seen and other is not None:
        # Its columns do not begin with GPU0; the reader of columns reports that.
        yield other


def _end(header: Line, later: Sequence[Line], last: int) -> int:
    """Where the rows below a header end: at the next header with the same prefix, as two machines may print at once."""
    prefix = _form(header.prefix)
    return next((one.number - 1 for one in later if header.is_table or _form(one.prefix) == prefix), last)


def _rows(header: Line, below: Sequence[str]) -> tuple[Line, ...]:
    """The rows of GPUs down to the legend."""
    found = []
    prefix = _form(header.prefix)
    for number, line in enumerate(below, header.number + 1):
        if _LEGEND.search(line):
            break
        if header.is_table:
            if "|" in line:
                found.append(Line(number, line, 0))
            continue
        match = _GPU.search(line)
        if match and _ROW.match(line, match.start()) and _form(line[: match.start()]) == prefix:
            found.append(Line(number, line, match.start()))
    return tuple(found)


def _form(prefix: str) -> str:
    """A prefix without the parts that differ from line to line: times, counts."""
    return re.sub(r"\d+", "0", " ".join(prefix.split()))


def _refuse_wrapped(matrix: Pasted, lines: Sequence[str]) -> None:
    """Refuses lines that a terminal wrapped: such a line only continues the header or a row."""
    if matrix.header.is_table:
        return
    rows = {row.number for row in matrix.rows}
    prefix = _form(matrix.header.prefix)
    after_header, after_row = True, False
    for number, line in enumerate(lines[matrix.header.number :], matrix.header.number + 1):
        words = _words(line)
        if _LEGEND.search(line) or (rows and number > max(rows) + 1):
            return
        if not words or _form(line) == prefix:
            continue
        cells = [_CELL.fullmatch(word) is not None for word in words]
        more_names = after_header and _NAME.fullmatch(words[0]) is not None and not any(cells)
        if more_names or ((after_header or after_row) and all(cells)):
            raise MatrixError(
                number, "the lines are wrapped, this one goes on with the one before; write them to a file"
            )
        after_header, after_row = False, number in rows


def _refuse_others(lines: Sequence[str]) -> None:
    """Says what the text is instead of a matrix, if that is recognized."""
    for number, line in enumerate(lines, 1):
        if _ROW.match(line.lstrip()) is None and _ERROR.search(line):
            said = "".join(one if one.isprintable() else " " for one in line.strip(" .\t"))
            raise MatrixError(number, f"no matrix, but an error: {shortened(said, 200)}")
    for pattern, what in _OTHERS:
        for number, line in enumerate(lines, 1):
            if re.search(pattern, line):
                raise MatrixError(number, f"this is what {what}")


def shortened(text: str, most: int = 40) -> str:
    """A text shortened for a message."""
    return text if len(text) <= most else f"{text[:most]}..."
