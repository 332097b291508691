"""The steps that training frameworks take with a group, each in its own way, with ``placement_group`` in Ray's place.

In our words, from verl (``single_controller/ray/base.py``), OpenRLHF (``trainer/ray/vllm_engine.py``), slime
(``ray/placement_group.py``), SkyRL (``ResolvedPlacementGroup``), NeMo-RL (``distributed/virtual_cluster.py``), Ray
Train v2 (``worker_group.py``) and Ray Data (``vllm_engine_stage.py``). What each of them does to the order of the
bundles must leave the ranks as they are: rank r on the r-th GPU that was chosen. GPU 0 of each node is another user's,
so that 2 and 3 are the only bridged pair.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement import placement_group  # instead of ray.util.placement_group
from placement.runtime.embedded import SimulatedNode
from tests.integration.conftest import settled
from tests.integration.test_place import another_user

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

ONE = {"GPU": 1, "CPU": 0.5}
Seen = tuple[str, str, list[int]]


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [
        SimulatedNode("a", topology="a100-pcie-4x", labels={"pool": "train"}, resources={"nvlink-0": 1}),
        SimulatedNode("b", topology="a100-pcie-4x", labels={"pool": "rollout"}, resources={"nvlink-1": 1}),
    ]


@pytest.fixture(autouse=True)
def neighbours(service: Any) -> Iterator[None]:
    users = [another_user("a"), another_user("b")]
    yield
    for user in users:
        ray.kill(user)
    for group_id, row in placement_group_table().items():  # they would end with this driver
        if row["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


@ray.remote(num_cpus=0)
class Worker:
    """Says where it is: node id, IP, GPUs."""

    def where(self) -> Seen:
        context = ray.get_runtime_context()
        gpus = sorted(map(int, context.get_accelerator_ids()["GPU"]))
        return context.get_node_id(), ray.util.get_node_ip_address(), gpus

    def child(self, group: PlacementGroup, bundle: int, gpus: float) -> Seen:
        """What a worker says that this one starts in a bundle, as an engine does."""
        return ray.get(start(group, bundle, gpus).where.remote())

    def visible(self) -> str | None:
        return os.environ.get("VLLM_RAY_BUNDLE_INDICES")


def start(group: PlacementGroup, bundle: int, gpus: float = 1, **options: Any) -> Any:
    inside = PlacementGroupSchedulingStrategy(
        group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=True
    )
    return Worker.options(num_gpus=gpus, scheduling_strategy=inside, **options).remote()


def probed(group: PlacementGroup) -> list[Seen]:
    """What an actor in each bundle says, as slime, SkyRL and NeMo-RL ask; it is ended then."""
    actors = [start(group, bundle) for bundle in range(group.bundle_count)]
    found = ray.get([actor.where.remote() for actor in actors])
    for actor in actors:
        ray.kill(actor)
    return found


def gpus_in(found: list[Seen], order: list[int]) -> list[int]:
    return [found[bundle][2][0] for bundle in order]


def test_verl_makes_a_group_for_each_node_and_takes_them_by_ip(service: Any) -> None:
    names = [f"pool_{i}:" for i in range(2)]
    groups = [
        placement_group([{"CPU": 1, "GPU": 1}] * 2, strategy="STRICT_PACK", name=name, lifetime=None)
        for name in names
    ]
    ray.get([group.ready() for group in groups])
    ips = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    by_ip = sorted(groups, key=lambda group: ips[placement_group_table(group)["bundles_to_node_id"][0]])
    # Two roles are colocated: half a GPU for a worker of each.
    workers = [start(group, bundle, 0.5) for group in by_ip for bundle in range(2) for _ in range(2)]
    found = ray.get([worker.where.remote() for worker in workers])
    assert [gpus for *_, gpus in found] == [[2], [2], [3], [3]] * 2
    assert [ip for _, ip, _ in found] == sorted(ip for _, ip, _ in found)


def test_openrlhf_starts_engines_on_bundles_that_share_a_node(service: Any) -> None:
    group = placement_group([ONE] * 2, strategy="PACK")
    ray.get(group.ready())
    nodes = placement_group_table(group)["bundles_to_node_id"]
    indices = sorted(nodes, key=lambda bundle: (nodes[bundle], bundle))
    env = {"VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, indices)), "VLLM_RAY_PER_WORKER_GPUS": "0.2"}
    engine = start(group, indices[0], 0, runtime_env={"env_vars": env})
    told = ray.get(engine.visible.remote()) or ""
    ranks = ray.get([engine.child.remote(group, int(bundle), 0.2) for bundle in told.split(",")])
    assert [gpus for *_, gpus in ranks] == [[2], [3]]


def test_slime_sorts_bundles_by_ip_and_gpu(service: Any) -> None:
    group = placement_group([ONE] * 6, strategy="PACK")
    found = probed(group)
    order = sorted(range(6), key=lambda bundle: ([*map(int, found[bundle][1].split("."))], found[bundle][2]))
    assert gpus_in(found, order) == [1, 2, 3] * 2
    assert [gpus for _, _, gpus in found] == [[1], [2], [3]] * 2, "within a node they were in order before"


def test_skyrl_resolves_a_group_and_removes_it_by_itself(service: Any) -> None:
    for bundles in ([ONE] * 2, [{"GPU": 2, "CPU": 2}]):
        group = placement_group(bundles, strategy="PACK")
        assert group.wait(30)
        actors = [start(group, bundle, specs["GPU"]) for bundle, specs in enumerate(group.bundle_specs)]
        found = ray.get([actor.where.remote() for actor in actors])
        order = sorted(range(len(found)), key=lambda bundle: (found[bundle][0], found[bundle][2]))
        assert order == [*range(len(found))]
        assert [gpu for *_, gpus in found for gpu in gpus] == [2, 3]
        remove_placement_group(group)
        assert settled(lambda: ray.available_resources()["GPU"] == 6)


def test_nemo_rl_asks_for_an_nvlink_domain_by_its_resource(service: Any) -> None:
    for domain, node in (("nvlink-1", "b"), ("nvlink-0", "a")):
        group = placement_group(
            [{"CPU": 0.5, "GPU": 1, domain: 0.001}] * 2, strategy="PACK", name=f"cluster-{domain}"
        )
        ray.get(group.ready(), timeout=30)
        found = probed(group)
        order = sorted(range(2), key=lambda bundle: (domain, found[bundle][0], found[bundle][2]))
        assert gpus_in(found, order) == [2, 3]
        names = {row["NodeID"]: row["NodeName"] for row in ray.nodes()}
        assert {names[node_id] for node_id, *_ in found} == {node}
        remove_placement_group(group)


@ray.remote(num_cpus=0)
class Controller:
    """As that of Ray Train: an actor that makes the group, and with which it ends."""

    def make(self, selectors: list[dict[str, str]]) -> PlacementGroup:
        self.group = placement_group(
            [{"GPU": 1, "CPU": 0.5}] * len(selectors), strategy="PACK", bundle_label_selector=selectors
        )
        ray.get(self.group.ready(), timeout=60)
        return self.group


def test_train_makes_it_in_an_actor_and_sorts_workers_by_node_and_gpu(service: Any) -> None:
    controller = Controller.options(lifetime="detached", name="train").remote()
    group = ray.get(controller.make.remote([{"pool": "train"}] * 2))
    found = ray.get([start(group, bundle).where.remote() for bundle in range(2)])
    first_seen = [node for node, *_ in found]
    order = sorted(range(2), key=lambda i: (first_seen.index(found[i][0]), found[i][2]))
    assert (order, gpus_in(found, order)) == ([0, 1], [2, 3])
    ray.kill(controller)
    assert settled(lambda: ray.available_resources()["GPU"] == 6), "it ended with who made it"


def test_data_makes_one_for_each_stage_in_its_remote_arguments(service: Any) -> None:
    def ray_remote_args() -> dict[str, Any]:
        group = placement_group([ONE] * 2, strategy="PACK")
        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                group, placement_group_capture_child_tasks=True
            )
        }

    stage = Worker.options(num_gpus=0, **ray_remote_args()).remote()

    @ray.remote
    def engine() -> list[Seen]:
        group = ray.util.get_current_placement_group()
        return ray.get([start(group, bundle).where.remote() for bundle in range(2)])

    args = ray_remote_args()
    found = ray.get(engine.options(num_cpus=0, num_gpus=0, **args).remote())
    assert [gpus for *_, gpus in found] == [[2], [3]]
    ray.kill(stage)
