"""A real Ray cluster of simulated nodes on this machine: real raylets and books, counted GPUs, no silicon.

For the demo, the tests and the benchmarks. Each node has a loopback address of its own, and a GPU node
carries the label that gives it the topology of a recorded machine. All traffic stays on 127.0.0.0/8.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import ray

from placement import topologies
from placement.runtime.discovery import TOPOLOGY_LABEL


@dataclass(frozen=True)
class SimulatedNode:
    """One node to start.

    Attributes:
        name: its name in the cluster.
        topology: catalogue entry whose GPUs it has; ``None`` for a node without one.
        gpus: GPU count where there is no catalogue entry.
        resources: custom resources, such as ``{"egress_openai": 64}``.
        labels: further node labels.
        env: environment variables of the node's raylet, and so of its workers.
    """

    name: str
    topology: str | None = None
    gpus: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def embedded_cluster(
    nodes: Sequence[SimulatedNode], progress: Callable[[str], None] = lambda _: None, dashboard: bool = False
) -> Iterator[str]:
    """Starts a head and the given nodes, connects this process, and stops all of it at the end, also on Ctrl-C.

    Args:
        nodes: the nodes beside the head, in order; the head has address 127.0.0.2, they 127.0.0.3 and on.
        progress: told what is being started.
        dashboard: also start the dashboard and job server on the head.

    Yields:
        The cluster's address.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="placement-") as home, _environment("HOME", home):
        running = Cluster()
        try:
            progress("head")
            running.add_node(
                node_ip_address="127.0.0.2",
                node_name="head",
                num_cpus=2,
                num_gpus=0,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.2",
                object_store_memory=80_000_000,
            )
            for number, node in enumerate(nodes):
                progress(node.name)
                gpus = len(topologies.load(node.topology)) if node.topology else node.gpus
                labels = dict(node.labels) | ({TOPOLOGY_LABEL: node.topology} if node.topology else {})
                running.add_node(
                    wait=False,
                    node_ip_address=f"127.0.0.{number + 3}",
                    node_name=node.name,
                    num_cpus=2,
                    num_gpus=gpus,
                    resources=dict(node.resources),
                    labels=labels,
                    env_vars=dict(node.env) or None,
                    object_store_memory=80_000_000,
                )
            running.wait_for_nodes()
            ray.init(
                address=running.address,
                _node_ip_address="127.0.0.2",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            yield running.address
        finally:
            ray.shutdown()
            running.shutdown()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
