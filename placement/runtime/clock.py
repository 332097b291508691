"""The controller's clock: one cheap look at the nodes each second, and whatever that calls for."""

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
"""How often, between two looks, it is seen whether something came or went that waits, or for which it waits."""
RETRY_SECONDS = 5.0
"""How often what is pending is tried while nothing that we know of has changed: others free GPUs, too."""

RECONCILERS = 8
"""How many deployments are placed anew at a time after a node's death, where node actors may have to be started."""

ATTEMPTS = 32
"""How much of what waits is tried at a time."""

ATTEMPT_SECONDS = 1.0
"""How long it is waited for one that is tried before the next is: its node may hang. Room is claimed within that."""

logger = logging.getLogger(__name__)


class Clock:
    """Notices nodes that came, went or drain; has what they held placed anew, and what waits tried again.

    Args:
        controller: what it has do that.
        reconcilers: where this goes on, so that no look waits for it; in threads, if it is left out.
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
        """Has what waits tried again at once where a look each second would be late: a node has come for it.

        No more than a fifth of the time goes into that.
        """
        queue = self._controller.queue
        queue.ask_for_nodes()
        if self._trying is not None and not self._trying.done():
            return
        if queue.news() != self._tried_on and time.monotonic() - self._tried_at > 4 * self._tried_for:
            self._try_again(self._tried_with)

    def _try_again(self, with_: object) -> None:
        """Begins to try what waits."""
        self._tried_with, self._tried_on = with_, self._controller.queue.news()
        self._trying = self._reconcilers.submit(self._try_all)

    def _try_all(self) -> None:
        """Tries what waits, one after the other."""
        began = time.monotonic()
        try:
            self._controller.queue.try_all(self._reconcile, self._attempt)
        except Exception:
            logger.exception("what waits could not be tried; trying again")
        self._tried_at = time.monotonic()
        self._tried_for = self._tried_at - began

    def _begin(self, name: str, do: Callable[[], None]) -> None:
        """Begins to do something to a deployment, unless something is being done already."""
        if name not in self._reconciling:
            self._reconciling[name] = self._reconcilers.submit(self._do, name, do)

    def _attempt(self, name: str, do: Callable[[], None]) -> None:
        """Has one be tried that waits, unless it is being tried already; what comes next does not wait for it long."""
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
            logger.exception("%r could not be brought to what is declared; trying again", name)
