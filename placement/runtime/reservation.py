"""Exact GPUs on an unmodified Ray: hold, create, verify, retry.

Ray always gives the lowest-numbered free GPUs of a node. So the wanted ones are made the lowest:

1. Look: which GPUs are free? Where nobody else uses the node that is known; else all free ones are taken
   for a moment by one task, which says which they are.
2. Choose the best set among them.
3. Steer: walk the free GPUs upwards. Take each run of unwanted ones with a filler and each run of wanted
   ones, but for the last, with a hold; then remove the holds and create the real group, which now gets
   exactly the wanted GPUs. Nothing ever runs in a hold or filler, so that removing it takes effect at once
   (see :mod:`placement.runtime.groups`).
4. Verify from inside every bundle. Others may have taken or freed a GPU meanwhile: then give everything back
   and start over, a bounded number of times.

Nothing is held for longer than one pass takes (tens of milliseconds), and nothing at all after a refusal.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from placement.core.score import Needs, choose, ray_set, score
from placement.core.topology import Topology

MAX_ATTEMPTS = 12
VIEW_LAG_SECONDS = 0.15
"""Ray's books follow a change after at most 0.1 s (measured); they are trusted again after this long."""
READY_DEADLINE_SECONDS = 0.15
"""Long enough for Ray to try twice; see :func:`~placement.runtime.groups.ready_or_removed`."""
LOOK_DEADLINE_SECONDS = 0.25


class Groups(Protocol):
    """What steering needs of a node; :class:`~placement.runtime.groups.NodeGroups` is the real one."""

    def hold(self, count: int) -> Any:
        """Takes the lowest free GPUs, for a moment."""

    def reserve(self, name: str, count: int) -> Any:
        """Takes the lowest free GPUs, one per bundle, to stay."""

    def ready_or_removed(self, group: Any, deadline_seconds: float) -> bool:
        """Waits for a group; one that could not be had is gone."""

    def remove(self, group: Any) -> None:
        """Gives a group back."""

    def gpus_of(self, group: Any, count: int) -> list[int]:
        """Which GPU each bundle holds, as a worker inside says."""

    def lowest_free(self, count: int, deadline_seconds: float) -> list[int] | None:
        """Which GPUs are the lowest free ones; ``None`` if there are not that many."""

    def available(self) -> int:
        """Whole free GPUs in Ray's books."""


@dataclass(frozen=True)
class Reserved:
    """A group that holds exactly ``gpus``: ``bundles[i]`` holds ``gpus[i]``. And what Ray alone would have given."""

    group: Any
    gpus: tuple[int, ...]
    bundles: tuple[int, ...]
    ray_gpus: tuple[int, ...]
    attempts: int


@dataclass(frozen=True)
class Refused:
    """Nothing is held. ``full``: there were too few free GPUs, rather than too much interference."""

    reason: str
    attempts: int
    full: bool


