"""The kinds of requests on a cluster: room should be left for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from placement.core.needs import Needs
from placement.core.request import Request


class Kind(NamedTuple):
    """What interchangeable requests have in common.

    CPUs and memory are not part of it: their mean over a kind predicts as well as each value, and some twenty
    kinds are compared instead of hundreds.
    """

    needs: Needs
    accelerators: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    labels: tuple[tuple[str, str], ...] = ()
    gpu_nodes: tuple[str, ...] | None = None

    @classmethod
    def of(cls, request: Request) -> Kind:
        """The kind of a request for GPUs."""
        labels = tuple(sorted(request.labels.items()))
        return cls(request.needs, request.accelerators, request.compute_capability, labels, request.gpu_nodes)


class Asked(NamedTuple):
    """How much of one kind is asked for.

    Attributes:
        sets: how many sets of GPUs; most replicas are one.
        cpu_milli, memory_bytes: the CPUs and memory that they take, in total.
    """

    sets: int
    cpu_milli: int
    memory_bytes: int


class Mix:
    """Kinds of requests, and how much of each is asked for. Immutable."""

    def __init__(self, kinds: Mapping[Kind, Asked] | None = None) -> None:
        self.kinds: Mapping[Kind, Asked] = kinds or {}

    def plus(self, request: Request) -> Mix:
        """The mix with one more request."""
        needs = request.needs
        if request.provider is not None or not needs.any:
            return self
        # It needs exactly these GPUs: room on others is of no use to it. And no two mixtures of shares are alike.
        if needs.named or needs.amounts:
            return self
        kind = Kind.of(request)
        sets, cpu, memory = self.kinds.get(kind, (0, 0, 0))
        more = len(request.replicas) * request.stages * request.parts
        asked = Asked(sets + more, cpu + more * request.cpu_milli, memory + more * request.memory_bytes)
        return Mix({**self.kinds, kind: asked})
