"""Queries, which change nothing: plans, snapshots, status, and what is known of a deployment."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from operator import itemgetter
from typing import Any

from placement.core.simulation import fragmentation
from placement.core.snapshot import Snapshot
from placement.errors import UnknownDeployment, UnknownNode
from placement.runtime import groups, metrics
from placement.runtime.deployment_state import DeploymentState
from placement.runtime.discovery import NodeInfo
from placement.runtime.feed import Event, Feed, event_of
from placement.runtime.fleet import Fleet
from placement.runtime.history import History
from placement.runtime.membership import meant_by, names_of, with_members
from placement.runtime.observed import ObservedCluster
from placement.runtime.owners import belongs_to_another
from placement.runtime.queue import WaitingQueue
from placement.runtime.state import ServiceState
from placement.runtime.status import Observed, cluster_status
from placement.runtime.topology_report import measured_report, topology_report
from placement.wire.cluster import ClusterFile
from placement.wire.deployment import Deployment
from placement.wire.dry_run import explain_deployments, plan_in_order
from placement.wire.held import HeldDeployment
from placement.wire.plans import ExplainedPlan, PlacementPlan
from placement.wire.requests import mix_of, request_unchecked

STATUS_SECONDS = 5.0
"""How long ``status`` waits for nodes that have not reported their GPUs yet."""


class Queries:
    """Answers queries. Thread-safe.

    Args:
        state: all deployments.
        cluster: the nodes as they were last seen.
        fleet: the nodes' actors.
        feed: the events.
        queue: what waits for room.
        near: labels of which nodes near each other share the values, widest first.
        history: what happened before.
    """

    def __init__(
        self,
        state: ServiceState,
        cluster: ObservedCluster,
        fleet: Fleet,
        feed: Feed,
        queue: WaitingQueue,
        near: Sequence[str],
        history: History,
    ) -> None:
        self._history = history
        self._state, self._cluster, self._fleet = state, cluster, fleet
        self._feed, self._queue, self._near = feed, queue, near

    def plan_in_order(self, wanted: Sequence[Deployment], atomic: bool) -> list[tuple[int, PlacementPlan]]:
        """What applying these would do, in the order in which to apply them; each with its position."""
        return self._cluster.patiently(
            lambda nodes, lag_seconds, fresh: plan_in_order(*self._look(wanted), wanted, atomic=atomic)
        )

    def plan_all(self, wanted: Sequence[Deployment], atomic: bool = False) -> list[PlacementPlan]:
        """What applying these would do; see the service."""
        for one in wanted:
            known = self._state.get(one.name)
            if known is not None and known.is_lease and not known.releasing:
                raise belongs_to_another(known, None)
        return [plan for _, plan in sorted(self.plan_in_order(wanted, atomic), key=itemgetter(0))]

    def explain_all(self, wanted: Sequence[Deployment]) -> list[ExplainedPlan]:
        """The same, with which nodes were excluded and why."""
        return explain_deployments(*self._look(wanted), wanted)

    def _look(self, wanted: Iterable[Deployment]) -> tuple[Snapshot, dict[str, HeldDeployment]]:
        return self._cluster.look(request_unchecked(one, (), {}) for one in wanted)

    def snapshot(self) -> ClusterFile:
        """The cluster as the planner sees it now."""
        snapshot, held = self._cluster.look()
        return ClusterFile.of(snapshot, held.values())

    def status(
        self, node: str | None = None, deployment: str | None = None, state: str | None = None
    ) -> dict[str, Any]:
        """The status of the cluster; see the service."""
        nodes = self._cluster.nodes()
        self._fleet.inventory.refresh(nodes, patience_seconds=STATUS_SECONDS)
        return cluster_status(self._observed(nodes), node, deployment, state)

    def readings(self) -> dict[metrics.Series, float]:
        """The gauges of :mod:`placement.runtime.metrics` now. It asks no node, and starts no node actor."""
        nodes, now = self._cluster.nodes(), time.time()
        seen = self._observed(nodes)
        self._cluster.read()
        with self._state.lock:
            snapshot = self._cluster.snapshot(nodes)
        declared, queue = self._state.all(), set(seen.queue)
        mix = mix_of(snapshot, [one.deployment for one in declared])
        waiting = {
            "deployment": [one.waiting_since or now for one in declared if one.name in queue],
            "call": [ticket.since for ticket in self._queue.tickets.all()],
        }
        topologies = {info.id: self._fleet.inventory.hardware(info).topology for info in nodes}
        fragmented = fragmentation(snapshot.changed((), mix))[1]
        return metrics.readings(cluster_status(seen), topologies, waiting, fragmented, now)

    def _observed(self, nodes: list[NodeInfo]) -> Observed:
        available = groups.available_resources()
        for node_id in self._fleet.lagging():
            available.pop(node_id, None)
        deployments = self._state.deployments.copy()
        return Observed(
            nodes,
            deployments,
            self._fleet.inventory.hardware,
            self._fleet.inventory.facts,
            self._fleet.foreign,
            available,
            self._state.unreadable.copy(),
            self._cluster.draining,
            self._cluster.dead(),
            [name for name in self._state.queue() if name in deployments and not deployments[name].releasing],
            self._queue.demand.report(),
            near=self._near,
        )

    def topology(self, node: str | None) -> list[dict[str, Any]]:
        """The facts of each node's GPUs, read now; see the service."""
        nodes = [info for info in self._cluster.nodes() if info.gpu_count]
        if node is not None:
            chosen = [info for info in nodes if info.named(node)]
            if not chosen:
                raise UnknownNode("--node", node, tuple(info.name for info in nodes))
            nodes = chosen
        inventory = self._fleet.inventory
        inventory.refresh(nodes, again=True)
        found = []
        for info in nodes:
            hardware = inventory.hardware(info)
            own = inventory.measurements.of(info.name, hardware)
            measured = measured_report(hardware.topology, own)
            found.append(topology_report(info, inventory.facts.get(info.id), measured))
        return found

    def get(self, name: str) -> DeploymentState:
        """What is known of a deployment.

        Raises:
            UnknownDeployment: it does not exist.
        """
        known = self._state.get(name)
        if known is None:
            raise UnknownDeployment(name, self._state.names())
        return known

    def describe(self, name: str) -> dict[str, Any]:
        """A deployment's declaration, and its replicas; see the service."""
        one = self.get(name)
        return {
            "deployment": one.deployment.model_dump(mode="json", exclude_none=True, exclude_defaults=True),
            "result": one.result().to_dict(),
            "generation": one.generation,
            "outdated": one.outdated,
            "given_up": one.given_up,
            "state": "releasing" if one.releasing else "pending" if one.unfinished() else "placed",
            "age_seconds": max(0.0, time.time() - one.declared_at),
            "owner": None if one.owner is None else dict(one.owner),
            "expires_at": one.expires_at,
        }

    def members(self, name: str) -> list[str]:
        """The deployments that a name means; see the service."""
        return meant_by(name, self._state.deployments)

    def events(self, name: str | None, since: int) -> list[Event]:
        """What happened to a deployment, to the members of a group, or to all; see the service."""
        if name is None:
            return self._feed.since(since)
        names = self.with_members([name])
        if not any(self._feed.known(each) or self._state.get(each) for each in names):
            raise UnknownDeployment(name, names_of(self._state.deployments))
        return self._feed.since(since, names)

    def with_members(self, names: Iterable[str]) -> list[str]:
        """Deployments, known or not, with its members in place of each group, also of one that is gone."""
        return with_members(names, self._state.deployments, self._state.groups)

    def kept_events(self, since: int, names: Collection[str] | None) -> list[Event]:
        """The same from the history, the first of them; a ``gap`` before them if some are not kept any more."""
        while True:
            page = self._history.read(since, None if names is None else {*names, ""})
            found = [event_of(one) for one in page.entries if one["kind"] in ("event", "gap")]
            if found or not page.more:
                return found
            since = page.last
