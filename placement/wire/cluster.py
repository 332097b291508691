"""A cluster as a file: what ``placement snapshot`` writes and ``placement plan --file`` reads."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from placement.core.matrix import parse_matrix, render_matrix
from placement.core.pasted import shortened
from placement.core.replicas import PlannedReplica
from placement.core.score import WHOLE
from placement.core.snapshot import NEAR_LABELS, Node, Snapshot
from placement.core.topology import Lanes, Topology, ordinals
from placement.core.topology import Path as PciePath
from placement.errors import InvalidClusterFile, InvalidDeployment, MatrixError, counted
from placement.wire.base import Model
from placement.wire.deployment import REMOTE_RUNTIMES, STANDS, Deployment, with_runtime
from placement.wire.facts import NumaFacts
from placement.wire.runtimes import infer_runtime
from placement.wire.text import printable, read_text

_AS_THEY_ARE = (
    "egress", "problem", "rests", "slots", "instances", "gpu_memory_bytes", "free_memory", "cpu_milli",
    "memory_bytes", "labels", "compute_capability", "uuids", "resources",
)  # fmt: skip
"""Fields that a node has in a file as it has them in a snapshot."""


_MOST = 1 << 60
"""Of an amount: more bytes than any machine has."""


class HeldReplica(Model):
    """A replica that stands: its node, and the GPUs, the egress units or the CPUs alone that it holds there."""

    replica_index: int
    node: str
    gpus: tuple[int, ...] = ()
    ranks: tuple[int, ...] = Field(default=(), description="of a replica over several nodes, those here")
    share: int = Field(default=WHOLE, description="thousandths of the GPU")
    profile: str = Field(default="", description="of the MIG instance that it holds instead of a GPU")
    cpu_milli: int = 0
    memory_bytes: int = 0
    egress_resource: str | None = None
    egress_units: int = 0
    set_size: int = Field(default=0, description="GPUs of each set that it is made of; 0 if they are one")
    generation: int = Field(
        default=0, description="the key under `earlier` by which it was placed; 0: as declared now"
    )

    def planned(self) -> PlannedReplica:
        """The same in the planner's terms."""
        fields = self.model_dump(exclude={"node", "generation"})
        return PlannedReplica(node_id=self.node, **fields)

    @classmethod
    def of(cls, planned: PlannedReplica) -> HeldReplica:
        """What a plan takes, once it is carried out."""
        fields = {name: value for name, value in vars(planned).items() if name != "node_id"}
        return cls.model_construct(node=planned.node_id, **fields)


class HeldDeployment(Model):
    """A deployment that stands; replicas that are declared and not listed are pending."""

    deployment: Deployment
    replicas: tuple[HeldReplica, ...]
    releasing: bool = Field(default=False, description="all of it is about to go")
    earlier: dict[int, Deployment] = Field(
        default_factory=dict,
        description="what was declared when replicas were placed that wait to be replaced",
    )

    @model_validator(mode="before")
    @classmethod
    def _keeps_its_runtime(cls, value: Any) -> Any:
        """What replicas hold tells whether a model's name was taken for that of an API when they were placed."""
        if not isinstance(value, Mapping):
            return value
        declared, replicas = value.get("deployment"), value.get("replicas")
        if not isinstance(declared, Mapping) or not isinstance(replicas, list | tuple):
            return value
        held = [one for one in replicas if isinstance(one, Mapping)]
        found = {**value, "deployment": _as_placed(declared, held, 0)}
        earlier = value.get("earlier")
        if isinstance(earlier, Mapping):
            found["earlier"] = {
                key: _as_placed(one, held, key) if isinstance(one, Mapping) else one
                for key, one in earlier.items()
            }
        return found

    @model_validator(mode="after")
    def _knows_all_generations(self) -> Self:
        for number in {one.generation for one in self.replicas}:
            if number and number not in self.earlier:
                raise ValueError(f"a replica is of generation {number}, which earlier does not have")
        return self

    @classmethod
    def of(cls, deployment: Deployment, replicas: Iterable[PlannedReplica]) -> HeldDeployment:
        """What a plan makes of a deployment, once it is carried out."""
        held = tuple(map(HeldReplica.of, replicas))
        return cls.model_construct(deployment=deployment, replicas=held, releasing=False, earlier={})

    def declared(self, replica: HeldReplica) -> Deployment:
        """What was declared when a replica was placed."""
        return self.earlier[replica.generation] if replica.generation else self.deployment

    def becomes(
        self, deployment: Deployment, replicas: Iterable[PlannedReplica], outdated: Collection[int]
    ) -> HeldDeployment:
        """The same once it is declared anew.

        Args:
            deployment: what is declared.
            replicas: those that are there, but for the outdated ones.
            outdated: the indices of those that stay as they are until they can be replaced.
        """
        this = max(self.earlier, default=0) + 1
        old = [one for one in self.replicas if one.replica_index in outdated]
        kept = [one.model_copy(update={"generation": one.generation or this}) for one in old]
        declared = {one.generation: self.declared(before) for one, before in zip(kept, old, strict=True)}
        held = (*map(HeldReplica.of, replicas), *kept)
        return self.model_construct(deployment=deployment, replicas=held, releasing=False, earlier=declared)

    def by_index(self) -> dict[int, tuple[PlannedReplica, ...]]:
        """Replica -> its parts, in the planner's terms."""
        found: dict[int, tuple[PlannedReplica, ...]] = {}
        for replica in self.replicas:
            found[replica.replica_index] = (*found.get(replica.replica_index, ()), replica.planned())
        return found


