"""Ray's node labels, and its label selectors: ``{"ray.io/accelerator-type": "in(H100, A100)"}``.

The syntax is Ray's own (``label_selector`` of ``ray.remote``): a value, ``!value``, ``in(a, b)`` or
``!in(a, b)``. A node without the label meets only the negative forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

GPU_DOMAIN_LABEL = "ray.io/gpu-domain"
"""Nodes with one value of this label share an NVLink fabric (an NVL72 rack). Ray's own name for it."""

_LIST = re.compile(r"in\((?P<values>[^()]*)\)")
_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def parse_condition(text: str) -> tuple[bool, frozenset[str]]:
    """A condition as (whether the label must have one of the values, the values).

    Raises:
        ValueError: it is not in Ray's syntax; the message shows the syntax.
    """
    wanted = not text.startswith("!")
    rest = text.removeprefix("!")
    match = _LIST.fullmatch(rest)
    values = [value.strip() for value in match["values"].split(",")] if match else [rest]
    if not all(_VALUE.fullmatch(value) for value in values):
        raise ValueError(f"{text!r} is not a label condition; write a, !a, in(a, b) or !in(a, b)")
    return wanted, frozenset(values)


def meets(labels: Mapping[str, str], key: str, condition: str) -> bool:
    """Whether a node's labels meet one condition."""
    wanted, values = parse_condition(condition)
    return (labels.get(key) in values) == wanted
