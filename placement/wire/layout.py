"""A replica as a Ray placement group, bundle by bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from placement.core.labels import parse_condition
from placement.core.needs import WHOLE
from placement.core.node import UNIT
from placement.core.request import Bundle, Strategy, amounts_of
from placement.wire.fields import MOST, MOST_LABEL, Declared, gpu_amount

MOST_BUNDLES = 4096
"""The most bundles in one placement group; more are a typing error."""


class BundleLayout(Declared):
    """A replica as a Ray placement group, bundle by bundle: what :func:`placement.placement_group` asks for.

    The GPUs that it has on one node are one set; its bundles get them in ascending order.
    """

    bundles: tuple[dict[str, float], ...] = Field(
        min_length=1,
        max_length=MOST_BUNDLES,
        description='resources of each bundle: {"GPU": 1, "CPU": 4, "memory": 1e9}, and custom resources',
    )
    strategy: Strategy = Field(default=Strategy.PACK, description="as in Ray")
    bundle_label_selector: tuple[dict[Annotated[str, MOST_LABEL], str], ...] = Field(
        default=(), description="for each bundle: label -> condition, as in Ray"
    )
    domain_label: Annotated[str, MOST_LABEL] | None = Field(
        default=None, description="all bundles on nodes with one value of this label; Ray's topology_strategy"
    )

    @field_validator("bundles")
    @classmethod
    def _amounts(cls, value: tuple[dict[str, float], ...]) -> tuple[dict[str, float], ...]:
        for i, bundle in enumerate(value):
            for resource, amount in bundle.items():
                if is_egress(resource) or resource == "object_store_memory":
                    raise ValueError(
                        f"bundle {i} asks for {resource}, which a placement group cannot have here; leave it out, or "
                        "call ray.util.placement_group, which chooses no GPUs"
                    )
                most = 2**60 if resource == "memory" else MOST
                if not 0 <= amount <= most:
                    raise ValueError(f"bundle {i} asks for {amount:g} {resource}; use 0 to {most}")
            if (amount := bundle.get("GPU", 0.0)) > 1 and not amount.is_integer():
                raise ValueError(
                    f"bundle {i} asks for {amount:g} GPUs, and a share cannot span two GPUs; use a whole number, or a "
                    "share below 1"
                )
            if 0 < amount < 1:
                gpu_amount(amount)
        if not any(map(has_gpus, value)):
            raise ValueError(
                "no bundle asks for a GPU, so there is none to choose; give at least one bundle a GPU"
            )
        return value

    @field_validator("bundle_label_selector")
    @classmethod
    def _conditions(cls, value: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
        for labels in value:
            for condition in labels.values():
                parse_condition(condition)
        return value

    @model_validator(mode="after")
    def _selectors_fit(self) -> BundleLayout:
        if len(self.bundle_label_selector) not in (0, len(self.bundles)):
            raise ValueError(
                f"bundle_label_selector has {len(self.bundle_label_selector)} entries for {len(self.bundles)} bundles; "
                "give one for each bundle, or none"
            )
        if self.on_one_node:
            self.check_labels_agree()
        for i, (bundle, labels) in enumerate(zip(self.bundles, self.labels, strict=True)):
            if self.domain_label in labels and not has_gpus(bundle):
                raise ValueError(
                    f"bundle {i} has no GPUs and a condition on {self.domain_label}, which is that of the bundles "
                    "with GPUs; leave the condition out"
                )
        return self

    def check_labels_agree(self) -> None:
        """Refuses conditions that contradict each other where all bundles are on one node."""
        together: dict[str, str] = {}
        for labels in self.labels:
            for key, condition in labels.items():
                if together.setdefault(key, condition) != condition:
                    raise ValueError(
                        f"bundle_label_selector asks for {key} {together[key]!r} and {condition!r} of one node; "
                        "write the condition that both mean"
                    )

    @property
    def gpus(self) -> int | float:
        """GPUs of all bundles, one for each share; if only one bundle has any, and a share, that share."""
        amounts = [bundle["GPU"] for bundle in self.bundles if has_gpus(bundle)]
        return amounts[0] if len(amounts) == 1 and amounts[0] < 1 else sum(map(math.ceil, amounts))

    @property
    def amounts(self) -> tuple[int, ...]:
        """Thousandths of a GPU, of each bundle that has GPUs; empty if these are whole GPUs, or one share."""
        return () if isinstance(self.gpus, float) else amounts_of(self.planned())

    @property
    def labels(self) -> tuple[Mapping[str, str], ...]:
        """The conditions for each bundle."""
        return self.bundle_label_selector or ({},) * len(self.bundles)

    @property
    def on_one_node(self) -> bool:
        """Whether all its GPUs are to be on one node."""
        return self.strategy is Strategy.STRICT_PACK or sum(map(has_gpus, self.bundles)) == 1

    @property
    def bundle_of_rank(self) -> list[int]:
        """The bundle of each GPU, by rank: the first bundle has the first ranks."""
        return [i for i, bundle in enumerate(self.bundles) for _ in range(math.ceil(bundle.get("GPU", 0)))]

    def planned(self) -> list[Bundle]:
        """The bundles in the planner's terms. Bundles without GPUs count only if one node holds all bundles."""
        return [
            Bundle(
                0 if share_of(bundle) else round(bundle.get("GPU", 0)),
                round(bundle.get("CPU", 0) * 1000),
                round(bundle.get("memory", 0)),
                tuple(sorted(labels.items())),
                tuple(
                    (resource, round(amount * UNIT))
                    for resource, amount in sorted(bundle.items())
                    if resource not in ("GPU", "CPU", "memory") and amount
                ),
                share_of(bundle),
            )
            for bundle, labels in zip(self.bundles, self.labels, strict=True)
            if has_gpus(bundle) or self.strategy is Strategy.STRICT_PACK
        ]


def is_egress(resource: str) -> bool:
    """Whether a Ray resource is an egress resource: ``egress``, ``egress_<provider>``."""
    return resource == "egress" or resource.startswith("egress_")


def share_of(bundle: Mapping[Any, float]) -> int:
    """Thousandths of a GPU, if a bundle takes a share of one; else 0."""
    amount = bundle.get("GPU", 0)
    return round(amount * WHOLE) if amount < 1 else 0


def has_gpus(bundle: Mapping[Any, float]) -> bool:
    """Whether a bundle takes GPUs, or a share of one."""
    return bundle.get("GPU", 0) > 0
