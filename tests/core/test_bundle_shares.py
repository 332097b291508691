"""Groups with several shares, beside whole GPUs or not: each strategy means what it means in Ray."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations, product

import pytest

from placement.core.bundles import OTHERS
from placement.core.needs import WHOLE
from placement.core.node import Node
from placement.core.planner import plan
from placement.core.replicas import Plan
from placement.core.request import Bundle, Request, Strategy, amounts_of
from placement.core.shares import OPENED, Portions, give
from placement.core.snapshot import Snapshot
from placement.errors import NotEnoughGpus, Unplaceable
from tests.core.test_bundles import PACK, PAIRS, SPREAD, STRICT_SPREAD, node, request


def share(thousandths: int, cpu_milli: int = 1000, **labels: str) -> Bundle:
    return Bundle(0, cpu_milli, share=thousandths, labels=tuple(labels.items()))


def mixed(strategy: Strategy, *bundles: Bundle) -> Request:
    asked = request(strategy, *bundles)
    return replace(asked, needs=asked.needs._replace(amounts=amounts_of(bundles)))


def parts(outcome: Plan | Unplaceable) -> dict[str, tuple[dict[int, int], list[int]]]:
    """Node -> GPU -> thousandths of it, and which ranks are there."""
    assert isinstance(outcome, Plan), outcome
    return {one.node_id[3:]: (one.taken, list(one.ranks)) for one in outcome.replicas}


HALF, QUARTER = share(500), share(250)


@pytest.mark.parametrize(
    ("case", "nodes", "asked", "expected"),
    [
        (
            "halves are packed on GPUs that are shared already",
            [node("a"), replace(node("b", free="3"), rests={0: 500, 1: 600})],
            mixed(PACK, HALF, HALF),
            {"b": ({0: 500, 1: 500}, [])},
        ),
        (
            "shares beside a pair that keeps its bridge",
            [node("a", PAIRS, "123")],
            mixed(PACK, QUARTER, Bundle(2, 2000), QUARTER),
            {"a": ({1: 500, 2: 1000, 3: 1000}, [])},
        ),
        (
            "the order of the bundles decides which of the two come first",
            [node("a", PAIRS)],
            mixed(PACK, Bundle(2, 2000), HALF),
            {"a": ({0: 1000, 1: 1000, 2: 500}, [])},
        ),
        (
            "a share on each node",
            [node("a"), node("b"), node("c")],
            mixed(SPREAD, HALF, Bundle(2), HALF),
            {"b": ({0: 500}, [0]), "a": ({0: 1000, 1: 1000}, [1, 2]), "c": ({0: 500}, [3])},
        ),
        (
            "as many as a node holds, and then the next",
            [node("a", free="01"), node("b", free="2")],
            mixed(PACK, *[share(400, 0)] * 5),
            {"a": ({0: 800, 1: 800}, [0, 1, 2, 3]), "b": ({2: 400}, [4])},
        ),
        (
            "whole GPUs here and a share there, where labels say so",
            [node("a", zone="x"), node("b", zone="y")],
            mixed(PACK, Bundle(2, labels=(("zone", "x"),)), share(500, zone="y")),
            {"a": ({0: 1000, 1: 1000}, [0, 1]), "b": ({0: 500}, [2])},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_shares_go_where_the_strategy_says(
    case: str, nodes: list[Node], asked: Request, expected: dict[str, tuple[dict[int, int], list[int]]]
) -> None:
    assert parts(plan(Snapshot(nodes), asked)) == expected


@pytest.mark.parametrize(
    ("nodes", "asked", "summary", "excluded"),
    [
        (
            [node("a", free="0")],
            mixed(Strategy.STRICT_PACK, HALF, HALF, QUARTER),
            "replica 0 needs 2 x 0.5 of a GPU and 0.25 of a GPU free on one node; "
            "at best a has 1 of its 4 GPUs free: GPU 0",
            {"has no 2 x 0.5 of a GPU and 0.25 of a GPU free": 1},
        ),
        (
            [node("a", 2)],
            mixed(Strategy.STRICT_PACK, *[share(600)] * 3),
            "3 x 0.6 of a GPU per replica, but the largest node has 2",
            {"has fewer than 3 GPUs": 1},
        ),
        (
            [node("a", free="0")],
            mixed(PACK, share(600), share(600)),
            "a bundle of 0.6 of a GPU finds no room on what the other bundles leave",
            {OTHERS: 1},
        ),
        (
            [node("a")],
            mixed(STRICT_SPREAD, HALF, HALF),
            "a bundle of 0.5 of a GPU finds no node of its own",
            {OTHERS: 1},
        ),
    ],
)
def test_a_refusal_of_shares_tells_of_what_finds_no_room(
    nodes: list[Node], asked: Request, summary: str, excluded: dict[str, int]
) -> None:
    asked = replace(asked, bundles=()) if asked.strategy is Strategy.STRICT_PACK else asked
    refused = plan(Snapshot(nodes), asked)
    assert isinstance(refused, NotEnoughGpus)
    assert (refused.summary, refused.excluded) == (summary, excluded)


def fits(node: Node, bundles: list[Bundle]) -> bool:
    """Whether Ray's rule finds room for bundles, in their order, with all that is free."""
    amounts = [WHOLE * one.gpus + one.share for one in bundles]
    if sum(one.cpu_milli for one in bundles) > node.cpu_milli:
        return False
    least = min(amounts, default=0)
    rests = {gpu: rest for gpu, rest in node.rests.items() if rest >= least}
    return give(amounts, rests, node.free) is not None


