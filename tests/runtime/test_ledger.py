"""Records of the ledger: read, refused, and never dropped."""

from __future__ import annotations

import json

import pytest

from placement import Deployment
from placement.core.lifecycle import State
from placement.runtime import ledger, records
from placement.runtime.deployment_state import DeploymentState
from placement.runtime.ledger import VERSION, read

REPLICA = {
    "order": "placement:t:d:0:x",
    "group": "00" * 18,
    "replica_index": 0,
    "node": "n",
    "gpus": [1],
    "bundle_indices": [0],
}
RECORD = {"version": 1, "deployment": {"name": "d", "model": "m"}, "replicas": []}


def test_a_record_of_version_1_is_read() -> None:
    record = read("d", json.dumps(RECORD).encode())
    assert record.content is not None
    standing = records.from_record(record.content)
    assert (standing.deployment.name, standing.releasing, standing.missing()) == ("d", False, [0])


def test_a_record_of_this_version_says_whether_it_is_to_go() -> None:
    record = read("d", json.dumps({**RECORD, "version": VERSION, "releasing": True}).encode())
    assert record.content is not None
    assert records.from_record(record.content).releasing


def test_a_newer_record_is_not_read() -> None:
    record = read("d", json.dumps({**RECORD, "version": VERSION + 1}).encode())
    assert (record.content, record.newer) == (None, True)
    assert f"version {VERSION + 1}, and this service reads up to {VERSION}" in record.problem


@pytest.mark.parametrize(
    "value", [b"", b"{", json.dumps(RECORD).encode()[:40], b"[]", b'"text"', b"{}", b"null", b"\xff\xfe"]
)
def test_half_a_record_or_none_is_told_as_such(value: bytes) -> None:
    record = read("d", value)
    assert (record.content, record.newer) == (None, False)
    assert "not written by this service, or is incomplete" in record.problem


EGRESS = REPLICA | {"gpus": [], "egress_resource": "egress", "egress_units": 1}


@pytest.mark.parametrize(
    ("model", "held", "runtime"),
    [
        ("gpt-5", REPLICA, "vllm"),
        ("azure/gpt-4o", REPLICA, "vllm"),
        ("openai/my-model", REPLICA, "vllm"),  # refused today: it can be meant both ways
        ("mistral-large-latest", REPLICA, "mistralrs"),
        ("O1-OPEN/OpenO1-LLama-8B-v0.1", EGRESS, "openai"),
        ("gpt-4all-falcon", EGRESS, "openai"),
        ("gpt-4o", EGRESS, "openai"),
        ("m", REPLICA, "vllm"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_an_old_record_keeps_what_it_holds_whatever_its_models_name_means_today(
    version: int, model: str, held: dict[str, object], runtime: str
) -> None:
    content = {"version": version, "deployment": {"name": "d", "model": model}, "replicas": [held]}
    standing = records.from_record(content)
    deployment = standing.deployment
    assert (deployment.runtime_name, deployment.remote) == (runtime, held is EGRESS)
    assert (deployment.gpus_per_replica, deployment.egress_per_replica) == (
        (0, 1) if held is EGRESS else (1, 0)
    )
    assert (list(standing.replicas), standing.missing()) == ([0], [])
    assert standing.states[0] is State.PLACED


@pytest.mark.parametrize(
    "fields",
    [
        {"pipeline_parallel": 2, "within": "nvlink"},
        {"gpus": 2, "pipeline_parallel": 2, "min_bandwidth_gb_per_s": 100.0},
        {"gpu_memory_gib": 4e-10},
        {"constraints": {"cpus_per_gpu": 0.0001}},
        {"runtime_config": {"base_url": "http://localhost:8000"}},
    ],
)
def test_what_stands_is_held_to_no_rule_that_came_later(fields: dict[str, object]) -> None:
    wanted = {"name": "d", "model": "m", **fields}
    assert records.from_record({"deployment": wanted, "replicas": []}).deployment.runtime_name == "vllm"
    with pytest.raises(ValueError, match="Deployment"):
        Deployment.model_validate(wanted)


def test_a_record_says_its_runtime_and_is_read_as_it_was_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a later version, to which the name means something else, holds to it."""
    saved: list[bytes] = []
    monkeypatch.setattr(
        ledger.ray_internals, "kv_put", lambda key, value, namespace: saved.append(value), raising=True
    )
    wanted = Deployment(name="d", model="gpt-5")
    records.save(DeploymentState(wanted))
    record = read("d", saved[0])
    assert record.content is not None
    assert record.content["runtime"] == "openai"
    assert records.from_record(record.content).deployment == wanted, "placing the same again is no conflict"
    other = records.from_record(record.content | {"runtime": "litellm"}).deployment
    assert (other.runtime_name, other.provider) == ("litellm", "litellm")
