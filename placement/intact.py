"""Whether ``placement`` is the package of ``ray-placement``, whole and alone.

Two other distributions have that import name: OpenStack's ``openstack-placement``, and ``placement``, an empty one
on PyPI that a mistaken ``pip install placement`` brings. In one folder each overwrites files of the other, and
uninstalling one removes files that the other needs. In two folders the order of ``sys.path`` decides, which need
not be the same in a driver and in Ray's workers.
"""

from __future__ import annotations

import os
import sys

_OPENSTACK = os.path.join("placement", "microversion.py")
"""A module of openstack-placement, in its 1.0.0 of 2019 as in 16.0.0, and none of ours."""

_FIX = (
    "`python -m pip uninstall -y openstack-placement placement ray-placement`, then install ray-placement again; "
    "where the other is needed, give each a virtual environment of its own"
)


def require_intact() -> None:
    """Checks it by a look at each folder of ``sys.path``: microseconds, with nothing imported.

    The packages whose ``__init__`` calls it are those that a command, a driver or a Ray worker imports first. Where
    the other's ``placement`` comes first on the path, nothing of ours runs that could tell.

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
            f"`placement` in {package.__path__[0]} is not whole: another distribution of that import name has "
            f"overwritten or removed placement/__init__.py of ray-placement: {_FIX}"
        )
