"""A planted API key is nowhere to be found; and records that cannot be read are told, kept, and never overwritten."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.experimental import internal_kv

from placement.errors import DeploymentConflict, InvalidDeployment, UnreadableRecord
from placement.runtime.embedded import SimulatedNode
from placement.runtime.ledger import VERSION
from tests.integration.conftest import settled

pytestmark = pytest.mark.integration

KEY = "sk-planted-5f2c81d09b7e4a6c"


@pytest.fixture(scope="module")
def cluster_nodes(tmp_path_factory: pytest.TempPathFactory) -> list[SimulatedNode]:
    path = tmp_path_factory.mktemp("keys") / "key"
    path.write_text(KEY)
    env = {"PLANTED_KEY": KEY, "PLANTED_FILE": str(path)}
    return [SimulatedNode("out", resources={"egress": 8}, env=env), SimulatedNode("gpu", topology="l40s-4x")]


def records() -> dict[bytes, bytes]:
    keys = internal_kv._internal_kv_list(b"", namespace=b"placement")
    found = {key: internal_kv._internal_kv_get(key, namespace=b"placement") or b"" for key in keys}
    return {key: zlib.decompress(one) if key.startswith(b"history/") else one for key, one in found.items()}


def test_a_planted_key_is_in_no_record_log_file_answer_error_or_pickle(
    service: Any, session_files: Callable[[], list[Path]]
) -> None:
    told: list[Any] = []
    for name, reference in (("env", {"from_env": "PLANTED_KEY"}), ("file", {"from_file": "~/planted/key"})):
        wanted = {"name": name, "model": "gpt-4o", "runtime_config": {"api_key": reference}}
        told.append(ray.get(service.place.remote(wanted)))
        with pytest.raises(DeploymentConflict) as conflict:
            ray.get(service.place.remote({**wanted, "model": "gpt-4"}))
        told += [conflict.value, ray.get(service.events.remote(name))]
    for config in (
        {"api_key": KEY},
        {"api_key": {"from_env": KEY}},
        {"options": {"api_key": KEY}},
        {"key": KEY},
    ):
        with pytest.raises(InvalidDeployment) as refused:
            ray.get(service.place.remote({"name": "bad", "model": "gpt-4o", "runtime_config": config}))
        told.append(refused.value)
    told += [ray.get(service.status.remote()), ray.get(service.snapshot.remote())]
    ray.kill(service, no_restart=False)
    told.append(ray.get(service.get.remote("env"), timeout=60))
    for one in told:
        for text in (str(one), repr(one), ray.cloudpickle.dumps(one).decode("latin-1")):
            assert KEY not in text
    assert settled(lambda: any(b"deployment_conflict" in value for value in records().values()))
    assert len(records()) >= 4  # the token, two deployments, and the history
    for key, value in records().items():
        assert KEY.encode() not in key + value
    files = session_files()
    assert len(files) > 10
    assert [
        path for path in files if path.name == "placement.log" and b"invalid_deployment" in path.read_bytes()
    ]
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def put(name: str, value: bytes) -> None:
    internal_kv._internal_kv_put(f"deployment/{name}".encode(), value, overwrite=True, namespace=b"placement")


def unreadable(service: Any) -> list[str]:
    return [one["name"] for one in ray.get(service.status.remote(), timeout=60)["unreadable"]]


def test_records_that_cannot_be_read_are_told_and_left_as_they_are(service: Any) -> None:
    kept = ray.get(service.place.remote({"name": "kept", "model": "m"}))
    ray.get(service.place.remote({"name": "half", "model": "m", "gpus": 2}))
    whole = records()[b"deployment/half"]
    newer = json.dumps({**json.loads(whole), "version": VERSION + 1}).encode()
    put("half", whole[: len(whole) // 2])
    put("newer", newer)
    put("nonsense", json.dumps({"version": VERSION, "deployment": {"gpus": "many"}, "replicas": []}).encode())
    ray.kill(service, no_restart=False)

    assert settled(lambda: unreadable(service) == ["half", "newer", "nonsense"])
    status = ray.get(service.status.remote())
    assert [one["name"] for one in status["deployments"]] == ["kept"]
    problems = {one["name"]: one["problem"] for one in status["unreadable"]}
    assert "or is incomplete" in problems["half"] and "`placement release half`" in problems["half"]
    assert f"version {VERSION + 1}" in problems["newer"]
    assert "is inconsistent" in problems["nonsense"]
    assert ray.get(service.get.remote("kept")).to_dict() == kept.to_dict()
    # what it holds is not taken from it
    assert settled(lambda: ray.available_resources()["GPU"] == 1), ray.available_resources()
    for name in problems:
        with pytest.raises(UnreadableRecord):
            ray.get(service.place.remote({"name": name, "model": "m"}))
    with pytest.raises(UnreadableRecord, match="run the version of placement that wrote it"):
        ray.get(service.release.remote("newer"))
    assert records()[b"deployment/newer"] == newer
    # giving it back is a decision, and then it is done
    assert ray.get(service.release.remote("half")) == 1
    assert settled(lambda: ray.available_resources()["GPU"] == 3)
    assert ray.get(service.release.remote("nonsense")) == 0
    internal_kv._internal_kv_del(b"deployment/newer", namespace=b"placement")
    ray.kill(service, no_restart=False)
    assert settled(lambda: unreadable(service) == [])


def test_a_record_of_before_keeps_its_gpu_though_the_models_name_means_a_provider_today(service: Any) -> None:
    """Earlier versions took gpt-5 for a model of vllm, and records did not say so."""
    placed = ray.get(service.place.remote({"name": "old", "model": "gpt-5", "runtime": "vllm", "gpus": 2}))
    record = json.loads(records()[b"deployment/old"])
    del record["runtime"], record["deployment"]["runtime"], record["deployment"]["gpus"]
    record["deployment"]["tensor_parallel"] = 2
    put("old", json.dumps(record).encode())
    ray.kill(service, no_restart=False)
    assert ray.get(service.get.remote("old"), timeout=60).to_dict() == placed.to_dict()
    [said] = ray.get(service.status.remote())["deployments"]
    assert (said["state"], said["runtime"], said["transport"]) == ("placed", "vllm", "local_gpu")
    assert unreadable(service) == []
    assert ray.available_resources()["GPU"] == 2
    assert ray.get(service.release.remote("old")) == 1
