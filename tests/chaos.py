"""Kills the service, its node actors, nodes and the head, again and again, and tells what came of it: ``make chaos``.

The tests do the killing. Each calls :func:`recovered` once it has seen that nothing was lost; the table at the end
is made of that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLE = "PLACEMENT_RECOVERIES"
TESTS = ("test_faults.py", "test_quiet.py", "test_node_death.py", "test_head_restart.py", "test_churn.py")


def recovered(fault: str, seconds: float) -> None:
    """Notes that all was well so long after a fault."""
    if file := os.environ.get(VARIABLE):
        with Path(file).open("a", encoding="utf-8") as notes:
            notes.write(json.dumps([fault, seconds]) + "\n")


def table(notes: str) -> str:
    """One row for each fault, in the order in which they came first."""
    found: dict[str, list[float]] = {}
    for line in notes.splitlines():
        fault, seconds = json.loads(line)
        found.setdefault(fault, []).append(seconds)
    rows = ["| fault | injected | recovery, median | slowest |", "| --- | --- | --- | --- |"]
    rows += [
        f"| {fault} | {len(times)} | {statistics.median(times):.2f} s | {max(times):.2f} s |"
        for fault, times in found.items()
    ]
    return "\n".join(rows)


def main() -> int:
    """Runs the tests as often as asked, then prints the table; the exit code of the first round that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    tests = [str(Path(__file__).parent / "integration" / name) for name in TESTS]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "notes")
        notes.touch()
        for number in range(1, options.rounds + 1):
            print(f"round {number} of {options.rounds}", flush=True)
            command = [sys.executable, "-m", "pytest", "-q", *tests]
            failed = subprocess.run(command, env={**os.environ, VARIABLE: str(notes)}, check=False).returncode
            if failed:
                break
        print("\n" + table(notes.read_text(encoding="utf-8")))
    return failed


if __name__ == "__main__":
    sys.exit(main())
