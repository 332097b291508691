"""Another distribution that is imported as ``placement``; ``tests/test_wheel.py`` has the real ones installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OURS = Path(__file__).resolve().parents[1] / "placement"


def said(code: str, *path: Path) -> str:
    """The last line of stderr of a Python that imports from these folders alone; empty if all is well."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-P", "-S", "-c", code], env=env, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package, as if installed there."""
    shutil.copytree(OURS, tmp_path / "ours" / "placement", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "ours"


def openstack(folder: Path) -> Path:
    (folder / "placement").mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "errors.py", "microversion.py"):
        (folder / "placement" / name).write_text("")
    return folder


def test_a_copy_beside_another_copy_of_ours_is_fine(copy: Path) -> None:
    assert "" == said("import placement.cli, placement.runtime", copy, OURS.parent)


def test_openstack_in_another_folder_is_refused_at_import(tmp_path: Path) -> None:
    theirs = openstack(tmp_path / "theirs")
    error = said("import placement", OURS.parent, theirs)
    assert error.startswith(
        f"ImportError: ray-placement and openstack-placement (in {theirs}) are both imported as `placement`"
    )
    assert "`python -m pip uninstall -y openstack-placement placement ray-placement`" in error


@pytest.mark.parametrize("package", ["cli", "runtime"])
def test_openstack_that_overwrote_our_files_is_told(copy: Path, package: str) -> None:
    error = said(f"import placement.{package}", openstack(copy))
    assert error.startswith("ImportError: ray-placement and openstack-placement (in "), error


@pytest.mark.parametrize("package", ["cli", "runtime"])
@pytest.mark.parametrize("left", ["'''coming soon'''", None])
def test_an_init_that_was_overwritten_or_removed_is_told(copy: Path, package: str, left: str | None) -> None:
    file = copy / "placement" / "__init__.py"
    file.unlink() if left is None else file.write_text(left)
    error = said(f"import placement.{package}", copy)
    assert error.startswith(f"ImportError: `placement` in {copy / 'placement'} is not complete"), error
