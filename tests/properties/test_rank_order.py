"""What engines make of a replica's bundles, by their own rules: its tensor-parallel groups, or what was said of them.

Each rule takes the bundles of a placement group, (node, GPU) by index, and gives (node, GPU) by rank. They are those of
vLLM 0.21 to 0.33 (``v1/executor/ray_executor_v2.py``), slime (``ray/placement_group.py``), SkyRL
(``ResolvedPlacementGroup``), NeMo-RL (``distributed/virtual_cluster.py``) and Ray Train 2.60 (``worker_group.py``).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from placement import topologies
from placement.core.labels import GPU_DOMAIN_LABEL
from placement.core.needs import Needs
from placement.core.node import Node
from placement.core.score import score
from placement.core.snapshot import Snapshot
from placement.runtime.results import NodeAssignment, PlacementResult
from placement.wire.deployment import Deployment
from placement.wire.dry_run import plan_deployments
from placement.wire.plans import PlannedAssignment


class Place(NamedTuple):
    node: str
    gpu: int


class Host(NamedTuple):
    """A node as engines tell it from others. All of their orders differ from each other and from that of the names."""

    name: str
    id: str
    ip: str
    topo_rank: int


HOSTS = {
    host.id: host
    for host in (
        Host("a", "c0", "10.0.0.20", 4),
        Host("b", "a1", "10.0.0.100", 3),
        Host("c", "d2", "10.0.0.9", 1),
        Host("d", "b3", "10.0.0.3", 2),
    )
}


# -- the rules ---------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What an engine is given: its bundles by index, the environment, rank 0's node, and node -> NVLink domain."""

    bundles: list[Place]
    environment: dict[str, str]
    driver: str
    domains: dict[str, str]


def _by_local_rank(order: Sequence[Place]) -> list[Place]:
    """vLLM: all GPUs of a node are sorted, and the i-th of its workers there takes the i-th of them."""
    left: dict[str, list[int]] = {}
    for node, gpu in sorted(order):
        left.setdefault(node, []).append(gpu)
    return [Place(node, left[node].pop(0)) for node, _ in order]


def vllm(asked: Asked) -> list[Place]:
    """The driver's node first, then by node id; of a node by bundle index."""
    return _by_local_rank(sorted(asked.bundles, key=lambda at: (at.node != asked.driver, at.node)))


def vllm_with_its_environment(asked: Asked) -> list[Place]:
    indices = [int(index) for index in asked.environment["VLLM_RAY_BUNDLE_INDICES"].split(",")]
    assert sorted(indices) == list(range(len(asked.bundles))), "the world's size, and none twice"
    return _by_local_rank([asked.bundles[index] for index in indices])


def slime(asked: Asked) -> list[Place]:
    """By the numbers of the IP address, then by GPU."""
    return sorted(asked.bundles, key=lambda at: ([int(n) for n in HOSTS[at.node].ip.split(".")], at.gpu))


def skyrl(asked: Asked) -> list[Place]:
    return sorted(asked.bundles, key=lambda at: (at.node, at.gpu))


def nemo_rl(asked: Asked) -> list[Place]:
    """By NVLink domain, the one that has the lowest topological rank first, then by that of the node, then by GPU."""
    first: dict[str, int] = {}
    for node, _ in asked.bundles:
        domain, rank = asked.domains[node], HOSTS[node].topo_rank
        first[domain] = min(first.get(domain, rank), rank)
    return sorted(
        asked.bundles, key=lambda at: (first[asked.domains[at.node]], HOSTS[at.node].topo_rank, at.gpu)
    )


def train(asked: Asked) -> list[Place]:
    """Nodes in the order of their first workers, of which there is one for each bundle; of a node by GPU."""
    nodes = list(dict.fromkeys(node for node, _ in asked.bundles))
    return sorted(asked.bundles, key=lambda at: (nodes.index(at.node), at.gpu))


Engine = Callable[[Asked], list[Place]]
KEEP_THE_ORDER_OF_NODES: tuple[Engine, ...] = (vllm_with_its_environment, train)
SORT_NODES: tuple[Engine, ...] = (vllm, slime, skyrl, nemo_rl)


# -- what they are asked -----------------------------------------------------------------------------


def nodes_of(machine: str, count: int, dice: random.Random, most_busy: int) -> Iterator[Node]:
    shape = topologies.load(machine)
    for host in list(HOSTS.values())[:count]:
        whole = [gpu for gpu in range(len(shape)) if gpu not in topologies.facts(machine).slots]
        busy = dice.sample(whole, dice.randint(0, min(most_busy, len(whole) - 2)))
        yield Node(host.id, host.name, topology=shape, free=frozenset(whole) - set(busy))


def planned(snapshot: Snapshot, tensor: int, pipeline: int) -> list[PlannedAssignment]:
    """Where a replica would go; nothing if there is no room."""
    wanted = Deployment(name="d", model="m", tensor_parallel=tensor, pipeline_parallel=pipeline)
    [plan] = plan_deployments(snapshot, {}, [wanted])
    return plan.assignments


def cut(gpus: Sequence[Any], size: int) -> list[frozenset[Any]]:
    return [frozenset(gpus[i : i + size]) for i in range(0, len(gpus), size)]


