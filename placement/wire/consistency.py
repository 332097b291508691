"""Refuses fields of a deployment that contradict each other, or have no meaning beside another; each with the fix."""

from __future__ import annotations

import re

from placement.core.needs import WHOLE
from placement.core.policy import Policy
from placement.core.request import Strategy
from placement.core.shares import least_gpus
from placement.errors import counted
from placement.wire.constraints import PlacementConstraints
from placement.wire.declaration import Declaration
from placement.wire.layout import has_gpus

GPU_RUNTIMES = ("tensorrt", "cudarc")
"""Runtimes that run only on GPUs."""

_MIG_PATTERN = re.compile(r"([1-8]c\.)?[1-8]g\.\d{1,3}gb([+-][a-z.]+)?")

NO_LINKS_BETWEEN_INSTANCES = (
    "MIG instances have no NVLink and no peer-to-peer access to each other, not even on one GPU"
)
"""Why one replica cannot have several; https://github.com/NVIDIA/nccl/issues/1716."""


def require_consistent(one: Declaration, stands: bool) -> None:
    """Checks a deployment whose fields are valid one by one.

    Args:
        one: the deployment.
        stands: it was accepted before, so that rules for new requests do not apply.

    Raises:
        ValueError: its fields contradict each other.
    """
    _check_runtime(one)
    _check_cpus(one)
    _check_layout(one)
    _check_parallelism(one)
    _check_named(one)
    _check_asked(one)
    if not stands:
        _check_endpoint(one)
        _check_floors(one)
        _check_group(one)


def _check_runtime(one: Declaration) -> None:
    config = one.runtime_config
    if config and one.runtime and config.runtime and config.runtime != one.runtime:
        raise ValueError(
            f"runtime is {one.runtime!r} but runtime_config.runtime is {config.runtime!r}; keep one"
        )
    if one.runtime_name == "custom":
        if config is None or config.transport is None:
            raise ValueError(
                'runtime custom needs runtime_config.transport: "local_gpu", "local_cpu" or "remote_network"'
            )
        if config.transport == "remote_network" and config.provider is None:
            raise ValueError("a custom remote runtime needs runtime_config.provider, such as openai")


def _check_endpoint(one: Declaration) -> None:
    """Refuses fields that only remote runtimes, or only custom ones, can have."""
    config, runtime = one.runtime_config, one.runtime_name
    if config is None:
        return
    if runtime != "custom":
        for field in ("transport", "provider"):
            if getattr(config, field) is not None:
                if getattr(config, field) == "local_cpu":
                    raise ValueError(
                        f"runtime_config.transport is for runtime custom, not {runtime} ({one.runtime_from}); "
                        "remove it, and set cpus instead"
                    )
                calls = "" if one.remote else "litellm if replicas call that provider, or to "
                raise ValueError(
                    f"runtime_config.{field} is for runtime custom, not {runtime} ({one.runtime_from}); set "
                    f"runtime to {calls}custom, or remove {field}"
                )
    elif config.provider is not None and not one.remote:
        raise ValueError(
            "runtime_config.provider is for a custom runtime that calls one; set transport to remote_network, "
            "or remove provider"
        )
    for field in ("base_url", "api_key"):
        if getattr(config, field) is not None and not one.remote:
            instead = (
                "transport to remote_network" if runtime == "custom" else "runtime to openai (or litellm)"
            )
            raise ValueError(
                f"runtime_config.{field} is for remote runtimes, not {runtime} ({one.runtime_from}); set "
                f"{instead} if replicas call an endpoint, or remove {field}"
            )


def _check_floors(one: Declaration) -> None:
    """Refuses a floor on links where each set is one GPU."""
    if one.needs.gpus != 1 or one.gpus_per_replica == 1:
        return
    for field in ("min_bandwidth_gb_per_s", "within"):
        value = getattr(one, field)
        if value is not None:
            asked = {"gpus", "tensor_parallel", "pipeline_parallel"}
            named = [f"{name}: {getattr(one, name)}" for name in sorted(asked) if getattr(one, name)]
            raise ValueError(
                f"{field}: {value} is about the links within a tensor-parallel group, and with "
                f"{', '.join(named)} each has one GPU; set tensor_parallel to 2 or more, or leave {field} out"
            )


