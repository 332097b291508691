"""A cluster as a file: what ``placement snapshot`` writes and ``placement plan --file`` reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from placement.core.needs import WHOLE
from placement.core.node import Node
from placement.core.pasted import shortened
from placement.core.snapshot import NEAR_LABELS, Snapshot
from placement.core.topology import Topology, ordinals
from placement.errors import InvalidClusterFile, InvalidDeployment, MatrixError, counted
from placement.wire.base import Model
from placement.wire.fields import STANDS
from placement.wire.held import HeldDeployment, HeldReplica
from placement.wire.machine import Machine
from placement.wire.text import printable, read_text

_AS_THEY_ARE = (
    "egress", "problem", "rests", "slots", "instances", "gpu_memory_bytes", "free_memory", "cpu_milli",
    "memory_bytes", "labels", "compute_capability", "uuids", "resources",
)  # fmt: skip
"""Fields that a node has in a file and in a snapshot alike."""


_MOST = 1 << 60
"""The largest amount: more bytes than any machine has."""


class ClusterNode(Model):
    """One node."""

    id: str
    name: str
    address: str = ""
    machine: str | None = Field(default=None, description="a key of `machines`; none without GPUs")
    free: tuple[int, ...] = Field(default=(), description="ordinals of the GPUs that are wholly free")
    rests: dict[int, int] = Field(default_factory=dict, description="shared GPU -> thousandths that are free")
    slots: dict[int, str] = Field(default_factory=dict, description="slot that is a MIG instance -> profile")
    instances: dict[int, str] = Field(default_factory=dict, description="MIG instances that are free")
    uuids: dict[int, str] = Field(
        default_factory=dict, description="slot -> UUID of the GPU, or of the MIG instance"
    )
    gpu_memory_bytes: int | None = None
    free_memory: dict[int, int] = Field(default_factory=dict, description="GPU -> bytes free, by NVML")
    cpu_milli: int = 0
    memory_bytes: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, int] = Field(
        default_factory=dict, description="custom resource of Ray's -> ten-thousandths free"
    )
    accelerators: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    deployments: tuple[str, ...] = ()
    egress: dict[str, int] = Field(default_factory=dict, description="resource -> requests still free")
    serving: tuple[tuple[str, str], ...] = Field(default=(), description="(provider, key fingerprint)")
    problem: str | None = None

    @field_validator("id", "name", "address", "problem")
    @classmethod
    def _is_printable(cls, value: str | None) -> str | None:
        """Removes control characters: the text is shown on terminals, and may come from anywhere."""
        return value if value is None else printable(value)


class ClusterFile(Model):
    """All that planning needs of a cluster. Holds no secret: of an API key only a fingerprint."""

    version: Literal[1] = 1
    machines: dict[str, Machine] = Field(default_factory=dict)
    near: tuple[str, ...] = Field(
        default=NEAR_LABELS, description="labels that nodes near each other share, widest first"
    )
    nodes: tuple[ClusterNode, ...] = ()
    deployments: tuple[HeldDeployment, ...] = ()

    @classmethod
    def of(cls, snapshot: Snapshot, held: Iterable[HeldDeployment]) -> ClusterFile:
        """The file that describes a snapshot."""
        keys: dict[Machine, str] = {}
        nodes = []
        for node in snapshot.nodes:
            key = None
            if len(node.topology):
                key = keys.setdefault(Machine.of(node.topology), f"machine-{len(keys) + 1}")
            nodes.append(
                ClusterNode(
                    id=node.id,
                    name=node.name,
                    address=node.address,
                    machine=key,
                    free=tuple(sorted(node.free)),
                    accelerators=tuple(sorted(node.accelerators)),
                    deployments=tuple(sorted(node.deployments)),
                    serving=tuple(sorted(node.serving)),
                    **{name: getattr(node, name) for name in _AS_THEY_ARE},
                )
            )
        machines = {key: machine for machine, key in keys.items()}
        return cls(machines=machines, near=snapshot.near, nodes=tuple(nodes), deployments=tuple(held))

    def snapshot(self) -> Snapshot:
        """What the planner sees.

        Raises:
            InvalidClusterFile: the file contradicts itself; names the node or the deployment, the field and the value.
        """
        machines = {key: _topology(key, machine) for key, machine in self.machines.items()}
        deployments: Counter[tuple[str, str]] = Counter()
        serving: Counter[tuple[str, tuple[str, str]]] = Counter()
        holders: dict[str, dict[int, list[str]]] = {}
        for held in self.deployments:
            for replica in held.replicas:
                calls = held.declared(replica).calls
                deployments[replica.node, held.deployment.name] += 1
                for gpu in replica.gpus:
                    holders.setdefault(replica.node, {}).setdefault(gpu, []).append(held.deployment.name)
                if calls is not None:
                    serving[replica.node, calls] += 1
        nodes: dict[str, Node] = {}
        for one in self.nodes:
            where = f"node {shortened(one.name)!r}"
            if one.machine is not None and one.machine not in machines:
                raise InvalidClusterFile(
                    f"{where}: machine {shortened(one.machine)!r} is not under machines; add it there"
                )
            topology = machines[one.machine] if one.machine is not None else Topology.unknown(0)
            problem = _contradiction(one, len(topology))
            if problem is not None:
                raise InvalidClusterFile(f"{where}: {problem}")
            if one.id in nodes:
                raise InvalidClusterFile(
                    f"{where}: id {shortened(one.id)!r} is there twice; give each node its own"
                )
            nodes[one.id] = Node(
                id=one.id,
                name=one.name,
                address=one.address,
                topology=topology,
                free=frozenset(one.free),
                accelerators=frozenset(one.accelerators),
                # Of a replica that is about to be placed there, only the name is known.
                deployments={name: max(1, deployments[one.id, name]) for name in one.deployments},
                serving={calls: max(1, serving[one.id, calls]) for calls in one.serving},
                holders={gpu: tuple(sorted(names)) for gpu, names in holders.get(one.id, {}).items()},
                **{name: getattr(one, name) for name in _AS_THEY_ARE},
            )
        seen: set[str] = set()
        in_use: Counter[tuple[str, int]] = Counter()
        for standing in self.deployments:
            name = standing.deployment.name
            if name in seen:
                raise InvalidClusterFile(f"deployment {name!r} is there twice; keep one")
            seen.add(name)
            try:
                for declared in (standing.deployment, *standing.earlier.values()):
                    _ = declared.needs, declared.cpu_milli_per_gpu, declared.memory_bytes_per_gpu
                    _ = declared.cpu_milli, declared.memory_bytes
            except OverflowError:  # the limits for new requests do not apply to what is placed
                raise InvalidClusterFile(
                    f"deployment {name!r}: an amount of CPUs, memory or bandwidth is too large; correct it"
                ) from None
            for replica in standing.replicas:
                problem = _false_holding(replica, nodes.get(replica.node))
                for gpu, share in replica.taken.items() if problem is None else ():
                    in_use[replica.node, gpu] += share
                    if in_use[replica.node, gpu] > WHOLE and problem is None:
                        problem = (
                            f"gpus names GPU {gpu}, of which others hold too much already; keep one of them"
                        )
                    rest = nodes[replica.node].rests.get(gpu, 0) if replica.node in nodes else 0
                    if in_use[replica.node, gpu] + rest > WHOLE and problem is None:
                        problem = (
                            f"gpus names GPU {gpu}, of which rests leaves {rest} on node "
                            f"{shortened(nodes[replica.node].name)!r}; it can be held or free"
                        )
                if problem is not None:
                    raise InvalidClusterFile(
                        f"deployment {name!r}: replica {shortened(str(replica.replica_index))}: {problem}"
                    )
        return Snapshot(nodes.values(), self.near)

    def held(self) -> Mapping[str, HeldDeployment]:
        """The placed deployments, by name."""
        return {one.deployment.name: one for one in self.deployments}


def load_cluster(path: Path) -> ClusterFile:
    """Reads what ``placement snapshot`` wrote.

    Raises:
        InvalidClusterFile: the file cannot be read, or is not such a file; names the first field at fault.
    """
    try:
        return ClusterFile.model_validate_json(read_text(path), context=STANDS)
    except InvalidDeployment as error:
        raise InvalidClusterFile(str(error)) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = shortened(printable(".".join(map(str, first["loc"]))), 200)
        what = f"{field}: {first['msg']}" if field else str(first["msg"])
        raise InvalidClusterFile(f"{path}: {what}; write it with `placement snapshot`") from None


def _contradiction(one: ClusterNode, count: int) -> str | None:
    """What contradicts itself in a node with ``count`` GPUs; ``None`` if nothing."""
    for field in ("free", "rests", "slots", "instances", "free_memory", "uuids"):
        strange = sorted(set(getattr(one, field)) - set(range(count)))
        if strange:
            return f"{field} names GPU {shortened(str(strange[0]))}, but it has {counted(count, 'GPU')}"
    if len(set(one.uuids.values())) < len(one.uuids):
        return "uuids gives two GPUs the same; each has its own"
    for field, clashing in (("rests", one.rests), ("slots", one.slots)):
        both = sorted(set(one.free) & set(clashing))
        if both:
            return f"GPU {both[0]} is in free and in {field}; keep one of them"
    if one.problem is not None and not one.problem.strip():
        return "problem is empty; say what is wrong with the node, or leave it out"
    for slot, profile in one.instances.items():
        if one.slots.get(slot) != profile:
            here, there = (shortened(text) for text in (profile, one.slots.get(slot, "nothing")))
            return f"instances has {here!r} at GPU {slot}, slots has {there!r}; make them the same"
    amounts = {"cpu_milli": one.cpu_milli, "memory_bytes": one.memory_bytes}
    for name in ("egress", "rests", "free_memory", "resources"):
        amounts |= {f"{name}.{key}": amount for key, amount in getattr(one, name).items()}
    for field, amount in amounts.items():
        most = WHOLE - 1 if field.startswith("rests.") else _MOST  # a GPU of which all is left is free
        if not 0 <= amount <= most:
            return f"{shortened(printable(field))} is {shortened(str(amount))}; use 0 to {most}"
    if one.gpu_memory_bytes is not None and not 0 < one.gpu_memory_bytes <= _MOST:
        return (
            f"gpu_memory_bytes is {shortened(str(one.gpu_memory_bytes))}; use 1 to {_MOST}, or leave it out"
        )
    return None


def _false_holding(replica: HeldReplica, node: Node | None) -> str | None:
    """What a replica cannot hold on a node; ``None`` if nothing, or if the node no longer exists."""
    amounts = {
        "replica_index": replica.replica_index,
        "cpu_milli": replica.cpu_milli,
        "memory_bytes": replica.memory_bytes,
        "egress_units": replica.egress_units,
        "set_size": replica.set_size,
    }
    for field, amount in amounts.items():
        if not 0 <= amount <= _MOST:
            return f"{field} is {shortened(str(amount))}; use 0 to {_MOST}"
    for field, shares in (("share", (replica.share,)), ("shares", replica.shares)):
        if strange := [share for share in shares if not 0 < share <= WHOLE]:
            return f"{field} is {shortened(str(strange[0]))}; use 1 to {WHOLE}"
    if replica.shares and len(replica.shares) != len(replica.gpus):
        return f"shares has {len(replica.shares)} entries for {counted(len(replica.gpus), 'GPU')}; give one for each"
    if len(set(replica.gpus)) < len(replica.gpus):
        return f"gpus names one twice: {shortened(ordinals(replica.gpus))}"
    several = (
        len(replica.ranks) >= len(replica.gpus) if replica.shares else len(replica.ranks) == len(replica.gpus)
    )
    if replica.ranks and not (several and len(set(replica.ranks)) == len(replica.ranks)):
        each = counted(len(replica.gpus), "GPU")
        return f"ranks is {shortened(str(list(replica.ranks)))}; give each of its {each} its own"
    if replica.share < WHOLE and len(replica.gpus) != 1:
        return f"share is {replica.share}, so that gpus must name one GPU, not {len(replica.gpus)}"
    if replica.gpus and replica.egress_resource is not None:
        return "must hold either gpus or an egress_resource; name one of them"
    if not replica.gpus and replica.egress_resource is None and not replica.cpu_milli:
        return "holds nothing; name its gpus, its egress_resource, or cpu_milli for a replica on CPUs alone"
    if node is None:
        return None
    name = shortened(node.name)
    for gpu in replica.gpus:
        if not 0 <= gpu < len(node.topology):
            return f"gpus names GPU {shortened(str(gpu))}, but node {name!r} has {counted(len(node.topology), 'GPU')}"
        if gpu in node.free or (gpu in node.instances and replica.profile):
            return f"gpus names GPU {gpu}, which is free on node {name!r}; it can be held or free"
    return None


def _topology(key: str, machine: Machine) -> Topology:
    where = f"machines.{shortened(printable(key))}"
    try:
        return machine.topology()
    except MatrixError as error:
        raise InvalidClusterFile(f"{where}.matrix: {error}") from None
    except ValueError as error:
        raise InvalidClusterFile(f"{where}: {error}; write it with `placement snapshot`") from None
