"""The real service on a make-believe Ray, in more trouble: a store that fails again and again, nodes that drain, and
calls from several threads at once."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from placement.errors import DeploymentConflict, ReservationFailed, UnknownDeployment, Unplaceable
from placement.runtime import clock
from placement.runtime.claims import Claim
from placement.runtime.clock import Clock
from placement.runtime.discovery import NodeInfo
from placement.runtime.groups import LiveGroup
from placement.runtime.orders import Refusal
from placement.runtime.results import NodeAssignment
from tests.properties import test_service
from tests.properties.test_service import (
    DirectService,
    Fleet,
    Group,
    Ray,
    Service,
    StoreFailed,
)
from tests.rules import CALLS, NAMES

EXAMPLES = int(os.environ.get("ORACLE_EXAMPLES", "0"))
WHEN = st.sampled_from(("before", "after"))


@dataclass
class Weak(Ray):
    """A Ray whose store fails several times in a row, and whose nodes may drain.

    Attributes:
        failures: how the next writes of a record fail.
        draining: nodes that Ray is about to take away.
        known: which of them the service knows of.
    """

    failures: list[str] = field(default_factory=list)
    draining: set[str] = field(default_factory=set)
    known: Callable[[], frozenset[str]] = frozenset

    @contextmanager
    def _write(self, key: bytes) -> Iterator[None]:
        if key.startswith((b"deployment/", b"ended/")) and self.failures:
            self.store_fails = self.failures.pop(0)
        with super()._write(key):
            yield


class Watchful(Fleet):
    """Node actors that know of no reason to be asked for anything on a node that drains."""

    def reserve(
        self, claim: Claim, known: Iterable[NodeInfo], create: Any = None
    ) -> tuple[list[tuple[str, NodeAssignment]], list[Refusal]]:
        assert isinstance(self._ray, Weak)
        for part in claim.replicas:
            assert part.node_id not in self._ray.known(), "placed on a node that drains"
        return super().reserve(claim, known, create)


class Trouble(Service):
    """The same rules, and these."""

    ray: Weak

    @initialize(nodes=st.integers(1, 4))
    def begin(self, nodes: int) -> None:
        self.patches: list[Any] = [
            mock.patch.object(test_service, "Ray", Weak),
            mock.patch.object(test_service, "Fleet", Watchful),
            mock.patch.object(clock, "draining_nodes", lambda: frozenset(self.ray.draining)),
        ]
        for patch in self.patches[:2]:
            patch.__enter__()
        super().begin(nodes)
        self.patches[2].__enter__()  # over the one that begin() has put there
        self.ray.known = lambda: self.service.cluster.draining

    def teardown(self) -> None:
        if not hasattr(self, "patched"):
            return
        self.ray.failures.clear()
        self.ray.draining.clear()
        self.patches.pop().__exit__(None, None, None)
        try:
            super().teardown()
        finally:
            for patch in self.patches[::-1]:
                patch.__exit__(None, None, None)

    def nothing_goes_wrong(self) -> bool:
        return super().nothing_goes_wrong() and not self.ray.failures

    def nothing_else_happens(self) -> bool:
        known = self.service.cluster.draining == self.ray.draining
        return super().nothing_else_happens() and known

    @rule(failures=st.lists(WHEN, min_size=2, max_size=6))
    def the_store_fails_several_times(self, failures: list[str]) -> None:
        self.ray.failures = failures

    @precondition(lambda self: self.ray.nodes - self.ray.draining)
    @rule(pick=st.integers(0, 9), noticed=st.booleans())
    def a_node_drains(self, pick: int, noticed: bool) -> None:
        nodes = sorted(self.ray.nodes - self.ray.draining)
        self.ray.draining.add(nodes[pick % len(nodes)])
        if noticed:
            self.time_passes()

    @precondition(lambda self: self.ray.draining)
    @rule(pick=st.integers(0, 9), ends=st.booleans())
    def a_node_drains_no_more(self, pick: int, ends: bool) -> None:
        """It is gone then, or stays after all."""
        node = sorted(self.ray.draining)[pick % len(self.ray.draining)]
        self.ray.draining.discard(node)
        if ends:
            self.ray.nodes.discard(node)

    def a_node_ends(self, pick: int) -> bool:
        ended = super().a_node_ends(pick)
        self.ray.draining &= self.ray.nodes
        return ended


TestTrouble = Trouble.TestCase
TestTrouble.settings = settings(max_examples=EXAMPLES or 60, stateful_step_count=30, deadline=None)


# -- threads -----------------------------------------------------------------------------------------


class Steady(dict[Any, Any]):
    """One that may change while somebody goes through it."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list(super().__iter__()))

    def values(self) -> Any:
        return list(super().values())

    def items(self) -> Any:
        return list(super().items())


