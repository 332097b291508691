"""All of Ray that this package uses and Ray does not document: each thing once, with the reason.

Ray may rename or drop any of it in a minor version. What was there from Ray 2.52 to 2.60 is used here as it is in
all of them; :func:`require_supported` looks at the start whether it still is. What GPUs a request gets is not
documented either: docs/ray.md says what was measured, and ``placement doctor`` tries it on each node.
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
"""The minor versions that were run, the first and the last; docs/ray.md says with what."""
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

    # What Ray refuses of a group before it asks the cluster.
    from ray.util.placement_group import PlacementGroup, validate_placement_group
except ImportError as error:
    raise UnsupportedRay(ray.__version__, REQUIREMENT, f"it lacks what is stood on: {error}") from None

__all__ = [
    "JOB_CONFIG_VARIABLE",
    "GetClusterStatusReply",
    "NodeStatus",
    "PlacementGroupTableData",
    "validate_placement_group",
]

HEAD = {"node:__internal_head__": 0.001}
"""Pins an actor to the head, wherever that comes up again. Ray Serve pins its controller so."""

SUPERVISOR = "_ray_internal_job_actor_{}", "SUPERVISOR_ACTOR_RAY_NAMESPACE"
"""Name and namespace of the actor that stands for a submitted job, and ends with it: dashboard/modules/job/common.py,
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
    """Checks, in microseconds and without the cluster, that this Ray is one to stand on.

    Args:
        version: of Ray; that of this process, if not given.

    Returns:
        What is to be said of a version that is newer than those tested; else nothing.

    Raises:
        UnsupportedRay: it is older than all that were tested, or lacks something that is used.
    """
    version = version or ray.__version__
    found = minor_version(version)
    if found < OLDEST:
        why = next(problem for before, problem in sorted(_WHY_NOT.items()) if found < before)
        raise UnsupportedRay(version, REQUIREMENT, why)
    missing = [name for name in _STANDS_ON if not _has(name)]
    if missing:
        lacks = ", ".join(f"ray.{name}" for name in missing)
        raise UnsupportedRay(version, REQUIREMENT, f"it lacks what is stood on: {lacks}")
    if found <= NEWEST:
        return ""
    return (
        f"Ray {version} is newer than all that placement was tested with ({tested()}), and exact GPUs stand on what "
        "Ray does not document: run `placement doctor`, which tries it on each node"
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
    """CUDA_VISIBLE_DEVICES as it was at ``ray start``, by which Ray names GPUs; ``None`` if it was not set.

    The variable itself does not tell: Ray before 2.56 empties it in an actor without a GPU, as the node actor is (PR
    62492), and any Ray does where RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO is set. Ray keeps what it read first.
    """
    tokens = ray._private.worker.global_worker.original_visible_accelerator_ids.get("GPU")
    return None if tokens is None else ",".join(tokens)


def logs_folder() -> str:
    """The folder of this node's log files, which is Ray's own for its session."""
    return str(ray._private.worker.global_worker.node.get_logs_dir_path())


def node_address() -> str:
    """The address of this process's node, as it was given to Ray; the public call finds out one of the machine's."""
    return str(ray._private.worker.global_worker.node.node_ip_address)


def submission_id() -> str | None:
    """The submission id of the job that this process belongs to. Not in a ``ray://`` client."""
    found: str | None = ray._private.worker.global_worker.core_worker.get_job_config().metadata.get(
        "job_submission_id"
    )
    return found


def is_ray_client() -> bool:
    """Whether this process is connected through ``ray://``. No public call says so."""
    return bool(ray.util.client.ray.is_connected())


def auth_token() -> str | None:
    """The token with which this process asks Ray, from wherever Ray has it; ``None`` where authentication is off."""
    [header] = get_auth_headers_if_auth_enabled({}).values() or [""]
    return str(header).removeprefix("Bearer ") or None


def local_address() -> str | None:
    """``host:port`` of the cluster that was started on this machine, if one was; ``ray.init`` would start one.

    Raises:
        ClusterUnreachable: there are several, and none of them was started last by `ray start`, with this RAY_TMPDIR.
            Ray would take any of them.
    """
    services = ray._private.services
    if len(found := services.find_gcs_addresses()) > 1 and services.find_bootstrap_address(None) is None:
        raise ClusterUnreachable(
            "auto", f"which of those on this machine is not said: {', '.join(sorted(found))}"
        )
    try:
        return str(ray._private.services.canonicalize_bootstrap_address("auto") or "") or None
    except ConnectionError:
        return None


def driver_at(host: str) -> dict[str, str]:
    """For ``ray.init``: the driver's own address, where a machine has several (simulated nodes)."""
    return {"_node_ip_address": host}


WITHOUT_HOOK: Mapping[str, Any] = {"_skip_env_hook": True}
"""For ``ray.init``: no ``RAY_RUNTIME_ENV_HOOK``, which gives the job a ``runtime_env``."""


def allow_blocking_get() -> None:
    """Has Ray not warn of ``ray.get`` in an actor with an event loop, whose threads may block."""
    os.environ["RAY_WARN_BLOCKING_GET_INSIDE_ASYNC"] = "0"


def actor_id(handle: Any) -> str:
    """The id of an actor, hex, by its handle. No public call says so to others than the actor."""
    return str(handle._actor_id.hex())


# -- the GCS: what lives, and the key-value store --------------------------------------------------------


def actor_has_ended(actor: str) -> bool:
    """Whether an actor, by its id, is no more. ``ray.util.state`` says so too, where there is a dashboard."""
    known = ray._private.state.state.actor_table(actor)
    return not known or known["State"] == "DEAD"


def jobs() -> list[dict[str, Any]]:
    """All jobs, those that ended long ago too: ``JobID`` and ``IsDead``."""
    found: list[dict[str, Any]] = ray._private.state.state.job_table()
    return found


def draining_nodes() -> frozenset[str]:
    """The ids of the nodes that Ray is about to take away."""
    return frozenset(ray._private.state.state.get_draining_nodes())


def available_resources() -> dict[str, dict[str, float]]:
    """Node id -> resource -> free amount, as the cluster's books show it; up to about 0.1 s old.

    ``ray.available_resources()`` has only the sums.
    """
    found: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    return found


def kv_get(key: bytes, namespace: bytes) -> bytes | None:
    """A value of the GCS key-value store, which outlives actors, and with Redis the head. No public call has it."""
    found: bytes | None = internal_kv._internal_kv_get(key, namespace=namespace)
    return found


def kv_put(key: bytes, value: bytes, namespace: bytes, overwrite: bool = True) -> None:
    """Stores a value; without ``overwrite`` only where there is none."""
    internal_kv._internal_kv_put(key, value, overwrite=overwrite, namespace=namespace)


def kv_delete(key: bytes, namespace: bytes) -> None:
    """Removes a value, if it is there."""
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
    """How far Ray is with a placement group.

    Attributes:
        attempt: attempts to reserve it; counted when one starts.
        state: ``"QUEUED"``, ``"NO_RESOURCES"``, ``"INFEASIBLE"`` and others.
        retry_delay_ms: the longest delay before an attempt; it rises when one has failed.
    """

    attempt: int
    state: str
    retry_delay_ms: float


def scheduling(row: Mapping[str, Any]) -> Scheduling:
    """Of a row of ``placement_group_table()``, whose ``stats`` are not documented."""
    stats = row["stats"]
    return Scheduling(stats["scheduling_attempt"], stats["scheduling_state"], stats["highest_retry_delay_ms"])


def group_handle(group_id: str) -> PlacementGroup:
    """A handle to a group by its id, hex. The public call wants a name, and that of this job's namespace."""
    return PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))


