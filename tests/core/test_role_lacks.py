"""What a waiting group lacks, in cases."""

from __future__ import annotations

from typing import Any

import pytest

from placement import topologies
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.reconcile import Desired, Observed
from placement.core.replicas import PlannedReplica
from placement.core.request import Lack, Request
from placement.core.role_lacks import lacks
from placement.core.routes import RoleLink, Roles, Via
from placement.core.snapshot import Snapshot

H100 = topologies.load("dgx-h100")


def node(name: str, *free: int, topology: Any = H100, **labels: str) -> Node:
    return Node(name, name, topology=topology, free=frozenset(free), labels=labels)


def lacking(
    nodes: list[Node],
    *links: RoleLink,
    units: int = 1,
    there: dict[tuple[str, int], tuple[str, int]] | None = None,
    **sizes: Any,
) -> tuple[Lack, ...]:
    """Of a group with one ``p`` and two ``d`` in each unit."""
    counts = {"p": 1, "d": 2}
    members = {}
    for name, count in counts.items():
        request = Request(name, tuple(range(units * count)), sizes.get(name, Needs(1)))
        stand = {
            index: Observed((PlannedReplica(index, node_id, (gpu,)),), request)
            for (of, index), (node_id, gpu) in (there or {}).items()
            if of == name
        }
        members[name] = Desired(request), stand
    return lacks(Snapshot(nodes, near=("rack",)), Roles("g", counts, units, links), members)


def told(lack: Lack) -> tuple[Any, ...]:
    homes = sorted(sorted((request.deployment, count) for request, count in home) for home in lack.nodes)
    return lack.first, homes, dict(lack.labels)


def link(within: str = "", least: float = 0.0, via: Via = Via.PCIE) -> RoleLink:
    return RoleLink(("p", "d"), via, within, least)


UNIT = [[("d", 2), ("p", 1)]]
EACH = [[("d", 1)], [("d", 1)], [("p", 1)]]


@pytest.mark.parametrize(
    ("floor", "homes"),
    [
        (link("node"), UNIT),
        (link("numa", via=Via.NVLINK), UNIT),
        (link("switch"), UNIT),
        (link(least=1e3), UNIT),
        (link("rack"), EACH),  # several nodes of a rack will do
        (link("nvlink", via=Via.NVLINK), EACH),  # or of an NVLink domain
        (link("switch", via=Via.NVLINK), EACH),
        (link(least=1e3, via=Via.NVLINK), EACH),
        (link("rack", least=1e3), UNIT),
    ],
)
def test_a_unit_that_a_floor_binds_is_asked_for_as_one(floor: RoleLink, homes: list[Any]) -> None:
    apart = [node(f"n{i}", 0, rack=f"r{i}") for i in range(3)]
    [one] = lacking(apart, floor)
    assert (("p", 0), homes, {}) == told(one)


def test_without_a_floor_only_what_has_no_place_is_asked_for() -> None:
    assert () == lacking([node("x", 0, 1, 2)], link())
    assert [(("d", 1), [[("d", 1)]], {})] == [told(one) for one in lacking([node("x", 0, 1)], link())]
    several = lacking([node("x", 0, 1, 2)], units=2)
    assert [("d", 1), ("d", 2), ("d", 3)] == [one.first for one in several]


def test_as_many_units_as_can_have_a_place() -> None:
    nodes = [node("x", 0, 1, 2, 3), node("y", 0, 1, 2), node("z", 0, 1)]
    assert [("p", 2), ("p", 3)] == [one.first for one in lacking(nodes, link("node"), units=4)]


def test_a_new_node_has_the_value_of_a_label_that_those_have_that_stand() -> None:
    nodes = [node("x", rack="r"), node("y", 0, 1, rack="s")]
    several = lacking(nodes, link("rack"), there={("p", 0): ("x", 0), ("d", 1): ("x", 1)})
    assert [(("d", 0), [[("d", 1)]], {"rack": "r"})] == list(map(told, several))
    nodes = [node("x", rack="r", **{GPU_DOMAIN_LABEL: "v"}), node("y", 0, 1)]
    several = lacking(nodes, link("rack", 1e-3, Via.NVLINK), there={("p", 0): ("x", 0)})
    assert [{"rack": "r", GPU_DOMAIN_LABEL: "v"}] == [dict(one.labels) for one in several]


@pytest.mark.parametrize("within", ["node", "nvlink", "rack"])
def test_beside_what_stands_no_new_node_helps(within: str) -> None:
    """It is no node without the label, either."""
    via = Via.NVLINK if within == "nvlink" else Via.PCIE
    several = lacking([node("x"), node("y", 0, 1)], link(within, via=via), there={("p", 0): ("x", 0)})
    assert ["p/0 is on x, and no new node is as near as the links' floors ask"] == [
        one.why for one in several
    ]
    assert all(not one.nodes for one in several)


def test_what_has_room_beside_what_stands_is_not_asked_for() -> None:
    nodes = [node("x", 2, 3), node("y", 0, 1)]
    several = lacking(nodes, link("node"), units=2, there={("p", 0): ("x", 0)})
    assert [(("p", 1), UNIT, {})] == list(map(told, several))


def test_where_no_node_has_nvlink_one_is_asked_for() -> None:
    slow = topologies.load("a100-pcie-4x")
    nodes = [node("x", 0, 1, 2, topology=slow)]
    assert () == lacking(nodes, link(via=Via.NVLINK))  # it has bridges
    lonely = [node(f"l40s-{i}", *range(4), topology=topologies.load("l40s-4x")) for i in range(2)]
    [one] = lacking(lonely, link(via=Via.NVLINK), units=2)
    assert (("p", 0), EACH, {}) == told(one)


def test_named_gpus_are_on_one_node_for_all_replicas() -> None:
    named = Needs(1, named=(0, 1, 2, 3))
    [one] = lacking([node("x", 0, 1), node("y", 2, 3)], units=2, d=named)
    assert (("d", 0), [[("d", 4)]], {}) == told(one)
