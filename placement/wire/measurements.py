"""Measured rates of nodes: as the service keeps them, as files hold them, and as nccl-tests prints them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from placement.core.pasted import shortened
from placement.errors import InvalidMeasurement, MatrixError
from placement.wire.base import Model
from placement.wire.machine import GbPerSecond, Machine, mb_per_s
from placement.wire.text import printable


class MeasuredRate(Model):
    """The measured rate of one set of GPUs."""

    gpus: tuple[int, ...] = Field(min_length=2, description="ordinals, ascending")
    gb_per_s: GbPerSecond = Field(
        description="bus bandwidth of a large all-reduce, as nccl-tests has it: 10^9 bytes per second and GPU"
    )
    message_bytes: PositiveInt | None = Field(
        default=None, description="message size of each GPU, per all-reduce"
    )
    library: str | None = Field(default=None, description="the library and its version: NCCL 2.27.3")
    driver_version: str | None = None
    measured_at: datetime | None = None

    @field_validator("library", "driver_version")
    @classmethod
    def _is_printable(cls, value: str | None) -> str | None:
        return value if value is None else shortened(printable(value))

    @field_validator("gpus")
    @classmethod
    def _ascends(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or value[:1] < (0,):
            raise ValueError("must be ordinals, ascending, each once")
        return value


class Measurement(Model):
    """The measured rates of one node: the node's identity, its machine, and the rates of its sets."""

    host: str = Field(description="the node's name")
    uuids: tuple[str | None, ...] = Field(description="UUIDs of its GPUs, in the order of their ordinals")
    machine: Machine = Field(description="its make: nodes of an equal make use these rates, too")
    rates: tuple[MeasuredRate, ...]

    @field_validator("host")
    @classmethod
    def _is_printable(cls, value: str) -> str:
        return shortened(printable(value))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            count = len(self.machine.topology())
        except MatrixError as error:
            raise ValueError(f"machine.matrix: {error}") from None
        if count != len(self.uuids):
            raise ValueError(f"uuids describe {len(self.uuids)} GPUs, machine.matrix {count}")
        for one in self.rates:
            if one.gpus[-1] >= len(self.uuids):
                raise ValueError(f"rates name GPU {one.gpus[-1]}, but uuids describe {len(self.uuids)} GPUs")
        if self.machine.measured:
            raise ValueError("machine.measured must be empty; put measured rates in rates")
        return self

    @property
    def identity(self) -> tuple[object, ...]:
        """How its node is recognized; see :func:`identity_of`."""
        return identity_of(self.host, self.uuids)

    def mb_per_s(self) -> dict[tuple[int, ...], int]:
        """Set of GPUs -> MB/s."""
        return {one.gpus: mb_per_s(one.gb_per_s) for one in self.rates}

    def updated(self, later: Measurement) -> Measurement:
        """The rates after another measurement of the node, which replaces those of the sets that it has."""
        rates = {one.gpus: one for one in (*self.rates, *later.rates)}
        return later.model_copy(update={"rates": tuple(rates[gpus] for gpus in sorted(rates))})


def identity_of(host: str, uuids: Sequence[str | None]) -> tuple[object, ...]:
    """How a node is recognized: by its GPUs' UUIDs, and by its name only if one of them has no UUID."""
    return tuple(uuids) if all(uuids) else (host, len(uuids))


class MeasurementFile(Model):
    """The file that ``placement measure --export`` writes."""

    version: Literal[1] = 1
    measurements: tuple[Measurement, ...]


def read_measurements(text: str, source: str) -> tuple[Measurement, ...]:
    """Reads a file of ``placement measure --export``.

    Raises:
        InvalidMeasurement: the text is no such file; names the first field at fault.
    """
    try:
        return MeasurementFile.model_validate_json(text).measurements
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = shortened(printable(".".join(map(str, first["loc"]))), 200)
        what = f"{field}: {first['msg']}" if field else str(first["msg"])
        raise InvalidMeasurement(source, f"{what}; write it with `placement measure --export`") from None


