"""Exact GPUs on an unmodified Ray: hold, create, verify, retry.

1. Look: which GPUs are free? See :mod:`placement.runtime.free_gpus`.
2. Choose the best set among them.
3. Steer Ray to exactly these; see :mod:`placement.runtime.steering`.
4. Verify from inside every bundle. If others took or freed a GPU meanwhile, give everything back
   and start over, a limited number of times.

A share of a GPU is reserved in the same way. For Ray a MIG instance is a GPU, and is steered to like one.

Nothing extra is held for longer than one pass takes (tens of milliseconds), and nothing at all after a refusal.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from placement.core.needs import WHOLE, Needs
from placement.core.node import Node
from placement.core.score import choose, ray_set, score
from placement.core.shares import give, least_gpus, pattern
from placement.core.topology import Topology
from placement.core.wording import describe, gpu_names
from placement.runtime import faults
from placement.runtime.free_gpus import BOOKS_LAG_SECONDS, TRUST_SECONDS, FreeGpus, Groups
from placement.runtime.orders import GpuHardware, Holding, Order, Prepared, Refused, Reserved, Steering
from placement.runtime.steering import READY_DEADLINE_SECONDS, Steerer

MAX_ATTEMPTS = 12
MAX_LOOKS = 3
"""How often a node is looked at before it refuses because too few of its GPUs are free."""
TOO_LITTLE_MEMORY = "its GPUs have too little memory, or their memory is unknown"

T = TypeVar("T")


class NodeReserver:
    """Reserves GPUs of one node, one request at a time.

    Args:
        groups: the node's placement groups.
        gpu_count: GPUs that Ray has on the node.

    Attributes:
        gpus: what is known of its GPUs.
    """

    def __init__(self, groups: Groups, gpu_count: int) -> None:
        self.gpus = FreeGpus(groups, gpu_count)
        self._groups = groups
        self._steerer = Steerer(groups, self.gpus)
        self._strays_until = float("-inf")

    def remove(self, name: str, group: Any) -> None:
        """Gives a reserved group back."""
        self.gpus.forget(name)
        self._groups.remove(group)
        self.gpus.note_freed()

    def reserve(self, order: Order, machine: GpuHardware, more: int = 0) -> Reserved | Refused:
        """Reserves the best GPUs that are free, healthy and meet the floors, in a new group.

        If possible it leaves room for ``more`` reservations with the same needs.
        """
        share = order.needs.share_of(machine.gpu_memory_bytes)
        if share is None:
            return Refused(TOO_LITTLE_MEMORY, 0, True)
        return self._reserve(order, machine, more) if share == WHOLE else self._share(order, machine, share)

    def _reserve(self, order: Order, machine: GpuHardware, more: int) -> Reserved | Refused:
        """Whole GPUs, or a MIG instance."""
        needs, topology = order.needs, machine.topology
        count = needs.gpus
        reason, full, attempt = "", False, 0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            free = self.gpus.look(count, attempt >= MAX_LOOKS)
            wanted = None
            if free is not None:
                wanted = _best(machine.node(free - self.gpus.ours(), {}), topology, needs, more)
            if free is None or wanted is None:
                reason, full = _none_free(needs), True
                if attempt >= MAX_LOOKS:
                    break
                time.sleep(BOOKS_LAG_SECONDS / 2)
                continue
            name, bundle = f"{order.name}:{attempt}", {"GPU": 1, **order.beside}
            outcome = self._steerer.create(
                partial(self._groups.reserve, name, bundle, len(wanted)), free, wanted
            )
            if outcome is None:
                reason, full = "another Ray user took GPUs meanwhile, or CPUs or memory are short", False
            else:
                group, slots = outcome
                got = tuple(sorted(slots))
                # Others took or freed GPUs, and the GPUs that Ray gave are no worse: then they are accepted.
                free_then = machine.node(got, {})
                sound = free_then.free_mask(needs._replace(free_memory_bytes=0))
                as_good = not more and needs.whole and sound.bit_count() == count
                as_good = as_good and score(topology, got) >= score(topology, wanted)
                if got == wanted or (as_good and choose(topology, got, needs._replace(free_memory_bytes=0))):
                    self.gpus.held[order.name] = Holding.whole(order.deployment, got)
                    bundles = tuple(slots.index(gpu) for gpu in got)
                    return Reserved(group, got, bundles, free, attempt)
                self._groups.remove(group)
                self.gpus.note_freed()
                reason, full = f"got GPUs {list(got)} instead of {list(wanted)}", False
            self.gpus.forget_foreign()
            self.gpus.note_change()
            time.sleep(0.01 * attempt)
        return Refused(reason, attempt, full)

    def prepare(self, order: Order, machine: GpuHardware, sets: int, more: int = 0) -> Prepared | Refused:
        """Makes the best GPUs the ones that Ray gives next, for a group that somebody else creates.

        Pass its result to :meth:`finish` soon: until then others cannot use the GPUs.

        Args:
            order: what is asked of this node; of a replica over several nodes, one of the ``sets``.
            machine: the node's hardware.
            sets: how many disjoint sets; more than one only for whole GPUs.
            more: for how many such orders to follow there should be room left.
        """
        needs = order.needs
        if needs.amounts:
            return self._prepare_mixed(order, machine)
        share = needs.share_of(machine.gpu_memory_bytes)
        if share is None:
            return Refused(TOO_LITTLE_MEMORY, 0, True)
        if share < WHOLE:
            return self._prepare_share(order, machine, share)
        reason, full, attempt = "", False, 0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            free = self.gpus.look(needs.gpus * sets, attempt >= MAX_LOOKS)
            chosen: list[tuple[int, ...]] | None = None
            if free is not None:
                node = machine.node(free - self.gpus.ours(), {})
                if sets > 1:
                    chosen = node.shape.several(node.free_mask(needs), needs, sets)
                elif best := _best(node, machine.topology, needs, more):
                    chosen = [best]
            if free is None or chosen is None:
                reason, full = _none_free(needs, sets), True
                if attempt >= MAX_LOOKS:
                    break
                time.sleep(BOOKS_LAG_SECONDS / 2)
                continue
            wanted = tuple(sorted(gpu for gpus in chosen for gpu in gpus))
            fillers = self._steerer.steer(free, wanted)
            faults.point("agent.prepared")
            if fillers is not None:
                rays = ray_set(free, len(wanted)) or wanted
                return Prepared(
                    tuple(chosen), rays, tuple(fillers), attempt, tuple(sorted(self.gpus.foreign))
                )
            reason, full = "another Ray user took GPUs meanwhile", False
            self.gpus.forget_foreign()
            time.sleep(0.01 * attempt)
        return Refused(reason, attempt, full)

    def _prepare_mixed(self, order: Order, machine: GpuHardware) -> Prepared | Refused:
        """The same for shares, or whole GPUs and shares, that are reserved at once."""
        needs, least = order.needs, min(order.needs.amounts)
        reason, full, attempt = "", False, 0
        unsure: set[int] = set()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            known = {gpu: rest for gpu, rest in self.gpus.usable_rests().items() if gpu not in unsure}
            rests = {gpu: rest for rest, gpu in machine.node((), known).shared_with_room(needs, least)}
            count, free = len(pattern(needs.amounts, rests)), frozenset[int]()
            strayed = self._may_stray or bool(unsure)
            if count or strayed:
                free = self.gpus.look(max(1, count), attempt >= MAX_LOOKS) or free
            portions = machine.node(free - self.gpus.ours(), rests).portions(needs)
            if portions is None:
                reason, full = f"too little of its GPUs is free for {describe(needs)}", True
                if attempt >= MAX_LOOKS:
                    break
                unsure.clear()
                time.sleep(BOOKS_LAG_SECONDS / 2)
                continue
            believed = {gpu: rest for gpu, rest in self.gpus.known_rests().items() if gpu not in unsure}
            fillers = self._steerer.steer_mixed(least, free, portions, believed, rests.keys(), strayed)
            faults.point("agent.prepared")
            if fillers is not None:
                rays = give(needs.amounts, self.gpus.rests(), free)
                alone = portions if rays is None else portions._replace(given=rays)
                foreign = tuple(sorted(self.gpus.foreign))
                return Prepared(
                    (portions.whole,), alone.whole, tuple(fillers), attempt, foreign, taken=portions.taken
                )
            reason, full = "another Ray user took GPUs or parts of them meanwhile", False
            unsure |= believed.keys()
            self.gpus.forget_foreign()
            time.sleep(0.01 * attempt)
        at_most = least_gpus(needs) - 1 if full else None
        return Refused(reason, attempt, full, at_most)

    def _prepare_share(self, order: Order, machine: GpuHardware, share: int) -> Prepared | Refused:
        """The same for a share of one GPU."""

        def prepare(attempt: int, free: frozenset[int], wanted: int) -> Prepared | None:
            fillers = self._steerer.steer_share(share, free, wanted)
            if fillers is not None and self._may_stray:
                fillers = fillers if self._steerer.fill_strays(fillers, share, wanted) else None
            faults.point("agent.prepared")
            if fillers is None:
                return None
            foreign = tuple(sorted(self.gpus.foreign))
            return Prepared(((wanted,),), (wanted,), tuple(fillers), attempt, foreign, share)

        return self._with_share(order, machine, share, prepare)

    def try_steering(self) -> Steering:
        """Makes Ray give the highest free GPU, in a group that ends with this process, and gives it back.

        It takes the steps of every reservation: if Ray gives the wanted GPU, Ray works as it was measured.
        """
        wanted = got = None
        count = attempt = 0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            free = (self.gpus.look(1, attempt >= MAX_LOOKS) or frozenset()) - self.gpus.ours()
            if not free and attempt >= MAX_LOOKS:
                return Steering(None, None, 0, attempt)
            if free:
                wanted, count = max(free), len(free)
                outcome = self._steerer.create(partial(self._groups.hold, 1), free, (wanted,))
                got = None
                if outcome is not None:
                    group, [got] = outcome
                    self._groups.remove(group)
                    self.gpus.note_freed()
                if got == wanted:
                    break
                self.gpus.forget_foreign()
            time.sleep(BOOKS_LAG_SECONDS / 2)
        return Steering(wanted, got, count, attempt)

    def look_ahead(self, count: int) -> None:
        """Looks and waits for Ray's records now, so that the following :meth:`prepare` is quick."""
        free = self.gpus.look(count)
        if free is not None:
            self.gpus.catch_up(free)

    def finish(self, prepared: Prepared, used: bool) -> None:
        """Gives back the fillers of the prepared GPUs; the next call looks again if the GPUs could not be taken."""
        if not used:
            self.gpus.forget_foreign()
            if prepared.taken:  # perhaps there is less left of them than is known
                self._note_stray(prepared.taken)
        for filler in prepared.fillers:
            self._groups.remove(filler)
        if prepared.fillers:
            self.gpus.note_freed()

    def wait_for(self, group: Any) -> bool:
        """Whether a group that somebody else creates becomes ready; if not, it is gone."""
        return self._groups.wait_for(group, READY_DEADLINE_SECONDS)

    def confirm(
        self, order: Order, prepared: Prepared, group: Any, bundles: Sequence[int]
    ) -> list[tuple[int, int]] | None:
        """GPU and bundle, if these bundles of a group hold exactly what was prepared; it then counts as held.

        A bundle is named once for each GPU that it holds.
        """
        share = prepared.share / WHOLE
        amounts = order.amounts or {bundle: count * share for bundle, count in Counter(bundles).items()}
        slots = self._groups.gpus_of(group, amounts)
        self.gpus.note_change()
        wanted = prepared.taken or {gpu: prepared.share for gpus in prepared.sets for gpu in gpus}
        taken: Counter[int] = Counter()
        for gpu, bundle in zip(slots, bundles, strict=False):  # fewer slots if the group is gone
            taken[gpu] += round(min(amounts[bundle], 1) * WHOLE)
        if taken != wanted:
            self.gpus.forget_foreign()
            if prepared.share < WHOLE or prepared.taken:
                self._note_stray(gpu for gpu, share in wanted.items() if taken[gpu] < share)
            return None
        faults.point("agent.confirmed")
        self.gpus.held[order.name] = Holding(order.deployment, dict(taken), group)
        return list(zip(slots, bundles, strict=True))

    @property
    def _may_stray(self) -> bool:
        return time.monotonic() < self._strays_until

    def _note_stray(self, gpus: Iterable[int]) -> None:
        """Notes that others use parts of GPUs, perhaps of these."""
        self._strays_until = time.monotonic() + TRUST_SECONDS
        self.gpus.doubt(self.gpus.rests().keys() & {*gpus})

    def _share(self, order: Order, machine: GpuHardware, share: int) -> Reserved | Refused:
        """A share of one GPU."""

        def create(attempt: int, free: frozenset[int], wanted: int) -> Reserved | None:
            group = self._steerer.create_share(f"{order.name}:{attempt}", order.beside, share, free, wanted)
            if group is None:
                return None
            self.gpus.held[order.name] = Holding(order.deployment, {wanted: share})
            return Reserved(group, (wanted,), (0,), frozenset({wanted}), attempt, share)

        return self._with_share(order, machine, share, create)

    def _with_share(
        self,
        order: Order,
        machine: GpuHardware,
        share: int,
        create: Callable[[int, frozenset[int], int], T | None],
    ) -> T | Refused:
        """Chooses a GPU for a share, until ``create(attempt, wholly free GPUs, GPU)`` succeeds with one."""
        reason, full, attempt = "", False, 0
        crowded = {
            gpu
            for held in self.gpus.held.values()
            if held.deployment == order.deployment
            for gpu in held.taken
        }
        unsure: set[int] = set()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            rests = self.gpus.usable_rests()
            rests = {gpu: rest for gpu, rest in rests.items() if gpu not in machine.lost | unsure}
            free: frozenset[int] = frozenset()
            wanted = order.planned if attempt == 1 else None
            if wanted is not None and wanted not in rests:
                free = self.gpus.look(1, attempt >= MAX_LOOKS) or frozenset()
            if wanted is None or (rests.get(wanted, 0) < share and wanted not in free - machine.lost):
                wanted, free = self._fullest(machine, order, rests, crowded, attempt >= MAX_LOOKS)
            if wanted is None:
                reason, full = f"none of its GPUs has {share / WHOLE:g} free", True
                if attempt >= MAX_LOOKS:
                    break
                unsure.clear()
                time.sleep(BOOKS_LAG_SECONDS / 2)
                continue
            outcome = create(attempt, free, wanted)
            if outcome is not None:
                return outcome
            reason, full = f"another Ray user has some of GPU {wanted}, or CPUs or memory are short", False
            if wanted in rests:
                unsure.add(wanted)
            self.gpus.forget_foreign()
            self.gpus.note_change()
            time.sleep(0.01 * attempt)
        return Refused(reason, attempt, full)

    def _fullest(
        self,
        machine: GpuHardware,
        order: Order,
        rests: Mapping[int, int],
        crowded: Collection[int],
        to_be_sure: bool,
    ) -> tuple[int | None, frozenset[int]]:
        """The fullest shared GPU that still fits a share, else a whole one; and which are free."""
        taken, free = machine.node((), rests).choose(order.needs, crowded), frozenset[int]()
        if taken is None:
            free = self.gpus.look(1, to_be_sure) or frozenset()
            taken = machine.node(free - self.gpus.ours(), {}).choose(order.needs)
        return (None if taken is None else taken.gpus[0]), free


def _best(node: Node, topology: Topology, needs: Needs, more: int) -> tuple[int, ...] | None:
    """The best of a node's free GPUs for one replica, or its MIG instance; ``None`` if there is none."""
    if needs.profile:
        taken = node.choose(needs)
        return None if taken is None else taken.gpus
    mask = node.free_mask(needs)
    return choose(topology, [gpu for gpu in node.free if mask >> gpu & 1], needs, more)


def _none_free(needs: Needs, sets: int = 1) -> str:
    """Why there are no GPUs for an order."""
    if needs.named:
        return f"too few of {gpu_names(needs.named)} are free, healthy and as close as demanded for {sets * needs.gpus}"
    if needs.profile:
        return f"none of its MIG instances {needs.profile} is free"
    if sets > 1:
        return f"too few of its GPUs are free and as demanded for {sets} x {needs.gpus}"
    return f"too few of its GPUs are free, healthy and as close as demanded for {needs.gpus}"
