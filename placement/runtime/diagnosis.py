"""The findings of ``placement doctor``, each with what to do. Pure: facts in, findings out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from placement.core.snapshot import NEAR_LABELS
from placement.core.topology import ordinals
from placement.errors import counted
from placement.runtime.discovery import TOPOLOGY_LABEL, NodeInfo
from placement.runtime.orders import Steering
from placement.wire.facts import NodeFacts
from placement.wire.slots import visible_tokens

State = Literal["ok", "warning", "failed", "skipped"]

INSTALL = "install ray-placement {} in the Python that runs `ray start` there, and restart the node"


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: its name: ``ray``, ``service``, ``near``, ``egress``, ``answer``, ``versions``, ``label``, ``driver``,
            ``topology``, ``device order`` or ``steering``.
        node: the node's name; ``None``: it is about the cluster.
        state: ``failed``: placement cannot keep a promise; ``warning``: it can, but something could be better.
        said: what was found.
        fix: what to do; empty if nothing.
    """

    check: str
    node: str | None
    state: State
    said: str
    fix: str = ""


@dataclass(frozen=True)
class NodeSaid:
    """What a process on a node reported.

    Attributes:
        placement, ray, python: versions there.
        cuda_device_order: CUDA_DEVICE_ORDER as workers have it.
        visible_devices: CUDA_VISIBLE_DEVICES at ``ray start``.
        facts: the GPUs in Ray's order; ``None`` on a node without one.
    """

    placement: str
    ray: str
    python: str
    cuda_device_order: str | None = None
    visible_devices: str | None = None
    facts: NodeFacts | None = None


@dataclass(frozen=True)
class Examined:
    """A node, and what it reported, or a sentence why it did not.

    Attributes:
        info: the node as Ray describes it.
        egress: its resources whose names look like egress resources, as given.
        said: the report of a process there.
        steering: the result of the steering test; ``None``: it has no GPU.
    """

    info: NodeInfo
    egress: Mapping[str, float]
    said: NodeSaid | str
    steering: Steering | str | None = None


@dataclass(frozen=True)
class ServiceSaid:
    """The running service.

    Attributes:
        version: of the package that it runs.
        near: the labels that make nodes near each other.
    """

    version: str
    near: Sequence[str]


def diagnose(
    ours: NodeSaid, ray: Finding, service: ServiceSaid | Finding, nodes: Sequence[Examined]
) -> list[Finding]:
    """All findings: of the cluster, then of each node.

    Args:
        ours: the versions of the process that asks.
        ray: the finding about this version of Ray.
        service: the running service, or why none answers.
        nodes: all nodes.
    """
    found = [ray]
    if isinstance(service, Finding):
        found.append(service)
    else:
        found += _of_service(ours, service, nodes)
    if not any(one.info.egress for one in nodes):
        said = "no node may call providers, so deployments of remote providers find no place"
        fix = "if you need them, start a node with --resources='{\"egress\": 64}'"
        found.append(Finding("egress", None, "skipped", said, fix))
    for one in nodes:
        found += _of_node(ours, one)
    return found


def _of_service(ours: NodeSaid, service: ServiceSaid, nodes: Sequence[Examined]) -> Iterator[Finding]:
    if service.version == ours.placement:
        yield Finding("service", None, "ok", f"runs, version {service.version}")
    else:
        said = f"it runs version {service.version}, and this command is version {ours.placement}"
        fix = "`placement down --keep-placements`, then `placement up`, with the same version on all nodes"
        yield Finding("service", None, "failed", said, fix)
    if tuple(service.near) == tuple(NEAR_LABELS):
        return
    with_gpus = [one.info for one in nodes if one.info.gpu_count]
    for label in service.near:
        without = [info.name for info in with_gpus if label not in info.labels]
        if without:
            said = f"{label} says which nodes are near each other, and {counted(len(without), 'GPU node')} "
            said += f"{'has' if len(without) == 1 else 'have'} no such label: {', '.join(without[:5])}"
            yield Finding("near", None, "warning", said, f"`ray start --labels={label}=...` there")


def _of_node(ours: NodeSaid, one: Examined) -> Iterator[Finding]:
    info, said = one.info, one.said
    if isinstance(said, str):
        fix = (
            INSTALL.format(ours.placement)
            if "import" in said
            else "see `ray status`, and the raylet's log there"
        )
        yield Finding("answer", info.name, "failed", said, fix)
    else:
        yield _versions(ours, info, said)
    if (problem := info.label_problem()) is not None:
        fix = f"start the node with another label {TOPOLOGY_LABEL}, or with none where NVML shows its GPUs"
        yield Finding("label", info.name, "failed", problem, fix)
    if isinstance(said, NodeSaid) and said.facts is not None:
        yield from _gpus(info, said, said.facts)
    if one.steering is not None:
        yield _steering(info, one.steering)
    for name, amount in one.egress.items():
        yield _egress(info, name, amount)


