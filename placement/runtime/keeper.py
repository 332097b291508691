"""The service's own clock: one cheap look at the nodes each second, and whatever that calls for."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from placement.runtime.discovery import draining_nodes, live_node_ids

if TYPE_CHECKING:
    from placement.runtime.service import DeploymentPlacementActor

POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0
"""How often what is pending is tried while nothing that we know of has changed: others free GPUs, too."""

MENDERS = 8
"""How many deployments are placed anew at a time after a node's death, where node actors may have to be started."""

logger = logging.getLogger(__name__)


class Keeper:
    """Notices nodes that came, went or drain; has what they held placed anew, and what is pending tried again.

    Args:
        service: what it looks after.
        menders: where this goes on, so that no look waits for it.
    """

    def __init__(self, service: DeploymentPlacementActor, menders: Executor | None = None) -> None:
        self._service = service
        self._menders = menders or ThreadPoolExecutor(MENDERS + 1, "mender")
        self._mending: dict[str, Future[None]] = {}
        self._trying: Future[None] | None = None
        self._tried_at = float("-inf")
        self._tried_with: object = None
        self._alive: frozenset[str] = frozenset()

    def start(self) -> None:
        """Begins, in a thread of its own. Which nodes drain is known from here on."""
        self._service.draining = draining_nodes()
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
        if alive != self._alive:
            service.fleet.forget_all_but(alive)
            self._alive = alive
        self._mending = {name: mending for name, mending in self._mending.items() if not mending.done()}
        for name in service.stranded(alive):
            if name not in self._mending:
                self._mending[name] = self._menders.submit(self._mend, name)
        if self._trying is None or self._trying.done():
            now = alive, service.draining, service.fleet.changed_at
            if now != self._tried_with or time.monotonic() - self._tried_at > RETRY_SECONDS:
                self._trying = self._menders.submit(self._try_again, alive)
        service.write_again()
        if service.fleet.agents.in_doubt():
            service.sweep()
        else:
            service.sweep_again()
        service.rest()

    def _try_again(self, alive: frozenset[str]) -> None:
        """Tries what is pending, one after the other."""
        service = self._service
        for name in service.waiting():
            self._mend(name)
        self._tried_with = alive, service.draining, service.fleet.changed_at
        self._tried_at = time.monotonic()

    def _mend(self, name: str) -> None:
        try:
            self._service.mend(name)
        except Exception:
            logger.exception("%r could not be mended; trying again", name)
