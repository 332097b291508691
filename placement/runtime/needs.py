"""What a waiting set of GPUs, remote replica or CPU replica needs of a node that does not exist yet. Pure.

Of a new node only its type's resources and labels are known. What depends on more (the links between its
GPUs, how much of their memory is free) is known only once it has joined.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from placement.core.labels import meets, parse_condition
from placement.core.needs import GIB, WHOLE
from placement.core.node import UNIT
from placement.core.request import Lack, Request, Resources, Strategy
from placement.core.shares import least_gpus
from placement.core.wording import describe, describe_cpus
from placement.errors import counted
from placement.wire.accelerators import accelerator_type
from placement.wire.node_types import NodeType
from placement.wire.requests import SPARED_MILLI

ACCELERATOR_LABEL = "ray.io/accelerator-type"

NODE_ID_LABEL = "ray.io/node-id"

_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")

Amounts = tuple[tuple[str, float], ...]
"""Resource -> amount, sorted and hashable."""

Conditions = dict[str, tuple[bool, frozenset[str]]]
"""Label -> (whether it must have one of the values, the values)."""


@dataclass(frozen=True)
class Way:
    """One form in which a need can be asked for.

    Attributes:
        bundles: the bundles of the placement group. A single bundle is on one node.
        smaller_than: asked for only while no node has this many GPUs; 0 means always.
    """

    bundles: tuple[Amounts, ...]
    smaller_than: int = 0

    @property
    def total(self) -> dict[str, float]:
        """Resource -> amount, over all bundles."""
        total: dict[str, float] = {}
        for bundle in self.bundles:
            for resource, amount in bundle:
                total[resource] = total.get(resource, 0.0) + amount
        return total


@dataclass(frozen=True)
class Need:
    """What one waiting set needs of a new node.

    Attributes:
        what: the resources, in the words of refusals.
        ways: the forms to ask in; the next one is used if no node type can hold the one before.
        labels: label -> condition, in Ray's syntax, sorted.
        floor: the links between its GPUs must reach a floor, which shows once it has joined.
        group: the group of the replicas that are to be near each other there; empty for a single one.
    """

    what: str
    ways: tuple[Way, ...]
    labels: tuple[tuple[str, str], ...] = ()
    floor: bool = False
    group: str = ""

    def __str__(self) -> str:
        on = ", ".join(f"{key} {condition}" for key, condition in self.labels)
        together = f" for replicas of {self.group!r} that talk" if self.group else ""
        return f"a node with {self.what}" + (f" and {on}" if on else "") + together

    def met_by(self, labels: Mapping[str, str]) -> bool:
        """Whether a node's labels meet the conditions."""
        return all(meets(labels, key, condition) for key, condition in self.labels)


def by_type(need: Need, types: Sequence[NodeType]) -> str:
    """Which node types would hold a need; if none would, what the first few lack.

    Returns:
        A clause without its full stop; empty without types.
    """
    if not types:
        return ""
    lacks = {one.name: _lack(need, one) for one in types}
    holding = [f"{one.name} (at most {one.max_workers})" for one in types if not lacks[one.name]]
    if holding:
        some = f"node type{'s' * (len(holding) > 1)} {_few(holding)} would hold it"
        return some + (", if its links reach the floor" if need.floor else "")
    return f"no node type holds it ({_few([f'{name} {lack}' for name, lack in lacks.items()], '; ')})"


def _lack(need: Need, one: NodeType) -> str:
    """What a node type lacks for a need; empty if nothing. CPUs and memory that Ray detects itself may suffice."""
    for key, condition in need.labels:
        if not meets(one.labels, key, condition):
            return f"has label {key} {one.labels[key]}" if key in one.labels else f"promises no label {key}"
    lack = ""
    for way in need.ways:
        lack = _short(way, one)
        if not lack:
            break
    return lack


def _short(way: Way, one: NodeType) -> str:
    for resource, amount in way.total.items():
        most = max(dict(bundle).get(resource, 0.0) for bundle in way.bundles)
        have = one.resources.get(resource)
        if have is None:
            if resource not in ("CPU", "memory"):
                return f"has no {resource}"
            continue
        if resource == "CPU" and "GPU" not in way.total:
            have = max(0.0, have - SPARED_MILLI / 1000 * one.resources.get("GPU", 0.0))
        if most > have:
            return f"has {_of(resource, have, most)}"
        elif amount > have * one.max_workers:
            return f"has {_of(resource, have * one.max_workers, amount)}, on {one.max_workers} nodes"
    return ""


