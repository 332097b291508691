"""`nvidia-smi topo -m`: what is read, what is refused, and where the refusal points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.core.matrix import parse_matrix, render_matrix
from placement.core.topology import UNKNOWN_LINK, Link, Nic, Path, Topology
from placement.errors import MatrixError

NV4, SYS = Link(Path.NVLINK, 4), Link(Path.SYS)

TABS = (
    "\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV4\tPIX\t0,5-7\t0-1\t\tN/A\n"
    "GPU1\tNV4\t X \tSYS\t8-9\tN/A\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \t\t\t\t\n"
)
PAIR = Topology(
    links=((UNKNOWN_LINK, NV4), (NV4, UNKNOWN_LINK)),
    numa=((0, 1), ()),
    cpus=((0, 5, 6, 7), (8, 9)),
    nics=(Nic("NIC0", (Path.PIX, Path.SYS)),),
)


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("tabs", TABS),
        ("blanks", TABS.replace(" X ", "X").expandtabs(16)),
        ("Windows line ends and a byte order mark", "\ufeff" + TABS.replace("\n", "\r\n")),
        ("an underlined header", "\t\x1b[4m" + TABS[1:].replace("ID\n", "ID\x1b[0m\n")),
        (
            "the command above, the legend below",
            "$ nvidia-smi topo -m\n" + TABS + "\nLegend:\n\n  X    = Self\n  GPU0 = a trap\n",
        ),
        ("the network card's row is cut off", TABS[: TABS.index("NIC0\tPIX")]),
        (
            "the affinities in another order",
            "GPU0 GPU1 NUMA Affinity CPU Affinity NIC0\nGPU0 X NV4 0-1 0,5-7 PIX\nGPU1 NV4 X N/A 8-9 SYS\n",
        ),
        ("no header for the GPU's own NUMA node", TABS.replace("\tGPU NUMA ID", "").replace("\t\tN/A", "")),
        (
            "a Markdown table",
            "|      | GPU0 | GPU1 | NIC0 | CPU Affinity | NUMA Affinity |\n"
            "|------|------|------|------|--------------|---------------|\n"
            "| GPU0 | X    | NV4  | PIX  | 0,5-7        | 0-1           |\n"
            "| GPU1 | NV4  | X    | SYS  | 8-9          |               |\n"
            "| NIC0 | PIX  | SYS  | X    |              |               |\n",
        ),
        (
            "a Markdown table with the affinities first",
            "| CPU Affinity | NUMA Affinity |      | GPU0 | GPU1 | NIC0 |\n"
            "|---|---|---|---|---|---|\n"
            "| 0,5-7 | 0-1 | GPU0 | X | NV4 | PIX |\n"
            "| 8-9 | N/A | GPU1 | NV4 | X | SYS |\n",
        ),
    ],
    ids=lambda value: value if "\n" not in value else "",
)
def test_one_machine_in_all_its_spellings(case: str, text: str) -> None:
    assert PAIR == parse_matrix(text)


def test_a_network_card_is_called_what_its_column_is_called() -> None:
    text = "GPU0 mlx5_bond_0 CPU Affinity\nGPU0 X SOC 0\n\nNIC Legend:\n\n  NIC0: mlx5_1\n"
    assert (Nic("mlx5_bond_0", (Path.SYS,)),) == parse_matrix(text).nics


def test_what_is_not_printed_is_unknown() -> None:
    assert Topology(links=PAIR.links) == parse_matrix("GPU0 GPU1\nGPU0 X NV4\nGPU1 NV4 X\n")


def test_a_single_gpu_is_a_machine() -> None:
    text = "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t0-7\t\tN/A\t\tN/A\n"
    assert Topology(links=((UNKNOWN_LINK,),), cpus=(tuple(range(8)),)) == parse_matrix(text)


def test_every_path_has_its_name() -> None:
    names = ["NV1", "NV18", "PIX", "PXB", "PHB", "NODE", "SYS", "?", "SOC"]
    read = [parse_matrix(f"GPU0 GPU1\nGPU0 X {name}\nGPU1 {name} X").link(0, 1) for name in names]
    assert [*names[:-1], "SYS"] == list(map(str, read))


THREE = "GPU0 GPU1 GPU2 CPU Affinity\nGPU0 X NV1 NV2 0\nGPU1 NV1 X NV1 0\nGPU2 NV2 NV1 X 0\n"


@pytest.mark.parametrize(
    ("case", "text", "line", "problem"),
    [
        ("nothing", "", 0, "no header line"),
        ("prose", "GPU 0: NVIDIA L4\nI have a GPU0 here\n", 0, "no header line"),
        ("the header is cut off", THREE.split("\n", 1)[1], 1, "no header line"),
        ("the end is cut off", THREE[: THREE.index("GPU2 NV2")], 3, "rows of GPU2 are missing"),
        ("only the header", THREE[: THREE.index("\n")], 1, "rows of GPU0, GPU1, GPU2 are missing"),
        ("a row's end is cut off", THREE.replace("X 0\n", "X\n"), 4, "row GPU2 has 3 cells for 4 columns"),
        ("two cells ran together", THREE.replace("NV1 NV2 0", "NV1NV2 0"), 2, "GPU0 has 3 cells"),
        ("one cell too many", THREE.replace("GPU1 NV1", "GPU1 NV1 NV1"), 3, "row GPU1 has 5 cells"),
        (
            "there and back differ",
            THREE.replace("GPU2 NV2", "GPU2 SYS"),
            4,
            "GPU2 to GPU0 is SYS, back it is NV2",
        ),
        ("no X on the diagonal", THREE.replace("NV1 X", "NV1 NV1"), 3, "GPU1 to itself is 'NV1'"),
        ("an X elsewhere", THREE.replace("X NV1 NV2", "X X NV2"), 2, "GPU0 to GPU1 is 'X', which is no link"),
        ("a typing error", THREE.replace("NV2 NV1", "NV2 VN1"), 4, "GPU2 to GPU1 is 'VN1', which is no link"),
        ("no NVLinks at all", THREE.replace("NV2", "NV0"), 2, "'NV0', which is no link"),
        ("the same row twice", THREE + "GPU1 NV1 X NV1 0\n", 5, "row GPU1 is there already, in line 3"),
        ("a row without a column", THREE + "GPU3 X X X 0\n", 5, "row GPU3 has no column"),
        ("GPUs left out", THREE.replace("GPU1 GPU2 CPU", "GPU2 GPU3 CPU"), 1, "GPU0, GPU2, GPU3, not"),
        (
            "a card at a path unheard of",
            TABS.replace("X \tSYS", "X \tXYZ"),
            3,
            "GPU1 to NIC0 is 'XYZ', which is no",
        ),
        (
            "a card over NVLink",
            TABS.replace("X \tSYS", "X \tNV4"),
            3,
            "GPU1 to NIC0 is 'NV4', which is no path",
        ),
        ("a column twice", "GPU0 a a\nGPU0 X SYS SYS\n", 1, "column 'a' is there twice"),
        (
            "a column of no name",
            "GPU0 (PCI)\nGPU0 X SYS\n",
            1,
            "'(PCI)' cannot be the name of a network card",
        ),
        ("no list of CPUs", THREE.replace("NV1 0", "NV1 0-x"), 3, "CPU Affinity is '0-x'"),
        ("a list backwards", THREE.replace("NV1 0", "NV1 7-3"), 3, "CPU Affinity is '7-3'"),
        ("too many CPUs", THREE.replace("NV1 0", "NV1 0-99999999999"), 3, "expected a list such as"),
        (
            "a short table row",
            "||GPU0|GPU1|\n|GPU0|X|NV1|\n|GPU1|NV1|\n",
            3,
            "row GPU1 has 1 cells for 2 columns",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_damaged_text_is_refused_at_its_line(case: str, text: str, line: int, problem: str) -> None:
    with pytest.raises(MatrixError) as caught:
        parse_matrix(text)
    assert line == caught.value.line
    assert problem in str(caught.value)


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    """Any machine of up to 8 GPUs and 4 network cards, unknown links and affinities included."""
    count = draw(st.integers(1, 8))
    paths = [Link(path) for path in Path if path is not Path.NVLINK]
    links = st.sampled_from(paths) | st.integers(1, 18).map(lambda n: Link(Path.NVLINK, n))
    rows = [[UNKNOWN_LINK] * count for _ in range(count)]
    for a in range(count):
        for b in range(a):
            rows[a][b] = rows[b][a] = draw(links)
    near = st.lists(
        st.sets(st.integers(0, 300)).map(lambda found: tuple(sorted(found))), min_size=count, max_size=count
    )
    names = draw(
        st.lists(st.from_regex(r"(NIC|mlx5_|roce_bond)[0-9]{1,2}", fullmatch=True), max_size=4, unique=True)
    )
    path = st.sampled_from([link.path for link in paths])
    nics = [Nic(name, tuple(draw(path) for _ in range(count))) for name in names]
    return Topology(tuple(map(tuple, rows)), numa=tuple(draw(near)), cpus=tuple(draw(near)), nics=tuple(nics))


@given(machines())
def test_what_is_written_is_read_back(machine: Topology) -> None:
    assert machine == parse_matrix(render_matrix(machine))


@given(machines(), st.data())
def test_a_text_cut_anywhere_before_the_last_cell_of_a_gpu_is_refused(
    machine: Topology, data: st.DataObject
) -> None:
    gpus = render_matrix(machine).splitlines()[: len(machine) + 1]
    text = "\n".join(gpus)
    whole = len(text) - len(gpus[-1].split("\t")[-1])  # where the last cell begins
    cut = data.draw(st.integers(0, whole - 1))
    with pytest.raises(MatrixError):
        parse_matrix(text[:cut])


def test_the_text_written_is_that_of_nvidia_smi() -> None:
    assert render_matrix(PAIR) == (
        "\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\n"
        "GPU0\t X \tNV4\tPIX\t0,5-7\t0-1\n"
        "GPU1\tNV4\t X \tSYS\t8-9\tN/A\n"
        "NIC0\tPIX\tSYS\t X \n"
    )


def test_what_lies_between_two_network_cards_is_not_kept() -> None:
    cards = (Nic("a", (Path.PIX,)), Nic("b", (Path.SYS,)))
    text = render_matrix(Topology(links=((UNKNOWN_LINK,),), nics=cards))
    assert text.endswith("\na\tPIX\t X \t?\nb\tSYS\t?\t X \n")
