"""No traceback from any file: real files of every kind, damaged at random, through every reader and command.

What comes out is a result, or one of this package's own errors in one line for each problem.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.cli.main import main
from placement.core.matrix import render_matrix
from placement.core.node import Node
from placement.core.snapshot import Snapshot
from placement.wire.cluster import ClusterFile
from placement.wire.deployment import Deployment
from placement.wire.held import HeldDeployment, HeldReplica

ROOT = Path(__file__).parents[2]

TOML = (ROOT / "examples" / "deployments.toml").read_bytes()
YAML = b"""# a comment
deployments:
- &base {name: llama, model: meta-llama/Llama-3.1-8B, gpus: 2, replicas: 2, runtime_config: {options: {a: [1, 2.5]}}}
- name: small
  model: m
  gpus: 0.25
  constraints: {accelerators: [A100], spread: {label: zone, max: 1}, min_compute_capability: "8.0"}
- {<<: *base, name: remote, model: gpt-4o, gpus: null, runtime_config: null, serving: {max_concurrent: 4}}
"""
MIX = b"""arrivals = 12
load = 0.5

[[mix]]
name = "small"
gpus = 0.5
weight = 3
mean_minutes = 10

[[mix]]
gpu_memory_gib = 24.0
constraints = { accelerators = ["A100"], cpus_per_gpu = 2.5, memory_gib_per_gpu = 8 }

[[mix]]
tensor_parallel = 2
pipeline_parallel = 2
"""
TRACE = b"""arrive_seconds,depart_seconds,name,model,gpus,replicas,accelerators,serving
0,100,a,m,1,2,A100|H100,
5.5,60,b,gpt-4o,,1,,"{""max_concurrent"": 8}"
9,,c,m,0.25,1,,
"""
PODS = b"""name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time
p0,4000,1024,1,460,T4|P100,LS,Running,100,160,101.0
p1,8000.0,2048,8,1000,,BE,Running,120,,
p2,1000,512,0,0,,LS,Pending,130,140,
"""
NODES = b"""sn,cpu_milli,memory_mib,gpu,model
n0,64000,262144,2,P100
n1,96000,786432,8,G2
n2,32000,131072,0,
"""
MATRICES = [path.read_bytes() for path in sorted((ROOT / "tests" / "field").glob("*.txt"))] + [
    render_matrix(topologies.load("dgx-a100")).encode()
]
MIG = topologies.facts("a100-mig-4x")
CLUSTER = (
    ClusterFile.of(
        Snapshot(
            [
                Node("id-a", "a", "10.0.0.1", topologies.load("a100-pcie-4x"), frozenset({0, 1}), rests={2: 500},
                     gpu_memory_bytes=80 << 30, free_memory={0: 1 << 36}, cpu_milli=64000, memory_bytes=1 << 38,
                     accelerators=frozenset({"A100"}), labels={"zone": "x"}, compute_capability=(8, 0),
                     deployments={"llama": 1}),
                Node("id-m", "m", topology=MIG.topology(), free=frozenset({11, 12}), slots=MIG.slots,
                     instances={1: "1g.10gb"}, gpu_memory_bytes=80 << 30),
                Node("id-e", "e", egress={"egress": 64}, serving={("openai", "0123456789abcdef"): 1}),
            ]
        ),
        [
            HeldDeployment(
                deployment=Deployment(name="llama", model="m", gpus=1),
                replicas=(HeldReplica(replica_index=0, node="id-a", gpus=(3,)),),
            )
        ],
    )
    .model_dump_json(exclude_none=True, indent=1)
    .encode()
)  # fmt: skip

TOKENS = [
    b"nan", b"-1", b"0", b"1e308", b"1e-320", b"9" * 400, b"9" * 5000, b"2.0", b"null", b"true", b'"', b"'", b"{", b"[",
    b"[" * 2000, b"{a: " * 300, b"a." * 300, b"*base", b"&base ", b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\t",
    b"\r\n", b"\n", b"|", b">", b",", b";", b": ", b"\x1b[31m", b"GPU0 ", b"X", b"NV99", b"N/A", b"Legend:",
    b"2001-99-99", b"!!int x", b"inf", b"[a]", b"A" * 3000, b"\xe2\x80\x8b", b"\xc2\xa0", b"\xd9\xa0",
]  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with up to four pieces cut, doubled, moved or put in; or in another encoding."""
    content = whole
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        end = min(len(content), at + draw(st.integers(0, 60)))
        match draw(st.sampled_from(["cut", "double", "put", "replace", "end", "swap", "number"])):
            case "cut":
                content = content[:at] + content[end:]
            case "double":
                content = content[:end] + content[at:]
            case "put":
                content = content[:at] + draw(st.sampled_from(TOKENS)) + content[at:]
            case "replace":
                content = content[:at] + draw(st.sampled_from(TOKENS)) + content[end:]
            case "end":
                content = content[:at]
            case "swap":
                lines = content.split(b"\n")
                one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
                lines[one], lines[other] = lines[other], lines[one]
                content = b"\n".join(lines)
            case "number":
                digits = [i for i, byte in enumerate(content) if byte in b"0123456789"]
                if digits:
                    at = draw(st.sampled_from(digits))
                    content = content[:at] + draw(st.sampled_from(TOKENS[:8])) + content[at + 1 :]
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-16", "utf-16-be"]))
    return content if encoding == "utf-8" else content.decode(errors="replace").encode(encoding)


