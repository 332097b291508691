"""The public API as a type checker, and so an editor, sees it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_type_checker_knows_what_the_clients_take_and_return_and_refuses_the_wrong() -> None:
    """What must be refused is marked as ignored there, and a mark for nothing is an error itself."""
    command = [sys.executable, "-m", "mypy", "tests/typing/clients.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("Success: no issues found in 1 source file\n", "")
