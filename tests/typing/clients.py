"""What a type checker sees of the two clients. Never run: tests/test_types.py has mypy read it."""

from typing import Any, assert_type

from placement import (
    AsyncClient,
    Client,
    Deployment,
    Group,
    GroupLink,
    NodeAssignment,
    NotEnoughGpus,
    PlacementConstraints,
    PlacementError,
    PlacementPlan,
    PlacementResult,
    bind,
    placement_group,
)
from placement.core.routes import Via
from placement.runtime.client_base import Event, Status


def blocking(wanted: Deployment) -> None:
    client = Client.start(near=("zone", "rack"), idle_seconds=60)
    assert_type(client, Client)
    result = client.place(wanted, PlacementConstraints(gpu_nodes=("a",)), wait_seconds=30)
    assert_type(result, PlacementResult)
    assert_type(result.assignments, list[NodeAssignment])
    assert_type(result.assignments[0].gpus, list[int])
    assert_type(result.environment(0, rank=1), dict[str, str])
    assert_type(result.assignments[0].environment(1), dict[str, str])
    assert_type(bind().cpus, frozenset[int])
    assert_type(client.place({"name": "d", "model": "m"}, {"gpu_nodes": ["a"]}), PlacementResult)
    assert_type(client.apply(wanted, atomic=True), PlacementResult)
    assert_type(client.apply_all([wanted, {"name": "d"}]), list[PlacementResult])
    assert_type(client.plan(wanted), PlacementPlan)
    assert_type(client.plan_all([wanted]), list[PlacementPlan])
    assert_type(client.get("d"), PlacementResult)
    assert_type(client.wait("d", 30), PlacementResult)
    assert_type(client.describe("d"), dict[str, Any])
    assert_type(client.renew("d"), float | None)
    assert_type(client.release("d"), int)
    assert_type(client.release_all(), list[str])
    assert_type(client.forget_measurements("gpu-a"), list[dict[str, Any]])
    assert_type(client.status(state="pending"), Status)
    assert_type(client.status()["nodes"], list[dict[str, Any]])
    assert_type(client.events("d"), list[Event])
    assert_type(client.watch(names=["d"]), list[Event])
    for event in client.follow():
        assert_type(event["number"], int)
    for entry in client.history(["d"], earliest=0.0):
        assert_type(entry["kind"], str)
    assert_type(client.topology(), list[dict[str, Any]])
    assert_type(client.snapshot(), dict[str, Any])
    assert_type(client.ping(), str)


async def awaited(wanted: Deployment) -> None:
    client = await AsyncClient.start()
    assert_type(client, AsyncClient)
    assert_type(await client.place(wanted, wait_seconds=30), PlacementResult)
    assert_type(await client.apply(wanted), PlacementResult)
    assert_type(await client.apply_all([wanted]), list[PlacementResult])
    assert_type(await client.plan(wanted), PlacementPlan)
    assert_type(await client.get("d"), PlacementResult)
    assert_type(await client.wait("d"), PlacementResult)
    assert_type(await client.release("d"), int)
    assert_type(await client.status(), Status)
    assert_type(await client.events(), list[Event])
    async for event in client.follow(["d"]):
        assert_type(event["replica"], int | None)
    async for entry in client.history(follow=True):
        assert_type(entry["deployment"], str)


def refused(client: Client, wanted: Deployment) -> None:
    client.place("d")  # type: ignore[arg-type]
    client.place(wanted, wait="long")  # type: ignore[call-arg]
    client.apply(wanted, None, True)  # type: ignore[call-arg]
    client.get(name=1)  # type: ignore[arg-type]
    client.release("d").upper()  # type: ignore[attr-defined]
    print(client.get("d").gpus)  # type: ignore[attr-defined]
    print(client.watch()[0]["nummer"])  # type: ignore[typeddict-item]


async def refused_to_async(client: AsyncClient) -> None:
    print(client.get("d").assignments)  # type: ignore[attr-defined]
    await client.follow()  # type: ignore[misc]


def laid_out() -> None:
    bundles = [{"GPU": 1, "CPU": 1}] * 4  # whole numbers, and a list that somebody else may have
    placement_group(bundles, "PACK", "group", within="nvlink", wait_seconds=0)
    placement_group([{"GPU": 1}], stategy="PACK")  # type: ignore[call-arg]
    placement_group({"GPU": 1})  # type: ignore[arg-type]
    placement_group([{"GPU": 1}], wait_seconds="long")  # type: ignore[arg-type]


def declared() -> None:
    wanted = Deployment(name="d", model="m", gpus=2, constraints=PlacementConstraints(gpus=(0, 1)))
    assert_type(wanted.replicas, int)
    assert_type(Group(name="g", members={"d": 1}, links=()).of([wanted]), list[Deployment])
    links = [GroupLink(between=("d", "e"), via="pcie", within="numa", min_bandwidth_gb_per_s=20)]
    Group(name="g", members={"d": 1, "e": 2}, units=4, links=links)
    as_documented = Group(name="g", members={"d": 1}, links=[{"between": ["d", "e"], "via": "nvlink"}])
    assert_type(as_documented.links, tuple[GroupLink, ...])
    assert_type(as_documented.links[0].via, Via)
    GroupLink(between=("d", "e"), via="nvswitch")  # type: ignore[arg-type]
    GroupLink(between="d", via="pcie")  # type: ignore[arg-type]
    GroupLink(via="pcie")  # type: ignore[call-arg]
    Group(name="g", members=["d"])  # type: ignore[arg-type]
    Group(name="g", members={"d": 1}, links=[{"between": ["d", "e"]}])  # type: ignore[list-item]
    Group(name="g", members={"d": 1}, links=[{"between": ["d", "e"], "via": "usb"}])  # type: ignore[list-item]
    Deployment(name="d")  # type: ignore[call-arg]
    Deployment(name="d", model="m", replica=2)  # type: ignore[call-arg]
    Deployment(name="d", model="m", replicas="two")  # type: ignore[arg-type]
    PlacementConstraints(gpu_nodes=1)  # type: ignore[arg-type]


def failed(client: Client, wanted: Deployment) -> None:
    try:
        client.place(wanted)
    except NotEnoughGpus as error:
        assert_type(error.requested, int)
        assert_type(error.excluded, dict[str, int])
        print(error.nodes)  # type: ignore[attr-defined]
    except PlacementError as error:
        assert_type(error.code, str)
        assert_type(error.to_dict(), dict[str, Any])
