"""All undocumented parts of Ray that this package uses: each once, with the reason.

Ray may rename or drop any of them in a minor version. The code here works with Ray 2.52 to
2.60; :func:`require_supported` checks at the start that they still exist. Which GPUs a request gets is not
documented either: docs/ray.md says what was measured, and ``placement doctor`` tests it on each node.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import ray

from placement.errors import ClusterUnreachable, UnsupportedRay

OLDEST, NEWEST = (2, 52), (2, 60)
"""The oldest and the newest tested minor version; docs/ray.md says what was run."""
REQUIREMENT = f"ray[default]>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"

try:
    import ray._private.services
    import ray._private.state
    import ray._private.worker
    import ray._raylet
    import ray.util.client
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR as JOB_CONFIG_VARIABLE
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply, NodeStatus
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.experimental import internal_kv

    # Ray's own checks of a group, before it asks the cluster.
    from ray.util.placement_group import PlacementGroup, validate_placement_group
except ImportError as error:
    raise UnsupportedRay(
        ray.__version__, REQUIREMENT, f"it lacks something that placement uses: {error}"
    ) from None

__all__ = [
    "JOB_CONFIG_VARIABLE",
    "GetClusterStatusReply",
    "NodeStatus",
    "PlacementGroupTableData",
    "validate_placement_group",
]

HEAD = {"node:__internal_head__": 0.001}
"""Pins an actor to the head, even if the head restarts elsewhere. Ray Serve pins its controller in this way."""

SUPERVISOR = "_ray_internal_job_actor_{}", "SUPERVISOR_ACTOR_RAY_NAMESPACE"
"""Name and namespace of the actor that runs a submitted job, and ends with it: dashboard/modules/job/common.py,
which cannot be imported where Ray was installed without ``[default]``."""

_WHY_NOT = {
    (2, 49): "it ignores bundle_label_selector, by which groups are pinned to nodes",
    (2, 52): "it ignores RAY_AUTH_MODE=token, so that its clusters are open to all, and was not tested",
}
"""Version -> what is wrong with those before it, the earliest first."""

_STANDS_ON = (
    "_config.metrics_report_interval_ms",
    "_private.services.canonicalize_bootstrap_address",
    "_private.services.find_bootstrap_address",
    "_private.services.find_gcs_addresses",
    "_private.state.GlobalState._connect_and_get_accessor",
    "_private.state.GlobalState.actor_table",
    "_private.state.GlobalState.get_draining_nodes",
    "_private.state.GlobalState.job_table",
    "_private.state.available_resources_per_node",
    "_private.worker.global_worker.node",
    "_private.worker.global_worker.original_visible_accelerator_ids",
    "_raylet.GCS_AUTOSCALER_STATE_NAMESPACE",
    "_raylet.GCS_AUTOSCALER_V2_ENABLED_KEY",
    "_raylet.GlobalStateAccessor.get_placement_group_info",
    "_raylet.GlobalStateAccessor.get_placement_group_table",
    "experimental.internal_kv._internal_kv_del",
    "experimental.internal_kv._internal_kv_get",
    "experimental.internal_kv._internal_kv_list",
    "experimental.internal_kv._internal_kv_put",
    "experimental.internal_kv.internal_kv_get_gcs_client",
)


# -- versions ------------------------------------------------------------------------------------------


def minor_version(version: str) -> tuple[int, int]:
    """``(2, 52)`` of ``2.52.1``, ``2.52.0rc1`` and ``2.52.0.dev0``."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def require_supported(version: str | None = None) -> str:
    """Checks, in microseconds and without the cluster, that this Ray is supported.

    Args:
        version: the version of Ray; by default that of this process.

    Returns:
        A warning for a version newer than the tested ones; otherwise an empty text.

    Raises:
        UnsupportedRay: it is older than all tested versions, or lacks something that is used.
    """
    version = version or ray.__version__
    found = minor_version(version)
    if found < OLDEST:
        why = next(problem for before, problem in sorted(_WHY_NOT.items()) if found < before)
        raise UnsupportedRay(version, REQUIREMENT, why)
    missing = [name for name in _STANDS_ON if not _has(name)]
    if missing:
        lacks = ", ".join(f"ray.{name}" for name in missing)
        raise UnsupportedRay(version, REQUIREMENT, f"it lacks something that placement uses: {lacks}")
    if found <= NEWEST:
        return ""
    return (
        f"Ray {version} is newer than all versions that placement was tested with ({tested()}), and exact GPUs rely on "
        "what Ray does not document: run `placement doctor`, which tests it on each node"
    )


def tested() -> str:
    """``2.52 to 2.60``."""
    return f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


def _has(name: str) -> bool:
    try:
        reduce(getattr, name.split("."), ray)
    except AttributeError:
        return False
    return True


# -- this process ----------------------------------------------------------------------------------------


def visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES as it was at ``ray start``, which gives Ray's GPU ids; ``None`` if it was not set.

    The variable itself cannot be used: Ray before 2.56 empties it in an actor without a GPU, such as a node actor (PR
    62492), and any Ray does if RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO is set. Ray keeps the value that it read first.
    """
    tokens = ray._private.worker.global_worker.original_visible_accelerator_ids.get("GPU")
    return None if tokens is None else ",".join(tokens)


def logs_folder() -> str:
    """The folder of this node's log files, which is Ray's own for its session."""
    return str(ray._private.worker.global_worker.node.get_logs_dir_path())


def node_address() -> str:
    """The address of this process's node, as given to Ray; the public call returns any address of the machine."""
    return str(ray._private.worker.global_worker.node.node_ip_address)


def submission_id() -> str | None:
    """The submission id of the job that this process belongs to. Not in a ``ray://`` client."""
    found: str | None = ray._private.worker.global_worker.core_worker.get_job_config().metadata.get(
        "job_submission_id"
    )
    return found


def is_ray_client() -> bool:
    """Whether this process is connected through ``ray://``. No public call returns it."""
    return bool(ray.util.client.ray.is_connected())


def auth_token() -> str | None:
    """The token with which this process calls Ray, wherever Ray finds it; ``None`` if authentication is off."""
    [header] = get_auth_headers_if_auth_enabled({}).values() or [""]
    return str(header).removeprefix("Bearer ") or None


def local_address() -> str | None:
    """``host:port`` of the cluster that was started on this machine, if one was; ``ray.init`` would start one.

    Raises:
        ClusterUnreachable: there are several, and none of them is the last one of `ray start` with this RAY_TMPDIR.
            Ray would take any of them.
    """
    services = ray._private.services
    if len(found := services.find_gcs_addresses()) > 1 and services.find_bootstrap_address(None) is None:
        raise ClusterUnreachable("auto", "several run on this machine", tuple(sorted(found)))
    try:
        return str(ray._private.services.canonicalize_bootstrap_address("auto") or "") or None
    except ConnectionError:
        return None


def driver_at(host: str) -> dict[str, str]:
    """For ``ray.init``: the driver's own address, if a machine has several (simulated nodes)."""
    return {"_node_ip_address": host}


WITHOUT_HOOK: Mapping[str, Any] = {"_skip_env_hook": True}
"""For ``ray.init``: no ``RAY_RUNTIME_ENV_HOOK``, which gives the job a ``runtime_env``."""


def allow_blocking_get() -> None:
    """Turns off Ray's warning about ``ray.get`` in an actor with an event loop, as our threads may block."""
    os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"


def actor_id(handle: Any) -> str:
    """The id of an actor, hex, by its handle. The public call works only inside the actor."""
    return str(handle._actor_id.hex())


# -- the GCS: what lives, and the key-value store --------------------------------------------------------


def actor_has_ended(actor: str) -> bool:
    """Whether an actor, by its id, has ended. ``ray.util.state`` also returns it, but only with a dashboard."""
    known = ray._private.state.state.actor_table(actor)
    return not known or known["State"] == "DEAD"


def jobs() -> list[dict[str, Any]]:
    """All jobs, including those that ended long ago: ``JobID`` and ``IsDead``."""
    found: list[dict[str, Any]] = ray._private.state.state.job_table()
    return found


def draining_nodes() -> frozenset[str]:
    """The ids of the nodes that are draining."""
    return frozenset(ray._private.state.state.get_draining_nodes())


def available_resources() -> dict[str, dict[str, float]]:
    """Node id -> resource -> free amount in Ray's records; up to about 0.1 s old.

    ``ray.available_resources()`` has only the sums.
    """
    found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return found


def kv_get(key: bytes, namespace: bytes) -> bytes | None:
    """A value of the GCS key-value store, which outlives actors, and with Redis the head. There is no public call."""
    found: bytes | None = internal_kv._internal_kv_get(key, namespace=namespace)
    return found


def kv_put(key: bytes, value: bytes, namespace: bytes, overwrite: bool = True) -> None:
    """Stores a value; without ``overwrite`` only if there is none."""
    internal_kv._internal_kv_put(key, value, overwrite=overwrite, namespace=namespace)


def kv_delete(key: bytes, namespace: bytes) -> None:
    """Removes a value, if it exists."""
    internal_kv._internal_kv_del(key, namespace=namespace)


def kv_keys(prefix: bytes, namespace: bytes) -> list[bytes]:
    """All keys that begin so."""
    found: list[bytes] = internal_kv._internal_kv_list(prefix, namespace=namespace)
    return found


def kv_all(prefix: bytes, namespace: bytes) -> dict[bytes, bytes]:
    """All values whose keys begin so. Two calls, however many there are."""
    keys = kv_keys(prefix, namespace)
    if not keys:
        return {}
    found: dict[bytes, bytes] = internal_kv.internal_kv_get_gcs_client().internal_kv_multi_get(
        keys, namespace=namespace
    )
    return found


