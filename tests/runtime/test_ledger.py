"""Records of the ledger: read, refused, and never dropped."""

from __future__ import annotations

import json

import pytest

from placement import Deployment
from placement.runtime.books import Standing
from placement.runtime.ledger import VERSION, read

REPLICA = {"order": "placement:t:d:0:x", "group": "00" * 18, "replica_index": 0, "node": "n", "gpus": [1]}
RECORD = {"version": 1, "deployment": {"name": "d", "model": "m"}, "replicas": []}


def test_a_record_of_version_1_is_read() -> None:
    record = read("d", json.dumps(RECORD).encode())
    assert record.content is not None
    standing = Standing.load(record.content)
    assert (standing.deployment.name, standing.releasing, standing.missing()) == ("d", False, [0])


def test_a_record_of_this_version_says_whether_it_is_to_go() -> None:
    record = read("d", json.dumps({**RECORD, "version": VERSION, "releasing": True}).encode())
    assert record.content is not None
    assert Standing.load(record.content).releasing


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
    assert "not one that this service wrote, or only a part" in record.problem


@pytest.mark.parametrize(
    "fields",
    [
        {"pipeline_parallel": 2, "within": "nvlink"},
        {"gpus": 2, "pipeline_parallel": 2, "min_bandwidth_gb_per_s": 100.0},
        {"gpu_memory_gib": 4e-10},
        {"constraints": {"cpus_per_gpu": 0.0001}},
    ],
)
def test_what_stands_is_held_to_no_rule_that_came_later(fields: dict[str, object]) -> None:
    wanted = {"name": "d", "model": "m", **fields}
    assert Standing.load({"deployment": wanted, "replicas": []}).deployment.runtime_name == "vllm"
    with pytest.raises(ValueError, match="Deployment"):
        Deployment.model_validate(wanted)
