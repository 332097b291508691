"""A cluster whose Python has no placement, or another one, and drivers that have it: they are told what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from placement.runtime.embedded import embedded_cluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PACKAGE = Path(placement.__file__).parent
FIX = (
    "; install ray-placement, and nothing else that is imported as `placement`, in the Python that runs `ray start`, "
    "there and on all GPU nodes: the service uses no job's runtime_env"
)


@contextmanager
def cluster(*path: Path) -> Iterator[str]:
    """The address of a cluster whose processes import from these folders first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, path)))
        with embedded_cluster([]) as running:
            yield running.address


def told(address: str, runtime_env: dict[str, Any]) -> str:
    """What a driver hears that starts the service."""
    ray.shutdown()
    here = os.getcwd()
    os.chdir("/")  # to Ray a driver's folder is one to import from
    try:
        ray.init(
            address, _node_ip_address=address.split(":")[0], runtime_env=runtime_env, log_to_driver=False
        )
    finally:
        os.chdir(here)
    with pytest.raises(placement.ServiceNotRunning) as refused:
        placement.start()
    with pytest.raises(placement.ServiceNotRunning, match="placement up"):
        placement.connect()
    return refused.value.problem


# These two first: one cluster at a time.


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with the package of openstack-placement, as far as it matters."""
    (tmp_path / "placement").mkdir()
    for name in ("__init__.py", "microversion.py"):
        (tmp_path / "placement" / name).touch()
    return tmp_path


def test_openstacks_placement_in_place_of_ours_is_told(theirs: Path) -> None:
    with cluster(theirs) as address:
        assert "on the head node: No module named 'placement.runtime'" + FIX == told(address, {})


def test_openstacks_placement_beside_ours_is_told(theirs: Path) -> None:
    with cluster(PACKAGE.parent, theirs) as address:
        problem = told(address, {})
    assert problem.startswith("on the head node: ray-placement and openstack-placement (in ")
    assert problem.endswith(FIX)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bare")
    absent = "raise ModuleNotFoundError(\"No module named 'placement'\", name='placement')"
    (folder / "placement.py").write_text(absent)
    with cluster(folder) as address:
        yield address


@pytest.mark.parametrize(
    "runtime_env",
    [{}, {"env_vars": {"MARK": "1"}}, {"py_modules": [str(PACKAGE)]}],
    ids=["nothing", "env_vars", "py_modules"],
)
def test_what_the_cluster_lacks_is_said_with_the_fix(without: str, runtime_env: dict[str, Any]) -> None:
    """Code that a driver brings along is not the service's, so that it does not help."""
    assert "on the head node: No module named 'placement'" + FIX == told(without, runtime_env)
