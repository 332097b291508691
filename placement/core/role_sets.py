"""The sets of a node's GPUs that a replica of a group may have; see :mod:`placement.core.roles`."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import NamedTuple

from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.routes import Gpus
from placement.core.twins import twins_of

MOST_SETS = 3_000
"""So many sets of GPUs of one node are looked at for one replica; the slowest are left out."""


class Left(NamedTuple):
    """What is left of a node: slots wholly free as a bit mask, thousandths by GPU that is shared, CPUs and memory."""

    mask: int
    rests: tuple[tuple[int, int], ...]
    cpu_milli: int
    memory_bytes: int


Found = list[tuple[int, tuple[int, ...], Gpus]]
"""Sets, the most welcome first: slowness, what others lose by it, and the GPUs."""


class Sets:
    """The sets that are good enough; of those that differ in nothing, one.

    Args:
        exact_gpus: no two GPUs are alike.

    Attributes:
        bounded: some were left out.
    """

    def __init__(self, exact_gpus: bool) -> None:
        self._exact_gpus = exact_gpus
        self.bounded = False
        self._kinds: dict[int, list[int]] = {}
        self._found: dict[tuple[int, int, Needs], Found] = {}

    def of(self, node: Node, left: Left, needs: Needs, known: Collection[int]) -> Found:
        """Those of a node; of shares the ones on the fullest GPUs first.

        Args:
            node: the node.
            left: what is left of it.
            needs: what is asked for.
            known: GPUs that are like no others, as replicas are there that others may come to talk to.
        """
        if needs.whole:
            return self.whole(node, left.mask & node.free_mask(needs), needs)
        return self._single(node, left, needs, known)

    def whole(self, node: Node, mask: int, needs: Needs) -> Found:
        """Sets of free GPUs that are good enough: slowness, what others lose by it, and the GPUs."""
        key = id(node.topology), mask, needs
        if key not in self._found:
            found = []
            before = node.shape.on_offer(mask)
            for gpus in self._picks(node, mask, needs.gpus):
                taken = sum(1 << gpu for gpu in gpus)
                offer = node.shape.offer(taken, needs.gpus, needs.within)
                if offer is not None and offer.slowness <= needs.slowest:
                    after = node.shape.on_offer(mask & ~taken)
                    loss = tuple(a - b for a, b in zip(before, after, strict=True))
                    found.append((offer.slowness, loss, gpus))
            found.sort()
            self.bounded |= len(found) > MOST_SETS
            self._found[key] = found[:MOST_SETS]
        return self._found[key]

    def _single(self, node: Node, left: Left, needs: Needs, known: Collection[int]) -> Found:
        """The same where a MIG instance or a share of a GPU is asked for."""
        if needs.profile:
            slots = left.mask & sum(1 << slot for slot in node.instances_for(needs))
            return [(0, (), gpus) for gpus in self._picks(node, slots, 1)]
        share = needs.share_of(node.gpu_memory_bytes)
        if share is None:
            return []
        alike: dict[object, tuple[int, tuple[int, ...], Gpus]] = {}
        for gpu, rest in left.rests:
            if rest >= share and node.meets(needs, gpu):
                kind = next(i for i, kind in enumerate(self._kinds_of(node)) if kind >> gpu & 1)
                alike.setdefault(gpu if gpu in known else (kind, rest), (0, (-1, rest), (gpu,)))
        whole = self.whole(node, left.mask & node.free_mask(needs), Needs(1))
        return sorted(alike.values()) + whole

    def _kinds_of(self, node: Node) -> list[int]:
        """The GPUs of a machine as bit masks of such as can change places."""
        key = id(node.topology)
        if key not in self._kinds:
            gpus = range(len(node.topology))
            paths = tuple(tuple(node.topology.pcie_path(a, b) for b in gpus) for a in gpus)
            twins = {gpu: kind[0] for kind in node.shape.twins for gpu in kind}
            places = [(twins[gpu], gpu * self._exact_gpus) for gpu in gpus]
            self._kinds[key] = [sum(1 << gpu for gpu in kind) for kind in twins_of(paths, places)]
        return self._kinds[key]

    def _picks(self, node: Node, mask: int, count: int) -> Iterator[Gpus]:
        """The sets of so many free GPUs; of those that differ in twins alone, the lowest."""
        gpus = range(len(node.topology))
        pools = [[gpu for gpu in gpus if (mask & kind) >> gpu & 1] for kind in self._kinds_of(node)]

        def pick(pools: Sequence[list[int]], count: int) -> Iterator[Gpus]:
            if not count:
                yield ()
            elif pools:
                for taken in range(min(count, len(pools[0])), -1, -1):
                    for rest in pick(pools[1:], count - taken):
                        yield (*pools[0][:taken], *rest)

        return (tuple(sorted(gpus)) for gpus in pick(pools, count))


def usable(node: Node, needs: Needs) -> Hashable:
    """What of a node will do for a replica."""
    if needs.profile:
        return tuple(sorted(node.instances_for(needs)))
    if needs.whole:
        return node.free_mask(needs)
    memory = node.gpu_memory_bytes if needs.memory_bytes else None
    return node.free_mask(needs), memory, tuple(sorted(node.shared_with_room(needs, 1)))
