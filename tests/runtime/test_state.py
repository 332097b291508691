"""What is declared and what is there: changes, the index by node, and how it is written down and read again."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from placement import Deployment
from placement.core.lifecycle import IllegalTransition, State
from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.runtime import groups, ledger, records
from placement.runtime.claims import Claim
from placement.runtime.deployment_state import DeploymentState, held_replica, holding_of
from placement.runtime.orders import Holding
from placement.runtime.results import NodeAssignment
from placement.runtime.state import ServiceState
from placement.wire.runtime_config import RuntimeConfig, Serving


def group(number: int) -> Any:
    return SimpleNamespace(id=SimpleNamespace(hex=lambda: f"{number:036x}"), number=number)


def local(name: str = "d", **fields: Any) -> Deployment:
    return Deployment(name=name, model="m", runtime="vllm", **fields)


def on(node: str, index: int, *gpus: int, **fields: Any) -> NodeAssignment:
    return NodeAssignment(index, node, list(gpus), group(index), list(range(len(gpus))), **fields)


def holding(*deployments: DeploymentState) -> ServiceState:
    found = ServiceState()
    for one in deployments:
        found.put(one)
    return found


def placed(deployment: Deployment, *assignments: NodeAssignment) -> DeploymentState:
    found = DeploymentState(deployment)
    for index in sorted({one.replica_index for one in assignments}):
        parts = [one for one in assignments if one.replica_index == index]
        found = found.with_replica(index, f"order-{deployment.name}-{index}", parts)
    return found


def test_the_parts_of_a_replica_are_kept_in_the_order_of_their_ranks() -> None:
    second, first, other = on("m", 1, 0, 1, ranks=[2, 3]), on("n", 1, 4, 5, ranks=[0, 1]), on("n", 0, 7)
    one = placed(local(replicas=4), second, first, other)
    assert one.assignments() == [other, first, second]
    assert one.nodes() == {"n": 2}, "where a replica begins"
    assert one.missing() == [2, 3]
    assert [part.node for part in one.result().assignments] == ["n", "n", "m"]
    assert one.result().deployment == "d"


def test_a_change_is_another_state() -> None:
    before = placed(local(replicas=2), on("n", 0, 1)).pending({1: "too few"}, 5.0)
    after = before.with_replica(1, "order", [on("n", 1, 2)]).lost(0, False, "node n died")
    assert (before.missing(), before.reasons, before.waiting_since) == ([1], {1: "too few"}, 5.0)
    assert (after.missing(), after.reasons, after.states) == (
        [0], {0: "node n died"}, {0: State.LOST, 1: State.PLACED},
    )  # fmt: skip


def test_what_cannot_happen_to_a_replica_is_refused() -> None:
    one = placed(local(), on("n", 0, 1))
    with pytest.raises(IllegalTransition):
        one.lost(1, False, "there is none")
    with pytest.raises(IllegalTransition):
        one.lost(0, False, "gone").lost(0, False, "gone twice")
    assert one.without([0]).states == {0: State.PENDING}


def test_replicas_of_an_earlier_declaration_are_outdated_until_they_are_replaced_or_kept() -> None:
    one = placed(local(gpus=1, replicas=2), on("n", 0, 1), on("n", 1, 2))
    anew = one.declared(local(gpus=2, replicas=3))
    assert (anew.generation, anew.outdated, anew.unfinished()) == (2, [0, 1], [0, 1, 2])
    assert anew.placed_under(anew.replicas[0]) == one.deployment
    partly = anew.with_replica(0, "order", [on("n", 0, 3, 4)])
    assert (partly.outdated, partly.earlier) == ([1], {1: one.deployment})
    held = {part.replica_index: part.generation for part in partly.held().replicas}
    assert held == {0: 0, 1: 1}, "0 is the present one"
    kept = partly.kept([1])
    assert (kept.outdated, kept.earlier, kept.unfinished()) == ([], {}, [2])
    same = one.declared(local(gpus=1, replicas=2, budget={"usd_per_day": 1}))
    assert (same.generation, same.outdated, same.earlier) == (2, [], {}), "replicas are not concerned"


def test_who_waits_longest_comes_first_in_the_queue() -> None:
    first = DeploymentState(local("late")).pending({0: "too few"}, 9.0)
    second = DeploymentState(local("early")).pending({0: "too few"}, 3.0)
    held = holding(first, second, placed(local("placed"), on("n", 0, 1)))
    assert held.queue() == ["early", "late"]
    held.put(second.with_replica(0, "order", [on("n", 0, 2)]))
    assert held.queue() == ["late"]
    again = first.pending({0: "still too few"}, 20.0)
    assert again.waiting_since == 9.0, "another reason does not cost the place in the queue"


def test_a_record_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(ledger, "save", lambda *record: written.append(record))
    monkeypatch.setattr(groups, "group_from_hex", lambda text: group(int(text, 16)))
    whole = on(
        "n", 0, 4, 5, ranks=[0, 1], node_name="gpu-n", cpus_per_gpu=1.5, memory_bytes_per_gpu=7, ray_gpus=[0, 1],
        bandwidth_gb_per_s=230.4, weakest_link="NV12", ray_bandwidth_gb_per_s=19.92, ray_weakest_link="SYS",
        sorted_bandwidth_gb_per_s=9.96, set_size=1, affinities=[{"cpus": "0-3", "ports": ["mlx5_0:1"]}, {}],
    )  # fmt: skip
    part = on("n", 2, 3, share=0.25, mig="1g.10gb", cpus=2.5, memory_bytes=9)
    one = placed(local(replicas=4), whole, part)
    declared = one.declared(local(replicas=4, gpus=2))
    owner = {"kind": "job", "job": "02000000"}
    lasting = replace(
        declared.pending({1: "too few"}, 8.0), releasing=True, owner=owner, expires_at=7.0, given_up=True
    )
    records.save(lasting)
    [(name, record, version)] = written
    assert (name, record["releasing"], record["runtime"], version) == ("d", True, "vllm", 3)
    read = records.from_record(json.loads(json.dumps(record)))
    assert (read.deployment, read.generation, read.earlier) == (declared.deployment, 2, {1: one.deployment})
    for before, after in zip(one.assignments(), read.assignments(), strict=True):
        assert before.placement_group.number == after.placement_group.number
        assert {**vars(before), "placement_group": 0} == {**vars(after), "placement_group": 0}
    assert {i: replica.order for i, replica in read.replicas.items()} == {0: "order-d-0", 2: "order-d-2"}
    assert read.states == {0: State.PLACED, 1: State.PENDING, 2: State.PLACED, 3: State.PENDING}
    assert read.reasons == dict.fromkeys(range(4), "not tried since the service restarted")
    for field in ("releasing", "owner", "expires_at", "given_up", "waiting_since", "declared_at"):
        assert getattr(read, field) == getattr(lasting, field), field


def grouped(*gpus: float, **fields: Any) -> Deployment:
    bundles = [{"GPU": amount} for amount in gpus]
    return Deployment.recorded(
        {"name": "g", "model": "m", "runtime": "python", "owner": "caller"}
        | {"placement_group": {"bundles": bundles}}
        | fields
    )


@pytest.mark.parametrize(
    ("gpus", "held", "version"),
    [
        ((0.5, 2, 0.25), {"gpus": [0, 1, 2, 0], "shares": [0.5, 1.0, 1.0, 0.25]}, 4),
        ((0.5, 0.5), {"gpus": [0, 0], "share": 0.5}, 4),
        ((0.5,), {"gpus": [0], "share": 0.5}, 3),
        ((1, 1), {"gpus": [0, 1]}, 3),
    ],
)
def test_only_a_record_with_several_shares_asks_for_a_newer_service(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[float, ...], held: dict[str, Any], version: int
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(ledger.ray_internals, "kv_put", lambda key, value, namespace: written.append(value))
    monkeypatch.setattr(groups, "group_from_hex", lambda text: group(int(text, 16)))
    part = NodeAssignment(
        0, "n", placement_group=group(1), bundle_indices=[*range(len(held["gpus"]))], **held
    )
    one = placed(grouped(*gpus), part)
    records.save(one)
    [value] = written
    assert json.loads(value)["version"] == version
    record = ledger.read("g", value)
    assert record.content is not None
    [again] = records.from_record(record.content).assignments()
    assert (again.gpus, again.share, again.shares, again.taken) == (
        part.gpus,
        part.share,
        part.shares,
        part.taken,
    )


def test_claims_are_open_until_they_are_closed() -> None:
    held = ServiceState()
    first, second = (held.claim(Claim(local(), (PlannedReplica(i, "n", (i,)),))) for i in range(2))
    assert held.claims == [first, second]
    held.close([first])
    assert held.claims == [second]


def test_a_node_holds_what_stands_on_it() -> None:
    held = holding(
        placed(local("b"), on("n", 0, 1, share=0.25)),
        placed(local("a"), on("n", 0, 2, 3), on("m", 1, 2, 3), on("n", 2, egress_resource="egress", egress_units=2)),
    )  # fmt: skip
    assert held.names() == ("a", "b")
    assert held.holdings("n") == {
        "order-a-0": Holding.whole("a", (2, 3)),
        "order-b-0": Holding("b", {1: 250}),
    }
    assert (held.holdings("nowhere"), held.nodes()) == ({}, {"n", "m"})
    assert [(s.name, a.node) for s, a in held.assignments()] == [
        ("a", "n"), ("a", "m"), ("a", "n"), ("b", "n"),
    ]  # fmt: skip
    assert holding_of("a", on("n", 0, 1, share=0.333)) == Holding("a", {1: 333})
    several = on("n", 0, 5, 2, 5, shares=[0.333, 1.0, 0.666])
    assert holding_of("a", several) == Holding("a", {2: 1000, 5: 999})


def test_a_tally_counts_what_stands_and_what_is_about_to() -> None:
    remote = Deployment(
        name="r",
        model="gpt-4o",
        runtime="openai",
        serving=Serving(max_concurrent=3),
        runtime_config=RuntimeConfig.model_validate({"api_key": {"from_env": "K"}}),
    )
    egress = NodeAssignment(0, "n", [], group(9), [0], egress_resource="egress", egress_units=3)
    beside = {"cpus_per_gpu": 1.5, "memory_bytes_per_gpu": 7}
    held = holding(
        placed(local("a"), on("n", 0, 2, 3, **beside)),
        placed(local("s"), on("n", 0, 1, share=0.25), on("n", 1, 1, share=0.5)),
        placed(remote, egress),
        placed(local("e"), on("n", 0, cpus=2.0, memory_bytes=5)),
    )
    held.claim(
        Claim(local("c"), (PlannedReplica(0, "n", (3, 4), cpu_milli=500, memory_bytes=1), PlannedReplica(1, "m", (0,))))
    )  # fmt: skip
    held.claim(Claim(local("t"), (PlannedReplica(0, "n", (1,), share=100),)))
    held.claim(Claim(local("u"), (PlannedReplica(0, "m", (1, 2, 3), shares=(1000, 250, 500)),)))
    there, other = held.tally("n"), held.tally("m")
    assert (there.gpus, there.claimed_gpus) == ({1, 2, 3}, {4})
    assert there.shares == {1: 850}
    assert there.egress == {"egress": 3}
    assert set(there.serving) == {("openai", remote.key_fingerprint)}
    assert set(there.deployments) == {"a", "s", "r", "c", "t", "e"}
    assert (there.cpu_milli, there.memory_bytes) == (5500, 20)
    assert (other.gpus, other.claimed_gpus, other.shares) == (set(), {0, 1, 2, 3}, {2: 250, 3: 500})
    assert set(other.deployments) == {"c", "u"}


def test_an_assignment_in_the_terms_of_plans() -> None:
    whole = held_replica(
        on("n", 3, 4, 5, ranks=[2, 3], mig="", cpus_per_gpu=1.5, memory_bytes_per_gpu=7, node_name="x")
    )
    assert whole.planned() == PlannedReplica(3, "n", (4, 5), (2, 3), WHOLE, "", 3000, 14)
    share = held_replica(on("n", 0, 1, ranks=[0], share=0.25, mig="1g.10gb"))
    assert share.planned() == PlannedReplica(0, "n", (1,), (0,), 250, "1g.10gb")
    cpus = held_replica(NodeAssignment(1, "n", [], group(1), [0], ranks=[0], cpus=2.5, memory_bytes=7))
    assert cpus.planned() == PlannedReplica(1, "n", cpu_milli=2500, memory_bytes=7)
    mixed = held_replica(on("n", 0, 5, 2, 5, share=1.0, shares=[0.5, 1.0, 0.25], cpus_per_gpu=1))
    assert mixed.planned() == PlannedReplica(0, "n", (2, 5), (0, 1, 2), shares=(1000, 750), cpu_milli=3000)
    for gpus, shares in (((3, 3), (1000,)), ((3, 4), (500, 500))):
        halves = held_replica(on("n", 0, *gpus, share=0.5)).planned()
        assert halves == PlannedReplica(0, "n", tuple(sorted({*gpus})), (0, 1), shares=shares)
    egress = held_replica(
        NodeAssignment(1, "n", [], group(1), [0], ranks=[0], egress_resource="egress", egress_units=4)
    )
    assert egress.planned() == PlannedReplica(1, "n", egress_resource="egress", egress_units=4)
