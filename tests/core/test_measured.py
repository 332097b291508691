"""What was measured counts before what is predicted: for the set itself, and for sets that are alike."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from placement import topologies
from placement.core.measured import is_suspect, of_all, sets_to_measure
from placement.core.needs import Needs
from placement.core.score import best_set, score
from placement.core.shape import shape_of
from placement.core.topology import UNKNOWN_LINK, MeasuredRates, Topology

HGX = topologies.load("dgx-h100")
BRIDGED = topologies.load("a100-pcie-4x")


def measured(machine: Topology, *rates: tuple[tuple[int, ...], int]) -> Topology:
    return replace(machine, measured=rates)


def gb(machine: Topology, *gpus: int) -> tuple[float, bool]:
    found = score(machine, gpus)
    return found.bandwidth_gb_per_s, found.measured


def test_a_measured_rate_is_that_of_its_set() -> None:
    machine = measured(BRIDGED, ((0, 1), 212_000))
    assert gb(machine, 1, 0) == (212.0, True)


def test_it_speaks_for_sets_that_are_alike_and_for_no_others() -> None:
    machine = measured(BRIDGED, ((0, 1), 212_000))
    assert gb(machine, 2, 3) == (212.0, True), "the other bridge"
    assert gb(machine, 0, 2) == gb(BRIDGED, 0, 2), "no bridge"
    assert gb(machine, 0, 1, 2, 3) == gb(BRIDGED, 0, 1, 2, 3), "larger"


ALL = list(combinations(range(8), 2))


def test_a_gpu_that_is_slow_with_all_others_makes_every_set_slow_that_holds_it() -> None:
    """Over an NVSwitch it spends the same links on whoever its peer is."""
    machine = measured(HGX, *((pair, 92_700 if 3 in pair else 370_000) for pair in ALL))
    sets = [range(3), range(4), range(8)]
    assert [gb(machine, *gpus) for gpus in sets] == [(370.8, False), (94.554, False), (122.57, False)]
    assert best_set(machine, range(5), 4) == (0, 1, 2, 4)
    assert score(machine, range(4)).upper_gb_per_s is None
    whole = measured(HGX, *machine.measured, (tuple(range(8)), 480_000))
    assert gb(whole, *range(8)) == (480.0, True), "what was measured itself counts"


def test_over_a_switch_a_pair_of_sound_gpus_slows_only_sets_of_three() -> None:
    machine = measured(HGX, *((pair, 92_700 if pair == (0, 1) else 370_000) for pair in ALL))
    assert gb(machine, 0, 1, 2) == (92.7, False)
    assert gb(machine, 0, 1, 2, 3) == gb(HGX, 0, 1, 2, 3), "a ring of four has a way around"
    few = measured(HGX, ((0, 1), 92_700), ((2, 3), 370_000), ((4, 5), 370_000))
    assert gb(few, 0, 1, 2, 3) == (94.554, False), "nobody has seen that either of them is sound"


def test_a_ring_is_as_slow_as_the_second_of_a_gpus_hops() -> None:
    quad = topologies.load("t4-4x")
    pairs = list(combinations(range(4), 2))
    usual = [round(1000 * gb(quad, *pair)[0]) for pair in pairs]
    slow = usual[0] // 4
    one = measured(quad, *zip(pairs, [slow, *usual[1:]], strict=True))
    assert gb(one, 0, 1, 2) == (slow * 1076 // 1000 / 1000, False)
    assert gb(one, 0, 1, 2, 3) == gb(quad, 0, 1, 2, 3), "a ring around it"
    two = measured(quad, *zip(pairs, [slow, slow, *usual[2:]], strict=True))
    assert gb(two, 0, 1, 2, 3) == (slow * 1115 // 1000 / 1000, False)
    assert gb(two, 1, 2, 3) == gb(quad, 1, 2, 3)


def test_rings_over_nvlink_carry_no_more_than_what_leaves_a_gpu() -> None:
    """A DGX-1V's fastest quads have two rings, 80 GB/s, and a link between each two of their GPUs."""
    machine = topologies.load("dgx-1v")
    assert gb(machine, 0, 1, 2, 3) == (80.0, False)
    rates = {pair: 20_000 * machine.link(*pair).nvlinks for pair in ALL if machine.link(*pair).nvlinks}
    rates |= {(0, other): 5_000 * machine.link(0, other).nvlinks for other in (1, 2, 3)}
    bad = measured(machine, *sorted(rates.items()))
    links = sum(machine.link(0, other).nvlinks for other in (1, 2, 3))
    assert gb(bad, 0, 1, 2, 3) == (5.0 * links, False)
    assert gb(bad, 4, 5, 6, 7) == (80.0, False)


