"""Interchangeable GPUs, and sets of GPUs as counts of them.

GPUs that can change places without any difference are *twins*. Sets that take the same number of each group
of twins are equally good, and leave the same, so that counts are searched instead of sets: 9 instead of 256
for an NVSwitch board. Such counts, a *pick*, are packed into one integer, a field per group with one bit to
spare, so that taking a pick out of another is one subtraction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Pick = int
"""How many GPUs of each group of twins, packed."""


def twins_of(links: Sequence[Sequence[object]], places: Sequence[object]) -> list[list[int]]:
    """The GPUs, ascending, in groups of twins."""
    kinds: list[list[int]] = []
    for gpu, place in enumerate(places):
        for kind in kinds:
            twin = kind[0]
            others = (other for other in range(len(places)) if other not in (gpu, twin))
            if place == places[twin] and all(links[gpu][other] == links[twin][other] for other in others):
                kind.append(gpu)
                break
        else:
            kinds.append([gpu])
    return kinds


class Picks:
    """The picks of a machine.

    Args:
        twins: the groups of interchangeable GPUs.

    Attributes:
        twins: as given.
        units: the pick of one GPU, per group.
        fields: the bits of a pick that count a group's GPUs, per group.
        spare: the spare bit of every field: a group's bit is cleared if too many of its GPUs are subtracted.
    """

    def __init__(self, twins: list[list[int]]) -> None:
        self.twins = twins
        self.units: list[Pick] = []
        self.fields: list[Pick] = []
        self.spare: Pick = 0
        self._masks: list[int] = []
        bit = 0
        for kind in twins:
            self.units.append(1 << bit)
            self.fields.append(((1 << len(kind).bit_length()) - 1) << bit)
            bit += len(kind).bit_length() + 1
            self.spare |= 1 << (bit - 1)
            self._masks.append(sum(1 << gpu for gpu in kind))

    def of(self, mask: int) -> Pick:
        """The pick of a bit mask: how many GPUs of each group it has."""
        return sum(
            (mask & kind).bit_count() * unit for kind, unit in zip(self._masks, self.units, strict=True)
        )

    def counts(self, pick: Pick) -> Iterator[int]:
        """The same, group by group."""
        for bits, unit in zip(self.fields, self.units, strict=True):
            yield (pick & bits) // unit

    def lowest(self, pick: Pick, mask: int) -> tuple[int, ...]:
        """The lowest free GPUs that match a pick."""
        gpus: list[int] = []
        for kind, count in zip(self.twins, self.counts(pick), strict=True):
            if count:
                gpus += [gpu for gpu in kind if mask >> gpu & 1][:count]
        return tuple(sorted(gpus))
