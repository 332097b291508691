"""Whole GPUs and shares that are reserved at once: Ray's rule, and the pool of GPUs that is left to it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations

import pytest

from placement import topologies
from placement.core.needs import WHOLE, GpuName, Needs, Within
from placement.core.node import Choice, Node
from placement.core.shares import OPENED, Portions, give, pattern
from placement.core.topology import Topology

MACHINES = [
    topologies.load(name) for name in ("a100-pcie-4x", "l40s-4x", "dgx-1v", "a100-pcie-8x", "dgx-h100")
]
MACHINES += [Topology.unknown(4), Topology.unknown(1)]
SHARES = (1, 100, 250, 300, 300, 500, 500, 600, 999)

Given = tuple[tuple[int, ...], ...]


def by_ray(amounts: Sequence[int], free_parts: Mapping[int, int]) -> Given | None:
    """GPUs as Ray has them: one number each, of which it subtracts what it gives."""
    left = dict(sorted(free_parts.items()))
    given = []
    for amount in amounts:
        if amount < WHOLE:
            fitting = [gpu for gpu, part in left.items() if part >= amount]
            gpus = tuple(sorted(fitting, key=lambda gpu: left[gpu])[:1])
        else:
            gpus = tuple(gpu for gpu, part in left.items() if part == WHOLE)[: amount // WHOLE]
        if len(gpus) < max(1, amount // WHOLE):
            return None
        for gpu in gpus:
            left[gpu] -= min(amount, WHOLE)
        given.append(gpus)
    return tuple(given)


@pytest.mark.parametrize(
    ("case", "amounts", "rests", "free", "expected"),
    [
        ("the first share opens the lowest", (500, 500), {}, (3, 1), ((1,), (1,))),
        ("the fullest that has enough", (300,), {0: 400, 1: 300, 2: 200}, (3,), ((1,),)),
        ("of equal ones the lowest", (300, 300), {2: 300, 1: 300}, (0,), ((1,), (2,))),
        ("one that was opened just now may be the lowest", (500, 500), {3: 500}, (0,), ((3,), (0,))),
        ("or as full as another, and lower", (500, 200, 200), {3: 500, 4: 700}, (0,), ((3,), (4,), (4,))),
        ("whole ones leave shared GPUs alone", (2000, 250), {0: 999}, (1, 2), ((1, 2), (0,))),
        ("order decides who gets the lower one", (250, 1000), {}, (1, 2), ((1,), (2,))),
        ("and the other way round", (1000, 250), {}, (1, 2), ((1,), (2,))),
        ("just enough, to the last thousandth", (999, 1), {}, (0,), ((0,), (0,))),
        ("one thousandth too much", (999, 2), {}, (0,), None),
        ("room in all, but in no single one", (600,), {0: 500, 1: 500}, (), None),
        ("too few whole ones", (3000,), {}, (0, 1), None),
        ("nothing is asked", (), {0: 500}, (1,), ()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_shares_are_given_as_ray_gives_them(
    case: str, amounts: tuple[int, ...], rests: dict[int, int], free: tuple[int, ...], expected: Given | None
) -> None:
    assert give(amounts, rests, free) == expected
    assert by_ray(amounts, rests | dict.fromkeys(free, WHOLE)) == expected


def some_amounts(chance: random.Random) -> tuple[int, ...]:
    """At least one share among them."""
    amounts = [chance.choice(SHARES), *chance.choices((*SHARES, 1000, 1000, 2000), k=chance.randint(0, 5))]
    return tuple(chance.sample(amounts, k=len(amounts)))


def some_node(chance: random.Random, topology: Topology) -> Node:
    gpus = range(len(topology))
    states = {gpu: chance.choice((0, 100, 250, 500, 750, WHOLE, WHOLE, WHOLE, WHOLE)) for gpu in gpus}
    return Node(
        "n",
        "n",
        topology=topology,
        free=frozenset(gpu for gpu, part in states.items() if part == WHOLE),
        rests={gpu: part for gpu, part in states.items() if part < WHOLE and chance.random() < 0.7},
    )


@pytest.mark.parametrize("seed", range(300))
def test_the_pattern_is_what_ray_takes_of_any_pool(seed: int) -> None:
    chance = random.Random(seed)
    amounts = some_amounts(chance)
    rests = {
        gpu: chance.choice((100, 250, 500, 999)) for gpu in chance.sample(range(30), k=chance.randint(0, 4))
    }
    wanted = pattern(amounts, rests)
    pool = sorted(chance.sample(sorted({*range(30)} - {*rests}), k=len(wanted)))
    given = give(amounts, rests, pool)
    assert given == by_ray(amounts, rests | dict.fromkeys(pool, WHOLE)) and given is not None
    portions = Portions(amounts, tuple(pool), (), given)
    assert {*pool} == {*portions.taken} - {*rests}, "all of the pool is taken, and nothing else that is free"
    assert [gpu in portions.whole for gpu in pool] == list(wanted)
    assert sum(portions.taken.values()) == sum(amounts)
    assert all(part <= rests.get(gpu, WHOLE) for gpu, part in portions.taken.items())
    assert wanted == () or give(amounts, rests, pool[:-1]) is None, "with less it fails"


def as_good(node: Node, amounts: tuple[int, ...], within: Within) -> set[tuple[int, tuple[int, ...]]]:
    """Speed of the whole GPUs and cost to others, of the best of all that Ray could be left with.

    With whole GPUs, some others may be opened before; on as few GPUs as it takes without that.
    """
    found = []
    for size in range(len(node.free) + 1):
        for gpus in combinations(sorted(node.free), size):
            for opened in subsets(gpus) if max(amounts) >= WHOLE else [()]:
                pool = tuple(gpu for gpu in gpus if gpu not in opened)
                parts = dict.fromkeys(pool, WHOLE) | dict.fromkeys(opened, OPENED)
                given = by_ray(amounts, dict(node.rests) | parts)
                if given is None:
                    continue
                portions = Portions(amounts, pool, opened, given)
                if not {*gpus} <= {*portions.taken}:
                    continue
                whole = portions.whole
                fast_set = (
                    whole if len(whole) > 1 else pool
                )  # one GPU has no links; then it is about all of them
                speed = node.shape.mb_per_s(fast_set) if len(fast_set) > 1 else 0
                mask = sum(1 << gpu for gpu in whole)
                if len(whole) < 2 or node.shape.best(mask, len(whole), within) is not None:
                    found.append((-speed, node.shape.loss(node.mask, gpus)))
        if found:
            break
    return {min(found)} if found else set()


def subsets(gpus: Sequence[int]) -> list[tuple[int, ...]]:
    return [some for size in range(len(gpus) + 1) for some in combinations(gpus, size)]


@pytest.mark.parametrize("within", [Within.NODE, Within.NVLINK])
@pytest.mark.parametrize("seed", range(150))
def test_the_pool_is_the_best_of_all_that_may_be_left_to_ray(seed: int, within: Within) -> None:
    chance = random.Random(seed)
    node = some_node(chance, chance.choice(MACHINES))
    amounts = some_amounts(chance)
    needs = Needs(sum(amount // WHOLE for amount in amounts), within, amounts=amounts)
    portions, taken = node.portions(needs), node.choose(needs)
    best = as_good(node, amounts, within)
    assert (portions is not None) == bool(best) == (taken is not None) == bool(node.copies(needs))
    assert (node.offer(needs) is not None) == bool(best)
    if portions is None or taken is None:
        return
    parts = dict.fromkeys(portions.pool, WHOLE) | dict.fromkeys(portions.opened, OPENED)
    assert portions.given == by_ray(amounts, dict(node.rests) | parts)
    fast_set = portions.whole if needs.gpus > 1 else portions.pool
    speed = node.shape.mb_per_s(fast_set) if len(fast_set) > 1 else 0
    [(slowness, loss)] = best
    assert slowness == -speed or needs.gpus == 1
    # Where GPUs are opened, the whole ones are chosen first: all of them together may cost others more.
    assert loss == node.shape.loss(node.mask, parts) or portions.opened
    assert dict(zip(taken.gpus, taken.shares, strict=True)) == portions.taken
    after = node.after(taken)
    left = {gpu: node.rests.get(gpu, WHOLE) - part for gpu, part in portions.taken.items()}
    assert after.free == node.free - parts.keys()
    assert {gpu: after.rests.get(gpu, 0) for gpu in left} == left
    back = after.before(portions.taken, "")
    assert (back.free, {gpu: rest for gpu, rest in back.rests.items() if rest}) == (
        node.free,
        {gpu: rest for gpu, rest in node.rests.items() if rest},
    )


@pytest.mark.parametrize(
    ("case", "amounts", "named", "expected"),
    [
        ("none of the shared ones is named", (500, 500), (2, 3), Choice((2,), WHOLE, 0, (1000,))),
        ("a shared one is, and has room for one", (500, 500), (0, 3), Choice((0, 3), WHOLE, 600, (500, 500))),
        ("whole ones and a share", (1000, 250), (2, 3), Choice((2, 3), WHOLE, 750, (1000, 250))),
        ("too few are named", (1000, 500, 600), (2, 3), None),
        ("whole ones cannot be on those that are shared", (1000, 100), (0, 1), None),
        ("nobody has such a GPU", (500, 500), (9,), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_of_named_gpus_just_these_are_taken(
    case: str, amounts: tuple[int, ...], named: tuple[GpuName, ...], expected: Choice | None
) -> None:
    node = Node("n", "n", topology=Topology.unknown(4), free=frozenset({2, 3}), rests={0: 600, 1: 250})
    needs = Needs(sum(amount // WHOLE for amount in amounts), named=named, amounts=amounts)
    assert node.choose(needs) == expected


def test_free_memory_keeps_shares_off_full_gpus() -> None:
    node = Node(
        "n", "n", topology=Topology.unknown(4), free=frozenset({2, 3}), rests={0: 600, 1: 600},
        free_memory={0: 1, 1: 9, 2: 1, 3: 9},
    )  # fmt: skip
    taken = node.choose(Needs(0, amounts=(500, 500), free_memory_bytes=5))
    assert taken is not None and taken.gpus == (1, 3)
