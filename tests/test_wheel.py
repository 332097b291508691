"""The wheel, as a user gets it: built, installed where nothing else is, and run."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def output(*command: str | Path, cwd: Path) -> str:
    """What the command prints; a failure shows what it said."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert 0 == done.returncode, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    assert f"placement-{VERSION}-py3-none-any.whl" == wheel.name
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "placement").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"placement/py.typed", "placement/topologies/catalogue.toml"} <= sources
    metadata = f"placement-{VERSION}.dist-info/"
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(metadata)}
    assert sources == packed


@pytest.mark.timeout(900)  # installs Ray, over a slow line at worst
def test_the_wheel_installs_into_an_empty_environment_and_runs(wheel: Path, tmp_path: Path) -> None:
    # From a folder of its own, so that the checkout cannot stand in for what was not packed.
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    output(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=tmp_path)

    assert "Usage: placement" in output(environment / "bin" / "placement", "--help", cwd=tmp_path)

    installed = "import placement; from importlib.resources import files; print(placement.__file__)"
    assert output(python, "-c", installed, cwd=tmp_path).startswith(str(environment))
    topologies = (
        "from importlib.resources import files;"
        "print(*sorted(p.name for p in files('placement.topologies').iterdir() if p.name.endswith('.txt')))"
    )
    assert {path.name for path in (ROOT / "placement" / "topologies").glob("*.txt")} == set(
        output(python, "-c", topologies, cwd=tmp_path).split()
    )
