"""The service's metrics, through ``ray.util.metrics``: Ray's agents export them, and Ray's discovery lists them.

:data:`placement.monitoring.METRICS` lists them. Counters and histograms are fed at the event, by
:func:`counted`, :func:`reserving`, :func:`steered`, :func:`placed` and :func:`noted`. These do nothing in a process
that did not call :func:`start`. Gauges are computed from the whole status, and set repeatedly by a thread: Ray
drops a gauge that was not set for two export intervals, so series of objects that are gone end.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from ray.util.metrics import Counter, Gauge, Histogram

from placement.core.shape import shape_of
from placement.core.topology import Topology
from placement.errors import PartlyApplied, PlacementError
from placement.monitoring import (
    COUNTER,
    GPU_STATES,
    HISTOGRAM,
    METRICS,
    MOST_DEPLOYMENTS,
    MOST_NODES,
    NODE_STATES,
    OTHERS,
    OWNERS,
    REPLICA_STATES,
    WAITING,
    Metric,
)
from placement.runtime import ray_internals
from placement.runtime.orders import without_suffix

P = ParamSpec("P")
T = TypeVar("T")
Series = tuple[str, tuple[str, ...]]
"""The name of a metric, and the values of its labels in order."""

MOST_OF_A_CORE = 0.02
"""The most of a core that reading the gauges may take. If one reading takes long, the last one is set again."""

logger = logging.getLogger(__name__)

_recorders: dict[str, Any] = {}
_lost_at: dict[tuple[str, int], float] = {}
_noting = threading.Lock()


# -- what happens --------------------------------------------------------------------------------------


def refused(error: BaseException) -> None:
    """Counts a call that was refused."""
    if isinstance(error, PartlyApplied):
        for failure in error.failures.values():
            _count("placement_refusals", code=failure["code"])
    elif isinstance(error, PlacementError):
        _count("placement_refusals", code=error.code)


def counted(call: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Has the refusals of a method of the service be counted."""

    @functools.wraps(call)
    async def counting(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(*args, **kwargs)
        except PlacementError as error:
            refused(error)
            raise

    return counting


@contextmanager
def reserving() -> Iterator[Callable[[str], None]]:
    """Counts a reservation, with the outcome set in the block; ``failed`` if the block ends with an exception."""
    outcomes = ["failed"]
    try:
        yield outcomes.append
    finally:
        _count("placement_reservations", outcome=outcomes[-1])


def steered(attempts: int) -> None:
    """Records how many attempts a node needed to reserve the wanted GPUs."""
    _observe("placement_steering_attempts", attempts)


def placed(seconds: float) -> None:
    """Records how long a placement took."""
    _observe("placement_duration_seconds", seconds)


def noted(name: str, replica: int | None, state: str) -> None:
    """Records an event of the feed, for the time from a replica's loss until it is placed again."""
    if not _recorders or replica is None:
        return
    with _noting:
        if state == "lost":
            _lost_at.setdefault((name, replica), time.monotonic())
            return
        if state not in ("placed", "released"):
            return
        since = _lost_at.pop((name, replica), None)
    if state == "placed" and since is not None:
        _observe("placement_recovery_seconds", time.monotonic() - since)


def _count(name: str, **labels: str) -> None:
    if name in _recorders:
        _recorders[name].inc(1, labels)


def _observe(name: str, value: float) -> None:
    if name in _recorders:
        _recorders[name].observe(value)


# -- what there is -------------------------------------------------------------------------------------


def readings(
    status: Mapping[str, Any],
    topologies: Mapping[str, Topology],
    waiting: Mapping[str, Sequence[float]],
    fragmented: float,
    now: float,
) -> dict[Series, float]:
    """The values of the gauges.

    Args:
        status: of the cluster, without a filter, as :func:`placement.runtime.status.cluster_status` has it.
        topologies: node id -> how its GPUs are linked.
        waiting: one of ``monitoring.WAITING`` -> since when each waits, in seconds since 1970.
        fragmented: how many GPUs are fragmented.
        now: seconds since 1970.
    """
    found: defaultdict[Series, float] = defaultdict(float)
    _read_nodes(status["nodes"], found)
    _read_deployments(status["deployments"], topologies, found)
    for kind in WAITING:
        found["placement_queue_length", (kind,)] = len(waiting.get(kind, ()))
    oldest = min((since for several in waiting.values() for since in several), default=now)
    found["placement_queue_oldest_seconds", ()] = max(0.0, now - oldest)
    found["placement_gpus_fragmented", ()] = fragmented
    return dict(found)


def _read_nodes(nodes: Sequence[Mapping[str, Any]], found: defaultdict[Series, float]) -> None:
    for state in NODE_STATES:
        found["placement_nodes", (state,)] = 0
    for node in nodes:
        found["placement_nodes", (node["state"],)] += 1
    with_gpus = [node for node in nodes if node["gpu_count"] and node["state"] != "dead"]
    of = _labels(sorted({node["name"] for node in with_gpus}), MOST_NODES)
    for node in with_gpus:
        name = of[node["name"]]
        for state in GPU_STATES:
            found["placement_gpus", (name, state)] += 0
        for gpu in node["gpus"]:
            found["placement_gpus", (name, _gpu_state(gpu))] += 1
        # Other users hold this many of the GPUs that seem free; which ones is not known.
        hidden = min(node["others_unlocated"], sum(gpu["state"] == "free" for gpu in node["gpus"]))
        found["placement_gpus", (name, "free")] -= hidden
        found["placement_gpus", (name, "foreign")] += hidden
        found["placement_gpus_lost", (name,)] += sum(gpu["problem"] is not None for gpu in node["gpus"])


def _gpu_state(gpu: Mapping[str, Any]) -> str:
    if gpu["state"] == "held":
        return "placed" if all(who["share"] == 1 for who in gpu["occupants"]) else "shared"
    return "foreign" if gpu["state"] == "other" else str(gpu["state"])


def _read_deployments(
    deployments: Sequence[Mapping[str, Any]],
    topologies: Mapping[str, Topology],
    found: defaultdict[Series, float],
) -> None:
    for owner in OWNERS:
        found["placement_deployments", (owner,)] = 0
    by_age = sorted(deployments, key=lambda one: (-one["age_seconds"], one["name"]))
    of = _labels(list(dict.fromkeys(map(_name, by_age))), MOST_DEPLOYMENTS)
    for one in deployments:
        found["placement_deployments", (one["owner"]["kind"] if one["owner"] else "none",)] += 1
        name = of[_name(one)]
        for state in REPLICA_STATES:
            found["placement_replicas", (name, state)] += 0
        for replica in one["replica_states"]:
            found["placement_replicas", (name, replica["state"])] += 1
        if name != OTHERS:
            for assignment in one["assignments"]:
                _read_bandwidth(name, assignment, topologies.get(assignment["node"]), found)


def _read_bandwidth(
    name: str, assignment: Mapping[str, Any], topology: Topology | None, found: defaultdict[Series, float]
) -> None:
    gpus, shares = assignment["gpus"], assignment["shares"]
    if shares:
        gpus = [gpu for gpu, share in zip(gpus, shares, strict=True) if share == 1]
    size = min(assignment["set_size"] or len(gpus), len(gpus))
    if assignment["bandwidth_gb_per_s"] is None or topology is None or size < 2 or max(gpus) >= len(topology):
        return
    shape = shape_of(topology)
    best = shape.best((1 << len(topology)) - 1, size)
    sets = [shape.mb_per_s(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)]
    if best is None or not shape.mb_per_s(best):
        return
    for metric, value in (
        ("placement_allreduce_bytes_per_second", assignment["bandwidth_gb_per_s"] * 1e9),
        ("placement_allreduce_best_ratio", min(sets) / shape.mb_per_s(best)),
    ):
        found[metric, (name,)] = min(value, found.get((metric, (name,)), value))


def _name(deployment: Mapping[str, Any]) -> str:
    name, owner = deployment["name"], deployment["owner"]
    return without_suffix(name) if owner and owner["kind"] == "caller" else name


def _labels(names: Sequence[str], most: int) -> dict[str, str]:
    """Name -> the label of its series: the name itself for the first ones, else "others"."""
    return {name: name if place < most else OTHERS for place, name in enumerate(names)}


# -- in the service ------------------------------------------------------------------------------------


def start(read: Callable[[], Mapping[Series, float]]) -> None:
    """Starts to report, in a thread of its own.

    Args:
        read: the :func:`readings`. While it raises, no gauge is reported.
    """
    _recorders.update({one.name: _recorder(one) for one in METRICS})
    threading.Thread(target=_report, args=(read,), name="metrics", daemon=True).start()


def _recorder(one: Metric) -> Counter | Gauge | Histogram:
    if one.kind == HISTOGRAM:
        return Histogram(one.name, one.meaning, list(one.buckets), one.labels)
    return (Counter if one.kind == COUNTER else Gauge)(one.name, one.meaning, one.labels)


def _report(read: Callable[[], Mapping[Series, float]]) -> None:
    period = ray_internals.metrics_export_seconds() / 2
    labels = {one.name: one.labels for one in METRICS}
    known: Mapping[Series, float] = {}
    not_before = float("-inf")
    while True:
        if time.monotonic() >= not_before:
            began = time.thread_time()
            try:
                known = read()
            except Exception:
                known = {}
                logger.exception("the gauges could not be computed; trying again")
            not_before = time.monotonic() + (time.thread_time() - began) / MOST_OF_A_CORE
        for (name, values), value in known.items():
            _recorders[name].set(value, dict(zip(labels[name], values, strict=True)))
        time.sleep(period)
