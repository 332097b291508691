"""The real service on a make-believe Ray: whatever is asked, refused, killed or lost, the books are right."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from placement.core.lifecycle import HOLDING, State
from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.core.request import Strategy
from placement.core.shares import Portions, give
from placement.core.topology import Topology
from placement.errors import (
    DeploymentConflict,
    LeaseExpired,
    PartlyApplied,
    ReservationFailed,
    UnknownDeployment,
    Unplaceable,
)
from placement.runtime import (
    asking,
    clock,
    controller,
    discovery,
    faults,
    fleet,
    groups,
    ledger,
    lifetimes,
    observed,
    queue,
    releases,
)
from placement.runtime.asking import Asked
from placement.runtime.claims import Claim
from placement.runtime.clock import Clock
from placement.runtime.controller import Controller
from placement.runtime.declarations import parse
from placement.runtime.deployment_state import DeploymentState
from placement.runtime.discovery import NodeInfo
from placement.runtime.groups import LiveGroup
from placement.runtime.needs import Need
from placement.runtime.orders import GpuHardware, Holding, Refusal, order_of_group
from placement.runtime.owners import owner_of
from placement.runtime.queue import Ticket
from placement.runtime.results import NodeAssignment, PlacementResult
from placement.wire.deployment import Deployment
from placement.wire.node_types import NodeType
from placement.wire.plans import ExplainedPlan, PlacementPlan
from tests.properties import consistent
from tests.rules import ASKED, CALLS, NAMES, SHAPES, TERMS, Call, Rules

GPUS = 4
EGRESS = 8
CPUS = 8
MEMORY = 1 << 30
FOREIGN = "placement:someone-else:a:0:x:1"
"""Another Ray user's group, with a name that looks like ours."""


class Killed(BaseException):
    """The service's process ends here."""


class StoreFailed(Exception):
    """The store did not answer; whether it has written is not known."""


@dataclass
class Group:
    """A placement group; ``id.hex()`` as Ray's has it.

    Attributes:
        held: node -> GPU -> thousandths.
        egress: node -> units.
        cpus, memory: node -> thousandths of a CPU, bytes.
        job: whose process created it, and with which it ends; nobody's, if empty.
    """

    name: str
    number: int
    held: dict[str, dict[int, int]] = field(default_factory=dict)
    egress: Counter[str] = field(default_factory=Counter)
    cpus: Counter[str] = field(default_factory=Counter)
    memory: Counter[str] = field(default_factory=Counter)
    job: str = ""

    @property
    def id(self) -> Any:
        return SimpleNamespace(hex=lambda: f"{self.number:036x}")


