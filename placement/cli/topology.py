"""``placement topology``: how GPUs are linked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from placement.cli import common
from placement.cli.group import Command


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement topology --node gpu-a\n"
    "  placement topology --name dgx-1v --picture topology.svg\n"
    "  nvidia-smi topo -m | placement topology --file -",
)
@click.option("--node", help="Only this node: its id, name or address.")
@click.option("--name", "name", help="A machine of the catalogue instead of a cluster's nodes.")
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Output of `nvidia-smi topo -m` instead; - for stdin. Needs no cluster.",
)
@click.option("--gpu", metavar="NAME", help="With --file: the GPUs' product name, which the text lacks.")
@common.with_picture("Also draws a picture: GPUs, links, PCIe switches, NUMA nodes, network cards.")
@common.with_address
@common.with_json
def topology(
    node: str | None,
    name: str | None,
    file: Path | None,
    gpu: str | None,
    picture: Path | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Shows how the GPUs of each node are linked. It is read from NVML, the catalogue or a file."""
    recorded = name is not None or file is not None
    if sum(choice is not None for choice in (node, name, file)) > 1:
        raise click.UsageError("--node, --name and --file exclude each other; give one of them")
    if recorded and address is not None:
        raise click.UsageError("--name and --file ask no cluster; leave out --address")
    if gpu is not None and file is None:
        raise click.UsageError("--gpu goes with --file; elsewhere the product name is known")
    from placement.cli.views.machine import topology_view

    if recorded:
        reports = [_recorded(name, file, gpu)]
    else:
        with common.service(address) as service:
            reports = common.ask(service.topology.remote(node))
    if picture is not None:
        from placement.cli.views import picture as machines

        common.draw(machines.picture(reports), picture)
    if as_json:
        common.dump({"nodes": reports})
        return
    for report in reports:
        common.show(*topology_view(report))


def _recorded(name: str | None, file: Path | None, gpu: str | None) -> dict[str, Any]:
    """A machine of the catalogue or of a file, in the form that nodes are reported in."""
    from dataclasses import replace

    from placement import topologies
    from placement.core.matrix import read_matrix, render_matrix
    from placement.wire.text import read_input

    notes: tuple[str, ...] = ()
    if name is not None:
        shape = topologies.load(name)
    else:
        assert file is not None
        reading = read_matrix(read_input(file))
        shape, notes = replace(reading.topology, model=gpu), reading.notes
    return {
        "name": name or ("stdin" if file == Path("-") else str(file)),
        "gpu_count": len(shape),
        "gpu_model": shape.model,
        "topology": name,
        "known": shape.known,
        "nvswitch": shape.nvswitch,
        "islands": [list(island) for island in shape.islands],
        "matrix": render_matrix(shape),
        "problem": "; ".join(notes) or None,
        "facts": topologies.facts(name).model_dump(mode="json") if name is not None else None,
    }
