"""The types and the base class of both clients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from ray.actor import ActorHandle

from placement.errors import InvalidDeployment
from placement.runtime import connection
from placement.wire.constraints import PlacementConstraints
from placement.wire.deployment import Deployment

DeploymentLike = Deployment | Mapping[str, Any]
Constraints = PlacementConstraints | Mapping[str, Any] | None

WATCH_SECONDS = 30.0
"""How long one call of ``watch`` waits for something to happen."""
FOLLOW_SECONDS = 0.5
"""How often who follows the history asks for what is new."""
WAIT_SECONDS = 60.0
"""How long one call of ``wait`` waits at most: the service does not notice that its caller has died."""


class Event(TypedDict):
    """An event of a deployment.

    ``number`` grows from event to event, also across restarts of the service; ``at`` is in seconds since 1970, and
    ``time`` the same as a date, in UTC; ``replica`` is ``None`` for the deployment as a whole.
    """

    number: int
    at: float
    time: str
    deployment: str
    replica: int | None
    state: str
    text: str


class Entry(Event):
    """One entry of the history: an event, a decision, or what concerns the service or the history itself.

    ``kind`` is ``event``, ``decision``, ``service`` or ``gap``; of the last two ``deployment`` is empty. Only a
    decision has the ``call``, the ``seconds`` that it took, and the ``code`` of a refusal; it and the service's
    ``stopped`` have the ``caller`` (``user``, ``job``, ``address`` and others, as far as they are known).
    """

    kind: str
    call: NotRequired[str]
    caller: NotRequired[dict[str, str]]
    seconds: NotRequired[float]
    code: NotRequired[str]


class Status(TypedDict):
    """Nodes with their GPUs and the replicas on them, deployments with their replicas, groups with their routes."""

    nodes: list[dict[str, Any]]
    deployments: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    unreadable: list[dict[str, Any]]
    totals: dict[str, int | float]
    demand: list[dict[str, Any]]


class Connected:
    """The base of both clients."""

    def __init__(self, service: ActorHandle | None = None) -> None:
        self._handle = connection.connect() if service is None else service

    @property
    def handle(self) -> ActorHandle:
        """The bare actor handle, for ``client.handle.place.remote(...)``; its answers need ``await`` or ``ray.get``."""
        return self._handle


class Waiting:
    """A time to wait, divided into parts.

    Args:
        seconds: the whole time; ``None`` for no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._until = 0.0

    def next_seconds(self) -> float:
        """The length of the next part."""
        now = time.monotonic()
        self._until = min(self._end, now + WAIT_SECONDS)
        return max(0.0, self._until - now)

    def is_over(self) -> bool:
        """Whether the event came before the part was over, or no time is left."""
        now = time.monotonic()
        return now < self._until or now >= self._end


def heard_of(names: Sequence[str] | None, entries: Iterable[Mapping[str, Any]]) -> list[str] | None:
    """The names, and those of the deployments in these entries.

    So the members of a group are followed on after it has ended, even if the service has restarted since.
    """
    if names is None:
        return None
    return sorted({*names, *(one["deployment"] for one in entries)} - {""})


def is_lease(deployment: DeploymentLike, owner: ActorHandle | None) -> bool:
    """Whether the caller creates the groups itself."""
    declared = (
        deployment.get("owner") if isinstance(deployment, Mapping) else getattr(deployment, "owner", None)
    )
    if declared == "caller" and owner is not None:
        problem = "owner: caller is declared, and an actor is named as the owner; leave one of them out"
        raise InvalidDeployment("deployment", (problem,))
    return declared == "caller"
