"""What a deployment asks of the nodes, in the planner's own terms."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from placement.core.needs import NO_GPUS, WHOLE, Needs
from placement.core.policy import Policy
from placement.errors import Unplaceable


class Strategy(StrEnum):
    """How the bundles of one placement group are spread over nodes; each means what it means in Ray."""

    PACK = "PACK"
    """On as few nodes as possible."""
    STRICT_PACK = "STRICT_PACK"
    """On one node."""
    SPREAD = "SPREAD"
    """On as many nodes as possible."""
    STRICT_SPREAD = "STRICT_SPREAD"
    """Each on a node of its own."""


Resources = tuple[tuple[str, int], ...]
"""Ray's custom resource -> amount, sorted."""


class Bundle(NamedTuple):
    """What one bundle of a placement group takes: whole GPUs, CPUs (thousandths), memory, and label -> condition.

    ``share``: thousandths of one GPU, instead of whole ones.
    ``resources``: Ray's custom resources, in its smallest units; see :data:`~placement.core.node.UNIT`.
    """

    gpus: int
    cpu_milli: int = 0
    memory_bytes: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    resources: Resources = ()
    share: int = 0


def amounts_of(bundles: Iterable[Bundle]) -> tuple[int, ...]:
    """Thousandths of a GPU, of each bundle that has GPUs; empty if none has a share of one."""
    amounts = tuple(WHOLE * one.gpus + one.share for one in bundles if one.gpus or one.share)
    return amounts if any(amount < WHOLE for amount in amounts) else ()


class Place(NamedTuple):
    """Whole GPUs of one node."""

    node_id: str
    gpus: tuple[int, ...]


@dataclass(frozen=True)
class Lack:
    """Replicas of a waiting group that need new nodes (:mod:`placement.core.role_lacks`).

    Attributes:
        group: its name.
        first: the first of them: deployment and index.
        nodes: what must be on one node each: requests, and how many tensor-parallel groups of each.
        labels: label -> the value that the nodes must have.
        why: why no new node would do; empty if one may.
    """

    group: str
    first: tuple[str, int]
    nodes: tuple[tuple[tuple[Request, int], ...], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Told:
    """The plan for a deployment that was made with its group (:mod:`placement.core.roles`).

    Attributes:
        places: replica -> where each of its tensor-parallel groups goes, in rank order.
        refusal: why none of the group goes anywhere.
        lacks: what new nodes it would need then.
        bounded: the search for the places was cut off; there may be better ones.
    """

    places: Mapping[int, tuple[Place, ...]] = field(default_factory=dict)
    refusal: Unplaceable | None = None
    lacks: tuple[Lack, ...] = ()
    bounded: bool = False


@dataclass(frozen=True)
class Request:
    """What is to be placed. An empty limit is no limit.

    Attributes:
        replicas: indices of the replicas to place.
        needs: what each needs of a node's GPUs; none if ``provider`` is set, and for a CPU replica.
        stages: how many times a replica has ``needs``: one tensor-parallel group for each pipeline stage.
        parts: on how many nodes of one NVLink domain a tensor-parallel group is, with ``needs`` on each.
        divisible: a replica that no node can hold may be cut into stages.
        policy: which node goes first among those with room.
        provider, key: what a remote replica calls, and the fingerprint of its API key.
        egress: egress units per remote replica.
        gpu_nodes, egress_nodes, cpu_nodes: only these nodes, by id, name or address; ``None`` means any. Only the one
            for the request's kind counts: :attr:`only_nodes`.
        egress_preference: egress nodes to try first, best first.
        labels: label -> condition, in Ray's syntax (``"a"``, ``"!a"``, ``"in(a, b)"``, ``"!in(a, b)"``).
        accelerators: accelerator types, as Ray names them.
        compute_capability: the least that is accepted.
        cpu_milli, memory_bytes: CPUs (thousandths) and memory that it also takes with each ``needs``; all that a CPU
            replica takes.
        spared_milli: CPUs (thousandths) that a CPU replica leaves on its node for each GPU that is free there.
        apart_from, near_to: deployments that must not, or must, have a replica on the node.
        kept_away_by: deployments that ask to be apart from this one: they must not be on the node either.
        spread_label, max_per_domain: at most so many replicas on nodes with one value of that label.
        standing: node id -> how many replicas of the same deployment are there already, or have their first part there.
        bundles: what each bundle takes, if a replica is laid out bundle by bundle. ``needs``, ``cpu_milli``
            and ``memory_bytes`` are then the sums (:mod:`placement.core.bundles`).
        strategy: how the bundles are spread.
        domain_label: all bundles are on nodes with one value of this label; ``None`` for any nodes.
        resources: custom resources that it takes, all bundles together.
        told: where the replicas go, if their group's plan has decided it.
    """

    deployment: str
    replicas: tuple[int, ...]
    needs: Needs = NO_GPUS
    stages: int = 1
    parts: int = 1
    divisible: bool = False
    policy: Policy = Policy.TOPOLOGY
    provider: str | None = None
    key: str | None = None
    egress: int = 0
    gpu_nodes: tuple[str, ...] | None = None
    egress_nodes: tuple[str, ...] | None = None
    egress_preference: tuple[str, ...] = ()
    cpu_nodes: tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerators: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    cpu_milli: int = 0
    memory_bytes: int = 0
    spared_milli: int = 0
    apart_from: tuple[str, ...] = ()
    near_to: tuple[str, ...] = ()
    kept_away_by: tuple[str, ...] = ()
    spread_label: str | None = None
    max_per_domain: int = 0
    standing: Mapping[str, int] = field(default_factory=dict)
    bundles: tuple[Bundle, ...] = ()
    strategy: Strategy = Strategy.STRICT_PACK
    domain_label: str | None = None
    resources: Resources = ()
    told: Told | None = None

    @property
    def calls(self) -> tuple[str, str] | None:
        """What a remote replica calls, as (provider, key)."""
        return None if self.provider is None else (self.provider, self.key or "")

    @property
    def on_cpus(self) -> bool:
        """Whether it is for CPU replicas, which have no GPUs and call no provider."""
        return self.provider is None and not self.needs.any

    @property
    def only_nodes(self) -> tuple[str, tuple[str, ...] | None]:
        """The constraint that names nodes for replicas of this kind, and the nodes that it names."""
        if self.provider is not None:
            return "egress_nodes", self.egress_nodes
        return ("cpu_nodes", self.cpu_nodes) if self.on_cpus else ("gpu_nodes", self.gpu_nodes)

    @property
    def likeness(self) -> Hashable:
        """Equal for requests that, with the same number of replicas, all fit or all do not, for the same reasons.

        ``None`` if the result depends on where other replicas are, or if taking a GPU makes room for CPU replicas.
        """
        stand = any(self.standing.values())
        if self.spared_milli or self.told is not None or self.apart_from or self.near_to or self.kept_away_by:
            return None
        if stand and (self.max_per_domain or self.needs.named):
            return None
        limits = (
            self.only_nodes,
            tuple(sorted(self.labels.items())),
            self.spread_label,
            self.max_per_domain,
            stand,
        )
        if self.provider is not None:
            return self.provider, self.egress, limits
        sizes = self.needs, self.stages, self.parts, self.divisible, self.cpu_milli, self.memory_bytes
        laid_out = self.bundles, self.strategy, self.domain_label, self.resources
        return sizes, limits, self.accelerators, self.compute_capability, self.policy, laid_out
