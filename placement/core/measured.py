"""The measured rates of a machine's sets of GPUs, and the other sets to which they apply."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from statistics import median_low

from placement.core.topology import Lanes, Link, MeasuredRates, Topology

Gpus = tuple[int, ...]
Likeness = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""The number of GPUs, the prediction, their links and their PCIe links: equal for sets that are alike."""

NOISE_PERCENT = 10
"""Rates of sets that are alike, or of one set on two machines of one make, count as equal if they differ by no more.
One machine's figures differ by a few percent from run to run, and by as much from those of the next machine; a choice
that by such a difference would be chance."""


def is_apart(rate: int, usual: int) -> bool:
    """Whether a rate differs from the usual one by more than noise."""
    return 100 * abs(rate - usual) > NOISE_PERCENT * usual


def is_suspect(measured_mb_per_s: int, predicted_mb_per_s: int) -> bool:
    """Whether a set is so slow that something must be wrong: less than half of its prediction."""
    return 2 * measured_mb_per_s < predicted_mb_per_s


def beside_predicted(measured_mb_per_s: int, predicted_mb_per_s: int) -> dict[str, object]:
    """The fields that go with a measured rate, JSON-ready."""
    suspect = is_suspect(measured_mb_per_s, predicted_mb_per_s)
    return {"predicted_gb_per_s": predicted_mb_per_s / 1000, "suspect": suspect}


def of_all(own: Mapping[Gpus, int], of_make: Iterable[Mapping[Gpus, int]]) -> MeasuredRates:
    """The rates of a machine: for each set the median of its make, or its own rate if that differs by more than noise.

    So healthy machines have the same rates, and none is preferred because of noise.

    Args:
        own: the rates measured on it.
        of_make: the rates measured on each machine of its make, including itself.
    """
    all_rates: dict[Gpus, list[int]] = {}
    for rates in of_make:
        for gpus, rate in rates.items():
            all_rates.setdefault(gpus, []).append(rate)
    usual = {gpus: median_low(rates) for gpus, rates in all_rates.items()}
    apart = {gpus: rate for gpus, rate in own.items() if gpus not in usual or is_apart(rate, usual[gpus])}
    return tuple(sorted((usual | apart).items()))


class Alike:
    """Which sets are alike: those of one :data:`Likeness`.

    Args:
        links: between each two GPUs.
        lanes: of each GPU.
        predicted: the predicted rate of a set, MB/s.
    """

    def __init__(
        self,
        links: Sequence[Sequence[Link]],
        lanes: Sequence[Lanes | None],
        predicted: Callable[[Sequence[int]], int],
    ) -> None:
        # Links are compared by number, as comparing them takes long.
        numbers: dict[object, int] = {}
        self._links = [[numbers.setdefault(link, len(numbers)) for link in row] for row in links]
        self._lanes = [numbers.setdefault(one, len(numbers)) for one in lanes]
        self._predicted = predicted

    def __call__(self, gpus: Sequence[int]) -> Likeness:
        """The likeness of a set."""
        between = sorted(self._links[a][b] for a, b in combinations(gpus, 2))
        lanes = sorted(self._lanes[gpu] for gpu in gpus)
        return len(gpus), self._predicted(gpus), tuple(between), tuple(lanes)


def sets_to_measure(
    topology: Topology, gpus: Collection[int], pairs_only: bool, predicted: Callable[[Sequence[int]], int]
) -> list[Gpus]:
    """Which sets of free GPUs are worth measuring, the most informative first.

    All pairs, since each link may be worse than it should be, neighbours first; then of each larger size one set from
    each class of sets that are alike, sizes that are powers of two first, as most replicas have such sizes.

    Args:
        topology: how the GPUs are linked.
        gpus: those that are free.
        pairs_only: no larger sets.
        predicted: the predicted rate of a set, MB/s.
    """
    free = sorted(gpus)
    pairs = sorted(combinations(free, 2), key=lambda pair: (pair[1] - pair[0], pair))
    if pairs_only:
        return list(pairs)
    sizes = sorted(range(3, len(free) + 1), key=lambda size: (size & (size - 1) != 0, size))
    likeness = Alike(topology.links, topology.lanes, predicted)
    first: dict[Likeness, Gpus] = {}
    for size in sizes:
        for one in combinations(free, size):
            first.setdefault(likeness(one), one)
    return [*pairs, *first.values()]


