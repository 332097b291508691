"""The wheel, as a user gets it: built, installed where nothing else is, and run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from placement import __version__

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMED = f"ray_placement-{__version__}"


def output(*command: str | Path, cwd: Path) -> str:
    """What the command prints; a failure shows what it said."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert 0 == done.returncode, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(folder: Path) -> Path:
    """The Python of a new, empty virtual environment."""
    venv.create(folder)
    return folder / "bin" / "python"


def pip(python: Path, *command: str | Path, cwd: Path) -> str:
    """What this environment's pip prints, for the environment of this Python, which has none: that takes long."""
    options = ("--python", python, "--quiet", "--disable-pip-version-check")
    return output(sys.executable, "-m", "pip", *options, *command, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    output(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.iterdir()
    return built


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    assert f"{NAMED}-py3-none-any.whl" == wheel.name
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "placement").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"placement/py.typed", "placement/topologies/catalogue.toml"} <= sources
    metadata = f"{NAMED}.dist-info/"
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(metadata)}
    assert sources == packed


@pytest.mark.timeout(900)  # installs Ray, over a slow line at worst
def test_the_wheel_installs_into_an_empty_environment_and_runs(wheel: Path, tmp_path: Path) -> None:
    # From a folder of its own, so that the checkout cannot stand in for what was not packed.
    python = environment(tmp_path / "environment")
    pip(python, "install", wheel, cwd=tmp_path)

    assert "Usage: placement" in output(python.parent / "placement", "--help", cwd=tmp_path)

    installed = (
        "import placement; from importlib.metadata import version;"
        "print(placement.__file__, placement.__version__, version('ray-placement'))"
    )
    file, *versions = output(python, "-c", installed, cwd=tmp_path).split()
    assert file.startswith(str(tmp_path / "environment"))
    assert [__version__, __version__] == versions
    topologies = (
        "from importlib.resources import files;"
        "print(*sorted(p.name for p in files('placement.topologies').iterdir() if p.name.endswith('.txt')))"
    )
    assert {path.name for path in (ROOT / "placement" / "topologies").glob("*.txt")} == set(
        output(python, "-c", topologies, cwd=tmp_path).split()
    )


@pytest.mark.timeout(900)
def test_an_allowed_ray_that_is_there_already_stays(wheel: Path, tmp_path: Path) -> None:
    requirement = next(text for text in PROJECT["dependencies"] if text.startswith("ray"))
    [lowest] = re.findall(r">=(\d+\.\d+)", requirement)
    python = environment(tmp_path / "environment")
    pip(python, "install", "--no-deps", f"ray=={lowest}", cwd=tmp_path)
    report = pip(python, "install", "--dry-run", "--report", "-", wheel, cwd=tmp_path)
    installs = {one["metadata"]["name"] for one in json.loads(report)["install"]}
    assert "ray-placement" in installs
    assert "ray" not in installs


OPENSTACK = "openstack-placement"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("other", [OPENSTACK, "placement"])
def test_what_overwrites_its_files_is_told_with_a_fix_that_helps(
    wheel: Path, tmp_path: Path, other: str
) -> None:
    python = environment(tmp_path / "environment")
    pip(python, "install", "--no-deps", wheel, cwd=tmp_path)
    pip(python, "install", "--no-deps", other, cwd=tmp_path)
    failed = subprocess.run([python.parent / "placement", "up"], cwd=tmp_path, capture_output=True, text=True)
    *_, said = failed.stderr.splitlines()
    assert said.startswith("ImportError: "), failed.stderr
    assert {OPENSTACK: "are both imported as `placement`", "placement": "is not complete"}[other] in said
    fix = re.findall("`python -m pip (uninstall .*?)`", said)[0].split()
    pip(python, *fix, cwd=tmp_path)
    pip(python, "install", "--no-deps", wheel, cwd=tmp_path)
    output(python, "-c", "import placement", cwd=tmp_path)
