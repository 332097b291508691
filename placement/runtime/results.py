"""The result of a placement: assignments with live Ray placement groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement.core.affinity import Affinity
from placement.core.needs import WHOLE
from placement.runtime.binding import CPUS, NUMA_NODE
from placement.wire.runtime_config import Budget, RuntimeConfig, Serving


@dataclass(frozen=True)
class NodeAssignment:
    """One replica on one node, and the placement group that holds its GPUs, its egress capacity or its CPUs.

    Attributes:
        replica_index: which replica, from 0.
        node: Ray's node id, hex.
        gpus: GPU ordinals on that node, in rank order (ascending, unless tensor-parallel groups interleave
            here); ``gpus[i]`` belongs to rank ``ranks[i]``. Empty for a remote replica, and for a CPU replica.
        placement_group: the Ray placement group; bundle ``bundle_indices[r]`` holds ``gpus[r]``.
        bundle_indices: the bundles of this assignment, in the same order.
        ranks: which ranks of the replica are here: ``0, 1, ...`` unless it is on several nodes.
        node_name: the node's name in Ray.
        share: the held part of the GPU, 1 for whole GPUs.
        shares: the part of ``gpus[r]`` that each rank has, if these differ; else empty. A GPU of which several ranks
            have shares is in ``gpus`` once for each.
        mig: profile of the MIG instance in ``gpus``; empty for GPUs.
        cpus_per_gpu, memory_bytes_per_gpu: what each bundle also holds.
        ray_gpus: what Ray alone would have given at that moment, to this replica and those that were placed with it:
            the lowest-numbered free GPUs.
        bandwidth_gb_per_s, ray_bandwidth_gb_per_s: bus bandwidth of an all-reduce between the GPUs,
            GB/s per direction, and between ``ray_gpus``: measured or predicted; ``None`` for fewer than two GPUs, or
            if nothing was measured and a link is unknown. The lower end of a range if the host's processors or
            peer-to-peer are unknown. The formula is in :mod:`placement.core.bandwidth`.
        upper_bandwidth_gb_per_s, ray_upper_bandwidth_gb_per_s: the upper end of the range; ``None`` if nothing
            that decides it is unknown.
        bandwidth_measured: whether ``bandwidth_gb_per_s`` was measured (``docs/measuring.md``).
        weakest_link, ray_weakest_link: slowest link between two of them as ``nvidia-smi topo -m`` names it;
            ``None`` for fewer than two GPUs, ``"?"`` where the topology is unknown.
        sorted_bandwidth_gb_per_s: the bandwidth in an engine that sorts the node's GPUs and cuts
            its tensor-parallel groups from these, as vLLM does. It is less only if sorting changes the groups to
            slower ones (``docs/rank-order.md``). Also ``None`` for results of versions before this field.
        egress_resource, egress_units: what a remote replica holds.
        cpus, memory_bytes: what a CPU replica holds.
        set_size: GPUs of each tensor-parallel group of the replica; 0 if all of its GPUs are one group.
        affinities: what is near each of ``gpus``; empty if unknown. :meth:`environment` passes it to a worker.
    """

    replica_index: int
    node: str
    gpus: list[int]
    placement_group: PlacementGroup
    bundle_indices: list[int]
    node_name: str = ""
    share: float = 1.0
    mig: str = ""
    ranks: list[int] = field(default_factory=list)
    cpus_per_gpu: float = 0.0
    memory_bytes_per_gpu: int = 0
    ray_gpus: list[int] = field(default_factory=list)
    bandwidth_gb_per_s: float | None = None
    weakest_link: str | None = None
    ray_bandwidth_gb_per_s: float | None = None
    ray_weakest_link: str | None = None
    sorted_bandwidth_gb_per_s: float | None = None
    upper_bandwidth_gb_per_s: float | None = None
    ray_upper_bandwidth_gb_per_s: float | None = None
    egress_resource: str | None = None
    egress_units: int = 0
    cpus: float = 0.0
    memory_bytes: int = 0
    set_size: int = 0
    affinities: list[Affinity] = field(default_factory=list)
    bandwidth_measured: bool = False
    shares: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", list(range(len(self.bundle_indices))))

    def share_of(self, rank: int = 0) -> float:
        """The part of ``gpus[rank]`` that this rank has: 1 for a whole GPU."""
        return self.shares[rank] if self.shares else self.share

    @property
    def taken(self) -> dict[int, float]:
        """GPU -> the part of it that is held, all ranks together."""
        parts: Counter[int] = Counter()
        for rank, gpu in enumerate(self.gpus):
            parts[gpu] += round(self.share_of(rank) * WHOLE)
        return {gpu: part / WHOLE for gpu, part in sorted(parts.items())}

    def actor_options(self, rank: int = 0) -> dict[str, Any]:
        """Options that start a worker on ``gpus[rank]``: ``Engine.options(**a.actor_options(0))``.

        For a replica over several nodes that is rank ``ranks[rank]`` of the replica; see
        :meth:`PlacementResult.actor_options`. A remote replica has one rank, 0, which takes its egress units; a
        CPU replica has one rank, which takes its CPUs and its memory.

        Raises:
            IndexError: the assignment has no such rank.
        """
        self._check(rank)
        strategy = PlacementGroupSchedulingStrategy(
            self.placement_group, placement_group_bundle_index=self.bundle_indices[rank]
        )
        options: dict[str, Any] = {
            "num_cpus": self.cpus or self.cpus_per_gpu,
            "scheduling_strategy": strategy,
        }
        if memory := self.memory_bytes or self.memory_bytes_per_gpu:
            options["memory"] = memory
        if self.gpus:
            options["num_gpus"] = 1 if (share := self.share_of(rank)) == 1 else share
        elif self.egress_resource is not None:
            options["resources"] = {self.egress_resource: self.egress_units}
        return options

    def engine_options(self) -> dict[str, Any]:
        """Options that start, on this node, an engine that creates its own workers in the group, as vLLM does.

        The engine itself takes no resources, so that its workers find all of the group free; workers that it starts
        without naming a group are in this group, too. The engine of a replica over several nodes belongs on the node of
        rank 0: :meth:`PlacementResult.engine_options` places it there, and :meth:`PlacementResult.environment` gives it
        the order of its ranks.
        """
        strategy = PlacementGroupSchedulingStrategy(
            self.placement_group,
            placement_group_bundle_index=self.bundle_indices[0],
            placement_group_capture_child_tasks=True,
        )
        # To create an actor that names no CPUs, Ray needs one free CPU, and a bundle need not have any.
        return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}

    def environment(self, rank: int = 0) -> dict[str, str]:
        """Environment variables for the worker on ``gpus[rank]``: see :meth:`PlacementResult.environment`.

        One assignment of a replica over several nodes does not know the others: variables about all ranks
        (``VLLM_RAY_BUNDLE_INDICES``, ``RANK``, ``WORLD_SIZE``) or about all nodes (``NCCL_...``) are then left out.

        Raises:
            IndexError: the assignment has no such rank.
        """
        self._check(rank)
        variables = _variables([self], self.ranks[rank])
        if self.gpus and len(self.bundle_indices) < self.placement_group.bundle_count:
            for name in _OF_ALL_NODES:
                variables.pop(name, None)
        return variables

    def _check(self, rank: int) -> None:
        if not 0 <= rank < len(self.bundle_indices):
            raise IndexError(
                f"replica {self.replica_index} has ranks 0 to {len(self.bundle_indices) - 1}, not {rank}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The assignment as JSON-ready values; the group by its id."""
        return {
            "replica_index": self.replica_index,
            "node": self.node,
            "node_name": self.node_name,
            "gpus": list(self.gpus),
            "placement_group": self.placement_group.id.hex(),
            "bundle_indices": list(self.bundle_indices),
            "ranks": list(self.ranks),
            "share": self.share,
            "shares": list(self.shares),
            "mig": self.mig,
            "cpus_per_gpu": self.cpus_per_gpu,
            "memory_bytes_per_gpu": self.memory_bytes_per_gpu,
            "ray_gpus": list(self.ray_gpus),
            "bandwidth_gb_per_s": self.bandwidth_gb_per_s,
            "bandwidth_measured": self.bandwidth_measured,
            "weakest_link": self.weakest_link,
            "ray_bandwidth_gb_per_s": self.ray_bandwidth_gb_per_s,
            "ray_weakest_link": self.ray_weakest_link,
            "sorted_bandwidth_gb_per_s": self.sorted_bandwidth_gb_per_s,
            "upper_bandwidth_gb_per_s": self.upper_bandwidth_gb_per_s,
            "ray_upper_bandwidth_gb_per_s": self.ray_upper_bandwidth_gb_per_s,
            "egress_resource": self.egress_resource,
            "egress_units": self.egress_units,
            "cpus": self.cpus,
            "memory_bytes": self.memory_bytes,
            "set_size": self.set_size,
            "affinities": [dict(one) for one in self.affinities],
        }


