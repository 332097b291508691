"""The service's own clock: one cheap look at the nodes each second, and whatever that calls for."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from placement.runtime.discovery import draining_nodes, live_node_ids

if TYPE_CHECKING:
    from placement.runtime.service import DeploymentPlacementActor

POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0
"""How often what is pending is tried while nothing that we know of has changed: others free GPUs, too."""

logger = logging.getLogger(__name__)


class Keeper:
    """Notices nodes that came, went or drain; has what they held placed anew, and what is pending tried again."""

    def __init__(self, service: DeploymentPlacementActor) -> None:
        self._service = service
        self._seen: frozenset[str] = frozenset()
        self._tried_at = float("-inf")
        self._tried_with: object = None

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
        for name in service.stranded(alive):
            service.mend(name)
        if service.fleet.in_doubt():
            service.sweep()
        waiting = service.waiting()
        now = alive, service.draining, service.fleet.changed_at
        if waiting and (now != self._tried_with or time.monotonic() - self._tried_at > RETRY_SECONDS):
            for name in waiting:
                service.mend(name)
            self._tried_with = alive, service.draining, service.fleet.changed_at
            self._tried_at = time.monotonic()
        service.rest()