# -- placement groups ------------------------------------------------------------------------------------


class Scheduling(NamedTuple):
    """Ray's progress with a placement group.

    Attributes:
        attempt: how many attempts to reserve it have started.
        state: ``"QUEUED"``, ``"NO_RESOURCES"``, ``"INFEASIBLE"`` and others.
        retry_delay_ms: the longest delay before an attempt; it rises after a failed attempt.
    """

    attempt: int
    state: str
    retry_delay_ms: float


def scheduling(row: Mapping[str, Any]) -> Scheduling:
    """The progress in a row of ``placement_group_table()``, whose ``stats`` are not documented."""
    stats = row["stats"]
    return Scheduling(stats["scheduling_attempt"], stats["scheduling_state"], stats["highest_retry_delay_ms"])


def group_handle(group_id: str) -> PlacementGroup:
    """A handle to a group by its id, hex. The public call needs a name, in this job's namespace."""
    return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))


def group_rows() -> Iterator[PlacementGroupTableData]:
    """All groups, including removed ones, which Ray never forgets: 10 µs each, a quarter of the public call."""
    table: Iterable[bytes] = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    return map(PlacementGroupTableData.FromString, table)


def group_row(group_id: str) -> PlacementGroupTableData | None:
    """One group: 0.2 ms, where the public call takes 0.33."""
    row = ray._private.state.state._connect_and_get_accessor().get_placement_group_info(
        ray.PlacementGroupID(bytes.fromhex(group_id))
    )
    return None if row is None else PlacementGroupTableData.FromString(row)


# -- the autoscaler --------------------------------------------------------------------------------------


def autoscaler_status(timeout_seconds: float) -> GetClusterStatusReply:
    """The autoscaler's last report. ``ray.autoscaler.v2.sdk`` leaves out the requests that no node type can hold."""
    gcs = ray._private.worker.global_worker.gcs_client
    return GetClusterStatusReply.FromString(gcs.get_cluster_status(timeout_s=timeout_seconds))


def is_second_autoscaler(timeout_seconds: float) -> bool:
    """Whether it is autoscaler v2, as the head recorded."""
    found: bytes | None = ray._private.worker.global_worker.gcs_client.internal_kv_get(
        ray._raylet.GCS_AUTOSCALER_V2_ENABLED_KEY.encode(),
        namespace=ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
        timeout=timeout_seconds,
    )
    return found == b"1"


# -- metrics ---------------------------------------------------------------------------------------------


def metrics_export_seconds() -> float:
    """How often a process hands its metrics to its node's agent: ``RAY_metrics_report_interval_ms``, at least 1 s.

    A gauge that was not set for two of these intervals is no longer exported.
    """
    return max(1.0, float(ray._config.metrics_report_interval_ms()) / 1000)


# -- Ray Serve -------------------------------------------------------------------------------------------


def serve_defaults() -> ModuleType:
    """The module in which Serve's controller has its function that creates placement groups; :mod:`placement.serve`
    checks that it has not changed.
    """
    return import_module("ray.serve._private.default_impl")


def serve_llm_callback() -> type:
    """The base class of callbacks of an ``LLMConfig``; ``object`` if this Ray has none."""
    try:
        found: type = import_module("ray.llm._internal.common.callbacks.base").CallbackBase
    except ImportError:
        return object
    return found


# -- simulated clusters ----------------------------------------------------------------------------------


def simulated_cluster() -> Any:
    """A cluster of raylets on this machine, from Ray's own tests."""
    from ray.cluster_utils import Cluster

    return Cluster()


def add_simulated_node(cluster: Any, seconds: float = 240.0, **options: Any) -> Any:
    """Starts a raylet of such a cluster, and waits for it for ``seconds``.

    Ray gives a raylet 30 s to register (a constant in ``Node.__init__``), which is too short on a machine that others
    keep busy. In that time it polls for the raylet's entry; so here the first poll waits until the entry exists.
    """
    from ray._private import services

    get_node, end = services.get_node, time.monotonic() + seconds

    def patiently(*args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return get_node(*args, **kwargs)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    services.get_node = patiently
    try:
        return cluster.add_node(**options)
    finally:
        services.get_node = get_node


def end_simulated_node(cluster: Any, node: Any, how: signal.Signals | int) -> None:
    """Ends the raylet of a node of such a cluster by a signal, and all its processes with it."""
    for process in node.all_processes["raylet"]:
        process.process.send_signal(how)
        process.process.wait()
    node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    cluster.worker_nodes.discard(node)


def simulated_head_is_alive(cluster: Any) -> bool:
    """Whether each process of the head of such a cluster runs."""
    return bool(cluster.head_node.remaining_processes_alive())