def _of(resource: str, have: float, needed: float) -> str:
    """``8 of 16 GPUs``."""
    if resource == "memory":
        return f"{have / GIB:.3g} of {needed / GIB:.3g} GiB of memory"
    return f"{have:g} of {needed:g} {resource}{'s' if resource in ('GPU', 'CPU') and needed != 1 else ''}"


def _few(names: Sequence[str], between: str = ", ", most: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f"{between}and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def needs_of(
    request: Request, indices: Iterable[int], full_domains: Collection[str] = ()
) -> dict[str, Need] | str:
    """The needs of some replicas' sets, by ``deployment:replica:set``; or why no node is asked for.

    Args:
        request: the replicas' request.
        indices: which of them wait.
        full_domains: values of the request's spread label whose nodes may take no more replicas.
    """
    if why := _untold(request):
        return why
    conditions = _conditions(request, full_domains)
    if isinstance(conditions, str):
        return conditions
    labels = _sorted(conditions)
    need = _remote(request, labels) if request.provider is not None else _local(request, labels)
    if request.needs.named:  # one node, for all of them
        return {f"{request.deployment}:{index}:0": need for index in [*indices][:1]}
    sets = 1 if request.provider is not None else request.stages * request.parts
    return {f"{request.deployment}:{index}:{part}": need for index in indices for part in range(sets)}


def needs_of_group(lacks: Sequence[Lack]) -> dict[str, Need | str]:
    """The needs of the replicas of a group that wait, each under the first of those that it is for.

    Args:
        lacks: what the group lacks.
    """
    return {f"{lack.first[0]}:{lack.first[1]}:0": lack.why or _need_of(lack) for lack in lacks}


def _need_of(lack: Lack) -> Need | str:
    """What replicas of a group need that are to be near each other; or why no node is asked for."""
    conditions: Conditions = {label: (True, frozenset({value})) for label, value in lack.labels}
    for request, _ in chain(*lack.nodes):
        found = _untold(request) or _conditions(request, ())
        if isinstance(found, str):
            return found
        for key, condition in found.items():
            _narrow(conditions, key, *condition)
    if why := _contradiction(conditions):
        return why
    labels = _sorted(conditions)
    each = [*chain(*lack.nodes)]
    if sum(count for _, count in each) == 1:
        return _local(each[0][0], labels)
    together = _together(each)
    ways = [Way((_amounts(*together),))]
    if len(lack.nodes) > 1:
        apart = tuple(_amounts(*_together(home)) for home in lack.nodes)
        ways.append(Way(apart, smaller_than=int(together[0])))
    gpus, cpu_milli, memory_bytes = together
    what = counted(int(gpus), "GPU") + _beside(cpu_milli, memory_bytes)
    return Need(what, tuple(ways), labels, group=lack.group)


