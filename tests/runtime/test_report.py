"""What ``status`` reports of one node: who sits on which GPU, and what others hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from placement import Deployment, topologies
from placement.runtime.state import Books, Standing
from placement.runtime.discovery import NodeInfo
from placement.runtime.report import status_report, topology_report
from placement.runtime.results import NodeAssignment
from placement.wire.facts import NodeFacts
from placement.wire.slots import in_ray_order


def books(**held: list[tuple[int, float]]) -> Books:
    """Deployment -> the (GPU, share) of each replica, all on node n."""
    found = Books()
    for name, replicas in held.items():
        standing = Standing(Deployment(name=name, model="m", replicas=len(replicas)))
        for index, (gpu, share) in enumerate(replicas):
            standing.add("order", NodeAssignment(index, "n", [gpu], _NO_GROUP, [0], "n", share))
        found.standing[name] = standing
    return found


_NO_GROUP: Any = SimpleNamespace(id=SimpleNamespace(hex=lambda: "00"))


def node(
    held: Books,
    available: float | None,
    foreign: frozenset[int] = frozenset(),
    gpus: int = 4,
    topology: str = "",
) -> dict[str, Any]:
    facts = {"n": topologies.facts(topology)} if topology else {}
    fleet: Any = SimpleNamespace(machines=SimpleNamespace(facts=facts), foreign={"n": foreign})
    in_books = {} if available is None else {"n": {"GPU": available}}
    report = status_report([NodeInfo("n", "n", "a", gpus)], held, fleet, in_books)
    return report["nodes"][0]


@pytest.mark.parametrize(
    ("available", "foreign", "others", "unlocated"),
    [
        # held: half and a quarter of GPU 0, all of GPU 1
        (2.25, frozenset(), [], 0),
        (1.25, frozenset(), [], 1),
        (1.25, frozenset({3}), [3], 0),
        (2.25, frozenset({3}), [], 0),  # given back since
        (1.65, frozenset(), [], 1),  # others share, too
        (0.25, frozenset({2}), [2], 1),
        (None, frozenset({3}), [3], 0),  # the books lag behind our own last change
    ],
)
def test_what_others_hold_is_counted_beside_shares(
    available: float | None, foreign: frozenset[int], others: list[int], unlocated: int
) -> None:
    report = node(books(a=[(0, 0.5), (1, 1.0)], b=[(0, 0.25)]), available, foreign)
    assert [gpu["ordinal"] for gpu in report["gpus"] if gpu["state"] == "other"] == others
    assert report["others_unlocated"] == unlocated


def test_a_shared_gpu_lists_all_its_occupants() -> None:
    report = node(books(a=[(0, 0.5), (1, 1.0)], b=[(0, 0.25)]), 2.25)
    assert report["gpus"][0]["occupants"] == [
        {"deployment": "a", "replica": 0, "share": 0.5},
        {"deployment": "b", "replica": 0, "share": 0.25},
    ]
    assert [(gpu["state"], gpu["deployment"], gpu["replica"]) for gpu in report["gpus"]] == [
        ("held", "a", 0),
        ("held", "a", 1),
        ("free", None, None),
        ("free", None, None),
    ]


def test_tenths_add_up() -> None:
    report = node(books(a=[(0, 0.1)] * 10), 3.0)
    assert (len(report["gpus"][0]["occupants"]), report["others_unlocated"]) == (10, 0)


def test_instances_are_reported_by_their_profile() -> None:
    report = node(books(a=[(7, 1.0)]), 12.0, gpus=13, topology="a100-mig-4x")
    profiles = [gpu["mig"] for gpu in report["gpus"]]
    assert profiles == ["1g.10gb"] * 7 + ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb", None, None]
    assert report["gpus"][7]["deployment"] == "a"


def test_what_a_deployment_runs_on_is_reported_and_who_says_so() -> None:
    held = Books()
    for name, fields in {
        "a": {"model": "gpt-5"},
        "b": {"model": "gpt-5", "runtime": "vllm"},
        "c": {"model": "m", "runtime_config": {"runtime": "ort"}},
    }.items():
        held.standing[name] = Standing(Deployment.model_validate({"name": name, **fields}))
    fleet: Any = SimpleNamespace(machines=SimpleNamespace(facts={}), foreign={})
    report = status_report([], held, fleet, {})
    assert [(one["runtime"], one["runtime_from"]) for one in report["deployments"]] == [
        ("openai", "by the model's name"),
        ("vllm", "declared"),
        ("ort", "runtime_config"),
    ]


def test_gpus_of_which_nobody_can_tell_what_they_are_are_no_free_ones() -> None:
    facts = in_ray_order(reading("a100-pcie-4x"), 6, None)
    fleet: Any = SimpleNamespace(machines=SimpleNamespace(facts={"n": facts}), foreign={"n": frozenset()})
    info = NodeInfo("n", "n", "a", 6)
    [report] = status_report([info], books(a=[(4, 1.0)]), fleet, {"n": {"GPU": 5.0}})["nodes"]
    assert [gpu["state"] for gpu in report["gpus"]] == ["free"] * 4 + ["held", "unknown"]
    assert [gpu["problem"] for gpu in report["gpus"]] == [None] * 4 + ["NVML does not show it"] * 2
    said = "Ray has 6 GPUs here, NVML shows 4 of them"
    assert report["problem"] == f"{said}; nothing is placed on GPU 4-5"
    assert report["gpu_model"] == "NVIDIA A100 80GB PCIe"
    shown = topology_report(info, facts)
    assert (shown["problem"], shown["facts"]["problem"]) == ("nothing is placed on GPU 4-5", said)


def reading(machine: str) -> NodeFacts:
    """What NVML says on such a machine."""
    facts = topologies.facts(machine)
    gpus = tuple(gpu.model_copy(update={"uuid": f"GPU-{gpu.ordinal}"}) for gpu in facts.gpus)
    return facts.model_copy(update={"source": "nvml", "gpus": gpus})
