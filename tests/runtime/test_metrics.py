"""What the gauges say of a cluster, how many series there are at most, and what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from placement import Deployment, monitoring, topologies
from placement.core.lifecycle import State
from placement.errors import Busy, NotEnoughGpus, PartlyApplied
from placement.runtime import metrics
from placement.runtime.discovery import NodeInfo
from placement.runtime.feed import Feed
from placement.runtime.metrics import Series, readings
from placement.runtime.results import NodeAssignment
from placement.runtime.status import cluster_status
from tests.properties.test_service import DirectService, Ray
from tests.runtime.test_status import _NO_GROUP, Known, known, observed


@dataclass
class Recorder:
    """Stands for a metric of Ray's."""

    values: list[tuple[float, dict[str, str]]] = field(default_factory=list)

    def inc(self, value: float, labels: dict[str, str]) -> None:
        self.values.append((value, labels))

    def set(self, value: float, labels: dict[str, str]) -> None:
        self.values.append((value, labels))

    def observe(self, value: float) -> None:
        self.values.append((value, {}))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Recorder]]:
    found = {one.name: Recorder() for one in monitoring.METRICS}
    monkeypatch.setattr(metrics, "_recorders", found)
    yield found
    metrics._lost_at.clear()


def read(nodes: list[NodeInfo], deployments: dict[str, Known], **more: Any) -> dict[Series, float]:
    seen = observed(nodes, deployments, **more)
    linked = {info.id: seen.hardware(info).topology for info in nodes}
    return readings(cluster_status(seen), linked, {}, 0.0, 0.0)


def of(found: dict[Series, float], name: str) -> dict[tuple[str, ...], float]:
    """The series of a metric that are not 0."""
    return {labels: value for (metric, labels), value in found.items() if metric == name and value}


def test_each_gpu_is_counted_once_by_its_state() -> None:
    facts = topologies.facts("a100-pcie-4x")
    lost = facts.model_copy(
        update={"gpus": (*facts.gpus[:3], facts.gpus[3].model_copy(update={"errors": ("Xid 79",)}))}
    )
    nodes = [NodeInfo("n", "n", "a", 4), NodeInfo("m", "m", "b", 4)]
    found = read(
        nodes,
        known(a=[(0, 0.5), (1, 1.0)], b=[(0, 0.25)]),
        facts={"n": lost},
        available={"n": {"GPU": 1.25}, "m": {"GPU": 2.0}},
    )
    assert lost.lost() == {3}
    assert of(found, "placement_gpus") == {
        ("n", "shared"): 1, ("n", "placed"): 1, ("n", "foreign"): 1, ("n", "unknown"): 1,
        ("m", "free"): 2, ("m", "foreign"): 2,
    }  # fmt: skip
    assert of(found, "placement_gpus_lost") == {("n",): 1}
    assert found["placement_gpus", ("n", "free")] == 0
    assert of(found, "placement_nodes") == {("alive",): 2}


def test_nodes_of_one_name_are_told_together() -> None:
    found = read([NodeInfo("1", "n", "a", 4), NodeInfo("2", "n", "b", 2)], {})
    assert of(found, "placement_gpus") == {("n", "free"): 6}


def test_replicas_are_told_by_deployment_and_deployments_by_owner() -> None:
    deployments = known(a=[(0, 1.0), (1, 1.0)], b=[(2, 1.0)])
    deployments["a"].states = {0: State.PLACED, 1: State.PLACED}
    deployments["a"].deployment = deployments["a"].deployment.model_copy(update={"replicas": 3})
    deployments["b"].owner = {"kind": "job", "job": "1"}
    found = read([NodeInfo("n", "n", "a", 4)], deployments)
    assert of(found, "placement_replicas") == {
        ("a", "placed"): 2, ("a", "pending"): 1, ("b", "placed"): 1,
    }  # fmt: skip
    assert of(found, "placement_deployments") == {("none",): 1, ("job",): 1}