def run(*arguments: str) -> None:
    """Runs a command, which must end with a result or with a message, and print no number that JSON has not."""
    result = CliRunner().invoke(main, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2)
    if result.exit_code:
        assert "error" in result.stderr
        assert "Traceback" not in result.stderr
        said = result.stderr
        if "--json" in arguments:  # which says it twice: as people read it, and by its fields
            said = json.loads(said.splitlines()[-1])["error"]["message"]
        assert max(map(len, said.splitlines())) < 2000
    elif "--json" in arguments:
        json.loads(result.stdout, parse_constant=pytest.fail)


KINDS = {
    **{f"matrix {i}": ("m.txt", content) for i, content in enumerate(MATRICES)},
    "deployments, TOML": ("d.toml", TOML),
    "deployments, YAML": ("d.yaml", YAML),
    "cluster": ("c.json", CLUSTER),
    "mix": ("m.toml", MIX),
    "trace": ("t.csv", TRACE),
    "pods": ("p.csv", PODS),
    "nodes": ("n.csv", NODES),
}


def commands(kind: str, path: Path, beside: Path) -> list[list[str]]:
    """The commands that read a file of a kind, with sound files beside it."""
    file, cluster, wanted = str(path), str(beside / "c.json"), str(beside / "d.yaml")
    trace = str(beside / "t.csv")
    match kind.split()[0].rstrip(","):
        case "matrix":
            return [["topology", "--file", file], ["topology", "--file", file, "--json"]]
        case "deployments":
            return [
                ["plan", file, "--file", cluster, "--json"],
                ["plan", file, "--file", cluster, "--explain"],
            ]
        case "cluster":
            return [
                ["plan", wanted, "--file", file, "--json"],
                ["plan", wanted, "--file", file, "--explain", "--json"],
                ["simulate", trace, "--cluster", file, "--json"],
            ]
        case "nodes":
            return [["simulate", trace, "--cluster", file, "--json"]]
    arguments = ["simulate", file, "--arrivals", "12", "--cluster"]
    return [[*arguments, cluster, "--json"], [*arguments, "a100-mig-4x=1", "--policy", "fragmentation"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in KINDS.values():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_sound_before_it_is_damaged(kind: str, folder: Path) -> None:
    name, content = KINDS[kind]
    path = folder / f"whole-{name}"
    path.write_bytes(content)
    for arguments in commands(kind, path, folder):
        run(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused(kind: str, folder: Path, data: st.DataObject) -> None:
    name, content = KINDS[kind]
    path = folder / f"damaged-{name}"
    path.write_bytes(data.draw(damaged(content)))
    for arguments in commands(kind, path, folder):
        run(*arguments)
