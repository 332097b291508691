"""Workloads to simulate: a mix, a trace, or the openb trace."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from placement.core.request import Request
from placement.core.score import WHOLE, Needs
from placement.core.simulation import Arrival, gpus_asked
from placement.core.snapshot import Node, Policy, Snapshot
from placement.core.topology import Topology
from placement.errors import InvalidDeployment
from placement.wire.base import Model
from placement.wire.deployment import Deployment, PlacementConstraints
from placement.wire.files import load_model, parse_model
from placement.wire.plans import request_of

OPENB_PODS = {"cpu_milli", "memory_mib", "num_gpu", "gpu_milli"}
_LISTS = ("gpu_nodes", "egress_nodes", "egress_preference", "accelerators", "apart_from", "near_to")

Source = Callable[[Snapshot], list[Arrival]]
"""What arrives on a cluster."""


class MixFile(Model):
    """A workload in proportions. ``load`` says how much is asked for at a time, on average."""

    arrivals: int = Field(default=1000, ge=1, le=1_000_000, description="how many deployments arrive")
    load: float = Field(
        default=1.0, gt=0, le=100, description="GPUs asked for at a time, as a part of the cluster's"
    )
    mix: tuple[dict[str, Any], ...] = Field(
        min_length=1, description="fields of a deployment, and: weight (default 1), mean_minutes (default 60)"
    )


class Proportion(Model):
    """How often one entry of a mix arrives, and how long it stays on average (exponentially distributed)."""

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    mean_minutes: float = Field(default=60.0, gt=0, allow_inf_nan=False)


def load_workload(path: Path, seed: int = 0, arrivals: int | None = None) -> Source:
    """Reads a workload: a mix (``.toml``, ``.yaml``), a trace (``.csv``), or a pod list of the openb trace (``.csv``).

    Args:
        path: the file.
        seed: of a mix, the same seed gives the same arrivals.
        arrivals: only so many; of a mix instead of the number that it names.

    Raises:
        InvalidDeployment: the file cannot be read, or a field is refused; names the row or entry.
    """
    if path.suffix != ".csv":
        mix = load_model(MixFile, path)
        entries = [_entry(one, f"{path}: mix[{i}]", i) for i, one in enumerate(mix.mix)]
        return lambda snapshot: _draw(snapshot, entries, arrivals or mix.arrivals, mix.load, seed)
    rows = read_rows(path)
    if set(rows[0]) >= OPENB_PODS:
        requests = [_pod(f"{path}: row {i}", row) for i, row in enumerate(rows[:arrivals], start=2)]
        return lambda snapshot: requests
    traced = [_traced(f"{path}: row {i}", row) for i, row in enumerate(rows[:arrivals], start=2)]
    return lambda snapshot: [
        Arrival(at, _request(one, snapshot), None if until is None else until - at)
        for one, at, until in traced
    ]


def openb_cluster(rows: Iterable[Mapping[str, str]], source: str) -> Snapshot:
    """The nodes of the openb trace. How their GPUs are linked is not known; the accelerator is the model."""
    shapes: dict[int, Topology] = {}
    nodes = []
    for i, row in enumerate(rows, start=2):
        gpus, cpu, memory = (
            _count(row, field, f"{source}: row {i}") for field in ("gpu", "cpu_milli", "memory_mib")
        )
        nodes.append(
            Node(
                row["sn"],
                row["sn"],
                topology=shapes.setdefault(gpus, Topology.unknown(gpus)),
                free=frozenset(range(gpus)),
                cpu_milli=cpu,
                memory_bytes=memory << 20,
                accelerators=frozenset([row["model"]]),
            )
        )
    return Snapshot(nodes)


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


def _pod(source: str, row: Mapping[str, str]) -> Arrival:
    """When the list has no times, one pod a second comes and none goes."""
    request = openb_request(row, source)
    if not row.get("creation_time"):
        return Arrival(float(source.rpartition(" ")[2]) - 2, request)
    begin = _count(row, "creation_time", source)
    return Arrival(
        begin, request, _count(row, "deletion_time", source) - begin if row.get("deletion_time") else None
    )


def _traced(source: str, row: Mapping[str, str | None]) -> tuple[Deployment, float, float | None]:
    fields: dict[str, Any] = {"model": "simulated", "name": "r" + source.rpartition(" ")[2]}
    limits: dict[str, Any] = {}
    times: dict[str, float | None] = {"arrive_seconds": None, "depart_seconds": None}
    for field, text in row.items():
        if text is None or not text.strip():
            continue
        if field in times:
            try:
                times[field] = float(text)
            except ValueError:
                raise InvalidDeployment(source, (f"{field}: {text!r} is not a number of seconds",)) from None
        elif field in PlacementConstraints.model_fields:
            limits[field] = [one.strip() for one in text.split("|")] if field in _LISTS else _value(text)
        else:
            fields[field] = text if field in ("name", "model", "mig") else _value(text)
    if limits:
        fields["constraints"] = limits
    begin, end = times.values()
    if begin is None:
        raise InvalidDeployment(source, ("arrive_seconds: is missing; say when it arrives",))
    if end is not None and end < begin:
        raise InvalidDeployment(source, (f"depart_seconds: {end:g} is before arrive_seconds, {begin:g}",))
    return parse_model(Deployment, fields, source), begin, end


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _entry(fields: dict[str, Any], source: str, index: int) -> tuple[Deployment, Proportion]:
    proportion = {name: fields[name] for name in Proportion.model_fields if name in fields}
    rest = {name: value for name, value in fields.items() if name not in proportion}
    wanted = {"name": f"mix-{index}", "model": "simulated", **rest}
    return parse_model(Deployment, wanted, source), parse_model(Proportion, proportion, source)


def _draw(
    snapshot: Snapshot, entries: list[tuple[Deployment, Proportion]], arrivals: int, load: float, seed: int
) -> list[Arrival]:
    """Poisson arrivals, exponential stays."""
    dice = random.Random(seed)
    weights = [proportion.weight for _, proportion in entries]
    requests = [_request(one, snapshot) for one, _ in entries]
    gpus = sum(node.whole_gpus for node in snapshot.nodes)
    gpu_seconds = sum(
        proportion.weight * proportion.mean_minutes * 60 * max(gpus_asked(snapshot, request), 1e-3)
        for request, (_, proportion) in zip(requests, entries, strict=True)
    ) / sum(weights)
    between = gpu_seconds / (load * max(gpus, 1))
    now, found = 0.0, []
    for index in dice.choices(range(len(entries)), weights, k=arrivals):
        now += dice.expovariate(1 / between)
        found.append(
            Arrival(now, requests[index], dice.expovariate(1 / (60 * entries[index][1].mean_minutes)))
        )
    return found


def with_policy(arrivals: Iterable[Arrival], policy: Policy | None) -> list[Arrival]:
    """The same arrivals under another policy; ``None`` leaves each its own."""
    if policy is None:
        return list(arrivals)
    return [replace(one, request=replace(one.request, policy=policy)) for one in arrivals]


def _request(one: Deployment, snapshot: Snapshot) -> Request:
    return request_of(one, range(one.replicas), {}, snapshot)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header.

    Raises:
        InvalidDeployment: it cannot be read, or has none.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InvalidDeployment(str(path), (f"cannot be read: {reason}; check the path",)) from None
    if not rows:
        raise InvalidDeployment(str(path), ("has no rows; a header line and one row at least are needed",))
    return rows


def _count(row: Mapping[str, str], field: str, source: str) -> int:
    text = row.get(field) or ""
    if not text.isdecimal():
        raise InvalidDeployment(source, (f"{field}: {text!r} is not a whole number",))
    return int(text)
