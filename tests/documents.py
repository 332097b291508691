"""The README and the documentation as tests read them: their pages and the code blocks in them.

A comment right before a block says what becomes of it::

    <!-- run -->                 Python: run on a cluster, by tests/integration/test_documents.py
    <!-- not run: REASON -->     Python that cannot run there; it is compiled
    <!-- compared: NAME -->      console: the commands are run, and what they print is compared

Every block of Python has one of the first two. TOML, YAML and JSON go through the reader that users have, and each
command of ``placement`` on a console is parsed as the command line does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(
    r"^(?:<!-- *(?P<mark>[^\n]*?) *-->\n)?(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A code block: its page from the root on, its line there, its language, what the comment says, and the code."""

    page: str
    line: int
    language: str
    mark: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """What a reader types on a console, continued lines joined."""
        joined = self.code.replace("\\\n", " ")
        return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def blocks_of(page: Path) -> list[Block]:
    """The code blocks of a page."""
    text, name = page.read_text(), str(page.relative_to(ROOT))
    return [
        Block(
            name,
            text[: match.start("language")].count("\n") + 1,
            match["language"],
            match["mark"] or "",
            match["code"],
        )
        for match in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """All that a link may name on a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}
