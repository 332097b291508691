"""How good a set of GPUs is, and which set is chosen, on machines that exist."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from placement import topologies
from placement.core.score import Score, best_set, pair_bandwidth, ray_set, score
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


@pytest.mark.parametrize(
    ("model", "link", "gb_per_s"),
    [
        ("Tesla P100-SXM2-16GB", nv(1), 20),
        ("Tesla V100-SXM2-32GB", nv(2), 50),
        ("Tesla V100-SXM2-32GB", Link(Path.PIX), 12),
        ("Tesla T4", Link(Path.PIX), 12),
        ("NVIDIA GeForce RTX 3090", nv(4), 56.248),
        ("NVIDIA RTX A6000", nv(4), 56.248),
        ("NVIDIA A100-SXM4-80GB", nv(12), 300),
        ("NVIDIA A100-SXM4-80GB", Link(Path.PIX), 24),
        ("NVIDIA A10G", Link(Path.PIX), 24),
        ("NVIDIA L40S", Link(Path.NODE), 15.6),
        ("NVIDIA GeForce RTX 4090", Link(Path.SYS), 10),
        ("NVIDIA H100 80GB HBM3", nv(18), 450),
        ("NVIDIA H200 NVL", Link(Path.PIX), 48),
        ("NVIDIA H20", nv(18), 450),
        ("NVIDIA B200", nv(18), 900),
        ("NVIDIA GB300", nv(18), 900),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", Link(Path.PIX), 48),
        ("a model of next year", nv(4), 100),
        (None, Link(Path.PHB), 16.8),
        (None, UNKNOWN_LINK, 5),
    ],
)
def test_what_a_pair_carries(model: str | None, link: Link, gb_per_s: float) -> None:
    assert gb_per_s == pair_bandwidth(pair(link, model), 0, 1)


MODELS = {topologies.describe(name).gpu for name in topologies.names()} | {
    "Tesla P100-SXM2-16GB",
    "NVIDIA GeForce RTX 3090",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "a model of next year",
}


@pytest.mark.parametrize("model", [None, *sorted(MODELS)])
def test_paths_are_strictly_ordered_on_every_model(model: str | None) -> None:
    paths = [Path.PIX, Path.PXB, Path.PHB, Path.NODE, Path.SYS, Path.UNKNOWN]
    best_first = [*map(nv, range(18, 0, -1)), *map(Link, paths)]
    rates = [pair_bandwidth(pair(link, model), 0, 1) for link in best_first]
    assert sorted(set(rates), reverse=True) == rates
    assert rates[-1] > 0


def test_the_weakest_link_counts_before_the_total() -> None:
    assert Score(50, 50) > Score(25, 400)
    assert Score(25, 400) > Score(25, 300)
    assert Score(math.inf, 0) > Score(900, 900)


def test_a_score_names_its_weakest_pair_which_does_not_change_the_order() -> None:
    dgx = topologies.load("dgx-1v")
    quad = score(dgx, (3, 1, 2, 0))
    assert Score(25, 225) == quad
    assert (nv(1), (0, 1)) == (quad.weakest, quad.weakest_pair)


def test_one_gpu_has_no_weakest_pair() -> None:
    alone = score(topologies.load("l40s-4x"), (2,))
    assert (math.inf, 0.0, None, None) == (
        alone.weakest_gb_per_s,
        alone.total_gb_per_s,
        alone.weakest,
        alone.weakest_pair,
    )


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
        ("behind a switch all pairs are equal: Ray's own choice", "dgx-h100", {1, 4, 6, 7}, 2, (1, 4)),
        ("16 GPUs behind switches", "dgx-2", {*range(3, 16)}, 8, (3, 4, 5, 6, 7, 8, 9, 10)),
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
    machine = joined(4, Link(Path.PIX), {(1, 3): nv(12), (0, 3): Link(Path.SYS), (2, 3): Link(Path.SYS)})
    assert score(machine, (0, 1, 2)).total_gb_per_s < score(machine, (1, 2, 3)).total_gb_per_s
    assert (0, 1, 2) == best_set(machine, range(4), 3)


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
    assert [20.0, 50.0] == [value.weakest_gb_per_s for value in on.values()]


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
