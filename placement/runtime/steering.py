"""Steering: makes Ray give exactly the wanted GPUs of a node.

Ray always gives the lowest-numbered free GPUs of a node. So the wanted ones are made the lowest: walk the free GPUs
upwards. Take each run of unwanted ones with a filler and each run of wanted ones, except the last, with a hold; then
remove the holds and create the real group, which now gets exactly the wanted GPUs. Nothing runs in these holds and
fillers, so removing one takes effect at once (see :mod:`placement.runtime.groups`).

A share of a GPU is steered in the same way. Ray gives it on the GPU with the smallest free part that is large enough,
so the free parts that would come before the wanted one are filled for a moment. An unknown free part shows when
the share lands there: it then serves as one more filler, and the share is tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import groupby
from typing import Any

from placement.core.needs import WHOLE
from placement.core.shares import OPENED, Portions
from placement.runtime import faults
from placement.runtime.free_gpus import BOOKS_LAG_SECONDS, FreeGpus, Groups

MAX_STRAY_SHARES = 6
"""How many unknown free parts are filled by a share that landed there."""
MAX_UNKNOWN_PARTS = 32
"""How often they are looked for, for several shares at once."""
POOL, OPEN = "pool", "open"
"""The kinds of GPUs that are steered to: those that are to be the lowest free ones, and those that are opened."""
READY_DEADLINE_SECONDS = 0.15
"""Long enough for Ray to try twice; see :func:`~placement.runtime.groups.ready_or_removed`."""


class Steerer:
    """Steers Ray on one node.

    Args:
        groups: the node's placement groups.
        gpus: what is known of its GPUs.
    """

    def __init__(self, groups: Groups, gpus: FreeGpus) -> None:
        self._groups, self._gpus = groups, gpus

    def create(
        self, create: Callable[[], Any], free: frozenset[int], wanted: tuple[int, ...]
    ) -> tuple[Any, list[int]] | None:
        """Makes the wanted GPUs the lowest free ones and creates the real group. Nothing else stays held."""
        groups = self._groups
        fillers = self.steer(free, wanted)
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
            slots = groups.gpus_of(real, dict.fromkeys(range(len(wanted)), 1))
            faults.point("agent.verified")
            done = True
            return real, slots
        finally:
            self._gpus.note_change()
            for group in fillers + ([real] if real is not None and not done else []):
                groups.remove(group)

    def steer(self, free: frozenset[int], wanted: tuple[int, ...]) -> list[Any] | None:
        """Makes the wanted GPUs the lowest free ones.

        Returns:
            The fillers that keep it so; ``None``, with nothing held, if other users took or freed GPUs.
        """
        groups = self._groups
        holds: list[Any] = []
        fillers: list[Any] = []
        done = False
        self._gpus.catch_up(free)
        try:
            for kind, count in _runs(free, dict.fromkeys(wanted, POOL))[:-1]:
                (holds if kind == POOL else fillers).append(groups.hold(count))
            if not all(groups.ready_or_removed(group, READY_DEADLINE_SECONDS) for group in holds + fillers):
                return None
            done = True
            return fillers
        finally:
            self._gpus.note_change()
            for group in holds + ([] if done else fillers):
                groups.remove(group)

    def create_share(
        self, name: str, beside: Mapping[str, float], share: int, free: frozenset[int], wanted: int
    ) -> Any:
        """Creates the real group on the wanted GPU, while every free part that Ray would prefer is filled.

        Returns:
            The group, or ``None``. Nothing else stays held.
        """
        groups = self._groups
        fillers = self.steer_share(share, free, wanted)
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
                if groups.gpus_of(group, {0: share / WHOLE}) == [wanted]:
                    kept = group
                    return group
            return None
        finally:
            self._gpus.note_change()
            for group in fillers:
                if group is not kept:
                    groups.remove(group)

    def steer_share(self, share: int, free: frozenset[int], wanted: int) -> list[Any] | None:
        """Fills every free part that Ray would prefer for a share.

        Returns:
            The fillers; ``None``, with nothing held, if other users took or freed GPUs.
        """
        groups = self._groups
        rests = self._gpus.known_rests()
        self._gpus.catch_up(free)
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
            self._gpus.note_change()
            for group in [] if done else fillers:
                groups.remove(group)

    def steer_mixed(
        self,
        least: int,
        free: frozenset[int],
        portions: Portions,
        rests: Mapping[int, int],
        usable: Collection[int],
        strayed: bool,
    ) -> list[Any] | None:
        """Leaves Ray what is chosen for shares, and whole GPUs, that are reserved at once.

        Args:
            least: thousandths of the smallest share.
            free: the wholly free GPUs.
            portions: what is chosen: its pool are then the lowest free ones, and one thousandth of the opened is taken.
            rests: GPU -> thousandths that are free, of GPUs that are shared.
            usable: those of them of which Ray may give what is free.
            strayed: there are unknown free parts: they are looked for, and filled.

        Returns:
            The fillers; ``None``, with nothing held, if other users took or freed GPUs.
        """
        groups, opened = self._groups, portions.opened

        def attracts(rest: int) -> bool:
            """Whether what opens a GPU would go to such a part instead."""
            return bool(opened) and (rest == 1 or rest >= OPENED)

        parts = sorted((rest, gpu) for gpu, rest in rests.items() if rest >= least or attracts(rest))
        runs = _runs(free, {**dict.fromkeys(portions.pool, POOL), **dict.fromkeys(opened, OPEN)})
        self._gpus.catch_up(free)
        # What comes last need not be held for a moment. A probe that finds no part lands there: to fail takes a second.
        if runs and runs[-1][0] == POOL and (not strayed or max(free) in portions.pool):
            runs.pop()
        if not strayed:
            while parts and parts[-1][1] in usable and not attracts(parts[-1][0]):
                parts.pop()
        holds: list[Any] = []
        fillers: list[Any] = []
        done = False
        try:
            for rest, gpu in parts:
                (holds if gpu in usable else fillers).append(groups.hold(rest / WHOLE))
            for kind, count in runs:
                for _ in range(count if kind == OPEN else 0):
                    holds.append(groups.hold(OPENED / WHOLE))
                    fillers.append(groups.hold(1 / WHOLE))  # it finds no smaller part than what that left
                if kind != OPEN:
                    (holds if kind == POOL else fillers).append(groups.hold(count))
            done = all(groups.ready_or_removed(group, READY_DEADLINE_SECONDS) for group in holds + fillers)
            done = done and (not strayed or self._fill_unknown(fillers, least, free))
            return fillers if done else None
        finally:
            self._gpus.note_change()
            for group in holds + ([] if done else fillers):
                groups.remove(group)

    def _fill_unknown(self, fillers: list[Any], least: int, free: Collection[int]) -> bool:
        """Adds fillers for unknown free parts, while all known ones are taken; returns whether none is left.

        The fillers are the smallest share, doubled while that lands in unknown parts, then halved as these get full.
        """
        groups = self._groups
        part, grows = least, True
        for _ in range(MAX_UNKNOWN_PARTS):
            probe = groups.hold(part / WHOLE)
            if groups.ready_or_removed(probe, READY_DEADLINE_SECONDS):
                fillers.append(probe)
                if not {*groups.gpus_of(probe, {0: part / WHOLE})} <= {*free}:
                    part *= 2 if grows and 2 * part < WHOLE else 1
                    continue
                groups.remove(fillers.pop())
                time.sleep(BOOKS_LAG_SECONDS)  # a worker ran in it
            if part == least:
                return True
            part, grows = part // 2, False  # no unknown part is as large
        return False

    def fill_strays(self, fillers: list[Any], share: int, wanted: int) -> bool:
        """Adds fillers for unknown free parts, until Ray gives the share on the wanted GPU.

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
                if groups.gpus_of(fillers[-1], {0: share / WHOLE}) == [wanted]:
                    groups.remove(fillers.pop())
                    time.sleep(BOOKS_LAG_SECONDS)  # a worker ran in it
                    done = True
                    return True
            return False
        finally:
            while fillers and not done:
                groups.remove(fillers.pop())


def _runs(free: Iterable[int], kinds: Mapping[int, str]) -> list[tuple[str | None, int]]:
    """The free GPUs up to the highest that has a kind, as runs of one kind (kind, length) in ascending order."""
    last = max(kinds, default=-1)
    alike = groupby(sorted(gpu for gpu in free if gpu <= last), kinds.get)
    return [(kind, len([*run])) for kind, run in alike]
