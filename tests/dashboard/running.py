"""The dashboard's command, running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def dashboard(address: str, env: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Runs the command, until it is interrupted; the address that it prints."""
    command = [
        str(Path(sys.executable).with_name("placement")),
        "dashboard",
        "--port",
        "0",
        "--json",
        "--address",
        address,
    ]
    with tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert running.stdout is not None
        try:
            said = "".join(running.stdout.readline() for _ in range(3))
            errors.seek(0)
            assert '"url"' in said, errors.read()
            yield json.loads(said)["url"]
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(120)
        errors.seek(0)
        assert (running.returncode, "Traceback" in errors.read()) == (130, False)
