"""A process binds itself to CPUs and memory."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from typing import Any

import pytest

CPUS = sorted(os.sched_getaffinity(0))

BOUND = """
import json, os, sys, threading
may = {int(cpu) for cpu in sys.argv[1].split(",")}
os.sched_setaffinity(0, may)
ready, done = threading.Event(), threading.Event()
def early():
    ready.set()
    done.wait()
    seen.append(sorted(os.sched_getaffinity(0)))
seen = []
thread = threading.Thread(target=early)
thread.start()
ready.wait()
import placement
bound = placement.bind()
done.set()
thread.join()
late = threading.Thread(target=lambda: seen.append(sorted(os.sched_getaffinity(0))))
late.start()
late.join()
assert "ray" not in sys.modules
print(json.dumps([sorted(bound.cpus), bound.numa_node, sorted(os.sched_getaffinity(0)), *seen]))
"""


def bound(may: list[int], **variables: str) -> list[Any]:
    """What :func:`bind` says where some CPUs may be used, and where it, an older and a later thread then run."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PLACEMENT_")} | variables
    command = [sys.executable, "-c", BOUND, ",".join(map(str, may))]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


needs_two = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")


@needs_two
def test_all_threads_run_on_the_cpus_that_are_told() -> None:
    last = [CPUS[-1]]
    assert bound(CPUS, PLACEMENT_CPUS=str(CPUS[-1])) == [last, None, last, last, last]


@needs_two
def test_a_process_stays_within_the_cpus_that_it_has() -> None:
    first = CPUS[:1]
    assert bound(first, PLACEMENT_CPUS=f"{CPUS[0]}-{CPUS[-1]}") == [first, None, first, first, first]
    assert bound(first, PLACEMENT_CPUS=f"{CPUS[1]},9000-9003") == [[], None, first, first, first]


def test_without_variables_everything_stays_as_it_is() -> None:
    assert bound(CPUS) == [[], None, CPUS, CPUS, CPUS]
    assert bound(CPUS, PLACEMENT_CPUS="", PLACEMENT_NUMA_NODE="") == [[], None, CPUS, CPUS, CPUS]


def test_memory_comes_from_a_numa_node_that_the_process_may_use() -> None:
    try:
        there = ctypes.CDLL("libnuma.so.1").numa_available() >= 0
    except OSError:
        there = False
    node = 0 if there else None
    assert bound(CPUS, PLACEMENT_NUMA_NODE="0") == [[], node, CPUS, CPUS, CPUS]
    assert bound(CPUS, PLACEMENT_NUMA_NODE="1023") == [[], None, CPUS, CPUS, CPUS]


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PLACEMENT_CPUS", "all"), ("PLACEMENT_CPUS", "0-"), ("PLACEMENT_CPUS", "0,,1"), ("PLACEMENT_NUMA_NODE", "-1")],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import placement

    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"{variable} is '{value}'; it has to be .*, or unset"):
        placement.bind()
