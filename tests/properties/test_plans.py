"""Planned together or one by one, on a live snapshot or from a file: the same comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from placement import topologies
from placement.core.needs import WHOLE
from placement.core.node import Node
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology
from placement.errors import Unplaceable
from placement.wire.cluster import ClusterFile
from placement.wire.deployment import Deployment
from placement.wire.dry_run import plan_deployments, plan_in_order
from placement.wire.held import HeldDeployment
from placement.wire.plans import PlacementPlan
from tests.properties.cases import held_as

CPUS, UNITS = 6000, 8
MACHINES = (topologies.load("a100-pcie-4x"), Topology.unknown(4), topologies.load("l40s-4x"))


@dataclass
class World:
    """Nodes, and what stands on them; what a node has free is counted anew from that, each time."""

    size: int
    held: dict[str, HeldDeployment] = field(default_factory=dict)

    def snapshot(self) -> Snapshot:
        return Snapshot(map(self.node, range(self.size)))

    def node(self, number: int) -> Node:
        name, machine = f"n{number}", MACHINES[number % len(MACHINES)]
        here = [
            (held.declared(replica), replica)
            for held in self.held.values()
            for replica in held.replicas
            if replica.node == name
        ]
        rests = dict.fromkeys(range(len(machine)), WHOLE)
        for _, replica in here:
            for gpu, share in replica.taken.items():
                rests[gpu] -= share
        remote = [one for one in here if one[1].egress_resource]
        left = UNITS - sum(replica.egress_units for _, replica in remote)
        cpus = CPUS - sum(replica.cpu_milli for _, replica in here)
        assert min([*rests.values(), left, cpus]) >= 0, "something is held twice"
        return Node(
            id=name,
            name=name,
            topology=machine,
            free=frozenset(gpu for gpu, rest in rests.items() if rest == WHOLE),
            rests={gpu: rest for gpu, rest in rests.items() if 0 < rest < WHOLE},
            egress={"egress": left},
            cpu_milli=cpus,
            labels={"zone": "ab"[number % 2]},
            gpu_memory_bytes=80 << 30,
            deployments=Counter(deployment.name for deployment, _ in here),
            serving=Counter(deployment.calls or ("", "") for deployment, _ in remote),
        )

    def apply(self, wanted: Deployment, atomic: bool) -> PlacementPlan:
        """Carries out what is planned for one."""
        [plan] = plan_deployments(self.snapshot(), self.held, [wanted], atomic)
        self.held[wanted.name] = held_as(wanted, plan, self.held.get(wanted.name))
        return plan


NAMES = ("a", "b", "c", "d")
LOCAL: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"gpus": st.sampled_from((1, 2, 4, 0.5, 0.25))}),
    st.fixed_dictionaries({"gpu_memory_gib": st.sampled_from((20, 40))}),
    st.fixed_dictionaries({"cpus": st.sampled_from((0.5, 1, 2))}),
    st.fixed_dictionaries({"gpus": st.just(2), "min_bandwidth_gb_per_s": st.just(100)}),
    st.fixed_dictionaries(
        {"tensor_parallel": st.sampled_from((1, 2)), "pipeline_parallel": st.sampled_from((2, 3))}
    ),
)
REMOTE = st.fixed_dictionaries(
    {
        "runtime": st.just("openai"),
        "serving": st.fixed_dictionaries({"max_concurrent": st.sampled_from((2, 3))}),
        "runtime_config": st.fixed_dictionaries(
            {"api_key": st.sampled_from(({"from_env": "A"}, {"from_env": "B"}))}
        ),
    }
)
LAID_OUT = st.builds(
    lambda gpus, strategy: {
        "owner": "caller",
        "runtime": "python",
        "placement_group": {"bundles": [{"GPU": amount} for amount in gpus], "strategy": strategy},
    },
    st.lists(st.sampled_from((0.25, 0.5, 0.6, 1, 2)), min_size=1, max_size=4),
    st.sampled_from(("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")),
)
"""A caller's group: several shares, whole GPUs, or both."""
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "apart_from": st.lists(st.sampled_from(NAMES), max_size=2, unique=True),
        "near_to": st.lists(st.sampled_from(NAMES), min_size=1, max_size=1),
        "node_labels": st.sampled_from(({"zone": "a"}, {"zone": "b"})),
        "gpu_nodes": st.sampled_from((["n0", "n1"], ["n1", "n2"])),
        "cpu_nodes": st.just(["n0", "n2"]),
        "spread": st.just({"label": "zone", "max": 1}),
        "cpus_per_gpu": st.sampled_from((1, 2)),
        "egress_preference": st.just(["n1"]),
    },
)


@st.composite
def declared(draw: st.DrawFn) -> Deployment:
    name = draw(st.sampled_from(NAMES))
    limits: Mapping[str, Any] = draw(st.one_of(st.just({}), LIMITS))
    limits = {key: [one for one in value if one != name] if key in ("apart_from", "near_to") else value
              for key, value in limits.items()}  # fmt: skip
    if set(limits.get("apart_from", ())) & set(limits.get("near_to", ())):
        limits = {**limits, "near_to": []}
    policy = draw(st.sampled_from(("topology", "topology", "spread", "pack", "fragmentation")))
    fields = draw(st.one_of(LOCAL, LOCAL, REMOTE, LAID_OUT))
    replicas = draw(st.integers(1, 3))
    if "placement_group" in fields:
        limits, replicas = {}, 1
    return Deployment.model_validate(
        {"name": name, "model": "m", "replicas": replicas, "policy": policy, "constraints": limits, **fields}
    )


def text(plan: PlacementPlan) -> dict[str, Any]:
    return plan.to_dict()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(3, 4),
    st.lists(declared(), max_size=5),
    st.lists(declared(), min_size=1, max_size=4),
    st.booleans(),
)
def test_together_or_one_by_one_is_the_same(
    size: int, before: list[Deployment], wanted: list[Deployment], atomic: bool
) -> None:
    world = World(size)
    for one in before:
        try:
            world.apply(one, atomic)
        except Unplaceable:
            continue
    file = ClusterFile.model_validate_json(
        ClusterFile.of(world.snapshot(), world.held.values()).model_dump_json()
    )
    try:
        together = plan_in_order(world.snapshot(), world.held, wanted, atomic)
    except Unplaceable as refusal:
        assert atomic
        try:
            for one in wanted:
                world.apply(one, atomic)
        except Unplaceable as other:
            assert str(other) == str(refusal) or any(one.constraints for one in wanted)
            return
        raise AssertionError("one by one it works") from refusal
    from_file = plan_in_order(file.snapshot(), file.held(), wanted, atomic)
    assert [(position, text(plan)) for position, plan in from_file] == [
        (position, text(plan)) for position, plan in together
    ]
    assert sorted(position for position, _ in together) == list(range(len(wanted)))
    for position, plan in together:
        assert text(world.apply(wanted[position], atomic)) == text(plan)
    for held in world.held.values():
        # What waits to be replaced stays where it was placed.
        current = [replica for replica in held.replicas if not replica.generation]
        limits, here = held.deployment.constraints, {replica.node for replica in current}
        for apart in limits.apart_from if limits else ():
            there = world.held[apart].replicas if apart in world.held else ()
            assert not here & {replica.node for replica in there}, (held.deployment.name, apart)
