"""The nodes of the cluster, from Ray's resources and labels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import is_

import ray

from placement import topologies
from placement.core.needs import WHOLE
from placement.core.node import UNIT, Node
from placement.errors import UnknownTopology
from placement.runtime import ray_internals
from placement.runtime.claims import Tally
from placement.runtime.orders import GpuHardware
from placement.wire.accelerators import accelerators_of
from placement.wire.layout import is_egress

TOPOLOGY_LABEL = "placement/topology"
"""A node with this label has the topology of that catalogue entry (a simulated node)."""

ACCELERATOR_LABEL = "ray.io/accelerator-type"
_ACCELERATOR = "accelerator_type:"
"""The prefix of the resource that Ray gives a node for the type of its GPUs."""

VIEW_SECONDS = 1.0
"""How old the list of nodes may be: reading it takes about 0.1 ms per node, which not every plan need pay."""


DEAD_SECONDS = 300.0
"""How long a node that died is shown."""
MOST_DEAD = 100
"""How many dead nodes are shown at most."""


@dataclass(frozen=True)
class NodeInfo:
    """A node that is alive, as Ray describes it.

    Attributes:
        egress: resource name (``egress``, ``egress_<provider>``) -> concurrent requests the node may carry.
        cpu_milli, memory_bytes: CPUs (thousandths) and memory that Ray was told of.
        accelerators: its accelerator types in Ray's resources; an operator may have added some (A100, A100-80G).
        resources: all other resources, given to Ray or its own (``node:10.0.0.1``) -> amount.
    """

    id: str
    name: str
    address: str
    gpu_count: int
    labels: Mapping[str, str] = field(default_factory=dict)
    egress: Mapping[str, int] = field(default_factory=dict)
    cpu_milli: int = 0
    memory_bytes: int = 0
    accelerators: frozenset[str] = frozenset()
    resources: Mapping[str, float] = field(default_factory=dict)

    def named(self, name: str) -> bool:
        """Whether ``name`` is this node's id, name or address."""
        return name in (self.id, self.name, self.address)

    @property
    def topology_name(self) -> str | None:
        """The catalogue entry that the node is labelled with."""
        return self.labels.get(TOPOLOGY_LABEL)

    def label_problem(self) -> str | None:
        """What is wrong with the topology label, if anything."""
        if self.topology_name is None or not self.gpu_count:
            return None
        where = f"label {TOPOLOGY_LABEL} of node {self.name}"
        try:
            gpus = len(topologies.load(self.topology_name))
        except UnknownTopology as error:
            return str(UnknownTopology(error.name, error.known, where))
        if gpus != self.gpu_count:
            return f"{where}: {self.topology_name} has {gpus} GPUs, the node {self.gpu_count}; correct one of them"
        return None


@dataclass(frozen=True)
class DeadNode:
    """A node that died; ``at``: when that was noticed, in seconds since the epoch."""

    info: NodeInfo
    at: float


class NodeView:
    """The nodes that are alive, read at most once a second; for callers that notice themselves if one is gone.

    Do not change a returned list. It is the same object as long as nothing has changed, and so is
    each node in it, so that callers can compare by identity.
    """

    def __init__(self) -> None:
        self._read: tuple[float, list[NodeInfo]] = (float("-inf"), [])
        self._dead: dict[str, DeadNode] = {}

    def now(self) -> list[NodeInfo]:
        """The nodes as they are now."""
        at, found = time.monotonic(), live_nodes()
        before = self._read[1]
        known = {info.id: info for info in before}
        nodes = [old if (old := known.get(info.id)) == info else info for info in found]
        if len(nodes) == len(before) and all(map(is_, nodes, before)):
            nodes = before
        else:
            self._note_dead({info.id: info for info in nodes}, known)
        self._read = (at, nodes)
        return nodes

    def dead(self) -> list[DeadNode]:
        """The nodes that died in the last minutes, if this view had seen them; the last one to die first."""
        now = time.time()
        return [one for one in reversed(self._dead.values()) if now - one.at < DEAD_SECONDS]

    def _note_dead(self, alive: Mapping[str, NodeInfo], before: Mapping[str, NodeInfo]) -> None:
        now = time.time()
        kept = {node_id: one for node_id, one in self._dead.items() if now - one.at < DEAD_SECONDS}
        kept |= {node_id: DeadNode(before[node_id], now) for node_id in before if node_id not in alive}
        self._dead = dict([*kept.items()][-MOST_DEAD:])

    def lately(self) -> list[NodeInfo]:
        """The nodes as they were less than a second ago."""
        at, nodes = self._read
        return nodes if time.monotonic() - at < VIEW_SECONDS else self.now()


def live_node_ids() -> frozenset[str]:
    """The ids of all nodes that are alive."""
    return frozenset(row["NodeID"] for row in ray.nodes() if row["Alive"])


