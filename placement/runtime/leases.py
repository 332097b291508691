"""Placements whose groups their caller creates itself, so that Ray ends them with it: one protocol, step by step.

The service plans, and prepares the GPUs on their nodes; the caller creates the group that gets exactly these; the
nodes' actors confirm it. This module connects the thread that reserves with the calls of the caller.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from placement.errors import LeaseExpired
from placement.runtime import groups
from placement.runtime.results import PlacementResult
from placement.wire.layout import BundleLayout

LEND_SECONDS = 1.5
"""How long GPUs stay prepared for a caller's group."""
KEPT_SECONDS = 10.0
"""How long the outcome of a lease is kept whose caller was too late."""


@dataclass(frozen=True)
class Loan:
    """GPUs that are prepared for a moment, for a group that the caller must create at once.

    Attributes:
        id: to be passed to ``confirm``.
        deployment: its name.
        group_name: the name that the group must have.
        bundles: the resources of each bundle.
        nodes: the id of each bundle's node; empty for a bundle that Ray places by ``strategy`` and ``labels``.
        strategy: how bundles are spread.
        labels: label -> condition, for each bundle.
        lifetime: ``None``, so that the group ends with who creates it, or ``detached``.
    """

    id: str
    deployment: str
    group_name: str
    bundles: list[dict[str, float]]
    nodes: list[str]
    strategy: str = "PACK"
    labels: tuple[Mapping[str, str], ...] = ()
    lifetime: str | None = None


class Lending:
    """One lease that is under way.

    Args:
        deployment: its name.
        layout: how its groups are laid out, if the caller decides that.

    Attributes:
        id: the id of all its loans.
    """

    def __init__(self, deployment: str, layout: BundleLayout | None = None) -> None:
        self.id = secrets.token_hex(8)
        self._deployment, self._layout = deployment, layout
        self._lock = threading.Lock()
        self._next: Future[Loan] = Future()
        self._answer: Future[str] | None = None
        self._is_over = False
        self._outcome: Future[PlacementResult] | None = None

    def create(
        self,
        name: str,
        bundles: list[dict[str, float]],
        nodes: list[str],
        domain: Mapping[str, str] | None = None,
    ) -> Any | None:
        """Has the caller create a group; ``None`` if he does not. In the thread that reserves."""
        answer: Future[str] = Future()
        with self._lock:
            if self._is_over:
                return None
            self._answer = answer
            offered, self._next = self._next, Future()
        loan = Loan(self.id, self._deployment, name, bundles, nodes)
        if self._layout is not None and not all(nodes):
            labels = tuple({**labels, **(domain or {})} for labels in self._layout.labels)
            loan = replace(loan, strategy=str(self._layout.strategy), labels=labels)
        offered.set_result(loan)
        try:
            group_id = answer.result(timeout=LEND_SECONDS)
        except TimeoutError:
            with self._lock:
                if not answer.done():
                    # Unless it came at the last moment: the GPUs stay prepared for a little longer.
                    self._is_over = True  # a caller that was too late once counts as gone
                    answer.set_result("")
            group_id = answer.result()
        return groups.group_from_hex(group_id) if group_id else None

    @property
    def is_over(self) -> bool:
        """Whether its caller has gone, or has given it up."""
        return self._is_over

    def end(self) -> None:
        """Records that nobody waits for it any more."""
        with self._lock:
            self._is_over = True
            if self._answer is not None and not self._answer.done():
                self._answer.set_result("")

    def begin(self, outcome: Future[PlacementResult]) -> None:
        """Sets the future of its outcome."""
        self._outcome = outcome

    async def step(self, group_id: str | None = None) -> Loan | PlacementResult:
        """The next loan, or the outcome.

        Args:
            group_id: the group that the caller has created, hex; empty if it has not.
        """
        assert self._outcome is not None
        with self._lock:
            following = self._next
            if group_id is not None and self._answer is not None and not self._answer.done():
                self._answer.set_result(group_id)
        loan, outcome = asyncio.wrap_future(following), asyncio.wrap_future(self._outcome)
        outcome.add_done_callback(_is_known)
        either: set[asyncio.Future[Any]] = {loan, outcome}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if loan.done() and not outcome.done():
            return loan.result()
        return await outcome


class Loans:
    """The leases that are under way. For one event loop."""

    def __init__(self) -> None:
        self._lendings: dict[str, Lending] = {}

    def __len__(self) -> int:
        return len(self._lendings)

    async def begin(
        self, lending: Lending, place: Coroutine[Any, Any, PlacementResult]
    ) -> Loan | PlacementResult:
        """Begins a lease, which ``place`` carries out; returns the first loan, or the result."""
        outcome: Future[PlacementResult] = Future()
        task = asyncio.ensure_future(place)
        task.add_done_callback(lambda done: self._lent(lending, done, outcome))
        lending.begin(outcome)
        self._lendings[lending.id] = lending
        try:
            return await self._next(lending)
        except asyncio.CancelledError:
            task.cancel()
            raise

    def _lent(
        self, lending: Lending, done: asyncio.Future[PlacementResult], outcome: Future[PlacementResult]
    ) -> None:
        """Ends it; its outcome can still be asked for during a short time."""
        _hand_on(done, outcome)
        asyncio.get_running_loop().call_later(KEPT_SECONDS, self._lendings.pop, lending.id, None)

    async def confirm(self, loan_id: str, group_id: str) -> Loan | PlacementResult:
        """The next loan, or the result, once the group of a loan is made; empty if it was not.

        Raises:
            LeaseExpired: it is too late.
        """
        lending = self._lendings.get(loan_id)
        if lending is None:
            raise LeaseExpired("?", "nothing is lent under that id; the service may have restarted")
        return await self._next(lending, group_id)

    def cancel(self, loan_id: str) -> None:
        """The caller gives it up. Harmless if it is over already."""
        lending = self._lendings.pop(loan_id, None)
        if lending is not None:
            lending.end()

    async def _next(self, lending: Lending, group_id: str | None = None) -> Loan | PlacementResult:
        try:
            return await lending.step(group_id)
        except BaseException:
            lending.end()
            raise


def _hand_on(done: asyncio.Future[PlacementResult], outcome: Future[PlacementResult]) -> None:
    if done.cancelled():
        outcome.set_exception(LeaseExpired("?", "it was interrupted"))
    elif error := done.exception():
        outcome.set_exception(error)
    else:
        outcome.set_result(done.result())


def _is_known(outcome: asyncio.Future[PlacementResult]) -> None:
    """Keeps asyncio from warning about an error that the next step will raise."""
    if not outcome.cancelled():
        outcome.exception()
