"""The command line without a cluster: help, bad input, exit codes."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import ray
from click.testing import CliRunner, Result

from placement import topologies
from placement.cli.main import main
from placement.core.matrix import render_matrix

MACHINES = Path(__file__).parents[1] / "topologies" / "machines"
NOBODY = ["--address", "127.0.0.9:1"]


def run(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    placement {name}" in result.output
    for parameter in main.commands[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name} is not explained"
    assert "--json" in result.output


def test_help_fits_a_terminal_of_80_columns_with_each_description_in_full() -> None:
    """click cuts what it has no room for."""
    _, *lines = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["--help"]).output.splitlines()
    assert not [line for line in lines if len(line) > 80 or line.endswith("...")]


def test_help_is_instant_and_lists_the_exit_codes() -> None:
    code = (
        "import sys\nfrom placement.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('ray', 'pydantic', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    for line in ("0    done", "1    refused", "2    bad input", "3    no Ray cluster", "130  interrupted"):
        assert line in done.stdout


@pytest.mark.parametrize("command", ["apply", "plan"])
def test_a_bad_file_is_refused_before_any_cluster_is_asked(command: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("deployments: [{name: a, model: m, gpus: 0}, {name: a, model: '', replica: 2}]")
    result = run(command, str(file), *NOBODY)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "deployment 1 (a): gpus: 0 is too small; use at least 1" in result.stderr
    assert "deployment 2 (a): unknown field 'replica'" in result.stderr
    missing = run(command, str(tmp_path / "none.toml"), *NOBODY)
    assert missing.exit_code == 2
    assert "cannot be read: No such file or directory; check the path" in missing.stderr


@pytest.mark.parametrize(
    "args", [["up"], ["status"], ["topology"], ["release", "x"], ["down"], ["dashboard", "--port", "0"]]
)
def test_no_cluster_at_the_address_is_said_at_once(args: list[str]) -> None:
    result = run(*args, *NOBODY)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "error: no Ray cluster at 127.0.0.9:1 (Connection refused); start one with" in result.stderr


def test_a_dashboard_where_nobody_can_listen_is_refused_before_any_cluster_is_asked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("dashboard", "--port", str(taken.getsockname()[1]), *NOBODY)
    assert result.exit_code == 2
    assert "Address already in use; choose another --port, or 0 for any that is free" in result.stderr
    elsewhere = run("dashboard", "--host", "192.0.2.1", "--port", "0", *NOBODY)
    assert elsewhere.exit_code == 2 and "check --host" in elsewhere.stderr


def test_an_address_that_is_none_is_said() -> None:
    result = run("status", "--address", "nonsense")
    assert result.exit_code == 3
    assert "no Ray cluster at nonsense (not of the form HOST:PORT)" in result.stderr


def test_of_several_clusters_on_this_machine_none_is_taken_unless_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = ray._private.services
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: frozenset({"127.0.0.9:2", "127.0.0.9:1"}))
    result = run("release", "--all", "--yes")
    assert (result.exit_code, result.stdout) == (3, "")
    assert (
        "error: 2 Ray clusters run on this machine; name one with --address or RAY_ADDRESS: 127.0.0.9:1, 127.0.0.9:2\n"
    ) == result.stderr
    monkeypatch.setattr(services, "find_gcs_addresses", frozenset)
    assert "error: no Ray cluster (RAY_ADDRESS is not set and" in run("status").stderr
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: "127.0.0.9:1")
    assert "no Ray cluster at 127.0.0.9:1 (Connection refused)" in run("status").stderr, (
        "the last that was started"
    )


@pytest.mark.parametrize("address", ["http://127.0.0.9:8265", "https://ray.example"])
def test_the_address_of_a_job_server_is_told_from_that_of_a_head(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    result = run("status")
    assert result.exit_code == 3
    assert f"no Ray cluster at {address} (that is the job server's address, for `ray job submit` only); " in (
        result.stderr
    )
    assert "or name another: --address HOST:PORT" in result.stderr


def test_errors_are_json_too_where_json_is_asked_for() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("placement")), "status", "--json", *NOBODY],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert json.loads(done.stderr)["error"]["type"] == "ClusterUnreachable"


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (["topology", "--name", "a", "--node", "b"], "UsageError"),
        (["status", "--nope"], "NoSuchOption"),
        (["apply"], "MissingParameter"),
    ],
)
def test_misuse_is_json_too_where_json_is_asked_for(args: list[str], kind: str) -> None:
    result = run(*args, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert json.loads(result.stderr)["error"]["type"] == kind
    assert run(*args).stderr.startswith("Usage: ")


def test_a_catalogue_machine_is_drawn_without_a_cluster() -> None:
    result = run("topology", "--name", "a100-pcie-4x")
    assert result.exit_code == 0
    assert "NVLink islands: [0-1]  [2-3]" in result.output
    said = (
        "processors: Intel Xeon Platinum 8470  ·  PCIe lanes: not known  ·  peer-to-peer over PCIe: not known"
    )
    assert said in " ".join(result.output.split("\n")[:5])
    report = json.loads(run("topology", "--name", "dgx-1v", "--json").output)
    assert report["nodes"][0]["gpu_count"] == 8


def test_an_unknown_machine_is_refused_with_the_known_ones() -> None:
    result = run("topology", "--name", "dgx-9")
    assert result.exit_code == 2
    assert f"unknown topology 'dgx-9'; use one of: {', '.join(topologies.names())}" in result.stderr


def test_a_matrix_file_is_drawn_or_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "matrix.txt"
    file.write_text("\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tNV4\t X \n")
    assert "NVLink islands: [0-1]" in run("topology", "--file", str(file)).output
    file.write_text("\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tSYS\t X \n")
    refused = run("topology", "--file", str(file))
    assert refused.exit_code == 2
    assert "error: line " in refused.stderr
    assert run("topology", "--file", str(tmp_path / "none")).exit_code == 2


def test_a_drawn_machine_shows_what_is_near(tmp_path: Path) -> None:
    file = tmp_path / "matrix.txt"
    file.write_text(
        "GPU0 GPU1 mlx5_0 mlx5_1 CPU Affinity NUMA Affinity\n"
        "GPU0 X NV4 PIX PIX 0-7 0\n"
        "GPU1 NV4 X SYS NODE 8-15 1-2\n"
    )
    result = run("topology", "--file", str(file), "--gpu", "NVIDIA L4")
    assert result.exit_code == 0
    assert [
        ["2", "x", "NVIDIA", "L4"],
        ["NVLink", "islands:", "[0-1]"],
        ["processors:", "not", "known", "·", "PCIe", "lanes:", "not", "known"],
        ["GPU", "0", "1", "NUMA", "CPUs", "nearest", "NIC"],
        ["0", "X", "NV4", "0", "0-7", "PIX", "mlx5_0", "and", "1", "more"],
        ["1", "NV4", "X", "1-2", "8-15", "NODE", "mlx5_1"],
    ] == [line.removeprefix(str(file)).split() for line in result.output.splitlines() if line.strip(" ─")]
    (node,) = json.loads(run("topology", "--file", str(file), "--gpu", "NVIDIA L4", "--json").output)["nodes"]
    assert ("NVIDIA L4", 2, [[0, 1]], True) == (
        node["gpu_model"],
        node["gpu_count"],
        node["islands"],
        "mlx5_1\tSYS" not in node["matrix"],
    )


@pytest.mark.parametrize(
    "args",
    [
        *(["--name", name] for name in topologies.names()),
        *(["--file", str(file)] for file in sorted(MACHINES.glob("*.txt"))),
    ],
    ids=lambda args: Path(args[1]).stem,
)
def test_every_machine_is_drawn_whole_or_refused_at_a_line(args: list[str]) -> None:
    result = run("topology", *args)
    if result.exit_code == 0:
        assert "…" not in result.output
        rows = [line for line in result.output.splitlines() if " X " in line]
        [node] = json.loads(run("topology", *args, "--json").output)["nodes"]
        instances = [gpu for gpu in (node["facts"] or {"gpus": []})["gpus"] if gpu["mig_profile"]]
        assert node["gpu_count"] - len(instances) == len(rows)
    else:
        assert (2, "") == (result.exit_code, result.stdout)
        assert re.match(r"error: line [1-9]", result.stderr)


def test_a_matrix_can_be_piped_in_and_needs_no_ray() -> None:
    code = (
        "import sys\nfrom placement.cli.main import main\n"
        "try: main(['topology', '--file', '-'])\nexcept SystemExit: pass\n"
        "print('ray' in sys.modules)"
    )
    text = "\tGPU0\tGPU1\nGPU0\t X \tNV4\nGPU1\tNV4\t X \n"
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True)
    assert "stdin  2 GPUs" in done.stdout
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "matrix.txt"
    file.write_bytes(b"\xff\xfeG")
    for args in (["topology", "--file", str(file)], ["topology", "--file", str(tmp_path)]):
        result = run(*args)
        assert (2, "") == (result.exit_code, result.stdout)
        assert "cannot be read: " in result.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--name", "dgx-1v", "--node", "a"], "exclude each other"),
        (["--file", "matrix.txt", "--node", "a"], "exclude each other"),
        (["--file", "matrix.txt", *NOBODY], "leave out --address"),
        (["--name", "dgx-1v", *NOBODY], "leave out --address"),
        (["--name", "dgx-1v", "--gpu", "NVIDIA L4"], "--gpu goes with --file"),
    ],
)
def test_options_that_exclude_each_other_are_refused(args: list[str], said: str) -> None:
    result = run("topology", *args)
    assert result.exit_code == 2
    assert said in result.stderr


CLUSTER: dict[str, Any] = {
    "machines": {
        "pairs": {"matrix": render_matrix(topologies.load("a100-pcie-4x")), "model": "NVIDIA A100 80GB PCIe"}
    },
    "nodes": [
        {"id": f"id-{i:03}", "name": f"gpu-{i:03}", "machine": "pairs", "free": [0, 1, 2, 3]}
        for i in range(100)
    ],
}


@pytest.fixture
def offline(tmp_path: Path) -> list[str]:
    """Arguments of a plan for 100 nodes in a file."""
    (tmp_path / "cluster.json").write_text(json.dumps(CLUSTER))
    (tmp_path / "d.toml").write_text('[[deployments]]\nname = "d"\nmodel = "m"\ngpus = 2\nreplicas = 3\n')
    return ["plan", "--file", str(tmp_path / "cluster.json"), str(tmp_path / "d.toml")]


def test_a_plan_without_a_cluster_is_the_same_to_the_letter(offline: list[str]) -> None:
    first = run(*offline, "--json")
    assert first.exit_code == 0
    [deployment] = json.loads(first.output)["deployments"]
    assert [(a["node_name"], a["gpus"]) for a in deployment["assignments"]] == [
        ("gpu-000", [0, 1]), ("gpu-001", [0, 1]), ("gpu-002", [0, 1]),
    ]  # fmt: skip
    assert run(*offline, "--json").output == first.output
    assert "230 GB/s, NV12" in run(*offline).output


def test_a_plan_without_a_cluster_imports_no_ray(offline: list[str]) -> None:
    script = (
        "import sys\nfrom placement.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code, end\n"
        "strange = [name for name in sys.modules if name.split('.')[0] in ('ray', 'pynvml')]\n"
        "assert not strange, strange\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *offline], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_explain_counts_the_nodes_names_the_nearest_miss_and_says_what_would_help(
    offline: list[str], tmp_path: Path
) -> None:
    fits = run(*offline, "--explain")
    assert fits.exit_code == 0
    assert "d: 100 nodes" in fits.output
    (tmp_path / "d.toml").write_text(
        '[[deployments]]\nname = "d"\nmodel = "m"\ngpus = 4\nwithin = "nvlink"\n'
    )
    refused = run(*offline, "--explain")
    assert refused.exit_code == 1
    assert "100: has no 4 GPUs within 'nvlink', free or not" in refused.output
    assert "nearest miss: gpu-000 has 4 GPUs, but in NVLink islands of 2 + 2" in refused.output
    assert "what would help: add a node with such a set, or ask for within: node" in refused.output
    assert "error: cannot place 'd'" in refused.output
    as_json = run(*offline, "--explain", "--json")
    assert as_json.exit_code == 1
    [explained] = json.loads(as_json.stdout)["deployments"]
    assert explained["plan"] is None
    assert explained["explanation"]["stages"][-1]["excluded"] == {
        "has no 4 GPUs within 'nvlink', free or not": 100
    }


@pytest.mark.parametrize(
    ("cluster", "message"),
    [("{}}", "Invalid JSON"), ('{"version": 7}', "version"), ('{"nodes": 1}', "nodes")],
)
def test_a_bad_cluster_file_is_bad_input(
    cluster: str, message: str, offline: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cluster.json").write_text(cluster)
    refused = run(*offline)
    assert refused.exit_code == 2
    assert message in refused.output and "placement snapshot" in refused.output


def test_a_plan_says_what_each_deployment_runs_on_and_why(offline: list[str], tmp_path: Path) -> None:
    cluster = json.loads((tmp_path / "cluster.json").read_text())
    cluster["nodes"].append({"id": "out", "name": "out", "egress": {"egress": 8}})
    (tmp_path / "cluster.json").write_text(json.dumps(cluster))
    (tmp_path / "d.toml").write_text(
        '[[deployments]]\nname = "a"\nmodel = "gpt-5"\n'
        '[[deployments]]\nname = "b"\nmodel = "llama"\n'
        '[[deployments]]\nname = "c"\nmodel = "gpt-4o"\nruntime = "vllm"\n'
    )
    shown = run(*offline).output
    assert "runtime by the model's name: openai for a; vllm for b\nruntime declared: vllm for c\n" in shown
    for more in ([], ["--explain"]):
        said = json.loads(run(*offline, "--json", *more).stdout)["deployments"]
        plans = [one["plan"] if more else one for one in said]
        assert [(one["runtime"], one["runtime_from"]) for one in plans] == [
            ("openai", "by the model's name"),
            ("vllm", "by the model's name"),
            ("vllm", "declared"),
        ]


def test_a_snapshot_of_what_an_earlier_version_placed_can_be_planned_on(
    offline: list[str], tmp_path: Path
) -> None:
    old = {"name": "old", "model": "m", "pipeline_parallel": 2, "within": "nvlink"}
    held = {
        "deployment": old,
        "replicas": [{"replica_index": 0, "node": "id-000", "gpus": [0, 1], "ranks": [0, 1]}],
    }
    nodes = [{**CLUSTER["nodes"][0], "free": [2, 3]}, *CLUSTER["nodes"][1:]]
    (tmp_path / "cluster.json").write_text(json.dumps({**CLUSTER, "nodes": nodes, "deployments": [held]}))
    assert run(*offline).exit_code == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_matrix_may_come_from_a_file_of_windows(tmp_path: Path, encoding: str) -> None:
    text = "\tGPU0\tGPU1\tibp0ibp1\nGPU0\t X \tPHB\tPIX\tSYS\nGPU1\tPHB\t X \tPIX\tSYS\n"
    file = tmp_path / "topo.txt"
    file.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    result = run("topology", "--file", str(file), "--json")
    [node] = json.loads(result.stdout)["nodes"]
    assert (result.exit_code, node["gpu_count"], node["known"]) == (0, 2, True)
    left_out = "the network cards are ignored, since their names are not separated: 1 of them for 2 columns"
    assert left_out == node["problem"]
    assert " ".join(run("topology", "--file", str(file)).stdout.split()).endswith(left_out)


def test_a_plan_without_a_cluster_says_what_would_wait_and_what_would_end(
    offline: list[str], tmp_path: Path
) -> None:
    declared = {"name": "old", "model": "m", "gpus": 2, "replicas": 2}
    held = {
        "deployment": declared,
        "replicas": [
            {"replica_index": i, "node": f"id-{i:03}", "gpus": [0, 1], "ranks": [0, 1]} for i in range(2)
        ],
    }
    nodes = [{**one, "free": [2, 3] if i < 2 else [0, 1, 2, 3]} for i, one in enumerate(CLUSTER["nodes"])]
    (tmp_path / "cluster.json").write_text(json.dumps({**CLUSTER, "nodes": nodes, "deployments": [held]}))

    def declare(*deployments: dict[str, object]) -> None:
        (tmp_path / "d.yaml").write_text(json.dumps({"deployments": deployments}))

    plan = [*offline[:-1], str(tmp_path / "d.yaml")]
    declare({**declared, "gpus": 1}, {"name": "large", "model": "m", "gpus": 4, "within": "nvlink"})
    shown = run(*plan)
    assert 0 == shown.exit_code, shown.stderr
    first, second, third, *_ = shown.stdout.splitlines()
    assert re.fullmatch(r"-/\+ old: gpus: replicas 0-1 replaced on gpu-\S+.*; ends 4 running workers", first)
    assert "  + large: new, 1 replica" == second
    assert third.startswith("      replica 0 would wait: ")
    refused = run(*plan, "--atomic")
    assert (1, "") == (refused.exit_code, refused.stdout)
    assert "error: cannot place 'large'" in refused.stderr

    declare(declared)
    assert "  = old: unchanged" == run(*plan).stdout.splitlines()[0]
    declare({**declared, "replicas": 1})
    assert (
        "  ~ old: replicas: replica 1 released; ends 2 running workers" == run(*plan).stdout.splitlines()[0]
    )
    declare({"name": "new", "model": "m"})
    assert "  - old: released; ends 4 running workers" == run(*plan, "--prune").stdout.splitlines()[1]
