"""What became of the nodes that came for what was asked: whether it was placed on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from placement.runtime.autoscaler import Cluster, Heard
from placement.runtime.needs import Need

KNOWN_SECONDS = 60.0
"""By when a node that arrived has said what its GPUs are: a first NVML reading may take 30 s."""

PLACED_SECONDS = 30.0
"""By when what arrived is placed from then on, or else is not wanted on that node."""


class Verdict(Enum):
    """How an arrival ended."""

    PLACED = auto()
    """It was placed, and may be wanted anew by now."""
    LOST = auto()
    """The nodes are no more, or hold something that has waited for longer. This is nothing against the next."""
    UNWANTED = auto()
    """It waits all the same: the planner does not want these nodes."""


@dataclass
class Arrival:
    """What arrived, until it is clear whether it was placed."""

    need: Need
    held: Mapping[str, Mapping[str, float]]
    at: float
    known: bool = False
    gone_since: float | None = None


class Arrivals(dict[str, Arrival]):
    """Key -> what arrived for it. Not thread-safe.

    Args:
        cluster: Ray.
    """

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self._cluster = cluster

    def judge(
        self,
        wanted: Mapping[str, Need | str],
        known: frozenset[str],
        heard: tuple[Heard | None, float],
        now: float,
    ) -> Iterator[tuple[str, Arrival, Verdict]]:
        """The arrivals of which it is clear by now how they ended; these are in it no more.

        Args:
            wanted: key -> need, or why nothing is asked for it.
            known: ids of nodes whose GPUs are known.
            heard: what the autoscaler said last, and when.
            now: of :func:`time.monotonic`.
        """
        for key, arrival in list(self.items()):
            if not arrival.known and (arrival.held.keys() <= set(known) or now - arrival.at >= KNOWN_SECONDS):
                arrival.known, arrival.at = True, now
            gone = arrival.gone_since
            if gone is not None and now - gone >= PLACED_SECONDS:
                verdict = Verdict.PLACED
            elif wanted.get(key) != arrival.need:
                arrival.gone_since = now if gone is None else gone
                continue
            elif _is_gone(arrival, *heard):
                verdict = Verdict.LOST
            elif arrival.known and now - arrival.at >= PLACED_SECONDS:
                verdict = Verdict.LOST if self._is_taken(arrival) else Verdict.UNWANTED
            else:
                arrival.gone_since = None
                continue
            del self[key]
            yield key, arrival, verdict

    def _is_taken(self, arrival: Arrival) -> bool:
        """Whether others have by now what it was given back for."""
        free = self._cluster.free()
        return any(
            free.get(node_id, {}).get(resource, 0.0) < amount - 1e-6
            for node_id, amounts in arrival.held.items()
            for resource, amount in amounts.items()
        )


def _is_gone(arrival: Arrival, heard: Heard | None, heard_at: float) -> bool:
    """Whether the nodes that came are no more."""
    return heard is not None and heard_at > arrival.at and not heard.nodes.keys() & arrival.held.keys()
