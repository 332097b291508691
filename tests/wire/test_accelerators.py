"""Which names a product goes by."""

from __future__ import annotations

import pytest

from placement import topologies
from placement.wire.accelerators import accelerator_type, accelerators_of


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GB10", "GB10"),
        ("NVIDIA RTX A6000", "RTX-A6000"),
        ("Quadro RTX 6000", "RTX-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 4090", "GeForce-RTX-4090"),
        ("NVIDIA TITAN V", "TITAN-V"),
        ("NVIDIA ", None),
        ("", None),
    ],
)
def test_a_product_has_the_type_that_ray_gives_it(product: str, name: str | None) -> None:
    assert name == accelerator_type(product)


def test_the_words_of_the_product_go_on_to_be_names() -> None:
    assert {"NVIDIA", "H100", "80GB", "HBM3"} == accelerators_of("NVIDIA H100 80GB HBM3")
    assert {"GeForce-RTX-4090", "NVIDIA", "GeForce", "RTX", "4090"} == accelerators_of(
        "NVIDIA GeForce RTX 4090"
    )
    assert set() == accelerators_of(None) == accelerators_of("")


def test_every_machine_of_the_catalogue_has_a_type() -> None:
    assert {
        "A100", "A10G", "B200", "GB200", "GB300", "GeForce-RTX-3090", "GeForce-RTX-4090", "H100", "H200", "H800",
        "L40S", "P100", "RTX-PRO-6000", "T4", "V100",
    } == {accelerator_type(topologies.describe(name).gpu) for name in topologies.names()}  # fmt: skip
