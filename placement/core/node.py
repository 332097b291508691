"""One node: what it has, what is free, what it offers to a request, and how it changes when something is taken."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from placement.core.needs import ANY_PROFILE, WHOLE, GpuName, Needs
from placement.core.shape import Offer, Shape, shape_of
from placement.core.shares import OPENED, Portions, give, opening
from placement.core.tables import LEFTOVER_SIZES
from placement.core.topology import Topology

UNKNOWN_PROFILE = "?"
"""The profile of a slot that cannot be identified: an unknown MIG instance, a lost GPU. Nothing is placed on it."""

UNIT = 10_000
"""Ray counts resources in ten-thousandths (``FixedPoint`` in Ray's ``fixed_point.h``)."""

_PLENTY = 1 << 62
"""More than any node has."""

_SHARED_ALREADY = (-1,) * len(LEFTOVER_SIZES)
"""The cost to others of a share on a GPU that is shared already: less than that of any whole GPU."""


class Choice(NamedTuple):
    """GPUs of a node for one replica: whole ones, one MIG instance, a share of one GPU, or shares of several.

    Attributes:
        share: thousandths of each.
        rest: thousandths that stay free on those that are shared.
        shares: thousandths of each, if they differ; else empty.
    """

    gpus: tuple[int, ...]
    share: int
    rest: int
    shares: tuple[int, ...] = ()


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        id: Ray's node id, hex.
        name: its name for users (Ray's node name, else its address).
        topology: its GPUs; no GPUs on a pure egress node.
        free: GPU ordinals that count as free. Exact unless other Ray users hold GPUs here; the node actor
            finds out when it reserves.
        egress: resource name (``egress`` or ``egress_<provider>``) -> concurrent requests still free.
        serving: (provider, key fingerprint) -> how many remote replicas that call it are here.
        problem: why nothing may be placed here; ``None`` if it may.
        rests: GPU -> thousandths still free, for the GPUs that are shared.
        instances: slots that are free MIG instances -> profile; none of them is in ``free``.
        slots: the same for all MIG instances, free or not.
        gpu_memory_bytes: memory of one GPU, the smallest if they differ; ``None`` if unknown.
        free_memory: GPU -> bytes that NVML reports as free, if known.
        cpu_milli, memory_bytes: CPUs (thousandths) and memory not yet reserved.
        labels: Ray's node labels.
        accelerators: names of its GPUs: Ray's accelerator type (``"H100"``), words of the product name.
        compute_capability: the lowest of its GPUs; ``None`` if unknown.
        deployments: name -> how many replicas of it, or parts of one, are here.
        uuids: slot -> UUID of the GPU, or of the MIG instance, as far as it is known.
        resources: Ray's custom resource -> free amount in Ray's accounting, in units of :data:`UNIT`.
        holders: GPU -> the deployments that hold all or some of it, one entry per replica, sorted.
    """

    id: str
    name: str
    address: str = ""
    topology: Topology = field(default_factory=lambda: Topology.unknown(0))
    free: frozenset[int] = frozenset()
    egress: Mapping[str, int] = field(default_factory=dict)
    serving: Mapping[tuple[str, str], int] = field(default_factory=dict)
    problem: str | None = None
    rests: Mapping[int, int] = field(default_factory=dict)
    instances: Mapping[int, str] = field(default_factory=dict)
    slots: Mapping[int, str] = field(default_factory=dict)
    gpu_memory_bytes: int | None = None
    free_memory: Mapping[int, int] = field(default_factory=dict)
    cpu_milli: int = 0
    memory_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerators: frozenset[str] = frozenset()
    compute_capability: tuple[int, int] | None = None
    deployments: Mapping[str, int] = field(default_factory=dict)
    uuids: Mapping[int, str] = field(default_factory=dict)
    holders: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    resources: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def shape(self) -> Shape:
        """The tables of its machine, shared by all nodes like it."""
        return shape_of(self.topology)

    @cached_property
    def mask(self) -> int:
        """The free GPUs as a bit mask."""
        return sum(1 << gpu for gpu in self.free)

    @property
    def replicas(self) -> int:
        """How many replicas are here, of all deployments."""
        return sum(self.deployments.values())

    @property
    def held(self) -> frozenset[int]:
        """The slots that are held, wholly or in part. Lost slots are not counted."""
        usable = {slot for slot in range(len(self.topology)) if self.slots.get(slot) != UNKNOWN_PROFILE}
        return frozenset(usable - self.free - self.instances.keys())

    def named(self, name: str) -> bool:
        """Whether ``name`` is this node's id, name or address."""
        return name in (self.id, self.name, self.address)

    @property
    def whole_gpus(self) -> int:
        """How many GPUs it has that have no MIG instances and are not lost, free or not."""
        return len(self.topology) - len(self.slots)

    @property
    def free_slots(self) -> int:
        """How many whole GPUs and MIG instances are wholly free."""
        return len(self.free) + sum(profile != UNKNOWN_PROFILE for profile in self.instances.values())

    @property
    def profiles(self) -> frozenset[str]:
        """The profiles of its MIG instances, as far as they are known."""
        return frozenset(self.slots.values()) - {UNKNOWN_PROFILE}

    @cached_property
    def _slots_by_uuid(self) -> Mapping[str, int]:
        return {uuid: slot for slot, uuid in self.uuids.items()}

    def slot_of(self, name: GpuName) -> int | None:
        """The slot of a named GPU; ``None`` if the node has no such slot, or its UUID is unknown."""
        if isinstance(name, int):
            return name if name < len(self.topology) else None
        return self._slots_by_uuid.get(name)

    def named_mask(self, needs: Needs) -> int:
        """The GPUs that are named, as a bit mask; all, if none are."""
        if not needs.named:
            return -1
        slots = {self.slot_of(name) for name in needs.named} - {None}
        return sum(1 << slot for slot in slots if slot is not None)

    def only_named(self, needs: Needs) -> Node:
        """The node reduced to what is free of the GPUs that are named; itself, if none are."""
        if not needs.named:
            return self
        mask = self.named_mask(needs)
        return replace(
            self,
            free=frozenset(gpu for gpu in self.free if mask >> gpu & 1),
            rests={gpu: rest for gpu, rest in self.rests.items() if mask >> gpu & 1},
            instances={slot: profile for slot, profile in self.instances.items() if mask >> slot & 1},
        )

    def best(self, needs: Needs) -> tuple[int, ...] | None:
        """The best free GPUs for a replica, whatever the floor on bandwidth."""
        taken = self.choose(needs)
        return None if taken is None else taken.gpus

    def free_mask(self, needs: Needs) -> int:
        """The wholly free GPUs that meet the limits on names and free memory, as a bit mask."""
        mask = self.mask & self.named_mask(needs)
        if not needs.free_memory_bytes:
            return mask
        least = needs.free_memory_bytes
        return sum(1 << gpu for gpu in self.free if mask >> gpu & 1 and self.free_memory.get(gpu, 0) >= least)

    def meets(self, needs: Needs, slot: int) -> bool:
        """Whether a GPU or MIG instance meets the limits on names and free memory."""
        named = self.named_mask(needs) >> slot & 1
        return bool(named) and self.free_memory.get(slot, 0) >= needs.free_memory_bytes

    def shared_with_room(self, needs: Needs, share: int) -> list[tuple[int, int]]:
        """The GPUs that are shared already and have enough left, as (thousandths left, GPU)."""
        return [(rest, gpu) for gpu, rest in self.rests.items() if rest >= share and self.meets(needs, gpu)]

    def instances_for(self, needs: Needs) -> list[int]:
        """The free MIG instances of the profile that have enough free memory."""
        return [
            slot
            for slot, profile in self.instances.items()
            if (profile == needs.profile or (needs.profile == ANY_PROFILE and profile != UNKNOWN_PROFILE))
            and self.meets(needs, slot)
        ]

    def choose(self, needs: Needs, crowded: Collection[int] = ()) -> Choice | None:
        """The best GPUs that are free for a replica; ``None`` if there are none (floors on bandwidth aside).

        Fractions fill the fullest shared GPU that still fits; only if there is none, a whole one, the one whose loss
        costs others least. ``crowded`` GPUs are avoided where that costs nothing.
        """
        if not needs.any:
            return Choice((), WHOLE, 0)
        if needs.amounts:
            portions = self.portions(needs)
            return None if portions is None else self._choice(portions)
        if needs.profile:
            slots = self.instances_for(needs)
            return Choice((min(slots),), WHOLE, 0) if slots else None
        share = needs.share_of(self.gpu_memory_bytes)
        if share is None:
            return None
        if share < WHOLE:
            fitting = [(rest, gpu in crowded, gpu) for rest, gpu in self.shared_with_room(needs, share)]
            if fitting:
                rest, _, gpu = min(fitting)
                return Choice((gpu,), share, rest - share)
        gpus = self.shape.best(self.free_mask(needs), needs.gpus, needs.within)
        return None if gpus is None else Choice(gpus, share, WHOLE - share)

    def portions(self, needs: Needs) -> Portions | None:
        """The best GPUs that are free for :attr:`~placement.core.needs.Needs.amounts`; ``None`` if there are none.

        Shares go to GPUs that are shared already, as far as they find room there. The whole GPUs are the fastest set
        that Ray's order allows; then the GPUs that are taken are those whose loss costs others least.
        """
        rests = {gpu: rest for rest, gpu in self.shared_with_room(needs, min(needs.amounts))}
        mask = self.free_mask(needs)
        if sum(needs.amounts) > WHOLE * mask.bit_count() + sum(rests.values()):
            return None
        count, order = opening(needs.amounts, rests)
        pool = self.shape.mixed(mask, order, needs.within)
        if pool is None:
            return None
        left = mask & ~sum(1 << gpu for gpu in pool)
        opened = self.shape.best(left, count) if count else ()
        if opened is None:
            return None
        given = give(needs.amounts, {**rests, **dict.fromkeys(opened, OPENED)}, pool)
        return None if given is None else Portions(needs.amounts, pool, opened, given)

    def _choice(self, portions: Portions) -> Choice:
        taken = portions.taken
        rest = sum(self.rests.get(gpu, WHOLE) - share for gpu, share in taken.items())
        return Choice((*taken,), WHOLE, rest, (*taken.values(),))

    def choice_of(self, needs: Needs, gpus: tuple[int, ...]) -> Choice | None:
        """The same of just these GPUs, however good they are; ``None`` if they are not free for it."""
        if needs.profile:
            return Choice(gpus, WHOLE, 0) if {*gpus} <= {*self.instances_for(needs)} else None
        share = needs.share_of(self.gpu_memory_bytes)
        rest = min(WHOLE if gpu in self.free else self.rests.get(gpu, 0) for gpu in gpus)
        return None if share is None or rest < share else Choice(gpus, share, rest - share)

    def offer(self, needs: Needs) -> Offer | None:
        """How good the choice of :meth:`choose` is, and what it costs others."""
        if needs.whole:
            return self._offer_whole(needs, needs.gpus)
        if needs.amounts:
            return self._offer_portions(needs)
        taken = self.choose(needs)
        if taken is None:
            return None
        if needs.profile:
            return Offer(0, (), 0, len(self.instances))
        if taken.gpus[0] in self.rests:
            return Offer(0, _SHARED_ALREADY, taken.rest, len(self.free))
        whole = self._offer_whole(needs, 1)
        return None if whole is None else whole._replace(rest=taken.rest)

    def _offer_portions(self, needs: Needs) -> Offer | None:
        portions = self.portions(needs)
        if portions is None:
            return None
        speed = self.shape.mb_per_s(portions.whole) if needs.gpus > 1 else 0
        free = (*portions.pool, *portions.opened)
        loss = self.shape.loss(self.mask, free) if free else _SHARED_ALREADY
        return Offer(-speed, loss, self._choice(portions).rest, len(self.free))

    def _offer_whole(self, needs: Needs, count: int) -> Offer | None:
        mask = self.free_mask(needs)
        offer = self.shape.offer(mask, count, needs.within)
        if offer is None or not needs.named:
            return offer
        # What it costs others depends on what else is free here.
        gpus = self.shape.best(mask, count, needs.within)
        return offer._replace(loss=self.shape.loss(self.mask, gpus or ()), free=len(self.free))

    def copies(self, needs: Needs) -> int:
        """How many times its free GPUs meet ``needs`` at the same time."""
        if needs.profile:
            return len(self.instances_for(needs))
        if needs.amounts:  # a placement group, of which there is one
            return int(self.portions(needs) is not None)
        share = needs.share_of(self.gpu_memory_bytes)
        if share is None:
            return 0
        mask = self.free_mask(needs)
        if share < WHOLE:
            fitting = sum(rest // share for rest, _ in self.shared_with_room(needs, share))
            return fitting + mask.bit_count() * (WHOLE // share)
        return len(self.shape.packed(mask, needs)) if needs.floor else mask.bit_count() // needs.gpus

    def emptied(self) -> Node:
        """The node as if nothing were placed on it; the CPUs and memory that this would free are unknown."""
        held = self.held
        if not held:
            return self
        whole = frozenset(range(len(self.topology))) - self.slots.keys()
        instances = {slot: profile for slot, profile in self.slots.items() if profile != UNKNOWN_PROFILE}
        memory = {**self.free_memory, **dict.fromkeys(held, self.gpu_memory_bytes or _PLENTY)}
        return replace(
            self,
            free=whole,
            rests={},
            instances=instances,
            free_memory=memory,
            cpu_milli=_PLENTY,
            memory_bytes=_PLENTY,
            holders={},
        )

    def after(self, taken: Choice, **fields: Any) -> Node:
        """The node once that has been taken, and with other ``fields`` changed, too."""
        if not taken.gpus:
            return replace(self, **fields) if fields else self
        if taken.shares:
            amounts = dict(zip(taken.gpus, taken.shares, strict=True))
            left = {
                gpu: self.rests.get(gpu, WHOLE) - share for gpu, share in amounts.items() if share < WHOLE
            }
            return replace(
                self, free=self.free.difference(taken.gpus), rests={**self.rests, **left}, **fields
            )
        if not self.free.isdisjoint(taken.gpus) and taken.share == WHOLE:
            return replace(self, free=self.free.difference(taken.gpus), **fields)
        [gpu] = taken.gpus
        if gpu in self.instances:
            return replace(self, instances={g: p for g, p in self.instances.items() if g != gpu}, **fields)
        return replace(self, free=self.free - {gpu}, rests={**self.rests, gpu: taken.rest}, **fields)

    def before(self, taken: Mapping[int, int], profile: str) -> Node:
        """The node once that has been given back. Slots that were lost since do not become free.

        Args:
            taken: GPU, or slot of a MIG instance -> thousandths.
            profile: of the MIG instance; empty for GPUs.
        """
        taken = {gpu: share for gpu, share in taken.items() if self.slots.get(gpu) != UNKNOWN_PROFILE}
        if not taken:
            return self
        if profile:
            return replace(self, instances={**self.instances, **dict.fromkeys(taken, profile)})
        rests = {**self.rests, **{gpu: self.rests.get(gpu, 0) + share for gpu, share in taken.items()}}
        whole = [gpu for gpu in taken if rests[gpu] >= WHOLE]
        rests = {gpu: rest for gpu, rest in rests.items() if gpu not in whole}
        return replace(self, free=self.free.union(whole), rests=rests)

    def holders_with(self, deployment: str, gpus: Iterable[int]) -> Mapping[int, tuple[str, ...]]:
        """:attr:`holders` once a replica of a deployment has these GPUs, too, or some of them."""
        return {**self.holders, **{gpu: (*sorted((*self.holders.get(gpu, ()), deployment)),) for gpu in gpus}}

    def holders_without(self, deployment: str, gpus: Iterable[int]) -> Mapping[int, tuple[str, ...]]:
        """The same once a replica of a deployment has given them back."""
        left = dict(self.holders)
        for gpu in gpus:
            names = [*left.pop(gpu, ())]
            if deployment in names:
                names.remove(deployment)
            if names:
                left[gpu] = tuple(names)
        return left

    def occupied(self, replicas: int, deployment: str, serving: tuple[str, str] | None = None) -> Node:
        """The node with more, or fewer, replicas of a deployment; ``serving`` is what remote ones call."""
        changed = copy(self)  # results computed for its GPUs are kept, as the GPUs do not change
        vars(changed)["deployments"] = _plus(self.deployments, deployment, replicas)
        if serving is not None:
            vars(changed)["serving"] = _plus(self.serving, serving, replicas)
        return changed

    def egress_for(self, provider: str) -> dict[str, int]:
        """The egress resources for ``provider`` here, and how much is free: its own before the general one."""
        return {r: self.egress[r] for r in (f"egress_{provider}", "egress") if r in self.egress}

    def egress_resource(self, provider: str, units: int = 0) -> str | None:
        """The egress resource from which a replica takes its units here; ``None`` if none has enough free."""
        return next((r for r, left in self.egress_for(provider).items() if left >= units), None)


K = TypeVar("K")


def _plus(counts: Mapping[K, int], key: K, more: int) -> Mapping[K, int]:
    """The counts with one changed; zero counts are left out."""
    changed = {**counts, key: counts.get(key, 0) + more}
    return {key: count for key, count in changed.items() if count > 0}
