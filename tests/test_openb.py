"""The openb benchmark, on a cluster small enough to check by hand. The trace itself is not in this repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.openb import arrivals, bound, load, milli, most, run, total_of
from placement.core.policy import Policy

NODES = "sn,cpu_milli,memory_mib,gpu,model\n" + "".join(f"n{i},32000,65536,4,T4\n" for i in range(3))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "openb_node_list_gpu_node.csv").write_text(NODES)
    pods = (
        "".join(f"p{i},1000,1024,1,{600 if i % 2 else 400}\n" for i in range(20)) + "big,8000,4096,4,1000\n"
    )
    (tmp_path / "openb_pod_list_tiny.csv").write_text("name,cpu_milli,memory_mib,num_gpu,gpu_milli\n" + pods)
    return tmp_path


def test_pods_are_drawn_until_130_percent_are_asked_for(data: Path) -> None:
    snapshot, pods = load(data, "tiny")
    total = total_of(snapshot)
    sequence = arrivals(pods, total, 42)
    assert total == 12_000
    assert sorted(map(id, sequence[: len(pods)])) == sorted(map(id, pods))
    assert sum(map(milli, sequence[:-1])) < 1.3 * total <= sum(map(milli, sequence))
    assert sequence == arrivals(pods, total, 42) != arrivals(pods, total, 43)


@pytest.mark.parametrize("policy", [Policy.FRAGMENTATION, Policy.TOPOLOGY])
def test_a_run_never_allocates_more_than_has_come_or_than_the_bound(data: Path, policy: Policy) -> None:
    reached, seconds = run(data, "tiny", policy, 42)
    assert seconds > 0
    assert reached == sorted(reached)
    for mark, percent in zip((80, 90, 100, 110, 120, 130), reached, strict=True):
        assert 0 < percent <= bound(data, "tiny", 42, mark) + 1e-6 <= 100 + 1e-6


def test_the_bound_knows_that_shares_do_not_span_gpus(data: Path) -> None:
    snapshot, pods = load(data, "tiny")
    small, large, big = (next(pod for pod in pods if milli(pod) == size) for size in (400, 600, 4000))
    assert most([(large, 100)], snapshot.nodes) == pytest.approx(12 * 600)
    assert most([(large, 100), (small, 100)], snapshot.nodes) == pytest.approx(12_000)
    assert most([(large, 2), (small, 1)], snapshot.nodes) == pytest.approx(1600)
    assert most([(big, 2)], snapshot.nodes) == pytest.approx(8000)


def test_the_command_prints_a_table(data: Path) -> None:
    header = "workload,policy," + ",".join(
        f"allocated_percent_at_arrived_{m}" for m in (80, 90, 100, 110, 120, 130)
    )
    (data / "published_allocation.csv").write_text(f"{header}\nopenb_pod_list_tiny,FGD,1,2,3,4,5,6\n")
    command = [sys.executable, "-m", "benchmarks.openb", str(data), "--seeds", "1", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert any(line.startswith("FGD, published") and line.endswith("6.00") for line in lines)
    assert any(line.startswith("ours, fragmentation") for line in lines)
    assert any(line.startswith("at most") for line in lines)


def test_a_folder_without_the_trace_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.openb", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "holds no openb_node_list_gpu_node.csv" in done.stderr
