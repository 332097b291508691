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
    of_make = [{(0, 1): 100}, {(0, 1): 120, (2, 3): 90}, {(0, 1): 500}]
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
