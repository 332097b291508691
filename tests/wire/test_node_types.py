"""The node types of a Ray cluster configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.errors import InvalidDeployment
from placement.wire.node_types import NodeType, node_types

ROOT = Path(__file__).resolve().parents[2]


def test_the_projects_own_configuration() -> None:
    zone = {"ray.io/availability-zone": "us-west-2a"}
    assert [
        NodeType("gpu-8x-a100", {"GPU": 8.0}, {"ray.io/accelerator-type": "A100"} | zone, 4),
        NodeType("gpu-4x-a10g", {"GPU": 4.0}, {"ray.io/accelerator-type": "A10G"} | zone, 8),
        NodeType("egress", {"egress": 64.0}, zone, 4),
    ] == node_types(ROOT / "ray_cluster.yaml")


@pytest.mark.parametrize(
    ("written", "most"),
    [
        ("max_workers: 5\navailable_node_types: {a: {resources: {GPU: 1}}}", [5]),
        ("max_workers: 5\navailable_node_types: {a: {max_workers: 9}}", [5]),
        ("available_node_types: {a: {}}", [2]),
        ("max_workers: 5\navailable_node_types: {a: {max_workers: 0}}", []),
        ("max_workers: 5\nhead_node_type: a\navailable_node_types: {a: {}}", []),
        ("max_workers: 5\nhead_node_type: a\navailable_node_types: {a: {max_workers: 1}}", [1]),
    ],
)
def test_how_many_there_may_be(tmp_path: Path, written: str, most: list[int]) -> None:
    (tmp_path / "cluster.yaml").write_text(written)
    assert most == [one.max_workers for one in node_types(tmp_path / "cluster.yaml")]


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("cluster_name: x", "available_node_types: is missing"),
        ("available_node_types: {a: {resources: {GPU: -1}}}", "available_node_types.a.resources.GPU"),
        ("available_node_types: {a: {resources: {GPU: .nan}}}", "available_node_types.a.resources.GPU"),
        ("available_node_types: [a]", "available_node_types"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, written: str, says: str) -> None:
    (tmp_path / "cluster.yaml").write_text(written)
    with pytest.raises(InvalidDeployment) as refused:
        node_types(tmp_path / "cluster.yaml")
    assert says in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDeployment):
        node_types(tmp_path / "none.yaml")
