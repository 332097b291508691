"""Other users are left alone: holds are short even if their maker dies, groups of others stay, idle nodes are idle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

import placement
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode
from tests.chaos import recovered
from tests.integration.conftest import settled

pytestmark = pytest.mark.integration

IDLE_SECONDS = 2.0


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    # One GPU of each pair is taken by others, so that a pair on one bridge has to be steered to.
    return [
        SimulatedNode("pcie", topology="a100-pcie-4x", labels={"rack": "r"}),
        SimulatedNode("pcie-b", topology="a100-pcie-4x", labels={"rack": "r"}),
    ]


@pytest.fixture(scope="module")
def cluster(faults: Path, cluster: EmbeddedCluster) -> EmbeddedCluster:
    """The cluster, started with the variable set."""
    return cluster


@pytest.fixture(scope="module")
def service(cluster: EmbeddedCluster) -> Any:
    return placement.start(idle_seconds=IDLE_SECONDS)


@pytest.fixture
def neighbours(service: Any) -> Iterator[list[Any]]:
    """Another Ray user's groups, one GPU on each node: the first of a bridged pair. One has a name like ours."""
    [ours] = {name.split(":")[1] for name in service_groups(service)}
    names = [f"placement:{ours}0:cut:0:x:1", "placement:cut"]
    nodes = [row["NodeID"] for row in ray.nodes() if row["Resources"].get("GPU")]
    groups = [
        placement_group([{"GPU": 1}], name=name, bundle_label_selector=[{"ray.io/node-id": node}])
        for name, node in zip(names, nodes, strict=True)
    ]
    ray.get([group.ready() for group in groups])
    yield groups
    for group in groups:
        remove_placement_group(group)


def service_groups(service: Any) -> list[str]:
    """Names of the groups of a deployment that is placed for a moment."""
    ray.get(service.place.remote({"name": "glance", "model": "m"}))
    names = [row["name"] for row in placement_group_table().values() if row["state"] == "CREATED"]
    ray.get(service.release.remote("glance"))
    return [name for name in names if ":glance:" in name]


class Holds(threading.Thread):
    """Watches how long each hold or filler lives, to within a few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, tuple[float, float]] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            now = time.monotonic()
            for group_id, row in placement_group_table().items():
                if row["name"].startswith("hold-") and row["state"] not in ("PENDING", "REMOVED"):
                    self.seen[group_id] = (self.seen.get(group_id, (now, now))[0], now)
            time.sleep(0.005)

    def __enter__(self) -> Holds:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join()

    def longest(self) -> float:
        return max((last - first for first, last in self.seen.values()), default=0.0)


PAIR = {"gpus": 2, "constraints": {"gpu_nodes": ["pcie"]}}
SHARE = {"gpus": 0.25, "constraints": {"gpu_nodes": ["pcie"]}}
GANG = {"tensor_parallel": 2, "pipeline_parallel": 2, "constraints": {"gpu_nodes": ["pcie", "pcie-b"]}}


@pytest.mark.parametrize(
    ("wanted", "step"),
    [
        (PAIR, ""),
        (PAIR, "agent.steered"),
        (GANG, ""),
        (GANG, "agent.prepared"),
        (GANG, "service.prepared"),
        (GANG, "service.group_created"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_holds_are_gone_soon_even_if_their_maker_is_killed(
    service: Any, neighbours: list[Any], faults: Path, wanted: dict[str, Any], step: str
) -> None:
    if step:
        (faults / step).touch()
    with Holds() as holds:
        ray.get(service.place.remote({"name": "cut", "model": "m", **wanted}), timeout=60)
    assert not step or not (faults / step).exists(), "nobody came there"
    longest = holds.longest()
    assert not [name for name in live_names() if name.startswith("hold-")]
    assert longest < 2.5, longest  # two seconds are promised; the rest is for a machine that stalls
    fault = f"the {'service' if 'service' in step else 'node actor'} is killed: its holds"
    recovered(fault if step else "(nobody is killed: holds)", longest)
    ray.get(service.release.remote("cut"))
    mine = {group.id.hex() for group in neighbours}
    assert mine <= {gid for gid, row in placement_group_table().items() if row["state"] == "CREATED"}


def live_names() -> list[str]:
    return [row["name"] for row in placement_group_table().values() if row["state"] != "REMOVED"]


def test_groups_of_others_with_names_like_ours_stay(service: Any, neighbours: list[Any]) -> None:
    """The service starts anew, and removes what it finds of its own and does not know."""
    kept = set(live_names())
    ray.kill(service, no_restart=False)
    assert ray.get(service.release_all.remote(), timeout=60) == []
    assert set(live_names()) == kept


def idle(name: str) -> bool:
    """Whether Ray's autoscaler would count a node as idle for more than a second."""
    [address] = [row["NodeManagerAddress"] for row in ray.nodes() if row["NodeName"] == name]
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    [node] = [one for one in status.active_nodes + status.idle_nodes if one.ip_address == address]
    return node.node_status == "IDLE" and node.resource_usage.idle_time_ms > 1000


def test_a_node_that_holds_nothing_is_idle_to_the_autoscaler(service: Any) -> None:
    ray.get(service.place.remote({"name": "kept", "model": "m", **PAIR}))
    assert settled(lambda: idle("pcie-b"))
    assert not idle("pcie")
    # What its GPUs are is known all the same, and looking does not wake it.
    nodes = {node["name"]: node for node in ray.get(service.status.remote())["nodes"]}
    assert nodes["pcie-b"]["islands"] == [[0, 1], [2, 3]]
    time.sleep(1)
    assert idle("pcie-b")
    ray.get(service.release.remote("kept"))
    assert settled(lambda: idle("pcie"))
    # And it is as good as before.
    result = ray.get(service.place.remote({"name": "again", "model": "m", **PAIR}))
    assert result.assignments[0].weakest_link == "NV12"
    ray.get(service.release.remote("again"))
