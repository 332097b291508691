"""The chosen set against brute force: every set tried, every leftover tried, every ring tried.

The oracle is written from the promise of :func:`best_set`. It shares with the search only the rates of
:mod:`placement.core.bandwidth`, which have tests of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, combinations, pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.bandwidth import (
    generation,
    has_switch,
    hop_mb_per_s,
    hosts_of,
    lanes_mb_per_s,
    nvlink_rings,
    staged_mb_per_s,
    switch_mb_per_s,
)
from placement.core.needs import Needs, Within
from placement.core.score import best_set, ray_set, score
from placement.core.shape import shape_of
from placement.core.topology import UNKNOWN_LINK, Lanes, Link, Path, Topology

Gpus = tuple[int, ...]

PALETTE = [Link(path) for path in Path if path is not Path.NVLINK]
PALETTE += [Link(Path.NVLINK, links) for links in (1, 2)]  # more, and the search for rings may be cut short
PALETTE += [
    Link(path, peer=peer) for path in (Path.PIX, Path.PHB, Path.NODE, Path.SYS) for peer in (True, False)
]
CPUS = [None, "AMD EPYC 7502", "AMD EPYC 9354", "Intel(R) Xeon(R) Gold 6230R"]
LANES = [None, Lanes(4), Lanes(4, 8), Lanes(3, 4)]
MODELS = [None, "Tesla V100-SXM2-32GB", "NVIDIA GeForce RTX 3090", "NVIDIA H100 PCIe"]
SMALL = [name for name in topologies.names() if len(topologies.load(name)) <= 8]
LARGE = [name for name in topologies.names() if len(topologies.load(name)) > 8]
NEAREST_FIRST = list(Path)


class Oracle:
    """A machine, with every answer by trying all; what is unknown of it at its worst, or at its best."""

    def __init__(self, machine: Topology, best: bool = False) -> None:
        self.machine = machine
        self.best_case = best
        self.gpu = generation(machine.model)
        self.switch = has_switch(machine.links, self.gpu)
        self.host = hosts_of(machine.cpu, self.gpu.pcie)[best]
        self.bandwidth = cache(self._bandwidth)
        self.shared = cache(self._shared)
        self.on_offer = cache(self._on_offer)

    def _rings(self, gpus: Gpus) -> list[list[Link]]:
        """Every ring through all of them, as its links."""
        return [[self.machine.link(a, b) for a, b in ring] for ring in self._ways(gpus)]

    def _ways(self, gpus: Gpus) -> list[list[tuple[int, int]]]:
        first, *others = gpus
        return [
            list(pairwise((first, *order, first))) for order in permutations(others) if order[0] <= order[-1]
        ]

    def _staged(self, a: int, b: int) -> bool:
        """Whether the two talk through the host's memory."""
        link = self.machine.link(a, b)
        if link.path in (Path.NVLINK, Path.UNKNOWN):
            return False
        return link.path not in (Path.PIX, Path.PXB) or not self._peer(link)

    def _peer(self, link: Link) -> bool:
        return self.best_case if link.peer is None else link.peer

    def _lanes(self, gpu: int) -> int:
        return lanes_mb_per_s(self.machine.lanes[gpu] or Lanes(self.gpu.pcie), self.gpu)

    def _met(self, gpus: Gpus, gpu: int, joined: Callable[[int, int], bool]) -> set[int]:
        """All that can be reached from one of them."""
        met = {gpu}
        while more := {b for b in gpus if b not in met and any(joined(a, b) for a in met)}:
            met |= more
        return met

    def _carries(self, gpus: Gpus, ring: list[tuple[int, int]]) -> int:
        """As much as its slowest hop, through the host with all that the GPUs share on the way there."""
        machine = self.machine
        rates = [
            min(hop_mb_per_s(machine.link(a, b), self.gpu), self._lanes(a), self._lanes(b))
            if machine.link(a, b).path not in (Path.NVLINK, Path.UNKNOWN)
            else hop_mb_per_s(machine.link(a, b), self.gpu)
            for a, b in ring
            if not self._staged(a, b)
        ]
        staged = [machine.link(a, b) for a, b in ring if self._staged(a, b)]
        if not staged:
            return min(rates)
        if len(gpus) == 2 and self._peer(staged[0]) and self.host.peer:
            most = self.host.peer if staged[0].path is Path.SYS else max(map(self._lanes, gpus))
            return min(most, *map(self._lanes, gpus))
        host = min(self.host.far if link.path is Path.SYS else self.host.near for link in staged)
        return min([*rates, staged_mb_per_s(host, *self.shared(gpus))])

    def _shared(self, gpus: Gpus) -> tuple[int, int, int, int]:
        """The slowest lanes, how many GPUs, and how many of them share a host bridge and an uplink."""
        everyone = tuple(range(len(self.machine)))
        islands = {min(self._met(gpus, gpu, lambda a, b: not self._staged(a, b))) for gpu in gpus}
        up = [min(self._met(everyone, gpu, self._one(Path.PIX, Path.PXB))) for gpu in islands]
        at = [min(self._met(everyone, gpu, self._one(Path.PIX, Path.PXB, Path.PHB))) for gpu in set(up)]
        bridge = max(map(at.count, at)) if self.host.bridged else 1
        return min(map(self._lanes, gpus)), len(gpus), bridge, max(map(up.count, up))

    def _one(self, *paths: Path) -> Callable[[int, int], bool]:
        return lambda a, b: self.machine.link(a, b).path in paths

    def _bandwidth(self, gpus: Gpus) -> int:
        if len(gpus) < 2:
            return 0
        rings = self._rings(gpus)
        best = max(self._carries(gpus, ring) for ring in self._ways(gpus))
        if not any(all(link.nvlinks for link in ring) for ring in rings):
            return best
        fewest = min(self.machine.link(a, b).nvlinks for a, b in combinations(gpus, 2))
        if self.switch and fewest:
            return max(best, switch_mb_per_s(fewest, len(gpus), self.gpu))
        if len(gpus) == 2:
            return max(best, fewest * self.gpu.nvlink_mb_per_s)
        return max(best, 2 * nvlink_rings(self.machine.links, gpus) * self.gpu.nvlink_mb_per_s)

    def _on_offer(self, rest: Gpus) -> list[tuple[int, int]]:
        """The best bandwidth and the sum over all sets, of 8, 4 and 2 GPUs."""
        found = []
        for size in (8, 4, 2):
            values = [self.bandwidth(gpus) for gpus in combinations(rest, size)]
            found.append((max(values, default=0), sum(values)))
        return found

    def near(self, gpus: Gpus) -> tuple[int, int]:
        machine = self.machine
        nic = max((NEAREST_FIRST.index(machine.nearest_nic[gpu]) for gpu in gpus), default=0)
        return nic, len({machine.numa[gpu] for gpu in gpus})

    def meets(self, gpus: Gpus, within: Within) -> bool:
        if within is Within.NODE:
            return True
        if within is Within.NUMA:
            nodes = {self.machine.numa[gpu] for gpu in gpus}
            return len(nodes) == 1 and () not in nodes
        if len(gpus) < 2:
            return True
        close = {Path.NVLINK} if within is Within.NVLINK else {Path.NVLINK, Path.PIX, Path.PXB}
        return any(all(link.path in close for link in ring) for ring in self._rings(gpus))

    def best(self, free: Gpus, size: int, within: Within = Within.NODE) -> Gpus | None:
        sets = [gpus for gpus in combinations(free, size) if self.meets(gpus, within)]
        if not sets:
            return None
        fastest = max(map(self.bandwidth, sets))
        sets = [gpus for gpus in sets if self.bandwidth(gpus) == fastest]
        rests = {gpus: tuple(gpu for gpu in free if gpu not in gpus) for gpus in sets}
        kindest = max(self.on_offer(rest) for rest in rests.values())
        sets = [gpus for gpus in sets if self.on_offer(rests[gpus]) == kindest]
        richest = max(map(self.on_offer, sets))
        sets = [gpus for gpus in sets if self.on_offer(gpus) == richest]
        nearest = min(map(self.near, sets))
        return min(gpus for gpus in sets if self.near(gpus) == nearest)

    def check(self, free: Gpus, size: int, within: Within = Within.NODE) -> None:
        expected = self.best(free, size, within)
        assert expected == best_set(self.machine, free, size, within), (free, size, within)


