"""One node's GPU facts, read from NVML. The only package that imports its binding; it needs no Ray.

An NVML call may block for ever inside the driver, where no signal reaches it. So :class:`Reader` lets a child
process read (``python -m placement.nvml``, which prints one JSON document) and gives it a deadline.
"""

from placement.nvml.reader import Reader
from placement.nvml.reading import read

__all__ = ["Reader", "read"]
