"""Random clusters and requests: small, and with every feature at once. The same for a seed."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import ANY_PROFILE, GIB, WHOLE, GpuName, Needs, Within
from placement.core.node import Node
from placement.core.policy import Policy
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology
from placement.wire.deployment import Deployment
from placement.wire.held import HeldDeployment, HeldReplica
from placement.wire.plans import PlacementPlan

EXAMPLES = int(os.environ.get("ORACLE_EXAMPLES", "0"))


def examples(usually: int) -> settings:
    """So many in the suite, and as many as are asked for in a long run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=EXAMPLES or usually, deadline=None, suppress_health_check=slow)


def _row() -> Topology:
    """NV1 - NV2 - NV1 in a row: the fastest pair is two that others need."""
    links = [[UNKNOWN_LINK] * 4 for _ in range(4)]
    for a, b, nvlinks in [(0, 1, 1), (1, 2, 2), (2, 3, 1), (0, 2, 0), (1, 3, 0), (0, 3, 0)]:
        links[a][b] = links[b][a] = Link(Path.NVLINK, nvlinks) if nvlinks else Link(Path.SYS)
    return Topology(tuple(map(tuple, links)), numa=((0,), (0,), (1,), (1,)), model="Tesla V100-SXM2-32GB")


def _part(name: str, gpus: Sequence[int]) -> Topology:
    """Some GPUs of a machine of the catalogue."""
    whole = topologies.load(name)
    links = tuple(tuple(whole.links[a][b] for b in gpus) for a in gpus)
    return Topology(links, numa=tuple(whole.numa[gpu] for gpu in gpus), model=whole.model)


MACHINES = [topologies.load(name) for name in ("a100-pcie-4x", "hgx-a100-4gpu", "l40s-4x")]
MACHINES += [
    _row(),
    _part("dgx-1v", range(4)),
    _part("dgx-1v", (0, 1, 2, 6)),
    _part("dgx-1v", (0, 3, 4, 5, 7)),
]
MACHINES += [_part("a100-pcie-4x", (0,)), _part("a100-pcie-4x", (0, 2)), Topology.unknown(3)]
SMALL, LARGE = "1g.10gb", "3g.40gb"
ZONE, RACK = "ray.io/availability-zone", "rack"
EGRESS = ("egress", "egress_openai", "egress_gemini")
NAMES = ("node-0", "id-1", "10.0.0.2", "node-3")
MODES = ("whole", "share", "memory", "mig", "stages", "parts", "larger")
"""What a replica may ask for."""
EVERYTHING = "everything"
"""A cluster for deployments of all kinds."""


