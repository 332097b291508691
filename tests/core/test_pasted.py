"""A matrix as it arrives, whatever stands before each line; or something else, called what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from placement.core.matrix import parse_matrix, read_matrix
from placement.core.topology import Link, Topology
from placement.core.topology import Path as Level
from placement.errors import MatrixError

FIELD = Path(__file__).parents[1] / "field"

PLAIN = (
    "\tGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV12\tPIX\tSYS\t0-31\t0\t\tN/A\n"
    "GPU1\tNV12\t X \tSYS\tPIX\t32-63\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \tSYS\t\t\t\t\n"
    "NIC1\tSYS\tPIX\tSYS\t X \t\t\t\t\n"
    "\n"
    "Legend:\n"
    "\n"
    "  X    = Self\n"
    "  NV#  = Connection traversing a bonded set of # NVLinks\n"
    "\n"
    "NIC Legend:\n"
    "\n"
    "  NIC0: mlx5_0\n"
)
MACHINE = parse_matrix(PLAIN)
CPUS = (tuple(range(32)), tuple(range(32, 64)))


def prefixed(prefix: str | Callable[[int], str], text: str = PLAIN) -> str:
    lines = text.split("\n")
    return "\n".join(
        (prefix if isinstance(prefix, str) else prefix(i)) + line for i, line in enumerate(lines)
    )


def mixed(one: str, other: str) -> str:
    """What two machines print at the same time."""
    return "".join(f"{one}{line}\n{other}{line}\n" for line in PLAIN.splitlines())


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("srun -l", prefixed("0: ")),
        ("srun -l of many tasks", prefixed("10: ")),
        ("srun -l, padded", prefixed(" 3: ")),
        ("mpirun --tag-output", prefixed("[1,0]<stdout>:")),
        ("kubectl logs --prefix", prefixed("[pod/worker-0/main] ")),
        ("kubectl logs --timestamps", prefixed(lambda i: f"2026-05-14T08:12:33.{i * 7919}Z ")),
        ("docker compose", prefixed("worker-1  | ")),
        ("docker compose --timestamps", prefixed(lambda i: f"worker-1  | 2026-05-14T08:12:{i:02}Z ")),
        ("journalctl", prefixed(lambda i: f"Nov 26 01:02:{i:02} node1 run.sh[123]: ")),
        ("ts", prefixed(lambda i: f"Nov 26 01:02:{i:02} ")),
        ("a log", prefixed(lambda i: f"2026-05-14 00:00:{i:02},{i * 31:03} INFO ")),
        ("a task of Ray's", prefixed("(probe pid=123, ip=10.0.0.3) ")),
        ("pdsh", prefixed("gpu-node01: ")),
        ("cat -n", prefixed(lambda i: f"{i + 1:6}\t")),
        ("grep -n", prefixed(lambda i: f"{i + 1}:")),
        ("a patch", prefixed("+")),
        ("quoted twice", prefixed("> > ")),
        ("quoted thrice", prefixed(">>> ")),
        ("quoted with a bar", prefixed("| ")),
        ("a Markdown fence", f"```text\n{PLAIN}```\n"),
        ("a Markdown fence on the same line", f"```{PLAIN}```"),
        ("indented code", prefixed("    ")),
        ("HTML", f"<pre>{PLAIN}</pre>"),
        ("HTML with entities", "<pre><code>" + PLAIN.replace("\t", "&#9;") + "</code></pre>"),
        ("HTML with hard blanks", PLAIN.expandtabs(8).replace(" ", "&nbsp;")),
        ("hard blanks", PLAIN.expandtabs(8).replace(" ", "\xa0")),
        ("colours", PLAIN.replace("\tGPU0", "\x1b[1;4m\tGPU0", 1).replace(" ID\n", " ID\x1b[0m\n")),
        ("colours without ESC", PLAIN.replace("\tGPU0", "[4m\tGPU0", 1).replace(" ID\n", " ID[0m\n")),
        ("cat -v", PLAIN.replace("\tGPU0", "^[[4m\tGPU0", 1).replace(" ID\n", " ID^[[0m\n")),
        ("Windows line ends", PLAIN.replace("\n", "\r\n")),
        ("line ends made twice", PLAIN.replace("\n", "\r\r\n")),
        ("old Mac line ends", PLAIN.replace("\n", "\r")),
        ("a byte order mark", "\ufeff" + PLAIN),
        ("blanks for tabs", PLAIN.expandtabs(8)),
        ("one blank for each gap", re.sub(r"[ \t]+", " ", PLAIN)),
        ("blanks at the ends", PLAIN.replace("\n", "   \n")),
        ("no last line end", PLAIN[: PLAIN.index("\nNIC0\tPIX")]),
        ("a dash for a hyphen", PLAIN.replace("0-31", "0\u201331")),
        ("the column is called NUMA", PLAIN.replace("NUMA Affinity", "NUMA")),
        ("the column is called CPU", PLAIN.replace("CPU Affinity", "CPU")),
        ("lower case", PLAIN.replace("CPU Affinity", "Cpu affinity")),
        ("two cards' names ran together", PLAIN.replace("NIC0\tNIC1", "NIC0NIC1")),
        ("a card's name and the affinity's", PLAIN.replace("NIC1\tCPU", "NIC1CPU")),
        ("two affinities' names", PLAIN.replace("CPU Affinity\tNUMA", "CPU AffinityNUMA")),
        ("the GPUs' names", PLAIN.replace("GPU0\tGPU1\tNIC0\tNIC1\t", "GPU0GPU1NIC0NIC1")),
        ("the GPUs out of order", "\n".join(PLAIN.split("\n")[i] for i in (0, 2, 1))),
        ("after the table of nvidia-smi", "| NVIDIA-SMI 550.54   Driver Version: 550.54 |\n" + PLAIN),
        (
            "a frame of lines",
            "│ │ GPU0 │ GPU1 │ NIC0 │ NIC1 │ CPU Affinity │ NUMA Affinity │\n"
            "├─┼──────┼──────┼──────┼──────┼──────────────┼───────────────┤\n"
            "│ GPU0 │ X │ NV12 │ PIX │ SYS │ 0-31 │ 0 │\n│ GPU1 │ NV12 │ X │ SYS │ PIX │ 32-63 │ 1 │\n",
        ),
        (
            "a table without bars at the ends",
            " | GPU0 | GPU1 | NIC0 | NIC1 | CPU Affinity | NUMA Affinity\n---|---|---|---|---|---|---\n"
            "GPU0 | X | NV12 | PIX | SYS | 0-31 | 0\nGPU1 | NV12 | X | SYS | PIX | 32-63 | 1\n",
        ),
        (
            "a quoted table",
            "> | | GPU0 | GPU1 | NIC0 | NIC1 | CPU Affinity | NUMA Affinity |\n> |---|---|\n"
            "> | GPU0 | X | NV12 | PIX | SYS | 0-31 | 0 |\n> | GPU1 | NV12 | X | SYS | PIX | 32-63 | 1 |\n",
        ),
    ],
    ids=lambda value: value if "\n" not in value and "\r" not in value else "",
)
def test_one_machine_however_it_arrives(case: str, text: str) -> None:
    reading = read_matrix(text)
    assert (MACHINE, ()) == (reading.topology, reading.notes)


NO_CORE = PLAIN.replace("\t32-63\t", "\t\t")
NO_NODE = PLAIN.replace("\t1\t\t", "\t\t\t")


@pytest.mark.parametrize(
    ("case", "text", "cpus", "numa"),
    [
        ("tabs", NO_CORE, (CPUS[0], ()), ((0,), (1,))),
        ("blanks for tabs", NO_CORE.expandtabs(8), (CPUS[0], ()), ((0,), (1,))),
        ("then quoted", prefixed("> ", NO_CORE.expandtabs(8)), (CPUS[0], ()), ((0,), (1,))),
        ("then indented", prefixed("    ", NO_CORE.expandtabs(8)), (CPUS[0], ()), ((0,), (1,))),
        ("a prefix, then blanks for tabs", prefixed("0: ", NO_CORE).expandtabs(8), (CPUS[0], ()), ((0,), (1,))),
        ("no NUMA node", NO_NODE, CPUS, ((0,), ())),
        ("no NUMA node, blanks for tabs", NO_NODE.expandtabs(8), CPUS, ((0,), ())),
        ("neither", NO_NODE.replace("\t32-63\t", "\t\t"), (CPUS[0], ()), ((0,), ())),
        ("no core, and no node told", NO_CORE.replace("\t1\t\t", "\t\tN/A\t\t"), (CPUS[0], ()), ((0,), ())),
        (
            "each below its name",
            "      GPU0  GPU1  CPU Affinity  NUMA\n"
            "GPU0    X   NV12  0-31          0\n"
            "GPU1  NV12    X                 1\n",
            (CPUS[0], ()),
            ((0,), (1,)),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)  # fmt: skip
def test_an_empty_affinity_is_unknown_where_tabs_or_place_tell_it(
    case: str, text: str, cpus: tuple[tuple[int, ...], ...], numa: tuple[tuple[int, ...], ...]
) -> None:
    shape = parse_matrix(text)
    assert (cpus, numa, MACHINE.links) == (shape.cpus, shape.numa, shape.links)


def test_cards_that_cannot_be_told_apart_are_left_out_and_that_is_said() -> None:
    reading = read_matrix(PLAIN.replace("NIC0\tNIC1", "ibp0ibp1"))
    assert Topology(MACHINE.links, MACHINE.numa, MACHINE.cpus) == reading.topology
    [note] = reading.notes
    assert note == (
        "the network cards are ignored, since their names are not separated: 1 of them for 2 columns"
    )


@pytest.mark.parametrize(
    ("name", "gpus", "cards", "link", "numa", "cores"),
    [
        ("nocpu", 2, 0, "NV12", "0 1", "32 0"),
        ("vllm31594", 8, 13, "NV18", "0 0 0 0 0 0 0 0", "16 16 16 16 16 16 16 16"),
        ("k8srecipes", 8, 0, "NV18", "0 0 0 0 1 1 1 1", "52 52 52 52 52 52 52 52"),
        ("srun_l", 2, 0, "PHB", "0 0", "64 64"),
        ("k8stime", 2, 0, "PHB", "0 0", "64 64"),
        ("quote", 2, 0, "PHB", "0 0", "64 64"),
        ("ansi_lost", 2, 0, "PHB", "0 0", "64 64"),
        ("p2p_before_m", 2, 0, "PHB", "0 0", "64 64"),
    ],
)
def test_files_from_the_field_are_read(
    name: str, gpus: int, cards: int, link: str, numa: str, cores: str
) -> None:
    shape = parse_matrix((FIELD / f"{name}.txt").read_text())
    assert (gpus, cards, link) == (len(shape), len(shape.nics), str(shape.link(0, 1)))
    assert numa == " ".join(str(nodes[0]) for nodes in shape.numa)
    assert cores == " ".join(str(len(cpus)) for cpus in shape.cpus)


def test_cards_whose_names_ran_together_keep_their_own_paths() -> None:
    cards = {card.name: card.paths for card in parse_matrix((FIELD / "vllm31594.txt").read_text()).nics}
    assert [Level.PIX, *[Level.NODE] * 3, *[Level.SYS] * 4] == list(cards["NIC11"])
    assert [*[Level.NODE] * 4, *[Level.SYS] * 4] == list(cards["NIC12"])


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("wrapped", 2, "the lines are wrapped"),
        ("two_nodes_legend", 10, "a second matrix begins here, the first in line 1"),
        ("p2p_gns", 1, "`nvidia-smi topo -p2p` printed this"),
        ("rocm", 1, "this is what rocm-smi prints; AMD's matrices are not read"),
        ("nvsentinel1485", 1, "no matrix, but an error: Failed to run topology matrix;"),
    ],
)
def test_files_from_the_field_are_refused_with_the_cause(name: str, line: int, says: str) -> None:
    with pytest.raises(MatrixError) as caught:
        parse_matrix((FIELD / f"{name}.txt").read_text())
    assert line == caught.value.line
    assert says in str(caught.value)


def wrapped_at(width: int) -> str:
    """The text in a terminal that is so narrow."""
    lines = PLAIN.expandtabs(8).split("\n")
    return "\n".join("\n".join(re.findall(rf".{{1,{width}}}", line)) for line in lines)


def peers(one: str, other: str = "") -> str:
    return f" \tGPU0\tGPU1\t\n GPU0\tX\t{one}\t\n GPU1\t{other or one}\tX\t\n\nLegend:\n\n  X    = Self\n"


@pytest.mark.parametrize(
    ("case", "text", "line", "says"),
    [
        *((f"{width} wide", wrapped_at(width), 2, "the lines are wrapped") for width in (24, 40, 53, 60)),
        (
            "wrapped between two GPUs",
            "GPU0 GPU1\nGPU2 CPU Affinity\nGPU0 X NV1\nNV1 0\nGPU1 NV1 X\nNV1 0\nGPU2 NV1 NV1\nX 0\n",
            2,
            "the lines are wrapped",
        ),
        ("twice", PLAIN + PLAIN, 15, "a second matrix begins here, the first in line 1"),
        ("of two tasks", prefixed("0: ") + "\n" + prefixed("1: "), 16, "a second matrix begins here"),
        ("of two hosts, mixed", mixed("alpha: ", "beta: "), 2, "a second matrix begins here, the first in line 1"),
        ("of two services, mixed", mixed("a-1  | ", "bc-1 | "), 2, "a second matrix begins here"),
        ("of two tasks, mixed", "0: GPU0\n1: GPU0\n0: GPU0 X\n1: GPU0 X\n", 4, "row GPU0 is there already, in line 3"),
        *((f"peers {code}", peers(code), 1, "topo -p2p") for code in ("OK", "CNS", "GNS", "TNS", "NS", "U")),
        ("peers that differ", peers("OK", "CNS"), 1, "topo -p2p"),
        (
            "no driver",
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Install it.\n",
            1,
            "an error: NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Install it;",
        ),
        ("no GPU", "\nNo devices were found\n", 2, "an error: No devices were found"),
        (
            "another version",
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.183\n",
            1,
            "an error: Failed to initialize NVML: Driver/library version mismatch",
        ),
        ("no command", "bash: nvidia-smi: command not found\n", 1, "bash: nvidia-smi: command not found"),
        ("a table", "+--+\n| NVIDIA-SMI 550.54   Driver Version: 550.54 |\n", 2, "what `nvidia-smi` prints"),
        ("a list", "GPU 0: NVIDIA L4 (UUID: GPU-1)\n", 1, "what `nvidia-smi -L` prints"),
        ("Intel's", "         GPU 0/0|GPU 1/0|CPU Affinity\nGPU 0/0  S  XL8\n", 1, "what xpu-smi prints"),
        ("Huawei's", "        NPU0 NPU1\nNPU0 X HCCS\nNPU1 HCCS X\n", 1, "what npu-smi prints"),
        ("CPUs", "Architecture:  x86_64\nCPU(s): 4\n", 1, "what lscpu prints"),
        (
            "a lost GPU",
            "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error\n",
            1,
            "an error: Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error",
        ),
        ("no host", "ssh: connect to host node01 port 22: Connection refused\n", 1, "an error: ssh: connect to"),
        ("a string", json.dumps({"stdout": PLAIN}), 1, r"with \n for a new line"),
        ("Python's string", repr(PLAIN), 1, r"with \n for a new line"),
        ("commas", ",GPU0,GPU1\nGPU0,X,NV12\nGPU1,NV12,X\n", 1, "what a spreadsheet writes"),
        ("commas, quoted", '"","GPU0","GPU1"\n"GPU0","X","NV12"\n', 1, "what a spreadsheet writes"),
        ("semicolons", ";GPU0;GPU1\nGPU0;X;NV12\nGPU1;NV12;X\n", 1, "what a spreadsheet writes"),
        ("HTML", "<table><tr><td></td><td>GPU0</td></tr></table>\n", 1, "what a page of HTML holds"),
        ("GPUs that run together", "GPU0-GPU1\nGPU0 X\n", 1, "the GPU columns are GPU0-GPU1, not GPU0"),
        ("the last row is missing", PLAIN[: PLAIN.index("GPU1\tNV12")], 2, "the rows of GPU1 are missing"),
        ("no header, a prefix", "0: GPU0\t X \tPHB\n", 1, "no header line that names GPU0"),
        ("NVLinks without end", PLAIN.replace("NV12", "NV" + "9" * 5000), 2, "999...', which is no link"),
        ("a CPU without end", PLAIN.replace("0-31", "9" * 5000), 2, "CPU Affinity is '9999"),
        ("a GPU without end", "GPU0 GPU" + "9" * 5000 + "\nGPU0 X X\n", 1, "the GPU columns are GPU0, GPU9"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)  # fmt: skip
def test_what_is_no_matrix_is_called_what_it_is(case: str, text: str, line: int, says: str) -> None:
    with pytest.raises(MatrixError) as caught:
        parse_matrix(text)
    assert says in str(caught.value)
    assert line == caught.value.line
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


@pytest.mark.parametrize("code", ["OK", "CNS", "GNS", "TNS", "NS", "U"])
def test_a_matrix_of_peers_beside_the_right_one_is_passed_over(code: str) -> None:
    assert MACHINE == parse_matrix(peers(code) + "\n" + PLAIN) == parse_matrix(PLAIN + "\n" + peers(code))


def test_prose_around_the_matrix_is_passed_over() -> None:
    text = f"On our box GPU0 and GPU1 are slow.\n\n{PLAIN}\nGPU0 is the one that I mean; see also GPU1.\n"
    assert Link(Level.NVLINK, 12) == parse_matrix(text).link(0, 1)


@pytest.mark.parametrize("number", ["{:6d}\t", "{:4d} ", "{}: "])
def test_numbers_of_lines_are_no_wrapped_cells(number: str) -> None:
    assert MACHINE == parse_matrix(prefixed(lambda i: number.format(i + 1)))


def test_names_in_bold_are_read() -> None:
    table = "| | **GPU0** | **GPU1** |\n|---|---|---|\n| **GPU0** | X | NV12 |\n| **GPU1** | NV12 | X |\n"
    assert Link(Level.NVLINK, 12) == parse_matrix(table).link(0, 1)