@pytest.mark.parametrize("seed", range(400))
def test_shares_are_placed_exactly_when_they_can_be(seed: int) -> None:
    """On one node and on nodes of their own always; packed and spread for bundles alike, as with whole GPUs."""
    some = random.Random(seed)
    nodes = []
    for i in range(some.randint(1, 3)):
        machine = some.choice((PAIRS, 3, 2))
        size = 4 if machine == PAIRS else int(machine)
        states = {gpu: some.choice((0, 250, 500, 700, WHOLE, WHOLE)) for gpu in range(size)}
        free = frozenset(gpu for gpu, left in states.items() if left == WHOLE)
        rests = {gpu: left for gpu, left in states.items() if 0 < left < WHOLE}
        nodes.append(replace(node(f"n{i}", machine, cpus=some.randint(1, 6)), free=free, rests=rests))
    kinds = [share(some.choice((200, 250, 300, 500, 600, 999))), HALF, Bundle(1, 1000), Bundle(2, 1000)]
    strategy = some.choice(list(Strategy))
    alike = strategy in (PACK, SPREAD) and some.random() < 0.7
    bundles = kinds[:1] * some.randint(2, 5) if alike else [*some.choices(kinds, k=some.randint(1, 3)), HALF]
    asked = mixed(strategy, *some.sample(bundles, k=len(bundles)))
    bundles = list(asked.bundles)
    if strategy is Strategy.STRICT_PACK:
        asked = replace(asked, bundles=())
    outcome = plan(Snapshot(nodes), asked)
    assert plan(Snapshot(nodes[::-1]), asked) == outcome or not isinstance(outcome, Plan)
    ways = [
        there
        for chosen in product(range(len(nodes)), repeat=len(bundles))
        if (
            there := [
                [b for b, at in zip(bundles, chosen, strict=True) if at == i] for i in range(len(nodes))
            ]
        )
        and all(fits(one, on) for one, on in zip(nodes, there, strict=True) if on)
    ]
    counts = [sum(map(bool, there)) for there in ways]
    if strategy is Strategy.STRICT_PACK:
        assert isinstance(outcome, Plan) == (1 in counts)
    elif strategy is STRICT_SPREAD:
        assert isinstance(outcome, Plan) == (len(bundles) in counts)
    elif alike or not ways:
        assert isinstance(outcome, Plan) == bool(ways)
    if not isinstance(outcome, Plan):
        return
    used = outcome.replicas
    if alike or (strategy is PACK and 1 in counts):
        assert len(used) == (min(counts) if strategy is PACK else max(counts))
    there_are = {one.id: one for one in nodes}
    every = [*range(sum(one.gpus or 1 for one in bundles))]
    assert sorted(rank for part in used for rank in part.ranks or every) == every
    of_rank = [i for i, one in enumerate(bundles) for _ in range(one.gpus or 1)]
    for part in used:
        on = there_are[part.node_id]
        here = [bundles[i] for i in sorted({of_rank[rank] for rank in part.ranks or every})]
        assert sum(part.taken.values()) == sum(WHOLE * one.gpus + one.share for one in here)
        assert all(taken <= (WHOLE if gpu in on.free else on.rests[gpu]) for gpu, taken in part.taken.items())
        assert fits(on, here)
        assert part.set_size == (len(part.gpus) if part.ranks and not part.shares else 0)
        if part.shares:  # just what Ray deals to them, in their order
            amounts = tuple(WHOLE * one.gpus + one.share for one in here)
            pool = tuple(sorted(on.free & {*part.gpus}))
            assert part.taken in [
                Portions(amounts, (), (), given).taken
                for size in range(len(pool) + 1)
                for opened in combinations(pool, size)
                if (
                    given := give(amounts, {**on.rests, **dict.fromkeys(opened, OPENED)}, {*pool} - {*opened})
                )
            ]
