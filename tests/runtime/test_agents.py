"""What becomes of node actors that die, raise, hang, or have nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from placement.runtime import agents
from placement.runtime.agents import AILING_SECONDS, DEADLINE_SECONDS, HUNG_SECONDS, Agents
from placement.runtime.discovery import NodeInfo
from placement.runtime.orders import Refused

NODE = NodeInfo("n", "n", "n", 4)


class Actor:
    """A node actor; what it is asked is written down."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *_: self.asked.append(method) or method)


class Ray:
    """Answers calls, or not."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.actors: list[Actor] = []
        self.killed: list[Actor] = []
        self.failure: Exception | None = None
        self.done: list[Any] = []
        self.waited: list[float] = []

    def make(self, info: NodeInfo) -> Actor:
        self.actors.append(Actor())
        return self.actors[-1]

    def get(self, call: Any, timeout: float) -> str:
        self.waited.append(timeout)
        if self.failure is not None:
            raise self.failure
        return f"answer to {call}"

    def wait(self, calls: list[Any], timeout: float, num_returns: int = 1) -> tuple[list[Any], list[Any]]:
        return [one for one in calls if one in self.done], [one for one in calls if one not in self.done]


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
    known = Agents(ray.make, lambda node: {}, lambda node: None)  # type: ignore[arg-type]
    known.agent(NODE)
    return known


def test_one_that_died_is_made_again_and_its_node_is_not_the_first_choice_for_a_while(
    ray: Ray, known: Agents
) -> None:
    ray.failure = ActorDiedError()
    refused = known.answer("n", "reserve")
    assert isinstance(refused, Refused) and not refused.full
    assert (known.in_doubt(), known.in_doubt()) == (True, False)
    assert known.agent(NODE) is ray.actors[1] and ray.actors[1].asked == ["adopt"]
    assert known.ailing() == {"n"}
    known.answer("n", "reserve")  # and again
    ray.now += 1.5 * AILING_SECONDS
    assert known.ailing() == {"n"}
    ray.now += AILING_SECONDS
    assert not known.ailing()


def test_one_that_answers_is_well(ray: Ray, known: Agents) -> None:
    ray.failure = ActorDiedError()
    known.answer("n", "reserve")
    ray.failure = None
    assert known.answer("n", "reserve") == "answer to reserve"
    assert not known.ailing()


def test_one_that_raised_may_not_have_tidied_up_and_is_ended(ray: Ray, known: Agents) -> None:
    ray.failure = RayTaskError("reserve", "", ConnectionError())
    assert isinstance(known.answer("n", "reserve"), Refused)
    assert ray.killed == ray.actors and not known.known() and known.in_doubt()


def test_one_that_hangs_keeps_callers_waiting_once(ray: Ray, known: Agents) -> None:
    ray.failure = GetTimeoutError()
    for _ in range(3):
        refused = known.answer("n", "reserve")
        assert isinstance(refused, Refused) and (refused.full, refused.room) == (True, 0)
    assert ray.waited == [DEADLINE_SECONDS, HUNG_SECONDS, HUNG_SECONDS]
    assert not known.in_doubt() and not ray.killed
    ray.done, ray.failure = ["adopt"], None  # it is done at last, with whatever it was asked
    assert known.in_doubt()
    known.answer("n", "reserve")
    assert ray.waited[-1] == DEADLINE_SECONDS


def test_one_that_has_something_to_do_is_neither_ended_nor_forgotten(ray: Ray, known: Agents) -> None:
    with known.working(["n"]):
        ray.now += 100
        assert known.idle(60) == []
        known.forget_all_but(())
        assert known.known()
    assert known.idle(60) == []
    ray.now += 61
    assert known.idle(60) == ["n"]
    known.rest("n", 60)
    assert ray.killed == ray.actors and not known.known()
    known.agent(NODE)
    known.forget_all_but(())
    assert not known.known()
