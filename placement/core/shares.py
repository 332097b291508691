"""Whole GPUs and shares of GPUs that are reserved at once: which bundle gets which GPU.

Ray reserves the bundles of a group on a node one after the other, without a chance to steer between two of them. Whole
GPUs are the lowest-numbered free ones. A share goes to the GPU with the smallest free part that is large enough, else
to the lowest free GPU (``NodeResourceInstanceSet::TryAllocate`` in Ray's ``resource_instance_set.cc``). So what is
chosen is what Ray finds; which bundle gets which follows: a pool of free GPUs, and GPUs that are opened. Of an opened
one, a thousandth is taken meanwhile: then it is no free GPU, and only shares go there, wherever it stands.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, islice
from typing import NamedTuple

from placement.core.needs import WHOLE, Needs

OPENED = WHOLE - 1
"""What is free of an opened GPU, in thousandths."""


class Portions(NamedTuple):
    """What some bundles get of a node's GPUs.

    Attributes:
        amounts: thousandths, of each bundle.
        pool: the free GPUs that Ray finds, and uses in ascending order.
        opened: further free GPUs, for shares only.
        given: the GPUs of each bundle.
    """

    amounts: tuple[int, ...]
    pool: tuple[int, ...]
    opened: tuple[int, ...]
    given: tuple[tuple[int, ...], ...]

    @property
    def whole(self) -> tuple[int, ...]:
        """The GPUs of the bundles that have whole ones, ascending."""
        several = (gpus for amount, gpus in zip(self.amounts, self.given, strict=True) if amount >= WHOLE)
        return tuple(sorted(gpu for gpus in several for gpu in gpus))

    @property
    def taken(self) -> dict[int, int]:
        """GPU -> thousandths of it, ascending."""
        amounts: Counter[int] = Counter()
        for (amount, gpus), bundles in Counter(zip(self.amounts, self.given, strict=True)).items():
            for gpu in gpus:
                amounts[gpu] += bundles * min(amount, WHOLE)
        return dict(sorted(amounts.items()))


def give(
    amounts: Sequence[int], rests: Mapping[int, int], free: Iterable[int]
) -> tuple[tuple[int, ...], ...] | None:
    """What Ray gives to bundles of a group on one node.

    Args:
        amounts: thousandths of a GPU, of each bundle in order: whole GPUs, or a share of one.
        rests: GPU -> thousandths that are free, of GPUs that are shared.
        free: the GPUs that are wholly free.

    Returns:
        The GPUs of each bundle, ascending; ``None`` if there are too few.
    """
    parts, unopened = sorted((rest, gpu) for gpu, rest in rests.items()), iter(sorted(free))
    given: list[tuple[int, ...]] = []
    for amount, alike in groupby(amounts):
        count = sum(1 for _ in alike)
        while count:
            enough = bisect_left(parts, (amount,)) if amount < WHOLE else len(parts)
            if enough < len(parts):
                rest, *gpus = parts.pop(enough)
            else:
                rest, gpus = WHOLE, [*islice(unopened, max(1, amount // WHOLE))]
            if len(gpus) * WHOLE < amount:
                return None
            several = 1
            if amount < WHOLE:
                # What is left of this GPU is now the smallest part: it gets as many as it has room for.
                several = min(count, rest // amount)
                insort(parts, (rest - several * amount, gpus[0]))
            given += [tuple(gpus)] * several
            count -= several
    return tuple(given)


@lru_cache(maxsize=16)
def least_gpus(needs: Needs) -> int:
    """How many GPUs a node must have for it, if all of them were free."""
    return len(pattern(needs.amounts, {})) if needs.amounts else needs.gpus


def pattern(amounts: Sequence[int], rests: Mapping[int, int]) -> tuple[bool, ...]:
    """How many free GPUs these bundles take, and which of them, ascending, go to bundles with whole ones."""
    first = max(rests, default=-1) + 1
    beyond = range(first, first + sum(max(1, amount // WHOLE) for amount in amounts))
    given = give(amounts, rests, beyond)
    assert given is not None
    portions = Portions(tuple(amounts), (), (), given)
    whole, taken = {*portions.whole}, portions.taken
    return tuple(gpu in whole for gpu in beyond if gpu in taken)


def opening(amounts: Sequence[int], rests: Mapping[int, int]) -> tuple[int, tuple[bool, ...]]:
    """How many GPUs can be opened so that no more are taken; and the :func:`pattern` of the others.

    The fewer are left to the pattern, the freer is the choice of the whole GPUs. A GPU that shares fill to the last
    thousandth cannot be opened.
    """
    without = pattern(amounts, rests)
    first = max(rests, default=-1) + 1
    for count in range(without.count(False) if any(without) else 0, 0, -1):
        opened = dict.fromkeys(range(first, first + count), OPENED)
        left = pattern(amounts, {**rests, **opened})
        given = give(amounts, {**rests, **opened}, range(first + count, first + count + len(left)))
        used = {gpu for gpus in given or () for gpu in gpus}
        if len(left) + count <= len(without) and opened.keys() <= used:
            return count, left
    return 0, without