def test_alike_sets_that_differ_by_noise_are_equally_fast() -> None:
    machine = measured(HGX, ((0, 1), 370_000), ((2, 3), 365_000), ((4, 5), 355_000))
    assert {gb(machine, *pair) for pair in combinations(range(8), 2)} == {(365.0, True)}
    assert best_set(machine, range(1, 8), 2) == best_set(HGX, range(1, 8), 2), "nothing is steered for noise"


def test_a_set_that_is_apart_has_its_own_rate_and_is_avoided() -> None:
    machine = measured(HGX, ((0, 1), 30_000), ((2, 3), 365_000), ((4, 5), 370_000))
    assert gb(machine, 0, 1) == (30.0, True)
    assert gb(machine, 0, 2) == (365.0, True)
    assert best_set(machine, range(8), 2) == (0, 2)
    assert shape_of(machine).slownesses(2) == [-365_000, -30_000]


def test_what_links_nobody_knows_reach_is_known_once_it_is_measured() -> None:
    machine = measured(Topology.unknown(4), ((0, 1), 12_000))
    assert score(machine, (0, 1)).weakest == UNKNOWN_LINK
    assert score(machine, (0, 1)).known_gb_per_s == 12.0
    assert score(machine, (0, 1, 2)).known_gb_per_s is None


def test_a_floor_is_held_against_what_was_measured() -> None:
    machine = measured(BRIDGED, ((0, 1), 90_000), ((2, 3), 210_000))
    needs = Needs(2, min_bandwidth_gb_per_s=200)
    assert shape_of(machine).packed(0b1111, needs) == [(2, 3)]


def test_what_is_predicted_stays_known() -> None:
    machine = measured(BRIDGED, ((0, 1), 100_000))
    assert shape_of(machine).predicted is shape_of(BRIDGED)
    assert shape_of(BRIDGED).predicted is shape_of(BRIDGED)


@pytest.mark.parametrize(
    ("case", "own", "rate"),
    [
        ("nothing of its own", {}, 120),
        ("its own, as others have it", {(0, 1): 125}, 120),
        ("its own, which is apart", {(0, 1): 135}, 135),
        ("its own, which is apart", {(0, 1): 7}, 7),
    ],
)
def test_a_machine_has_the_rates_of_its_make_but_where_its_own_are_apart(
    case: str, own: dict[tuple[int, ...], int], rate: int
) -> None:
    of_make: list[dict[tuple[int, ...], int]] = [{(0, 1): 100}, {(0, 1): 120, (2, 3): 90}, {(0, 1): 500}]
    assert of_all(own, of_make) == (((0, 1), rate), ((2, 3), 90))
    assert of_all(own | {(1, 2): 5}, of_make) == (((0, 1), rate), ((1, 2), 5), ((2, 3), 90))


def test_less_than_half_is_suspect() -> None:
    assert [is_suspect(rate, 100) for rate in (49, 50, 51, 200)] == [True, False, False, False]


@pytest.mark.parametrize(
    "rates",
    [
        (((0,), 5),),
        (((1, 0), 5),),
        (((0, 4), 5),),
        (((0, 1), 0),),
        (((0, 1), 5), ((0, 1), 6)),
        (((-1, 0), 5),),
    ],
)
def test_what_is_no_rate_of_a_set_is_refused(rates: MeasuredRates) -> None:
    with pytest.raises(ValueError, match="measured has"):
        replace(BRIDGED, measured=rates)


def test_many_gpus_of_which_every_pair_is_apart_are_still_chosen_from() -> None:
    rates = {pair: 1000 * (i + 1) for i, pair in enumerate(combinations(range(17), 2))}
    machine = measured(Topology.unknown(17), *rates.items())
    shape = shape_of(machine)
    assert not shape.tabulated
    assert (shape.mb_per_s((16, 15)), shape.mb_per_s((0, 1))) == (136_000, 1_000)
    assert {-shape.mb_per_s(pair) for pair in rates} <= set(shape.slownesses(2))
    assert best_set(machine, range(17), 2) == (15, 16)


def test_pairs_are_measured_first_then_one_of_each_kind_of_larger_sets() -> None:
    predicted = shape_of(BRIDGED).mb_per_s
    pairs = [(1, 2), (2, 3), (1, 3)]
    assert sets_to_measure(BRIDGED, {3, 1, 2}, True, predicted) == pairs
    assert sets_to_measure(BRIDGED, {3, 1, 2}, False, predicted) == [*pairs, (1, 2, 3)]
    sets = sets_to_measure(HGX, range(8), False, shape_of(HGX).mb_per_s)
    assert [len(gpus) for gpus in sets[28:]] == [4, 8, 3, 5, 6, 7]
