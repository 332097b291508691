"""The names that users rely on, and what importing them costs."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

import placement
from placement import errors


def test_every_public_name_is_there_and_documented() -> None:
    for name in placement.__all__:
        value = getattr(placement, name)
        if name != "__version__":
            assert inspect.getdoc(value), f"{name} has no docstring"
    with pytest.raises(AttributeError):
        placement.nothing  # noqa: B018


def test_importing_the_package_imports_neither_ray_nor_pydantic() -> None:
    code = "import sys, placement; print([m for m in ('ray', 'pydantic', 'pynvml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_services_actor_has_what_the_clients_ask_of_it_and_no_method_blocks() -> None:
    service = importlib.import_module("placement.runtime.service").DeploymentPlacementActor
    names = {name for name, _ in inspect.getmembers(service, inspect.isfunction) if not name.startswith("_")}
    theirs = {name for name, _ in inspect.getmembers(placement.Client, inspect.isroutine)}
    measured = {"measurements", "record_measurements"}
    assert names - theirs == {
        "lend",
        "confirm",
        "cancel",
        "log",
        "explain_all",
        "settings",
        "stop_agents",
        *measured,
    }
    for name in names:
        method = getattr(service, name)
        assert inspect.iscoroutinefunction(method) and inspect.getdoc(method), name


def test_who_finds_the_service_loads_its_methods_and_signatures_but_not_the_service() -> None:
    """Ray pickles an actor's class, and loads it with the handle."""
    service = importlib.import_module("placement.runtime.service").DeploymentPlacementActor
    bootstrap = importlib.import_module("placement.runtime.bootstrap")
    code = (
        "import inspect, pickle, sys\n"
        "loaded = pickle.load(sys.stdin.buffer)\n"
        "print([name for name in sys.modules if name.startswith(('placement', 'pydantic', 'numpy'))])\n"
        "for name, method in inspect.getmembers(loaded, inspect.iscoroutinefunction):\n"
        "    print(f'{name}{inspect.signature(method)}')"
    )
    pickled = cloudpickle.dumps(bootstrap._light(service))
    done = subprocess.run([sys.executable, "-c", code], input=pickled, capture_output=True, check=True)
    methods = inspect.getmembers(service, inspect.iscoroutinefunction)
    theirs = [f"{name}{inspect.signature(method)}" for name, method in methods if name[0] != "_"]
    assert done.stdout.decode().splitlines() == ["[]", *theirs]


def test_what_serve_needs_is_imported_without_serve_and_documented() -> None:
    serve = importlib.import_module("placement.serve")
    for name in serve.__all__:
        assert inspect.getdoc(getattr(serve, name)), f"{name} has no docstring"


def test_without_vllm_its_executor_says_what_to_install() -> None:
    with pytest.raises(
        ImportError, match=r"needs vLLM 0.21 or later.*\(No module named 'vllm'\).*pip install"
    ):
        importlib.import_module("placement.vllm")


