"""Calls of the service that wait for room: who cancels his call, or ends, waits no more. On a make-believe Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from placement.errors import Busy, InvalidDeployment, LeaseExpired, UnknownDeployment
from placement.runtime import leases, queue
from placement.runtime import service as service_module
from placement.runtime.bootstrap import MOST_CALLS
from placement.runtime.feed import WATCHERS
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
        ask: Any = service.place if how == "place" else service.lend
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
        ask: Any = service.place if how == "place" else service.lend
        calls = [asyncio.create_task(ask(one(c["job"]), None, 600.0, caller=c)) for c in (A, B)]
        await until(lambda: len(waiting(service)) == 2)
        monkeypatch.setattr(queue, "has_ended", lambda owner: owner["job"] == A["job"])
        await room_comes(service)
        with pytest.raises(LeaseExpired, match="has ended"):
            await calls[0]
        assert (await calls[1]).deployment == B["job"]
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
        service._controller.lifetimes.end_what_is_over(lambda owner: False, 0.0)
        assert waiting(service) == [B["job"]]
        calls[1].cancel()
        await asyncio.wait(calls)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("ask", "advice"),
    [
        (lambda service: service.place(one(owner="caller")), "place`, which creates them"),
        (lambda service: service.apply(one(owner="caller")), "place`, which creates them"),
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
        with pytest.raises(LeaseExpired, match="restarted"):
            await service.confirm("none", "")

    asyncio.run(scene())


def test_what_a_lease_came_to_is_not_known_for_ever(
    service: DeploymentPlacementActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        monkeypatch.setattr(leases, "KEPT_SECONDS", 0.0)
        assert await service.lend(one(), caller=A)
        await until(lambda: not service._loans)

    asyncio.run(scene())


@contextmanager
def a_node_hangs(outside: Ray) -> Iterator[threading.Event]:
    """The next reservation does not come to an end before this does; what is handed on is set once it has begun."""
    begun, over = threading.Event(), threading.Event()
    outside.meanwhile.append(lambda: (begun.set(), over.wait()))
    try:
        yield begun
    finally:
        over.set()


def test_releases_of_what_is_being_placed_keep_no_other_waiting(
    service: DeploymentPlacementActor, outside: Ray
) -> None:
    service._releases = ThreadPoolExecutor(1)

    async def scene() -> None:
        await service.place(one("other"))
        with a_node_hangs(outside) as begun:
            placing = asyncio.create_task(service.place(one()))
            await until(begun.is_set)
            ask = (service.renew, service.release, service.release)
            behind = [asyncio.create_task(call("a")) for call in ask]
            await asyncio.sleep(0)  # they are asked for first
            assert await service.release("other") == 1
            assert not any(call.done() for call in (placing, *behind))
        await placing
        renewed, *released = await asyncio.gather(*behind)
        assert (renewed, released) == (None, [1, 1]), "in their order, and the same call is made once"

    asyncio.run(scene())


def test_whose_time_is_over_in_the_middle_of_an_attempt_keeps_nobody_from_looking(
    service: DeploymentPlacementActor, outside: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    service._reads = service._plans = ThreadPoolExecutor(1)

    async def scene() -> None:
        over = asyncio.Event()
        monkeypatch.setattr(asyncio, "wait", lambda outcomes, timeout: over.wait())
        await service.place(one("holds", gpus=4))
        call = asyncio.create_task(service.place(one(), None, 600.0))
        await until(lambda: waiting(service))
        with a_node_hangs(outside) as begun:
            coming = asyncio.create_task(room_comes(service))
            await until(begun.is_set)
            over.set()
            await until(lambda: not waiting(service))
            assert len(await service.plan_all([one("b", gpus=1)])) == 1
            assert not call.done()
        await coming
        assert (await call).assignments, "it came just in time"

    asyncio.run(scene())


def test_the_same_file_applied_twice_at_once_is_applied_once(
    service: DeploymentPlacementActor, outside: Ray
) -> None:
    async def scene() -> None:
        with a_node_hangs(outside) as begun:
            first = asyncio.create_task(service.apply_all([one("a"), one("b")]))
            await until(begun.is_set)
            second = asyncio.create_task(service.apply_all([one("a"), one("b")]))
            another = asyncio.create_task(service.apply_all([one("a")]))
            await until(lambda: service._outcomes.running() == 2)
        results, same, _ = await asyncio.gather(first, second, another)
        assert results is same

    asyncio.run(scene())


def test_how_many_calls_wait_is_bounded_and_who_looks_or_releases_is_let_in(
    service: DeploymentPlacementActor,
) -> None:
    assert service_module.CALLS + WATCHERS < MOST_CALLS, "so that Ray lets others in"
    service._calls.limit = 2

    async def scene() -> None:
        await service.place(one("holds", gpus=4))
        calls = [
            asyncio.create_task(ask(one(ask.__name__), None, 600.0)) for ask in (service.place, service.lend)
        ]
        await until(lambda: len(waiting(service)) == 2)
        for refused in (
            service.place(one()), service.lend(one()), service.apply(one()), service.apply_all([one()]),
        ):  # fmt: skip
            with pytest.raises(Busy, match="2 calls that change deployments"):
                await refused
        assert len(waiting(service)) == 2
        assert (await service.get("holds")).assignments
        assert await service.release("holds") == 1
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert (await service.place(one())).assignments

    asyncio.run(scene())


def test_plans_that_wait_for_a_node_keep_nobody_from_the_status(
    service: DeploymentPlacementActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    service._plans, over = ThreadPoolExecutor(1), threading.Event()
    monkeypatch.setattr(service._controller.cluster, "look", lambda wanted=(): over.wait())

    async def scene() -> None:
        await service.place(one())
        ask = (
            service.plan(one("b")),
            service.explain_all([one("b")]),
            service.snapshot(),
            service.topology(),
        )
        calls = [asyncio.create_task(call) for call in ask]
        await asyncio.sleep(0)  # they are asked for first
        try:
            assert [told["name"] for told in (await service.status())["deployments"]] == ["a"]
            assert not any(call.done() for call in calls)
        finally:
            over.set()
        await asyncio.wait(calls)

    asyncio.run(scene())
