"""``placement.placement_group``: Ray's own call, on exact GPUs, with real workers in the bundles."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

import placement
from placement import Client, InvalidDeployment, NotEnoughGpus, UnknownGpu, placement_group
from placement.runtime.embedded import SimulatedNode
from placement.wire.files import load_deployments
from tests.integration.conftest import left_over, settled, worker_at
from tests.integration.test_place import another_user, node_id

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
ONE = {"GPU": 1, "CPU": 1}
TWO = {"GPU": 2, "CPU": 2}

DRIVER = """
import sys, ray
from placement import placement_group
ray.init(sys.argv[1], _node_ip_address=sys.argv[1].split(":")[0], log_to_driver=False, logging_level="ERROR")
lifetime, name = sys.argv[2:] or (None, "")
pg = placement_group([{"GPU": 2}] * 2, strategy="STRICT_SPREAD", name=name, lifetime=lifetime)
if not lifetime:
    shares = placement_group([{"GPU": 0.5}, {"GPU": 1}, {"GPU": 0.25}], wait_seconds=0)
print(pg.id.hex(), flush=True)
lifetime or sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode("pcie", topology="a100-pcie-4x", labels={"host": "pcie", "rack": "1"}),
        SimulatedNode(
            "pcie-b",
            topology="a100-pcie-4x",
            labels={"host": "pcie-b"},
            resources={"nvlink-b": 1, "accelerator_type:A100": 1},
        ),
    ]


class Bundle(NamedTuple):
    """What a worker in a bundle says: on which node it is, and all GPUs of the bundle."""

    node: str
    gpus: list[int]


def bundles_of(group: PlacementGroup) -> list[Bundle]:
    """What is in each bundle that has a GPU."""
    names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
    found = []
    for i, specs in enumerate(group.bundle_specs):
        if gpus := specs.get("GPU"):
            inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
            worker = worker_at({"num_gpus": gpus, "num_cpus": 0, "scheduling_strategy": inside})
            found.append(Bundle(names[worker.node], sorted(map(int, worker.gpus))))
    return found


def known(service: Any) -> list[str]:
    return [one["name"] for one in ray.get(service.status.remote())["deployments"]]


@pytest.fixture
def neighbours(service: Any) -> Iterator[None]:
    """Another Ray user has GPU 0 of each node."""
    users = [another_user("pcie"), another_user("pcie-b")]
    yield
    for user in users:
        ray.kill(user)


@pytest.fixture
def removed() -> Iterator[list[PlacementGroup]]:
    """Groups that are removed after the test."""
    groups: list[PlacementGroup] = []
    yield groups
    for group in groups:
        remove_placement_group(group)


