"""The catalogue: every machine is whole, says where it is from, and reads the same everywhere."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.resources import files

import pytest

from placement import topologies
from placement.core.matrix import parse_matrix, render_matrix
from placement.core.topology import MAX_NVLINKS_PER_GPU, Lanes, Link, Path
from placement.errors import UnknownTopology

NAMES = topologies.names()


@pytest.mark.parametrize(
    ("name", "gpus", "levels", "switched", "islands"),
    [
        ("dgx-1p", 8, {"NV1", "SYS"}, False, 1),
        ("dgx-1v", 8, {"NV1", "NV2", "SYS"}, False, 1),
        ("dgx-2", 16, {"NV6"}, True, 1),
        ("dgx-a100", 8, {"NV12"}, True, 1),
        ("dgx-h100", 8, {"NV18"}, True, 1),
        ("gcp-a4", 8, {"NV18"}, True, 1),
        ("dgx-b200", 8, {"NV18"}, True, 1),
        ("gb200-tray", 4, {"NV18"}, True, 1),
        ("azure-gb300", 4, {"NV18"}, True, 1),
        ("hgx-h200", 8, {"NV18"}, True, 1),
        ("hgx-h800", 8, {"NV8"}, True, 1),
        ("hgx-a100-4gpu", 4, {"NV4"}, False, 1),
        ("hgx-h100-4gpu", 4, {"NV6"}, False, 1),
        ("v100-4x", 4, {"NV2"}, False, 1),
        ("a100-pcie-4x", 4, {"NV12", "SYS"}, False, 2),
        ("a100-pcie-8x", 8, {"NV12", "NODE", "SYS"}, False, 4),
        ("h100-pcie-2x", 2, {"NV12"}, False, 1),
        ("l40s-4x", 4, {"NODE", "SYS"}, False, 4),
        ("rtx-4090-8x", 8, {"SYS"}, False, 8),
        ("rtx-3090-2x", 2, {"NV4"}, False, 1),
        ("rtx-pro-6000-8x", 8, {"PHB", "PIX"}, False, 8),
        ("a10-4x", 4, {"PHB"}, False, 4),
        ("t4-4x", 4, {"PHB"}, False, 4),
        ("a100-mig-4x", 13, {"?", "NV12"}, False, 12),
    ],
)
def test_machines_are_what_they_are_known_for(
    name: str, gpus: int, levels: set[str], switched: bool, islands: int
) -> None:
    shape = topologies.load(name)
    found = {str(shape.link(a, b)) for a in range(len(shape)) for b in range(a)}
    assert (gpus, levels, switched, islands) == (len(shape), found, shape.nvswitch, len(shape.islands))


def test_every_matrix_has_its_entry_and_every_entry_its_matrix() -> None:
    texts = {path.name for path in files(topologies).iterdir() if path.name.endswith(".txt")}
    assert {f"{name}.txt" for name in NAMES} == texts


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_is_complete_and_tells_its_source(name: str) -> None:
    entry = topologies.describe(name)
    assert name == entry.name
    assert re.fullmatch(
        r"(https://github\.com/|public text, page not recorded|derived from )[^\n]*", entry.source
    )
    assert entry.title and entry.gpu.startswith(("NVIDIA ", "Tesla "))
    assert 16 <= entry.memory_gib <= 288
    assert (6, 0) <= entry.compute_capability <= (12, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_is_written_and_read_back(name: str) -> None:
    shape = topologies.load(name)
    links = tuple(tuple(replace(link, peer=None) for link in row) for row in shape.links)
    assert replace(shape, links=links, lanes=(), cpu=None, nvls=None) == parse_matrix(render_matrix(shape))
    assert topologies.describe(name).gpu == shape.model


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_is_possible(name: str) -> None:
    """Without a switch no GPU has more links than there are, and no CPU is near to two sockets' GPUs.

    Affinities are told of all GPUs or of none.
    """
    shape = topologies.load(name)
    assert shape.known
    assert all(shape.cpus) or not any(shape.cpus)
    for gpu, row in enumerate(shape.links):
        assert shape.nvswitch or sum(link.nvlinks for link in row) <= MAX_NVLINKS_PER_GPU
        for other in range(gpu):
            shared = set(shape.cpus[gpu]) & set(shape.cpus[other])
            assert shape.cpus[gpu] == shape.cpus[other] or not shared
            if shape.numa[gpu] and shape.numa[other]:
                assert (shape.numa[gpu] == shape.numa[other]) == bool(shared)


@pytest.mark.parametrize(
    ("name", "links"),
    [("dgx-1p", 4), ("dgx-1v", 6), ("v100-4x", 6), ("hgx-a100-4gpu", 12), ("hgx-h100-4gpu", 18)],
)
def test_a_mesh_uses_all_links_of_each_gpu(name: str, links: int) -> None:
    assert {links} == {sum(link.nvlinks for link in row) for row in topologies.load(name).links}


def test_the_network_cards_are_those_of_the_source() -> None:
    assert {
        "dgx-1p": 4, "dgx-1v": 4, "dgx-a100": 12, "dgx-h100": 12, "gcp-a4": 8, "gb200-tray": 6, "azure-gb300": 4,
        "hgx-h200": 8, "hgx-h800": 9, "hgx-a100-4gpu": 2, "hgx-h100-4gpu": 4, "v100-4x": 1, "l40s-4x": 2,
        "rtx-4090-8x": 2,
    } == {name: len(topologies.load(name).nics) for name in NAMES if topologies.load(name).nics}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_simulated_node_reports_the_machine_and_nothing_it_cannot_know(name: str) -> None:
    entry, shape, facts = topologies.describe(name), topologies.load(name), topologies.facts(name)
    assert ("catalogue", name) == (facts.source, facts.catalogue_name)
    assert (shape, shape.model) == (facts.topology(), facts.topology().model)
    for ordinal, gpu in enumerate(facts.gpus):
        assert (ordinal, entry.gpu) == (gpu.ordinal, gpu.name)
        if gpu.instance is None:
            assert entry.memory_gib * 1024**3 == gpu.memory_total_bytes
        assert entry.compute_capability == gpu.compute_capability
        assert (None, None, None, False) == (gpu.uuid, gpu.memory_used_bytes, gpu.pci_bus_id, gpu.lost)
    for pair in facts.pairs:
        hidden = shape.link(pair.a, pair.b).path is Path.NVLINK
        assert hidden == (pair.common_ancestor is Path.UNKNOWN)


def test_what_the_source_tells_of_processors_lanes_and_peer_to_peer_is_there() -> None:
    dgx, cards = topologies.load("dgx-a100"), topologies.load("rtx-pro-6000-8x")
    assert dgx.cpu == "AMD EPYC 7742 64-Core Processor"
    assert set(dgx.lanes) == {Lanes(4, 16)} and set(cards.lanes) == {Lanes(5, 16)}
    assert [cards.link(0, 1), cards.link(0, 4)] == [Link(Path.PIX, peer=True), Link(Path.PHB, peer=True)]
    assert topologies.load("rtx-4090-8x").link(0, 1) == Link(Path.SYS, peer=False)
    unknown = topologies.load("l40s-4x")
    assert (unknown.cpu, set(unknown.lanes), unknown.link(0, 1).peer) == (None, {None}, None)


def test_a_message_survives_the_wire() -> None:
    facts = topologies.facts("dgx-1v")
    assert facts == type(facts).model_validate_json(facts.model_dump_json())


def test_the_links_of_a_gpu_end_in_the_switch_where_there_is_one() -> None:
    ends = {
        name: {gpu.nvswitch_links for gpu in topologies.facts(name).gpus if gpu.instance is None}
        for name in NAMES
    }
    switched = {"dgx-2": 6, "dgx-a100": 12, "hgx-h800": 8}
    switched |= dict.fromkeys(["dgx-h100", "gcp-a4", "dgx-b200", "gb200-tray", "azure-gb300", "hgx-h200"], 18)
    assert {name: {links} for name, links in switched.items()} == {
        name: links for name, links in ends.items() if links != {0}
    }


@pytest.mark.parametrize("name", ["dgx-3", "", "catalogue", "../core/dgx-1v", "DGX-1V"])
def test_an_unknown_machine_is_refused_with_the_known_ones(name: str) -> None:
    for function in (topologies.load, topologies.facts, topologies.describe):
        with pytest.raises(UnknownTopology) as caught:
            function(name)
        assert (name, NAMES) == (caught.value.name, caught.value.known)


def test_the_instances_of_a_cut_up_gpu_stand_in_its_place() -> None:
    facts = topologies.facts("a100-mig-4x")
    profiles = ["1g.10gb"] * 7 + ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]
    assert [gpu.instance for gpu in facts.gpus] == [*profiles, None, None]
    assert [gpu.memory_total_bytes for gpu in facts.gpus[6:9]] == [10 << 30, 40 << 30, 20 << 30]
    assert [(pair.a, pair.b, pair.nvlinks) for pair in facts.pairs] == [(11, 12, 12)]
    assert {facts.gpus[slot].numa_nodes for slot in range(11)} == {(0,)}


@pytest.mark.parametrize("name", NAMES)
def test_instances_are_as_many_as_fit_on_their_gpu(name: str) -> None:
    entry = topologies.describe(name)
    for profiles in entry.instances.values():
        assert sum(int(profile[0]) for profile in profiles) <= 7
        assert sum(int(profile[3:-2]) for profile in profiles) <= entry.memory_gib