@st.composite
def machines(draw: st.DrawFn, most: int = 6) -> Topology:
    """Any links, out of few kinds: many ties, or few."""
    count = draw(st.integers(1, most))
    kinds = draw(st.lists(st.sampled_from(PALETTE), min_size=2, max_size=4, unique=True))
    # Drawn one by one the links would mostly be equal: small examples are what hypothesis tries first.
    chance = random.Random(draw(st.integers(0, 2**32)))
    rows = [[UNKNOWN_LINK] * count for _ in range(count)]
    for a in range(count):
        for b in range(a):
            rows[a][b] = rows[b][a] = chance.choice(kinds)
    numa = tuple(chance.choice([(0,), (1,)]) for _ in range(count))
    lanes = tuple(chance.choice(LANES) for _ in range(count))
    cpu, model = draw(st.sampled_from(CPUS)), draw(st.sampled_from(MODELS))
    return Topology(tuple(map(tuple, rows)), numa=numa, model=model, lanes=lanes, cpu=cpu)


@st.composite
def islands(draw: st.DrawFn) -> Topology:
    """Real machines are trees: GPUs in groups in groups, each level with its link, ordinals shuffled."""
    count = draw(st.integers(2, 7))
    order = draw(st.permutations(range(count)))
    near, middle, far = draw(st.lists(st.sampled_from(PALETTE), min_size=3, max_size=3))

    def link(a: int, b: int) -> Link:
        a, b = order[a], order[b]
        return near if a // 2 == b // 2 else middle if a // 4 == b // 4 else far

    links = tuple(tuple(link(a, b) for b in range(count)) for a in range(count))
    return Topology(links, cpu=draw(st.sampled_from(CPUS)))


