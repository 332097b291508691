"""What waits for nodes, as Ray's autoscaler hears it: one pending placement group for each set that waits.

The groups are of the process in which this runs and end with it. What is asked, and for how long, is decided in
:mod:`placement.runtime.asking`; what the autoscaler makes of it is told in :mod:`placement.runtime.autoscaler`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from placement.runtime.asking import Asked, Asks
from placement.runtime.autoscaler import Cluster, RayCluster
from placement.runtime.needs import Need

logger = logging.getLogger(__name__)

RETRY_SECONDS = 2.0
"""Wait after a call to Ray that failed."""

WITHDRAW_SECONDS = 3.0
"""Longest wait for what is asked to be withdrawn."""


class Demand:
    """Keeps the autoscaler told of what waits. Thread-safe; no call waits for Ray but :meth:`withdraw`.

    A thread of its own calls Ray. It sleeps while nothing is wanted.

    Args:
        prefix: begins the name of every group; nothing else's may begin so.
        max_open: the most groups at a time; what is asked for first waits longest.
        cluster: Ray, unless a test says otherwise.
        on_change: called in that thread whenever :meth:`poll` says something else; must not block.

    Attributes:
        version: grows whenever :meth:`poll` says something else.
    """

    def __init__(
        self,
        prefix: str,
        max_open: int = 32,
        cluster: Cluster | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_change = on_change
        self.version = 0
        self._asks = Asks(prefix, max_open, cluster or RayCluster())
        self._wanted: dict[str, Need | str] = {}
        self._known: frozenset[str] = frozenset()
        self._changed = threading.Condition()
        self._new = False
        self._thread: threading.Thread | None = None

    def want(self, needs: Mapping[str, Need | str], known_nodes: Collection[str]) -> None:
        """Says all that waits; what is not in it is withdrawn.

        Args:
            needs: key (``deployment:replica:set``) -> need, oldest first; or why nothing is asked for it.
            known_nodes: ids of the nodes whose GPUs are known: nothing is taken on them, and what a new one holds is
                given back once it is among them.
        """
        with self._changed:
            # The order counts as well.
            if list(needs.items()) == list(self._wanted.items()) and self._known == frozenset(known_nodes):
                return
            self._wanted, self._known = dict(needs), frozenset(known_nodes)
            self._new = True
            if self._wanted:
                self._start()
            self._changed.notify_all()

    def poll(self) -> Mapping[str, Asked]:
        """What became of each need that is wanted, a second ago at most unless Ray hangs."""
        told, wanted = self._asks.told, self._wanted
        return {key: told.get(key) or self.outlook(need) for key, need in wanted.items()}

    def listen(self) -> None:
        """Has it hear the autoscaler although nothing is wanted yet, so that :meth:`outlook` can tell."""
        with self._changed:
            self._start()

    def outlook(self, need: Need | str) -> Asked:
        """What becomes of a need once it is wanted, as far as is known; of one for which nothing is asked, why."""
        return self._asks.outlook(need)

    def withdraw(self) -> None:
        """Withdraws all of it, and waits until that is done, or for 3 s."""
        self.want({}, ())
        with self._changed:
            self._changed.wait_for(lambda: self._asks.empty and not self._new, WITHDRAW_SECONDS)

    def report(self) -> list[dict[str, Any]]:
        """What became of each need, JSON-ready, oldest first."""
        now, wanted = time.monotonic(), self._wanted
        rows = []
        for key, asked in self.poll().items():
            deployment, replica, part = key.rsplit(":", 2)
            need = wanted.get(key)
            rows.append(
                {
                    "deployment": deployment,
                    "replica": int(replica),
                    "set": int(part),
                    "asked": str(need) if isinstance(need, Need) else None,
                    "state": asked.state.value,
                    "reason": asked.reason,
                    "nodes": list(asked.nodes),
                    "seconds": None if asked.since is None else round(now - asked.since, 1),
                    "again_in_seconds": None
                    if asked.again is None
                    else round(max(0.0, asked.again - now), 1),
                }
            )
        return rows

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="placement-demand", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        """The thread."""
        with contextlib.suppress(Exception):  # it is heard again once something is wanted
            self._asks.listen()
        while True:
            with self._changed:
                wanted, known, self._new = self._wanted, self._known, False
            before = self._asks.told
            try:
                pause = self._asks.step(wanted, known)
                if self._asks.told != before:
                    self.version += 1
                    self._on_change()
            except Exception as error:
                logger.warning("could not tell the autoscaler what waits: %s", error)
                pause = RETRY_SECONDS
            with self._changed:
                self._changed.notify_all()
                if not self._new:
                    self._changed.wait(pause)
