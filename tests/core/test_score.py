"""How good a set of GPUs is, and which set is chosen, on machines that exist."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from placement import topologies
from placement.core.score import Score, best_set, ray_set, score
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology

ALL = range(16)


def pair(link: Link, model: str | None = None) -> Topology:
    """Two GPUs joined by ``link``."""
    return Topology(links=((UNKNOWN_LINK, link), (link, UNKNOWN_LINK)), model=model)


def quads(near: Link, far: Link) -> Topology:
    """Two islands of four, ``near`` within and ``far`` between."""
    return Topology(tuple(tuple(near if a // 4 == b // 4 else far for b in range(8)) for a in range(8)))


def nv(links: int) -> Link:
    return Link(Path.NVLINK, links)


def test_a_score_orders_by_bandwidth_and_names_its_weakest_pair() -> None:
    assert Score(50) > Score(25) and Score(math.inf) > Score(900)
    quad = score(topologies.load("dgx-1v"), (3, 1, 2, 0))
    # two rings of double and single links: the NV1 edges (two rings' worth) bound both
    assert (nv(1), (0, 1)) == (quad.weakest, quad.weakest_pair)
    assert quad == Score(quad.bandwidth_gb_per_s, None, None)


def test_one_gpu_needs_no_link() -> None:
    alone = score(topologies.load("l40s-4x"), (2,))
    assert (math.inf, None, None) == (alone.bandwidth_gb_per_s, alone.weakest, alone.weakest_pair)


@pytest.mark.parametrize(
    ("case", "machine", "free", "count", "expected"),
    [
        ("a DGX-1 pair has two links, and leaves the other quad whole", "dgx-1v", ALL, 2, (0, 3)),
        ("a DGX-1 quad is one of the two fully linked ones", "dgx-1v", ALL, 4, (0, 1, 2, 3)),
        ("with 0 busy the other quad is taken", "dgx-1v", {1, 2, 3, 4, 5, 6, 7}, 4, (4, 5, 6, 7)),
        ("a single GPU spares the whole quad", "dgx-1v", {3, 4, 5, 6, 7}, 1, (3,)),
        ("a second pair joins the first one's quad", "dgx-1v", {1, 2, 4, 5, 6, 7}, 2, (1, 2)),
        ("a pair without a double link takes a single one", "dgx-1v", {0, 2, 7}, 2, (0, 2)),
        ("no NVLink left: GPUs over SYS are better than none", "dgx-1v", {0, 5}, 2, (0, 5)),
        ("bridged pairs: 0 and 1", "a100-pcie-4x", {0, 1, 2, 3}, 2, (0, 1)),
        ("bridged pairs, 0 busy: not 1 and 2", "a100-pcie-4x", {1, 2, 3}, 2, (2, 3)),
        ("a single GPU takes the half of a broken pair", "a100-pcie-4x", {1, 2, 3}, 1, (1,)),
        ("a single GPU, the broken pair last", "a100-pcie-4x", {0, 1, 3}, 1, (3,)),
        ("two pairs of one socket", "a100-pcie-8x", {1, 2, 3, 4, 5, 6, 7}, 4, (4, 5, 6, 7)),
        ("three GPUs stay on a socket", "a100-pcie-8x", {1, 3, 4, 6, 7}, 3, (4, 6, 7)),
        ("two GPUs of a socket without NVLink", "l40s-4x", {1, 2, 3}, 2, (2, 3)),
        ("behind a switch all pairs are equal: one NUMA node", "dgx-h100", {1, 4, 6, 7}, 2, (4, 6)),
        ("of one NUMA node: Ray's own choice", "dgx-h100", {4, 5, 6, 7}, 2, (4, 5)),
        ("16 GPUs behind switches, in two NUMA nodes", "dgx-2", {*range(3, 16)}, 8, (*range(8, 16),)),
        ("all of them", "dgx-2", ALL, 16, tuple(ALL)),
        ("all pairs over SYS", "rtx-4090-8x", {2, 3, 5, 7}, 2, (2, 3)),
        ("nothing asked for", "dgx-1v", {1, 2}, 0, ()),
        ("too few are free", "dgx-1v", {1, 2}, 3, None),
        ("none is free", "dgx-1v", (), 1, None),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)  # fmt: skip
def test_the_best_set(
    case: str, machine: str, free: set[int] | range, count: int, expected: tuple[int, ...] | None
) -> None:
    shape = topologies.load(machine)
    assert expected == best_set(shape, {gpu for gpu in free if gpu < len(shape)}, count)


def test_of_an_unknown_machine_the_lowest_ordinals_are_taken_as_ray_does() -> None:
    free = {6, 1, 3, 5}
    assert ray_set(free, 3) == best_set(Topology.unknown(8), free, 3) == (1, 3, 5)


def test_where_something_is_known_it_beats_the_unknown() -> None:
    rows = [[UNKNOWN_LINK] * 4 for _ in range(4)]
    rows[2][3] = rows[3][2] = Link(Path.SYS)
    assert (2, 3) == best_set(Topology(tuple(map(tuple, rows))), range(4), 2)


def test_a_small_request_goes_to_the_island_that_is_broken_already() -> None:
    machine = quads(Link(Path.PIX), Link(Path.SYS))
    assert (5, 6) == best_set(machine, {0, 1, 2, 3, 5, 6}, 2)
    assert (0, 1, 2, 3) == best_set(machine, {0, 1, 2, 3, 5, 6}, 4)


def joined(count: int, rest: Link, links: dict[tuple[int, int], Link]) -> Topology:
    """``count`` GPUs, the named pairs joined so, all others over ``rest``."""
    rows = [[links.get((min(a, b), max(a, b)), rest) for b in range(count)] for a in range(count)]
    return Topology(tuple(map(tuple, rows)))


def test_one_fast_pair_does_not_make_up_for_a_slow_one() -> None:
    slow = {(0, 3): Link(Path.SYS), (2, 3): Link(Path.SYS)}
    machine = joined(4, Link(Path.PIX), {(1, 3): nv(12), **slow})
    assert score(machine, (0, 1, 2)) > score(machine, (1, 2, 3))
    assert (0, 1, 2) == best_set(machine, range(4), 3)


def test_a_chain_of_nvlinks_is_no_ring() -> None:
    """Quads of a DGX-1V that NVLink joins, but not in a ring, are worth no more than PCIe."""
    dgx = topologies.load("dgx-1v")
    chained = [
        quad
        for quad in itertools.combinations(range(8), 4)
        if len(Topology(tuple(tuple(dgx.link(a, b) for b in quad) for a in quad)).islands) == 1
        and score(dgx, quad).bandwidth_gb_per_s < 20
    ]
    assert 48 == len(chained)


def test_a_good_quad_is_left_to_others_before_a_good_pair() -> None:
    far = {(0, other): Link(Path.SYS) for other in (2, 3, 4)}
    machine = joined(5, Link(Path.PIX), {(0, 1): nv(4), **far})
    assert (0,) == best_set(machine, range(5), 1)
    assert (2,) == best_set(machine, range(4), 1), "no quad is left over by four, so the pair is"


def test_the_model_decides_where_shapes_are_equal() -> None:
    """A cache by topology alone would mix them up: equality leaves the model out."""
    shape = quads(nv(1), Link(Path.PIX))
    on = {
        model: score(replace(shape, model=model), (0, 1)) for model in ("Tesla P100-SXM2-16GB", "NVIDIA B200")
    }
    assert [18.0, 48.001] == [value.bandwidth_gb_per_s for value in on.values()]


def test_equal_sets_score_exactly_equal() -> None:
    """Sums of floating-point rates would depend on the order of the pairs."""
    bridges = replace(quads(nv(4), Link(Path.PHB)), model="NVIDIA GeForce RTX 3090")
    assert 1 == len({score(bridges, gpus) for gpus in itertools.permutations((0, 1, 4, 5))})
    assert score(bridges, (0, 1, 2, 4)) == score(bridges, (3, 5, 6, 7))


@pytest.mark.parametrize(("free", "count"), [({0, 8}, 1), ({-1}, 1), ({0, 1}, -1)])
def test_what_makes_no_sense_is_refused(free: set[int], count: int) -> None:
    with pytest.raises(ValueError, match=r"GPU (8|-1)|-1 GPUs"):
        best_set(topologies.load("dgx-1v"), free, count)


@pytest.mark.parametrize(
    ("free", "count", "expected"),
    [({7, 2, 4}, 2, (2, 4)), ([3, 3, 1], 2, (1, 3)), ({1}, 2, None), ((), 0, ())],
)
def test_ray_gives_the_lowest(free: set[int], count: int, expected: tuple[int, ...] | None) -> None:
    assert expected == ray_set(free, count)


def test_what_is_not_known_is_not_told_as_a_fact() -> None:
    machine = topologies.load("a100-pcie-4x")
    unknown, alone = score(Topology.unknown(2), (0, 1)), score(machine, (0,))
    assert (unknown.known_gb_per_s, unknown.link_name, unknown.bandwidth_gb_per_s) == (None, "?", 0.1)
    assert (alone.known_gb_per_s, alone.link_name, alone.bandwidth_gb_per_s) == (None, None, math.inf)
    bridged = score(machine, (1, 0))
    assert (bridged.known_gb_per_s, bridged.link_name, bridged.weakest_pair) == (230.4, "NV12", (0, 1))