@dataclass
class Shared(Weak):
    """A Ray that several threads use at a time."""

    groups: dict[str, Group] = field(default_factory=Steady)
    actors: dict[str, set[str]] = field(default_factory=Steady)
    store: dict[bytes, bytes] = field(default_factory=Steady)
    lock: Any = field(default_factory=threading.RLock)

    def rests(self, node: str) -> dict[int, int]:
        with self.lock:
            return super().rests(node)

    def egress_left(self, node: str) -> int:
        with self.lock:
            return super().egress_left(node)

    def available(self) -> dict[str, dict[str, float]]:
        with self.lock:
            return super().available()

    def infos(self) -> list[NodeInfo]:
        with self.lock:
            return super().infos()

    def live(self, wanted: Callable[[str], bool]) -> dict[str, LiveGroup]:
        with self.lock:
            return super().live(wanted)

    def take(
        self, group: Group, node: str, gpus: Sequence[int], share: int, units: int, *amounts: int
    ) -> list[int] | None:
        with self.lock:
            return super().take(group, node, gpus, share, units, *amounts)

    @contextmanager
    def _write(self, key: bytes) -> Iterator[None]:
        with self.lock, super()._write(key):
            yield


Act = tuple[str, Any]
CALLED = st.tuples(st.just("call"), CALLS)
ACTS: st.SearchStrategy[Act] = st.one_of(
    CALLED,
    CALLED,
    CALLED,
    st.tuples(st.just("plan"), CALLS),
    st.tuples(st.sampled_from(("get", "status", "look")), NAMES),
)
SCRIPTS = st.lists(st.lists(ACTS, min_size=3, max_size=10), min_size=2, max_size=3)


def act(service: DirectService, own: Clock, what: str, about: Any) -> None:
    """One call, answered or honestly refused."""
    try:
        if what == "look":
            own.look()
        elif what == "status":
            assert {one["name"] for one in service.queries.status()["deployments"]} <= {"a", "b", "c"}
        elif what == "get":
            service.get(about)
        elif what == "plan" and about.method != "release":
            planned = service.plan(about.argument())
            assert {one.replica_index for one in planned.assignments} <= set(
                range(dict(about.fields)["replicas"])
            )
        elif about.method == "release":
            assert service.release(about.name) >= 0
        else:
            result = getattr(service, about.method)(about.argument())
            placed = {one.replica_index for one in result.assignments}
            assert placed | set(result.pending) == set(range(dict(about.fields)["replicas"]))
    except (Unplaceable, ReservationFailed, DeploymentConflict, UnknownDeployment, StoreFailed):
        pass


@settings(
    max_examples=EXAMPLES or 60, deadline=None, phases=[Phase.reuse, Phase.generate]
)  # none is the same twice
@given(scripts=SCRIPTS, nodes=st.integers(1, 3), failures=st.lists(WHEN, max_size=2), drains=st.booleans())
def test_calls_from_several_threads_leave_the_books_right(
    scripts: list[list[Act]], nodes: int, failures: list[str], drains: bool
) -> None:
    world = Trouble()
    errors: list[BaseException] = []
    at_once = threading.Barrier(len(scripts))

    def run(script: list[Act]) -> None:
        at_once.wait()
        try:
            for what, about in script:
                act(world.service, world.clock, what, about)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(script,), daemon=True) for script in scripts]
    interval = sys.getswitchinterval()
    with mock.patch.object(sys.modules[__name__], "Weak", Shared):
        world.begin(nodes)
    try:
        world.ray.draining = {"n0"} if drains else set()
        world.time_passes()  # it is noticed
        world.ray.failures = failures
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
        sys.setswitchinterval(interval)
        assert not any(thread.is_alive() for thread in threads), "they wait for each other"
        if errors:
            raise errors[0]
        world.ray.failures.clear()
        world.time_passes()
        world.the_books_are_right()
    finally:
        sys.setswitchinterval(interval)
        world.teardown()
