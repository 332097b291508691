"""The real service on a make-believe Ray: whatever is asked, refused, killed or lost, the books are right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from placement.core.lifecycle import HOLDING, State
from placement.core.topology import Topology
from placement.errors import DeploymentConflict, ReservationFailed, UnknownDeployment, Unplaceable
from placement.runtime import faults, groups, keeper, ledger, recovery, service
from placement.runtime.books import Claim
from placement.runtime.discovery import NodeInfo
from placement.runtime.fleet import Refusal
from placement.runtime.keeper import Keeper
from placement.runtime.reservation import Machine
from placement.runtime.results import NodeAssignment
from placement.runtime.service import DeploymentPlacementActor

NAMES = st.sampled_from(("a", "b", "c"))
GPUS = 4
STEPS = (
    "service.planned", "service.reserved", "service.kept", "service.releasing", "service.given_back",
)  # fmt: skip


class Killed(BaseException):
    """The service's process ends here."""


@dataclass
class Group:
    """A placement group; ``id.hex()`` as Ray's has it."""

    name: str
    held: dict[str, list[int]]
    number: int

    @property
    def id(self) -> Any:
        return SimpleNamespace(hex=lambda: f"{self.number:036x}")


@dataclass
class Ray:
    """What is outside of the service: nodes, groups, and the store."""

    nodes: set[str] = field(default_factory=set)
    groups: dict[str, Group] = field(default_factory=dict)
    store: dict[bytes, bytes] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    refusals: int = 0
    kill_at: str = ""

    def free(self, node: str) -> set[int]:
        taken = {gpu for group in self.groups.values() for gpu in group.held.get(node, ())}
        return set(range(GPUS)) - taken

    def group(self, text: str) -> Group:
        return self.groups.get(text) or Group("gone", {}, int(text, 16))

    def infos(self) -> list[NodeInfo]:
        return [NodeInfo(node, node, node, GPUS) for node in sorted(self.nodes)]

    def point(self, name: str) -> None:
        if name == self.kill_at:
            self.kill_at = ""
            raise Killed


class Fleet:
    """The node actors, as the service sees them."""

    changed_at = float("-inf")
    agent_died = False

    def __init__(self, ray: Ray, prefix: str) -> None:
        self._ray, self._prefix = ray, prefix
        self.foreign: dict[str, frozenset[int]] = {}
        self.facts: dict[str, Any] = {}

    def settling(self) -> frozenset[str]:
        return frozenset()

    def machine(self, info: NodeInfo) -> Machine:
        return Machine(SHAPE)

    def __getattr__(self, name: str) -> Callable[..., None]:
        assert name in ("meet", "settle", "forget_all_but", "note_change"), name
        return lambda *args, **kwargs: None

    def reserve(self, claim: Claim) -> tuple[list[tuple[str, NodeAssignment]], list[Refusal]]:
        made: dict[int, Group] = {}
        reserved = []
        for part in claim.replicas:
            if self._ray.refusals or part.node_id not in self._ray.nodes:
                self._ray.refusals = max(0, self._ray.refusals - 1)
                return reserved, [Refusal(part.node_id, part.node_id, 1, "another took it")]
            gpus = sorted(self._ray.free(part.node_id))[: len(part.gpus)]
            assert len(gpus) == len(part.gpus), "the plan was made with GPUs that are not free"
            number = next(self._ray.numbers)
            order = f"{self._prefix}{claim.deployment.name}:{part.replica_index}:x"
            group = made.setdefault(part.replica_index, Group(f"{order}:1", {}, number))
            group.held[part.node_id] = gpus
            self._ray.groups[group.id.hex()] = group
            reserved.append(
                (
                    order,
                    NodeAssignment(
                        part.replica_index, part.node_id, gpus, group, list(range(len(gpus))),
                        node_name=part.node_id, ranks=list(part.ranks) or list(range(len(gpus))),
                    ),
                )
            )  # fmt: skip
        return reserved, []

    def give_back(self, reserved: Any) -> None:
        for _, assignment in reserved:
            self._ray.groups.pop(assignment.placement_group.id.hex(), None)


SHAPE = Topology.unknown(GPUS)


@contextmanager
def make_believe(ray: Ray) -> Iterator[None]:
    """Puts ``ray`` in the place of Ray."""
    kv = SimpleNamespace(
        _internal_kv_get=lambda key, namespace: ray.store.get(key),
        _internal_kv_put=lambda key, value, overwrite, namespace: ray.store.__setitem__(key, value),
        _internal_kv_del=lambda key, namespace: ray.store.pop(key, None),
        _internal_kv_list=lambda prefix, namespace: [key for key in ray.store if key.startswith(prefix)],
    )
    patches = [
        mock.patch.object(ledger, "internal_kv", kv),
        mock.patch.object(faults, "point", ray.point),
        mock.patch.object(service, "live_nodes", ray.infos),
        mock.patch.object(recovery, "live_nodes", ray.infos),
        mock.patch.object(service, "Fleet", lambda make, holdings, prefix: Fleet(ray, prefix)),
        mock.patch.object(service, "Keeper", lambda one: SimpleNamespace(start=lambda: None)),
        mock.patch.object(keeper, "live_node_ids", lambda: frozenset(ray.nodes)),
        mock.patch.object(keeper, "draining_nodes", frozenset),
        mock.patch.object(
            groups, "available_resources", lambda: {n: {"GPU": len(ray.free(n))} for n in ray.nodes}
        ),
        mock.patch.object(
            groups, "group_from_hex", lambda text: ray.groups.get(text) or Group("gone", {}, int(text, 16))
        ),
        mock.patch.object(
            groups, "remove_group", lambda group, ready=False: ray.groups.pop(group.id.hex(), None)
        ),
        mock.patch.object(
            groups,
            "live_groups",
            lambda wanted: {
                text: {"name": g.name, "bundles_to_node_id": dict(enumerate(g.held))}
                for text, g in ray.groups.items()
                if wanted(g.name)
            },
        ),
    ]
    with contextmanager_stack(patches):
        yield


