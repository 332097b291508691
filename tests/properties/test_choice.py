"""The chosen set against brute force: every set tried, every leftover tried, on any machine of up to 8 GPUs.

The oracle is written from the promise and shares nothing with the search but the rate of a pair.
"""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.score import best_set, pair_bandwidth, ray_set, score
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology

Value = tuple[Fraction | float, Fraction]

PALETTE = [Link(path) for path in Path if path is not Path.NVLINK]
PALETTE += [Link(Path.NVLINK, links) for links in (1, 2, 4, 12)]
MODELS = [None, "Tesla V100-SXM2-32GB", "NVIDIA GeForce RTX 3090", "NVIDIA H100 PCIe"]
SMALL = [name for name in topologies.names() if len(topologies.load(name)) <= 8]


def value(machine: Topology, gpus: tuple[int, ...]) -> Value:
    """Slowest pair, then the sum, in exact GB/s."""
    rates = [Fraction(str(pair_bandwidth(machine, a, b))) for a, b in combinations(gpus, 2)]
    return min(rates, default=float("inf")), sum(rates, Fraction(0))


def every_best_set(machine: Topology, free: frozenset[int]) -> list[tuple[int, ...] | None]:
    """For each size from 0 to one more than there are, the best set by trying all."""
    values = {
        gpus: value(machine, gpus)
        for size in range(len(free) + 1)
        for gpus in combinations(sorted(free), size)
    }

    def on_offer(rest: frozenset[int]) -> list[Value]:
        return [
            max(values[gpus] for gpus in combinations(sorted(rest), size))
            for size in (8, 4, 2)
            if size <= len(rest)
        ]

    best: list[tuple[int, ...] | None] = []
    for size in range(len(free) + 1):
        sets = list(combinations(sorted(free), size))
        top = max(values[gpus] for gpus in sets)
        sets = [gpus for gpus in sets if values[gpus] == top]
        left = {gpus: on_offer(free - set(gpus)) for gpus in sets}
        kindest = max(left.values())
        best.append(
            next(gpus for gpus in sets if left[gpus] == kindest)
        )  # combinations come in ascending order
    return [*best, None]


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    """Any links, out of few kinds: many ties, or few."""
    count = draw(st.integers(1, 8))
    kinds = draw(st.lists(st.sampled_from(PALETTE), min_size=2, max_size=4, unique=True))
    # Drawn one by one the links would mostly be equal: small examples are what hypothesis tries first.
    chance = random.Random(draw(st.integers(0, 2**32)))
    rows = [[UNKNOWN_LINK] * count for _ in range(count)]
    for a in range(count):
        for b in range(a):
            rows[a][b] = rows[b][a] = chance.choice(kinds)
    return Topology(tuple(map(tuple, rows)), model=draw(st.sampled_from(MODELS)))


@st.composite
def islands(draw: st.DrawFn) -> Topology:
    """Real machines are trees: GPUs in groups in groups, each level with its link, ordinals shuffled."""
    count = draw(st.integers(2, 8))
    order = draw(st.permutations(range(count)))
    near, middle, far = draw(st.lists(st.sampled_from(PALETTE), min_size=3, max_size=3))

    def link(a: int, b: int) -> Link:
        a, b = order[a], order[b]
        return near if a // 2 == b // 2 else middle if a // 4 == b // 4 else far

    return Topology(tuple(tuple(link(a, b) for b in range(count)) for a in range(count)))


def check(machine: Topology, free: frozenset[int]) -> None:
    found = [best_set(machine, free, size) for size in range(len(free) + 2)]
    assert every_best_set(machine, free) == found


@given(machines() | islands(), st.data())
@settings(max_examples=150, deadline=None)
def test_the_choice_is_that_of_brute_force(machine: Topology, data: st.DataObject) -> None:
    busy = data.draw(st.frozensets(st.sampled_from(range(len(machine))), max_size=3))
    check(machine, frozenset(range(len(machine))) - busy)


@pytest.mark.parametrize("name", SMALL)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_choice_is_that_of_brute_force_on_known_machines(name: str, data: st.DataObject) -> None:
    machine = topologies.load(name)
    check(machine, frozenset(range(len(machine))))
    check(machine, data.draw(st.frozensets(st.sampled_from(range(len(machine))))))


@given(machines(), st.data())
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


@pytest.mark.parametrize("size", [1, 2, 4, 8, 15])
def test_sixteen_equal_gpus_are_given_out_from_the_lowest(size: int) -> None:
    free = frozenset(range(16)) - {0, 5}
    assert ray_set(free, size) == best_set(topologies.load("dgx-2"), free, size)
