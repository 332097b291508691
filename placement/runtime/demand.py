"""Asks Ray's autoscaler for nodes: one pending placement group for each waiting set.

The groups belong to this process and end with it. What is asked, and for how long, is decided in
:mod:`placement.runtime.asking`; :mod:`placement.runtime.autoscaler` describes how the autoscaler reacts.
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
"""The wait after a failed call to Ray."""

WITHDRAW_SECONDS = 3.0
"""The longest wait until everything is withdrawn."""


class Demand:
    """Keeps the autoscaler informed of what waits. Thread-safe; only :meth:`withdraw` waits for Ray.

    A thread of its own calls Ray. It sleeps while nothing is wanted.

    Args:
        prefix: begins the name of every group, and of no others.
        max_open: the most groups at a time; the oldest needs come first.
        cluster: Ray, or a test's replacement.
        on_change: called in that thread whenever the result of :meth:`poll` changes; must not block.

    Attributes:
        version: grows whenever the result of :meth:`poll` changes.
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
        """Sets all that waits; asks for anything else are withdrawn.

        Args:
            needs: key (``deployment:replica:set``) -> need, oldest first; or why no node is asked for.
            known_nodes: ids of the nodes whose GPUs are known: groups take nothing on them, and what a new node holds
                is given back once the node is among them.
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
        """The state of each need, at most a second old unless Ray hangs."""
        told, wanted = self._asks.told, self._wanted
        return {key: told.get(key) or self.outlook(need) for key, need in wanted.items()}

    def listen(self) -> None:
        """Makes it read the autoscaler's report although nothing is wanted yet, for :meth:`outlook`."""
        with self._changed:
            self._start()

    def outlook(self, need: Need | str) -> Asked:
        """What would happen to a need if it were asked for, as far as known; or why no node would be asked for."""
        return self._asks.outlook(need)

    def withdraw(self) -> None:
        """Withdraws everything, and waits until that is done, or for 3 s."""
        self.want({}, ())
        with self._changed:
            self._changed.wait_for(lambda: self._asks.empty and not self._new, WITHDRAW_SECONDS)

    def report(self) -> list[dict[str, Any]]:
        """The state of each need, JSON-ready, oldest first."""
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
        with contextlib.suppress(Exception):  # the report is read again once something is wanted
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
                logger.warning("the autoscaler could not be asked for nodes: %s", error)
                pause = RETRY_SECONDS
            with self._changed:
                self._changed.notify_all()
                if not self._new:
                    self._changed.wait(pause)
