"""A real Ray cluster of simulated nodes on this machine: real raylets, counted GPUs, no real GPUs.

For the demo, the tests and the benchmarks. Each node has a loopback address of its own, and a GPU node
has the label that gives it the topology of a recorded machine. All traffic stays on 127.0.0.0/8, where
each cluster has a network of its own: 127.0.0 for the first, 127.0.16 and up for others.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray

from placement import topologies
from placement.runtime import ray_internals
from placement.runtime.discovery import TOPOLOGY_LABEL

CPUS = 2
SIZE = {"object_store_memory": 80_000_000}
NETWORKS = tuple(f"127.0.{number}" for number in (0, *range(16, 64)))
IN_USE_PORT = 6378
"""The cluster that listens on this port at address 1 of a network owns the network."""
PORTS = range(24_000, 32_768)
"""Ports above those that Ray uses for workers and clients, and below Linux's ephemeral ports."""


@dataclass(frozen=True)
class SimulatedNode:
    """One node to start.

    Attributes:
        name: its name in the cluster.
        topology: catalogue entry whose GPUs it has; ``None`` for a node without one.
        gpus: GPU count without a catalogue entry.
        resources: custom resources, such as ``{"egress_openai": 64}``.
        labels: further node labels.
        cpus: CPUs that Ray is told of.
        env: environment variables of the node's raylet, and so of its workers.
    """

    name: str
    topology: str | None = None
    gpus: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    cpus: int = CPUS
    env: Mapping[str, str] = field(default_factory=dict)


class EmbeddedCluster:
    """A running cluster; nodes can be added and ended.

    Attributes:
        host: the address of its head's machine.
        address: ``host:port`` of its head.
    """

    def __init__(self, dashboard: bool) -> None:
        self._network = Network()
        self.host = f"{self._network.prefix}.2"
        self._cluster = ray_internals.simulated_cluster()
        self._nodes: dict[str, Any] = {}
        self._count = 0
        self._dashboard = dashboard

    def start_head(self) -> None:
        """Starts the head."""
        ray_internals.add_simulated_node(
            self._cluster,
            node_ip_address=self.host,
            node_name="head",
            num_gpus=0,
            num_cpus=CPUS,
            include_dashboard=self._dashboard,
            dashboard_host=self.host,
            # Jobs go to the head's agent, which listens on every address, so that each cluster needs another port.
            dashboard_agent_listen_port=free_port(self.host) if self._dashboard else None,
            no_monitor=True,  # of an autoscaler; there is none here
            include_log_monitor=False,
            **SIZE,
        )
        self.address: str = self._cluster.address

    def add(self, node: SimulatedNode) -> None:
        """Starts a node, with the next free address; it joins within seconds."""
        gpus = len(topologies.load(node.topology)) if node.topology else node.gpus
        labels = dict(node.labels) | ({TOPOLOGY_LABEL: node.topology} if node.topology else {})
        self._nodes[node.name] = ray_internals.add_simulated_node(
            self._cluster,
            wait=False,
            node_ip_address=f"{self._network.prefix}.{3 + self._count % 250}",
            node_name=node.name,
            num_gpus=gpus,
            num_cpus=node.cpus,
            resources=dict(node.resources),
            labels=labels,
            env_vars=dict(node.env) or None,
            **SIZE,
        )
        self._count += 1

    def is_alive(self) -> bool:
        """Whether its head runs; `ray stop` ends it, too."""
        return ray_internals.simulated_head_is_alive(self._cluster)

    def wait(self) -> None:
        """Waits until all nodes that were started have joined."""
        self._cluster.wait_for_nodes()

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        """Ends a node's raylet and its workers, as if its machine were gone; with SIGTERM it leaves cleanly."""
        ray_internals.end_simulated_node(self._cluster, self._nodes.pop(name), how)

    def stop(self) -> None:
        """Ends all of it."""
        self._cluster.shutdown()
        self._network.close()


@contextmanager
def embedded_cluster(
    nodes: Sequence[SimulatedNode], progress: Callable[[str], None] = lambda _: None, dashboard: bool = False
) -> Iterator[EmbeddedCluster]:
    """Starts a head and the given nodes, connects this process, and stops all of it at the end, also on Ctrl-C.

    Args:
        nodes: the nodes beside the head, in order; the head has address 2 of its network, they 3 and on.
        progress: called with what is being started.
        dashboard: also start the dashboard and job server on the head.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)

    with tempfile.TemporaryDirectory(prefix="placement-") as home, _environment("HOME", home):
        running = EmbeddedCluster(dashboard)
        try:
            progress("head")
            running.start_head()
            for node in nodes:
                progress(node.name)
                running.add(node)
            running.wait()
            ray.init(
                address=running.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **ray_internals.driver_at(running.host),
            )
            yield running
        finally:
            ray.shutdown()
            running.stop()


class Network:
    """A part of 127.0.0.0/8 that no other cluster uses, until it is closed.

    Attributes:
        prefix: ``127.0.0``, followed by a machine's number.

    Raises:
        OSError: there is none.
    """

    def __init__(self) -> None:
        for self.prefix in NETWORKS:
            self._in_use = socket.socket()
            try:
                self._in_use.bind((f"{self.prefix}.1", IN_USE_PORT))
                return
            except OSError:
                self._in_use.close()
        raise OSError(
            f"each network from {NETWORKS[0]} to {NETWORKS[-1]} has a simulated cluster; end one of them"
        )

    def close(self) -> None:
        """Frees it for others."""
        self._in_use.close()


def free_port(host: str) -> int:
    """A free port at this address that the kernel does not give to other programs by itself.

    An ephemeral port that is free now may be taken before the server has started.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"each port from {PORTS[0]} to {PORTS[-1]} is in use at {host}")


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
