"""Real workers in placed groups, and another Ray user beside them: the demo checks results with these."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from placement.runtime.results import PlacementResult


def _where_am_i() -> tuple[str, list[int]]:
    context = ray.get_runtime_context()
    return context.get_node_id(), [int(gpu) for gpu in context.get_accelerator_ids()["GPU"]]


def gpus_seen_by_workers(
    result: PlacementResult, progress: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """What a worker at each rank of each replica reports, beside the result.

    A worker process serves several ranks of its node, one after the other, as Ray's workers do.
    """
    # max_calls=0 keeps the process; otherwise Ray ends it after a task that had a GPU.
    worker = ray.remote(max_calls=0)(_where_am_i)
    seen = []
    for a in result.assignments:
        progress(f"{result.deployment}/{a.replica_index}")
        for rank in range(len(a.bundle_indices)):
            node, gpus = ray.get(worker.options(**a.actor_options(rank)).remote())
            seen.append(
                {
                    "deployment": result.deployment,
                    "replica": a.replica_index,
                    "rank": a.ranks[rank],
                    "promised": {"node": a.node, "gpus": a.gpus[rank : rank + 1]},
                    "got": {"node": node, "gpus": gpus},
                }
            )
    return seen


class _Neighbour:
    def here(self) -> bool:
        return True


class AnotherUser:
    """Another user, who holds one GPU through plain Ray until :meth:`leave`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def leave(self) -> None:
        """Gives the GPU back."""
        ray.kill(self._actor)


def another_user(node_name: str) -> AnotherUser:
    """Takes one GPU of a node with plain Ray, and returns once it is held.

    Raises:
        StopIteration: no node has that name.
    """
    node = next(row["NodeID"] for row in ray.nodes() if row["NodeName"] == node_name and row["Alive"])
    pinned = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(num_cpus=0, num_gpus=1)(_Neighbour).options(scheduling_strategy=pinned).remote()
    ray.get(actor.here.remote())
    return AnotherUser(actor)


def everything_is_free(deadline_seconds: float = 10.0) -> bool:
    """Whether every GPU and egress unit becomes free, and every placement group is removed, within the deadline."""
    end = time.monotonic() + deadline_seconds
    while time.monotonic() < end:
        total, free = ray.cluster_resources(), ray.available_resources()
        held = [
            name for name in total if name.startswith(("GPU", "egress")) and free.get(name, 0.0) < total[name]
        ]
        if not held and all(row["state"] == "REMOVED" for row in placement_group_table().values()):
            return True
        time.sleep(0.1)
    return False
