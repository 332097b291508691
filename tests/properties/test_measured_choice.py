"""Where sets were measured the choice is that of brute force, too."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from statistics import median_low

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.score import score
from placement.core.topology import MeasuredRates, Topology
from tests.properties.test_choice import Gpus, Oracle, check_any, islands, machines

RATES = [1_000, 5_000, 5_200, 20_000, 21_900, 22_100, 50_000, 230_000, 240_000]
"""Some of them near enough to each other to be noise, on either side of 10 percent."""


class MeasuredOracle(Oracle):
    """The same with every set's rate by the definition: its own, that of sets like it, the prediction."""

    def _bandwidth(self, gpus: Gpus) -> int:
        predicted = super()._bandwidth(gpus)
        alike = [rate for other, rate in self.machine.measured if self._alike(other, gpus)]
        if not alike:
            return self._at_most(gpus, predicted)
        usual = median_low(alike)
        own = dict(self.machine.measured).get(gpus, usual)
        return own if abs(own - usual) > usual / 10 else usual

    def _at_most(self, gpus: Gpus, predicted: int) -> int:
        """But for suspect pairs: a part of it on a switch, else the second of a GPU's hops, or all over NVLink."""
        reached = (
            {
                pair: (self._bandwidth(pair), super(MeasuredOracle, self)._bandwidth(pair))
                for pair in combinations(gpus, 2)
            }
            if len(gpus) > 2
            else {}
        )
        slow = {pair for pair, (rate, usual) in reached.items() if rate < usual / 2}
        if self.switch and all(self.machine.link(a, b).nvlinks for a, b in reached):
            counts = [reached[pair] for pair in slow if len(gpus) == 3 or not all(map(self._sound, pair))]
            return min((predicted * rate // usual for rate, usual in counts), default=predicted)
        bounds = [predicted]
        for gpu in gpus if slow else ():
            hops = [(min(gpu, other), max(gpu, other)) for other in gpus if other != gpu]
            second = sorted(reached[hop][0] if hop in slow else 10**9 for hop in hops)[-2]
            ring = second * (1000 + 230 * (len(gpus) - 2) // len(gpus)) // 1000
            nvlinks = [
                reached[hop][0 if hop in slow else 1] for hop in hops if self.machine.link(*hop).nvlinks
            ]
            bounds.append(max(ring, sum(nvlinks)))
        return min(bounds)

    def _sound(self, gpu: int) -> bool:
        """Whether it was measured with another one that was not slow."""
        pairs = [pair for pair, _ in self.machine.measured if len(pair) == 2 and gpu in pair]
        return any(
            self._bandwidth(pair) >= super(MeasuredOracle, self)._bandwidth(pair) / 2 for pair in pairs
        )

    def _alike(self, one: Gpus, other: Gpus) -> bool:
        def told(gpus: Gpus) -> tuple[list[str], list[str]]:
            links = [repr(self.machine.link(a, b)) for a, b in combinations(gpus, 2)]
            return sorted(links), sorted(repr(self.machine.lanes[gpu]) for gpu in gpus)

        same = len(one) == len(other) and told(one) == told(other)
        return same and super()._bandwidth(one) == super()._bandwidth(other)


@st.composite
def measurements(draw: st.DrawFn, machine: Topology) -> MeasuredRates:
    """Some of its sets, each with a rate."""
    sets = [gpus for size in range(2, len(machine) + 1) for gpus in combinations(range(len(machine)), size)]
    chosen = draw(st.lists(st.sampled_from(sets), unique=True, max_size=12)) if sets else []
    return tuple((gpus, draw(st.sampled_from(RATES))) for gpus in chosen)


@given(machines() | islands(), st.data())
@settings(max_examples=120, deadline=None)
def test_the_choice_is_that_of_brute_force(machine: Topology, data: st.DataObject) -> None:
    machine = replace(machine, measured=data.draw(measurements(machine)))
    oracle = MeasuredOracle(machine)
    check_any(oracle, data)
    for size in range(2, len(machine) + 1):
        for gpus in combinations(range(len(machine)), size):
            assert score(machine, gpus).bandwidth_gb_per_s == oracle.bandwidth(gpus) / 1000


@pytest.mark.parametrize("name", ["dgx-1v", "dgx-h100", "a100-pcie-8x"])
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_so_it_is_on_machines_with_eight_gpus(name: str, data: st.DataObject) -> None:
    machine = topologies.load(name)
    oracle = MeasuredOracle(replace(machine, measured=data.draw(measurements(machine))))
    free = tuple(sorted(data.draw(st.frozensets(st.sampled_from(range(8)), min_size=4))))
    for size in range(len(free) + 1):
        oracle.check(free, size)