def test_groups_of_callers_go_by_their_name_without_what_makes_it_unique() -> None:
    deployments = known(
        **{"verl-0a1b2c3d": [(0, 1.0)], "verl-ffffffff": [(1, 1.0)], "kept-00000000": [(2, 1.0)]}
    )
    for name in ("verl-0a1b2c3d", "verl-ffffffff"):
        deployments[name].owner = {"kind": "caller", "job": "1"}
    found = read([NodeInfo("n", "n", "a", 4)], deployments)
    assert of(found, "placement_replicas") == {("verl", "placed"): 2, ("kept-00000000", "placed"): 1}


def test_the_bandwidth_is_that_of_the_slowest_replica_beside_the_best_set_there() -> None:
    info = NodeInfo("n", "n", "a", 4)
    pairs = {"bridged": ([0, 1], 230.0), "apart": ([1, 2], 14.9)}
    held = [
        NodeAssignment(index, "n", gpus, _NO_GROUP, [0, 1], "n", bandwidth_gb_per_s=speed)
        for index, (gpus, speed) in enumerate(pairs.values())
    ]
    facts = {"n": topologies.facts("a100-pcie-4x")}
    one = Known(Deployment(name="a", model="m", replicas=2, gpus=2), held[:1])
    found = read([info], {"a": one}, facts=facts)
    assert found["placement_allreduce_best_ratio", ("a",)] == 1.0
    one.held = held
    found = read([info], {"a": one}, facts=facts)
    assert found["placement_allreduce_best_ratio", ("a",)] == pytest.approx(14.9 / 230, rel=0.05)
    assert found["placement_allreduce_bytes_per_second", ("a",)] == 14.9e9
    part = NodeAssignment(
        0, "n", [0, 1, 3], _NO_GROUP, [0, 0, 1], "n", shares=[1.0, 1.0, 0.5], bandwidth_gb_per_s=230.0
    )
    found = read([info], {"a": Known(one.deployment, [part])}, facts=facts)
    assert found["placement_allreduce_best_ratio", ("a",)] == 1.0, "it is about the whole GPUs"
    unknown = read([info], {"a": Known(one.deployment, [NodeAssignment(0, "n", [0, 1], _NO_GROUP, [0, 1])])})
    assert not of(unknown, "placement_allreduce_best_ratio")


def test_however_many_there_are_the_series_are_bounded_and_the_rest_is_told_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "MOST_NODES", 2)
    monkeypatch.setattr(metrics, "MOST_DEPLOYMENTS", 2)
    deployments = known(**{f"d{i}": [(0, 1.0)] for i in range(5)})
    for age, one in enumerate(deployments.values()):
        one.declared_at = float(-age)  # the last is the oldest
    nodes = [NodeInfo(f"n{i}", f"n{i}", "a", 4) for i in range(5)]
    found = read(nodes, deployments, at=1.0)
    assert {labels[0] for name, labels in found if name == "placement_replicas"} == {"d4", "d3", "(others)"}
    assert sum(of(found, "placement_replicas").values()) == 5
    assert of(found, "placement_gpus") == {("n0", "free"): 4, ("n1", "free"): 4, ("(others)", "free"): 12}


def test_every_reading_is_of_a_gauge_of_the_table_and_has_its_labels() -> None:
    gauges = {one.name: one.labels for one in monitoring.METRICS if one.kind == monitoring.GAUGE}
    deployments = known(a=[(0, 1.0)])
    pair = NodeAssignment(0, "n", [0, 1], _NO_GROUP, [0, 1], "n", bandwidth_gb_per_s=230.0)
    deployments["b"] = Known(Deployment(name="b", model="m", gpus=2), [pair])
    facts = {"n": topologies.facts("a100-pcie-4x")}
    found = read([NodeInfo("n", "n", "a", 4)], deployments, facts=facts)
    assert {name for name, _ in found} == set(gauges)
    assert all(len(labels) == len(gauges[name]) for name, labels in found)


