"""What the cluster has and holds at one moment. Immutable; a plan is a function of it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress, groupby
from operator import is_not, itemgetter
from typing import Any, NamedTuple, Protocol, TypeVar

from placement.core.mix import Kind, Mix
from placement.core.needs import ANY_PROFILE, WHOLE, GpuName, Needs
from placement.core.policy import Policy, Rank
from placement.core.shape import Offer, Shape, shape_of
from placement.core.tables import LEFTOVER_SIZES
from placement.core.topology import Topology


class Choice(NamedTuple):
    """GPUs of a node for one replica: whole ones, one MIG instance, or a share of one GPU.

    Attributes:
        share: thousandths of each.
        rest: thousandths that stay free on it.
    """

    gpus: tuple[int, ...]
    share: int
    rest: int


UNKNOWN_PROFILE = "?"
"""Of a slot that cannot be identified: a MIG instance of unknown size, a GPU that is lost. Nothing is placed on it."""

GPU_DOMAIN_LABEL = "ray.io/gpu-domain"
"""Nodes with one value of this label share an NVLink fabric (an NVL72 rack). Ray's own name for it."""

NEAR_LABELS = ("ray.io/availability-region", "ray.io/availability-zone", "block", "rack", GPU_DOMAIN_LABEL)
"""What makes nodes near each other unless the operator says otherwise, widest first."""

UNIT = 10_000
"""Ray counts resources in ten-thousandths (``FixedPoint`` in Ray's ``fixed_point.h``)."""

_PLENTY = 1 << 62
"""More than there is of anything."""

_SHARED_ALREADY = (-1,) * len(LEFTOVER_SIZES)
"""What a share of a GPU that is shared already costs others: less than a whole GPU ever does."""

MOST_KINDS = 256
"""Of so many kinds of requests it is remembered which nodes are how welcome to them."""

Bits = int
"""A set of nodes: bit *i* is the *i*-th node by name and id. Thousands of nodes are compared in one operation."""


