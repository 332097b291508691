"""What is placed for an owner ends with it: drivers, actors and jobs that are killed, also in the middle of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table, remove_placement_group

from placement import AsyncClient, Client, DeploymentConflict, LeaseExpired, UnknownDeployment
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode, embedded_cluster
from tests.chaos import recovered
from tests.integration.conftest import left_over, settled
from tests.integration.test_place import another_user, ranks_gpus

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
PAIR = {"model": "m", "gpus": 2, "constraints": {"gpu_nodes": ["pcie"]}}
LEASE = {"model": "m", "gpus": 2, "owner": "caller"}
SHARE = {"model": "m", "gpus": 0.25, "owner": "caller"}
REMOTE = {"model": "gpt-4o", "serving": {"max_concurrent": 3}, "owner": "caller"}

DRIVER = """
import json, sys, threading, ray
ray.init(sys.argv[1], _node_ip_address=sys.argv[1].split(":")[0], log_to_driver=False, logging_level="ERROR")
from placement import Client
from placement.errors import PlacementError
client = Client()

def ask(wanted, seconds):
    try:
        told = client.place(wanted, None, seconds).to_dict()
    except PlacementError as error:
        told = error.to_dict()
    print(json.dumps(told), flush=True)

print("connected", flush=True)
for line in sys.stdin:
    threading.Thread(target=ask, args=json.loads(line), daemon=True).start()
"""
"""A driver that places what it is told to, and ends when it is killed."""


class Driver:
    """Another driver, and what it places."""

    def __init__(self, address: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DRIVER, address]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
        assert self._read() == "connected"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def asks(self, wanted: dict[str, Any], wait_seconds: float = 0.0) -> None:
        """Has it place something; does not wait for that."""
        assert self._process.stdin is not None
        print(json.dumps([wanted, wait_seconds]), file=self._process.stdin, flush=True)

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What it got, or the error."""
        self.asks(wanted)
        told: dict[str, Any] = json.loads(self._read())
        return told

    def kill(self) -> None:
        """As ``kill -9``."""
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def cluster(faults: Path) -> Iterator[EmbeddedCluster]:
    nodes = [
        SimulatedNode("pcie", topology="a100-pcie-4x"),
        SimulatedNode("pcie-b", topology="a100-pcie-4x"),
        SimulatedNode("egress", resources={"egress": 8}),
    ]
    with embedded_cluster(nodes) as running:
        yield running


@pytest.fixture
def client(service: Any) -> Client:
    return Client(service)


@pytest.fixture
def new_driver(service: Any, address: str) -> Iterator[Callable[[], Driver]]:
    drivers: list[Driver] = []

    def new() -> Driver:
        drivers.append(Driver(address))
        return drivers[-1]

    yield new
    for driver in drivers:
        driver.kill()


@pytest.fixture
def neighbour(service: Any) -> Iterator[None]:
    """Another Ray user has GPU 0 of a node."""
    worker = another_user("pcie")
    yield
    ray.kill(worker)


def is_forgotten(client: Client, name: str) -> bool:
    try:
        client.get(name)
    except UnknownDeployment:
        return True
    return False


def ends(client: Client, names: list[str], what: str, gpus: float = 8.0, egress: float = 8.0) -> None:
    """Everything is free, and forgotten; how long that took is said, and recorded."""
    began = time.monotonic()

    def free() -> bool:
        now = ray.available_resources()
        return now.get("GPU") == gpus and now.get("egress") == egress

    while not free():
        assert time.monotonic() - began < 15, left_over()
        time.sleep(0.005)
    freed = time.monotonic() - began
    for name in names:
        assert settled(partial(is_forgotten, client, name)), client.describe(name)
    forgot = time.monotonic() - began
    print(f"\n{what}: free after {freed:.2f} s, forgotten after {forgot:.2f} s")
    recovered(what, forgot)


def waiting_calls(service: Any) -> int:
    """How many calls wait for room in the service."""
    count: int = ray.get(
        service.__ray_call__.remote(lambda self: len(self._service._controller.queue.tickets.all()))
    )
    return count


# -- drivers and actors that create their groups -----------------------------------------------------


