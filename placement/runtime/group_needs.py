"""What waiting groups ask of the autoscaler: nodes for all that they lack, or none."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from placement.core.request import Lack
from placement.runtime.asking import Asked, State
from placement.runtime.backoff import Backoff
from placement.runtime.demand import Demand
from placement.runtime.needs import Need, needs_of_group
from placement.wire.groups import Group

UNUSED_SECONDS = 60.0, 3600.0
"""The first and the longest wait before nodes are asked for again that have come for a part of a group, and left
unused while another part still waited for its own."""


class GroupNeeds:
    """The needs of groups. Only :meth:`of` may be called by any thread.

    All of a group is placed, or nothing: nodes that come for a part of it are idle, and leave, as long as another part
    has none.

    Args:
        demand: asks Ray's autoscaler for nodes.
    """

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self._came: dict[str, set[str]] = {}
        self._unused = Backoff(*UNUSED_SECONDS)

    def of(self, several: Sequence[Lack]) -> dict[str, Need | str]:
        """The needs of a group that lacks this; or, for each, why no node is asked for now."""
        needs = needs_of_group(several)
        waits = self._unused.get(several[0].group) if several else None
        if waits is not None and time.monotonic() < waits[1]:
            return dict.fromkeys(needs, "nodes that came for a part of its group left before the others came")
        hindered = {
            key: asked.reason
            for key, need in needs.items()
            if (asked := self._demand.outlook(need)).state is not State.ASKED
        }
        why = next(iter(hindered.values()), "")
        return {key: needs[key] for key in hindered} | {
            key: why or need for key, need in needs.items() if key not in hindered
        }

    def seen(self, group: Group, needs: Collection[str], told: Mapping[str, Asked]) -> None:
        """Notes what a group lacks now.

        Args:
            group: it waits.
            needs: the keys of its needs.
            told: the state of what was asked for until now.
        """
        came = self._came.setdefault(group.name, set())
        if not came.isdisjoint(needs):
            self._unused.fail(group.name)
            came.difference_update(needs)
        for key, asked in told.items():
            if asked.nodes and key not in needs and key.rsplit(":", 2)[0] in group.members:
                came.add(key)

    def keep(self, groups: Collection[str]) -> None:
        """Forgets all groups but these, since they wait no more."""
        for group in self._came.keys() - groups:
            del self._came[group]
            self._unused.pop(group, None)
