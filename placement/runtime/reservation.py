"""Exact GPUs on an unmodified Ray: hold, create, verify, retry.

Ray always gives the lowest-numbered free GPUs of a node. So the wanted ones are made the lowest:

1. Look: which GPUs are free? Where nobody else uses the node that is known, and also for some seconds after
   the last look if there are still as many; else all free ones are taken for a moment by one hold, in which a
   task says which they are.
2. Choose the best set among them.
3. Steer: walk the free GPUs upwards. Take each run of unwanted ones with a filler and each run of wanted
   ones, but for the last, with a hold; then remove the holds and create the real group, which now gets
   exactly the wanted GPUs. Nothing runs in these holds and fillers, so that removing one takes effect at once
   (see :mod:`placement.runtime.groups`).
4. Verify from inside every bundle. Others may have taken or freed a GPU meanwhile: then give everything back
   and start over, a bounded number of times.

A share of a GPU is steered in the same way. Ray gives it on the GPU with the smallest rest that is enough, so
the rests that would come before the wanted one are filled for a moment. A rest that nobody knew of shows when
the share lands there: it then serves as one more filler, and the share is tried again. To Ray a MIG instance
is a GPU like any other, and is steered to as one.

Nothing is held for longer than one pass takes (tens of milliseconds), and nothing at all after a refusal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from placement.core.needs import WHOLE, Needs
from placement.core.node import Node
from placement.core.score import choose, ray_set, score
from placement.core.topology import Topology
from placement.core.wording import gpu_names
from placement.runtime import faults
from placement.runtime.orders import GpuHardware, Holding, Order, Prepared, Refused, Reserved, Steering

MAX_ATTEMPTS = 12
BOOKS_LAG_SECONDS = 0.15
"""Ray's books follow a change after at most 0.1 s (measured); they are trusted again after this long."""
CATCH_UP_SECONDS = 0.3
"""How long, at most, the books are given to show what was just given back."""
MAX_STRAY_SHARES = 6
"""How many rests that nobody knew of are filled by a share that landed there."""
READY_DEADLINE_SECONDS = 0.15
"""Long enough for Ray to try twice; see :func:`~placement.runtime.groups.ready_or_removed`."""
LOOK_DEADLINE_SECONDS = 0.2
TRUST_SECONDS = 10.0
"""How long a look is good for while the number of free GPUs is as it should be. If others have changed places all the
same, that shows when the GPUs are verified."""
RETURN_SECONDS = 2.0
"""How long GPUs that were given back may take to come free; a few milliseconds, but on a machine that is overrun."""
MAX_LOOKS = 3
"""How often a node is looked at before it refuses since too few of its GPUs are free."""
TOO_LITTLE_MEMORY = "its GPUs have too little memory, or nobody knows how much"

T = TypeVar("T")


class Groups(Protocol):
    """What steering needs of a node; :class:`~placement.runtime.groups.NodeGroups` is the real one."""

    def hold(self, amount: float) -> Any:
        """Takes the lowest free GPUs, or a share of the fullest GPU that has it, for a moment."""

    def reserve(self, name: str, bundle: dict[str, float], count: int) -> Any:
        """Takes equal bundles, to stay: one GPU each, or a share of one."""

    def ready_or_removed(self, group: Any, deadline_seconds: float) -> bool:
        """Waits for a group; one that could not be had is gone."""

    def remove(self, group: Any) -> None:
        """Gives a group back."""

    def gpus_of(self, group: Any, bundles: Iterable[int], share: float = 1) -> list[int]:
        """Which GPU each of these bundles holds a share of, as a worker inside says.

        A bundle is named once for each GPU that it holds.
        """

    def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
        """Which GPUs are the lowest free ones; ``None`` if there are not that many."""

    def available(self) -> float:
        """Free GPUs in Ray's books, shares included."""


