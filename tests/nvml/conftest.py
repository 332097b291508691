"""The fake NVML, compiled once, and two ways to see a machine through it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import pynvml
import pytest

from placement import nvml
from placement.wire.facts import NodeFacts
from tests import fake_nvml


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_nvml.build(tmp_path_factory.mktemp("fake-nvml"))


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The file that describes the machine; a test writes it."""
    return tmp_path / "machine.txt"


@pytest.fixture
def env(library: Path, machine: Path) -> dict[str, str]:
    """For a child process that shall see ``machine``."""
    return fake_nvml.environment(library, machine)


@pytest.fixture
def read_machine(
    library: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], NodeFacts]]:
    """Reads a described machine in this process, which is quick: the tables of faults need hundreds."""
    # pynvml loads its library unless it has one, and keeps every function that it found.
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(library)))
    monkeypatch.setenv("FAKE_NVML_MACHINE", str(machine))
    monkeypatch.setenv("PLACEMENT_HOST_ROOT", str(machine.with_name("host")))
    pynvml._nvmlGetFunctionPointer_cache.clear()

    def read(description: str) -> NodeFacts:
        machine.write_text(description)
        return nvml.read()

    yield read
    pynvml._nvmlGetFunctionPointer_cache.clear()
