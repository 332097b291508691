"""A placement group laid out bundle by bundle: what is accepted of it, and what the planner is asked for then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from placement.core.needs import ANY_PROFILE, Needs, Within
from placement.core.request import Bundle, Strategy
from placement.core.shares import least_gpus
from placement.errors import InvalidDeployment
from placement.wire.deployment import Deployment
from placement.wire.files import parse_model
from placement.wire.requests import request_unchecked

GPU = {"GPU": 1, "CPU": 1}


def declared(
    *bundles: Mapping[str, float], fields: dict[str, Any] | None = None, **layout: Any
) -> Deployment:
    group = {"bundles": bundles, **layout}
    base = {"name": "g", "model": "m", "runtime": "python", "owner": "caller", "placement_group": group}
    return parse_model(Deployment, {**base, **(fields or {})}, "g")


def test_bundles_that_may_lie_apart_are_asked_for_one_by_one() -> None:
    zones = [{"zone": "a"}, {}, {"zone": "!b"}]
    one = declared({"GPU": 2, "CPU": 1.5}, {"CPU": 4}, {"GPU": 1, "memory": 2e9}, bundle_label_selector=zones)
    request = request_unchecked(one, (0,), {})
    assert (request.needs, request.stages, request.divisible) == (Needs(3), 1, False)
    assert (request.strategy, request.bundles) == (
        Strategy.PACK,
        (Bundle(2, 1500, 0, (("zone", "a"),)), Bundle(1, 0, 2_000_000_000, (("zone", "!b"),))),
    )
    assert (request.cpu_milli, request.memory_bytes) == (1500, 2_000_000_000)
    assert one.gpus_per_replica == 3
    assert one.placement_group is not None
    assert one.placement_group.bundle_of_rank == [0, 0, 2]


def test_bundles_on_one_node_are_one_set() -> None:
    one = declared(
        GPU, {"CPU": 2}, GPU, strategy="STRICT_PACK", bundle_label_selector=[{"zone": "a"}, {"disk": "x"}, {}],
        fields={"within": "nvlink", "min_bandwidth_gb_per_s": 100},
    )  # fmt: skip
    request = request_unchecked(one, (0,), {})
    assert (request.needs, request.bundles) == (Needs(2, Within.NVLINK, 100.0), ())
    assert (request.cpu_milli, dict(request.labels)) == (4000, {"zone": "a", "disk": "x"})


@pytest.mark.parametrize("strategy", list(Strategy))
def test_a_share_is_the_only_bundle_with_a_gpu(strategy: Strategy) -> None:
    one = declared({"GPU": 0.25, "CPU": 1}, {"CPU": 1}, strategy=strategy)
    request = request_unchecked(one, (0,), {})
    assert (request.needs, request.bundles) == (Needs(1, share=250), ())
    assert request.cpu_milli == (2000 if strategy is Strategy.STRICT_PACK else 1000)
    assert one.placement_group is not None
    assert one.placement_group.bundle_of_rank == [0]


def test_several_shares_are_planned_in_the_order_of_their_bundles() -> None:
    one = declared({"GPU": 0.5, "CPU": 1}, {"CPU": 1}, {"GPU": 2}, {"GPU": 0.333})
    request = request_unchecked(one, (0,), {})
    assert request.needs == Needs(2, amounts=(500, 2000, 333))
    assert [(bundle.gpus, bundle.share) for bundle in request.bundles] == [(0, 500), (2, 0), (0, 333)]
    assert one.placement_group is not None
    assert (one.placement_group.bundle_of_rank, one.gpus_per_replica) == ([0, 2, 2, 3], 4)
    together = declared(*[{"GPU": 0.5}] * 3, strategy="STRICT_PACK")
    request = request_unchecked(together, (0,), {})
    assert (request.needs, least_gpus(request.needs), request.bundles) == (
        Needs(0, amounts=(500,) * 3),
        2,
        (),
    )
    assert declared(GPU, GPU).needs.amounts == declared({"GPU": 0.5}, {"CPU": 1}).needs.amounts == ()


def test_named_gpus_put_all_bundles_on_one_node() -> None:
    zones = [{"zone": "a"}, {}, {"disk": "x"}]
    one = declared(
        GPU, {"CPU": 2}, GPU, strategy="SPREAD", bundle_label_selector=zones,
        fields={"constraints": {"gpus": [3, 2]}},
    )  # fmt: skip
    request = request_unchecked(one, (0,), {})
    assert (request.needs, request.bundles) == (Needs(2, named=(2, 3)), ())
    assert (request.cpu_milli, dict(request.labels)) == (2000, {"zone": "a", "disk": "x"})
    instance = declared({"GPU": 1}, fields={"constraints": {"gpus": ["MIG-0001"]}})
    assert instance.needs == Needs(1, profile=ANY_PROFILE, named=("MIG-0001",))


def test_custom_resources_and_the_label_of_a_domain_are_planned_with() -> None:
    one = declared({"GPU": 1, "nvlink-0": 0.001}, {"GPU": 1, "nvlink-0": 0.001, "x": 0}, domain_label="rack")
    request = request_unchecked(one, (0,), {})
    assert [bundle.resources for bundle in request.bundles] == [(("nvlink-0", 10),)] * 2
    assert (request.resources, request.domain_label) == ((("nvlink-0", 20),), "rack")


def test_it_is_read_from_the_ledger_as_it_was_written() -> None:
    one = declared(GPU, {"GPU": 2}, strategy="STRICT_SPREAD", bundle_label_selector=[{"zone": "a"}, {}])
    assert Deployment.recorded(one.model_dump(mode="json")) == one


def test_another_layout_is_another_shape() -> None:
    shapes = [
        declared(GPU, GPU), declared({"GPU": 2, "CPU": 2}), declared(GPU, GPU, strategy="SPREAD"),
        declared(GPU, GPU, domain_label="rack"), declared(GPU, GPU, fields={"constraints": {"gpus": [0, 1]}}),
    ]  # fmt: skip
    assert [one.shape() == shapes[0].shape() for one in shapes] == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("bundles", "fields", "layout", "problem"),
    [
        ([{"GPU": 1.5}], {}, {}, "bundle 0 asks for 1.5 GPUs, and a share cannot span two GPUs; use a whole number"),
        ([GPU, {"GPU": 0.12345}], {}, {}, "0.12345 is not a share of a GPU; use 0.001 to 0.999, in thousandths"),
        ([GPU, {"GPU": 0.5}], {"within": "nvlink"}, {}, "it has one whole GPU at most; leave it out"),
        ([{"GPU": 0.0001}], {}, {}, "0.0001 is not a share of a GPU; use 0.001 to 0.999"),
        ([{"CPU": 1}], {}, {}, "no bundle asks for a GPU"),
        ([{"GPU": 1, "CPU": -1}], {}, {}, "bundle 0 asks for -1 CPU; use 0 to 100000"),
        ([{"GPU": float("nan")}], {}, {}, "bundle 0 asks for nan GPU; use 0 to"),
        ([{"GPU": 1, "egress_openai": 1}], {}, {}, "bundle 0 asks for egress_openai, which a placement"),
        (
            [GPU, {"CPU": 1}], {}, {"domain_label": "rack", "bundle_label_selector": [{}, {"rack": "a"}]},
            "bundle 1 has no GPUs and a condition on rack, which is that of the bundles with GPUs",
        ),
        ([GPU], {}, {"bundle_label_selector": [{}, {}]}, "has 2 entries for 1 bundles; give one for each bundle"),
        (
            [GPU, GPU], {}, {"strategy": "STRICT_PACK", "bundle_label_selector": [{"z": "a"}, {"z": "b"}]},
            "asks for z 'a' and 'b' of one node; write the condition that both mean",
        ),
        (
            [{"GPU": 0.6}] * 3, {"constraints": {"gpus": [2, 3]}}, {},
            "names 2 GPUs, and a replica needs 3; name more",
        ),
        (
            [{"GPU": 0.5}] * 2, {"constraints": {"gpus": ["MIG-0001"]}}, {},
            "constraints.gpus names MIG instances, and a replica is one of them, all of it",
        ),
        ([{"GPU": 0.5}] * 2, {"min_bandwidth_gb_per_s": 10}, {}, "it has one whole GPU at most; leave it out"),
        ([GPU], {"gpus": 1}, {}, "placement_group says all of what is asked for; leave gpus out"),
        ([GPU], {"constraints": {"gpu_nodes": ["a"]}}, {}, "but for constraints.gpus; leave the other constraints out"),
        ([GPU, GPU], {"constraints": {"gpus": [2]}}, {}, "names 1 GPU, and a replica needs 2; name more"),
        (
            [GPU, GPU], {"constraints": {"gpus": [2, 3]}}, {"strategy": "STRICT_SPREAD"},
            "names GPUs of one node, and STRICT_SPREAD wants each bundle on a node of its own; use PACK",
        ),
        (
            [GPU, GPU], {"constraints": {"gpus": [2, 3]}}, {"bundle_label_selector": [{"z": "a"}, {"z": "b"}]},
            "asks for z 'a' and 'b' of one node; write the condition that both mean",
        ),
        (
            [GPU, GPU], {"constraints": {"gpus": ["MIG-0001", "MIG-0002"]}}, {},
            "constraints.gpus names MIG instances, and a replica is one of them, all of it; MIG instances",
        ),
        ([GPU], {"replicas": 2}, {}, "placement_group is one replica, not 2; leave replicas out"),
        ([GPU], {"runtime": "openai"}, {}, "placement_group has GPUs, and openai is remote; leave it out"),
        ([GPU], {"owner": "detached"}, {}, "owner is detached; call placement.placement_group, or set owner to caller"),
        ([GPU], {"within": "nvlink"}, {}, "it has one GPU at most; leave it out"),
    ],
)  # fmt: skip
def test_what_is_refused_says_the_fix(
    bundles: list[dict[str, float]], fields: dict[str, Any], layout: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InvalidDeployment) as refused:
        declared(*bundles, fields=fields, **layout)
    assert problem in str(refused.value)
