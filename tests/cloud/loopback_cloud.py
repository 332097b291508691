"""A cloud on this machine for Ray's own autoscaler: its machines are raylets with counted GPUs on loopback addresses.

Ray imports it by the name in ``cluster.yaml``, in the process of its autoscaler.
"""

from __future__ import annotations

import threading
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler import tags
from ray.autoscaler.node_provider import NodeProvider

HEAD = "loopback-0"
"""RAY_CLOUD_INSTANCE_ID of the head, by which the autoscaler knows it for one of the cloud's machines."""


class Machine:
    """One machine: its tags, and its Ray once that runs."""

    def __init__(self, number: int, machine_tags: dict[str, str]) -> None:
        self.number = number
        self.tags = machine_tags
        self.ray: Node | None = None


class LoopbackCloud(NodeProvider):
    """Machines are listed from the moment at which they are asked for, and Ray starts on one after the other.

    A ``node_config`` may say ``refuses: true``: there is never such a machine; or ``forgets_labels: true``: its Ray
    does not have the labels that the type promises.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        head = {
            tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_HEAD,
            tags.TAG_RAY_USER_NODE_TYPE: provider_config["head_node_type"],
            tags.TAG_RAY_NODE_NAME: HEAD,
            tags.TAG_RAY_NODE_STATUS: tags.STATUS_UP_TO_DATE,
        }
        self._machines = {HEAD: Machine(0, head)}
        self._count = 0
        self._listing = threading.Lock()
        self._starting = threading.Lock()  # two raylets at once miss Ray's deadlines on two cores

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._listing:
            return [name for name, one in self._machines.items() if tag_filters.items() <= one.tags.items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self._machines

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._machines

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._machines[node_id].tags

    def set_node_tags(self, node_id: str, changed: dict[str, str]) -> None:
        self._machines[node_id].tags.update(changed)

    def internal_ip(self, node_id: str) -> str:
        network, last = self.provider_config["gcs_address"].rsplit(":", 1)[0].rsplit(".", 1)
        return f"{network}.{int(last) + self._machines[node_id].number}"

    external_ip = internal_ip

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        machine_tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        if node_config.get("refuses"):
            raise RuntimeError("there is no such machine today")
        for _ in range(count):
            with self._listing:
                self._count += 1
                name = f"loopback-{self._count}"
                # Listed before Ray runs on it: a Ray on a machine that is not blocks its type for ten minutes.
                ready = {tags.TAG_RAY_NODE_NAME: name, tags.TAG_RAY_NODE_STATUS: tags.STATUS_UP_TO_DATE}
                machine = self._machines[name] = Machine(self._count, {**machine_tags, **ready})
            promised = {} if node_config.get("forgets_labels") else dict(labels)
            threading.Thread(
                target=self._boot, args=(machine, name, dict(resources), promised), daemon=True
            ).start()

    def _boot(self, machine: Machine, name: str, resources: dict[str, float], labels: dict[str, str]) -> None:
        gcs = self.provider_config["gcs_address"]
        cpus, gpus, memory = (resources.pop(key, 0) for key in ("CPU", "GPU", "memory"))
        params = RayParams(
            node_ip_address=self.internal_ip(name),
            node_name=name,
            gcs_address=gcs,
            redis_address=gcs,
            min_worker_port=0,
            max_worker_port=0,
            dashboard_port=None,
            dashboard_agent_listen_port=0,
            num_cpus=cpus,
            num_gpus=gpus,
            memory=memory or None,
            object_store_memory=80 << 20,
            resources=resources,
            # Ray takes this label from its environment, which is the head's here.
            labels={**labels, "ray.io/node-group": machine.tags[tags.TAG_RAY_USER_NODE_TYPE]},
            env_vars={
                "RAY_CLOUD_INSTANCE_ID": name,
                "RAY_NODE_TYPE_NAME": machine.tags[tags.TAG_RAY_USER_NODE_TYPE],
            },
        )
        with self._starting:
            if self.is_running(name):
                # On a busy machine this may miss Ray's own deadline of 30 s: then it is as if the machine were broken.
                machine.ray = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)

    def terminate_node(self, node_id: str) -> None:
        with self._listing:
            machine = self._machines.pop(node_id)
        if machine.ray is not None:
            machine.ray.kill_all_processes(check_alive=False, allow_graceful=True)

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config
