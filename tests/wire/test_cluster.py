"""A cluster in a file, and plans without a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from placement import topologies
from placement.core.node import Node
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import UNKNOWN_LINK, Lanes, Link, Nic, NumaNode, Topology
from placement.core.topology import Path as PciePath
from placement.errors import InvalidClusterFile, NotEnoughGpus, UnknownNode
from placement.wire.cluster import ClusterFile, load_cluster
from placement.wire.deployment import Deployment
from placement.wire.dry_run import explain_deployments, plan_deployments
from placement.wire.fields import STANDS as STANDS_ALREADY
from placement.wire.held import HeldDeployment, HeldReplica

CLUSTER = Snapshot(
    (
        Node("id-b", "b", "10.0.0.2", topologies.load("a100-pcie-4x"), frozenset({1, 2, 3})),
        Node(
            "id-a",
            "a",
            "10.0.0.1",
            topologies.load("a100-pcie-4x"),
            frozenset({0}),
            uuids={gpu: f"GPU-a-{gpu}" for gpu in range(4)},
            holders={2: ("old",), 3: ("old",)},
            resources={"nvlink_domain": 10_000},
        ),
        Node("id-c", "c", "10.0.0.3", Topology.unknown(2), frozenset({0, 1}), problem="is ill"),
        Node("id-e", "e", egress={"egress": 4}, serving={("openai", "0123456789abcdef"): 1}),
    )
)
TWO = "\tGPU0\tGPU1\nGPU0\t X \tNV2\nGPU1\tNV2\t X \n"
STANDS = HeldDeployment(
    deployment=Deployment(name="old", model="m", gpus=2),
    replicas=(HeldReplica(replica_index=0, node="id-a", gpus=(2, 3)),),
)


def test_a_cluster_survives_its_file(tmp_path: Path) -> None:
    file = ClusterFile.of(CLUSTER, [STANDS])
    path = tmp_path / "cluster.json"
    path.write_text(file.model_dump_json(exclude_none=True))
    again = load_cluster(path)
    assert again.snapshot().nodes == CLUSTER.nodes
    assert [node.topology.model for node in again.snapshot().nodes] == [
        node.topology.model for node in CLUSTER.nodes
    ]
    assert again.held() == {"old": STANDS}
    assert len(again.machines) == 2, "a make of machine is written once"


def test_pcie_paths_below_nvlink_survive_the_file() -> None:
    machine = topologies.load("hgx-a100-4gpu")
    known = replace(machine, below=((PciePath.PHB,) * 4,) * 4)
    nodes = [Node(name, name, topology=one) for name, one in (("a", known), ("b", machine))]
    text = ClusterFile.of(Snapshot(nodes), ()).model_dump_json()
    assert [known, machine] == [
        one.topology for one in ClusterFile.model_validate_json(text).snapshot().nodes
    ]
    cut = text.replace('[["PHB","PHB","PHB","PHB"],', "[")
    with pytest.raises(InvalidClusterFile, match=r"machines.machine-1: below is not a matrix of 4 x 4"):
        ClusterFile.model_validate_json(cut).snapshot()


def test_what_links_carry_is_the_same_from_its_file() -> None:
    peers = (
        (None, False, True, None),
        (False, None, None, True),
        (True, None, None, False),
        (None, True, False, None),
    )
    links = tuple(
        tuple(
            UNKNOWN_LINK if a == b else Link(PciePath.PIX if a // 2 == b // 2 else PciePath.NODE, peer=peer)
            for b, peer in enumerate(row)
        )
        for a, row in enumerate(peers)
    )
    lanes = (Lanes(4), Lanes(4, 8), None, Lanes(3, 4))
    machine = Topology(links, lanes=lanes, cpu="AMD EPYC, Rome", model="NVIDIA GeForce RTX 3090")
    file = ClusterFile.of(Snapshot((Node("id", "a", topology=machine, free=frozenset(range(4))),)), [])
    [again] = ClusterFile.model_validate_json(file.model_dump_json(exclude_none=True)).snapshot().nodes
    assert again.topology == machine
    assert score(again.topology, range(4)) == score(machine, range(4))


def test_what_is_known_of_the_host_is_the_same_from_its_file() -> None:
    machine = replace(
        Topology.unknown(2),
        nics=(
            Nic("mlx5_0", (PciePath.PIX, PciePath.SYS), ("mlx5_0:1",), ("ens1", "ens2")),
            Nic("eth0", (PciePath.NODE, PciePath.UNKNOWN)),
        ),
        numa_nodes=(NumaNode(0, ((0, 2), (1, 3)), 1 << 30, 0), NumaNode(1)),
        nvls=False,
    )
    file = ClusterFile.of(Snapshot((Node("id", "a", topology=machine),)), [])
    [again] = ClusterFile.model_validate_json(file.model_dump_json(exclude_none=True)).snapshot().nodes
    assert again.topology == machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"machines": {"m": {"matrix": TWO, "nics": [{"name": "mlx5_0", "ports": ["mlx5_0:1"]}]}}},
            "machines.m: nics names mlx5_0, which is no network card of the matrix",
        ),
        (
            {"machines": {"m": {"matrix": TWO, "peers": ["Y"]}}},
            "machines.m: peers must be 2 rows of 2 letters",
        ),
        ({"machines": {"m": {"matrix": TWO, "peers": ["?X", "X?"]}}}, "letters Y, N or \\?"),
        ({"machines": {"m": {"matrix": TWO, "peers": ["?Y", "N?"]}}}, "machines.m: GPU 1 to 0 is"),
        (
            {"machines": {"m": {"matrix": TWO, "pcie": [[4, 16]]}}},
            "machines.m: pcie describes 1 GPUs, the matrix 2",
        ),
        ({"machines": {"m": {"matrix": TWO, "pcie": [[4, 0], None]}}}, "machines.m.pcie.0.1: "),
        ({"version": 2}, "version: Input should be 1"),
        ({"nodes": [{"name": "a"}]}, "nodes.0.id: Field required"),
        ({"nodes": [{"id": "a", "name": "a", "colour": 1}]}, "nodes.0.colour: Extra inputs"),
        ({"nodes": [{"id": "a", "name": "a", "machine": "m"}]}, "machine 'm' is not under machines"),
        ({"nodes": [{"id": "a", "name": "a", "free": [0]}]}, "free names GPU 0, but it has 0 GPUs"),
        ({"nodes": [{"id": "a", "name": n} for n in "ab"]}, "id 'a' is there twice"),
        ({"machines": {"m": {"matrix": "what"}}}, "machines.m.matrix: no header line"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_the_field(
    change: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.json"
    if change is not None:
        path.write_text(json.dumps(change))
    with pytest.raises(InvalidClusterFile, match=message):
        load_cluster(path).snapshot()


def lying(held: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A cluster of one node with two GPUs that says something that cannot be."""
    node = {"id": "n", "name": "a", "machine": "m", **fields}
    file: dict[str, Any] = {"machines": {"m": {"matrix": TWO}}, "nodes": [node]}
    if held is not None:
        replica = {"replica_index": 0, "node": "n", **held}
        file["deployments"] = [{"deployment": {"name": "d", "model": "m"}, "replicas": [replica]}]
    return file


