"""Ray Serve LLM with vLLM on exact GPUs: by ``placement.serve.install``, unchanged; by ``placement.serve.Callback``."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from placement import Client
from placement.runtime.embedded import SimulatedNode, free_port
from tests.engines.serving import PATIENT, names_of_nodes, serve, serve_on
from tests.integration.conftest import left_over, settled
from tests.integration.test_place import another_user

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-engines` has it")

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

NODES = [SimulatedNode("pcie", topology="a100-pcie-4x", resources={"accelerator_type:A100": 1})]


def config(model: Path, **further: Any) -> dict[str, Any]:
    """An engine of two tensor-parallel ranks, as small as can be."""
    return {
        "model_loading_config": {"model_id": "tiny", "model_source": str(model)},
        "engine_kwargs": {
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "ray",
            "load_format": "dummy",
            "enforce_eager": True,
            "max_model_len": 64,
            "max_num_seqs": 4,
            "worker_extension_cls": "counted_gpus.Whereabouts",
        },
        "deployment_config": {
            "autoscaling_config": {"min_replicas": 1, "max_replicas": 1},
            "ray_actor_options": {"num_cpus": 0.1},
        },
        "accelerator_type": "A100",
        "log_engine_metrics": False,
        **further,
    }


@contextmanager
def served(variables: dict[str, str], wanted: dict[str, Any]) -> Iterator[str]:
    """Where it answers. Another Ray user has GPU 0. At the end, nothing is held nor known to be."""
    from ray.serve.llm import LLMConfig, build_openai_app

    port = free_port("127.0.0.1")
    at = {"host": "127.0.0.1", "port": port}
    with serve_on(NODES, variables, proxy_location="HeadOnly", http_options=at):
        user = another_user("pcie")
        app = build_openai_app({"llm_configs": [LLMConfig(**wanted)]})
        serve.run(app, name="llm", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
        serve.delete("llm")
        ray.kill(user)
        assert settled(lambda: not left_over()), left_over()
        assert settled(lambda: Client().status()["deployments"] == [])


def completion(url: str) -> int:
    """How many tokens it answers with."""
    asked = {"model": "tiny", "prompt": "w3 w4 w5", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["usage"]["completion_tokens"]


def ranks() -> list[tuple[str, int]]:
    """The node and the GPU of each rank, as its worker says."""
    server = serve.get_deployment_handle("LLMServer:tiny", "llm")
    found = sorted(server.collective_rpc.remote("where").result(timeout_s=120))
    name = names_of_nodes()
    return [(name(node), gpu) for _, node, gpu in found]


def test_an_unchanged_app_has_its_ranks_on_the_best_pair(model: Path) -> None:
    with served(PATIENT, config(model)) as url:
        assert completion(url) == 4
        assert ranks() == [("pcie", 2), ("pcie", 3)]
        [deployment] = Client().status()["deployments"]
        assert deployment["name"].startswith("llm-LLMServer-tiny-")


def test_with_the_callback_the_replica_makes_its_own_group(model: Path) -> None:
    own = {
        "accelerator_config": {"kind": "gpu"},
        "placement_group_config": {"bundles": [{"CPU": 0.1}]},
        "callback_config": {
            "callback_class": "placement.serve.Callback",
            "callback_kwargs": {"within": "nvlink"},
        },
    }
    with served({}, config(model, **own)) as url:
        assert completion(url) == 4
        assert ranks() == [("pcie", 2), ("pcie", 3)]
        [deployment] = Client().status()["deployments"]
        assert deployment["name"].startswith("llm-LLMServer-tiny-")
