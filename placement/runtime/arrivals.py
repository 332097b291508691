"""Tracks new nodes that were asked for: whether the waiting sets were placed on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from placement.runtime.autoscaler import Cluster, Heard
from placement.runtime.needs import Need

KNOWN_SECONDS = 60.0
"""How long a new node may take to report its GPUs: a first NVML reading may take 30 s."""

PLACED_SECONDS = 30.0
"""How long placing on it may take after that; otherwise the planner does not want that node."""


class Verdict(Enum):
    """The end of an arrival."""

    PLACED = auto()
    """It was placed; by now it may be wanted again."""
    LOST = auto()
    """The nodes are gone, or hold something that waited longer. The next arrival may still succeed."""
    UNWANTED = auto()
    """It still waits: the planner does not want these nodes."""


@dataclass
class Arrival:
    """An arrival, until it is clear whether it was placed."""

    need: Need
    held: Mapping[str, Mapping[str, float]]
    at: float
    known: bool = False
    gone_since: float | None = None


class Arrivals(dict[str, Arrival]):
    """Key -> the nodes that arrived for it. Not thread-safe.

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
        """Removes and returns the arrivals whose end is known by now.

        Args:
            wanted: key -> need, or why no node is asked for.
            known: ids of nodes whose GPUs are known.
            heard: the autoscaler's last report, and its time.
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
        """Whether others hold by now what was given back for it."""
        free = self._cluster.free()
        return any(
            free.get(node_id, {}).get(resource, 0.0) < amount - 1e-6
            for node_id, amounts in arrival.held.items()
            for resource, amount in amounts.items()
        )


def _is_gone(arrival: Arrival, heard: Heard | None, heard_at: float) -> bool:
    """Whether the nodes that arrived no longer exist."""
    return heard is not None and heard_at > arrival.at and not heard.nodes.keys() & arrival.held.keys()
