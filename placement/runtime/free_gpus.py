"""Which GPUs of a node are free, as far as Ray's books and looking tell.

Ray's books say how many are free, but not which, and they lag. Where nobody else uses the node it is known, and also
for some seconds after the last look if there are still as many. Else all free ones are taken for a moment by one hold,
in which a task says which they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from placement.core.needs import WHOLE
from placement.runtime.orders import Holding

BOOKS_LAG_SECONDS = 0.15
"""Ray's books follow a change after at most 0.1 s (measured); they are trusted again after this long."""
CATCH_UP_SECONDS = 0.3
"""How long, at most, the books are given to show what was just given back."""
LOOK_DEADLINE_SECONDS = 0.2
TRUST_SECONDS = 10.0
"""How long a look is good for while the number of free GPUs is as it should be. If others have changed places all the
same, that shows when the GPUs are verified."""
RETURN_SECONDS = 2.0
"""How long GPUs that were given back may take to come free; a few milliseconds, but on a machine that is overrun."""


class Groups(Protocol):
    """What a node's GPUs are taken and looked at by; :class:`~placement.runtime.groups.NodeGroups` is the real one."""

    def hold(self, amount: float) -> Any:
        """Takes the lowest free GPUs, or a share of the fullest GPU that has it, for a moment."""

    def reserve(self, name: str, bundle: dict[str, float], count: int) -> Any:
        """Takes equal bundles, to stay: one GPU each, or a share of one."""

    def ready_or_removed(self, group: Any, deadline_seconds: float) -> bool:
        """Waits for a group; one that could not be had is gone."""

    def wait_for(self, group: Any, deadline_seconds: float) -> bool:
        """The same, for a group that somebody else creates."""

    def is_gone(self, group: Any) -> bool:
        """Whether somebody has removed a group, or it ended with its creator."""

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


class FreeGpus:
    """What is known of one node's GPUs: which are ours, which are others', which are free.

    Args:
        groups: the node's placement groups.
        gpu_count: GPUs that Ray has on the node.

    Attributes:
        held: order name -> what is reserved for it.
    """

    def __init__(self, groups: Groups, gpu_count: int) -> None:
        self.held: dict[str, Holding] = {}
        self._groups = groups
        self._gpu_count = gpu_count
        self._removed: set[str] = set()
        self._foreign: frozenset[int] | None = frozenset()
        self._changed_at = float("-inf")
        self._freed_at = time.monotonic()  # an earlier actor of this node may have died with holds
        self._looked_at = float("-inf")

    @property
    def foreign(self) -> frozenset[int]:
        """GPUs that other Ray users held when they were last looked at."""
        return (self._foreign or frozenset()) - self.ours()

    def ours(self) -> frozenset[int]:
        """GPUs that this service holds, or a share of."""
        return frozenset(gpu for held in self.held.values() for gpu in held.gpus)

    def rests(self) -> dict[int, int]:
        """Thousandths free of each GPU that we share out, if nobody else uses it."""
        rests: dict[int, int] = {}
        for held in self.held.values():
            if held.share < WHOLE:
                [gpu] = held.gpus
                rests[gpu] = rests.get(gpu, WHOLE) - held.share
        return rests

    def adopt(self, holdings: Mapping[str, Holding]) -> None:
        """Notes what is reserved already, by order name, and that nothing else of ours is."""
        self.held = dict(holdings)
        self._removed.clear()
        self._foreign = None

    def forget(self, name: str) -> None:
        """Notes that an order is not reserved any more."""
        self._removed.discard(name)
        if self.held.pop(name, None) is not None:
            self.note_freed()

    def note_change(self) -> None:
        """Notes that something was taken or given back here just now; Ray's books will follow."""
        self._changed_at = time.monotonic()

    def note_freed(self) -> None:
        """Notes that GPUs were given back here just now, and will come free."""
        self._changed_at = self._freed_at = time.monotonic()

    def forget_foreign(self) -> None:
        """Has the next look ask the node: what others hold is not known any more."""
        self._foreign = None

    def locate(self) -> frozenset[int]:
        """Which GPUs other Ray users hold; looked at anew, whatever is known."""
        self._foreign = None
        if self.look(1) is None:
            self._foreign = frozenset(range(self._gpu_count)) - self.ours()
        return self.foreign

    def look(self, count: int, to_be_sure: bool = False) -> frozenset[int] | None:
        """The wholly free GPUs, or ``None`` if there are fewer than ``count``.

        Among them may be some that we hold, as far as we have heard: these are steered past, and given to nobody.

        Args:
            count: how many there must be.
            to_be_sure: try it all the same where the cluster's books say that there are fewer, since on a busy
                cluster they lag by more than we wait.
        """
        not_ours = (frozenset(range(self._gpu_count)) - self.ours()) | self._given_back()
        expected = len(not_ours) - len(self.foreign)
        is_lost = False
        quiet = time.monotonic() - self._changed_at
        if self._foreign is None and quiet < BOOKS_LAG_SECONDS:
            time.sleep(BOOKS_LAG_SECONDS - quiet)
        if self._foreign is None or quiet > BOOKS_LAG_SECONDS:
            rests = self.rests()
            whole = self._groups.available() - sum(rests.values()) / WHOLE
            # Others may use the rest of a GPU that we share: then it is not what is short.
            expected = min(len(not_ours), math.ceil(whole - 1e-6) if rests else math.floor(whole + 1e-6))
            # What we took for held is free: its owner has ended, and we have not heard of it yet.
            is_lost = math.floor(whole + 1e-6) > len(not_ours)
            if expected == len(not_ours) and not is_lost:
                self._foreign = frozenset()
        if is_lost:
            self._removed |= {name for name, held in self.held.items() if self._is_removed(held)}
            not_ours |= self._given_back()
            expected = math.floor(whole + 1e-6)
            if expected == len(not_ours):
                self._foreign = frozenset()
            elif expected != len(not_ours - self.foreign):
                self._foreign = None
        if expected == len(not_ours) and self._foreign is not None:
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

    def _is_removed(self, held: Holding) -> bool:
        return held.group is not None and held.share == WHOLE and self._groups.is_gone(held.group)

    def _given_back(self) -> frozenset[int]:
        """GPUs that count as ours although their owner has removed their group, or ended."""
        return frozenset(gpu for name in self._removed & self.held.keys() for gpu in self.held[name].gpus)

    def catch_up(self, free: Collection[int]) -> None:
        """Waits until the cluster's books show what was given back here, or taken for a moment to look.

        Ray's scheduler goes by them: a group that is asked for before fails at once, and is tried again only
        after up to a second.
        """
        expected = len(free) + sum(self.rests().values()) / WHOLE - 1e-6
        until = max(self._freed_at, self._looked_at) + CATCH_UP_SECONDS
        while (left := until - time.monotonic()) > 0:
            began = time.monotonic()
            if self._groups.available() >= expected:
                return
            time.sleep(min(left, max(0.005, 3 * (time.monotonic() - began))))
