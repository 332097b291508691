"""Which nodes a deployment's replicas go to: ``plan(snapshot, request) -> Plan | Unplaceable``.

Rules, in order:

1. A replica's GPUs lie on one node; a remote replica's capacity lies on one egress node.
2. All replicas are placed, or none.
3. A GPU replica goes where the best set on offer is fastest; among equals, to the node with the fewest
   replicas of the same deployment, then to the one with the fewest free GPUs (large sets stay whole).
4. A remote replica goes to the node with the fewest replicas of the same deployment; among equals, to
   nodes named in ``egress_preference``, then to nodes that already serve the same (provider, API key) so
   that they can share a rate limiter, then to the one with the most capacity left.
5. The last key is the node's name and id: the same input gives the same plan, to the letter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from placement.core.score import best_set, score
from placement.core.snapshot import Node, Snapshot
from placement.core.topology import ordinals
from placement.errors import NoEgressNodes, NoGpuNodes, NotEnoughEgress, NotEnoughGpus, Unplaceable


@dataclass(frozen=True)
class Request:
    """What is to be placed.

    Attributes:
        replicas: indices of the replicas to place.
        gpus: GPUs per replica; 0 for a remote deployment.
        provider, key: what a remote replica calls, and the fingerprint of its API key.
        egress: egress units per remote replica.
        gpu_nodes, egress_nodes: limits the choice to these nodes; ``None`` means any.
        egress_preference: egress nodes to try first, best first.
        standing: node id -> replicas of the same deployment that already sit there.
    """

    deployment: str
    replicas: tuple[int, ...]
    gpus: int = 0
    provider: str | None = None
    key: str | None = None
    egress: int = 0
    gpu_nodes: tuple[str, ...] | None = None
    egress_nodes: tuple[str, ...] | None = None
    egress_preference: tuple[str, ...] = ()
    standing: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedReplica:
    """One replica's node, the GPU set on offer there, or the egress resource it takes."""

    replica_index: int
    node_id: str
    gpus: tuple[int, ...] = ()
    egress_resource: str | None = None


@dataclass(frozen=True)
class Plan:
    """A decision. Nothing is reserved by it."""

    deployment: str
    replicas: tuple[PlannedReplica, ...]


def plan(snapshot: Snapshot, request: Request) -> Plan | Unplaceable:
    """Chooses a node for each replica of ``request``.

    Returns:
        The plan, or why there is none. Nothing is raised: both are answers.
    """
    place_one = _place_remote if request.provider is not None else _place_local
    standing = Counter(request.standing)
    planned: list[PlannedReplica] = []
    for index in request.replicas:
        outcome = place_one(snapshot, request, standing, index)
        if isinstance(outcome, Unplaceable):
            return outcome
        planned.append(outcome)
        standing[outcome.node_id] += 1
        snapshot = occupy(snapshot, request, outcome)
    return Plan(request.deployment, tuple(planned))


def occupy(snapshot: Snapshot, request: Request, replica: PlannedReplica) -> Snapshot:
    """The snapshot as it is once ``replica`` of ``request`` has been placed."""
    node = snapshot.node(replica.node_id)
    if replica.egress_resource is None:
        return snapshot.with_node(replace(node, free=node.free - set(replica.gpus)))
    egress = dict(node.egress)
    egress[replica.egress_resource] -= request.egress
    serving = node.serving | {(request.provider or "", request.key or "")}
    return snapshot.with_node(replace(node, egress=egress, serving=serving))


def _sift(
    nodes: Iterable[Node], objection: Callable[[Node], str | None]
) -> tuple[list[Node], dict[str, int]]:
    """The nodes without an objection, and how many each objection excluded."""
    passed: list[Node] = []
    excluded: Counter[str] = Counter()
    for node in nodes:
        reason = objection(node)
        if reason is None:
            passed.append(node)
        else:
            excluded[reason] += 1
    return passed, dict(excluded)


def _outside(field_name: str, allowed: tuple[str, ...] | None) -> Callable[[Node], str | None]:
    def objection(node: Node) -> str | None:
        if allowed is None or any(node.named(name) for name in allowed):
            return None
        return f"not in constraints.{field_name}"

    return objection


