"""Predicted bandwidth against what people measured with nccl-tests, and rings against brute force.

Figures are the bus bandwidth of a large all-reduce on one machine, GB/s. Where NCCL was told to do otherwise
than it does by itself (tuned channels, another algorithm), the row says so.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from placement import topologies
from placement.core.bandwidth import (
    generation,
    has_switch,
    hop_mb_per_s,
    hosts_of,
    nvlink_rings,
    switch_mb_per_s,
)
from placement.core.score import best_set, score
from placement.core.topology import UNKNOWN_LINK, Lanes, Link, Path, Topology

TOLERANCE = 0.15


def sockets(count: int, near: Path | Link, far: Path | Link, model: str, cpu: str | None = None) -> Topology:
    """Two sockets of ``count`` GPUs each, ``near`` within and ``far`` between."""
    near, far = (link if isinstance(link, Link) else Link(link) for link in (near, far))
    everyone = range(2 * count)
    return Topology(
        tuple(tuple(near if a // count == b // count else far for b in everyone) for a in everyone),
        model=model,
        cpu=cpu,
    )


A100_CARDS = topologies.load("a100-pcie-8x")
A100 = topologies.load("dgx-a100")
H100 = topologies.load("dgx-h100")
H100_CARDS = topologies.load("h100-pcie-2x")
H800 = topologies.load("hgx-h800")
H200 = topologies.load("hgx-h200")
B200 = topologies.load("gcp-a4")
RTX_4090 = sockets(4, Link(Path.PIX, peer=True), Path.SYS, "NVIDIA GeForce RTX 4090")
RTX_5090 = sockets(4, Path.NODE, Path.SYS, "NVIDIA GeForce RTX 5090", "Intel(R) Xeon(R) Platinum 8480+")
RTX_PRO = sockets(
    4, Path.PHB, Path.SYS, "NVIDIA RTX PRO 6000 Blackwell Server Edition", "AMD EPYC 9374F 32-Core Processor"
)
RTX_PRO_SWITCHES = topologies.load("rtx-pro-6000-8x")
BRIDGED_2080 = sockets(1, Path.PIX, Link(Path.NVLINK, 2), "NVIDIA GeForce RTX 2080 Ti")
SWITCHED_2080 = sockets(1, Path.PIX, Link(Path.PIX, peer=False), "NVIDIA GeForce RTX 2080 Ti")

ML_ENGINEERING = "stas00/ml-engineering@744d01e1 network/README.md"
RTX6KPRO = "voipmonitor/rtx6kpro hardware/pcie-bandwidth.md"


@dataclass(frozen=True)
class Figure:
    """What somebody measured."""

    name: str
    machine: Topology
    gpus: int
    gb_per_s: float
    source: str

    @property
    def predicted(self) -> float:
        """What the model says of the machine's first GPUs."""
        return score(self.machine, range(self.gpus)).bandwidth_gb_per_s

    @property
    def off(self) -> float:
        """By which part the model is too high (or too low)."""
        return self.predicted / self.gb_per_s - 1

    def __str__(self) -> str:
        return f"{self.name}, {self.gpus} GPUs"


FIGURES = [
    Figure("A100 PCIe, bridged pair", A100_CARDS, 2, 208, "NVIDIA/nccl-tests#178"),
    Figure("A100 SXM, low", A100, 8, 220, "NVIDIA/nccl-tests#228 #149"),
    Figure("A100 SXM, high", A100, 8, 235, "stas00/ml-engineering@744d01e1"),
    Figure("H100 SXM", H100, 8, 480, "NVIDIA/nccl-tests#212 #290"),
    Figure("H800", H800, 8, 215, "NVIDIA/nccl#1374"),
    *(
        Figure("H200", H200, gpus, gb_per_s, f"{ML_ENGINEERING} L923-929")
        for gpus, gb_per_s in ((4, 363), (5, 414), (6, 436), (7, 460), (8, 473))
    ),
    *(
        Figure("B200", B200, gpus, gb_per_s, f"{ML_ENGINEERING} L935-941")
        for gpus, gb_per_s in ((4, 673), (5, 678), (6, 778), (7, 811), (8, 838))
    ),
    Figure("RTX 4090, peer-to-peer", RTX_4090, 4, 25.7, "tinygrad/open-gpu-kernel-modules#36"),
    # The driver has no peer-to-peer for it: both copy through host memory, though they share a switch.
    Figure("RTX 2080 Ti, one switch", SWITCHED_2080, 2, 4.0, "gist Anthony-Hoo 5b407716"),
    *(Figure("RTX 5090", RTX_5090, gpus, rate, "NVIDIA/nccl#1639") for gpus, rate in ((4, 35), (8, 28))),
    Figure("RTX PRO 6000, a socket", RTX_PRO, 4, 30, RTX6KPRO),
    Figure("RTX PRO 6000, two sockets", RTX_PRO, 8, 22.2, RTX6KPRO),
]

