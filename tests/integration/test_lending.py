"""GPUs are prepared on their nodes, and the caller creates the group itself: it is exact, and ends with the caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from placement import Deployment, NodeAssignment
from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.runtime import groups
from placement.runtime.bootstrap import make_agent
from placement.runtime.claims import Claim
from placement.runtime.deployment_state import holding_of
from placement.runtime.discovery import live_nodes
from placement.runtime.embedded import SimulatedNode
from placement.runtime.fleet import Fleet
from placement.runtime.node_agent import LEASE_SECONDS
from placement.runtime.orders import Holding, Refusal, deployment_of
from tests.chaos import recovered
from tests.integration.conftest import left_over, settled
from tests.integration.test_place import another_user, node_id, ranks_gpus

pytestmark = pytest.mark.integration

CALLER = """
import json, sys, ray
from placement.runtime.groups import create_group, ready_or_removed
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[1].split(":")[0], log_to_driver=False, logging_level="ERROR")
print("connected", flush=True)
for line in sys.stdin:
    group = create_group(*json.loads(line), lifetime=None)
    print(group.id.hex() if ready_or_removed(group) else "", flush=True)
"""
"""A driver that creates the groups it is told of, and ends when it is killed."""


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode("pcie", topology="a100-pcie-4x"),
        SimulatedNode("pcie-b", topology="a100-pcie-4x"),
        SimulatedNode("egress", resources={"egress": 8}),
    ]


class Leases:
    """What a controller does for callers, as far as the nodes are concerned."""

    def __init__(self) -> None:
        self.held: dict[str, NodeAssignment] = {}
        self.fleet = Fleet(make_agent, self._on, "placement:lending:")

    def _on(self, node: str) -> dict[str, Holding]:
        return {
            order: holding_of(deployment_of(order), a) for order, a in self.held.items() if a.node == node
        }

    def take(self, create: Any, *replicas: PlannedReplica, **declared: Any) -> list[NodeAssignment] | Refusal:
        """Reserves these replicas for a caller; what is refused is given back."""
        deployment = Deployment(name="lent", replicas=len(replicas), **declared)
        reserved, refusals = self.fleet.reserve(Claim(deployment, replicas), live_nodes(), create)
        if refusals:
            self.fleet.give_back(reserved)
        else:
            self.held |= dict(reserved)
        self.fleet.recorded("lent")
        return refusals[0] if refusals else [assignment for _, assignment in reserved]

    def gone(self) -> None:
        """Notes that the groups are gone, without having removed them."""
        for order, assignment in list(self.held.items()):
            del self.held[order]
            self.fleet.forget_gone(order, [assignment.node])


@pytest.fixture(scope="module")
def module_leases(address: str) -> Iterator[Leases]:
    leases = Leases()
    yield leases
    leases.fleet.agents.stop()
    assert settled(lambda: not left_over()), left_over()


@pytest.fixture
def leases(module_leases: Leases) -> Iterator[Leases]:
    """With nothing held, neither before a test nor after it. What else the test has must come after it."""
    yield module_leases
    for assignment in module_leases.held.values():
        remove_placement_group(assignment.placement_group)
    module_leases.gone()
    assert settled(lambda: not left_over()), left_over()


@pytest.fixture
def neighbours() -> Iterator[list[Any]]:
    """Other Ray users, who are ended after the test."""
    users: list[Any] = []
    yield users
    for user in users:
        ray.kill(user)


def here(
    name: str, bundles: list[dict[str, float]], nodes: list[str], domain: Any = None
) -> PlacementGroup | None:
    """This driver creates the group, which ends with it."""
    group = groups.create_group(name, bundles, nodes, lifetime=None)
    return group if groups.ready_or_removed(group) else None


def on(node: str, *gpus: int, index: int = 0, share: int = WHOLE) -> PlannedReplica:
    return PlannedReplica(index, node_id(node), gpus, share=share)


def test_whole_gpus_beside_another_user_are_the_best_ones_and_free_once_the_caller_removes_the_group(
    leases: Leases, neighbours: list[Any]
) -> None:
    neighbours.append(another_user("pcie"))
    for _ in range(2):
        taken = leases.take(here, on("pcie", 2, 3), model="m", gpus=2, constraints={"cpus_per_gpu": 0.5})
        assert isinstance(taken, list)
        [lent] = taken
        assert (lent.gpus, lent.ray_gpus, lent.weakest_link, lent.cpus_per_gpu) == (
            [2, 3],
            [1, 2],
            "NV12",
            0.5,
        )
        assert ranks_gpus(lent) == [2, 3]
        remove_placement_group(lent.placement_group)
        leases.gone()


def test_replicas_get_their_groups_one_after_the_other_and_shares_share(leases: Leases) -> None:
    quarter = [on("pcie", 0, index=index, share=250) for index in range(3)]
    taken = leases.take(here, *quarter, model="m", gpus=0.25)
    assert isinstance(taken, list)
    assert [(a.replica_index, a.gpus, a.share) for a in taken] == [(index, [0], 0.25) for index in range(3)]
    assert [ranks_gpus(a) for a in taken] == [[0], [0], [0]]
    pairs = [on("pcie", 2, 3), on("pcie-b", 0, 1, index=1)]
    taken = leases.take(here, *pairs, model="m", gpus=2)
    assert isinstance(taken, list)
    assert [(a.node_name, a.gpus) for a in taken] == [("pcie", [2, 3]), ("pcie-b", [0, 1])]
    assert [ranks_gpus(a) for a in taken] == [[2, 3], [0, 1]]


def test_a_replica_over_two_nodes(leases: Leases) -> None:
    parts = [
        PlannedReplica(0, node_id(name), (0, 1), ranks=ranks, set_size=2)
        for name, ranks in (("pcie", (0, 1)), ("pcie-b", (2, 3)))
    ]
    deployment = Deployment(name="lent", model="m", tensor_parallel=2, pipeline_parallel=2)
    reserved, refusals = leases.fleet.reserve(Claim(deployment, tuple(parts), 2), live_nodes(), here)
    assert not refusals
    assert [(a.node_name, a.gpus, a.ranks) for _, a in reserved] == [
        ("pcie", [0, 1], [0, 1]),
        ("pcie-b", [0, 1], [2, 3]),
    ]
    assert len({a.placement_group.id for _, a in reserved}) == 1
    assert [ranks_gpus(a) for _, a in reserved] == [[0, 1], [0, 1]]
    leases.fleet.give_back(reserved)
    leases.fleet.recorded("lent")


def test_egress_units(leases: Leases) -> None:
    unit = PlannedReplica(0, node_id("egress"), egress_resource="egress", egress_units=3)
    remote = {"model": "gpt-4o", "serving": {"max_concurrent": 3}}
    taken = leases.take(here, unit, **remote)
    assert isinstance(taken, list)
    assert [(a.node_name, a.egress_units) for a in taken] == [("egress", 3)]
    assert settled(lambda: ray.available_resources()["egress"] == 5)


def late(name: str, bundles: list[dict[str, float]], nodes: list[str], domain: Any = None) -> None:
    time.sleep(LEASE_SECONDS + 0.1)


def raises(
    name: str, bundles: list[dict[str, float]], nodes: list[str], domain: Any = None
) -> PlacementGroup | None:
    if ":1:" in name:
        raise ConnectionError("the caller is gone")
    return here(name, bundles, nodes)


def test_a_caller_that_does_not_come_leaves_nothing_behind(leases: Leases, neighbours: list[Any]) -> None:
    neighbours.append(another_user("pcie"))
    pair = on("pcie", 2, 3)
    refused = leases.take(late, pair, model="m", gpus=2)
    assert isinstance(refused, Refusal)
    assert (refused.full, refused.reason) == (
        False,
        f"no placement group was created within {LEASE_SECONDS:g} s",
    )
    with pytest.raises(ConnectionError):
        leases.take(raises, on("pcie", 1), on("pcie", 2, index=1), model="m", gpus=1)
    ray.kill(neighbours.pop())
    assert settled(lambda: not left_over()), left_over()
    taken = leases.take(here, on("pcie", 0, 1, 2, 3), model="m", gpus=4)
    assert isinstance(taken, list), "the node knows that all of it is free"


def test_a_group_with_other_gpus_than_those_prepared_does_not_stay(
    leases: Leases, request: pytest.FixtureRequest
) -> None:
    """Another user is quicker than the caller, the first time."""
    others: list[PlacementGroup] = []

    def second(
        name: str, bundles: list[dict[str, float]], nodes: list[str], domain: Any = None
    ) -> PlacementGroup | None:
        if not others:
            others.append(groups.create_group("theirs", [{"GPU": 1}], [node_id("pcie")]))
            request.addfinalizer(lambda: remove_placement_group(others[0]))
            assert groups.ready_or_removed(others[0])
        return here(name, bundles, nodes)

    taken = leases.take(second, on("pcie", 0, 1), model="m", gpus=2)
    assert isinstance(taken, list)
    assert [a.gpus for a in taken] == [[2, 3]] and ranks_gpus(taken[0]) == [2, 3]


@pytest.fixture
def caller(address: str) -> Iterator[subprocess.Popen[str]]:
    """Another driver."""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None and "connected" in process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def creates(caller: subprocess.Popen[str]) -> Callable[..., PlacementGroup | None]:
    def create(name: str, bundles: Any, nodes: Any, domain: Any = None) -> PlacementGroup | None:
        assert caller.stdin is not None and caller.stdout is not None
        print(json.dumps([name, bundles, nodes]), file=caller.stdin, flush=True)
        made = caller.stdout.readline().strip()
        return groups.group_from_hex(made) if made else None

    return create


def test_what_a_killed_driver_held_is_free_and_can_be_had_again(
    leases: Leases, caller: subprocess.Popen[str], neighbours: list[Any]
) -> None:
    neighbours.append(another_user("pcie"))
    replicas = [on("pcie", 2, 3), on("pcie-b", 0, 1, index=1)]
    taken = leases.take(creates(caller), *replicas, model="m", gpus=2)
    assert isinstance(taken, list)
    assert [a.gpus for a in taken] == [[2, 3], [0, 1]]
    assert [ranks_gpus(a) for a in taken] == [[2, 3], [0, 1]]
    caller.kill()
    killed = time.monotonic()
    assert settled(lambda: ray.available_resources().get("GPU") == 7), ray.available_resources()
    recovered("a driver that created its groups is killed", time.monotonic() - killed)
    leases.gone()
    taken = leases.take(here, *replicas, model="m", gpus=2)
    assert isinstance(taken, list)
    assert [a.gpus for a in taken] == [[2, 3], [0, 1]]