def _as_placed(
    declared: Mapping[str, Any], replicas: Iterable[Mapping[str, Any]], generation: object
) -> dict[str, Any]:
    """The fields of a declaration, with the runtime that replicas of that generation have been placed as."""
    remote = {
        "egress_resource" in one for one in replicas if str(one.get("generation", 0)) == str(generation)
    }
    placed_as = None
    with contextlib.suppress(ValueError):
        means = infer_runtime(str(declared.get("model")))
        if remote <= {means in REMOTE_RUNTIMES}:
            placed_as = means
    return with_runtime(declared, placed_as)


GbPerSecond = Annotated[float, Field(ge=0.001, le=1_000_000)]
"""A rate in GB/s: at least 1 MB/s, which is as fine as rates are compared."""


def mb_per_s(gb_per_s: float) -> int:
    """The same in MB/s."""
    return round(gb_per_s * 1000)


_PEERS = {True: "Y", False: "N", None: "?"}


class NicNames(Model):
    """What programs call a network card of the matrix."""

    name: str
    ports: tuple[str, ...] = Field(default=(), description="its RDMA ports that work")
    interfaces: tuple[str, ...] = Field(default=(), description="its network interfaces that work")


class Machine(Model):
    """A make of GPU node, written once for all nodes of that make."""

    matrix: str = Field(description="as `nvidia-smi topo -m` prints it")
    model: str | None = Field(default=None, description="product name of the GPUs")
    below: tuple[tuple[PciePath, ...], ...] = Field(
        default=(), description="PCIe paths, also below NVLink, where they are known: a row for each GPU"
    )
    cpu: str | None = Field(default=None, description="product name of the processors")
    pcie: tuple[tuple[PositiveInt, PositiveInt] | None, ...] = Field(
        default=(), description="per GPU its PCIe generation and how many lanes; empty if unknown"
    )
    peers: tuple[str, ...] = Field(
        default=(),
        description="per GPU a letter for each: Y or N, whether peer-to-peer works over PCIe, or ?; empty if unknown",
    )
    numa_nodes: tuple[NumaFacts, ...] = Field(
        default=(), description="the NUMA nodes of the host; empty if unknown"
    )
    nics: tuple[NicNames, ...] = Field(default=(), description="those of which it is known")
    nvls: bool | None = Field(
        default=None, description="collectives reduce inside the NVSwitch; none if unknown"
    )
    measured: tuple[tuple[tuple[int, ...], GbPerSecond], ...] = Field(
        default=(),
        description="sets of GPUs with the all-reduce bus bandwidth that was measured on them, GB/s; empty if none was",
    )

    @classmethod
    def make(cls, topology: Topology) -> Machine:
        """What machines of one make have in common: all of this but what was measured."""
        return cls.of(replace(topology, measured=()))

    @classmethod
    def of(cls, topology: Topology) -> Machine:
        """What a file says of such a machine."""
        peers = tuple("".join(_PEERS[link.peer] for link in row) for row in topology.links)
        pcie = tuple((one.generation, one.width) if one else None for one in topology.lanes)
        return cls(
            matrix=render_matrix(topology),
            model=topology.model,
            cpu=topology.cpu,
            pcie=pcie if any(pcie) else (),
            peers=peers if {"Y", "N"} & set("".join(peers)) else (),
            below=topology.below,
            numa_nodes=tuple(map(NumaFacts.of, topology.numa_nodes)),
            nics=tuple(
                NicNames(name=nic.name, ports=nic.ports, interfaces=nic.interfaces)
                for nic in topology.nics
                if nic.ports or nic.interfaces
            ),
            nvls=topology.nvls,
            measured=tuple((gpus, rate / 1000) for gpus, rate in topology.measured),
        )

    def topology(self) -> Topology:
        """The machine.

        Raises:
            MatrixError: the matrix cannot be read.
            ValueError: the rest describes another number of GPUs, or holds something else.
        """
        read = parse_matrix(self.matrix)
        links = read.links
        if self.peers:
            if {len(self.peers), *map(len, self.peers)} != {len(read)} or set("".join(self.peers)) - {
                *_PEERS.values()
            }:
                raise ValueError(
                    f"peers must be {len(read)} rows of {len(read)} letters Y, N or ?, as the matrix has GPUs"
                )
            told = {letter: peer for peer, letter in _PEERS.items()}
            links = tuple(
                tuple(replace(link, peer=told[letter]) for link, letter in zip(row, letters, strict=True))
                for row, letters in zip(links, self.peers, strict=True)
            )
        if self.pcie and len(self.pcie) != len(read):
            raise ValueError(f"pcie describes {len(self.pcie)} GPUs, the matrix {len(read)}")
        lanes = tuple(Lanes(*one) if one else None for one in self.pcie)
        names = {nic.name: nic for nic in self.nics}
        if unknown := names.keys() - {nic.name for nic in read.nics}:
            raise ValueError(f"nics names {min(unknown)}, which is no network card of the matrix")
        nics = tuple(
            replace(nic, ports=names[nic.name].ports, interfaces=names[nic.name].interfaces)
            if nic.name in names
            else nic
            for nic in read.nics
        )
        return replace(
            read,
            links=links,
            model=self.model,
            cpu=self.cpu,
            lanes=lanes,
            below=self.below,
            nics=nics,
            numa_nodes=tuple(one.node for one in self.numa_nodes),
            nvls=self.nvls,
            measured=tuple((gpus, mb_per_s(rate)) for gpus, rate in self.measured),
        )


