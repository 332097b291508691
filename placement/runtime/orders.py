"""The orders to a node's actor, and its answers; and what is known of its GPUs."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from placement.core.needs import WHOLE, Needs
from placement.core.node import UNKNOWN_PROFILE, Node
from placement.core.policy import Policy
from placement.core.replicas import PlannedReplica
from placement.core.topology import MeasuredRates, Topology
from placement.wire.deployment import Deployment
from placement.wire.facts import NodeFacts


@dataclass(frozen=True)
class GpuHardware:
    """The hardware of a node's GPUs.

    Attributes:
        topology: how they are linked.
        lost: GPUs on which nothing may be placed.
        instances: slot that is a MIG instance -> its profile; unknown for a lost GPU.
        gpu_memory_bytes: memory of one whole GPU; ``None`` if unknown.
        free_memory: GPU -> bytes that NVML reports as free.
        capability: the lowest compute capability; ``None`` if unknown.
        uuids: slot -> UUID of the GPU, or of the MIG instance, as far as it is known.
    """

    topology: Topology
    lost: frozenset[int] = frozenset()
    instances: Mapping[int, str] = field(default_factory=dict)
    gpu_memory_bytes: int | None = None
    free_memory: Mapping[int, int] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    uuids: Mapping[int, str] = field(default_factory=dict)

    def node(self, free: Iterable[int], rests: Mapping[int, int]) -> Node:
        """The machine as the planner sees it, with these GPUs free."""
        sound = frozenset(free) - self.lost
        return Node(
            "",
            "",
            topology=self.topology,
            free=sound - self.instances.keys(),
            rests={gpu: rest for gpu, rest in rests.items() if gpu not in self.lost},
            slots=self.instances,
            instances={slot: profile for slot, profile in self.instances.items() if slot in sound},
            gpu_memory_bytes=self.gpu_memory_bytes,
            free_memory=self.free_memory,
            uuids=self.uuids,
        )


def with_rates(hardware: GpuHardware, rates: MeasuredRates) -> GpuHardware:
    """The same hardware with measured rates, of itself or of others of its make."""
    if not rates:
        return hardware
    return replace(hardware, topology=_measured(hardware.topology, hardware.topology.model, rates))


@lru_cache(maxsize=1024)
def _measured(topology: Topology, model: str | None, rates: MeasuredRates) -> Topology:
    """The same object for equal machines, so that they share their tables; ``==`` ignores the model."""
    return replace(topology, measured=rates)


def hardware_of(facts: NodeFacts | None, gpu_count: int) -> GpuHardware:
    """The hardware from a node's facts; unknown without facts."""
    if facts is None or not facts.gpus:
        return GpuHardware(Topology.unknown(gpu_count))
    return GpuHardware(
        topology=facts.topology(),
        lost=facts.lost(),
        instances={**facts.slots, **dict.fromkeys(facts.lost(), UNKNOWN_PROFILE)},
        gpu_memory_bytes=facts.gpu_memory_bytes,
        free_memory={
            gpu.ordinal: gpu.memory_total_bytes - gpu.memory_used_bytes
            for gpu in facts.gpus
            if gpu.memory_total_bytes is not None and gpu.memory_used_bytes is not None
        },
        capability=facts.compute_capability,
        uuids=facts.uuids,
    )


@dataclass(frozen=True)
class Order:
    """One replica to reserve.

    Attributes:
        name: unique; begins the placement group's name.
        needs: what it needs of the GPUs.
        deployment: its name; replicas of one deployment avoid each other's GPUs if that costs nothing.
        beside: what each bundle also takes: ``{"CPU": 4, "memory": 8589934592}``.
        amounts: bundle -> GPUs that it has, or the share of one, where the caller laid out bundles with shares.
        planned: for a share, the GPU that was planned; ``None`` leaves the choice to the node.
        measured: the rates with which it was planned, which the node's actor uses, too.
    """

    name: str
    needs: Needs
    deployment: str = ""
    beside: Mapping[str, float] = field(default_factory=dict)
    planned: int | None = None
    measured: MeasuredRates = ()
    amounts: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Holding:
    """What a replica that stands holds.

    Attributes:
        taken: GPU -> thousandths of it.
        group: its placement group, where its owner may remove that and it is known.
    """

    deployment: str
    taken: Mapping[int, int]
    group: Any = None

    @classmethod
    def whole(cls, deployment: str, gpus: Iterable[int], group: Any = None) -> Holding:
        """Whole GPUs."""
        return cls(deployment, dict.fromkeys(gpus, WHOLE), group)


