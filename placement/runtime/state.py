"""All deployments: the service's only memory, indexed by node.

Each deployment has one :class:`~placement.runtime.deployment_state.DeploymentState`, which is read without a
lock. Claims, changes, and the index by node are guarded by :attr:`ServiceState.lock`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from placement.core.replicas import PlannedReplica
from placement.runtime import ledger
from placement.runtime.claims import Claim, Tally
from placement.runtime.deployment_state import DeploymentState, held_replica, holding_of
from placement.runtime.orders import Holding
from placement.runtime.results import NodeAssignment
from placement.wire.deployment import Deployment
from placement.wire.held import HeldDeployment

KEPT_GROUPS = 2000
"""Of how many groups the members are known, those included that are gone."""


class ServiceState:
    """All deployments, open claims, and what each node holds.

    Args:
        changed: called under the lock with the nodes on which something was taken, given back or claimed.

    Attributes:
        lock: guards claims, changes and planning, so that two plans never use the same room.
        deployments: name -> state; read it without the lock, change it by :meth:`put`.
        unreadable: name -> record of the ledger that this version cannot read.
        queue_version: grows with each change of a waiting deployment.
        groups: name -> members of the groups that were declared last, also of those that are gone.
    """

    def __init__(self, changed: Callable[[Iterable[str]], None] = lambda nodes: None) -> None:
        self.lock = threading.RLock()
        self.deployments: dict[str, DeploymentState] = {}
        self.unreadable: dict[str, ledger.Record] = {}
        self.claims: list[Claim] = []
        self._changed = changed
        self._by_node: dict[str, dict[tuple[str, int], list[NodeAssignment]]] = {}
        self._claims_on: dict[str, list[tuple[Claim, PlannedReplica]]] = {}
        self._keeping_apart: dict[str, list[Deployment]] = {}
        self._queue: set[str] = set()
        self.queue_version = 0
        self.groups: dict[str, list[str]] = {}
        self._temporary: set[str] = set()

    def put(self, state: DeploymentState) -> None:
        """Replaces the state of a deployment."""
        with self.lock:
            self._unindex(state.name)
            self.deployments[state.name] = state
            if (group := state.deployment.group) is not None:
                self.groups.pop(group.name, None)
                self.groups[group.name] = sorted(group.members)
                if len(self.groups) > KEPT_GROUPS:
                    del self.groups[next(iter(self.groups))]
            # A replica to be replaced counts with its own declaration until then.
            declared = (state.deployment, *state.earlier.values())
            if apart := [one for one in declared if one.constraints and one.constraints.apart_from]:
                self._keeping_apart[state.name] = apart
            if state.releasing or (state.unfinished() and not state.given_up and not state.is_lease):
                self._queue.add(state.name)
                self.queue_version += 1
            if state.ends_by_itself:
                self._temporary.add(state.name)
            for index, one in state.replicas.items():
                for part in one.parts:
                    on_node = self._by_node.setdefault(part.node, {})
                    on_node.setdefault((state.name, index), []).append(part)
            self._changed({part.node for part in state.assignments()})

    def drop(self, name: str) -> None:
        """Forgets a deployment."""
        with self.lock:
            self._unindex(name)
            self.deployments.pop(name, None)

    def _unindex(self, name: str) -> None:
        self._keeping_apart.pop(name, None)
        if name in self._queue:
            self._queue.discard(name)
            self.queue_version += 1
        self._temporary.discard(name)
        known = self.deployments.get(name)
        if known is None:
            return
        for index, one in known.replicas.items():
            for part in one.parts:
                on_node = self._by_node[part.node]
                on_node.pop((name, index), None)
                if not on_node:
                    del self._by_node[part.node]
        self._changed({part.node for part in known.assignments()})

    def claim(self, claim: Claim) -> Claim:
        """Opens a claim."""
        with self.lock:
            self.claims.append(claim)
            for replica in claim.replicas:
                self._claims_on.setdefault(replica.node_id, []).append((claim, replica))
            self._changed({replica.node_id for replica in claim.replicas})
        return claim

    def close(self, claims: Iterable[Claim]) -> None:
        """Closes claims: their replicas are in a state now, or were given back."""
        with self.lock:
            for claim in claims:
                self.claims.remove(claim)
                for node in {replica.node_id for replica in claim.replicas}:
                    left = [one for one in self._claims_on[node] if one[0] is not claim]
                    if left:
                        self._claims_on[node] = left
                    else:
                        del self._claims_on[node]
                self._changed({replica.node_id for replica in claim.replicas})

    def get(self, name: str) -> DeploymentState | None:
        """The state of a deployment."""
        return self.deployments.get(name)

    def names(self) -> tuple[str, ...]:
        """The names of all deployments, in order."""
        return tuple(sorted(self.deployments.copy()))

    def all(self) -> list[DeploymentState]:
        """All deployments, by name."""
        return [one for _, one in sorted(self.deployments.copy().items())]

    def assignments(self) -> Iterator[tuple[DeploymentState, NodeAssignment]]:
        """All replicas that hold something."""
        for one in self.all():
            for assignment in one.assignments():
                yield one, assignment

    def holdings(self, node_id: str) -> dict[str, Holding]:
        """Order name -> what is held on a node."""
        found = {}
        with self.lock:
            for (name, index), parts in self._by_node.get(node_id, {}).items():
                order = self.deployments[name].replicas[index].order
                for part in parts:
                    if part.gpus:
                        found[order] = holding_of(name, part)
        return found

    def holds(self, node_id: str) -> bool:
        """Whether anything is held on a node."""
        return node_id in self._by_node

    def on_node(self, node_id: str) -> list[tuple[str, NodeAssignment]]:
        """What is held on a node, with the deployment that holds it."""
        with self.lock:
            return [
                (name, part) for (name, _), parts in self._by_node.get(node_id, {}).items() for part in parts
            ]

    def nodes(self) -> frozenset[str]:
        """The nodes on which anything is held."""
        return frozenset(self._by_node.copy())

    def queue(self) -> list[str]:
        """Names of deployments that wait for room, or to be released; the longest wait comes first."""
        waiting = [one for name in self._queue.copy() if (one := self.deployments.get(name))]
        return [one.name for one in sorted(waiting, key=lambda one: (one.waiting_since or 0.0, one.name))]

    def temporary(self) -> list[DeploymentState]:
        """Deployments that may end, or be given up, by themselves."""
        return [one for name in sorted(self._temporary.copy()) if (one := self.deployments.get(name))]

    def held(self) -> dict[str, HeldDeployment]:
        """The deployments by name, in the form of plans and snapshots."""
        return {one.name: one.held() for one in self.all()}

    def keeping_apart(self, name: str) -> list[Deployment]:
        """The declarations, including new ones, that ask to be apart from a deployment."""
        with self.lock:
            declared = [one for several in self._keeping_apart.values() for one in several]
            declared += [claim.deployment for claim in self.claims]
        return [
            one
            for one in declared
            if one.constraints is not None and name in one.constraints.apart_from and one.name != name
        ]

    def tally(self, node_id: str) -> Tally:
        """What this service holds and claims on a node. Under the lock."""
        tally = Tally()
        for (name, index), parts in self._by_node.get(node_id, {}).items():
            state = self.deployments[name]
            deployment = state.placed_under(state.replicas[index])
            for part in parts:
                tally.gpus.update(part.gpus)
                tally.add(deployment, held_replica(part).planned())
        for claim, replica in self._claims_on.get(node_id, ()):
            tally.claimed_gpus.update(set(replica.gpus) - tally.gpus)
            tally.add(claim.deployment, replica)
        return tally