ERRORS = [
    errors.InvalidDeployment("f.toml", ("name: is empty; give it one",)),
    errors.UnknownTopology("dgx-9", ("dgx-1v",), "label x"),
    errors.MatrixError(3, "GPU2 has 3 links"),
    errors.MissingSecret("runtime_config.api_key.from_env", "KEY", "is not set"),
    errors.NoGpuNodes("d", "none", {"reason": 1}, "add one"),
    errors.NoCpuNodes("d", "none", {"reason": 1}, "add one"),
    errors.NoEgressNodes("d", "none", {"reason": 1}, "add one", "openai"),
    errors.BelowFloor("d", "too slow", {"reason": 2}, "add some"),
    errors.InvalidClusterFile("c.json: nodes: wrong; write it again"),
    errors.NotEnoughGpus("d", "too few", {"reason": 2}, "add some", 4, 2),
    errors.NotEnoughEgress("d", "too few", {}, "add some"),
    errors.ReservationFailed("d", "gpu-a", 12, "taken"),
    errors.DeploymentConflict("d", {"gpus": ("2", "4")}),
    errors.GroupStands("pd", "prefill", "its replicas would have to move (gpus)"),
    errors.UnknownDeployment("d", ()),
    errors.UnknownNode("--node", "x", ("a", "b")),
    errors.UnknownGpu("constraints.gpus", 9, ("0-3 (a)",)),
    errors.UnreadableRecord("d", "its record has version 9", True),
    errors.Busy("calls that change deployments", 4096),
    errors.PartlyApplied({"a": {"code": "unknown_node", "message": "no node x"}}, ("b",)),
    errors.LeaseExpired("d", "no group came within 1.5 s"),
    errors.InvalidMeasurement("f", "has no line `# Rank 0`"),
    errors.CannotMeasure("gpu-a", "one of its GPUs is free"),
    errors.NoCollectiveLibrary("gpu-a", "its workers cannot import torch"),
    errors.ServiceDiffers("127.0.0.2:6379", {"near": ("zone,rack", "block")}),
    errors.ServiceNotRunning("127.0.0.2:6379"),
    errors.ServiceNotRunning("127.0.0.2:6379", "no such module on the head node; install it"),
    errors.ClusterUnreachable("127.0.0.2:6379", "refused"),
    errors.ClusterUnreachable("auto", "several run on this machine", ("127.0.0.2:6379", "127.0.0.3:6379")),
    errors.UnsupportedRay("2.49.2", "ray[default]>=2.52,<2.61", "it is too old"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_crosses_a_process_with_all_its_fields_and_says_the_next_step(
    error: errors.PlacementError,
) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))
    assert len(str(error)) > 20


DEFINED = {
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, errors.PlacementError)
}


def test_all_errors_are_checked_above() -> None:
    assert DEFINED - {type(error) for error in ERRORS} == {errors.PlacementError, errors.Unplaceable}


def test_every_error_has_a_code_of_its_own() -> None:
    assert {kind for kind in DEFINED if "code" not in vars(kind)} == set()
    codes = [kind.code for kind in DEFINED]
    assert sorted(set(codes)) == sorted(codes)
    assert [code for code in codes if not re.fullmatch("[a-z]+(_[a-z]+)*", code)] == []


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_told_in_json_with_its_code_and_all_its_fields(error: errors.PlacementError) -> None:
    told = error.to_dict()
    assert told == json.loads(json.dumps(told, allow_nan=False))
    names = list(inspect.signature(type(error).__init__).parameters)[1:]
    assert ["code", "type", "message", *names] == list(told)
    assert (type(error).code, type(error).__name__, str(error)) == (
        told["code"], told["type"], told["message"],
    )  # fmt: skip
    assert json.loads(json.dumps(error.args)) == [told[name] for name in names]


def test_a_field_that_json_lacks_is_unknown() -> None:
    told = errors.Unplaceable("d", "none", {"a": float("nan"), "b": float("inf"), "c": 1.5}, "wait").to_dict()  # type: ignore[dict-item]
    assert {"a": None, "b": None, "c": 1.5} == told["excluded"]


def test_one_is_counted_in_the_singular() -> None:
    refused = errors.Unplaceable("d", "none is free", {"is full": 1, "is lost": 2}, "wait")
    assert "cannot place 'd': none is free (1 node: is full, 2 nodes: is lost); wait" == str(refused)
    assert "gave up after 1 attempt (" in str(errors.ReservationFailed("d", "gpu-a", 1, "taken"))
    assert "gave up after 2 attempts (" in str(errors.ReservationFailed("d", "gpu-a", 2, "taken"))


def test_the_table_of_errors_names_all_of_them_with_their_fields_and_exit_codes() -> None:
    from placement.cli.main import exit_code

    text = (Path(__file__).parents[1] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d) \| (.*) \|$", text, re.M)
    assert {(kind.code, kind.__name__) for kind in DEFINED} == {(code, name) for code, name, *_ in rows}
    for _, name, exits, fields in rows:
        kind = getattr(errors, name)
        assert int(exits) == exit_code(kind), name
        if kind is not errors.PlacementError:
            base = ["deployment", "summary", "excluded", "advice"] if fields.startswith("same") else []
            told = list(inspect.signature(kind.__init__).parameters)[1:]
            assert told == base + re.findall(r"`(\w+)`", fields), name
