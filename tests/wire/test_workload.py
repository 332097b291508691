"""Workload files: mixes, traces, and the openb trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from placement.core.needs import GIB, WHOLE, Needs
from placement.core.node import Node
from placement.core.policy import Policy
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import InvalidDeployment
from placement.wire.workload import load_workload, openb_cluster, read_rows, with_policy

CLUSTER = Snapshot([Node("a", "a", topology=Topology.unknown(8), free=frozenset(range(8)))])

MIX = """
arrivals = 400
load = 0.5

[[mix]]
name = "small"
gpus = 0.5
weight = 3
mean_minutes = 10

[[mix]]
name = "large"
gpus = 4
"""


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_mix_arrives_in_its_proportions_at_its_load(tmp_path: Path) -> None:
    path = write(tmp_path, "mix.toml", MIX)
    arrivals = load_workload(path, seed=1)(CLUSTER)
    assert len(arrivals) == 400
    small = sum(one.request.deployment == "small" for one in arrivals)
    assert 250 < small < 350
    asked = sum(
        one.request.needs.gpus * one.request.needs.share / WHOLE * (one.stays_seconds or 0)
        for one in arrivals
    )
    assert asked / arrivals[-1].at_seconds == pytest.approx(0.5 * 8, rel=0.3)


def test_the_same_seed_gives_the_same_arrivals(tmp_path: Path) -> None:
    path = write(tmp_path, "mix.toml", MIX)
    one, same, other = (load_workload(path, seed)(CLUSTER) for seed in (1, 1, 2))
    assert one == same != other
    assert len(load_workload(path, arrivals=7)(CLUSTER)) == 7


def test_a_trace_has_times_and_fields_of_a_deployment(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "trace.csv",
        "arrive_seconds,depart_seconds,name,gpus,replicas,accelerators,cpus_per_gpu,cpus\n"
        "0,60,llama,2,3,H100|H200,4,\n"
        "5.5,,,0.25,,,,\n"
        "6,,router,,,,,2.5\n",
    )
    first, second, third = load_workload(path)(CLUSTER)
    assert (first.at_seconds, first.stays_seconds) == (0, 60)
    assert first.request.replicas == (0, 1, 2)
    assert first.request.accelerators == ("H100", "H200")
    assert first.request.cpu_milli == 8000
    assert (second.at_seconds, second.stays_seconds, second.request.needs) == (5.5, None, Needs(1, share=250))
    assert (third.request.on_cpus, third.request.cpu_milli) == (True, 2500)


PODS = """name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,creation_time,deletion_time
p0,4000,1024,1,460,T4|P100,100,160
p1,8000,2048,8,1000,,120,
p2,1000,512,0,0,,130,140
"""


def test_the_openb_trace_is_known_by_its_columns(tmp_path: Path) -> None:
    shared, whole, without = load_workload(write(tmp_path, "pods.csv", PODS))(CLUSTER)
    assert shared.request.needs == Needs(1, share=460)
    assert shared.request.accelerators == ("P100", "T4")
    assert (shared.request.cpu_milli, shared.request.memory_bytes) == (4000, GIB)
    assert (shared.at_seconds, shared.stays_seconds) == (100, 60)
    assert (whole.request.needs, whole.stays_seconds) == (Needs(8), None)
    assert without.request.needs == Needs(0)


def test_openb_pods_without_times_come_one_a_second_and_stay(tmp_path: Path) -> None:
    text = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\np0,0,0,1,1000\np1,0,0,1,500\n"
    arrivals = load_workload(write(tmp_path, "pods.csv", text))(CLUSTER)
    assert [(one.at_seconds, one.stays_seconds) for one in arrivals] == [(0, None), (1, None)]


def test_openb_nodes(tmp_path: Path) -> None:
    path = write(
        tmp_path, "nodes.csv", "sn,cpu_milli,memory_mib,gpu,model\nn0,64000,1024,2,P100\nn1,1,1,8,G2\n"
    )
    first, second = openb_cluster(read_rows(path), str(path)).nodes
    assert (first.id, first.free, first.cpu_milli, first.memory_bytes) == ("n0", {0, 1}, 64000, GIB)
    assert (second.accelerators, len(second.topology)) == ({"G2"}, 8)


def test_a_policy_may_be_given_to_all(tmp_path: Path) -> None:
    arrivals = load_workload(write(tmp_path, "pods.csv", PODS))(CLUSTER)
    assert {one.request.policy for one in with_policy(arrivals, Policy.PACK)} == {Policy.PACK}
    assert with_policy(arrivals, None) == arrivals


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("w.csv", "", "w.csv: has no rows"),
        ("w.csv", "arrive_seconds,gpus\n,1\n", "row 2: arrive_seconds: is missing"),
        ("w.csv", "arrive_seconds,gpus\n0,1\nsoon,1\n", "row 3: arrive_seconds: 'soon' is not a number"),
        (
            "w.csv",
            "arrive_seconds,depart_seconds\n5,4\n",
            "row 2: depart_seconds: 4 is before arrive_seconds, 5",
        ),
        ("w.csv", "arrive_seconds,gpus\n0,1.5\n", "row 2: gpus: 1.5 GPUs is more than one and not whole"),
        ("w.csv", "arrive_seconds,gpu\n0,1\n", "row 2: unknown field 'gpu'"),
        (
            "w.csv",
            "cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,one,0\n",
            "row 2: num_gpu: 'one' is not a whole",
        ),
        (
            "w.csv",
            "cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,2,500\n",
            "row 2: gpu_milli: 500 with num_gpu 2",
        ),
        ("w.toml", "arrivals = 3", "w.toml: mix: is missing"),
        ("w.toml", "[[mix]]\ngpus = 1\nweight = 0", "mix[0]: weight: "),
        ("w.toml", "load = 0\n[[mix]]\ngpus = 1", "load: "),
        ("w.toml", "[[mix]]\ngpus = 1.5", "mix[0]: gpus: 1.5 GPUs is more than one"),
        ("w.txt", "x", "has the ending '.txt'"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(InvalidDeployment) as raised:
        load_workload(write(tmp_path, name, text))(CLUSTER)
    assert says in str(raised.value)


TRACE = "arrive_seconds,depart_seconds,name,gpus\n0,100,a,1\n5.5,60,b,8\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.csv", b"\xef\xbb\xbf" + TRACE.encode()),
        ("excel.csv", TRACE.encode("utf-16")),
        ("UPPER.CSV", TRACE.encode()),
        ("semicolons.csv", TRACE.replace(",", ";").encode()),
        ("hint.csv", b"sep=;\r\n" + TRACE.replace(",", ";").replace("\n", "\r\n").encode()),
        ("tabs.csv", TRACE.replace(",", "\t").encode()),
        ("floats.csv", TRACE.replace(",8\n", ",8.0\n").replace(",1\n", ",1.0\n").encode()),
        ("exponents.csv", TRACE.replace(",100,", ",1e2,").replace(",8\n", ",0.8e1\n").encode()),
        ("blanks.csv", TRACE.replace(",", " , ").encode()),
        ("capitals.csv", TRACE.replace("arrive_seconds", "Arrive_Seconds").replace("gpus", "GPUs").encode()),
        ("lines.csv", TRACE.replace("5.5", "\n,,,\n   \n5.5").encode()),
        ("trailing.csv", TRACE.replace("\n", ",\n").encode()),
        ("more.csv", TRACE.replace("1\n", "1,,\n").encode()),
        ("quoted.csv", TRACE.replace(",8", ',"8"').encode()),
        ("index.csv", b",arrive_seconds,depart_seconds,name,gpus\n0,0,100,a,1\n1,5.5,60,b,8\n"),
        ("old-mac.csv", TRACE.replace("\n", "\r").encode()),
        ("cut.csv", TRACE.strip().encode()),
    ],
)
def test_a_trace_is_read_as_spreadsheets_write_it(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    arrivals = load_workload(path)(CLUSTER)
    assert [("a", 0.0, 100.0, 1), ("b", 5.5, 54.5, 8)] == [
        (one.request.deployment, one.at_seconds, one.stays_seconds, one.request.needs.gpus)
        for one in arrivals
    ]


def test_a_cell_may_hold_json(tmp_path: Path) -> None:
    text = 'arrive_seconds,model,serving\n0,gpt-4o,"{""max_concurrent"": 8}"\n'
    [one] = load_workload(write(tmp_path, "remote.csv", text))(CLUSTER)
    assert ("openai", 8) == (one.request.provider, one.request.egress)


def test_an_openb_list_may_have_whole_numbers_as_pandas_writes_them(tmp_path: Path) -> None:
    text = (
        "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,creation_time,deletion_time,scheduled_time\n"
        "openb-pod-0000,12000.0,16384.0,1.0,1000.0,,LS,Running,0,12537496,0.0\n"
    )
    [one] = load_workload(write(tmp_path, "pods_float.csv", text))(CLUSTER)
    assert (12000, 16 * GIB, Needs(1)) == (one.request.cpu_milli, one.request.memory_bytes, one.request.needs)
    assert (0, 12537496) == (one.at_seconds, one.stays_seconds)
    nodes = write(tmp_path, "nodes.csv", "SN;cpu_milli;memory_mib;gpu;model\nn0;64000.0;1024.0;2.0;P100\n")
    [node] = openb_cluster(read_rows(nodes), str(nodes)).nodes
    assert (64000, GIB, {0, 1}) == (node.cpu_milli, node.memory_bytes, node.free)


HEAD = "arrive_seconds,depart_seconds,name,gpus\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD + "nan,100,a,1\n", "row 2: arrive_seconds: 'nan' is not a number of seconds"),
        (HEAD + "0,100,a,1\n5,inf,b,1\n", "row 3: depart_seconds: 'inf' is not a number of seconds"),
        (HEAD + "-1,100,a,1\n", "row 2: arrive_seconds: '-1' is not a number of seconds"),
        (HEAD + "1e400,,a,1\n", "row 2: arrive_seconds: '1e400' is not a number of seconds"),
        (HEAD + "1_0,,a,1\n", "row 2: arrive_seconds: '1_0' is not a number of seconds"),
        (HEAD + "9" * 5000 + ",,a,1\n", "row 2: arrive_seconds: '9999"),
        (HEAD.replace(",", ";") + "0,5;1;a;1\n", "arrive_seconds: '0,5' is not a number of seconds; write a point"),
        (HEAD + "1700000000000,,a,1\n", "'1700000000000' is too large; give seconds, at most 1099511627776"),
        (HEAD + '"1,000",,a,1\n', "'1,000' is not a number of seconds; write it without commas, or a point"),
        (HEAD + '0,"1,500,000",a,1\n', "'1,500,000' is not a number of seconds; write it without commas"),
        ("# made by hand\n" + HEAD + "0,1,a,1\n", "row 2: has 4 cells for 1 column;"),
        (HEAD + "\n\n0,soon,a,1\n", "row 4: depart_seconds: 'soon' is not a number"),
        (HEAD + "0,1,a,1,5\n", "row 2: has 5 cells for 4 columns"),
        (HEAD + "0,1,a\nsoon,1\n", "row 3: arrive_seconds: 'soon'"),
        (HEAD + "0,1,a,nan\n", "row 2: gpus: "),
        (HEAD + "0,1,a,inf\n", "row 2: gpus: "),
        (HEAD + "0,1,a,8.5\n", "row 2: gpus: 8.5 GPUs"),
        (HEAD, "has no rows; a header line and one row at least"),
        ("\n , ,\n" + HEAD, "has no rows"),
        ("arrive_seconds,name,name\n0,a,b\n", "column 'name' is there twice"),
        ("arrive_seconds,Name,name\n0,a,b\n", "column 'name' is there twice"),
        ("arrive_seconds,,name\n0,x,a\n", "row 2: column 2 has no name, and 'x' in it"),
        ("name,gpus\na,1\n", "has no column arrive_seconds, as a trace needs"),
        ("num_gpu,cpu_milli,memory_mib\n1,1,1\n", "an openb pod list needs cpu_milli, gpu_milli, memory_mib, num_gpu"),
        ("arrive_seconds,serving\n0,\"" + "[" * 50_000 + "\"\n", "row 2: serving: "),
        ("arrive_seconds,serving\n0," + "[" * 200 + "]" * 200 + "\n", "row 2: serving: is nested more than 64 deep"),
        ("arrive_seconds,model\n0,\"" + "x" * 200_000 + "\"\n", "row 2: cannot be read: field larger than"),
        ("cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,-1,0\n", "num_gpu: '-1' is not a whole number"),
        ("cpu_milli,memory_mib,num_gpu,gpu_milli\n1,1,1.5,0\n", "num_gpu: '1.5' is not a whole number"),
        ("cpu_milli;memory_mib;num_gpu;gpu_milli\n1,5;1;1;0\n", "'1,5' is not a whole number; write a point"),
        ("cpu_milli,memory_mib,num_gpu,gpu_milli\n1e300,1,1,0\n", "cpu_milli: '1e300' is too large"),
        (
            "cpu_milli,memory_mib,num_gpu,gpu_milli,creation_time,deletion_time\n1,1,1,1000,9,5\n",
            "row 2: deletion_time: 5 is before creation_time, 9",
        ),
    ],
)  # fmt: skip
def test_a_bad_cell_is_refused_with_its_row_and_column(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidDeployment) as caught:
        load_workload(write(tmp_path, "w.csv", text))(CLUSTER)
    assert says in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 600


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("n0,1,1,999999999,P100", "row 3: gpu: '999999999' is too large; use at most 1024"),
        ("n0,1,1,1,", "row 3: sn: 'n0' is there twice"),
        (",1,1,1,", "row 3: sn: is missing"),
        ("n1,1,1,nan,", "row 3: gpu: 'nan' is not a whole number"),
    ],
)
def test_a_bad_node_of_the_openb_trace_is_refused_with_its_row(tmp_path: Path, row: str, says: str) -> None:
    path = write(tmp_path, "nodes.csv", f"sn,cpu_milli,memory_mib,gpu,model\nn0,1,1,1,P100\n{row}\n")
    with pytest.raises(InvalidDeployment) as caught:
        openb_cluster(read_rows(path), str(path))
    assert says in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(InvalidDeployment, match="nowhere.csv: cannot be read"):
        load_workload(Path("nowhere.csv"))
