"""The tables of a machine's shape: what is asked of them, and the answers where a machine is too large for tables."""

from __future__ import annotations

from itertools import combinations
from unittest import mock

import pytest

from placement import topologies
from placement.core import shape as module
from placement.core.bandwidth import generation, hosts_of
from placement.core.needs import Needs, Within
from placement.core.score import choose, score, slowest_group
from placement.core.shape import Offer, Shape, shape_of
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology

DGX1, BRIDGED, H100 = (topologies.load(name) for name in ("dgx-1v", "a100-pcie-4x", "dgx-h100"))
PCIE8 = topologies.load("a100-pcie-8x")


def mask(*gpus: int) -> int:
    return sum(1 << gpu for gpu in gpus)


def joined(count: int, links: dict[tuple[int, int], Link], rest: Link = UNKNOWN_LINK) -> Topology:
    rows = [[links.get((min(a, b), max(a, b)), rest) for b in range(count)] for a in range(count)]
    return Topology(tuple(map(tuple, rows)))


# -- offers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "machine", "free", "needs", "expected"),
    [
        ("a pair costs the four", BRIDGED, (0, 1, 2, 3), Needs(2), Offer(-230_400, (0, 16_565, 0), 0, 4)),
        ("the last pair costs itself", BRIDGED, (2, 3), Needs(2), Offer(-230_400, (0, 0, 230_400), 0, 2)),
        ("one GPU has no speed", BRIDGED, (1, 2, 3), Needs(1), Offer(0, (0, 0, 0), 0, 3)),
        ("and breaks a pair where it must", BRIDGED, (2, 3), Needs(1), Offer(0, (0, 0, 230_400), 0, 2)),
        ("four of eight behind a switch", H100, range(8), Needs(4), Offer(-378_216, (490_280, 0, 0), 0, 8)),
        ("none is asked for", BRIDGED, (0, 1), Needs(0), Offer(0, (0, 0, 0), 0, 2)),
        ("too few are free", BRIDGED, (0,), Needs(2), None),
        ("none is near enough", BRIDGED, (0, 2), Needs(2, Within.NVLINK), None),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)  # fmt: skip
def test_an_offer_is_speed_and_what_others_lose(
    case: str, machine: Topology, free: tuple[int, ...], needs: Needs, expected: Offer | None
) -> None:
    shape = shape_of(machine)
    for _ in range(2):  # worked out, and then looked up
        assert shape.offer(mask(*free), needs.gpus, needs.within) == expected


@pytest.mark.parametrize(
    ("free", "count", "within", "expected"),
    [
        ((0, 1, 2, 3), 2, Within.NVLINK, (0, 1)),
        ((0, 2, 3), 2, Within.NVLINK, (2, 3)),
        ((0, 2), 2, Within.NVLINK, None),
        ((0, 2), 2, Within.NODE, (0, 2)),
        ((0, 2), 1, Within.NVLINK, (0,)),
        ((0, 1, 2, 3), 4, Within.NVLINK, None),
    ],
)
def test_a_set_is_as_close_as_demanded(
    free: tuple[int, ...], count: int, within: Within, expected: tuple[int, ...] | None
) -> None:
    assert shape_of(BRIDGED).best(mask(*free), count, within) == expected


def test_past_a_host_bridge_is_not_within_a_switch_and_an_unknown_numa_node_is_none() -> None:
    links = {(0, 1): Link(Path.PIX), (0, 2): Link(Path.PXB), (1, 2): Link(Path.PXB)}
    four = joined(4, links, Link(Path.PHB))
    machine = Topology(four.links, numa=((0,), (0,), (1,), ()))
    shape = shape_of(machine)
    assert shape.best(mask(1, 2), 2, Within.SWITCH) == (1, 2)
    assert shape.best(mask(0, 1, 2), 3, Within.SWITCH) == (0, 1, 2)
    assert shape.best(mask(2, 3), 2, Within.SWITCH) is None
    assert shape.best(mask(0, 1, 2, 3), 2, Within.NUMA) == (0, 1)
    assert shape.best(mask(1, 2, 3), 2, Within.NUMA) is None
    assert [shape.best(mask(gpu), 1, Within.NUMA) for gpu in (2, 3)] == [(2,), None]
    assert shape.best(mask(3), 1, Within.SWITCH) == (3,)
    assert shape.best(mask(0, 1), 2, Within.NVLINK) is None


