"""Both clients against the running service; and groups of the caller's own, which end with it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from placement import (
    AsyncClient,
    Client,
    Deployment,
    NodeAssignment,
    NotEnoughGpus,
    PlacementResult,
    ServiceNotRunning,
    UnknownDeployment,
)
from placement.runtime import bootstrap
from placement.runtime.connection import caller
from placement.runtime.embedded import SimulatedNode
from placement.runtime.groups import group_from_hex
from placement.runtime.leases import Loan
from tests.integration.conftest import left_over, settled

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

WANTED = {"name": "mine", "model": "m", "gpus": 2, "replicas": 2, "owner": "caller"}


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode("pcie", topology="a100-pcie-4x")]


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    client = Client.start()
    yield client
    Client.start().release_all()
    assert settled(lambda: not left_over()), left_over()


# -- the service ---------------------------------------------------------------------------------------


def test_what_is_placed_is_found_shown_and_released(client: Client) -> None:
    wanted = Deployment(name="pair", model="m", gpus=2)
    planned = client.plan(wanted)
    placed = client.place(wanted)
    assert [a.gpus for a in placed.assignments] == [a.gpus for a in planned.assignments] == [[0, 1]]
    assert client.get("pair").to_dict() == Client().get("pair").to_dict() == placed.to_dict()
    assert [row["name"] for row in client.status()["deployments"]] == ["pair"]
    assert next(client.follow(["pair"]))["state"] == "placed"
    assert len(client.apply({"name": "pair", "model": "m", "gpus": 1, "replicas": 3}).assignments) == 3
    assert client.release("pair") == 3
    assert client.ping()
    assert [node["name"] for node in client.topology()] == ["pcie"]


def test_errors_are_the_services_own_without_rays_traceback(client: Client) -> None:
    calls = [
        (NotEnoughGpus, lambda: client.place({"name": "huge", "model": "m", "gpus": 5})),
        (UnknownDeployment, lambda: client.get("nothing")),
    ]
    for kind, call in calls:
        with pytest.raises(kind) as caught:
            call()
        assert type(caught.value) is kind
        assert caught.value.__suppress_context__
        assert "ray" not in str(caught.value)


def test_async_calls_run_side_by_side_and_fail_with_the_services_own_errors(client: Client) -> None:
    async def run() -> None:
        service = await AsyncClient.start()
        wanted = [{"name": f"d{i}", "model": "m"} for i in range(4)]
        results = await asyncio.gather(*(service.place(one) for one in wanted))
        assert sorted(a.gpus for result in results for a in result.assignments) == [[0], [1], [2], [3]]
        with pytest.raises(NotEnoughGpus) as caught:
            await service.place({"name": "more", "model": "m"})
        assert type(caught.value) is NotEnoughGpus
        async for event in service.follow(["d0"]):
            assert (event["replica"], event["state"]) == (0, "placed")
            break
        assert await service.release("d1") == 1
        bare = await service.handle.get.remote("d0")
        assert bare.to_dict() == (await service.get("d0")).to_dict()

    asyncio.run(run())


def test_a_service_that_is_gone_is_said_to_be(address: str) -> None:
    client = Client.start()
    bootstrap.stop()
    with pytest.raises(ServiceNotRunning):
        client.ping()
    with pytest.raises(ServiceNotRunning):
        asyncio.run(AsyncClient(client.handle).ping())
    with pytest.raises(ServiceNotRunning):
        Client()


# -- who asks ------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Somebody:
    """An actor that asks."""

    def caller(self) -> dict[str, str]:
        return caller()


def test_a_caller_says_which_job_process_and_actor_it_is(address: str) -> None:
    here = caller()
    context = ray.get_runtime_context()
    assert (here["job"], here["node"], here["pid"]) == (
        context.get_job_id(),
        context.get_node_id(),
        str(os.getpid()),
    )
    assert "actor" not in here
    assert "submission" not in here
    somebody = Somebody.remote()
    there = ray.get(somebody.caller.remote())
    assert (there["job"], there["actor"]) == (here["job"], somebody._actor_id.hex())
    assert caller(somebody)["owner_actor"] == somebody._actor_id.hex()
    ray.kill(somebody)


DRIVER = """
import json, sys
import ray
ray.init(sys.argv[1], _node_ip_address=sys.argv[1].split(":")[0], log_to_driver=False, logging_level="ERROR")
from placement.runtime.connection import caller
print(json.dumps([caller(), ray.get(ray.remote(num_cpus=0)(caller).remote())]))
"""


def test_a_submitted_job_is_known_by_its_submission_also_in_its_workers(address: str) -> None:
    """As the job server starts it."""
    env = os.environ | {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "raysubmit_1"}}'}
    done = subprocess.run([sys.executable, "-c", DRIVER, address], env=env, capture_output=True, text=True)
    driver, worker = json.loads(done.stdout)
    assert driver["submission"] == worker["submission"] == "raysubmit_1"
    assert driver["job"] == worker["job"] != caller()["job"]


# -- groups of the caller's own ------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Lender:
    """Lends pairs of the node's GPUs, as many as there are replicas, as the service does, but in no special order."""

    def __init__(self, node: str, error: Exception | None = None) -> None:
        self.node, self.error = node, error
        self.confirmed: list[str] = []
        self.cancelled: list[str] = []
        self.asked = self.stopped = False

    def _loan(self) -> Loan:
        number = len(self.confirmed)
        return Loan(str(number), "mine", f"lent-{number}-{id(self)}", [{"GPU": 1.0}] * 2, [self.node] * 2)

    async def lend(
        self, deployment: Any, constraints: Any, wait_seconds: float, *, caller: dict[str, str]
    ) -> Loan:
        self.asked = True
        if wait_seconds:
            try:
                await asyncio.sleep(wait_seconds)
            except asyncio.CancelledError:
                self.stopped = True
                raise
        return self._loan()

    async def confirm(self, loan_id: str, group_id: str) -> Loan | PlacementResult:
        self.confirmed.append(group_id)
        if len(self.confirmed) < 2:
            return self._loan()
        if self.error is not None:
            raise self.error
        parts = enumerate(map(group_from_hex, self.confirmed))
        return PlacementResult(
            "mine", [NodeAssignment(i, self.node, [], group, [0, 1]) for i, group in parts]
        )

    async def cancel(self, loan_id: str) -> None:
        self.cancelled.append(loan_id)

    async def seen(self) -> dict[str, Any]:
        return dict(vars(self))


