"""Distributed GPU placement on Ray: exact GPUs, chosen by topology, reserved by Ray itself.

Names are imported when first used, so ``import placement`` is fast and needs no Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from placement.intact import require_intact

if TYPE_CHECKING:
    from placement.errors import (
        BelowFloor,
        Busy,
        ClusterUnreachable,
        DeploymentConflict,
        GroupStands,
        InvalidClusterFile,
        InvalidDeployment,
        LeaseExpired,
        MissingSecret,
        NoCpuNodes,
        NoEgressNodes,
        NoGpuNodes,
        NotEnoughEgress,
        NotEnoughGpus,
        PartlyApplied,
        PlacementError,
        ReservationFailed,
        ServiceDiffers,
        ServiceNotRunning,
        UnknownDeployment,
        UnknownGpu,
        UnknownNode,
        UnknownTopology,
        Unplaceable,
        UnreadableRecord,
        UnsupportedRay,
    )
    from placement.runtime.async_client import AsyncClient
    from placement.runtime.binding import bind
    from placement.runtime.bootstrap import start
    from placement.runtime.client import Client
    from placement.runtime.connection import connect
    from placement.runtime.drop_in import placement_group
    from placement.runtime.results import NodeAssignment, PlacementResult
    from placement.wire.constraints import PlacementConstraints
    from placement.wire.deployment import Deployment
    from placement.wire.files import load_deployments
    from placement.wire.groups import Group, GroupLink
    from placement.wire.plans import PlacementPlan
    from placement.wire.runtime_config import ApiKey, Budget, RuntimeConfig, Serving

__version__ = "0.1.0"
require_intact()

_HOME = {
    "placement.errors": (
        "BelowFloor", "Busy", "ClusterUnreachable", "DeploymentConflict", "GroupStands", "InvalidClusterFile",
        "InvalidDeployment", "LeaseExpired", "MissingSecret", "NoCpuNodes", "NoEgressNodes", "NoGpuNodes",
        "NotEnoughEgress", "NotEnoughGpus", "PartlyApplied", "PlacementError", "ReservationFailed", "ServiceDiffers",
        "ServiceNotRunning", "UnknownDeployment", "UnknownGpu", "UnknownNode", "UnknownTopology", "Unplaceable",
        "UnreadableRecord", "UnsupportedRay",
    ),
    "placement.runtime.binding": ("bind",),
    "placement.runtime.bootstrap": ("start",),
    "placement.runtime.connection": ("connect",),
    "placement.runtime.async_client": ("AsyncClient",),
    "placement.runtime.client": ("Client",),
    "placement.runtime.drop_in": ("placement_group",),
    "placement.runtime.results": ("NodeAssignment", "PlacementResult"),
    "placement.wire.constraints": ("PlacementConstraints",),
    "placement.wire.deployment": ("Deployment",),
    "placement.wire.files": ("load_deployments",),
    "placement.wire.groups": ("Group", "GroupLink"),
    "placement.wire.plans": ("PlacementPlan",),
    "placement.wire.runtime_config": ("ApiKey", "Budget", "RuntimeConfig", "Serving"),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ApiKey",
    "AsyncClient",
    "BelowFloor",
    "Budget",
    "Busy",
    "Client",
    "ClusterUnreachable",
    "Deployment",
    "DeploymentConflict",
    "Group",
    "GroupLink",
    "GroupStands",
    "InvalidClusterFile",
    "InvalidDeployment",
    "LeaseExpired",
    "MissingSecret",
    "NoCpuNodes",
    "NoEgressNodes",
    "NoGpuNodes",
    "NodeAssignment",
    "NotEnoughEgress",
    "NotEnoughGpus",
    "PartlyApplied",
    "PlacementConstraints",
    "PlacementError",
    "PlacementPlan",
    "PlacementResult",
    "ReservationFailed",
    "RuntimeConfig",
    "ServiceDiffers",
    "ServiceNotRunning",
    "Serving",
    "UnknownDeployment",
    "UnknownGpu",
    "UnknownNode",
    "UnknownTopology",
    "Unplaceable",
    "UnreadableRecord",
    "UnsupportedRay",
    "__version__",
    "bind",
    "connect",
    "load_deployments",
    "placement_group",
    "start",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'placement' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