@dataclass(frozen=True)
class Node:
    """One node.

    Attributes:
        id: Ray's node id, hex.
        name: what people call it (Ray's node name, else its address).
        topology: its GPUs; no GPUs on a pure egress node.
        free: GPU ordinals believed free. Exact unless other Ray users hold GPUs here; the node actor
            finds out when it reserves.
        egress: resource name (``egress`` or ``egress_<provider>``) -> concurrent requests still free.
        serving: (provider, key fingerprint) -> how many remote replicas that call it sit here.
        problem: why nothing may be placed here, if so.
        rests: GPU -> thousandths still free, of the GPUs that this service shares out.
        instances: slots that are free MIG instances -> profile; none of them is in ``free``.
        slots: the same of all MIG instances, free or not.
        gpu_memory_bytes: memory of one GPU, the smallest if they differ; ``None`` if unknown.
        free_memory: GPU -> bytes that NVML shows as free, where it does.
        cpu_milli, memory_bytes: CPUs (thousandths) and memory not yet reserved.
        labels: Ray's node labels.
        accelerators: names its GPUs go by: Ray's accelerator type (``"H100"``), words of the product name.
        compute_capability: the lowest of its GPUs; ``None`` if unknown.
        deployments: name -> how many replicas of it, or parts of one, are here.
        uuids: slot -> UUID of the GPU, or of the MIG instance, as far as it is known.
        resources: custom resource of Ray's -> free amount in Ray's books, in units of :data:`UNIT`.
        holders: GPU -> the deployments that hold all or some of it, one for each replica that does, sorted.
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
        """The slots of which somebody holds all or a part. A lost one is nobody's."""
        usable = {slot for slot in range(len(self.topology)) if self.slots.get(slot) != UNKNOWN_PROFILE}
        return frozenset(usable - self.free - self.instances.keys())

    def named(self, name: str) -> bool:
        """Whether ``name`` is this node's id, name or address."""
        return name in (self.id, self.name, self.address)

    @property
    def whole_gpus(self) -> int:
        """How many GPUs it has that are neither cut up into MIG instances nor lost, free or not."""
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
        """The slot that somebody names; ``None`` if the node has none such, or nobody knows it by that."""
        if isinstance(name, int):
            return name if name < len(self.topology) else None
        return self._slots_by_uuid.get(name)

    def named_mask(self, needs: Needs) -> int:
        """The GPUs that are named, as a bit mask; all, if none are."""
        if not needs.named:
            return -1
        slots = {self.slot_of(name) for name in needs.named} - {None}
        return sum(1 << slot for slot in slots if slot is not None)

    def best(self, needs: Needs) -> tuple[int, ...] | None:
        """The best free GPUs for a replica, whatever the floor on bandwidth."""
        taken = self.choose(needs)
        return None if taken is None else taken.gpus

    def free_mask(self, needs: Needs) -> int:
        """The wholly free GPUs that will do, by their name and by how much free memory they have, as a bit mask."""
        mask = self.mask & self.named_mask(needs)
        if not needs.free_memory_bytes:
            return mask
        least = needs.free_memory_bytes
        return sum(1 << gpu for gpu in self.free if mask >> gpu & 1 and self.free_memory.get(gpu, 0) >= least)

    def shared_with_room(self, needs: Needs, share: int) -> list[tuple[int, int]]:
        """The GPUs that are shared already and have so many thousandths left, as (thousandths left, GPU)."""
        named = self.named_mask(needs)
        return [
            (rest, gpu)
            for gpu, rest in self.rests.items()
            if rest >= share and named >> gpu & 1 and self.free_memory.get(gpu, 0) >= needs.free_memory_bytes
        ]

    def instances_for(self, needs: Needs) -> list[int]:
        """The free MIG instances of the profile that have as much free memory as is needed."""
        named = self.named_mask(needs)
        return [
            slot
            for slot, profile in self.instances.items()
            if (profile == needs.profile or (needs.profile == ANY_PROFILE and profile != UNKNOWN_PROFILE))
            and named >> slot & 1
            and self.free_memory.get(slot, 0) >= needs.free_memory_bytes
        ]

    def choose(self, needs: Needs, crowded: Collection[int] = ()) -> Choice | None:
        """The best GPUs that are free for a replica; ``None`` if there are none (floors on bandwidth aside).

        A share goes on the GPU that is shared already and on which it leaves the least; only if there is none
        on a whole one, the one that others miss least. ``crowded`` GPUs are avoided where that costs nothing.
        """
        if not needs.gpus:
            return Choice((), WHOLE, 0)
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

    def offer(self, needs: Needs) -> Offer | None:
        """How good what :meth:`choose` gives is, and what taking it costs the others."""
        if needs.whole:
            return self._offer_whole(needs, needs.gpus)
        taken = self.choose(needs)
        if taken is None:
            return None
        if needs.profile:
            return Offer(0, (), 0, len(self.instances))
        if taken.gpus[0] in self.rests:
            return Offer(0, _SHARED_ALREADY, taken.rest, len(self.free))
        whole = self._offer_whole(needs, 1)
        return None if whole is None else whole._replace(rest=taken.rest)

    def _offer_whole(self, needs: Needs, count: int) -> Offer | None:
        mask = self.free_mask(needs)
        offer = self.shape.offer(mask, count, needs.within)
        if offer is None or not needs.named:
            return offer
        gpus = self.shape.best(mask, count, needs.within)  # to others it matters what else is free here
        return offer._replace(loss=self.shape.loss(self.mask, gpus or ()), free=len(self.free))

    def copies(self, needs: Needs) -> int:
        """How often ``needs`` are met by its free GPUs, all at once."""
        if needs.profile:
            return len(self.instances_for(needs))
        share = needs.share_of(self.gpu_memory_bytes)
        if share is None:
            return 0
        mask = self.free_mask(needs)
        if share < WHOLE:
            fitting = sum(rest // share for rest, _ in self.shared_with_room(needs, share))
            return fitting + mask.bit_count() * (WHOLE // share)
        return len(self.shape.packed(mask, needs)) if needs.floor else mask.bit_count() // needs.gpus

    def emptied(self) -> Node:
        """The node as it would be if all that is placed on it went; how much CPU and memory that frees is not known."""
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
        if not self.free.isdisjoint(taken.gpus) and taken.share == WHOLE:
            return replace(self, free=self.free.difference(taken.gpus), **fields)
        [gpu] = taken.gpus
        if gpu in self.instances:
            return replace(self, instances={g: p for g, p in self.instances.items() if g != gpu}, **fields)
        return replace(self, free=self.free - {gpu}, rests={**self.rests, gpu: taken.rest}, **fields)

    def before(self, gpus: Collection[int], share: int, profile: str) -> Node:
        """The node once that has been given back. What has been lost since is of no use."""
        gpus = [gpu for gpu in gpus if self.slots.get(gpu) != UNKNOWN_PROFILE]
        if not gpus:
            return self
        if profile:
            return replace(self, instances={**self.instances, **dict.fromkeys(gpus, profile)})
        if share == WHOLE:
            return replace(self, free=self.free.union(gpus))
        [gpu] = gpus
        rest = self.rests.get(gpu, 0) + share
        others = {g: r for g, r in self.rests.items() if g != gpu}
        if rest >= WHOLE:
            return replace(self, free=self.free | {gpu}, rests=others)
        return replace(self, rests={**others, gpu: rest})

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
        """The node with so many replicas of a deployment more, or fewer; ``serving`` is what remote ones call."""
        changed = copy(self)  # with what has been worked out of its GPUs, which stay as they are
        vars(changed)["deployments"] = _plus(self.deployments, deployment, replicas)
        if serving is not None:
            vars(changed)["serving"] = _plus(self.serving, serving, replicas)
        return changed

    def egress_for(self, provider: str) -> dict[str, int]:
        """What a replica calling ``provider`` may take here, and how much is free: its own before the general one."""
        return {r: self.egress[r] for r in (f"egress_{provider}", "egress") if r in self.egress}

    def egress_resource(self, provider: str, units: int = 0) -> str | None:
        """The resource that a replica of so many units takes here; ``None`` if none has them free."""
        return next((r for r, left in self.egress_for(provider).items() if left >= units), None)


K = TypeVar("K")


def _plus(counts: Mapping[K, int], key: K, more: int) -> Mapping[K, int]:
    """The counts with one changed; what there is none of is left out."""
    changed = {**counts, key: counts.get(key, 0) + more}
    return {key: count for key, count in changed.items() if count > 0}


class Offers:
    """Which nodes are how welcome to one kind of request: rank -> nodes, the best rank first."""

    def __init__(self, nodes: dict[Rank, Bits]) -> None:
        self._nodes = nodes
        self._best_first = sorted(nodes)

    def copy(self) -> Offers:
        """The same, to be changed on its own."""
        return Offers(dict(self._nodes))

    def move(self, node: Bits, old: Rank | None, new: Rank | None) -> None:
        """Notes that one node's rank has changed; ``None`` is "has no room"."""
        if old == new:
            return
        if old is not None:
            left = self._nodes[old] & ~node
            if left:
                self._nodes[old] = left
            else:
                del self._nodes[old]
                self._best_first.remove(old)
        if new is not None:
            if new not in self._nodes:
                insort(self._best_first, new)
            self._nodes[new] = self._nodes.get(new, 0) | node

    def best(self, preference: Iterable[Bits]) -> Bits:
        """The one node to take; none if no node of ``preference`` has room.

        The first half of the rank counts first. Among the nodes that are equal in it, those in the first of
        the ``preference`` sets (disjoint, most wanted first) that holds any; among these the second half;
        then the order of nodes.
        """
        sets = list(preference)
        for _, equals in groupby(self._best_first, key=itemgetter(0)):
            ranks = list(equals)
            for wanted in sets:
                for rank in ranks:
                    found = self._nodes[rank] & wanted
                    if found:
                        return found & -found
        return 0


class Follower(Protocol):
    """What is worked out of all nodes, and kept up to date: :class:`placement.core.room.Room`."""

    def update(self, bit: Bits, node: Node) -> None:
        """Notes that a node has changed."""


class Snapshot:
    """All nodes that are alive.

    Args:
        nodes: in any order; :attr:`nodes` has them by name and id.
        near: labels of which nodes that are near each other share the values, widest first.
        mix: what is asked for on this cluster, as far as it is known.

    Attributes:
        room: what there is room for, once it has been worked out; handed on to what it changes into.
        open_to: kind of request -> the nodes that it may go to, as far as somebody asked.

    One that is kept and shared by threads is planned with in copies (:meth:`copy`), and followed (:meth:`followed`).
    """

    def __init__(
        self, nodes: Iterable[Node], near: Sequence[str] = NEAR_LABELS, mix: Mix | None = None
    ) -> None:
        self.near = tuple(near)
        self.mix = mix or Mix()
        self.room: Follower | None = None
        self.open_to: dict[Kind, Bits] = {}
        self.nodes: tuple[Node, ...] = tuple(sorted(nodes, key=lambda node: (node.name, node.id)))
        self._offers: dict[tuple[Needs, Policy], Offers] = {}
        self._earlier: dict[tuple[Needs, Policy], tuple[Offers, tuple[Node, ...]]] = {}
        self._origin: Snapshot | None = None

    @cached_property
    def _position(self) -> dict[str, int]:
        if self._origin is not None:
            return self._origin._position
        return {node.id: i for i, node in enumerate(self.nodes)}

    @cached_property
    def usable(self) -> Bits:
        """The nodes that have GPUs, and no problem."""
        return self.select(filter(_is_usable, self.nodes))

    def domains(self, label: str) -> dict[str, Bits]:
        """The nodes by their value of a label; those without it are left out."""
        members: dict[str, list[Node]] = {}
        for node in self.nodes:
            if label in node.labels:
                members.setdefault(node.labels[label], []).append(node)
        return {value: self.select(nodes) for value, nodes in sorted(members.items())}

    @cached_property
    def regions(self) -> list[tuple[int, Bits]]:
        """Sets of nodes that are near each other, as (level, nodes); the narrowest level, 0, first.

        The last one is the whole cluster.
        """
        if self._origin is not None:
            return self._origin.regions
        found: dict[Bits, int] = {self.select(self.nodes): len(self.near)}
        for labels in range(1, len(self.near) + 1):
            named = self.near[:labels]
            members: dict[tuple[str | None, ...], list[Node]] = {}
            for node in self.nodes:
                if named[-1] in node.labels:
                    members.setdefault(tuple(map(node.labels.get, named)), []).append(node)
            for nodes in members.values():
                found[self.select(nodes)] = len(self.near) - labels
        return sorted((level, bits) for bits, level in found.items())

    @cached_property
    def _by_name(self) -> dict[str, Bits]:
        if self._origin is not None:
            return self._origin._by_name
        found: dict[str, Bits] = {}
        for i, node in enumerate(self.nodes):
            for name in {node.id, node.name, node.address}:
                found[name] = found.get(name, 0) | 1 << i
        return found

    def node(self, node_id: str) -> Node:
        """The node of that id.

        Raises:
            KeyError: there is none.
        """
        return self.nodes[self._position[node_id]]

    def bit(self, node_id: str) -> Bits:
        """The set of just the node of that id; empty if there is none."""
        position = self._position.get(node_id)
        return 0 if position is None else 1 << position

    def at(self, bit: Bits) -> Node:
        """The one node of a set."""
        return self.nodes[bit.bit_length() - 1]

    def select(self, nodes: Iterable[Node]) -> Bits:
        """Some of the nodes, as a set."""
        marks = bytearray(len(self.nodes) // 8 + 1)
        for node in nodes:
            position = self._position[node.id]
            marks[position >> 3] |= 1 << (position & 7)
        return int.from_bytes(marks, "little")

    def named(self, names: Iterable[str]) -> Bits:
        """The nodes that have one of these ids, names or addresses."""
        found = 0
        for name in names:
            found |= self._by_name.get(name, 0)
        return found

    def offers(self, needs: Needs, policy: Policy) -> Offers:
        """How welcome every usable node is to a request. Not to be changed.

        What is known of the snapshot that this one comes from is brought up to date, rather than asked of every node.
        """
        key = (needs, policy)
        known = self._offers.get(key)
        if known is None:
            if self._origin is not None:
                known = self._since(key, self._origin.offers(needs, policy), self._origin.nodes)
            elif key in self._earlier:
                known = self._since(key, *self._earlier[key])
            else:
                groups: dict[Rank, list[Node]] = {}
                for node in self.nodes:
                    rank = _usable_rank(node, needs, policy)
                    if rank is not None:
                        groups.setdefault(rank, []).append(node)
                known = Offers({rank: self.select(nodes) for rank, nodes in groups.items()})
            self._offers[key] = known
        return known

    def _since(self, key: tuple[Needs, Policy], known: Offers, nodes: tuple[Node, ...]) -> Offers:
        """Offers of when the nodes were these, as they are now."""
        if nodes is self.nodes:
            return known
        found = known.copy()
        for i in compress(range(len(nodes)), map(is_not, nodes, self.nodes)):
            found.move(1 << i, _usable_rank(nodes[i], *key), _usable_rank(self.nodes[i], *key))
        return found

    def changed(self, nodes: Iterable[Node], mix: Mix | None = None) -> Snapshot:
        """The same cluster with some nodes replaced, by others of the same id, name, address and labels.

        What was worked out of the cluster is carried over, so that this takes next to no time.
        """
        offers = {key: known.copy() for key, known in self._offers.copy().items()}
        later, positions = self._replaced(nodes, mix)
        for position in positions:
            old, node = self.nodes[position], later.nodes[position]
            for (needs, policy), known in offers.items():
                before, after = _usable_rank(old, needs, policy), _usable_rank(node, needs, policy)
                known.move(1 << position, before, after)
        later._offers, later._origin, later._earlier = offers, self._origin, self._earlier
        return later

    def followed(self, nodes: Iterable[Node]) -> Snapshot:
        """The same as :meth:`changed`, for one cluster that is followed for long, through all kinds of requests.

        Offers are brought up to date when they are next asked for; those that were not for longest are forgotten.
        """
        later, _ = self._replaced(nodes, None)
        earlier = {
            **self._earlier,
            **{key: (known, self.nodes) for key, known in self._offers.copy().items()},
        }
        for key in [*earlier][: max(0, len(earlier) - MOST_KINDS)]:
            del earlier[key]
        later._earlier = earlier
        if len(later.open_to) > MOST_KINDS:
            later.open_to = {}
        return later

    def copy(self) -> Snapshot:
        """The same, for one who plans with it: what that works out of the nodes is known to this one, too.

        The room is not shared, since planning changes it.
        """
        later = Snapshot((), self.near, self.mix)
        later.nodes, later.open_to, later._origin = self.nodes, self.open_to, self
        later.__dict__["usable"] = self.usable
        return later

    def _replaced(self, nodes: Iterable[Node], mix: Mix | None) -> tuple[Snapshot, list[int]]:
        """The same with some nodes replaced, and their positions; no offers are known yet."""
        listed, positions = list(self.nodes), []
        later = Snapshot((), self.near, mix or self.mix)
        lasting, closed = True, 0
        for node in nodes:
            position = self._position[node.id]
            old, listed[position] = listed[position], node
            positions.append(position)
            if not _is_same_machine(old, node):
                lasting = lasting and not _is_usable(node)
                closed |= 1 << position
        later.nodes = tuple(listed)
        for name in _OF_ALL:
            if name in self.__dict__:
                later.__dict__[name] = self.__dict__[name]
        later.open_to = self.open_to
        if closed:
            usable = later.select(later.nodes[i] for i in positions if _is_usable(later.nodes[i]))
            later.__dict__["usable"] = self.usable & ~closed | usable & closed
            later.open_to = {}
            if lasting:
                later.open_to = {kind: bits & ~closed for kind, bits in self.open_to.copy().items()}
        elif self.room is not None:
            later.room, self.room = self.room, None
            for position in positions:
                later.room.update(1 << position, later.nodes[position])
        return later, positions


_OF_ALL = ("_position", "_by_name", "usable", "regions")
"""What is worked out of the nodes as such, whatever is free on them."""


def _is_same_machine(old: Node, new: Node) -> bool:
    """Whether nodes differ in nothing but what is free, and in what is placed there."""
    return (
        old.problem == new.problem
        and (old.topology is new.topology or old.topology == new.topology)
        and (old.accelerators is new.accelerators or old.accelerators == new.accelerators)
        and old.compute_capability == new.compute_capability
        and (old.slots is new.slots or old.slots == new.slots)
        and old.gpu_memory_bytes == new.gpu_memory_bytes
        and (old.uuids is new.uuids or old.uuids == new.uuids)
    )


def _is_usable(node: Node) -> bool:
    """Whether anything may be placed on its GPUs."""
    return node.problem is None and len(node.topology) > 0


def rank_of(node: Node, needs: Needs, policy: Policy) -> Rank | None:
    """How welcome a node is to a request; ``None`` if it has no GPUs for it that are good enough.

    Whether it has the CPUs is not looked at.
    """
    if not needs.gpus:
        return _rank_of_cpus(node, policy)
    offer = node.offer(needs)
    if offer is None or offer.slowness > needs.slowest:
        return None
    replicas = node.replicas if policy is Policy.ROUND_ROBIN else 0  # counted only where it matters
    return policy.rank(offer, not needs.whole, replicas)


def _usable_rank(node: Node, needs: Needs, policy: Policy) -> Rank | None:
    """The same; ``None`` too if nothing may be placed there."""
    usable = _is_usable(node) if needs.gpus else node.problem is None
    return rank_of(node, needs, policy) if usable else None


def _rank_of_cpus(node: Node, policy: Policy) -> Rank:
    """Sorts nodes by how welcome their CPUs are to CPU replicas: under every policy those without GPUs first."""
    gpus = len(node.topology) > 0
    match policy:
        case Policy.PACK:
            return (gpus, node.cpu_milli), ()
        case Policy.ROUND_ROBIN:
            return (gpus,), (node.replicas,)
        case Policy.LEAST_LOADED:
            return (gpus, -node.cpu_milli), ()
        case _:  # the fullest: fewest others could use what is left
            return (gpus,), (node.free_slots if gpus else node.cpu_milli,)
