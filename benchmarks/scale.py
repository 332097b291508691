"""What the service itself takes, by the size of the cluster: ``python -m benchmarks.scale``.

The real service on a make-believe Ray: nodes of 8 GPUs, of which deployments of one GPU hold up to five, 5,000 in
all at most. What the make-believe Ray takes (the nodes' answers, reading what is free) is measured and left out; the
store is a dictionary. All times are CPU time of the whole process, so that a busy machine counts less.

What is measured: ``place`` of 1, 2 and 3 GPUs in turn, and its release; ``status``; a look of the service's clock, of
which there is one a second, with nothing to do, and at deployments that wait and find no room; and a start with
deployments, and the facts of all nodes, in the ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from placement import topologies
from placement.core.needs import WHOLE
from placement.runtime import clock, controller, demand, discovery, faults, fleet, groups, ledger, service
from placement.runtime.discovery import NodeInfo
from placement.runtime.groups import LiveGroup
from placement.runtime.inventory import Inventory
from placement.runtime.orders import Refusal, order_name
from placement.runtime.results import NodeAssignment

GPUS = 8
MACHINE = "dgx-a100"
TOKEN = "scale"
WARM_UP = 3
"""So many rounds are not counted."""
HELD_EACH = 5
"""How many GPUs of a node deployments hold at first."""


@dataclass(frozen=True)
class Group:
    """A placement group: what it holds on each node; ``id.hex()`` as Ray's has it."""

    name: str
    number: int
    held: dict[str, float]

    @property
    def id(self) -> Any:
        return SimpleNamespace(hex=lambda: f"{self.number:036x}")


@dataclass
class Cluster:
    """What is outside of the service. Keeps its own books up to date rather than adding up.

    Attributes:
        infos: the nodes.
        rows: node -> resource -> what is free, as Ray says it; a row is replaced when it changes.
        groups: id -> placement group.
        store: the key-value store.
        seconds: CPU time that all this took.
    """

    nodes: int
    infos: list[NodeInfo] = field(init=False)
    rows: dict[str, dict[str, float]] = field(init=False)
    groups: dict[str, Group] = field(default_factory=dict)
    store: dict[bytes, bytes] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self.infos = [
            NodeInfo(
                id=f"{number:056x}",
                name=f"node-{number:05}",
                address=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}",
                gpu_count=GPUS,
                labels={"ray.io/accelerator-type": "A100", "rack": f"rack-{number // 16:04}"},
                cpu_milli=128_000,
                memory_bytes=1 << 40,
                accelerators=frozenset({"A100"}),
            )
            for number in range(self.nodes)
        ]
        self.rows = {
            info.id: {
                "GPU": float(GPUS),
                "CPU": 128.0,
                "memory": float(1 << 40),
                "object_store_memory": float(1 << 37),
                f"node:{info.address}": 1.0,
                "accelerator_type:A100": 1.0,
            }
            for info in self.infos
        }

    @contextmanager
    def outside(self) -> Iterator[None]:
        """What is done here is not the service's."""
        began = time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self.seconds += time.thread_time() - began

    def available(self) -> dict[str, dict[str, float]]:
        with self.outside():
            return dict(self.rows)

    def begin(self, name: str, held: dict[str, float]) -> Group:
        """Makes a group that holds so many GPUs on these nodes."""
        group = Group(name, next(self._numbers), held)
        self.groups[group.id.hex()] = group
        self.take(held, 1)
        return group

    def end(self, group: Group) -> None:
        if self.groups.pop(group.id.hex(), None) is not None:
            self.take(group.held, -1)

    def take(self, held: dict[str, float], sign: int) -> None:
        for node, gpus in held.items():
            self.rows[node] = {**self.rows[node], "GPU": self.rows[node]["GPU"] - sign * gpus}

    def fill(self, deployments: int) -> None:
        """Writes what an earlier service had placed: deployments of one replica of one GPU, spread over all nodes."""
        for number in range(deployments):
            info, gpu = self.infos[number % self.nodes], number // self.nodes
            name = f"held-{number:05}"
            order = f"placement:{TOKEN}:{name}:0:00000000"
            replica = {
                "order": order,
                "group": self.begin(f"{order}:1", {info.id: 1.0}).id.hex(),
                "replica_index": 0, "node": info.id, "node_name": info.name, "gpus": [gpu],
                "bundle_indices": [0], "ranks": [0], "share": 1.0, "mig": "", "cpus_per_gpu": 0.0,
                "memory_bytes_per_gpu": 0, "ray_gpus": [gpu], "bandwidth_gb_per_s": None, "weakest_link": None,
                "ray_bandwidth_gb_per_s": None, "ray_weakest_link": None, "egress_resource": None,
                "egress_units": 0, "set_size": 0,
            }  # fmt: skip
            self.record(name, [replica])

    def record(self, name: str, replicas: Sequence[dict[str, Any]], **declared: Any) -> None:
        """Writes a record as version 2 of the ledger has it, which later ones read."""
        content = {
            "version": 2,
            "deployment": {"name": name, "model": "m", "replicas": 1, "gpus": 1, **declared},
            "runtime": "vllm",
            "replicas": replicas,
            "releasing": False,
        }
        self.store[f"deployment/{name}".encode()] = json.dumps(content).encode()

    def occupy(self) -> None:
        """Others take all that is free."""
        for info in self.infos:
            self.begin("somebody else's", {info.id: self.rows[info.id]["GPU"]})


