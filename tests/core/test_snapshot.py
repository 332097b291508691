"""What a node offers, and the cluster as sets of nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement import topologies
from placement.core.mix import Kind, Mix
from placement.core.needs import GIB, WHOLE, Needs, Within
from placement.core.node import Choice, Node
from placement.core.offers import Offers
from placement.core.planner import plan
from placement.core.policy import Policy
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.shape import Offer
from placement.core.snapshot import Snapshot
from placement.core.topology import Topology

FOUR = Topology.unknown(4)
BRIDGED = topologies.load("a100-pcie-4x")

# -- one node ----------------------------------------------------------------------------------------

SHARED = Node("n", "n", topology=FOUR, free=frozenset({2, 3}), rests={0: 600, 1: 250})
MEMORY = replace(SHARED, gpu_memory_bytes=80 * GIB, free_memory={0: 10 * GIB, 1: 70 * GIB, 3: 70 * GIB})
SLOTS = {0: "1g.10gb", 1: "1g.10gb", 2: "3g.40gb"}
CUT_UP = Node(
    "m", "m", topology=FOUR, free=frozenset({3}), slots=SLOTS, instances={1: "1g.10gb", 2: "3g.40gb"},
    free_memory={1: 9 * GIB, 2: 30 * GIB, 3: 70 * GIB},
)  # fmt: skip


def unused(gib: int, **fields: object) -> Needs:
    return Needs(1, free_memory_bytes=gib * GIB, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "node", "needs", "expected"),
    [
        ("a share: where it leaves the least", SHARED, Needs(1, share=200), Choice((1,), 200, 50)),
        ("just so much is left", SHARED, Needs(1, share=250), Choice((1,), 250, 0)),
        ("the fullest has too little", SHARED, Needs(1, share=251), Choice((0,), 251, 349)),
        ("no shared GPU has so much: a whole one", SHARED, Needs(1, share=601), Choice((2,), 601, 399)),
        ("whole GPUs are not those that are shared", SHARED, Needs(2), Choice((2, 3), WHOLE, 0)),
        ("and not more than are free", SHARED, Needs(3), None),
        ("memory is a share", MEMORY, Needs(1, memory_bytes=20 * GIB), Choice((1,), 250, 0)),
        ("of a size that nobody knows it is none", SHARED, Needs(1, memory_bytes=GIB), None),
        ("free memory counts on a shared GPU", MEMORY, unused(70, share=200), Choice((1,), 200, 50)),
        ("and keeps it off", MEMORY, unused(11, share=300), Choice((3,), 300, 700)),
        ("a free GPU whose memory is unknown is passed over", MEMORY, unused(1), Choice((3,), WHOLE, 0)),
        ("too little is free anywhere", MEMORY, unused(71, share=300), None),
        ("an instance of that profile", CUT_UP, Needs(1, profile="1g.10gb"), Choice((1,), WHOLE, 0)),
        ("with the memory that is asked", CUT_UP, unused(30, profile="3g.40gb"), Choice((2,), WHOLE, 0)),
        ("or none", CUT_UP, unused(10, profile="1g.10gb"), None),
        ("a profile that it has not", CUT_UP, Needs(1, profile="7g.80gb"), None),
        ("a whole GPU beside instances", CUT_UP, Needs(1), Choice((3,), WHOLE, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)  # fmt: skip
def test_what_a_node_gives(case: str, node: Node, needs: Needs, expected: Choice | None) -> None:
    assert node.choose(needs) == expected
    assert node.best(needs) == (None if expected is None else expected.gpus)
    assert (node.offer(needs) is None) == (expected is None)


def test_of_equal_rests_a_gpu_without_a_replica_of_the_same_deployment_is_taken() -> None:
    equal = replace(SHARED, rests={0: 600, 1: 600})
    assert equal.choose(Needs(1, share=100)) == Choice((0,), 100, 500)
    assert equal.choose(Needs(1, share=100), crowded=(0,)) == Choice((1,), 100, 500)
    assert equal.choose(Needs(1, share=100), crowded=(0, 1)) == Choice((0,), 100, 500)
    fuller = replace(SHARED, rests={0: 500, 1: 600})
    assert fuller.choose(Needs(1, share=100), crowded=(0,)) == Choice((0,), 100, 400), "it would cost room"


@pytest.mark.parametrize(
    ("node", "needs", "expected"),
    [
        (SHARED, Needs(1, share=200), Offer(0, (-1, -1, -1), 50, 2)),  # less than any whole GPU costs
        (SHARED, Needs(1, share=700), Offer(0, (0, 0, 100), 300, 2)),
        (SHARED, Needs(2), Offer(-100, (0, 0, 100), 0, 2)),
        (CUT_UP, Needs(1, profile="1g.10gb"), Offer(0, (), 0, 2)),
        (CUT_UP, Needs(1), Offer(0, (0, 0, 0), 0, 1)),
    ],
)
def test_what_that_costs_others(node: Node, needs: Needs, expected: Offer) -> None:
    assert node.offer(needs) == expected


@pytest.mark.parametrize(
    ("node", "needs"),
    [
        (SHARED, Needs(1, share=200)),
        (SHARED, Needs(1, share=700)),
        (SHARED, Needs(2)),
        (CUT_UP, Needs(1, profile="3g.40gb")),
        (CUT_UP, Needs(1)),
    ],
)
def test_what_is_taken_and_given_back_leaves_the_node_as_it_was(node: Node, needs: Needs) -> None:
    taken = node.choose(needs)
    assert taken is not None
    after = node.after(taken)
    assert after != node
    assert after.before(taken.gpus, taken.share, needs.profile) == node


def test_a_share_is_taken_off_the_rest_of_its_gpu_and_of_no_other() -> None:
    after = SHARED.after(Choice((1,), 200, 50))
    assert (after.free, after.rests) == ({2, 3}, {0: 600, 1: 50})
    after = SHARED.after(Choice((3,), 700, 300))
    assert (after.free, after.rests) == ({2}, {0: 600, 1: 250, 3: 300})
    assert SHARED.after(Choice((), WHOLE, 0)) is SHARED
    after = CUT_UP.after(Choice((2,), WHOLE, 0))
    assert (after.free, after.instances) == ({3}, {1: "1g.10gb"})


def test_a_gpu_is_free_again_when_the_last_share_of_it_has_left() -> None:
    assert SHARED.before((0,), 300, "").rests == {0: 900, 1: 250}
    whole = SHARED.before((0,), 400, "")
    assert (whole.free, whole.rests) == ({0, 2, 3}, {1: 250})
    part = replace(SHARED, rests={}).before((0,), 400, "")
    assert (part.free, part.rests) == ({2, 3}, {0: 400})


def test_whole_gpus_and_profiles_are_those_of_the_machine_not_of_what_is_free() -> None:
    assert (SHARED.whole_gpus, SHARED.profiles) == (4, frozenset())
    assert (CUT_UP.whole_gpus, CUT_UP.profiles) == (1, {"1g.10gb", "3g.40gb"})
    unknown = replace(CUT_UP, slots={0: "?", 1: "1g.10gb"})
    assert (unknown.whole_gpus, unknown.profiles) == (2, {"1g.10gb"})


def test_what_is_lost_is_held_by_nobody_and_gives_nothing_back() -> None:
    assert SHARED.held == {0, 1}
    assert CUT_UP.held == {0}
    lost = replace(CUT_UP, slots={**SLOTS, 0: "?", 3: "?"}, free=frozenset())
    assert lost.held == frozenset()
    assert lost.emptied() is lost
    assert replace(lost, instances={1: "1g.10gb"}).held == {2}


def test_a_node_goes_by_id_name_and_address() -> None:
    node = Node("id", "name", "10.0.0.1")
    assert [node.named(name) for name in ("id", "name", "10.0.0.1", "", "i")] == [True] * 3 + [False] * 2


def test_the_resource_of_the_provider_goes_before_the_general_one() -> None:
    both = Node("e", "e", egress={"egress": 1, "egress_openai": 1})
    assert [both.egress_resource(one) for one in ("openai", "gemini")] == ["egress_openai", "egress"]
    assert Node("e", "e", egress={"egress_openai": 1}).egress_resource("gemini") is None


# -- policies ----------------------------------------------------------------------------------------


def nodes_of(policy: Policy, nodes: list[Node], replicas: int, needs: Needs, **fields: object) -> list[str]:
    request = Request("d", tuple(range(replicas)), needs, policy=policy, **fields)  # type: ignore[arg-type]
    outcome = plan(Snapshot(nodes), request)
    assert isinstance(outcome, Plan)
    return [replica.node_id for replica in outcome.replicas]


def gpus(name: str, free: int, machine: Topology = FOUR) -> Node:
    return Node(name, name, topology=machine, free=frozenset(range(free)))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy.TOPOLOGY, ["a", "b", "c", "b"]),  # a keeps a pair
        (Policy.PACK, ["b", "b", "a", "a"]),
        (Policy.SPREAD, ["a", "b", "c", "b"]),
        (Policy.ROUND_ROBIN, ["a", "b", "c", "a"]),
        (Policy.LEAST_LOADED, ["c", "a", "c", "b"]),
    ],
)
def test_the_order_of_nodes_by_policy(policy: Policy, expected: list[str]) -> None:
    assert nodes_of(policy, [gpus("a", 3), gpus("b", 2), gpus("c", 4)], 4, Needs(1)) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy.TOPOLOGY, "c-fast"),
        (Policy.FRAGMENTATION, "c-fast"),
        (Policy.PACK, "b-full"),
        (Policy.SPREAD, "c-fast"),
        (Policy.ROUND_ROBIN, "a-slow"),
        (Policy.LEAST_LOADED, "d-empty"),
    ],
)
def test_speed_counts_first_only_where_the_policy_says_so(policy: Policy, expected: str) -> None:
    nodes = [
        gpus("a-slow", 4, topologies.load("l40s-4x")),
        gpus("b-full", 2, topologies.load("l40s-4x")),
        gpus("c-fast", 4, BRIDGED),
        gpus("d-empty", 8, topologies.load("rtx-4090-8x")),
    ]
    assert nodes_of(policy, nodes, 1, Needs(2)) == [expected]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Policy.TOPOLOGY, "a"),
        (Policy.PACK, "a"),
        (Policy.SPREAD, "b"),
        (Policy.ROUND_ROBIN, "b"),
        (Policy.LEAST_LOADED, "b"),
    ],
)
def test_a_share_goes_where_others_miss_it_least_before_it_spreads(policy: Policy, expected: str) -> None:
    nodes = [replace(gpus("a", 2), rests={2: 300}), replace(gpus("b", 3), rests={3: 500})]
    assert nodes_of(policy, nodes, 1, Needs(1, share=300), standing={"a": 1}) == [expected]


def test_a_floor_on_bandwidth_excludes_what_is_slower_and_nothing_else() -> None:
    nodes = [gpus("a", 4, topologies.load("l40s-4x")), gpus("b", 2, BRIDGED)]
    snapshot = Snapshot(nodes)
    for floor, expected in ((0.0, 2), (3.75, 2), (3.76, 1), (230.4, 1), (230.5, 0)):
        offers = snapshot.offers(Needs(2, min_bandwidth_gb_per_s=floor), Policy.TOPOLOGY)
        assert (offers.best([1]) > 0) + (offers.best([2]) > 0) == expected, floor


# -- offers ------------------------------------------------------------------------------------------

FAST, SLOW = ((0,), (1,)), ((5,), (0,))
FAST_AND_DEAR = ((0,), (9,))


def test_the_best_offer_is_the_first_node_of_the_best_rank_that_is_wanted() -> None:
    offers = Offers({SLOW: 0b1000, FAST: 0b0110, FAST_AND_DEAR: 0b0001})
    assert offers.best([0b1111]) == 0b0010
    assert offers.best([0b1101]) == 0b0100
    assert offers.best([0b1001]) == 0b0001
    assert offers.best([0b1000]) == 0b1000
    assert offers.best([0b10000]) == offers.best([]) == 0
    assert offers.best([0b1001, 0b0110]) == 0b0001, "within equal speed the preference goes before the loss"
    assert offers.best([0b1000, 0b0110]) == 0b0010, "but speed before the preference"


def test_a_node_that_moves_is_found_under_its_new_rank_only() -> None:
    offers = Offers({FAST: 0b0011, SLOW: 0b0100})
    kept = offers.copy()
    offers.move(0b0001, FAST, SLOW)
    assert [offers.best([bit]) for bit in (1, 2, 4)] == [1, 2, 4]
    assert offers.best([0b0101]) == 0b0001
    offers.move(0b0010, FAST, None)
    assert (offers.best([0b0010]), offers.best([0b0111])) == (0, 0b0001)
    offers.move(0b0010, None, FAST_AND_DEAR)
    assert offers.best([0b0111]) == 0b0010
    offers.move(0b0010, FAST_AND_DEAR, FAST_AND_DEAR)
    assert offers.best([0b0111]) == 0b0010
    offers.move(0b1000, None, None)
    assert offers.best([0b1000]) == 0
    assert kept.best([0b0111]) == 0b0001, "a copy stays as it was"


# -- the cluster -------------------------------------------------------------------------------------


def labelled(name: str, **labels: str) -> Node:
    return Node(f"id-{name}", name, f"10.0.0.{name}", topology=FOUR, labels=labels)


CLUSTER = Snapshot(
    [
        labelled("1", rack="r1", host="h"), labelled("2", rack="r1"), labelled("3", rack="r2"), labelled("4"),
        Node("id-5", "5"), replace(labelled("6", rack="r2"), problem="is ill"),
    ],
    near=("rack", "host"),
)  # fmt: skip


def test_nodes_are_sets_by_name_label_and_use() -> None:
    assert [node.name for node in CLUSTER.nodes] == list("123456")
    assert CLUSTER.usable == 0b001111
    assert CLUSTER.domains("rack") == {"r1": 0b000011, "r2": 0b100100}
    assert CLUSTER.domains("nothing") == {}
    assert CLUSTER.named(["id-1", "3", "10.0.0.4", "nobody"]) == 0b001101
    assert [CLUSTER.bit(node_id) for node_id in ("id-1", "id-6", "id-7")] == [1, 32, 0]
    assert CLUSTER.at(0b100) is CLUSTER.node("id-3") is CLUSTER.nodes[2]
    assert CLUSTER.select([]) == 0
    many = Snapshot([Node(f"{i:02}", f"{i:02}") for i in range(17)])
    assert many.select(many.nodes) == (1 << 17) - 1
    assert many.select([many.nodes[8], many.nodes[16]]) == 1 << 8 | 1 << 16


def test_a_name_that_two_nodes_share_means_both() -> None:
    twins = Snapshot([Node("1", "same", "a"), Node("2", "same", "b"), Node("3", "other", "b")])
    assert (twins.named(["same"]), twins.named(["b"])) == (
        twins.bit("1") | twins.bit("2"),
        twins.bit("2") | twins.bit("3"),
    )


def test_regions_are_the_nodes_that_share_a_label_and_all_wider_ones() -> None:
    assert CLUSTER.regions == [(0, 0b000001), (1, 0b000011), (1, 0b100100), (2, 0b111111)]
    split = Snapshot(
        [labelled("1", rack="a", host="h"), labelled("2", rack="b", host="h")], near=("rack", "host")
    )
    assert split.regions == [(0, 0b01), (0, 0b10), (2, 0b11)], "one host name in two racks is two hosts"


def test_a_snapshot_that_changed_answers_as_one_made_anew() -> None:
    kinds = [Needs(1), Needs(2), Needs(1, share=300), Needs(2, Within.NVLINK)]
    before = Snapshot([gpus("a", 4, BRIDGED), gpus("b", 4), gpus("c", 1)], near=("rack",))
    asked = [(needs, policy) for needs in kinds for policy in Policy]
    for needs, policy in asked:
        before.offers(needs, policy)
    assert before.usable == 0b111
    nodes = [replace(before.node("a"), free=frozenset({1, 3})), replace(before.node("c"), free=frozenset())]
    after, anew = before.changed(nodes), Snapshot([*nodes, before.node("b")])
    for needs, policy in asked:
        for wanted in range(8):
            assert after.offers(needs, policy).best([wanted]) == anew.offers(needs, policy).best([wanted])
    assert (after.usable, after.near, after.nodes) == (anew.usable, ("rack",), anew.nodes)
    assert before.offers(Needs(1), Policy.PACK).best([0b100]) == 0b100, "the old one stays as it was"


# -- what is asked for -------------------------------------------------------------------------------


def test_the_mix_counts_sets_and_what_they_take_besides() -> None:
    request = Request(
        "d", (0, 1), Needs(4), stages=3, parts=2, cpu_milli=500, memory_bytes=7,
        labels={"b": "2", "a": "1"}, accelerators=("H100",), compute_capability=(9, 0), gpu_nodes=("n",),
    )  # fmt: skip
    kind = Kind(Needs(4), ("H100",), (9, 0), (("a", "1"), ("b", "2")), ("n",))
    once = Mix().plus(request)
    assert once.kinds == {kind: (12, 6000, 84)}
    twice = once.plus(Request("e", (0,), Needs(4))).plus(replace(request, deployment="other", replicas=(5,)))
    assert twice.kinds == {kind: (18, 9000, 126), Kind(Needs(4)): (1, 0, 0)}
    assert once.kinds == {kind: (12, 6000, 84)}, "the old one stays as it was"


@pytest.mark.parametrize("request_", [Request("d", (0,), provider="openai"), Request("d", (0,), Needs(0))])
def test_what_takes_no_gpus_is_not_in_the_mix(request_: Request) -> None:
    mix = Mix()
    assert mix.plus(request_) is mix
    assert mix.kinds == {}
