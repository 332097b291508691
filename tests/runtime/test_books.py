"""What the service holds: what stands, what is claimed, and how it is written down and read again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from placement import Deployment
from placement.core.lifecycle import Event, IllegalTransition, State
from placement.core.replicas import PlannedReplica
from placement.core.score import WHOLE
from placement.runtime import groups, ledger
from placement.runtime.orders import Holding
from placement.runtime.results import NodeAssignment
from placement.runtime.state import Books, Claim, Standing, held_replica, holding_of


def group(number: int) -> Any:
    return SimpleNamespace(id=SimpleNamespace(hex=lambda: f"{number:036x}"), number=number)


def local(name: str = "d", **fields: Any) -> Deployment:
    return Deployment(name=name, model="m", runtime="vllm", **fields)


def on(node: str, index: int, *gpus: int, **fields: Any) -> NodeAssignment:
    return NodeAssignment(index, node, list(gpus), group(index), list(range(len(gpus))), **fields)


def books(*standing: Standing) -> Books:
    found = Books()
    found.standing = {one.deployment.name: one for one in standing}
    return found


def placed(deployment: Deployment, *assignments: NodeAssignment) -> Standing:
    standing = Standing(deployment)
    for one in assignments:
        standing.add(f"order-{deployment.name}-{one.replica_index}", one)
        standing.states[one.replica_index] = State.PLACED
    return standing


def test_the_parts_of_a_replica_are_kept_in_the_order_of_their_ranks() -> None:
    second, first, other = on("m", 1, 0, 1, ranks=[2, 3]), on("n", 1, 4, 5, ranks=[0, 1]), on("n", 0, 7)
    standing = placed(local(replicas=4), second, first, other)
    assert standing.assignments() == [other, first, second]
    assert standing.nodes() == {"n": 2}, "where a replica begins"
    assert standing.missing() == [2, 3]
    assert [one.node for one in standing.result().assignments] == ["n", "n", "m"]
    assert standing.result().deployment == "d"


def test_a_copy_changes_on_its_own() -> None:
    standing = placed(local(replicas=2), on("n", 0, 1))
    standing.states[1], standing.reasons[1] = State.PENDING, "too few"
    copy = standing.copy()
    assert (copy.replicas, copy.orders, copy.reasons) == (standing.replicas, {0: "order-d-0"}, {1: "too few"})
    copy.add("order", on("n", 1, 2))
    copy.reasons.clear()
    copy.happen(0, Event.LOST)
    assert (standing.missing(), standing.reasons) == ([1], {1: "too few"})
    assert (standing.states[0], copy.states[0]) == (State.PLACED, State.LOST)


def test_what_happens_to_a_replica_is_noted_or_refused() -> None:
    standing = placed(local(), on("n", 0, 1))
    with pytest.raises(IllegalTransition):
        standing.happen(0, Event.RESERVED)
    assert standing.states == {0: State.PLACED}
    assert standing.happen(0, Event.RELEASE) is State.RELEASING
    assert standing.happen(0, Event.RELEASED) is None
    assert standing.states == {}
    assert standing.happen(5, Event.RESERVE) is State.RESERVING


def test_a_record_is_read_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    monkeypatch.setattr(ledger, "save", lambda *record: written.append(record))
    monkeypatch.setattr(groups, "group_from_hex", lambda text: group(int(text, 16)))
    whole = on(
        "n", 0, 4, 5, ranks=[0, 1], node_name="gpu-n", cpus_per_gpu=1.5, memory_bytes_per_gpu=7, ray_gpus=[0, 1],
        bandwidth_gb_per_s=230.4, weakest_link="NV12", ray_bandwidth_gb_per_s=19.92, ray_weakest_link="SYS",
        set_size=1,
    )  # fmt: skip
    part = on("n", 2, 3, share=0.25, mig="1g.10gb")
    standing = placed(local(replicas=4), whole, part)
    standing.releasing = True
    standing.save()
    [(name, declared, replicas, releasing, runtime)] = written
    assert (name, releasing, runtime) == ("d", True, "vllm")
    record = {"deployment": declared, "replicas": replicas, "releasing": releasing, "runtime": runtime}
    read = Standing.load(record)
    assert (read.deployment, read.releasing) == (standing.deployment, True)
    for before, after in zip(standing.assignments(), read.assignments(), strict=True):
        assert before.placement_group.number == after.placement_group.number
        assert {**vars(before), "placement_group": 0} == {**vars(after), "placement_group": 0}
    assert read.orders == {0: "order-d-0", 2: "order-d-2"}
    assert read.states == {0: State.PLACED, 1: State.PENDING, 2: State.PLACED, 3: State.PENDING}
    assert read.reasons == dict.fromkeys((1, 3), "not tried since the service restarted")


def test_claims_are_open_until_they_are_settled() -> None:
    held = Books()
    first, second = (held.claim(Claim(local(), (PlannedReplica(i, "n", (i,)),))) for i in range(2))
    assert held.claims == [first, second]
    held.settle([first])
    assert held.claims == [second]


def test_a_node_holds_what_stands_on_it() -> None:
    held = books(
        placed(local("b"), on("n", 0, 1, share=0.25)),
        placed(local("a"), on("n", 0, 2, 3), on("m", 1, 2, 3), on("n", 2, egress_resource="egress", egress_units=2)),
    )  # fmt: skip
    assert held.names() == ("a", "b")
    assert held.holdings("n") == {"order-a-0": Holding("a", (2, 3)), "order-b-0": Holding("b", (1,), 250)}
    assert held.holdings("nowhere") == {}
    assert [(s.deployment.name, a.node) for s, a in held.assignments()] == [
        ("a", "n"), ("a", "m"), ("a", "n"), ("b", "n"),
    ]  # fmt: skip
    assert holding_of("a", on("n", 0, 1, share=0.333)) == Holding("a", (1,), 333)


def test_a_tally_counts_what_stands_and_what_is_about_to() -> None:
    remote = Deployment(
        name="r",
        model="gpt-4o",
        runtime="openai",
        serving={"max_concurrent": 3},
        runtime_config={"api_key": {"from_env": "K"}},
    )
    egress = NodeAssignment(0, "n", [], group(9), [0], egress_resource="egress", egress_units=3)
    beside = {"cpus_per_gpu": 1.5, "memory_bytes_per_gpu": 7}
    held = books(
        placed(local("a"), on("n", 0, 2, 3, **beside)),
        placed(local("s"), on("n", 0, 1, share=0.25), on("n", 1, 1, share=0.5)),
        placed(remote, egress),
    )
    held.claim(
        Claim(local("c"), (PlannedReplica(0, "n", (3, 4), cpu_milli=500, memory_bytes=1), PlannedReplica(1, "m", (0,))))
    )  # fmt: skip
    held.claim(Claim(local("t"), (PlannedReplica(0, "n", (1,), share=100),)))
    tallies = held.tallies()
    there, other = tallies["n"], tallies["m"]
    assert (there.gpus, there.claimed_gpus) == ({1, 2, 3}, {4})
    assert there.shares == {1: 850}
    assert there.egress == {"egress": 3}
    assert set(there.serving) == {("openai", remote.key_fingerprint)}
    assert set(there.deployments) == {"a", "s", "r", "c", "t"}
    assert (there.cpu_milli, there.memory_bytes) == (3500, 15)
    assert (other.gpus, other.claimed_gpus, set(other.deployments)) == (set(), {0}, {"c"})


def test_an_assignment_in_the_terms_of_plans() -> None:
    whole = held_replica(
        on("n", 3, 4, 5, ranks=[2, 3], mig="", cpus_per_gpu=1.5, memory_bytes_per_gpu=7, node_name="x")
    )
    assert whole.planned() == PlannedReplica(3, "n", (4, 5), (2, 3), WHOLE, "", 3000, 14)
    share = held_replica(on("n", 0, 1, ranks=[0], share=0.25, mig="1g.10gb"))
    assert share.planned() == PlannedReplica(0, "n", (1,), (0,), 250, "1g.10gb")
    egress = held_replica(
        NodeAssignment(1, "n", [], group(1), [0], ranks=[0], egress_resource="egress", egress_units=4)
    )
    assert egress.planned() == PlannedReplica(1, "n", egress_resource="egress", egress_units=4)
