"""What becomes of node actors that die, raise, hang, or have nothing to do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from placement.runtime import agents
from placement.runtime.agents import (
    AILING_SECONDS,
    COLD_SECONDS,
    DEADLINE_SECONDS,
    HUNG_SECONDS,
    POLL_SECONDS,
    SUSPECT_SECONDS,
    UNREACHABLE_SECONDS,
    Agents,
    Unanswered,
)
from placement.runtime.discovery import NodeInfo
from placement.runtime.orders import Refused


def node(name: str) -> NodeInfo:
    return NodeInfo(name, name, name, 4)


NODE = node("n")


@dataclass(eq=False)
class Call:
    """What an actor was asked."""

    node: str
    method: str


class Actor:
    """A node actor; what it is asked is written down."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.asked: list[str] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: self.asked.append(method) or Call(self.node, method))


@dataclass
class Ray:
    """Answers calls, or not. Time passes while somebody waits.

    Attributes:
        busy: nodes whose actors answer nothing but what they are.
        frozen: nodes whose actors answer nothing at all.
    """

    now: float = 1000.0
    actors: list[Actor] = field(default_factory=list)
    killed: list[Actor] = field(default_factory=list)
    failure: Exception | None = None
    busy: set[str] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)

    def make(self, info: NodeInfo) -> Actor:
        self.actors.append(Actor(info.id))
        return self.actors[-1]

    def get(self, call: Call, timeout: float) -> str:
        if self.failure is not None:
            raise self.failure
        return f"{call.node} answers {call.method}"

    def wait(self, calls: list[Call], timeout: float, num_returns: int = 1) -> tuple[list[Call], list[Call]]:
        late = [one for one in calls if self.is_late(one)]
        if late:
            self.now += timeout
        return [one for one in calls if one not in late], late

    def is_late(self, call: Call) -> bool:
        return call.node in self.frozen or (call.node in self.busy and call.method != "facts")


@pytest.fixture
def ray() -> Iterator[Ray]:
    ray = Ray()
    with (
        mock.patch.multiple(agents.ray, get=ray.get, wait=ray.wait, kill=ray.killed.append),
        mock.patch.object(agents.time, "monotonic", lambda: ray.now),
    ):
        yield ray


@pytest.fixture
def known(ray: Ray) -> Agents:
    known = Agents(ray.make, lambda node: {}, lambda node: None)
    known.agent(NODE)
    return known


def ask(known: Agents, name: str = "n") -> Any:
    return known.answer(name, known.agent(node(name)).reserve.remote())


def test_one_that_died_is_made_again_and_its_node_is_not_the_first_choice_for_a_while(
    ray: Ray, known: Agents
) -> None:
    ray.failure = ActorDiedError()
    refused = ask(known)
    assert isinstance(refused, Refused) and not refused.full
    assert (known.orphans_suspected(), known.orphans_suspected()) == (True, False)
    assert known.agent(NODE) is ray.actors[1] and ray.actors[1].asked == ["adopt"]
    assert known.suspect() == {"n"}
    ask(known)  # and again
    ray.now += 1.5 * AILING_SECONDS
    assert known.suspect() == {"n"}
    ray.now += AILING_SECONDS
    assert not known.suspect()


def test_one_that_answers_is_well(ray: Ray, known: Agents) -> None:
    ray.failure = ActorDiedError()
    ask(known)
    ray.failure = None
    assert ask(known) == "n answers reserve"
    assert not known.suspect()


@pytest.mark.parametrize(
    "raised", [ConnectionError(), GetTimeoutError()], ids=["an error", "its own timeout"]
)
def test_one_that_raised_may_not_have_tidied_up_and_is_ended(
    ray: Ray, known: Agents, raised: Exception
) -> None:
    ray.failure = RayTaskError("reserve", "", raised).as_instanceof_cause()
    assert isinstance(ask(known), Refused)
    assert ray.killed == ray.actors and not known.known() and known.orphans_suspected()


@pytest.mark.parametrize(
    ("case", "has_answered", "frozen", "expected"),
    [
        ("it has never answered: it may be starting", False, True, DEADLINE_SECONDS),
        ("it works, and says so", True, False, DEADLINE_SECONDS),
        ("it says nothing at all", True, True, UNREACHABLE_SECONDS),
    ],
)
def test_one_that_hangs_keeps_callers_waiting_once(
    ray: Ray, known: Agents, case: str, has_answered: bool, frozen: bool, expected: float
) -> None:
    if has_answered:
        ask(known)
    (ray.frozen if frozen else ray.busy).add("n")
    for seconds in (expected, HUNG_SECONDS, HUNG_SECONDS):
        began = ray.now
        refused = ask(known)
        assert isinstance(refused, Refused) and (refused.full, refused.at_most) == (True, 0)
        assert refused.reason.startswith("its node actor has not answered for")
        assert seconds <= ray.now - began <= seconds + 2 * POLL_SECONDS
    assert not known.orphans_suspected() and not ray.killed
    assert known.silent() == known.suspect() == {"n"}
    ray.busy, ray.frozen = set(), set()  # it is done at last, with whatever it was asked
    assert known.orphans_suspected() and not known.silent()
    assert ask(known) == "n answers reserve" and not known.suspect()


