"""What a deployment asks of the nodes, in the planner's own terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from placement.core.score import Needs, Within


@dataclass(frozen=True)
class Request:
    """What is to be placed.

    Attributes:
        replicas: indices of the replicas to place.
        gpus: GPUs per replica; 0 for a remote deployment.
        within: how far apart the GPUs of one replica may be.
        min_bandwidth_gb_per_s: the least predicted bandwidth between the GPUs of one replica that will do
            (see :class:`~placement.core.score.Score`).
        provider, key: what a remote replica calls, and the fingerprint of its API key.
        egress: egress units per remote replica.
        gpu_nodes, egress_nodes: limits the choice to these nodes; ``None`` means any.
        egress_preference: egress nodes to try first, best first.
        standing: node id -> replicas of the same deployment that already sit there.
    """

    deployment: str
    replicas: tuple[int, ...]
    gpus: int = 0
    within: Within = Within.NODE
    min_bandwidth_gb_per_s: float = 0.0
    provider: str | None = None
    key: str | None = None
    egress: int = 0
    gpu_nodes: tuple[str, ...] | None = None
    egress_nodes: tuple[str, ...] | None = None
    egress_preference: tuple[str, ...] = ()
    standing: Mapping[str, int] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """What each replica needs of a GPU node."""
        return Needs(self.gpus, self.within, self.min_bandwidth_gb_per_s)