def test_without_the_service_it_is_rays_own_with_one_warning_where_that_is_told(
    address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Comes before all that have the service started."""
    monkeypatch.setenv("PLACEMENT_WITHOUT_SERVICE", "ray")
    with caplog.at_level(logging.WARNING, "placement"):
        groups = [placement_group([ONE], name=name) for name in ("first", "second")]
    assert all(group.wait(30) for group in groups)
    assert len(caplog.records) == 1 and "start the service with `placement up`" in caplog.text
    for group in groups:
        remove_placement_group(group)
    with pytest.raises(
        InvalidDeployment,
        match=r"gpus: \[2\] needs the service, as Ray alone cannot give named GPUs; start the service",
    ):
        placement_group([ONE], gpus=[2])
    monkeypatch.setenv("PLACEMENT_WITHOUT_SERVICE", "pray")
    with pytest.raises(InvalidDeployment, match="'pray' is not a known value"):
        placement_group([ONE])
    with pytest.raises(placement.ServiceNotRunning):
        placement.connect()
    assert settled(lambda: not left_over()), left_over()


def test_without_the_service_it_is_started(address: str) -> None:
    group = placement_group([{"GPU": 4}], name="started")
    assert group.bundle_specs == [{"GPU": 4.0}]
    assert len(Client().status()["deployments"]) == 1
    remove_placement_group(group)
    assert settled(lambda: not left_over()), left_over()


def test_one_gpu_for_each_bundle(service: Any, neighbours: None, removed: list[PlacementGroup]) -> None:
    here = [{"host": "pcie"}] * 2
    group = placement_group([ONE] * 2, strategy="PACK", bundle_label_selector=here, wait_seconds=0)
    removed.append(group)
    assert type(group) is PlacementGroup
    assert group.wait(10) and ray.get(group.ready()) == group
    assert group.bundle_specs == [{"GPU": 1.0, "CPU": 1.0}] * 2
    assert bundles_of(group) == [("pcie", [2]), ("pcie", [3])], "Ray alone would give 1 and 2"


def test_a_bundle_of_two_gpus_on_each_of_two_nodes(
    service: Any, neighbours: None, removed: list[PlacementGroup]
) -> None:
    group = placement_group([TWO] * 2, strategy="STRICT_SPREAD", within="nvlink", wait_seconds=0)
    removed.append(group)
    assert sorted(bundles_of(group)) == [("pcie", [2, 3]), ("pcie-b", [2, 3])]
    with pytest.raises(NotEnoughGpus, match="has fewer than 2 GPUs free"):
        placement_group([TWO], wait_seconds=0)


def test_unequal_parts_of_a_packed_group_and_a_bundle_without_gpus(
    service: Any, removed: list[PlacementGroup]
) -> None:
    neighbour = another_user("pcie")
    try:
        group = placement_group([{"CPU": 0.5}, *[{"GPU": 1}] * 6], name="unequal", wait_seconds=0)
        removed.append(group)
        on = bundles_of(group)
    finally:
        ray.kill(neighbour)
    assert on == [*(("pcie-b", [gpu]) for gpu in range(4)), ("pcie", [2]), ("pcie", [3])]
    assert len(placement_group_table(group)["bundles_to_node_id"]) == 7
    assert get_placement_group("unequal") == group


def test_a_share_is_put_on_the_gpu_that_is_shared_already(
    service: Any, removed: list[PlacementGroup]
) -> None:
    for _ in range(2):
        removed.append(placement_group([{"GPU": 0.25, "CPU": 0.5}], strategy="SPREAD", wait_seconds=0))
    first, second = (bundles_of(group) for group in removed)
    assert first == second and len(first) == 1


def held_by(group: PlacementGroup) -> list[tuple[int, Bundle]]:
    """What the service says of a group: bundle, and one of its GPUs."""
    return sorted(
        (bundle, Bundle(part["node_name"], [gpu]))
        for one in Client().status()["deployments"]
        for part in one["assignments"]
        if part["placement_group"] == group.id.hex()
        for gpu, bundle in zip(part["gpus"], part["bundle_indices"], strict=True)
    )


def test_shares_and_whole_gpus_beside_another_user_of_half_a_gpu(
    service: Any, removed: list[PlacementGroup]
) -> None:
    """No GPU is given twice, and what the service says is what a worker in each bundle finds."""
    assert settled(lambda: not known(service)), known(service)
    used: Counter[tuple[str, int]] = Counter()
    there = NodeAffinitySchedulingStrategy(node_id("pcie"), soft=False)
    half = Probe.options(num_gpus=0.5, scheduling_strategy=there).remote()
    [gpu] = ray.get(half.where.remote())[1]
    used["pcie", gpu] = 500
    asked: list[tuple[str, list[float]]] = [
        ("SPREAD", [0.25, 1, 0.25]), ("STRICT_PACK", [0.25, 2, 0.25]), ("PACK", [0.5] * 4),
    ]  # fmt: skip
    try:
        for strategy, amounts in asked:
            bundles = [{"GPU": amount} for amount in amounts]
            removed.append(placement_group(bundles, strategy=strategy, wait_seconds=20))
            found = bundles_of(removed[-1])
            assert held_by(removed[-1]) == [
                (i, Bundle(node, [gpu])) for i, (node, gpus) in enumerate(found) for gpu in gpus
            ]
            nodes = len({node for node, _ in found})
            assert strategy == "PACK" or nodes == (2 if strategy == "SPREAD" else 1)
            for amount, (node, gpus) in zip(amounts, found, strict=True):
                for gpu in gpus:
                    used[node, gpu] += round(min(amount, 1) * 1000)
            assert max(used.values()) <= 1000, used
            if strategy == "STRICT_PACK":
                assert found[1].gpus in ([0, 1], [2, 3]), "whole GPUs are a bridged pair"
                assert found[0] == found[2], "and the shares are on one GPU"
        with pytest.raises(NotEnoughGpus, match="needs 2 GPUs and 2 x 0.9 of a GPU free on one node"):
            placement_group([{"GPU": 2}, *[{"GPU": 0.9}] * 2], strategy="STRICT_PACK", wait_seconds=0)
    finally:
        ray.kill(half)


def test_what_is_removed_can_be_had_again_at_once_and_is_forgotten(
    service: Any, removed: list[PlacementGroup]
) -> None:
    for _ in range(3):
        group = placement_group([{"GPU": 4}] * 2, strategy="SPREAD", name="again", wait_seconds=0)
        assert len(known(service)) == 1
        remove_placement_group(group)
    assert settled(lambda: not known(service)), known(service)
    assert settled(lambda: not left_over()), left_over()


def test_a_service_that_starts_anew_knows_groups_by_whatever_name(
    service: Any, removed: list[PlacementGroup]
) -> None:
    group = placement_group([{"GPU": 3}, {"GPU": 0.5}, {"GPU": 0.25}], name="kept", wait_seconds=0)
    removed.append(group)
    ray.kill(service, no_restart=False)
    assert known(service) and settled(lambda: "the service has restarted" in str(Client().events()))
    assert known(service)[0].startswith("kept-") and get_placement_group("kept") == group
    on = bundles_of(group)
    other = placement_group([{"GPU": 4}], wait_seconds=0)
    removed.append(other)
    [(node, _), rest, _] = on
    assert on == [(node, [0, 1, 2]), (node, [3]), (node, [3])]
    assert bundles_of(other) == [("pcie-b" if node == "pcie" else "pcie", [0, 1, 2, 3])]
    removed.append(placement_group([{"GPU": 0.125}] * 2, wait_seconds=0))
    assert bundles_of(removed[-1]) == [rest, rest], "it knows how much is left of which GPU"
    with pytest.raises(NotEnoughGpus):
        placement_group([{"GPU": 0.001}], wait_seconds=0)


@pytest.fixture
def driver(address: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another driver, which makes a group."""
    drivers: list[subprocess.Popen[str]] = []

    def new(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DRIVER, address, *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        drivers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env))
        return drivers[-1]

    yield new
    for process in drivers:
        process.kill()
        process.wait()