def asked_of(parts: list[PlannedAssignment], domains: dict[str, str]) -> tuple[Asked, list[Place]]:
    """What an engine is given once this is placed, and (node, GPU) by rank as it is meant.

    Bundle i is made for rank i's node; of a node Ray gives the lowest bundle the lowest GPU.
    """
    bundles: dict[int, Place] = {}
    assignments = []
    meant: dict[int, Place] = {}
    for a in parts:
        ranks = a.ranks or list(range(len(a.gpus)))
        index_of = dict(zip(sorted(a.gpus), sorted(ranks), strict=True))
        bundles |= {index: Place(a.node, gpu) for gpu, index in index_of.items()}
        meant |= {rank: Place(a.node, gpu) for rank, gpu in zip(ranks, a.gpus, strict=True)}
        group: Any = SimpleNamespace()
        indices = [index_of[gpu] for gpu in a.gpus]
        assignments.append(NodeAssignment(0, a.node, a.gpus, group, indices, ranks=ranks))
    environment = PlacementResult("d", assignments).environment(0)
    asked = Asked([bundles[i] for i in range(len(bundles))], environment, meant[0].node, domains)
    return asked, [meant[rank] for rank in range(len(meant))]


def check(snapshot: Snapshot, tensor: int, pipeline: int) -> bool | None:
    """Compares what every engine does with what is meant and said.

    Returns:
        Whether a loss was said; ``None`` if there is no room.
    """
    parts = planned(snapshot, tensor, pipeline)
    if not parts:
        return None
    domains = {node.id: node.labels.get(GPU_DOMAIN_LABEL, node.id) for node in snapshot.nodes}
    asked, meant = asked_of(parts, domains)
    said = {a.node: a for a in parts}
    loses = any(a.sorted_bandwidth_gb_per_s != a.bandwidth_gb_per_s for a in parts)
    over_nodes = any(a.set_size not in (0, tensor) for a in parts)
    for engine in (*KEEP_THE_ORDER_OF_NODES, *SORT_NODES):
        ranks = engine(asked)
        assert sorted(ranks) == sorted(meant), engine.__name__
        for node, a in said.items():
            size = a.set_size or len(a.gpus)
            theirs = cut([gpu for at, gpu in ranks if at == node], size)
            topology = snapshot.node(node).topology
            reached = min(score(topology, gpus) for gpus in theirs)
            assert reached.known_gb_per_s == a.sorted_bandwidth_gb_per_s, (engine.__name__, a)
            if a.sorted_bandwidth_gb_per_s == a.bandwidth_gb_per_s:
                assert set(theirs) == set(cut(a.gpus, size)), (engine.__name__, a)
        if engine in KEEP_THE_ORDER_OF_NODES and not loses:
            assert ranks == meant, engine.__name__
        elif not over_nodes and not loses:
            assert set(cut(ranks, tensor)) == set(cut(meant, tensor)), engine.__name__
        elif engine is nemo_rl:
            groups = cut(ranks, tensor)
            assert all(len({domains[node] for node, _ in group}) == 1 for group in groups), parts
    return loses


# -- the contract ------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", topologies.names())
def test_engines_keep_the_groups_or_it_was_said_what_they_lose(machine: str) -> None:
    """On one node and over several, whatever is free."""
    dice = random.Random(machine)
    lost = Counter[bool | None]()
    size = len(topologies.load(machine))
    for nodes, (tensor, pipeline) in product((1, 2, 4), product((1, 2, 3, 4, 8), (1, 2, 3, 4))):
        for most_busy in (0, size // 2, size // 2):
            snapshot = Snapshot(nodes_of(machine, nodes, dice, most_busy))
            lost[check(snapshot, tensor, pipeline)] += 1
    assert lost[False]
    assert bool(lost[True]) == (machine in {"dgx-1p", "dgx-1v"}), lost


@pytest.mark.parametrize(("tensor", "pipeline"), [(8, 1), (8, 2), (16, 1), (12, 1), (4, 3), (2, 7)])
@pytest.mark.parametrize("racks", ["pqpq", "pqqp", "pppp"])
def test_so_it_is_with_groups_over_the_nodes_of_nvlink_domains(
    tensor: int, pipeline: int, racks: str
) -> None:
    snapshot = trays(racks)
    assert check(snapshot, tensor, pipeline) is (False if racks == "pppp" or tensor in (2, 4, 8) else None)


def trays(racks: str) -> Snapshot:
    shape = topologies.load("gb200-tray")
    return Snapshot(
        Node(host.id, host.name, topology=shape, free=frozenset(range(4)), labels={GPU_DOMAIN_LABEL: rack})
        for host, rack in zip(HOSTS.values(), racks, strict=True)
    )


def test_who_sorts_nodes_may_cut_groups_across_domains_and_the_environment_does_not() -> None:
    """As ``docs/rank-order.md`` says of those that know nothing of NVLink domains."""
    snapshot = trays("pqqp")
    domains = {node.id: node.labels[GPU_DOMAIN_LABEL] for node in snapshot.nodes}
    asked, _ = asked_of(planned(snapshot, 8, 2), domains)

    def within(ranks: list[Place]) -> bool:
        return all(len({domains[node] for node, _ in group}) == 1 for group in cut(ranks, 8))

    kept = {engine.__name__: within(engine(asked)) for engine in (*KEEP_THE_ORDER_OF_NODES, *SORT_NODES)}
    assert kept == {
        "vllm_with_its_environment": True, "train": True, "nemo_rl": True,
        "vllm": False, "slime": False, "skyrl": False,
    }  # fmt: skip


@pytest.mark.parametrize("machine", ["dgx-1p", "dgx-1v", "a100-pcie-8x", "dgx-2"])
def test_a_node_chooses_as_was_planned(machine: str) -> None:
    dice = random.Random(machine)
    for tensor, pipeline in product((2, 3, 4), repeat=2):
        [node] = nodes_of(machine, 1, dice, 3)
        part = next(iter(planned(Snapshot([node]), tensor, pipeline)), None)
        live = node.shape.several(node.free_mask(Needs(tensor)), Needs(tensor), pipeline)
        assert (part.gpus if part else []) == [gpu for gpus in live or () for gpu in gpus]
