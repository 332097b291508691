"""Which shapes of needs are not asked for now, and why; and in which form the others are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from placement.runtime.backoff import Backoff
from placement.runtime.needs import Need, Way

INFEASIBLE_SECONDS = 30.0, 3600.0
"""The first and the longest wait before what no node type could hold is asked for again."""

REFUSED_SECONDS = 300.0, 3600.0
"""The same for a shape for which unsuitable nodes joined."""


@dataclass(frozen=True)
class Setback:
    """Why a shape is not asked for now.

    Attributes:
        infeasible: no node type can hold it now; otherwise unsuitable nodes joined.
        why: in words.
        since: when it failed, by :func:`time.monotonic`.
        until: when it may be asked for again, likewise.
    """

    infeasible: bool
    why: str
    since: float
    until: float


class Shapes:
    """The failures of shapes; a shape is a need as text. Not thread-safe."""

    def __init__(self) -> None:
        self._infeasible = Backoff(*INFEASIBLE_SECONDS)
        self._refused = Backoff(*REFUSED_SECONDS)
        self._why: dict[str, str] = {}
        self._way: dict[Need, int] = {}

    def way(self, need: Need) -> Way:
        """The form in which a need is asked for."""
        return need.ways[self._way.get(need, 0)]

    def next_way(self, need: Need, way: Way, largest: float) -> None:
        """Records that no node type can hold a need in this form: it is asked for in another form, or later.

        Args:
            need: the need.
            way: the form in which it was asked for.
            largest: the most GPUs of an existing node, or of one that may be on its way.
        """
        after = need.ways.index(way) + 1
        if after < len(need.ways) and (
            not need.ways[after].smaller_than or largest < need.ways[after].smaller_than
        ):
            self._way[need] = after
        else:
            self._way.pop(need, None)
            self.fail(need, f"no node type of this cluster can hold {need}, or its maximum is reached")

    def fail(self, need: Need, why: str) -> None:
        """Records that it could not be asked for; it is tried again later."""
        self._note(self._infeasible, need, why)

    def refuse(self, need: Need, why: str) -> None:
        """Records that unsuitable nodes joined; this shape is not asked for again for minutes."""
        self._note(self._refused, need, why)

    def _note(self, backoff: Backoff, need: Need, why: str) -> None:
        shape = str(need)
        if shape not in backoff.waiting():
            backoff.fail(shape)
            self._why[shape] = why

    def arrived(self, need: Need, since: float) -> None:
        """Records that a node joined that was asked for at that time."""
        failed = self._infeasible.get(str(need))
        if failed and since >= failed[1] - failed[0]:
            del self._infeasible[str(need)]

    def placed(self, need: Need) -> None:
        """Records that it was placed on a node that joined for it."""
        self._refused.pop(str(need), None)

    def failed(self, shape: str) -> bool:
        """Whether it failed, and has not succeeded since."""
        return shape in self._infeasible or shape in self._refused

    def setbacks(self) -> dict[str, Setback]:
        """Shape -> why it is not asked for now; a refusal takes precedence."""
        return dict([*self._setbacks(self._infeasible, True), *self._setbacks(self._refused, False)])

    def _setbacks(self, backoff: Backoff, infeasible: bool) -> Iterator[tuple[str, Setback]]:
        for shape in backoff.waiting():
            wait, until = backoff[shape]
            yield shape, Setback(infeasible, self._why[shape], until - wait, until)
