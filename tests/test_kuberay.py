"""The manifests of ``deploy/kuberay`` are what Kubernetes, KubeRay and Ray's autoscaler read.

Always: Ray's own reader of RayClusters, its autoscaler's choice of groups, and the shell. By KubeRay's schemas where
``KUBERAY_CRDS`` names their folder (``helm-chart/kuberay-operator/crds`` of its repository), by Kubernetes' own where
kubernetes-validate is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator

from placement import Deployment
from placement.core.labels import parse_condition
from placement.runtime.needs import needs_of
from placement.wire.requests import request_unchecked
from tests import fake_nvml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "kuberay"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CRDS = os.environ.get("KUBERAY_CRDS")

Json = dict[str, Any]


def documents(name: str) -> list[Json]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


RESOURCES = [documents(f"{name}.yaml")[0] for name in ("raycluster", "rayservice", "rayjob")]
CLUSTER, SERVICE, JOB = RESOURCES
SPECS = {
    "RayCluster": CLUSTER["spec"],
    "RayService": SERVICE["spec"]["rayClusterConfig"],
    "RayJob": JOB["spec"]["rayClusterSpec"],
}
GROUPS = {
    f"{kind}/{group.get('groupName', 'head')}": group
    for kind, spec in SPECS.items()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
}
HEADS = {name: group for name, group in GROUPS.items() if name.endswith("/head")}
WITH_GPUS = {name: group for name, group in GROUPS.items() if "/a100" in name}
WHOLE = {name: group for name, group in WITH_GPUS.items() if not name.endswith("-mig")}

each_cluster = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)


def ray_container(group: Json) -> Json:
    """The first is Ray's."""
    return group["template"]["spec"]["containers"][0]


def environment(group: Json) -> dict[str, str]:
    return {one["name"]: one["value"] for one in ray_container(group).get("env", ()) if "value" in one}


def as_kuberay_runs_it(group: Json, ray_start: str) -> str:
    """What bash is given for a container: its command, word by word, then Ray's (BuildPod in KubeRay's pod.go)."""
    container = ray_container(group)
    words = container.get("command", []) + container.get("args", [])
    before = "".join(f" {word} " for word in words)
    raised = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {ray_start}"
    return f"{before} && {raised}" if before else raised


def read_by_ray(spec: Json) -> Json:
    """The node types, as the autoscaler in the head's pod reads them."""
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "placement", "namespace": "default"}, "spec": spec}
    )


# What Ray reads.


def test_ray_reads_of_each_group_what_its_nodes_will_have() -> None:
    types = read_by_ray(CLUSTER["spec"])["available_node_types"]
    read = {
        name: ({k: v for k, v in kind["resources"].items() if k != "memory"}, kind["labels"])
        for name, kind in types.items()
    }
    assert {
        "headgroup": ({"CPU": 0}, {}),
        "a100-8x": ({"CPU": 64, "GPU": 8}, {"ray.io/accelerator-type": "A100"}),
        "a100-mig": ({"CPU": 12, "GPU": 7}, {"mig": "1g.10gb"}),
        "egress": ({"CPU": 2, "egress": 64}, {}),
    } == read


@each_cluster
def test_no_work_runs_on_the_head_and_the_second_autoscaler_is_asked(spec: Json) -> None:
    config = read_by_ray(spec)
    head = config["available_node_types"]["headgroup"]
    assert {"CPU": 0, "memory": 8 * 2**30} == head["resources"]
    assert spec["enableInTreeAutoscaling"] is True
    assert "v2" == spec["autoscalerOptions"]["version"], "the first knows no labels"
    assert 10 == config["idle_timeout_minutes"]


FIRST = {"a100-mig": 1, "egress": 2}
"""What comes before anything is asked for."""
DEPLOYMENTS = [
    ("a100-8x", {"gpus": 4, "constraints": {"accelerators": ["A100"]}}, 2),
    # The two that are there carry one such replica each.
    ("egress", {"model": "gpt-4o", "serving": {"max_concurrent": 48}}, 1),
]


@pytest.mark.parametrize(("group", "asked", "brought"), DEPLOYMENTS, ids=[one[0] for one in DEPLOYMENTS])
def test_what_waits_brings_nodes_of_its_group(group: str, asked: Json, brought: int) -> None:
    assert Counter(FIRST) + Counter({group: brought}) == launched(CLUSTER["spec"], *([asked] * 3))


def test_no_node_with_instances_comes_for_whole_gpus_nor_one_with_gpus_for_an_instance() -> None:
    mig = {"mig": "1g.10gb", "constraints": {"node_labels": {"mig": "1g.10gb"}}}
    assert FIRST == launched(CLUSTER["spec"], *([mig] * 9)), "more than there are, and still nothing comes"
    whole = {"gpus": 1, "constraints": {"accelerators": ["A100"]}}
    assert FIRST | {"a100-8x": 1} == launched(CLUSTER["spec"], *([whole] * 8))