@contextmanager
def contextmanager_stack(patches: list[Any]) -> Iterator[None]:
    from contextlib import ExitStack

    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


class Service(RuleBasedStateMachine):
    """Anything may happen, in any order."""

    @initialize(nodes=st.integers(1, 4))
    def begin(self, nodes: int) -> None:
        self.ray = Ray(nodes={f"n{i}" for i in range(nodes)})
        self.foreign = self.ray.groups.setdefault("f", Group("placement:someone-else:a:0:x:1", {}, 0))
        self.born = nodes
        self.patched = make_believe(self.ray)
        self.patched.__enter__()
        self.restart()

    def teardown(self) -> None:
        if not hasattr(self, "patched"):
            return
        try:  # in the end there is room for all, and all of it is placed
            self.ray.refusals, self.ray.kill_at = 0, ""
            self.ray.nodes |= {f"spare{i}" for i in range(12)}
            for _ in range(2):
                self.keeper._tried_at = float("-inf")
                self.keeper.look()
            for name, standing in self.service._books.standing.items():
                assert not standing.missing(), (name, standing.reasons)
                assert set(standing.states.values()) <= {State.PLACED}
            self.service.release_all()
            assert list(self.ray.groups.values()) == [self.foreign]
            assert list(self.ray.store) == [b"token"]
        finally:
            self.patched.__exit__(None, None, None)

    def call(self, ask: Callable[[], Any]) -> None:
        """An answer, an honest refusal, or a death; the dead service is started anew and asked again, as Ray does."""
        for _ in range(3):
            try:
                ask()
                return
            except (Unplaceable, ReservationFailed, DeploymentConflict, UnknownDeployment):
                return
            except Killed:
                self.restart()

    @rule(
        name=NAMES, gpus=st.sampled_from((1, 1, 2, 4)), stages=st.integers(1, 2), replicas=st.integers(1, 3)
    )
    def place(self, name: str, gpus: int, stages: int, replicas: int) -> None:
        wanted = {
            "name": name, "model": "m", "tensor_parallel": gpus, "pipeline_parallel": stages, "replicas": replicas,
        }  # fmt: skip
        self.call(lambda: self.service.place(wanted))

    @rule(name=NAMES, gpus=st.sampled_from((1, 2)), replicas=st.integers(1, 4))
    def apply(self, name: str, gpus: int, replicas: int) -> None:
        self.call(
            lambda: self.service.apply({"name": name, "model": "m", "gpus": gpus, "replicas": replicas})
        )

    @rule(name=NAMES)
    def release(self, name: str) -> None:
        self.call(lambda: self.service.release(name))

    @rule(name=NAMES)
    def release_twice(self, name: str) -> None:
        self.release(name)
        self.release(name)

    @rule(pick=st.integers(0, 9))
    def a_node_dies(self, pick: int) -> None:
        if self.ray.nodes:
            self.ray.nodes.remove(sorted(self.ray.nodes)[pick % len(self.ray.nodes)])

    @rule()
    def a_node_comes(self) -> None:
        self.born += 1
        self.ray.nodes.add(f"n{self.born}")

    @rule(pick=st.integers(0, 9))
    def somebody_removes_a_group_of_ours(self, pick: int) -> None:
        ours = sorted(set(self.ray.groups) - {"f"})
        if ours:
            del self.ray.groups[ours[pick % len(ours)]]
            self.restart()  # it is noticed when the service starts

    @rule()
    def the_keeper_looks(self) -> None:
        self.keeper._tried_at = float("-inf")
        try:
            self.keeper.look()
        except Killed:
            self.restart()

    @rule(times=st.integers(1, 7))
    def nodes_refuse(self, times: int) -> None:
        self.ray.refusals = times

    @rule(step=st.sampled_from(STEPS))
    def the_service_will_be_killed(self, step: str) -> None:
        self.ray.kill_at = step

    @rule()
    def restart(self) -> None:
        self.service = DeploymentPlacementActor(lambda info: None)
        self.keeper = Keeper(self.service)

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "service"):
            return
        recorded = {record.name: record.content for record in ledger.records()}
        standing = self.service._books.standing
        assert set(recorded) == set(standing)
        known = set()
        for name, one in standing.items():
            content = recorded[name]
            assert content is not None and not content["releasing"]
            assert content["deployment"]["name"] == name
            there = {replica["replica_index"] for replica in content["replicas"]}
            assert there == set(one.replicas) == {i for i, state in one.states.items() if state in HOLDING}
            assert set(one.states) <= set(range(one.deployment.replicas))
            assert set(one.missing()) == set(one.reasons)
            known |= {part.placement_group.id.hex() for part in one.assignments()}
        assert set(self.ray.groups) - {"f"} <= known, "a group that nobody knows of"
        for node in self.ray.nodes:
            held = [gpu for group in self.ray.groups.values() for gpu in group.held.get(node, ())]
            assert len(held) == len(set(held)), "a GPU is held twice"


TestService = Service.TestCase
TestService.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
