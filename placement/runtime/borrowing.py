"""The caller's half of a lease: it creates the placement groups itself, so that Ray ends them with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from ray.util.placement_group import PlacementGroup, get_placement_group

from placement.errors import PlacementError
from placement.runtime import groups
from placement.runtime.connection import in_cluster
from placement.runtime.leases import Loan
from placement.runtime.results import PlacementResult

T = TypeVar("T")

READY_DEADLINE_SECONDS = 0.15
"""How long a group may take to be ready; it takes some milliseconds where the GPUs are as free as they should be."""


class OwnGroups:
    """Placement groups that belong to this process: Ray removes them when it ends.

    Under ``ray://`` they belong to the process in the cluster that stands for it, which ends when it disconnects.
    """

    def warm(self) -> None:
        """Returns once :meth:`create` would be quick: under ``ray://`` a worker process has to start for it."""
        in_cluster(_nothing)

    def create(self, loan: Loan) -> PlacementGroup | None:
        """Creates the group that a loan is for.

        Returns:
            The group, ready; ``None`` if it could not be had, and nothing of it is left.
        """
        return in_cluster(_create, loan)

    def find(self, name: str) -> PlacementGroup | None:
        """A group of this process's namespace that has not been removed, ready or not."""
        try:
            return get_placement_group(name)
        except ValueError:
            return None

    def remove(self, group: PlacementGroup, ready: bool) -> None:
        """See :func:`placement.runtime.groups.remove_group`."""
        groups.remove_group(group, ready)


class Borrower:
    """What one request has been lent so far. None of it stays unless the request succeeds.

    Args:
        groups: makes and removes the groups.
        cancel: tells the service that a loan, by its id, is not used.
        own: what the caller says of the groups himself: fields of :class:`Loan`.
    """

    def __init__(
        self, groups: OwnGroups, cancel: Callable[[str], object], own: Mapping[str, Any] | None = None
    ) -> None:
        self._groups, self._cancel, self._own = groups, cancel, own or {}
        self._loan: Loan | None = None
        self._made: list[PlacementGroup] = []

    def make(self, loan: Loan) -> str:
        """Creates the group that a loan is for.

        Returns:
            The group's id, hex, to confirm the loan with; empty if the group could not be had.
        """
        self._loan = loan
        group = self._groups.create(replace(loan, **self._own))
        if group is None:
            return ""
        self._made.append(group)
        return str(group.id.hex())

    def keep(self, result: PlacementResult) -> PlacementResult:
        """Ends a request that succeeded. Groups that are not in its result, from attempts that failed, are removed."""
        used = {a.placement_group.id for a in result.assignments}
        for group in self._made:
            if group.id not in used:
                with contextlib.suppress(Exception):
                    self._groups.remove(group, True)
        return result

    def give_back(self, error: BaseException) -> None:
        """Ends a request that failed: removes all its groups, and cancels its loan unless the service ended it."""
        for group in self._made:
            with contextlib.suppress(Exception):
                self._groups.remove(group, True)
        if self._loan is None:
            return
        with contextlib.suppress(Exception):  # one that was being made when the request was interrupted
            found = self._groups.find(self._loan.group_name)
            if found is not None and found.id not in {group.id for group in self._made}:
                self._groups.remove(found, False)
        if not isinstance(error, PlacementError):
            with contextlib.suppress(Exception):
                self._cancel(self._loan.id)


def _nothing() -> None:
    pass


def _create(loan: Loan) -> PlacementGroup | None:
    group = groups.create_group(
        loan.group_name, loan.bundles, loan.nodes, loan.lifetime, loan.strategy, loan.labels
    )
    try:
        ready = groups.ready_or_removed(group, min(READY_DEADLINE_SECONDS, loan.seconds))
    except BaseException:  # Ctrl-C
        groups.remove_group(group)
        raise
    return group if ready else None
