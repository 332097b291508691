"""What waits, as Ray's own autoscaler hears it: on a cloud of loopback machines, from no GPU node."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from placement.core.needs import Needs
from placement.core.request import Request
from placement.runtime.asking import Asked, State
from placement.runtime.demand import Demand
from placement.runtime.groups import create_group, ready_or_removed, remove_group
from placement.runtime.needs import Need, needs_of
from tests.cloud.cloud import cloud, host_of
from tests.cloud.seen import coming, demanded, machines, open_groups
from tests.integration.conftest import settled

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def running() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="placement-") as folder, cloud(Path(folder)) as address:
        connection = {"_node_ip_address": host_of(address), "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address, namespace="test", **connection)
        try:
            yield address
        finally:
            ray.shutdown()


@ray.remote(num_cpus=0)
class Owner:
    """In whose process the demand is, as it is in the service's."""

    def __init__(self) -> None:
        self.demand = Demand("ask-")

    def want(self, needs: dict[str, Need | str], known: list[str]) -> None:
        self.demand.want(needs, known)

    def poll(self) -> dict[str, Asked]:
        return dict(self.demand.poll())

    def report(self) -> list[dict[str, Any]]:
        return self.demand.report()

    def withdraw(self) -> None:
        self.demand.withdraw()

    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def owner(running: str) -> Iterator[Any]:
    handle = Owner.options(lifetime="detached", name="owner").remote()
    yield handle
    # A group whose owner ends while Ray reserves it may stay for good: Ray's own, so that it does not happen here.
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(handle.want.remote({}, []))
        settled(lambda: ray.get(handle.poll.remote()) is None or not open_groups(), 20)
    ray.kill(handle)
    assert settled(lambda: not open_groups()), open_groups()
    # Whatever was on its way comes, finds that nobody wants it, and goes.
    assert settled(lambda: not machines() and not coming()), (machines(), coming())


def needs(name: str, gpus: int, replicas: int = 1, **limits: Any) -> dict[str, Need | str]:
    found = needs_of(Request(name, tuple(range(replicas)), Needs(gpus), **limits), range(replicas))
    assert not isinstance(found, str)
    return dict(found)


def told(owner: Any) -> dict[str, Asked]:
    return ray.get(owner.poll.remote(), timeout=30)


def until(owner: Any, condition: Callable[[dict[str, Asked]], Any], seconds: float = 60) -> dict[str, Asked]:
    """What is told once the condition holds."""
    assert settled(lambda: condition(told(owner)), seconds), ray.get(owner.report.remote())
    return told(owner)


def test_the_right_nodes_come_and_their_gpus_are_handed_over_and_they_go(owner: Any) -> None:
    wanted = needs("big", 8, replicas=2) | needs("small", 4, accelerators=("L40S",))
    ray.get(owner.want.remote(wanted, list(machines())))
    # There is one machine with 8 GPUs at most.
    found = until(
        owner,
        lambda now: (
            State.INFEASIBLE in {one.state for one in now.values()}
            and sum(len(one.nodes) for one in now.values()) == 2
        ),
    )
    refused = next(key for key, one in found.items() if one.state is State.INFEASIBLE)
    big = next(key for key in ("big:0:0", "big:1:0") if key != refused)
    assert refused.startswith("big:")
    assert "its maximum is reached" in found[refused].reason
    (node,), (other,) = found[big].nodes, found["small:0:0"].nodes
    assert {node: "gpu8", other: "gpu4"} == machines()
    assert ["CREATED", "CREATED"] == list(open_groups().values()), "held until their GPUs are known"

    ray.get(owner.want.remote(wanted, [node, other]))
    until(owner, lambda now: [now[big].state, now["small:0:0"].state] == [State.ARRIVED] * 2)
    # The exact placement follows at once: each GPU of the node, in bundles that name it.
    exact = create_group("exact", [{"GPU": 1.0}] * 8, [node] * 8)
    assert ready_or_removed(exact, 5.0)
    ray.get(owner.want.remote({refused: wanted[refused]}, [node, other]))
    assert {"exact": "CREATED"} == open_groups()
    assert {node: "gpu8", other: "gpu4"} == machines(), "nobody asked for more"
    remove_group(exact, ready=True)


def test_what_is_withdrawn_brings_nothing_more(owner: Any) -> None:
    ray.get(owner.want.remote(needs("d", 4, replicas=2), list(machines())))
    until(owner, lambda now: {one.state for one in now.values()} == {State.ASKED})
    assert settled(lambda: demanded() == 2)
    ray.get(owner.withdraw.remote())
    assert ({}, {}, 0) == (told(owner), open_groups(), demanded())
    assert settled(lambda: not machines() and not coming()), "what was on its way has gone again"


def test_nothing_is_asked_for_once_the_process_that_asked_was_killed(owner: Any) -> None:
    ray.get(owner.want.remote(needs("d", 2, accelerators=("B200",)), []))
    until(owner, lambda now: "the cloud refuses node type never" in now["d:0:0"].reason)
    assert 1 == demanded()
    os.kill(ray.get(owner.pid.remote()), signal.SIGKILL)
    assert settled(lambda: not open_groups() and not demanded()), open_groups()


def test_what_no_node_type_has_is_told_and_withdrawn_and_the_general_resource_is_tried(owner: Any) -> None:
    remote = needs_of(Request("r", (0,), provider="openai", egress=16), (0,))
    assert isinstance(remote, dict)
    ray.get(owner.want.remote(needs("d", 16) | remote, []))
    found = until(owner, lambda now: now["d:0:0"].state is State.INFEASIBLE and now["r:0:0"].nodes)
    assert "no node type of this cluster can hold a node with 16 GPUs" in found["d:0:0"].reason
    assert ["egress"] == list(machines().values())
    assert 1 == len(open_groups())


def test_nodes_without_the_label_that_their_type_promises_do_not_come_without_end(owner: Any) -> None:
    ray.get(owner.want.remote(needs("d", 1, labels={"placement/misnamed": "yes"}), []))
    found = until(owner, lambda now: now["d:0:0"].state is State.NOT_ASKED and now["d:0:0"].again, 90)
    assert "2 nodes joined without the labels that it asks for" == found["d:0:0"].reason
    assert ({}, 0) == (open_groups(), demanded())