KNOWN_MISSES = [
    # Half of what its twelve links give on an A100; the issue was closed without a reason found.
    Figure("H100 PCIe, bridged pair", H100_CARDS, 2, 115.5, "NVIDIA/nccl#1161"),
    # Half of what its two links give on a V100.
    Figure("RTX 2080 Ti, bridged pair", BRIDGED_2080, 2, 21.9, "NVIDIA/nccl-tests#44"),
    # Peer-to-peer past the host bridge and between sockets, which NCCL does only when told to.
    Figure("RTX PRO 6000, NCCL_P2P_LEVEL=SYS", RTX_PRO, 4, 39, RTX6KPRO),
    Figure("RTX PRO 6000, NCCL_MIN_NCHANNELS=8", RTX_PRO, 8, 37.6, RTX6KPRO),
    Figure("RTX PRO 6000 on switches, NCCL_MIN_NCHANNELS=8", RTX_PRO_SWITCHES, 8, 41.1, RTX6KPRO),
]


@pytest.mark.parametrize("figure", FIGURES, ids=str)
def test_the_prediction_is_near_what_was_measured(figure: Figure) -> None:
    assert pytest.approx(figure.gb_per_s, rel=TOLERANCE) == figure.predicted, figure.source


@pytest.mark.parametrize("figure", KNOWN_MISSES, ids=str)
def test_what_the_model_is_known_to_miss(figure: Figure) -> None:
    """A list that stays true: whatever a better model hits belongs into the other one."""
    assert abs(figure.off) > TOLERANCE, f"{figure} is a hit now: {figure.off:+.0%}"


@pytest.mark.parametrize(
    ("model", "links", "gb_per_s", "source"),
    [
        ("NVIDIA H100 80GB HBM3", 18, 370, "NVIDIA/nccl-tests#212: NCCL_ALGO=RING"),
        ("NVIDIA H200", 18, 363, f"{ML_ENGINEERING} L923-929"),
        ("NVIDIA H200", 18, 366, f"{ML_ENGINEERING} L923-929"),
        ("NVIDIA B200", 18, 674, f"{ML_ENGINEERING} L935-941"),
        ("NVIDIA B200", 18, 682, f"{ML_ENGINEERING} L935-941"),
    ],
)
def test_rings_over_a_switch_carry_what_the_links_do(
    model: str, links: int, gb_per_s: float, source: str
) -> None:
    carried = links * generation(model).nvlink_mb_per_s / 1000
    assert pytest.approx(gb_per_s, rel=TOLERANCE) == carried, source


def figures(*names: str) -> list[Figure]:
    return [figure for figure in FIGURES + KNOWN_MISSES if figure.name in names]