def _check_asked(one: Declaration) -> None:
    """Refuses two ways to ask for GPUs at once, and limits on GPUs for replicas without GPUs."""
    if one.mig is not None and (one.gpus or 0) > 1:
        raise ValueError(
            f"mig: {one.mig} and gpus: {one.gpus} ask for tensor parallelism across MIG instances; "
            f"{NO_LINKS_BETWEEN_INSTANCES}; ask for one larger instance, or for whole GPUs"
        )
    asked = [name for name in ("gpus", "gpu_memory_gib", "mig") if getattr(one, name) is not None]
    if len(asked) > 1:
        values = " and ".join(f"{name}: {getattr(one, name)}" for name in asked)
        raise ValueError(f"{values} are different ways to ask for GPUs; keep one of them")
    if one.remote and asked:
        raise ValueError(
            f"{asked[0]}: {getattr(one, asked[0])} on a remote deployment ({one.runtime_name}); leave "
            f"{asked[0]} out, or set runtime to a local one such as vllm"
        )
    if one.mig is not None and not _MIG_PATTERN.fullmatch(one.mig):
        raise ValueError(f"mig: {one.mig!r} is not a MIG profile; write one such as 1g.10gb")
    for field in ("min_bandwidth_gb_per_s", "within"):
        value = getattr(one, field)
        if value is not None and one.needs.gpus * one.stages < 2:
            has = "one GPU at most" if one.gpus_per_replica else "no GPUs"
            has = "one whole GPU at most" if one.needs.amounts else has
            raise ValueError(
                f"{field}: {value} is about the links between a replica's GPUs, and it has {has}; "
                "leave it out, or ask for 2 gpus or more"
            )
    limits = one.constraints
    if limits and one.name in (*limits.apart_from, *limits.near_to):
        raise ValueError(
            f"constraints: apart_from or near_to names {one.name!r} itself; use constraints.spread to keep "
            "its replicas apart"
        )


def _check_cpus(one: Declaration) -> None:
    if one.cpus is None:
        if one.memory_gib is not None:
            raise ValueError(
                f"memory_gib: {one.memory_gib:g} is for replicas without GPUs, which say cpus as well; add cpus, "
                "or use constraints.memory_gib_per_gpu"
            )
        if one.transport == "local_cpu":
            raise ValueError("runtime_config.transport local_cpu needs cpus: how many each replica takes")
        return
    asked = f"cpus: {one.cpus:g}"
    for field in (
        "gpus",
        "gpu_memory_gib",
        "mig",
        "tensor_parallel",
        "pipeline_parallel",
        "placement_group",
    ):
        if getattr(one, field) is not None:
            raise ValueError(
                f"{asked} is for replicas without GPUs, and {field} asks for GPUs; leave one of them out, or use "
                "constraints.cpus_per_gpu for CPUs beside GPUs"
            )
    if one.remote:
        raise ValueError(
            f"{asked} on a remote deployment ({one.runtime_name}); leave cpus out, or set runtime to one that "
            "runs here, such as python"
        )
    if one.runtime_name in GPU_RUNTIMES:
        raise ValueError(
            f"{asked} with runtime {one.runtime_name}, which needs GPUs; ask for gpus, or set runtime to another "
            "one, such as ort"
        )
    if one.transport == "local_gpu":
        raise ValueError(f"{asked} with transport local_gpu; set runtime_config.transport to local_cpu")


def _check_group(one: Declaration) -> None:
    """Refuses fields that a member of a group cannot have."""
    group = one.group
    if group is None:
        return
    if one.name not in group.members:
        raise ValueError(f"group: {one.name!r} is no member of {group.name!r}; add it to its members")
    if one.replicas != group.replicas(one.name):
        raise ValueError(
            f"replicas: {one.replicas}, but group {group.name!r} has {counted(group.units, 'unit')} with "
            f"{group.members[one.name]} each; leave replicas out, or set it to {group.replicas(one.name)}"
        )
    limits = one.constraints or PlacementConstraints()
    others = sorted({*limits.apart_from, *limits.near_to} & group.members.keys())
    refused = {
        "runtime": one.runtime_name if one.remote else None,
        "cpus": one.cpus,
        "placement_group": one.placement_group and "given",
        "constraints.spread": limits.spread and limits.spread.label,
        "constraints.apart_from or near_to": others[0] if others else None,
        "policy": None if one.policy is Policy.TOPOLOGY else str(one.policy),
        "owner": one.owner if one.owner == "caller" else None,
        "deadline_seconds": one.deadline_seconds,
    }
    for field, value in refused.items():
        if value:
            raise ValueError(
                f"{field}: {value} is not possible for a member of a group ({group.name!r}), whose replicas have "
                "GPUs, are placed by the group's links, and end as one; leave it out, or "
                f"take {one.name!r} out of the group"
            )