class Nobody:
    """Node actors that are never needed: nothing fails, and nothing is left over."""

    def orphans_suspected(self) -> bool:
        return False

    @contextmanager
    def working(self, nodes: Iterable[str]) -> Iterator[None]:
        yield

    def __getattr__(self, name: str) -> Callable[..., frozenset[str]]:
        return lambda *args, **more: frozenset()


class Fleet(fleet.Fleet):
    """The real one, with node actors that do at once what was planned."""

    def __init__(self, cluster: Cluster, prefix: str, holdings: Any) -> None:
        super().__init__(lambda info: None, holdings, prefix)
        self._cluster = cluster
        nobody: Any = Nobody()
        self.agents, self.inventory = nobody, Inventory(nobody, {})

    def catch_up(self, since: float) -> bool:
        return False

    def restore(self, nodes: Sequence[NodeInfo]) -> None:
        self.inventory.restore({info.id for info in nodes})

    def reserve(self, claim: Any, known: Any, create: Any = None) -> Any:
        with self._cluster.outside():
            reserved: list[Any] = []
            for part in claim.replicas:
                order = order_name(self._prefix, claim.deployment.name, part.replica_index)
                gpus = len(part.gpus) * part.share / WHOLE
                if self._cluster.rows[part.node_id]["GPU"] < gpus:
                    return reserved, [Refusal(part.node_id, part.node_id, 1, "too few", full=True, at_most=0)]
                assignment = NodeAssignment(
                    part.replica_index,
                    part.node_id,
                    list(part.gpus),
                    self._cluster.begin(f"{order}:1", {part.node_id: gpus}),
                    list(range(len(part.gpus))),
                    node_name=part.node_id,
                    share=part.share / WHOLE,
                )
                reserved.append(self._note_reserved(order, assignment))
            self.note_change({part.node_id for part in claim.replicas})
            return reserved, []

    def _give_back(self, reserved: Any) -> None:
        with self._cluster.outside():
            for _, assignment in reserved:
                self._cluster.end(assignment.placement_group)
            self.note_change({assignment.node for _, assignment in reserved})


