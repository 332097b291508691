"""``placement doctor``: tests on each node what placement relies on, while others use the cluster.

Nothing stays: what it starts and takes belongs to the calling process, so that Ray ends all of it with that
process, however it ends. It needs no running service, since it is used when that does not start.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from placement import __version__, topologies
from placement.core.snapshot import NEAR_LABELS
from placement.errors import ServiceNotRunning, UnsupportedRay
from placement.nvml import Reader
from placement.runtime import connection, ray_internals
from placement.runtime.bootstrap import import_problem, probe
from placement.runtime.diagnosis import Examined, Finding, NodeSaid, ServiceSaid, diagnose
from placement.runtime.discovery import NodeInfo, live_nodes
from placement.runtime.groups import NodeGroups
from placement.runtime.orders import Steering
from placement.runtime.reservation import NodeReserver
from placement.wire.facts import NodeFacts
from placement.wire.slots import in_ray_order

DEADLINE_SECONDS = 60.0
"""How long it may take by default. A process on a node starts in 1 to 5 s; NVML, without persistence mode, may
need 30 s."""
SERVICE_SECONDS = 5.0
"""How long the service, which answers in milliseconds, may take for each of two calls."""


class NodeDoctor:
    """The process on one node.

    Args:
        node_id: the node, hex.
        gpu_count: GPUs that Ray has there.
        topology_name: the catalogue entry that the node is labelled with.
    """

    def __init__(self, node_id: str, gpu_count: int, topology_name: str | None) -> None:
        self._node_id, self._gpu_count, self._topology_name = node_id, gpu_count, topology_name

    def examine(self, deadline_seconds: float) -> NodeSaid:
        """Reports what is there; NVML may take this long."""
        facts: NodeFacts | None = None
        visible = ray_internals.visible_devices()
        if self._gpu_count and self._topology_name in topologies.names():
            facts = topologies.facts(self._topology_name)
        elif self._gpu_count:
            reader = Reader(deadline_seconds)
            facts = in_ray_order(reader.facts(), self._gpu_count, visible)
            reader.close()
        order = os.environ.get("CUDA_DEVICE_ORDER")
        return versions(cuda_device_order=order, visible_devices=visible, facts=facts)

    def try_steering(self) -> Steering:
        """See :meth:`~placement.runtime.reservation.NodeReserver.try_steering`."""
        return NodeReserver(NodeGroups(self._node_id, probe), self._gpu_count).try_steering()


_NodeDoctor = ray.remote(num_cpus=0)(NodeDoctor)


def versions(**more: Any) -> NodeSaid:
    """The versions that this process runs, with ``more`` facts."""
    return NodeSaid(__version__, ray.__version__, platform.python_version(), **more)


def findings(seconds: float = DEADLINE_SECONDS) -> list[Finding]:
    """Examines the connected cluster. Needs a process of it: see :func:`~placement.runtime.connection.in_cluster`.

    Args:
        seconds: how long it may take. A node that has not answered in half of that is skipped, and its GPUs are not
            touched.
    """
    end = time.monotonic() + seconds
    nodes = {info.id: info for info in live_nodes()}
    egress = {row["NodeID"]: _like_egress(row["Resources"]) for row in ray.nodes() if row["Alive"]}
    draining = ray_internals.draining_nodes()
    doctors = {info.id: _doctor(info) for info in nodes.values()}
    try:
        # NVML gets a little less time, so that a hanging driver is distinguished from a hanging node.
        calls = {node: doctor.examine.remote(0.4 * seconds) for node, doctor in doctors.items()}
        said = _answers(calls, end - seconds / 2)
        trials: dict[str, Any] = {}
        for node, info in nodes.items():
            if info.gpu_count and isinstance(said[node], NodeSaid) and node not in draining:
                trials[node] = doctors[node].try_steering.remote()
        steered = _answers(trials, end)
    finally:
        for doctor in doctors.values():
            ray.kill(doctor)
    examined = [
        Examined(info, egress.get(node, {}), said[node], steered.get(node)) for node, info in nodes.items()
    ]
    return diagnose(versions(), _ray(), _service(SERVICE_SECONDS), examined)


def _doctor(info: NodeInfo) -> Any:
    here = NodeAffinitySchedulingStrategy(info.id, soft=False)
    options = {"scheduling_strategy": here}
    return _NodeDoctor.options(**options).remote(info.id, info.gpu_count, info.topology_name)


def _answers(calls: Mapping[str, Any], end: float) -> dict[str, Any]:
    """The answer of each node, or a sentence why there is none."""
    began = time.monotonic()
    if calls:
        ray.wait([*calls.values()], num_returns=len(calls), timeout=max(0.0, end - began))
    said = {}
    for node, call in calls.items():
        try:
            said[node] = ray.get(call, timeout=0)
        except ray.exceptions.GetTimeoutError:
            said[node] = f"no answer within {time.monotonic() - began:.0f} s"
        except ray.exceptions.RayError as error:
            cause = import_problem(error)
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            said[node] = f"cannot import placement: {cause}" if cause else f"it failed: {''.join(last)}"
    return said


def _like_egress(resources: Mapping[str, float]) -> dict[str, float]:
    """Resources that are egress resources, or were meant to be."""
    return {
        name: amount
        for name, amount in sorted(resources.items())
        if name.lower().startswith("egress") and "_group_" not in name
    }


def _ray() -> Finding:
    try:
        untested = ray_internals.require_supported()
    except UnsupportedRay as error:
        return Finding("ray", None, "failed", str(error), f"pip install '{error.requirement}'")
    if untested:
        said = f"Ray {ray.__version__} is newer than the tested versions, {ray_internals.tested()}"
        fix = "if steering is ok on each node below, it gives GPUs as they do; otherwise use a tested version"
        return Finding("ray", None, "warning", said, fix)
    return Finding("ray", None, "ok", f"Ray {ray.__version__}; tested: {ray_internals.tested()}")


def _service(seconds: float) -> ServiceSaid | Finding:
    try:
        service = connection.connect()
    except ServiceNotRunning:
        return Finding("service", None, "warning", "it does not run", "`placement up` starts it")
    try:
        version = ray.get(service.ping.remote(), timeout=seconds)
        if version != __version__:  # another version may not report its settings
            return ServiceSaid(version, NEAR_LABELS)
        return ServiceSaid(version, ray.get(service.settings.remote(), timeout=seconds)["near"])
    except ray.exceptions.RayError as error:
        said = f"it does not answer ({type(error).__name__})"
        fix = "see its log on the head; if this persists, end its process there: Ray restarts it, and placements stay"
        return Finding("service", None, "failed", said, fix)