# -- packing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "free", "needs", "expected"),
    [
        (BRIDGED, range(4), Needs(2, Within.NVLINK), [(0, 1), (2, 3)]),
        (BRIDGED, (0, 2, 3), Needs(2, Within.NVLINK), [(2, 3)]),
        (BRIDGED, range(4), Needs(2, min_bandwidth_gb_per_s=230.4), [(0, 1), (2, 3)]),
        (BRIDGED, range(4), Needs(2, min_bandwidth_gb_per_s=230.401), []),
        (BRIDGED, range(4), Needs(3), [(0, 1, 2)]),
        (BRIDGED, range(4), Needs(5), []),
        (BRIDGED, range(4), Needs(1), [(0,), (1,), (2,), (3,)]),
        (DGX1, range(8), Needs(4, min_bandwidth_gb_per_s=80.0), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (PCIE8, range(8), Needs(4, Within.NUMA), [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (PCIE8, range(7), Needs(4, Within.NUMA), [(0, 1, 2, 3)]),
    ],
)
def test_as_many_sets_as_there_are_the_fastest_first(
    machine: Topology, free: tuple[int, ...], needs: Needs, expected: list[tuple[int, ...]]
) -> None:
    assert shape_of(machine).packed(mask(*free), needs) == expected


ROW = joined(
    4, {(0, 1): Link(Path.NVLINK, 1), (1, 2): Link(Path.NVLINK, 2), (2, 3): Link(Path.NVLINK, 1)}, Link(Path.SYS)
)  # fmt: skip


def test_the_best_pair_is_left_alone_only_where_as_many_more_are_to_follow() -> None:
    """NV1 - NV2 - NV1 in a row: the pair in the middle is the fastest, and the ends are not joined."""
    close = Needs(2, Within.NVLINK)
    assert choose(ROW, range(4), close) == (1, 2)
    assert choose(ROW, range(4), close, more=1) == (0, 1)
    assert choose(ROW, range(4), close, more=2) == (1, 2), "there is no room for three, whatever is chosen"
    assert choose(ROW, range(4), Needs(2), more=1) == (1, 2), "without a floor the ends will do"
    assert choose(ROW, (0, 3), close) is None
    assert choose(ROW, range(4), Needs(2, min_bandwidth_gb_per_s=40.0)) == (1, 2)
    assert choose(ROW, range(4), Needs(2, min_bandwidth_gb_per_s=40.1)) is None
    assert choose(ROW, range(4), Needs(1, min_bandwidth_gb_per_s=40.1)) == (0,), "one GPU is fast enough"
    assert choose(ROW, range(4), Needs(5)) is None


# -- rank order --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "machine", "free", "size", "count", "expected"),
    [
        ("they are in order as they are", DGX1, range(8), 4, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("the same GPUs cut anew", DGX1, (0, 1, 2, 3, 4, 6), 2, 3, [(0, 1), (2, 3), (4, 6)]),
        ("other GPUs, where 0,4 and 2,3 cross", DGX1, (0, 2, 3, 4, 5, 6, 7), 2, 2, [(0, 3), (5, 6)]),
        ("none is as fast: NV2, and NV1 or SYS in order", DGX1, range(1, 8), 2, 3, [(1, 5), (2, 3), (4, 7)]),
        ("single GPUs", DGX1, (1, 4, 6), 1, 3, [(1,), (4,), (6,)]),
        ("nothing is known", Topology.unknown(6), range(6), 3, 2, [(0, 1, 2), (3, 4, 5)]),
        ("too few", DGX1, range(5), 2, 3, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_several_sets_are_ascending_chunks_where_any_are_as_fast(
    case: str,
    machine: Topology,
    free: tuple[int, ...],
    size: int,
    count: int,
    expected: list[tuple[int, ...]] | None,
) -> None:
    assert shape_of(machine).several(mask(*free), Needs(size), count) == expected


def test_the_slowest_group_is_that_of_the_order_given() -> None:
    ours = (1, 5, 2, 3, 4, 7)
    assert slowest_group(DGX1, ours, 2) == score(DGX1, (1, 5))
    resorted = slowest_group(DGX1, sorted(ours), 2)
    assert (resorted.known_gb_per_s, resorted.link_name) == (5.302, "SYS")
    assert resorted.known_upper_gb_per_s == 12.0, "whatever the host is, its lanes carry no more"
    assert slowest_group(DGX1, ours, 0) == slowest_group(DGX1, ours, 6) == score(DGX1, ours)
    assert slowest_group(DGX1, (), 0) == score(DGX1, ())


# -- without tables ----------------------------------------------------------------------------------


def large(machine: Topology) -> Shape:
    """The machine as if it were too large: made anew, since shapes are kept for all who ask later."""
    with mock.patch.object(module, "MAX_PICKS", 1):
        gpu = generation(machine.model)
        host, _ = hosts_of(machine.cpu, gpu.pcie)
        shape = Shape(machine.links, machine.numa, machine.nearest_nic, gpu, machine.lanes, host, peer=False)
    assert not shape.tabulated
    return shape


@pytest.mark.parametrize(
    ("machine", "free", "count", "within"),
    [
        (BRIDGED, (0, 1, 2, 3), 2, Within.NODE),
        (BRIDGED, (0, 2, 3), 2, Within.NODE),
        (BRIDGED, (0, 2), 2, Within.NVLINK),
        (BRIDGED, (0, 2, 3), 2, Within.NVLINK),
        (BRIDGED, (1, 2), 3, Within.NODE),
        (BRIDGED, (3,), 1, Within.NUMA),
        (BRIDGED, (), 1, Within.NODE),
        (BRIDGED, (1,), 0, Within.NODE),
        (DGX1, (4, 5, 6, 7), 4, Within.NODE),
        (DGX1, (0, 1), 2, Within.NUMA),  # whose NUMA nodes nobody knows
        (PCIE8, range(8), 4, Within.NUMA),
        (PCIE8, range(1, 8), 4, Within.NUMA),
        (PCIE8, (0, 1, 4, 5), 3, Within.NUMA),
        (PCIE8, (0, 2), 2, Within.SWITCH),
        (H100, (1, 4, 6, 7), 4, Within.SWITCH),
        (H100, range(8), 8, Within.NVLINK),
        (ROW, range(4), 2, Within.NODE),
    ],
)
def test_a_large_machine_gives_the_same_set_where_growing_one_finds_it(
    machine: Topology, free: tuple[int, ...], count: int, within: Within
) -> None:
    expected = shape_of(machine).best(mask(*free), count, within)
    shape = large(machine)
    for _ in range(2):
        assert shape.best(mask(*free), count, within) == expected


def test_growing_starts_from_each_gpu_and_takes_whoever_is_joined_best() -> None:
    links = {
        (0, 1): Link(Path.PIX),
        (2, 3): Link(Path.NVLINK, 2),
        (3, 4): Link(Path.NVLINK, 2),
        (2, 4): Link(Path.NVLINK, 1),
    }
    shape = large(joined(5, links, Link(Path.SYS)))
    assert shape.best(mask(0, 1, 2, 3, 4), 3) == (2, 3, 4)
    assert shape.best(mask(0, 1, 2, 3, 4), 2) == (2, 3)
    assert shape.best(mask(0, 1, 2, 4), 2) == (2, 4)
    assert shape.best(mask(0, 1, 2), 2) == (0, 1)
    assert shape.best(mask(0, 3), 2) == (0, 3)
    assert shape.best(mask(1, 2, 3, 4), 4) == (1, 2, 3, 4)


def test_the_speed_on_a_large_machine_is_that_of_its_slowest_link() -> None:
    shape = large(PCIE8)
    for gpus in combinations(range(8), 3):
        slowest = shape.mb_per_s(gpus)
        assert slowest == round(score(PCIE8, gpus).bandwidth_gb_per_s * 1000)
        offer = shape.offer(mask(*gpus), 3)
        assert offer == Offer(-slowest, (0, 0, 0), 0, 3)
    switched = large(H100)
    assert [switched.mb_per_s(range(count)) for count in (2, 4, 8)] == [370_800, 378_216, 490_280]
    assert switched.offer(mask(0, 1, 2), 1) == Offer(0, (0, 0, 0), 0, 3)


@pytest.mark.parametrize(
    ("machine", "free", "needs", "expected"),
    [
        (BRIDGED, range(4), Needs(2, Within.NVLINK), [(0, 1), (2, 3)]),
        (BRIDGED, range(4), Needs(2, min_bandwidth_gb_per_s=230.4), [(0, 1), (2, 3)]),
        (BRIDGED, range(4), Needs(2, min_bandwidth_gb_per_s=230.401), []),
        (BRIDGED, (0, 1, 2), Needs(2), [(0, 1)]),
        (BRIDGED, (0, 2, 3), Needs(1, min_bandwidth_gb_per_s=999.0), [(0,), (2,), (3,)]),
        (BRIDGED, range(4), Needs(5), []),
    ],
)
def test_packing_on_a_large_machine(
    machine: Topology, free: tuple[int, ...], needs: Needs, expected: list[tuple[int, ...]]
) -> None:
    assert large(machine).packed(mask(*free), needs) == expected
