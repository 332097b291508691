"""What a simulation remembers and counts, beyond the plain cases of ``test_simulation.py``."""

from __future__ import annotations

from typing import Any

import pytest

from placement import topologies
from placement.core.mix import Mix
from placement.core.needs import GIB, Needs, Within
from placement.core.node import Node
from placement.core.request import Request
from placement.core.simulation import Arrival, Report, fragmentation, gpus_asked, simulate
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology

BRIDGED = topologies.load("a100-pcie-4x")


def node(name: str, gpus: int = 2, **fields: object) -> Node:
    defaults = {
        "free": frozenset(range(gpus)),
        "cpu_milli": 4000,
        "memory_bytes": GIB,
        "labels": {"zone": "z"},
    }
    return Node(name, name, topology=Topology.unknown(gpus), **{**defaults, **fields})  # type: ignore[arg-type]


def ask(needs: Needs = Needs(1), replicas: int = 1, **fields: object) -> Request:  # noqa: B008
    return Request("d", tuple(range(replicas)), needs, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("refused", "fits"),
    [
        (ask(Needs(3)), ask(Needs(2))),
        (ask(replicas=5), ask(replicas=4)),
        (ask(cpu_milli=4001), ask(cpu_milli=4000)),
        (ask(memory_bytes=GIB + 1), ask(memory_bytes=GIB)),
        (ask(gpu_nodes=("a",), replicas=3), ask(gpu_nodes=("b",), replicas=2)),
        (ask(Needs(2), stages=3), ask(Needs(2), stages=2)),
        (ask(Needs(2), parts=2), ask(Needs(2))),
        (ask(Needs(4)), ask(Needs(4), divisible=True)),
        (ask(Needs(2, Within.NVLINK)), ask(Needs(2))),
        (
            ask(replicas=2, spread_label="zone", max_per_domain=1),
            ask(replicas=2, spread_label="zone", max_per_domain=2),
        ),
        (ask(replicas=2, spread_label="zone", max_per_domain=1), ask(replicas=2)),
        (ask(labels={"zone": "y"}), ask(labels={"zone": "z"})),
        (ask(near_to=("db",)), ask()),
    ],
)
def test_what_was_refused_stays_refused_for_its_like_and_nobody_else(refused: Request, fits: Request) -> None:
    cluster = Snapshot([node("a"), node("b")])
    report = simulate(cluster, [Arrival(0, refused), Arrival(1, refused), Arrival(2, fits)])
    assert (report.refused, report.placed) == (2, 1)
    assert list(report.reasons.values()) == [2], "both for the same reason"
    alone = simulate(cluster, [Arrival(0, refused)])
    assert alone.reasons.keys() == report.reasons.keys()


def test_who_wants_to_be_near_another_is_tried_again_once_that_has_come() -> None:
    cache, db = (
        Request(name, (0,), Needs(1), near_to=near) for name, near in (("cache", ("db",)), ("db", ()))
    )
    report = simulate(Snapshot([node("a")]), [Arrival(0, cache), Arrival(1, db), Arrival(2, cache)])
    assert (report.refused, report.placed) == (1, 2)


def test_who_stands_apart_from_another_is_tried_again_once_that_has_left() -> None:
    db = Request("db", (0, 1), Needs(1))
    alone = Request("alone", (0,), Needs(1), apart_from=("db",))
    arrivals = [Arrival(0, db, 5), Arrival(1, alone), Arrival(6, alone)]
    report = simulate(Snapshot([node("a", gpus=3)]), arrivals)
    assert (report.refused, report.placed) == (1, 2)


def test_a_remote_replica_is_refused_and_placed_by_its_own_capacity() -> None:
    egress = Node("e", "e", egress={"egress": 3})
    remote = Request("r", (0,), provider="openai", key="k", egress=2)
    arrivals = [Arrival(0, remote, 2), Arrival(1, remote), Arrival(3, remote)]
    report = simulate(Snapshot([node("a"), egress]), arrivals)
    assert (report.placed, report.refused) == (2, 1)
    assert [moment.asked_gpus for moment in report.moments] == [0, 0, 0]


def test_a_moment_counts_what_is_held_asked_and_free() -> None:
    half = Request("half", (0, 1), Needs(1, share=500))
    whole = Request("whole", (0,), Needs(2))
    arrivals = [Arrival(0, half, 10), Arrival(4, whole, 10), Arrival(12, whole), Arrival(12, half)]
    report = simulate(Snapshot([node("a", gpus=3)]), arrivals)
    assert [(m.at_seconds, m.arrived_gpus, m.asked_gpus, m.allocated_gpus, m.free_gpus) for m in report.moments] == [
        (0, 1, 1, 1, 2),
        (4, 3, 3, 3, 0),
        (12, 5, 4, 2, 1),
        (12, 6, 5, 3, 0),
    ]  # fmt: skip
    assert (report.gpus, report.placed, report.refused) == (3, 3, 1)


def test_instances_are_neither_asked_for_nor_held_in_gpus() -> None:
    slots = dict.fromkeys(range(2), "1g.10gb")
    cut_up = node("a", slots=slots, instances=slots, free=frozenset())
    instance = ask(Needs(1, profile="1g.10gb"), replicas=2)
    report = simulate(Snapshot([cut_up]), [Arrival(0, instance)])
    [moment] = report.moments
    assert (report.gpus, report.placed) == (0, 1)
    assert (moment.arrived_gpus, moment.asked_gpus, moment.allocated_gpus, moment.free_gpus) == (0, 0, 0, 0)