@dataclass(frozen=True)
class PlacementResult:
    """A deployment and where its replicas are.

    Attributes:
        assignments: one per replica and node, by replica index and first rank there.
        pending: replicas without a place -> why. They are placed when there is room.
        model, runtime, runtime_config, serving, budget: declared fields, for the code that starts its workers.
            The API key is a reference; a worker reads the key with ``runtime_config.api_key.resolve()``.
    """

    deployment: str
    assignments: list[NodeAssignment]
    pending: dict[int, str] = field(default_factory=dict)
    model: str = ""
    runtime: str = ""
    runtime_config: RuntimeConfig | None = None
    serving: Serving = field(default_factory=Serving)
    budget: Budget | None = None

    def replica(self, replica_index: int) -> list[NodeAssignment]:
        """The assignments of one replica: several if it lies on several nodes, in one placement group."""
        return [a for a in self.assignments if a.replica_index == replica_index]

    def actor_options(self, replica_index: int, rank: int) -> dict[str, Any]:
        """Options that start rank ``rank`` of a replica, whichever node it is on.

        Raises:
            IndexError: there is no such replica, or it has no such rank.
        """
        for a in self.replica(replica_index):
            if rank in a.ranks:
                return a.actor_options(a.ranks.index(rank))
        raise IndexError(f"{self.deployment} has no rank {rank} of a replica {replica_index}")

    def engine_options(self, replica_index: int) -> dict[str, Any]:
        """Options that start the engine of a replica where its rank 0 is: see :meth:`NodeAssignment.engine_options`.

        Raises:
            IndexError: there is no such replica.
        """
        for a in self.replica(replica_index):
            if 0 in a.ranks:
                return a.engine_options()
        raise IndexError(f"{self.deployment} has no replica {replica_index}")

    def environment(self, replica_index: int, rank: int | None = None) -> dict[str, str]:
        """Environment variables for the engine of a replica, or for its worker of that rank.

        They go into ``Engine.options(runtime_env={"env_vars": ...})``, or into a subprocess's environment:

        - ``VLLM_RAY_BUNDLE_INDICES``: the bundles of the replica's placement group in rank order, one for each rank.
        - ``VLLM_RAY_PER_WORKER_GPUS``: how much of a GPU each bundle has, if all have the same.
        - ``CUDA_DEVICE_ORDER=PCI_BUS_ID``: CUDA then numbers a node's GPUs as NVML and Ray do.
        - ``RAY_ADDRESS``: the cluster, if this process is connected to it. The process in which vLLM starts its engine
          core needs it, as several clusters may run on the same machine.
        - With a rank, ``RANK`` and ``WORLD_SIZE`` as torch.distributed reads them. A worker sees one GPU, ``cuda:0``.
        - With a rank, what is near its GPU, as far as it is known: ``PLACEMENT_CPUS`` and ``PLACEMENT_NUMA_NODE``, by
          which :func:`placement.bind` binds the worker; ``UCX_NET_DEVICES``, the nearest RDMA ports; and
          ``NCCL_IB_HCA``, those near any GPU of the replica on that node, since NCCL needs all ranks of a node to have
          the same (NVIDIA/nccl#1478) and each node to have the same number: otherwise it is left out. If no RDMA
          port is near, ``NCCL_SOCKET_IFNAME`` has the near network interfaces.

        The first three are for GPUs, so a remote replica and a CPU replica have none of them. A CPU
        replica gets an empty ``CUDA_VISIBLE_DEVICES``: otherwise Ray lets a worker without GPUs see all GPUs of its
        node.

        Raises:
            IndexError: there is no such replica, or it has no such rank.
        """
        parts = self.replica(replica_index)
        if not parts:
            raise IndexError(f"{self.deployment} has no replica {replica_index}")
        if rank is not None and not any(rank in a.ranks for a in parts):
            raise IndexError(f"{self.deployment} has no rank {rank} of a replica {replica_index}")
        return _variables(parts, rank)

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values, without ``runtime_config``, which may name endpoints and keys."""
        return {
            "deployment": self.deployment,
            "assignments": [a.to_dict() for a in self.assignments],
            "pending": {str(index): reason for index, reason in self.pending.items()},
            "model": self.model,
            "runtime": self.runtime,
            "serving": self.serving.model_dump(mode="json"),
            "budget": None if self.budget is None else self.budget.model_dump(mode="json", exclude_none=True),
        }


_OF_ALL_NODES = ("VLLM_RAY_BUNDLE_INDICES", "RANK", "WORLD_SIZE", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME")
"""Variables that depend on all parts of a replica."""


def _variables(parts: Sequence[NodeAssignment], rank: int | None) -> dict[str, str]:
    """The environment of a replica with these parts, or of its worker with that rank."""
    bundle_of = dict(sorted(pair for a in parts for pair in zip(a.ranks, a.bundle_indices, strict=True)))
    variables: dict[str, str] = {}
    if parts[0].gpus:
        variables["VLLM_RAY_BUNDLE_INDICES"] = ",".join(map(str, bundle_of.values()))
        if len(shares := {a.share_of(i) for a in parts for i in range(len(a.gpus))}) == 1:
            variables["VLLM_RAY_PER_WORKER_GPUS"] = f"{shares.pop():g}"
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    elif parts[0].cpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if ray.is_initialized():
        variables["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    if rank is not None:
        variables |= {"RANK": str(rank), "WORLD_SIZE": str(len(bundle_of))}
        variables |= _near(parts, next(a for a in parts if rank in a.ranks), rank)
    return variables


def _near(parts: Sequence[NodeAssignment], part: NodeAssignment, rank: int) -> dict[str, str]:
    """The variables with what is near a worker's GPU."""
    if not part.affinities:
        return {}
    near = part.affinities[part.ranks.index(rank)]
    found: dict[str, str] = {}
    if "cpus" in near:
        found[CPUS] = near["cpus"]
    if "numa_node" in near:
        found[NUMA_NODE] = str(near["numa_node"])
    if "ports" in near:
        found["UCX_NET_DEVICES"] = ",".join(near["ports"])
    ports = [_names(one.get("ports", []) for one in a.affinities) for a in parts]
    interfaces = [_names(one.get("interfaces", []) for one in a.affinities) for a in parts]
    variable, names = ("NCCL_IB_HCA", ports) if any(ports) else ("NCCL_SOCKET_IFNAME", interfaces)
    here = names[parts.index(part)]
    if here and len({len(one) for one in names}) == 1:
        found[variable] = f"={','.join(here)}"  # exact names: mlx5_1 would also match mlx5_10
    return found


def _names(lists: Iterable[list[str]]) -> list[str]:
    """All names, each once."""
    return list(dict.fromkeys(name for one in lists for name in one))