def _together(pieces: Iterable[tuple[Request, int]]) -> tuple[float, float, int]:
    """The GPUs, CPUs (thousandths) and memory of a node on which all of these are."""
    gpus, least, cpu_milli, memory_bytes = 0, 0, 0, 0
    for request, count in pieces:
        needs = request.needs
        gpus += -(-count // (WHOLE // needs.share)) * needs.gpus  # as in _local, memory takes whole GPUs
        least = max(least, *(1 + name for name in needs.named if isinstance(name, int)), 0)
        cpu_milli += count * request.cpu_milli
        memory_bytes += count * request.memory_bytes
    return float(max(gpus, least)), cpu_milli, memory_bytes


def _untold(request: Request) -> str:
    """The constraint that cannot be expressed to the autoscaler, if there is one."""
    named, nodes = request.only_nodes
    if nodes is not None:
        return f"constraints.{named} names existing nodes"
    if request.near_to:
        return "constraints.near_to needs a node with another deployment on it"
    if request.provider is not None or request.on_cpus:
        return ""
    if any(isinstance(name, str) for name in request.needs.named):
        return "constraints.gpus names GPUs by UUID, and a new node has other UUIDs"
    if request.needs.named and any(request.standing.values()):
        return "constraints.gpus names GPUs of the node on which other replicas are"
    if request.needs.free_memory_bytes:
        return "constraints.min_free_gpu_memory_gib cannot be known before a node has joined"
    if request.compute_capability is not None and not request.accelerators:
        return "node types do not state their compute capability; set constraints.accelerators as well"
    return ""


def _conditions(request: Request, full_domains: Collection[str]) -> Conditions | str:
    """The hard constraints as label conditions; or why they cannot be expressed."""
    conditions: Conditions = {}
    for key, text in request.labels.items():
        conditions[key] = parse_condition(text)
    if request.provider is None and not request.on_cpus and request.accelerators:
        names = {
            name for asked in request.accelerators for name in (asked, accelerator_type(f"NVIDIA {asked}"))
        }
        known = frozenset(name for name in names if name and _LABEL_VALUE.fullmatch(name))
        if not known:
            return f"Ray has no accelerator type for {', '.join(request.accelerators)}"
        _narrow(conditions, ACCELERATOR_LABEL, True, known)
    if request.spread_label is not None and full_domains:
        _narrow(conditions, request.spread_label, False, frozenset(full_domains))
    return _contradiction(conditions) or conditions


def _contradiction(conditions: Conditions) -> str:
    """Why no new node can meet all of the conditions; empty if one may."""
    for key, (wanted, values) in conditions.items():
        if wanted and not values:
            return f"no node can meet all conditions on its label {key}"
    if conditions.get(NODE_ID_LABEL, (False, frozenset()))[0]:
        return f"the label {NODE_ID_LABEL} names existing nodes"
    return ""


def _sorted(conditions: Conditions) -> tuple[tuple[str, str], ...]:
    """The conditions in Ray's syntax."""
    return tuple(sorted((key, _condition(*condition)) for key, condition in conditions.items()))


def _narrow(conditions: Conditions, key: str, wanted: bool, values: frozenset[str]) -> None:
    """Combines a condition with those on the same label."""
    if key not in conditions:
        conditions[key] = wanted, values
        return
    before, have = conditions[key]
    if before and wanted:
        conditions[key] = True, have & values
    elif before or wanted:
        conditions[key] = True, have - values if before else values - have
    else:
        conditions[key] = False, have | values


def _condition(wanted: bool, values: frozenset[str]) -> str:
    """A condition in Ray's syntax."""
    text = next(iter(values)) if len(values) == 1 else f"in({', '.join(sorted(values))})"
    return text if wanted else f"!{text}"


def _local(request: Request, labels: tuple[tuple[str, str], ...]) -> Need:
    needs = request.needs
    # The memory of a new node's GPUs is unknown, so a whole GPU is asked for.
    gpus = needs.share / WHOLE if needs.share < WHOLE and not needs.memory_bytes else float(needs.gpus)
    gpus = float(least_gpus(needs)) if needs.amounts else gpus
    what = describe(needs)
    if needs.named:  # a node with four GPUs has GPU 3
        gpus = 1.0 + max(name for name in needs.named if isinstance(name, int))
        what = counted(int(gpus), "GPU")
    ways = [Way((_amounts(gpus, request.cpu_milli, request.memory_bytes, request.resources),))]
    if request.bundles:
        apart = Way(
            tuple(
                _amounts(b.gpus + b.share / WHOLE, b.cpu_milli, b.memory_bytes, b.resources)
                for b in request.bundles
            )
        )
        ways = [*ways, apart] if request.strategy is Strategy.PACK else [apart]
    if (
        not needs.named
        and request.divisible
        and request.stages * request.parts == 1
        and needs.whole
        and needs.gpus > 1
    ):
        each = _amounts(1.0, request.cpu_milli / needs.gpus, request.memory_bytes // needs.gpus)
        ways.append(Way((each,) * needs.gpus, smaller_than=needs.gpus))
    if request.on_cpus:
        return Need(describe_cpus(request), tuple(ways), labels)
    beside = _beside(request.cpu_milli, request.memory_bytes, request.resources)
    return Need(what + beside, tuple(ways), labels, floor=needs.floor and needs.gpus > 1)


def _beside(cpu_milli: float, memory_bytes: int, resources: Resources = ()) -> str:
    """``, 8 CPUs, 64 GiB of memory``: what is taken beside GPUs."""
    beside = f", {cpu_milli / 1000:g} CPUs" if cpu_milli else ""
    beside += f", {memory_bytes / GIB:.3g} GiB of memory" if memory_bytes else ""
    return beside + "".join(f", {amount / UNIT:g} {resource}" for resource, amount in resources)


def _amounts(gpus: float, cpu_milli: float, memory_bytes: int, resources: Resources = ()) -> Amounts:
    amounts = {"GPU": gpus, "CPU": cpu_milli / 1000, "memory": float(memory_bytes)}
    amounts |= {resource: amount / UNIT for resource, amount in resources}
    return tuple((resource, amount) for resource, amount in amounts.items() if amount)


def _remote(request: Request, labels: tuple[tuple[str, str], ...]) -> Need:
    resources = (f"egress_{request.provider}", "egress")
    ways = tuple(Way((((resource, float(request.egress)),),)) for resource in resources)
    return Need(f"{request.egress} of {resources[0]} or egress", ways, labels)
