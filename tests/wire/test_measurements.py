"""Measurements as files: our own, and what nccl-tests prints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from placement import topologies
from placement.errors import InvalidMeasurement
from placement.wire.machine import Machine
from placement.wire.measurements import (
    Device,
    MeasuredRate,
    Measurement,
    as_file,
    gpus_of,
    parse_nccl_tests,
    read_measurements,
)

MACHINE = Machine.make(topologies.load("a100-pcie-4x"))

HEADER = """\
# nThread 1 nGpus 2 minBytes 134217728 maxBytes 1073741824 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1
#
# Using devices
#  Rank  0 Group  0 Pid   1728 on gpu-a device  0 [0000:0f:00] NVIDIA A100 80GB PCIe
#  Rank  1 Group  0 Pid   1728 on gpu-a device  1 [0000:15:00] NVIDIA A100 80GB PCIe
"""
OLD_HEADER = """\
# Using devices
#   Rank  0 Pid  21834 on gpu-a device  0 [0x0f] A100-SXM4-40GB
#   Rank  1 Pid  21834 on gpu-a device  1 [0x15] A100-SXM4-40GB
"""
COLUMNS = """\
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""
SMALL = """\
   134217728      33554432     float     sum      -1   1200.0  111.85  111.85      0   1190.0  112.79  112.79      0
"""
LARGE = """\
  1073741824     268435456     float     sum      -1   5250.0  204.52  204.52      0   5180.0  207.29  207.29      0
"""
END = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 159.1\n#\n"
OUTPUT = HEADER + "NCCL version 2.27.3+cuda12.9\n" + COLUMNS + SMALL + LARGE + END


def measurement(**fields: Any) -> Measurement:
    told: dict[str, Any] = {
        "host": "gpu-a",
        "uuids": ("GPU-a", "GPU-b", "GPU-c", "GPU-d"),
        "machine": MACHINE,
        "rates": (MeasuredRate(gpus=(0, 1), gb_per_s=207.29),),
    }
    return Measurement(**(told | fields))


def test_the_largest_message_counts_in_place() -> None:
    [run] = parse_nccl_tests(OUTPUT, "f")
    assert (run.host, run.gb_per_s, run.message_bytes, run.library) == (
        "gpu-a", 207.29, 1073741824, "NCCL 2.27.3",
    )  # fmt: skip
    assert run.devices == (Device(0, "0000:0f:00"), Device(1, "0000:15:00"))


@pytest.mark.parametrize(
    ("case", "text", "library"),
    [
        ("an older version, which prints no root", OLD_HEADER + COLUMNS + LARGE.replace("      -1", ""), None),
        ("lines that srun has labelled", "".join(f" 0: {line}\n" for line in OUTPUT.splitlines()), "NCCL 2.27.3"),
        ("NCCL's own log in between", OUTPUT.replace(SMALL, "h:1:1 [0] NCCL INFO rank 0\n" + SMALL), "NCCL 2.27.3"),
        ("the version as a number, before the devices",
         "# nccl-tests version 2.17.6 nccl-headers=22808 nccl-library=22808\n" + HEADER + COLUMNS + LARGE,
         "NCCL 2.28.8"),
        ("columns that are cut by tabs", OUTPUT.replace("     ", "\t"), "NCCL 2.27.3"),
    ],
)  # fmt: skip
def test_it_is_read_in_every_form(case: str, text: str, library: str | None) -> None:
    [run] = parse_nccl_tests(text, "f")
    assert (run.gb_per_s, [one.index for one in run.devices], run.library) == (207.29, [0, 1], library)


def test_several_runs_of_one_file_are_several_results() -> None:
    assert [run.gb_per_s for run in parse_nccl_tests(OUTPUT + HEADER + COLUMNS + SMALL, "f")] == [
        207.29,
        112.79,
    ]


