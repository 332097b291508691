"""Workloads to simulate: a mix, a trace, or the openb trace."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from placement.core.needs import WHOLE, Needs
from placement.core.node import Node
from placement.core.policy import Policy
from placement.core.request import Request
from placement.core.simulation import Arrival, gpus_asked
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import InvalidDeployment, counted
from placement.wire.base import Model
from placement.wire.constraints import PlacementConstraints
from placement.wire.deployment import Deployment
from placement.wire.files import check_depth, load_model, parse_model
from placement.wire.groups import Group
from placement.wire.requests import request_of
from placement.wire.text import read_text

OPENB_PODS = {"cpu_milli", "memory_mib", "num_gpu", "gpu_milli"}
_LISTS = (
    "gpu_nodes",
    "egress_nodes",
    "egress_preference",
    "cpu_nodes",
    "accelerators",
    "apart_from",
    "near_to",
)

_LEAST, _MOST = 1e-6, 1e9
"""Bounds of weights, loads and mean stays, since other numbers are divided by them."""

_MOST_GPUS_PER_NODE = 1024
_MOST_COUNT = 1 << 40

Source = Callable[[Snapshot], list[Arrival]]
"""What arrives on a cluster."""


class MixFile(Model):
    """A workload in proportions. ``load`` says how much is asked for at a time, on average."""

    arrivals: int = Field(default=1000, ge=1, le=1_000_000, description="how many deployments arrive")
    load: float = Field(
        default=1.0,
        ge=_LEAST,
        le=100,
        description="GPUs asked for at a time, as a fraction of the cluster's GPUs",
    )
    mix: tuple[dict[str, Any], ...] = Field(
        min_length=1,
        description="fields of a deployment, or group and deployments for a group and its members; and weight "
        "(default 1), mean_minutes (default 60)",
    )


class Proportion(Model):
    """How often one entry of a mix arrives, and how long it stays on average (exponentially distributed)."""

    weight: float = Field(default=1.0, ge=_LEAST, le=_MOST)
    mean_minutes: float = Field(default=60.0, ge=_LEAST, le=_MOST)


def load_workload(path: Path, seed: int = 0, arrivals: int | None = None) -> Source:
    """Reads a workload: a mix (``.toml``, ``.yaml``), a trace (``.csv``), or a pod list of the openb trace (``.csv``).

    Args:
        path: the file.
        seed: of a mix, the same seed gives the same arrivals.
        arrivals: replay only this many; for a mix, instead of its own number.

    Raises:
        InvalidDeployment: the file cannot be read, or a field is refused; names the row or entry.
    """
    if path.suffix.lower() != ".csv":
        mix = load_model(MixFile, path)
        entries = [_entry(one, f"{path}: mix[{i}]", i) for i, one in enumerate(mix.mix)]
        return lambda snapshot: _draw(snapshot, entries, arrivals or mix.arrivals, mix.load, seed)
    rows = read_rows(path)
    if set(rows[0]) >= OPENB_PODS:
        requests = [_pod(row, path) for row in rows[:arrivals]]
        return lambda snapshot: requests
    if "arrive_seconds" not in rows[0]:
        raise InvalidDeployment(
            str(path),
            (
                "has no column arrive_seconds, as a trace needs; "
                f"an openb pod list needs {', '.join(sorted(OPENB_PODS))}",
            ),
        )
    traced = [_traced(row, path) for row in rows[:arrivals]]
    return lambda snapshot: [
        Arrival(at, _request(one, snapshot), None if until is None else until - at)
        for one, at, until in traced
    ]


def openb_cluster(rows: Iterable[Row], source: str) -> Snapshot:
    """The nodes of the openb trace. Their GPUs' links are unknown; the accelerator type is the trace's model.

    Raises:
        InvalidDeployment: a number is invalid, or two nodes have the same name.
    """
    shapes: dict[int, Topology] = {}
    nodes: dict[str, Node] = {}
    for row in rows:
        where = f"{source}: row {row.number}"
        gpus = _count(row, "gpu", where, _MOST_GPUS_PER_NODE)
        cpu, memory = (_count(row, field, where) for field in ("cpu_milli", "memory_mib"))
        name = row["sn"]
        if not name or name in nodes:
            problem = (
                f"sn: {name!r} is there twice; give each node its own" if name else "sn: is missing; add it"
            )
            raise InvalidDeployment(where, (problem,))
        nodes[name] = Node(
            name,
            name,
            topology=shapes.setdefault(gpus, Topology.unknown(gpus)),
            free=frozenset(range(gpus)),
            cpu_milli=cpu,
            memory_bytes=memory << 20,
            accelerators=frozenset({row["model"]} - {""}),
        )
    return Snapshot(nodes.values())


def openb_request(row: Mapping[str, str], source: str) -> Request:
    """One pod of the openb trace. One without GPUs takes CPUs and memory only."""
    gpus, milli, cpu, memory = (
        _count(row, field, source) for field in ("num_gpu", "gpu_milli", "cpu_milli", "memory_mib")
    )
    if (gpus > 1 and milli != WHOLE) or (gpus == 1 and not 0 < milli <= WHOLE):
        raise InvalidDeployment(
            source, (f"gpu_milli: {milli} with num_gpu {gpus}; shares are of one GPU, 1 to 1000",)
        )
    return Request(
        row.get("name") or "pod",
        (0,),
        Needs(gpus, share=milli if gpus == 1 else WHOLE),
        accelerators=tuple(sorted({model for model in (row.get("gpu_spec") or "").split("|") if model})),
        cpu_milli=cpu,
        memory_bytes=memory << 20,
    )


def _pod(row: Row, path: Path) -> Arrival:
    """If the list has no times, one pod arrives each second and none departs."""
    where = f"{path}: row {row.number}"
    request = openb_request(row, where)
    if not row.get("creation_time"):
        return Arrival(float(row.number) - 2, request)
    begin = _count(row, "creation_time", where)
    if not row.get("deletion_time"):
        return Arrival(begin, request)
    end = _count(row, "deletion_time", where)
    if end < begin:
        raise InvalidDeployment(where, (f"deletion_time: {end} is before creation_time, {begin}",))
    return Arrival(begin, request, end - begin)


def _traced(row: Row, path: Path) -> tuple[Deployment, float, float | None]:
    where = f"{path}: row {row.number}"
    fields: dict[str, Any] = {"model": "simulated", "name": f"r{row.number}"}
    limits: dict[str, Any] = {}
    times: dict[str, float | None] = {"arrive_seconds": None, "depart_seconds": None}
    for field, text in row.items():
        if not text:
            continue
        if field in times:
            times[field] = _seconds(text, field, where)
        elif field in PlacementConstraints.model_fields and field not in Deployment.model_fields:
            limits[field] = [one.strip() for one in text.split("|")] if field in _LISTS else _value(text)
        else:
            fields[field] = text if field in ("name", "model", "mig") else _value(text)
    if limits:
        fields["constraints"] = limits
    begin, end = times.values()
    if begin is None:
        raise InvalidDeployment(where, ("arrive_seconds: is missing; say when it arrives",))
    if end is not None and end < begin:
        raise InvalidDeployment(where, (f"depart_seconds: {end:g} is before arrive_seconds, {begin:g}",))
    for name, value in fields.items():
        check_depth(value, f"{where}: {name}")
    return parse_model(Deployment, fields, where), begin, end


def _seconds(text: str, field: str, where: str) -> float:
    seconds = _number(text)
    if seconds is not None and seconds > _MOST_COUNT:
        raise InvalidDeployment(
            where, (f"{field}: {_shown(text)} is too large; give seconds, at most {_MOST_COUNT}",)
        )
    if seconds is None or seconds < 0:
        raise InvalidDeployment(where, (f"{field}: {_shown(text)} is not a number of seconds{_comma(text)}",))
    return seconds


def _number(text: str) -> float | None:
    """A finite number as spreadsheets write it; ``None`` for anything else."""
    try:
        number = float(text) if "_" not in text else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _comma(text: str) -> str:
    if re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+", text):
        return "; write it without commas, or a point if one is meant"
    return "; write a point for the comma" if re.fullmatch(r"[+-]?\d*,\d+", text) else ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _value(text: str) -> Any:
    """What a cell holds: JSON, or else text. A whole number is one, also where a spreadsheet wrote it as 8.0."""
    try:
        value = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        value = text
    if isinstance(value, str | float) and (number := _number(text)) is not None:
        return int(number) if number.is_integer() and abs(number) <= _MOST_COUNT else number
    return value


def _entry(fields: dict[str, Any], source: str, index: int) -> tuple[list[Deployment], Proportion]:
    """What arrives together, a deployment or the members of a group, and how often."""
    proportion = {name: fields[name] for name in Proportion.model_fields if name in fields}
    rest = {name: value for name, value in fields.items() if name not in proportion}
    often = parse_model(Proportion, proportion, source)
    if "deployments" not in rest:
        return [
            parse_model(Deployment, {"name": f"mix-{index}", "model": "simulated", **rest}, source)
        ], often
    members, declared = rest.pop("deployments"), rest.pop("group", None)
    if rest or not isinstance(members, list) or not isinstance(declared, dict):
        problem = (
            "deployments is the list of a group's members; give group and deployments, and no other field"
        )
        raise InvalidDeployment(source, (problem,))
    group = parse_model(Group, {"name": f"mix-{index}", **declared}, f"{source}.group")
    given = [
        parse_model(
            Deployment, {"model": "simulated", **one} if isinstance(one, dict) else one, f"{source}: {i}"
        )
        for i, one in enumerate(members)
    ]
    group.of(given)
    return [parse_model(Deployment, group.bound(one), source) for one in given], often


def _draw(
    snapshot: Snapshot,
    entries: list[tuple[list[Deployment], Proportion]],
    arrivals: int,
    load: float,
    seed: int,
) -> list[Arrival]:
    """Poisson arrivals, exponential stays."""
    dice = random.Random(seed)
    weights = [proportion.weight for _, proportion in entries]
    requests = [[_request(one, snapshot) for one in several] for several, _ in entries]
    roles = [several[0].group.planned() if several[0].group else None for several, _ in entries]
    gpus = sum(node.whole_gpus for node in snapshot.nodes)
    gpu_seconds = sum(
        proportion.weight
        * proportion.mean_minutes
        * 60
        * max(sum(gpus_asked(snapshot, request) for request in several), 1e-3)
        for several, (_, proportion) in zip(requests, entries, strict=True)
    ) / sum(weights)
    between = gpu_seconds / (load * max(gpus, 1))
    now, found = 0.0, []
    for index in dice.choices(range(len(entries)), weights, k=arrivals):
        now += dice.expovariate(1 / between)
        first, *others = requests[index]
        stays = dice.expovariate(1 / (60 * entries[index][1].mean_minutes))
        found.append(Arrival(now, first, stays, roles[index], tuple(others)))
    return found


def with_policy(arrivals: Iterable[Arrival], policy: Policy | None) -> list[Arrival]:
    """The same arrivals under another policy; ``None`` leaves each its own. Groups always use their links."""
    if policy is None:
        return list(arrivals)
    return [
        one if one.roles else replace(one, request=replace(one.request, policy=policy)) for one in arrivals
    ]


def _request(one: Deployment, snapshot: Snapshot) -> Request:
    return request_of(one, range(one.replicas), {}, snapshot)


class Row(dict[str, str]):
    """The cells of one row by column, without surrounding blanks.

    Attributes:
        number: of the row in the file; the header is row 1.
    """

    def __init__(self, cells: Iterable[tuple[str, str]], number: int) -> None:
        super().__init__(cells)
        self.number = number


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file with a header, parted by commas, or by semicolons or tabs as Excel does.

    Raises:
        InvalidDeployment: it cannot be read, or has none; or a row has more cells than the header, or the header
            has a column twice.
    """
    source = str(path)
    text = read_text(path)
    first, _, rest = text.partition("\n")
    if match := re.fullmatch(r"\W?sep=(.)\W?\s*", first, re.IGNORECASE):  # Excel's own hint
        delimiter, text, skipped = match[1], rest, 1
    else:
        delimiter, skipped = max(",;\t", key=first.count), 0
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for number, cells in enumerate(reader, start=1 + skipped):
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                rows.append((number, stripped))
    except csv.Error as error:
        raise InvalidDeployment(
            f"{source}: row {reader.line_num + skipped}", (f"cannot be read: {error}",)
        ) from None
    if len(rows) < 2:
        raise InvalidDeployment(source, ("has no rows; a header line and one row at least are needed",))
    columns = [name.lower() for name in rows[0][1]]
    while not columns[-1]:
        columns.pop()
    for name in columns:
        if name and columns.count(name) > 1:
            raise InvalidDeployment(source, (f"column {_shown(name)} is there twice; keep one",))
    return [_row(columns, cells, number, source) for number, cells in rows[1:]]


