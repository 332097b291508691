"""``placement.vllm.Executor`` in real engines: which GPUs the ranks hold, and that these are free when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from placement import Client, Deployment, InvalidDeployment, PlacementConstraints
from placement.runtime.embedded import SimulatedNode, free_port
from tests.integration.conftest import left_over, settled
from tests.integration.test_place import another_user, node_id

vllm = pytest.importorskip("vllm", reason="vLLM is not installed; `make test-engines` has it")

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"load_format": "dummy", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4}
"""Arguments of an engine that keep it small."""
START_SECONDS = 600.0


@pytest.fixture(scope="module")
def cluster_nodes() -> list[SimulatedNode]:
    return [SimulatedNode(name, topology="a100-pcie-4x") for name in ("pcie", "pcie-b")]


@pytest.fixture
def neighbours(service: Any) -> Iterator[None]:
    """Another Ray user has GPU 0 of each node: of the four A100s that are bridged in pairs, 2 and 3 remain a pair."""
    users = [another_user("pcie"), another_user("pcie-b")]
    yield
    for user in users:
        ray.kill(user)


class Server:
    """One ``vllm serve``, and all its processes, but for the workers, which are Ray's."""

    def __init__(self, log: Path, address: str, model: Path, *arguments: str) -> None:
        self._log, port = log, free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{port}"
        small = [
            f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}")
            for key, value in SMALL.items()
        ]
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name=tiny",
            "--host=127.0.0.1", f"--port={port}", "--distributed-executor-backend=placement.vllm.Executor",
            "--worker-extension-cls=counted_gpus.Whereabouts", *small, *arguments,
        ]  # fmt: skip
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                start_new_session=True,
                env={**os.environ, "RAY_ADDRESS": address},
            )

    def wait(self) -> Server:
        """Returns once it serves."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.ask("/health")
                return self
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)
        raise AssertionError(f"vLLM does not serve:\n{self._log.read_text()[-8000:]}")

    def ask(self, path: str, body: Any = None) -> Any:
        """What it answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or "null")

    def ranks(self) -> list[tuple[str, int]]:
        """The node's id and the GPU of each rank, as its worker says."""
        found = sorted(self.ask("/collective_rpc", {"method": "where"})["results"])
        assert [rank for rank, *_ in found] == list(range(len(found)))
        return [(node, gpu) for _, node, gpu in found]

    def end(self, how: signal.Signals) -> None:
        """Ends it: with SIGTERM as whoever supervises it does, with SIGKILL all its processes at once."""
        if how is signal.SIGKILL:
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        self.process.wait(60)

    def seconds_to_free(self, how: signal.Signals, gpus: int) -> float:
        """Ends all its processes by a signal; how long it takes until so many GPUs are free in Ray's books."""
        sent = time.monotonic()
        os.killpg(self.process.pid, how)
        assert settled(lambda: ray.available_resources().get("GPU") == gpus), left_over()
        passed = time.monotonic() - sent
        self.process.wait(60)
        return passed


@pytest.fixture
def serve(service: Any, address: str, model: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server."""
    servers: list[Server] = []

    def start(*arguments: str) -> Server:
        servers.append(Server(tmp_path / f"vllm-{len(servers)}.log", address, model, *arguments))
        return servers[-1].wait()

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.mark.smoke
def test_tensor_parallel_serves_on_the_best_pair_and_sigterm_frees_it(
    neighbours: None, serve: Callable[..., Server]
) -> None:
    said = {"name": "llama", "within": "nvlink", "constraints": {"gpu_nodes": ["pcie"]}}
    server = serve("--tensor-parallel-size=2", f"--additional-config={json.dumps({'placement': said})}")
    asked = {"model": "tiny", "prompt": "w3 w4 w5", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    assert server.ask("/v1/completions", asked)["usage"]["completion_tokens"] == 4
    assert server.ranks() == [(node_id("pcie"), 2), (node_id("pcie"), 3)]
    [shown] = Client().status()["deployments"]
    assert shown["name"] == "llama"
    server.end(signal.SIGTERM)
    assert settled(lambda: Client().status()["deployments"] == [])
    assert settled(lambda: ray.available_resources()["GPU"] == 6), left_over()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_its_gpus_are_free_soon_after_all_its_processes_got_a_signal(
    how: signal.Signals, neighbours: None, serve: Callable[..., Server]
) -> None:
    server = serve("--tensor-parallel-size=2")
    print(f"free {server.seconds_to_free(how, 6):.2f} s after {how.name}")
    assert settled(lambda: Client().status()["deployments"] == [])


def test_pipeline_parallel_over_two_nodes_keeps_the_order_of_the_ranks_and_sigkill_frees_all(
    neighbours: None, serve: Callable[..., Server]
) -> None:
    """vLLM's CPU build starts with pipeline parallelism, and does not generate with it, on no executor."""
    said = {"name": "stages", "within": "nvlink"}
    server = serve(
        "--tensor-parallel-size=2",
        "--pipeline-parallel-size=2",
        f"--additional-config={json.dumps({'placement': said})}",
    )
    ranks = server.ranks()
    placed = sorted(Client().get("stages").assignments, key=lambda one: one.ranks)
    assert [(one.node, gpu) for one in placed for gpu in one.gpus] == ranks
    assert [gpu for _, gpu in ranks] == [2, 3, 2, 3]
    assert ranks[0][0] == ranks[1][0] != ranks[2][0] == ranks[3][0]
    server.end(signal.SIGKILL)
    assert settled(lambda: Client().status()["deployments"] == [])
    assert settled(lambda: ray.available_resources()["GPU"] == 6), left_over()


@ray.remote(max_restarts=0)
class Engine:
    """An engine in an actor, which makes its own workers in the group that it runs in."""

    def __init__(self, model: str) -> None:
        from vllm import LLM

        self._llm = LLM(
            model,
            tensor_parallel_size=2,
            distributed_executor_backend="placement.vllm.Executor",
            worker_extension_cls="counted_gpus.Whereabouts",
            **SMALL,
        )

    def ranks(self) -> list[tuple[str, int]]:
        return [(node, gpu) for _, node, gpu in sorted(self._llm.collective_rpc("where"))]

    def generate(self, prompt: str) -> int:
        from vllm import SamplingParams

        [output] = self._llm.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))
        return len(output.outputs[0].token_ids)


