"""Reading in a child process: deadlines, hangs, crashes. Every child here is a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

import placement
from placement import topologies
from placement.nvml import Reader
from placement.wire.facts import NodeFacts
from tests import fake_nvml

PACKAGE_ROOT = Path(placement.__file__).parents[1]
DGX = fake_nvml.as_matrix(replace(topologies.load("dgx-1v"), nics=()))  # NVML does not tell them
PATIENT, SHORT = 120.0, 0.5
"""Deadlines in seconds: one that a busy machine keeps, and one for a reading that hangs anyway."""
HANG = "hang nvmlDeviceGetCount_v2\n"


class Clock:
    """A clock that the test winds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Child(subprocess.Popen[str]):
    """A real child process, counted. ``unkillable``: in the driver, where no signal arrives."""

    started: ClassVar[list[Child]] = []
    unkillable = False

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[call-overload]
        Child.started.append(self)

    def kill(self) -> None:
        if not Child.unkillable:
            super().kill()


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Child]]:
    monkeypatch.setattr(Child, "started", [])
    monkeypatch.setattr(Child, "unkillable", False)
    monkeypatch.setattr(subprocess, "Popen", Child)
    yield Child.started
    for child in Child.started:
        super(Child, child).kill()
        child.wait()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reader(env: dict[str, str], clock: Clock) -> Iterator[Reader]:
    reader = Reader(deadline_seconds=PATIENT, env=env, clock=clock)
    yield reader
    reader.close()


def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < give_up, "it never happened"
        time.sleep(0.01)


def refreshed(reader: Reader) -> NodeFacts:
    """The facts after one more reading has ended, well or badly."""
    reader.refresh()
    until(lambda: not any(thread.name == "nvml-reader" for thread in threading.enumerate()))
    return reader.facts()


def test_the_first_facts_are_read_by_a_child(reader: Reader, machine: Path, children: list[Child]) -> None:
    machine.write_text(fake_nvml.describe(DGX))
    facts = reader.facts()
    assert ("nvml", 0.0, None) == (facts.source, facts.age_seconds, facts.problem)
    assert fake_nvml.as_matrix(facts.topology()) == DGX
    assert [fake_nvml.uuid(gpu) for gpu in range(8)] == [gpu.uuid for gpu in facts.gpus]
    assert [0] == [child.returncode for child in children]


def test_a_reading_grows_old_until_it_is_refreshed(reader: Reader, machine: Path, clock: Clock) -> None:
    machine.write_text("gpus 1\n")
    assert 0.0 == reader.facts().age_seconds
    clock.now += 7.5
    machine.write_text("gpus 3\n")
    assert (7.5, 1) == (reader.facts().age_seconds, len(reader.facts().gpus))
    assert (0.0, 3) == (refreshed(reader).age_seconds, len(reader.facts().gpus))


def test_a_reading_that_is_too_old_is_replaced_first(
    reader: Reader, machine: Path, clock: Clock, children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "placement.nvml.reader._FRESH_SECONDS", 60
    )  # by the real clock; the machine may be overrun
    reader.facts()
    clock.now += 3
    assert reader.facts(max_age_seconds=5).age_seconds == 3
    assert reader.facts(max_age_seconds=2).age_seconds == 0
    assert len(children) == 2


def test_many_who_ask_first_share_one_reading(reader: Reader, machine: Path, children: list[Child]) -> None:
    machine.write_text(fake_nvml.describe(DGX))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: reader.facts(), range(8)))
    assert [answers[0]] * 8 == answers
    assert 1 == len(children)


def test_a_first_reading_that_hangs_is_given_up(reader: Reader, machine: Path, children: list[Child]) -> None:
    reader.deadline_seconds = SHORT
    machine.write_text(fake_nvml.describe(DGX, HANG))
    expected = NodeFacts(source="none", problem="NVML did not answer within 0.5 s")
    assert expected == reader.facts()
    until(lambda: children[0].poll() is not None)
    assert expected == reader.facts()


def test_the_last_good_reading_outlives_a_hang(reader: Reader, machine: Path, clock: Clock) -> None:
    machine.write_text(fake_nvml.describe(DGX))
    good = reader.facts()
    reader.deadline_seconds = SHORT
    machine.write_text(fake_nvml.describe(DGX, HANG))
    clock.now += 3
    late = refreshed(reader)
    assert good.model_copy(update={"age_seconds": 3.0, "problem": "NVML did not answer within 0.5 s"}) == late
    clock.now += 4
    assert 7.0 == reader.facts().age_seconds

    reader.deadline_seconds = PATIENT
    machine.write_text(fake_nvml.describe(DGX))
    assert good == refreshed(reader)