@pytest.mark.parametrize(
    ("case", "these"),
    [
        ("more GPUs of an H200 board", figures("H200")),
        ("more GPUs of a B200 board", figures("B200")),
        (
            "whole boards",
            [
                figure
                for figure in figures("A100 SXM, low", "A100 SXM, high", "H100 SXM", "H800", "H200", "B200")
                if figure.gpus == 8
            ],
        ),
        ("four GPUs of a board", [figure for figure in figures("H200", "B200") if figure.gpus == 4]),
        ("one socket or two", figures("RTX PRO 6000, a socket", "RTX PRO 6000, two sockets")),
        (
            "the same, tuned",
            figures("RTX PRO 6000, NCCL_P2P_LEVEL=SYS", "RTX PRO 6000, NCCL_MIN_NCHANNELS=8"),
        ),
        (
            "eight GPUs, tuned",
            figures("RTX PRO 6000, NCCL_MIN_NCHANNELS=8", "RTX PRO 6000 on switches, NCCL_MIN_NCHANNELS=8"),
        ),
        ("one socket or two of another host", figures("RTX 5090")),
        ("a bridge or a switch", figures("RTX 2080 Ti, bridged pair", "RTX 2080 Ti, one switch")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_order_is_what_was_measured(case: str, these: list[Figure]) -> None:
    """Figures less than 3 % apart are no order: one machine differs as much from the next."""
    compared = [
        (more, less)
        for more, less in itertools.permutations(these, 2)
        if more.gb_per_s > 1.03 * less.gb_per_s and (more.machine, more.gpus) != (less.machine, less.gpus)
    ]
    assert compared
    for more, less in compared:
        assert more.predicted > less.predicted, f"{more} against {less}"


def test_of_a_host_that_is_not_known_a_range_is_told_and_what_was_measured_is_in_it() -> None:
    """Three A100 cards, two of them bridged, reach 20 GB/s on a machine whose processors the source does not name."""
    found = score(A100_CARDS, (0, 1, 2))
    assert found.upper_gb_per_s is not None
    assert found.bandwidth_gb_per_s < 20 < 1.05 * found.upper_gb_per_s, "NVIDIA/nccl-tests#178"
    assert score(A100_CARDS, (0, 1)).upper_gb_per_s is None, "over NVLink nothing is missing"
    assert score(RTX_PRO, range(4)).upper_gb_per_s is None, "past the host nobody has peer-to-peer"


def test_peer_to_peer_that_is_not_known_makes_a_range() -> None:
    cpu = "AMD EPYC 9374F 32-Core Processor"
    unknown, with_it, without = (
        score(sockets(2, Link(Path.PIX, peer=peer), Path.SYS, "NVIDIA L40S", cpu), (0, 1))
        for peer in (None, True, False)
    )
    least, most = without.bandwidth_gb_per_s, with_it.bandwidth_gb_per_s
    assert (least, most) == (unknown.bandwidth_gb_per_s, unknown.upper_gb_per_s)
    assert with_it.upper_gb_per_s is None and without.upper_gb_per_s is None and least < most


@pytest.mark.parametrize(
    ("nvls", "least", "most"), [(True, 490.28, None), (False, 370.8, None), (None, 370.8, 490.28)]
)
def test_whether_the_switch_reduces_counts_and_if_not_known_makes_a_range(
    nvls: bool | None, least: float, most: float | None
) -> None:
    found = score(replace(H100, nvls=nvls), range(8))
    assert (found.bandwidth_gb_per_s, found.upper_gb_per_s) == (least, most)
    assert found.bandwidth_gb_per_s == pytest.approx(330, rel=TOLERANCE) or nvls, "NVIDIA/nccl#1221: NVLS off"
    few = score(replace(H100, nvls=nvls), (0, 1))
    assert (few.bandwidth_gb_per_s, few.upper_gb_per_s) == (370.8, None), "two GPUs make rings anyway"


def test_switches_before_hopper_have_no_range() -> None:
    assert A100.nvls is None and score(A100, range(8)).upper_gb_per_s is None


def test_one_order_is_known_to_be_wrong() -> None:
    """Bridged H100 cards should beat bridged A100 cards, and did not."""
    (a100,), (h100,) = figures("A100 PCIe, bridged pair"), figures("H100 PCIe, bridged pair")
    assert a100.gb_per_s > h100.gb_per_s
    assert a100.predicted < h100.predicted


# -- through the host --------------------------------------------------------------------------------


def cards(
    levels: Sequence[Path], cpu: str, pcie: int, narrow: Sequence[int] = (), peer: bool = False
) -> Topology:
    """Eight cards over PCIe: two below what the first level joins, four below the second, then the third."""
    pairs = [[next(i for i in (1, 2, 3) if a >> i == b >> i) for b in range(8)] for a in range(8)]
    links = tuple(
        tuple(UNKNOWN_LINK if a == b else Link(levels[level - 1], peer=peer) for b, level in enumerate(row))
        for a, row in enumerate(pairs)
    )
    lanes = tuple(Lanes(pcie, 8 if gpu in narrow else 16) for gpu in range(8))
    return Topology(links, lanes=lanes, cpu=cpu)


SOCKETS = (Path.NODE, Path.NODE, Path.SYS)
ROME = cards(SOCKETS, "AMD EPYC, Rome", 4)
ROME_NARROW = cards(SOCKETS, "AMD EPYC, Rome", 4, narrow=(3, 4))
ROME_BRIDGES = cards((Path.PHB, Path.NODE, Path.SYS), "AMD EPYC 7502 32-Core Processor", 4)
ROME_SWITCHES = cards((Path.PIX, Path.NODE, Path.NODE), "AMD EPYC, Rome", 2)
GENOA = cards(SOCKETS, "AMD EPYC, Genoa", 4, narrow=(1,))
GENOA_5 = cards((Path.NODE, Path.SYS, Path.SYS), "AMD EPYC 9V74 80-Core Processor", 5)
XEON_SWITCHES = cards((Path.PIX, Path.NODE, Path.SYS), "Intel(R) Xeon(R) Gold 6230R CPU @ 2.10GHz", 3)

GEFORCE = "WU-CVGL 05_GPU_P2P_GeForce_and_CMP.md"
NEU = "d2l-neu NCCL PCIe investigation"
V100S = "V100S comm report, ACS on"
MACHINE_NOTES = "machine notes, torch probe"


@pytest.mark.parametrize(
    ("machine", "gpus", "gb_per_s", "source"),
    [
        (ROME, (0, 1), 3.6, GEFORCE),
        (ROME, (0, 1, 2, 3), 4.0, GEFORCE),
        (ROME, (0, 4), 1.4, GEFORCE),
        (ROME, tuple(range(8)), 1.6, GEFORCE),
        (ROME_NARROW, (0, 1, 2, 3), 3.6, GEFORCE),
        (ROME_NARROW, (4, 5, 6), 3.3, GEFORCE),
        (ROME_NARROW, (0, 4), 1.3, GEFORCE),
        (ROME_BRIDGES, (0, 1), 2.24, NEU),
        (ROME_BRIDGES, (0, 2), 3.35, NEU),
        (ROME_BRIDGES, (0, 1, 2, 3), 2.19, NEU),
        (ROME_SWITCHES, (0, 1), 1.7, GEFORCE),
        (ROME_SWITCHES, (0, 2), 3.0, GEFORCE),
        (ROME_SWITCHES, (0, 1, 2, 3), 1.93, GEFORCE),
        (ROME_SWITCHES, tuple(range(8)), 2.17, GEFORCE),
        (GENOA, (2, 3), 18.5, GEFORCE),
        (GENOA, (3, 7), 16.4, GEFORCE),
        (GENOA, (4, 5, 6, 7), 21.1, GEFORCE),
        (GENOA, tuple(range(8)), 10.6, GEFORCE),
        (GENOA_5, (0, 1), 28.8, MACHINE_NOTES),
        (GENOA_5, (0, 2), 22.2, MACHINE_NOTES),
        (GENOA_5, (0, 1, 2, 3), 25.6, MACHINE_NOTES),
        (XEON_SWITCHES, (0, 1), 3.3, V100S),
        (XEON_SWITCHES, (0, 2), 5.56, V100S),
        (XEON_SWITCHES, (0, 4), 5.45, V100S),
        (XEON_SWITCHES, (0, 1, 2, 3), 3.74, V100S),
        (XEON_SWITCHES, (0, 2, 4, 6), 6.81, V100S),
    ],
)
def test_through_the_host_the_prediction_is_near_what_was_measured(
    machine: Topology, gpus: tuple[int, ...], gb_per_s: float, source: str
) -> None:
    assert pytest.approx(gb_per_s, rel=TOLERANCE) == score(machine, gpus).bandwidth_gb_per_s, source


def test_four_cards_that_share_no_uplink_are_known_to_be_faster() -> None:
    predicted = score(ROME_SWITCHES, (0, 2, 4, 6)).bandwidth_gb_per_s
    assert predicted < 0.75 * 4.19, GEFORCE
    assert predicted > score(ROME_SWITCHES, (0, 1, 2, 3)).bandwidth_gb_per_s


def test_without_peer_to_peer_one_card_per_uplink_is_the_best_set() -> None:
    assert best_set(XEON_SWITCHES, range(8), 2) == (0, 2)
    assert best_set(XEON_SWITCHES, range(8), 4) == (0, 2, 4, 6)
    assert best_set(ROME, (0, 4, 5), 2) == (4, 5)
    switches = cards((Path.PIX, Path.NODE, Path.SYS), "Intel(R) Xeon(R) Gold 6230R", 3, peer=True)
    assert best_set(switches, range(8), 2) == (0, 1), "with it the switch is"


def test_two_cards_that_are_alone_on_amd_go_peer_to_peer_past_the_host() -> None:
    machine = cards(SOCKETS, "AMD EPYC, Rome", 4, peer=True)
    assert score(machine, (0, 1)).bandwidth_gb_per_s == pytest.approx(24.0, rel=TOLERANCE), GEFORCE
    assert score(machine, (0, 4)).bandwidth_gb_per_s == pytest.approx(18.3, rel=TOLERANCE), GEFORCE
    assert score(machine, (0, 1, 2)).bandwidth_gb_per_s == score(ROME, (0, 1, 2)).bandwidth_gb_per_s
    xeon = cards(SOCKETS, "Intel(R) Xeon(R) Gold 6230R", 3, peer=True)
    assert score(xeon, (0, 1)).bandwidth_gb_per_s < 6


def test_nvlink_pairs_share_an_uplink_once_each() -> None:
    """A ring over two bridged pairs below one switch leaves it twice, not four times."""
    bare = cards((Path.PIX,) * 3, "Intel(R) Xeon(R) Gold 6230R", 3)
    paired = replace(
        bare,
        links=tuple(
            tuple(Link(Path.NVLINK, 4) if {a, b} in ({0, 1}, {2, 3}) else link for b, link in enumerate(row))
            for a, row in enumerate(bare.links)
        ),
    )
    alone, both = (score(one, (0, 1, 2, 3)).bandwidth_gb_per_s for one in (bare, paired))
    assert both > 1.4 * alone


@pytest.mark.parametrize(
    ("cpu", "known"),
    [
        ("AMD EPYC 7763 64-Core Processor", "zen2"),
        ("AMD Ryzen Threadripper PRO 5975WX 32-Cores", "zen2"),
        ("AMD EPYC 9354 32-Core Processor", "zen4"),
        ("AMD EPYC, Turin", "zen4"),
        ("AMD Ryzen Threadripper PRO 7995WX 96-Cores", "zen4"),
        ("Intel(R) Xeon(R) Platinum 8260 CPU @ 2.40GHz", "xeon"),
        ("Intel(R) Xeon(R) CPU @ 2.00GHz, Skylake", "xeon"),
        ("Intel(R) Xeon(R) Platinum 8470", "xeon4"),
        ("INTEL(R) XEON(R) PLATINUM 8570", "xeon4"),
        ("Intel(R) Xeon(R) 6787P", "xeon4"),
        ("Intel(R) Xeon(R) CPU @ 2.70GHz, Sapphire Rapids", "xeon4"),
    ],
)
def test_hosts_are_told_by_the_names_of_their_processors(cpu: str, known: str) -> None:
    hosts = {"zen2": ROME.cpu, "zen4": GENOA.cpu, "xeon": XEON_SWITCHES.cpu, "xeon4": RTX_5090.cpu}
    slowest, fastest = hosts_of(cpu, 4)
    assert slowest == fastest and hosts_of(cpu, 4) == hosts_of(hosts[known], 4)


@pytest.mark.parametrize(
    "cpu", ["Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz", "AMD EPYC", "AMD EPYC 7601", "Neoverse-V2", None]
)
def test_a_host_that_nobody_measured_is_between_the_slowest_with_such_cards_and_the_fastest(
    cpu: str | None,
) -> None:
    (xeon, _), (zen2, _), (zen4, _) = (hosts_of(one.cpu, 4) for one in (XEON_SWITCHES, ROME, GENOA))
    assert [hosts_of(cpu, pcie) for pcie in (3, 4)] == [(xeon, zen4), (zen2, zen4)]
    assert hosts_of(cpu, 5)[0].near == zen4.near


@pytest.mark.parametrize(
    "cpu", ["Intel(R) Xeon(R) Gold 6330 CPU @ 2.00GHz", "Intel(R) Xeon(R) CPU @ 2.60GHz, Ice Lake"]
)
def test_the_third_generation_of_xeon_is_between_its_neighbours(cpu: str) -> None:
    neighbours = hosts_of("Intel(R) Xeon(R) Gold 6230R", 4)[0], hosts_of("Intel(R) Xeon(R) Gold 6430", 4)[0]
    assert hosts_of(cpu, 4) == neighbours


# -- rings -------------------------------------------------------------------------------------------

Counts = dict[frozenset[int], int]
"""NVLinks per pair."""


def hamiltonian(gpus: Sequence[int]) -> list[frozenset[frozenset[int]]]:
    """Every ring through ``gpus``, as the set of its pairs."""
    first, *others = gpus
    return list(
        {
            frozenset(frozenset(hop) for hop in itertools.pairwise((first, *order, first)))
            for order in itertools.permutations(others)
        }
    )


def most_rings(counts: Counts, gpus: Sequence[int]) -> int:
    """Takes rings away in every order that there is."""

    def most(room: Counts, rings: list[frozenset[frozenset[int]]]) -> int:
        best = 0
        for i, ring in enumerate(rings):
            if all(room.get(hop, 0) for hop in ring):
                left = {hop: count - (hop in ring) for hop, count in room.items()}
                best = max(best, 1 + most(left, rings[i:]))
        return best

    possible = [ring for ring in hamiltonian(gpus) if all(counts.get(hop, 0) for hop in ring)]
    return most(counts, possible)


def machine(counts: Counts, size: int) -> Topology:
    def link(a: int, b: int) -> Link:
        count = counts.get(frozenset((a, b)), 0)
        return Link(Path.NVLINK, count) if count else UNKNOWN_LINK

    return Topology(tuple(tuple(link(a, b) for b in range(size)) for a in range(size)))


@pytest.mark.parametrize("size", [3, 4, 5])
@pytest.mark.parametrize("seed", range(40))
def test_rings_are_as_many_as_brute_force_finds(size: int, seed: int) -> None:
    chance = random.Random(seed)
    most = chance.choice((1, 2, 3)) if size < 5 else chance.choice((1, 2))
    pairs = [frozenset(pair) for pair in itertools.combinations(range(size), 2)]
    counts = {pair: chance.randint(0, most) for pair in pairs}
    if size == 5 and seed % 4 == 0:  # a sparse graph with many links on a pair
        counts = {pair: chance.choice((0, 1, 3)) for pair in pairs}
    shape = machine(counts, size)
    assert most_rings(counts, range(size)) == nvlink_rings(shape.links, range(size))


def counts_of(shape: Topology) -> Counts:
    return {
        frozenset((a, b)): shape.link(a, b).nvlinks for a, b in itertools.combinations(range(len(shape)), 2)
    }


def joined(counts: Counts, gpus: tuple[int, ...]) -> bool:
    """Whether NVLinks lead from each to each of them, perhaps over others of them."""
    reached = {gpus[0]}
    for _ in gpus:
        reached |= {b for a in reached for b in gpus if a != b and counts[frozenset((a, b))]}
    return reached == set(gpus)


def test_most_quads_of_a_dgx1_are_joined_by_nvlinks_but_have_no_ring() -> None:
    dgx = topologies.load("dgx-1v")
    counts = counts_of(dgx)
    quads = list(itertools.combinations(range(8), 4))
    with_ring = {quad: most_rings(counts, quad) for quad in quads}
    ringless = [quad for quad in quads if joined(counts, quad) and not with_ring[quad]]
    assert (70, 48, 14) == (len(quads), len(ringless), sum(not joined(counts, quad) for quad in quads))
    assert with_ring == {quad: nvlink_rings(dgx.links, quad) for quad in quads}
    assert {(0, 1, 2, 3), (4, 5, 6, 7)} == {quad for quad, rings in with_ring.items() if rings == 2}
    for quad in ringless:
        assert score(dgx, quad).bandwidth_gb_per_s < 12, "a ring over PCIe somewhere"


def test_a_whole_dgx1_has_three_rings() -> None:
    dgx = topologies.load("dgx-1v")
    assert 3 == most_rings(counts_of(dgx), range(8)) == nvlink_rings(dgx.links, range(8))
    assert 3 * 2 * 20 == score(dgx, range(8)).bandwidth_gb_per_s


@pytest.mark.parametrize(
    ("name", "rings"), [("v100-4x", 3), ("hgx-a100-4gpu", 6), ("hgx-h100-4gpu", 9), ("dgx-1p", 1)]
)
def test_a_full_mesh_uses_all_its_links(name: str, rings: int) -> None:
    assert rings == nvlink_rings(topologies.load(name).links, range(4))


# -- hops --------------------------------------------------------------------------------------------

MODELS = sorted(
    {topologies.describe(name).gpu for name in topologies.names()}
    | {"NVIDIA GeForce RTX 5090", "NVIDIA RTX A6000", "a model of next year"}
)


@pytest.mark.parametrize("model", [None, *MODELS])
def test_hops_are_strictly_ordered_on_every_model(model: str | None) -> None:
    slowest_first = [
        *(Link(path) for path in (Path.UNKNOWN, Path.PXB, Path.PIX)),
        *(Link(Path.NVLINK, links) for links in range(1, 37)),
    ]
    rates = [hop_mb_per_s(link, generation(model)) for link in slowest_first]
    assert sorted(set(rates)) == rates
    assert rates[0] > 0


PCIE = (Path.PIX, Path.PXB, Path.UNKNOWN)


@pytest.mark.parametrize(
    ("model", "over_pcie", "over_nvlinks"),
    [
        ("Tesla V100-SXM2-32GB", [12_000, 11_400, 100], [20_000, 40_000, 80_000]),
        ("NVIDIA A100-SXM4-80GB", [24_000, 22_800, 100], [24_001, 38_400, 76_800]),
        ("NVIDIA H100 80GB HBM3", [48_000, 45_600, 100], [48_001, 48_002, 82_400]),
    ],
)
def test_what_a_hop_carries(model: str, over_pcie: list[int], over_nvlinks: list[int]) -> None:
    """The PCIe rate by generation; the count times the rate of a link, above PCIe anyway."""
    gpu = generation(model)
    assert [hop_mb_per_s(Link(path), gpu) for path in PCIE] == over_pcie
    assert {type(hop_mb_per_s(Link(path), gpu)) for path in PCIE} == {int}, "so that sums are exact"
    assert [hop_mb_per_s(Link(Path.NVLINK, links), gpu) for links in (1, 2, 4)] == over_nvlinks


@pytest.mark.parametrize(
    ("model", "links", "reached"),
    [
        ("NVIDIA A100-SXM4-80GB", 12, [230_400, 230_400, 230_400]),  # no reductions in the switch
        ("NVIDIA H100 80GB HBM3", 18, [370_800, 378_216, 490_280]),  # which pay off from four GPUs on
        ("NVIDIA B200", 18, [721_800, 721_800, 830_872]),
        ("NVIDIA H100 80GB HBM3", 9, [185_400, 189_108, 245_140]),
    ],
)
def test_what_two_four_and_eight_gpus_reach_over_a_switch(model: str, links: int, reached: list[int]) -> None:
    found = [switch_mb_per_s(links, count, generation(model)) for count in (2, 4, 8)]
    assert found == reached
    assert {type(rate) for rate in found} == {int}, "so that sums are exact"


def test_a_switch_shows_as_more_links_than_a_gpu_has() -> None:
    """Three peers with six links each use up the 18 of an H100, and are a mesh; so are two with nine."""
    for peers, links, is_switch in (
        (3, 6, False),
        (3, 7, True),
        (2, 9, False),
        (1, 18, False),
        (2, 18, True),
    ):
        row = (UNKNOWN_LINK, *[Link(Path.NVLINK, links)] * peers)
        assert has_switch([row], generation("NVIDIA H100 80GB HBM3")) == is_switch
        assert has_switch([(UNKNOWN_LINK,), row], generation("NVIDIA H100 80GB HBM3")) == is_switch


def test_the_search_for_rings_ends_on_a_mesh_that_nobody_builds() -> None:
    """Among twelve GPUs that are all joined there are twenty million rings."""
    counts = {frozenset(pair): 1 for pair in itertools.combinations(range(12), 2)}
    assert 1 <= nvlink_rings(machine(counts, 12).links, range(12)) <= 5


def test_the_model_decides_where_shapes_are_equal() -> None:
    """Topologies compare equal whatever the model; their bandwidth is not."""
    volta = BRIDGED_2080
    blackwell = replace(volta, model="NVIDIA B200")
    assert volta == blackwell
    assert [40.0, 80.2] == [score(one, (0, 1)).bandwidth_gb_per_s for one in (volta, blackwell)]
