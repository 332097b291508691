"""Which node goes first: the policies that a deployment may choose from."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from placement.core.shape import Offer

Rank = tuple[tuple[Any, ...], tuple[Any, ...]]
"""A node's rank for a request; the least is best. Between its halves, replicas of the same deployment are compared."""


class Policy(StrEnum):
    """Which node goes first among those with room.

    For CPU replicas it is one without GPUs under every policy; then CPUs count instead of GPUs
    (:func:`placement.core.offers.rank_of`).
    """

    TOPOLOGY = "topology"
    """The fastest set on offer; then fewest replicas of the same deployment; then the set that costs others least.

    A share of a GPU goes where it costs others least; replicas spread only among equals."""
    PACK = "pack"
    """The fullest node."""
    SPREAD = "spread"
    """The node with the fewest replicas of the same deployment; then as topology."""
    ROUND_ROBIN = "round_robin"
    """The nodes in turn: the fewest replicas of the same deployment, then of all, then by name."""
    LEAST_LOADED = "least_loaded"
    """The node with the most free GPUs; then as topology."""
    FRAGMENTATION = "fragmentation"
    """The fastest set on offer; then the set that leaves most room for all kinds of requests
    (:mod:`placement.core.room`); then fewest replicas of the same deployment. For fleets of shares, single GPUs and
    large sets."""

    def rank(self, offer: Offer, shared: bool = False, replicas: int = 0) -> Rank:
        """The rank of an offer; ``shared`` for shares. Only round robin uses the number of replicas on the node.

        Replicas of the same deployment are compared before the second half.
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
