"""The planner's rules as a model that tries everything: for small clusters only.

Written from what the docstrings of :mod:`placement.core.planner`, :mod:`~placement.core.gangs`,
:mod:`~placement.core.request` and :class:`~placement.core.policy.Policy` promise, not from how it is done. It
shares with the planner only the predicted speed of one set, which has an oracle of its own (``test_choice.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import ANY_PROFILE, WHOLE, Needs, Within
from placement.core.node import Node
from placement.core.replicas import PlannedReplica
from placement.core.request import Request
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology

Gpus = tuple[int, ...]
Piece = tuple[int, Gpus]
"""A set of GPUs: the position of its node, and its ordinals."""


@dataclass(frozen=True)
class Left:
    """What a request can use of a node, as far as it is left.

    Attributes:
        rests: GPU (or MIG instance) -> thousandths left, of those that will do, as sorted pairs.
    """

    rests: tuple[tuple[int, int], ...]
    cpu_milli: int
    memory_bytes: int


@dataclass(frozen=True)
class State:
    """The cluster in the middle of a deployment.

    Attributes:
        left: by node.
        replicas: of the deployment, by value of the label it spreads over, as sorted pairs.
    """

    left: tuple[Left, ...]
    replicas: tuple[tuple[str, int], ...] = ()


def speed(topology: Topology, gpus: Gpus) -> float:
    """The predicted bandwidth between the GPUs of a set, GB/s; 0 where there is nothing to be fast."""
    return score(topology, gpus).bandwidth_gb_per_s if len(gpus) > 1 else 0.0


def fulfils(labels: dict[str, str], key: str, condition: str) -> bool:
    """Whether a label meets ``a``, ``!a``, ``in(a, b)`` or ``!in(a, b)``."""
    positive = condition[0] != "!"
    text = condition.lstrip("!")
    listed = text[3:-1].split(",") if text.startswith("in(") else [text]
    return (labels.get(key) in [value.strip() for value in listed]) is positive


class Oracle:
    """All placements of a request for GPUs that is made of the sets it says, and not cut any further.

    Args:
        snapshot: the cluster.
        request: what is asked for.
        home: the position of the one node for all replicas, where GPUs are named.
    """

    def __init__(self, snapshot: Snapshot, request: Request, home: int | None = None) -> None:
        self.nodes = snapshot.nodes
        self.near = snapshot.near
        self.request = request
        self.home = home
        self.allowed = [
            i for i, node in enumerate(self.nodes) if home in (None, i) and may_use(node, request)
        ]
        self._units = cache(self._find_units)

    # -- states ----------------------------------------------------------------------------------

    def start(self) -> State:
        """The cluster as it is, of the deployment with what stands."""
        counts: Counter[str] = Counter()
        for node in self.nodes:
            domain = self.domain(node)
            if domain is not None:
                counts[domain] += self.request.standing.get(node.id, 0)
        left = tuple(
            Left(tuple(sorted(self._usable(node).items())), node.cpu_milli, node.memory_bytes)
            for node in self.nodes
        )
        return State(left, tuple(sorted(counts.items())))

    def domain(self, node: Node) -> str | None:
        """The value of the label that the deployment spreads over."""
        label = self.request.spread_label
        return None if label is None else node.labels.get(label)

    def share(self, node: Node) -> int | None:
        """Thousandths of a GPU of this node that one set takes of each; ``None`` if that cannot be."""
        needs = self.request.needs
        if needs.profile or not needs.memory_bytes:
            return WHOLE if needs.profile else needs.share
        if not node.gpu_memory_bytes or node.gpu_memory_bytes < needs.memory_bytes:
            return None
        return next(n for n in range(1, WHOLE + 1) if node.gpu_memory_bytes * n >= needs.memory_bytes * WHOLE)

    def _usable(self, node: Node) -> dict[int, int]:
        needs = self.request.needs
        if needs.profile:
            rests = {slot: WHOLE for slot, profile in node.instances.items() if will_do(profile, needs)}
        else:
            rests = {**dict.fromkeys(node.free, WHOLE), **node.rests}
        if needs.named:
            rests = {gpu: rest for gpu, rest in rests.items() if {gpu, node.uuids.get(gpu)} & {*needs.named}}
        least = needs.free_memory_bytes
        return {
            gpu: rest for gpu, rest in rests.items() if not least or node.free_memory.get(gpu, 0) >= least
        }

    def take(self, state: State, pieces: Sequence[Piece]) -> State:
        """The state once one replica has these pieces; they must be there."""
        left = list(state.left)
        for position, gpus in pieces:
            share = self.share(self.nodes[position])
            assert share is not None
            rests = dict(left[position].rests)
            for gpu in gpus:
                assert rests[gpu] >= share, "held twice"
                rests[gpu] -= share
            left[position] = Left(
                tuple(sorted(rests.items())),
                left[position].cpu_milli - self.request.cpu_milli,
                left[position].memory_bytes - self.request.memory_bytes,
            )
            assert min(left[position].cpu_milli, left[position].memory_bytes) >= 0
        counts = dict(state.replicas)
        if (domain := self.domain(self.nodes[pieces[0][0]])) is not None:
            counts[domain] += 1
        return State(tuple(left), tuple(sorted(counts.items())))

    # -- one replica -----------------------------------------------------------------------------

    def units(self, state: State, position: int, at_least: float, alike: bool) -> list[Gpus]:
        """The sets that are free on a node; if ``alike``, one for all between which nothing differs."""
        left = state.left[position]
        if left.cpu_milli < self.request.cpu_milli or left.memory_bytes < self.request.memory_bytes:
            return []
        return self._units(position, left.rests, at_least, alike)

    def _find_units(
        self, position: int, rests: tuple[tuple[int, int], ...], at_least: float, alike: bool
    ) -> list[Gpus]:
        node, needs = self.nodes[position], self.request.needs
        share = self.share(node)
        if share is None:
            return []
        if share < WHOLE:
            fitting = {rest if alike else gpu: gpu for gpu, rest in rests if rest >= share}
            return [(gpu,) for gpu in sorted(fitting.values())]
        whole = [gpu for gpu, rest in rests if rest == WHOLE]
        if alike and not needs.floor and at_least <= 0:
            whole = whole[: needs.gpus]
        return [
            gpus
            for gpus in combinations(whole, needs.gpus)
            if good_enough(node, gpus, self.request)
            and (at_least <= 0 or speed(node.topology, gpus) >= at_least)
        ]

    def ways(
        self,
        state: State,
        positions: Iterable[int] | None = None,
        at_least: float = 0.0,
        alike: bool = False,
    ) -> Iterator[list[Piece]]:
        """Every way to place one replica, as its sets in rank order: on these nodes, no set slower than this."""
        within = [i for i in self.allowed if positions is None or i in positions]
        request, counts = self.request, dict(state.replicas)
        if request.spread_label is not None:
            full = {domain for domain, count in counts.items() if 0 < request.max_per_domain <= count}
            within = [i for i in within if self.domain(self.nodes[i]) not in full]
        for regions in self._regions(within):
            yield from self._fill([], state, regions, at_least, alike)

    def _regions(self, within: list[int]) -> list[list[int]]:
        """The nodes by what one replica must have in common: the GPU model, the domain that it spreads over."""
        request = self.request
        if request.stages == request.parts == 1:
            return [within]
        found: dict[tuple[str, str | None], list[int]] = {}
        for i in within:
            node = self.nodes[i]
            if request.parts == 1 or GPU_DOMAIN_LABEL in node.labels:
                found.setdefault((node.topology.model or "", self.domain(node)), []).append(i)
        return list(found.values())

    def _fill(
        self, pieces: list[Piece], state: State, within: list[int], at_least: float, alike: bool
    ) -> Iterator[list[Piece]]:
        parts = self.request.parts
        if len(pieces) == self.request.stages * parts:
            yield pieces
            return
        first_of_group = len(pieces) % parts == 0
        before = pieces[-parts if first_of_group else -1] if pieces else (-1, ())
        for i in within:
            if i < before[0] or not (first_of_group or self._same_fabric(pieces[-1][0], i)):
                continue
            for gpus in self.units(state, i, at_least, alike):
                if (i, gpus) > before:
                    after = self.take(state, [(i, gpus)])
                    yield from self._fill([*pieces, (i, gpus)], after, within, at_least, alike)

    def _same_fabric(self, one: int, other: int) -> bool:
        return self.nodes[one].labels[GPU_DOMAIN_LABEL] == self.nodes[other].labels[GPU_DOMAIN_LABEL]

    # -- all replicas ----------------------------------------------------------------------------

    def exists(self, state: State | None = None, replicas: int | None = None) -> bool:
        """Whether there is any placement of all replicas."""
        known: dict[tuple[object, int], bool] = {}

        def search(state: State, replicas: int) -> bool:
            key = (self._what_matters(state), replicas)
            if key not in known:
                known[key] = not replicas or any(
                    search(self.take(state, way), replicas - 1) for way in self.ways(state, alike=True)
                )
            return known[key]

        start = self.start() if state is None else state
        return search(start, len(self.request.replicas) if replicas is None else replicas)

    def _what_matters(self, state: State) -> object:
        """Equal for states that differ only in which of several like GPUs are left."""
        if self.request.needs.floor:
            return state
        left = [
            (sorted(rest for _, rest in one.rests), one.cpu_milli, one.memory_bytes) for one in state.left
        ]
        return str((left, state.replicas))

    # -- the best for one replica ------------------------------------------------------------------

    def fastest(self, state: State, positions: Iterable[int] | None = None) -> float | None:
        """How fast the slowest set of a replica can be on these nodes; ``None`` if there is no room for it."""
        chosen = None if positions is None else list(positions)
        speeds = {
            speed(self.nodes[i].topology, gpus)
            for i in self.allowed
            for gpus in self.units(state, i, 0.0, False)
        }
        return next((s for s in sorted(speeds, reverse=True) if self.possible(state, chosen, s)), None)

    def possible(self, state: State, positions: Iterable[int] | None, at_least: float) -> bool:
        """Whether a replica has room on these nodes with no set slower than this."""
        return next(self.ways(state, positions, at_least, alike=True), None) is not None

    def level(self, positions: Iterable[int]) -> int:
        """How near nodes are to each other: -1 on one node, 0 in the narrowest region."""
        nodes = [self.nodes[i] for i in set(positions)]
        if len(nodes) == 1:
            return -1
        for labels in range(len(self.near), 0, -1):
            named = self.near[:labels]
            values = {tuple(node.labels.get(label) for label in named) for node in nodes}
            if len(values) == 1 and named[-1] in nodes[0].labels:
                return len(self.near) - labels
        return len(self.near)

    def nearest(self, state: State, positions: Iterable[int], at_least: float) -> tuple[int, int]:
        """The narrowest level on which there is room for a replica, and on how few nodes."""
        among = [i for i in self.allowed if i in set(positions)]
        found = [
            (self.level(chosen), size)
            for size in range(1, self.request.stages * self.request.parts + 1)
            for chosen in combinations(among, size)
            if self.possible(state, chosen, at_least)
        ]
        return min(found)


def oracles(snapshot: Snapshot, request: Request) -> Iterator[Oracle]:
    """All ways in which a request may be placed: in how many pieces, and, where GPUs are named, on which node."""
    for cut in cuts(snapshot, request):
        if not cut.needs.named:
            yield Oracle(snapshot, cut)
            continue
        homes = {node_id for node_id, count in cut.standing.items() if count}
        for i, node in enumerate(snapshot.nodes):
            if not homes or node.id in homes:
                yield Oracle(snapshot, cut, i)


def will_do(profile: str | None, needs: Needs) -> bool:
    """Whether a slot is what is asked for: a MIG instance of a profile, or of any that is known; or a GPU."""
    if needs.profile == ANY_PROFILE:
        return profile not in (None, "?")
    return profile == (needs.profile or None)


def has_named(node: Node, needs: Needs) -> bool:
    """Whether a node has all GPUs that are named, each as it is asked for."""
    slots: dict[int | str, int] = {gpu: gpu for gpu in range(len(node.topology))}
    slots |= {uuid: gpu for gpu, uuid in node.uuids.items()}
    return all(name in slots and will_do(node.slots.get(slots[name]), needs) for name in needs.named)


def may_use(node: Node, request: Request) -> bool:
    """Whether a request for GPUs may go to a node, if there is room."""
    least = request.compute_capability
    return (
        len(node.topology) > 0
        and node.problem is None
        and (request.gpu_nodes is None or is_named(node, request.gpu_nodes))
        and all(fulfils(dict(node.labels), key, condition) for key, condition in request.labels.items())
        and (not request.accelerators or bool(set(request.accelerators) & set(node.accelerators)))
        and (
            least is None or (node.compute_capability is not None and tuple(node.compute_capability) >= least)
        )
        and may_be_beside(node, request)
        and has_named(node, request.needs)
        and (request.spread_label is None or request.spread_label in node.labels)
    )


def may_be_beside(node: Node, request: Request) -> bool:
    """Whether a node has the deployments that a request asks to be near, and none that it is kept apart from."""
    apart = {*request.apart_from, *request.kept_away_by}
    return not apart & set(node.deployments) and set(request.near_to) <= set(node.deployments)


def may_use_cpus(node: Node, request: Request) -> bool:
    """Whether a CPU replica may go to a node, if there is room: whatever is asked of GPUs."""
    return (
        node.problem is None
        and (request.cpu_nodes is None or is_named(node, request.cpu_nodes))
        and all(fulfils(dict(node.labels), key, condition) for key, condition in request.labels.items())
        and may_be_beside(node, request)
        and (request.spread_label is None or request.spread_label in node.labels)
    )


def is_named(node: Node, names: Iterable[str]) -> bool:
    """Whether a node is among those named, by id, name or address."""
    return not {node.id, node.name, node.address}.isdisjoint(names)


def good_enough(node: Node, gpus: Gpus, request: Request) -> bool:
    """Whether a set meets the floors."""
    needs = request.needs
    if needs.within is not Within.NODE:
        mask = sum(1 << gpu for gpu in gpus)
        if node.shape.best(mask, len(gpus), needs.within) is None:
            return False
    return len(gpus) < 2 or speed(node.topology, gpus) >= needs.min_bandwidth_gb_per_s


def cuts(snapshot: Snapshot, request: Request) -> list[Request]:
    """The ways in which a request may be made of sets, the most wanted first.

    As it is, unless it is larger than each node that it may go to. Then in equal pieces, the largest first: inside an
    NVLink domain, then, if it is divisible, as stages. They have two GPUs or more, but where no node has two; pieces
    of one GPU meet no floor, but that an NVLink domain keeps them on NVLink.
    """
    needs = request.needs
    usable = [node for node in snapshot.nodes if may_use(node, request)]
    largest = max((len(node.topology) - len(node.slots) for node in usable), default=0)
    if not needs.whole or needs.gpus <= largest:
        return [request]
    sizes = [size for size in range(largest, 0, -1) if needs.gpus % size == 0 and (size > 1 or largest == 1)]
    on_nvlink = needs.within in (Within.NODE, Within.NVLINK) and needs.min_bandwidth_gb_per_s <= 0

    def cut(size: int) -> Request:
        pieces = needs.gpus // size
        return replace(
            request,
            needs=needs._replace(gpus=size),
            cpu_milli=request.cpu_milli // pieces,
            memory_bytes=request.memory_bytes // pieces,
        )

    found = [replace(cut(size), parts=needs.gpus // size) for size in sizes if size > 1 or on_nvlink]
    if request.divisible:
        found += [
            replace(cut(size), stages=needs.gpus // size) for size in sizes if size > 1 or not needs.floor
        ]
    return found


def pieces_of(snapshot: Snapshot, parts: Sequence[PlannedReplica], size: int) -> list[Piece]:
    """The sets of one replica in rank order, as a plan says them. Checks that its ranks are just those it has."""
    positions = {node.id: i for i, node in enumerate(snapshot.nodes)}
    if len(parts) == 1 and not parts[0].ranks:
        return [(positions[parts[0].node_id], parts[0].gpus)]
    at: dict[int, Piece] = {}
    for part in parts:
        assert len(part.ranks) == len(part.gpus)
        assert list(part.ranks) == sorted(set(part.ranks))
        for rank, gpu in zip(part.ranks, part.gpus, strict=True):
            assert rank not in at, "a rank is there twice"
            at[rank] = positions[part.node_id], (gpu,)
    assert sorted(at) == list(range(len(at)))
    pieces = []
    for first in range(0, len(at), size):
        ranks = range(first, first + size)
        [position] = {at[rank][0] for rank in ranks}
        pieces.append((position, tuple(gpu for rank in ranks for gpu in at[rank][1])))
    return pieces


# -- remote replicas -------------------------------------------------------------------------------


class Remote:
    """All placements of a request for egress units. The state is node and resource -> units left."""

    def __init__(self, snapshot: Snapshot, request: Request) -> None:
        self.nodes, self.request = snapshot.nodes, request
        self.resources = (f"egress_{request.provider}", "egress")

    def start(self) -> dict[tuple[int, str], int]:
        """What may be used, as it is."""
        return {
            (i, resource): node.egress[resource]
            for i, node in enumerate(self.nodes)
            for resource in self.resources
            if resource in node.egress
            and node.problem is None
            and may_be_beside(node, self.request)
            and (self.request.egress_nodes is None or is_named(node, self.request.egress_nodes))
        }

    def exists(self) -> bool:
        """Whether there is any placement of all replicas."""
        room = sum(units // self.request.egress for units in self.start().values())
        return room >= len(self.request.replicas)


# -- CPU replicas ----------------------------------------------------------------------------------

Amounts = dict[int, tuple[int, int]]
"""Position of a node -> its CPUs (thousandths) and its memory that are left."""


class OnCpus:
    """All placements of a request for CPUs alone."""

    def __init__(self, snapshot: Snapshot, request: Request) -> None:
        self.nodes, self.request = snapshot.nodes, request

    def start(self) -> Amounts:
        """What may be used, as it is."""
        return {
            i: (node.cpu_milli, node.memory_bytes)
            for i, node in enumerate(self.nodes)
            if may_use_cpus(node, self.request)
        }

    def domains(self) -> Counter[str]:
        """How many replicas stand, by value of the label that the deployment spreads over."""
        counts: Counter[str] = Counter()
        for i, node in enumerate(self.nodes):
            counts[self.domain(i)] += self.request.standing.get(node.id, 0)
        return counts

    def domain(self, i: int) -> str:
        """The value of that label on a node."""
        return self.nodes[i].labels.get(self.request.spread_label or "", "")

    def ways(self, left: Amounts, domains: Counter[str]) -> list[int]:
        """The nodes on which one replica has room: so that each free GPU keeps what is to be spared for it."""
        request, found = self.request, []
        for i, (cpu_milli, memory_bytes) in left.items():
            node = self.nodes[i]
            free = len(node.free) + sum(profile != "?" for profile in node.instances.values())
            enough = cpu_milli - request.spared_milli * free >= request.cpu_milli
            full = 0 < request.max_per_domain <= domains[self.domain(i)]
            if enough and memory_bytes >= request.memory_bytes and not full:
                found.append(i)
        return found

    def take(self, left: Amounts, domains: Counter[str], i: int) -> tuple[Amounts, Counter[str]]:
        """What is left once one replica is on a node."""
        cpu_milli, memory_bytes = left[i]
        rest = cpu_milli - self.request.cpu_milli, memory_bytes - self.request.memory_bytes
        return {**left, i: rest}, domains + Counter([self.domain(i)])

    def exists(self) -> bool:
        """Whether there is any placement of all replicas."""

        def search(left: Amounts, domains: Counter[str], replicas: int) -> bool:
            ways = self.ways(left, domains) if replicas else []
            return not replicas or any(search(*self.take(left, domains, i), replicas - 1) for i in ways)

        return search(self.start(), self.domains(), len(self.request.replicas))
