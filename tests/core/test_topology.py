"""Shapes of machines: what a topology refuses, and what it tells of islands and switches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement import topologies
from placement.core.topology import UNKNOWN_LINK, Link, Nic, Path, Topology, ordinals

NV1, SYS = Link(Path.NVLINK, 1), Link(Path.SYS)


def mesh(count: int, *joined: tuple[int, int], link: Link = NV1) -> Topology:
    """``count`` GPUs, the named pairs joined by ``link``, all others over SYS."""
    rows = [[SYS] * count for _ in range(count)]
    for a, b in joined:
        rows[a][b] = rows[b][a] = link
    return Topology(links=tuple(map(tuple, rows)))


@pytest.mark.parametrize(
    ("what", "links"),
    [
        ("has 1 links", ((SYS, SYS), (SYS,))),
        ("GPU 1 to 0 is NV1, but 0 to 1 is SYS", ((SYS, SYS), (NV1, SYS))),
    ],
)
def test_a_matrix_that_cannot_be_is_refused(what: str, links: tuple[tuple[Link, ...], ...]) -> None:
    with pytest.raises(ValueError, match=what):
        Topology(links=links)


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="numa describes 1 GPUs, the matrix 2"):
        Topology(links=mesh(2).links, numa=((0,),))


@pytest.mark.parametrize(("path", "nvlinks"), [(Path.NVLINK, 0), (Path.PIX, 2)])
def test_nvlinks_are_counted_on_nvlink_and_nowhere_else(path: Path, nvlinks: int) -> None:
    with pytest.raises(ValueError, match=path.name):
        Link(path, nvlinks)


def test_a_link_prints_as_nvidia_smi_prints_it() -> None:
    assert ["NV12", "PHB", "?"] == [str(Link(Path.NVLINK, 12)), str(Link(Path.PHB)), str(UNKNOWN_LINK)]


@pytest.mark.parametrize(
    ("case", "shape", "islands"),
    [
        ("no NVLink: every GPU alone", mesh(3), ((0,), (1,), (2,))),
        ("bridged pairs, interleaved", mesh(4, (0, 2), (1, 3)), ((0, 2), (1, 3))),
        ("a chain is one island", mesh(4, (0, 3), (3, 1)), ((0, 1, 3), (2,))),
        ("nothing known", Topology.unknown(2), ((0,), (1,))),
        ("no GPUs", Topology.unknown(0), ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_islands(case: str, shape: Topology, islands: tuple[tuple[int, ...], ...]) -> None:
    assert islands == shape.islands
    assert [i for i, island in enumerate(islands) for _ in island] == [
        shape.island_of(gpu) for island in islands for gpu in island
    ]


def test_a_switch_is_told_from_a_mesh_by_more_links_than_a_gpu_has() -> None:
    pairs = [(a, b) for a in range(4) for b in range(a)]
    assert not mesh(4, *pairs, link=Link(Path.NVLINK, 6)).nvswitch  # H100 board with 4 GPUs: 18 links each
    assert mesh(4, *pairs, link=Link(Path.NVLINK, 18)).nvswitch


def test_the_nearest_network_card_is_the_one_over_the_best_path() -> None:
    cards = (
        Nic("NIC0", (Path.SYS, Path.PHB, Path.UNKNOWN)),
        Nic("NIC1", (Path.PIX, Path.NODE, Path.UNKNOWN)),
    )
    shape = Topology(links=mesh(3).links, nics=cards)
    assert (Path.PIX, Path.PHB, Path.UNKNOWN) == shape.nearest_nic
    assert (Path.UNKNOWN,) * 3 == mesh(3).nearest_nic
    assert mesh(3) != shape


@pytest.mark.parametrize("name", ["", "GPU0", "X", "mlx5 0", "mlx5\t0", "|", "Karte-ä"])
def test_a_network_card_needs_a_name_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a network card"):
        Nic(name, ())


def test_network_cards_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="no NVLink leads to network card NIC0"):
        Nic("NIC0", (Path.NVLINK,))
    with pytest.raises(ValueError, match="NIC0 has paths to 1 GPUs, the matrix has 2"):
        Topology(links=mesh(2).links, nics=(Nic("NIC0", (Path.PIX,)),))
    with pytest.raises(ValueError, match="share a name: a, a"):
        Topology(links=mesh(1).links, nics=(Nic("a", (Path.PIX,)), Nic("a", (Path.SYS,))))


def test_the_same_shape_is_the_same_topology_whatever_the_model() -> None:
    named = Topology(links=mesh(2).links, model="NVIDIA L4")
    assert (mesh(2), hash(mesh(2))) == (named, hash(named))


def test_nothing_is_known_of_an_unknown_machine() -> None:
    assert not Topology.unknown(8).known
    assert mesh(2).known
    assert Link(Path.UNKNOWN) == Topology.unknown(8).link(0, 7)


@pytest.mark.parametrize(
    ("gpus", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 3), "0-3"), ((7, 5, 0, 2, 6), "0,2,5-7")]
)
def test_ordinals_as_people_write_them(gpus: tuple[int, ...], text: str) -> None:
    assert text == ordinals(gpus)


def test_the_pcie_path_below_nvlink_follows_from_what_both_have_near() -> None:
    load = topologies.load
    assert load("t4-4x").link(0, 3).path is load("t4-4x").pcie_path(0, 3)
    assert Path.PHB is replace(load("dgx-h100"), below=HOSTS).pcie_path(0, 3)
    h100, a100 = load("dgx-h100"), load("dgx-a100")
    assert (Path.NODE, Path.SYS) == (h100.pcie_path(0, 3), h100.pcie_path(3, 4))  # by NUMA node
    assert (Path.PXB, Path.SYS) == (
        a100.pcie_path(2, 3),
        a100.pcie_path(3, 4),
    )  # by a card that both are near to
    nobody_knows = Topology(((Link(Path.NVLINK, 4),) * 2,) * 2)
    assert Path.UNKNOWN is nobody_knows.pcie_path(0, 1)


HOSTS = ((Path.PHB,) * 8,) * 8


def test_pcie_paths_of_another_number_of_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="below is not a matrix of 2 x 2"):
        Topology(((UNKNOWN_LINK,) * 2,) * 2, below=HOSTS)
