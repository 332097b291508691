"""vLLM on exact GPUs: ``vllm serve MODEL --distributed-executor-backend placement.vllm.Executor``.

For vLLM 0.21 to 0.32; nothing else of this package imports it. How it is used, and what is not: docs/vllm.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.placement_group import remove_placement_group

from placement.errors import InvalidDeployment
from placement.runtime.connection import caller, connect_ray
from placement.runtime.drop_in import service_or_rays_own
from placement.runtime.orders import own_name
from placement.runtime.results import PlacementResult
from placement.wire.deployment import Deployment
from placement.wire.files import parse_model

try:
    from vllm.logger import init_logger
    from vllm.v1.executor.ray_executor_v2 import RayExecutorV2
except ImportError as error:
    raise ImportError(
        f"placement.vllm needs vLLM 0.21 or later, in the Python that runs it and on all GPU nodes ({error}); "
        'install one: pip install "vllm>=0.21"'
    ) from error

OPTIONS = "additional_config.placement"
"""The key of an engine's options: ``--additional-config '{"placement": {"within": "nvlink"}}'``."""

_FROM_VLLM = {
    "model": "the model",
    "runtime": "vLLM itself",
    "gpus": "--tensor-parallel-size and --pipeline-parallel-size",
    "tensor_parallel": "--tensor-parallel-size",
    "pipeline_parallel": "--pipeline-parallel-size",
    "replicas": "there being one engine",
    "owner": "there being one engine",
}
"""Fields of a deployment that follow from vLLM's own options, and from which."""

logger = init_logger("vllm.placement")


class Executor(RayExecutorV2):  # type: ignore[misc]
    """vLLM's own Ray executor, on the best GPUs that are free.

    Only the placement group differs from vLLM's executor. It is a deployment of the placement service: the process of
    vLLM's engine core owns it, so it ends with that process, however it ends, and is never placed again. Its size
    follows from tensor, pipeline and prefill-context parallelism. The GPUs of each pipeline stage are one set on one
    node, and ranks follow these sets (``docs/rank-order.md``). Without pipeline parallelism it is on several nodes only
    if no node has so many GPUs.

    In an actor that runs in a placement group, or if ``parallel_config.placement_group`` is set, that group is used.

    Options are in vLLM's ``additional_config``, under ``placement``: ``wait_seconds``, how long to
    wait for room (without limit if left out; vLLM itself gives up after VLLM_ENGINE_READY_TIMEOUT_S), and any
    field of :class:`placement.Deployment` that vLLM's options do not set: ``name``, ``within``,
    ``min_bandwidth_gb_per_s``, ``policy``, ``constraints``. Without ``name`` it is named after the model, with a random
    suffix.

    The cluster is that of RAY_ADDRESS, else the one that was started on this machine. If the service does not run it
    is started; with PLACEMENT_WITHOUT_SERVICE=ray in the environment vLLM creates the group itself instead.

    Raises:
        ClusterUnreachable: there is no Ray cluster.
        InvalidDeployment: the options are refused.
        DeploymentConflict: another engine of that name runs.
        Unplaceable: no room was found in time: ``NoGpuNodes``, ``NotEnoughGpus`` or ``BelowFloor``.
        ReservationFailed, LeaseExpired: until the time was over, others kept taking the GPUs, or this process was too
            slow.
        ServiceNotRunning: the service cannot be started.

    Example:
        ::

            from vllm import LLM
            from placement.vllm import Executor

            llm = LLM("meta-llama/Llama-3.1-8B-Instruct", tensor_parallel_size=2, distributed_executor_backend=Executor)
    """

    places_its_group = True  # what placement.vllm_plugin asks of an executor's class

    def _init_executor(self) -> None:
        config = self.parallel_config
        if not ray.is_initialized():
            connect_ray(runtime_env=config.ray_runtime_env)
        self._placed = None
        if config.placement_group is None and get_current_placement_group() is None:
            self._placed = _place(self.vllm_config)
        if self._placed is not None:
            config.placement_group = self._placed.assignments[0].placement_group
            os.environ.update(self._placed.environment(0))
        config.distributed_executor_backend = "ray"  # vLLM's workers ask for it by that name
        super()._init_executor()

    def shutdown(self) -> None:
        """Ends the workers, and gives back their GPUs."""
        super().shutdown()
        placed, self._placed = getattr(self, "_placed", None), None
        if placed is not None and ray.is_initialized():
            remove_placement_group(placed.assignments[0].placement_group)


def _place(vllm_config: Any) -> PlacementResult | None:
    """The GPUs of an engine; ``None`` if the service does not run and must not be started."""
    options = _options(vllm_config.additional_config)
    wait_seconds = options.pop("wait_seconds", None)
    wanted = _deployment(vllm_config, options)
    borrower = service_or_rays_own()
    if borrower is None:
        return None
    placed = borrower.borrow_patiently(wanted, wait_seconds, wanted.name, caller())
    for one in placed.assignments:
        link = f", {one.weakest_link}" if one.weakest_link else ""
        logger.info("%s has GPUs %s of %s%s", wanted.name, one.gpus, one.node_name, link)
    return placed


def _options(additional_config: Any) -> dict[str, Any]:
    said = additional_config.get("placement", {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(said, Mapping):
        raise InvalidDeployment(OPTIONS, (f'{said!r} holds no options; write {{"within": "nvlink"}}',))
    problems = [
        f"{field}: that follows from {_FROM_VLLM[field]}; leave it out"
        for field in said
        if field in _FROM_VLLM
    ]
    seconds = said.get("wait_seconds")
    if seconds is not None and (
        isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0
    ):
        problems.append(
            f"wait_seconds: {seconds!r} is no time to wait; use seconds, or leave it out to wait without limit"
        )
    if problems:
        raise InvalidDeployment(OPTIONS, tuple(problems))
    return dict(said)


def _deployment(vllm_config: Any, options: Mapping[str, Any]) -> Deployment:
    """The deployment of an engine."""
    parallel, model = vllm_config.parallel_config, str(vllm_config.model_config.model)
    stages = parallel.pipeline_parallel_size
    name = options.get("name")
    if name is None:
        known_as = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(model).name).strip("._-")[:48] or "vllm"
        name = own_name(known_as)
    elif parallel.data_parallel_index:  # the size is 1 here, unless the model has experts
        name = f"{name}-{parallel.data_parallel_index}"
    if stages > 1:
        gpus = {"tensor_parallel": parallel.world_size // stages, "pipeline_parallel": stages}
    else:
        gpus = {"gpus": parallel.world_size}
    fields = {**options, "name": name, "model": model, "runtime": "vllm", "owner": "caller", **gpus}
    return parse_model(Deployment, fields, OPTIONS)
