"""Ray Serve on exact GPUs.

:func:`install` is for all of a cluster, :func:`replica_group` and :class:`Callback` are for one deployment.

Serve creates the placement groups of its replicas itself and accepts no existing ones (ray-project/ray#59857). So
:func:`install` replaces the one function with which its controller creates them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import threading
import time
from dataclasses import fields
from importlib import import_module
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from placement.errors import InvalidDeployment
from placement.runtime import connection, ray_internals
from placement.runtime.borrowing import Borrower
from placement.runtime.connection import own_errors
from placement.runtime.drop_in import WITHOUT_SERVICE, detached_group, placement_group

__all__ = ["Callback", "install", "replica_group"]

SECONDS_VARIABLE = "PLACEMENT_SERVE_SECONDS"
SECONDS = 5.0
"""How long Serve's controller waits for one group on exact GPUs, unless SECONDS_VARIABLE says otherwise.

The controller does nothing else meanwhile; requests do not pass through it. A group takes some hundredths of a second,
the first on a node about one.
"""
QUIET = 6
"""After a timeout the service is not asked again for this many times SECONDS."""

logger = logging.getLogger("ray.serve.placement")  # so that it is in the log of Serve's controller

_MAKER = "_default_create_placement_group"
_USED = {"bundles", "strategy", "name", "bundle_label_selector"}
_KNOWN = _USED | {
    "target_node_id",  # only a hint; the service's policy chooses the node
    "runtime_env",  # without effect on a group
    "fallback_strategy",  # Serve does not use it yet
}
"""The fields of Serve's request to its function (Ray 2.60, ``serve/_private/common.py``)."""


def install() -> None:
    """Makes Serve's controller create every placement group with GPUs on the best GPUs that are free.

    The controller calls it: start the head with
    ``RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH=placement.serve.install`` in its environment.

    A group is created as by ``placement.placement_group(..., lifetime="detached")``, under Serve's own name. Serve
    removes it when its replica ends, and finds it by its name after the controller has died. If the service does not
    run, it is started (with PLACEMENT_WITHOUT_SERVICE=ray it is not).

    It never keeps a replica from starting. If no set is free, or the service does not
    run or does not answer within PLACEMENT_SERVE_SECONDS (5), Serve creates the group as without placement: it is
    pending until Ray finds room, Ray's autoscaler sees it, and Ray chooses its GPUs. One warning says so.

    If this Ray differs from what it relies on, it logs an error, and Serve creates its groups as without placement.
    """
    try:
        ray_serve = ray_internals.serve_defaults()
        problem = _difference(ray_serve)
        seconds = float(os.environ.get(SECONDS_VARIABLE, SECONDS))
    except Exception as error:  # an exception would end Serve's controller
        problem = str(error)
    if problem:
        logger.error(
            "placement.serve.install has changed nothing: %s; Serve's placement groups get the GPUs that Ray chooses. "
            "Install a ray-placement for Ray %s, or unset RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH",
            problem,
            ray.__version__,
        )
        return
    # It blocks Serve's controller on purpose, and not for long; Ray would warn about that.
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
    setattr(ray_serve, _MAKER, _Maker(getattr(ray_serve, _MAKER), seconds))
    logger.info("Serve's placement groups lie on exact GPUs (placement.serve.install)")


def _difference(ray_serve: Any) -> str:
    """How Ray differs from what :func:`install` relies on; empty if it does not."""
    maker = getattr(ray_serve, _MAKER, None)
    if maker is None or list(inspect.signature(maker).parameters) != ["request"]:
        return f"Ray {ray.__version__} has no {ray_serve.__name__}.{_MAKER}(request)"
    if _MAKER not in ray_serve.create_deployment_scheduler.__code__.co_names:
        return f"Ray {ray.__version__} does not use {ray_serve.__name__}.{_MAKER}"
    asked = {field.name for field in fields(ray_serve.CreatePlacementGroupRequest)}
    if unknown := asked - _KNOWN | _USED - asked:
        return f"Ray {ray.__version__} asks for other placement groups: {', '.join(sorted(unknown))}"
    return ""