def _check_layout(one: Declaration) -> None:
    if one.placement_group is None:
        return
    for field in ("gpus", "gpu_memory_gib", "mig", "tensor_parallel", "pipeline_parallel"):
        if getattr(one, field) is not None:
            raise ValueError(f"placement_group says all of what is asked for; leave {field} out")
    limits = one.constraints or PlacementConstraints()
    if limits.model_copy(update={"gpus": None}) != PlacementConstraints():
        raise ValueError(
            "placement_group says all of what is asked for, but for constraints.gpus; leave the other "
            "constraints out"
        )
    if one.replicas > 1:
        raise ValueError(f"placement_group is one replica, not {one.replicas}; leave replicas out")
    if one.remote:
        raise ValueError(f"placement_group has GPUs, and {one.runtime_name} is remote; leave it out")
    if one.owner != "caller":
        raise ValueError(
            f"placement_group is created by its caller, and owner is {one.owner}; call "
            "placement.placement_group, or set owner to caller"
        )


def _check_named(one: Declaration) -> None:
    """Refuses named GPUs that do not match the rest of the request."""
    if not one.named:
        return
    if one.remote:
        raise ValueError(
            f"constraints.gpus names GPUs, and {one.runtime_name} is remote; leave constraints.gpus out"
        )
    if one.cpus is not None:
        raise ValueError(
            f"constraints.gpus names GPUs, and cpus: {one.cpus:g} is for replicas without; leave one of them out"
        )
    kinds = {name[:3] for name in one.named if isinstance(name, str)}
    if len(kinds) > 1:
        raise ValueError("constraints.gpus names GPUs and MIG instances; name one kind of them")
    if "GPU" in kinds and one.mig is not None:
        raise ValueError(f"constraints.gpus names GPUs, and mig: {one.mig} is an instance; name one of these")
    asked, by_memory = one.gpus_asked, one.gpu_memory_gib is not None
    if "MIG" in kinds and (one.gpus_per_replica > 1 or isinstance(asked, float) or by_memory):
        raise ValueError(
            f"constraints.gpus names MIG instances, and a replica is one of them, all of it; "
            f"{NO_LINKS_BETWEEN_INSTANCES}; ask for 1 GPU per replica"
        )
    each = WHOLE // one.needs.share if one.needs.share < WHOLE else 1
    per_replica = least_gpus(one.needs) * one.stages
    most = len(one.named) * each // per_replica
    if one.replicas > most and not by_memory:
        many = f"{one.replicas} replicas need" if one.replicas > 1 else "a replica needs"
        needed = -(-one.replicas * per_replica // each)
        raise ValueError(
            f"constraints.gpus names {counted(len(one.named), 'GPU')}, and {many} {needed}; name more, or ask "
            "for less"
        )
    if one.placement_group is not None:
        several = sum(map(has_gpus, one.placement_group.bundles)) > 1
        if several and one.placement_group.strategy is Strategy.STRICT_SPREAD:
            raise ValueError(
                "constraints.gpus names GPUs of one node, and STRICT_SPREAD wants each bundle on a node of its "
                "own; use PACK, or make a group for each node"
            )
        one.placement_group.check_labels_agree()


def _check_parallelism(one: Declaration) -> None:
    tensor, pipeline = one.tensor_parallel, one.pipeline_parallel
    asked = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    for name, value in asked.items():
        if value is None:
            continue
        if one.remote:
            raise ValueError(f"{name}: {value} on a remote deployment ({one.runtime_name}); leave it out")
        if one.mig is not None:
            raise ValueError(
                f"mig: {one.mig} and {name}: {value} ask for a replica of several MIG instances; "
                f"{NO_LINKS_BETWEEN_INSTANCES}; ask for one larger instance, or for whole GPUs"
            )
        if isinstance(one.gpus, float) or one.gpu_memory_gib is not None:
            raise ValueError(f"{name}: {value} is for whole GPUs, not for a share of one; leave it out")
        if one.gpus is not None and one.gpus % value:
            raise ValueError(f"gpus: {one.gpus} cannot be divided by {name}: {value}; leave gpus out")
    if tensor is not None and pipeline is not None and one.gpus not in (None, tensor * pipeline):
        raise ValueError(
            f"gpus: {one.gpus} is not tensor_parallel x pipeline_parallel ({tensor} x {pipeline} = "
            f"{tensor * pipeline}); leave gpus out"
        )
