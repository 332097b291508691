"""The actor on each GPU node: reads the GPUs, and reserves exact ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.util
from ray.util.placement_group import PlacementGroup

from placement import topologies
from placement.core.affinity import Affinity, affinities
from placement.core.needs import WHOLE
from placement.core.score import Score, ray_set, score, slowest_group
from placement.nvml import Reader
from placement.runtime.connection import NAMESPACE
from placement.runtime.groups import NodeGroups
from placement.runtime.orders import (
    GpuHardware,
    Holding,
    Order,
    Prepared,
    Refused,
    Reserved,
    hardware_of,
    with_rates,
)
from placement.runtime.ray_internals import visible_devices
from placement.runtime.reservation import NodeReserver
from placement.wire.facts import NodeFacts
from placement.wire.slots import in_ray_order


@dataclass(frozen=True)
class Filled:
    """An order that is reserved and verified, and what is near each of its GPUs.

    ``mig``: the profile of the MIG instance; empty for GPUs. ``ray_gpus``: what Ray alone would have given.
    """

    order: Order
    reserved: Reserved
    score: Score
    ray_gpus: tuple[int, ...]
    ray_score: Score
    mig: str = ""
    affinities: Sequence[Affinity] = ()


@dataclass(frozen=True)
class Reply:
    """All orders filled, or none of them and the reason.

    ``foreign_gpus`` are the GPUs that other Ray users held when the node actor last looked.
    """

    filled: tuple[Filled, ...]
    refused: Refused | None
    foreign_gpus: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a node holds of a replica, after it was prepared, reserved and verified there.

    Attributes:
        sets: one set of GPUs for each tensor-parallel group, or part of a group, on this node.
        slots: GPU and bundle of each rank here, in their order. Of shares, a GPU may have several.
        score: the score of the slowest set.
        sorted_score: the same if the sets were cut from the GPUs in ascending order.
        ray_gpus: what Ray alone would have given.
        ray_score: the score of ``ray_gpus``, if there is one set.
        share: thousandths of each GPU.
        mig: the profile of the MIG instance; empty for GPUs.
        affinities: what is near each GPU of the slots, in their order; empty if unknown.
    """

    sets: tuple[tuple[int, ...], ...]
    slots: list[tuple[int, int]]
    score: Score
    sorted_score: Score
    ray_gpus: tuple[int, ...]
    ray_score: Score
    share: int = WHOLE
    mig: str = ""
    affinities: Sequence[Affinity] = ()


_NAME = "node:"


def agent_name(node_id: str) -> str:
    """What the actor of a node is called, in the service's namespace."""
    return _NAME + node_id