def group_rows() -> Iterator[PlacementGroupTableData]:
    """All groups, removed ones too, of which Ray forgets none: 10 microseconds each, a quarter of the public call."""
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
    """What the autoscaler last said. ``ray.autoscaler.v2.sdk`` drops the requests that no node type can hold."""
    gcs = ray._private.worker.global_worker.gcs_client
    return GetClusterStatusReply.FromString(gcs.get_cluster_status(timeout_s=timeout_seconds))


def is_second_autoscaler(timeout_seconds: float) -> bool:
    """Whether it is autoscaler v2, as the head noted it."""
    found: bytes | None = ray._private.worker.global_worker.gcs_client.internal_kv_get(
        ray._raylet.GCS_AUTOSCALER_V2_ENABLED_KEY.encode(),
        namespace=ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
        timeout=timeout_seconds,
    )
    return found == b"1"


# -- metrics ---------------------------------------------------------------------------------------------


def metrics_export_seconds() -> float:
    """How often a process hands its metrics to its node's agent: ``RAY_metrics_report_interval_ms``, at least 1 s.

    A gauge that was not set for two of these is not exported any more.
    """
    return max(1.0, float(ray._config.metrics_report_interval_ms()) / 1000)


# -- Ray Serve -------------------------------------------------------------------------------------------


def serve_defaults() -> ModuleType:
    """Where Serve's controller has the function by which it makes placement groups; :mod:`placement.serve` looks
    whether it still is what it was.
    """
    return import_module("ray.serve._private.default_impl")


def serve_llm_callback() -> type:
    """What a callback of an ``LLMConfig`` must inherit from; any class where this Ray has none."""
    try:
        found: type = import_module("ray.llm._internal.common.callbacks.base").CallbackBase
    except ImportError:
        return object
    return found


# -- simulated clusters ----------------------------------------------------------------------------------


def simulated_cluster() -> Any:
    """A cluster of raylets on this machine, as Ray's own tests have it."""
    from ray.cluster_utils import Cluster

    return Cluster()


def add_simulated_node(cluster: Any, seconds: float = 240.0, **options: Any) -> Any:
    """Starts a raylet of such a cluster, and waits for it so long.

    Ray gives a raylet 30 s to register (a number in ``Node.__init__``), which is too short on a machine that others
    keep busy. It asks for the raylet's entry again and again until then: so the first answer is made to wait.
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