GATHER = """\
  1073741824     268435456     float    none      -1   5250.0  204.52  102.26    N/A   5180.0  207.29  103.65    N/A
"""


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        ("has no line `# Rank 0", "hello"),
        ("has no results", HEADER + COLUMNS),
        ("is over several hosts (gpu-a, gpu-b)", OUTPUT.replace("gpu-a device  1", "gpu-b device  1")),
        ("is of one GPU", "\n".join(line for line in OUTPUT.splitlines() if "Rank  1" not in line)),
        ("is not of all-reduce", HEADER + COLUMNS + GATHER),
        ("is not of all-reduce", HEADER + COLUMNS + LARGE.replace("207.29  207.29", "207.29  103.65")),
        ("had wrong results", OUTPUT.replace("112.79      0", "112.79      7")),
        ("has no bandwidths", OUTPUT.replace("207.29  207.29", "207.29  fast")),
    ],
)
def test_what_says_nothing_of_an_all_reduce_on_one_node_is_refused(problem: str, text: str) -> None:
    with pytest.raises(InvalidMeasurement, match="^f: ") as refused:
        parse_nccl_tests(text, "f")
    assert problem in str(refused.value)


def test_gpus_are_known_by_their_bus_whatever_cuda_counts() -> None:
    buses = {0: "0000:15:00.0", 1: "0000:1b:00.0", 2: "0000:0f:00.0", 3: "0000:88:00.0"}
    for header in (HEADER, OLD_HEADER):
        [run] = parse_nccl_tests(header + COLUMNS + LARGE, "f")
        assert gpus_of(run, buses, 4, "f") == (0, 2)
        assert gpus_of(run, {}, 4, "f") == (0, 1), "without NVML they are as CUDA counts"


@pytest.mark.parametrize(
    ("problem", "buses", "count"),
    [
        ("the node has no GPU like that", {0: "0000:15:00.0", 1: "0000:1b:00.0"}, 2),
        ("the node has 2 GPUs like that", {0: "0000:0f:00.0", 1: "0001:0f:00.0", 2: "0000:15:00.0"}, 3),
        ("the node has no GPU like that", {}, 1),
    ],
)
def test_a_run_on_another_node_is_refused(problem: str, buses: dict[int, str], count: int) -> None:
    [run] = parse_nccl_tests(OLD_HEADER + COLUMNS + LARGE, "f")
    with pytest.raises(InvalidMeasurement, match=problem):
        gpus_of(run, buses, count, "f")


def test_a_file_is_read_as_it_was_written() -> None:
    told = (measurement(), measurement(host="gpu-b", uuids=(None,) * 4))
    assert read_measurements(json.dumps(as_file(told)), "f") == told


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("measurements.0.rates.0.gb_per_s", {"rates": [{"gpus": [0, 1], "gb_per_s": 0}]}),
        ("measurements.0.rates.0.gpus", {"rates": [{"gpus": [1, 0], "gb_per_s": 1}]}),
        ("measurements.0.rates.0.gpus", {"rates": [{"gpus": [1], "gb_per_s": 1}]}),
        ("rates name GPU 4", {"rates": [{"gpus": [0, 4], "gb_per_s": 1}]}),
        ("uuids describe 3 GPUs, machine.matrix 4", {"uuids": ["a", "b", "c"]}),
        ("machine.matrix", {"machine": {"matrix": "hello"}}),
        ("measurements.0.host", {"host": None}),
        ("measurements.0.speed", {"speed": 1}),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_by_the_field(field: str, change: dict[str, Any]) -> None:
    file = as_file([measurement()])
    file["measurements"][0] |= change
    with pytest.raises(InvalidMeasurement) as refused:
        read_measurements(json.dumps(file), "f")
    assert field in str(refused.value) and "placement measure --export" in str(refused.value)


def test_a_later_measurement_counts_for_the_sets_that_it_has() -> None:
    first = measurement(rates=[{"gpus": (0, 1), "gb_per_s": 100}, {"gpus": (0, 2), "gb_per_s": 20}])
    later = measurement(rates=[{"gpus": (0, 1), "gb_per_s": 200}, {"gpus": (2, 3), "gb_per_s": 210}])
    assert first.updated(later).mb_per_s() == {(0, 1): 200_000, (0, 2): 20_000, (2, 3): 210_000}


def test_a_node_is_known_by_its_gpus_and_by_its_name_where_one_is_unknown() -> None:
    assert measurement().identity == measurement(host="renamed").identity
    assert measurement().identity != measurement(uuids=("GPU-a", "GPU-b", "GPU-d", "GPU-c")).identity
    nameless = measurement(uuids=(None,) * 4)
    assert nameless.identity != measurement(host="gpu-b", uuids=(None,) * 4).identity
