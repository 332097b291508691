"""The names that users rely on, and what importing them costs."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

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


ERRORS = [
    errors.InvalidDeployment("f.toml", ("name: is empty; give it one",)),
    errors.UnknownTopology("dgx-9", ("dgx-1v",), "label x"),
    errors.MatrixError(3, "GPU2 has 3 links"),
    errors.MissingSecret("runtime_config.api_key.from_env", "KEY", "is not set"),
    errors.NoGpuNodes("d", "none", {"reason": 1}, "add one"),
    errors.NoEgressNodes("d", "none", {"reason": 1}, "add one", "openai"),
    errors.BelowFloor("d", "too slow", {"reason": 2}, "add some"),
    errors.InvalidClusterFile("c.json: nodes: wrong; write it again"),
    errors.NotEnoughGpus("d", "too few", {"reason": 2}, "add some", 4, 2),
    errors.NotEnoughEgress("d", "too few", {}, "add some"),
    errors.ReservationFailed("d", "gpu-a", 12, "taken"),
    errors.DeploymentConflict("d", {"gpus": ("2", "4")}),
    errors.UnknownDeployment("d", ()),
    errors.UnknownNode("--node", "x", ("a", "b")),
    errors.UnreadableRecord("d", "its record has version 9", True),
    errors.ServiceNotRunning("127.0.0.2:6379"),
    errors.ServiceNotRunning("127.0.0.2:6379", "no such module on the head node; install it"),
    errors.ClusterUnreachable("127.0.0.2:6379", "refused"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_crosses_a_process_with_all_its_fields_and_says_the_next_step(
    error: errors.PlacementError,
) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))
    assert len(str(error)) > 20


def test_all_errors_are_checked_above() -> None:
    defined = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.PlacementError)
    }
    assert defined - {type(error) for error in ERRORS} == {errors.PlacementError, errors.Unplaceable}