# -- nccl-tests ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """One GPU in the output of nccl-tests.

    Attributes:
        index: CUDA's number.
        bus: ``1b``, or with domain and device ``0000:1b:00``.
    """

    index: int
    bus: str


@dataclass(frozen=True)
class NcclRun:
    """One run of ``all_reduce_perf`` on one host.

    Attributes:
        host: its own host name.
        devices: by rank.
        gb_per_s: bus bandwidth of the largest message, in place, as engines reduce.
        message_bytes: its size.
        library: ``"NCCL 2.27.3"``, ``None`` where that is not printed.
    """

    host: str
    devices: tuple[Device, ...]
    gb_per_s: float
    message_bytes: int
    library: str | None = None


@dataclass
class _Run:
    """The lines of one run."""

    hosts: set[str] = field(default_factory=set)
    devices: list[Device] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    library: str | None = None


_LABEL = re.compile(r"^\s*\d+:\s?(?=\s*(?:#|\d))")
"""The prefix that ``srun --label`` puts before each line."""
_DEVICE = re.compile(
    r"#\s+Rank\s+(?P<rank>\d+)\s+.*?Pid\s+\d+\s+on\s+(?P<host>\S+)\s+device\s+(?P<index>\d+)\s+\[(?:0x)?(?P<bus>[0-9a-fA-F:]+)\]"
)
_VERSION = re.compile(r"NCCL version\s+(\d[\d.]*\d)|nccl-library=(\d+)")


def parse_nccl_tests(text: str, source: str) -> list[NcclRun]:
    """The runs of ``all_reduce_perf`` in a text, one or several.

    Of each run the largest message counts, and its in-place bandwidth. The format is that of ``src/common.cu`` of
    NVIDIA/nccl-tests, 2.0 to 2.17: a line for each GPU, then one for each message with time, algbw, busbw and #wrong,
    out of place and in place. Lines in between (``NCCL INFO``, labels of ``srun``) are passed over.

    Raises:
        InvalidMeasurement: a run is of another collective, of several hosts, of wrong results, or is cut off; or there
            is none.
    """
    runs: list[_Run] = []
    library = None
    for line in text.splitlines():
        line = _LABEL.sub("", line)
        if found := _VERSION.search(line):
            library = f"NCCL {found[1] or _dotted(int(found[2]))}"
        if found := _DEVICE.search(line):
            if int(found["rank"]) == 0 or not runs:
                runs.append(_Run())
            runs[-1].hosts.add(printable(found["host"]))
            runs[-1].devices.append(Device(int(found["index"]), found["bus"].lower()))
        elif runs and (row := _row(line)):
            runs[-1].rows.append(row)
            runs[-1].library = library
    if not runs:
        raise InvalidMeasurement(
            source,
            "has no line `# Rank 0 ... device ...`; give the whole output of all_reduce_perf, unchanged",
        )
    return [_checked(run, source) for run in runs]


def _row(line: str) -> list[str] | None:
    """The columns of a line of results, without the root that older versions do not print."""
    columns = line.split()
    if len(columns) == 13:
        del columns[4]
    is_row = len(columns) == 12 and columns[0].isdigit() and columns[1].isdigit()
    return columns if is_row else None


def _checked(run: _Run, source: str) -> NcclRun:
    hosts, devices, rows = sorted(run.hosts), run.devices, run.rows
    if len(hosts) > 1:
        several = shortened(", ".join(hosts))
        raise InvalidMeasurement(
            source, f"a run is over several hosts ({several}); give one of a single node"
        )
    if len(devices) < 2:
        raise InvalidMeasurement(source, "a run is of one GPU; run all_reduce_perf with -g 2 or more")
    if not rows:
        raise InvalidMeasurement(source, "a run has no results; give the whole output of all_reduce_perf")
    largest = max(rows, key=lambda row: int(row[0]))
    try:
        algorithm, bus = float(largest[9]), float(largest[10])
        wrong = any(int(row[column]) for row in rows for column in (7, 11) if row[column].isdigit())
    except ValueError:
        raise InvalidMeasurement(
            source, f"the line of {largest[0]} bytes has no bandwidths; give the output unchanged"
        ) from None
    count = len(devices)
    # In all-reduce each GPU sends 2 (k - 1) / k of the message; nccl-tests' PERFORMANCE.md.
    if largest[3] == "none" or abs(bus - algorithm * 2 * (count - 1) / count) > 0.02 + 0.01 * bus:
        raise InvalidMeasurement(
            source, "a run is not of all-reduce, by its bus bandwidth; run all_reduce_perf"
        )
    if wrong:
        raise InvalidMeasurement(source, "a run had wrong results (#wrong), so it is not used")
    if not bus > 0:
        raise InvalidMeasurement(
            source, "the messages are too small for a bandwidth; run it with -b 1G -e 1G"
        )
    return NcclRun(hosts[0], tuple(devices), bus, int(largest[0]), run.library)


def _dotted(code: int) -> str:
    """NCCL_VERSION_CODE (22703) as ``2.27.3``; ``nccl.h`` has the form, since 2.9."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def gpus_of(run: NcclRun, bus_ids: Mapping[int, str], count: int, source: str) -> tuple[int, ...]:
    """The GPUs of a node that a run was on: by their PCI bus ids where these are known, else by CUDA's numbers.

    Args:
        run: what was run.
        bus_ids: GPU -> PCI bus id (``0000:1b:00.0``), as far as it is known.
        count: how many GPUs the node has.
        source: the file.

    Raises:
        InvalidMeasurement: the node lacks one, or two are the same GPU.
    """
    by_bus: dict[tuple[int, ...], list[int]] = {}
    for gpu, bus_id in bus_ids.items():
        domain, bus, device = (int(part, 16) for part in bus_id.split(".")[0].split(":"))
        by_bus.setdefault((bus,), []).append(gpu)
        by_bus.setdefault((domain, bus, device), []).append(gpu)
    found = []
    for one in run.devices:
        key = tuple(int(part, 16) for part in one.bus.split(":") if part)
        here = by_bus.get(key, []) if bus_ids else [one.index] if one.index < count else []
        if len(here) != 1:
            which = f"{len(here)} GPUs" if here else "no GPU"
            raise InvalidMeasurement(
                source,
                f"device {one.index} [{one.bus}]: the node has {which} like that; name the right --node",
            )
        found += here
    if len(set(found)) < len(found):
        raise InvalidMeasurement(source, "two of its devices are one GPU of the node; name the right --node")
    return tuple(sorted(found))


def as_file(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """The contents of such a file, JSON-ready."""
    return MeasurementFile(measurements=tuple(measurements)).model_dump(mode="json", exclude_none=True)
