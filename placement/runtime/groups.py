"""The only module that calls Ray for placement groups: create, wait, remove, and ask which GPUs a bundle holds.

Measured on Ray 2.60, the same from 2.52 on; the callers rely on it:

- A raylet gives the lowest-numbered completely free GPUs, when a bundle is reserved; the bundles of one
  group on one node are reserved in ascending order.
- A group in which no worker ever ran is gone as soon as its removal has been sent: a group created right
  after it finds its GPUs free. If a probe ran in it, this does not work: Ray's scheduler waits for the raylet to
  report the worker's resources back (up to 100 ms), fails the first attempt, and backs off for 100 ms or more.
- No call returns which GPUs a bundle holds; a task inside must report it.
- A group that is removed while Ray is reserving it (state ``PREPARED``) leaks its GPUs for as long as the
  raylet lives. So a group is removed only when it is ready, or right after an attempt to schedule it has
  failed, when the next one is at least 100 ms away.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from placement.runtime import ray_internals
from placement.runtime.ray_internals import PlacementGroupTableData
from placement.wire.slots import visible_tokens

HOLD = "hold-"
"""The prefix of the name of every short-lived group."""

STUCK_SECONDS = 10.0
"""Longest wait for Ray's scheduler to end one attempt; it takes 2 to 5 ms, more if thousands are queued."""

POLL_SECONDS = 0.02
"""How often Ray's records are read while GPUs are waited for."""

MAX_TRIES = 3
"""How often to ask for GPUs that the records show as free: free parts of several GPUs add up there."""

WARM_SECONDS = 0.5
"""How long a task may take before it is asked whether its group is still there."""

GPU_IDS_DEADLINE_SECONDS = 60.0
"""How long a task in a ready group may take. A cold worker process takes 1 to 3 s on a busy machine."""


@dataclass(frozen=True)
class LiveGroup:
    """A group that Ray has not removed, and the ids of the nodes that hold bundles of it."""

    name: str
    nodes: frozenset[str]


