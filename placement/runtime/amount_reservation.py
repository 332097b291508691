"""Replicas that hold no GPU: egress capacity towards a provider, or CPUs and memory, in a group of one bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ray.util.placement_group import PlacementGroup

from placement.core.replicas import PlannedReplica
from placement.runtime import faults, groups
from placement.runtime.discovery import NodeInfo
from placement.runtime.group_reservation import Creator
from placement.runtime.orders import Refusal
from placement.runtime.results import NodeAssignment


def reserve_amounts(
    info: NodeInfo,
    replicas: Sequence[PlannedReplica],
    names: Mapping[int, str],
    reserved: list[tuple[str, NodeAssignment]],
    refusals: list[Refusal],
    create: Creator | None,
) -> None:
    """Reserves replicas that are egress capacity, or CPUs and memory, of one node.

    There are no slots to steer; Ray's own table verifies the reservation.

    Args:
        info: the node.
        replicas: what was planned on it.
        names: replica index -> name of its order.
        reserved: each reservation is added to it at once, with the name of its order, so that it is known whatever is
            raised later.
        refusals: what could not be reserved is added to it.
        create: the creator of the groups; by default the service.
    """

    def made() -> Iterator[tuple[PlannedReplica, PlacementGroup | None]]:
        for replica in replicas:
            name, bundle = names[replica.replica_index], _bundle(replica)
            if create is not None:
                faults.point("service.lent")
                yield replica, create(name, [bundle], [info.id])
            else:
                yield replica, groups.create_group(name, [bundle], [info.id])

    # The service's own groups all at once; a caller's one after the other, since it may fail before the next.
    all_made = made() if create is not None else list(made())
    faults.point("service.egress_created")
    for replica, group in all_made:
        if group is None or not groups.ready_or_removed(group) or groups.node_of_group(group) != info.id:
            if group is not None:
                groups.remove_group(group)
            what = "CPUs or memory" if replica.egress_resource is None else "egress capacity"
            reason = f"another Ray user took {what} meanwhile"
            refusals.append(Refusal(info.id, info.name, 1, reason))
            continue
        assignment = NodeAssignment(
            replica_index=replica.replica_index,
            node=info.id,
            gpus=[],
            placement_group=group,
            bundle_indices=[0],
            node_name=info.name,
            egress_resource=replica.egress_resource,
            egress_units=replica.egress_units,
            cpus=replica.cpu_milli / 1000,
            memory_bytes=replica.memory_bytes,
        )
        reserved.append((names[replica.replica_index], assignment))


def _bundle(replica: PlannedReplica) -> dict[str, float]:
    """The resources of the one bundle of a replica without GPUs."""
    if replica.egress_resource is not None:
        return {replica.egress_resource: float(replica.egress_units)}
    amounts = {"CPU": replica.cpu_milli / 1000, "memory": float(replica.memory_bytes)}
    return {resource: amount for resource, amount in amounts.items() if amount}
