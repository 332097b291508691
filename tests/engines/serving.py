"""Ray Serve on a simulated cluster, and replicas that say which GPUs their workers have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement import Client, connect
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode, embedded_cluster
from tests.integration.conftest import left_over, settled
from tests.integration.test_place import another_user

serve = pytest.importorskip("ray.serve", reason='Ray Serve is not installed: pip install "ray[serve]"')

NODES = [SimulatedNode(name, topology="a100-pcie-4x") for name in ("pcie", "pcie-b")]
"""Four GPUs each, with NVLink between 0 and 1 and between 2 and 3."""
PAIR = [{"CPU": 0.1}, {"GPU": 1}, {"GPU": 1}]
"""A replica, and its two workers."""
INSTALL = {"RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": "placement.serve.install"}
PATIENT = INSTALL | {"PLACEMENT_SERVE_SECONDS": "60"}
"""For a machine that is busy with other tests."""
QUICK = {"health_check_period_s": 0.5, "graceful_shutdown_wait_loop_s": 0.1, "graceful_shutdown_timeout_s": 5}


class Replica(NamedTuple):
    """What a replica says: its process, and the nodes and GPUs of its workers."""

    pid: int
    version: str
    nodes: tuple[str, ...]
    gpus: tuple[int, ...]


@ray.remote(num_cpus=0, num_gpus=1)
class Rank:
    """One worker of an engine."""

    def where(self) -> tuple[str, int]:
        context = ray.get_runtime_context()
        return context.get_node_id(), int(context.get_accelerator_ids()["GPU"][0])


def ranks_in(group: PlacementGroup) -> list[Any]:
    """A worker in each bundle that has a GPU."""
    return [
        Rank.options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i)
        ).remote()
        for i, bundle in enumerate(group.bundle_specs)
        if bundle.get("GPU")
    ]


@serve.deployment(
    placement_group_bundles=PAIR, placement_group_strategy="STRICT_PACK", ray_actor_options={"num_cpus": 0.1}, **QUICK
)  # fmt: skip
class Unchanged:
    """As users write it: nothing of placement in it."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.ranks = ranks_in(get_current_placement_group())
        self.where = ray.get([rank.where.remote() for rank in self.ranks])

    def __call__(self) -> Replica:
        nodes, gpus = zip(*self.where, strict=True)
        return Replica(os.getpid(), self.version, nodes, gpus)


@contextmanager
def serve_on(
    nodes: Sequence[SimulatedNode], variables: Mapping[str, str], **options: Any
) -> Iterator[EmbeddedCluster]:
    """A cluster with Serve on it; its head is started with these variables, and Serve with these options."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with embedded_cluster(nodes) as cluster:
            serve.start(**{"proxy_location": "Disabled", **options})
            try:
                yield cluster
            finally:
                serve.shutdown()


@contextmanager
def neighbours() -> Iterator[None]:
    """Other Ray users have GPU 0 of each of the :data:`NODES`. Afterwards all applications go, and no GPU is held."""
    users = [another_user(node.name) for node in NODES]
    yield
    for name in serve.status().applications:
        serve.delete(name)
    for user in users:
        ray.kill(user)
    assert settled(lambda: not left_over()), left_over()


def known() -> list[str]:
    """The deployments that the service knows."""
    return [one["name"] for one in Client().status()["deployments"]]


def waiting() -> int:
    """How many calls wait in the service's queue."""
    return ray.get(
        connect().__ray_call__.remote(lambda self: len(self._service._controller.queue.tickets.all()))
    )


def run(deployment: Any, version: str, **options: Any) -> Any:
    """Declares an application. One of another version is a rolling update, one of the same version is not.

    To Serve each ``run`` is another version, unless Ray's own flag says it.
    """
    wanted = deployment.options(version=version, _internal=True, **options).bind(version)
    return serve.run(wanted, name="app", route_prefix=None)


def replicas(handle: Any, count: int, version: str) -> set[Replica]:
    """So many replicas of a version, once these are all that answer."""
    seen: list[Replica] = []

    def answered() -> bool:
        try:
            seen.append(Replica(*handle.remote().result(timeout_s=120)))
        except ray.exceptions.RayActorError:  # of which Serve has yet to notice that it is gone
            return False
        latest = seen[-12 * count :]
        return (
            len(latest) == 12 * count
            and {one.version for one in latest} == {version}
            and len(set(latest)) == count
        )

    assert settled(answered, 120), seen[-12 * count :]
    return set(seen[-12 * count :])


def groups_of_serve() -> dict[str, str]:
    """The groups of replicas that are not removed: name -> state."""
    rows = ray.util.placement_group_table().values()
    return {row["name"]: row["state"] for row in rows if "SERVE" in row["name"] and row["state"] != "REMOVED"}


def controller() -> Any:
    """The handle of Serve's controller."""
    return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")


def controllers_log() -> str:
    """What Serve's controllers have written to their logs, one after the other."""
    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs" / "serve"
    return "".join(path.read_text() for path in sorted(folder.glob("controller_*.log")))


def names_of_nodes() -> Callable[[str], str]:
    """A node's name, by its id."""
    known = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
    return known.__getitem__
