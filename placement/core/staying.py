"""Which replicas stay where they are when their deployment is declared again.

A replica stays if what it holds is what is asked for now, and its nodes meet the limits that changed. A limit that did
not change is no reason to move, and neither is an unknown fact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from placement.core import gangs
from placement.core.labels import GPU_DOMAIN_LABEL, meets
from placement.core.limits import eligible
from placement.core.needs import ANY_PROFILE, Needs, Within
from placement.core.node import Node
from placement.core.replicas import PlannedReplica
from placement.core.request import Request
from placement.core.snapshot import Snapshot

Replica = Sequence[PlannedReplica]
"""One replica, by its parts on several nodes."""


def staying(
    snapshot: Snapshot,
    replicas: Mapping[int, Replica],
    before: Request,
    after: Request,
    others: Iterable[Replica] = (),
) -> list[int]:
    """The placed replicas that stay.

    Args:
        snapshot: the cluster on which they are placed.
        replicas: index -> its parts.
        before: the request by which they were placed; its ``replicas`` have no meaning.
        after: what is asked for now.
        others: replicas of the deployment that stay in any case; if it spreads, these count first.
    """
    others = [*others]
    stay = [index for index, parts in sorted(replicas.items()) if _stays(snapshot, parts, before, after)]
    if after.needs.named:  # all named GPUs are on one node
        first = [parts for parts in (*others, *(replicas[index] for index in stay))][:1]
        home = {part.node_id for parts in first for part in parts}
        stay = [index for index in stay if {part.node_id for part in replicas[index]} <= home]
    asks_anew = (before.spread_label, before.max_per_domain) != (after.spread_label, after.max_per_domain)
    return _spread(snapshot, replicas, stay, after, others) if asks_anew and after.spread_label else stay


def _stays(snapshot: Snapshot, parts: Replica, before: Request, after: Request) -> bool:
    nodes = [snapshot.node(part.node_id) for part in parts if snapshot.bit(part.node_id)]
    return (
        _holds(snapshot, parts, before, after)
        and all(_may_be_on(node, before, after) for node in nodes)
        and (after.calls is not None or _lies_well(snapshot, parts, before, after))
    )


def _holds(snapshot: Snapshot, parts: Replica, before: Request, after: Request) -> bool:
    """Whether a replica holds the same kind and amount of resources as is asked for now."""
    if before.calls != after.calls:
        return False
    if after.calls is not None:
        return before.egress == after.egress
    if after.on_cpus:
        takes = [(one.cpu_milli, one.memory_bytes) for one in (before, after)]
        return before.on_cpus and takes[0] == takes[1]
    old, new = before.needs, after.needs
    counts = [len(part.gpus) for part in parts]
    if old.named != new.named and new.named and not all(_are_named(snapshot, part, after) for part in parts):
        return False
    laid_out = before.bundles, before.strategy, before.domain_label, before.resources
    if laid_out != (after.bundles, after.strategy, after.domain_label, after.resources):
        return False
    if old.amounts or new.amounts:
        return old == new
    if not all(counts) or sum(counts) != new.gpus * after.stages or not _is_alike(parts, old, new):
        return False
    for was, is_now in ((before.cpu_milli, after.cpu_milli), (before.memory_bytes, after.memory_bytes)):
        if was * new.gpus != is_now * old.gpus:
            return False
    if (old.share, old.memory_bytes) == (new.share, new.memory_bytes):
        return True
    [part] = parts
    if not new.memory_bytes:
        return part.share == new.share
    node = snapshot.node(part.node_id) if snapshot.bit(part.node_id) else None
    return node is None or node.gpu_memory_bytes is None or part.share == new.share_of(node.gpu_memory_bytes)


def _is_alike(parts: Replica, old: Needs, new: Needs) -> bool:
    """Whether it has GPUs if GPUs are asked for, and an instance of the profile if that is."""
    is_any = new.profile == ANY_PROFILE and all(part.profile for part in parts)
    return old.profile == new.profile or is_any


def _are_named(snapshot: Snapshot, part: PlannedReplica, after: Request) -> bool:
    """Whether the GPUs that a replica holds on a node are among those that are named now, as far as known."""
    if not snapshot.bit(part.node_id):
        return True
    node, names = snapshot.node(part.node_id), after.needs.named
    slots = {node.slot_of(name) for name in names}
    if None not in slots:
        return slots.issuperset(part.gpus)
    uuids = [name for name in names if isinstance(name, str)]
    known = node.uuids or any(other.slot_of(uuid) is not None for other in snapshot.nodes for uuid in uuids)
    return bool(uuids) and not known


def _may_be_on(node: Node, before: Request, after: Request) -> bool:
    """Whether a node meets the limits that changed."""
    (_, was), (_, allowed) = before.only_nodes, after.only_nodes
    if allowed is not None and was != allowed and not any(map(node.named, allowed)):
        return False
    if (set(after.apart_from) - set(before.apart_from)) & node.deployments.keys():
        return False
    if set(after.near_to) - set(before.near_to) - node.deployments.keys():
        return False
    for label, condition in after.labels.items():
        if before.labels.get(label) != condition and not meets(node.labels, label, condition):
            return False
    return after.calls is not None or after.on_cpus or _has_the_gpus(node, before, after)


def _has_the_gpus(node: Node, before: Request, after: Request) -> bool:
    named = frozenset(after.accelerators if before.accelerators != after.accelerators else ())
    if named and node.accelerators and not named & node.accelerators:
        return False
    least, known = after.compute_capability, node.compute_capability
    return least is None or known is None or before.compute_capability == least or known >= least


def _lies_well(snapshot: Snapshot, parts: Replica, before: Request, after: Request) -> bool:
    """Whether its GPUs are as close together, and as fast, as is asked for now."""
    if _arrangement(before) == _arrangement(after):
        return True
    by_rank: dict[int, tuple[str, int]] = {}
    for part in parts:
        ranks = part.ranks or range(len(part.gpus))
        by_rank |= {rank: (part.node_id, gpu) for rank, gpu in zip(ranks, part.gpus, strict=True)}
    ordered = [by_rank[rank] for rank in sorted(by_rank)]
    if any(not snapshot.bit(node_id) for node_id, _ in ordered):
        return True
    if _is_cut(snapshot, ordered, after):
        return True
    # A replica that no node can hold may be divided, if it is divided in one of the ways that a plan would use.
    together = len({node_id for node_id, _ in ordered}) == 1
    cuts = [] if together else gangs.splits(snapshot, after, eligible(snapshot, after))
    return any(_is_cut(snapshot, ordered, cut) for cut in cuts)


def _arrangement(request: Request) -> tuple[object, ...]:
    needs = request.needs
    return needs.gpus, needs.within, needs.slowest, request.stages, request.divisible


def _is_cut(snapshot: Snapshot, ordered: Sequence[tuple[str, int]], request: Request) -> bool:
    """Whether GPUs in rank order form the sets that a request asks for, and each meets its floors."""
    size = request.needs.gpus
    domains: list[str | None] = []
    for i in range(0, len(ordered), size):
        piece = ordered[i : i + size]
        node = snapshot.node(piece[0][0])
        if {node_id for node_id, _ in piece} != {node.id} or not _meets_floor(node, piece, request):
            return False
        domains.append(node.labels.get(GPU_DOMAIN_LABEL))
    if request.parts == 1:
        return True
    groups = [set(domains[i : i + request.parts]) for i in range(0, len(domains), request.parts)]
    return all(len(group) == 1 and None not in group for group in groups)


def _meets_floor(node: Node, piece: Sequence[tuple[str, int]], request: Request) -> bool:
    needs = request.needs
    if needs.gpus < 2 or not needs.floor or not node.topology.known:
        return True
    gpus = [gpu for _, gpu in piece]
    if needs.within is Within.NUMA and not all(node.topology.numa[gpu] for gpu in gpus):
        return True
    offer = node.shape.offer(sum(1 << gpu for gpu in gpus), len(gpus), needs.within)
    return offer is not None and offer.slowness <= needs.slowest


def _spread(
    snapshot: Snapshot,
    replicas: Mapping[int, Replica],
    stay: Sequence[int],
    after: Request,
    others: Iterable[Replica],
) -> list[int]:
    """As many of these replicas as each domain may have: the first by index."""
    label, in_domain, kept = after.spread_label or "", Counter[str](), []

    def domains_of(parts: Replica) -> set[str | None]:
        nodes = [snapshot.node(part.node_id) for part in parts if snapshot.bit(part.node_id)]
        return {node.labels.get(label) for node in nodes}

    for parts in others:
        in_domain.update(domain for domain in domains_of(parts) if domain is not None)
    for index in stay:
        domains = domains_of(replicas[index])
        if not domains:
            kept.append(index)
            continue
        domain = domains.pop()
        if domains or domain is None or (after.max_per_domain and in_domain[domain] >= after.max_per_domain):
            continue
        in_domain[domain] += 1
        kept.append(index)
    return kept
