"""What the nodes' actors are told of orders, and what is done without those that do not answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from placement.core.replicas import PlannedReplica
from placement.runtime import fleet
from placement.runtime.agents import Unanswered
from placement.runtime.claims import Claim
from placement.runtime.discovery import NodeInfo
from placement.runtime.fleet import Fleet
from placement.runtime.orders import Holding, Refusal, Refused, order_name
from placement.runtime.results import NodeAssignment
from placement.wire.deployment import Deployment
from placement.wire.runtime_config import Serving

NODES = [NodeInfo(name, name, name, 4, egress={"egress": 8}) for name in "ab"]


class Agents:
    """Node actors: those of ``hangs`` answer nothing, and of ``hung`` that is known."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.hangs: set[str] = set()
        self.hung: set[str] = set()
        self.doubts = 0

    def agent(self, info: NodeInfo) -> Any:
        return self._actor(info.id)

    def known(self) -> dict[str, Any]:
        return {node: self._actor(node) for node in "ab"}

    def _actor(self, node: str) -> Any:
        def ask(method: str, *arguments: Any) -> str:
            self.asked.append((node, method, arguments))
            return method

        class Actor:
            def __getattr__(self, method: str) -> Any:
                return SimpleNamespace(remote=lambda *arguments: ask(method, *arguments))

        return Actor()

    def forget(self, order: str, nodes: Iterable[str]) -> None:
        self.asked += [(node, "forget", (order,)) for node in sorted(nodes)]

    def silent(self) -> frozenset[str]:
        return frozenset(self.hung)

    @contextlib.contextmanager
    def working(self, nodes: Iterable[str]) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def sole(self, nodes: Iterable[str]) -> Iterator[Any]:
        for node in self.hung & set(nodes):
            raise Unanswered(node, "its node actor has not answered for 3 s")
        yield lambda node: None

    def answers(self, calls: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        return {node: Refused("too late", 1, True) if node in self.hangs else None for node in calls}

    def suspect_orphans(self, *_: Any) -> None:
        self.doubts += 1


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Groups that were removed without an actor."""
    removed: list[Any] = []
    monkeypatch.setattr(fleet.groups, "remove_group", lambda group, ready=False: removed.append(group))
    return removed


@pytest.fixture
def agents(removed: list[Any]) -> Agents:
    return Agents()


@pytest.fixture
def books() -> dict[str, dict[str, Holding]]:
    return {}


@pytest.fixture
def nodes(agents: Agents, books: dict[str, dict[str, Holding]]) -> Fleet:
    nodes = Fleet(lambda info: None, lambda node: dict(books.get(node, {})), "placement:t:")
    nodes.agents = agents  # type: ignore[assignment]
    return nodes


ORDER = order_name("placement:t:", "d", 0)


def test_a_lease_that_ended_is_forgotten_at_once_also_by_an_actor_that_is_new(
    nodes: Fleet, agents: Agents, books: dict[str, dict[str, Holding]]
) -> None:
    books["a"] = {ORDER: Holding.whole("d", (0,))}
    nodes.forget_gone(ORDER, ["a"])
    assert agents.asked == [("a", "forget", (ORDER,))] and "a" in nodes.lagging()
    assert nodes._holdings("a") == {}, "although the books still show it"
    del books["a"]
    nodes.recorded("d")
    books["a"] = {ORDER: Holding.whole("d", (0,))}
    assert nodes._holdings("a") == books["a"], "nothing is remembered of it"
    agents.asked.clear()
    nodes.forget_gone(ORDER, ["b"])  # the books show it no more
    nodes.recorded("d")
    assert agents.asked == [("b", "forget", (ORDER,))]


@pytest.mark.parametrize("is_known", [False, True])
def test_a_release_does_without_an_actor_that_does_not_answer(
    nodes: Fleet, agents: Agents, removed: list[Any], is_known: bool
) -> None:
    (agents.hung if is_known else agents.hangs).add("a")
    held = [(ORDER, NodeAssignment(0, node, [0], node, [0])) for node in "ab"]
    nodes.give_back(held)
    asked = [(node, method) for node, method, _ in agents.asked]
    assert asked == ([("b", "release")] if is_known else [("a", "release"), ("b", "release")])
    assert removed == ["a"]
    nodes.recorded("d")
    assert agents.asked[-1] == ("a", "forget", (ORDER,)), "it hears of it once it goes on"


def test_a_node_that_is_known_to_hang_refuses_without_being_asked(nodes: Fleet, agents: Agents) -> None:
    agents.hung = {"a"}
    replicas = tuple(PlannedReplica(index, node, (0,)) for index, node in enumerate("ab"))
    claim = Claim(Deployment(name="d", model="m", replicas=2), replicas)
    refusal = Refusal("a", "a", 1, "its node actor has not answered for 3 s")
    for create in (None, lambda *_: None):
        assert nodes.reserve(claim, NODES, create) == ([], [refusal])
    assert not agents.asked


def test_what_others_took_of_the_cpus_meanwhile_is_a_refusal_and_the_rest_is_held(
    nodes: Fleet, removed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(fleet.groups, "create_group", lambda name, *asked: made.append(asked) or len(made))
    monkeypatch.setattr(fleet.groups, "ready_or_removed", lambda group: group == 1)
    monkeypatch.setattr(fleet.groups, "node_of_group", lambda group: "a")
    replicas = tuple(
        PlannedReplica(index, node, cpu_milli=1500, memory_bytes=7) for index, node in enumerate("ab")
    )
    reserved, [refusal] = nodes.reserve(
        Claim(Deployment(name="d", model="m", replicas=2, cpus=1.5), replicas), NODES
    )
    assert made == [([{"CPU": 1.5, "memory": 7.0}], ["a"]), ([{"CPU": 1.5, "memory": 7.0}], ["b"])]
    assert (refusal.node_id, refusal.reason) == ("b", "another Ray user took CPUs or memory meanwhile")
    [(order, held)] = reserved
    assert (order.split(":")[2], held.node, held.cpus, held.memory_bytes) == ("d", "a", 1.5, 7)
    assert (held.gpus, held.bundle_indices, removed) == ([], [0], [2])


def test_egress_that_was_lent_before_the_caller_failed_is_given_back(
    nodes: Fleet, removed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet.groups, "ready_or_removed", lambda group: True)
    monkeypatch.setattr(fleet.groups, "node_of_group", lambda group: "a")
    replicas = tuple(
        PlannedReplica(index, node, egress_resource="egress", egress_units=2)
        for index, node in enumerate("ab")
    )
    declared = Deployment(name="d", model="gpt-4o", replicas=2, serving=Serving(max_concurrent=2))
    made: list[Any] = []

    def create(name: str, bundles: Any, nodes: list[str], domain: Any = None) -> Any:
        made.append((bundles, nodes))
        if nodes == ["b"]:
            raise ConnectionError
        return "group on a"

    with pytest.raises(ConnectionError):
        nodes.reserve(Claim(declared, replicas), NODES, create)
    assert made == [([{"egress": 2.0}], ["a"]), ([{"egress": 2.0}], ["b"])]
    assert removed == ["group on a"]
