"""What is near a GPU, and whose the CPUs are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import topologies
from placement.core.affinity import Affinity, affinities
from placement.core.topology import Nic, NumaNode, Path, Topology

PIX, PXB, PHB, NODE, SYS, UNKNOWN = Path.PIX, Path.PXB, Path.PHB, Path.NODE, Path.SYS, Path.UNKNOWN


def machine(*numa: tuple[int, ...], nodes: tuple[NumaNode, ...] = (), nics: tuple[Nic, ...] = ()) -> Topology:
    return replace(Topology.unknown(len(numa)), numa=numa, numa_nodes=nodes, nics=nics)


def threads(number: int, first: int, count: int, of: int) -> NumaNode:
    """A NUMA node with so many cores of two threads, on a host with ``of`` cores in all."""
    return NumaNode(number, tuple((cpu, cpu + of) for cpu in range(first, first + count)))


TWO = (threads(0, 0, 4, of=8), threads(1, 4, 4, of=8))


def test_gpus_of_a_numa_node_share_its_cores_and_no_core_is_cut() -> None:
    found = affinities(machine((0,), (0,), (1,), (1,), nodes=TWO), range(4))
    assert found == [
        {"numa_node": 0, "cpus": "0-1,8-9"},
        {"numa_node": 0, "cpus": "2-3,10-11"},
        {"numa_node": 1, "cpus": "4-5,12-13"},
        {"numa_node": 1, "cpus": "6-7,14-15"},
    ]


def test_cores_that_do_not_divide_are_all_given_out() -> None:
    found = affinities(machine((0,), (0,), (0,), nodes=(threads(0, 0, 4, of=4),)), range(3))
    assert [one["cpus"] for one in found] == ["0,4", "1,5", "2-3,6-7"]


def test_with_fewer_cores_than_gpus_nobody_is_given_any() -> None:
    assert affinities(machine((0,), (0,), (0,), nodes=(threads(0, 0, 2, of=2),)), [1]) == [{"numa_node": 0}]


def test_memory_nodes_of_grace_have_no_cpus_and_bind_nobody() -> None:
    """A GB200 is near its processor's node and those of its own memory."""
    nodes = (NumaNode(0, ((0,), (1,))), *(NumaNode(number) for number in range(2, 5)))
    assert affinities(machine((0, 2, 3, 4), nodes=nodes), [0]) == [{"numa_node": 0, "cpus": "0-1"}]


@pytest.mark.parametrize(
    ("topology", "found"),
    [
        (machine((0,), (1,)), []),
        (machine((), (), nodes=TWO), []),
        (machine((7,), (7,), nodes=TWO), []),
        (machine((), (0,), nodes=TWO), [{}, {"numa_node": 0, "cpus": "0-3,8-11"}]),
        (topologies.load("dgx-h100"), []),
    ],
)
def test_what_is_unknown_is_left_out(topology: Topology, found: list[Affinity]) -> None:
    assert affinities(topology, [0, 1]) == found


@pytest.mark.parametrize(
    ("paths", "ports"),
    [
        ((PIX, PIX, PXB, SYS), ["a:1", "b:1", "b:2"]),
        ((PXB, PHB, NODE, PIX), ["a:1"]),
        ((SYS, NODE, PHB, PIX), ["c:1"]),
        ((SYS, NODE, SYS, PIX), ["b:1", "b:2"]),
        ((SYS, SYS, SYS, PIX), None),
        ((UNKNOWN, UNKNOWN, SYS, PIX), None),
    ],
)
def test_the_nearest_cards_that_work_are_named_unless_all_are_past_the_link_between_numa_nodes(
    paths: tuple[Path, ...], ports: list[str] | None
) -> None:
    named = (("a:1",), ("b:1", "b:2"), ("c:1",), ())
    nics = tuple(Nic(f"nic{i}", (path,), one) for i, (path, one) in enumerate(zip(paths, named, strict=True)))
    [found] = affinities(machine((0,), nics=nics), [0]) or [Affinity()]
    assert found.get("ports") == ports


def test_interfaces_are_nearest_by_themselves() -> None:
    nics = (Nic("mlx5_0", (PIX,), ("mlx5_0:1",)), Nic("mlx5_1", (NODE,), (), ("eth1",)))
    assert affinities(machine((0,), nics=nics), [0]) == [{"ports": ["mlx5_0:1"], "interfaces": ["eth1"]}]


NUMBERS = st.lists(st.integers(0, 3), max_size=3, unique=True).map(lambda found: tuple(sorted(found)))


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_no_two_gpus_have_a_cpu_in_common_and_each_is_near_its_own(
    numa: list[tuple[int, ...]], sizes: list[int]
) -> None:
    first = [sum(sizes[:number]) for number in range(4)]
    nodes = tuple(threads(number, first[number], sizes[number], of=sum(sizes)) for number in range(4))
    found = affinities(machine(*numa, nodes=nodes), range(len(numa))) or [Affinity()] * len(numa)
    owner: dict[int, int] = {}
    for gpu, one in enumerate(found):
        runs = [run.split("-") for run in one.get("cpus", "").split(",") if run]
        for cpu in (cpu for run in runs for cpu in range(int(run[0]), int(run[-1]) + 1)):
            assert owner.setdefault(cpu, gpu) == gpu
            assert any(cpu in core for number in numa[gpu] for core in nodes[number].cores)
    for node in nodes:
        sharing = [gpu for gpu, near in enumerate(numa) if node.number in near]
        given_out = [core for core in node.cores if core[0] in owner]
        assert len(given_out) == (len(node.cores) if 0 < len(sharing) <= len(node.cores) else 0)
