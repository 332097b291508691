"""Points at which a test can kill this process. Without the variable PLACEMENT_FAULTS they do nothing."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDER = os.environ.get("PLACEMENT_FAULTS")


def point(name: str) -> None:
    """Ends the process if the folder ``PLACEMENT_FAULTS`` has a file of this name; it deletes the file."""
    if _FOLDER is not None:
        try:
            Path(_FOLDER, name).unlink()
        except FileNotFoundError:
            return
        os._exit(137)
