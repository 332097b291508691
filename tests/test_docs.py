"""That the documentation says what is: the parts made from the code, links, errors, and every code block."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import placement
from placement import Deployment, Group, errors
from placement.cli.main import main
from placement.cli.simulate import cluster_of
from placement.core.snapshot import Snapshot
from placement.wire.cluster import ClusterFile
from placement.wire.files import parse_deployments, parse_model
from placement.wire.workload import load_workload
from scripts import reference
from tests.documents import BLOCKS, PAGES, ROOT, Block, anchors
from tests.test_public_api import DEFINED

DOCS = ROOT / "docs"


# -- made from the code ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", reference.pages())
def test_what_is_made_from_the_code_is_current(page: str) -> None:
    assert reference.pages()[page] == (DOCS / page).read_text(), "run `python -m scripts.reference`"


BESIDE: dict[str, dict[str, Any]] = {
    "memory_gib": {"cpus": 4},
    "min_bandwidth_gb_per_s": {"gpus": 2},
    "within": {"gpus": 2},
    "runtime_config": {"model": "gpt-4o"},
    "constraints.cpu_nodes": {"cpus": 4},
    "constraints.egress_nodes": {"model": "gpt-4o"},
    "constraints.egress_preference": {"model": "gpt-4o"},
    "runtime_config.runtime": {"model": "any"},
    "runtime_config.transport": {"runtime": "custom", "cpus": 4},
    "runtime_config.provider": {"runtime": "custom", "runtime_config": {"transport": "remote_network"}},
    "runtime_config.api_key": {"model": "gpt-4o"},
    "runtime_config.base_url": {"model": "gpt-4o"},
    "runtime_config.api_key.from_env": {"model": "gpt-4o"},
    "runtime_config.api_key.from_file": {"model": "gpt-4o"},
    "constraints.spread.max": {"constraints": {"spread": {"label": "zone"}}},
}
"""Fields that mean something only beside others."""


@pytest.mark.parametrize(
    ("path", "name", "field"), list(reference.fields()), ids=lambda one: one if isinstance(one, str) else ""
)
def test_every_field_is_described_and_its_examples_are_accepted(path: str, name: str, field: Any) -> None:
    assert field.description, "say what it means"
    assert field.examples, "give an example"
    for example in field.examples:
        declared: dict[str, Any] = {"name": "d", "model": "org/m", **BESIDE.get(path + name, {})}
        if path == "groups.":
            whole = {"name": "g", "members": {"prefill": 1, "decode": 2}, name: example}
            assert parse_model(Group, whole, "example")
            continue
        if path == "groups.links.":
            link = {"between": ["prefill", "decode"], "via": "pcie", name: example}
            assert parse_model(
                Group, {"name": "g", "members": {"prefill": 1, "decode": 2}, "links": [link]}, "example"
            )
            continue
        inner = declared
        for part in path.split(".")[:-1]:
            inner = inner.setdefault(part, {})
        inner[name] = example
        assert parse_model(Deployment, declared, "example")


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: placement\.(\w+)$", (DOCS / "reference" / "python.md").read_text(), re.M)
    public = {name for name in placement.__all__ if name[0] != "_" and not hasattr(errors, name)}
    assert public == set(listed) - {"errors"}


def test_every_state_and_event_that_is_told_is_explained() -> None:
    told = set()
    for module in (ROOT / "placement" / "runtime").glob("*.py"):
        told |= set(re.findall(r'feed\.add\([^"\n]*"([a-z ]+)"', module.read_text()))
    assert told, "the events are told elsewhere now"
    explained = set(re.findall(r"^\| `([a-z ]+)` \|", (DOCS / "events.md").read_text(), re.M))
    assert {*told, "placed", "pending", "lost"} <= explained


# -- errors ----------------------------------------------------------------------------------------

NODE = errors.UnknownNode("constraints.gpu_nodes", "gpu-x", ("gpu-a", "gpu-b"))
SAMPLES = [
    errors.InvalidDeployment(
        "deployments.toml",
        ("deployment 1 (llama): unknown field 'gpu'; did you mean gpus? Known here: name, model, ...",),
    ),
    errors.InvalidClusterFile(
        "--cluster: 'dgx' is not a file and not MACHINE=COUNT; write dgx-h100=4,l40s-4x=8"
    ),
    errors.InvalidMeasurement(
        "nccl.txt",
        "has no line `# Rank 0 ... device ...`; give the whole output of all_reduce_perf, unchanged",
    ),
    errors.MatrixError(3, "GPU2 has 3 links"),
    errors.UnknownTopology("dgx-9", ("dgx-1p", "dgx-1v"), "label placement/topology of node gpu-a"),
    errors.ReservationFailed("llama", "gpu-a", 12, "GPU 2 was taken by another"),
    errors.DeploymentConflict("llama", {"gpus": ("2", "4")}),
    errors.GroupStands("pd", "prefill", "its replicas would have to move (gpus)"),
    errors.UnknownDeployment("lama", ("llama", "whisper")),
    NODE,
    errors.UnknownGpu("constraints.gpus", 9, ("0-7 (gpu-a)", "0-3 (gpu-b)")),
    errors.UnreadableRecord("llama", "its record has version 9", True),
    errors.MissingSecret("runtime_config.api_key.from_env", "OPENAI_API_KEY", "is not set"),
    errors.Busy("calls that change deployments", 4096),
    errors.PartlyApplied({"llama": NODE.to_dict()}, ("whisper",)),
    errors.LeaseExpired("llama", "its placement group did not come in time"),
    errors.CannotMeasure("gpu-a", "one of its GPUs is free, and two are needed; release some, or wait"),
    errors.NoCollectiveLibrary(
        "gpu-a",
        "its workers cannot import torch (No module named 'torch'); `pip install torch` in their Python",
    ),
    errors.ServiceDiffers("127.0.0.2:6379", {"near": ("zone,rack", "block")}),
    errors.UnsupportedRay("2.49.2", "ray[default]>=2.52,<2.61", "it is too old"),
    errors.ServiceNotRunning("127.0.0.2:6379"),
    errors.ClusterUnreachable("127.0.0.2:6379", "refused"),
]
REFUSALS: dict[type[errors.PlacementError], str] = {
    errors.Unplaceable: "gpus = 1\nconstraints = { cpus_per_gpu = 999 }",
    errors.NoGpuNodes: 'constraints = { accelerators = ["H100"] }',
    errors.NotEnoughGpus: "gpus = 11",
    errors.BelowFloor: "gpus = 4\nmin_bandwidth_gb_per_s = 600",
    errors.NoCpuNodes: "cpus = 400",
    errors.NoEgressNodes: 'runtime = "anthropic"',
    errors.NotEnoughEgress: 'runtime = "openai"\nserving = { max_concurrent = 16 }',
}
"""What the planner refuses on the cluster of :func:`_explained`."""


def entry(code: str) -> tuple[str, str]:
    """The message and the text that a code has in docs/errors.md."""
    text = (DOCS / "errors.md").read_text()
    found = re.search(rf"^### {code}\n\n```text\n(.*?)\n```\n\n(.*?)(?=^### |\Z)", text, re.M | re.S)
    assert found, f"docs/errors.md has no entry for {code}"
    return found[1], found[2]


def test_every_error_has_an_entry() -> None:
    assert {type(sample) for sample in SAMPLES} | set(REFUSALS) == DEFINED - {errors.PlacementError}
    for kind in DEFINED - {errors.PlacementError}:
        assert len(entry(kind.code)[1]) > 60, "say the cause and the fix"


def test_troubleshooting_leads_from_the_words_of_refusals_and_reasons_as_they_are() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    assert [kind.code for kind in REFUSALS if f"errors.md#{kind.code}" not in text] == []
    code = [path for folder in ("core", "runtime") for path in (ROOT / "placement" / folder).glob("*.py")]
    # What these two pages show is compared with what is printed.
    said = "".join(path.read_text() for path in (*code, DOCS / "errors.md", DOCS / "tutorial.md"))
    _, refusals, reasons, _ = re.split(r"^## (?:A refusal|It waits|The cluster has)", text, flags=re.M)[:4]
    words = [
        quoted
        for part in (refusals, reasons)
        for row in re.findall(r"^\| (`.*?) \|", part, re.M)
        for quoted in re.findall("`(.*?)`", row)
    ]
    assert len(words) > 25
    parts = {
        part.strip(" ,;:'")
        for quoted in words
        for part in re.split(r"\bN\b|\bM\b|\b[XP]\b|\b600\b|\.\.\.|'nvlink'", quoted)
    }
    assert [part for part in parts if len(part) > 5 and part not in said] == []


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: error.code)
def test_the_words_of_an_error_lead_to_its_entry(error: errors.PlacementError) -> None:
    assert str(error) == entry(error.code)[0]


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.code)
def test_the_words_of_a_refusal_lead_to_its_entry(kind: type[errors.PlacementError], tmp_path: Path) -> None:
    _explained(tmp_path)
    (tmp_path / "one.toml").write_text(
        f'[[deployments]]\nname = "llama"\nmodel = "org/llama"\n{REFUSALS[kind]}\n'
    )
    told = shown(["placement plan --atomic --json --file cluster.json one.toml"], tmp_path).splitlines()[-1]
    error = json.loads(told)["error"]
    assert (error["code"], error["message"]) == (kind.code, entry(kind.code)[0])


# -- links -----------------------------------------------------------------------------------------

LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target, anchor in LINK.findall(text):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), f"{target}#{anchor}"


def test_no_page_of_the_site_loads_anything_from_elsewhere() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert (settings["strict"], settings["theme"]["font"]) == (True, False)
    assert all(
        (DOCS / one).is_file() for one in settings.get("extra_css", []) + settings.get("extra_javascript", [])
    )
    assert [page for page in PAGES if "```mermaid" in page.read_text()] == [], (
        "Material fetches what draws these"
    )


# -- code blocks -----------------------------------------------------------------------------------


def of(*languages: str) -> Any:
    found = [block for block in BLOCKS if block.language in languages]
    assert found
    return pytest.mark.parametrize("block", found, ids=str)


def test_every_block_says_its_language() -> None:
    known = {"python", "toml", "yaml", "json", "console", "sh", "text"}
    assert [(str(block), block.language) for block in BLOCKS if block.language not in known] == []


@of("toml", "yaml")
def test_what_is_declared_on_a_page_is_accepted(block: Block, tmp_path: Path) -> None:
    content = tomllib.loads(block.code) if block.language == "toml" else yaml.safe_load(block.code)
    if "mix" in content:
        (tmp_path / "mix.toml").write_text(f"arrivals = 10\nload = 1.0\n{block.code}")
        load_workload(tmp_path / "mix.toml")
        return
    if "groups" in content and "deployments" not in content:
        members = {name for group in content["groups"] for name in group["members"]}
        content["deployments"] = [{"name": name, "model": "org/m"} for name in sorted(members)]
    if "deployments" in content:
        assert parse_deployments(yaml.safe_dump(content), ".yaml", str(block))
    else:
        assert block.mark.startswith("not read: "), "say what reads it"


@of("json")
def test_json_is_json(block: Block) -> None:
    assert json.loads(block.code)


@of("sh", "console")
def test_commands_can_be_typed_so(block: Block) -> None:
    typed = block.commands if block.language == "console" else [block.code]
    assert typed
    for command in typed:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command
        for part in re.split(r"\s(?:&&|\|)\s|\s--\s", command):
            words = shlex.split(part, comments=True)
            if words[:1] == ["placement"] and len(words) > 1:
                arguments = [word for word in words[2:] if not re.match(r"[<>]", word)]
                end = next(
                    (i for i, word in enumerate(words[2:]) if re.match(r"\d?[<>]", word)), len(arguments)
                )
                main.commands[words[1]].make_context(words[1], words[2 : 2 + end])


@of("python")
def test_python_is_run_or_says_why_not(block: Block) -> None:
    compile(block.code, str(block), "exec")
    assert block.mark == "run" or re.fullmatch(r"not run: .{10,}", block.mark), str(block)


def _explained(folder: Path) -> None:
    """Of three kinds of nodes one has too few GPUs free, one has them in pairs, one has them together."""
    kinds = [
        cluster_of("dgx-1v=1").nodes[0],
        cluster_of("a100-pcie-4x=1").nodes[0],
        cluster_of("dgx-1p=1").nodes[0],
    ]
    kinds[0] = replace(kinds[0], free=frozenset({0, 1, 2}), egress={"egress_openai": 8})
    nodes = [replace(kinds[i % 3], id=f"gpu-{i:03}", name=f"gpu-{i:03}") for i in range(100)]
    (folder / "cluster.json").write_text(ClusterFile.of(Snapshot(nodes), ()).model_dump_json())
    (folder / "deployments.toml").write_text(
        '[[deployments]]\nname = "llama"\nmodel = "meta-llama/Llama-3.1-70B-Instruct"\ngpus = 4\nwithin = "nvlink"\n'
    )


def _pairs(folder: Path) -> None:
    """A DGX-1V of which somebody has GPU 0."""
    node = replace(cluster_of("dgx-1v=1").nodes[0], id="dgx", name="dgx", free=frozenset(range(1, 8)))
    (folder / "cluster.json").write_text(ClusterFile.of(Snapshot([node]), ()).model_dump_json())
    (folder / "pairs.toml").write_text(
        '[[deployments]]\nname = "pairs"\nmodel = "org/m"\ntensor_parallel = 2\npipeline_parallel = 3\n'
    )


BEFORE = {"explain": _explained, "pairs": _pairs}
COMPARED = [block for block in BLOCKS if block.mark.startswith("compared: ") and block.mark[10:] in BEFORE]


def test_every_comparison_is_made() -> None:
    marked = {block.mark[10:] for block in BLOCKS if block.mark.startswith("compared: ")}
    assert marked == {*BEFORE, "tutorial", "demo"}, "the last two are in tests/integration/test_documents.py"


@pytest.mark.parametrize("block", COMPARED, ids=str)
def test_a_console_shows_what_the_commands_print(block: Block, tmp_path: Path) -> None:
    BEFORE[block.mark[10:]](tmp_path)
    assert block.code == shown(block.commands, tmp_path)


def shown(commands: list[str], folder: Path, env: dict[str, str] | None = None) -> str:
    """What a console shows of these commands."""
    lines = []
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", f"exec 2>&1; {command}"],
            cwd=folder,
            env=environment() | (env or {}),
            capture_output=True,
            text=True,
        )
        lines += [f"$ {command}", *(line.rstrip() for line in done.stdout.splitlines())]
    return "\n".join(lines) + "\n"


def environment() -> dict[str, str]:
    """In which ``placement`` and ``python`` are those of this test."""
    import os
    import sys

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
