"""What ``status`` shows of large and small clusters, on narrow and on wide terminals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from placement.cli.views.console import FittedTable, host_list, shortened
from placement.cli.views.difference import difference_lines
from placement.cli.views.nodes import cluster_map
from placement.cli.views.status import status_view, totals_of, totals_text
from placement.cli.views.tables import assignments_table
from tests.cli import fake_service
from tests.cli.fake_service import assignment, standing
from tests.cli.test_render import gpu, node

LONG_NODE = "gke-prod-us-central1-a3-highgpu-8g-pool-7f6d9c5b-x{:03}"
LONG_NAME = "team-search-llama-3-70b-instruct-production-{:02}"


def drawn(width: int, *renderables: Any) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=True)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return [line.rstrip() for line in capture.get().splitlines()]


def h100(i: int, name: str, gpus: Sequence[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    shape = {"gpu_count": 8, "gpu_model": "NVIDIA H100 80GB HBM3", "nvswitch": True, "islands": [[*range(8)]]}
    return node(id=f"id-{i}", name=name, gpus=list(gpus), **shape, **fields)


def cluster(nodes: int, busy: int, node_name: str, name: str) -> dict[str, Any]:
    """Nodes of 8 GPUs; on each that is busy either 8 replicas of one GPU, two of four, or four whose names differ."""
    deployments: dict[str, dict[str, Any]] = {}
    listed = []
    for i in range(nodes):
        gpus = []
        for ordinal in range(8):
            if i >= busy:
                gpus.append(gpu(ordinal))
                continue
            kind, size = i % 3, (1, 4, 2)[i % 3]
            number = ordinal // size
            called = name.format(i // 3 if kind < 2 else (i + number) % 20)
            one = deployments.setdefault(called, standing(called, replicas=0))
            index = one["replicas"]
            if ordinal % size == 0:
                one["replicas"] += 1
                held = [*range(ordinal, ordinal + size)]
                one["assignments"].append(
                    assignment(
                        replica_index=index,
                        node=f"id-{i}",
                        node_name=node_name.format(i),
                        gpus=held,
                        ray_gpus=held,
                        weakest_link="NV18",
                        bandwidth_gb_per_s=378.0,
                        ray_bandwidth_gb_per_s=378.0,
                    )
                )
            gpus.append(gpu(ordinal, "held", (called, index - (ordinal % size > 0), 1)))
        listed.append(h100(i, node_name.format(i), gpus))
    waits = {"pending": {"7": "no node has 4 free GPUs within 'nvlink' that " + "is long to say " * 8}}
    first = next(iter(deployments.values()), standing(name.format(0)))
    first |= {**waits, "state": "pending", "queue_position": 1}
    return {"nodes": listed, "deployments": [*deployments.values()] or [first], "unreadable": []}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("nodes", "busy"), [(20, 20), (20, 9), (400, 400), (400, 60), (400, 3)])
@pytest.mark.parametrize(("node_name", "name"), [(LONG_NODE, LONG_NAME), ("gpu-{:03}", "llama-{:02}")])
def test_nothing_is_wider_than_the_terminal_and_no_bracket_is_broken_within_a_gpu(
    width: int, nodes: int, busy: int, node_name: str, name: str
) -> None:
    lines = drawn(width, *status_view(cluster(nodes, busy, node_name, name)))
    assert max(map(len, lines)) <= width
    opened = 0
    for line in lines:
        if line.lstrip().startswith("[ "):
            assert not opened, "the one before was closed"
            opened = 1
        # What a line of a bracket holds is whole: ordinals, then whose they are.
        if opened:
            inside = line.strip().removeprefix("[ ").removesuffix(" ]")
            assert all(
                re.fullmatch(r"[\d,-]+ (free|\S+/\d+(-\d+)?)", part) for part in inside.split("   ")
            ), line
            opened = 0 if line.endswith(" ]") else 1
    assert not opened
    for i in range(busy):
        called = node_name.format(i)
        assert any(called in line or shortened(called, width // 2) in line for line in lines)


def test_twenty_nodes_with_long_names_are_few_lines_on_80_columns() -> None:
    lines = drawn(80, *status_view(cluster(20, 20, LONG_NODE, LONG_NAME)))
    of_nodes = [line for line in lines if line.lstrip().startswith(("[", "gke", "8 x", "2-3", "4-5", "6-7"))]
    assert len(of_nodes) <= 20 * 5
    assert len(lines) <= 130, "192 once"


def test_four_hundred_nodes_have_a_line_each_and_those_without_placements_one_together() -> None:
    report = cluster(400, 60, "gpu-{:03}", "llama-{:02}")
    lines = drawn(80, cluster_map(report))
    assert " 8 x NVIDIA H100 80GB HBM3, NVSwitch: 60 nodes" == lines[1]
    assert "   gpu-000   0 free  llama-00/0-7" == lines[2]
    assert "   gpu-001   0 free  llama-00/8-9" == lines[3]
    assert [
        " gpu-[060-399]",
        "     340 nodes, nothing is placed on them; each has 8 x NVIDIA H100 80GB HBM3,",
        "     NVSwitch",
        "",
    ] == lines[62:]
    assert sum(line.startswith("   gpu-0") for line in lines) == 60


def test_few_nodes_without_placements_are_drawn_each() -> None:
    report = cluster(3, 0, "gpu-{}", "a")
    assert 3 == sum("[ 0-7 free ]" in line for line in drawn(100, cluster_map(report)))
    different = [h100(i, f"gpu-{i}", [gpu(k) for k in range(8)], problem="no driver") for i in range(9)]
    assert 9 == sum(
        "no driver" in line for line in drawn(100, cluster_map({"nodes": different, "deployments": []}))
    )


DEMAND: list[dict[str, Any]] = [
    {"deployment": "first", "replica": 3, "set": number, "asked": "8 x H100 on one node", "state": "refused",
     "reason": "no such node type", "nodes": [], "seconds": 12.4, "again_in_seconds": 130.0}
    for number in (0, 1)
]  # fmt: skip


def test_what_waits_comes_before_the_nodes_in_the_order_of_the_queue() -> None:
    deployments = [
        standing("second", state="pending", replicas=1, pending={"0": "none is free"}, queue_position=2),
        standing(
            "first", 0, state="pending", replicas=4, pending={"1": "x", "2": "x", "3": "y"}, queue_position=1
        ),
        standing("kept", 0, outdated=[0]),
        standing(
            "dead", 0, state="lost", replica_states=[{"index": 0, "state": "lost", "reason": "node a died"}]
        ),
    ]
    report = {
        "nodes": [h100(0, "gpu-0", [gpu(k) for k in range(8)])],
        "deployments": deployments,
        "unreadable": [],
    }
    lines = [line for line in drawn(100, *status_view({**report, "demand": DEMAND})) if line]
    assert [
        "8 GPUs on 1 node: 0 held, 8 free",
        "4 deployments with 7 replicas, 4 pending",
        "waiting, next first",
        " 1. first, replicas 1-2 pending: x",
        " 1. first, replica 3 pending: y",
        " 2. second, pending: none is free",
        " dead, lost: node a died",
        " kept, replica 0: as declared before, until there is room for what is declared now",
        "asked of the autoscaler",
        " first/3, 8 x H100 on one node: refused, 12s: no such node type; again in 2m",
        " gpu-0   8 x NVIDIA H100 80GB HBM3, NVSwitch",
    ] == lines[:11]


def test_sums_are_those_of_the_service_where_it_tells_them() -> None:
    report = cluster(2, 1, "gpu-{}", "a-{}")
    assert (16, 8, 8, 2) == tuple(totals_of(report)[key] for key in ("gpus", "free", "held", "nodes"))
    assert 99 == totals_of({**report, "totals": {"gpus": 99}})["gpus"]


def test_nodes_without_gpus_are_counted_apart() -> None:
    report = cluster(2, 1, "gpu-{}", "a-{}")
    report["nodes"].append(node(id="head", name="head", gpu_count=0, gpus=[]))
    assert totals_text(report).plain.splitlines()[0] == (
        "16 GPUs on 2 nodes: 8 held, 8 free; 1 node without GPUs"
    )
    older = {"gpus": 16, "held": 8, "free": 8, "nodes": 3}
    assert totals_text({**report, "totals": older}).plain.startswith("16 GPUs on 3 nodes: 8 held, 8 free\n")


def test_many_replicas_are_shown_only_where_their_deployment_is_asked_for() -> None:
    report = cluster(30, 30, "gpu-{:02}", "llama-{:02}")
    replicas = sum(len(one["assignments"]) for one in report["deployments"])
    of_all, of_one = drawn(100, *status_view(report)), drawn(100, *status_view(report, of_one=True))
    assert sum(" GPU " in line for line in of_one) == replicas
    assert not any(" GPU " in line for line in of_all)
    assert any("placement status --deployment NAME" in line for line in of_all)


def test_a_dead_node_is_greyed_and_says_so() -> None:
    gpus = [gpu(0, "dead", ("a", 0, 1)), gpu(1, "dead", ("a", 0, 1)), *(gpu(k, "dead") for k in range(2, 8))]
    dead = h100(0, "gone", gpus, state="dead", dead_seconds=72.4, problem="the node died")
    console = Console(width=80, color_system="standard", force_terminal=True)
    report = {"nodes": [dead], "deployments": [{"name": "a", "assignments": []}]}
    with console.capture() as capture:
        console.print(cluster_map(report))
    first, _ = [line for line in capture.get().splitlines() if line.strip()]
    assert "\x1b[2mgone" in first and "\x1b[1m" not in first
    assert [" gone   died 1m ago", "        [ 0-1 a/0 ]"] == [
        line for line in drawn(80, cluster_map(report)) if line
    ]
    many = [{**dead, "name": f"gone-{i:02}"} for i in range(50)]
    lines = drawn(80, cluster_map({**report, "nodes": many}))
    assert [" dead: 50 nodes", "   gone-00  died 1m ago  a/0"] == lines[1:3]


def test_shares_and_others_are_broken_between_occupants() -> None:
    names = [f"embedding-model-number-{i}" for i in range(6)]
    shared = gpu(0, "held", *((name, 0, 0.15) for name in names))
    one = node(gpu_count=2, gpus=[shared, gpu(1, "other")])
    lines = drawn(
        80,
        cluster_map({"nodes": [one], "deployments": [{"name": name, "assignments": []} for name in names]}),
    )
    assert [
        " a   2 x GPU, one NVLink island",
        "     [ 0 embedding-model-number-0/0 0.15, embedding-model-number-1/0 0.15,",
        "       embedding-model-number-2/0 0.15, embedding-model-number-3/0 0.15,",
        "       embedding-model-number-4/0 0.15, embedding-model-number-5/0 0.15,",
        "       0.1 left   1 (another Ray user) ]",
    ] == [line for line in lines if line]


def test_a_table_of_replicas_keeps_to_the_width_and_to_its_gpus() -> None:
    report = cluster(20, 20, LONG_NODE, LONG_NAME)
    rows = [{"deployment": one["name"], "assignments": one["assignments"]} for one in report["deployments"]]
    lines = drawn(80, assignments_table(rows, title="placed"))
    assert max(map(len, lines)) <= 80
    with_gpus = [line for line in lines if "GPU " in line]
    assert len(with_gpus) == sum(len(row["assignments"]) for row in rows)
    assert all("378 GB/s, NV18" in line for line in with_gpus)


@pytest.mark.parametrize(("width", "left_out"), [(40, "all-reduce, Ray alone"), (80, "Ray alone"), (200, "")])
def test_columns_for_which_a_terminal_has_no_room_are_named(width: int, left_out: str) -> None:
    fields: dict[str, Any] = {
        "ray_bandwidth_gb_per_s": 14.9,
        "bandwidth_gb_per_s": 230.0,
        "weakest_link": "NV12",
    }
    placed = assignment(node_name="ノード" * 6, gpus=[0, 1], ray_gpus=[1, 2], **fields)
    shown = drawn(width, assignments_table([{"deployment": "日本語" * 5, "assignments": [placed]}], "placed"))
    assert max(map(cell_len, shown)) <= width
    [row] = [line for line in shown if "GPU 0-1" in line]
    heading = next(line for line in shown if "replica" in line)
    assert cell_len(row[: row.index("GPU 0-1")]) == heading.index("holds"), (
        "wide characters are counted as two"
    )
    said = " ".join(" ".join(shown).split())
    assert (f"left out: {left_out}; a wider terminal or --json shows" in said) == bool(left_out)


def test_what_is_piped_is_in_full_and_no_line_ends_in_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    name, reason = "long-" * 30 + "name", "no node is free, " * 30 + "at all"
    placed = assignment(node_name=name, gpus=[0, 1], bandwidth_gb_per_s=230.0, weakest_link="NV12")
    one = standing(name, 0, replicas=2, state="pending", pending={"1": reason}) | {"assignments": [placed]}
    held = [gpu(i, "held", (name, 0, 1)) for i in range(8)]
    report = fake_service.report(one, nodes=[h100(0, name, held, problem=reason)])
    fake_service.use(monkeypatch, fake_service.FakeService(status=report))
    lines = fake_service.run("status").stdout.splitlines()
    assert [line for line in lines if line.endswith(reason)] == [
        f" {name}, replica 1 pending: {reason}",
        next(line for line in lines if line.endswith(f"  {reason}")),
    ]
    assert sum(line.count(name) for line in lines) == 7, lines
    assert not [line for line in lines if line.endswith(" ")]


@pytest.mark.parametrize(("width", "left_out"), [(30, ["b", "c"]), (45, ["c"]), (70, [])])
def test_a_fitted_table_leaves_out_the_last_columns(width: int, left_out: list[str]) -> None:
    table = FittedTable(box=None)
    for heading in "abc":
        table.add_column(heading, no_wrap=True)
    table.add_row(*(20 * one for one in "abc"))
    shown = drawn(width, table)
    assert [one for one in "abc" if not any(20 * one in line for line in shown)] == left_out
    assert ("left out" in " ".join(shown)) == bool(left_out)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["gpu-001", "gpu-002", "gpu-003", "gpu-007"], "gpu-[001-003,007]"),
        (["gpu-9", "gpu-10", "gpu-11"], "gpu-9, gpu-[10-11]"),
        (["10.0.0.1", "10.0.0.2"], "10.0.0.[1-2]"),
        (["a", "b"], "a, b"),
        (["n1.rack", "n2.rack"], "n[1-2].rack"),
        ([f"{name}-node-of-a-long-name" for name in "abcdef"], "a-node-of-a-long-name and 5 more"),
    ],
)
def test_nodes_are_named_as_slurm_does(names: list[str], text: str) -> None:
    assert text == host_list(names, 40)


def test_names_lose_their_middle() -> None:
    assert ["abc", "ab…gh", "abc…ghi"] == [
        shortened("abc", 3),
        shortened("abcdefgh", 5),
        shortened("abcdefghi", 7),
    ]


def test_a_difference_without_the_new_fields_is_told_by_what_stands() -> None:
    bare = {"deployment": "a", "assignments": [], "standing": False, "pending": {}}
    assert ["  + a: new, 0 replicas"] == [str(line) for line in difference_lines([bare], {})]
    assert ["  ~ a: changed in place"] == [str(line) for line in difference_lines([bare], {"a": {0: 1}})]