def says(driver: subprocess.Popen[str]) -> str:
    assert driver.stdout is not None
    return driver.stdout.readline().strip()


def test_a_driver_that_is_killed_leaves_nothing(
    service: Any, driver: Callable[..., subprocess.Popen[str]]
) -> None:
    process = driver()
    assert says(process)
    assert settled(lambda: ray.available_resources().get("GPU") == 2.25), left_over()
    process.kill()
    assert settled(lambda: not left_over()), left_over()
    assert settled(lambda: not known(service)), known(service)


def test_a_detached_group_outlives_its_driver_until_somebody_removes_it(
    service: Any, driver: Callable[..., subprocess.Popen[str]]
) -> None:
    process = driver("detached", "stays")
    group_id = says(process)
    assert process.wait(60) == 0
    [name] = known(service)
    assert name.startswith("stays-")
    group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
    assert sorted(bundles_of(group)) == [("pcie", [0, 1]), ("pcie-b", [0, 1])]
    remove_placement_group(group)
    assert settled(lambda: not left_over() and not known(service)), left_over()


def test_callers_at_once_queue(
    service: Any, removed: list[PlacementGroup], caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor() as pool, caplog.at_level(logging.WARNING, "placement"):
        asked = [pool.submit(placement_group, [{"GPU": 1}] * 2, wait_seconds=60) for _ in range(4)]
        removed += [one.result() for one in asked]
        held = [(node, gpu) for group in removed for node, gpus in bundles_of(group) for gpu in gpus]
        assert len(set(held)) == 8, "nobody was refused, and none has another's"
        waiting = pool.submit(placement_group, [{"GPU": 1}] * 2)
        assert settled(lambda: "waits: cannot place" in caplog.text)
        remove_placement_group(removed[0])
        removed[0] = waiting.result(60)
    assert bundles_of(removed[0])


def test_what_ray_refuses_is_refused_as_ray_does_and_the_rest_with_the_fix(service: Any) -> None:
    wrong: dict[str, Any]
    for wrong in (
        {"bundles": []},
        {"bundles": [ONE], "strategy": "STRICT"},
        {"bundles": [ONE], "lifetime": "x"},
    ):
        with pytest.raises(ValueError):
            placement_group(**wrong)
    with pytest.raises(InvalidDeployment, match="bundle 0 asks for 1.5 GPUs"):
        placement_group([{"GPU": 1.5}])
    with pytest.raises((ValueError, InvalidDeployment)):  # the latter of a Ray that has no topology_strategy
        placement_group([ONE], strategy="PACK", topology_strategy={"rack": "STRICT_PACK"})
    with pytest.raises(InvalidDeployment, match=r"gpus: names 2 twice"):
        placement_group([ONE], gpus=[2, 2])
    with pytest.raises(InvalidDeployment, match="no bundle asks for a GPU"):
        placement_group([{"CPU": 1}], gpus=[2])
    with pytest.raises(InvalidDeployment, match="within"):
        placement_group([ONE] * 2, within="rack")


def test_just_the_gpus_that_are_named(service: Any, neighbours: None, removed: list[PlacementGroup]) -> None:
    """The best pair would be 2 and 3, and Ray alone would give 1 and 2 of whichever node it likes."""
    group = placement_group([ONE] * 2, gpus=[3, 1], wait_seconds=0)
    removed.append(group)
    [(node, _), _] = found = bundles_of(group)
    assert [gpus for _, gpus in found] == [[1], [3]]
    elsewhere = [{"host": f"!{node}"}] * 2
    other = placement_group(
        [{"GPU": 2}, {"CPU": 0.5}], gpus=[1, 3], bundle_label_selector=elsewhere, wait_seconds=0
    )
    removed.append(other)
    [(on, gpus)] = bundles_of(other)
    assert (on != node, gpus) == (True, [1, 3])
    with pytest.raises(NotEnoughGpus, match=r"GPU 3 is held by 'placement-group-\w+'"):
        placement_group([ONE], gpus=[3], wait_seconds=0)
    with pytest.raises(NotEnoughGpus, match="GPU 0 is held by another Ray user"):
        placement_group([ONE], gpus=[0], wait_seconds=0)
    with pytest.raises(UnknownGpu, match=r"no node has GPU 4; there are: 0-3 \(pcie\), 0-3 \(pcie-b\)"):
        placement_group([ONE], gpus=[4], wait_seconds=0)


def test_the_example_with_named_gpus(service: Any) -> None:
    results = Client().apply_all(load_deployments(ROOT / "examples" / "named_gpus.toml"))
    found = {one.deployment: [(a.node_name, a.gpus) for a in one.assignments] for one in results}
    assert found == {"llama": [("pcie", [2, 3])], "whisper": [("pcie", [0]), ("pcie", [1])]}


def test_who_names_a_gpu_waits_for_just_that(service: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Two others have GPUs 0 and 1. Once the second leaves, Ray's books say that one is free, but not which."""
    first, second = another_user("pcie"), another_user("pcie")
    here = [{"host": "pcie"}]
    try:
        with ThreadPoolExecutor() as pool, caplog.at_level(logging.WARNING, "placement"):
            asked = pool.submit(placement_group, [ONE], gpus=[1], bundle_label_selector=here, wait_seconds=60)
            assert settled(lambda: "GPU 1 is held by another Ray user" in caplog.text)
            ray.kill(second)
            group = asked.result(60)
        assert bundles_of(group) == [("pcie", [1])]
        remove_placement_group(group)
    finally:
        ray.kill(first)
        ray.kill(second)


def test_bundles_of_one_domain_with_its_resource(service: Any, removed: list[PlacementGroup]) -> None:
    """As NeMo-RL asks for an NVLink domain."""
    group = placement_group([{"CPU": 1, "GPU": 1, "nvlink-b": 0.001}] * 2, wait_seconds=0)
    removed.append(group)
    assert bundles_of(group) == [("pcie-b", [0]), ("pcie-b", [1])]
    with pytest.raises(placement.Unplaceable, match="has less than 2 nvlink-b free"):
        placement_group([{"GPU": 1, "nvlink-b": 2}], wait_seconds=0)


def test_bundles_of_one_domain_by_rays_own_topology_strategy(
    service: Any, removed: list[PlacementGroup]
) -> None:
    if "topology_strategy" not in signature(ray.util.placement_group).parameters:
        with pytest.raises(InvalidDeployment, match="use strategy, or Ray 2.57 or later"):
            placement_group([ONE], topology_strategy={"rack": "STRICT_PACK"})
        return
    asked = {"ray.io/node-id": "SPREAD", "rack": "STRICT_PACK"}
    half = {"GPU": 1, "CPU": 0.5}
    spread = placement_group([half, half, {"CPU": 0.5}], topology_strategy=asked, wait_seconds=0)
    removed.append(spread)
    assert {node for node, _ in bundles_of(spread)} == {"pcie"}, "alone in its rack"
    with pytest.raises(NotEnoughGpus):
        placement_group([{"GPU": 1}] * 3, topology_strategy={"rack": "STRICT_PACK"}, wait_seconds=0)


def test_without_a_gpu_it_is_rays_own(service: Any, removed: list[PlacementGroup]) -> None:
    removed.append(placement_group([{"CPU": 1}], name="cpus"))
    assert removed[0].wait(30) and known(service) == []


@ray.remote(num_cpus=0)
class Probe:
    """What a framework starts in a bundle: alone to ask for its GPU, or beside others that share it."""

    def where(self) -> tuple[str, list[int]]:
        context = ray.get_runtime_context()
        return context.get_node_id(), sorted(map(int, context.get_accelerator_ids()["GPU"]))


@pytest.mark.parametrize(
    ("framework", "bundles", "asked", "share", "gpus"),
    [
        ("verl", [ONE] * 2, {"strategy": "STRICT_PACK", "name": "pool-0:2"}, 0.5, 2),
        ("OpenRLHF", [ONE] * 4, {"strategy": "PACK"}, 0.25, 4),
        ("slime", [ONE] * 4, {"strategy": "PACK"}, 1, 4),
        ("SkyRL", [TWO] * 2, {"strategy": "PACK"}, 2, 4),
        ("NeMo-RL", [{"CPU": 1, "GPU": 1, "nvlink-b": 0.001}] * 2, {"strategy": "PACK", "name": "unified"}, 1, 2),
        ("Train", [ONE] * 2, {"strategy": "SPREAD", "bundle_label_selector": [{"host": "!x"}] * 2}, 1, 2),
        ("Data", [ONE] * 2, {"strategy": "PACK", "lifetime": None}, 1, 2),
        ("Serve", [{"CPU": 0.1}, {"GPU": 1}, {"GPU": 1}], {"strategy": "PACK", "name": "replica"}, 1, 2),
        ("Serve LLM", [{"GPU": 1, "accelerator_type:A100": 0.001}] * 2, {"strategy": "PACK"}, 1, 2),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_steps_that_frameworks_take(
    service: Any,
    neighbours: None,
    framework: str,
    bundles: list[dict[str, float]],
    asked: dict[str, Any],
    share: float,
    gpus: int,
) -> None:
    """Make a group, wait for it, read its table, start actors in each bundle, sort them by node and GPU, remove it."""
    group = placement_group(bundles, **asked)
    assert ray.get(group.ready()) == group and group.wait(30)
    nodes = placement_group_table(group)["bundles_to_node_id"]
    actors: dict[int, list[Any]] = {}
    for i, specs in enumerate(group.bundle_specs):
        inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        several = int(specs.get("GPU", 0) / share)
        options = {"num_gpus": share, "scheduling_strategy": inside}
        actors[i] = [Probe.options(**options).remote() for _ in range(several)]
    found = {i: ray.get([actor.where.remote() for actor in several]) for i, several in actors.items()}
    assert all(node == nodes[i] for i, several in found.items() for node, _ in several)
    assert all(one == several[0] for several in found.values() for one in several), "they share the GPUs"
    order = [several[0] for several in found.values() if several]
    by_node: dict[str, list[list[int]]] = {}
    for node, ids in order:
        by_node.setdefault(node, []).append(ids)
    assert all(ids == sorted(ids) for ids in by_node.values()), "sorting by GPU leaves the bundles in order"
    held = [(node, gpu) for node, ids in order for gpu in ids]
    assert len(set(held)) == gpus
    assert not {(node_id(name), 0) for name in ("pcie", "pcie-b")} & set(held)
    pairs = [{gpu for at, gpu in held if at == node} for node in by_node]
    assert framework == "Train" or {2, 3} in pairs, "one node at least gives its bridged pair"
    remove_placement_group(group)
    assert settled(lambda: ray.available_resources()["GPU"] == 6), left_over()
