"""Which GPUs of a node are free, from Ray's records and from looking.

Ray's records say how many are free, but not which, and they lag. If nobody else uses the node it is known which; also
for some seconds after the last look, if the number has not changed. Otherwise one hold takes all free GPUs for a
moment, and a task in it reports which they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from placement.core.needs import WHOLE
from placement.runtime.orders import Holding

BOOKS_LAG_SECONDS = 0.15
"""Ray's records show a change after at most 0.1 s (measured); they are trusted again after this time."""
CATCH_UP_SECONDS = 0.3
"""The longest wait for the records to show what was just given back."""
LOOK_DEADLINE_SECONDS = 0.2
TRUST_SECONDS = 10.0
"""How long a look is used while the number of free GPUs is as expected. If other users have changed GPUs all the
same, verifying the GPUs shows it."""
RETURN_SECONDS = 2.0
"""How long GPUs that were given back may take to become free; milliseconds, unless the machine is overloaded."""


class Groups(Protocol):
    """Takes and examines a node's GPUs; :class:`~placement.runtime.groups.NodeGroups` is the real implementation."""

    def hold(self, amount: float) -> Any:
        """Takes the lowest free GPUs, or a share of the fullest GPU that still fits it, for a moment."""

    def reserve(self, name: str, bundle: dict[str, float], count: int) -> Any:
        """Takes equal bundles permanently: one GPU each, or a share of one."""

    def ready_or_removed(self, group: Any, deadline_seconds: float) -> bool:
        """Waits for a group; if it could not be reserved, it is removed."""

    def wait_for(self, group: Any, deadline_seconds: float) -> bool:
        """The same, for a group that somebody else creates."""

    def is_gone(self, group: Any) -> bool:
        """Whether somebody has removed a group, or it ended with its creator."""

    def remove(self, group: Any) -> None:
        """Gives a group back."""

    def gpus_of(self, group: Any, amounts: Mapping[int, float]) -> list[int]:
        """The GPUs that bundles hold, or a share of, as a worker in each of them reports.

        Args:
            group: their group.
            amounts: bundle -> the GPUs that it holds, or the share of one.
        """

    def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
        """Which GPUs are the lowest free ones; ``None`` if there are not that many."""

    def available(self) -> float:
        """Free GPUs in Ray's records, including free parts."""