def test_all_that_a_killed_driver_owned_is_free_and_forgotten(
    client: Client, new_driver: Callable[[], Driver], neighbour: None
) -> None:
    driver = new_driver()
    got = {
        name: driver.place({"name": name, **wanted})
        for name, wanted in (("pairs", {**LEASE, "replicas": 2}), ("share", SHARE), ("remote", REMOTE))
    }
    for name, told in got.items():
        result = client.get(name)
        assert result.to_dict() == told
        assert client.describe(name)["owner"]["kind"] == "caller"
        for one in result.assignments:
            assert not one.gpus or ranks_gpus(one) == one.gpus
    pairs = {(a["node_name"], *a["gpus"]) for a in got["pairs"]["assignments"]}
    assert pairs <= {("pcie", 2, 3), ("pcie-b", 0, 1), ("pcie-b", 2, 3)}
    driver.kill()
    ends(client, list(got), "a driver is killed", gpus=7)


@ray.remote(num_cpus=0)
class Placer:
    """An actor that places for itself."""

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return Client().place(wanted).to_dict()


@pytest.mark.parametrize("lifetime", ["detached", None], ids=["detached", "normal, whose driver lives"])
def test_all_that_a_killed_actor_owned_is_free_and_forgotten(client: Client, lifetime: Any) -> None:
    actor = Placer.options(lifetime=lifetime, name="placer").remote()
    told = ray.get(actor.place.remote({"name": "pairs", "replicas": 2, **LEASE}))
    assert client.get("pairs").to_dict() == told
    ray.kill(actor)
    ends(client, ["pairs"], f"an actor is killed that is {lifetime or 'not detached'}")


def test_what_its_owner_removes_is_forgotten_and_can_be_had_again_at_once(client: Client) -> None:
    wanted = {"name": "pairs", "replicas": 2, **LEASE}
    for _ in range(2):
        result = client.place(wanted)
        assert client.place(wanted).to_dict() == result.to_dict()
        for one in result.assignments:
            remove_placement_group(one.placement_group)
    first, second = client.place(wanted).assignments
    remove_placement_group(first.placement_group)
    again = client.place(wanted)
    assert {a.replica_index for a in again.assignments} == {0, 1}
    assert second.placement_group.id in {a.placement_group.id for a in again.assignments}
    for one in again.assignments:
        assert placement_group_table(one.placement_group)["state"] == "CREATED"
        remove_placement_group(one.placement_group)
    ends(client, ["pairs"], "an owner removes its groups")


def test_of_two_who_ask_for_the_same_name_at_once_one_gets_it(client: Client) -> None:
    actors = [Placer.remote(), Placer.remote()]
    calls = [actor.place.remote({"name": "mine", **LEASE}) for actor in actors]
    outcomes: list[Any] = []
    for call in calls:
        try:
            outcomes.append(ray.get(call))
        except DeploymentConflict as refused:
            outcomes.append(refused)
    [conflict] = [one for one in outcomes if isinstance(one, DeploymentConflict)]
    [told] = [one for one in outcomes if isinstance(one, dict)]
    assert "another caller" in str(conflict)
    assert client.get("mine").to_dict() == told
    assert settled(lambda: ray.available_resources()["GPU"] == 6)
    for actor in actors:
        ray.kill(actor)
    ends(client, ["mine"], "an actor is killed that won")


def test_a_lease_outlives_the_service_and_still_ends_with_its_owner(
    client: Client, new_driver: Callable[[], Driver]
) -> None:
    driver = new_driver()
    told = driver.place({"name": "pairs", "replicas": 2, **LEASE})
    ray.kill(client.handle, no_restart=False)
    assert client.get("pairs").to_dict() == told
    driver.kill()
    ends(client, ["pairs"], "a driver is killed, after the service")


# -- owners that create nothing --------------------------------------------------------------------------


def test_an_actor_that_is_named_as_the_owner(client: Client) -> None:
    actor = Placer.remote()
    client.place({"name": "owned", "model": "m", "gpus": 2}, owner=actor)
    client.apply({"name": "also", "model": "m", "gpus": 9}, owner=actor)
    ray.kill(actor)
    ends(client, ["owned", "also"], "an actor is killed that was named as the owner")
    with pytest.raises(LeaseExpired):
        client.place({"name": "late", "model": "m", "gpus": 9}, wait_seconds=600, owner=actor)