def test_the_readings_are_the_status(service: DirectService, outside: Ray) -> None:
    service.place(Deployment(name="a", model="m", gpus=3))
    service.apply(Deployment(name="b", model="m", gpus=2, replicas=3))
    found, status = service.queries.readings(), service.queries.status()
    gpus = of(found, "placement_gpus")
    held = sum(value for (_, state), value in gpus.items() if state == "placed")
    assert (held, sum(gpus.values())) == (status["totals"]["held"], status["totals"]["gpus"])
    assert of(found, "placement_replicas")["b", "pending"] == status["totals"]["pending"] > 0
    assert of(found, "placement_queue_length") == {("deployment",): 1}
    assert found["placement_queue_oldest_seconds", ()] >= 0
    # Of two nodes with 4 GPUs one GPU is left beside the three: of no use to what wants two, half of what is asked.
    assert found["placement_gpus_fragmented", ()] > 0


def test_refusals_are_counted_by_code_and_other_failures_are_not(recorded: dict[str, Recorder]) -> None:
    @metrics.counted
    async def call(error: BaseException | None) -> str:
        if error is not None:
            raise error
        return "done"

    short = NotEnoughGpus("a", "too few", {}, "add some")
    several = PartlyApplied({"a": short.to_dict(), "b": short.to_dict()}, ())
    for error in (short, Busy("calls", 1), several, ValueError("a defect")):
        with pytest.raises(type(error)):
            asyncio.run(call(error))
    assert asyncio.run(call(None)) == "done"
    codes = [labels["code"] for _, labels in recorded["placement_refusals"].values]
    assert codes == ["not_enough_gpus", "busy", "not_enough_gpus", "not_enough_gpus"]


def test_a_reservation_that_raises_has_failed(recorded: dict[str, Recorder]) -> None:
    with metrics.reserving() as outcome:
        outcome("reserved")
    with pytest.raises(RuntimeError), metrics.reserving():
        raise RuntimeError
    outcomes = [labels["outcome"] for _, labels in recorded["placement_reservations"].values]
    assert outcomes == ["reserved", "failed"]
    assert set(outcomes) <= set(monitoring.OUTCOMES)


def test_a_recovery_is_from_the_loss_until_it_is_placed_again(recorded: dict[str, Recorder]) -> None:
    feed = Feed()
    for name, replica, state in [
        ("a", 0, "placed"), ("a", 0, "lost"), ("a", 1, "lost"), ("a", 0, "pending"), ("a", 0, "placed"),
        ("a", 1, "released"), ("a", 1, "placed"), ("a", None, "restarted"),
    ]:  # fmt: skip
        feed.add(name, replica, state)
    assert len(recorded["placement_recovery_seconds"].values) == 1
    assert not metrics._lost_at


def test_where_nothing_was_started_nothing_is_counted() -> None:
    metrics.steered(1)
    metrics.refused(Busy("calls", 1))
    metrics.noted("a", 0, "lost")
    assert not metrics._recorders and not metrics._lost_at


def test_gauges_are_set_again_and_again_as_long_as_they_can_be_read(
    recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (("placement_gpus_lost", (name,)) for name in "ab")
    told: list[Any] = [{a: 1.0, b: 2.0}, {b: 2.0}, ConnectionError(), {b: 3.0}]
    now, cost = [0.0], [0.0]

    def read() -> dict[Series, float]:
        cost[0] += 1.0  # a second of CPU time
        found = told.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def sleep(seconds: float) -> None:
        assert seconds == 5.0
        now[0] += seconds
        if not told:
            raise SystemExit

    monkeypatch.setattr(metrics.ray_internals, "metrics_export_seconds", lambda: 10.0)
    monkeypatch.setattr(
        metrics,
        "time",
        SimpleNamespace(sleep=sleep, monotonic=lambda: now[0], thread_time=lambda: cost[0]),
    )
    with pytest.raises(SystemExit):
        metrics._report(read)
    values = [(labels["node"], value) for value, labels in recorded["placement_gpus_lost"].values]
    # It reads for 2 % of the time, and sets them each 5 s; while it cannot read, it sets none.
    assert values == [("a", 1.0), ("b", 2.0)] * 10 + [("b", 2.0)] * 10 + [("b", 3.0)]
    assert now == [155.0]
