"""The controller's clock: one cheap look at the nodes each second, and the work that follows from it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING

from placement.runtime import metrics
from placement.runtime.discovery import draining_nodes, live_node_ids
from placement.runtime.owners import has_ended

if TYPE_CHECKING:
    from placement.runtime.controller import Controller

POLL_SECONDS = 1.0
GLANCE_SECONDS = 0.1
"""How often, between two looks, it checks whether the queue has changed, or a node has joined for it."""
RETRY_SECONDS = 5.0
"""How often pending replicas are tried while nothing known has changed: other users free GPUs, too."""

RECONCILERS = 8
"""How many deployments are placed again at a time after a node's death, as node actors may have to start."""

ATTEMPTS = 32
"""How many waiting entries are tried at a time."""

ATTEMPT_SECONDS = 1.0
"""How long one attempt is waited for before the next starts: its node may hang. It claims its room within this time."""

logger = logging.getLogger(__name__)


class Clock:
    """Notices nodes that join, leave or drain; places lost replicas again, and tries waiting ones again.

    Args:
        controller: does that work.
        reconcilers: runs the work, so that no look waits for it; threads by default.
    """

    def __init__(self, controller: Controller, reconcilers: Executor | None = None) -> None:
        self._controller = controller
        self._reconcilers = reconcilers or ThreadPoolExecutor(RECONCILERS + 1, "reconciler")
        self._triers = reconcilers or ThreadPoolExecutor(ATTEMPTS, "waiting")
        self._reconciling: dict[str, Future[None]] = {}
        self._attempts: dict[str, Future[None]] = {}
        self._trying: Future[None] | None = None
        self._tried_at = float("-inf")
        self._tried_for = 0.0
        self._tried_with: object = None
        self._tried_on: object = None
        self._alive: frozenset[str] = frozenset()

    def start(self) -> None:
        """Begins, in a thread of its own; others report metrics, and write the history.

        Which nodes drain is known from here on.
        """
        self._controller.cluster.draining = draining_nodes()
        self._controller.queue.demand.listen()
        threading.Thread(target=self._run, name="clock", daemon=True).start()
        metrics.start(self._controller.queries.readings)
        self._controller.history.start()

    def _run(self) -> None:
        looked_at = time.monotonic()
        while True:
            time.sleep(GLANCE_SECONDS)
            try:
                if time.monotonic() - looked_at < POLL_SECONDS:
                    self.glance()
                    continue
                looked_at = time.monotonic()
                self.look()
            except Exception:
                logger.exception("the look at the nodes failed; trying again")

    def look(self) -> None:
        """One look."""
        controller = self._controller
        alive = live_node_ids()
        controller.cluster.draining = draining_nodes()
        if alive != self._alive:
            controller.fleet.forget_all_but(alive)
            self._alive = alive
        self._reconciling = {name: one for name, one in self._reconciling.items() if not one.done()}
        controller.lifetimes.end_what_is_over(has_ended, time.time(), self._begin)
        for name in controller.stranded(alive):
            self._begin(name, partial(controller.reconcile, name))
        if self._trying is None or self._trying.done():
            now = alive, controller.cluster.draining, controller.queue.depends_on()
            if now != self._tried_with or time.monotonic() - self._tried_at > RETRY_SECONDS:
                self._try_again(now)
        controller.queue.ask_for_nodes()
        controller.write_again()
        if controller.fleet.agents.orphans_suspected():
            controller.sweeper.sweep()
        else:
            controller.sweeper.sweep_again()
        controller.stop_idle_agents()

    def glance(self) -> None:
        """Tries waiting entries at once if a look each second would be late: a node has joined for them.

        It takes at most a fifth of the time.
        """
        queue = self._controller.queue
        queue.ask_for_nodes()
        if self._trying is not None and not self._trying.done():
            return
        if queue.news() != self._tried_on and time.monotonic() - self._tried_at > 4 * self._tried_for:
            self._try_again(self._tried_with)

    def _try_again(self, with_: object) -> None:
        """Starts to try what waits."""
        self._tried_with, self._tried_on = with_, self._controller.queue.news()
        self._trying = self._reconcilers.submit(self._try_all)

    def _try_all(self) -> None:
        """Tries what waits, one after the other."""
        began = time.monotonic()
        try:
            self._controller.queue.try_all(self._reconcile, self._attempt)
        except Exception:
            logger.exception("the queue could not be tried; trying again")
        self._tried_at = time.monotonic()
        self._tried_for = self._tried_at - began

    def _begin(self, name: str, do: Callable[[], None]) -> None:
        """Starts some work on a deployment, unless work on it is under way already."""
        if name not in self._reconciling:
            self._reconciling[name] = self._reconcilers.submit(self._do, name, do)

    def _attempt(self, name: str, do: Callable[[], None]) -> None:
        """Tries one waiting entry, unless it is being tried already; the next one does not wait for it long."""
        self._attempts = {other: one for other, one in self._attempts.items() if not one.done()}
        if name not in self._attempts:
            self._attempts[name] = self._triers.submit(do)
            wait([self._attempts[name]], ATTEMPT_SECONDS)

    def _reconcile(self, name: str) -> None:
        self._do(name, partial(self._controller.reconcile, name))

    def _do(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception:
            logger.exception("%r could not be reconciled; trying again", name)
