"""Predicted all-reduce bandwidth beside published figures: ``python -m benchmarks.bandwidth FOLDER``.

The folder holds ``measured.csv`` (machine, model, gpus, busbw_gb_per_s, message, nccl, forced, source, note), the
matrix of each machine as ``nvidia-smi topo -m`` prints it (``<machine>.txt``), and ``hosts.toml``, what is known of the
hosts: cpu, pcie_generation, pcie_width by GPU, peer_to_peer (``ok``, ``none``, or ``acs`` where it is redirected).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from placement.core.bandwidth import generation
from placement.core.matrix import parse_matrix
from placement.core.score import score
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
            predicted = round(score(topology, gpus).bandwidth_gb_per_s, 2)
            measured = float(row["busbw_gb_per_s"])
            cases.append(Case(row["machine"], gpus, row["forced"], measured, predicted, kind(topology, gpus)))
    return cases


def described(matrix: Topology, host: dict[str, Any], forced: str) -> Topology:
    """The machine with what is known of its host, as a reader would have found it."""
    peer = {"ok": True, "none": False, "acs": False}.get(host.get("peer_to_peer", ""))
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
    return replace(matrix, links=links, lanes=lanes, cpu=host.get("cpu"))


def over_pcie(link: Link, peer: bool | None) -> Link:
    """The link without its NVLinks, which are not used without peer-to-peer either; the path below is not told."""
    return Link(Way.NODE if link.nvlinks else link.path, peer=peer)


def kind(topology: Topology, gpus: Sequence[int]) -> str:
    """By what it is over."""
    links = [topology.link(a, b) for a, b in combinations(gpus, 2)]
    if all(link.nvlinks for link in links) or topology.nvswitch:
        return "NVLink"
    if any(link.nvlinks for link in links) and all(link.peer is None for link in links):
        return "NVLink"
    return "PCIe, peer-to-peer" if any(link.peer for link in links) else "PCIe, through the host"


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    cases = read(options.folder)
    if options.json:
        json.dump([asdict(case) | {"ratio": round(case.ratio, 3)} for case in cases], sys.stdout, indent=2)
        print()
        return 0
    print(f"{'machine':30}{'GPUs':26}{'forced':20}{'measured':>9}{'predicted':>10}{'ratio':>7}")
    for case in cases:
        gpus = " ".join(map(str, case.gpus))
        mark = "" if case.within(0.15) else " *" if case.within(0.3) else " **"
        print(
            f"{case.machine:30}{gpus:26}{case.forced:20}{case.measured:9.2f}{case.predicted:10.2f}{case.ratio:7.2f}{mark}"
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
