"""``placement simulate``: a workload on a cluster, both described in files, under one policy or several."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from placement import topologies
from placement.cli import common
from placement.cli.progress import Progress
from placement.core.needs import GIB
from placement.core.node import Node
from placement.core.policy import Policy
from placement.core.simulation import Report, simulate
from placement.core.snapshot import Snapshot
from placement.errors import InvalidClusterFile, InvalidDeployment
from placement.wire.accelerators import accelerators_of
from placement.wire.cluster import load_cluster
from placement.wire.workload import load_workload, openb_cluster, read_rows, with_policy

CPUS_PER_GPU, MEMORY_GIB_PER_GPU = 16, 128
"""CPUs and memory for each GPU of a described cluster, since the catalogue does not say."""

OPENB_NODES = {"sn", "cpu_milli", "memory_mib", "gpu", "model"}


def run(
    workload: Path, cluster: str, policies: tuple[str, ...], seed: int, arrivals: int | None, show: bool
) -> dict[str, Report]:
    """Simulates the workload under each policy.

    Args:
        workload: a file.
        cluster: see :func:`cluster_of`.
        policies: their names; none leaves each deployment its own.
        seed: of a mix.
        arrivals: only so many.
        show: how it goes, on stderr.

    Returns:
        Policy (``"as declared"`` for none) -> the result.

    Raises:
        InvalidDeployment, UnknownNode: the workload is refused.
        InvalidClusterFile, UnknownTopology: the cluster is refused.
    """
    snapshot = cluster_of(cluster)
    arriving = load_workload(workload, seed, arrivals)(snapshot)
    asked: list[Policy | None] = [Policy(name) for name in policies] or [None]
    reports = {}
    total, began = len(arriving) * len(asked), time.monotonic()
    with Progress("simulating", show) as progress:

        def tell(before: int, arrived: int) -> None:
            done = before + arrived
            left = f", {(time.monotonic() - began) * (total - done) / done:.0f} s left" if done else ""
            progress.say(f"simulating: {done} of {total} deployments{left}")

        for turn, policy in enumerate(asked):
            reports[policy or "as declared"] = simulate(
                snapshot, with_policy(arriving, policy), progress=partial(tell, turn * len(arriving))
            )
    return reports


def cluster_of(text: str) -> Snapshot:
    """The cluster that ``--cluster`` means.

    Args:
        text: a file that ``placement snapshot`` wrote (``.json``); a node list of the openb trace (``.csv``);
            or machines of the catalogue by number, as ``dgx-h100=4,l40s-4x=8``, all free.

    Raises:
        InvalidClusterFile: it is none of these, or has no nodes.
        UnknownTopology: a machine is not in the catalogue.
    """
    ending = Path(text).suffix.lower()
    if ending == ".json":
        snapshot = load_cluster(Path(text)).snapshot()
        if not snapshot.nodes:
            raise InvalidClusterFile(
                f"{text}: has no nodes, so that nothing can be placed; add one under nodes"
            )
        return snapshot
    if ending == ".csv":
        try:
            rows = read_rows(Path(text))
            missing = sorted(OPENB_NODES - set(rows[0]))
            if not missing:
                return openb_cluster(rows, text)
        except InvalidDeployment as error:
            raise InvalidClusterFile(str(error)) from None
        raise InvalidClusterFile(f"{text}: has no columns {', '.join(missing)}; use an openb node list")
    nodes: list[Node] = []
    for part in text.split(","):
        name, _, count = part.strip().partition("=")
        if not count.isdecimal() or not 0 < int(count) <= 100_000:
            raise InvalidClusterFile(
                f"--cluster: {part.strip()!r} is not a file and not MACHINE=COUNT; write dgx-h100=4,l40s-4x=8"
            )
        nodes += _machines(name, int(count))
    if len({node.id for node in nodes}) < len(nodes):
        raise InvalidClusterFile(f"--cluster: {text!r} names a machine twice; add the two counts")
    return Snapshot(nodes)


def _machines(name: str, count: int) -> Iterator[Node]:
    topology, facts = topologies.load(name), topologies.facts(name)
    gpus, slots = len(topology), facts.slots
    for i in range(count):
        yield Node(
            f"{name}-{i:05}",
            f"{name}-{i:05}",
            topology=topology,
            free=frozenset(range(gpus)) - slots.keys(),
            slots=slots,
            instances=slots,
            gpu_memory_bytes=facts.gpu_memory_bytes,
            cpu_milli=gpus * CPUS_PER_GPU * 1000,
            memory_bytes=gpus * MEMORY_GIB_PER_GPU * GIB,
            accelerators=accelerators_of(topology.model),
            compute_capability=facts.compute_capability,
        )


def draw(reports: Mapping[str, Report], path: Path) -> None:
    """Draws the GPUs over time, as SVG or PNG by the ending of ``path``.

    Raises:
        click.UsageError: matplotlib is not installed, or the file cannot be written.
    """
    check_picture(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(reports), 1, figsize=(8, 3.2 * len(reports)), sharex=True, squeeze=False, layout="constrained"
    )
    for (name, report), plot in zip(reports.items(), axes[:, 0], strict=True):
        hours = [moment.at_seconds / 3600 for moment in report.moments]
        plot.axhline(report.gpus, color="0.6", linewidth=0.8)
        lines: dict[str, tuple[Any, str]] = {
            "asked for": ("asked_gpus", "0.6"),
            "allocated": ("allocated_gpus", "0.1"),
        }
        for label, (field, shade) in lines.items():
            values = [getattr(moment, field) for moment in report.moments]
            plot.plot(hours, values, label=label, color=shade, linestyle=":" if label == "asked for" else "-")
        lost = [moment.fragmented_gpus for moment in report.moments]
        plot.fill_between(
            hours, lost, label="free, but fragmented", color="0.75", hatch="///", edgecolor="0.4"
        )
        plot.set_ylabel("GPUs")
        plot.set_ylim(0, 1.35 * max(report.gpus, 1))
        plot.set_title(f"{name}: {report.placed} placed, {report.refused} refused", loc="left", fontsize=10)
        plot.legend(loc="upper left", ncols=3, frameon=False, fontsize=8)
    axes[-1, 0].set_xlabel("hours")
    try:
        with common.writing("--picture", path):
            figure.savefig(path)
    finally:
        pyplot.close(figure)


def check_picture(path: Path) -> None:
    """Checks that a picture can be drawn, before hours of simulation.

    Raises:
        click.UsageError: the ending is another, or matplotlib is not installed.
    """
    from importlib.util import find_spec

    if path.suffix.lower() not in (".svg", ".png"):
        raise click.UsageError(f"--picture: {path.name!r} ends neither in .svg nor in .png; name it so")
    if find_spec("matplotlib") is None:
        raise click.UsageError('--picture needs matplotlib; install it: pip install "ray-placement[picture]"')
