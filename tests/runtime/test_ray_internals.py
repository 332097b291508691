"""What of Ray is not documented is used in one file, and what is used there is there; versions that will not do."""

from __future__ import annotations

import ast
import logging
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from packaging.requirements import Requirement

import placement
from placement.errors import UnsupportedRay
from placement.runtime import bootstrap, ray_internals
from placement.runtime.ray_internals import minor_version, require_supported

ROOT = Path(__file__).resolve().parents[2]
HOME = "placement/runtime/ray_internals.py"
PUBLIC = {
    "ray": None,  # all that has no underscore
    "ray.actor": {"ActorHandle"},
    "ray.util": None,
    "ray.util.metrics": {"Counter", "Gauge", "Histogram"},
    "ray.util.placement_group": {
        "PlacementGroup", "get_placement_group", "placement_group", "placement_group_table", "remove_placement_group",
    },
    "ray.util.scheduling_strategies": {"NodeAffinitySchedulingStrategy", "PlacementGroupSchedulingStrategy"},
}  # fmt: skip
"""Modules that Ray's API reference has, and what of them it has."""
PARTS = {"autoscaler", "cluster_utils", "core", "dashboard", "experimental"}
"""Below ``ray``, and in no reference."""


def private(source: str) -> Iterator[str]:
    """What a module uses of Ray that Ray's reference does not have."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (
                one.name for one in node.names if one.name.startswith("ray.") and one.name not in PUBLIC
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            known = PUBLIC.get(str(node.module), set())
            for one in node.names:
                if one.name.startswith("_") or (known is not None and one.name not in known):
                    yield f"{node.module}.{one.name}"
        elif isinstance(node, ast.Attribute):
            parts = ast.unparse(node).split(".")
            if parts[0] == "ray" and (PARTS & {parts[1]} or any(re.match("_(?!_)", part) for part in parts)):
                yield ".".join(parts)
            elif node.attr in ("_actor_id", "_private"):
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init":
            yield from (f"ray.init({one.arg}=)" for one in node.keywords if (one.arg or "").startswith("_"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import ray.util\nray.nodes()\nray.util.list_named_actors()", []),
        ("from ray.util.placement_group import placement_group", []),
        ("from ray.util.placement_group import validate_placement_group", ["validate_placement_group"]),
        ("from ray.experimental import internal_kv", ["ray.experimental.internal_kv"]),
        ("import ray._private.state", ["ray._private.state"]),
        ("ray._private.state.state.job_table()", ["ray._private.state.state.job_table"]),
        ("from ray import _raylet", ["ray._raylet"]),
        ("ray.init(_node_ip_address='x')", ["ray.init(_node_ip_address=)"]),
        ("handle._actor_id.hex()", ["_actor_id"]),
    ],
)
def test_what_is_private_is_recognized(source: str, found: list[str]) -> None:
    seen = list(private(source))
    assert bool(found) == bool(seen)
    assert all(any(one in name for name in seen) for one in found)


def test_what_ray_does_not_document_is_used_in_one_file() -> None:
    used = {
        str(path.relative_to(ROOT)): sorted(set(private(path.read_text())))
        for path in (ROOT / "placement").rglob("*.py")
    }
    assert used.pop(HOME)
    assert {path: names for path, names in used.items() if names} == {}


def test_the_installed_ray_is_one_that_was_tested_and_has_all_of_it() -> None:
    assert require_supported() == ""


def test_the_bounds_are_those_that_pip_goes_by() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = (one for one in map(Requirement, project["dependencies"]) if one.name == "ray")
    assert Requirement(ray_internals.REQUIREMENT) == needed


def test_the_table_of_what_was_run_has_each_minor_version() -> None:
    (oldest, newest), text = (
        (ray_internals.OLDEST, ray_internals.NEWEST),
        (ROOT / "docs" / "ray.md").read_text(),
    )
    assert oldest[0] == newest[0]
    versions = {f"| {oldest[0]}.{minor}." for minor in range(oldest[1], newest[1] + 1)}
    assert {begins for begins in versions if begins not in text} == set()


@pytest.mark.parametrize(
    ("version", "minor"),
    [("2.52.1", (2, 52)), ("2.60.0rc1", (2, 60)), ("3.0.0.dev0", (3, 0)), ("local", (0, 0))],
)
def test_a_version_is_its_first_two_numbers(version: str, minor: tuple[int, int]) -> None:
    assert minor_version(version) == minor


@pytest.mark.parametrize(
    ("version", "why"),
    [("2.9.3", "bundle_label_selector"), ("2.48.0", "bundle_label_selector"), ("2.51.9", "token")],
)
def test_an_older_one_is_refused_with_the_reason_and_the_fix(version: str, why: str) -> None:
    with pytest.raises(UnsupportedRay, match=why) as refused:
        require_supported(version)
    assert refused.value.version == version
    assert f"`pip install '{ray_internals.REQUIREMENT}'`" in str(refused.value)


def test_a_newer_one_is_warned_of() -> None:
    newer = f"{ray_internals.NEWEST[0]}.{ray_internals.NEWEST[1] + 1}.0"
    assert (
        f"Ray {newer} is newer than all versions that placement was tested with (2.52 to 2.60)"
        in require_supported(newer)
    )
    assert "`placement doctor`" in require_supported(newer)


def test_one_that_lacks_something_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray._private.state.GlobalState, "get_draining_nodes")
    with pytest.raises(
        UnsupportedRay,
        match=r"lacks something that placement uses: ray\._private\.state\.\S*get_draining_nodes",
    ):
        require_supported()


def test_the_service_is_not_started_on_what_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "__version__", "2.51.2")
    with pytest.raises(UnsupportedRay, match=r"placement cannot run on Ray 2\.51\.2"):
        placement.start()


def test_and_on_a_newer_one_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "__version__", "2.99.0")
    monkeypatch.setattr(bootstrap, "_has_environment", lambda: False)
    monkeypatch.setattr(bootstrap, "start_in_this_job", lambda *_: "the service")
    with caplog.at_level(logging.WARNING):
        assert placement.start() == "the service"
    [record] = caplog.records
    assert record.getMessage().startswith(
        "Ray 2.99.0 is newer than all versions that placement was tested with"
    )