def test_an_engine_in_an_actor_inside_a_group_has_its_ranks_there(
    neighbours: None, service: Any, model: Path
) -> None:
    result = Client().place(
        Deployment(
            name="inside",
            model=str(model),
            runtime="vllm",
            gpus=2,
            constraints=PlacementConstraints(gpu_nodes=("pcie-b",)),
        )
    )
    options = result.engine_options(0) | {"runtime_env": {"env_vars": result.environment(0)}}
    engine = Engine.options(**options).remote(str(model))
    assert ray.get(engine.ranks.remote(), timeout=START_SECONDS) == [
        (node_id("pcie-b"), 2),
        (node_id("pcie-b"), 3),
    ]
    assert ray.get(engine.generate.remote("w7 w8"), timeout=120) == 4
    assert [one["name"] for one in Client().status()["deployments"]] == ["inside"], "it asks for no more"
    Client().release("inside")
    assert settled(lambda: ray.available_resources()["GPU"] == 6), left_over()


def test_the_example_generates(service: Any, address: str, model: Path) -> None:
    command = [
        sys.executable, str(EXAMPLES / "vllm_generate.py"), "--model", str(model), "--gpus", "2",
        "--engine", json.dumps(SMALL), "w3 w4 w5",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        env={**os.environ, "RAY_ADDRESS": address},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert any(line.startswith("w3 w4 w5 -> ") for line in done.stdout.splitlines()), done.stdout[-4000:]
    assert "has GPUs [0, 1] of pcie" in done.stdout + done.stderr
    assert settled(lambda: not left_over()), left_over()


def test_with_data_parallelism_each_engine_core_places_its_own(
    neighbours: None, serve: Callable[..., Server]
) -> None:
    said = {"name": "twins", "constraints": {"gpu_nodes": ["pcie"]}}
    server = serve("--data-parallel-size=2", f"--additional-config={json.dumps({'placement': said})}")
    asked = {"model": "tiny", "prompt": "w3 w4 w5", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    assert server.ask("/v1/completions", asked)["usage"]["completion_tokens"] == 4
    assert sorted(one["name"] for one in Client().status()["deployments"]) == ["twins", "twins-1"]
    assert ray.available_resources()["GPU"] == 4
    server.seconds_to_free(signal.SIGTERM, 6)


def test_data_parallelism_in_which_vllm_makes_the_groups_is_refused(model: Path) -> None:
    from vllm import EngineArgs

    from placement.vllm import Executor

    asked: dict[str, Any] = {"model": str(model), "data_parallel_size": 2, "data_parallel_backend": "ray"}
    for executor in (Executor, "placement.vllm.Executor"):
        with pytest.raises(InvalidDeployment, match="data_parallel_backend: 'ray' has vLLM make the"):
            EngineArgs(**asked, distributed_executor_backend=executor).create_engine_config()
    EngineArgs(**asked, distributed_executor_backend="ray").create_engine_config()


def test_options_that_make_no_sense_are_refused() -> None:
    from placement.vllm import _options

    assert _options({}) == {} == _options({"placement": {}})
    with pytest.raises(InvalidDeployment, match="'nvlink' holds no options; write"):
        _options({"placement": "nvlink"})
    with pytest.raises(InvalidDeployment, match="gpus: that follows from --tensor-parallel-size"):
        _options({"placement": {"gpus": 4}})
    with pytest.raises(InvalidDeployment, match="wait_seconds: 'long' is no time to wait; use seconds"):
        _options({"placement": {"wait_seconds": "long"}})