class _Maker:
    """Creates Serve's placement groups in its controller: on exact GPUs, or as Serve does if that is not possible.

    Args:
        serves_own: Serve's own function for it.
        seconds: how long one group may take.
    """

    def __init__(self, serves_own: Any, seconds: float) -> None:
        self._serves_own, self._seconds = serves_own, seconds
        self._not_before = float("-inf")
        self._start = threading.Thread(target=_start_service, daemon=True)
        self._start.start()

    def __call__(self, request: Any) -> PlacementGroup:
        if time.monotonic() >= self._not_before and any(bundle.get("GPU") for bundle in request.bundles):
            try:
                return self._on_exact_gpus(request)
            except ray.exceptions.GetTimeoutError:
                quiet = QUIET * self._seconds
                self._not_before = time.monotonic() + quiet
                logger.warning(
                    "the placement service has not answered within %g s: for placement group %s, and those of the next "
                    "%g s, Ray chooses the GPUs; see `placement status`, or raise %s",
                    self._seconds, request.name, quiet, SECONDS_VARIABLE,
                )  # fmt: skip
            except Exception as error:  # an exception would count as a failed start of the replica
                logger.warning(
                    "Ray chooses the GPUs of placement group %s, once it finds room: %s",
                    request.name,
                    error,
                )
        return self._serves_own(request)

    def _on_exact_gpus(self, request: Any) -> PlacementGroup:
        end = time.monotonic() + self._seconds
        self._start.join(self._seconds)
        layout = {
            "bundles": request.bundles,
            "strategy": request.strategy,
            "bundle_label_selector": request.bundle_label_selector,
        }
        known_as = request.name.partition("::")[2] or request.name  # without Serve's prefix
        return detached_group(_hurried(end), layout, request.name, known_as)


def _hurried(end: float) -> Borrower:
    """Borrows GPUs from the running service, and waits for its answers until ``end``, by ``time.monotonic()``.

    After that it raises ``ray.exceptions.GetTimeoutError``, and nothing stays reserved.
    """

    def ask(reference: Any) -> Any:
        try:
            with own_errors():
                return ray.get(reference, timeout=max(0.0, end - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            with contextlib.suppress(Exception):
                ray.cancel(reference)
            raise

    return Borrower(connection.connect(), ask, ask)


def _start_service() -> None:
    """Starts the service unless it runs, or must not be started; Serve's controller does not wait for it."""
    if os.environ.get(WITHOUT_SERVICE, "start") == "start":
        try:
            from placement.runtime import bootstrap  # all of the service

            bootstrap.start()
        except Exception as error:
            logger.warning("the placement service could not be started: %s", error)


async def replica_group(
    bundles: list[dict[str, float]], strategy: str = "PACK", **options: Any
) -> PlacementGroup:
    """A placement group that a Serve replica creates for itself, without :func:`install`: call it in ``async
    __init__``.

    The Serve deployment itself asks for no GPU. Its replica waits for room in the service's queue, for which Ray's
    autoscaler (v2) is asked for nodes; Serve shows it as ``STARTING`` meanwhile, however long. The group ends with the
    replica, however that ends. ``placement status`` shows it under the names of its application and deployment.

    Args:
        bundles: as in :func:`placement.placement_group`.
        strategy: as there.
        options: its other arguments, such as ``within`` and ``wait_seconds``.

    Raises:
        RayServeException: this process is no replica.
        Same as :func:`placement.placement_group`. Serve counts it as a failed start, and allows three of them.

    Example:
        ::

            @serve.deployment(ray_actor_options={"num_cpus": 0.1})
            class Engine:
                async def __init__(self) -> None:
                    self.group = await replica_group([{"GPU": 1}] * 2, within="nvlink")
    """
    replica = import_module("ray.serve").get_replica_context().replica_id
    name = f"{replica.deployment_id.app_name}-{replica.deployment_id.name}-{replica.unique_id}"
    return await asyncio.to_thread(placement_group, bundles, strategy, name, **options)


class Callback(ray_internals.serve_llm_callback()):  # type: ignore[misc]
    """Gives the vLLM engine of one Serve LLM deployment exact GPUs, for clusters without :func:`install`.

    The replica itself asks for no GPU; the engine's workers get a :func:`replica_group`. Other arguments of
    :func:`placement.placement_group` go into ``callback_kwargs``.

    Raises:
        InvalidDeployment: Serve has reserved GPUs for the replica already.

    Example:
        ::

            LLMConfig(
                ...,
                engine_kwargs={"tensor_parallel_size": 2},
                accelerator_config={"kind": "gpu"},
                placement_group_config={"bundles": [{"CPU": 1}]},
                callback_config={
                    "callback_class": "placement.serve.Callback",
                    "callback_kwargs": {"within": "nvlink"},
                },
            )
    """

    async def on_before_node_init(self) -> None:
        """Called by Serve LLM in the replica, before it starts the engine in ``ctx.placement_group``."""
        engine = self.llm_config.get_engine_config()
        if any(bundle.get("GPU") for bundle in engine.placement_bundles):
            problem = (
                "Serve has reserved GPUs for the replica already, which it would not use; set "
                'placement_group_config={"bundles": [{"CPU": 1}]} and accelerator_config={"kind": "gpu"}'
            )
            raise InvalidDeployment("LLMConfig.placement_group_config", (problem,))
        bundles = engine.accelerator.default_bundles(
            num_devices=engine.num_devices, accelerator_type_str=self.llm_config.accelerator_type
        )
        self.ctx.placement_group = await replica_group(bundles, **self.kwargs)
