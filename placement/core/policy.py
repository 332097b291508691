"""Which node goes first: the policies that a deployment may choose from."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from placement.core.shape import Offer

Rank = tuple[tuple[Any, ...], tuple[Any, ...]]
"""How welcome a node is to a request; the least is best. Between the halves, replicas of the same deployment count."""


class Policy(StrEnum):
    """Which node goes first among those with room.

    For CPU replicas it is one without GPUs under every policy; then CPUs count instead of GPUs
    (:func:`placement.core.offers.rank_of`).
    """

    TOPOLOGY = "topology"
    """The fastest set on offer; then fewest replicas of the same deployment; then what others miss least.

    A share of a GPU goes where others miss it least; only among equals replicas spread."""
    PACK = "pack"
    """The fullest node."""
    SPREAD = "spread"
    """The node with the fewest replicas of the same deployment; then as topology."""
    ROUND_ROBIN = "round_robin"
    """The nodes in turn: the fewest replicas of the same deployment, then of all, then by name."""
    LEAST_LOADED = "least_loaded"
    """The node with the most free GPUs; then as topology."""
    FRAGMENTATION = "fragmentation"
    """The fastest set on offer; then what leaves most room for all that is asked for (:mod:`placement.core.room`);
    then fewest replicas of the same deployment. For fleets of shares, single GPUs and large sets."""

    def rank(self, offer: Offer, shared: bool = False, replicas: int = 0) -> Rank:
        """Sorts offers, of shares if ``shared``, of nodes with so many replicas (which only round robin asks).

        Before the second half, replicas of the same deployment count.
        """
        slowness, loss, rest, free = offer
        match self:
            case Policy.TOPOLOGY if shared:
                return (slowness, loss, rest, free), ()
            case Policy.TOPOLOGY | Policy.FRAGMENTATION:
                return (slowness,), (loss, rest, free)
            case Policy.PACK:
                return (free, rest, slowness, loss), ()
            case Policy.SPREAD:
                return (), (slowness, loss, rest, free)
            case Policy.ROUND_ROBIN:
                return (), (replicas,)
            case Policy.LEAST_LOADED:
                return (-free,), (slowness, loss, rest)
