"""Every machine in ``machines/``, as its owner published it: read with all that is told, or refused at its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.core.matrix import parse_matrix, render_matrix
from placement.core.topology import Path as Level
from placement.core.topology import ordinals
from placement.errors import MatrixError

MACHINES = Path(__file__).parent / "machines"

READ = [
    # name, GPUs, islands, network cards, NUMA nodes per GPU, nearest card per GPU; ? where nothing is told
    ("2x-nv2-pair", 2, "0-1", 0, "?", "?"),
    ("2x-nv3-bad-bridge", 2, "0-1", 0, "?", "?"),
    ("2x-phb-desktop", 2, "0 1", 0, "?", "?"),
    ("a100-8x-nic-only-first-four", 8, "0-7", 4, "0 0 0 0 1 1 1 1", "PXB PXB PXB PXB SYS SYS SYS SYS"),
    ("a100-dgx1-style-cloud-8x-nv12-48c", 8, "0-7", 0, "0 0 0 0 1 1 1 1", "?"),
    ("a100-pcie-4x-nv12-pairs-8470", 4, "0-1 2-3", 0, "0 0 1 1", "?"),
    ("a100-pcie-8x-nv12-pairs-node-sys", 8, "0-1 2-3 4-5 6-7", 0, "0 0 0 0 1 1 1 1", "?"),
    ("aws-p4d-8x-a100", 8, "0-7", 0, "0 0 0 0 1 1 1 1", "?"),
    ("azure-nd-gb300-v6-tray", 4, "0-3", 4, "?", "NODE NODE NODE NODE"),
    ("cgroup-4x-a100-nv4-cpu-0-64", 4, "0-3", 1, "0-3 0-3 0-3 0-3", "SYS SYS SYS PHB"),
    ("dell-c4140-4x-v100-nv2", 4, "0-3", 1, "0 0 0 0", "NODE NODE NODE NODE"),
    ("dgx-a100-8x-nv12-nic12", 8, "0-7", 12, "3 3 1 1 7 7 5 5", "PXB PXB PXB PXB PXB PXB PXB PXB"),
    ("dgx-a100-slurm-2of8-partial", 2, "0-1", 10, "3 3", "PXB PXB"),
    ("dgx-h100-8x-nic12", 8, "0-7", 12, "0 0 0 0 1 1 1 1", "PXB PXB PXB PXB PXB PXB PXB PXB"),
    ("dgx1v-v100-msccl", 8, "0-7", 4, "?", "PIX PIX PIX PIX PIX PIX PIX PIX"),
    ("dgx1v-v100-ucxpy", 8, "0-7", 4, "?", "PIX PIX PIX PIX PIX PIX PIX PIX"),
    ("docker-cpuset-mems-1gpu-numa-na", 1, "0", 0, "?", "?"),
    ("gke-a4-b200-8x", 8, "0-7", 8, "0 0 0 0 1 1 1 1", "PIX PIX PIX PIX PIX PIX PIX PIX"),
    ("h100-4x-nv6-odd-cpu-lists", 4, "0-3", 4, "3 1 7 5", "PIX PIX PIX PIX"),
    ("h100-8x-nv18-104c-ht", 8, "0-7", 0, "0 0 0 0 1 1 1 1", "?"),
    ("h100-8x-nv18-52c", 8, "0-7", 0, "0 0 0 0 1 1 1 1", "?"),
    ("h20-8x-dual-epyc", 8, "0-7", 2, "0 0 0 0 1 1 1 1", "SYS SYS SYS SYS NODE NODE PHB NODE"),
    ("h200-nvl-4x-pix-node-no-bridge", 4, "0 1 2 3", 0, "?", "?"),
    ("h800-4x-nv8", 4, "0-3", 0, "?", "?"),
    ("h800-8x-nv8-nic9", 8, "0-7", 9, "0 0 0 0 1 1 1 1", "PIX PIX PIX PIX PIX PIX PIX PIX"),
    ("k80-4x-node-single-socket", 4, "0 1 2 3", 0, "?", "?"),
    ("l40s-4x-node-sys", 4, "0 1 2 3", 2, "0 0 1 1", "SYS SYS NODE NODE"),
    ("leonardo-4x-a100-nv4-cpu0", 4, "0-3", 4, "0-1 0-1 0-1 0-1", "PXB PXB PXB PXB"),
    ("litgpt-4x-phb", 4, "0 1 2 3", 0, "0 0 0 0", "?"),
    ("litgpt-8x-a100-nv12-nic10", 8, "0-7", 10, "0 0 0 0 1 1 1 1", "PXB PXB PXB PXB PXB PXB PXB PXB"),
    ("mixed-5x-5090-4090-1plus4", 5, "0 1 2 3 4", 0, "1 0 0 0 0", "?"),
    ("nic-pxb-8x-a100-2nic", 8, "0-7", 2, "0 0 0 0 1 1 1 1", "PXB PXB NODE NODE PXB PXB NODE NODE"),
    ("pcie-4x-pix-phb-lmdeploy", 4, "0 1 2 3", 0, "0 0 0 0", "?"),
    ("pcie-4x-pxb-pix-sys", 4, "0 1 2 3", 0, "0 0 1 1", "?"),
    ("polaris-4x-a100-nv4", 4, "0-3", 2, "3 2 1 0", "SYS PHB SYS PHB"),
    ("princeton-della-4x-a100-nv4", 4, "0-3", 1, "0 0 1 1", "NODE NODE SYS SYS"),
    ("rtx3090-2x-nv4", 2, "0-1", 0, "0 0", "?"),
    ("rtx4090-8x-all-sys", 8, "0 1 2 3 4 5 6 7", 2, "0 0 0 0 1 1 1 1", "SYS SYS SYS SYS SYS SYS PHB SYS"),
    ("rtx5090-2x-phb-p2p-gns", 2, "0 1", 0, "0 0", "?"),
    ("rtxpro6000-4x-node", 4, "0 1 2 3", 0, "?", "?"),
    ("rtxpro6000-8x-1cpu-pix-phb", 8, "0 1 2 3 4 5 6 7", 0, "?", "?"),
    ("rtxpro6000-8x-asus-esc8000a", 8, "0 1 2 3 4 5 6 7", 0, "0 0 0 0 1 1 1 1", "?"),
    ("rtxpro6000-8x-dual-turin-phb-sys", 8, "0 1 2 3 4 5 6 7", 0, "?", "?"),
    ("rtxpro6000-8x-wrx90-2switch", 8, "0 1 2 3 4 5 6 7", 0, "?", "?"),
    ("tesla-p4-1x-numa-na", 1, "0", 0, "?", "?"),
    ("v100-8x-mesh-1nic-32gb", 8, "0-7", 1, "0 0 0 0 1 1 1 1", "NODE NODE NODE NODE SYS SYS SYS SYS"),
]
REFUSED = [
    ("dgx-b200-8x-4numa-nic16", 6, "row GPU4 has 26 cells for 27 columns"),
    ("dgx1-topo-mp-pci-only", 8, "the rows of GPU7 are missing"),
    ("dgx2-16x-v100-nv6-partial", 5, "the rows of GPU4, GPU5, GPU6"),
    ("gb200-emulated-nv17-nv16-degraded", 1, "no header line that names GPU0"),
    ("hopper-8x-nv18-nic18-partial", 5, "the rows of GPU4, GPU5, GPU6, GPU7 are missing"),
    ("k80-8x-pix-phb-sys-partial", 6, "the rows of GPU5, GPU6, GPU7 are missing"),
    ("pcie-4x-all-sys-2numa-partial", 1, "no header line that names GPU0"),
    ("pcie-8x-pix-node-sys-96t", 8, "row GPU6 has 9 cells for 11 columns"),
    ("pcie-8x-pix-pxb-sys-no-numa", 7, "the rows of GPU6, GPU7 are missing"),
]


def text(name: str) -> str:
    return (MACHINES / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("name", "gpus", "islands", "cards", "numa", "nearest"), READ, ids=[row[0] for row in READ]
)
def test_a_machine_reads_as_what_it_is(
    name: str, gpus: int, islands: str, cards: int, numa: str, nearest: str
) -> None:
    shape = parse_matrix(text(name))
    assert (gpus, cards) == (len(shape), len(shape.nics))
    assert islands == " ".join(map(ordinals, shape.islands))
    assert (numa.split() if numa != "?" else ["?"] * gpus) == [ordinals(nodes) or "?" for nodes in shape.numa]
    assert (nearest.split() if nearest != "?" else ["?"] * gpus) == list(shape.nearest_nic)
    assert shape == parse_matrix(render_matrix(shape))


@pytest.mark.parametrize(("name", "line", "problem"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_damaged_or_partial_machine_is_refused_at_its_line(name: str, line: int, problem: str) -> None:
    with pytest.raises(MatrixError) as caught:
        parse_matrix(text(name))
    assert line == caught.value.line
    assert f"line {line}: {problem}" in str(caught.value)


def test_no_machine_is_left_out_and_each_has_its_source() -> None:
    listed = [row[0] for row in (*READ, *REFUSED)]
    assert sorted(path.stem for path in MACHINES.glob("*.txt")) == sorted(listed)
    table = (MACHINES / "README.md").read_text()
    assert sorted(listed) == sorted(line.split("|")[1].strip() for line in table.splitlines()[8:])


def test_a_card_is_near_to_its_own_gpus_only() -> None:
    cards = {card.name: card.paths for card in parse_matrix(text("dgx-a100-8x-nv12-nic12")).nics}
    assert [Level.SYS] * 4 + [Level.PXB] * 2 + [Level.SYS] * 2 == list(cards["mlx5_6"])
    assert [Level.SYS] * 8 == list(cards["mlx5_4"])  # for storage
