"""Where replicas may go: limits on nodes and GPUs."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from placement.core.labels import parse_condition
from placement.core.needs import GpuName
from placement.wire.fields import MOST, MOST_LABEL, Amount, Count, Declared, Named

_UUID_PATTERN = re.compile(r"(GPU|MIG)-[A-Za-z0-9/-]{4,120}")


def _capability(value: Any) -> Any:
    text = f"{value:.1f}" if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,2}\.\d", text):
        raise ValueError(f'{value!r} is not a compute capability; write major.minor, such as "8.0"')
    return text


def _gpu_name(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < MOST:
            raise ValueError(f"{value} is no GPU of a node; use 0 or more, as `placement status` shows them")
        return value
    if not isinstance(value, str) or not _UUID_PATTERN.fullmatch(value):
        shown = repr(value[:80] if isinstance(value, str) else value)
        raise ValueError(
            f"{shown} names no GPU; write its ordinal, such as 2, or its UUID: GPU-... or MIG-..."
        )
    return value


class Spread(Declared):
    """Keeps replicas apart: at most ``max`` of them on nodes with one value of ``label``."""

    path = "constraints.spread."

    label: Annotated[str, MOST_LABEL] = Field(
        min_length=1, description="a node label", examples=["ray.io/availability-zone"]
    )
    max: Count = Field(
        default=1,
        description="how many replicas at most on nodes with the same value of the label",
        examples=[1],
    )


class PlacementConstraints(Declared):
    """Limits the choice of nodes. A node is named by its id, its name or its address.

    ``None`` means "any that the cluster has"; an empty list is refused.
    """

    path = "constraints."

    gpu_nodes: tuple[Named, ...] | None = Field(
        default=None,
        min_length=1,
        description="only these nodes, for replicas on GPUs",
        examples=[["gpu-a", "gpu-b"]],
    )
    gpus: tuple[Annotated[GpuName, BeforeValidator(_gpu_name)], ...] | None = Field(
        default=None,
        min_length=1,
        description="only these GPUs, all of one node: ordinals as `placement status` shows them, or UUIDs",
        examples=[[2, 3]],
    )
    egress_nodes: tuple[Named, ...] | None = Field(
        default=None,
        min_length=1,
        description="only these nodes, for replicas that call a provider",
        examples=[["egress-a"]],
    )
    egress_preference: tuple[Named, ...] = Field(
        default=(), description="egress nodes to try first, best first", examples=[["egress-b", "egress-a"]]
    )
    cpu_nodes: tuple[Named, ...] | None = Field(
        default=None,
        min_length=1,
        description="only these nodes, for replicas with cpus",
        examples=[["cpu-a"]],
    )
    accelerators: tuple[Named, ...] | None = Field(
        default=None,
        min_length=1,
        description="only GPUs of these accelerator types, as Ray names them",
        examples=[["H100", "H200"]],
    )
    min_compute_capability: Annotated[str, BeforeValidator(_capability)] | None = Field(
        default=None, description="the least CUDA compute capability that will do", examples=["8.0"]
    )
    min_free_gpu_memory_gib: Amount | None = Field(
        default=None, description="memory that NVML must report as free on each GPU", examples=[40]
    )
    node_labels: dict[Annotated[str, MOST_LABEL], str] = Field(
        default_factory=dict,
        description="label -> condition: a, !a, in(a, b) or !in(a, b), as in Ray's label_selector",
        examples=[{"team": "in(search, ads)"}],
    )
    cpus_per_gpu: Amount | None = Field(
        default=None, description="CPUs that each GPU's bundle also holds", examples=[8]
    )
    memory_gib_per_gpu: Amount | None = Field(
        default=None, description="memory that each GPU's bundle also holds", examples=[64]
    )
    spread: Spread | None = Field(
        default=None,
        description="keeps replicas apart, by a node label",
        examples=[{"label": "ray.io/availability-zone", "max": 1}],
    )
    apart_from: tuple[Named, ...] = Field(
        default=(),
        description="deployments that must not be on the node; they keep away from this one, too",
        examples=[["noisy"]],
    )
    near_to: tuple[Named, ...] = Field(
        default=(),
        description="deployments that must be on the node when a replica is placed; they may leave later",
        examples=[["embed"]],
    )

    @field_validator("node_labels")
    @classmethod
    def _conditions(cls, value: dict[str, str]) -> dict[str, str]:
        for condition in value.values():
            parse_condition(condition)
        return value

    @field_validator("gpus")
    @classmethod
    def _each_once(cls, value: tuple[GpuName, ...] | None) -> tuple[GpuName, ...] | None:
        twice = next((name for name in value or () if (value or ()).count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"names {twice} twice; name each GPU once")
        return value and tuple(sorted(value, key=lambda name: (isinstance(name, str), name)))

    @model_validator(mode="after")
    def _no_contradiction(self) -> PlacementConstraints:
        both = sorted(set(self.apart_from) & set(self.near_to))
        if both:
            raise ValueError(f"apart_from and near_to both name {both[0]!r}; remove it from one of them")
        return self

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """The least compute capability, as (major, minor)."""
        if self.min_compute_capability is None:
            return None
        major, _, minor = self.min_compute_capability.partition(".")
        return int(major), int(minor)
