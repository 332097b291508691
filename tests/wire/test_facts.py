"""Readings of machines that are alike are one topology."""

from __future__ import annotations

from placement import topologies
from placement.core.topology import UNKNOWN_LINK, Path
from placement.wire.facts import GpuFacts, NodeFacts


def reading(name: str, number: int) -> NodeFacts:
    """Of one of many machines: what differs from machine to machine is what cannot be placed by."""
    facts = topologies.facts(name)
    gpus = tuple(
        gpu.model_copy(update={"uuid": f"GPU-{number}-{gpu.ordinal}", "memory_used_bytes": number})
        for gpu in facts.gpus
    )
    return NodeFacts.model_validate_json(facts.model_copy(update={"gpus": gpus}).model_dump_json())


def test_machines_that_are_alike_share_a_topology() -> None:
    first, second = (reading("dgx-a100", number).topology() for number in (1, 2))
    assert first is second
    assert first == topologies.load("dgx-a100") and first.model == "NVIDIA A100-SXM4-80GB"
    assert reading("dgx-h100", 1).topology() != first


def test_one_of_another_model_is_another_topology() -> None:
    facts = reading("dgx-a100", 1)
    other = tuple(gpu.model_copy(update={"name": "another"}) for gpu in facts.gpus)
    found = facts.model_copy(update={"gpus": other}).topology()
    assert found == facts.topology(), "of the same shape"
    assert found.model == "another"
    mixed = facts.model_copy(update={"gpus": (*facts.gpus[:7], other[7])}).topology()
    assert mixed.model is None


def test_a_lost_gpu_has_no_links_and_no_say_in_the_model() -> None:
    facts = reading("a100-pcie-4x", 1)
    lost = GpuFacts(ordinal=3, errors=("GPU is lost",))
    pairs = tuple(pair for pair in facts.pairs if 3 not in (pair.a, pair.b))
    found = facts.model_copy(update={"gpus": (*facts.gpus[:3], lost), "pairs": pairs}).topology()
    assert found.model == facts.topology().model
    assert [found.link(gpu, 3) for gpu in range(3)] == [UNKNOWN_LINK] * 3
    assert NodeFacts(source="none").topology().links == ()


def test_the_pcie_path_below_nvlink_is_kept_as_nvml_tells_it() -> None:
    facts = reading("hgx-a100-4gpu", 1)
    read = {True: Path.PHB, False: Path.SYS}
    pairs = tuple(
        pair.model_copy(update={"common_ancestor": read[pair.b - pair.a == 1]}) for pair in facts.pairs
    )
    found = facts.model_copy(update={"pairs": pairs}).topology()
    assert found.links == topologies.load("hgx-a100-4gpu").links
    assert [Path.PHB, Path.SYS] == [found.pcie_path(0, 1), found.pcie_path(0, 2)]
    assert () == facts.topology().below


def test_facts_of_an_earlier_version_still_read() -> None:
    """Without minor numbers, NVLinks one by one, or NVLS: all of that is unknown."""
    later = {"minor_number", "nvlink_version", "nvlinks", "vgpu"}
    facts = reading("dgx-h100", 1)
    old = facts.model_dump(mode="json", exclude={"nvls": True, "gpus": {"__all__": later}})
    found = NodeFacts.model_validate(old)
    assert {getattr(gpu, name) for gpu in found.gpus for name in later} == {None}
    assert (found.nvls, found.topology().nvls) == (None, None)
    assert found.topology().links == facts.topology().links
