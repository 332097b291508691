"""Removes the service's placement groups that belong to no deployment: interrupted work leaves them behind."""

from __future__ import annotations

from collections.abc import Mapping

from placement.runtime import groups
from placement.runtime.fleet import Fleet
from placement.runtime.observed import ObservedCluster
from placement.runtime.orders import deployment_of, order_of_group
from placement.runtime.state import ServiceState
from placement.runtime.turns import Turns


class Sweeper:
    """Finds and removes such groups.

    Args:
        prefix: begins the name of every group of this service.
        state: what deployments hold.
        cluster: the nodes as they were last seen.
        fleet: the nodes' actors.
        turns: one change of a deployment at a time.
    """

    def __init__(
        self, prefix: str, state: ServiceState, cluster: ObservedCluster, fleet: Fleet, turns: Turns
    ) -> None:
        self._prefix, self._state, self._cluster, self._fleet, self._turns = (
            prefix,
            state,
            cluster,
            fleet,
            turns,
        )
        self._undecided: dict[str, groups.LiveGroup] = {}

    def begin(self, live: Mapping[str, groups.LiveGroup]) -> None:
        """The first sweep, with the groups that were found when the service started."""
        self._undecided = self.remove_unknown(live)

    def sweep(self) -> None:
        """Removes groups with the service's token that belong to no deployment, and finds living node actors."""
        try:
            self._fleet.agents.suspect_orphans(
                self._fleet.agents.rediscover(self._cluster.nodes_lately()), now=False
            )
            self._undecided = self.remove_unknown(self.live())
        except BaseException:
            self._fleet.agents.suspect_orphans()
            raise

    def sweep_again(self) -> None:
        """The same for groups of which it was not yet clear whether they belong to a deployment."""
        if self._undecided:
            self._undecided = self.remove_unknown(self._undecided)

    def live(self) -> dict[str, groups.LiveGroup]:
        """The existing groups of this service."""
        return groups.live_groups(lambda name: name.startswith(self._prefix))

    def remove_unknown(self, live: Mapping[str, groups.LiveGroup]) -> dict[str, groups.LiveGroup]:
        """Removes groups that belong to no deployment; returns those of which that is not yet clear."""
        undecided = {}
        for group_id, group in live.items():
            name = deployment_of(order_of_group(group.name))
            if name in self._state.unreadable or self._knows(name, group_id):
                continue
            with self._turns.sole(name, wait=False) as mine:
                if not mine:  # a reservation is under way, and this may be its group
                    undecided[group_id] = group
                elif not self._knows(name, group_id):
                    self.remove(group_id, group)
                    self._fleet.recorded(name)
        return undecided

    def remove(self, group_id: str, group: groups.LiveGroup) -> None:
        """Removes a group that is in no record."""
        self._fleet.note_removed(order_of_group(group.name), group.nodes)
        groups.remove_group(groups.group_from_hex(group_id))

    def _knows(self, name: str, group_id: str) -> bool:
        known = self._state.get(name)
        return known is not None and any(one.group_id == group_id for one in known.replicas.values())