def test_no_second_child_is_started_beside_one_that_cannot_be_killed(
    reader: Reader, machine: Path, clock: Clock, children: list[Child]
) -> None:
    machine.write_text(fake_nvml.describe(DGX))
    good = reader.facts()
    Child.unkillable = True
    reader.deadline_seconds = SHORT
    machine.write_text(fake_nvml.describe(DGX, HANG))
    stuck_facts = refreshed(reader)
    stuck = children[1]
    assert stuck.poll() is None
    assert stuck_facts.problem == (
        f"NVML did not answer within 0.5 s; it is not asked again while process {stuck.pid} hangs in the driver"
    )
    clock.now += 60
    for _ in range(3):
        assert stuck_facts.model_copy(update={"age_seconds": 60.0}) == refreshed(reader)
    assert 2 == len(children)

    Child.unkillable = False
    stuck.kill()
    stuck.wait()
    reader.deadline_seconds = PATIENT
    machine.write_text(fake_nvml.describe(DGX))
    assert good == refreshed(reader)
    assert 3 == len(children)


def test_a_crash_inside_nvml_harms_nobody(reader: Reader, machine: Path) -> None:
    machine.write_text(fake_nvml.describe(DGX, "crash nvmlDeviceGetP2PStatus"))
    facts = reader.facts()
    assert ("none", ()) == (facts.source, facts.gpus)
    assert facts.problem is not None
    assert facts.problem.startswith("the NVML process ended with code -6: ")


def test_without_a_library_there_is_no_source(tmp_path: Path) -> None:
    # An unusable library also hides a real one of this machine.
    (tmp_path / fake_nvml.LIBRARY).write_text("")
    reader = Reader(env={"LD_LIBRARY_PATH": str(tmp_path)}, deadline_seconds=PATIENT)
    facts = reader.facts()
    assert ("none", ()) == (facts.source, facts.gpus)
    assert "no NVIDIA driver here: libnvidia-ml.so.1 cannot be loaded" == facts.problem
    reader.close()


def test_a_driver_that_goes_away_leaves_the_last_good_reading(reader: Reader, machine: Path) -> None:
    machine.write_text(fake_nvml.describe(DGX))
    good = reader.facts()
    machine.unlink()
    problem = "NVML does not start: Driver Not Loaded (NVML error 9)"
    assert good.model_copy(update={"problem": problem}) == refreshed(reader)


def test_a_driver_that_comes_later_is_found(reader: Reader, machine: Path) -> None:
    assert "none" == reader.facts().source
    machine.write_text(fake_nvml.describe(DGX))
    assert ("nvml", DGX, None) == (
        refreshed(reader).source,
        fake_nvml.as_matrix(reader.facts().topology()),
        reader.facts().problem,
    )


def test_a_child_that_cannot_be_started_is_a_problem_not_an_exception(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    facts = reader.facts()
    assert "none" == facts.source
    assert "No such file or directory: '/no/such/python'" in str(facts.problem)


def test_closing_ends_a_reading_that_hangs(reader: Reader, machine: Path, children: list[Child]) -> None:
    machine.write_text(fake_nvml.describe(DGX, HANG))
    reader.refresh()
    until(lambda: bool(children))
    reader.close()
    until(lambda: children[0].returncode is not None)
    assert NodeFacts(source="none", problem="the reader is closed") == reader.facts()
    reader.refresh()
    assert 1 == len(children)


def test_what_was_read_can_be_asked_for_after_closing(reader: Reader, machine: Path) -> None:
    machine.write_text(fake_nvml.describe(DGX))
    good = reader.facts()
    reader.close()
    assert good.model_copy(update={"problem": "the reader is closed"}) == reader.facts()


def test_the_module_prints_one_json_document(env: dict[str, str], machine: Path) -> None:
    machine.write_text(fake_nvml.describe(DGX))
    command = [sys.executable, "-m", "placement.nvml"]
    environment = {**os.environ, **env, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "" == done.stderr
    assert DGX == fake_nvml.as_matrix(NodeFacts.model_validate(json.loads(done.stdout)).topology())


def test_the_child_finds_the_package_where_its_parent_found_it(
    env: dict[str, str], machine: Path, tmp_path: Path
) -> None:
    # A folder of that name in the working directory is not it, and no variable points to the real one.
    (tmp_path / "placement").mkdir()
    (tmp_path / "placement" / "__init__.py").write_text("raise ImportError('the wrong one')")
    machine.write_text(fake_nvml.describe(DGX))
    program = (
        f"import sys; sys.path.insert(0, {str(PACKAGE_ROOT)!r})\n"
        "from placement.nvml import Reader\n"
        f"print(Reader(deadline_seconds={PATIENT}).facts().model_dump_json())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert DGX == fake_nvml.as_matrix(NodeFacts.model_validate_json(done.stdout).topology())


def test_reading_needs_no_ray() -> None:
    program = "import sys, placement.nvml; print([m for m in sys.modules if m.split('.')[0] == 'ray'])"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "[]" == done.stdout.strip()
