"""What both clients ask of the service for a deployment that its caller owns, and what they leave behind."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytest
import ray

import placement
from placement import (
    AsyncClient,
    Client,
    Deployment,
    InvalidDeployment,
    LeaseExpired,
    NodeAssignment,
    NotEnoughGpus,
    PlacementResult,
)
from placement.runtime import async_client, borrowing, client, client_base
from placement.runtime.borrowing import Borrower, OwnGroups
from placement.runtime.leases import Loan

WANTED: dict[str, Any] = {"name": "mine", "model": "m", "replicas": 2, "owner": "caller"}
CALLER = {"job": "01000000", "node": "aa", "pid": "7"}


class Reference:
    """The answer of a call, for those who block and those who await."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def get(self) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def __await__(self) -> Generator[None, None, Any]:
        yield
        return self.get()


class Service:
    """Gives the answers that it was made with to calls of ``lend`` and ``confirm``, in order."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)


@dataclass
class Method:
    service: Service
    name: str

    def remote(self, *arguments: Any, **named: Any) -> Reference:
        self.service.calls.append((self.name, *arguments, *([named] if named else [])))
        return Reference(None if self.name == "cancel" else self.service.answers.pop(0))


@dataclass(frozen=True)
class Id:
    text: str

    def hex(self) -> str:
        return self.text


@dataclass(frozen=True)
class Group:
    id: Id


class Groups(OwnGroups):
    """Groups that are there, by name; ``id-`` and the name is the id of one."""

    def __init__(self, meanwhile: Callable[[str], None] = lambda name: None):
        self.there: dict[str, Group] = {}
        self.removed: list[str] = []
        self.meanwhile = meanwhile

    def warm(self) -> None:
        pass

    def create(self, loan: Loan) -> Any:
        self.there[loan.group_name] = Group(Id(f"id-{loan.group_name}"))
        self.meanwhile(loan.group_name)
        return self.there[loan.group_name]

    def find(self, name: str) -> Any:
        return self.there.get(name)

    def remove(self, group: Any) -> None:
        name = group.id.hex().removeprefix("id-")
        del self.there[name]
        self.removed.append(name)


def loan(number: int) -> Loan:
    return Loan(f"loan-{number}", "mine", f"group-{number}", [{"GPU": 1.0}], ["aa"])


def result(*names: str) -> PlacementResult:
    groups: list[Any] = [Group(Id(f"id-{name}")) for name in names]
    return PlacementResult(
        "mine", [NodeAssignment(i, "aa", [i], group, [0]) for i, group in enumerate(groups)]
    )


def place(kind: type[Client] | type[AsyncClient], service: Service, groups: Groups) -> PlacementResult:
    client = kind(service)
    client._borrower.groups = groups
    if isinstance(client, Client):
        return client.place(WANTED, wait_seconds=3.0)
    return asyncio.run(client.place(WANTED, wait_seconds=3.0))


@pytest.fixture(autouse=True)
def seams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", Reference.get)
    for module in (client, async_client, borrowing):
        monkeypatch.setattr(module, "caller", lambda owner=None: CALLER)


both = pytest.mark.parametrize("kind", [Client, AsyncClient])
LEND = ("lend", WANTED, None, 3.0, {"caller": CALLER})


@both
def test_each_replica_is_lent_created_and_confirmed(kind: Any) -> None:
    service, groups = Service(loan(1), loan(2), result("group-1", "group-2")), Groups()
    placed = place(kind, service, groups)
    assert service.calls == [LEND, ("confirm", "loan-1", "id-group-1"), ("confirm", "loan-2", "id-group-2")]
    assert [a.placement_group for a in placed.assignments] == list(groups.there.values())
    assert not groups.removed


@both
def test_what_stands_already_needs_no_group(kind: Any) -> None:
    service, groups = Service(result("before")), Groups()
    assert place(kind, service, groups) == result("before")
    assert service.calls == [LEND]


@both
def test_a_group_that_the_result_does_not_hold_is_removed(kind: Any) -> None:
    """Other GPUs were in it than were lent, so that the service made another attempt."""
    service, groups = Service(loan(1), loan(2), result("group-2")), Groups()
    place(kind, service, groups)
    assert (list(groups.there), groups.removed) == (["group-2"], ["group-1"])


@both
def test_an_error_of_the_service_removes_the_groups_of_the_replicas_before(kind: Any) -> None:
    error = NotEnoughGpus("mine", "none is free", {}, "wait")
    service, groups = Service(loan(1), loan(2), error), Groups()
    with pytest.raises(type(error)) as caught:
        place(kind, service, groups)
    assert caught.value is error
    assert service.calls[-1] == ("confirm", "loan-2", "id-group-2"), "it is over for the service already"
    assert not groups.there


@both
def test_who_was_too_late_or_whose_service_started_anew_asks_once_more(kind: Any) -> None:
    expired = LeaseExpired("mine", "none came")
    service, groups = Service(loan(1), loan(2), expired, loan(3), result("group-3")), Groups()
    place(kind, service, groups)
    assert (list(groups.there), groups.removed) == (["group-3"], ["group-1", "group-2"])
    service, groups = Service(loan(1), expired, loan(2), LeaseExpired("mine", "again")), Groups()
    with pytest.raises(LeaseExpired, match="again"):
        place(kind, service, groups)
    assert not groups.there


@pytest.mark.parametrize(
    ("kind", "stop"),
    [(Client, KeyboardInterrupt), (Client, SystemExit), (Client, OSError), (AsyncClient, OSError)],
)
def test_a_caller_who_is_interrupted_leaves_no_group_and_cancels(kind: Any, stop: Any) -> None:
    """Async code hears of an interrupt as a cancellation, below."""

    def interrupt(name: str) -> None:
        if name == "group-2":
            raise stop

    service, groups = Service(loan(1), loan(2)), Groups(meanwhile=interrupt)
    with pytest.raises(stop):
        place(kind, service, groups)
    assert groups.removed == ["group-1", "group-2"]
    assert service.calls[-1] == ("cancel", "loan-2")


def test_an_interrupt_while_the_service_confirms_gives_all_back() -> None:
    service, groups = Service(loan(1), KeyboardInterrupt()), Groups()
    with pytest.raises(KeyboardInterrupt):
        place(Client, service, groups)
    assert (groups.there, service.calls[-1]) == ({}, ("cancel", "loan-1"))


@pytest.mark.parametrize("times", [1, 3])
def test_a_cancelled_task_waits_for_the_group_that_is_being_created_and_removes_it(times: int) -> None:
    creating, go_on = threading.Event(), threading.Event()

    def meanwhile(name: str) -> None:
        creating.set()
        assert go_on.wait(10)

    service, groups = Service(loan(1)), Groups(meanwhile=meanwhile)
    client = AsyncClient(service)
    client._borrower.groups = groups

    async def run() -> None:
        task = asyncio.create_task(client.place(WANTED))
        assert await asyncio.to_thread(creating.wait, 10)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        assert list(groups.there) == ["group-1"]
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert (groups.there, groups.removed) == ({}, ["group-1"])
    assert service.calls[-1] == ("cancel", "loan-1")


def test_trouble_with_giving_back_does_not_hide_the_error() -> None:
    class Broken(Groups):
        def remove(self, group: Any) -> None:
            raise RuntimeError("Ray is gone")

    service = Service(loan(1), OSError("first"))
    with pytest.raises(OSError, match="first"):
        place(Client, service, Broken())
    assert service.calls[-1] == ("cancel", "loan-1")


@both
def test_a_caller_and_an_actor_cannot_both_own_it(kind: Any) -> None:
    client = kind(Service())
    for method in (client.place, client.apply):
        with pytest.raises(InvalidDeployment, match="leave one of them out"):
            answer = method(placement.Deployment(**WANTED), owner=object())
            asyncio.run(answer)


@both
def test_who_asks_is_said_where_somebody_may_own_it_and_only_the_callers_own_is_lent(kind: Any) -> None:
    detached = {"name": "d", "model": "m"}
    service = Service(*[result()] * 4)
    client = kind(service)
    client._borrower.groups = Groups()
    for answer in (
        client.place(detached),
        client.apply(detached, atomic=True),
        client.apply_all([detached]),
        client.apply(WANTED),
    ):
        if kind is AsyncClient:
            asyncio.run(answer)
    who = {"caller": CALLER}
    assert service.calls == [
        ("place", detached, None, 0.0, who),
        ("apply", detached, None, True, who),
        ("apply_all", [detached], False, who),
        ("lend", WANTED, None, 0.0, who),
    ]


class Waited(Service):
    """Its deployment is placed at a time; meanwhile the clock goes on."""

    def __init__(self, placed_at: float) -> None:
        super().__init__()
        self.now, self.placed_at = 100.0, placed_at

    def monotonic(self) -> float:
        return self.now

    @property
    def wait(self) -> Any:
        service = self

        class Wait:
            def remote(self, name: str, seconds: float) -> Reference:
                service.calls.append((name, seconds))
                service.now = min(service.now + seconds, max(service.now, service.placed_at))
                pending = {} if service.now >= service.placed_at else {0: "no room"}
                return Reference(PlacementResult(name, [], pending))

        return Wait()


@both
@pytest.mark.parametrize(
    ("placed_after", "timeout", "asked", "found"),
    [
        (0.0, None, [60.0], True),
        (130.0, None, [60.0, 60.0, 60.0], True),
        (130.0, 80.0, [60.0, 20.0], False),
        (70.0, 80.0, [60.0, 20.0], True),
        (70.0, 0.0, [0.0], False),
        (70.0, -1.0, [0.0], False),
    ],
)
def test_waiting_is_asked_for_in_parts_until_it_is_placed_or_the_time_is_over(
    kind: Any, placed_after: float, timeout: float | None, asked: list[float], found: bool, monkeypatch: Any
) -> None:
    service = Waited(100.0 + placed_after)
    monkeypatch.setattr(client_base, "time", service)
    answer = kind(service).wait("mine", timeout)
    result = answer if kind is Client else asyncio.run(answer)
    assert service.calls == [("mine", seconds) for seconds in asked]
    assert found is not bool(result.pending)


def test_following_asks_for_what_came_after_the_last() -> None:
    events = [{"number": number, "deployment": name} for number, name in ((4, "a"), (7, ""), (9, "b"))]

    def asked(since: int, names: list[str] | None = None) -> tuple[Any, ...]:
        return "watch", {"since": since, "names": names, "timeout_seconds": client_base.WATCH_SECONDS}

    service = Service(events[:2], [], events[2:])
    following = Client(service).follow(["group"], 3)
    assert [next(following)["number"] for _ in range(3)] == [4, 7, 9]
    # Of a group its members are followed on, as the next service may not know it any more.
    assert service.calls == [asked(3, ["group"]), *[asked(7, ["a", "group"])] * 2]
    service = Service(events, events)
    following = Client(service).follow(since=3)
    assert [next(following)["number"] for _ in range(4)] == [4, 7, 9, 4]
    assert service.calls == [asked(3), asked(9)]

    async def follow() -> list[int]:
        found = []
        async for event in AsyncClient(Service(events[:2], [], events[2:])).follow(["a"], 3):
            found.append(event["number"])
            if len(found) == 3:
                break
        return found

    assert asyncio.run(follow()) == [4, 7, 9]


def test_both_clients_have_the_same_methods() -> None:
    def methods(kind: type) -> dict[str, str]:
        found = inspect.getmembers(kind, inspect.isroutine)
        public = {name: inspect.signature(method) for name, method in found if not name.startswith("_")}
        return {
            name: str(signature).replace("AsyncIterator", "Iterator").replace("AsyncClient", "Client")
            for name, signature in public.items()
        }

    assert methods(Client) == methods(AsyncClient)


LAID_OUT = {"name": "mine", "model": "m", "runtime": "python", "owner": "caller"}
FULL = NotEnoughGpus("mine", "none is free", {}, "wait")


@pytest.mark.parametrize(
    ("lifetime", "name", "told", "called"),
    [(None, "", CALLER, "group-1"), ("detached", "theirs", {}, "theirs")],
)
def test_a_group_waits_for_room_and_is_called_what_its_owner_says(
    lifetime: str | None, name: str, told: dict[str, str], called: str, caplog: pytest.LogCaptureFixture
) -> None:
    layout = Deployment.model_validate({**LAID_OUT, "placement_group": {"bundles": [{"GPU": 1}]}})
    service, groups = (
        Service(FULL, LeaseExpired("mine", "none came"), FULL, loan(1), result(called)),
        Groups(),
    )
    lifetimes: list[str | None] = []
    create, groups.create = groups.create, lambda loan: lifetimes.append(loan.lifetime) or create(loan)  # type: ignore[method-assign]
    borrower = Borrower(service)
    borrower.groups = groups
    assert borrower.create_group(layout, name, lifetime, None) == groups.there[called]
    waits = [call[3] for call in service.calls if call[0] == "lend"]
    assert waits[0] == 0 and set(waits[1:]) == {float("inf")}
    assert (lifetimes, service.calls[-1]) == ([lifetime], ("confirm", "loan-1", f"id-{called}"))
    assert {str(call[-1]["caller"]) for call in service.calls if call[0] == "lend"} == {str(told)}
    assert len(caplog.records) == 1 and "waits: cannot place 'mine'" in caplog.text


def test_a_group_without_time_to_wait_is_refused_at_once() -> None:
    layout = Deployment.model_validate({**LAID_OUT, "placement_group": {"bundles": [{"GPU": 1}]}})
    service = Service(FULL)
    with pytest.raises(NotEnoughGpus):
        Borrower(service).create_group(layout, "", None, 0)
    assert len(service.calls) == 1


def test_the_history_comes_page_by_page_and_is_followed_from_the_last_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (client, async_client):
        monkeypatch.setattr(module, "FOLLOW_SECONDS", 0.0)
    pages = [
        {"entries": [{"number": n, "deployment": "a"} for n in (4, 7)], "last": 8, "more": True},
        {"entries": [], "last": 8, "more": False},
        {"entries": [{"number": 9, "deployment": "b"}], "last": 9, "more": False},
    ]
    service = Service(*pages)
    following = Client(service).history(["g"], since=3, earliest=1.5, follow=True)
    assert [next(following)["number"] for _ in range(3)] == [4, 7, 9]
    assert service.calls == [
        ("history", since, names, 1.5) for since, names in ((3, ["g"]), (8, ["a", "g"]), (8, ["a", "g"]))
    ]
    assert [one["number"] for one in Client(Service(*pages)).history()] == [4, 7]

    async def both() -> tuple[list[int], list[int]]:
        whole = [one["number"] async for one in AsyncClient(Service(*pages)).history()]
        following = AsyncClient(Service(*pages)).history(follow=True)
        return whole, [(await anext(following))["number"] for _ in range(3)]

    assert asyncio.run(both()) == ([4, 7], [4, 7, 9])