def cluster(chance: Random, mode: str) -> Snapshot:
    """Up to four nodes of one machine or of several, more or less busy, on which what is asked for is likely."""
    everything, on_cpus = mode == EVERYTHING, mode == "cpus"
    shared = chance.random() < (1 if mode in ("share", "memory") else 0.4 if everything else 0.2)
    cut = chance.random() < (1 if mode == "mig" else 0.4 if everything else 0.1)
    labelled = chance.random() < (1 if mode in ("parts", "larger") else 0.5)
    egress = chance.random() < (1 if mode == "remote" or everything else 0.1)
    seen, sized = chance.random() < 0.5, chance.random() < 0.6
    palette = chance.choices(MACHINES, k=chance.randint(1, 2))
    free = (5, 10) if everything or mode in ("stages", "parts", "larger") else (1, 2, 5)
    gpu_states: list[str | int] = ["busy", *["free"] * chance.choice(free)]
    gpu_states += [250, 500, 750] if shared else []
    gpu_states += [SMALL, LARGE, "?", "busy " + SMALL] if cut else []
    if mode == "mig":
        gpu_states = chance.sample([*gpu_states, SMALL, LARGE], k=3)
    usual = chance.choices((None, 10, 70, 70), k=5)
    made: list[tuple[Topology, list[str | int], dict[str, Any]]] = []
    for i in range(chance.randint(2 if everything else 1, 4)):
        if i and chance.random() < 0.3:  # one like another, but for which GPUs are in which state
            machine, states, facts = chance.choice(made)
            states = chance.sample(states, k=len(states))
        else:
            machine = chance.choice(
                [*palette, *palette, Topology.unknown(0)] if egress or on_cpus else palette
            )
            states = chance.choices(gpu_states, k=len(machine))
            facts = {"cpu_milli": 64_000, "memory_bytes": 512 * GIB}
            facts["gpu_memory_bytes"] = chance.choice([None, 24 * GIB, 80 * GIB, 80 * GIB])
            facts["problem"] = chance.choice([*[None] * 8, "is draining"])
            if seen:
                gibs = usual if chance.random() < 0.7 else chance.choices(usual, k=len(usual))
                facts["free_memory"] = {gpu: gib * GIB for gpu, gib in enumerate(gibs[: len(machine)]) if gib}
            if labelled:
                facts |= description(chance)
            if sized or on_cpus:
                facts["cpu_milli"] = chance.choice([500, 1000, 2000, 4000, *[6000] * on_cpus])
                facts["memory_bytes"] = chance.choice([8, 64]) * GIB
            if egress:
                units = {resource: chance.choice([None, 0, 1, 2, 5]) for resource in EGRESS}
                facts["egress"] = {resource: left for resource, left in units.items() if left is not None}
                facts["serving"] = counted(chance.choice(((), (("openai", "k"),))))
        made.append((machine, states, facts))
    nodes = [
        Node(
            f"id-{i}",
            f"node-{i}",
            f"10.0.0.{i}",
            machine,
            uuids={gpu: uuid(i, gpu) for gpu in range(len(machine)) if machine.known},
            **gpu_fields(states),
            **facts,
        )
        for i, (machine, states, facts) in enumerate(made)
    ]
    return Snapshot(chance.sample(nodes, k=len(nodes)))


def uuid(node: int, gpu: int) -> str:
    """What a GPU of a node is called."""
    return f"GPU-{node}000-{gpu}"


def named(chance: Random, least: int) -> tuple[GpuName, ...]:
    """GPUs that are named: ordinals, UUIDs of one node, or both."""
    node = chance.choice((0, 0, 1, 2))
    gpus = chance.sample(range(4), k=chance.choice([k for k in (1, 2, 3, 4, 4) if k >= min(least, 4)]))
    by_uuid = chance.choice((0.0, 0.0, 0.5, 1.0))
    names = [uuid(node, gpu) if chance.random() < by_uuid else gpu for gpu in gpus]
    return tuple(sorted(names, key=lambda name: (isinstance(name, str), name)))


def gpu_fields(states: Sequence[str | int]) -> dict[str, Any]:
    """What a node holds, from what each of its GPUs is: free, busy, shared, or an instance."""
    of = dict(enumerate(states))
    profiles = {gpu: str(state).removeprefix("busy ") for gpu, state in of.items()}
    return {
        "free": frozenset(gpu for gpu, state in of.items() if state == "free"),
        "rests": {gpu: state for gpu, state in of.items() if isinstance(state, int)},
        "slots": {gpu: profile for gpu, profile in profiles.items() if profile in (SMALL, LARGE, "?")},
        "instances": {gpu: state for gpu, state in of.items() if state in (SMALL, LARGE, "?")},
    }


def counted(items: Collection[Any]) -> dict[Any, int]:
    """What is on a node, once each."""
    return dict.fromkeys(items, 1)


def description(chance: Random) -> dict[str, Any]:
    """What a node is called, and who is on it."""
    values = {
        ZONE: chance.choice([None, "a", "a", "b"]),
        RACK: chance.choice([None, "1", "2"]),
        GPU_DOMAIN_LABEL: chance.choice([None, "x", "x", "x", "y"]),
    }
    return {
        "labels": {label: value for label, value in values.items() if value is not None},
        "accelerators": frozenset(chance.choice(((), ("A100",), ("A100", "A100-80G")))),
        "compute_capability": chance.choice([None, (7, 0), (8, 0)]),
        "deployments": counted([name for name in "xy" if chance.random() < 0.5]),
    }


