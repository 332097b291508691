"""Who asked for what, and what was decided: one entry of the history for each deployment that a call is about.

A call that changed nothing, and was not refused, leaves none: a file that is applied again each minute is no news.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from placement.core.topology import ordinals
from placement.errors import PartlyApplied, PlacementError, counted
from placement.runtime import metrics
from placement.runtime.feed import Feed
from placement.runtime.results import NodeAssignment, PlacementResult
from placement.wire.deployment import Deployment

P = ParamSpec("P")
T = TypeVar("T")
Told = tuple[str, str, str, str | None]
"""A deployment's name, the state, the text, and the code of a refusal."""

WHO = ("user", "job", "submission", "actor", "owner_actor", "node", "address", "pid")
"""What is kept of who asks, of what :func:`placement.runtime.connection.caller` says."""
LONGEST = 200
QUIET = "placed", "pending", "applied"
"""States of which no entry is left where nothing has changed."""


def decided(call: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Has the decisions of a method of the service be kept, and its refusals be counted.

    What is asked for is its first argument: a deployment, several, or a name.
    """
    signature, calling = inspect.signature(call), metrics.counted(call)

    @functools.wraps(call)
    async def deciding(*args: P.args, **kwargs: P.kwargs) -> T:
        service, asked, *_ = (given := signature.bind(*args, **kwargs).arguments).values()
        work = calling(*args, **kwargs)
        return await noted(service._controller.feed, call.__name__, asked, given.get("caller"), work)

    return deciding


async def noted(feed: Feed, call: str, asked: Any, caller: Any, work: Awaitable[T]) -> T:
    """What ``work`` comes to; it is kept, with who asked for it."""
    began, seen, names = time.monotonic(), feed.last_number, list(_names(asked))
    told: list[Told] = []
    try:
        outcome = await work
        told = list(_outcomes(outcome, names))
        return outcome
    except (Exception, asyncio.CancelledError) as error:
        told = list(_refusals(error, names))
        raise
    finally:
        more = {"call": call, "caller": who(caller), "seconds": round(time.monotonic() - began, 6)}
        for name, state, text, code in told:
            if state not in QUIET or feed.since(seen, (name,)):
                feed.note("decision", name, state, text, **more, **({"code": code} if code else {}))


def who(caller: Any) -> dict[str, str]:
    """Who asks, as far as it is said."""
    said = {**caller} if isinstance(caller, Mapping) else {}
    said.setdefault("job", said.get("driver"))
    return {key: str(said[key])[:LONGEST] for key in WHO if said.get(key)}


def place_of(part: NodeAssignment) -> str:
    """Where a part of a replica is."""
    return f"{part.node_name} GPUs {part.gpus}" if part.gpus else part.node_name


def _names(asked: Any) -> Iterator[str]:
    for one in asked if isinstance(asked, Sequence) and not isinstance(asked, str) else [asked]:
        name = (
            one.name if isinstance(one, Deployment) else one.get("name") if isinstance(one, Mapping) else one
        )
        yield str(name or "")[:LONGEST]


def _outcomes(outcome: Any, names: Sequence[str]) -> Iterator[Told]:
    for one in outcome if isinstance(outcome, list) else [outcome]:
        if isinstance(one, PlacementResult):
            yield one.deployment, "pending" if one.pending else "placed", _text(one), None
        else:
            yield names[0], "released", counted(one, "replica"), None


def _text(result: PlacementResult) -> str:
    """Where its replicas are, how fast their links are, and what waits, and why."""
    placed = [f"replica {a.replica_index} on {place_of(a)}{_speed(a)}" for a in result.assignments]
    waiting: dict[str, list[int]] = {}
    for index, reason in sorted(result.pending.items()):
        waiting.setdefault(reason, []).append(index)
    waits = [f"{_which(indices)}: {reason}" for reason, indices in waiting.items()]
    return "; ".join(placed + waits)


def _which(indices: Sequence[int]) -> str:
    """``replica 3 waits``, ``replicas 0-2,5 wait``."""
    return f"replica {indices[0]} waits" if len(indices) == 1 else f"replicas {ordinals(indices)} wait"


def _speed(part: NodeAssignment) -> str:
    if part.bandwidth_gb_per_s is None:
        return ""
    return f" at {part.bandwidth_gb_per_s:g} GB/s ({part.weakest_link})"


def _refusals(error: BaseException, names: Sequence[str]) -> Iterator[Told]:
    if isinstance(error, PartlyApplied):
        for name, failure in error.failures.items():
            yield name, "refused", failure["message"], failure["code"]
        for name in error.applied:
            yield name, "applied", "others of this call were refused", None
        return
    for name in names:
        if isinstance(error, PlacementError):
            yield name, "refused", str(error), error.code
        elif isinstance(error, asyncio.CancelledError):
            yield name, "cancelled", "its caller no longer waits for it", None
        else:
            yield name, "failed", f"{type(error).__name__}: {error}", None
