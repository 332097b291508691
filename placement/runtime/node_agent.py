"""The actor on each GPU node: reads the GPUs, and reserves exact ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from placement import topologies
from placement.core.score import Score, score
from placement.nvml import Reader
from placement.runtime.groups import NodeGroups
from placement.runtime.reservation import Holding, NodeReserver, Order, Refused, Reserved, machine_of
from placement.wire.facts import NodeFacts
from placement.wire.slots import in_ray_order


@dataclass(frozen=True)
class Filled:
    """An order that is reserved and verified."""

    order: Order
    reserved: Reserved
    score: Score
    ray_score: Score


@dataclass(frozen=True)
class Reply:
    """All orders filled, or none of them and the reason.

    ``foreign_gpus`` are those that other Ray users held when the node actor last looked.
    """

    filled: tuple[Filled, ...]
    refused: Refused | None
    foreign_gpus: tuple[int, ...]


class NodePlacementActor:
    """Pinned to one GPU node. Reservations are made one at a time; facts are served beside them.

    Args:
        node_id: the node, hex.
        gpu_count: GPUs that Ray has on the node.
        topology_name: catalogue entry of a simulated node; ``None`` reads NVML.
        probe: the Ray remote function that reports GPU ids from inside a bundle.
    """

    def __init__(self, node_id: str, gpu_count: int, topology_name: str | None, probe: Any) -> None:
        self._gpu_count = gpu_count
        self._reserver = NodeReserver(NodeGroups(node_id, probe), gpu_count)
        self._recorded = topologies.facts(topology_name) if topology_name else None
        self._reader = None if topology_name else Reader()

    @ray.method(concurrency_group="facts")
    def facts(self) -> NodeFacts:
        """What the node's GPUs report, one entry for each GPU that Ray has, in Ray's order.

        Never fails: without NVML the GPUs are there and nothing is known of them. A new reading is
        started for the next caller, so that memory use is recent.
        """
        facts = self._last_facts()
        if self._reader is not None and (facts.age_seconds is None or facts.age_seconds > 1.0):
            self._reader.refresh()
        return facts

    def adopt(self, holdings: Mapping[str, Holding]) -> None:
        """Notes what is reserved already, by order name: all that this service holds here."""
        self._reserver.adopt(holdings)

    def reserve(self, orders: Sequence[Order]) -> Reply:
        """Reserves all orders, each on the best GPUs that are free, or none of them."""
        machine = machine_of(self._last_facts(), self._gpu_count)
        topology = machine.topology
        filled: list[Filled] = []
        try:
            for to_follow, order in zip(reversed(range(len(orders))), orders, strict=True):
                outcome = self._reserver.reserve(order, machine, to_follow)
                if isinstance(outcome, Refused):
                    self._undo(filled)
                    return Reply((), outcome, tuple(sorted(self._reserver.foreign)))
                ours, rays = score(topology, outcome.gpus), score(topology, outcome.ray_gpus)
                filled.append(Filled(order, outcome, ours, rays))
        except BaseException:
            self._undo(filled)
            raise
        return Reply(tuple(filled), None, tuple(sorted(self._reserver.foreign)))

    def release(self, orders: Sequence[tuple[str, PlacementGroup]]) -> None:
        """Gives groups back. Harmless if they are gone already."""
        for name, group in orders:
            self._reserver.remove(name, group)

    def _last_facts(self) -> NodeFacts:
        if self._recorded is not None:
            return self._recorded
        assert self._reader is not None
        return in_ray_order(self._reader.facts(), self._gpu_count, os.environ.get("CUDA_VISIBLE_DEVICES"))

    def _undo(self, filled: Sequence[Filled]) -> None:
        self.release([(one.order.name, one.reserved.group) for one in filled])
