"""What a cluster could hold if nothing were placed on it: whether waiting can help at all.

What is called impossible here is impossible for the nodes that are there. The reverse need not hold: nodes that may not
be used now count, and CPUs, memory, the memory that is free on GPUs, and limits by what else is placed do not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from placement.core.advice import asking_for_wider, how_apart
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.limits import allowed, too_small
from placement.core.needs import Needs, Within
from placement.core.node import Node
from placement.core.request import Request
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import Path
from placement.core.wording import any_of, reached
from placement.errors import counted

NO_USE = "waiting does not help unless such a node joins"

_PLENTY = 1 << 40
"""More replicas than anybody declares."""


class FloorMiss(NamedTuple):
    """A floor that no node reaches, even with all its GPUs free.

    Attributes:
        within: whether it is the distance; else it is the bandwidth.
        nearest: the node that comes closest, and what it reaches.
        advice: what would help.
    """

    within: bool
    nearest: str
    advice: str


def floor_miss(snapshot: Snapshot, request: Request, usable: Sequence[Node]) -> FloorMiss | None:
    """Why no node reaches the floors of a request; ``None`` if one does, or may, as its links are unknown.

    Args:
        snapshot: the cluster.
        request: the request.
        usable: the nodes that it may use now, for what is free on them.
    """
    needs = request.needs._replace(free_memory_bytes=0)
    candidates = allowed(snapshot, request)
    nodes = [node for node, _ in _emptied(candidates, needs)]
    if any(
        _may_reach(node, needs._replace(gpus=size)) for size in _pieces(request, candidates) for node in nodes
    ):
        return None
    one = request.stages * request.parts == 1
    if (nearest := _best(nodes, needs)) is None:
        nearest = _best(nodes, needs._replace(within=Within.NODE))
        if nearest is None:  # there are not as many GPUs
            return None
        new = "add a node with such a set" if one else "add nodes with such sets"
        advice = any_of(new, asking_for_wider(nearest, needs))
        return FloorMiss(True, how_apart(nearest, needs.gpus, needs.within, "GPUs"), f"{advice}; {NO_USE}")
    best = score(nearest.topology, nearest.best(needs) or ())
    offers = [offer for node in usable if (offer := node.offer(request.needs))]
    now = -min(offers).slowness / 1000 if offers else 0.0
    lower = f"lower min_bandwidth_gb_per_s to {best.bandwidth_gb_per_s:g}"
    lower += f" ({now:g} for what is free now)" if 0 < now < best.bandwidth_gb_per_s else ""
    advice = any_of(lower, "add a faster node" if one else "add faster nodes")
    reaches = f"reaches {reached(best)} with {needs.gpus} GPUs (weakest link {best.link_name})"
    return FloorMiss(False, f"{nearest.name} {reaches}", f"{advice}; {NO_USE}")


def _best(nodes: Iterable[Node], needs: Needs) -> Node | None:
    """The node with the best set, whatever its bandwidth; ``None`` if none has such a set."""
    offers = [(offer, node.name, node.id, node) for node in nodes if (offer := node.offer(needs))]
    return min(offers)[3] if offers else None


def _may_reach(node: Node, needs: Needs) -> bool:
    """Whether the free GPUs of a node reach the floors, as far as their links are known."""
    if _has_unknown_links(node):
        return too_small(node, needs) is None
    offer = node.offer(needs)
    return offer is not None and offer.slowness <= needs.slowest


def _has_unknown_links(node: Node) -> bool:
    """Whether links between its GPUs are unknown. They may become known once the node has answered."""
    return any(link.path is Path.UNKNOWN for gpu, row in enumerate(node.topology.links) for link in row[:gpu])


def _pieces(request: Request, nodes: Sequence[Node]) -> list[int]:
    """How many GPUs a set of the request may have: as many as asked for, or fewer where it may be cut.

    When it is cut, and how, says :func:`placement.core.gangs.splits`.
    """
    gpus = request.needs.gpus
    whole = gpus * request.parts * (request.stages if request.divisible else 1)
    may_cut = request.divisible or any(GPU_DOMAIN_LABEL in node.labels for node in nodes)
    largest = max((node.whole_gpus for node in nodes if node.problem is None), default=0)
    others_limit = request.apart_from or request.kept_away_by or request.near_to
    if not request.needs.whole or not may_cut or (largest >= whole == gpus and not others_limit):
        return [gpus]
    least = 2 if largest > 1 else 1
    return [size for size in range(gpus, 0, -1) if whole % size == 0 and (size >= least or size == gpus)]


class Capacity(NamedTuple):
    """What the nodes that a request may go to could hold.

    Attributes:
        gpus: their GPUs, without those that are divided by MIG.
        replicas: at most so many replicas find room at the same time.
        where: the nodes, as the beginning of a clause.
        noun: how their GPUs are called.
    """

    gpus: int = 0
    replicas: int = 0
    where: str = ""
    noun: str = "GPU"

    def lacks(self, request: Request, replicas: int, gang: bool = False) -> str:
        """Why all replicas of a deployment can never be placed on the nodes that are there.

        Args:
            request: what is asked for.
            replicas: how many replicas there are to be, placed or not.
            gang: they are placed all at once.

        Returns:
            A clause that ends with what would help; empty if all of them may find room, and also if the refusal itself
            says why not even one does.
        """
        needs = request.needs
        asked = needs.gpus * request.stages * request.parts * replicas
        end = "waiting does not help" + (" all of them" if replicas > 1 and not gang else "")
        end += "" if needs.named else " unless nodes join"
        if needs.whole and 0 < self.gpus < asked:
            who = f"its {replicas} replicas need" if replicas > 1 else "it needs"
            return f"{self.where} {counted(self.gpus, self.noun)}, and {who} {asked}: {end}"
        if 0 < self.replicas < replicas:
            return f"{self.where} room for {self.replicas} of its {replicas} replicas when all is free: {end}"
        return ""


def capacity(snapshot: Snapshot, request: Request) -> Capacity:
    """What the nodes of a cluster that a request may go to could hold.

    Nothing is known of requests without GPUs, and of placement groups whose bundles may lie on several nodes.
    """
    if not request.needs.gpus or request.bundles:
        return Capacity()
    needs = request.needs._replace(free_memory_bytes=0)
    candidates = allowed(snapshot, request)
    nodes = _emptied(candidates, needs)
    per_replica = needs.gpus * request.stages * request.parts
    most = 0
    for size in _pieces(request, candidates):
        sets = [count * _sets(node, needs._replace(gpus=size)) for node, count in nodes]
        fit = max(sets, default=0) if needs.named else sum(sets)  # all named GPUs are on one node
        most = max(most, fit * size // per_replica)
    everywhere = len(candidates) == sum(1 for node in snapshot.nodes if len(node.topology))
    where = "the whole cluster has" if everywhere else "the nodes that it may use have"
    noun = "whole GPU" if any(node.slots for node in candidates) else "GPU"
    return Capacity(sum(node.whole_gpus for node in candidates), most, where, noun)


def _sets(node: Node, needs: Needs) -> int:
    """How many sets a node could hold; plenty if too little is known of it."""
    if (needs.memory_bytes or needs.profile) and node.gpu_memory_bytes is None and not node.slots:
        return _PLENTY
    if _has_unknown_links(node):
        needs = needs._replace(within=Within.NODE, min_bandwidth_gb_per_s=0.0)
    return node.copies(needs)


def _emptied(nodes: Iterable[Node], needs: Needs) -> list[tuple[Node, int]]:
    """The nodes with nothing on them: the first of each kind, and how many there are of it."""
    kinds: dict[Hashable, list[Node]] = {}
    for node in nodes:
        slots = tuple(sorted(node.slots.items()))
        kind = node.shape, node.gpu_memory_bytes, slots, node.id if needs.named else ""
        kinds.setdefault(kind, []).append(node)
    return [(alike[0].emptied().only_named(needs), len(alike)) for alike in kinds.values()]
