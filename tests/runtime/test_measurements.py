"""What was measured is kept, and nodes go by it: those that it was measured on, and those of their make."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from placement import Deployment, topologies
from placement.core.score import score
from placement.core.topology import MeasuredRates
from placement.runtime import ray_internals
from placement.runtime.discovery import NodeInfo
from placement.runtime.inventory import Inventory
from placement.runtime.orders import GpuHardware, Order, hardware_of, order_of, with_rates
from placement.runtime.status import Observed, cluster_status
from placement.runtime.topology_report import measured_report
from placement.wire.cluster import ClusterFile
from placement.wire.facts import NodeFacts
from placement.wire.machine import Machine
from placement.wire.measurements import MeasuredRate, Measurement

BRIDGED = topologies.facts("a100-pcie-4x")
NODES = [NodeInfo(name, name, name, 4) for name in ("a", "b", "c")]
FACTS = {"a": BRIDGED, "b": BRIDGED, "c": topologies.facts("t4-4x")}


def measured(host: str, rates: Mapping[tuple[int, ...], float], name: str = "a100-pcie-4x") -> Measurement:
    return Measurement(
        host=host,
        uuids=(None,) * 4,
        machine=Machine.make(topologies.load(name)),
        rates=tuple(MeasuredRate(gpus=gpus, gb_per_s=rate) for gpus, rate in rates.items()),
    )


@pytest.fixture
def store() -> Iterator[dict[bytes, bytes]]:
    found: dict[bytes, bytes] = {}
    with (
        mock.patch.object(ray_internals, "kv_put", lambda key, value, namespace: found.update({key: value})),
        mock.patch.object(ray_internals, "kv_delete", lambda key, namespace: found.pop(key)),
        mock.patch.object(
            ray_internals,
            "kv_all",
            lambda prefix, namespace: {k: v for k, v in found.items() if k.startswith(prefix)},
        ),
    ):
        yield found


def inventory(facts: Mapping[str, NodeFacts] = FACTS) -> Inventory:
    agents: Any = SimpleNamespace(working=lambda nodes: contextlib.nullcontext())
    return Inventory(agents, dict(facts))


def rates(known: Inventory) -> list[MeasuredRates]:
    return [known.hardware(info).topology.measured for info in NODES]


def test_a_node_goes_by_its_own_rates_and_others_of_its_make_go_by_them_too(
    store: dict[bytes, bytes],
) -> None:
    known = inventory()
    assert rates(known) == [(), (), ()]
    known.pop_changed()
    known.record_measurement(measured("a", {(0, 1): 212.0}))
    assert known.pop_changed() == {"a", "b"}
    assert rates(known) == [(((0, 1), 212_000),), (((0, 1), 212_000),), ()]
    known.record_measurement(measured("b", {(0, 1): 185.0, (0, 2): 18.0}))
    assert rates(known) == [
        (((0, 1), 212_000), ((0, 2), 18_000)), (((0, 1), 185_000), ((0, 2), 18_000)), (),
    ]  # fmt: skip


def test_nodes_whose_rates_differ_by_noise_are_equally_fast(store: dict[bytes, bytes]) -> None:
    known = inventory()
    known.record_measurement(measured("a", {(0, 1): 212.0}))
    known.record_measurement(measured("b", {(0, 1): 209.0}))
    first, second, _ = (known.hardware(info).topology for info in NODES)
    assert first is second and first.measured == (((0, 1), 209_000),)


def test_nodes_of_one_make_share_their_tables(store: dict[bytes, bytes]) -> None:
    known = inventory()
    known.record_measurement(measured("elsewhere", {(0, 1): 212.0}))
    first, second, _ = (known.hardware(info).topology for info in NODES)
    assert first is second and first.model == "NVIDIA A100 80GB PCIe"


def test_a_suspect_figure_is_that_of_its_node_alone(store: dict[bytes, bytes]) -> None:
    known = inventory()
    known.record_measurement(measured("a", {(0, 1): 12.0, (2, 3): 212.0}))
    assert rates(known)[:2] == [(((0, 1), 12_000), ((2, 3), 212_000)), (((2, 3), 212_000),)]


def test_a_service_that_starts_anew_knows_it_and_leaves_what_it_cannot_read(
    store: dict[bytes, bytes],
) -> None:
    inventory().record_measurement(measured("a", {(0, 1): 212.0}))
    store[b"measured/later"] = b'{"version": 9}'
    again = inventory()
    again.restore({"a"})
    assert rates(again)[0] == (((0, 1), 212_000),)
    assert b"measured/later" in store


def test_what_is_measured_again_replaces_what_was_and_leaves_the_rest(store: dict[bytes, bytes]) -> None:
    known = inventory()
    known.record_measurement(measured("a", {(0, 1): 100.0, (2, 3): 200.0}))
    known.record_measurement(measured("a", {(0, 1): 210.0}))
    assert [one.mb_per_s() for one in known.measurements.all()] == [{(0, 1): 210_000, (2, 3): 200_000}]
    assert len(store) == 1


def test_a_host_whose_links_have_changed_is_another_make(store: dict[bytes, bytes]) -> None:
    known = inventory()
    known.record_measurement(measured("c", {(0, 1): 212.0}))
    assert rates(known) == [(((0, 1), 212_000),), (((0, 1), 212_000),), ()]


def test_gpus_are_known_by_their_uuids_and_a_node_that_is_renamed_keeps_its_rates(
    store: dict[bytes, bytes],
) -> None:
    uuids = tuple(f"GPU-{gpu}" for gpu in range(4))
    gpus = tuple(gpu.model_copy(update={"uuid": uuid}) for gpu, uuid in zip(BRIDGED.gpus, uuids, strict=True))
    known = inventory({**FACTS, "b": BRIDGED.model_copy(update={"gpus": gpus})})
    earlier = measured("old-name", {(0, 1): 12.0}).model_copy(update={"uuids": uuids})
    known.record_measurement(earlier)
    assert rates(known)[:2] == [(), (((0, 1), 12_000),)], "suspect, so that only its own node goes by it"


def test_an_order_says_what_it_was_planned_with() -> None:
    found = (((0, 1), 212_000),)
    deployment = Deployment(name="d", model="m", runtime="vllm", gpus=2)
    order: Order = order_of("o", deployment, measured=found)
    assert with_rates(hardware_of(BRIDGED, 4), order.measured).topology.measured == found


def status(hardware: GpuHardware) -> dict[str, Any]:
    seen = Observed(NODES[:1], {}, lambda info: hardware, {"a": BRIDGED})
    found: dict[str, Any] = cluster_status(seen)["nodes"][0]
    return found


def test_status_tells_of_suspect_pairs() -> None:
    hardware = hardware_of(BRIDGED, 4)
    assert status(hardware)["problem"] is None and status(hardware)["suspects"] == []
    slow = with_rates(hardware, (((0, 1), 11_900), ((0, 2), 18_000), ((2, 3), 100_000)))
    assert status(slow)["suspects"] == [
        {"gpus": [0, 1], "gb_per_s": 11.9, "predicted_gb_per_s": 230.4},
        {"gpus": [2, 3], "gb_per_s": 100.0, "predicted_gb_per_s": 230.4},
    ]
    assert status(slow)["problem"] == (
        "suspect: GPU 0 and 1 measured at 11.9 of 230 GB/s, and 1 pair more; see `placement topology`"
    )


def test_topology_tells_what_was_measured_and_where() -> None:
    topology = with_rates(hardware_of(BRIDGED, 4), (((0, 1), 11_900), ((2, 3), 212_000))).topology
    mine, others = measured_report(topology, measured("a", {(0, 1): 11.9}))
    assert (mine["gpus"], mine["own"], mine["suspect"], mine["predicted_gb_per_s"]) == (
        [0, 1],
        True,
        True,
        230.4,
    )
    assert others == {
        "gpus": [2, 3], "gb_per_s": 212.0, "predicted_gb_per_s": 230.4, "suspect": False, "own": False,
    }  # fmt: skip


def test_a_plan_from_a_file_goes_by_the_same_rates(store: dict[bytes, bytes]) -> None:
    known = inventory()
    known.record_measurement(measured("a", {(0, 1): 90.0, (2, 3): 212.0}))
    machine = Machine.of(known.hardware(NODES[0]).topology)
    read = ClusterFile.model_validate_json(ClusterFile(machines={"m": machine}).model_dump_json())
    topology = read.machines["m"].topology()
    assert topology == known.hardware(NODES[0]).topology
    assert score(topology, (0, 1)).bandwidth_gb_per_s == 90.0


def test_what_was_measured_is_forgotten_and_nodes_go_by_the_rest(store: dict[bytes, bytes]) -> None:
    known = inventory()
    known.record_measurement(measured("a", {(0, 1): 212.0}))
    known.record_measurement(measured("b", {(0, 1): 185.0, (0, 2): 18.0}))
    known.record_measurement(measured("gone", {(0, 3): 20.0}))
    rates(known), known.pop_changed()
    assert [(one.host, len(one.rates)) for one in known.forget_measurements("b", NODES)] == [("b", 2)]
    assert known.pop_changed() == {"a", "b"}
    assert rates(known)[:2] == [(((0, 1), 212_000), ((0, 3), 20_000))] * 2
    assert [one.host for one in known.forget_measurements("gone", NODES)] == ["gone"]
    assert known.forget_measurements("nobody", NODES) == []
    assert [one.host for one in known.forget_measurements(None, NODES)] == ["a"]
    assert (rates(known), store) == ([(), (), ()], {})
    assert known.forget_measurements(None, NODES) == []


def test_a_node_whose_name_is_another_now_is_forgotten_by_its_gpus(store: dict[bytes, bytes]) -> None:
    uuids = ("GPU-0", "GPU-1", "GPU-2", "GPU-3")
    gpus = tuple(gpu.model_copy(update={"uuid": uuid}) for gpu, uuid in zip(BRIDGED.gpus, uuids, strict=True))
    known = inventory(FACTS | {"a": BRIDGED.model_copy(update={"gpus": gpus})})
    known.record_measurement(measured("earlier", {(0, 1): 212.0}).model_copy(update={"uuids": uuids}))
    assert [one.host for one in known.forget_measurements("a", NODES)] == ["earlier"]
    assert rates(known)[0] == ()