def _place_local(
    snapshot: Snapshot, request: Request, standing: Counter[str], index: int
) -> PlannedReplica | Unplaceable:
    count = request.gpus
    gpu_nodes = tuple(node for node in snapshot.nodes if len(node.topology))
    outside = _outside("gpu_nodes", request.gpu_nodes)
    allowed, excluded = _sift(gpu_nodes, lambda node: outside(node) or node.problem)
    if not allowed:
        summary = "no GPU node may be used" if gpu_nodes else "the cluster has no GPU node"
        advice = "widen constraints.gpu_nodes" if gpu_nodes else "start one with `ray start --num-gpus=N`"
        if any(node.problem for node in gpu_nodes):
            advice = "run `placement topology` and repair the nodes it names"
        return NoGpuNodes(request.deployment, summary, excluded, advice)

    fitting, too_small = _sift(
        allowed, lambda node: f"has fewer than {count} GPUs" if len(node.topology) < count else None
    )
    largest = max(len(node.topology) for node in allowed)
    if not fitting:
        return NotEnoughGpus(
            request.deployment,
            f"{count} GPUs per replica, but the largest node has {largest}",
            excluded | too_small,
            f"ask for at most {largest} GPUs per replica, or add a node with {count}",
            count,
            largest,
        )

    roomy, full = _sift(
        fitting, lambda node: f"has fewer than {count} GPUs free" if len(node.free) < count else None
    )
    if not roomy:
        most = max(fitting, key=lambda node: (len(node.free), node.id))
        return NotEnoughGpus(
            request.deployment,
            f"replica {index} needs {count} free GPUs on one node, and {_free(most)} on {most.name} at best",
            excluded | too_small | full,
            f"release something, add a node with {count} GPUs, or ask for fewer replicas or GPUs",
            count,
            largest,
        )

    def rank(node: Node) -> tuple[float, float, int, int, str, str]:
        offer = score(node.topology, best_set(node.topology, node.free, count) or ())
        speed = (offer.weakest_gb_per_s, offer.total_gb_per_s)
        return (-speed[0], -speed[1], standing[node.id], len(node.free), node.name, node.id)

    chosen = min(roomy, key=rank)
    return PlannedReplica(index, chosen.id, best_set(chosen.topology, chosen.free, count) or ())


def _place_remote(
    snapshot: Snapshot, request: Request, standing: Counter[str], index: int
) -> PlannedReplica | Unplaceable:
    provider = request.provider or ""
    resource = f"egress_{provider}"
    egress_nodes = tuple(node for node in snapshot.nodes if node.egress_resource(provider))
    allowed, excluded = _sift(egress_nodes, _outside("egress_nodes", request.egress_nodes))
    if not allowed:
        summary = "no egress node may be used" if egress_nodes else f"no node may call out to {provider}"
        advice = (
            "widen constraints.egress_nodes"
            if egress_nodes
            else f"start one with `ray start --resources='{{\"{resource}\": 64}}'`"
        )
        return NoEgressNodes(request.deployment, summary, excluded, advice, provider)

    def left(node: Node) -> int:
        return node.egress[node.egress_resource(provider) or ""]

    short = f"has fewer than {request.egress} egress units free"
    roomy, full = _sift(allowed, lambda node: short if left(node) < request.egress else None)
    if not roomy:
        most = max(allowed, key=lambda node: (left(node), node.id))
        return NotEnoughEgress(
            request.deployment,
            f"replica {index} needs {request.egress} concurrent requests to {provider} on one node, "
            f"and {left(most)} are free on {most.name} at best",
            excluded | full,
            f"lower serving.max_concurrent, release something, or raise {resource} on a node",
        )

    identity = (provider, request.key or "")

    def rank(node: Node) -> tuple[int, int, bool, int, str, str]:
        preference = next(
            (i for i, name in enumerate(request.egress_preference) if node.named(name)),
            len(request.egress_preference),
        )
        return (standing[node.id], preference, identity not in node.serving, -left(node), node.name, node.id)

    chosen = min(roomy, key=rank)
    return PlannedReplica(index, chosen.id, egress_resource=chosen.egress_resource(provider))


def _free(node: Node) -> str:
    count = len(node.free)
    return f"{count} ({ordinals(tuple(node.free))}) are free" if count else "none is free"
