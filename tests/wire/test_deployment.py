"""What a deployment accepts, infers and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from placement.core.needs import NO_GPUS
from placement.errors import InvalidDeployment, MissingSecret
from placement.wire.constraints import PlacementConstraints
from placement.wire.deployment import Deployment
from placement.wire.files import load_deployments, parse_deployments, parse_model
from placement.wire.runtime_config import ApiKey

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "deployments.toml"


@pytest.mark.parametrize(
    ("model", "runtime", "transport", "provider"),
    [
        ("gpt-4o", "openai", "remote_network", "openai"),
        ("gpt-3.5-turbo", "openai", "remote_network", "openai"),
        ("o1-mini", "openai", "remote_network", "openai"),
        ("o3-pro", "openai", "remote_network", "openai"),
        ("chatgpt-4o-latest", "openai", "remote_network", "openai"),
        ("claude-sonnet-4", "anthropic", "remote_network", "anthropic"),
        ("anthropic/claude-3", "anthropic", "remote_network", "anthropic"),
        ("gemini-2.5-pro", "gemini", "remote_network", "gemini"),
        ("google/gemini-flash", "gemini", "remote_network", "gemini"),
        ("litellm/command-r", "litellm", "remote_network", "litellm"),
        ("gpt-4o-via-litellm", "litellm", "remote_network", "litellm"),
        ("mistralai/Mistral-7B", "mistralrs", "local_gpu", None),
        ("meta-llama/Llama-3.1-8B", "vllm", "local_gpu", None),
        ("openai/whisper-large-v3", "vllm", "local_gpu", None),
    ],
)
def test_the_runtime_follows_from_the_models_name(
    model: str, runtime: str, transport: str, provider: str | None
) -> None:
    deployment = Deployment(name="d", model=model)
    assert (deployment.runtime_name, deployment.transport, deployment.provider) == (
        runtime,
        transport,
        provider,
    )


def test_what_is_said_wins_over_what_is_inferred() -> None:
    explicit = Deployment(name="d", model="gpt-4o", runtime="vllm")
    configured = Deployment.model_validate(
        {"name": "d", "model": "gpt-4o", "runtime_config": {"runtime": "candle"}}
    )
    assert (explicit.runtime_name, configured.runtime_name) == ("vllm", "candle")


def test_a_local_replica_takes_one_gpu_by_default_and_a_remote_one_none() -> None:
    local, remote = Deployment(name="d", model="m"), Deployment(name="d", model="gpt-4o")
    assert (local.gpus_per_replica, local.egress_per_replica) == (1, 0)
    assert (remote.gpus_per_replica, remote.egress_per_replica) == (0, 1)


def test_a_custom_runtime_says_its_transport() -> None:
    fields = {"name": "d", "model": "m", "runtime": "custom"}
    local = Deployment.model_validate({**fields, "runtime_config": {"transport": "local_gpu"}})
    remote = Deployment.model_validate(
        {**fields, "runtime_config": {"transport": "remote_network", "provider": "acme"}}
    )
    assert (local.gpus_per_replica, remote.provider) == (1, "acme")
    with pytest.raises(
        ValidationError, match=r'needs runtime_config.transport: "local_gpu", "local_cpu" or "remote_network"'
    ):
        Deployment.model_validate(fields)


def test_cpus_alone_are_a_transport() -> None:
    ort = Deployment(name="d", model="BAAI/bge-m3", runtime="ort", cpus=2.5, memory_gib=4)
    assert (ort.transport, ort.gpus_per_replica, ort.egress_per_replica) == ("local_cpu", 0, 0)
    assert (ort.cpu_milli, ort.memory_bytes, ort.needs, ort.calls) == (2500, 4 << 30, NO_GPUS, None)
    custom = Deployment.model_validate(
        {
            "name": "d",
            "model": "m",
            "runtime": "custom",
            "runtime_config": {"transport": "local_cpu"},
            "cpus": 1,
        }
    )
    assert (custom.transport, custom.remote, custom.cpu_milli) == ("local_cpu", False, 1000)
    vllm = Deployment(name="d", model="meta-llama/Llama-3.1-8B", cpus=16)
    assert (vllm.runtime_name, vllm.transport) == ("vllm", "local_cpu"), "vLLM runs on CPUs, too"


@pytest.mark.parametrize(
    ("more", "same"),
    [
        ({"constraints": {"accelerators": ["H100"], "gpu_nodes": ["x"], "egress_nodes": ["x"]}}, True),
        ({"serving": {"max_concurrent": 4}}, True),
        ({"constraints": {"cpu_nodes": ["x"]}}, False),
        ({"cpus": 3}, False),
        ({"memory_gib": 5}, False),
        ({"cpus": None, "memory_gib": None, "gpus": 1}, False),
    ],
)
def test_the_shape_of_a_cpu_deployment_is_what_decides_where_it_can_sit(
    more: dict[str, Any], same: bool
) -> None:
    fields = {"name": "d", "model": "m", "cpus": 2, "memory_gib": 4}
    before, after = (Deployment.model_validate(one) for one in (fields, {**fields, **more}))
    assert (before.shape() == after.shape()) is same


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"name": ""}, "name: is empty; give the deployment a name"),
        ({"name": "a b"}, "name: 'a b' is not a name Ray groups can carry"),
        ({"name": "../etc"}, "name: '../etc' is not a name Ray groups can carry"),
        ({"name": "x" * 64}, "at most 63 characters"),
        ({"model": " "}, "model: is empty; name the model to serve"),
        ({"replicas": 0}, "replicas: 0 is too small; use a whole number of at least 1"),
        ({"replicas": -2}, "replicas: -2 is too small"),
        ({"replicas": "2"}, "replicas: '2' is not a number"),
        ({"replicas": 10**9}, "replicas: 1000000000 is too large; use at most 100000"),
        ({"gpus": 0}, "gpus: 0 is too small; use at least 1"),
        ({"gpus": -1}, "gpus: -1 is too small"),
        ({"gpus": 1.5}, "gpus: 1.5 GPUs is more than one and not whole, and a share cannot span two GPUs"),
        ({"gpus": 0.0001}, "gpus: 0.0001 is not a share of a GPU; use 0.001 to 0.999"),
        ({"gpus": True}, "gpus: True is not a number"),
        ({"model": "gpt-4o", "gpus": 2}, "gpus: 2 on a remote deployment (openai); leave gpus out"),
        (
            {"mig": "1g.10gb", "gpus": 2},
            "mig: 1g.10gb and gpus: 2 ask for tensor parallelism across MIG instances; MIG instances "
            "have no NVLink and no peer-to-peer access to each other",
        ),
        ({"mig": "1g.10gb", "gpus": 1}, "mig: 1g.10gb are different ways to ask for GPUs; keep one of them"),
        ({"mig": "10gb"}, "mig: '10gb' is not a MIG profile; write one such as 1g.10gb"),
        (
            {"mig": "1g.10gb", "within": "nvlink"},
            "within: nvlink is about the links between a replica's GPUs",
        ),
        (
            {"mig": "1g.10gb", "min_bandwidth_gb_per_s": 10},
            "min_bandwidth_gb_per_s: 10.0 is about the links between a replica's GPUs",
        ),
        (
            {"model": "gpt-4o", "mig": "1g.10gb"},
            "mig: 1g.10gb on a remote deployment (openai); leave mig out",
        ),
        (
            {"runtime": "tgi"},
            "runtime: 'tgi' is no runtime; there are vllm, tensorrt, ort, candle, cudarc, mistralrs, python, openai",
        ),
        (
            {"runtime_config": {"runtime": "tgi"}},
            "runtime_config.runtime: 'tgi' is no runtime; there are vllm",
        ),
        (
            {"runtime": "custom", "runtime_config": {"transport": "LocalTpu"}},
            "runtime_config.transport: 'LocalTpu' is no transport; there are local_gpu, local_cpu, remote_network",
        ),
        (  # which may be a key
            {"runtime": "custom", "runtime_config": {"transport": "sk-1f9c"}},
            "runtime_config.transport: is no transport; there are local_gpu",
        ),
        ({"cpus": 0}, "cpus: 0 is too small; use at least 0.001"),
        (
            {"cpus": 2, "gpus": 1},
            "cpus: 2 is for replicas without GPUs, and gpus asks for GPUs; leave one of them out",
        ),
        ({"cpus": 2, "mig": "1g.10gb"}, "and mig asks for GPUs"),
        ({"cpus": 2, "tensor_parallel": 2}, "and tensor_parallel asks for GPUs"),
        (
            {"cpus": 2, "placement_group": {"bundles": [{"GPU": 1}]}},
            "and placement_group asks for GPUs; leave one of them out, or use constraints.cpus_per_gpu",
        ),
        (
            {"model": "gpt-4o", "cpus": 2},
            "cpus: 2 on a remote deployment (openai); leave cpus out, or set runtime",
        ),
        (
            {"runtime": "tensorrt", "cpus": 2},
            "cpus: 2 with runtime tensorrt, which needs GPUs; ask for gpus, or",
        ),
        (
            {"cpus": 2, "within": "nvlink"},
            "within: nvlink is about the links between a replica's GPUs, and it has no GPUs",
        ),
        ({"memory_gib": 2}, "memory_gib: 2 is for replicas without GPUs, which say cpus as well; add cpus"),
        (
            {"runtime": "custom", "runtime_config": {"transport": "local_cpu"}},
            "runtime_config.transport local_cpu needs cpus: how many each replica takes",
        ),
        (
            {"runtime": "custom", "runtime_config": {"transport": "local_gpu"}, "cpus": 2},
            "cpus: 2 with transport local_gpu; set runtime_config.transport to local_cpu",
        ),
        (
            {"runtime": "ort", "runtime_config": {"transport": "local_cpu"}, "cpus": 2},
            "runtime_config.transport is for runtime custom, not ort (declared); remove it, and set cpus instead",
        ),
        ({"replica": 2}, "unknown field 'replica'; did you mean replicas? Known here: name, model"),
        (
            {"serving": {"concurrency": 2}},
            "unknown field 'serving.concurrency'; did you mean max_concurrent? Known",
        ),
        ({"serving": {"max_concurrent": 0}}, "serving.max_concurrent: 0 is too small"),
        (
            {"runtime_config": {"api_key": {"from_env": "K"}}},
            "runtime_config.api_key is for remote runtimes, not vllm",
        ),
        ({"model": "gpt-4o", "runtime_config": {"api_key": {}}}, "set exactly one of from_env and from_file"),
        ({"constraints": {"gpu_nodes": []}}, "constraints.gpu_nodes: "),
        (
            {"constraints": {"accelerators": ["A" * 254]}},
            "f.yaml: deployment 1 (d): constraints.accelerators.0: String should have at most 253 characters",
        ),
        ({"constraints": {"near_to": ["a" * 5000]}}, "constraints.near_to.0: String should have at most 253"),
        ({"constraints": {"spread": {"label": "a" * 318}}}, "constraints.spread.label: String should have"),
        ({"constraints": {"node_labels": {"a" * 318: "b"}}}, "String should have at most 317 characters"),
        ({"gpu_memory_gib": 4e-10}, "gpu_memory_gib: 4e-10 is too small; use at least 0.001"),
        ({"gpu_memory_gib": 1e300}, "gpu_memory_gib: 1e+300 is too large; use at most 100000"),
        ({"gpu_memory_gib": float("nan")}, "gpu_memory_gib: nan is not a number"),
        ({"gpus": 2, "min_bandwidth_gb_per_s": 1e-4}, "min_bandwidth_gb_per_s: 0.0001 is too small"),
        (
            {"constraints": {"min_free_gpu_memory_gib": 1e-10}},
            "constraints.min_free_gpu_memory_gib: 1e-10 is too small; use at least 0.001",
        ),
        (
            {"constraints": {"memory_gib_per_gpu": 1e-10}},
            "constraints.memory_gib_per_gpu: 1e-10 is too small",
        ),
        ({"constraints": {"cpus_per_gpu": 0.0004}}, "constraints.cpus_per_gpu: 0.0004 is too small"),
        ({"constraints": {"cpus_per_gpu": float("inf")}}, "constraints.cpus_per_gpu: inf is not a number"),
        ({"replicas": 2.5}, "replicas: 2.5 is fractional"),
        ({"replicas": 0.0}, "replicas: 0 is too small"),
        ({"replicas": 1e300}, "replicas: it is too large; use at most 100000"),
        ({"replicas": float("inf")}, "replicas: inf is not a number"),
        ({"gpus": 8.5}, "gpus: 8.5 GPUs is more than one and not whole"),
        ({"gpus": 200000.0}, "gpus: 200000 is too large"),
        (
            {"model": "llama", "runtime_config": {"base_url": "http://vllm:8000/v1"}},
            "runtime_config.base_url is for remote runtimes, not vllm (by the model's name); set runtime to openai "
            "(or litellm) if replicas call an endpoint, or remove base_url",
        ),
        (
            {"runtime": "python", "runtime_config": {"base_url": "http://vllm:8000/v1"}},
            "runtime_config.base_url is for remote runtimes, not python (declared)",
        ),
        (
            {"runtime_config": {"provider": "openai"}},
            "runtime_config.provider is for runtime custom, not vllm (by the model's name); set runtime to litellm if "
            "replicas call that provider, or to custom, or remove provider",
        ),
        (
            {"model": "gpt-4o", "runtime_config": {"transport": "remote_network"}},
            "runtime_config.transport is for runtime custom, not openai (by the model's name); set runtime to custom, "
            "or remove transport",
        ),
        (
            {"runtime": "custom", "runtime_config": {"transport": "local_gpu", "provider": "acme"}},
            "runtime_config.provider is for a custom runtime that calls one; set transport to remote_network",
        ),
        (
            {"runtime": "custom", "runtime_config": {"transport": "local_gpu", "base_url": "http://a"}},
            "runtime_config.base_url is for remote runtimes, not custom (declared); set transport to remote_network",
        ),
    ],
)
def test_bad_input_is_named_with_its_value_and_the_fix(fields: dict[str, object], sentence: str) -> None:
    import yaml

    text = yaml.safe_dump({"deployments": [{"name": "d", "model": "m"} | fields]})
    with pytest.raises(InvalidDeployment) as refused:
        parse_deployments(text, ".yaml", "f.yaml")
    assert sentence in str(refused.value)
    assert len(refused.value.problems) == 1


def test_toml_and_yaml_say_the_same() -> None:
    import tomllib

    import yaml

    toml = load_deployments(EXAMPLE)
    text = yaml.safe_dump(tomllib.loads(EXAMPLE.read_text()))
    assert parse_deployments(text, ".yml", "x") == toml
    assert [d.name for d in toml][:2] == ["llama-70b", "qwen-32b"]
    assert sum(d.gpus_per_replica * d.replicas for d in toml) == 16


@pytest.mark.parametrize(
    ("text", "suffix", "sentence"),
    [
        ("", ".toml", "is empty; add at least one deployment under [[deployments]]"),
        ("# nothing\n", ".yaml", "is empty; add at least one deployment under deployments:"),
        ("deployments = []", ".toml", "has no deployments"),
        ("[deployments]\nname = 'a'", ".toml", "deployments is a table; write [[deployments]]"),
        ("deployments: {a: {model: m}}", ".yaml", "deployments is a table; write deployments: and a list"),
        (
            "deployment: []",
            ".yaml",
            "unknown field 'deployment' at the top; did you mean deployments? The file",
        ),
        (
            "[[deployment]]\nname = 'a'",
            ".toml",
            "'deployment' at the top; did you mean [[deployments]]? The file",
        ),
        ("name: a", ".yaml", "unknown field 'name' at the top; the file holds only deployments and groups"),
        ("[1, 2]", ".yaml", "is not a mapping"),
        ("a = ", ".toml", "is not valid TOML"),
        ("a: [", ".yaml", "is not valid YAML"),
        ("{}", ".json", "has the ending '.json'; use .toml, .yaml or .yml"),
    ],
)
def test_a_file_that_holds_no_deployments_is_refused(text: str, suffix: str, sentence: str) -> None:
    with pytest.raises(InvalidDeployment) as refused:
        parse_deployments(text, suffix, "f" + suffix)
    assert sentence in str(refused.value)
    assert str(refused.value).startswith("f" + suffix)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDeployment, match="cannot be read: No such file or directory; check the path"):
        load_deployments(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidDeployment, match="is not UTF-8 text"):
        load_deployments(tmp_path / "binary.toml")


def test_the_same_name_twice_in_a_file_is_refused() -> None:
    text = "deployments: [{name: a, model: m}, {name: b, model: m}, {name: a, model: n}]"
    with pytest.raises(
        InvalidDeployment, match="deployment 3 .a.: name 'a' is already used by deployment 1; rename one"
    ):
        parse_deployments(text, ".yaml", "f.yaml")


def test_a_missing_variable_matters_only_where_the_key_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    key = ApiKey(from_env="MY_KEY")
    with pytest.raises(
        MissingSecret, match="from_env: MY_KEY is not set where the key is needed; export MY_KEY"
    ):
        key.resolve()
    monkeypatch.setenv("MY_KEY", "value")
    assert key.resolve() == "value"
    with pytest.raises(MissingSecret, match="cannot be read"):
        ApiKey(from_file=str(tmp_path / "none")).resolve()


def test_one_key_reference_is_one_identity_whatever_the_model() -> None:
    def identity(model: str, variable: str) -> str | None:
        config = {"api_key": {"from_env": variable}}
        return Deployment.model_validate(
            {"name": "d", "model": model, "runtime_config": config}
        ).key_fingerprint

    assert identity("gpt-4o", "A") == identity("gpt-4o-mini", "A") != identity("gpt-4o", "B")
    assert Deployment(name="d", model="gpt-4o").key_fingerprint == identity("gpt-4o", "OPENAI_API_KEY")
    assert Deployment(name="d", model="m").key_fingerprint is None


@pytest.mark.parametrize(
    "mig", ["1g.5gb", "7g.141gb", "1c.3g.40gb", "1g.10gb+me", "1g.24gb-me", "1g.24gb+me.all"]
)
def test_a_mig_profile_is_written_as_nvidia_smi_does(mig: str) -> None:
    needs = Deployment(name="d", model="m", mig=mig).needs
    assert (needs.profile, needs.gpus, needs.whole) == (mig, 1, False)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.stem)
def test_an_example_is_read(file: Path) -> None:
    assert load_deployments(file)


@pytest.mark.parametrize("field", ["gpus", "replicas", "tensor_parallel", "pipeline_parallel"])
def test_a_whole_number_may_be_written_with_a_point(field: str) -> None:
    """Spreadsheets and pandas write 8.0 for 8."""
    plain, pointed = (Deployment.model_validate({"name": "d", "model": "m", field: n}) for n in (8, 8.0))
    assert (pointed, type(getattr(pointed, field))) == (plain, int)
    assert Deployment.model_validate(
        {"name": "d", "model": "m", "serving": {"max_concurrent": 8.0}}
    ).serving == (
        Deployment.model_validate({"name": "d", "model": "m", "serving": {"max_concurrent": 8}}).serving
    )


@pytest.mark.parametrize("floor", [{"min_bandwidth_gb_per_s": 100}, {"within": "nvlink"}, {"within": "numa"}])
@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"pipeline_parallel": 2}, "pipeline_parallel: 2"),
        ({"gpus": 2, "pipeline_parallel": 2}, "gpus: 2, pipeline_parallel: 2"),
        ({"gpus": 4, "tensor_parallel": 1}, "gpus: 4, tensor_parallel: 1"),
        ({"tensor_parallel": 1, "pipeline_parallel": 3}, "pipeline_parallel: 3, tensor_parallel: 1"),
        (
            {"gpus": 3, "tensor_parallel": 1, "pipeline_parallel": 3},
            "gpus: 3, pipeline_parallel: 3, tensor_parallel: 1",
        ),
    ],
)
def test_a_floor_for_links_that_no_stage_has_is_refused(
    asked: dict[str, int], named: str, floor: dict[str, object]
) -> None:
    with pytest.raises(ValidationError) as refused:
        Deployment.model_validate({"name": "d", "model": "m", **asked, **floor})
    [field] = floor
    assert f"{field}: {floor[field]}" in str(refused.value)
    assert f"with {named} each has one GPU; set tensor_parallel to 2 or more" in str(refused.value)
    two = {"tensor_parallel": 2, "pipeline_parallel": 2}
    assert Deployment.model_validate({"name": "d", "model": "m", **two, **floor}).needs.gpus == 2


def test_one_that_was_made_past_its_validators_is_read_anew() -> None:
    """As model_copy and model_construct do, and as versions do that know other rules."""
    good = Deployment(name="d", model="m", gpus=2, constraints=PlacementConstraints(gpu_nodes=("a",)))
    assert parse_model(Deployment, good, "f") == good
    for change in (
        {"gpus": -1},
        {"model": "gpt-4o"},
        {"constraints": PlacementConstraints(near_to=("d",))},
        {"constraints": PlacementConstraints.model_construct(gpu_nodes=())},
        {"replicas": "many"},
    ):
        with pytest.raises(InvalidDeployment, match="^f: "):
            parse_model(Deployment, good.model_copy(update=change), "f")


@pytest.mark.parametrize(
    "key", ["Authorization", "x-api-key", "passwd", "private_key", "private-key", "hf-token", "apiKey"]
)
def test_options_hold_no_secret_however_it_is_called_and_what_stands_stays_readable(key: str) -> None:
    fields = {"name": "a", "model": "gpt-4o", "runtime_config": {"options": {"headers": {key: "sk-1"}}}}
    with pytest.raises(ValidationError, match="looks like a secret") as caught:
        Deployment.model_validate(fields)
    assert "sk-1" not in str(caught.value)
    assert "a" == Deployment.recorded(fields).name
