"""What real engines need on simulated nodes. This folder is on PYTHONPATH, as an installed package would be."""

from __future__ import annotations

from typing import Any

import ray
from vllm.platforms.cpu import CpuPlatform


class CountedGpuPlatform(CpuPlatform):
    """vLLM on CPUs, whose workers are given a GPU by Ray all the same, as they are on a machine that has some."""

    ray_device_key = "GPU"


def register() -> str:
    """The entry point ``vllm.platform_plugins``."""
    return "counted_gpus.CountedGpuPlatform"


class Whereabouts:
    """What each of vLLM's workers can be asked then: ``--worker-extension-cls counted_gpus.Whereabouts``."""

    def where(self) -> list[Any]:
        """Its rank, the id of its node, and the GPU that the actor holds in which it runs."""
        context = ray.get_runtime_context()
        [gpu] = context.get_accelerator_ids()["GPU"]
        return [self.rank, context.get_node_id(), int(gpu)]
