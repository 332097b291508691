"""``placement simulate``, from the outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from placement.cli import simulate as simulation
from placement.cli.main import POLICIES, main
from placement.cli.simulate import cluster_of
from placement.core.policy import Policy
from placement.errors import InvalidClusterFile, UnknownTopology

MIX = Path(__file__).parents[2] / "examples" / "workloads" / "mix.toml"
ARGUMENTS = ["simulate", str(MIX), "--cluster", "dgx-h100=1,l40s-4x=2", "--arrivals", "60"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_policies_stand_side_by_side() -> None:
    code, out, _ = run(*ARGUMENTS, "--policy", "topology", "--policy", "fragmentation")
    assert code == 0
    head = next(line for line in out.splitlines() if "topology" in line)
    assert head.split() == ["topology", "fragmentation"]
    assert next(line for line in out.splitlines() if line.split()[:1] == ["GPUs"]).split() == [
        "GPUs",
        "16",
        "16",
    ]


def test_json_has_every_moment_and_the_same_seed_gives_the_same() -> None:
    code, out, err = run(*ARGUMENTS, "--json", "--seed", "3")
    assert (code, err) == (0, "")
    [one] = json.loads(out)["simulations"]
    assert one["policy"] == "as declared"
    assert one["placed"] + one["refused"] == 60 == len(one["moments"])
    assert sum(one["refusals"].values()) == one["refused"]
    assert out == run(*ARGUMENTS, "--json", "--seed", "3")[1]
    assert out != run(*ARGUMENTS, "--json", "--seed", "4")[1]


@pytest.mark.parametrize(("ending", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_picture(tmp_path: Path, ending: str, begins: bytes) -> None:
    path = tmp_path / f"gpus.{ending}"
    code, _, err = run(*ARGUMENTS, "--picture", str(path))
    assert (code, err) == (0, f"drawn: {path}\n")
    assert path.read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["nowhere.toml", "--cluster", "dgx-h100=1"], "nowhere.toml: cannot be read", 2),
        ([str(MIX), "--cluster", "dgx-h100"], "'dgx-h100' is not a file and not MACHINE=COUNT", 2),
        ([str(MIX), "--cluster", "dgx-h1000=1"], "dgx-h1000", 2),
        ([str(MIX), "--cluster", "nowhere.json"], "nowhere.json: cannot be read", 2),
        ([str(MIX), "--cluster", "nowhere.csv"], "nowhere.csv: cannot be read", 2),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], says: str, code: int) -> None:
    found, out, err = run("simulate", *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ") and says in err


def test_a_picture_of_another_kind_is_refused_before_anything_is_simulated() -> None:
    code, out, err = run("simulate", "nowhere.toml", "--cluster", "dgx-h100=1", "--picture", "gpus.gif")
    assert (code, out) == (2, "")
    assert "'gpus.gif' ends neither in .svg nor in .png" in err


def test_the_policies_on_offer_are_those_there_are() -> None:
    assert set(POLICIES) == set(Policy)


def test_described_clusters() -> None:
    cluster = cluster_of("a100-mig-4x=1, l40s-4x=2")
    assert [node.name for node in cluster.nodes] == ["a100-mig-4x-00000", "l40s-4x-00000", "l40s-4x-00001"]
    assert cluster.nodes[0].instances and not cluster.nodes[0].free & cluster.nodes[0].instances.keys()
    assert cluster.nodes[1].cpu_milli == 4 * 16_000
    with pytest.raises(InvalidClusterFile, match="names a machine twice"):
        cluster_of("l40s-4x=1,l40s-4x=2")
    with pytest.raises(UnknownTopology):
        cluster_of("toaster=1")


def test_a_node_list_of_the_openb_trace(tmp_path: Path) -> None:
    path = tmp_path / "nodes.csv"
    path.write_text("sn,cpu_milli,memory_mib,gpu,model\nn0,64000,1024,2,P100\n")
    assert [node.name for node in cluster_of(str(path)).nodes] == ["n0"]
    path.write_text("name,gpus\nn0,2\n")
    with pytest.raises(InvalidClusterFile, match="has no columns cpu_milli, gpu"):
        cluster_of(str(path))


EGRESS = '{"version": 1, "nodes": [{"id": "n2", "name": "egress-a", "egress": {"egress": 64}}]}'
CPU_NODES = (
    "sn,cpu_milli,memory_mib,gpu,model\nopenb-node-0000,32000,262144,0,\nopenb-node-0001,32000,262144,0,\n"
)
CPU_PODS = (
    "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
    "openb-pod-0000,16500,51200,0,0,,LS,Running,12627409,12629841,12627410\n"
    "openb-pod-0037,12500,57344,0,0,,LS,Pending,10307338,10307380,\n"
)
REMOTE = 'arrive_seconds,depart_seconds,name,model,serving\n0,100,a,gpt-4o,"{""max_concurrent"": 8}"\n'
LOCAL = "arrive_seconds,depart_seconds,name,gpus\n0,50,a,1\n"


@pytest.mark.parametrize(
    ("workload", "cluster", "content", "placed"),
    [
        (CPU_PODS, "cpunodes.csv", CPU_NODES, 2),
        (REMOTE, "egressonly.json", EGRESS, 1),
        (LOCAL, "egressonly.json", EGRESS, 0),
        (LOCAL, "NODES.CSV", CPU_NODES, 0),
        (LOCAL, "Cluster.JSON", EGRESS, 0),
    ],
)
def test_a_cluster_without_gpus_is_simulated(
    tmp_path: Path, workload: str, cluster: str, content: str, placed: int
) -> None:
    (tmp_path / "w.CSV").write_text(workload)
    (tmp_path / cluster).write_text(content)
    asked = ["simulate", str(tmp_path / "w.CSV"), "--cluster", str(tmp_path / cluster)]
    picture = tmp_path / "gpus.SVG"
    code, out, err = run(*asked, "--picture", str(picture))
    assert (code, err) == (0, f"drawn: {picture}\n")
    assert next(line for line in out.splitlines() if line.split()[:1] == ["GPUs"]).split() == ["GPUs", "0"]
    code, out, _ = run(*asked, "--json")
    assert code == 0
    [one] = json.loads(out, parse_constant=pytest.fail)["simulations"]
    assert (one["gpus"], one["placed"]) == (0, placed)


@pytest.mark.parametrize("content", ["{}", '{"version": 1}', '{"nodes": []}'])
def test_a_cluster_without_nodes_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "w.csv").write_text(LOCAL)
    cluster = tmp_path / "empty.json"
    cluster.write_text(content)
    code, out, err = run("simulate", str(tmp_path / "w.csv"), "--cluster", str(cluster))
    assert (code, out) == (2, "")
    assert err == f"error: {cluster}: has no nodes, so that nothing can be placed; add one under nodes\n"


@pytest.mark.parametrize(
    ("accelerator", "machine"),
    [
        ("A100", "dgx-a100"),
        ("V100", "dgx-1v"),
        ("P100", "dgx-1p"),
        ("T4", "t4-4x"),
        ("H100", "dgx-h100"),
        ("L40S", "l40s-4x"),
        ("A10G", "a10-4x"),
        ("RTX-PRO-6000", "rtx-pro-6000-8x"),
        ("GeForce-RTX-4090", "rtx-4090-8x"),
        ("A100-SXM4-80GB", "dgx-a100"),
        ("NVIDIA", "dgx-a100"),
    ],
)
def test_a_machine_of_the_catalogue_has_the_names_that_ray_gives_and_the_words_of_its_product(
    tmp_path: Path, accelerator: str, machine: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"arrive_seconds,depart_seconds,name,gpus,accelerators\n0,100,a,1,{accelerator}\n")
    code, out, _ = run("simulate", str(path), "--cluster", f"{machine}=1", "--json")
    [one] = json.loads(out)["simulations"]
    assert (code, one["placed"], one["refusals"]) == (0, 1, {})


def test_a_mix_may_ask_for_a_type_as_ray_names_it(tmp_path: Path) -> None:
    path = tmp_path / "mixacc.toml"
    path.write_text(
        'arrivals = 50\nload = 0.5\n[[mix]]\nname = "llama"\ngpus = 4\n'
        'constraints = { accelerators = ["A100"] }\n[[mix]]\nname = "small"\ngpus = 1\n'
    )
    [report] = simulation.run(path, "dgx-a100=1", (), 0, None, show=False).values()
    assert report.placed > 25
    assert not [reason for reason in report.reasons if "A100" in reason]


def test_it_needs_no_ray() -> None:
    code = (
        "import sys\nfrom placement.cli.main import main\n"
        f"main({ARGUMENTS!r}, standalone_mode=False)\n"
        "strange = [name for name in sys.modules if name.split('.')[0] in ('ray', 'pynvml')]\n"
        "assert not strange, strange"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