def _row(columns: list[str], cells: list[str], number: int, source: str) -> Row:
    """A row that is too short lacks its last cells; extra cells of a row that is too long must be empty."""
    where = f"{source}: row {number}"
    if any(cells[len(columns) :]):
        raise InvalidDeployment(
            where,
            (
                f"has {len(cells)} cells for {counted(len(columns), 'column')}; put quotes around a cell with a comma",
            ),
        )
    whole = cells + [""] * (len(columns) - len(cells))
    # pandas numbers the rows in a first column without a name.
    nameless = next((i for i, name in enumerate(columns) if i and not name and whole[i]), None)
    if nameless is not None:
        raise InvalidDeployment(
            where, (f"column {nameless + 1} has no name, and {_shown(whole[nameless])} in it",)
        )
    return Row(((name, cell) for name, cell in zip(columns, whole, strict=False) if name), number)


def _count(row: Mapping[str, str], field: str, source: str, most: int = _MOST_COUNT) -> int:
    text = row.get(field) or ""
    number = _number(text)
    if number is None or not number.is_integer() or number < 0:
        raise InvalidDeployment(source, (f"{field}: {_shown(text)} is not a whole number{_comma(text)}",))
    if number > most:
        raise InvalidDeployment(source, (f"{field}: {_shown(text)} is too large; use at most {most}",))
    return int(number)
