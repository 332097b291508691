"""``constraints.gpus``: what is accepted, what it asks the planner for, and what is refused with which fix."""

from __future__ import annotations

from typing import Any

import pytest

from placement import topologies
from placement.core.needs import ANY_PROFILE, Needs
from placement.core.node import Node
from placement.core.snapshot import Snapshot
from placement.errors import InvalidDeployment, NotEnoughGpus, UnknownGpu, Unplaceable
from placement.wire.cluster import ClusterFile
from placement.wire.deployment import Deployment
from placement.wire.dry_run import explain_deployments, plan_deployments
from placement.wire.files import parse_model

UUIDS = {gpu: f"GPU-a-0000-{gpu}" for gpu in range(4)}
CLUSTER = Snapshot(
    [
        Node("id-a", "a", topology=topologies.load("a100-pcie-4x"), free=frozenset(range(4)), uuids=UUIDS),
        Node("id-e", "e", egress={"egress": 4}),
    ]
)


def declared(*gpus: Any, **fields: Any) -> Deployment:
    limits = {"gpus": [*gpus], **fields.pop("constraints", {})}
    return parse_model(Deployment, {"name": "d", "model": "org/m", "constraints": limits, **fields}, "d")


@pytest.mark.parametrize(
    ("gpus", "fields", "needs"),
    [
        ((3, 2.0), {"gpus": 2}, Needs(2, named=(2, 3))),
        (("GPU-0001", 0), {"replicas": 2}, Needs(1, named=(0, "GPU-0001"))),
        ((2,), {"gpus": 0.25, "replicas": 4}, Needs(1, share=250, named=(2,))),
        ((2,), {"gpu_memory_gib": 1, "replicas": 4}, Needs(1, memory_bytes=1 << 30, named=(2,))),
        ((5,), {"mig": "1g.10gb"}, Needs(1, profile="1g.10gb", named=(5,))),
        (("MIG-GPU-0001/7/0",), {}, Needs(1, profile=ANY_PROFILE, named=("MIG-GPU-0001/7/0",))),
        (("MIG-0001",), {"mig": "1g.10gb"}, Needs(1, profile="1g.10gb", named=("MIG-0001",))),
        ((0, 1, 2, 3), {"tensor_parallel": 2, "pipeline_parallel": 2}, Needs(2, named=(0, 1, 2, 3))),
    ],
)
def test_what_is_named_is_asked_for(gpus: tuple[Any, ...], fields: dict[str, Any], needs: Needs) -> None:
    one = declared(*gpus, **fields)
    assert one.needs == needs
    assert Deployment.recorded(one.model_dump(mode="json")) == one


def test_in_another_order_it_is_the_same() -> None:
    assert declared(1, 0, gpus=2).shape() == declared(0, 1, gpus=2).shape() != declared(0, 2, gpus=2).shape()


@pytest.mark.parametrize(
    ("gpus", "fields", "problem"),
    [
        ((), {}, "constraints.gpus: Tuple should have at least 1 item"),
        ((-1,), {}, "-1 is no GPU of a node; use 0 or more"),
        ((True,), {}, "True names no GPU; write its ordinal, such as 2, or its UUID: GPU-... or MIG-..."),
        (("2",), {}, "'2' names no GPU; write its ordinal, such as 2"),
        ((2, 3, 2), {}, "constraints.gpus: names 2 twice; name each GPU once"),
        ((2,), {"gpus": 2}, "constraints.gpus names 1 GPU, and a replica needs 2; name more, or ask for less"),
        ((2, 3), {"replicas": 3}, "constraints.gpus names 2 GPUs, and 3 replicas need 3; name more, or ask for less"),
        ((2,), {"gpus": 0.3, "replicas": 4}, "names 1 GPU, and 4 replicas need 2; name more"),
        ((2, 3), {"tensor_parallel": 2, "pipeline_parallel": 2}, "names 2 GPUs, and a replica needs 4"),
        ((2,), {"cpus": 2}, "constraints.gpus names GPUs, and cpus: 2 is for replicas without; leave one of them out"),
        ((2,), {"model": "gpt-4o"}, "constraints.gpus names GPUs, and openai is remote; leave constraints.gpus out"),
        (("GPU-0001", "MIG-0001"), {}, "names GPUs and MIG instances; name one kind of them"),
        (("GPU-0001",), {"mig": "1g.10gb"}, "names GPUs, and mig: 1g.10gb is an instance; name one of these"),
        (("MIG-0001", "MIG-0002"), {"gpus": 2}, "a replica is one of them, all of it; MIG instances have no NVLink"),
        (("MIG-0001",), {"gpus": 0.5}, "a replica is one of them, all of it"),
        (("MIG-0001",), {"gpu_memory_gib": 5}, "a replica is one of them, all of it"),
    ],
)  # fmt: skip
def test_what_is_refused_says_the_fix(gpus: tuple[Any, ...], fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidDeployment) as refused:
        declared(*gpus, **fields)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("gpu", "text"),
    [
        (7, "constraints.gpus: no node has GPU 7; there are: 0-3 (a)"),
        (
            "GPU-b-0000-0",
            "constraints.gpus: no node has GPU-b-0000-0; there are: GPU-a-0000-0 (a), GPU-a-0000-1 (a), "
            "GPU-a-0000-2 (a), GPU-a-0000-3 (a)",
        ),
    ],
)
def test_a_gpu_that_nobody_has_is_refused_with_what_there_is(gpu: int | str, text: str) -> None:
    with pytest.raises(UnknownGpu) as refused:
        plan_deployments(CLUSTER, {}, [declared(gpu)])
    assert str(refused.value) == text


def test_where_no_node_has_gpus_nobody_knows_which_one_will_have() -> None:
    [plan] = plan_deployments(Snapshot([Node("id-e", "e", egress={"egress": 4})]), {}, [declared(7)])
    assert "the cluster has no GPU node" in plan.pending[0]


def test_a_dry_run_says_who_has_it_from_a_file_too() -> None:
    first, second = declared(2, 3, gpus=2), declared(3)
    second = second.model_copy(update={"name": "e"})
    [one, other] = plan_deployments(CLUSTER, {}, [first, second])
    assert [a.gpus for a in one.assignments] == [[2, 3]]
    assert "GPU 3 is held by 'd'" in other.pending[0]
    file = ClusterFile.of(CLUSTER, [])
    read = ClusterFile.model_validate_json(file.model_dump_json())
    assert plan_deployments(read.snapshot(), read.held(), [first, second]) == [one, other]
    [_, explained] = explain_deployments(read.snapshot(), read.held(), [first, second])
    assert isinstance(explained.error, NotEnoughGpus)
    assert isinstance(explained.error, Unplaceable)
    assert explained.explanation.excluded["has none of GPU 3 free"] == 1


def test_uuids_of_a_file_are_each_its_own() -> None:
    file = ClusterFile.of(CLUSTER, [])
    twice = file.nodes[0].model_copy(update={"uuids": {0: "GPU-x-1", 1: "GPU-x-1"}})
    with pytest.raises(Exception, match="uuids gives two GPUs the same"):
        file.model_copy(update={"nodes": (twice,)}).snapshot()