class FreeGpus:
    """What is known of one node's GPUs: held by the service, held by others, or free.

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
        self._doubted: dict[int, float] = {}
        self._foreign: frozenset[int] | None = frozenset()
        self._changed_at = float("-inf")
        self._freed_at = time.monotonic()  # an earlier actor of this node may have died with holds
        self._looked_at = float("-inf")

    @property
    def foreign(self) -> frozenset[int]:
        """GPUs that other Ray users held at the last look."""
        return (self._foreign or frozenset()) - self.ours()

    def ours(self) -> frozenset[int]:
        """GPUs that this service holds, or a share of."""
        return frozenset(gpu for held in self.held.values() for gpu in held.taken)

    def rests(self) -> dict[int, int]:
        """The free thousandths of each GPU that the service shares, if nobody else uses it."""
        rests: dict[int, int] = {}
        for held in self._standing():
            for gpu, share in held.taken.items():
                rests[gpu] = rests.get(gpu, WHOLE) - share
        return {gpu: rest for gpu, rest in rests.items() if rest > 0}

    def known_rests(self) -> dict[int, int]:
        """The same without the GPUs of which others were found to use parts lately."""
        now = time.monotonic()
        return {gpu: rest for gpu, rest in self.rests().items() if self._doubted.get(gpu, now) <= now}

    def usable_rests(self) -> dict[int, int]:
        """The known ones, without GPUs of which a part was given back that elsewhere still counts as held."""
        gone = {gpu for name in self._removed & self.held.keys() for gpu in self.held[name].taken}
        return {gpu: rest for gpu, rest in self.known_rests().items() if gpu not in gone}

    def doubt(self, gpus: Iterable[int]) -> None:
        """Notes that others use parts of these GPUs, for :data:`TRUST_SECONDS`."""
        self._doubted |= dict.fromkeys(gpus, time.monotonic() + TRUST_SECONDS)

    def _standing(self) -> list[Holding]:
        return [held for name, held in self.held.items() if name not in self._removed]

    def adopt(self, holdings: Mapping[str, Holding]) -> None:
        """Records what is reserved already, by order name; the service holds nothing else."""
        self.held = dict(holdings)
        self._removed.clear()
        self._foreign = None

    def forget(self, name: str) -> None:
        """Notes that an order is not reserved any more."""
        self._removed.discard(name)
        if self.held.pop(name, None) is not None:
            self.note_freed()

    def note_change(self) -> None:
        """Records that something was just taken or given back here; Ray's records will follow."""
        self._changed_at = time.monotonic()

    def note_freed(self) -> None:
        """Records that GPUs were just given back here, and will become free."""
        self._changed_at = self._freed_at = time.monotonic()

    def forget_foreign(self) -> None:
        """Forces a new look next time: what others hold is no longer known."""
        self._foreign = None
        self._notice_removed()

    def _notice_removed(self) -> None:
        """Asks Ray which groups are gone, where their owner may remove them."""
        self._removed |= {
            name
            for name, held in self.held.items()
            if held.group is not None and self._groups.is_gone(held.group)
        }

    def locate(self) -> frozenset[int]:
        """Which GPUs other Ray users hold, by a new look."""
        self._foreign = None
        if self.look(1) is None:
            self._foreign = frozenset(range(self._gpu_count)) - self.ours()
        return self.foreign

    def look(self, count: int, to_be_sure: bool = False) -> frozenset[int] | None:
        """The wholly free GPUs, or ``None`` if there are fewer than ``count``.

        Some of them may still count as held by the service: these are steered past, and not assigned.

        Args:
            count: how many there must be.
            to_be_sure: look even if Ray's records show fewer, since on a busy
                cluster they lag by more than the usual wait.
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
            # Others may use the free part of a GPU that we share; then that is not the reason.
            expected = min(len(not_ours), math.ceil(whole - 1e-6) if rests else math.floor(whole + 1e-6))
            # Something that counted as held is free: its owner has ended, which is not known here yet.
            is_lost = whole > len(not_ours) + 1e-6
            # If others use parts, it is not known of which GPUs.
            in_parts = bool(rests) and abs(whole - round(whole)) > 1e-6
            if expected == len(not_ours) and not is_lost and not in_parts:
                self._foreign = frozenset()
        if is_lost:
            self._notice_removed()
            not_ours |= self._given_back()
            expected = math.floor(self._groups.available() - sum(self.rests().values()) / WHOLE + 1e-6)
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
        # Others hold some. Their number is only known up to the lag of the records and up to shared GPUs,
        # which count as partly free but cannot be taken whole: so ask for fewer until Ray gives them.
        amounts: Sequence[int] = range(expected, count - 1, -1)
        if not amounts and to_be_sure and count <= len(not_ours):
            amounts = sorted({len(not_ours), count}, reverse=True)
        for several in amounts:
            patience = LOOK_DEADLINE_SECONDS
            if to_be_sure and several == count:
                # GPUs that were just given back here become free as soon as the workers on them have died.
                patience = max(patience, self._freed_at + RETURN_SECONDS - time.monotonic())
            seen = self._groups.lowest_free(several, patience)
            self._looked_at = time.monotonic()
            if seen is not None:
                self._foreign = not_ours - frozenset(seen)
                return frozenset(seen)
        self._foreign = None
        return None

    def _given_back(self) -> frozenset[int]:
        """GPUs that count as ours although their owners have removed their groups, or ended."""
        return self.ours() - {gpu for held in self._standing() for gpu in held.taken}

    def catch_up(self, free: Collection[int]) -> None:
        """Waits until Ray's records show what was given back here, or taken for a moment to look.

        Ray's scheduler uses them: a group that is asked for before that fails at once, and is tried again only
        after up to a second.
        """
        expected = len(free) + sum(self.known_rests().values()) / WHOLE - 1e-6
        until = max(self._freed_at, self._looked_at) + CATCH_UP_SECONDS
        while (left := until - time.monotonic()) > 0:
            began = time.monotonic()
            if self._groups.available() >= expected:
                return
            time.sleep(min(left, max(0.005, 3 * (time.monotonic() - began))))
