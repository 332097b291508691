"""``ray.util.placement_group`` on exact GPUs: the same call, the same group."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.placement_group import placement_group as rays_own

from placement.errors import InvalidDeployment, ServiceNotRunning
from placement.runtime import connection
from placement.runtime.borrowing import Borrower
from placement.runtime.needs import NODE_ID_LABEL
from placement.runtime.orders import own_name
from placement.runtime.ray_internals import validate_placement_group
from placement.wire.deployment import Deployment
from placement.wire.files import parse_model

WITHOUT_SERVICE = "PLACEMENT_WITHOUT_SERVICE"
"""The variable that says what to do if the service does not run: ``start`` it, or use plain ``ray``."""

_START = "start the service with `placement up`"

logger = logging.getLogger(__name__)


def placement_group(
    bundles: Sequence[Mapping[str, float]],
    strategy: str | None = None,
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: Sequence[Mapping[str, str]] | None = None,
    topology_strategy: Mapping[str, str] | None = None,
    *,
    gpus: Sequence[int | str] | None = None,
    within: str | None = None,
    min_bandwidth_gb_per_s: float | None = None,
    policy: str | None = None,
    wait_seconds: float | None = None,
) -> PlacementGroup:
    """``ray.util.placement_group`` with the same arguments and result, on the best GPUs that are free.

    The group belongs to this process, like any group that it creates with Ray: it ends with the process, or by
    ``ray.util.remove_placement_group``, and is not placed again. The service knows it, and ``placement status`` shows
    it. The whole GPUs that it has on one node are the set with the highest predicted all-reduce bandwidth; its bundles
    there get them in ascending order. Without a GPU in any bundle, it is Ray's own call.

    What differs from Ray's: it returns once the group is reserved and a worker in each bundle has confirmed its GPUs.
    While there is no room it waits in the service's queue, as ``ray.get(pg.ready())`` would; a warning says
    why, and Ray's autoscaler (v2) is asked for nodes. It blocks: in ``async`` code, use ``asyncio.to_thread``.

    If the service does not run it is started. With PLACEMENT_WITHOUT_SERVICE=ray in the environment it is not started;
    Ray then chooses the GPUs, and one warning says so.

    Args:
        bundles: the GPU, CPU, memory and custom resources of each. GPUs are whole GPUs, of which actors may take
            shares, or a share of one: 0.001 to 0.999. Shares fill GPUs that are shared already, as Ray deals them.
        strategy: PACK (default), STRICT_PACK, SPREAD or STRICT_SPREAD, as in Ray.
        name: the group's name, for ``ray.util.get_placement_group``.
        lifetime: ``None``, or ``"detached"``: it stays until it is removed, or released by ``placement release``.
        _soft_target_node_id: ignored; for Ray it is a hint.
        bundle_label_selector: label -> condition, for each bundle.
        topology_strategy: instead of ``strategy``, with Ray 2.57 or later: a strategy for ``ray.io/node-id``, and
            ``STRICT_PACK`` for a label that must have the same value on all nodes.
        gpus: only these GPUs, all on one node: ordinals as ``placement status`` shows them, or UUIDs of GPUs or of a
            MIG instance. ``bundle_label_selector`` may select the node; else it is one on which they are free.
        within: floor for the whole GPUs that it has on one node: nvlink, switch, numa or node.
        min_bandwidth_gb_per_s: floor for the same: predicted all-reduce bus bandwidth, GB/s per direction.
        policy: which node goes first among those with room; see :class:`placement.Deployment`.
        wait_seconds: how long to wait for room; ``None`` waits without limit, 0 does not wait.

    Raises:
        ValueError: Ray itself refuses the arguments.
        InvalidDeployment: placement refuses them: egress in a bundle, 1.5 GPUs, more than 4096 bundles, fewer
            ``gpus`` than the bundles take.
        UnknownGpu: no node has a GPU that ``gpus`` names.
        Unplaceable: no room was found in time: ``NoGpuNodes``, ``NotEnoughGpus`` or ``BelowFloor``.
        ReservationFailed, LeaseExpired: until the time was over, others kept taking the GPUs, or this process was too
            slow. Whatever is raised, nothing stays reserved.
        RuntimeError: Ray is not connected.
        ServiceNotRunning: the service cannot be started.

    Example:
        ::

            from placement import placement_group  # instead of ray.util's

            pg = placement_group([{"GPU": 1, "CPU": 1}] * 4, strategy="PACK")
    """
    if topology_strategy is not None and "topology_strategy" not in signature(rays_own).parameters:
        problem = f"topology_strategy: Ray {ray.__version__} has none; use strategy, or Ray 2.57 or later"
        raise InvalidDeployment("placement_group", (problem,))
    further: dict[str, Any] = {} if topology_strategy is None else {"topology_strategy": topology_strategy}
    asked: dict[str, Any] = {
        "strategy": strategy if strategy or topology_strategy else "PACK",
        "lifetime": lifetime,
        "bundle_label_selector": bundle_label_selector,
        **further,
    }
    validate_placement_group(bundles, _soft_target_node_id=_soft_target_node_id, **asked)
    if gpus is None and not any(bundle.get("GPU") for bundle in bundles):
        return rays_own(bundles, name=name, **asked)
    by_label = dict(topology_strategy or {})
    layout = {
        "bundles": bundles,
        "strategy": by_label.pop(NODE_ID_LABEL, None) or strategy,
        "bundle_label_selector": bundle_label_selector,
        "domain_label": next(iter(by_label), None),
    }
    limits: dict[str, Any] = {
        "within": within,
        "min_bandwidth_gb_per_s": min_bandwidth_gb_per_s,
        "policy": policy,
    }
    if gpus is not None:
        limits["constraints"] = {"gpus": [*gpus]}
    wanted = _deployment(name, layout, limits)
    borrower = service_or_rays_own()
    if borrower is None and gpus is not None:
        raise InvalidDeployment(
            "placement_group",
            (f"gpus: {[*gpus]} needs the service, as Ray alone cannot give named GPUs; {_START}",),
        )
    if borrower is None:
        return rays_own(bundles, name=name, **asked)
    group = borrower.create_group(wanted, name, lifetime, wait_seconds)
    return PlacementGroup(group.id, bundle_cache=[{k: float(v) for k, v in one.items()} for one in bundles])


def _deployment(name: str, layout: Mapping[str, Any], limits: Mapping[str, Any]) -> Deployment:
    """The deployment that the service is told for a group, with a unique name."""
    known_as = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:48] or "placement-group"
    fields = {
        "name": own_name(known_as),
        "model": known_as,
        "runtime": "python",
        "owner": "caller",
        "placement_group": {key: value for key, value in layout.items() if value is not None},
        **{key: value for key, value in limits.items() if value is not None},
    }
    return parse_model(Deployment, fields, "placement_group")


def service_or_rays_own() -> Borrower | None:
    """Borrows from the service, which is started if it does not run; ``None`` if WITHOUT_SERVICE forbids that."""
    try:
        return Borrower(connection.connect())
    except ServiceNotRunning:
        instead = os.environ.get(WITHOUT_SERVICE, "start")
        if instead not in ("start", "ray"):
            problem = f"{instead!r} is not a known value; set it to start or to ray"
            raise InvalidDeployment(WITHOUT_SERVICE, (problem,)) from None
        if instead == "start":
            from placement.runtime import bootstrap  # all of the service

            return Borrower(bootstrap.start())
        _warn_once()
        return None


def detached_group(
    borrower: Borrower, layout: Mapping[str, Any], name: str, known_as: str, wait_seconds: float
) -> PlacementGroup:
    """A detached group; raises as :func:`placement_group`.

    Args:
        borrower: asks the service.
        layout: ``bundles``, ``strategy`` and ``bundle_label_selector``.
        name: of the group.
        known_as: its name in ``placement status``, with a suffix.
        wait_seconds: how long to wait for room.
    """
    own = {"lifetime": "detached", "group_name": name}  # without an owner, whose end would end it
    result = borrower.borrow(_deployment(known_as, layout, {}), None, wait_seconds, {}, own)
    group = result.assignments[0].placement_group
    return PlacementGroup(
        group.id, bundle_cache=[{k: float(v) for k, v in one.items()} for one in layout["bundles"]]
    )


@cache
def _warn_once() -> None:
    logger.warning(
        "the placement service does not run, and %s=ray: Ray chooses the GPUs of placement groups; %s",
        WITHOUT_SERVICE,
        _START,
    )