_PLANNED = ("GPU", "CPU", "memory", "object_store_memory")
"""Resources that are not custom ones."""


def draining_nodes() -> frozenset[str]:
    """The ids of the nodes that are draining."""
    return ray_internals.draining_nodes()


def live_nodes() -> list[NodeInfo]:
    """All nodes that are alive, ordered by name and id."""
    found = []
    for row in ray.nodes():
        if not row["Alive"]:
            continue
        resources = row["Resources"]
        found.append(
            NodeInfo(
                id=row["NodeID"],
                name=_shown(row.get("NodeName") or row["NodeManagerAddress"]),
                address=row["NodeManagerAddress"],
                gpu_count=int(resources.get("GPU", 0)),
                labels=dict(row.get("Labels") or {}),
                egress={
                    name: int(amount)
                    for name, amount in sorted(resources.items())
                    if is_egress(name) and "_group_" not in name
                },
                cpu_milli=round(resources.get("CPU", 0) * 1000),
                memory_bytes=int(resources.get("memory", 0)),
                resources={
                    name: amount
                    for name, amount in sorted(resources.items())
                    if name not in _PLANNED and "_group_" not in name and not is_egress(name)
                },
                accelerators=frozenset(
                    name.removeprefix(_ACCELERATOR)
                    for name in resources
                    if name.startswith(_ACCELERATOR) and "_group_" not in name
                ),
            )
        )
    return sorted(found, key=lambda node: (node.name, node.id))


def _shown(name: str) -> str:
    """A name that a terminal can show as it is."""
    return "".join(character if character.isprintable() else "?" for character in name)


def node_state(
    info: NodeInfo,
    machine: GpuHardware,
    available: Mapping[str, float] | None,
    tally: Tally,
    foreign: frozenset[int],
    draining: bool = False,
) -> Node:
    """One node as the planner sees it.

    Args:
        info: the node.
        machine: what is known of its GPUs.
        available: resource -> free amount in Ray's records; ``None`` while these lag behind the service's last change.
        tally: what this service holds and claims there.
        foreign: GPUs that other Ray users held when the node actor last looked.
        draining: the node is draining.
    """
    not_ours = frozenset(range(info.gpu_count)) - tally.gpus
    foreign &= not_ours
    if available is not None:
        # Free parts of our shared GPUs are also free in Ray's records, and claims may have been reserved there by now.
        shared = [tally.shares[gpu] for gpu in tally.gpus & tally.shares.keys()]
        rests = sum(WHOLE - share for share in shared)
        free_in_books = int(available.get("GPU", 0.0) - rests / WHOLE + 1e-6)
        unseen = len(not_ours) - free_in_books - len(foreign)
        if unseen < 0:  # another user gave GPUs back since
            foreign = frozenset(sorted(foreign)[-unseen:])
        else:  # or took some: Ray gives the lowest-numbered. Some of them may be the service's claims, just reserved.
            untouched = sorted(not_ours - foreign - tally.claimed_gpus)
            foreign |= frozenset(untouched[: max(0, unseen - len(tally.claimed_gpus))])
    amounts = {
        "CPU": (info.cpu_milli - tally.cpu_milli) / 1000,
        "memory": info.memory_bytes - tally.memory_bytes,
    }
    amounts |= {name: total - tally.egress[name] for name, total in info.egress.items()}
    if available is not None:
        amounts = {name: min(amount, available.get(name, 0.0) + 1e-6) for name, amount in amounts.items()}
    # While the records lag, what is held and claimed may add up to more than there is.
    amounts = {name: max(0, amount) for name, amount in amounts.items()}
    rests_of = {gpu: WHOLE - share for gpu, share in tally.shares.items() if share < WHOLE}
    if available is not None:  # other users also take parts of our shared GPUs: Ray fills those first
        free = int(available.get("GPU", 0.0) * WHOLE + 1e-6)
        rests_of = {gpu: min(rest, free) for gpu, rest in rests_of.items() if free > 0}
    seen = machine.node(not_ours - foreign - tally.claimed_gpus, rests_of)
    names = {info.labels.get(ACCELERATOR_LABEL), *info.accelerators, *accelerators_of(machine.topology.model)}
    return replace(
        seen,
        id=info.id,
        name=info.name,
        address=info.address,
        egress={name: int(amounts[name]) for name in info.egress},
        cpu_milli=int(amounts["CPU"] * 1000 + 1e-3),
        memory_bytes=int(amounts["memory"]),
        serving=dict(tally.serving),
        deployments=dict(tally.deployments),
        resources={
            name: int((total if available is None else available.get(name, 0.0)) * UNIT + 0.5)
            for name, total in info.resources.items()
        },
        holders={gpu: tuple(sorted(names)) for gpu, names in tally.holders.items()},
        labels=info.labels,
        accelerators=frozenset(name for name in names if name),
        compute_capability=machine.capability,
        problem="is draining" if draining else info.label_problem(),
    )
