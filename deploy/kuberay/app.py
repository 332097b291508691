"""A Serve application whose replicas have their GPUs placed: each waits for its own, and they are free when it ends.

Here a stand-in runs on them that says which GPU it has; an engine that creates its own workers, as vLLM does, is
started with ``Engine.options(**assignment.engine_options())`` instead.
"""

import asyncio

import ray
from ray import serve

from placement import Client, Deployment


@ray.remote
class Worker:
    """One tensor-parallel rank of an inference engine."""

    def gpu(self) -> str:
        return ray.get_runtime_context().get_accelerator_ids()["GPU"][0]


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Engine:
    """A replica, which requests no GPU from Serve."""

    def __init__(self) -> None:
        name = f"engine-{serve.get_replica_context().replica_id.unique_id}"
        wanted = Deployment(name=name, model="my/model", gpus=2, owner="caller")
        # A replica that raises counts as a failed start; while it waits, the autoscaler may start a node.
        (assignment,) = Client.start().place(wanted, wait_seconds=1800).assignments
        self.node, self.gpus = assignment.node_name, assignment.gpus
        self.workers = [Worker.options(**assignment.actor_options(rank)).remote() for rank in range(2)]

    async def __call__(self, request: object) -> dict[str, object]:
        return {"node": self.node, "placed": self.gpus, "workers": [int(gpu) for gpu in await self._ask()]}

    async def check_health(self) -> None:
        """Raises once a worker is gone, with its node for example: then Serve replaces this replica."""
        await self._ask()

    async def _ask(self) -> list[str]:
        return await asyncio.gather(*(worker.gpu.remote() for worker in self.workers))


app = Engine.bind()
