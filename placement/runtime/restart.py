"""Recovery after the service died: the deployments in the ledger, without what is gone by now."""

from __future__ import annotations

import logging
from dataclasses import replace

from placement import __version__
from placement.runtime import groups, ledger, records
from placement.runtime.actions import Actions
from placement.runtime.feed import Feed, event_of
from placement.runtime.fleet import Fleet
from placement.runtime.history import History
from placement.runtime.observed import ObservedCluster
from placement.runtime.releases import Releases
from placement.runtime.state import ServiceState
from placement.runtime.sweeper import Sweeper

logger = logging.getLogger(__name__)


def recall(history: History, feed: Feed) -> None:
    """Has the feed know the last events of before, and the history that the service has started."""
    entries, before = history.recall()
    if entries:
        feed.recall(map(event_of, entries), before)
    text = f"version {__version__}"
    if history.was_cut_off:
        text += "; the service before it died, and its last second may be missing here"
    feed.note("service", "", "started", text)


def restore(
    state: ServiceState,
    cluster: ObservedCluster,
    fleet: Fleet,
    actions: Actions,
    feed: Feed,
    releases: Releases,
    sweeper: Sweeper,
) -> None:
    """Reads the ledger, drops what is gone, finishes interrupted releases, and removes groups that are in no record.

    Args:
        state: all deployments; empty so far.
        cluster: the nodes as they were last seen.
        fleet: the nodes' actors.
        actions: what changes things.
        feed: where events are reported.
        releases: gives back what deployments hold.
        sweeper: removes groups that belong to no deployment.
    """
    for record in ledger.records():
        try:
            if record.content is not None:
                one = records.from_record(record.content)
                if one.name != record.name:
                    raise ValueError(f"it is about {one.name!r}")
                state.put(one)
                continue
        except Exception:
            record = replace(record, content=None, problem="its record is inconsistent")
            logger.exception("the record of %r is inconsistent", record.name)
        logger.error("%r: %s; it is left as it is", record.name, record.problem)
        state.unreadable[record.name] = record
    nodes = cluster.nodes()
    fleet.restore(nodes)
    releases.recall_answers()
    live, alive = sweeper.live(), {info.id for info in nodes}
    ending = {one.deployment.group.name for one in state.all() if one.releasing and one.deployment.group}
    for one in state.all():
        feed.add(one.name, None, "restarted", "the service has restarted")
        group = one.deployment.group
        if one.releasing or (group is not None and group.name in ending):
            releases.resume(one.name)
            continue
        later = one
        for index, replica in one.replicas.items():
            # Under a name that its owner chose.
            theirs = one.is_lease and not groups.is_gone(replica.group_id)
            if replica.group_id not in live and not theirs:
                partly, reason = actions.drop(later, index, alive | replica.nodes)
                later = later.lost(index, partly, reason)
        surplus = [index for index in later.replicas if index >= one.deployment.replicas]
        if surplus:  # an apply was interrupted
            later = actions.release(later, surplus)
        if later is not one:
            actions.note(later)
        if later.is_lease and not later.replicas:
            releases.release(one.name)
    sweeper.begin(live)