class ClusterNode(Model):
    """One node."""

    id: str
    name: str
    address: str = ""
    machine: str | None = Field(default=None, description="a key of `machines`; none without GPUs")
    free: tuple[int, ...] = Field(default=(), description="GPU ordinals believed wholly free")
    rests: dict[int, int] = Field(default_factory=dict, description="shared GPU -> thousandths left")
    slots: dict[int, str] = Field(default_factory=dict, description="slot that is a MIG instance -> profile")
    instances: dict[int, str] = Field(default_factory=dict, description="those of them that are free")
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
        """It is shown on terminals, and may come from anywhere."""
        return value if value is None else printable(value)


class ClusterFile(Model):
    """Everything that planning looks at. Holds no secret: of an API key only a fingerprint."""

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
                # Of what is about to be placed there only the name is known.
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
            except OverflowError:  # what stands is not held to the limits of what is asked for
                raise InvalidClusterFile(
                    f"deployment {name!r}: an amount of CPUs, memory or bandwidth is too large; correct it"
                ) from None
            for replica in standing.replicas:
                problem = _false_holding(replica, nodes.get(replica.node))
                for gpu in replica.gpus:
                    in_use[replica.node, gpu] += replica.share
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
        """The deployments that stand, by name."""
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
    """What a node cannot be, with so many GPUs; ``None`` if nothing."""
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
        most = WHOLE - 1 if field.startswith("rests.") else _MOST  # one that is wholly left is free
        if not 0 <= amount <= most:
            return f"{shortened(printable(field))} is {shortened(str(amount))}; use 0 to {most}"
    if one.gpu_memory_bytes is not None and not 0 < one.gpu_memory_bytes <= _MOST:
        return (
            f"gpu_memory_bytes is {shortened(str(one.gpu_memory_bytes))}; use 1 to {_MOST}, or leave it out"
        )
    return None


def _false_holding(replica: HeldReplica, node: Node | None) -> str | None:
    """What a replica cannot hold on a node; ``None`` if nothing, or if the node is no more."""
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
    if not 0 < replica.share <= WHOLE:
        return f"share is {shortened(str(replica.share))}; use 1 to {WHOLE}"
    if len(set(replica.gpus)) < len(replica.gpus):
        return f"gpus names one twice: {shortened(ordinals(replica.gpus))}"
    if replica.ranks and not len(set(replica.ranks)) == len(replica.ranks) == len(replica.gpus):
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
