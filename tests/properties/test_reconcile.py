"""Rounds of reconciling on clusters with every feature, while declarations, nodes and others change.

``ORACLE_EXAMPLES=20000`` makes it a long run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random
from typing import Any

from hypothesis import given, note

from placement.core.needs import Needs, Within
from placement.core.planner import Shortfall, advance, attempt
from placement.core.reconcile import Decision, Desired, Observed, Wait, admit, reconcile
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from tests.properties.cases import (
    EVERYTHING,
    MODES,
    RACK,
    SEEDS,
    ZONE,
    cluster,
    examples,
    gpu_request,
    named,
    offered,
    remote_request,
    shown,
)
from tests.properties.rounds import World, checked, lost, waiting, without
from tests.properties.test_dry_run import without_limits


def declared(chance: Random, before: Request | None) -> Desired:
    """A declaration: a new one, or the last one with something changed."""
    if before is not None and chance.random() < 0.7:
        request = replace(before, **change(chance, before))
    else:
        mode = chance.choice((*MODES, "remote"))
        request = remote_request(chance) if mode == "remote" else gpu_request(chance, mode)
        if chance.random() < 0.6:
            request = without_limits(request)
    replicas = tuple(range(chance.choice((1, 2, 2, 3, 4))))
    request = replace(request, replicas=replicas, standing={})
    return Desired(request, gang=chance.random() < 0.3, releasing=chance.random() < 0.05)


def change(chance: Random, before: Request) -> dict[str, Any]:
    """Fields of a declaration that are changed."""
    needs = before.needs
    choices: list[dict[str, Any]] = [
        {},
        {"spread_label": chance.choice((ZONE, RACK)), "max_per_domain": chance.choice((0, 1, 2))},
        {"spread_label": None, "max_per_domain": 0},
        {"apart_from": chance.choice(((), ("x",), ("y",)))},
        {"near_to": chance.choice(((), ("y",)))},
        {"kept_away_by": chance.choice(((), ("x",)))},
        {"labels": chance.choice(({}, {ZONE: "a"}, {RACK: "!1"}))},
    ]
    if before.provider is not None:
        choices += [{"egress": chance.choice((1, 2, 3))}, {"key": "new"}]
        choices += [{"egress_nodes": chance.choice((None, ("node-0", "id-1")))}]
    else:
        choices += [
            {"cpu_milli": chance.choice((0, 500)), "memory_bytes": 0},
            {"gpu_nodes": chance.choice((None, ("node-0", "id-1")))},
            {"compute_capability": chance.choice((None, (8, 0)))},
        ]
        if before.parts == 1 and not before.divisible:
            names = chance.choice(((), named(chance, needs.gpus * before.stages)))
            choices += [{"needs": needs._replace(named=names)}] * 2
        if needs.whole and not needs.profile:
            gpus = chance.choice((1, 2, 2, 3, 4))
            choices += [{"needs": Needs(gpus)}] * 3
            choices += [
                {"needs": Needs(gpus, within=chance.choice(list(Within))), "stages": chance.choice((1, 2))}
            ]
        elif needs.share < 1000:
            choices += [{"needs": needs._replace(share=chance.choice((100, 250, 500, 750)))}] * 3
    found = chance.choice(choices)
    return found | chance.choice(choices)


def elsewhere(chance: Random, world: World) -> World:
    """The world once a node has died, come back or begun to drain, a group has gone, and others have taken GPUs."""
    nodes, observed = list(world.nodes), dict(world.observed)
    if len(nodes) > 1 and chance.random() < 0.2:
        nodes.remove(chance.choice(nodes))
    if observed and chance.random() < 0.15:
        index = chance.choice(sorted(observed))
        observed[index] = replace(observed[index], gone=True)
    if chance.random() < 0.2:
        position = chance.randrange(len(nodes))
        problem = None if nodes[position].problem else "is draining"
        nodes[position] = replace(nodes[position], problem=problem)
    if chance.random() < 0.3:
        busy = chance.choice(nodes)
        taken = [gpu for gpu in busy.free if chance.random() < 0.6]
        nodes[nodes.index(busy)] = replace(busy, free=busy.free.difference(taken))
    if chance.random() < 0.2:
        other, name = chance.choice(nodes), chance.choice("xy")
        there = {one: count for one, count in other.deployments.items() if one != name}
        here = there if name in other.deployments else {**there, name: 1}
        nodes[nodes.index(other)] = replace(other, deployments=here)
    return World(nodes, observed, world.near)


@examples(250)
@given(seed=SEEDS)
def test_rounds(seed: int) -> None:
    chance = Random(f"rounds {seed}")
    start = cluster(chance, EVERYTHING)
    world, desired = World(list(start.nodes), {}, start.near), None
    for _ in range(chance.randint(2, 7)):
        desired = declared(chance, desired.request if desired else None)
        for node in world.nodes:
            note(shown(node))
        note(f"{desired}\n{world.observed}")
        atomic = chance.random() < 0.3
        known = offered(world.snapshot)
        decision, after = checked(world, desired, atomic=atomic)
        note(str(decision.actions))
        assert offered(world.snapshot) == known
        offered(decision.snapshot)
        if decision.refusal is not None:
            assert_no_room_for_all(world, desired)
        elif not desired.releasing:
            assert_none_has_room(after, desired, decision)
        world = elsewhere(chance, after)


def assert_no_room_for_all(world: World, desired: Desired) -> None:
    """Of an atomic change that is refused: there is no room for all of it, beside nor in place."""
    gone = lost(world)
    start = without(world, gone, desired.request.deployment)
    decision = reconcile(desired, {i: one for i, one in world.observed.items() if i not in gone}, start)
    assert waiting(decision)


def assert_none_has_room(after: World, desired: Desired, decision: Decision) -> None:
    """That each replica which waits has no room by itself, nor in its own place; a gang's not all together."""
    request, waits = desired.request, waiting(decision)
    if not waits:
        return
    groups = [sorted(waits)] if desired.gang else [[index] for index in sorted(waits)]
    for group in groups:
        own = [index for index in group if index in after.observed]
        others = [one.parts[0].node_id for index, one in after.observed.items() if index not in group]
        standing = {node: others.count(node) for node in others}
        asked = replace(request, replicas=tuple(group), standing=standing)
        for snapshot in (after.snapshot, without(after, own, request.deployment)):
            assert isinstance(attempt(snapshot, asked), Shortfall), "it waits, and there is room"