def _versions(ours: NodeSaid, info: NodeInfo, said: NodeSaid) -> Finding:
    text = f"placement {said.placement}, Ray {said.ray}, Python {said.python}"
    differs = [
        name
        for name, theirs, wanted in (
            (f"placement {ours.placement}", said.placement, ours.placement),
            (f"Ray {ours.ray}", said.ray, ours.ray),
            (f"Python {_minor(ours.python)}", _minor(said.python), _minor(ours.python)),
        )
        if theirs != wanted
    ]
    if not differs:
        return Finding("versions", info.name, "ok", text)
    fix = f"install {' and '.join(differs)} there, as here, and restart the node"
    return Finding("versions", info.name, "failed", text, fix)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _gpus(info: NodeInfo, said: NodeSaid, facts: NodeFacts) -> Iterator[Finding]:
    if facts.source == "catalogue":
        text = f"{facts.catalogue_name} of the catalogue, by its label; NVML is not read"
        yield Finding("topology", info.name, "ok", text)
        return
    if facts.source == "none":
        text = f"nothing is known of its {counted(info.gpu_count, 'GPU')}: {facts.problem or 'NVML reports nothing'}"
        fix = "install the NVIDIA driver, or make libnvidia-ml.so.1 visible; until then GPUs are chosen by number"
        yield Finding("driver", info.name, "warning", text, fix)
        return
    text = f"driver {facts.driver_version or 'unknown'}, {counted(len(facts.gpus), 'GPU')}"
    if facts.problem or facts.lost():
        unused = f"nothing is placed on GPU {ordinals(sorted(facts.lost()))}" if facts.lost() else None
        text = "; ".join(filter(None, (text, facts.problem, unused)))
        fix = f"see `placement topology --node {info.name}`, and `nvidia-smi` there; start the node with the "
        fix += "healthy GPUs in CUDA_VISIBLE_DEVICES, or with their number in --num-gpus"
        yield Finding("driver", info.name, "failed" if unused else "warning", text, fix)
    else:
        yield Finding("driver", info.name, "ok", text)
    yield _topology(info, facts)
    yield _device_order(info, said, facts)


def _topology(info: NodeInfo, facts: NodeFacts) -> Finding:
    shape = facts.topology()
    whole = [gpu.ordinal for gpu in facts.gpus if gpu.instance is None and not gpu.lost]
    cut = counted(len(facts.slots), "MIG instance") if facts.slots else ""
    if len(whole) > 1 and not shape.known:
        text = "the links between its GPUs are unknown, so they are chosen by number"
        return Finding("topology", info.name, "warning", text, "update the driver, or ask its maker for NVML")
    islands = [island for island in shape.islands if island[0] in whole] if shape.known else []
    links = "NVSwitch" if shape.nvswitch else "islands " + " + ".join(ordinals(one) for one in islands)
    model = f"{len(whole)} x {shape.model or 'GPU'}" if whole else ""
    text = ", ".join(filter(None, (model, links if len(whole) > 1 else "", cut)))
    return Finding("topology", info.name, "ok", text)


def _device_order(info: NodeInfo, said: NodeSaid, facts: NodeFacts) -> Finding:
    """Whether CUDA numbers GPUs as NVML does. With UUIDs the numbers do not matter."""
    tokens = visible_tokens(said.visible_devices)
    check = "device order"
    if said.cuda_device_order == "PCI_BUS_ID":
        return Finding(check, info.name, "ok", "CUDA_DEVICE_ORDER=PCI_BUS_ID")
    if tokens is not None and not any(token.isdigit() for token in tokens):
        return Finding(check, info.name, "ok", "CUDA_VISIBLE_DEVICES names GPUs by UUID")
    if len(facts.gpus) == 1 and tokens is None:
        return Finding(check, info.name, "ok", "there is one GPU")
    is_set = f"is {said.cuda_device_order}" if said.cuda_device_order else "is not set"
    text = f"CUDA_DEVICE_ORDER {is_set}: CUDA numbers GPUs by speed, NVML by PCI bus, so workers may use other GPUs"
    return Finding(
        check, info.name, "failed", text, "export CUDA_DEVICE_ORDER=PCI_BUS_ID before `ray start` there"
    )


def _steering(info: NodeInfo, trial: Steering | str) -> Finding:
    if isinstance(trial, str):
        return Finding(
            "steering", info.name, "failed", trial, "see the raylet's log there, and run this again"
        )
    if trial.wanted is None:
        return Finding("steering", info.name, "skipped", "no GPU is free, so it cannot be tested")
    if trial.got == trial.wanted:
        said = f"GPU {trial.wanted} was wanted and given" if trial.free > 1 else "the one free GPU was given"
        more = f", at attempt {trial.attempts}: others took GPUs meanwhile" if trial.attempts > 1 else ""
        return Finding("steering", info.name, "ok", said + more)
    gave = "none" if trial.got is None else f"GPU {trial.got}"
    said = f"GPU {trial.wanted} was wanted; after {counted(trial.attempts, 'attempt')} Ray still gave {gave}"
    fix = (
        "if others take and free GPUs there all the time, run this again; if not, this Ray gives GPUs in an unknown "
        "way, and exact GPUs are not possible: use a tested version"
    )
    return Finding("steering", info.name, "failed", said, fix)


def _egress(info: NodeInfo, name: str, amount: float) -> Finding:
    if name in info.egress and amount >= 1:
        return Finding("egress", info.name, "ok", f"{name}: {info.egress[name]} requests at once")
    if name in info.egress:
        said = f"{name}: {amount:g} is less than one request at once"
        fix = f"give it a whole number: --resources='{{\"{name}\": 64}}'"
        return Finding("egress", info.name, "failed", said, fix)
    said = f"the resource {name} is not an egress resource"
    return Finding(
        "egress", info.name, "warning", said, "name it egress, or egress_PROVIDER, in lower-case letters"
    )


def has_failed(findings: Collection[Finding]) -> bool:
    """Whether any check failed."""
    return any(one.state == "failed" for one in findings)
