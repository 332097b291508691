"""The names of a GPU that users may write: Ray's accelerator type, and the words of its product name."""

from __future__ import annotations

import re

_TYPE = re.compile(r"\w+\s+((?:[A-Z]+\s+)*[A-Z0-9]*\d[A-Z0-9]*)")
"""Ray's own pattern: after the brand, words in capitals up to the first one with a digit, that one up to its hyphen."""


def accelerator_type(product: str) -> str | None:
    """Ray's accelerator type for a GPU with NVML's product name; ``None`` without a name.

    Example:
        >>> [accelerator_type(name) for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090")]
        ['A100', 'GeForce-RTX-4090']
    """
    match = _TYPE.match(product)
    if match and len(match[1]) > 1:
        return match[1].replace(" ", "-")
    return re.sub(r"^NVIDIA\s+", "", product).strip().replace(" ", "-") or None


def accelerators_of(product: str | None) -> frozenset[str]:
    """All names that ``constraints.accelerators`` may use for a product; none if it is unknown."""
    if not product:
        return frozenset()
    return frozenset(name for name in (accelerator_type(product), *product.split()) if name)
