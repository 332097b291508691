"""Ray Serve on exact GPUs.

:func:`install` is for all of a cluster, :func:`replica_group` and :class:`Callback` are for one deployment.

Serve creates the placement groups of its replicas itself and accepts no existing ones (ray-project/ray#59857). So
:func:`install` replaces the function with which its controller creates them, and lets a replica wait for its group.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import fields
from importlib import import_module
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from placement.errors import InvalidDeployment, LeaseExpired, ReservationFailed, Unplaceable
from placement.runtime import connection, ray_internals
from placement.runtime.borrowing import Borrower
from placement.runtime.connection import own_errors
from placement.runtime.drop_in import WITHOUT_SERVICE, detached_group, placement_group

__all__ = ["Callback", "install", "replica_group"]

SECONDS_VARIABLE = "PLACEMENT_SERVE_SECONDS"
SECONDS = 5.0
"""How long the service may take to answer for one group, unless SECONDS_VARIABLE says otherwise.

A group takes some hundredths of a second, the first on a node about one.
"""
WAIT_VARIABLE = "PLACEMENT_SERVE_WAIT_SECONDS"
WAIT_SECONDS = 60.0
"""How long a replica's group may wait for room on exact GPUs, unless WAIT_VARIABLE says otherwise."""
LOOK_SECONDS = 0.5
"""How often one that waits looks whether its replica is still wanted."""
QUIET = 6
"""After the service has not answered, it is not asked again for so many times as long."""

logger = logging.getLogger("ray.serve.placement")  # so that it is in the log of Serve's controller

