"""Every refusal names the stage at which no node was left, and says what helps: tried on all there is at once.

By the seed instead of by hypothesis: a case takes a millisecond, and it takes many to meet the rare mixtures.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from placement import topologies
from placement.core.explanation import explain
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import GIB, Needs, Within
from placement.core.node import Node
from placement.core.planner import advance, plan
from placement.core.policy import Policy
from placement.core.reconcile import Desired, Wait, reconcile
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import BelowFloor, Unplaceable

CASES = 2000
MACHINES = [topologies.load("a100-pcie-4x"), *map(Topology.unknown, (0, 1, 2, 4, 4))]
LINKED = [topologies.load(name) for name in ("a100-pcie-4x", "dgx-1v", "l40s-4x")]
NO_USE = "waiting does not help"
PROFILES = ("1g.10gb", "3g.40gb")
LABELS = {"zone": "ab", GPU_DOMAIN_LABEL: "pq", "rack": "xy"}


def cluster(dice: random.Random) -> Snapshot:
    return Snapshot([node(dice, f"n{i}") for i in range(dice.randint(0, 4))])


def node(dice: random.Random, name: str) -> Node:
    machine = dice.choice(MACHINES)
    gpus = range(len(machine))
    cut_up = dice.random() < 0.3
    slots = {gpu: dice.choice(PROFILES) for gpu in gpus if cut_up and dice.random() < 0.5}
    state = {gpu: dice.choice(("free", "free", "free", "held", 300, 700)) for gpu in gpus}
    memory = {gpu: dice.choice((10 * GIB, 80 * GIB)) for gpu in gpus} if dice.random() < 0.5 else {}
    return Node(
        f"id-{name}",
        name,
        topology=machine,
        uuids={gpu: f"GPU-{name}-{gpu}" for gpu in gpus},
        free=frozenset(gpu for gpu in gpus if state[gpu] == "free" and gpu not in slots),
        rests={gpu: rest for gpu, rest in state.items() if isinstance(rest, int) and gpu not in slots},
        slots=slots,
        instances={gpu: profile for gpu, profile in slots.items() if state[gpu] == "free"},
        gpu_memory_bytes=dice.choice((None, 80 * GIB)),
        free_memory=memory,
        cpu_milli=dice.choice((1000, 8000)),
        memory_bytes=64 * GIB,
        egress={name: dice.randint(0, 4) for name in ("egress", "egress_openai") if dice.random() < 0.5},
        problem=dice.choice((None, None, None, None, "is draining")),
        labels={key: dice.choice(values) for key, values in LABELS.items() if dice.random() < 0.8},
        deployments=dict.fromkeys(dice.choice(((), (), ("other",))), 1),
    )


def request(dice: random.Random) -> Request:
    limits = dice.choice((None, None, None, ("n0", "n1")))
    if dice.random() < 0.15:
        units = dice.randint(1, 4)
        return Request("d", (0, 1), provider="openai", key="k", egress=units, egress_nodes=limits)
    if dice.random() < 0.15:
        spread = dice.choice((None, "zone"))
        return Request(
            "d",
            (0, 1, 2),
            policy=dice.choice(list(Policy)),
            cpu_nodes=limits,
            cpu_milli=dice.choice((500, 2000, 5000)),
            memory_bytes=dice.choice((0, 30 * GIB)),
            spared_milli=1000,
            apart_from=dice.choice(((), (), ("other",))),
            spread_label=spread,
            max_per_domain=dice.randint(1, 2) if spread else 0,
        )
    gpus, whole = dice.randint(1, 5), dice.random() < 0.7
    needs = Needs(gpus if whole else 1, free_memory_bytes=dice.choice((0, 0, 40 * GIB)))
    if whole and gpus > 1:
        floor = dice.choice((0.0, 0.0, 4.0, 100.0))
        needs = needs._replace(within=dice.choice((Within.NODE, *Within)), min_bandwidth_gb_per_s=floor)
    if not whole:
        kinds = ({"share": 500}, {"memory_bytes": 20 * GIB}, {"profile": "1g.10gb"})
        needs = needs._replace(**dice.choice(kinds))
    names = dice.choice(((), (), (), (0, 1, 2, 3), (1, 2), ("GPU-n1-1",), (0, "GPU-n1-1")))
    spread = dice.choice((None, "zone"))
    stages, parts = (dice.randint(1, 3), dice.choice((1, 1, 2))) if whole else (1, 1)
    if parts == 1:
        needs = needs._replace(named=names)
    return Request(
        "d",
        tuple(range(dice.randint(1, 3))),
        needs,
        stages=stages,
        parts=parts,
        divisible=whole and stages == parts == 1 and not needs.named and dice.random() < 0.5,
        policy=dice.choice(list(Policy)),
        gpu_nodes=limits,
        cpu_milli=dice.choice((0, 0, 2000)),
        apart_from=dice.choice(((), (), ("other",))),
        spread_label=spread,
        max_per_domain=dice.randint(1, 2) if spread else 0,
    )


def test_a_refusal_names_the_stage_that_left_no_node_and_what_would_help() -> None:
    refused = 0
    for seed in range(CASES):
        dice = random.Random(seed)
        snapshot, asked = cluster(dice), request(dice)
        step, _ = advance(snapshot, asked)
        why = explain(step.seen, step.request)
        kept = [len(snapshot.nodes), *(stage.kept for stage in why.stages)]
        for before, stage, after in zip(kept, why.stages, kept[1:], strict=False):
            assert before - after == sum(stage.excluded.values()), (seed, stage)
        if isinstance(step.outcome, Unplaceable):
            refused += 1
            assert kept[-1] == 0 and all(kept[1:-1]), (seed, step.outcome)
            assert step.outcome.advice == why.advice != "", seed
            assert step.outcome.excluded.items() <= why.excluded.items(), seed
        else:
            assert all(kept[1:]) and why.advice == "", (seed, "what is planned passes every stage")
    assert CASES / 10 < refused < CASES


def at_best(snapshot: Snapshot) -> Snapshot:
    """The cluster with nothing on it and all nodes usable; CPUs and memory are plenty."""
    plenty: dict[str, Any] = {
        "problem": None,
        "cpu_milli": 1 << 40,
        "memory_bytes": 1 << 60,
        "deployments": {},
    }
    nodes = [replace(one.emptied(), **plenty) for one in snapshot.nodes]
    memory = [dict.fromkeys(one.free | one.instances.keys(), 1 << 60) for one in nodes]
    return Snapshot([replace(one, free_memory=free) for one, free in zip(nodes, memory, strict=True)])


def test_waiting_is_called_useless_just_where_not_all_fit_on_the_empty_cluster() -> None:
    said = set()
    for seed in range(CASES):
        dice = random.Random(f"useless {seed}")
        snapshot, asked = cluster(dice), request(dice)
        if not asked.needs.gpus:
            continue
        gang = dice.random() < 0.3
        [*_, last] = [None, *reconcile(Desired(asked, gang), {}, snapshot).actions]
        if not isinstance(last, Wait):
            continue
        best, anywhere = at_best(snapshot), replace(asked, apart_from=())
        fits, one_fits = (
            isinstance(plan(best, replace(anywhere, replicas=replicas)), Plan)
            for replicas in (asked.replicas, (0,))
        )
        useless = NO_USE in last.refusal.advice
        said.add((useless, fits))
        assert not (useless and fits), (seed, last.refusal)
        whole_sets = asked.stages == asked.parts == 1 and not (asked.divisible or asked.apart_from)
        calm = not asked.spread_label and not any(one.problem for one in snapshot.nodes)
        known = asked.needs.whole and not asked.needs.floor
        if whole_sets and calm and known and one_fits and not fits:
            assert useless, (seed, last.refusal)
    assert said == {(True, False), (False, True), (False, False)}


def test_a_floor_is_called_impossible_just_where_it_alone_is_in_the_way_on_the_empty_cluster() -> None:
    said = []
    for seed in range(CASES):
        dice = random.Random(f"floor {seed}")
        snapshot, asked = cluster(dice), request(dice)
        asked = replace(
            asked, replicas=(0,), spread_label=None, max_per_domain=0, divisible=False, apart_from=()
        )
        needs = asked.needs
        if not needs.floor or asked.stages * asked.parts > 1:
            continue
        snapshot = Snapshot(
            [replace(one, topology=dice.choice(LINKED), problem=None) for one in snapshot.nodes]
        )
        step, _ = advance(snapshot, asked)
        if isinstance(step.outcome, Plan) or step.request.parts > 1:
            continue
        best = at_best(snapshot)
        loose = replace(asked, needs=needs._replace(within=Within.NODE, min_bandwidth_gb_per_s=0.0))
        alone = isinstance(plan(best, loose), Plan) and not isinstance(plan(best, asked), Plan)
        said.append(isinstance(step.outcome, BelowFloor) and NO_USE in step.outcome.advice)
        assert said[-1] == alone, (seed, step.outcome)
    assert set(said) == {True, False}


def test_release_something_is_said_just_where_it_would_help() -> None:
    helps = []
    for seed in range(CASES):
        dice = random.Random(seed)
        snapshot, asked = cluster(dice), replace(request(dice), replicas=(0,), cpu_milli=0)
        step, _ = advance(snapshot, asked)
        if isinstance(step.outcome, Unplaceable) and asked.needs.gpus:
            emptied = Snapshot([node.emptied() for node in snapshot.nodes])
            as_cut = replace(step.request, divisible=False, standing={})
            helps.append(isinstance(plan(emptied, as_cut), Plan))
            assert ("release something" in step.outcome.advice) == helps[-1], (seed, step.outcome)
    assert set(helps) == {True, False}