class AtOnce(Executor):
    """Does what it is given before it returns."""

    def submit(self, do: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        do(*args, **more)
        done: Future[Any] = Future()
        done.set_result(None)
        return done


@contextmanager
def make_believe(cluster: Cluster) -> Iterator[None]:
    """Puts ``cluster`` in the place of Ray."""

    def put(key: bytes, value: bytes, namespace: bytes, overwrite: bool = True) -> None:
        cluster.store[key] = value

    def live(wanted: Callable[[str], bool]) -> dict[str, LiveGroup]:
        with cluster.outside():
            return {
                text: LiveGroup(group.name, frozenset(group.held))
                for text, group in cluster.groups.items()
                if wanted(group.name)
            }

    kv = SimpleNamespace(
        kv_get=lambda key, namespace: cluster.store.get(key),
        kv_put=put,
        kv_delete=lambda key, namespace: cluster.store.pop(key, None),
        kv_keys=lambda prefix, namespace: [key for key in cluster.store if key.startswith(prefix)],
        kv_all=lambda prefix, namespace: {k: v for k, v in cluster.store.items() if k.startswith(prefix)},
    )
    cluster.store.setdefault(b"token", TOKEN.encode())
    nodes = frozenset(info.id for info in cluster.infos)
    instead: list[tuple[Any, str, Any]] = [
        (ledger, "ray_internals", kv),
        (faults, "point", lambda name: None),
        (discovery, "live_nodes", lambda: list(cluster.infos)),
        (controller, "Fleet", lambda make, holdings, prefix: Fleet(cluster, prefix, holdings)),
        (service, "Clock", lambda *args: SimpleNamespace(start=lambda: None)),
        (demand.Demand, "_run", lambda self: None),
        (clock, "live_node_ids", lambda: nodes),
        (clock, "draining_nodes", frozenset),
        (groups, "available_resources", cluster.available),
        (groups, "group_from_hex", lambda text: cluster.groups.get(text) or Group("gone", int(text, 16), {})),
        (groups, "remove_group", lambda group, ready=False: cluster.end(group)),
        (groups, "live_groups", live),
    ]
    with ExitStack() as stack:
        for where, name, what in instead:
            stack.enter_context(mock.patch.object(where, name, what))
        yield


class Service:
    """The service under test."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._loop = asyncio.new_event_loop()
        self._one: Any = None
        self.start_seconds = self.timed(self._start)[0]

    def _start(self) -> None:
        self._one = service.DeploymentPlacementActor(lambda info: None)

    def timed(self, do: Callable[[], Any]) -> tuple[float, Any]:
        """CPU seconds that something took, without what is outside of the service; and what it returned."""
        outside, began = self._cluster.seconds, time.process_time()
        found = do()
        return time.process_time() - began - (self._cluster.seconds - outside), found

    def ask(self, method: str, *args: Any) -> tuple[float, Any]:
        """The same of a public method."""
        return self.timed(lambda: self._loop.run_until_complete(getattr(self._one, method)(*args)))

    def look(self) -> float:
        """CPU seconds of one look of its clock at which all that waits is tried."""
        self._clock = clock.Clock(self._one._controller, AtOnce())
        return self.look_again()

    def look_again(self) -> float:
        """CPU seconds of the next look, before which nothing has changed."""
        return self.timed(self._clock.look)[0]

    def close(self) -> None:
        self._loop.close()


@contextmanager
def started(nodes: int, deployments: int, waiting: int = 0) -> Iterator[tuple[Cluster, Service]]:
    """A service that has just started with so many deployments of one GPU, and with some that find no room."""
    cluster = Cluster(nodes)
    cluster.fill(deployments)
    if waiting:
        cluster.occupy()
    for number in range(waiting):
        cluster.record(f"waits-{number:05}", [], gpus=1 + number % 4)
    facts = topologies.facts(MACHINE).model_dump_json(exclude_none=True).encode()
    cluster.store |= {f"facts/{info.id}".encode(): facts for info in cluster.infos}
    with make_believe(cluster):
        gc.collect()  # what was measured before
        one = Service(cluster)
        try:
            yield cluster, one
        finally:
            one.close()


def placing(sizes: Sequence[int], most: int, rounds: int) -> dict[int, tuple[list[float], list[float]]]:
    """Nodes -> seconds of each ``place``, and of each release. The sizes take turns, and see the same noise."""
    found: dict[int, tuple[list[float], list[float]]] = {nodes: ([], []) for nodes in sizes}
    with ExitStack() as stack:
        services = {
            nodes: stack.enter_context(started(nodes, min(most, HELD_EACH * nodes))) for nodes in sizes
        }
        gc.freeze()  # or a small service would pay for the large ones beside it
        stack.callback(gc.unfreeze)
        for number in range(-WARM_UP, rounds):
            for nodes, (cluster, one) in services.items():
                with make_believe(cluster):
                    name = f"bench{number}"
                    asked = {"name": name, "model": "m", "gpus": 1 + number % 3}
                    placing, result = one.ask("place", asked)
                    releasing, count = one.ask("release", name)
                assert (len(result.assignments), count) == (1, 1)
                if number >= 0:
                    found[nodes][0].append(placing)
                    found[nodes][1].append(releasing)
    return found


def milliseconds(seconds: Sequence[float]) -> tuple[float, float]:
    """The median, and the mean."""
    return statistics.median(seconds) * 1e3, statistics.fmean(seconds) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000, 5000])
    parser.add_argument("--most", type=int, default=5000, help="most replicas, and deployments of a restart")
    parser.add_argument("--pending", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    print(f"python -m benchmarks.scale   {os.cpu_count()} cores, Python {platform.python_version()}")
    print("CPU time of the service alone, median (mean)\n")
    print(f"{'8-GPU nodes':>12}{'replicas':>10}{'place':>22}{'growth':>9}{'release':>22}{'growth':>9}")
    found = placing(options.nodes, options.most, options.rounds)
    first = [milliseconds(seconds)[0] for seconds in found[options.nodes[0]]]
    for nodes, times in found.items():
        line = f"{nodes:>12}{min(options.most, HELD_EACH * nodes):>10}"
        for seconds, base in zip(times, first, strict=True):
            median, mean = milliseconds(seconds)
            line += f"{median:>10.2f} ({mean:.2f}) ms".rjust(22) + f"{median / base:>8.1f}x"
        print(line, flush=True)

    nodes = max((one for one in options.nodes if one <= 1000), default=options.nodes[0])
    deployments = min(options.most, HELD_EACH * nodes)
    print()
    with started(nodes, deployments) as (_, one):
        restart = one.start_seconds
        statuses = [one.ask("status") for _ in range(5)]
        _, report = statuses[0]
        assert len(report["nodes"]) == nodes and len(report["deployments"]) == deployments
        median, mean = milliseconds([took for took, _ in statuses])
        one.look()
        idle = statistics.median(one.look_again() for _ in range(options.rounds))
    print(f"status, {nodes} nodes, {deployments} replicas: {median:.0f} ({mean:.0f}) ms")
    print(f"idle, {nodes} nodes, {deployments} deployments: {100 * idle:.2f} % of a core, a look each second")
    print(f"restart, {nodes} nodes, {deployments} deployments: {restart:.2f} s")
    with started(nodes, deployments, options.pending) as (_, one):
        first_look, again, idle = one.look(), one.look(), one.look_again()
    print(
        f"a look at {options.pending} deployments that find no room: {again:.2f} s; "
        f"the first one after a restart: {first_look:.2f} s; while nothing changes: {1e3 * idle:.1f} ms"
    )


if __name__ == "__main__":
    main()