@dataclass
class Ray:
    """What is outside of the service: nodes, groups, and the store.

    Attributes:
        actors: node -> the orders that its actor takes to be reserved there.
        refusals: how many reservations fail from now on.
        late: reservations that are carried out after the service has stopped waiting for them.
        orphans_suspected: one of them has been by now.
        store_fails: the next write of a record fails: ``"before"`` or ``"after"`` it was written.
        meanwhile: what happens in the middle of the next reservation.
        under_way: how many reservations are.
        ended: jobs that are no more.
        now: seconds since 1970.
    """

    nodes: set[str] = field(default_factory=set)
    groups: dict[str, Group] = field(default_factory=dict)
    actors: dict[str, set[str]] = field(default_factory=dict)
    store: dict[bytes, bytes] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    refusals: int = 0
    lates: int = 0
    late: list[Callable[[], None]] = field(default_factory=list)
    orphans_suspected: bool = False
    meanwhile: list[Callable[[], object]] = field(default_factory=list)
    under_way: int = 0
    kill_at: str = ""
    store_fails: str = ""
    ended: set[str] = field(default_factory=set)
    now: float = 1_000_000.0
    ticks: Iterator[int] = field(default_factory=itertools.count)

    def time(self) -> float:
        """Grows with each call, so that it can be seen what was first."""
        return self.now + next(self.ticks) / 1024

    def end_job(self, job: str) -> None:
        """A job ends, and its groups with it."""
        self.ended.add(job)
        self.groups = type(self.groups)({text: one for text, one in self.groups.items() if one.job != job})

    def has_ended(self, owner: Mapping[str, str]) -> bool:
        return owner.get("job") in self.ended

    def put(self, key: bytes, value: bytes, namespace: bytes, overwrite: bool = True) -> None:
        with self._write(key):
            self.store[key] = value

    def delete(self, key: bytes, namespace: bytes) -> None:
        with self._write(key):
            self.store.pop(key, None)

    @contextmanager
    def _write(self, key: bytes) -> Iterator[None]:
        fails = ""
        if key.startswith((b"deployment/", b"ended/")):
            fails, self.store_fails = self.store_fails, ""
        if fails == "before":
            raise StoreFailed
        yield
        if fails == "after":
            raise StoreFailed

    def rests(self, node: str) -> dict[int, int]:
        """GPU -> thousandths free."""
        rests = dict.fromkeys(range(GPUS), WHOLE)
        for group in self.groups.values():
            for gpu, share in group.held.get(node, {}).items():
                rests[gpu] -= share
        assert min(rests.values()) >= 0, "a GPU is held twice"
        return rests

    def egress_left(self, node: str) -> int:
        return EGRESS - sum(group.egress[node] for group in self.groups.values())

    def cpus_left(self, node: str) -> tuple[int, int]:
        """Thousandths of a CPU, and bytes of memory."""
        groups = self.groups.values()
        return CPUS * 1000 - sum(one.cpus[node] for one in groups), MEMORY - sum(
            one.memory[node] for one in groups
        )

    def available(self) -> dict[str, dict[str, float]]:
        return {node: self._available_on(node) for node in self.nodes}

    def _available_on(self, node: str) -> dict[str, float]:
        cpu_milli, memory = self.cpus_left(node)
        return {
            "GPU": sum(self.rests(node).values()) / WHOLE,
            "egress": float(self.egress_left(node)),
            "CPU": cpu_milli / 1000,
            "memory": float(memory),
        }

    def group(self, text: str) -> Group:
        return self.groups.get(text) or Group("gone", int(text, 16))

    def infos(self) -> list[NodeInfo]:
        has: dict[str, Any] = {"egress": {"egress": EGRESS}, "cpu_milli": CPUS * 1000, "memory_bytes": MEMORY}
        return [NodeInfo(node, node, node, GPUS, **has) for node in sorted(self.nodes)]

    def live(self, wanted: Callable[[str], bool]) -> dict[str, LiveGroup]:
        return {
            text: LiveGroup(group.name, frozenset(group.held))
            for text, group in self.groups.items()
            if wanted(group.name)
        }

    def point(self, name: str) -> None:
        if name == self.kill_at:
            self.kill_at = ""
            raise Killed

    def take(
        self,
        group: Group,
        node: str,
        gpus: Sequence[int],
        share: int,
        units: int,
        cpu_milli: int = 0,
        memory: int = 0,
    ) -> list[int] | None:
        """Has a group hold this on a node; what it got, or ``None`` if there is too little."""
        if node not in self.nodes or self.egress_left(node) < units:
            return None
        cpus_left, memory_left = self.cpus_left(node)
        if cpus_left < cpu_milli or memory_left < memory:
            return None
        rests = self.rests(node)
        if share < WHOLE:
            roomy = [gpu for gpu in (*gpus, *rests) if rests[gpu] >= share]  # as planned, or elsewhere
            got = roomy[:1]
        else:
            got = [gpu for gpu, rest in rests.items() if rest == WHOLE][: len(gpus)]
        if len(got) < len(gpus):
            return None
        group.held.setdefault(node, {}).update(dict.fromkeys(got, share))
        group.egress[node] += units
        group.cpus[node] += cpu_milli
        group.memory[node] += memory
        self.groups[group.id.hex()] = group
        return got

    def take_shares(
        self, group: Group, node: str, amounts: Sequence[int], planned: Collection[int]
    ) -> list[tuple[int, ...]] | None:
        """The same for bundles that are reserved at once: the GPUs of each; as planned, or elsewhere."""
        if node not in self.nodes:
            return None
        rests = self.rests(node)
        shared = {gpu: rest for gpu, rest in rests.items() if rest < WHOLE}
        free = [gpu for gpu, rest in rests.items() if rest == WHOLE]
        given = give(amounts, shared, {*free} & {*planned}) or give(amounts, shared, free)
        if given is None:
            return None
        group.held.setdefault(node, {}).update(Portions(tuple(amounts), (), (), given).taken)
        self.groups[group.id.hex()] = group
        return list(given)


