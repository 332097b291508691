"""What ``placement doctor`` makes of what nodes say: one finding a check, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from placement import topologies
from placement.cli.views.console import console
from placement.cli.views.diagnosis import diagnosis_view
from placement.runtime.diagnosis import Examined, Finding, NodeSaid, ServiceSaid, State, diagnose, has_failed
from placement.runtime.discovery import NodeInfo
from placement.runtime.orders import Steering
from placement.wire.facts import GpuFacts, NodeFacts

OURS = NodeSaid("0.1.0", "2.60.0", "3.11.7")
RAY = Finding("ray", None, "ok", "Ray 2.60.0")
FACTS = topologies.facts("a100-pcie-4x").model_copy(update={"source": "nvml", "driver_version": "570.86"})
GPUS = replace(OURS, cuda_device_order="PCI_BUS_ID", facts=FACTS)
GIVEN = Steering(3, 3, 4, 1)
INFO = NodeInfo("id", "gpu-a", "127.0.0.3", 4, egress={"egress": 8})
NODE = Examined(INFO, {"egress": 8.0}, GPUS, GIVEN)
SERVICE = ServiceSaid("0.1.0", ("zone",))


def found(node: Examined = NODE, service: ServiceSaid | Finding = SERVICE) -> list[Finding]:
    return diagnose(
        OURS, RAY, service, [replace(node, info=replace(node.info, labels={"zone": "z", **node.info.labels}))]
    )


def the(check: str, findings: list[Finding]) -> tuple[State, str, str]:
    [one] = [one for one in findings if one.check == check]
    return one.state, one.said, one.fix


def test_a_node_on_which_all_is_well() -> None:
    findings = found()
    assert {one.state for one in findings} == {"ok"}
    assert not has_failed(findings)
    assert [(one.check, one.said) for one in findings if one.node == "gpu-a"] == [
        ("versions", "placement 0.1.0, Ray 2.60.0, Python 3.11.7"),
        ("driver", "driver 570.86, 4 GPUs"),
        ("topology", "4 x NVIDIA A100 80GB PCIe, islands 0-1 + 2-3"),
        ("device order", "CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        ("steering", "GPU 3 was wanted and given"),
        ("egress", "egress: 8 requests at once"),
    ]


def node_said(**fields: Any) -> Examined:
    return replace(NODE, said=replace(GPUS, **fields))


def facts(**fields: Any) -> Examined:
    return node_said(facts=FACTS.model_copy(update=fields))


def info(**fields: Any) -> Examined:
    return replace(NODE, info=replace(INFO, **fields))


ONE_GPU = FACTS.model_copy(update={"gpus": FACTS.gpus[:1], "pairs": (), "nics": ()})
LOST = (*FACTS.gpus[:3], GpuFacts(ordinal=3, errors=("NVML does not show it",)))


@pytest.mark.parametrize(
    ("node", "check", "state", "said", "fix"),
    [
        (replace(NODE, said="no answer within 30 s", steering=None), "answer", "failed", "within 30 s", "raylet's log"),
        (
            replace(NODE, said="cannot import placement: No module named 'placement'", steering=None),
            "answer", "failed", "No module named 'placement'", "install ray-placement 0.1.0",
        ),
        (node_said(ray="2.59.0"), "versions", "failed", "Ray 2.59.0", "install Ray 2.60.0 there"),
        (node_said(placement="0.0.9"), "versions", "failed", "placement 0.0.9", "install placement 0.1.0 there"),
        (node_said(python="3.12.1"), "versions", "failed", "Python 3.12.1", "install Python 3.11 there"),
        (node_said(python="3.11.9"), "versions", "ok", "Python 3.11.9", ""),
        (info(labels={"placement/topology": "dgx-9"}), "label", "failed", "unknown topology 'dgx-9'", "another label"),
        (info(labels={"placement/topology": "dgx-1v"}), "label", "failed", "has 8 GPUs, the node 4", "another label"),
        (node_said(facts=topologies.facts("dgx-1v")), "topology", "ok", "dgx-1v of the catalogue", ""),
        (
            node_said(facts=NodeFacts(source="none", problem="no NVIDIA driver here")),
            "driver", "warning", "nothing is known of its 4 GPUs: no NVIDIA driver here", "libnvidia-ml.so.1",
        ),
        (facts(gpus=LOST), "driver", "failed", "nothing is placed on GPU 3", "placement topology --node gpu-a"),
        (facts(problem="NVML answered in part: x"), "driver", "warning", "answered in part", "nvidia-smi"),
        (facts(pairs=()), "topology", "warning", "the links between its GPUs are unknown", "driver"),
        (node_said(cuda_device_order=None), "device order", "failed", "is not set", "export CUDA_DEVICE"),
        (
            node_said(cuda_device_order="FASTEST_FIRST"),
            "device order", "failed", "is FASTEST_FIRST", "export CUDA_DEVICE_ORDER=PCI_BUS_ID",
        ),
        (node_said(cuda_device_order=None, visible_devices="1,0"), "device order", "failed", "is not set", "export"),
        (node_said(cuda_device_order=None, visible_devices="GPU-a,MIG-b"), "device order", "ok", "by UUID", ""),
        (
            node_said(cuda_device_order=None, facts=ONE_GPU),
            "device order", "ok", "there is one GPU", "",
        ),
        (replace(NODE, steering=Steering(3, 3, 4, 2)), "steering", "ok", "at attempt 2: others took", ""),
        (replace(NODE, steering=Steering(2, 2, 1, 1)), "steering", "ok", "the one free GPU was given", ""),
        (replace(NODE, steering=Steering(None, None, 0, 3)), "steering", "skipped", "no GPU is free", ""),
        (replace(NODE, steering=Steering(3, 0, 4, 12)), "steering", "failed", "Ray still gave GPU 0", "again"),
        (replace(NODE, steering=Steering(3, None, 4, 12)), "steering", "failed", "still gave none", "run this again"),
        (replace(NODE, steering="no answer within 30 s"), "steering", "failed", "within 30 s", "run this again"),
        (
            replace(info(egress={"egress": 0}), egress={"egress": 0.5}),
            "egress", "failed", "0.5 is less than one request", "'{\"egress\": 64}'",
        ),
        (replace(NODE, egress={"Egress-openai": 9.0}), "egress", "warning", "Egress-openai", "egress_PROVIDER"),
    ],
)  # fmt: skip
def test_what_is_found_and_what_to_do(node: Examined, check: str, state: State, said: str, fix: str) -> None:
    findings = found(node)
    assert the(check, findings)[0] == state
    assert said in the(check, findings)[1]
    assert fix in the(check, findings)[2]
    assert bool(the(check, findings)[2]) == (state in ("failed", "warning"))
    assert has_failed(findings) == (state == "failed")


@pytest.mark.parametrize(
    ("service", "check", "state", "said"),
    [
        (
            ServiceSaid("0.0.9", ("zone",)),
            "service",
            "failed",
            "it runs version 0.0.9, and this command is version 0.1.0",
        ),
        (ServiceSaid("0.1.0", ("zone", "rack")), "near", "warning", "1 GPU node has no such label: gpu-a"),
        (
            Finding("service", None, "warning", "it does not run", "`placement up`"),
            "service",
            "warning",
            "not run",
        ),
    ],
)
def test_the_service(service: ServiceSaid | Finding, check: str, state: State, said: str) -> None:
    findings = found(service=service)
    assert the(check, findings)[0] == state
    assert said in the(check, findings)[1]
    assert the(check, findings)[2]


def test_a_cluster_without_egress_says_how_to_have_it() -> None:
    state, said, fix = the("egress", found(replace(info(egress={}), egress={})))
    assert (state, "no node may call providers" in said, "--resources" in fix) == ("skipped", True, True)


def test_what_is_wrong_is_shown_first_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    draw: Callable[..., None] = console().print
    for part in diagnosis_view([vars(one) for one in found(node_said(cuda_device_order=None))]):
        draw(part)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("failed  gpu-a: device order: CUDA_DEVICE_ORDER is not set")
    assert any(line.startswith("        -> export CUDA_DEVICE_ORDER=PCI_BUS_ID") for line in lines)
    assert lines[-1] == "1 failed, 7 ok"