class NodeReserver:
    """Reserves GPUs of one node, one request at a time.

    Args:
        groups: the node's placement groups.
        gpu_count: GPUs that Ray has on the node.
    """

    def __init__(self, groups: Groups, gpu_count: int) -> None:
        self._groups = groups
        self._gpu_count = gpu_count
        self._held: dict[str, Holding] = {}
        self._foreign: frozenset[int] | None = frozenset()
        self._changed_at = float("-inf")
        self._freed_at = time.monotonic()  # an earlier actor of this node may have died with holds
        self._looked_at = float("-inf")
        self._strayed = False

    @property
    def foreign(self) -> frozenset[int]:
        """GPUs that other Ray users held when they were last looked at."""
        return (self._foreign or frozenset()) - self._ours()

    def adopt(self, holdings: Mapping[str, Holding]) -> None:
        """Notes what is reserved already, by order name, and that nothing else of ours is."""
        self._held = dict(holdings)
        self._foreign = None

    def forget(self, name: str) -> None:
        """Notes that an order is not reserved any more."""
        if self._held.pop(name, None) is not None:
            self._foreign = None
            self._changed_at = self._freed_at = time.monotonic()

    def remove(self, name: str, group: Any) -> None:
        """Gives a reserved group back."""
        self._held.pop(name, None)
        self._groups.remove(group)
        self._changed_at = self._freed_at = time.monotonic()

    def reserve(self, order: Order, machine: GpuHardware, more: int = 0) -> Reserved | Refused:
        """Reserves the best GPUs that are free, sound and good enough, in a new group.

        As many ``more`` reservations with the same needs will follow, and should find room.
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
            free = self._look(count, attempt >= MAX_LOOKS)
            wanted = None
            if free is not None:
                wanted = _best(machine.node(free - self._ours(), {}), topology, needs, more)
            if free is None or wanted is None:
                reason, full = _none_free(needs), True
                if attempt >= MAX_LOOKS:
                    break
                time.sleep(BOOKS_LAG_SECONDS / 2)
                continue
            name, bundle = f"{order.name}:{attempt}", {"GPU": 1, **order.beside}
            outcome = self._create_steered(
                partial(self._groups.reserve, name, bundle, len(wanted)), free, wanted
            )
            if outcome is None:
                reason, full = "another Ray user took GPUs meanwhile, or CPUs or memory are short", False
            else:
                group, slots = outcome
                got = tuple(sorted(slots))
                # Others moved GPUs, and what was got instead is no worse: then it will do.
                free_then = machine.node(got, {})
                sound = free_then.free_mask(needs._replace(free_memory_bytes=0))
                as_good = not more and needs.whole and sound.bit_count() == count
                as_good = as_good and score(topology, got) >= score(topology, wanted)
                if got == wanted or (as_good and choose(topology, got, needs._replace(free_memory_bytes=0))):
                    self._held[order.name] = Holding(order.deployment, got)
                    bundles = tuple(slots.index(gpu) for gpu in got)
                    return Reserved(group, got, bundles, ray_set(free, count) or got, attempt)
                self._groups.remove(group)
                self._freed_at = time.monotonic()
                reason, full = f"got GPUs {list(got)} instead of {list(wanted)}", False
            self._foreign = None
            self._changed_at = time.monotonic()
            time.sleep(0.01 * attempt)
        return Refused(reason, attempt, full)

    def prepare(self, order: Order, machine: GpuHardware, sets: int, more: int = 0) -> Prepared | Refused:
        """Makes the best GPUs those that Ray gives next, for a group that somebody else creates.

        What it returns is to be handed to :meth:`finish`, and soon: others go without the GPUs until then.

        Args:
            order: what is asked of this node; of a replica over several nodes, one of the ``sets``.
            machine: what its GPUs are.
            sets: how many disjoint sets there are to be: of whole GPUs, where it is not one.
            more: as many such orders will follow, and should find room.
        """
        needs = order.needs
        share = needs.share_of(machine.gpu_memory_bytes)
        if share is None:
            return Refused(TOO_LITTLE_MEMORY, 0, True)
        if share < WHOLE:
            return self._prepare_share(order, machine, share)
        reason, full, attempt = "", False, 0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            free = self._look(needs.gpus * sets, attempt >= MAX_LOOKS)
            chosen: list[tuple[int, ...]] | None = None
            if free is not None:
                node = machine.node(free - self._ours(), {})
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
            fillers = self._steer(free, wanted)
            faults.point("agent.prepared")
            if fillers is not None:
                rays = ray_set(free, len(wanted)) or wanted
                return Prepared(tuple(chosen), rays, tuple(fillers), attempt, tuple(sorted(self.foreign)))
            reason, full = "another Ray user took GPUs meanwhile", False
            self._foreign = None
            time.sleep(0.01 * attempt)
        return Refused(reason, attempt, full)

    def _prepare_share(self, order: Order, machine: GpuHardware, share: int) -> Prepared | Refused:
        """The same for a share of one GPU."""

        def prepare(attempt: int, free: frozenset[int], wanted: int) -> Prepared | None:
            fillers = self._steer_share(share, free, wanted)
            if fillers is not None and self._strayed and not self._fill_strays(fillers, share, wanted):
                fillers = None
            faults.point("agent.prepared")
            if fillers is None:
                return None
            foreign = tuple(sorted(self.foreign))
            return Prepared(((wanted,),), (wanted,), tuple(fillers), attempt, foreign, share)

        return self._with_share(order, machine, share, prepare)

    def try_steering(self) -> Steering:
        """Has Ray give the highest free GPU in a group that ends with this process, and gives it back.

        It takes the steps of every reservation: where Ray gives the GPU that was wanted, it is as it was measured.
        """
        wanted = got = None
        count = attempt = 0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            free = (self._look(1, attempt >= MAX_LOOKS) or frozenset()) - self._ours()
            if not free and attempt >= MAX_LOOKS:
                return Steering(None, None, 0, attempt)
            if free:
                wanted, count = max(free), len(free)
                outcome = self._create_steered(partial(self._groups.hold, 1), free, (wanted,))
                got = None
                if outcome is not None:
                    group, [got] = outcome
                    self._groups.remove(group)
                    self._freed_at = time.monotonic()
                if got == wanted:
                    break
                self._foreign = None
            time.sleep(BOOKS_LAG_SECONDS / 2)
        return Steering(wanted, got, count, attempt)

    def locate(self) -> frozenset[int]:
        """Which GPUs other Ray users hold; looked at anew, whatever is known."""
        self._foreign = None
        if self._look(1) is None:
            self._foreign = frozenset(range(self._gpu_count)) - self._ours()
        return self.foreign

    def look_ahead(self, count: int) -> None:
        """Sees to it that :meth:`prepare`, which is about to follow, need neither look nor wait for the books."""
        free = self._look(count)
        if free is not None:
            self._catch_up(free)

    def finish(self, prepared: Prepared, used: bool) -> None:
        """Gives back what kept the prepared GPUs the lowest free ones; looks anew if they were not to be had."""
        if not used:
            self._foreign = None
        for filler in prepared.fillers:
            self._groups.remove(filler)
        self._changed_at = self._freed_at = time.monotonic()

    def confirm(
        self, order: Order, prepared: Prepared, group: Any, bundles: Sequence[int]
    ) -> dict[int, int] | None:
        """GPU -> bundle, if these bundles of a group hold just the prepared GPUs; they are then noted as ours.

        A bundle is named once for each GPU that it holds.
        """
        is_share = prepared.share < WHOLE
        slots = self._groups.gpus_of(group, bundles, prepared.share / WHOLE if is_share else 1)
        self._changed_at = time.monotonic()
        if sorted(slots) != sorted(gpu for gpus in prepared.sets for gpu in gpus):
            self._foreign = None
            self._strayed = is_share
            return None
        if is_share:
            self._strayed = False
        faults.point("agent.confirmed")
        self._held[order.name] = Holding(order.deployment, tuple(sorted(slots)), prepared.share)
        return dict(zip(slots, bundles, strict=True))

    def _share(self, order: Order, machine: GpuHardware, share: int) -> Reserved | Refused:
        """A share of one GPU."""

        def create(attempt: int, free: frozenset[int], wanted: int) -> Reserved | None:
            group = self._create_share_steered(f"{order.name}:{attempt}", order.beside, share, free, wanted)
            if group is None:
                return None
            self._held[order.name] = Holding(order.deployment, (wanted,), share)
            return Reserved(group, (wanted,), (0,), (wanted,), attempt, share)

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
            gpu for held in self._held.values() if held.deployment == order.deployment for gpu in held.gpus
        }
        unsure: set[int] = set()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            rests = {gpu: rest for gpu, rest in self._rests().items() if gpu not in machine.lost | unsure}
            free: frozenset[int] = frozenset()
            wanted = order.planned if attempt == 1 else None
            if wanted is not None and wanted not in rests:
                free = self._look(1, attempt >= MAX_LOOKS) or frozenset()
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
            self._foreign = None
            self._changed_at = time.monotonic()
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
        """The GPU that is shared already and has just room for a share, else a whole one; and which are free."""
        taken, free = machine.node((), rests).choose(order.needs, crowded), frozenset[int]()
        if taken is None:
            free = self._look(1, to_be_sure) or frozenset()
            taken = machine.node(free - self._ours(), {}).choose(order.needs)
        return (None if taken is None else taken.gpus[0]), free

    def _ours(self) -> frozenset[int]:
        return frozenset(gpu for held in self._held.values() for gpu in held.gpus)

    def _rests(self) -> dict[int, int]:
        """Thousandths free of each GPU that we share out, if nobody else uses it."""
        rests: dict[int, int] = {}
        for held in self._held.values():
            if held.share < WHOLE:
                [gpu] = held.gpus
                rests[gpu] = rests.get(gpu, WHOLE) - held.share
        return rests

    def _look(self, count: int, to_be_sure: bool = False) -> frozenset[int] | None:
        """The wholly free GPUs, or ``None`` if there are fewer than ``count``.

        Among them may be some that we hold, as far as we have heard: these are steered past, and given to nobody.

        Args:
            count: how many there must be.
            to_be_sure: try it all the same where the cluster's books say that there are fewer, since on a busy
                cluster they lag by more than we wait.
        """
        not_ours = frozenset(range(self._gpu_count)) - self._ours()
        expected = len(not_ours) - len(self.foreign)
        is_lost = False
        quiet = time.monotonic() - self._changed_at
        if self._foreign is None and quiet < BOOKS_LAG_SECONDS:
            time.sleep(BOOKS_LAG_SECONDS - quiet)
        if self._foreign is None or quiet > BOOKS_LAG_SECONDS:
            rests = self._rests()
            whole = self._groups.available() - sum(rests.values()) / WHOLE
            # Others may use the rest of a GPU that we share: then it is not what is short.
            expected = min(len(not_ours), math.ceil(whole - 1e-6) if rests else math.floor(whole + 1e-6))
            # What we took for held is free: its owner has ended, and we have not heard of it yet.
            is_lost = math.floor(whole + 1e-6) > len(not_ours)
            if expected == len(not_ours) and not is_lost:
                self._foreign = frozenset()
        if is_lost:
            expected, self._foreign = math.floor(whole + 1e-6), None
        elif expected == len(not_ours) and self._foreign is not None:
            return not_ours if len(not_ours) >= count else None
        free = not_ours - self.foreign
        is_recent = self._foreign is not None and time.monotonic() - self._looked_at < TRUST_SECONDS
        if is_recent and expected == len(free) >= count and not to_be_sure:
            return free
        # Others hold some. How many is known to within the lag of the books and to within shared GPUs,
        # which count as partly free but cannot be had whole: so ask for fewer until the answer comes.
        amounts: Sequence[int] = range(expected, count - 1, -1)
        if not amounts and to_be_sure and count <= len(not_ours):
            amounts = sorted({len(not_ours), count}, reverse=True)
        for several in amounts:
            patience = LOOK_DEADLINE_SECONDS
            if to_be_sure and several == count:
                # What was just given back here will come, as soon as the workers in it have died.
                patience = max(patience, self._freed_at + RETURN_SECONDS - time.monotonic())
            seen = self._groups.lowest_free(several, patience)
            self._looked_at = time.monotonic()
            if seen is not None:
                self._foreign = not_ours - frozenset(seen)
                return frozenset(seen)
        self._foreign = None
        return None

    def _catch_up(self, free: Collection[int]) -> None:
        """Waits until the cluster's books show what was given back here, or taken for a moment to look.

        Ray's scheduler goes by them: a group that is asked for before fails at once, and is tried again only
        after up to a second.
        """
        expected = len(free) + sum(self._rests().values()) / WHOLE - 1e-6
        until = max(self._freed_at, self._looked_at) + CATCH_UP_SECONDS
        while (left := until - time.monotonic()) > 0:
            began = time.monotonic()
            if self._groups.available() >= expected:
                return
            time.sleep(min(left, max(0.005, 3 * (time.monotonic() - began))))

    def _create_steered(
        self, create: Callable[[], Any], free: frozenset[int], wanted: tuple[int, ...]
    ) -> tuple[Any, list[int]] | None:
        """Creates the real group with the wanted GPUs made the lowest free ones. Leaves nothing else held."""
        groups = self._groups
        fillers = self._steer(free, wanted)
        if fillers is None:
            return None
        real: Any = None
        done = False
        try:
            faults.point("agent.steered")
            real = create()
            if not groups.ready_or_removed(real, READY_DEADLINE_SECONDS):
                return None
            faults.point("agent.created")
            while fillers:
                groups.remove(fillers.pop())
            slots = groups.gpus_of(real, range(len(wanted)))
            faults.point("agent.verified")
            done = True
            return real, slots
        finally:
            self._changed_at = time.monotonic()
            for group in fillers + ([real] if real is not None and not done else []):
                groups.remove(group)

    def _steer(self, free: frozenset[int], wanted: tuple[int, ...]) -> list[Any] | None:
        """Makes the wanted GPUs the lowest free ones.

        Returns:
            The fillers that keep it so; ``None``, and nothing held, if others were in the way.
        """
        groups = self._groups
        holds: list[Any] = []
        fillers: list[Any] = []
        done = False
        self._catch_up(free)
        try:
            for run, is_wanted in _runs(free, wanted)[:-1]:
                (holds if is_wanted else fillers).append(groups.hold(run))
            if not all(groups.ready_or_removed(group, READY_DEADLINE_SECONDS) for group in holds + fillers):
                return None
            done = True
            return fillers
        finally:
            self._changed_at = time.monotonic()
            for group in holds + ([] if done else fillers):
                groups.remove(group)

    def _create_share_steered(
        self, name: str, beside: Mapping[str, float], share: int, free: frozenset[int], wanted: int
    ) -> Any:
        """Creates the real group on the wanted GPU, every rest that Ray would prefer filled meanwhile.

        Returns:
            The group, or ``None``. Nothing else is left held.
        """
        groups = self._groups
        fillers = self._steer_share(share, free, wanted)
        if fillers is None:
            return None
        kept: Any = None
        try:
            faults.point("agent.steered")
            for again in range(MAX_STRAY_SHARES):
                group = groups.reserve(f"{name}:{again}", {"GPU": share / WHOLE, **beside}, 1)
                fillers.append(group)
                if not groups.ready_or_removed(group, READY_DEADLINE_SECONDS):
                    return None
                faults.point("agent.created")
                if groups.gpus_of(group, [0], share / WHOLE) == [wanted]:
                    kept = group
                    return group
            return None
        finally:
            self._changed_at = time.monotonic()
            for group in fillers:
                if group is not kept:
                    groups.remove(group)

    def _steer_share(self, share: int, free: frozenset[int], wanted: int) -> list[Any] | None:
        """Fills every rest that Ray would prefer for a share.

        Returns:
            The fillers; ``None``, and nothing held, if others were in the way.
        """
        groups = self._groups
        rests = self._rests()
        self._catch_up(free)
        before = sorted((rest, gpu) for gpu, rest in rests.items() if rest >= share and gpu != wanted)
        if wanted in rests:
            before = [one for one in before if one < (rests[wanted], wanted)]
        fillers: list[Any] = []
        done = False
        try:
            for rest, _ in before:
                fillers.append(groups.hold(rest / WHOLE))
            lower = sum(1 for gpu in free if gpu < wanted)
            if lower and wanted not in rests:
                fillers.append(groups.hold(lower))
            done = all(groups.ready_or_removed(group, READY_DEADLINE_SECONDS) for group in fillers)
            return fillers if done else None
        finally:
            self._changed_at = time.monotonic()
            for group in [] if done else fillers:
                groups.remove(group)

    def _fill_strays(self, fillers: list[Any], share: int, wanted: int) -> bool:
        """Adds fillers for rests that nobody knew of, until Ray gives a share where it is wanted.

        Returns:
            Whether it does; if not, no filler is left.
        """
        groups = self._groups
        done = False
        try:
            for _ in range(MAX_STRAY_SHARES):
                fillers.append(groups.hold(share / WHOLE))
                if not groups.ready_or_removed(fillers[-1], READY_DEADLINE_SECONDS):
                    return False
                if groups.gpus_of(fillers[-1], [0], share / WHOLE) == [wanted]:
                    groups.remove(fillers.pop())
                    time.sleep(BOOKS_LAG_SECONDS)  # a worker ran in it
                    done = True
                    return True
            return False
        finally:
            while fillers and not done:
                groups.remove(fillers.pop())


def _best(node: Node, topology: Topology, needs: Needs, more: int) -> tuple[int, ...] | None:
    """The best of a node's free GPUs for one replica, or its MIG instance; ``None`` if there is none."""
    if needs.profile:
        taken = node.choose(needs)
        return None if taken is None else taken.gpus
    mask = node.free_mask(needs)
    return choose(topology, [gpu for gpu in node.free if mask >> gpu & 1], needs, more)


def _none_free(needs: Needs, sets: int = 1) -> str:
    """Why there are no GPUs for it."""
    if needs.named:
        return f"too few of {gpu_names(needs.named)} are free, sound and as close as demanded for {sets * needs.gpus}"
    if needs.profile:
        return f"none of its MIG instances {needs.profile} is free"
    if sets > 1:
        return f"too few of its GPUs are free and as demanded for {sets} x {needs.gpus}"
    return f"too few of its GPUs are free, sound and as close as demanded for {needs.gpus}"


def _runs(free: Iterable[int], wanted: tuple[int, ...]) -> list[tuple[int, bool]]:
    """The free GPUs up to the highest wanted one, as (length, wanted?) runs in ascending order."""
    runs: list[tuple[int, bool]] = []
    for gpu in sorted(g for g in free if g <= wanted[-1]):
        is_wanted = gpu in wanted
        if runs and runs[-1][1] == is_wanted:
            runs[-1] = (runs[-1][0] + 1, is_wanted)
        else:
            runs.append((1, is_wanted))
    return runs
