"""Declarations and placed replicas, in the planner's terms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from operator import attrgetter

from placement.core.bundles import summed
from placement.core.mix import Mix
from placement.core.node import Node
from placement.core.reconcile import Desired, Observed
from placement.core.request import Bundle, Request, Resources, Strategy
from placement.core.snapshot import Snapshot
from placement.core.topology import ordinals
from placement.errors import GroupStands, UnknownGpu, UnknownNode
from placement.wire.constraints import PlacementConstraints
from placement.wire.deployment import Deployment
from placement.wire.held import HeldDeployment

SPARED_MILLI = 1000
"""CPUs that CPU replicas leave to each free GPU of their node, thousandths: verl, OpenRLHF, slime, SkyRL and Ray Data
ask for one CPU with each GPU, and cannot use a GPU without a free CPU."""


def desired_of(wanted: Deployment, others: Iterable[Deployment] = (), releasing: bool = False) -> Desired:
    """A declaration in the planner's terms; some of ``others`` may have to keep away from it.

    Nodes that its constraints name need not exist: :func:`request_of` checks that.
    """
    gang = wanted.gang or wanted.group is not None
    return Desired(request_unchecked(wanted, range(wanted.replicas), {}, others), gang, releasing)


def observed_of(held: HeldDeployment) -> dict[int, Observed]:
    """The replicas of a deployment in the planner's terms, each with the declaration by which it was placed."""
    requests = {number: request_unchecked(one, (), {}) for number, one in held.earlier.items()}
    requests[0] = request_unchecked(held.deployment, (), {})
    found: dict[int, Observed] = {}
    for one in sorted(held.replicas, key=attrgetter("replica_index", "ranks")):
        before = found.get(one.replica_index)
        parts = (*(before.parts if before else ()), one.planned())
        found[one.replica_index] = Observed(parts, requests[one.generation])
    return found


def differing(before: Deployment, after: Deployment) -> list[str]:
    """Names of the declared fields in which two declarations differ."""
    was, is_now = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [name for name in is_now if was[name] != is_now[name]]


def request_of(
    wanted: Deployment,
    missing: Iterable[int],
    standing: Mapping[str, int],
    snapshot: Snapshot,
    mending: bool = False,
    others: Iterable[Deployment] = (),
) -> Request:
    """A request for the ``missing`` replicas of a deployment; some of ``others`` may have to keep away from it.

    Raises:
        UnknownNode: its constraints name a node that does not exist; with ``mending``, only if none of them exists, as
            a node that it named may be the one that died.
        UnknownGpu: they name a GPU that no node has.
    """
    limits = wanted.constraints or PlacementConstraints()
    for limit in ("gpu_nodes", "egress_nodes", "egress_preference", "cpu_nodes"):
        names = getattr(limits, limit) or ()
        for name in names:
            if not snapshot.named([name]) and not (mending and snapshot.named(names)):
                known = tuple(node.name for node in snapshot.nodes)
                raise UnknownNode(f"constraints.{limit}", name, known)
    having = [node for node in snapshot.nodes if len(node.topology)]
    for gpu in limits.gpus or ():
        if having and not mending and all(node.slot_of(gpu) is None for node in having):
            raise UnknownGpu("constraints.gpus", gpu, _gpus_like(having, gpu))
    return request_unchecked(wanted, missing, standing, others)


def _gpus_like(nodes: Iterable[Node], name: int | str) -> tuple[str, ...]:
    """The GPUs that exist, each with its node: by ordinal or by UUID, as the unknown one was named."""
    if isinstance(name, str):
        alike = [(uuid, node) for node in nodes for uuid in node.uuids.values() if uuid[:4] == name[:4]]
        return tuple(f"{uuid} ({node.name})" for uuid, node in alike)
    return tuple(f"{ordinals(range(len(node.topology)))} ({node.name})" for node in nodes)