def test_many_that_hang_are_waited_for_side_by_side_and_the_others_are_told_at_once(
    ray: Ray, known: Agents
) -> None:
    names = [f"n{i}" for i in range(9)]
    ray.frozen = set(names[:8])
    calls = {name: known.agent(node(name)).reserve.remote() for name in names}
    told: dict[str, float] = {}
    began = ray.now
    said = known.answers(calls, ray.now + 30, lambda name: told.update({name: ray.now - began}))
    assert ray.now - began == 30
    assert told == {**dict.fromkeys(names[:8], 30), "n8": POLL_SECONDS}
    assert said.pop("n8") == "n8 answers reserve"
    assert all(isinstance(one, Refused) for one in said.values()) and said.keys() == ray.frozen


@pytest.mark.parametrize(("has_answered", "normal"), [(True, SUSPECT_SECONDS), (False, COLD_SECONDS)])
def test_a_node_is_suspect_while_its_actor_is_waited_for(
    ray: Ray, known: Agents, has_answered: bool, normal: float
) -> None:
    if has_answered:
        ask(known)
    ray.frozen = {"n"}
    seen: list[tuple[float, bool]] = []

    def wait(calls: list[Call], timeout: float, num_returns: int = 1) -> Any:
        if timeout:  # not in the middle of another question
            seen.append((ray.now - began, "n" in known.suspect()))
        return ray.wait(calls, timeout, num_returns)

    began = ray.now
    with mock.patch.object(agents.ray, "wait", wait):
        ask(known)
    assert seen == [(at, at > normal) for at, _ in seen] and seen[-1][0] > normal


def test_who_waits_for_the_turn_of_a_node_that_hangs_leaves(ray: Ray, known: Agents) -> None:
    ask(known)
    ray.frozen = {"n"}
    call = known.agent(NODE).reserve.remote()
    left: list[Unanswered] = []

    def waiter() -> None:
        try:
            with known.sole(["n"]):
                pass
        except Unanswered as error:
            left.append(error)

    with known.sole(["n"]):
        waiting = threading.Thread(target=waiter)
        waiting.start()
        known.answers({"n": call}, ray.now + 60)
        waiting.join(10)
    assert [(one.node_id, str(one).partition(" for ")[0]) for one in left] == [
        ("n", "its node actor has not answered")
    ]
    began = ray.now
    with pytest.raises(Unanswered), known.sole(["m", "n"]):
        pass
    assert ray.now == began  # it has been given up: nobody waits
    ray.frozen = set()
    assert known.silent() == frozenset()
    with known.sole(["m", "n"]):  # nobody has kept a turn
        pass


def test_who_comes_to_a_node_that_may_only_be_slow_waits_for_a_moment(ray: Ray, known: Agents) -> None:
    ask(known)
    ray.busy = {"n"}
    call = known.agent(NODE).reserve.remote()
    known.answers({"n": call}, ray.now + UNREACHABLE_SECONDS + 1)  # too late, but it shows that it works
    assert known.silent() == {"n"}
    with mock.patch.object(agents.time, "sleep", lambda seconds: setattr(ray, "now", ray.now + seconds)):
        began = ray.now
        with pytest.raises(Unanswered), known.sole(["m", "n"]):
            pass
        assert SUSPECT_SECONDS < ray.now - began <= SUSPECT_SECONDS + 2 * POLL_SECONDS


def test_a_turn_can_be_given_up_before_the_others(ray: Ray, known: Agents) -> None:
    with known.sole(["a", "b"]) as leave:
        leave("a")
        with known.sole(["a"]):
            pass
        leave("a")
    with known.sole(["a", "b"]):
        pass


def test_one_that_has_something_to_do_is_neither_ended_nor_forgotten(ray: Ray, known: Agents) -> None:
    with known.working(["n"]):
        ray.now += 100
        assert known.idle(60) == []
        known.forget_all_but(())
        assert known.known()
    assert known.idle(60) == []
    ray.now += 61
    assert known.idle(60) == ["n"]
    known.stop_idle("n", 60)
    assert ray.killed == ray.actors and not known.known()
    known.agent(NODE)
    known.forget_all_but(())
    assert not known.known()
