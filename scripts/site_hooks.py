"""What mkdocs.yml asks of MkDocs while it builds: files outside of docs/ that pages link to become pages, too.

On a code host a link to ``../examples/bind.py`` shows that file. The site has no such file, so each one that a page
links to is shown as a page of its own; Markdown files, such as CONTRIBUTING.md, as what they are.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
ROLE = re.compile(r":[a-z]+:<code>~?([^<]*)</code>")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".sh": "bash", ".c": "c"}
OUTSIDE = "source/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file outside of docs/ that a page links to."""
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while waiting:
        source, text = waiting.pop()
        for target in _targets(source, text):
            uri = _uri(target)
            if target.startswith("docs/") or files.get_file_from_path(uri) or not (ROOT / target).is_file():
                continue
            linked = (ROOT / target).read_text()
            shown = linked if target.endswith(".md") else _as_page(target, linked)
            files.append(File.generated(config, uri, content=shown, inclusion=InclusionLevel.NOT_IN_NAV))
            if target.endswith(".md"):
                waiting.append((target, linked))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Has links lead to the pages, wherever they led in the repository."""
    uri = page.file.src_uri
    outside = uri.removeprefix(OUTSIDE)
    source = f"docs/{uri}" if outside == uri else outside
    if source != f"docs/{uri}" and not (ROOT / source).is_file():
        return markdown  # a file that is shown as a page, which holds no links

    def lead(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        return posixpath.relpath(_uri(target), posixpath.dirname(uri) or ".") + (match[2] or "")

    return LINK.sub(lead, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Shows the names in docstrings, which say their kind for other tools, as names alone."""
    return ROLE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)


def _targets(source: str, text: str) -> Iterator[str]:
    """The files that a file links to, from the root of the repository."""
    for match in LINK.finditer(text):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))


def _uri(target: str) -> str:
    """Where a file of the repository is in the site."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return OUTSIDE + target + ("" if target.endswith(".md") else ".md")


def _as_page(target: str, text: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text + "``")))
    return f"# {target}\n\n{fence}{LANGUAGES.get(Path(target).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"
