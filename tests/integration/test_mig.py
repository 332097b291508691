"""MIG instances on real raylets: found through NVML, placed by profile, seen by the worker inside."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import placement
from placement import Deployment, Group, GroupLink, NodeAssignment, PlacementConstraints, topologies
from placement.runtime.embedded import SimulatedNode, embedded_cluster
from placement.runtime.probing import AnotherUser, another_user
from placement.wire.files import load_deployments
from tests import fake_nvml
from tests.integration.conftest import settled, worker_at

pytestmark = pytest.mark.integration

CUT_UP = topologies.describe("a100-mig-4x").instances
SMALL = [fake_nvml.mig_uuid(0, index) for index in range(7)]
BALANCED = [fake_nvml.mig_uuid(1, index) for index in range(4)]  # 3g.40gb, 2g.20gb, 1g.10gb, 1g.10gb
# A whole GPU, then instances, then the GPU that it is bridged to.
MIXED = [fake_nvml.uuid(2), SMALL[4], *BALANCED, SMALL[1], fake_nvml.uuid(3)]
PROFILES = [None, "1g.10gb", "3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb", "1g.10gb", None]
ONLY = [SMALL[0], SMALL[5], SMALL[3]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("nvml")
    machine = folder / "machine.txt"
    machine.write_text(fake_nvml.describe(topologies.load("a100-pcie-4x"), instances=CUT_UP))
    env = fake_nvml.environment(fake_nvml.build(folder), machine)

    def node(name: str, tokens: list[str], **more: str) -> SimulatedNode:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(tokens)}
        return SimulatedNode(name, gpus=len(tokens), env={**env, **visible, **more})

    nodes = [
        node("mixed", MIXED),
        node("only", ONLY),
        SimulatedNode("unlisted", gpus=4, env=env),
        SimulatedNode("recorded", topology="a100-mig-4x"),
        node("zero", [SMALL[2], SMALL[6]], RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="1"),
    ]
    with embedded_cluster(nodes) as running:
        yield running.address


def seen(assignment: NodeAssignment) -> list[str]:
    """What the worker at each rank was given, as Ray says and as CUDA will see."""
    found = []
    for rank in range(len(assignment.gpus)):
        worker = worker_at(assignment.actor_options(rank))
        assert worker.gpus == [worker.visible]
        found += worker.gpus
    return found


def place(service: Any, name: str, node: str | None, **fields: Any) -> list[NodeAssignment]:
    wanted = {"name": name, "model": "m", **fields}
    limits = {"gpu_nodes": [node]} if node else None
    return ray.get(service.place.remote(wanted, limits)).assignments


def test_a_node_offers_its_instances_with_their_profiles(service: Any) -> None:
    [report] = ray.get(service.topology.remote("mixed"))
    gpus = report["facts"]["gpus"]
    assert [gpu["uuid"] for gpu in gpus] == MIXED
    assert [gpu["mig_profile"] for gpu in gpus] == PROFILES
    assert (report["problem"], report["facts"]["problem"]) == (None, None)


def test_two_replicas_of_a_profile_get_two_instances_of_it(service: Any) -> None:
    replicas = place(service, "small", "mixed", mig="1g.10gb", replicas=2)
    assert [(a.gpus, a.mig) for a in replicas] == [([1], "1g.10gb"), ([4], "1g.10gb")]
    assert [seen(a) for a in replicas] == [[SMALL[4]], [BALANCED[2]]]


def test_an_instance_in_the_middle_is_had_and_nothing_else_is_kept(service: Any) -> None:
    [middle] = place(service, "two", "mixed", mig="2g.20gb")
    assert (middle.gpus, middle.ray_gpus, seen(middle)) == ([3], [0], [BALANCED[1]])
    [larger] = place(service, "three", "mixed", mig="3g.40gb")
    assert seen(larger) == [BALANCED[0]]
    [pair] = place(service, "pair", "mixed", gpus=2)
    assert (pair.weakest_link, seen(pair)) == ("NV12", [fake_nvml.uuid(2), fake_nvml.uuid(3)])
    rest = place(service, "rest", "mixed", mig="1g.10gb", replicas=4)
    assert sorted(a.gpus[0] for a in rest) == [1, 4, 5, 6]


def test_whole_gpus_never_land_on_instances(service: Any) -> None:
    assert [a.gpus for a in place(service, "ones", "mixed", gpus=1, replicas=2)] == [[0], [7]]
    with pytest.raises(placement.NotEnoughGpus, match="1 GPU free on one node"):
        place(service, "third", "mixed", gpus=1)
    with pytest.raises(placement.NotEnoughGpus, match="has MIG instances only"):
        place(service, "whole", "only", gpus=1)
    with pytest.raises(placement.NotEnoughGpus, match="has MIG instances only"):
        place(service, "share", "only", gpus=0.5)
    ray.get(service.release.remote("ones"))
    shares = place(service, "shares", "mixed", gpus=0.5, replicas=4)
    assert [a.gpus for a in shares] == [[0], [0], [7], [7]]


def test_instances_never_land_on_whole_gpus(service: Any) -> None:
    place(service, "all", "only", mig="1g.10gb", replicas=3)
    with pytest.raises(placement.NotEnoughGpus, match=re.escape("a MIG instance 1g.10gb free on one node")):
        place(service, "one-more", "only", mig="1g.10gb")
    with pytest.raises(placement.NotEnoughGpus, match=re.escape("ask for one of: 1g.10gb, 2g.20gb, 3g.40gb")):
        place(service, "unknown", None, mig="7g.80gb")


def test_instances_are_told_apart_where_ray_empties_their_names_for_actors(service: Any) -> None:
    other = another_user("zero")
    try:
        [replica] = place(service, "one", "zero", mig="1g.10gb")
        assert (replica.gpus, seen(replica)) == ([1], [SMALL[6]])
    finally:
        other.leave()


def test_tensor_parallelism_across_instances_is_refused_with_the_reason(service: Any) -> None:
    with pytest.raises(placement.InvalidDeployment, match="no NVLink and no peer-to-peer access"):
        place(service, "parallel", "mixed", mig="1g.10gb", gpus=2)


def test_a_gpu_that_is_cut_up_is_no_whole_gpu_where_ray_was_not_told(service: Any) -> None:
    [report] = ray.get(service.topology.remote("unlisted"))
    assert "MIG is on on GPU 0-1" in report["facts"]["problem"]
    [pair] = place(service, "pair", "unlisted", gpus=2)
    assert (pair.gpus, seen(pair)) == ([2, 3], ["2", "3"])
    with pytest.raises(placement.NotEnoughGpus):
        place(service, "more", "unlisted", gpus=1)


def test_a_simulated_node_has_instances_too(service: Any) -> None:
    [two] = place(service, "two", "recorded", mig="2g.20gb")
    assert two.gpus == [8]
    [pair] = place(service, "pair", "recorded", gpus=2)
    assert (pair.gpus, pair.weakest_link) == ([11, 12], "NV12")
    with pytest.raises(placement.NotEnoughGpus):
        place(service, "more", "recorded", gpus=1)


def test_the_example_is_placed_and_shown(service: Any) -> None:
    wanted = load_deployments(Path(__file__).parents[2] / "examples" / "mig.toml")
    results = {one.deployment: one.assignments for one in ray.get(service.apply_all.remote(wanted))}
    assert [a.mig for a in results["embed"]] == ["1g.10gb"] * 4
    assert [a.weakest_link for a in results["qwen-32b"]] == ["NV12"]
    report = ray.get(service.status.remote())
    held = {
        (node["name"], gpu["ordinal"]): gpu["mig"]
        for node in report["nodes"]
        for gpu in node["gpus"]
        if gpu["deployment"] in ("embed", "qwen-7b")
    }
    assert sorted(held.values()) == ["1g.10gb"] * 4 + ["3g.40gb"]
    [mixed] = [node for node in report["nodes"] if node["name"] == "mixed"]
    assert [gpu["mig"] for gpu in mixed["gpus"]] == PROFILES


def speculative(units: int, *nodes: str, **link: Any) -> list[Deployment]:
    """In each unit a whole GPU, and an instance of the smallest profile."""
    links = [GroupLink(between=("target", "draft"), via="pcie", **link)]
    group = Group(name="sd", members={"target": 1, "draft": 1}, units=units, links=links)
    limits = PlacementConstraints(gpu_nodes=nodes or None)
    draft = Deployment(name="draft", model="m", mig="1g.10gb", constraints=limits)
    return group.of([Deployment(name="target", model="m", constraints=limits), draft])


def test_a_group_has_instances_beside_whole_gpus(service: Any) -> None:
    other = another_user("mixed")  # it holds the first GPU, and so the other one is the target's
    try:
        wanted = speculative(1, "mixed", within="node")

        def planned() -> list[list[int]]:
            return [one.assignments[0].gpus for one in ray.get(service.plan_all.remote(wanted))]

        assert settled(lambda: planned()[0] == [7])  # Ray's records show the other user a moment later
        before = planned()
        target, draft = (one.assignments for one in ray.get(service.apply_all.remote(wanted, atomic=True)))
        assert [target[0].gpus, draft[0].gpus] == before
        assert ([7], "", [fake_nvml.uuid(3)]) == (target[0].gpus, target[0].mig, seen(target[0]))
        assert (PROFILES[draft[0].gpus[0]], draft[0].mig) == ("1g.10gb",) * 2
        assert seen(draft[0]) == [MIXED[draft[0].gpus[0]]]
        [group] = ray.get(service.status.remote())["groups"]
        [link] = group["links"]
        assert (["target/0", "draft/0"], [7, draft[0].gpus[0]]) == (link["between"], link["gpus"])
        # A second unit waits for the GPU as a whole; the instances that are free are not taken for it.
        results = ray.get(service.apply_all.remote(speculative(2, "mixed", within="node")))
        assert [[1], [1]] == [[*one.pending] for one in results]
    finally:
        other.leave()
    assert settled(lambda: not any(ray.get(service.get.remote(name)).pending for name in ("target", "draft")))
    first, second = ray.get(service.get.remote("draft")).assignments
    assert first == draft[0] and first.gpus != second.gpus and seen(second) == [MIXED[second.gpus[0]]]
    assert seen(ray.get(service.get.remote("target")).assignments[1]) == [fake_nvml.uuid(2)]
    assert 4 == ray.get(service.release.remote("sd"))


def test_a_group_of_instances_and_shares_is_on_every_node_that_has_both(service: Any) -> None:
    """The unlisted node has no instance that Ray knows of."""
    links = [GroupLink(between=("half", "mig"), via="pcie", within="node")]
    group = Group(name="g", members={"half": 1, "mig": 2}, units=4, links=links)
    half = Deployment(name="half", model="m", gpus=0.5)
    wanted = group.of([half, Deployment(name="mig", model="m", mig="1g.10gb")])
    halves, instances = (one.assignments for one in ray.get(service.apply_all.remote(wanted, atomic=True)))
    for unit in range(4):
        own, several = halves[unit], instances[2 * unit : 2 * unit + 2]
        assert {own.node_name} == {one.node_name for one in several} <= {"mixed", "recorded"}
        assert 3 == len({(own.gpus[0], "half"), *((one.gpus[0], "mig") for one in several)})
        if own.node_name == "mixed":
            assert [MIXED[one.gpus[0]] for one in (own, *several)] == [
                seen(one)[0] for one in (own, *several)
            ]
    assert 8 == len({(one.node, *one.gpus) for one in instances})
    assert 12 == ray.get(service.release.remote("mig"))


def test_instances_while_another_user_takes_and_frees_some(service: Any) -> None:
    dice = random.Random(7)
    uuids = dict(enumerate(MIXED))
    others: list[AnotherUser] = []
    standing: list[str] = []
    placed = refused = 0
    try:
        for step in range(15):
            if others and dice.random() < 0.4:
                others.pop(dice.randrange(len(others))).leave()
            elif len(others) < 4 and len(others) + len(standing) < len(MIXED):
                others.append(another_user("mixed"))
            if standing and dice.random() < 0.4:
                ray.get(service.release.remote(standing.pop(dice.randrange(len(standing)))))
                continue
            profile = dice.choice(["1g.10gb", "1g.10gb", "2g.20gb", "3g.40gb"])
            try:
                [replica] = place(service, f"step-{step}", "mixed", mig=profile)
            except (placement.NotEnoughGpus, placement.ReservationFailed):
                refused += 1
                continue
            placed += 1
            standing.append(f"step-{step}")
            assert PROFILES[replica.gpus[0]] == profile
            assert seen(replica) == [uuids[replica.gpus[0]]]
    finally:
        for other in others:
            other.leave()
    assert placed > refused