class Fleet(fleet.Fleet):
    """The node actors, as the service sees them."""

    def __init__(self, ray: Ray, prefix: str, holdings: Callable[[str], dict[str, Holding]]) -> None:
        super().__init__(nothing, holdings, prefix)
        self._ray = ray
        self.inventory: Any = SimpleNamespace(
            facts={},
            refresh=nothing,
            hardware=lambda info: GpuHardware(SHAPE),
            unknown_nodes=lambda nodes: frozenset(),
            pop_changed=frozenset,
        )
        self.agents: Any = SimpleNamespace(
            orphans_suspected=self._suspected,
            suspect_orphans=nothing,
            rediscover=lambda nodes: [],
            idle=lambda seconds: [],
            suspect=frozenset,
            forget=self._forgotten,
        )

    def lagging(self, lag_seconds: float = 0.0, read_at: float | None = None) -> frozenset[str]:
        return frozenset()

    def catch_up(self, since: float) -> bool:
        return False

    def restore(self, nodes: Sequence[NodeInfo]) -> None:
        for node in self._ray.actors:
            self._ray.actors[node] = set(self._holdings(node))

    def forget_all_but(self, alive: Collection[str]) -> None:
        self._ray.actors = {node: held for node, held in self._ray.actors.items() if node in alive}

    def _forgotten(self, order: str, nodes: Iterable[str]) -> None:
        for node in nodes & self._ray.actors.keys():
            self._ray.actors[node].discard(order)

    def _suspected(self) -> bool:
        suspected, self._ray.orphans_suspected = self._ray.orphans_suspected, False
        return suspected

    def reserve(
        self, claim: Claim, known: Iterable[NodeInfo], create: Any = None
    ) -> tuple[list[tuple[str, NodeAssignment]], list[Refusal]]:
        undisturbed = not self._ray.meanwhile and not self._ray.under_way
        self._ray.under_way += 1
        try:
            return self._reserve(claim, undisturbed, create)
        finally:
            self._ray.under_way -= 1

    def _reserve(
        self, claim: Claim, undisturbed: bool, create: Any
    ) -> tuple[list[tuple[str, NodeAssignment]], list[Refusal]]:
        ray = self._ray
        made: dict[int, Group] = {}
        reserved: list[tuple[str, NodeAssignment]] = []
        for part in claim.replicas:
            if ray.meanwhile:
                ray.meanwhile.pop()()
            group = made.setdefault(part.replica_index, self._new(claim, part.replica_index))
            units = claim.deployment.egress_per_replica
            if ray.refusals or part.node_id not in ray.nodes:
                ray.refusals = max(0, ray.refusals - 1)
                return reserved, [Refusal(part.node_id, part.node_id, 1, "another took it")]
            if ray.lates:
                ray.lates -= 1
                late = Group(group.name, next(ray.numbers))
                ray.late.append(partial(self._late, late, part, units))
                return reserved, [Refusal(part.node_id, part.node_id, 1, "no answer", full=True, at_most=0)]
            if create is not None:
                faults.point("service.lent")
                group.job = create(group.name, [], [part.node_id]) or ""
                if not group.job:
                    return reserved, [Refusal(part.node_id, part.node_id, 1, "its caller made none")]
            amounts = part.cpu_milli, part.memory_bytes
            shares: list[float] = []
            if part.shares:
                here = amounts_on(claim.deployment, part)
                given = ray.take_shares(group, part.node_id, here, part.gpus)
                got = None if given is None else [gpu for gpus in given for gpu in gpus]
                shares = [min(one, WHOLE) / WHOLE for one in here for _ in range(max(1, one // WHOLE))]
            else:
                got = ray.take(group, part.node_id, part.gpus, part.share, units, *amounts)
            if create is not None:
                faults.point("service.group_created")
            if got is None:
                assert not undisturbed, "the plan was made with room that is not there"
                return reserved, [Refusal(part.node_id, part.node_id, 1, "too few", full=True, at_most=0)]
            assignment = NodeAssignment(
                part.replica_index, part.node_id, got, group, list(range(len(got) or 1)),
                node_name=part.node_id, ranks=list(part.ranks),
                share=part.share / WHOLE if len({*shares}) != 1 else shares[0],
                shares=shares if len({*shares}) > 1 else [],
                egress_resource=part.egress_resource, egress_units=units,
                cpus=part.cpu_milli / 1000, memory_bytes=part.memory_bytes,
            )  # fmt: skip
            order = order_of_group(group.name)
            reserved.append(self._note_reserved(order, assignment))
            if got:
                ray.actors.setdefault(part.node_id, set(self._holdings(part.node_id))).add(order)
        return reserved, []

    def _give_back(self, reserved: Any) -> None:
        for order, assignment in reserved:
            self._ray.groups.pop(assignment.placement_group.id.hex(), None)
            if assignment.node in self._ray.actors:
                self._ray.actors[assignment.node].discard(order)
            else:
                self.note_removed(order, [assignment.node])

    def _new(self, claim: Claim, index: int) -> Group:
        number = next(self._ray.numbers)
        return Group(f"{self._prefix}{claim.deployment.name}:{index}:x{number}:1", number)

    def _late(self, group: Group, part: Any, units: int) -> None:
        amounts = part.cpu_milli, part.memory_bytes
        if part.shares:  # which bundles they are does not matter any more
            self._ray.take_shares(group, part.node_id, part.shares, part.gpus)
            self._ray.orphans_suspected = True
            return
        self._ray.take(group, part.node_id, part.gpus, part.share, units, *amounts)
        self._ray.orphans_suspected = True


SHAPE = Topology.unknown(GPUS)

OTHERS = st.sampled_from(({}, {}, {"apart_from": ["a"]}, {"apart_from": ["b", "c"]}, {"near_to": ["b"]}))
DECLARED = st.builds(
    lambda name, shape, others, replicas, budget, terms: {
        "name": name, "model": "m", "replicas": replicas, "budget": {"requests_per_minute": budget},
        **shape, **terms,
        "constraints": {kind: [one for one in named if one != name] for kind, named in others.items()},
    },
    NAMES, SHAPES, OTHERS, st.integers(1, 3), st.integers(1, 2), TERMS,
)  # fmt: skip


def amounts_on(deployment: Deployment, part: PlannedReplica) -> list[int]:
    """Thousandths of a GPU, of each bundle on a part's node."""
    assert deployment.placement_group is not None
    of = deployment.placement_group.bundle_of_rank
    bundles = dict.fromkeys(of[rank] for rank in part.ranks or range(len(of)))
    return [round(deployment.placement_group.bundles[bundle]["GPU"] * WHOLE) for bundle in bundles]


def places(what: PlacementResult | PlacementPlan) -> tuple[Any, ...]:
    """Which replica is where, with how much; which GPUs these are, the node's actor decides."""
    on_gpus = [
        (a.replica_index, a.node, a.share, list(a.ranks) or list(range(len(a.gpus))))
        for a in what.assignments
        if a.gpus
    ]
    others = [
        (a.replica_index, a.node, a.egress_units, a.cpus, a.memory_bytes)
        for a in what.assignments
        if not a.gpus
    ]
    return what.deployment, on_gpus, others, sorted(what.pending)


def nothing(*args: Any, **more: Any) -> None:
    """Takes no time and changes nothing."""


class DirectService(Controller):
    """The controller, called as the service calls it, one call after the other."""

    def __init__(self, node_types: Sequence[NodeType] = ()) -> None:
        super().__init__(lambda info: None, node_types=node_types)

    def place(self, deployment: Any, caller: Any = None, lending: Any = None) -> PlacementResult:
        wanted = parse(deployment, None)
        return super().place(wanted, owner_of(wanted, caller), lending)

    def apply(self, deployment: Any, atomic: bool = False, caller: Any = None) -> PlacementResult:
        wanted = parse(deployment, None)
        return super().apply(wanted, atomic, owner_of(wanted, caller))

    def apply_all(self, deployments: Sequence[Any], atomic: bool = False) -> list[PlacementResult]:  # type: ignore[override]
        return super().apply_all([parse(one, None) for one in deployments], atomic)

    def plan(self, deployment: Any, constraints: Any = None, atomic: bool = False) -> PlacementPlan:
        return self.queries.plan_all([parse(deployment, constraints)], atomic)[0]

    def plan_all(self, deployments: Sequence[Any], atomic: bool = False) -> list[PlacementPlan]:
        return self.queries.plan_all([parse(one, None) for one in deployments], atomic)

    def explain_all(self, deployments: Sequence[Any]) -> list[ExplainedPlan]:
        return self.queries.explain_all([parse(one, None) for one in deployments])

    def get(self, name: str) -> PlacementResult:
        return self.queries.get(name).result()

    def events(self, name: str, since: int = 0) -> list[dict[str, Any]]:
        return [one.to_dict() for one in self.queries.events(name, since)]


@dataclass
class Borrower:
    """A caller that creates the groups itself, so many of them, and has gone then."""

    job: str
    left: int
    is_over: bool = False

    def create(self, name: str, bundles: list[dict[str, float]], nodes: list[str]) -> str | None:
        """Whose group it is; ``None`` if there is none."""
        self.left -= 1
        self.is_over = self.is_over or self.left < 0
        return None if self.is_over else self.job


class NoAutoscaler:
    """Nothing is asked."""

    version = 0

    def __init__(self, prefix: str) -> None:
        self.wanted: dict[str, Need | str] = {}

    def want(self, needs: Mapping[str, Need | str], known_nodes: Collection[str]) -> None:
        self.wanted = dict(needs)

    def poll(self) -> dict[str, Asked]:
        return {}

    def outlook(self, need: Need | str) -> Asked:
        return Asked(asking.State.NOT_ASKED, "the cluster has no autoscaler")

    def report(self) -> list[dict[str, Any]]:
        return []


class AtOnce(Executor):
    """Does what it is given before it returns."""

    def submit(self, do: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        do(*args, **more)
        done: Future[Any] = Future()
        done.set_result(None)
        return done


@contextmanager
def make_believe(ray: Ray) -> Iterator[None]:
    """Puts ``ray`` in the place of Ray."""
    kv = SimpleNamespace(
        kv_get=lambda key, namespace: ray.store.get(key),
        kv_put=ray.put,
        kv_delete=ray.delete,
        kv_keys=lambda prefix, namespace: [key for key in ray.store if key.startswith(prefix)],
        kv_all=lambda prefix, namespace: {k: v for k, v in ray.store.items() if k.startswith(prefix)},
    )
    with ExitStack() as stack:
        for where, name, instead in (
            (ledger, "ray_internals", kv),
            (faults, "point", ray.point),
            (discovery, "live_nodes", ray.infos),
            (controller, "Fleet", lambda make, holdings, prefix: Fleet(ray, prefix, holdings)),
            (controller, "Demand", NoAutoscaler),
            (observed, "BOOKS_SECONDS", -1.0),
            (clock, "live_node_ids", lambda: frozenset(ray.nodes)),
            (clock, "draining_nodes", frozenset),
            (groups, "available_resources", ray.available),
            (groups, "group_from_hex", ray.group),
            (groups, "remove_group", lambda group, ready=False: ray.groups.pop(group.id.hex(), None)),
            (groups, "live_groups", ray.live),
            (groups, "is_gone", lambda group_id: group_id not in ray.groups),
            (lifetimes, "has_ended", ray.has_ended),
            (queue, "has_ended", ray.has_ended),
            (clock, "has_ended", ray.has_ended),
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        yield


class Service(Rules):
    """The rules on a make-believe Ray, and what only there can be done at will."""

    @initialize(nodes=st.integers(1, 4))
    def begin(self, nodes: int) -> None:
        self.ray = Ray(nodes={f"n{i}" for i in range(nodes)})
        self.foreign = self.ray.groups.setdefault("f", Group(FOREIGN, 0))
        self.others: list[str] = []
        self.born = nodes
        self.caller_dies = False
        self.jobs = ["job-0", "job-1"]
        self.tickets: list[Ticket[PlacementResult]] = []
        self.patched = ExitStack()
        self.patched.enter_context(make_believe(self.ray))
        self.patched.enter_context(mock.patch.object(time, "time", self.ray.time))
        self.kill_the_service()

    def teardown(self) -> None:
        if not hasattr(self, "patched"):
            return
        try:  # in the end there is room for all, and all of it is placed
            self.ray.refusals, self.ray.lates, self.ray.kill_at, self.ray.store_fails = 0, 0, "", ""
            self.ray.meanwhile.clear()
            self.what_was_late_is_done()
            self.ray.nodes |= {f"spare{i}" for i in range(24)}
            for _ in range(2):
                self.time_passes()
            assert not self.tickets
            for name, standing in self.service.state.deployments.items():
                limits = standing.deployment.constraints
                if limits and limits.near_to:  # who is to be near another may wait for it for ever
                    continue
                if standing.given_up or standing.is_lease:
                    continue
                assert not standing.unfinished(), (name, standing.reasons)
                assert set(standing.states.values()) <= {State.PLACED}
            self.service.release_all()
            while self.others:
                self.another_user_ends()
            assert list(self.ray.groups.values()) == [self.foreign]
            with mock.patch.object(releases, "ENDED_SECONDS", -1.0):
                self.service.stop_idle_agents()
            assert (
                sorted(self.ray.store) == [b"event numbers", b"token"] and not self.service.actions.unwritten
            )
        finally:
            self.patched.close()

    def clients_send(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.send(call)

    def send(self, call: Call, in_the_middle: bool = False, **more: Any) -> None:
        """An answer, an honest refusal, or a death; the dead service is started anew and asked again, as Ray does."""
        if call.name in self.service.turns.names():
            return  # it would wait for its turn, and here nothing goes on beside it
        before = self.service.state.deployments.get(call.name)
        held = None if before is None else len(before.replicas)
        for _ in range(3):
            try:
                result = getattr(self.service, call.method)(call.argument(), **more)
            except (Unplaceable, ReservationFailed, DeploymentConflict):
                assert call.method != "release"
                return
            except LeaseExpired:
                assert more["lending"].is_over
                return
            except StoreFailed:
                return
            except UnknownDeployment:
                assert (call.method, held) == ("release", None)
                return
            except Killed:
                if in_the_middle:
                    raise  # what it is in the middle of is cut off, too
                self.kill_the_service()
                if self.caller_dies or "lending" in more:
                    self.caller_dies = False
                    return
            else:
                if call.method == "release":
                    # After a restart nobody can tell a call that was cut off from one that comes twice.
                    assert before is None or before.releasing or result == held
                else:
                    placed = {a.replica_index for a in result.assignments}
                    assert placed | set(result.pending) == set(range(dict(call.fields)["replicas"]))
                return

    def kill_at(self, step: str) -> None:
        self.ray.kill_at = step

    def kill_the_service(self) -> None:
        while True:
            try:
                self.service = DirectService()
                break
            except (StoreFailed, Killed):  # it is started anew, until it can take up what stood
                continue
        self.clock = Clock(self.service, AtOnce())
        self.tickets.clear()  # they are gone with it

    def a_node_ends(self, pick: int) -> bool:
        if not self.ray.nodes:
            return False
        self.ray.nodes.remove(sorted(self.ray.nodes)[pick % len(self.ray.nodes)])
        return True

    def a_node_begins(self) -> bool:
        self.born += 1
        self.ray.nodes.add(f"n{self.born}")
        return True

    def another_user_begins(self, gpus: int) -> bool:
        group = Group("", next(self.ray.numbers))
        for node in sorted(self.ray.nodes):
            if self.ray.take(group, node, range(gpus), WHOLE, 0):
                self.others.append(group.id.hex())
                return True
        return False

    def another_user_ends(self) -> bool:
        if not self.others:
            return False
        del self.ray.groups[self.others.pop(0)]
        return True

    def remove_a_group_of_ours(self, pick: int) -> bool:
        ours = sorted(set(self.ray.groups) - {"f", *self.others})
        if not ours:
            return False
        del self.ray.groups[ours[pick % len(ours)]]
        self.kill_the_service()  # it is noticed when the service starts
        return True

    def time_passes(self) -> None:
        self.clock._tried_with = None
        undisturbed = self.nothing_goes_wrong()
        try:
            self.clock.look()
        except StoreFailed:  # the clock notes it, and looks again
            undisturbed = False
        except Killed:
            self.kill_the_service()
            return
        for ticket in [one for one in self.tickets if one.outcome.done()]:
            self.service.queue.tickets.remove(ticket)
            self.tickets.remove(ticket)
            if ticket.outcome.exception() is None and (got := ticket.outcome.result()).pending:
                # Somebody has declared the same meanwhile, which waited: what stands is what place() returns.
                assert (
                    not got.assignments or len(got.assignments) + len(got.pending) == ticket.wanted.replicas
                )
                known = self.service.state.get(ticket.name)
                assert known is None or known.deployment == ticket.wanted
        if undisturbed:
            self.all_that_is_over_has_ended()

    def nothing_goes_wrong(self) -> bool:
        """Whether every call of the service will do what it is to."""
        ray = self.ray
        return not (ray.meanwhile or ray.refusals or ray.lates or ray.kill_at or ray.store_fails)

    def all_that_is_over_has_ended(self) -> None:
        for one in self.service.state.all():
            if one.is_lease:
                assert one.replicas and all(r.group_id in self.ray.groups for r in one.replicas.values())
            else:
                assert one.owner is None or one.owner["job"] not in self.ray.ended
            assert one.expires_at is None or one.expires_at > self.ray.now
            deadline = one.deployment.deadline_seconds
            assert deadline is None or one.is_lease or not one.reasons or one.given_up or (
                one.waiting_since is not None and self.ray.now - one.waiting_since <= deadline
            )  # fmt: skip
            assert not one.given_up or one.reasons
        for ticket in self.tickets:
            assert not any(owner["job"] in self.ray.ended for owner in ticket._needed_by)

    @rule(call=ASKED, slot=st.integers(0, 1))
    def a_job_asks(self, call: Call, slot: int) -> None:
        """What it gets ends with it."""
        asked = replace(call, fields=(*call.fields, ("owner", "job")))
        self.tried["a job asks"] += 1
        self.send(asked, caller={"job": self.jobs[slot]})

    @rule(call=ASKED, slot=st.integers(0, 1), makes=st.integers(0, 5))
    def a_job_borrows(self, call: Call, slot: int, makes: int) -> None:
        """It creates the groups itself; now and then it has gone before it has made them all."""
        asked = replace(call, method="place", fields=(*call.fields, ("owner", "caller")))
        job, lending = {"job": self.jobs[slot]}, Borrower(self.jobs[slot], makes)
        self.tried["a job borrows"] += 1
        self.send(asked, caller=job, lending=lending)

    @rule(
        gpus=st.lists(st.sampled_from((0.25, 0.5, 0.6, 1, 2)), min_size=2, max_size=4),
        strategy=st.sampled_from(Strategy),
        name=NAMES,
        slot=st.integers(0, 1),
        makes=st.integers(0, 3),
    )
    def a_job_borrows_shares(
        self, gpus: list[float], strategy: Strategy, name: str, slot: int, makes: int
    ) -> None:
        """Several at once, beside whole GPUs or not."""
        layout = {"bundles": [{"GPU": amount} for amount in gpus], "strategy": strategy.value}
        fields = {"owner": "caller", "placement_group": layout, "replicas": 1, "runtime": "python"}
        asked = Call("place", name, tuple(fields.items()))
        job, lending = {"job": self.jobs[slot]}, Borrower(self.jobs[slot], makes)
        self.tried["a job borrows shares"] += 1
        self.send(asked, caller=job, lending=lending)

    @rule(step=st.sampled_from(("service.lent", "service.group_created")))
    def the_service_will_be_killed_while_it_lends(self, step: str) -> None:
        self.kill_at(step)

    @rule(slot=st.integers(0, 1))
    def a_job_ends(self, slot: int) -> None:
        self.ray.end_job(self.jobs[slot])
        self.jobs[slot] = f"job-{slot}-{next(self.ray.numbers)}"

    @rule(slot=st.integers(0, 1), pick=st.integers(0, 9))
    def a_job_removes_a_group_of_its_own(self, slot: int, pick: int) -> None:
        own = sorted(text for text, one in self.ray.groups.items() if one.job == self.jobs[slot])
        if own:
            del self.ray.groups[own[pick % len(own)]]

    def ends_by_its_owner(self, one: DeploymentState) -> bool:
        """Whether its owner has ended, or has removed all that was there of it, though nobody has looked since."""
        if one.owner is not None and self.ray.has_ended(one.owner):
            return True
        return one.is_lease and not any(held.group_id in self.ray.groups for held in one.replicas.values())

    @rule(name=NAMES)
    def somebody_renews(self, name: str) -> None:
        if name in self.service.turns.names():
            return
        known = self.service.state.get(name)
        if self.ray.meanwhile:
            return
        try:
            until = self.service.renew(name)
        except UnknownDeployment:
            assert known is None or known.releasing or self.ends_by_its_owner(known)
        except StoreFailed:
            return
        except Killed:
            self.kill_the_service()
        else:
            assert known is not None
            seconds = known.deployment.ttl_seconds
            assert until == self.service.state.deployments[name].expires_at
            assert (until is None) == (seconds is None)
            assert until is None or seconds is None or until >= self.ray.now + seconds

    @rule(call=ASKED, slot=st.integers(0, 1))
    def a_call_waits(self, call: Call, slot: int) -> None:
        """It is tried at once, and then in its turn."""
        if self.ray.meanwhile:
            return
        service, asked = self.service, call.argument()
        ticket = Ticket(
            parse(asked, None), lambda: service.place(asked), [{"kind": "caller", "job": self.jobs[slot]}]
        )
        try:
            ticket.attempt()
        except (Unplaceable, ReservationFailed):
            self.tried["a call waits"] += 1
            service.queue.tickets.add(ticket)
            self.tickets.append(ticket)
        except Killed:
            self.kill_the_service()
        except (StoreFailed, DeploymentConflict):
            pass

    @rule(pick=st.integers(0, 9))
    def a_call_gives_up(self, pick: int) -> None:
        if self.tickets:
            ticket = self.tickets.pop(pick % len(self.tickets))
            self.service.queue.tickets.remove(ticket)
            with pytest.raises((Unplaceable, ReservationFailed)):
                ticket.result()

    @rule(seconds=st.sampled_from((10, 901, 1801)))
    def much_time_passes(self, seconds: float) -> None:
        self.ray.now += seconds
        self.time_passes()

    @rule()
    def what_has_room_is_placed(self) -> None:
        """After two looks in which nothing goes wrong there is nothing to do but to wait."""
        if not self.nothing_goes_wrong() or self.ray.late or self.ray.orphans_suspected:
            return
        self.time_passes()
        self.time_passes()
        for name in self.service.state.queue():
            one = self.service.state.deployments[name]
            assert not one.releasing
            planned = self.service.plan(one.deployment)
            assert sorted(planned.pending) == sorted(one.reasons), (name, one.reasons)

    @rule(times=st.integers(1, 7))
    def nodes_refuse(self, times: int) -> None:
        self.ray.refusals = times

    @rule(times=st.integers(1, 3))
    def nodes_answer_too_late(self, times: int) -> None:
        self.ray.lates = times

    @rule()
    def what_was_late_is_done(self) -> None:
        while self.ray.late:
            self.ray.late.pop(0)()

    @rule(pick=st.integers(0, 9))
    def a_node_actor_ends(self, pick: int) -> None:
        self.a_node_actor_dies(pick)

    def a_node_actor_dies(self, pick: int) -> None:
        if self.ray.actors:
            del self.ray.actors[sorted(self.ray.actors)[pick % len(self.ray.actors)]]

    @rule(when=st.sampled_from(("before", "after")))
    def the_store_fails_once(self, when: str) -> None:
        self.ray.store_fails = when

    @rule()
    def the_next_caller_dies_with_the_service(self) -> None:
        self.caller_dies = True

    @rule(call=CALLS)
    def another_call_comes_in_the_middle(self, call: Call) -> None:
        self.ray.meanwhile.append(lambda: self.send(call, in_the_middle=True))

    @rule(declared=st.lists(DECLARED, min_size=1, max_size=4), atomic=st.booleans())
    def several_are_applied_together(self, declared: list[dict[str, Any]], atomic: bool) -> None:
        """What a dry run says just before is what happens, if nothing else does."""
        quiet = self.nothing_else_happens()
        try:
            planned = self.service.plan_all(declared, atomic)
        except (Unplaceable, DeploymentConflict):
            planned = None
        try:
            results = self.service.apply_all(declared, atomic)
        except (Unplaceable, ReservationFailed):
            assert atomic
            assert not quiet or planned is None, "a dry run promised what cannot be"
        except (PartlyApplied, DeploymentConflict):
            assert not quiet or planned is None
        except StoreFailed:
            assert not quiet
        except Killed:
            assert not quiet
            self.kill_the_service()
        else:
            if quiet:
                assert planned is not None, "a dry run refused what can be"
                self.tried["a dry run was right"] += 1
                assert list(map(places, planned)) == list(map(places, results))

    def nothing_else_happens(self) -> bool:
        """Whether the service knows all there is, and nothing will go wrong."""
        ray = self.ray
        self.service.cluster.nodes()  # its list of nodes may be a second old
        known = [a for one in self.service.state.deployments.values() for a in one.assignments()]
        ours = {a.placement_group.id.hex() for a in known}
        return (
            self.nothing_goes_wrong()
            and set(ray.groups) - {"f"} == ours
            and {a.node for a in known} <= ray.nodes
            and not any(map(self.ends_by_its_owner, self.service.state.all()))
        )

    @rule(pick=st.integers(0, 9))
    def a_node_dies_in_the_middle(self, pick: int) -> None:
        self.ray.meanwhile.append(lambda: self.a_node_ends(pick))

    @rule(pick=st.integers(0, 9))
    def a_node_actor_dies_in_the_middle(self, pick: int) -> None:
        self.ray.meanwhile.append(lambda: self.a_node_actor_dies(pick))

    @rule()
    def another_user_comes_in_the_middle(self) -> None:
        self.ray.meanwhile.append(lambda: self.another_user_begins(1))

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "service"):
            return
        recorded = {record.name: record.content for record in ledger.records()}
        standing = self.service.state.deployments
        unwritten = self.service.actions.unwritten
        assert set(recorded) ^ set(standing) <= unwritten
        assert not self.service.state.claims and not self.service.turns.names()
        assert not self.service.fleet._under_way and not self.service.fleet._gone
        known = set()
        for name, one in standing.items():
            assert set(one.replicas) == {i for i, state in one.states.items() if state in HOLDING}
            if name not in unwritten and not one.releasing:
                content = recorded[name]
                assert content is not None and not content["releasing"]
                assert content["deployment"]["name"] == name
                assert {replica["replica_index"] for replica in content["replicas"]} == set(one.replicas)
            assert set(one.states) <= set(range(one.deployment.replicas))
            assert set(one.unfinished()) == set(one.reasons)
            known |= {part.placement_group.id.hex() for part in one.assignments()}
            limits = one.deployment.constraints
            current = {r.parts[0].node for i, r in one.replicas.items() if i not in one.outdated}
            for other in limits.apart_from if limits else ():
                beside = standing[other].nodes() if other in standing else {}
                assert not current & beside.keys(), (name, other)
        if not self.ray.orphans_suspected:
            assert set(self.ray.groups) - {"f", *self.others} <= known, "a group that nobody knows of"
        for node, held in self.ray.actors.items():
            if node in self.ray.nodes:
                assert held == set(self.service.state.holdings(node)), "a node actor has other books"
        for node in self.ray.nodes:
            assert min(self.ray.rests(node).values()) >= 0 and self.ray.egress_left(node) >= 0
            assert min(self.ray.cpus_left(node)) >= 0
        for one in standing.values():
            consistent.check_state(one)
        consistent.check_indices(self.service)
        consistent.check_ledger(self.service, recorded)
        consistent.check_snapshot(self.service)


TestService = Service.TestCase
TestService.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_an_apply_that_was_cut_off_with_its_caller_leaves_no_replica_too_many() -> None:
    """It adds a lost replica and takes away one; the service dies in between."""
    ray = Ray(nodes={"n"})
    with make_believe(ray):
        DirectService().apply({"name": "a", "model": "m", "replicas": 3})
        del ray.groups[min(ray.groups)]
        ray.kill_at = "service.kept"
        with pytest.raises(Killed):
            DirectService().apply({"name": "a", "model": "m", "replicas": 2})
        standing = DirectService().state.deployments["a"]
        assert (sorted(standing.replicas), len(ray.groups)) == ([0, 1], 2)


def test_what_is_asked_for_again_while_its_release_is_cut_off_is_placed_anew() -> None:
    ray = Ray(nodes={"n"})
    with make_believe(ray):
        one = DirectService()
        one.place({"name": "a", "model": "m"})
        with mock.patch.object(ledger, "note_ended", side_effect=StoreFailed), pytest.raises(StoreFailed):
            one.release("a")
        assert one.place({"name": "a", "model": "m"}).assignments[0].gpus == [0]
        assert one.release("a") == 1
        assert (ray.groups, one.state.deployments) == ({}, {})


def test_what_is_given_back_may_be_the_room_for_what_is_pending() -> None:
    ray = Ray(nodes={"n"})
    with make_believe(ray):
        one = DirectService()
        one.place({"name": "a", "model": "m", "gpus": 2, "replicas": 2})
        ray.nodes.add("m")
        one.apply({"name": "a", "model": "m", "gpus": 2, "replicas": 3})
        moved = one.get("a").assignments[2].placement_group
        ray.nodes.remove("m")
        ray.groups.pop(moved.id.hex())
        Clock(one, AtOnce()).look()
        assert list(one.get("a").pending) == [2]
        del ray.groups[one.get("a").assignments[0].placement_group.id.hex()]
        one = DirectService()  # now 0 and 2 are pending, and another takes the room
        assert ray.take(Group("", next(ray.numbers)), "n", range(2), WHOLE, 0)
        assert sorted(one.get("a").pending) == [0, 2]
        shrunk = one.apply({"name": "a", "model": "m", "gpus": 2, "replicas": 1})
        assert ([a.replica_index for a in shrunk.assignments], shrunk.pending) == ([0], {})
        assert one.plan({"name": "a", "model": "m", "gpus": 2, "replicas": 1}).standing