def both_hold(*held: dict[str, Any]) -> dict[str, Any]:
    """The same, where deployments d, e, ... hold something."""
    deployments = [lying(held=one)["deployments"][0] for one in held]
    for name, one in zip("de", deployments, strict=True):
        one["deployment"]["name"] = name
    return lying() | {"deployments": deployments}


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (lying(free=[0, 9]), "node 'a': free names GPU 9, but it has 2 GPUs"),
        (lying(free=[-1]), "node 'a': free names GPU -1, but it has 2 GPUs"),
        (lying(rests={"7": 500}), "node 'a': rests names GPU 7, but it has 2 GPUs"),
        (lying(slots={"2": "1g.10gb"}), "node 'a': slots names GPU 2, but it has 2 GPUs"),
        (lying(free_memory={"2": 1}), "node 'a': free_memory names GPU 2, but it has 2 GPUs"),
        (lying(free=[0, 1], rests={"1": 500}), "node 'a': GPU 1 is in free and in rests; keep one of them"),
        (lying(free=[0], slots={"0": "1g.10gb"}), "node 'a': GPU 0 is in free and in slots; keep one of them"),
        (lying(instances={"0": "1g.10gb"}), "node 'a': instances has '1g.10gb' at GPU 0, slots has 'nothing'"),
        (lying(rests={"0": 1001}), "node 'a': rests.0 is 1001; use 0 to 999"),
        (lying(rests={"0": 1000}), "node 'a': rests.0 is 1000; use 0 to 999"),
        (lying(rests={"0": -1}), "node 'a': rests.0 is -1; use 0 to 999"),
        (lying(egress={"egress": -4}), "node 'a': egress.egress is -4; use 0 to"),
        (lying(cpu_milli=-1), "node 'a': cpu_milli is -1; use 0 to"),
        (lying(memory_bytes=10**30), "node 'a': memory_bytes is 1000000000000000000000000000000; use 0 to"),
        (lying(gpu_memory_bytes=0), "node 'a': gpu_memory_bytes is 0; use 1 to"),
        (lying(held={"gpus": [9]}), "deployment 'd': replica 0: gpus names GPU 9, but node 'a' has 2 GPUs"),
        (lying(held={"gpus": [0]}, free=[0, 1]), "gpus names GPU 0, which is free on node 'a'"),
        (lying(held={"gpus": [0, 0]}), "deployment 'd': replica 0: gpus names one twice: 0,0"),
        (lying(held={"gpus": [0, 1], "ranks": [0]}), "replica 0: ranks is [0]; give each of its 2 GPUs its own"),
        (lying(held={"gpus": [0, 1], "ranks": [1, 1]}), "replica 0: ranks is [1, 1]; give each of its 2 GPUs its own"),
        (lying(held={"gpus": [0, 1], "share": 500}), "share is 500, so that gpus must name one GPU, not 2"),
        (lying(held={"gpus": [0], "share": 0}), "deployment 'd': replica 0: share is 0; use 1 to 1000"),
        (lying(held={"gpus": [0, 1], "shares": [500]}), "shares has 1 entries for 2 GPUs; give one for each"),
        (lying(held={"gpus": [0], "shares": [500, 500]}), "shares has 2 entries for 1 GPU; give one for each"),
        (lying(held={"gpus": [0, 1], "shares": [500, 0]}), "deployment 'd': replica 0: shares is 0; use 1 to 1000"),
        (lying(held={"gpus": [0, 1], "shares": [1001, 1]}), "deployment 'd': replica 0: shares is 1001; use 1 to 1000"),
        (lying(held={"gpus": [0, 0], "shares": [500, 500]}), "deployment 'd': replica 0: gpus names one twice: 0,0"),
        (lying(held={"gpus": [0, 1], "shares": [500, 1000], "ranks": [2]}), "ranks is [2]; give each of its 2 GPUs"),
        (lying(held={"gpus": [0, 1], "shares": [500, 1000], "ranks": [1, 1, 2]}), "ranks is [1, 1, 2]; give each"),
        (lying(held={"gpus": [0, 1], "shares": [600, 1000]}, rests={"0": 401}), "of which rests leaves 401 on"),
        (
            both_hold({"gpus": [1, 0], "shares": [1000, 600]}, {"gpus": [0], "share": 401}),
            "deployment 'e': replica 0: gpus names GPU 0, of which others hold too much already",
        ),
        (lying(held={"gpus": [0], "cpu_milli": -5}), "deployment 'd': replica 0: cpu_milli is -5; use 0 to"),
        (lying(held={"replica_index": -1}), "deployment 'd': replica -1: replica_index is -1; use 0 to"),
        ({**lying(), "deployments": lying(held={"gpus": [0]})["deployments"] * 2}, "deployment 'd' is there twice"),
        (lying() | {"machines": {"m": {"matrix": TWO.replace("NV2", "NV" + "9" * 99)}}}, "which is no link"),
        (lying(None, **{"x\ny": 1}), "nodes.0.x?y: Extra inputs"),
        (lying(free=[float("nan")]), "nodes.0.free.0: "),
        (both_hold({"gpus": [0]}, {"gpus": [1, 0]}), "deployment 'e': replica 0: gpus names GPU 0, of which others"),
        (both_hold({"gpus": [0], "share": 600}, {"gpus": [0], "share": 401}), "of which others hold too much already"),
        (lying(held={"gpus": [0]}, rests={"0": 500}), "gpus names GPU 0, of which rests leaves 500 on node 'a'"),
        (lying(held={"gpus": [0], "share": 600}, rests={"0": 401}), "of which rests leaves 401 on node 'a'"),
        (lying(held={}), "deployment 'd': replica 0: holds nothing; name its gpus, its egress_resource, or cpu_milli"),
        (lying(held={"gpus": [0], "egress_resource": "egress"}), "must hold either gpus or an egress_resource"),
        (lying(problem=""), "node 'a': problem is empty; say what is wrong with the node, or leave it out"),
        (lying() | {"deployments": [{"deployment": {"name": "d", "model": "m", "runtime_config": 1}, "replicas": []}]},
         "deployments.0.deployment.runtime_config: "),
        ({"version": 2}, "version: Input should be 1"),
        ([], "Input should be an object"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused_in_one_line(
    file: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(file))
    with pytest.raises(InvalidClusterFile) as caught:
        load_cluster(path).snapshot()
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Invalid JSON: EOF"),
        (b'{"version": 1', "Invalid JSON: EOF"),
        (b'{"nodes": ' + b"[" * 100_000, "Invalid JSON: recursion limit"),
        (b"\xff\xfe\xff", "is not UTF-8 text"),
        (b"{}\0", "is not text"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_bytes(content)
    with pytest.raises(InvalidClusterFile) as caught:
        load_cluster(path)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_cluster_file_may_come_from_windows(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "CLUSTER.JSON"
    text = ClusterFile.of(CLUSTER, [STANDS]).model_dump_json(exclude_none=True)
    path.write_bytes(text.replace("{", "{\r\n", 1).encode(encoding))
    assert CLUSTER.nodes == load_cluster(path).snapshot().nodes


@pytest.mark.parametrize(
    "fields",
    [
        {"gpu_memory_gib": 1e300},
        {"constraints": {"memory_gib_per_gpu": 1e308}},
        {"constraints": {"cpus_per_gpu": 1e308}},
    ],
)
def test_amounts_beyond_all_bounds_are_refused_in_what_stands(fields: dict[str, Any]) -> None:
    file = lying(held={})
    file["deployments"][0]["deployment"] |= fields
    with pytest.raises((InvalidClusterFile, ValidationError), match="too large|deployments.0"):
        ClusterFile.model_validate(file).snapshot()


def test_shares_of_one_gpu_may_stand_beside_each_other() -> None:
    file = both_hold({"gpus": [0], "share": 600}, {"gpus": [0], "share": 400})
    assert len(ClusterFile.model_validate(file).snapshot().nodes) == 1
    shared = lying(held={"gpus": [0], "share": 600}, rests={"0": 400})
    assert len(ClusterFile.model_validate(shared).snapshot().nodes) == 1


def test_shares_of_several_gpus_survive_their_file_and_leave_the_rest_to_others() -> None:
    held = {"gpus": [0, 1], "shares": [600, 1000], "ranks": [0, 1, 2]}  # ranks 0 and 2 share GPU 0
    file = ClusterFile.model_validate(lying(held=held, rests={"0": 400}))
    again = ClusterFile.model_validate_json(file.model_dump_json(exclude_none=True))
    assert again == file and len(again.snapshot().nodes) == 1
    [replica] = again.held()["d"].replicas
    assert (replica.taken, replica.planned().taken) == ({0: 600, 1: 1000}, {0: 600, 1: 1000})
    group = {"bundles": [{"GPU": 0.2}] * 2}
    asked = Deployment.recorded(
        {"name": "g", "model": "m", "runtime": "python", "owner": "caller", "placement_group": group}
    )
    [plan] = plan_deployments(again.snapshot(), again.held(), [asked])
    [one] = plan.assignments
    assert (one.gpus, one.shares, one.share) == ([0], [0.4], 1.0)


def test_what_a_file_says_of_a_node_can_be_shown_on_a_terminal() -> None:
    odd = "a\x1b[2J\nb"
    [node] = ClusterFile.model_validate(lying(name=odd, problem=odd)).snapshot().nodes
    assert ("a?[2J?b", "a?[2J?b") == (node.name, node.problem)


@pytest.mark.parametrize(
    ("model", "held", "runtime"),
    [
        ("mistral-large", {"gpus": [0, 1]}, "mistralrs"),  # refused today, if nothing is declared
        ("gpt-5", {"gpus": [0, 1]}, "vllm"),  # what earlier versions took it for
        ("gpt-5", {"egress_resource": "egress", "egress_units": 1}, "openai"),
        ("azure/gpt-4o", {"gpus": [0]}, "vllm"),
        ("llama", {"gpus": [0]}, "vllm"),
        ("gpt-4o", {"egress_resource": "egress", "egress_units": 1}, "openai"),
    ],
)
def test_what_stands_runs_on_what_it_was_placed_for(model: str, held: dict[str, Any], runtime: str) -> None:
    file = lying(held=held)
    fields: dict[str, Any] = {"model": model} | ({"gpus": len(held["gpus"])} if "gpus" in held else {})
    file["deployments"][0]["deployment"] |= fields
    again = ClusterFile.model_validate_json(json.dumps(file), context=STANDS_ALREADY)
    assert again.deployments[0].deployment.runtime_name == runtime


def test_a_replica_on_a_node_that_is_no_more_may_stand() -> None:
    file = ClusterFile.model_validate(lying(held={"node": "gone", "gpus": [9]}))
    assert ["d"] == list(file.held()) and len(file.snapshot().nodes) == 1


def deployment(name: str, **fields: Any) -> Deployment:
    return Deployment.model_validate({"name": name, "model": "m", **fields})


def test_what_stands_stays_and_what_shrinks_makes_room() -> None:
    held = {"old": STANDS}
    [same] = plan_deployments(CLUSTER, held, [STANDS.deployment])
    assert (same.standing, [a.gpus for a in same.assignments]) == (True, [[2, 3]])
    [grown] = plan_deployments(CLUSTER, held, [deployment("old", gpus=2, replicas=2)])
    assert [(a.node_name, a.gpus) for a in grown.assignments] == [("a", [2, 3]), ("b", [2, 3])]
    # another shape takes the room of what it replaces, where there is none beside it
    with pytest.raises(NotEnoughGpus):
        plan_deployments(
            CLUSTER, {}, [deployment("old", gpus=3, constraints={"gpu_nodes": ["a"]})], atomic=True
        )
    [replaced] = plan_deployments(
        CLUSTER, held, [deployment("old", gpus=3, constraints={"gpu_nodes": ["a"]})]
    )
    assert [a.gpus for a in replaced.assignments] == [[0, 2, 3]]


def test_the_plan_says_how_fast_it_is() -> None:
    [planned] = plan_deployments(CLUSTER, {}, [deployment("new", gpus=2)])
    [assignment] = planned.assignments
    assert (assignment.gpus, assignment.bandwidth_gb_per_s, assignment.weakest_link) == (
        [2, 3],
        230.4,
        "NV12",
    )


def test_an_explanation_ends_with_the_refusal() -> None:
    wanted = [deployment("fits", gpus=2), deployment("does-not", gpus=2), deployment("never-asked", gpus=1)]
    first, second = explain_deployments(CLUSTER, {}, wanted)
    assert (first.deployment, first.refusal) == ("fits", None)
    assert second.plan is None
    assert second.refusal is not None and "needs 2 GPUs free on one node" in second.refusal
    stages = {stage.name: stage.excluded for stage in second.explanation.stages}
    assert stages["free GPUs"] == {"has fewer than 2 GPUs free": 2}
    assert stages["health"] == {"is ill": 1}
    assert second.explanation.advice.startswith("release something")


def test_constraints_must_name_nodes_that_are_there() -> None:
    with pytest.raises(UnknownNode, match="nowhere"):
        plan_deployments(CLUSTER, {}, [deployment("d", constraints={"gpu_nodes": ["nowhere"]})])


def test_instances_survive_their_file_and_are_planned_with() -> None:
    slots = dict(enumerate(["1g.10gb", "1g.10gb", "?"]))
    shape = topologies.load("a100-mig-4x")
    node = Node("id-m", "m", topology=shape, free=frozenset({11, 12}), slots=slots, instances={1: "1g.10gb"})
    text = ClusterFile.of(Snapshot([node]), []).model_dump_json()
    again = ClusterFile.model_validate_json(text).snapshot()
    assert again.nodes == (node,)
    small = Deployment(name="small", model="m", mig="1g.10gb")
    pair = Deployment(name="pair", model="m", gpus=2)
    plans = plan_deployments(again, {}, [small, pair])
    assert [(plan.assignments[0].gpus, plan.assignments[0].mig) for plan in plans] == [
        ([1], "1g.10gb"),
        ([11, 12], ""),
    ]
