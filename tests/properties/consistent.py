"""What holds of the service's memory after every step: each part of it says the same."""

from __future__ import annotations

import json
from typing import Any

from placement.core.lifecycle import State
from placement.core.snapshot import NEAR_LABELS
from placement.runtime import groups, records
from placement.runtime.controller import Controller
from placement.runtime.deployment_state import DeploymentState
from placement.runtime.view import ClusterView


def check_state(one: DeploymentState) -> None:
    """The parts of one deployment's state agree with each other."""
    assert {replica.generation for replica in one.replicas.values()} - {one.generation} == set(one.earlier)
    assert all(generation < one.generation for generation in one.earlier)
    assert one.outdated == sorted(i for i, r in one.replicas.items() if r.generation in one.earlier)
    for generation, declared in one.earlier.items():
        assert declared.shape() != one.deployment.shape(), f"{one.name}: generation {generation} is no other"
    for index, replica in one.replicas.items():
        assert all(part.replica_index == index for part in replica.parts)
        assert len({part.node for part in replica.parts}) == len(replica.parts)
        assert f":{one.name}:{index}:" in replica.order
    for index in one.missing():
        assert one.states[index] in (State.PENDING, State.LOST) or one.releasing
    assert all(one.reasons.values()), "a replica waits and does not say why"
    assert one.reasons or one.waiting_since is None, f"{one.name}: nothing waits, since {one.waiting_since}"


def check_indices(controller: Controller) -> None:
    """What is looked up by node, and what waits, is what the deployments say."""
    state = controller.state
    by_node: dict[str, dict[tuple[str, int], list[Any]]] = {}
    for name, one in state.deployments.items():
        assert one.name == name
        for index, replica in one.replicas.items():
            for part in replica.parts:
                by_node.setdefault(part.node, {}).setdefault((name, index), []).append(part)
    assert state._by_node == by_node
    assert not state._claims_on
    waiting = [
        one
        for one in state.all()
        if one.releasing or (one.unfinished() and not one.given_up and not one.is_lease)
    ]
    queue = state.queue()
    assert queue == [
        one.name for one in sorted(waiting, key=lambda one: (one.waiting_since or 0.0, one.name))
    ]
    for one in waiting:
        assert one.releasing or one.waiting_since is not None, f"{one.name} has no place in the queue"
    assert [one.name for one in state.temporary()] == [one.name for one in state.all() if one.ends_by_itself]
    apart = {
        one.name: keeps
        for one in state.all()
        if (keeps := [d for d in (one.deployment, *one.earlier.values()) if d.constraints and d.constraints.apart_from])
    }  # fmt: skip
    assert state._keeping_apart == apart


def check_ledger(controller: Controller, recorded: dict[str, dict[str, Any] | None]) -> None:
    """The ledger says what the state says, but for what could not be written."""
    for name, one in controller.state.deployments.items():
        if name in controller.actions.unwritten or one.releasing:
            continue
        content = recorded[name]
        assert content is not None
        expected = json.loads(json.dumps({"version": records.version_for(one), **records.to_record(one)}))
        if set(one.reasons.values()) == {"not tried since the service restarted"}:
            expected["waiting_since"] = content["waiting_since"]  # it died before it could say that it waits
        assert content == expected
        again = records.from_record(content)
        assert (again.deployment, again.generation, again.earlier) == (
            one.deployment, one.generation, one.earlier,
        )  # fmt: skip
        assert (again.outdated, again.missing(), again.owner) == (one.outdated, one.missing(), one.owner)


def check_snapshot(controller: Controller) -> None:
    """The snapshot that is kept up to date is the one that is made from scratch."""
    cluster, fleet = controller.cluster, controller.fleet
    cluster.read()
    with controller.state.lock:
        nodes = cluster.nodes()
        kept = cluster.snapshot(nodes)
        anew = ClusterView(
            NEAR_LABELS,
            hardware=fleet.inventory.hardware,
            tally=controller.state.tally,
            foreign=lambda node_id: fleet.foreign.get(node_id, frozenset()),
            lagging=fleet.lagging,
        )
        anew.update_available(groups.available_resources())
        anew.update_nodes(nodes, cluster.draining)
        fresh = anew.snapshot()
        assert [node.id for node in kept.nodes] == [node.id for node in fresh.nodes]
        for node in fresh.nodes:
            assert kept.node(node.id) == node
