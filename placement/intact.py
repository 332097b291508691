"""Checks that ``placement`` is the complete package of ``ray-placement``, and the only one of that name.

Two other distributions have that import name: OpenStack's ``openstack-placement``, and ``placement``, an empty one
on PyPI that a mistaken ``pip install placement`` brings. In one folder each overwrites files of the other, and
uninstalling one removes files that the other needs. In two folders the order of ``sys.path`` decides, which need
not be the same in a driver and in Ray's workers.
"""

from __future__ import annotations

import os
import sys

_OPENSTACK = os.path.join("placement", "microversion.py")
"""A module that openstack-placement has (1.0.0 of 2019 and 16.0.0) and ray-placement does not."""

_FIX = (
    "`python -m pip uninstall -y openstack-placement placement ray-placement`, then install ray-placement again; "
    "where the other is needed, give each a virtual environment of its own"
)


def require_intact() -> None:
    """Checks each folder of ``sys.path``: it takes microseconds and imports nothing.

    The packages whose ``__init__`` calls it are those that a command, a driver or a Ray worker imports first. If
    the other ``placement`` comes first on the path, no code of ray-placement runs, so this cannot be detected.

    Raises:
        ImportError: another distribution is there, or has overwritten or removed ``placement/__init__.py``.
    """
    for folder in map(str, sys.path):
        if os.path.exists(os.path.join(folder, _OPENSTACK)):
            raise ImportError(
                f"ray-placement and openstack-placement (in {folder or os.getcwd()}) are both imported as "
                f"`placement`, and one hides or overwrites the other: {_FIX}"
            )
    package = sys.modules["placement"]
    if not hasattr(package, "__version__"):
        raise ImportError(
            f"`placement` in {package.__path__[0]} is not complete: another distribution of that import name has "
            f"overwritten or removed placement/__init__.py of ray-placement: {_FIX}"
        )