class Rates:
    """Measured rates of a machine's sets, and of sets that are alike.

    Sets are *alike* if all that is known of them is equal, except which GPUs they are: the number of GPUs, the links
    between them, the PCIe lanes, and the prediction. They count as equally fast: the rate
    of all is the median of the measured ones. A set whose own rate differs from that by more than
    :data:`NOISE_PERCENT` is *apart*: it has its own.

    Args:
        measured: the rates, MB/s.
        links: between each two GPUs.
        lanes: of each GPU.
        predicted: the predicted rate of a set, MB/s.
        switch: whether the GPUs meet in an NVSwitch.

    Attributes:
        apart: the sets that have their own rate.
    """

    def __init__(
        self,
        measured: MeasuredRates,
        links: Sequence[Sequence[Link]],
        lanes: Sequence[Lanes | None],
        predicted: Callable[[Sequence[int]], int],
        switch: bool,
    ) -> None:
        self._likeness = Alike(links, lanes, predicted)
        self._links, self._predicted, self._switch = links, predicted, switch
        self._sizes = {len(gpus) for gpus, _ in measured}
        self._pairs = [gpus for gpus, _ in measured if len(gpus) == 2]
        alike: dict[Likeness, dict[Gpus, int]] = {}
        for gpus, rate in measured:
            alike.setdefault(self._likeness(gpus), {})[gpus] = rate
        self._usual = {likeness: median_low(rates.values()) for likeness, rates in alike.items()}
        self.apart = {
            gpus: rate
            for likeness, rates in alike.items()
            for gpus, rate in rates.items()
            if is_apart(rate, self._usual[likeness])
        }

    @cached_property
    def _suspects(self) -> _Suspects:
        pairs: list[Gpus] = list(combinations(range(len(self._links)), 2))
        predicted = {pair: self._predicted(pair) for pair in pairs}
        slow = {pair: rate for pair in pairs if (rate := self.of(pair)) and is_suspect(rate, predicted[pair])}
        sound = {gpu for pair in self._pairs for gpu in pair if pair not in slow}
        return _Suspects(slow, predicted, self._links, self._switch, sound)

    def at_most(self, gpus: Gpus, predicted_mb_per_s: int) -> int:
        """The predicted rate of a set that was not measured, limited by the bounds of its suspect pairs."""
        return self._suspects.at_most(gpus, predicted_mb_per_s)

    def of(self, gpus: Gpus) -> int | None:
        """The rate of a set (ascending); ``None`` if neither it nor any set alike was measured."""
        if len(gpus) not in self._sizes:  # a quick answer, as a machine of 16 GPUs has 65,519 sets
            return None
        own = self.apart.get(gpus)
        return self._usual.get(self._likeness(gpus)) if own is None else own

    def all_of(self, count: int) -> set[int]:
        """All rates that sets of ``count`` GPUs may have."""
        usual = {rate for likeness, rate in self._usual.items() if likeness[0] == count}
        return usual | {rate for gpus, rate in self.apart.items() if len(gpus) == count}

    def split(self, twins: Iterable[Sequence[int]]) -> list[list[int]]:
        """Groups of twins, divided so that exchanging two GPUs of a group keeps which sets are apart."""
        found: dict[Gpus, list[int]] = {}
        for number, kind in enumerate(twins):
            for gpu in kind:
                member_of = tuple(i for i, gpus in enumerate(self.apart) if gpu in gpus)
                found.setdefault((number, *member_of), []).append(gpu)
        return sorted(found.values())


class _Suspects:
    """The bounds that suspect pairs set for larger sets that contain them, by how collectives use the links.

    - On an NVSwitch a GPU uses the same links for every peer, so one of the two has no more than the
      pair reached: a set that contains both is slower than predicted by the same factor as the pair. This does not hold
      if each of them was measured with another GPU and was not suspect; then only a set of three is slower, whose ring
      cannot avoid the pair.
    - In a ring each GPU has two hops, so the ring is no faster than the second fastest of any GPU's hops. A hop
      between a suspect pair carries what the pair reached, and up to 23 % more, as transfers overlap in longer rings
      (:func:`placement.core.bandwidth.staged_mb_per_s`).
    - Several rings over NVLink each leave a GPU over one of its hops: together they carry no more than these hops.

    Args:
        slow: the suspect pairs, with their measured rates, MB/s.
        predicted: the predicted rate of every pair, MB/s.
        links: between each two GPUs.
        switch: whether they meet in an NVSwitch.
        sound: the GPUs that were measured with another one and were not suspect.
    """

    def __init__(
        self,
        slow: Mapping[Gpus, int],
        predicted: Mapping[Gpus, int],
        links: Sequence[Sequence[Link]],
        switch: bool,
        sound: Collection[int],
    ) -> None:
        everyone = range(len(links))
        self._slow = dict(slow) | {(b, a): rate for (a, b), rate in slow.items()}
        self._predicted = dict(predicted) | {(b, a): rate for (a, b), rate in predicted.items()}
        self._slow_with = [sum(1 << b for b in everyone if (a, b) in self._slow) for a in everyone]
        self._joined = [sum(1 << b for b in everyone if b != a and links[a][b].nvlinks) for a in everyone]
        self._switch = switch
        by_part = sorted(slow, key=lambda pair: slow[pair] / predicted[pair])
        self._slowest_first = [(1 << a | 1 << b, (a, b), a in sound and b in sound) for a, b in by_part]

    def at_most(self, gpus: Gpus, predicted_mb_per_s: int) -> int:
        """The most that a set with this prediction can reach."""
        if len(gpus) < 3 or not self._slow:
            return predicted_mb_per_s
        mask = sum(1 << gpu for gpu in gpus)
        if self._switch and all(mask & ~(1 << gpu) & ~self._joined[gpu] == 0 for gpu in gpus):
            for both, pair, alone in self._slowest_first:
                if both & mask == both and (not alone or len(gpus) == 3):
                    return predicted_mb_per_s * self._slow[pair] // self._predicted[pair]
            return predicted_mb_per_s
        # For all other pairs, each of the two GPUs has hops that are not known to be slow.
        tight = [gpu for gpu in gpus if (self._slow_with[gpu] & mask).bit_count() >= len(gpus) - 2]
        return min([predicted_mb_per_s, *(self._leaving(gpu, gpus) for gpu in tight)])

    def _leaving(self, gpu: int, gpus: Gpus) -> int:
        """The most that rings through a set carry at one of its GPUs, of whose hops at most one is not slow."""
        hops = [(gpu, other) for other in gpus if other != gpu]
        slow = sorted((self._slow[hop] for hop in hops if hop in self._slow), reverse=True)
        second = slow[0] if len(slow) < len(hops) else slow[1]
        joined = [hop for hop in hops if self._joined[gpu] >> hop[1] & 1]
        several = sum(self._slow.get(hop, self._predicted[hop]) for hop in joined)
        return max(second * (1000 + 230 * (len(gpus) - 2) // len(gpus)) // 1000, several)
