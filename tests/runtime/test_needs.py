"""What a waiting set asks of a node that is not there yet, and what it cannot ask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from placement.core.needs import GIB, Needs, Within
from placement.core.request import Bundle, Lack, Request, Strategy
from placement.runtime.needs import Need, Way, by_type, needs_of, needs_of_group
from placement.wire.node_types import NodeType


def request(gpus: int = 4, **what: Any) -> Request:
    return Request("d", (0, 1), Needs(gpus), **what)


def the_need(wanted: Request, **more: Any) -> Need:
    needs = needs_of(wanted, (0,), **more)
    assert not isinstance(needs, str), needs
    (need,) = set(needs.values())
    return need


def test_a_replica_asks_for_each_of_its_sets_and_only_those_that_wait_ask() -> None:
    assert ["d:0:0", "d:1:0"] == list(needs_of(request(), (0, 1)))
    assert ["d:1:0", "d:1:1"] == list(needs_of(request(stages=2), (1,)))
    assert ["d:1:0", "d:1:1", "d:1:2", "d:1:3"] == list(needs_of(request(stages=2, parts=2), (1,)))


def test_a_set_is_one_bundle_since_a_bundle_lies_on_one_node() -> None:
    wanted = request(8, cpu_milli=16_000, memory_bytes=64 * GIB)
    assert (Way(((("GPU", 8.0), ("CPU", 16.0), ("memory", 64.0 * GIB)),)),) == the_need(wanted).ways
    assert {"GPU": 8.0, "CPU": 16.0, "memory": 64.0 * GIB} == the_need(wanted).ways[0].total
    assert "a node with 8 GPUs, 16 CPUs, 64 GiB of memory" == str(the_need(wanted))


def test_what_may_be_cut_is_asked_for_in_pieces_next_but_only_where_no_node_is_large_enough() -> None:
    wanted = request(8, divisible=True, cpu_milli=16_000, memory_bytes=64 * GIB)
    whole, pieces = the_need(wanted).ways
    assert (1, 0) == (len(whole.bundles), whole.smaller_than)
    assert (((("GPU", 1.0), ("CPU", 2.0), ("memory", 8.0 * GIB)),) * 8, 8) == (
        pieces.bundles,
        pieces.smaller_than,
    )
    assert whole.total == pieces.total
    assert 1 == len(the_need(request(1, divisible=True)).ways)


@pytest.mark.parametrize(
    ("needs", "gpus", "what"),
    [
        (Needs(1, share=250), 0.25, "0.25 of a GPU"),
        (Needs(1, memory_bytes=20 * GIB), 1.0, "20 GiB of a GPU"),  # how large a share that is, nobody knows
        (Needs(0, amounts=(500, 500)), 1.0, "2 x 0.5 of a GPU"),
        (Needs(0, amounts=(600, 600, 400)), 2.0, "2 x 0.6 of a GPU and 0.4 of a GPU"),
        (Needs(2, amounts=(250, 2000, 250)), 3.0, "2 GPUs and 2 x 0.25 of a GPU"),
        (Needs(0, amounts=(100, 200, 300, 400, 500)), 2.0, "5 shares of a GPU, 0.1 to 0.5"),
        (Needs(1, profile="1g.10gb"), 1.0, "a MIG instance 1g.10gb"),
        (Needs(8, within=Within.NVLINK, min_bandwidth_gb_per_s=300), 8.0, "8 GPUs"),
    ],
)
def test_shares_and_instances_and_sets_with_a_floor_ask_for_gpus(
    needs: Needs, gpus: float, what: str
) -> None:
    need = the_need(replace(request(), needs=needs))
    assert ({"GPU": gpus}, f"a node with {what}") == (need.ways[0].total, str(need))


def test_labels_and_accelerators_are_conditions_in_rays_syntax() -> None:
    wanted = request(
        labels={"zone": "!in(b,a)", "disk": "nvme", "tier": "!slow", "rack": "in(r1)"},
        accelerators=("A100-SXM4-80GB", "H100"),
    )
    assert {
        "zone": "!in(a, b)",
        "disk": "nvme",
        "tier": "!slow",
        "rack": "r1",
        # Ray's name for the product that was named, and what was written.
        "ray.io/accelerator-type": "in(A100, A100-SXM4-80GB, H100)",
    } == dict(the_need(wanted).labels)


@pytest.mark.parametrize(
    ("condition", "together"),
    [
        ("H100", "H100"),
        ("in(H100, B200)", "H100"),
        ("!A100", "H100"),
        ("!in(T4, L4)", "in(A100, H100)"),
    ],
)
def test_two_conditions_on_one_label_become_one(condition: str, together: str) -> None:
    wanted = request(labels={"ray.io/accelerator-type": condition}, accelerators=("A100", "H100"))
    assert (("ray.io/accelerator-type", together),) == the_need(wanted).labels


def test_a_domain_that_has_its_share_is_not_asked_for() -> None:
    wanted = request(spread_label="zone", max_per_domain=1, labels={"zone": "!c"})
    assert (("zone", "!in(a, b, c)"),) == the_need(wanted, full_domains=("a", "b")).labels
    assert (("zone", "!c"),) == the_need(wanted).labels
    assert (("zone", "!a"),) == the_need(request(spread_label="zone"), full_domains=("a",)).labels


def test_a_remote_replica_asks_for_its_providers_resource_and_then_for_the_general_one() -> None:
    wanted = Request("r", (0,), provider="openai", egress=16, accelerators=("H100",), labels={"zone": "a"})
    need = the_need(wanted)
    assert [{"egress_openai": 16.0}, {"egress": 16.0}] == [way.total for way in need.ways]
    assert (("zone", "a"),) == need.labels, "accelerators are no concern of an egress node"


def test_a_cpu_replica_asks_for_cpus_and_memory_on_any_node() -> None:
    wanted = Request(
        "c", (0, 1), cpu_milli=2500, memory_bytes=GIB, accelerators=("H100",), labels={"zone": "a"}
    )
    needs = needs_of(wanted, (0, 1))
    assert isinstance(needs, dict)
    assert list(needs) == ["c:0:0", "c:1:0"]
    assert the_need(wanted).ways == (Way(((("CPU", 2.5), ("memory", float(GIB))),)),)
    assert str(the_need(wanted)) == "a node with 2.5 CPUs and 1 GiB of memory and zone a"


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        (request(gpu_nodes=("a",)), "constraints.gpu_nodes names existing nodes"),
        (Request("d", (0,), Needs(1, named=(2, "GPU-0001"))), "constraints.gpus names GPUs by UUID"),
        (
            Request("d", (0,), Needs(1, named=(2,)), standing={"n": 1}),
            "names GPUs of the node on which other replicas",
        ),
        (request(near_to=("other",)), "constraints.near_to"),
        (replace(request(), needs=Needs(1, free_memory_bytes=GIB)), "constraints.min_free_gpu_memory_gib"),
        (request(compute_capability=(9, 0)), "set constraints.accelerators as well"),
        (request(labels={"ray.io/node-id": "ab12"}), "ray.io/node-id names existing nodes"),
        (request(labels={"ray.io/accelerator-type": "T4"}, accelerators=("H100",)), "no node can meet"),
        (request(accelerators=("@",)), "no accelerator type for @"),
        (
            Request("r", (0,), provider="p", egress=1, egress_nodes=("a",)),
            "constraints.egress_nodes names existing nodes",
        ),
        (Request("c", (0,), cpu_milli=1000, cpu_nodes=("a",)), "constraints.cpu_nodes names existing nodes"),
    ],
)
def test_what_cannot_be_asked_is_told(wanted: Request, why: str) -> None:
    told = needs_of(wanted, (0,))
    assert isinstance(told, str)
    assert why in told


def test_a_capability_is_no_hindrance_where_the_accelerators_are_named() -> None:
    wanted = request(compute_capability=(9, 0), accelerators=("H100",))
    assert (("ray.io/accelerator-type", "H100"),) == the_need(wanted).labels


def test_a_need_knows_which_nodes_meet_its_conditions() -> None:
    need = the_need(request(labels={"zone": "in(a, b)", "tier": "!slow"}))
    assert need.met_by({"zone": "a"})
    assert not need.met_by({"zone": "a", "tier": "slow"})
    assert not need.met_by({})


A100 = NodeType("a100", {"GPU": 8.0}, {"ray.io/accelerator-type": "A100"}, 4)
A10G = NodeType("a10g", {"GPU": 4.0, "CPU": 48.0}, {"ray.io/accelerator-type": "A10G"}, 2)
OUT = NodeType("out", {"egress": 64.0}, {}, 1)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (request(8), "node type a100 (at most 4) would hold it"),
        (request(4), "node types a100 (at most 4), a10g (at most 2) would hold it"),
        (Request("d", (0,), Needs(8, min_bandwidth_gb_per_s=99.0)),
         "node type a100 (at most 4) would hold it, if its links reach the floor"),
        (request(4, accelerators=("A10G",)), "node type a10g (at most 2) would hold it"),
        (request(16), "no node type holds it (a100 has 8 of 16 GPUs; a10g has 4 of 16 GPUs; out has no GPU)"),
        (
            request(16, divisible=True),
            "node type a100 (at most 4) would hold it",
        ),
        (
            request(4, accelerators=("H100",)),
            "no node type holds it (a100 has label ray.io/accelerator-type A100; a10g has label "
            "ray.io/accelerator-type A10G; out promises no label ray.io/accelerator-type)",
        ),
        (request(4, cpu_milli=96_000, accelerators=("A10G",)), "no node type holds it (a100 has label"),
        (request(4, cpu_milli=96_000), "node type a100 (at most 4) would hold it"),  # how many CPUs Ray looks up
        (Request("d", (0,), cpu_milli=44_000), "node types a100 (at most 4), a10g (at most 2), out (at most 1) would"),
        (
            Request("d", (0,), cpu_milli=45_000, labels={"ray.io/accelerator-type": "A10G"}),
            "no node type holds it (a100 has label ray.io/accelerator-type A100; a10g has 44 of 45 CPUs; out promises",
        ),
        (Request("d", (0,), Needs(0), provider="openai", egress=64), "node type out (at most 1) would hold it"),
        (Request("d", (0,), Needs(0), provider="openai", egress=65), "no node type holds it (a100 has no egress"),
    ],
)  # fmt: skip
def test_the_type_that_would_do_is_named_or_what_each_lacks(wanted: Request, said: str) -> None:
    assert by_type(the_need(wanted), (A100, A10G, OUT)).startswith(said)
    assert by_type(the_need(wanted), ()) == ""


def test_of_many_types_the_first_few_are_named() -> None:
    many = [NodeType(f"t{number}", {"GPU": 1.0}, {}, 1) for number in range(6)]
    assert by_type(the_need(request(2)), many).endswith("t3 has 1 of 2 GPUs; and 2 more)")


def test_gpus_that_are_named_by_ordinal_are_asked_for_once_on_a_node_that_has_them() -> None:
    wanted = Request("d", (0, 1), Needs(1, named=(1, 3)), divisible=True, stages=2)
    needs = needs_of(wanted, (0, 1))
    assert isinstance(needs, dict)
    assert list(needs) == ["d:0:0"]
    assert (needs["d:0:0"].ways, str(needs["d:0:0"])) == ((Way(((("GPU", 4.0),),)),), "a node with 4 GPUs")


def test_custom_resources_are_asked_for_as_well() -> None:
    need = the_need(request(2, resources=(("nvlink-0", 20),)))
    assert (need.ways[0].total, str(need)) == (
        {"GPU": 2.0, "nvlink-0": 0.002},
        "a node with 2 GPUs, 0.002 nvlink-0",
    )


def test_shares_are_asked_for_as_ray_would_deal_them_or_apart() -> None:
    bundles = Bundle(0, share=600), Bundle(0, share=600), Bundle(1)
    needs = Needs(1, amounts=(600, 600, 1000))
    wanted = Request("d", (0,), needs, bundles=bundles, strategy=Strategy.PACK)
    together, apart = the_need(wanted).ways
    assert together.bundles == ((("GPU", 3.0),),), "two shares of 0.6 are no GPU and a fifth"
    assert apart.bundles == ((("GPU", 0.6),), (("GPU", 0.6),), (("GPU", 1.0),))


@pytest.mark.parametrize(
    ("strategy", "together"),
    [(Strategy.PACK, True), (Strategy.SPREAD, False), (Strategy.STRICT_SPREAD, False)],
)
def test_bundles_are_asked_for_apart_and_where_that_will_do_first_together(
    strategy: Strategy, together: bool
) -> None:
    bundles = Bundle(2, 2000), Bundle(1, 1000)
    request = Request("d", (0,), Needs(3), cpu_milli=3000, bundles=bundles, strategy=strategy)
    needs = needs_of(request, [0])
    assert isinstance(needs, dict)
    [need] = needs.values()
    apart = Way(((("GPU", 2), ("CPU", 2.0)), (("GPU", 1), ("CPU", 1.0))))
    assert need.ways == ((Way(((("GPU", 3.0), ("CPU", 3.0)),)), apart) if together else (apart,))


def lack(*nodes: tuple[tuple[Request, int], ...], **labels: str) -> Lack:
    return Lack("g", ("p", 1), nodes, tuple(labels.items()))


def asked(one: Lack) -> Any:
    [(key, need)] = needs_of_group([one]).items()
    assert "p:1:0" == key
    return need


def test_what_must_be_together_in_a_group_is_one_bundle_with_all_of_it() -> None:
    large = Request("p", (0, 1), Needs(2), cpu_milli=4000, labels={"zone": "in(a, b)"})
    small = Request("d", (0, 1), Needs(1), memory_bytes=GIB, labels={"zone": "!b"})
    need = asked(lack(((large, 1), (small, 3)), rack="r"))
    assert (Way(((("GPU", 5.0), ("CPU", 4.0), ("memory", 3.0 * GIB)),)),) == need.ways
    beside = "5 GPUs, 4 CPUs, 3 GiB of memory and rack r, zone a"
    assert f"a node with {beside} for replicas of 'g' that talk" == str(need)
    assert need != asked(replace(lack(((large, 1), (small, 3)), rack="r"), group="h"))


@pytest.mark.parametrize(
    ("needs", "count", "gpus"),
    [
        (Needs(1, share=250), 4, 1),
        (Needs(1, share=250), 5, 2),
        (Needs(1, share=600), 3, 3),
        (Needs(1, memory_bytes=GIB), 2, 2),  # the memory of a new GPU is not known
        (Needs(1, profile="1g.10gb"), 3, 3),
        (Needs(1, named=(5, 6)), 2, 7),
    ],
)
def test_shares_of_a_group_are_asked_for_as_whole_gpus(needs: Needs, count: int, gpus: int) -> None:
    need = asked(lack(((Request("d", (0,), needs), count),)))
    assert {"GPU": float(gpus)} == need.ways[0].total


def test_a_single_replica_of_a_group_is_asked_for_like_any_other() -> None:
    share = Request("p", (0, 1), Needs(1, share=250))
    assert the_need(share) == asked(lack(((share, 1),)))
    assert "a node with 0.25 of a GPU and rack r" == str(asked(lack(((share, 1),), rack="r")))


def test_what_labels_bind_is_asked_for_on_several_nodes_if_none_is_large_enough() -> None:
    train, roll = Request("p", (0,), Needs(8), stages=2), Request("d", (0,), Needs(4))
    need = asked(lack(((train, 1),), ((train, 1),), ((roll, 1),), rack="r"))
    apart = Way(((("GPU", 8.0),), (("GPU", 8.0),), (("GPU", 4.0),)), smaller_than=20)
    assert (Way(((("GPU", 20.0),),)), apart) == need.ways


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (Lack("g", ("p", 1), why="p/0 is on x"), "p/0 is on x"),
        (
            lack(((request(near_to=("x",)), 2),)),
            "constraints.near_to needs a node with another deployment on it",
        ),
        (
            lack(((request(labels={"rack": "!r"}), 2),), rack="r"),
            "no node can meet all conditions on its label rack",
        ),
        (
            lack(((request(labels={"ray.io/node-id": "n"}), 2),)),
            "the label ray.io/node-id names existing nodes",
        ),
    ],
)
def test_what_a_group_cannot_get_from_a_new_node_is_told(one: Lack, why: str) -> None:
    assert why == asked(one)
