"""What ``make release`` refuses, before it checks, builds or tags anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from placement import __version__

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = f"# Changelog\n\n## {__version__} (2026-11-26)\n"


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    """A repository of which a release could be made, but for a Makefile: without one `make lint` fails."""
    for name in ("scripts/release", "placement/__init__.py"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")


def refused(folder: Path) -> str:
    tags = git(folder, "tag")
    done = subprocess.run([folder / "scripts/release"], capture_output=True, text=True)
    assert 0 != done.returncode
    assert tags == git(folder, "tag")
    return done.stderr


def test_a_failing_check_ends_it(ready: Path) -> None:
    error = refused(ready)
    assert "lint" in error
    assert "no release" not in error


def test_a_tree_with_changes(ready: Path) -> None:
    (ready / "left").touch()
    assert "no release: the working tree has changes; commit or remove them\n" == refused(ready)


def test_a_version_that_is_tagged_already(ready: Path) -> None:
    git(ready, "tag", f"v{__version__}")
    assert (
        f"no release: the tag v{__version__} is there already; raise __version__ in placement/__init__.py\n"
        == (refused(ready))
    )


@pytest.mark.parametrize(
    "heading", [f"## {__version__} (unreleased)", f"## {__version__}.1 (2026-11-26)", ""]
)
def test_a_changelog_without_a_dated_section_for_it(ready: Path, heading: str) -> None:
    (ready / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
    commit(ready)
    assert f"CHANGELOG.md has no heading '## {__version__} (YYYY-MM-DD)'" in refused(ready)