def launched(spec: Json, *deployments: Json) -> Counter[str]:
    """How many nodes of each group Ray's autoscaler starts on an empty cluster for what placement asks it for."""
    config = AutoscalingConfig(read_by_ray(spec))
    gangs = []
    for number, fields in enumerate(deployments):
        wanted = Deployment.model_validate({"name": f"d{number}", "model": "org/m", **fields})
        needs = needs_of(request_unchecked(wanted, (0,), {}), (0,))
        assert not isinstance(needs, str), needs
        for need in needs.values():
            conditions = [
                (key, operator(wanted), sorted(values))
                for key, (wanted, values) in ((key, parse_condition(text)) for key, text in need.labels)
            ]
            way = need.ways[-1]  # `egress` after `egress_openai`
            requests = [
                ResourceRequestUtil.make(dict(bundle), label_selectors=[conditions]) for bundle in way.bundles
            ]
            gangs.append(GangResourceRequest(requests=requests))
    reply = ResourceDemandScheduler(event_logger=None).schedule(
        SchedulingRequest(
            disable_launch_config_check=config.disable_launch_config_check(),
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=gangs,
        )
    )
    return Counter({one.instance_type: one.count for one in reply.to_launch})


def operator(wanted: bool) -> Any:
    return LabelSelectorOperator.Value("LABEL_OPERATOR_IN" if wanted else "LABEL_OPERATOR_NOT_IN")


# What the nodes are.


def test_gpu_nodes_promise_the_accelerator_that_ray_will_find_on_them() -> None:
    """A label that no type promises brings no node; one that the nodes then lack brings one after the other."""
    for name, group in WHOLE.items():
        # GPU feature discovery writes NVML's name with hyphens for blanks.
        product = group["template"]["spec"]["nodeSelector"]["nvidia.com/gpu.product"].replace("-", " ", 1)
        found = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(product)
        assert found == group["labels"]["ray.io/accelerator-type"], name


def test_gpus_are_numbered_by_pci_bus_where_ray_starts() -> None:
    for name, group in WITH_GPUS.items():
        assert "PCI_BUS_ID" == environment(group)["CUDA_DEVICE_ORDER"], name


@each_group
def test_only_nodes_with_gpus_have_the_image_that_asks_for_all_gpus(group: Json) -> None:
    container = ray_container(group)
    devices = [name for name in container["resources"]["limits"] if name.startswith("nvidia.com/")]
    assert container["image"].endswith("-gpu") == bool(devices)


@each_cluster
def test_the_images_bring_the_ray_and_the_python_the_package_needs(spec: Json) -> None:
    (needed,) = (one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "ray")
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    images = {ray_container(group)["image"].removesuffix("-gpu") for group in groups}
    assert {f"placement-ray:{spec['rayVersion']}-py311"} == images
    assert needed.specifier.contains(spec["rayVersion"])
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11")
    built = re.findall(r"ray:([\w.]+-py\d+)", (FOLDER / "Dockerfile").read_text())
    assert {f"{spec['rayVersion']}-py311"} == set(built)


def test_the_egress_nodes_read_their_key_from_a_secret_and_no_secret_is_in_a_file() -> None:
    for path in FOLDER.iterdir():
        assert "kind: Secret" not in path.read_text(), path.name
    key, *_ = ray_container(GROUPS["RayCluster/egress"])["env"]
    assert "OPENAI_API_KEY" == key["name"]
    assert "secretKeyRef" in key["valueFrom"]


def test_redis_is_where_the_head_looks_for_it() -> None:
    service, redis = documents("redis.yaml")
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    container = redis["spec"]["template"]["spec"]["containers"][0]
    password = next(one for one in container["env"] if one["name"] == "REDIS_PASSWORD")["valueFrom"]
    for kind in ("RayCluster", "RayService"):
        options = SPECS[kind]["gcsFaultToleranceOptions"]
        assert {"redisAddress": address, "redisPassword": {"valueFrom": password}} == options
    assert service["spec"]["selector"] == redis["spec"]["template"]["metadata"]["labels"]


# What the containers run.


@each_group
def test_kuberay_can_append_its_own_command(group: Json) -> None:
    text = as_kuberay_runs_it(group, "ray start --block")
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
    assert (0, "") == (done.returncode, done.stderr)
    own = " ".join(ray_container(group).get("command", ()))
    assert "ray start" not in own, "KubeRay would then not add its own"
    assert not re.search(r"\$\$|\$\([\w.-]+\)", own), "Kubernetes replaces these itself"


