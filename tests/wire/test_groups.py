"""Groups in files, in plans and in workloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import placement
from placement import Deployment, Group, topologies
from placement.core.node import Node
from placement.core.simulation import simulate
from placement.core.snapshot import Snapshot
from placement.errors import BelowFloor, GroupStands, InvalidDeployment, NotEnoughGpus
from placement.wire.cluster import ClusterFile
from placement.wire.dry_run import explain_deployments, plan_deployments
from placement.wire.files import load_deployments, parse_deployments
from placement.wire.groups import GroupLink
from placement.wire.held import HeldDeployment
from placement.wire.plans import PlacementPlan
from placement.wire.workload import load_workload

EXAMPLE = Path(__file__).parents[2] / "examples" / "groups.toml"
LINK: dict[str, Any] = {"between": ["prefill", "decode"], "via": "pcie", "within": "numa"}


def pd(units: int = 2, link: dict[str, Any] | None = None, **fields: Any) -> list[Deployment]:
    group = Group(
        name="pd", members={"prefill": 1, "decode": 2}, units=units, links=(GroupLink(**(link or LINK)),)
    )
    return group.of([Deployment(name=name, model="org/m", **fields) for name in ("prefill", "decode")])


def cluster(*free: int) -> Snapshot:
    machine = topologies.load("dgx-h100")
    return Snapshot(
        Node(f"id-{i}", f"h{i}", topology=machine, free=frozenset(range(gpus))) for i, gpus in enumerate(free)
    )


def gpus_of(plans: list[PlacementPlan]) -> dict[str, list[tuple[str, int]]]:
    return {one.deployment: [(a.node_name, gpu) for a in one.assignments for gpu in a.gpus] for one in plans}


def held(
    snapshot: Snapshot, wanted: list[Deployment], plans: list[PlacementPlan]
) -> tuple[Snapshot, dict[str, HeldDeployment]]:
    """The cluster once that is placed, as it comes back from a file."""
    from placement.core.replicas import PlannedReplica

    standing, nodes = [], {node.id: node for node in snapshot.nodes}
    for one, plan in zip(wanted, plans, strict=True):
        parts = [PlannedReplica(a.replica_index, a.node, tuple(a.gpus)) for a in plan.assignments]
        standing.append(HeldDeployment.of(one, parts))
        for part in parts:
            nodes[part.node_id] = nodes[part.node_id].after(_take(part.gpus)).occupied(1, one.name)
    file = ClusterFile.model_validate_json(
        ClusterFile.of(Snapshot(nodes.values()), standing).model_dump_json()
    )
    return file.snapshot(), dict(file.held())


def _take(gpus: tuple[int, ...]) -> Any:
    from placement.core.node import Choice

    return Choice(gpus, 1000, 0)


def test_the_example_is_planned_unit_by_unit_on_its_numa_node() -> None:
    wanted = load_deployments(EXAMPLE)
    assert [("prefill", 4), ("decode", 8)] == [(one.name, one.replicas) for one in wanted]
    plans = plan_deployments(cluster(8, 8), {}, wanted, atomic=True)
    where = gpus_of(plans)
    for unit in range(4):
        several = [where["prefill"][unit], *where["decode"][2 * unit : 2 * unit + 2]]
        assert 1 == len({(node, gpu // 4) for node, gpu in several}), several
    links = [link for plan in plans for link in plan.to_dict()["links"]]
    assert 8 == len(links)
    assert {("pcie", "NODE", 29.714)} == {(one["via"], one["route"], one["gb_per_s"]) for one in links}
    assert ["prefill/3", "decode/7"] == links[-1]["between"]
    assert {"qwen"} == {plan.to_dict()["group"] for plan in plans}
    assert not any(plan.bounded for plan in plans)


def test_all_of_a_group_waits_if_there_is_no_room_for_all() -> None:
    plans = plan_deployments(cluster(8, 2), {}, [*pd(3), Deployment(name="other", model="org/m", gpus=8)])
    pending = {plan.deployment: plan.pending for plan in plans}
    assert [] == [a for plan in plans[:2] for a in plan.assignments]
    assert {0, 1, 2} == set(pending["prefill"])
    assert set(range(6)) == set(pending["decode"])
    [reason] = {*pending["prefill"].values(), *pending["decode"].values()}
    assert reason.startswith("cannot place 'pd': the route between prefill/")
    assert {} == pending["other"]  # the group holds nothing that others could have


def test_atomic_refuses_what_finds_no_room() -> None:
    with pytest.raises(BelowFloor, match="within = 'numa'"):
        plan_deployments(cluster(8, 2), {}, pd(3), atomic=True)
    with pytest.raises(NotEnoughGpus, match="prefill and decode, but not for all of them together"):
        plan_deployments(cluster(5), {}, pd(2, {**LINK, "within": None}), atomic=True)
    [refused] = explain_deployments(cluster(8, 2), {}, pd(3))
    assert refused.error is not None and refused.error.code == "below_floor"


def test_a_group_that_is_placed_stays_and_grows_by_units() -> None:
    snapshot, wanted = cluster(8, 8), pd(2)
    first = plan_deployments(snapshot, {}, wanted)
    later, standing = held(snapshot, wanted, first)
    again = plan_deployments(later, standing, wanted)
    assert gpus_of(first) == gpus_of(again)
    assert ["unchanged", "unchanged"] == [plan.change for plan in again]
    grown = plan_deployments(later, standing, pd(3))
    assert [[2], [4, 5]] == [plan.placed for plan in grown]
    assert [[0, 1], [0, 1, 2, 3]] == [plan.unchanged for plan in grown]
    fewer = plan_deployments(later, standing, pd(1))
    assert [[1], [2, 3]] == [plan.removed for plan in fewer]


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        (pd(2, gpus=2), "its replicas would have to move (gpus)"),
        (pd(2, {**LINK, "via": "nvlink"}), "the group has another name, other members or other links now"),
        ([Deployment(name="prefill", model="org/m", replicas=2)], "it is declared without the group"),
    ],
)
def test_what_would_move_a_group_that_is_placed_is_refused(wanted: list[Deployment], problem: str) -> None:
    snapshot, before = cluster(8, 8), pd(2)
    later, standing = held(snapshot, before, plan_deployments(snapshot, {}, before))
    with pytest.raises(GroupStands) as refused:
        plan_deployments(later, standing, wanted)
    assert str(refused.value) == (
        f"group 'pd', member 'prefill': {problem}; while it is placed, only units and fields that move no "
        "replica can change, so release it first: placement release pd"
    )


def test_members_are_planned_together_whatever_is_declared_between_them() -> None:
    wanted = [pd()[0], Deployment(name="between", model="org/m", gpus=2), pd()[1]]
    where = gpus_of(plan_deployments(cluster(8), {}, wanted, atomic=True))
    assert list(range(8)) == sorted(gpu for several in where.values() for _, gpu in several)
    assert {0, 1} == {gpu // 4 for _, gpu in where["between"]}


def test_a_member_without_the_others_is_refused() -> None:
    with pytest.raises(InvalidDeployment, match="'pd' is declared without its members decode"):
        plan_deployments(cluster(8), {}, pd()[:1])


BASE = """
[[deployments]]
name = "prefill"
model = "org/m"
{prefill}
[[deployments]]
name = "decode"
model = "org/m"
[[groups]]
name = "{name}"
members = {members}
links = [{links}]
"""


def linked(more: str = 'via = "pcie"', *ends: str) -> str:
    one, other = ends or ("prefill", "decode")
    return f'{{ between = ["{one}", "{other}"], {more} }}'


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"members": "{ prefill = 1, decoder = 2 }"},
            "there is no deployment 'decoder' in this file; it has prefill, decode",
        ),
        (
            {"members": "{ prefill = 1 }", "links": linked()},
            "'decode' is no member of group 'pd'; use two of: prefill",
        ),
        ({"links": linked('via = "pcie"', "prefill", "prefill")}, "between names 'prefill' twice"),
        ({"links": linked('within = "node"')}, "links.0.via: is missing; add it"),
        ({"links": linked('via = "rdma"')}, "Input should be 'nvlink', 'pcie' or 'network'"),
        ({"links": linked('via = "pcie", within = "nvlink"')}, "within: 'nvlink' contradicts via: 'pcie'"),
        (
            {"links": linked('via = "network", min_bandwidth_gb_per_s = 5')},
            "nothing is known of the network's bandwidth",
        ),
        (
            {"links": ", ".join([linked(), linked('via = "nvlink"', "decode", "prefill")])},
            "decode and prefill are linked twice",
        ),
        ({"name": "decode"}, "name: 'decode' is the name of a member, too; rename one of them"),
        (
            {"prefill": "replicas = 3"},
            "replicas: 3, but group 'pd' has 1 unit with 1 each; leave replicas out, or set it to 1",
        ),
        ({"prefill": "cpus = 2"}, "cpus: 2.0 is not possible for a member of a group ('pd')"),
        ({"prefill": 'policy = "spread"'}, "policy: spread is not possible for a member of a group"),
        (
            {"members": "{ prefill = 300, decode = 300 }"},
            "make 600 replicas, which are placed all at once; use at most 512",
        ),
    ],
)
def test_what_a_group_cannot_be(fields: dict[str, str], problem: str) -> None:
    text = BASE.format(
        **{"prefill": "", "name": "pd", "members": "{ prefill = 1, decode = 1 }", "links": ""} | fields
    )
    with pytest.raises(InvalidDeployment) as refused:
        parse_deployments(text, ".toml", "f.toml")
    assert problem in str(refused.value)


def test_in_python_unknown_and_missing_members_are_refused() -> None:
    group = placement.Group(name="g", members={"a": 1, "b": 1})
    one = Deployment(name="a", model="org/m")
    with pytest.raises(InvalidDeployment, match=r"no deployment 'b' among those given \(a\)"):
        group.of([one])
    with pytest.raises(InvalidDeployment, match="'c' is given, and is no member"):
        group.of([one, Deployment(name="b", model="org/m"), Deployment(name="c", model="org/m")])
    with pytest.raises(ValidationError, match="owner: caller is not possible"):
        group.of([one, Deployment(name="b", model="org/m", owner="caller")])


def test_a_workload_of_groups_is_simulated(tmp_path: Path) -> None:
    (tmp_path / "mix.toml").write_text(
        """
arrivals = 40
load = 1.5
[[mix]]
deployments = [{ name = "prefill" }, { name = "decode" }]
[mix.group]
members = { prefill = 1, decode = 2 }
links = [{ between = ["prefill", "decode"], via = "pcie" }]
[[mix]]
gpus = 2
"""
    )
    report = simulate(cluster(8, 8), load_workload(tmp_path / "mix.toml")(cluster(8, 8)))
    routes = report.to_dict()["routes"]
    assert isinstance(routes, dict)
    assert "NODE, 29.7 GB/s" in routes
    assert report.placed > 20