def lender(error: Exception | None = None, name: str | None = None) -> Any:
    node = next(node["NodeID"] for node in ray.nodes() if node["NodeName"] == "pcie")
    return Lender.options(name=name, namespace="lender").remote(node, error)


@ray.remote(num_cpus=0)
class AsyncOwner:
    """An actor with async methods that places for itself, as a replica of Serve would."""

    async def place(self, service: Any) -> list[str]:
        result = await AsyncClient(service).place(WANTED)
        return [a.placement_group.id.hex() for a in result.assignments]


def states(ids: list[str]) -> list[str]:
    return [placement_group_table(group_from_hex(one))["state"] for one in ids]


def test_groups_of_a_drivers_own_are_held_until_it_removes_them(address: str) -> None:
    service = lender()
    result = Client(service).place(WANTED)
    ids = [a.placement_group.id.hex() for a in result.assignments]
    assert ray.get(service.seen.remote())["confirmed"] == ids
    assert states(ids) == ["CREATED", "CREATED"]
    assert settled(lambda: ray.available_resources().get("GPU", 0.0) == 0.0)
    for a in result.assignments:
        ray.util.remove_placement_group(a.placement_group)
    assert settled(lambda: not left_over()), left_over()


def test_an_error_in_the_second_replica_gives_the_first_back(address: str) -> None:
    service = lender(NotEnoughGpus("mine", "too few", {}, "wait"))
    for call in (
        lambda: Client(service).place(WANTED),
        lambda: asyncio.run(AsyncClient(service).place(WANTED)),
    ):
        with pytest.raises(NotEnoughGpus):
            call()
        assert settled(lambda: not left_over()), left_over()


def test_an_actor_that_is_detached_owns_what_it_places_and_its_death_frees_it(address: str) -> None:
    owner = AsyncOwner.options(lifetime="detached", name="owner").remote()
    ids = ray.get(owner.place.remote(lender()))
    assert states(ids) == ["CREATED", "CREATED"]
    ray.kill(owner)
    assert settled(lambda: not left_over()), left_over()


def test_who_stops_waiting_for_room_is_not_waited_for_by_the_service(address: str) -> None:
    service = lender()

    async def run() -> None:
        task = asyncio.create_task(AsyncClient(service).place(WANTED, wait_seconds=600.0))
        while not (await service.seen.remote())["asked"]:
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert settled(lambda: ray.get(service.seen.remote())["stopped"])


PLACER = """
import os, signal, sys, threading, time
import ray
address, how = sys.argv[1:]
own = {} if address.startswith("ray://") else {"_node_ip_address": address.split(":")[0]}
ray.init(address, log_to_driver=False, logging_level="ERROR", **own)
from placement import Client
from placement.runtime.connection import caller
service = ray.get_actor("lender", namespace="lender")
wanted = {"name": "mine", "model": "m", "gpus": 2, "replicas": 2, "owner": "caller"}
if how == "interrupt":
    def later():
        while not ray.get(service.seen.remote())["asked"]:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=later, daemon=True).start()
    try:
        Client(service).place(wanted, wait_seconds=600.0)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
else:
    result = Client(service).place(wanted)
    print(*[a.placement_group.id.hex() for a in result.assignments], flush=True)
time.sleep(600)
"""


def placing(address: str, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PLACER, address, how]
    env = os.environ | {
        "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "1"
    }  # seconds; by default it may come back for 30
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def named_lender(address: str) -> Iterator[Any]:
    """A service of this name, which another process finds."""
    service = lender(name="lender")
    ray.get(service.seen.remote())
    yield service
    ray.kill(service)


@pytest.mark.parametrize("connection", ["address", "ray_client"])
def test_a_process_that_is_killed_holds_nothing(
    named_lender: Any, connection: str, request: pytest.FixtureRequest
) -> None:
    """A ``ray://`` client's groups belong to the process in the cluster that stands for it."""
    child = placing(request.getfixturevalue(connection), "killed")
    try:
        assert child.stdout is not None
        ids = child.stdout.readline().split()
        assert states(ids) == ["CREATED", "CREATED"]
    finally:
        child.kill()
        child.wait()
    assert settled(lambda: not left_over()), left_over()


def test_ctrl_c_while_the_queue_is_waited_in_ends_the_wait_in_the_service(
    named_lender: Any, address: str
) -> None:
    child = placing(address, "interrupt")
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "interrupted\n"
        assert settled(lambda: ray.get(named_lender.seen.remote())["stopped"])
    finally:
        child.kill()
        child.wait()
