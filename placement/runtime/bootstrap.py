"""Starts and stops the service. The only place that turns its classes into Ray actors."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from placement.core.snapshot import NEAR_LABELS
from placement.errors import ServiceNotRunning
from placement.runtime import log, ray_internals
from placement.runtime.connection import NAME, NAMESPACE, caller, connect, require_ray
from placement.runtime.discovery import NodeInfo
from placement.runtime.groups import my_gpu_ids
from placement.runtime.node_agent import NodePlacementActor, agent_name
from placement.runtime.service import DeploymentPlacementActor as Service
from placement.runtime.settings import HISTORY_DAYS, HISTORY_MIB, IDLE_SECONDS
from placement.wire.node_types import NodeType
from placement.wire.node_types import node_types as read_node_types

START_DEADLINE_SECONDS = 120.0
JOB_DEADLINE_SECONDS = START_DEADLINE_SECONDS + 60.0
"""The same, plus time for the starting process to connect."""
RESTART_SECONDS = 1.0
STOP_SECONDS = 10.0
"""The longest wait for the service to be gone; it takes some hundredths of a second."""
MOST_CALLS = 10_000
"""How many calls may be under way at once; nearly all of them wait, which costs little."""

logger = logging.getLogger(__name__)

# num_cpus=0: a bundle of one GPU has no CPU for a probe. max_calls=0: keep the worker process,
# which Ray otherwise ends after every task that had a GPU.
probe = ray.remote(num_cpus=0, max_calls=0)(my_gpu_ids)
_Agent = ray.remote(num_cpus=0, concurrency_groups={"facts": 1})(NodePlacementActor)


def begin(*args: Any) -> Service:
    """The service, in its actor, which is restarted until it could read the records of an earlier service."""
    log.begin(ray_internals.logs_folder())
    if untested := ray_internals.require_supported():
        logger.warning(untested)
    is_new = ray.get_runtime_context().was_current_actor_reconstructed is False
    try:
        return Service(*args)
    except Exception:
        # If its constructor raised, Ray would never restart the actor. If its process ends, Ray does.
        if is_new:
            raise
        logger.exception("the records of placed deployments could not be read; starting again")
        time.sleep(RESTART_SECONDS)
        os._exit(1)


def _light(service: type) -> type:
    """An actor class with the service's methods and their signatures, which imports the service only in the actor.

    Ray loads an actor's class in each process that looks the actor up, and importing the service takes longer than most
    calls. A class that is made in a function is pickled by value, so that loading it imports nothing.
    """

    class DeploymentPlacementActor:
        __qualname__ = service.__name__

        def __init__(self, *args: Any) -> None:
            from placement.runtime.bootstrap import begin

            self._service = begin(*args)

    def forwarding(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return await getattr(self._service, name)(*args, **kwargs)

        vars(call)["__signature__"] = inspect.signature(method)
        return call

    for name, method in inspect.getmembers(service, inspect.iscoroutinefunction):
        if not name.startswith("_"):
            setattr(DeploymentPlacementActor, name, forwarding(name, method))
    return DeploymentPlacementActor


_Service = ray.remote(num_cpus=0)(_light(Service))


def make_agent(info: NodeInfo) -> Any:
    """The node actor of a GPU node, created if there is none."""
    return _Agent.options(
        name=agent_name(info.id),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(info.id, soft=False),
    ).remote(info.id, info.gpu_count, info.topology_name, probe)


def start(
    near: Sequence[str] = NEAR_LABELS,
    idle_seconds: float = IDLE_SECONDS,
    node_types: str | Path | Sequence[NodeType] | None = None,
    history_days: float = HISTORY_DAYS,
    history_mib: float = HISTORY_MIB,
) -> Any:
    """Gets the placement service of the connected cluster, and starts it if it does not run. Safe to call at any time.

    The service is a detached actor on the head node: it outlives the caller and restarts if it dies. It and its node
    actors run in the environment in which the nodes were started; they do not inherit the caller's ``runtime_env`` or
    placement group.

    Args:
        near: node labels that make nodes near each other, widest first (``("zone", "block", "rack")``): the
            stages of a replica over several nodes share as many of them as possible. Ignored by a
            running service.
        idle_seconds: how long the actor of a node that holds nothing stays there. It makes the next placement on
            that node about a second quicker, and keeps Ray's autoscaler from removing the node; ``math.inf`` where
            nodes are never removed. Of no effect on a service that runs.
        node_types: the cluster configuration that ``ray up`` was given, here: where there is no room, it is said which
            of its node types would hold what is asked for, or what they lack. Its path, or what was read of it. Of no
            effect on a service that runs.
        history_days: how long events and decisions are kept, in days. Of no effect on a service that runs.
        history_mib: how much of Ray's store these may take, in MiB (2^20 bytes); the oldest are dropped. Of no effect
            on a service that runs.

    Returns:
        The actor handle; see :class:`~placement.runtime.service.DeploymentPlacementActor` for its methods.

    Raises:
        RuntimeError: Ray is not connected; call ``ray.init(address="auto")`` first.
        UnsupportedRay: Ray is older than the tested versions, or lacks something that is used. A newer one gives a
            warning.
        InvalidDeployment: the file cannot be read, or is no cluster configuration.
        ServiceNotRunning: it cannot run there, for example because the package is not installed on the head node.
        ray.exceptions.GetTimeoutError: the actor did not come up within two minutes.
    """
    require_ray()
    if untested := ray_internals.require_supported():
        logger.warning(untested)
    types = read_node_types(node_types) if isinstance(node_types, str | Path) else node_types or ()
    settings = tuple(near), idle_seconds, history_days, history_mib
    if not _has_environment():
        return start_in_this_job(types, *settings)
    try:
        service = connect()
    except ServiceNotRunning:
        _start_in_a_job_of_its_own(types, *settings)
        service = connect()
    _wait_for(service)
    return service


def start_in_this_job(
    types: Sequence[NodeType],
    near: Sequence[str],
    idle_seconds: float,
    history_days: float,
    history_mib: float,
) -> Any:
    """:func:`start` in the caller's own job, which must have no ``runtime_env``: the service would inherit it."""
    service = _Service.options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=MOST_CALLS,
        resources=ray_internals.HEAD,
        # By default it would be in the placement group of the calling task, if that captures child tasks.
        scheduling_strategy="DEFAULT",
    ).remote(make_agent, tuple(near), idle_seconds, tuple(types), history_days, history_mib)
    _wait_for(service)
    return service


