"""When Ray's books are read for plans, and how far they are believed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from placement.core.needs import Needs
from placement.core.request import Request
from placement.core.snapshot import NEAR_LABELS
from placement.runtime import groups, observed
from placement.runtime.discovery import NodeInfo
from placement.runtime.fleet import VIEW_LAG_SECONDS, Fleet
from placement.runtime.observed import BOOKS_SECONDS, LOCATED_SECONDS, ObservedCluster
from placement.runtime.state import ServiceState

NODE = NodeInfo("n", "n", "n", gpu_count=4)


@dataclass
class World:
    """A clock, and Ray's books.

    Attributes:
        takes: how long reading them takes.
        read: how often they were.
    """

    now: float = 1000.0
    takes: float = 0.0
    read: int = 0
    free: float = 4.0
    state: ServiceState = field(default_factory=ServiceState)

    def __post_init__(self) -> None:
        self.fleet = Fleet(lambda info: None, self.state.holdings, "placement:t:")
        self.cluster = ObservedCluster(self.state, self.fleet, NEAR_LABELS)

    def available(self) -> dict[str, dict[str, float]]:
        self.read += 1
        self.now += self.takes
        return {"n": {"GPU": self.free}}

    def free_gpus(self) -> int:
        with self.state.lock:
            [node] = self.cluster.snapshot([NODE]).nodes
        return len(node.free)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    clock = SimpleNamespace(monotonic=lambda: made.now)
    monkeypatch.setattr(observed, "time", clock)
    monkeypatch.setattr("placement.runtime.fleet.time", clock)
    monkeypatch.setattr(groups, "available_resources", made.available)
    return made


def test_books_are_read_again_once_they_are_old_or_must_be_new(world: World) -> None:
    world.cluster.read(fresh=False)
    world.now += BOOKS_SECONDS / 2
    world.cluster.read(fresh=False)
    assert world.read == 1
    world.cluster.read()
    assert world.read == 2
    world.now += 2 * BOOKS_SECONDS
    world.cluster.read(fresh=False)
    assert world.read == 3


def test_no_more_than_a_tenth_of_the_time_goes_into_reading_books(world: World) -> None:
    world.takes = 0.5  # as on thousands of nodes
    end = world.now + 60
    while world.now < end:
        world.now += 0.01
        world.cluster.read(fresh=False)
    assert 0 < world.read * world.takes <= 6.5


def test_books_that_were_read_before_our_own_last_change_are_not_believed(world: World) -> None:
    world.cluster.read()
    world.free = 0.0
    assert world.free_gpus() == 4
    world.cluster.read()
    world.now += VIEW_LAG_SECONDS / 2
    world.fleet.note_change(["n"])  # what another user held there is known to be free now
    world.now += 2 * VIEW_LAG_SECONDS  # these books are older than the change all the same
    assert world.free_gpus() == 4
    world.cluster.read()
    assert world.free_gpus() == 0


def test_where_gpus_are_named_nodes_are_looked_at_for_which_others_hold(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, looked = {1}, 0

    def locate(nodes: Sequence[NodeInfo]) -> None:
        nonlocal looked
        looked += len(nodes)
        world.fleet.foreign["n"] = frozenset(held)
        world.fleet.located["n"] = world.now

    def is_free(gpu: int) -> bool:
        world.cluster.read()
        with world.state.lock:
            snapshot = world.cluster.snapshot([NODE])
        if world.cluster.locate(snapshot, [Request("d", (0,), Needs(1, named=(gpu,)))]):
            with world.state.lock:
                snapshot = world.cluster.snapshot([NODE])
        return gpu in snapshot.node("n").free

    monkeypatch.setattr(world.fleet, "locate", locate)
    monkeypatch.setattr(world.cluster, "nodes_lately", lambda: [NODE])
    world.free = 3.0
    assert is_free(2) and not looked, "as far as the books tell, it is free"
    assert is_free(0) and looked == 1, "by the books it would be the lowest that others hold"
    assert not is_free(1) and looked == 1, "that is known by now"
    held, world.free, world.now = {0}, 3.0, world.now + 1
    assert not is_free(1) and looked == 1, "they hold as many as before, and moved lately"
    world.now += LOCATED_SECONDS
    assert is_free(1) and looked == 2
    held, world.free, world.now = {1, 2}, 2.0, world.now + 1
    assert not is_free(1) and looked == 3, "they hold more now"


def test_only_what_changed_lately_lags(world: World) -> None:
    world.fleet.note_change(["a", "b"])
    world.now += 1
    world.fleet.note_change(["c", "a"])
    assert world.fleet.lagging(0.5) == {"c", "a"}
    assert world.fleet.lagging(1.5) == {"a", "b", "c"}
    assert world.fleet.lagging(0.5, read_at=world.now + 0.5) == set()


def test_others_plan_while_books_are_read(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.cluster.read()
    world.now += 1
    reads, planned = threading.Event(), threading.Event()

    def slowly() -> dict[str, dict[str, float]]:
        reads.set()
        assert planned.wait(10)
        return world.available()

    monkeypatch.setattr(groups, "available_resources", slowly)
    reader = threading.Thread(target=world.cluster.read)
    reader.start()
    assert reads.wait(10)
    assert world.free_gpus() == 4
    planned.set()
    reader.join()
    assert world.read == 2
