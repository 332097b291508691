"""The ranks of nodes for a kind of request."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter

from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.policy import Policy, Rank

Bits = int
"""A set of nodes: bit *i* is the *i*-th node by name and id. Thousands of nodes are compared in one operation."""


class Offers:
    """The ranks of nodes for one kind of request: rank -> nodes, the best rank first."""

    def __init__(self, nodes: dict[Rank, Bits]) -> None:
        self._nodes = nodes
        self._best_first = sorted(nodes)

    def copy(self) -> Offers:
        """A copy that can be changed on its own."""
        return Offers(dict(self._nodes))

    def move(self, node: Bits, old: Rank | None, new: Rank | None) -> None:
        """Records that one node's rank has changed; ``None`` is "has no room"."""
        if old == new:
            return
        if old is not None:
            left = self._nodes[old] & ~node
            if left:
                self._nodes[old] = left
            else:
                del self._nodes[old]
                self._best_first.remove(old)
        if new is not None:
            if new not in self._nodes:
                insort(self._best_first, new)
            self._nodes[new] = self._nodes.get(new, 0) | node

    def best(self, preference: Iterable[Bits]) -> Bits:
        """The node to take, as a set of one; empty if no node of ``preference`` has room.

        The first half of the rank counts first. Among the nodes that are equal in it, those in the first of
        the ``preference`` sets (disjoint, most wanted first) that holds any; among these the second half;
        then the order of nodes.
        """
        sets = list(preference)
        for _, equals in groupby(self._best_first, key=itemgetter(0)):
            ranks = list(equals)
            for wanted in sets:
                for rank in ranks:
                    found = self._nodes[rank] & wanted
                    if found:
                        return found & -found
        return 0


def is_usable(node: Node) -> bool:
    """Whether anything may be placed on its GPUs."""
    return node.problem is None and len(node.topology) > 0


def rank_of(node: Node, needs: Needs, policy: Policy) -> Rank | None:
    """The node's rank for a request; ``None`` if it has no GPUs that meet the request.

    CPUs are not checked here.
    """
    if not needs.any:
        return _rank_of_cpus(node, policy)
    offer = node.offer(needs)
    if offer is None or offer.slowness > needs.slowest:
        return None
    replicas = node.replicas if policy is Policy.ROUND_ROBIN else 0  # counted only if it matters
    return policy.rank(offer, not needs.whole, replicas)


def usable_rank(node: Node, needs: Needs, policy: Policy) -> Rank | None:
    """The same; also ``None`` if nothing may be placed there."""
    usable = is_usable(node) if needs.any else node.problem is None
    return rank_of(node, needs, policy) if usable else None


def _rank_of_cpus(node: Node, policy: Policy) -> Rank:
    """The rank of a node for CPU replicas: under every policy nodes without GPUs come first."""
    gpus = len(node.topology) > 0
    match policy:
        case Policy.PACK:
            return (gpus, node.cpu_milli), ()
        case Policy.ROUND_ROBIN:
            return (gpus,), (node.replicas,)
        case Policy.LEAST_LOADED:
            return (gpus, -node.cpu_milli), ()
        case _:  # the fullest, whose remaining CPUs the fewest others could use
            return (gpus,), (node.free_slots if gpus else node.cpu_milli,)