def test_a_node_with_instances_tells_ray_all_of_them() -> None:
    group = GROUPS["RayCluster/a100-mig"]
    instances = [fake_nvml.mig_uuid(0, number) for number in range(7)]
    listed = "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-{0})\n" + "".join(
        f"  MIG 1g.10gb     Device  {number}: (UUID: {one})\n" for number, one in enumerate(instances)
    )
    text = as_kuberay_runs_it(group, "echo $CUDA_VISIBLE_DEVICES")
    script = f'nvidia-smi() {{ [ $1 = -L ] && printf %s "$LISTED"; }}\n{text}'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "LISTED": listed}
    )
    assert ",".join(instances) == done.stdout.strip()
    assert str(len(instances)) == group["resources"]["GPU"]
    assert group["resources"]["GPU"] == ray_container(group)["resources"]["limits"]["nvidia.com/mig-1g.10gb"]


@pytest.mark.parametrize("group", HEADS.values(), ids=HEADS)
def test_the_head_starts_the_service(group: Json) -> None:
    assert ["(until sleep 10; placement up; do :; done &)"] == ray_container(group)["command"]


def test_the_job_runs_an_example_as_it_can_be_called() -> None:
    _, script, *arguments = JOB["spec"]["entrypoint"].split()
    (mount,) = ray_container(GROUPS["RayJob/head"])["volumeMounts"]
    assert mount["mountPath"] == str(Path(script).parent)
    command = [sys.executable, str(ROOT / "examples" / Path(script).name), *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (0, "") == (done.returncode, done.stderr)


def test_the_application_is_found_on_every_pod() -> None:
    for name, group in GROUPS.items():
        if name.startswith("RayService/"):
            mounts = {one["mountPath"] for one in ray_container(group)["volumeMounts"]}
            assert {environment(group)["PYTHONPATH"]} == mounts, name
    (application,) = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert re.search(rf"^{name} = Engine\.bind\(\)$", (FOLDER / f"{module}.py").read_text(), re.M)
    assert ["Engine"] == [one["name"] for one in application["deployments"]]


def test_serve_accepts_its_configuration() -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="Ray Serve is not installed (ray[serve])")
    schema.ServeDeploySchema.model_validate(yaml.safe_load(SERVICE["spec"]["serveConfigV2"]))


# What KubeRay's operator refuses beyond its schemas (ValidateRayClusterSpec in its validation.go).


@each_group
def test_resources_and_labels_are_said_once_and_in_strings(group: Json) -> None:
    assert {} == group["rayStartParams"], "resources and labels are the group's own"
    for value in [*group.get("resources", {}).values(), *group.get("labels", {}).values()]:
        assert isinstance(value, str)


@each_cluster
def test_tokens_are_asked_for_and_pods_restart_as_kuberay_wants(spec: Json) -> None:
    assert {"mode": "token"} == spec["authOptions"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        # KubeRay's own probes and restart policy; a failed postStart would end the container.
        assert not {"livenessProbe", "readinessProbe", "lifecycle"} & ray_container(group).keys()
        assert "restartPolicy" not in group["template"]["spec"]


# By schema.


@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS does not name the folder of KubeRay's CRDs")
@pytest.mark.parametrize("resource", RESOURCES, ids=SPECS)
def test_kuberays_schemas_accept_it(resource: Json) -> None:
    schema = crd_schema(resource)
    assert [] == [
        f"{error.json_path}: {error.message}" for error in Draft7Validator(schema).iter_errors(resource)
    ]


@pytest.mark.skipif(CRDS is None, reason="KUBERAY_CRDS does not name the folder of KubeRay's CRDs")
def test_kuberays_schemas_refuse_a_misspelt_field_and_a_number_for_a_string() -> None:
    validator = Draft7Validator(crd_schema(CLUSTER))
    for path, value in (("workerGroupSpecs.0.minReplica", 1), ("headGroupSpec.resources.CPU", 0)):
        broken = yaml.safe_load(yaml.safe_dump(CLUSTER))
        *parents, last = path.split(".")
        at = broken["spec"]
        for part in parents:
            at = at[int(part) if isinstance(at, list) else part]
        at[last] = value
        assert not validator.is_valid(broken), path


def crd_schema(resource: Json) -> Json:
    """The schema of a resource, in which a field that is not in it is refused, as the API server does it."""
    path = Path(CRDS or "") / f"ray.io_{resource['kind'].lower()}s.yaml"
    (version,) = (
        one
        for one in yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]["versions"]
        if f"ray.io/{one['name']}" == resource["apiVersion"]
    )
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    is_object = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    # `metadata` is the API server's own.
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner["additionalProperties"] = False
    return inner


PODS = {
    name: {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
    for name, group in GROUPS.items()
}
PLAIN = {one["kind"]: one for one in documents("redis.yaml")}


@pytest.mark.parametrize("resource", [*PODS.values(), *PLAIN.values()], ids=[*PODS, *PLAIN])
def test_kubernetes_accepts_it(resource: Json) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    kubernetes.validate(resource, kubernetes.latest_version(), strict=True)
