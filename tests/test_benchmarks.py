"""The yardstick does what its public description says, and the tables come out."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from benchmarks import bandwidth, choice, clients, partition, results, scale
from placement import __version__, topologies
from placement.core.matrix import parse_matrix
from placement.core.topology import UNKNOWN_LINK, Link, Path, Topology


def nv(links: int) -> Link:
    return Link(Path.NVLINK, links)


def four(links: dict[tuple[int, int], Link], rest: Path = Path.SYS) -> Topology:
    """Four GPUs, the named pairs joined so."""
    return Topology(
        tuple(tuple(links.get((min(a, b), max(a, b)), Link(rest)) for b in range(4)) for a in range(4))
    )


@pytest.mark.parametrize(
    ("link", "points"),
    [
        (nv(1), 100),
        (nv(12), 1200),
        (Link(Path.PIX), 50),
        (Link(Path.PXB), 40),
        (Link(Path.PHB), 30),
        (Link(Path.NODE), 20),
        (Link(Path.SYS), 10),
        (UNKNOWN_LINK, 0),
    ],
)
def test_a_pair_scores_by_its_link(link: Link, points: int) -> None:
    assert points == partition.pair_score(link)


@pytest.mark.parametrize(
    ("free", "size", "ways"),
    [(4, 2, 3), (8, 2, 105), (8, 4, 35), (7, 2, 105), (5, 4, 5), (3, 1, 1), (6, 8, 1)],
)
def test_every_division_is_tried_once(free: int, size: int, ways: int) -> None:
    tried = [frozenset(sets) for sets in partition.partitions(tuple(range(free)), size)]
    assert ways == len(tried) == len(set(tried)) == partition.count_partitions(free, size)
    smaller = [free % size] if free % size else []
    for sets in tried:
        assert list(range(free)) == sorted(gpu for gpus in sets for gpu in gpus)
        assert sorted(smaller + [size] * (free // size)) == sorted(map(len, sets))


def test_the_best_division_counts_before_the_best_set() -> None:
    machine = four({(1, 2): nv(3), (0, 1): nv(2), (2, 3): nv(2)})
    assert (0, 1) == partition.best_set(machine, range(4), 2), (
        "400 in two pairs, against 310 with the best pair"
    )
    assert (1, 2) == partition.best_set(machine, {1, 2, 3}, 2), "the one that is left over scores nothing"


def test_of_equal_divisions_the_first_is_taken() -> None:
    assert (0, 1) == partition.best_set(four({}), range(4), 2)
    assert (1,) == partition.best_set(four({(1, 2): nv(1)}), {1, 2, 3}, 1), (
        "single GPUs have no pairs to score"
    )


def test_the_best_set_of_the_best_division_is_taken() -> None:
    assert (2, 3) == partition.best_set(four({(0, 1): nv(1), (2, 3): nv(2)}), range(4), 2)
    assert partition.best_set(four({}), {0, 3}, 4) is None


def test_too_many_divisions_are_not_tried() -> None:
    with pytest.raises(OverflowError, match="16 GPUs"):
        partition.best_set(topologies.load("dgx-2"), range(16), 2)


@pytest.mark.parametrize("waiting", [False, True])
def test_jobs_never_hold_more_than_there_is_and_leave_once(waiting: bool) -> None:
    held: dict[int, int] = {}
    for job, size in choice.arrivals(8, "any", 200, waiting):
        if size:
            assert job not in held
            held[job] = size
        else:
            del held[job]
        assert sum(held.values()) <= 8


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize("name", [name for name in topologies.names() if len(topologies.load(name)) <= 8])
def test_ours_reaches_no_less_than_its_peers_in_the_long_run(name: str, waiting: bool) -> None:
    reached = choice.sequences(topologies.load(name), 40, 60, waiting)
    assert {"ours", "partitions", "Ray"} == set(reached)
    assert [0, 0, 0] == [one.refused for one in reached.values()]
    assert 1 == len({len(one.bandwidth) for one in reached.values()})
    totals = {chooser: math.fsum(one.bandwidth) for chooser, one in reached.items()}
    assert totals["ours"] == max(totals.values())


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    choice.main(["--asked", "2", "--seeds", "1", "--steps", "8", "--machines", "dgx-1v", "dgx-2", "t4-4x"])
    printed = capsys.readouterr().out
    assert printed.startswith("python -m benchmarks.choice ")
    assert "2027025" in printed
    assert 2 == printed.count("\n            dgx-1v ")
    assert 2 == printed.count("none refused: dgx-2, t4-4x\n")


def test_the_service_is_measured_at_every_size(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(["--nodes", "2", "4", "--most", "15", "--pending", "3", "--rounds", "3"])
    printed = capsys.readouterr().out
    assert printed.startswith("python -m benchmarks.scale ")
    sizes = [line.split()[:2] for line in printed.splitlines() if line.count("x") == 2]
    assert [["2", "10"], ["4", "15"]] == sizes
    for measured in (
        "status, 4 nodes, 15 replicas: ",
        "restart, 4 nodes, 15 deployments: ",
        "idle, 4 nodes, 15 deployments: ",
        "a look at 3 deployments that find no room: ",
    ):
        assert measured in printed


def test_the_make_believe_ray_of_the_benchmark_has_what_the_service_placed() -> None:
    with scale.started(nodes=3, deployments=6, waiting=2) as (cluster, service):
        assert [0.0] * 3 == [row["GPU"] for row in cluster.rows.values()]
        service.look()
        _, report = service.ask("status")
        assert {"held-00000", "waits-00001"} <= {one["name"] for one in report["deployments"]}
        assert all(
            gpu["state"] in ("held", "other", "free") for node in report["nodes"] for gpu in node["gpus"]
        )
        assert 2 == sum(bool(one["pending"]) for one in report["deployments"])
        service.ask("release", "held-00000")
        assert 1.0 == sum(row["GPU"] for row in cluster.rows.values())
        service.look()
        placed = [one for one in service.ask("status")[1]["deployments"] if one["name"] == "waits-00000"]
        assert "placed" == placed[0]["state"], "what waits gets the room"
        assert 0.0 == sum(row["GPU"] for row in cluster.rows.values())


def test_many_clients_are_set_beside_the_plain_way(capsys: pytest.CaptureFixture[str]) -> None:
    rate = clients.tell("groups, a task in each", [10.0] * 40, Counter(), 2.0)
    clients.tell("place, apply, release", [20.0, 30.0, 40.0] * 10, Counter(NotEnoughGpus=3), 2.0, beside=rate)
    plain, ours = capsys.readouterr().out.splitlines()
    assert ["20.0/s", "10", "ms", "10", "ms"] == plain.split()[5:10]
    assert ["15.0/s", "75", "%", "30", "ms", "40", "ms"] == ours.split()[3:10]
    assert ours.endswith("refusals: 3 NotEnoughGpus")


def test_clients_go_on_until_the_time_is_over_and_their_errors_are_counted() -> None:
    def once(number: int, turn: int) -> None:
        if turn % 2:
            raise KeyError(number)

    took, errors = clients.storm(once, clients=3, seconds=0.05)
    assert took and set(errors) == {"KeyError"}
    assert abs(len(took) - errors["KeyError"]) <= 3


def test_published_results_are_set_beside_the_prediction(
    tmp_path: FilePath, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "box.txt").write_text(
        "\tGPU0\tGPU1\tGPU2\nGPU0\tX\tPIX\tNODE\nGPU1\tPIX\tX\tNODE\nGPU2\tNODE\tNODE\tX\n"
    )
    (tmp_path / "hosts.toml").write_text(
        '[box]\ncpu = "Intel Xeon Gold 6230R"\npcie_generation = 3\npcie_width = { 1 = 8 }\npeer_to_peer = "none"\n'
    )
    (tmp_path / "measured.csv").write_text(
        "machine,model,gpus,busbw_gb_per_s,message,nccl,forced,source,note\n"
        "box,Tesla V100S-PCIE-32GB,0 1,2.3,6G,2.27.3,,a report,\n"
        "box,Tesla V100S-PCIE-32GB,0 2,5.5,6G,2.27.3,,a report,\n"
        "box,Tesla V100S-PCIE-32GB,0 1,6.0,6G,2.27.3,P2P driver,a report,\n"
    )
    assert bandwidth.main([str(tmp_path), "--json"]) == 0
    shared, apart, peer = json.loads(capsys.readouterr().out)
    assert [(one["gpus"], one["measured"]) for one in (shared, apart)] == [([0, 1], 2.3), ([0, 2], 5.5)]
    assert [one["predicted"] for one in (shared, apart, peer)] == [2.28, 5.3, 6.0]
    assert bandwidth.main([str(tmp_path)]) == 0
    assert "order of equally large sets: 1 right, 0 tied, 0 wrong" in capsys.readouterr().out
    plot = tmp_path / "plot.svg"
    assert bandwidth.main([str(tmp_path), "--plot", str(plot)]) == 0
    drawn = plot.read_text("utf-8")
    assert drawn.count('r="4.5"') == 2 + 1, "NCCL's own choices, and one kind in the legend"
    assert "PCIe, through the host: 2 of 2 within 15 %" in drawn


def test_what_a_source_does_not_tell_of_peer_to_peer_is_what_the_driver_says_of_such_cards() -> None:
    pair = parse_matrix("\tGPU0\tGPU1\nGPU0\tX\tPIX\nGPU1\tPIX\tX\n")
    found = [
        bandwidth.described(replace(pair, model=model), {}, "").link(0, 1).peer
        for model in ("NVIDIA L40S", "NVIDIA GeForce RTX 4090", "NVIDIA CMP 170HX")
    ]
    assert found == [True, False, False]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (results.exact("f", 2), results.exact("f", 2), "same"),
        (results.exact("f", 2), results.exact("f", 2.1), "better"),
        (results.exact("f", 2, more_is_better=False), results.exact("f", 2.1, more_is_better=False), "worse"),
        (results.Figure("f", 2, 1.8, 2.4, True), results.Figure("f", 2.5, 2.2, 3, True), "noise"),
        (results.Figure("f", 2, 1.8, 2.2, True), results.Figure("f", 2.5, 2.4, 3, True), "noise"),
        (results.Figure("f", 2, 1.8, 2.2, True), results.Figure("f", 3, 2.8, 3.2, True), "better"),
        (results.Figure("f", 2, 1.8, 2.2, False), results.Figure("f", 3, 2.8, 3.2, False), "worse"),
    ],
)
def test_what_changed_from_version_to_version(
    old: results.Figure,
    new: results.Figure,
    said: str,
    tmp_path: FilePath,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = tmp_path / "old.json", tmp_path / "new.json"
    for path, figure, gone in zip(paths, (old, new), ("was", "is"), strict=True):
        path.write_text(json.dumps(results.recorded([figure, results.exact(gone, 1)])))
    results.main(["compare", *map(str, paths)])
    *_, line, was, now = capsys.readouterr().out.splitlines()
    assert line.split() == ["f", f"{old.value:g}", f"{new.value:g}", f"{new.value / old.value:.3f}", said]
    assert (was.split(maxsplit=1), now.split(maxsplit=1)) == (
        ["was", "only in the old"],
        ["is", "only in the new"],
    )


def test_this_version_is_recorded() -> None:
    file = results.load(__version__)
    assert ([*file["machine"]], file["version"]) == (["cores", "python", "ray"], __version__)
    *_, last = results.compared(file, file)
    assert last.endswith(" 1.000  same")
    with pytest.raises(SystemExit, match=r"9\.9: nothing is recorded of it; there are .*0\.1\.0"):
        results.load("9.9")
