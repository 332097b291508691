"""Remote replicas: which egress node, how much of it, and nothing of the key anywhere."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import ray
from ray.experimental import internal_kv

import placement
from placement import Deployment
from tests.integration.conftest import settled

pytestmark = pytest.mark.integration


def remote(
    name: str, model: str = "gpt-4o", key: str = "OPENAI_API_KEY", units: int = 4, **fields: Any
) -> dict[str, Any]:
    config = {"api_key": {"from_env": key}}
    return {
        "name": name,
        "model": model,
        "runtime_config": config,
        "serving": {"max_concurrent": units},
        **fields,
    }


def nodes_of(result: placement.PlacementResult) -> list[str]:
    return [a.node_name for a in result.assignments]


def test_replicas_spread_and_hold_their_capacity_and_no_gpu(service: Any) -> None:
    result = ray.get(service.place.remote(remote("gpt", replicas=2, units=8)))
    assert sorted(nodes_of(result)) == ["egress-a", "egress-b"]
    assert [a.gpus for a in result.assignments] == [[], []]
    held = {a.node_name: (a.egress_resource, a.egress_units) for a in result.assignments}
    assert held == {"egress-a": ("egress_openai", 8), "egress-b": ("egress", 8)}
    free = ray.available_resources
    assert settled(lambda: (free()["egress_openai"], free()["egress"], free()["GPU"]) == (24, 24, 12))


def test_the_same_key_goes_where_it_is_served_already_another_does_not(service: Any) -> None:
    first = nodes_of(ray.get(service.place.remote(remote("one", units=30))))
    assert nodes_of(ray.get(service.place.remote(remote("two", units=2)))) == first
    other = nodes_of(ray.get(service.place.remote(remote("three", key="OTHER_KEY", units=2))))
    assert other != first


def test_a_full_node_is_passed_over_and_full_nodes_refuse(service: Any) -> None:
    ray.get(service.place.remote(remote("fill", units=30)))
    assert nodes_of(ray.get(service.place.remote(remote("next", units=4)))) == ["egress-b"]
    with pytest.raises(placement.NotEnoughEgress, match="33 concurrent requests to openai"):
        ray.get(service.place.remote(remote("big", units=33)))


def test_constraints_and_preference_choose_the_egress_node(service: Any) -> None:
    preferred = ray.get(service.place.remote(remote("a"), {"egress_preference": ["egress-b"]}))
    limited = ray.get(service.place.remote(remote("b"), {"egress_nodes": ["egress-a"]}))
    assert (nodes_of(preferred), nodes_of(limited)) == (["egress-b"], ["egress-a"])


def test_a_provider_that_no_node_may_call_is_refused(service: Any) -> None:
    with pytest.raises(placement.NoEgressNodes, match="no egress node may be used") as refused:
        ray.get(service.place.remote(remote("c", model="claude-sonnet-4"), {"egress_nodes": ["dgx"]}))
    assert refused.value.provider == "anthropic"


@ray.remote
class Caller:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def test_a_worker_runs_inside_the_replicas_reservation(service: Any) -> None:
    (assignment,) = ray.get(service.place.remote(remote("call"))).assignments
    worker = Caller.options(**assignment.actor_options()).remote()
    assert ray.get(worker.node.remote()) == assignment.node


def test_a_planted_key_is_nowhere(service: Any, monkeypatch: pytest.MonkeyPatch, session_files: Any) -> None:
    """The variable is set where the driver runs; a key pasted into the wrong field is refused without an echo."""
    planted = "sk-planted-4f1c9a"
    monkeypatch.setenv("PLANTED_KEY", planted)
    deployment = Deployment.model_validate(remote("secret", key="PLANTED_KEY"))
    said = [repr(deployment), deployment.model_dump_json()]
    said.append(str(ray.get(service.place.remote(deployment)).to_dict()))
    said.append(str(ray.get(service.status.remote())))
    for wrong in (
        {"runtime_config": {"api_key": planted}},
        {"runtime_config": {"api_key": {"from_env": planted}}},
        {"runtime_config": {"api_key": {"from_file": planted}}},
        {"runtime_config": {"key": planted}},
        {"runtime_config": {"options": {"openai_api_key": planted}}},
        {"runtime_config": {"options": {"deep": [{"password": planted}]}}},
        {"runtime_config": {"base_url": f"https://user:{planted}@host"}},
        {"runtime_config": {"base_url": f"https://host/v1?key={planted}"}},
    ):
        with pytest.raises(placement.InvalidDeployment) as refused:
            ray.get(service.place.remote({"name": "wrong", "model": "gpt-4o", **wrong}))
        said.append(str(refused.value.cause))
    for key in internal_kv._internal_kv_list(b"", namespace=b"placement"):
        value = internal_kv._internal_kv_get(key, namespace=b"placement")
        said.append(str(zlib.decompress(value) if key.startswith(b"history/") else value))
    assert any("secret" in text for text in said), "the ledger was read"
    assert [text for text in said if planted in text] == []
    assert [str(path) for path in session_files() if planted.encode() in path.read_bytes()] == []
