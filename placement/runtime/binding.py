"""Binds a worker to the CPUs and the memory near its GPU. Needs no Ray: a process that a worker starts may call it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Set
from contextlib import suppress
from typing import NamedTuple

CPUS, NUMA_NODE = "PLACEMENT_CPUS", "PLACEMENT_NUMA_NODE"
"""Variables of a worker's environment: ``0-3,64-67``, as Linux writes CPUs, and the number of a NUMA node."""


class Binding(NamedTuple):
    """What a process is bound to; empty or ``None`` where nothing was changed.

    Attributes:
        cpus: the CPUs that its threads run on.
        numa_node: the NUMA node from which its memory comes as long as that has some free.
    """

    cpus: frozenset[int] = frozenset()
    numa_node: int | None = None


def bind() -> Binding:
    """Binds this process to what is near its GPU, by the variables from ``environment(...)`` of its assignment.

    The CPUs are those of ``PLACEMENT_CPUS`` that the process may use now, for all its threads, also later ones; if
    there are none, it keeps its CPUs. Memory of ``PLACEMENT_NUMA_NODE`` is preferred, by ``libnuma.so.1``
    (Debian's libnuma1), for this thread and those that it starts; without that library, or if the process may not
    use that node, memory stays as it is. Call it first in a worker, before a model is loaded.

    It does nothing if neither variable is set.

    Raises:
        ValueError: a variable has an invalid value.

    Example:
        ::

            @ray.remote
            class Engine:
                def __init__(self):
                    placement.bind()
    """
    wanted = _cpus(os.environ.get(CPUS, ""))
    cpus = frozenset(wanted & os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task") if cpus else ():
        with suppress(ProcessLookupError):  # the thread has ended meanwhile
            os.sched_setaffinity(int(thread), cpus)
    node = os.environ.get(NUMA_NODE, "")
    if node and not node.isdecimal():
        raise ValueError(f"{NUMA_NODE} is {node!r}; it has to be the number of a NUMA node, or unset")
    return Binding(cpus, int(node) if node and _prefer_memory_of(int(node)) else None)


def _cpus(text: str) -> Set[int]:
    try:
        runs = [[int(end) for end in run.split("-", 1)] for run in text.split(",") if text]
    except ValueError:
        raise ValueError(f"{CPUS} is {text!r}; it has to be a list such as 0-3,64-67, or unset") from None
    return {cpu for run in runs for cpu in range(run[0], run[-1] + 1)}


def _prefer_memory_of(node: int) -> bool:
    """Makes this thread's memory come from a NUMA node; returns ``False`` if that is not possible."""
    try:
        numa = ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    if numa.numa_available() < 0:
        return False
    numa.numa_get_mems_allowed.restype = ctypes.c_void_p
    allowed = ctypes.c_void_p(numa.numa_get_mems_allowed())
    may = bool(numa.numa_bitmask_isbitset(allowed, node))
    numa.numa_bitmask_free(allowed)
    if may:
        numa.numa_set_preferred(node)
    return may
