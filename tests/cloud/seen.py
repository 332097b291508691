"""What can be seen of a cluster on the loopback cloud, by a process that is connected to it."""

from __future__ import annotations

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.util.placement_group import placement_group_table


def machines() -> dict[str, str]:
    """Node id -> node type, of what the cloud has sent."""
    return {
        node["NodeID"]: node["Labels"]["ray.io/node-group"]
        for node in ray.nodes()
        if node["Alive"] and node["Labels"].get("ray.io/node-group") != "head"
    }


def open_groups() -> dict[str, str]:
    table = placement_group_table().values()
    return {row["name"]: row["state"] for row in table if row["state"] != "REMOVED"}


def heard() -> GetClusterStatusReply:
    gcs = ray._private.worker.global_worker.gcs_client
    return GetClusterStatusReply.FromString(gcs.get_cluster_status())


def demanded() -> int:
    """How many groups the autoscaler is asked for."""
    return len(heard().cluster_resource_state.pending_gang_resource_requests)


def coming() -> list[str]:
    """Node types of which the autoscaler has asked for machines that are not there yet."""
    state = heard().autoscaling_state
    pending = [*state.pending_instance_requests, *state.pending_instances]
    return [one.ray_node_type_name for one in pending]
