"""Carries out by hand what :mod:`placement.core.reconcile` decides, and checks what must hold of every decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from placement.core.node import Node
from placement.core.planner import vacate
from placement.core.reconcile import (
    Action,
    Decision,
    Desired,
    Drop,
    Keep,
    Observed,
    Release,
    Reserve,
    Wait,
    outcome,
    reconcile,
)
from placement.core.replicas import PlannedReplica
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from tests.properties.test_dry_run import carried_out, same


@dataclass
class World:
    """Nodes, and the replicas of one deployment on them."""

    nodes: Sequence[Node]
    observed: Mapping[int, Observed]
    near: Sequence[str] = ()

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.nodes, self.near)

    def execute(self, desired: Desired, actions: Sequence[Action]) -> World:
        """The world once the actions are carried out, one by one; that nothing is held twice is asserted."""
        nodes, there, request = self.nodes, dict(self.observed), desired.request
        name = request.deployment

        def give_back(index: int) -> None:
            nonlocal nodes
            one = there.pop(index)
            nodes = carried_out(nodes, one.parts, name, one.request.calls, -1)

        for action in actions:
            if isinstance(action, Drop):
                give_back(action.index)
            elif isinstance(action, Keep):
                for index in action.indices:
                    there[index] = replace(there[index], request=request)
            elif isinstance(action, Release):
                for index in action.indices:
                    give_back(index)
            elif isinstance(action, Reserve):
                assert action.plan.deployment == name
                nodes = carried_out(nodes, action.plan.replicas, name, request.calls, 1)
                for index in action.replaces:
                    give_back(index)
                new: dict[int, list[PlannedReplica]] = {}
                for part in action.plan.replicas:
                    new.setdefault(part.replica_index, []).append(part)
                assert not new.keys() & there.keys(), "a replica is there twice"
                there |= {index: Observed(tuple(parts), request) for index, parts in new.items()}
        return World(nodes, there, self.near)


def checked(
    world: World,
    desired: Desired,
    *,
    atomic: bool = False,
) -> tuple[Decision, World]:
    """A decision, with what comes of it; asserts what must hold whatever is declared and there."""
    start = world.snapshot
    decision = reconcile(desired, world.observed, start, atomic=atomic)
    after = world.execute(desired, decision.actions)
    assert same(decision.snapshot, after.nodes), "it becomes other than decided"
    assert same(start, world.nodes), "the snapshot was changed"
    assert outcome(desired, world.observed, decision.actions) == after.observed
    assert not any(
        isinstance(action, Wait) and later
        for action, later in zip(decision.actions, decision.actions[1:], strict=False)
    ), "what waits comes last"
    if decision.refusal is not None:
        assert atomic
        assert decision.actions == ()
        return decision, after
    if desired.releasing:
        assert not after.observed
        return decision, after
    wanted = set(desired.request.replicas)
    waits = waiting(decision)
    assert after.observed.keys() <= wanted
    assert wanted - after.observed.keys() <= waits <= wanted
    assert all(
        same_declaration(after.observed[index].request, desired.request)
        for index in after.observed.keys() - waits
    )
    for index in lost(world):
        assert any(isinstance(action, Drop) and action.index == index for action in decision.actions)
    for index in satisfied(world, desired.request):
        assert after.observed[index].parts == world.observed[index].parts, "needlessly replaced"
    assert_replacements_have_room(world, desired, decision)
    assert not (atomic and waits), "it is not placed, and not refused"
    again = reconcile(desired, after.observed, after.snapshot, atomic=atomic)
    assert all(isinstance(action, Wait) for action in again.actions), "the second round changes something"
    assert waiting(again) == waits
    return decision, after


def waiting(decision: Decision) -> set[int]:
    """The replicas for which there is no room."""
    return {index for action in decision.actions if isinstance(action, Wait) for index in action.indices}


def same_declaration(one: Request, other: Request) -> bool:
    """Whether two requests ask for the same, whichever replicas they name, and whoever keeps away from them."""
    return replace(one, replicas=(), kept_away_by=()) == replace(other, replicas=(), kept_away_by=())


def lost(world: World) -> list[int]:
    """The replicas with a node that is no more, or whose group is gone."""
    alive = {node.id for node in world.nodes}
    return [
        index
        for index, one in world.observed.items()
        if one.gone or any(part.node_id not in alive for part in one.parts)
    ]


def satisfied(world: World, request: Request) -> list[int]:
    """The replicas that were placed under just this declaration."""
    return [
        index
        for index, one in world.observed.items()
        if index in request.replicas and index not in lost(world) and same_declaration(one.request, request)
    ]


def assert_replacements_have_room(world: World, desired: Desired, decision: Decision) -> None:
    """That a replica which is still wanted is given back only where its replacement is reserved before or next."""
    for position, action in enumerate(decision.actions):
        if isinstance(action, Release | Reserve):
            given_up = action.indices if isinstance(action, Release) else action.replaces
            again = {index for index in given_up if index in desired.request.replicas}
            placed = action if isinstance(action, Reserve) or not again else decision.actions[position + 1]
            assert not again or (isinstance(placed, Reserve) and again <= indices(placed))


def indices(action: Reserve) -> set[int]:
    """The replicas that are placed."""
    return {part.replica_index for part in action.plan.replicas}


def without(world: World, indices: Sequence[int], name: str) -> Snapshot:
    """The cluster once some replicas have gone."""
    snapshot = world.snapshot
    for index in indices:
        one = world.observed[index]
        snapshot = vacate(snapshot, one.parts, name, one.request.calls)
    return snapshot