class NodeReserver:
    """Reserves GPUs of one node, one request at a time.

    Args:
        groups: the node's placement groups.
        gpu_count: GPUs that Ray has on the node.
    """

    def __init__(self, groups: Groups, gpu_count: int) -> None:
        self._groups = groups
        self._gpu_count = gpu_count
        self._held: dict[str, tuple[int, ...]] = {}
        self._foreign: frozenset[int] | None = frozenset()
        self._changed_at = float("-inf")

    @property
    def foreign(self) -> frozenset[int]:
        """GPUs that other Ray users held when they were last looked at."""
        return (self._foreign or frozenset()) - self._ours()

    def adopt(self, holdings: Iterable[tuple[str, Iterable[int]]]) -> None:
        """Notes which (name, GPUs) are reserved already, and that nothing else of ours is."""
        self._held = {name: tuple(gpus) for name, gpus in holdings}

    def remove(self, name: str, group: Any) -> None:
        """Gives a reserved group back."""
        self._groups.remove(group)
        self._held.pop(name, None)
        self._changed_at = time.monotonic()

    def reserve(
        self, name: str, needs: Needs, topology: Topology, lost: frozenset[int] = frozenset(), more: int = 0
    ) -> Reserved | Refused:
        """Reserves the best GPUs that are free, not ``lost`` and good enough, in a new group called ``name``.

        As many ``more`` reservations with the same needs will follow, and should find room.
        """
        count = needs.gpus
        reason, full, attempt = "", False, 0
        for attempt in range(1, MAX_ATTEMPTS + 1):
            free = self._look(count)
            wanted = choose(topology, free - lost, needs, more) if free is not None else None
            if free is None or wanted is None:
                reason, full = (
                    f"fewer than {count} of its GPUs are free, sound and as close as demanded",
                    True,
                )
                # The books may simply be behind a release; once they are not, believe them.
                if attempt > 3:
                    break
                time.sleep(VIEW_LAG_SECONDS / 2)
                continue
            outcome = self._take(f"{name}:{attempt}", free, wanted)
            if outcome is None:
                reason, full = "another Ray user took GPUs meanwhile", False
            else:
                group, slots = outcome
                got = tuple(sorted(slots))
                as_good = not more and score(topology, got) >= score(topology, wanted)
                if got == wanted or (as_good and not lost & set(got) and choose(topology, got, needs)):
                    self._held[name] = got
                    bundles = tuple(slots.index(gpu) for gpu in got)
                    return Reserved(group, got, bundles, ray_set(free, count) or got, attempt)
                self._groups.remove(group)
                reason, full = f"got GPUs {list(got)} instead of {list(wanted)}", False
            self._foreign = None
            self._changed_at = time.monotonic()
            time.sleep(0.01 * attempt)
        return Refused(reason, attempt, full)

    def _ours(self) -> frozenset[int]:
        return frozenset(gpu for gpus in self._held.values() for gpu in gpus)

    def _look(self, count: int) -> frozenset[int] | None:
        """The free GPUs, or ``None`` if there are fewer than ``count``."""
        not_ours = frozenset(range(self._gpu_count)) - self._ours()
        expected = len(not_ours) - len(self.foreign)
        quiet = time.monotonic() - self._changed_at
        if self._foreign is None and quiet < VIEW_LAG_SECONDS:
            time.sleep(VIEW_LAG_SECONDS - quiet)
        if self._foreign is None or quiet > VIEW_LAG_SECONDS:
            expected = min(len(not_ours), self._groups.available())
            if expected == len(not_ours):
                self._foreign = frozenset()
        if expected == len(not_ours) and self._foreign is not None:
            return not_ours if len(not_ours) >= count else None
        # Others hold some. How many is known to within the lag of the books and to within shared GPUs,
        # which count as partly free but cannot be had whole: so ask for fewer until the answer comes.
        for several in range(expected, count - 1, -1):
            seen = self._groups.lowest_free(several, LOOK_DEADLINE_SECONDS)
            if seen is not None:
                self._foreign = not_ours - frozenset(seen)
                return frozenset(seen)
        self._foreign = None
        return None

    def _take(self, name: str, free: frozenset[int], wanted: tuple[int, ...]) -> tuple[Any, list[int]] | None:
        """Creates the real group with the wanted GPUs made the lowest free ones. Leaves nothing else held."""
        groups = self._groups
        holds: list[Any] = []
        fillers: list[Any] = []
        real: Any = None
        done = False
        try:
            for run, is_wanted in _runs(free, wanted)[:-1]:
                (holds if is_wanted else fillers).append(groups.hold(run))
            if not all(groups.ready_or_removed(group, READY_DEADLINE_SECONDS) for group in holds + fillers):
                return None
            while holds:
                groups.remove(holds.pop())
            real = groups.reserve(name, len(wanted))
            if not groups.ready_or_removed(real, READY_DEADLINE_SECONDS):
                return None
            while fillers:
                groups.remove(fillers.pop())
            slots = groups.gpus_of(real, len(wanted))
            done = True
            return real, slots
        finally:
            self._changed_at = time.monotonic()
            for group in holds + fillers + ([real] if real is not None and not done else []):
                groups.remove(group)


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
