"""GPUs that are named, by ordinal and by the UUID that NVML shows, with real workers on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import placement
from placement import Client, Deployment, topologies
from placement.core.needs import WHOLE
from placement.runtime.embedded import SimulatedNode, embedded_cluster
from placement.runtime.probing import another_user
from placement.wire.cluster import ClusterFile
from placement.wire.dry_run import plan_deployments
from tests import fake_nvml
from tests.integration.conftest import settled, worker_at

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PAIRS = topologies.load("a100-pcie-4x")
UUID = [fake_nvml.uuid(gpu) for gpu in range(4)]
MIG = [fake_nvml.mig_uuid(0, index) for index in range(3)]
REVERSED = UUID[::-1]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("nvml")
    library = fake_nvml.build(folder)

    def env(name: str, visible: list[str], **more: Any) -> dict[str, str]:
        machine = folder / f"{name}.txt"
        machine.write_text(fake_nvml.describe(PAIRS, **more))
        return {**fake_nvml.environment(library, machine), "CUDA_VISIBLE_DEVICES": ",".join(visible)}

    cut_up = topologies.describe("a100-mig-4x").instances
    nodes = [
        SimulatedNode("pairs", gpus=4, env=env("pairs", REVERSED)),
        SimulatedNode("mig", gpus=3, env=env("mig", MIG, instances=cut_up)),
        SimulatedNode("recorded", topology="a100-pcie-4x"),
    ]
    with embedded_cluster(nodes) as running:
        yield running.address


def wanted(*gpus: int | str, name: str = "d", on: str | None = None, **fields: Any) -> Deployment:
    limits = {"gpus": gpus, **({"gpu_nodes": [on]} if on else {})}
    return Deployment.model_validate({"name": name, "model": "org/m", "constraints": limits, **fields})


def seen(result: placement.PlacementResult) -> list[str]:
    """What each worker was given, as Ray says."""
    options = [a.actor_options(rank) for a in result.assignments for rank in range(len(a.gpus))]
    return [worker_at(one).gpus[0] for one in options]


@pytest.fixture
def client(service: Any) -> Client:
    return Client(service)


def test_by_uuid_whatever_the_order_of_rays_slots(client: Client) -> None:
    result = client.place(wanted(UUID[1], UUID[3], gpus=2))
    assert [(a.node_name, a.gpus) for a in result.assignments] == [("pairs", [0, 2])]
    assert sorted(seen(result)) == [UUID[1], UUID[3]]
    [gpus] = [node["gpus"] for node in client.status()["nodes"] if node["name"] == "pairs"]
    assert [gpu["uuid"] for gpu in gpus] == REVERSED
    with pytest.raises(placement.NotEnoughGpus, match=f"{UUID[3]} is held by 'd'"):
        client.place(wanted(UUID[3], name="e"))
    with pytest.raises(placement.UnknownGpu, match=f"no node has GPU-0000-1; there are: {UUID[3]} "):
        client.place(wanted("GPU-0000-1", name="e"))


def test_a_mig_instance_by_its_uuid_alone(client: Client) -> None:
    profiles = topologies.describe("a100-mig-4x").instances
    assert profiles is not None
    result = client.place(wanted(MIG[1]))
    assert seen(result) == [MIG[1]]
    assert [a.mig for a in result.assignments] == [profiles[0][1]]
    again = client.place(wanted(MIG[0], MIG[2], name="e", mig=profiles[0][0], replicas=2))
    assert sorted(seen(again)) == sorted([MIG[0], MIG[2]])
    client.release("d")
    assert seen(client.place(wanted(MIG[1], name="f"))) == [MIG[1]]


def test_a_dry_run_says_what_is_placed_and_a_file_says_the_same(client: Client) -> None:
    asked = wanted(1, 2, on="recorded", gpus=1, replicas=2)
    file = ClusterFile.model_validate(client.snapshot())
    [planned] = plan_deployments(file.snapshot(), file.held(), [asked])
    live = client.plan(asked)
    result = client.place(asked)
    for plan in (planned, live):
        assert [(a.node, a.gpus) for a in plan.assignments] == [(a.node, a.gpus) for a in result.assignments]
    assert sorted(map(int, seen(result))) == [1, 2]


def test_shares_of_just_that_gpu(client: Client) -> None:
    result = client.place(wanted(2, on="recorded", gpus=0.5, replicas=2))
    assert [(a.gpus, round(a.share * WHOLE)) for a in result.assignments] == [([2], 500)] * 2


def test_declared_anew_it_moves_and_what_may_stay_stays(client: Client) -> None:
    first = client.place(wanted(0, 1, on="recorded", replicas=2))
    kept = client.apply(wanted(1, 2, on="recorded", replicas=2))
    assert {a.gpus[0] for a in kept.assignments} == {1, 2}
    [stayed] = [a for a in first.assignments if a.gpus == [1]]
    assert stayed.placement_group.id in {a.placement_group.id for a in kept.assignments}
    moved = client.apply(wanted(UUID[0], UUID[1], replicas=2))
    assert {a.node_name for a in moved.assignments} == {"pairs"}
    assert sorted(seen(moved)) == [UUID[0], UUID[1]]


def test_it_waits_for_just_that_gpu_and_its_owner_may_be_the_caller(client: Client) -> None:
    users = [another_user("recorded") for _ in range(3)]  # they have GPUs 0 to 2
    try:
        waits = client.apply(wanted(1, on="recorded"))
        assert "GPU 1 is held by another Ray user" in waits.pending[0]
        free = client.place(wanted(3, on="recorded", name="own", owner="caller"))
        assert seen(free) == ["3"]
        users[1].leave()
        assert settled(lambda: not client.get("d").pending)
        assert seen(client.get("d")) == ["1"]
    finally:
        for user in users:
            user.leave()
