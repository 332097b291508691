"""A Ray Serve application on exact GPUs, in two ways.

Unchanged, without placement in the code, if the head was started like this::

    RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH=placement.serve.install ray start --head --num-gpus=8
    serve run examples.serve_app:engine

On any other cluster, with a group that the replica creates itself::

    serve run examples.serve_app:own_group

Either answers with the GPUs that its workers have: ``curl localhost:8000``.
"""

import asyncio

import ray
from ray import serve
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.serve import replica_group


@ray.remote(num_cpus=0, num_gpus=1)
class Worker:
    """Stands for one tensor-parallel rank of an inference engine."""

    def gpu(self) -> int:
        return int(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])


def workers_in(group: PlacementGroup) -> list[ray.actor.ActorHandle]:
    """One in each bundle that has a GPU."""
    at = [i for i, bundle in enumerate(group.bundle_specs) if bundle.get("GPU")]
    inside = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in at]
    return [Worker.options(scheduling_strategy=one).remote() for one in inside]


class Answers:
    """What both engines do after their workers have started."""

    workers: list[ray.actor.ActorHandle]

    async def __call__(self, request: object = None) -> list[int]:
        return await asyncio.gather(*(worker.gpu.remote() for worker in self.workers))

    async def check_health(self) -> None:
        """Raises once a worker is gone, with its node for example: then Serve replaces this replica."""
        await self()


# The first bundle is the replica's own.
@serve.deployment(
    ray_actor_options={"num_cpus": 0.1}, placement_group_bundles=[{"CPU": 0.1}, {"GPU": 1}, {"GPU": 1}]
)
class Engine(Answers):
    """In a group that Serve creates."""

    def __init__(self) -> None:
        self.workers = workers_in(get_current_placement_group())


# No GPUs here: the replica creates its group, and waits until there is room.
@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class OwnGroup(Answers):
    """In a group that the replica creates itself, which ends with the replica."""

    async def __init__(self) -> None:  # type: ignore[misc]
        self.workers = workers_in(await replica_group([{"GPU": 1}] * 2, within="nvlink"))


engine = Engine.bind()
own_group = OwnGroup.bind()
