"""``ray_cluster.yaml`` is what ``ray up`` accepts, and brings up what the README says it does.

Prepared as ``ray up`` prepares it up to the point where it asks AWS for the machines: defaults filled in,
setup commands merged, then Ray's own schema and checks.
"""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray._private.label_utils import validate_label_key, validate_label_value
from ray.autoscaler._private.util import prepare_config, validate_config

import placement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WHEEL = f"/home/ray/placement-dist/ray_placement-{placement.__version__}-py3-none-any.whl"

Config = dict[str, Any]


@pytest.fixture(scope="module")
def written() -> Config:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


@pytest.fixture(scope="module")
def prepared(written: Config) -> Config:
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    return config


def node_types(config: Config, resource: str) -> dict[str, Config]:
    types = config["available_node_types"].items()
    return {name: kind for name, kind in types if kind["resources"].get(resource, 0) > 0}


def test_ray_refuses_the_file_once_a_field_is_misspelt(written: Config) -> None:
    broken = copy.deepcopy(written)
    broken["available_node_types"]["egress"]["lables"] = {}
    with pytest.raises(Exception, match="'lables' was unexpected"):
        validate_config(prepare_config(broken))


def test_the_head_runs_the_service_and_no_work(prepared: Config) -> None:
    head = prepared["available_node_types"][prepared["head_node_type"]]
    assert {"CPU": 0} == head["resources"]
    assert 0 == head["max_workers"], "a second head would be a worker without resources"


def test_gpu_nodes_advertise_the_gpus_their_machines_have(prepared: Config) -> None:
    machines = {
        kind["node_config"]["InstanceType"]: kind["resources"]["GPU"]
        for kind in node_types(prepared, "GPU").values()
    }
    # AWS instance type pages: P4 (8 A100), G5 (4 A10G).
    assert {"p4d.24xlarge": 8, "g5.12xlarge": 4} == machines


def test_gpu_nodes_promise_the_accelerator_that_ray_will_find_on_them(prepared: Config) -> None:
    """A label that no type promises brings no node; one that the nodes then lack brings one after the other."""
    promised = {
        kind["node_config"]["InstanceType"]: kind["labels"]["ray.io/accelerator-type"]
        for kind in node_types(prepared, "GPU").values()
    }
    # What NVML calls the GPUs of these machines, as Ray abbreviates it.
    products = {"p4d.24xlarge": "NVIDIA A100-SXM4-40GB", "g5.12xlarge": "NVIDIA A10G"}
    found = {
        machine: NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(name)
        for machine, name in products.items()
    }
    assert found == promised


def test_gpu_nodes_have_their_topology_read_and_not_assumed(prepared: Config) -> None:
    assert not [
        name
        for name, kind in node_types(prepared, "GPU").items()
        if "placement/topology" in kind.get("labels", {})
    ]


def test_egress_nodes_advertise_how_many_requests_they_may_carry(prepared: Config) -> None:
    egress = node_types(prepared, "egress")
    assert {"egress": {"egress": 64}} == {name: kind["resources"] for name, kind in egress.items()}
    assert not egress.keys() & node_types(prepared, "GPU").keys()
    assert 2 <= egress["egress"]["min_workers"], "the replicas of a deployment need two nodes to spread over"


def test_every_node_names_its_failure_domain_in_a_label_that_ray_accepts(prepared: Config) -> None:
    zone = prepared["provider"]["availability_zone"]
    for name, kind in prepared["available_node_types"].items():
        assert zone == kind["labels"]["ray.io/availability-zone"], name
        for key, value in kind["labels"].items():
            assert validate_label_key(key) is None, key
            validate_label_value(value)


def test_the_minimum_of_every_node_type_fits_the_cluster(prepared: Config) -> None:
    assert (
        sum(kind["min_workers"] for kind in prepared["available_node_types"].values())
        <= (prepared["max_workers"])
    )


@pytest.mark.parametrize("commands", ["head_setup_commands", "worker_setup_commands"])
def test_every_node_installs_the_mounted_wheel(prepared: Config, commands: str) -> None:
    assert {"/home/ray/placement-dist": "dist"}.items() <= prepared["file_mounts"].items()
    assert f"pip install {WHEEL}" in prepared[commands]
    # A node type's own list would replace the merged one, and the wheel with it.
    for name, kind in prepared["available_node_types"].items():
        assert "worker_setup_commands" not in kind, name


def test_the_images_bring_the_ray_and_the_python_the_package_needs(prepared: Config) -> None:
    images = {prepared["docker"]["image"]}
    images |= {
        kind["docker"]["worker_image"]
        for kind in prepared["available_node_types"].values()
        if "docker" in kind
    }
    versions = {
        found
        for image in images
        for found in re.findall(r"^rayproject/ray:(\d+\.\d+\.\d+)-(py\d+)(?:-gpu)?$", image)
    }
    [(ray, python)] = versions
    (needed,) = (one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "ray")
    assert needed.specifier.contains(ray)
    assert ("py311", True) == (python, SpecifierSet(PROJECT["requires-python"]).contains("3.11"))


def test_the_head_starts_ray_and_then_the_service(prepared: Config) -> None:
    *_, ray_start, service_start = prepared["head_start_ray_commands"]
    [port] = re.findall(r"ray start --head --port=(\d+) ", ray_start)
    assert f"placement up --address 127.0.0.1:{port}" == service_start
    assert "RAY_enable_autoscaler_v2=1" in ray_start, "the first autoscaler knows no labels"
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in ray_start


def test_gpus_are_numbered_by_pci_bus_where_ray_starts(prepared: Config) -> None:
    start = prepared["worker_start_ray_commands"][-1]
    assert start.startswith("export CUDA_DEVICE_ORDER=PCI_BUS_ID; ray start --address=$RAY_HEAD_IP:6379 ")


def test_authentication_is_on_and_the_token_is_nowhere_in_the_file(prepared: Config) -> None:
    assert "-e RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    assert "~/.ray/auth_token" == prepared["file_mounts"]["/home/ray/.ray/auth_token"]
    assert "RAY_AUTH_TOKEN" not in (ROOT / "ray_cluster.yaml").read_text()
