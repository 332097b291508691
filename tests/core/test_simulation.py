"""Simulated workloads: what is counted, by hand, and what must hold throughout."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.mix import Mix
from placement.core.needs import GIB, WHOLE, Needs
from placement.core.node import Node
from placement.core.policy import Policy
from placement.core.request import Request
from placement.core.simulation import Arrival, Report, fragmentation, gpus_asked, simulate
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology


def node(
    name: str = "a", gpus: int = 4, free: str | None = None, rests: dict[int, int] | None = None
) -> Node:
    return Node(
        name,
        name,
        topology=Topology.unknown(gpus),
        free=frozenset(range(gpus) if free is None else map(int, free)),
        rests=rests or {},
        cpu_milli=8000,
        memory_bytes=64 * GIB,
    )


def ask(gpus: int = 1, share: int = WHOLE, name: str = "d", **more: object) -> Request:
    return Request(name, (0,), Needs(gpus, share=share), **more)  # type: ignore[arg-type]


def fragmented(nodes: list[Node], *mix: Request) -> tuple[float, float]:
    asked = Mix()
    for request in mix:
        asked = asked.plus(request)
    return fragmentation(Snapshot(nodes, mix=asked))


@pytest.mark.parametrize(
    ("nodes", "mix", "expected"),
    [
        ([node()], [], (4.0, 0.0)),
        ([node()], [ask()], (4.0, 0.0)),
        # too few GPUs for it: all that is free is of no use
        ([node(free="01")], [ask(4)], (2.0, 2.0)),
        # enough of them: but the rest of a shared one is not
        ([node(free="01", rests={2: 400})], [ask(2)], (2.4, 0.4)),
        # a share can use any rest that is large enough
        ([node(free="", rests={0: 400, 1: 200})], [ask(share=300)], (0.6, 0.2)),
        # half of the requests can use all, half nothing
        ([node(free="01")], [ask(), ask(4)], (2.0, 1.0)),
        # no CPUs beside the GPUs
        ([node(free="01")], [ask(cpu_milli=9000)], (2.0, 2.0)),
        # not the GPUs that it insists on
        ([node(free="01"), node("b")], [ask(gpu_nodes=("b",))], (6.0, 2.0)),
        ([node()], [Request("d", (0,), Needs(1, profile="1g.10gb"))], (4.0, 0.0)),
    ],
)
def test_fragmented_is_what_the_mix_cannot_use(
    nodes: list[Node], mix: list[Request], expected: tuple[float, float]
) -> None:
    assert expected == pytest.approx(fragmented(nodes, *mix))


def test_what_is_asked_for_is_counted_in_gpus() -> None:
    cluster = Snapshot([node()])
    assert gpus_asked(cluster, ask(3)) == 3
    assert gpus_asked(cluster, Request("d", (0, 1), Needs(1, share=250))) == 0.5
    assert gpus_asked(cluster, Request("d", (0,), Needs(2), stages=2)) == 4
    assert gpus_asked(cluster, Request("d", (0,), provider="openai")) == 0


def test_what_leaves_makes_room_before_what_comes_at_that_time() -> None:
    arrivals = [
        Arrival(0, ask(4, name="first"), 10),
        Arrival(9, ask(name="early")),
        Arrival(10, ask(4, name="next")),
    ]
    report = simulate(Snapshot([node()]), arrivals)
    assert (report.placed, report.refused) == (2, 1)
    assert [moment.allocated_gpus for moment in report.moments] == [4, 4, 4]
    assert [moment.asked_gpus for moment in report.moments] == [4, 5, 5]
    assert [moment.arrived_gpus for moment in report.moments] == [4, 5, 9]
    assert dict(report.reasons) == {"has no GPU free": 1}


def test_a_refusal_is_remembered_until_something_leaves() -> None:
    arrivals = [Arrival(0, ask(4), 5), *(Arrival(at, ask(2)) for at in (1, 2, 6))]
    report = simulate(Snapshot([node()]), arrivals)
    assert (report.placed, report.refused) == (2, 2)


def test_a_deployment_may_come_near_another_until_that_has_left() -> None:
    near = ask(near_to=("db",), name="cache")
    arrivals = [Arrival(0, ask(name="db"), 5), Arrival(1, near), Arrival(6, near)]
    report = simulate(Snapshot([node()]), arrivals)
    assert (report.placed, dict(report.reasons)) == (2, {"has no replica of 'db'": 1})


def test_a_deployment_keeps_away_from_one_that_is_apart_from_it_until_that_has_left() -> None:
    arrivals = [Arrival(0, ask(apart_from=("db",), name="cache"), 5)]
    arrivals += [Arrival(at, ask(name="db")) for at in (1, 6)]
    report = simulate(Snapshot([node()]), arrivals)
    why = "has a replica of 'cache', which is to be apart from this one"
    assert (report.placed, dict(report.reasons)) == (2, {why: 1})


def test_bandwidth_is_a_part_of_the_best_that_the_empty_nodes_have() -> None:
    machine = topologies.load("a100-pcie-4x")
    bridge = machine.islands[0]
    empty = Node("a", "a", topology=machine, free=frozenset(range(4)))
    assert simulate(Snapshot([empty]), [Arrival(0, ask(2)), Arrival(1, ask(2))]).bandwidth == [1.0, 1.0]
    apart = Node("a", "a", topology=machine, free=frozenset(range(4)) - {bridge[0]} - {machine.islands[1][0]})
    [part] = simulate(Snapshot([apart]), [Arrival(0, ask(2))]).bandwidth
    assert 0 < part < 0.5


def test_moments_are_few_and_the_last_one_is_the_end() -> None:
    told: list[int] = []
    report = simulate(Snapshot([node()]), [Arrival(at, ask(), 1) for at in range(1000)], 50, told.append)
    assert len(report.moments) == 50 == len(told)
    assert (report.moments[-1].at_seconds, told[-1]) == (999, 1000)


@st.composite
def workloads(draw: st.DrawFn) -> list[Arrival]:
    found = []
    for _ in range(draw(st.integers(1, 15))):
        gpus = draw(st.integers(0, 4))
        share = draw(st.sampled_from((WHOLE, 250, 600))) if gpus == 1 else WHOLE
        request = Request(
            "d",
            tuple(range(draw(st.integers(1, 2)))),
            Needs(gpus, share=share),
            policy=draw(st.sampled_from(Policy)),
            cpu_milli=draw(st.sampled_from((0, 1000))),
        )
        stays = draw(st.one_of(st.none(), st.integers(0, 10)))
        found.append(Arrival(draw(st.integers(0, 20)), request, stays))
    return found


@settings(max_examples=100, deadline=None)
@given(workloads())
def test_free_and_allocated_add_up_at_every_moment(arrivals: list[Arrival]) -> None:
    report: Report = simulate(Snapshot([node(), node("b", 2)]), arrivals, moments=100)
    assert report.placed + report.refused == len(arrivals) == len(report.moments)
    for moment in report.moments:
        assert moment.free_gpus + moment.allocated_gpus == pytest.approx(6)
        assert -1e-9 <= moment.fragmented_gpus <= moment.free_gpus + 1e-9
        assert moment.allocated_gpus <= moment.asked_gpus + 1e-9