def limits(chance: Random) -> dict[str, Any]:
    """Constraints on nodes: mostly none, now and then several."""
    conditions = ("a", "!a", "in(a, 1)", "!in(b, 2)", "1")
    choices: dict[str, Any] = {
        "gpu_nodes": tuple(chance.sample(NAMES, k=chance.randint(1, 3))),
        "labels": {chance.choice((ZONE, RACK)): chance.choice(conditions)},
        "accelerators": chance.choice((("A100",), ("A100-80G", "H100"))),
        "compute_capability": chance.choice(((7, 5), (8, 0))),
        "apart_from": ("x",),
        "near_to": ("y",),
        "kept_away_by": ("x",),
        "spread_label": chance.choice((ZONE, RACK)),
    }
    found = {
        name: choices[name]
        for name in chance.sample(sorted(choices), k=chance.choice((0, 0, 0, 0, 0, 0, 1, 1, 2)))
    }
    if "spread_label" in found:
        found["max_per_domain"] = chance.choice((1, 2))
    return found


def standing(chance: Random) -> dict[str, int]:
    """Where replicas of the same deployment are already; also on a node that is no more."""
    return {node: chance.choice((1, 2)) for node in ("id-0", "id-1", "gone") if chance.random() < 0.2}


def gpu_request(chance: Random, mode: str) -> Request:
    """A request for GPUs: whole ones, a share, an instance, or several sets."""
    fields = limits(chance)
    needs: dict[str, Any] = {"gpus": 1}
    if mode == "share":
        needs["share"] = chance.choice((100, 250, 300, 500, 750))
    elif mode == "memory":
        needs["memory_bytes"] = chance.choice((6, 20, 24, 50, 80, 100)) * GIB
    elif mode == "mig":
        needs["profile"] = chance.choice((SMALL, LARGE))
    else:
        needs["gpus"] = chance.choice((1, 1, 2, 2, 2, 3, 4) if mode == "whole" else (1, 2, 2, 2))
        if mode == "stages":
            fields["stages"] = chance.choice((2, 2, 3))
        elif mode == "parts":
            fields["parts"] = 2
            fields["stages"] = chance.choice((1, 1, 2))
        elif mode == "larger":
            needs["gpus"] = chance.choice((2, 4, 6, 8))
            fields["divisible"] = chance.random() < 0.7
        if needs["gpus"] > 1:
            needs["within"] = chance.choice([Within.NODE, Within.NODE, *Within])
            needs["min_bandwidth_gb_per_s"] = chance.choice((0.0, 0.0, 15.0, 24.0, 50.0))
    if chance.random() < (0.5 if mode == "mig" else 0.2):
        needs["free_memory_bytes"] = 40 * GIB
    if chance.random() < 0.5:
        fields["cpu_milli"] = chance.choice((500, 1000, 1000)) * needs["gpus"]
        fields["memory_bytes"] = chance.choice((0, 4, 6)) * GIB * needs["gpus"]
    if mode not in ("parts", "larger") and chance.random() < 0.25:
        needs["named"] = named(chance, needs["gpus"] * fields.get("stages", 1))
        if mode == "mig" and chance.random() < 0.3:
            needs["profile"] = ANY_PROFILE
    return Request(
        "d",
        tuple(range(chance.choice((1, 1, 2, 3)))),
        Needs(**needs),
        policy=chance.choice([*Policy, Policy.FRAGMENTATION]),
        standing=standing(chance),
        **fields,
    )


def remote_request(chance: Random) -> Request:
    """A request for egress units."""
    others: tuple[dict[str, Any], ...] = (
        *({}, {}, {}, {}),
        *({"apart_from": ("x",)}, {"near_to": ("y",)}, {"kept_away_by": ("x",)}),
    )
    return Request(
        "d",
        tuple(range(chance.randint(1, 4))),
        provider="openai",
        key=chance.choice(("k", "other")),
        egress=chance.choice((1, 1, 2, 3)),
        egress_nodes=chance.choice((None, tuple(chance.sample(NAMES, k=2)))),
        egress_preference=tuple(chance.sample(NAMES, k=chance.randint(0, 2))),
        standing=standing(chance),
        **chance.choice(others),
    )