@dataclass(frozen=True)
class Reserved:
    """A group that holds exactly ``gpus``: ``bundles[i]`` holds ``share`` thousandths of ``gpus[i]``.

    ``free``: the GPUs that were free before.
    """

    group: Any
    gpus: tuple[int, ...]
    bundles: tuple[int, ...]
    free: frozenset[int]
    attempts: int
    share: int = WHOLE


@dataclass(frozen=True)
class Prepared:
    """Disjoint sets of GPUs that Ray gives next while the ``fillers`` stay: ``share`` thousandths of each.

    With what Ray alone would have given, and the GPUs that other Ray users held. ``taken``: GPU -> thousandths of it,
    for whole GPUs and shares that are reserved at once; ``sets`` is then the set of those that are whole.
    """

    sets: tuple[tuple[int, ...], ...]
    ray_gpus: tuple[int, ...]
    fillers: tuple[Any, ...]
    attempts: int
    foreign_gpus: tuple[int, ...] = ()
    share: int = WHOLE
    taken: Mapping[int, int] = field(default_factory=dict)

    def bundle(self, beside: Mapping[str, float]) -> dict[str, float]:
        """What each bundle takes: one GPU, as vLLM needs it, or the share of it, and ``beside``."""
        return {"GPU": self.share / WHOLE if self.share < WHOLE else 1.0, **beside}


@dataclass(frozen=True)
class Steering:
    """The result of a steering test: the wanted GPU and the one that Ray gave; ``None`` if Ray gave none.

    ``free`` GPUs were free; with only one there was nothing to steer past.
    """

    wanted: int | None
    got: int | None
    free: int
    attempts: int


@dataclass(frozen=True)
class Refused:
    """The node refused, and nothing is held. ``full``: too few GPUs were free, rather than too much interference.

    ``at_most``: how many are free, if known. ``foreign_gpus``: the GPUs that other Ray users held, if known.
    """

    reason: str
    attempts: int
    full: bool
    at_most: int | None = None
    foreign_gpus: tuple[int, ...] | None = None

    def at(self, node_id: str, node_name: str, at_most: int | None = None) -> Refusal:
        """The same for a node; with ``at_most`` if nothing better is known."""
        at_most = at_most if self.at_most is None else self.at_most
        return Refusal(node_id, node_name, self.attempts, self.reason, self.full, at_most)


@dataclass(frozen=True)
class Refusal:
    """A node that did not reserve what was planned. ``full``: it has too few GPUs free, ``at_most`` this many."""

    node_id: str
    node_name: str
    attempts: int
    reason: str
    full: bool = False
    at_most: int | None = None


def order_of(
    name: str,
    deployment: Deployment,
    set_size: int | None = None,
    planned: PlannedReplica | None = None,
    measured: MeasuredRates = (),
) -> Order:
    """The order for one replica; or for one set of ``set_size`` GPUs of it, if given."""
    beside: dict[str, float] = {}
    if deployment.cpu_milli_per_gpu:
        beside["CPU"] = deployment.cpu_milli_per_gpu / 1000
    if deployment.memory_bytes_per_gpu:
        beside["memory"] = deployment.memory_bytes_per_gpu
    needs = deployment.needs if set_size is None else deployment.needs._replace(gpus=set_size)
    if planned is not None and deployment.group is not None:
        # The places of the group's other members depend on it.
        needs = needs._replace(named=planned.gpus)
    exact = deployment.policy is Policy.FRAGMENTATION and planned is not None and planned.share < WHOLE
    return Order(
        name,
        needs,
        deployment.name,
        beside,
        planned.gpus[0] if planned and exact else None,
        measured,
    )


def own_name(known_as: str) -> str:
    """A unique name for a deployment that belongs to its caller."""
    return f"{known_as}-{secrets.token_hex(4)}"


def without_suffix(own_name: str) -> str:
    """The name of such a deployment without its suffix."""
    return re.sub(r"-[0-9a-f]{8}$", "", own_name)


def order_name(prefix: str, deployment: str, replica_index: int) -> str:
    """A new name for the order of a replica. The names of its groups begin with it.

    ``prefix`` is ``placement:token:``.
    """
    return f"{prefix}{deployment}:{replica_index}:{secrets.token_hex(4)}"


def order_of_group(group_name: str) -> str:
    """The name of a group's order: ``placement:token:deployment:replica:random``, and no more."""
    return ":".join(group_name.split(":")[:5])


def deployment_of(order: str) -> str:
    """The deployment that an order belongs to."""
    return order.split(":")[2]