_MAKER = "_default_create_placement_group"
_SCHEDULER_MAKER = "create_deployment_scheduler"
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

    While no set is free, a replica's group waits in the service's queue, as in a rolling update for the GPUs of the old
    replica; the replica is pending, and Serve's controller goes on. It never keeps a replica from starting: where exact
    GPUs cannot be had within PLACEMENT_SERVE_WAIT_SECONDS (60), or the service does not run or does not answer within
    PLACEMENT_SERVE_SECONDS (5), Serve creates the group as without placement. It is pending until Ray finds room, Ray's
    autoscaler sees it, and Ray chooses its GPUs. One warning says so. A gang's group does not wait for room.

    If this Ray differs from what it relies on, it logs an error, and Serve creates its groups as without placement.
    """
    try:
        ray_serve = ray_internals.serve_defaults()
        problem = _difference(ray_serve)
        seconds = float(os.environ.get(SECONDS_VARIABLE, SECONDS))
        wait_seconds = float(os.environ.get(WAIT_VARIABLE, WAIT_SECONDS))
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
    # A gang blocks Serve's controller on purpose, and not for long; Ray would warn about that.
    os.environ.setdefault("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "0")
    groups = _Groups(ray_serve, seconds, wait_seconds)
    make_scheduler = getattr(ray_serve, _SCHEDULER_MAKER)

    def scheduler(*args: Any, **options: Any) -> Any:
        return groups.attend(make_scheduler(*args, **options))

    setattr(ray_serve, _MAKER, groups)
    setattr(ray_serve, _SCHEDULER_MAKER, scheduler)
    logger.info("Serve's placement groups lie on exact GPUs (placement.serve.install)")


def _difference(ray_serve: Any) -> str:
    """How Ray differs from what :func:`install` relies on; empty if it does not."""
    scheduler = ray_serve.DeploymentScheduler
    strategy = "default_scheduling_strategy, target_node_id, target_labels"
    for where, name, parameters in (
        (ray_serve, _MAKER, "request"),
        (scheduler, "_schedule_replica", f"self, scheduling_request, {strategy}"),
        (scheduler, "on_replica_stopping", "self, replica_id"),
    ):
        found = getattr(where, name, None)
        if found is None or ", ".join(inspect.signature(found).parameters) != parameters:
            return f"Ray {ray.__version__} has no {where.__name__}.{name}({parameters})"
    if _MAKER not in getattr(ray_serve, _SCHEDULER_MAKER).__code__.co_names:
        return f"Ray {ray.__version__} does not use {ray_serve.__name__}.{_MAKER}"
    asked = {field.name for field in fields(ray_serve.CreatePlacementGroupRequest)}
    if unknown := asked - _KNOWN | _USED - asked:
        return f"Ray {ray.__version__} asks for other placement groups: {', '.join(sorted(unknown))}"
    return ""


class _Groups:
    """Makes Serve's placement groups: on exact GPUs, or as Serve does where these cannot be had.

    A replica's is made in a thread of its own; until then the replica stays among those that Serve's scheduler tries
    again and again, some ten times a second. A gang's is made while the controller waits.

    Args:
        ray_serve: the module that :func:`install` changes.
        seconds: how long the service may take to answer.
        wait_seconds: how long a replica's group may wait for room.
    """

    def __init__(self, ray_serve: Any, seconds: float, wait_seconds: float) -> None:
        self._serves_own = getattr(ray_serve, _MAKER)
        self._request = ray_serve.CreatePlacementGroupRequest
        self._seconds, self._wait_seconds = seconds, wait_seconds
        self._not_before = float("-inf")
        self._made: dict[str, Future[PlacementGroup | None]] = {}
        self._start = threading.Thread(target=_start_service, daemon=True)
        self._start.start()

    def __call__(self, request: Any) -> PlacementGroup:
        """In place of Serve's own function."""
        made = self._made.pop(request.name, None)
        if made is None:
            made = Future()
            made.set_result(self._on_exact_gpus(request, made, 0.0) if _has_gpus(request.bundles) else None)
        return made.result() or self._serves_own(request)

    def attend(self, scheduler: Any) -> Any:
        """Has a scheduler leave a replica pending until its group is made; returns the scheduler."""
        schedule, on_stopping = scheduler._schedule_replica, scheduler.on_replica_stopping

        def schedule_replica(scheduling_request: Any, *args: Any, **options: Any) -> bool:
            return self._is_made(scheduling_request) and schedule(scheduling_request, *args, **options)

        def on_replica_stopping(replica_id: Any) -> None:
            on_stopping(replica_id)
            self._give_up(replica_id.to_full_id_str())

        scheduler._schedule_replica, scheduler.on_replica_stopping = schedule_replica, on_replica_stopping
        return scheduler

    def _is_made(self, wanted: Any) -> bool:
        """Whether a replica can be scheduled; has its group made if nobody has asked for that yet."""
        if wanted.gang_placement_group or not _has_gpus(wanted.placement_group_bundles or ()):
            return True
        name = wanted.actor_options["name"]
        if name not in self._made:
            request = self._request(
                bundles=wanted.placement_group_bundles,
                strategy=wanted.placement_group_strategy or "PACK",
                target_node_id=None,
                name=name,
                bundle_label_selector=wanted.placement_group_bundle_label_selector,
            )
            self._made[name] = Future()
            threading.Thread(target=self._make, args=(request, self._made[name]), daemon=True).start()
        return self._made[name].done()

    def _make(self, request: Any, made: Future[PlacementGroup | None]) -> None:
        group = self._on_exact_gpus(request, made, self._wait_seconds)
        try:
            made.set_result(group)
        except InvalidStateError:  # given up meanwhile
            if group is not None:
                remove_placement_group(group)

    def _give_up(self, name: str) -> None:
        """A replica that is not scheduled yet ends, and so does its group."""
        made = self._made.pop(name, None)
        if made is not None and not made.cancel() and (group := made.result()):
            remove_placement_group(group)

    def _on_exact_gpus(
        self, request: Any, made: Future[PlacementGroup | None], wait_seconds: float
    ) -> PlacementGroup | None:
        """``None`` if the group is to be Serve's own; then one warning has said why."""
        if time.monotonic() < self._not_before:
            return None
        self._start.join(self._seconds)
        try:
            try:
                return self._placed(request, made, 0.0)
            except (Unplaceable, ReservationFailed, LeaseExpired) as refusal:
                if not wait_seconds:
                    raise
                logger.info("placement group %s waits %g s for room: %s", request.name, wait_seconds, refusal)
                return self._placed(request, made, wait_seconds)
        except ray.exceptions.GetTimeoutError:
            if not made.cancelled():
                quiet = QUIET * self._seconds
                self._not_before = time.monotonic() + quiet
                logger.warning(
                    "the placement service has not answered within %g s: for placement group %s, and those of the next "
                    "%g s, Ray chooses the GPUs; see `placement status`, or raise %s",
                    self._seconds, request.name, quiet, SECONDS_VARIABLE,
                )  # fmt: skip
        except Exception as error:  # an exception would count as a failed start of the replica
            logger.warning(
                "placement group %s is Ray's own, on whatever GPUs Ray gives, once it finds room: %s",
                request.name,
                error,
            )
        return None

    def _placed(
        self, request: Any, made: Future[PlacementGroup | None], wait_seconds: float
    ) -> PlacementGroup:
        layout = {
            "bundles": request.bundles,
            "strategy": request.strategy,
            "bundle_label_selector": request.bundle_label_selector,
        }
        known_as = request.name.partition("::")[2] or request.name  # without Serve's prefix
        borrower = _hurried(time.monotonic() + wait_seconds + self._seconds, made.cancelled)
        return detached_group(borrower, layout, request.name, known_as, wait_seconds)


def _has_gpus(bundles: Iterable[Mapping[str, float]]) -> bool:
    return any(bundle.get("GPU") for bundle in bundles)


def _hurried(end: float, is_given_up: Callable[[], bool]) -> Borrower:
    """Borrows GPUs from the running service, and waits for its answers until ``end``, by ``time.monotonic()``.

    After that, or soon after it is given up, it raises ``ray.exceptions.GetTimeoutError``, and nothing stays reserved.
    """

    def ask(reference: Any) -> Any:
        with own_errors():
            while True:
                try:
                    return ray.get(reference, timeout=min(LOOK_SECONDS, max(0.0, end - time.monotonic())))
                except ray.exceptions.GetTimeoutError:
                    if time.monotonic() >= end or is_given_up():
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
