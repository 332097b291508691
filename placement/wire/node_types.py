"""The node types of a Ray cluster configuration (``ray_cluster.yaml``): the nodes that the autoscaler can start.

A running cluster does not report them: only this file has them, on the machine that ran ``ray up`` and on the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, FiniteFloat

from placement.wire.base import Model
from placement.wire.files import load_model

Amount = Annotated[FiniteFloat, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class NodeType:
    """One node type.

    Attributes:
        name: in the configuration.
        resources: what such a node has: ``{"GPU": 8}``; Ray finds out the others.
        labels: the labels that its nodes will have.
        max_workers: how many such nodes there may be.
    """

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    max_workers: int


class _Declared(Model):
    """A node type in the file; its other fields are the cloud's."""

    model_config = ConfigDict(extra="ignore")

    resources: dict[str, Amount] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)
    max_workers: Count | None = None


class _Configuration(Model):
    """The fields of the file that are used here."""

    model_config = ConfigDict(extra="ignore")

    available_node_types: dict[str, _Declared]
    head_node_type: str = ""
    max_workers: Count = 2
    """Ray's own default."""


def node_types(path: str | Path) -> list[NodeType]:
    """Reads the types of nodes that may be started as workers, in the file's order.

    Raises:
        InvalidDeployment: the file cannot be read, or is no cluster configuration.
    """
    found = load_model(_Configuration, Path(path))
    types = []
    for name, one in found.available_node_types.items():
        # Ray starts no second head unless a maximum says so.
        default = 0 if name == found.head_node_type else found.max_workers
        most = min(default if one.max_workers is None else one.max_workers, found.max_workers)
        if most:
            types.append(NodeType(name, one.resources, one.labels, most))
    return types