def living_agents() -> set[str]:
    """The nodes, by id, that have an actor now."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {
        actor["name"].removeprefix(_NAME)
        for actor in actors
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_NAME)
    }


FRESH_SECONDS = 2.0
"""An older reading is not used for free GPU memory."""

LEASE_SECONDS = 1.5
"""How long the creator of a group may take."""
GRACE_SECONDS = 0.5
"""How much longer GPUs stay prepared, as the message that the group exists takes time, too."""


class NodePlacementActor:
    """The actor of one GPU node. It makes one reservation at a time, and answers questions about facts beside that.

    Args:
        node_id: the node, hex.
        gpu_count: GPUs that Ray has on the node.
        topology_name: catalogue entry of a simulated node; ``None`` reads NVML.
        probe: the Ray remote function that reports GPU ids from inside a bundle.
    """

    def __init__(self, node_id: str, gpu_count: int, topology_name: str | None, probe: Any) -> None:
        self._gpu_count = gpu_count
        self._groups = NodeGroups(node_id, probe)
        self._reserver = NodeReserver(self._groups, gpu_count)
        self._recorded = topologies.facts(topology_name) if topology_name else None
        self._reader = None if topology_name else Reader()
        self._told: NodeFacts | None = None
        self._prepared: Prepared | None = None
        self._lease: threading.Timer | None = None
        self._preparing = threading.Lock()

    @ray.method(concurrency_group="facts")
    def facts(self, max_age_seconds: float | None = None) -> NodeFacts:
        """The facts of the node's GPUs, one entry for each GPU that Ray has, in Ray's order.

        Never fails: without NVML the GPUs are listed and nothing is known of them. A new reading is
        started for the next caller, so that memory use is recent.
        """
        facts = self._read(max_age_seconds)
        if self._reader is not None and (facts.age_seconds is None or facts.age_seconds > 1.0):
            self._reader.refresh()
        return facts

    def adopt(self, holdings: Mapping[str, Holding], facts: NodeFacts | None = None) -> None:
        """Records what is reserved already, by order name: all that this service holds here.

        Also what an earlier actor of the node reported of its GPUs, which is used until they have been read.
        """
        self._reserver.gpus.adopt(holdings)
        if facts is not None and self._reader is not None and not self._reader.has_read:
            self._told = facts
            self._reader.refresh()

    def forget(self, name: str) -> None:
        """Records that others removed an order's group."""
        self._reserver.gpus.forget(name)

    def reserve(self, orders: Sequence[Order]) -> Reply:
        """Reserves all orders, each on the best GPUs that are free, or none of them."""
        machine = self._machine(orders)
        topology = machine.topology
        filled: list[Filled] = []
        given: set[int] = set()
        given_by_ray: set[int] = set()
        try:
            for to_follow, order in zip(reversed(range(len(orders))), orders, strict=True):
                outcome = self._reserver.reserve(order, machine, to_follow)
                if isinstance(outcome, Refused):
                    self._undo(filled)
                    if outcome.full:  # for this order, not for those before it
                        outcome = replace(outcome, at_most=(len(filled) + 1) * order.needs.gpus - 1)
                    return Reply((), outcome, tuple(sorted(self._reserver.gpus.foreign)))
                gpus = outcome.gpus
                # It would have given the orders before this one its own choice as well.
                rays = ray_set((outcome.free | given) - given_by_ray, len(gpus)) or gpus
                given.update(gpus)
                given_by_ray.update(rays)
                mig, near = _profile(machine, order, gpus), affinities(topology, gpus)
                scores = score(topology, gpus), rays, score(topology, rays)
                filled.append(Filled(order, outcome, *scores, mig, near))
        except BaseException:
            self._undo(filled)
            raise
        return Reply(tuple(filled), None, tuple(sorted(self._reserver.gpus.foreign)))

    def locate(self) -> tuple[int, ...]:
        """Which GPUs other Ray users hold, by a new look."""
        return tuple(sorted(self._reserver.gpus.locate()))

    def warm(self, gpus: int) -> None:
        """Answers once everything is started that :meth:`prepare` and :meth:`confirm` need to be quick.

        With 0 GPUs it only starts processes and touches no GPU.
        """
        self._last_facts()
        self._groups.warm()
        if gpus:
            self._reserver.look_ahead(gpus)

    def prepare(self, order: Order, sets: int, more: int = 0) -> Prepared | Refused:
        """Makes the best GPUs the ones that Ray gives next, for a group that somebody else creates.

        :meth:`confirm` or :meth:`cancel` must follow; if neither does in time, the GPUs are freed by
        themselves.

        Args:
            order: what is asked of this node; of a replica over several nodes, one of the ``sets``.
            sets: how many disjoint sets of GPUs of this node it needs.
            more: for how many such orders to follow there should be room left.
        """
        self.cancel()
        machine = self._machine([order])
        outcome = self._reserver.prepare(order, machine, sets, more)
        if isinstance(outcome, Prepared):
            self._prepared = outcome
            self._lease = lease = threading.Timer(LEASE_SECONDS + GRACE_SECONDS, self._run_out)
            lease.daemon = True
            lease.start()
            return replace(outcome, fillers=())
        return replace(outcome, foreign_gpus=tuple(sorted(self._reserver.gpus.foreign)))

    def _run_out(self) -> None:
        """No group came in time. If the GPUs cannot be freed, the end of this process frees them."""
        try:
            self.cancel()
        except BaseException:
            os._exit(1)

    def cancel(self) -> None:
        """Frees prepared GPUs, if there are any."""
        self._let_go(used=False)

    def confirm(self, order: Order, group: PlacementGroup, bundles: Sequence[int]) -> Part | Refused:
        """What the bundles of a group hold here, once it is ready, if it is just what was prepared."""
        ready = self._reserver.wait_for(group)  # what is prepared stays so until then
        prepared = self._let_go(used=ready)
        if not ready:
            return Refused("another Ray user took GPUs meanwhile, or CPUs or memory are short", 1, full=False)
        if prepared is None:
            return Refused("the GPUs that were prepared had been let go", 1, full=False)
        slots = self._reserver.confirm(order, prepared, group, bundles)
        if slots is None:
            return Refused("another Ray user took or freed GPUs meanwhile", 1, full=False)
        machine = with_rates(hardware_of(self._last_facts(), self._gpu_count), order.measured)
        topology = machine.topology
        gpus, size = [gpu for one in prepared.sets for gpu in one], len(prepared.sets[0])
        if not prepared.taken:  # in rank order
            bundle_of = dict(slots)
            slots = [(gpu, bundle_of[gpu]) for gpu in gpus]
        slowest, resorted = slowest_group(topology, gpus, size), slowest_group(topology, sorted(gpus), size)
        rays = score(topology, prepared.ray_gpus)
        mig = _profile(machine, order, gpus)
        return Part(
            prepared.sets,
            slots,
            slowest,
            resorted,
            prepared.ray_gpus,
            rays,
            prepared.share,
            mig,
            affinities(topology, [gpu for gpu, _ in slots]),
        )

    def release(self, orders: Sequence[tuple[str, PlacementGroup]]) -> None:
        """Removes groups. Harmless if they are gone already."""
        for name, group in orders:
            self._reserver.remove(name, group)

    def _let_go(self, used: bool) -> Prepared | None:
        with self._preparing:  # the lease may expire at this moment
            prepared, self._prepared = self._prepared, None
            if self._lease is not None:
                self._lease.cancel()
            if prepared is not None:
                self._reserver.finish(prepared, used)
        return prepared

    def _machine(self, orders: Sequence[Order]) -> GpuHardware:
        """The GPUs' hardware; read again if free memory matters."""
        fresh = any(order.needs.free_memory_bytes for order in orders)
        hardware = hardware_of(self._last_facts(FRESH_SECONDS if fresh else None), self._gpu_count)
        return with_rates(hardware, orders[0].measured) if orders else hardware

    def _last_facts(self, max_age_seconds: float | None = None) -> NodeFacts:
        has_read = self._reader is None or self._reader.has_read
        if self._told is not None and not has_read and max_age_seconds is None:
            return self._told
        return self._read(max_age_seconds)

    def _read(self, max_age_seconds: float | None) -> NodeFacts:
        if self._recorded is not None:
            return self._recorded
        assert self._reader is not None
        return in_ray_order(self._reader.facts(max_age_seconds), self._gpu_count, visible_devices())

    def _undo(self, filled: Sequence[Filled]) -> None:
        self.release([(one.order.name, one.reserved.group) for one in filled])


def _profile(machine: GpuHardware, order: Order, gpus: Sequence[int]) -> str:
    """The profile of an order's MIG instance; empty for GPUs."""
    return machine.instances[gpus[0]] if order.needs.profile else ""