@given(machines() | islands(), st.data())
@settings(max_examples=120, deadline=None)
def test_the_choice_is_that_of_brute_force(machine: Topology, data: st.DataObject) -> None:
    check_any(Oracle(machine), data)


def check_any(oracle: Oracle, data: st.DataObject) -> None:
    """Checks sets of all sizes of some free GPUs, within some distance."""
    everyone = range(len(oracle.machine))
    busy = data.draw(st.frozensets(st.sampled_from(everyone), max_size=3))
    within = data.draw(st.sampled_from(Within))
    free = tuple(gpu for gpu in everyone if gpu not in busy)
    for size in range(len(free) + 2):
        oracle.check(free, size, within)


@given(machines() | islands())
@settings(max_examples=60, deadline=None)
def test_a_score_is_between_the_worst_and_the_best_that_is_possible(machine: Topology) -> None:
    worst, best = Oracle(machine), Oracle(machine, best=True)
    for size in range(2, len(machine) + 1):
        for gpus in combinations(range(len(machine)), size):
            found = score(machine, gpus)
            least, most = (oracle.bandwidth(gpus) / 1000 for oracle in (worst, best))
            assert (least, most if most > least else None) == (
                found.bandwidth_gb_per_s,
                found.upper_gb_per_s,
            )


@pytest.mark.parametrize("name", SMALL)
def test_the_choice_is_that_of_brute_force_on_every_known_machine_whatever_is_free(name: str) -> None:
    oracle = Oracle(topologies.load(name))
    gpus = range(len(oracle.machine))
    for count in range(len(gpus) + 1):
        for free in combinations(gpus, count):
            for size in range(count + 2):
                oracle.check(free, size)


