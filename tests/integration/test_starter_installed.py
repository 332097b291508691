"""A cluster whose Python has no placement, and drivers that have it: they are told what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import placement
from placement.runtime.embedded import embedded_cluster

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("bare")
    absent = "raise ModuleNotFoundError(\"No module named 'placement'\", name='placement')"
    (folder / "placement.py").write_text(absent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with embedded_cluster([]) as running:
            yield running.address


@pytest.mark.parametrize("field", ["nothing", "env_vars", "py_modules"])
def test_what_the_cluster_lacks_is_said_with_the_fix(address: str, field: str) -> None:
    """Code that a driver brings along is not the service's, so that it does not help."""
    ray.shutdown()
    package = str(Path(placement.__file__).parent)
    env = {"nothing": {}, "env_vars": {"env_vars": {"MARK": "1"}}, "py_modules": {"py_modules": [package]}}[
        field
    ]
    here = os.getcwd()
    os.chdir("/")  # to Ray a driver's folder is one to import from
    try:
        ray.init(address, _node_ip_address=address.split(":")[0], runtime_env=env, log_to_driver=False)
    finally:
        os.chdir(here)
    with pytest.raises(
        placement.ServiceNotRunning, match="No module named 'placement' on the head node; "
    ) as e:
        placement.start()
    assert "install placement in the Python that runs `ray start`" in str(e.value)
    with pytest.raises(placement.ServiceNotRunning, match="placement up"):
        placement.connect()
