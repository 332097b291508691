"""What nodes say of their GPUs is asked once, noted, and asked again where nobody knew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from placement import topologies
from placement.runtime import machines
from placement.runtime.discovery import NodeInfo
from placement.runtime.machines import ASK_AGAIN_SECONDS, DEADLINE_SECONDS, Machines
from placement.wire.facts import NodeFacts

NODES = [NodeInfo(name, name, name, 4) for name in ("a", "b")]
KNOWN = topologies.facts("a100-pcie-4x")
NOTHING = NodeFacts(source="none", problem="no driver")


class Ray:
    """Nodes that answer, or do not."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.says: dict[str, NodeFacts] = {}
        self.asked: list[str] = []
        self.waited: list[float] = []
        self.noted: list[str] = []

    def agent(self, info: NodeInfo) -> Any:
        def ask(max_age_seconds: float | None) -> str:
            self.asked.append(info.id)
            return f"{info.id}{len(self.asked)}"

        return SimpleNamespace(facts=SimpleNamespace(remote=ask))

    def wait(self, calls: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        if timeout:
            self.waited.append(timeout)
        done = [call for call in calls if call[0] in self.says]
        if len(done) < len(calls):
            self.now += timeout
        return done, [call for call in calls if call not in done]


@pytest.fixture
def ray() -> Iterator[Ray]:
    ray = Ray()
    with (
        mock.patch.multiple(machines.ray, get=lambda call, timeout: ray.says[call[0]], wait=ray.wait),
        mock.patch.object(machines.time, "monotonic", lambda: ray.now),
        mock.patch.object(machines.ledger, "save_facts", lambda node, facts: ray.noted.append(node)),
        mock.patch.object(machines.ledger, "forget_facts", lambda node: ray.noted.remove(node)),
    ):
        yield ray


@pytest.fixture
def known(ray: Ray) -> Machines:
    agents: Any = SimpleNamespace(agent=ray.agent, working=lambda nodes: contextlib.nullcontext())
    return Machines(agents, {})


def test_each_is_asked_once_and_noted_once(ray: Ray, known: Machines) -> None:
    ray.says = {"a": KNOWN, "b": KNOWN}
    assert known.strangers(NODES) == {"a", "b"}
    for _ in range(3):
        known.meet(NODES)
    assert (ray.asked, ray.noted, known.strangers(NODES)) == (["a", "b"], ["a", "b"], frozenset())
    known.meet(NODES, again=True)
    assert (len(ray.asked), ray.noted) == (4, ["a", "b"]), "how full its memory is, is no news"
    assert known.machine(NODES[0]).topology.known
    known.forget_all_but({"b"})
    assert known.strangers(NODES) == {"a"} and ray.noted == ["b"]


def test_one_that_does_not_answer_is_waited_for_once(ray: Ray, known: Machines) -> None:
    ray.says = {"b": KNOWN}
    known.meet(NODES, patience_seconds=5.0)
    assert known.strangers(NODES) == {"a"} and not known.machine(NODES[0]).topology.known
    known.meet(NODES)
    assert ray.waited == [5.0, DEADLINE_SECONDS - 5.0]
    assert known.strangers(NODES) == frozenset()
    began = ray.now
    for _ in range(3):
        known.meet(NODES, again=True)
    assert (ray.now, ray.asked.count("a"), ray.asked.count("b")) == (began, 1, 4)
    ray.says["a"] = KNOWN  # at last
    known.meet(NODES)
    assert known.machine(NODES[0]).topology.known and ray.noted == ["b", "a"]


def test_one_that_can_say_nothing_is_asked_again_less_and_less_often_and_not_noted(
    ray: Ray, known: Machines
) -> None:
    ray.says = {"a": NOTHING}
    for wait in (ASK_AGAIN_SECONDS, 2 * ASK_AGAIN_SECONDS, 4 * ASK_AGAIN_SECONDS):
        before = len(ray.asked)
        for _ in range(2):
            known.meet(NODES[:1])
        assert len(ray.asked) == before + 1
        assert known.strangers(NODES[:1]) == frozenset()
        ray.now += wait + 1
    assert not ray.noted
    ray.says["a"] = KNOWN
    known.meet(NODES[:1])
    ray.says["a"] = NOTHING  # later: what was known is worth more
    known.meet(NODES[:1], again=True)
    assert known.machine(NODES[0]).topology.known and ray.noted == ["a"]
