"""What a request asks of a node besides room, one limit at a time: who passes, and the reason of who does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from placement.core.explanation import Explanation, Stage, explain
from placement.core.limits import eligible, roomy
from placement.core.needs import GIB, Needs
from placement.core.node import Node
from placement.core.planner import plan
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.core.wording import describe
from placement.errors import NoGpuNodes, NotEnoughGpus, Unplaceable

FIELDS: dict[str, dict[str, Any]] = {
    "a": {
        "labels": {"zone": "x"},
        "accelerators": frozenset({"H100", "NVIDIA"}),
        "compute_capability": (9, 0),
    },
    "b": {"labels": {"zone": "y"}, "accelerators": frozenset({"A100"}), "compute_capability": (8, 0)},
    "c": {"compute_capability": (8, 9)},
    "d": {"problem": "is ill", "labels": {"zone": "x"}, "accelerators": frozenset({"H100"})},
}
CLUSTER = Snapshot(
    Node(
        name,
        name,
        topology=Topology.unknown(2),
        free=frozenset({0, 1}),
        cpu_milli=2000,
        memory_bytes=GIB,
        **fields,
    )
    for name, fields in FIELDS.items()
)


def ask(**fields: Any) -> Request:
    return Request("d", (0,), Needs(1), **fields)


def passing(bits: int) -> str:
    return "".join(node.name for i, node in enumerate(CLUSTER.nodes) if bits >> i & 1)


@pytest.mark.parametrize(
    ("request_", "passes", "stage", "reasons"),
    [
        (ask(labels={"zone": "x"}), "a", "label zone", {"label zone is not 'x'": 2}),
        (ask(labels={"zone": "!x"}), "bc", "label zone", {"label zone is not '!x'": 1}),
        (ask(labels={"zone": "in(x, y)"}), "ab", "label zone", {"label zone is not 'in(x, y)'": 1}),
        (ask(accelerators=("H100",)), "a", "accelerator", {"its GPUs are not H100": 2}),
        (ask(accelerators=("H100", "A100")), "ab", "accelerator", {"its GPUs are not H100, A100": 1}),
        (
            ask(compute_capability=(8, 9)),
            "ac",
            "compute capability",
            {"compute capability below 8.9, or unknown": 1},
        ),
        (
            ask(compute_capability=(9, 0)),
            "a",
            "compute capability",
            {"compute capability below 9.0, or unknown": 2},
        ),
        (ask(spread_label="zone"), "ab", "spread label", {"has no label zone": 1}),
        (ask(gpu_nodes=("a", "c", "d")), "ac", "constraints", {"not in constraints.gpu_nodes": 1}),
        (ask(gpu_nodes=("b", "c")), "bc", "constraints", {"not in constraints.gpu_nodes": 2}),
    ],
)
def test_a_limit(request_: Request, passes: str, stage: str, reasons: dict[str, int]) -> None:
    assert passing(eligible(CLUSTER, request_)) == passes
    [found] = [one for one in explain(CLUSTER, request_).stages if one.name == stage]
    assert found.excluded == reasons
    assert found.kept == len(passes) + (stage == "constraints" and "d" in str(request_.gpu_nodes))
    outcome = plan(CLUSTER, request_)
    assert isinstance(outcome, Plan)
    assert outcome.replicas[0].node_id in passes


def test_every_limit_must_be_met() -> None:
    both = ask(labels={"zone": "y"}, accelerators=("H100",))
    assert eligible(CLUSTER, both) == 0
    refused = plan(CLUSTER, both)
    assert isinstance(refused, NoGpuNodes)
    assert refused.excluded == {"is ill": 1, "label zone is not 'y'": 2, "its GPUs are not H100": 1}
    assert refused.advice == "loosen the constraint (accelerator), or add a node that meets it"
    assert passing(eligible(CLUSTER, ask())) == "abc"


@pytest.mark.parametrize(
    ("cpu_milli", "memory_bytes", "passes"),
    [(0, 0, "abcd"), (2000, 0, "abcd"), (2001, 0, ""), (0, GIB, "abcd"), (0, GIB + 1, ""), (1, GIB + 1, "")],
)
def test_room_beside_the_gpus(cpu_milli: int, memory_bytes: int, passes: str) -> None:
    """Nodes that are ill are left out elsewhere."""
    assert passing(roomy(CLUSTER, ask(cpu_milli=cpu_milli, memory_bytes=memory_bytes))) == passes


@pytest.mark.parametrize(
    ("needs", "text"),
    [
        (Needs(1), "1 GPU"),
        (Needs(4), "4 GPUs"),
        (Needs(1, share=250), "0.25 of a GPU"),
        (Needs(1, share=999), "0.999 of a GPU"),
        (Needs(1, memory_bytes=20 * GIB), "20 GiB of a GPU"),
        (Needs(1, memory_bytes=GIB // 2), "0.5 GiB of a GPU"),
        (Needs(1, profile="1g.10gb"), "a MIG instance 1g.10gb"),
    ],
)
def test_what_is_asked_for_in_words(needs: Needs, text: str) -> None:
    assert describe(needs) == text


def test_an_explanation_in_json() -> None:
    stages = (Stage("size", 1, {"too small": 2}), Stage("health", 0, {"is ill": 1}))
    why = Explanation(3, stages, "a has 1", "add one")
    assert why.excluded == {"too small": 2, "is ill": 1}
    assert why.to_dict() == {
        "nodes": 3,
        "stages": [
            {"name": "size", "kept": 1, "excluded": {"too small": 2}},
            {"name": "health", "kept": 0, "excluded": {"is ill": 1}},
        ],
        "nearest_miss": "a has 1",
        "advice": "add one",
    }


def test_a_domain_is_full_by_the_replicas_that_stand_on_all_its_nodes() -> None:
    cluster = Snapshot(
        Node(name, name, topology=Topology.unknown(2), free=frozenset({0, 1}), labels={"zone": zone})
        for name, zone in {"a": "x", "b": "x", "c": "y"}.items()
    )
    spread = ask(spread_label="zone", max_per_domain=2, standing={"a": 1, "b": 1, "c": 1})
    stage = explain(cluster, spread).stages[-1]
    assert (stage.name, stage.kept, stage.excluded) == (
        "spread",
        1,
        {"its zone has 2 of its replicas already": 2},
    )
    outcome = plan(cluster, spread)
    assert isinstance(outcome, Plan)
    assert outcome.replicas[0].node_id == "c"
    refused = plan(cluster, replace(spread, replicas=(3, 4)))
    assert "replica 4 finds no node: every zone with room has 2 replicas already" in str(refused)
    assert getattr(refused, "excluded", None) == {"its zone has 2 of its replicas already": 3}
    one_each = plan(cluster, replace(spread, max_per_domain=1))
    assert "every zone with room has 1 replica already" in str(one_each)


@pytest.mark.parametrize(
    ("others", "advice"),
    [
        ([], "raise constraints.spread.max, or add a node with another zone"),
        # the other zone has GPUs, which somebody holds
        ([0], "raise constraints.spread.max, release something, or add a node with another zone"),
    ],
)
def test_where_replicas_spread_as_far_as_they_may_the_limit_and_more_zones_help(
    others: list[int], advice: str
) -> None:
    shape = Topology.unknown(2)
    nodes = [Node("a", "a", topology=shape, free=frozenset({0, 1}), labels={"zone": "1"})]
    nodes += [Node(f"b{i}", f"b{i}", topology=shape, labels={"zone": "2"}) for i in others]
    request = Request("d", (0, 1), Needs(1), spread_label="zone", max_per_domain=1)
    refused = plan(Snapshot(nodes), request)
    assert type(refused) is Unplaceable
    assert refused.advice == advice


def test_where_a_share_is_more_memory_than_any_gpu_has_a_smaller_one_helps() -> None:
    small = Node("a", "a", topology=Topology.unknown(2), free=frozenset({0, 1}), gpu_memory_bytes=24 * GIB)
    refused = plan(Snapshot([small]), Request("d", (0,), Needs(1, memory_bytes=30 * GIB)))
    assert isinstance(refused, NotEnoughGpus)
    assert refused.summary == "30 GiB of a GPU per replica, but the largest GPU has 24 GiB"
    assert refused.advice == "ask for less gpu_memory_gib, or add a larger GPU"
