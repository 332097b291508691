"""The service's own clock: one cheap look at the nodes each second, and whatever that calls for."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from placement.runtime.discovery import draining_nodes, live_node_ids

if TYPE_CHECKING:
    from placement.runtime.service import DeploymentPlacementActor

POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0
"""How often what is pending is tried while nothing that we know of has changed: others free GPUs, too."""

MENDERS = 8
"""How many deployments are placed anew at a time after a node's death."""

logger = logging.getLogger(__name__)


class Keeper:
    """Notices nodes that came, went or drain; has what they held placed anew, and what is pending tried again."""

    def __init__(self, service: DeploymentPlacementActor) -> None:
        self._service = service
        self._tried_at = float("-inf")
        self._tried_with: object = None
        self._to_try: list[str] = []

    def start(self) -> None:
        """Begins, in a thread of its own."""
        threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(POLL_SECONDS)
            try:
                self.look()
            except Exception:
                logger.exception("looking after the nodes failed; trying again")

    def look(self) -> None:
        """One look."""
        service = self._service
        alive = live_node_ids()
        service.draining = draining_nodes()
        if stranded := service.stranded(alive):
            # Side by side: where they go, node actors may have to be started first.
            with ThreadPoolExecutor(MENDERS) as menders:
                list(menders.map(service.mend, stranded))
        if service.fleet.in_doubt():
            service.sweep()
        self._try_again(alive)
        service.rest()

    def _try_again(self, alive: frozenset[str]) -> None:
        """Tries what is pending, but never so long that a node's death would be noticed late."""
        service = self._service
        began = time.monotonic()
        if not self._to_try:
            now = alive, service.draining, service.fleet.changed_at
            if now == self._tried_with and began - self._tried_at <= RETRY_SECONDS:
                return
            self._to_try = service.waiting()
        while self._to_try and time.monotonic() - began < POLL_SECONDS:
            service.mend(self._to_try.pop(0))
        self._tried_with = alive, service.draining, service.fleet.changed_at
        self._tried_at = time.monotonic()