def cpu_request(chance: Random) -> Request:
    """A request for CPUs alone. What it asks of GPUs is of no concern."""
    fields = limits(chance)
    if "gpu_nodes" in fields and chance.random() < 0.8:
        fields["cpu_nodes"] = fields.pop("gpu_nodes")
    return Request(
        "d",
        tuple(range(chance.randint(1, 4))),
        policy=chance.choice([*Policy]),
        cpu_milli=chance.choice((250, 500, 1000, 1500)),
        memory_bytes=chance.choice((0, 0, 4, 6)) * GIB,
        spared_milli=chance.choice((1000, 1000, 0)),
        standing=standing(chance),
        **fields,
    )


def request_of_kind(chance: Random, mode: str) -> Request:
    """A request of one of the modes, or for egress units, or for CPUs alone."""
    if mode == "cpus":
        return cpu_request(chance)
    return remote_request(chance) if mode == "remote" else gpu_request(chance, mode)


SEEDS = st.integers(0, 2**32)
"""Drawn one by one, most of what a case is made of would be of the simplest."""


def case(mode: str, seed: int) -> tuple[Snapshot, Request]:
    """A cluster and a request, the same for a seed."""
    chance = Random(f"{mode} {seed}")
    snapshot = cluster(chance, mode)
    request = request_of_kind(chance, mode)
    if request.provider is not None:  # a replica that stands calls what the others call
        calls = request.provider, request.key or ""
        nodes = [
            replace(node, serving=counted({*node.serving, calls})) if node.id in request.standing else node
            for node in snapshot.nodes
        ]
        snapshot = Snapshot(nodes)
    for node in snapshot.nodes:
        note(shown(node))
    note(str(request))
    return snapshot, request


def shown(node: Node) -> str:
    """A node without the links of its GPUs."""
    fields = {name: getattr(node, name) for name in Node.__dataclass_fields__ if name != "topology"}
    return f"{len(node.topology)} x {node.topology.model} {fields}"


def offered(snapshot: Snapshot) -> object:
    """All that a snapshot says. What it has worked out by now must be what a fresh one works out."""
    fresh = Snapshot(snapshot.nodes, snapshot.near)
    for (needs, policy), known in snapshot._offers.items():
        assert known._nodes == fresh.offers(needs, policy)._nodes
    if snapshot.room is not None:
        assert vars(snapshot.room)["_nodes"] == list(snapshot.nodes)
    nodes = [
        [copy.copy(getattr(node, field)) for field in Node.__dataclass_fields__] for node in snapshot.nodes
    ]
    return nodes, dict(snapshot.mix.kinds)


def held_as(
    deployment: Deployment, planned: PlacementPlan, before: HeldDeployment | None = None
) -> HeldDeployment:
    """What stands once a plan has been carried out, of which some stood ``before``."""
    replicas = tuple(
        HeldReplica(
            replica_index=one.replica_index,
            node=one.node,
            gpus=tuple(one.gpus),
            ranks=tuple(one.ranks),
            share=round(one.share * WHOLE),
            shares=tuple(round(share * WHOLE) for share in one.shares),
            profile=one.mig,
            cpu_milli=round(one.cpus * 1000) or deployment.cpu_milli_per_gpu * len(one.gpus),
            memory_bytes=one.memory_bytes or deployment.memory_bytes_per_gpu * len(one.gpus),
            egress_resource=one.egress_resource,
            egress_units=one.egress_units,
            set_size=one.set_size,
        )
        for one in planned.assignments
        if one.replica_index not in planned.pending
    )
    if before is None:
        return HeldDeployment(deployment=deployment, replicas=replicas)
    return before.becomes(deployment, [one.planned() for one in replicas], planned.pending)
