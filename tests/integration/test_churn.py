"""A hundred random steps while another Ray user takes and frees GPUs on the same nodes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

import placement
from placement.runtime.embedded import SimulatedNode
from placement.runtime.groups import ready_or_removed, remove_group

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
STEPS = 120
SEED = 20261123


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode("dgx", topology="dgx-1v"),
        SimulatedNode("pcie", topology="a100-pcie-4x"),
        SimulatedNode("egress-a", resources={"egress_openai": 8}),
    ]


@ray.remote(num_cpus=0, max_calls=0)
def who() -> tuple[str, list[int]]:
    """The node and GPUs of the bundle that this task runs in."""
    context = ray.get_runtime_context()
    return context.get_node_id(), [int(gpu) for gpu in context.get_accelerator_ids()["GPU"]]


class Neighbour(threading.Thread):
    """Another Ray user: groups of 1 or 2 GPUs, wherever Ray puts them, kept for a moment.

    It removes them with care, since Ray 2.60 loses the GPUs of a group removed while it is being reserved.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(daemon=True)
        self.chance = random.Random(seed)
        self.stop = threading.Event()
        self.taken = 0

    def run(self) -> None:
        held: list[Any] = []
        while not self.stop.is_set():
            if held and (len(held) > 2 or self.chance.random() < 0.5):
                remove_group(held.pop(0), ready=True)
            else:
                group = placement_group([{"GPU": self.chance.choice([1, 1, 2])}])
                if ready_or_removed(group):
                    held.append(group)
                    self.taken += 1
            time.sleep(self.chance.uniform(0.01, 0.15))
        for group in held:
            remove_group(group, ready=True)


@pytest.fixture
def neighbour(service: Any) -> Iterator[Neighbour]:
    thread = Neighbour(SEED)
    thread.start()
    yield thread
    thread.stop.set()
    thread.join(30)
    assert not thread.is_alive()


def workers_say(result: placement.PlacementResult) -> list[tuple[str, list[int]]]:
    """Node and GPUs of each replica, as a worker at each rank says."""
    said = []
    for a in result.assignments:
        ranks = [ray.get(who.options(**a.actor_options(rank)).remote()) for rank in range(len(a.gpus))]
        said.append((ranks[0][0] if ranks else a.node, [gpu for _, gpus in ranks for gpu in gpus]))
    return said


def test_random_steps_beside_another_user(service: Any, neighbour: Neighbour) -> None:
    chance = random.Random(SEED)
    standing: dict[str, placement.PlacementResult] = {}
    placed = refused = released = 0
    for step in range(STEPS):
        if standing and chance.random() < 0.4:
            name = chance.choice(sorted(standing))
            ray.get(service.release.remote(name))
            del standing[name]
            released += 1
            continue
        gpus, replicas = chance.choice([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1), (0, 1)])
        wanted: dict[str, Any] = {"name": f"step-{step}", "replicas": replicas}
        wanted |= (
            {"model": "m", "gpus": gpus} if gpus else {"model": "gpt-4o", "serving": {"max_concurrent": 2}}
        )
        try:
            result = ray.get(service.place.remote(wanted))
        except (placement.Unplaceable, placement.ReservationFailed):
            refused += 1
            continue
        placed += 1
        standing[wanted["name"]] = result
        assert workers_say(result) == [(a.node, a.gpus) for a in result.assignments]
        taken = [(a.node, gpu) for r in standing.values() for a in r.assignments for gpu in a.gpus]
        assert len(taken) == len(set(taken)), f"step {step}: a GPU is in two hands"
        names = [row["name"] for row in placement_group_table().values() if row["state"] != "REMOVED"]
        assert not [name for name in names if name.startswith("hold-")], "holds are gone once placing returns"
    print(
        f"placed {placed}, refused {refused}, released {released}; the other user took GPUs {neighbour.taken} times"
    )
    assert placed >= STEPS // 4
    assert neighbour.taken > 0
