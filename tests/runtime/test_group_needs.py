"""What groups ask for: all that they lack, or nothing; and not again and again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from placement import Group
from placement.core.needs import Needs
from placement.core.request import Lack, Request
from placement.runtime import backoff, group_needs
from placement.runtime.asking import Asked, State
from placement.runtime.group_needs import GroupNeeds
from placement.runtime.needs import Need

GROUP = Group(name="g", members={"a": 1, "b": 1})
COME = Asked(State.ARRIVED, nodes=("n",))
LARGE, SMALL = (
    Lack("g", (name, 0), (((Request(name, (0,), Needs(gpus)), 1),),)) for name, gpus in (("a", 8), ("b", 1))
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    for module in (backoff, group_needs):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def hindered() -> dict[str, str]:
    """Need -> why it cannot be met now."""
    return {}


@pytest.fixture
def needs(clock: SimpleNamespace, hindered: dict[str, str]) -> GroupNeeds:
    def outlook(need: Need | str) -> Asked:
        if isinstance(need, str):
            return Asked(State.NOT_ASKED, need)
        return Asked(State.INFEASIBLE, hindered[str(need)]) if str(need) in hindered else Asked(State.ASKED)

    demand: Any = SimpleNamespace(outlook=outlook)
    return GroupNeeds(demand)


def of(needs: GroupNeeds, *several: Lack) -> dict[str, str]:
    return {key: str(need) for key, need in needs.of(several).items()}


def test_all_or_nothing_is_asked_for(needs: GroupNeeds, hindered: dict[str, str]) -> None:
    assert {"a:0:0": "a node with 8 GPUs", "b:0:0": "a node with 1 GPU"} == of(needs, LARGE, SMALL)
    hindered["a node with 8 GPUs"] = "too large"
    assert {"a:0:0": "a node with 8 GPUs", "b:0:0": "too large"} == of(needs, SMALL, LARGE)
    assert {"b:0:0": "a node with 1 GPU"} == of(needs, SMALL)
    stands = Lack("g", ("a", 0), why="it stands elsewhere")
    assert {"a:0:0": "it stands elsewhere", "b:0:0": "it stands elsewhere"} == of(needs, stands, SMALL)
    assert {} == of(needs)


def test_nodes_that_came_for_a_part_and_left_are_asked_for_less_and_less_often(
    needs: GroupNeeds, clock: SimpleNamespace
) -> None:
    for wait in (60, 120, 240):
        assert "a node with 1 GPU" == of(needs, SMALL, LARGE)["b:0:0"]
        needs.seen(GROUP, {"a:0:0", "b:0:0"}, {})
        needs.seen(GROUP, {"a:0:0"}, {"b:0:0": COME, "a:0:0": Asked(State.ASKED)})
        needs.seen(GROUP, {"a:0:0"}, {})
        assert {"a:0:0": "a node with 8 GPUs"} == of(needs, LARGE)
        needs.seen(GROUP, {"a:0:0", "b:0:0"}, {})  # it has left, unused
        for now in (0, wait - 1):
            clock.now += now
            [why] = {*of(needs, LARGE, SMALL).values()}
            assert "nodes that came for a part of its group left before the others came" == why
        needs.seen(GROUP, {"a:0:0", "b:0:0"}, {})
        clock.now += 1
    needs.keep({"g"})
    needs.seen(GROUP, {"a:0:0"}, {"b:0:0": COME})
    needs.keep(())  # it is placed
    needs.seen(GROUP, {"b:0:0"}, {})
    assert {"b:0:0": "a node with 1 GPU"} == of(needs, SMALL)


def test_room_that_comes_and_goes_without_a_node_and_nodes_of_others_do_not_count(needs: GroupNeeds) -> None:
    for _ in range(3):
        needs.seen(GROUP, {"a:0:0", "b:0:0"}, {"b:0:0": COME, "other:0:0": COME})
        needs.seen(GROUP, {"a:0:0"}, {"other:0:0": COME, "b:0:0": Asked(State.ASKED)})
    needs.seen(GROUP, {"other:0:0", "b:0:0"}, {})
    assert {"b:0:0": "a node with 1 GPU"} == of(needs, SMALL)
