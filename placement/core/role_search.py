"""The search for the places of a group: depth first, replica after replica; see :mod:`placement.core.roles`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from placement.core.offers import Bits
from placement.core.role_places import NONE, NOTHING, Cost, Level, Piece, Places, plus
from placement.core.routes import Gpus

STEPS = 20_000
"""How many places one round of the search considers; then it only completes the choice by taking each first place as
the best; there are a few rounds. Some tenths of a second each."""


class _Found(NamedTuple):
    """Places for some replicas.

    Attributes:
        worst: the slowest route between two that talk.
        at: where all replicas are, including those placed before.
    """

    worst: Level
    cost: Cost
    at: dict[Piece, tuple[Bits, Gpus]]


def solve(places: Places, todo: Sequence[Piece]) -> _Found | None:
    """The best places for some of the replicas, by whole units; ``None`` if there are none."""
    if not todo:
        return _Found(NONE, NOTHING, places.placed())
    if not places.may_fit(todo):
        return None
    stood = {places.unit_of(piece) for piece in places.placed()}
    fresh = [piece for piece in todo if places.unit_of(piece) not in stood]
    unit = [one for one in fresh if places.unit_of(one) == places.unit_of(fresh[0])]
    several = 0 < len(unit) < len(todo)
    best: _Found | None = None
    least = NONE
    if several:  # no unit can do better beside others than alone
        alone = solve(places, unit)
        if alone is None:
            return None
        least = alone.worst
        best = _Run(places, todo, least).first()
    if best is None:
        best = _Run(places, todo, places.farthest).first()
        while best is not None and best.worst > least:
            better = _Run(places, todo, (best.worst[0], best.worst[1] - 1)).first()
            if better is None:
                break
            best = better
    if best is None:
        return None
    bound = NOTHING
    if several and not places.bounded:
        alone = _Run(places, unit, best.worst).best()
        bound = alone.cost if alone is not None and not places.bounded else NOTHING
    return _Run(places, todo, best.worst, bound, stood).best() or best


def fits(places: Places, todo: Sequence[Piece]) -> bool:
    """Whether some of the replicas have places at all, as far as the search comes; unit by unit."""
    return places.may_fit(todo) and _Run(places, todo, places.farthest).first() is not None


class _Run:
    """One search: depth first, replica after replica, the best place first.

    Args:
        places: those that they may have.
        todo: the replicas, unit by unit.
        limit: no route is slower.
        bound: the least cost of a unit of which nothing is placed yet.
        stood: the units of which something is placed already.
    """

    def __init__(
        self,
        places: Places,
        todo: Sequence[Piece],
        limit: Level,
        bound: Cost = NOTHING,
        stood: Iterable[int] = (),
    ) -> None:
        self._places, self._todo, self._now = places, todo, places.begin(limit)
        units, known, ends = [places.unit_of(piece) for piece in todo], set(stood), len(todo)
        self._begins = [units.index(unit) for unit in units]
        self._ends = [len(units) - units[::-1].index(unit) for unit in units]
        self._least = [NOTHING] * (ends + 1)
        """A lower bound of the cost of all replicas from one on."""
        for i in range(ends - 1, -1, -1):
            before = [*places.standing_of(units[i]), *todo[self._begins[i] : i]]
            self._least[i] = plus(self._least[i + 1], places.least(todo[i], before))
            if i == self._begins[i] and units[i] not in known:
                self._least[i] = max(self._least[i], plus(self._least[self._ends[i]], bound))
        self._states: dict[object, Cost] = {}
        self._found: _Found | None = None
        self._any = False

    def first(self) -> _Found | None:
        """The first places found."""
        self._any = True
        return self.best()

    def best(self) -> _Found | None:
        """The places with the least cost."""
        self._dive(0, NONE, NOTHING)
        return self._found

    def _dive(self, i: int, worst: Level, cost: Cost) -> bool:
        """Places the replicas from one on; returns whether nothing better can follow."""
        now = self._now
        if i == len(self._todo):
            self._found = _Found(worst, cost, dict(now.at))
            return self._any or cost <= self._least[0]
        piece = self._todo[i]
        name = piece[0]
        unit = sorted((piece[:2], now.at[piece]) for piece in self._todo[self._begins[i] : i])
        homes = self._places.homes(now)
        state = i, tuple(unit), tuple(sorted(now.left.items())), tuple(sorted(homes.items()))
        if state in self._states and (self._any or self._states[state] <= cost):
            return False
        self._states[state] = cost
        for turn, option in enumerate(self._places.options(now, piece, self._todo[i : self._ends[i]])):
            later = plus(cost, option.cost)
            if self._found is not None and plus(later, self._least[i + 1]) >= self._found.cost:
                continue
            if turn and now.seen > STEPS:
                self._places.cut_off = True
                return True
            bit, before = option.bit, now.left.get(option.bit)
            now.left[bit] = self._places.taken(name, before, option)
            now.at[piece] = bit, option.gpus
            now.crowd[bit, name] = now.crowd.get((bit, name), 0) + 1
            done = self._dive(i + 1, max(worst, option.worst), later)
            now.crowd[bit, name] -= 1
            del now.at[piece]
            if before is None:
                del now.left[bit]
            else:
                now.left[bit] = before
            if done:
                return True
        return False
