"""What nodes say of their GPUs is asked once, saved, and asked again where nobody knew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from placement import topologies
from placement.runtime import inventory
from placement.runtime.discovery import NodeInfo
from placement.runtime.inventory import ASK_AGAIN_SECONDS, DEADLINE_SECONDS, Inventory
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
        self.saved: list[str] = []

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
        mock.patch.multiple(inventory.ray, get=lambda call, timeout: ray.says[call[0]], wait=ray.wait),
        mock.patch.object(inventory.time, "monotonic", lambda: ray.now),
        mock.patch.object(inventory.ledger, "save_facts", lambda node, facts: ray.saved.append(node)),
        mock.patch.object(inventory.ledger, "forget_facts", lambda node: ray.saved.remove(node)),
        mock.patch.object(inventory.ledger, "measurements", list),
    ):
        yield ray


@pytest.fixture
def known(ray: Ray) -> Inventory:
    agents: Any = SimpleNamespace(agent=ray.agent, working=lambda nodes: contextlib.nullcontext())
    return Inventory(agents, {})


def test_each_is_asked_once_and_saved_once(ray: Ray, known: Inventory) -> None:
    ray.says = {"a": KNOWN, "b": KNOWN}
    assert known.unknown_nodes(NODES) == {"a", "b"}
    for _ in range(3):
        known.refresh(NODES)
    assert (ray.asked, ray.saved, known.unknown_nodes(NODES)) == (["a", "b"], ["a", "b"], frozenset())
    known.refresh(NODES, again=True)
    assert (len(ray.asked), ray.saved) == (4, ["a", "b"]), "how full its memory is, is no news"
    assert known.hardware(NODES[0]).topology.known
    known.forget_all_but({"b"})
    assert known.unknown_nodes(NODES) == {"a"} and ray.saved == ["b"]


def test_one_that_does_not_answer_is_waited_for_once(ray: Ray, known: Inventory) -> None:
    ray.says = {"b": KNOWN}
    known.refresh(NODES, patience_seconds=5.0)
    assert known.unknown_nodes(NODES) == {"a"} and not known.hardware(NODES[0]).topology.known
    known.refresh(NODES)
    assert ray.waited == [5.0, DEADLINE_SECONDS - 5.0]
    assert known.unknown_nodes(NODES) == frozenset()
    began = ray.now
    for _ in range(3):
        known.refresh(NODES, again=True)
    assert (ray.now, ray.asked.count("a"), ray.asked.count("b")) == (began, 1, 4)
    ray.says["a"] = KNOWN  # at last
    known.refresh(NODES)
    assert known.hardware(NODES[0]).topology.known and ray.saved == ["b", "a"]


def test_one_that_can_say_nothing_is_asked_again_less_and_less_often_and_not_saved(
    ray: Ray, known: Inventory
) -> None:
    ray.says = {"a": NOTHING}
    for wait in (ASK_AGAIN_SECONDS, 2 * ASK_AGAIN_SECONDS, 4 * ASK_AGAIN_SECONDS):
        before = len(ray.asked)
        for _ in range(2):
            known.refresh(NODES[:1])
        assert len(ray.asked) == before + 1
        assert known.unknown_nodes(NODES[:1]) == frozenset()
        ray.now += wait + 1
    assert not ray.saved
    ray.says["a"] = KNOWN
    known.refresh(NODES[:1])
    ray.says["a"] = NOTHING  # later: what was known is worth more
    known.refresh(NODES[:1], again=True)
    assert known.hardware(NODES[0]).topology.known and ray.saved == ["a"]


class Counted(list[NodeInfo]):
    """Says how often somebody went through all of it."""

    times = 0

    def __iter__(self) -> Iterator[NodeInfo]:
        self.times += 1
        return super().__iter__()


def test_nodes_that_have_answered_are_not_looked_at_again(ray: Ray, known: Inventory) -> None:
    nodes = Counted(NODES)
    ray.says = {"a": KNOWN}
    known.refresh(nodes, patience_seconds=5.0)
    looked = nodes.times
    for _ in range(3):
        known.refresh(nodes, patience_seconds=0.0)
        assert known.unknown_nodes(nodes) == {"b"}
    ray.says["b"] = KNOWN
    known.refresh(nodes)
    assert known.unknown_nodes(nodes) == frozenset() and known.hardware(NODES[1]).topology.known
    assert nodes.times == looked

    more = Counted([*NODES, NodeInfo("c", "c", "c", 4)])
    assert known.unknown_nodes(more) == {"c"}
    known.forget_all_but({"b"})
    assert known.unknown_nodes(more) == {"a", "c"}


def test_a_question_that_stays_open_is_looked_after(ray: Ray, known: Inventory) -> None:
    """It was asked of a node that is known already."""
    ray.says = {"a": KNOWN, "b": KNOWN}
    known.refresh(NODES)
    known.pop_changed()
    ray.says = {"b": KNOWN}
    known.refresh(NODES, again=True, patience_seconds=1.0)
    assert known.pop_changed() == {"b"} and known.unknown_nodes(NODES) == frozenset()
    ray.says["a"] = topologies.facts("t4-4x")
    known.refresh(NODES)
    assert known.hardware(NODES[0]).topology.model == "Tesla T4"
    assert (known.pop_changed(), known.pop_changed()) == ({"a"}, frozenset())


def test_what_an_earlier_service_knew_is_not_asked_again(ray: Ray, known: Inventory) -> None:
    assert known.unknown_nodes(NODES) == {"a", "b"}
    with mock.patch.object(inventory.ledger, "facts", lambda: {"a": KNOWN, "b": None, "gone": KNOWN}):
        ray.saved.append("gone")
        known.restore({"a", "b"})
    assert (known.unknown_nodes(NODES), known.pop_changed(), ray.saved) == ({"b"}, {"a"}, [])
