"""Groups of roles on a live cluster: placed as one on just the planned GPUs, waiting as one, after a death, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group

from placement import Deployment, Group, InvalidDeployment
from placement.core.routes import Via
from placement.errors import BelowFloor, GroupStands
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode
from placement.wire.files import load_deployments
from placement.wire.groups import GroupLink
from tests.integration.conftest import settled
from tests.integration.test_node_death import kill
from tests.integration.test_place import ranks_gpus

pytestmark = pytest.mark.integration

EXAMPLE = Path(__file__).parents[2] / "examples" / "groups.toml"


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode(f"h{i}", topology="dgx-h100", labels={"rack": "r"}) for i in range(3)]


def pd(units: int = 2, within: str = "numa") -> list[Deployment]:
    link = GroupLink.model_validate({"between": ("prefill", "decode"), "via": "pcie", "within": within})
    group = Group(name="pd", members={"prefill": 1, "decode": 2}, units=units, links=(link,))
    return group.of([Deployment(name=name, model="org/m") for name in ("prefill", "decode")])


def units_of(
    service: Any, several: int = 2, names: tuple[str, str] = ("prefill", "decode")
) -> list[set[tuple[str, int]]]:
    """The (node, PCI root) of each unit; a worker in each bundle has confirmed its GPU."""
    found: dict[int, set[tuple[str, int]]] = {}
    for name, count in zip(names, (1, several), strict=True):
        for a in ray.get(service.get.remote(name)).assignments:
            assert ranks_gpus(a) == a.gpus
            found.setdefault(a.replica_index // count, set()).add((a.node_name, a.gpus[0] // 4))
    return [found[unit] for unit in sorted(found)]


def states(service: Any) -> dict[str, str]:
    report = ray.get(service.status.remote())
    return {one["name"]: one["state"] for one in [*report["groups"], *report["deployments"]]}


def test_the_example_is_placed_beside_another_user_and_shown_as_one(service: Any) -> None:
    other = placement_group([{"GPU": 1}] * 2, strategy="STRICT_PACK")  # GPUs 0 and 1 of some node
    ray.get(other.ready(), timeout=30)
    wanted = load_deployments(EXAMPLE)
    results = ray.get(service.apply_all.remote(wanted, atomic=True))
    assert [4, 8] == [len(one.assignments) for one in results]
    assert all(1 == len(unit) for unit in units_of(service))
    report = ray.get(service.status.remote())
    [group] = report["groups"]
    assert ("qwen", "placed", 4, {"prefill": 1, "decode": 2}) == (
        group["name"], group["state"], group["units"], group["members"],
    )  # fmt: skip
    assert {("NODE", 29.714)} == {(link["route"], link["gb_per_s"]) for link in group["links"]}
    assert 8 == len(group["links"])
    assert 12 == ray.get(service.release.remote("qwen"))
    assert {} == states(service)
    ray.util.remove_placement_group(other)


def test_it_waits_as_one_and_comes_as_one(service: Any) -> None:
    blockers = [
        {"name": f"b{i}", "model": "org/m", "gpus": 6, "constraints": {"gpu_nodes": [f"h{i}"]}}
        for i in range(3)
    ]
    ray.get(service.apply_all.remote(blockers, atomic=True))
    with pytest.raises(BelowFloor, match="within = 'numa'"):
        ray.get(service.apply_all.remote(pd(), atomic=True))
    assert {"b0", "b1", "b2"} == states(service).keys()
    results = ray.get(service.apply_all.remote(pd()))
    assert [2, 4] == [len(one.pending) for one in results]
    assert [0, 0] == [len(one.assignments) for one in results]
    assert {"pending"} == {states(service)[name] for name in ("pd", "prefill", "decode")}
    ray.get(service.release.remote("b1"))
    assert settled(lambda: states(service)["pd"] == "placed"), ray.get(service.status.remote())["groups"]
    assert {frozenset({("h1", 0)}), frozenset({("h1", 1)})} == set(map(frozenset, units_of(service)))
    # It grows by units, and ends as one, by the name of any member.
    ray.get(service.release.remote("b2"))
    ray.get(service.apply_all.remote(pd(3), atomic=True))
    assert 3 == len(units_of(service))
    assert {("h2", 0)} == units_of(service)[2] or {("h2", 1)} == units_of(service)[2]
    assert 9 == ray.get(service.release.remote("decode"))
    assert {"b0"} == states(service).keys()


def test_a_draft_model_on_a_share_lies_beside_its_target(service: Any) -> None:
    """Of via = "pcie" only a GPU of the same root is near enough; the other user holds those that come first."""
    ray.get(service.place.remote({"name": "other", "model": "org/m", "gpus": 0.5}))
    link = GroupLink(between=("target", "draft"), via=Via.PCIE, within="numa")
    group = Group(name="sd", members={"target": 1, "draft": 2}, units=2, links=(link,))
    target = Deployment(name="target", model="org/m", gpus=3)
    draft = Deployment(name="draft", model="org/m", gpus=0.25)
    ray.get(service.apply_all.remote(group.of([target, draft]), atomic=True))
    assert all(1 == len(unit) for unit in units_of(service, 2, ("target", "draft")))
    drafts = ray.get(service.get.remote("draft")).assignments
    assert {0.25} == {one.share for one in drafts}
    assert 2 == len({(one.node, *one.gpus) for one in drafts})  # the two of a unit share a GPU
    [status] = ray.get(service.status.remote())["groups"]
    assert {"NODE"} == {one["route"] for one in status["links"]}
    events = ray.get(service.events.remote("sd"))
    assert {"target", "draft"} == {one["deployment"] for one in events}
    assert 6 == ray.get(service.release.remote("sd"))
    ray.get(service.release.remote("other"))


def test_a_trainer_over_two_nodes_is_placed_with_its_rollout_workers(service: Any) -> None:
    group = Group(
        name="rl",
        members={"train": 1, "roll": 2},
        links=(GroupLink(between=("train", "roll"), via=Via.NVLINK, within="rack"),),
    )
    train = Deployment(name="train", model="org/m", tensor_parallel=8, pipeline_parallel=2)
    wanted = group.of([train, Deployment(name="roll", model="org/m", gpus=4)])
    [plan, _] = ray.get(service.plan_all.remote(wanted))
    ray.get(service.apply_all.remote(wanted, atomic=True))
    parts = ray.get(service.get.remote("train")).assignments
    assert [[*range(8)], [*range(8, 16)]] == [one.ranks for one in parts]
    assert [(one.node, one.gpus) for one in plan.assignments] == [(one.node, one.gpus) for one in parts]
    for one in parts:
        assert ranks_gpus(one) == one.gpus == [*range(8)]
    rolls = ray.get(service.get.remote("roll")).assignments
    assert 1 == len({one.node for one in rolls} - {one.node for one in parts})
    [status] = ray.get(service.status.remote())["groups"]
    assert {"network, one rack"} == {one["route"] for one in status["links"]}
    assert "unchanged" == ray.get(service.plan_all.remote(wanted))[0].change
    assert 3 == ray.get(service.release.remote("rl"))


def test_members_go_together_or_not_at_all(service: Any) -> None:
    prefill, decode = pd()
    for call in (service.place, service.apply, service.plan):
        with pytest.raises(InvalidDeployment, match="member"):
            ray.get(call.remote(prefill))
    with pytest.raises(InvalidDeployment, match="without its members decode"):
        ray.get(service.apply_all.remote([prefill]))
    ray.get(service.apply_all.remote([decode, prefill]))
    with pytest.raises(GroupStands, match="declared without the group"):
        ray.get(service.apply.remote({"name": "prefill", "model": "org/m"}))
    assert ["unchanged", "unchanged"] == [
        one.change for one in ray.get(service.plan_all.remote([prefill, decode]))
    ]


def test_units_on_a_node_that_dies_are_placed_elsewhere_whole(cluster: EmbeddedCluster, service: Any) -> None:
    ray.get(service.apply_all.remote(pd(4), atomic=True))
    before = units_of(service)
    [lost] = {node for unit in before[:1] for node, _ in unit}
    kill(cluster, lost)
    assert settled(lambda: states(service)["pd"] == "placed" and lost not in str(units_of(service)))
    after = units_of(service)
    assert all(1 == len(unit) for unit in after)
    for one, other in zip(before, after, strict=True):  # those elsewhere stay
        assert one == other or {node for node, _ in one} == {lost}
    # Without room for all that is lost, none of it is placed: two nodes have 16 GPUs, five units want 15 on 4 roots.
    ray.get(service.apply_all.remote(pd(5)))
    report = ray.get(service.status.remote())
    [group] = report["groups"]
    assert "pending" == group["state"]
    assert 4 == len(units_of(service))
