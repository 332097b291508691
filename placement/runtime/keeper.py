"""The controller's clock: one cheap look at the nodes each second, and whatever that calls for."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from placement.runtime.discovery import draining_nodes, live_node_ids
from placement.runtime.owners import has_ended

if TYPE_CHECKING:
    from placement.runtime.controller import Controller

POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0
"""How often what is pending is tried while nothing that we know of has changed: others free GPUs, too."""

RECONCILERS = 8
"""How many deployments are placed anew at a time after a node's death, where node actors may have to be started."""

logger = logging.getLogger(__name__)


class Keeper:
    """Notices nodes that came, went or drain; has what they held placed anew, and what waits tried again.

    Args:
        controller: what it has do that.
        reconcilers: where this goes on, so that no look waits for it.
    """

    def __init__(self, controller: Controller, reconcilers: Executor | None = None) -> None:
        self._controller = controller
        self._reconcilers = reconcilers or ThreadPoolExecutor(RECONCILERS + 1, "reconciler")
        self._reconciling: dict[str, Future[None]] = {}
        self._trying: Future[None] | None = None
        self._tried_at = float("-inf")
        self._tried_with: object = None
        self._alive: frozenset[str] = frozenset()

    def start(self) -> None:
        """Begins, in a thread of its own. Which nodes drain is known from here on."""
        self._controller.cluster.draining = draining_nodes()
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
        controller = self._controller
        alive = live_node_ids()
        controller.cluster.draining = draining_nodes()
        if alive != self._alive:
            controller.fleet.forget_all_but(alive)
            self._alive = alive
        self._reconciling = {name: one for name, one in self._reconciling.items() if not one.done()}
        for name in controller.stranded(alive):
            if name not in self._reconciling:
                self._reconciling[name] = self._reconcilers.submit(self._reconcile, name)
        if self._trying is None or self._trying.done():
            now = alive, controller.cluster.draining, controller.queue.depends_on()
            if now != self._tried_with or time.monotonic() - self._tried_at > RETRY_SECONDS:
                self._trying = self._reconcilers.submit(self._try_again, now)
        controller.queue.ask_for_nodes()
        controller.write_again()
        if controller.fleet.agents.in_doubt():
            controller.sweeper.sweep()
        else:
            controller.sweeper.sweep_again()
        controller.end_what_is_over(has_ended, time.time())
        controller.rest()

    def _try_again(self, with_: object) -> None:
        """Tries what waits, one after the other."""
        controller = self._controller
        try:
            controller.queue.try_all(self._reconcile)
        except Exception:
            logger.exception("what waits could not be tried; trying again")
        self._tried_with = with_
        self._tried_at = time.monotonic()

    def _reconcile(self, name: str) -> None:
        try:
            self._controller.reconcile(name)
        except Exception:
            logger.exception("%r could not be brought to what is declared; trying again", name)
