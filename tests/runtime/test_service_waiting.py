"""Calls of the service that wait for room: who cancels his call, or ends, waits no more. On a make-believe Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from placement.errors import InvalidDeployment, LeaseExpired, UnknownDeployment
from placement.runtime import queue
from placement.runtime import service as service_module
from placement.runtime.service import DeploymentPlacementActor
from tests.properties.test_service import Ray

A, B = {"job": "0a000000"}, {"job": "0b000000"}


@pytest.fixture
def node_names() -> set[str]:
    return {"x"}


@pytest.fixture
def service(outside: Ray) -> DeploymentPlacementActor:
    with mock.patch.object(service_module, "Clock", lambda controller: SimpleNamespace(start=int)):
        return DeploymentPlacementActor(lambda info: None)


def one(name: str = "a", **fields: Any) -> dict[str, Any]:
    return {"name": name, "model": "m", "gpus": 2, **fields}


def waiting(service: DeploymentPlacementActor) -> list[str]:
    return [ticket.name for ticket in service._controller.queue.tickets.all()]


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # a test that never gets there is ended by its time limit
        await asyncio.sleep(0.01)


async def room_comes(service: DeploymentPlacementActor) -> None:
    """What was in the way is released, and what waits is tried."""
    await service.release("holds")
    await asyncio.to_thread(service._controller.queue.try_all, lambda name: None)


@pytest.mark.parametrize("how", ["place", "lend"])
def test_a_cancelled_call_leaves_the_queue_and_is_not_placed_later(
    service: DeploymentPlacementActor, how: str
) -> None:
    async def scene() -> None:
        await service.place(one("holds", gpus=4))
        ask = service.place if how == "place" else service.lend
        call = asyncio.create_task(ask(one(), None, 600.0, caller=A))
        await until(lambda: waiting(service))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: not waiting(service))
        await room_comes(service)
        with pytest.raises(UnknownDeployment):
            await service.get("a")
        assert (await service.place(one(), None, 600.0, caller=A)).assignments, "asked again, it begins anew"

    asyncio.run(scene())


@pytest.mark.parametrize("other", [A, B], ids=["the same caller", "another"])
def test_who_asks_for_the_same_goes_on_waiting(
    service: DeploymentPlacementActor, other: dict[str, str]
) -> None:
    async def scene() -> None:
        await service.place(one("holds", gpus=4))
        first = asyncio.create_task(service.place(one(), None, 600.0, caller=A))
        second = asyncio.create_task(service.place(one(), None, 600.0, caller=other))
        await until(lambda: len(waiting(service)) == (1 if other is A else 2))
        await asyncio.sleep(0.05)
        first.cancel()
        await until(first.done)
        assert waiting(service) == ["a"]
        await room_comes(service)
        assert (await second).assignments

    asyncio.run(scene())


@pytest.mark.parametrize("how", ["place", "lend"])
def test_what_waits_for_who_has_ended_is_not_placed(
    service: DeploymentPlacementActor, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        await service.place(one("holds", gpus=4))
        ask = service.place if how == "place" else service.lend
        calls = [asyncio.create_task(ask(one(c["job"]), None, 600.0, caller=c)) for c in (A, B)]
        await until(lambda: len(waiting(service)) == 2)
        monkeypatch.setattr(queue, "has_ended", lambda owner: owner["job"] == A["job"])
        await room_comes(service)
        with pytest.raises(LeaseExpired, match="has ended"):
            await calls[0]
        assert (await calls[1]).deployment == B["job"]  # type: ignore[union-attr]
        with pytest.raises(UnknownDeployment):
            await service.get(A["job"])

    asyncio.run(scene())


def test_it_leaves_the_queue_also_while_there_is_no_room(
    service: DeploymentPlacementActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        await service.place(one("holds", gpus=4))
        calls = [asyncio.create_task(service.place(one(c["job"]), None, 600.0, caller=c)) for c in (A, B)]
        await until(lambda: len(waiting(service)) == 2)
        monkeypatch.setattr(queue, "has_ended", lambda owner: owner["job"] == A["job"])
        service._controller.end_what_is_over(lambda owner: False, 0.0)
        assert waiting(service) == [B["job"]]
        calls[1].cancel()
        await asyncio.wait(calls)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("ask", "advice"),
    [
        (lambda service: service.place(one(owner="caller")), "place`, which does that"),
        (lambda service: service.apply(one(owner="caller")), "place`, which does that"),
        (lambda service: service.apply_all([one(owner="caller")]), "one by one"),
    ],
    ids=["place", "apply", "apply_all"],
)
def test_who_is_to_own_the_groups_is_told_how(
    service: DeploymentPlacementActor, ask: Callable[[Any], Awaitable[Any]], advice: str
) -> None:
    async def scene() -> None:
        with pytest.raises(InvalidDeployment, match=advice):
            await ask(service)

    asyncio.run(scene())


def test_a_loan_that_nobody_knows_of(service: DeploymentPlacementActor) -> None:
    async def scene() -> None:
        await service.cancel("none")
        with pytest.raises(LeaseExpired, match="started anew"):
            await service.confirm("none", "")

    asyncio.run(scene())


def test_what_a_lease_came_to_is_not_known_for_ever(
    service: DeploymentPlacementActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        monkeypatch.setattr(service_module, "KEPT_SECONDS", 0.0)
        assert await service.lend(one(), caller=A)
        await until(lambda: not service._lendings)

    asyncio.run(scene())