@pytest.mark.parametrize("within", [Within.NVLINK, Within.SWITCH, Within.NUMA])
@pytest.mark.parametrize("name", SMALL)
def test_so_it_is_with_a_floor(name: str, within: Within) -> None:
    oracle = Oracle(topologies.load(name))
    chance = random.Random(name)
    for _ in range(12):
        free = tuple(gpu for gpu in range(len(oracle.machine)) if chance.random() < 0.75)
        for size in (1, 2, 3, 4):
            oracle.check(free, size, within)


@pytest.mark.parametrize("name", LARGE)
def test_so_it_is_on_large_machines_with_some_gpus_free(name: str) -> None:
    oracle = Oracle(topologies.load(name))
    chance = random.Random(name)
    for _ in range(8):
        free = tuple(sorted(chance.sample(range(len(oracle.machine)), 9)))
        for size in range(len(free) + 2):
            oracle.check(free, size)


@pytest.mark.parametrize("seed", range(3))
def test_so_it_is_where_no_two_of_sixteen_gpus_are_alike(seed: int) -> None:
    chance = random.Random(seed)
    rows = [[UNKNOWN_LINK] * 16 for _ in range(16)]
    for a in range(16):
        for b in range(a):
            rows[a][b] = rows[b][a] = chance.choice(PALETTE[: len(Path)] * 3 + PALETTE[-2:])
    oracle = Oracle(Topology(tuple(map(tuple, rows)), model="NVIDIA H100 PCIe"))
    for _ in range(4):
        free = tuple(sorted(chance.sample(range(16), 8)))
        for size in range(len(free) + 2):
            oracle.check(free, size)


@given(machines(8), st.data())
@settings(deadline=None)
def test_the_choice_is_never_worse_than_rays_and_does_not_depend_on_the_order(
    machine: Topology, data: st.DataObject
) -> None:
    free = data.draw(st.lists(st.sampled_from(range(len(machine))), min_size=1, unique=True))
    count = data.draw(st.integers(1, len(free)))
    chosen, rays = best_set(machine, free, count), ray_set(free, count)
    assert chosen is not None and rays is not None
    assert set(chosen) <= set(free) and list(chosen) == sorted(set(chosen)) and len(chosen) == count
    assert score(machine, chosen) >= score(machine, rays)
    assert chosen == best_set(machine, free[::-1], count)


@given(machines(7) | islands(), st.data())
@settings(max_examples=120, deadline=None)
def test_several_sets_are_as_fast_as_can_be_and_in_rank_order_where_that_can_be(
    machine: Topology, data: st.DataObject
) -> None:
    free = sorted(data.draw(st.frozensets(st.sampled_from(range(len(machine))), min_size=1)))
    size = data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, 3))
    found = shape_of(machine).several(sum(1 << gpu for gpu in free), Needs(size), count)

    def slowest(sets: Sequence[Gpus]) -> float:
        return min(score(machine, gpus).bandwidth_gb_per_s for gpus in sets)

    def chunks(gpus: Sequence[int]) -> list[Gpus]:
        return [tuple(gpus[i : i + size]) for i in range(0, len(gpus), size)]

    if len(free) < size * count:
        assert found is None
        return
    assert found is not None and len(set(chain(*found))) == size * count
    kept = max(slowest(chunks(gpus)) for gpus in combinations(free, size * count))
    best = max(slowest(chunks(gpus)) for gpus in permutations(free, size * count))
    assert slowest(found) == best
    assert (found == chunks(sorted(chain(*found)))) == (kept == best)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_what_is_equal_is_given_out_from_the_lowest(size: int) -> None:
    free = frozenset(range(8)) - {0, 5}
    machine = Topology.unknown(8)
    assert ray_set(free, size) == best_set(machine, free, size)