def test_memory_is_asked_for_as_a_part_of_the_largest_gpu() -> None:
    cluster = Snapshot([node("a", gpu_memory_bytes=40 * GIB), node("b", gpu_memory_bytes=80 * GIB)])
    assert gpus_asked(cluster, ask(Needs(1, memory_bytes=20 * GIB), replicas=2)) == 0.5
    assert gpus_asked(cluster, ask(Needs(4), replicas=2, stages=3, parts=2)) == 48


def test_bandwidth_is_that_of_the_slowest_set_of_each_replica() -> None:
    def bridged(name: str, *free: int) -> Node:
        return Node(name, name, topology=BRIDGED, free=frozenset(free))

    two_sets = Request("d", (0,), Needs(2), stages=2)
    assert simulate(Snapshot([bridged("a", 0, 1, 2, 3)]), [Arrival(0, two_sets)]).bandwidth == [1.0]
    [part] = simulate(Snapshot([bridged("a", 0, 1), bridged("b", 0, 2)]), [Arrival(0, two_sets)]).bandwidth
    assert part == pytest.approx(14.857 / 230.4)
    single = simulate(Snapshot([bridged("a", 0, 1)]), [Arrival(0, ask(Needs(1), replicas=2))])
    assert single.bandwidth == []
    elsewhere = [bridged("a", 0, 2), node("b")]
    [part] = simulate(Snapshot(elsewhere), [Arrival(0, ask(Needs(2), gpu_nodes=("b",)))]).bandwidth
    assert part == 1.0, "of the nodes that it may go to"


def test_a_report_in_json() -> None:
    nothing = Report(4).to_dict()
    assert nothing == {
        "gpus": 4, "placed": 0, "refused": 0, "refusals": {}, "bandwidth_of_best_mean": None,
        "bandwidth_of_best_worst": None, "moments": [],
    }  # fmt: skip
    cluster = Snapshot([Node("a", "a", topology=BRIDGED, free=frozenset({0, 1, 2}))])
    report = simulate(cluster, [Arrival(5, ask(Needs(2))), Arrival(6, ask(Needs(2)))])
    assert report.to_dict() == {
        "gpus": 4, "placed": 1, "refused": 1, "refusals": {"has fewer than 2 GPUs free": 1},
        "bandwidth_of_best_mean": 1.0, "bandwidth_of_best_worst": 1.0,
        "moments": [
            {"at_seconds": at, "arrived_gpus": asked, "asked_gpus": asked, "allocated_gpus": 2, "free_gpus": 1,
             "fragmented_gpus": 1} for at, asked in ((5, 2), (6, 4))
        ],
    }  # fmt: skip
    report.bandwidth = [1.0, 0.5]
    assert (report.to_dict()["bandwidth_of_best_mean"], report.to_dict()["bandwidth_of_best_worst"]) == (
        0.75,
        0.5,
    )


@pytest.mark.parametrize(
    ("arrivals", "most", "reported"),
    [(7, 3, [3, 6, 7]), (6, 3, [2, 4, 6]), (2, 3, [1, 2]), (1, 1, [1]), (0, 3, [])],
)
def test_moments_are_spread_evenly_and_told(arrivals: int, most: int, reported: list[int]) -> None:
    told: list[int] = []
    cluster = Snapshot([node("a")])
    report = simulate(cluster, [Arrival(at, ask(), 0) for at in range(arrivals)], most, told.append)
    assert (told, [moment.at_seconds + 1 for moment in report.moments]) == (reported, reported)


def test_arrivals_may_be_given_in_any_order() -> None:
    late, early = Arrival(9, ask(Needs(2), gpu_nodes=("a",))), Arrival(1, ask(Needs(1), gpu_nodes=("a",)))
    report = simulate(Snapshot([node("a")]), [late, early])
    assert (report.placed, [moment.at_seconds for moment in report.moments]) == (1, [1, 9])


@pytest.mark.parametrize(
    ("asked", "fragmented"),
    [
        ({"cpu_milli": 4000, "memory_bytes": GIB}, 0),
        ({"cpu_milli": 4001}, 2),
        ({"memory_bytes": GIB + 1}, 2),
        ({"cpu_milli": 4001, "memory_bytes": GIB + 1}, 2),
    ],
)
def test_what_is_free_is_of_use_where_there_is_just_as_much_beside_it(
    asked: dict[str, Any], fragmented: float
) -> None:
    mix = Mix().plus(ask(replicas=2, **asked))
    assert fragmentation(Snapshot([node("a")], mix=mix)) == (2, fragmented)


def test_a_kind_that_is_asked_for_more_often_counts_more_and_uses_its_own_parts() -> None:
    """Of 1.4 free GPUs, three requests for a half can use the whole one, and one for a pair nothing."""
    there = node("a", free=frozenset({0}), rests={1: 400})
    mix = Mix().plus(ask(Needs(1, share=500), replicas=3)).plus(ask(Needs(2)))
    assert fragmentation(Snapshot([there], mix=mix)) == pytest.approx((1.4, (3 * 0.4 + 1.4) / 4))
    ill = node("b", problem="is ill")
    assert fragmentation(Snapshot([there, ill], mix=mix))[0] == pytest.approx(1.4)


def test_memory_counts_by_the_gpu_it_is_on() -> None:
    quarter = Mix().plus(ask(Needs(1, memory_bytes=20 * GIB)))
    sizes = {"a": 80 * GIB, "b": 16 * GIB, "c": None}
    nodes = [node(name, gpus=1, gpu_memory_bytes=size) for name, size in sizes.items()]
    assert fragmentation(Snapshot(nodes, mix=quarter)) == (3, 2)