def my_gpu_ids() -> list[str]:
    """The GPU ids that Ray gave to the calling task or actor, as workers see them."""
    return [str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"]]


class NodeGroups:
    """Placement groups on one node. Must be used on that node: probing from elsewhere is 10 times slower.

    Args:
        node_id: the node, hex.
        probe: a Ray remote function that returns :func:`my_gpu_ids`.
    """

    def __init__(self, node_id: str, probe: Any) -> None:
        self._node_id = node_id
        self._probe = probe
        self._ready: set[str] = set()
        self._tokens = visible_tokens(ray_internals.visible_devices())

    def hold(self, amount: float) -> PlacementGroup:
        """Takes the lowest free GPUs, or a share of the fullest GPU that still fits it, in one bundle.

        The group dies with this actor, however that ends.
        """
        return create_group(HOLD + secrets.token_hex(6), [{"GPU": amount}], [self._node_id], lifetime=None)

    def reserve(self, name: str, bundle: dict[str, float], count: int) -> PlacementGroup:
        """Reserves ``count`` equal bundles, detached, with one GPU per bundle, as vLLM needs."""
        return create_group(name, [bundle] * count, [self._node_id] * count)

    def ready_or_removed(self, group: PlacementGroup, deadline_seconds: float) -> bool:
        """See :func:`ready_or_removed`."""
        ready = ready_or_removed(group, deadline_seconds)
        if ready:
            self._ready.add(group.id.hex())
        return ready

    def wait_for(self, group: PlacementGroup, deadline_seconds: float) -> bool:
        """The same, for a group that somebody else creates."""
        return ready_or_removed(group, deadline_seconds)

    def is_gone(self, group: PlacementGroup) -> bool:
        """See :func:`is_gone`."""
        return is_gone(group.id.hex())

    def remove(self, group: PlacementGroup) -> None:
        """See :func:`remove_group`."""
        ready = group.id.hex() in self._ready
        self._ready.discard(group.id.hex())
        remove_group(group, ready)

    def gpus_of(self, group: PlacementGroup, amounts: Mapping[int, float]) -> list[int]:
        """The slots that bundles hold, or a share of, as a worker in each of them reports.

        Asked one after the other, so that one warm worker process answers all. Those of the first ones only, if the
        group is gone.

        Args:
            group: their group.
            amounts: bundle -> the GPUs that it holds, or the share of one.

        Raises:
            ray.exceptions.GetTimeoutError: a bundle did not answer in time.
        """
        slots: list[int] = []
        for bundle, amount in amounts.items():
            found = self._ask(group, bundle, amount)
            if not found:
                break
            slots += sorted(found)
        return slots

    def warm(self) -> None:
        """Waits until a worker process can answer the next probe at once."""
        here = NodeAffinitySchedulingStrategy(self._node_id, soft=False)
        self._answer(self._probe.options(num_gpus=0, scheduling_strategy=here))

    def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
        """Which ``count`` GPUs are the lowest free ones, by taking them for a moment.

        Returns:
            Their slots, ascending; ``None`` if there were not that many free within the deadline, or some tenths of a
            second more.
        """
        self.warm()  # otherwise the GPUs would be held while a worker process starts
        end = time.monotonic() + deadline_seconds
        tries = 1
        while not self.ready_or_removed(group := self.hold(count), 0.0):
            # Ray would try again only every second. It uses its records, so these show when a new group can succeed.
            while time.monotonic() < end and self.available() < count:
                time.sleep(POLL_SECONDS)
            if time.monotonic() >= end or tries == MAX_TRIES:
                return None
            tries += 1
            time.sleep(POLL_SECONDS)
        try:
            return sorted(self._ask(group, 0, count))
        finally:
            self.remove(group)

    def available(self) -> float:
        """GPUs that Ray's records show as free here, including free parts; up to about 0.1 s old."""
        return available_resources().get(self._node_id, {}).get("GPU", 0.0)

    def _slot(self, gpu_id: str) -> int:
        """The slot of Ray's GPU id: the id is a token of CUDA_VISIBLE_DEVICES, or the slot itself if that was unset."""
        if self._tokens is None:
            return int(gpu_id)
        if gpu_id.strip() in self._tokens:
            return self._tokens.index(gpu_id.strip())
        at_start = ",".join(self._tokens)
        raise ValueError(
            f"GPU {gpu_id!r} is not in CUDA_VISIBLE_DEVICES at `ray start`, which was {at_start!r}"
        )

    def _ask(self, group: PlacementGroup, bundle: int, share: float) -> list[int]:
        """The slots of which a bundle holds a ``share``; none, if its group is gone."""
        inside = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        ids = self._answer(self._probe.options(num_gpus=share, scheduling_strategy=inside), group)
        return [self._slot(gpu_id) for gpu_id in ids]

    def _answer(self, task: Any, group: PlacementGroup | None = None) -> list[str]:
        """What a task says; nothing, if its group is gone."""
        reference, end = task.remote(), time.monotonic() + GPU_IDS_DEADLINE_SECONDS
        while True:
            try:
                return list(ray.get(reference, timeout=WARM_SECONDS))
            except ray.exceptions.RayError as error:
                gone = group is not None and is_gone(group.id.hex())
                late = isinstance(error, ray.exceptions.GetTimeoutError)
                if late and not gone and time.monotonic() < end:
                    continue
                ray.cancel(reference, force=True)
                if gone:  # with whoever created it; Ray may keep such a task waiting for ever
                    return []
                raise


def create_group(
    name: str,
    bundles: Sequence[dict[str, float]],
    nodes: Sequence[str],
    lifetime: str | None = "detached",
    strategy: str = "PACK",
    labels: Sequence[Mapping[str, str]] = (),
) -> PlacementGroup:
    """Asks Ray for a group with each bundle on the node given for it.

    Ray places a bundle without a given node, by the ``strategy`` and its ``labels``.
    """
    others = labels or ({},) * len(bundles)
    return placement_group(
        list(bundles),
        strategy=strategy,
        name=name,
        lifetime=lifetime,
        bundle_label_selector=[
            {"ray.io/node-id": node_id} if node_id else dict(other)
            for node_id, other in zip(nodes, others, strict=True)
        ],
    )


def ready_or_removed(group: PlacementGroup, deadline_seconds: float = 0.15) -> bool:
    """Waits until the group is reserved; if it is not by the first attempt that ends after the deadline, removes it.

    Ray tries at once, again after 0.2 to 0.3 s, then every second.

    Returns:
        Whether it is reserved. If not, it is gone.
    """
    start = time.monotonic()
    with contextlib.suppress(Exception):
        # Ray raises this for a removed group; the table gives the certain answer.
        if group.wait(min(deadline_seconds, 0.05)):
            return True
    seen = None
    while True:
        row = placement_group_table(group)
        waited = time.monotonic() - start
        if not row or row["state"] == "REMOVED":
            return False
        if row["state"] == "CREATED":
            return True
        if row["state"] == "RESCHEDULING":  # its node died, and it is pinned to that node
            remove_placement_group(group)
            return False
        # Ray counts an attempt when it starts, but raises the delay before the next one when it has failed.
        delay = ray_internals.scheduling(row).retry_delay_ms
        just_failed = row["state"] == "PENDING" and seen is not None and delay > seen
        if (just_failed and waited > deadline_seconds) or waited > STUCK_SECONDS:
            remove_placement_group(group)
            return False
        seen = delay
        time.sleep(0.002)


def remove_group(group: PlacementGroup, ready: bool = False) -> None:
    """Removes a group and ends the workers in it. Removing it twice is harmless.

    Args:
        group: what to remove.
        ready: it is known to be reserved; otherwise this waits for a moment at which removing it is safe.
    """
    if ready or ready_or_removed(group, 0.0):
        remove_placement_group(group)


def group_from_hex(group_id: str) -> PlacementGroup:
    """A handle to a group that exists."""
    return ray_internals.group_handle(group_id)


def live_groups(wanted: Callable[[str], bool]) -> dict[str, LiveGroup]:
    """Group id, hex -> group, of those not yet removed whose name is ``wanted``.

    Ray keeps every removed group in its table for ever. With Ray's own reader a service that restarts after a day's
    work would wait for seconds.
    """
    found = {}
    for group in ray_internals.group_rows():
        if group.state != PlacementGroupTableData.REMOVED and wanted(group.name):
            nodes = frozenset(bundle.node_id.hex() for bundle in group.bundles if bundle.node_id)
            found[group.placement_group_id.hex()] = LiveGroup(group.name, nodes)
    return found


def is_gone(group_id: str) -> bool:
    """Whether a group, by its id in hex, was removed by anybody, or ended with its creator."""
    row = ray_internals.group_row(group_id)
    return row is None or row.state == PlacementGroupTableData.REMOVED


def node_of_group(group: PlacementGroup) -> str | None:
    """The node that Ray's table shows for bundle 0 of a reserved group, hex."""
    return placement_group_table(group)["bundles_to_node_id"].get(0)


def available_resources() -> dict[str, dict[str, float]]:
    """Node id -> resource -> free amount in Ray's records; up to about 0.1 s old."""
    return ray_internals.available_resources()
