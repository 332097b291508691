"""On real nodes with GPUs taken by other Ray users, a replica's workers sit on the best free set there is."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from placement import topologies
from placement.core.score import score
from placement.core.topology import Topology
from placement.runtime.probing import AnotherUser, another_user
from tests.integration.test_place import ranks_gpus

pytestmark = pytest.mark.integration

MACHINES = {"dgx": topologies.load("dgx-1v"), "pcie": topologies.load("a100-pcie-4x")}


def taken(users: list[AnotherUser]) -> frozenset[int]:
    """The GPUs that other users hold: the lowest, since Ray gave them."""
    return frozenset(range(len(users)))


def best_bandwidth(machine: Topology, free: frozenset[int], count: int) -> float:
    return max(score(machine, gpus).bandwidth_gb_per_s for gpus in combinations(sorted(free), count))


@pytest.mark.parametrize(("node", "busy"), [("pcie", 1), ("pcie", 2), ("dgx", 1), ("dgx", 2), ("dgx", 3)])
def test_workers_sit_on_the_best_free_set(service: Any, node: str, busy: int) -> None:
    machine = MACHINES[node]
    users = [another_user(node) for _ in range(busy)]
    free = frozenset(range(len(machine))) - taken(users)
    sizes = [count for count in (2, 3, 4) if count <= len(free)]
    random.Random(busy).shuffle(sizes)
    try:
        for step, count in enumerate(sizes):
            if count > len(free):
                continue
            result = ray.get(
                service.place.remote({"name": f"r{step}", "model": "m", "gpus": count}, {"gpu_nodes": [node]})
            )
            [assignment] = result.assignments
            assert ranks_gpus(assignment) == assignment.gpus
            assert set(assignment.gpus) <= free
            reached = score(machine, assignment.gpus).bandwidth_gb_per_s
            assert reached == assignment.bandwidth_gb_per_s == best_bandwidth(machine, free, count)
            free -= set(assignment.gpus)
    finally:
        for user in users:
            user.leave()


def test_a_floor_is_kept_on_the_real_node(service: Any) -> None:
    user = another_user("pcie")
    try:
        wanted = {"name": "tp", "model": "m", "gpus": 3, "within": "nvlink"}
        with pytest.raises(
            placement.BelowFloor,
            match="even with all its GPUs free; at best pcie has 4 GPUs, but in NVLink islands of 2 \\+ 2",
        ):
            ray.get(service.place.remote(wanted, {"gpu_nodes": ["pcie"]}))
        result = ray.get(service.place.remote(wanted))
        [assignment] = result.assignments
        assert (assignment.node_name, assignment.bandwidth_gb_per_s) == ("dgx", 40.0)
        assert ranks_gpus(assignment) == assignment.gpus
    finally:
        user.leave()


def test_two_replicas_with_a_floor_share_a_node(service: Any) -> None:
    wanted = {"name": "pairs", "model": "m", "gpus": 2, "replicas": 4, "within": "nvlink"}
    result = ray.get(service.place.remote(wanted, {"gpu_nodes": ["dgx"]}))
    assert len({gpu for a in result.assignments for gpu in a.gpus}) == 8
    assert all(a.weakest_link in ("NV1", "NV2") for a in result.assignments)


def test_a_snapshot_plans_on_any_laptop_as_the_service_does(
    service: Any, address: str, tmp_path: Path
) -> None:
    user = another_user("pcie")
    try:
        ray.get(service.place.remote({"name": "stands", "model": "m", "gpus": 4}))
        placement_command = str(Path(sys.executable).with_name("placement"))
        deployments = tmp_path / "d.toml"
        deployments.write_text(
            '[[deployments]]\nname = "stands"\nmodel = "m"\ngpus = 4\nreplicas = 2\n'
            '[[deployments]]\nname = "pair"\nmodel = "m"\ngpus = 2\nwithin = "nvlink"\n'
        )
        taken_now = _run(placement_command, "snapshot", "--address", address)
        assert "OPENAI_API_KEY" not in taken_now
        (tmp_path / "cluster.json").write_text(taken_now)
        live = _run(placement_command, "plan", str(deployments), "--json", "--address", address)
        offline = _run(
            placement_command, "plan", str(deployments), "--json", "--file", str(tmp_path / "cluster.json")
        )
        assert json.loads(offline) == json.loads(live)
        explained = _run(placement_command, "plan", str(deployments), "--explain", "--address", address)
        assert "pair: 5 nodes" in explained
    finally:
        user.leave()


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
