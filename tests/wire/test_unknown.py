"""Fields that there are not: what was meant is said, wherever they were written, and never their values."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from placement.errors import InvalidDeployment
from placement.wire.deployment import Deployment
from placement.wire.files import load_model, parse_deployments, parse_model
from placement.wire.workload import MixFile

SECRET = "sk-planted-81f2"
MEANT = [
    ("tensor_parallel_size", "did you mean tensor_parallel?"),
    ("tensor-parallel-size", "did you mean tensor_parallel?"),
    ("tensorParallelSize", "did you mean tensor_parallel?"),
    ("pipeline_parallel_size", "did you mean pipeline_parallel?"),
    ("gpu_memory_utilization", "it belongs in runtime_config.options, which the engine gets as it is"),
    ("max_model_len", "it belongs in runtime_config.options, which the engine gets as it is"),
    ("GPUs", "did you mean gpus?"),
    ("GPUS", "did you mean gpus?"),
    ("num_gpus", "did you mean gpus?"),
    ("num_replicas", "did you mean replicas?"),
    ("replica", "did you mean replicas?"),
    ("model_id", "did you mean model?"),
    ("modelName", "did you mean model?"),
    ("max_concurrency", "did you mean serving.max_concurrent?"),
    ("max_concurrent", "did you mean serving.max_concurrent?"),
    ("accelerators", "did you mean constraints.accelerators?"),
    ("gpu_type", "did you mean constraints.accelerators?"),
    ("api_base", "did you mean runtime_config.base_url?"),
    ("api_key", "did you mean runtime_config.api_key?"),
    ("min_bandwith_gb_per_s", "did you mean min_bandwidth_gb_per_s?"),
    ("constrains", "did you mean constraints?"),
    ("runtime_config.apiBase", "did you mean base_url?"),
    ("runtime_config.max_model_len", "it belongs in runtime_config.options, which the engine gets as it is"),
    ("runtime_config.gpus", "did you mean the deployment's own gpus?"),
    ("runtime_config.api_key.env", "did you mean from_env?"),
    ("constraints.gpu_type", "did you mean accelerators?"),
    ("constraints.acelerators", "did you mean accelerators?"),
    ("constraints.spread.maximum", "known here: label, max"),
    ("serving.concurrency", "did you mean max_concurrent?"),
    ("budget.usd_a_day", "did you mean usd_per_day?"),
]


def fields(path: str) -> dict[str, Any]:
    """A deployment with a field of that name, whose value is a secret."""
    *outer, last = path.split(".")
    found: dict[str, Any] = {last: SECRET}
    for part in reversed(outer):
        found = {part: found | ({"label": "x"} if part == "spread" else {})}
    return {"name": "d", "model": "m", **found}


def refusals(wanted: dict[str, Any]) -> dict[str, str]:
    """What is said in YAML, in TOML, of a dict, and where Python makes one."""
    text = yaml.safe_dump({"deployments": [wanted]})
    toml = "[[deployments]]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in wanted.items())
    assert tomllib.loads(toml) == yaml.safe_load(text)
    said = {}
    for way, read in {
        "yaml": lambda: parse_deployments(text, ".yaml", "f"),
        "toml": lambda: parse_deployments(toml, ".toml", "f"),
        "dict": lambda: parse_model(Deployment, wanted, "f"),
        "python": lambda: Deployment(**wanted),
    }.items():
        with pytest.raises((InvalidDeployment, ValidationError)) as refused:
            read()
        said[way] = str(refused.value)
    return said


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(inner)}' for key, inner in value.items()) + "}"
    return f'"{value}"'


@pytest.mark.parametrize(("path", "sentence"), MEANT)
def test_what_was_meant_is_said_in_files_in_dicts_and_in_python(path: str, sentence: str) -> None:
    for way, said in refusals(fields(path)).items():
        assert sentence in said, way
        assert path in said, way
        assert SECRET not in said, way
        assert "unknown field" in said, way


def test_where_nobody_can_tell_nothing_is_guessed() -> None:
    assert not [said for said in refusals(fields("zzz")).values() if "did you mean" in said]


def test_all_that_is_wrong_is_still_said_at_once() -> None:
    wanted = {"model": "", "replicas": 0, "num_gpus": 2, "runtime_config": {"api_key": SECRET, "x": 1}}
    with pytest.raises(InvalidDeployment) as refused:
        parse_model(Deployment, wanted, "f")
    assert sorted(problem.split(";")[0] for problem in refused.value.problems) == [
        "model: is empty",
        "name: is missing",
        "replicas: 0 is too small",
        "runtime_config.api_key: must not hold a key",
        "unknown field 'num_gpus'",
        "unknown field 'runtime_config.x'",
    ]
    assert SECRET not in str(refused.value)


def test_a_workload_says_it_too(tmp_path: Any) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text("arrival: 3\nmix: [{gpus: 1}]")
    with pytest.raises(
        InvalidDeployment, match="unknown field 'arrival'; did you mean arrivals[?] Known here: arrivals"
    ):
        load_model(MixFile, file)