@examples(100)
@given(seed=SEEDS)
def test_all_that_waits_is_looked_at_as_if_it_were_one_after_the_other(seed: int) -> None:
    chance = Random(f"admit {seed}")
    snapshot = cluster(chance, EVERYTHING)
    kinds = [declared(chance, None) for _ in range(3)]
    queue: list[tuple[str, Desired, Mapping[int, Observed]]] = []
    for number in range(chance.randint(2, 8)):
        kind, standing, name = chance.choice(kinds), dict[int, Observed](), f"q{number}"
        request = replace(kind.request, deployment=name)
        if chance.random() < 0.5:  # some of it is there, as declared or as declared before
            earlier = replace(request, **(change(chance, request) if chance.random() < 0.5 else {}))
            one = replace(earlier, replicas=(chance.randrange(3),))
            step, later = advance(snapshot, one)
            if isinstance(step.outcome, Plan):
                snapshot = later
                standing[one.replicas[0]] = Observed(step.outcome.replicas, earlier)
        queue.append((name, replace(kind, request=request), standing))
    decided = admit(queue, Snapshot(snapshot.nodes, snapshot.near))
    now = Snapshot(snapshot.nodes, snapshot.near)
    for (name, desired, observed), (key, together) in zip(queue, decided, strict=True):
        note(f"{desired} {observed}\n{together.actions}")
        alone = reconcile(desired, observed, now)
        assert key == name
        assert without_reasons(together) == without_reasons(alone)
        assert together.snapshot.nodes == alone.snapshot.nodes
        for action in together.actions:
            if isinstance(action, Wait):
                assert action.refusal.deployment == name
                assert str(action.refusal).startswith(f"cannot place {name!r}: ")
        now = Snapshot(alone.snapshot.nodes, alone.snapshot.near, alone.snapshot.mix)


def without_reasons(decision: Decision) -> list[object]:
    """What is done, whatever is said about it."""
    return [action.indices if isinstance(action, Wait) else action for action in decision.actions]