@pytest.mark.parametrize("owner", ["detached", "caller"])
def test_a_time_that_is_over_ends_it_unless_it_is_renewed(client: Client, owner: str) -> None:
    client.place({"name": "brief", "model": "m", "ttl_seconds": 2, "owner": owner})
    before = client.describe("brief")["expires_at"]
    renewed = client.renew("brief")
    assert renewed is not None and renewed > before
    assert client.describe("brief")["expires_at"] == renewed
    assert settled(lambda: is_forgotten(client, "brief"))
    assert time.time() >= renewed


# -- who waits -------------------------------------------------------------------------------------------


def test_nothing_is_placed_for_who_was_killed_or_cancelled_while_it_waited(
    client: Client, service: Any, new_driver: Callable[[], Driver]
) -> None:
    client.place({"name": "holds", "model": "m", "gpus": 4, "replicas": 2})
    owners = ("caller", "job", "detached")
    driver = new_driver()
    for owner in owners:
        driver.asks({"name": f"for-{owner}", "model": "m", "owner": owner}, 600.0)

    async def cancelled() -> None:
        here = AsyncClient(service)
        calls = [
            asyncio.create_task(here.place({"name": f"off-{o}", "model": "m", "owner": o}, wait_seconds=600))
            for o in owners
        ]
        while await asyncio.to_thread(waiting_calls, service) < 6:
            await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        for one in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(one, asyncio.CancelledError)

    asyncio.run(cancelled())
    assert settled(lambda: waiting_calls(service) == 3)
    driver.kill()
    began = time.monotonic()
    assert settled(lambda: waiting_calls(service) == 0)
    print(f"\na driver is killed that waits: it is noticed after {time.monotonic() - began:.2f} s")
    client.release("holds")
    assert len(client.place({"name": "later", "model": "m", "gpus": 4, "replicas": 2}).assignments) == 2
    told = {event["deployment"] for event in client.events() if event["state"] == "placed"}
    assert not told & {f"{how}-{owner}" for how in ("for", "off") for owner in owners}


def test_who_waits_gets_it_once_there_is_room(client: Client, new_driver: Callable[[], Driver]) -> None:
    client.place({"name": "holds", "model": "m", "gpus": 4, "replicas": 2})
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(client.place, {"name": "mine", **LEASE}, None, 600.0)
        assert settled(lambda: waiting_calls(client.handle) == 1)
        client.release("holds")
        [one] = waiting.result(60).assignments
    assert ranks_gpus(one) == one.gpus


# -- killed at every step --------------------------------------------------------------------------------

SERVICE = ("lent", "prepared", "group_created", "confirmed", "reserved", "kept")
STEPS = [
    *((PAIR, f"service.{step}") for step in SERVICE),
    *((PAIR, f"agent.{step}") for step in ("prepared", "confirmed")),
    (SHARE, "agent.confirmed"),
    (REMOTE, "service.lent"),
]


@pytest.mark.parametrize(("wanted", "step"), STEPS, ids=[f"{next(iter(w.values()))}-{s}" for w, s in STEPS])
def test_killed_at_a_step_it_is_placed_all_the_same(
    client: Client, faults: Path, wanted: dict[str, Any], step: str
) -> None:
    (faults / step).touch()
    began = time.monotonic()
    result = client.place({"name": "cut", "replicas": 2, **wanted, "owner": "caller"})
    print(f"\n{step}: placed, after {time.monotonic() - began:.2f} s")
    assert not (faults / step).exists(), "nobody came there"
    for one in result.assignments:
        assert not one.gpus or ranks_gpus(one) == one.gpus
    assert sorted(a.replica_index for a in result.assignments) == [0, 1]
    assert client.get("cut").to_dict() == result.to_dict()
    held = sum(a.share * len(a.gpus) for a in result.assignments)
    assert settled(lambda: abs(ray.available_resources().get("GPU", 0.0) - (8 - held)) < 1e-6), left_over()
    for one in result.assignments:
        remove_placement_group(one.placement_group)
    ends(client, ["cut"], "an owner removes its groups")