def request_unchecked(
    wanted: Deployment,
    missing: Iterable[int],
    standing: Mapping[str, int],
    others: Iterable[Deployment] = (),
) -> Request:
    """The same, whether the nodes that it names exist or not."""
    limits = wanted.constraints or PlacementConstraints()
    labels, bundles, resources = limits.node_labels, tuple[Bundle, ...](), _NO_RESOURCES
    cpu_milli = wanted.cpu_milli or wanted.cpu_milli_per_gpu * wanted.needs.gpus
    memory_bytes = wanted.memory_bytes or wanted.memory_bytes_per_gpu * wanted.needs.gpus
    if (layout := wanted.placement_group) is not None:
        bundles = tuple(layout.planned())
        cpu_milli, memory_bytes = (
            sum(one.cpu_milli for one in bundles),
            sum(one.memory_bytes for one in bundles),
        )
        resources = summed(one.resources for one in bundles)
        if layout.on_one_node or limits.gpus:
            labels, bundles = {key: value for one in bundles for key, value in one.labels}, ()
    return Request(
        deployment=wanted.name,
        replicas=tuple(missing),
        needs=wanted.needs,
        policy=wanted.policy,
        provider=wanted.provider,
        key=wanted.key_fingerprint,
        egress=wanted.egress_per_replica,
        gpu_nodes=limits.gpu_nodes,
        egress_nodes=limits.egress_nodes,
        egress_preference=limits.egress_preference,
        cpu_nodes=limits.cpu_nodes,
        labels=labels,
        accelerators=limits.accelerators or (),
        compute_capability=limits.compute_capability,
        cpu_milli=cpu_milli,
        memory_bytes=memory_bytes,
        spared_milli=SPARED_MILLI if wanted.cpus is not None else 0,
        stages=wanted.stages,
        divisible=wanted.divisible,
        apart_from=limits.apart_from,
        near_to=limits.near_to,
        kept_away_by=tuple(
            sorted(
                {  # one that is being changed is among them with its old and its new declaration
                    one.name
                    for one in others
                    if one.constraints
                    and wanted.name in one.constraints.apart_from
                    and one.name != wanted.name
                }
            )
        ),
        spread_label=limits.spread.label if limits.spread else None,
        max_per_domain=limits.spread.max if limits.spread else 0,
        standing=dict(standing),
        bundles=bundles,
        strategy=layout.strategy if layout and bundles else Strategy.STRICT_PACK,
        domain_label=layout.domain_label if layout else None,
        resources=resources,
    )


_NO_RESOURCES: Resources = ()


def mix_of(snapshot: Snapshot, deployments: Iterable[Deployment], mix: Mix | None = None) -> Mix:
    """The mix with the requests of these deployments.

    Deployments whose constraints name a node that no longer exists do not count.
    """
    mix = mix or Mix()
    for one in deployments:
        with contextlib.suppress(UnknownNode, UnknownGpu):
            mix = mix.plus(request_of(one, range(one.replicas), {}, snapshot))
    return mix


def require_same_places(
    before: Deployment, wanted: Deployment, placed: bool, group_placed: bool = True
) -> None:
    """Checks that a new declaration of a group's member moves no replica, and keeps the group.

    Args:
        before: the current declaration.
        wanted: the new declaration.
        placed: whether any replica of it is placed.
        group_placed: whether any replica of its group is placed.

    Raises:
        GroupStands: it would move one, or leave the group.
    """
    was, is_now = before.group, wanted.group
    if was is None and (is_now is None or not placed):
        return
    name = (is_now or was or wanted).name
    if was is None:
        raise GroupStands(name, wanted.name, "it is placed, and was no member of the group")
    if is_now is None:
        raise GroupStands(name, wanted.name, "it is declared without the group")
    names = (was.name, was.members.keys()) == (is_now.name, is_now.members.keys())
    if was.model_copy(update={"units": is_now.units}) != is_now and (group_placed or not names):
        raise GroupStands(
            was.name, wanted.name, "the group has another name, other members or other links now"
        )
    if placed and before.shape() != wanted.shape():
        fields = ", ".join(field for field in differing(before, wanted) if field not in ("group", "replicas"))
        raise GroupStands(name, wanted.name, f"its replicas would have to move ({fields})")