def _wait_for(service: Any) -> None:
    try:
        ray.get(service.ping.remote(), timeout=START_DEADLINE_SECONDS)
    except ray.exceptions.ActorDiedError as error:
        cause = import_problem(error)
        if cause is None:
            raise
        problem = (
            f"on the head node: {cause}; install ray-placement, and nothing else that is imported as `placement`, "
            "in the Python that runs `ray start`, there and on all GPU nodes: the service uses no job's runtime_env"
        )
        raise ServiceNotRunning(ray.get_runtime_context().gcs_address, problem) from None


def import_problem(error: Exception) -> str | None:
    """The import that failed where an actor was to run; ``None`` if it died for another reason."""
    found = re.search(r"(?:ModuleNotFound|Import)Error: (.+)", str(error))
    return found[1] if found else None


def _has_environment() -> bool:
    """Whether actors of this process inherit a ``runtime_env``; its ``config`` alone does not count."""
    inherited = ray.get_runtime_context().runtime_env
    return any(value for key, value in inherited.items() if key != "config")


def _start_in_a_job_of_its_own(types: Sequence[NodeType], *settings: Any) -> None:
    """Starts the service as a job of its own.

    An actor inherits the ``runtime_env`` of its creator, and cannot ask for none: its own is merged
    into that. With CUDA_VISIBLE_DEVICES in it, all GPU ids that Ray reports to node actors and probes are wrong.
    """
    context = ray.get_runtime_context()
    arguments = context.gcs_address, [asdict(one) for one in types], *settings
    if ray_internals.is_ray_client():  # this process may be outside of the cluster
        problem = ray.get(ray.remote(num_cpus=0)(_run_job).remote(*arguments))
    else:
        problem = _run_job(*arguments)
    if problem:
        raise ServiceNotRunning(context.gcs_address, problem)


def _run_job(address: str, types: Sequence[dict[str, Any]], *settings: Any) -> str:
    """Runs ``python -m placement.runtime``, which starts the service; what is wrong, if it could not."""
    node_address = ray_internals.node_address()
    # The child can import what this process can. It runs in /, since its actors import from where it runs.
    paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    env.pop(ray_internals.JOB_CONFIG_VARIABLE, None)  # the environment of a submitted job
    argument = json.dumps([address, node_address, types, *settings])
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "placement.runtime", argument],
            cwd="/",
            env=env,
            timeout=JOB_DEADLINE_SECONDS,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"it did not come up within {JOB_DEADLINE_SECONDS:g} s; look at the logs of the head node"
    said = child.stderr.strip().splitlines() or [f"the process ended with code {child.returncode}"]
    return said[-1] if child.returncode else ""


def stop(keep_placements: bool = False) -> list[str]:
    """Stops the service and its node actors.

    Args:
        keep_placements: keep all placement groups; the next :func:`start` finds them again.

    Returns:
        The deployments that were released.

    Raises:
        ServiceNotRunning: there is none.
    """
    service, asker = connect(), caller()
    released: list[str] = [] if keep_placements else ray.get(service.release_all.remote(caller=asker))
    ray.get(service.stop_agents.remote(caller=asker))
    ray.kill(service, no_restart=True)
    _wait_until_gone(service)
    return released


def _wait_until_gone(service: Any) -> None:
    """Waits until it is gone: before that, starting the service would return the one that is about to end."""
    end = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        while time.monotonic() < end:
            ray.get(service.ping.remote(), timeout=STOP_SECONDS)
            time.sleep(0.01)
