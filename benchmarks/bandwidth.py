"""Predicted all-reduce bandwidth beside published figures: ``python -m benchmarks.bandwidth FOLDER``.

The folder holds ``measured.csv`` (machine, model, gpus, busbw_gb_per_s, message, nccl, forced, source, note), the
matrix of each machine as ``nvidia-smi topo -m`` prints it (``<machine>.txt``), and ``hosts.toml``, what is known of the
hosts: cpu, pcie_generation, pcie_width by GPU, peer_to_peer (``ok``, ``none``, or ``acs`` where it is redirected).
Where that is not told, it is what NVIDIA's driver says of such cards: none between GeForce and CMP cards.

``--plot FILE.svg`` draws NCCL's own choices, predicted against measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from placement.cli.views.svg import INK, PALE, Drawing
from placement.core.bandwidth import generation
from placement.core.matrix import parse_matrix
from placement.core.needs import Within
from placement.core.score import best_set, score
from placement.core.topology import Lanes, Link, Topology
from placement.core.topology import Path as Way

DEFAULTS = ""
"""What ``forced`` says where NCCL had its own way."""

TIED = 1.03
"""Figures nearer to each other than this are no order: one machine differs as much from the next."""


@dataclass(frozen=True)
class Case:
    """One published result: GB/s as nccl-tests reports the bus bandwidth, beside what is predicted."""

    machine: str
    gpus: tuple[int, ...]
    forced: str
    measured: float
    predicted: float
    kind: str
    upper: float | None = None

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    def within(self, part: float) -> bool:
        return 1 - part <= self.ratio <= 1 + part


def read(folder: Path) -> list[Case]:
    """All results of a folder, in its order."""
    hosts = tomllib.loads((folder / "hosts.toml").read_text("utf-8"))

    @cache
    def machine(name: str, model: str, forced: str) -> Topology:
        matrix = parse_matrix((folder / f"{name}.txt").read_text("utf-8"))
        return described(replace(matrix, model=model), hosts.get(name, {}), forced)

    cases = []
    with (folder / "measured.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            gpus = tuple(map(int, row["gpus"].split()))
            topology = machine(row["machine"], row["model"], row["forced"])
            found = score(topology, gpus)
            predicted = round(found.bandwidth_gb_per_s, 2)
            upper = found.upper_gb_per_s and round(found.upper_gb_per_s, 2)
            measured = float(row["busbw_gb_per_s"])
            cases.append(
                Case(row["machine"], gpus, row["forced"], measured, predicted, kind(topology, gpus), upper)
            )
    return cases


def described(matrix: Topology, host: dict[str, Any], forced: str) -> Topology:
    """The machine with what is known of its host, as a reader would have found it."""
    allowed = re.search(r"GeForce|CMP", matrix.model or "") is None
    peer = {"ok": True, "none": False, "acs": False}.get(host.get("peer_to_peer", ""), allowed)
    if forced == "P2P_DISABLE":
        peer = False
    elif forced == "P2P driver":
        peer = True
    links = tuple(
        tuple(link if link.nvlinks and forced != "P2P_DISABLE" else over_pcie(link, peer) for link in row)
        for row in matrix.links
    )
    widths = {int(gpu): width for gpu, width in host.get("pcie_width", {}).items()}
    pcie = host.get("pcie_generation", generation(matrix.model).pcie)
    lanes = tuple(Lanes(pcie, widths.get(gpu, 16)) for gpu in range(len(matrix)))
    # NCCL has reductions inside the switch on by itself.
    return replace(matrix, links=links, lanes=lanes, cpu=host.get("cpu"), nvls=forced != "NVLS=0")


def over_pcie(link: Link, peer: bool | None) -> Link:
    """The link without its NVLinks, which are not used without peer-to-peer either; the path below is not told."""
    return Link(Way.NODE if link.nvlinks else link.path, peer=peer)


def kind(topology: Topology, gpus: Sequence[int]) -> str:
    """By what it is over."""
    if best_set(topology, gpus, len(gpus), Within.NVLINK):
        return "NVLink"
    peers = (topology.link(a, b).peer for a, b in combinations(gpus, 2))
    return "PCIe, peer-to-peer" if any(peers) else "PCIe, through the host"


def orders(cases: Sequence[Case]) -> Counter[str]:
    """How the order of equally large sets of one machine is predicted: right, tied, wrong."""
    found: Counter[str] = Counter()
    for one, other in combinations(cases, 2):
        if (one.machine, one.forced, len(one.gpus)) != (other.machine, other.forced, len(other.gpus)):
            continue
        more, less = sorted((one, other), key=lambda case: -case.measured)
        if one.gpus == other.gpus or more.measured <= TIED * less.measured:
            continue
        found[
            "right"
            if more.predicted > less.predicted
            else "tied"
            if more.predicted == less.predicted
            else "wrong"
        ] += 1
    return found


COLOURS = {"NVLink": "#3f7d00", "PCIe, peer-to-peer": "#4a6fa5", "PCIe, through the host": "#b86e00"}
LEAST, MOST = 1, 1000
"""GB/s, at the ends of both axes."""


def plot(cases: Sequence[Case]) -> str:
    """Predicted against measured, both logarithmic, as SVG; a line where what is not known makes a range."""
    draw, left, top, side = Drawing(), 70, 50, 480

    def at(gb_per_s: float) -> float:
        return side * math.log(min(max(gb_per_s, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)

    draw.rect(left, top, side, side, "#fbfbf9", PALE)
    for decade in (1, 10, 100):
        for step in range(1, 10):
            x, y = left + at(decade * step), top + side - at(decade * step)
            if step > 1 or decade > 1:
                draw.line(x, top, x, top + side, "#d5d9dd" if step == 1 else "#eef0f2")
                draw.line(left, y, left + side, y, "#d5d9dd" if step == 1 else "#eef0f2")
    for mark in (1, 10, 100, 1000):
        draw.text(left + at(mark), top + side + 18, str(mark), size=12, fill=PALE)
        draw.text(left - 8, top + side - at(mark) + 4, str(mark), size=12, fill=PALE, anchor="end")
    draw.line(left, top + side, left + side, top, INK, 1.2)
    for part in (0.7, 0.85, 1.15, 1.3):
        shift = side * math.log(part) / math.log(MOST / LEAST)
        start, end = max(0, -shift), min(side, side - shift)
        draw.line(
            left + start,
            top + side - start - shift,
            left + end,
            top + side - end - shift,
            PALE,
            0.8,
            dashed=True,
        )
    for case in cases:
        x, y, colour = left + at(case.measured), top + side - at(case.predicted), COLOURS[case.kind]
        if case.upper:
            draw.line(x, y, x, top + side - at(case.upper), colour, 1.5)
        draw.circle(x, y, 4.5, colour, "#ffffff")
    draw.text(
        left, 28, "All-reduce bus bandwidth, GB/s: NCCL's own choices", size=15, anchor="start", bold=True
    )
    draw.text(left + side / 2, top + side + 42, "measured", size=13)
    draw.text(24, top + side / 2, "predicted", size=13, upward=True)
    y = top + 26
    for name in sorted({case.kind for case in cases}):
        these = [case for case in cases if case.kind == name]
        near = sum(case.within(0.15) for case in these)
        draw.circle(left + 20, y - 4, 4.5, COLOURS[name])
        draw.text(left + 32, y, f"{name}: {near} of {len(these)} within 15 %", size=12, anchor="start")
        y += 20
    draw.text(left + 32, y, "dashed: 15 % and 30 % off", size=12, fill=PALE, anchor="start")
    return draw.svg(left + side + 30, top + side + 60)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw NCCL's own choices")
    options = parser.parse_args(arguments)
    cases = read(options.folder)
    if options.plot:
        options.plot.write_text(plot([case for case in cases if case.forced == DEFAULTS]), encoding="utf-8")
    if options.json:
        json.dump([asdict(case) | {"ratio": round(case.ratio, 3)} for case in cases], sys.stdout, indent=2)
        print()
        return 0
    print(f"{'machine':30}{'GPUs':26}{'forced':20}{'measured':>9}{'predicted':>10}{'ratio':>7}")
    for case in cases:
        gpus = " ".join(map(str, case.gpus))
        mark = "" if case.within(0.15) else " *" if case.within(0.3) else " **"
        most = f" (at most {case.upper:.2f})" if case.upper else ""
        print(
            f"{case.machine:30}{gpus:26}{case.forced:20}{case.measured:9.2f}{case.predicted:10.2f}{case.ratio:7.2f}"
            f"{mark}{most}"
        )
    print("\n* off by more than 15 %   ** by more than 30 %\n")
    for title, some in (("NCCL's defaults", [c for c in cases if c.forced == DEFAULTS]), ("all", cases)):
        print(f"{title}:")
        for name in (*sorted({case.kind for case in some}), ""):
            these = [case for case in some if name in ("", case.kind)]
            near, far = (sum(case.within(part) for case in these) for part in (0.15, 0.3))
            print(f"  {name or 'together':28}{near:3} of {len(these):3} within 15 %, {far:3} within 30 %")
        order = orders(some)
        print(
            f"  order of equally large sets: {order['right']} right, {order['tied']} tied, {order['wrong']} wrong"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
