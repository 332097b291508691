"""The locks of the service are always taken in the same order; ``tests/conftest.py`` has all unit tests watch that."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from placement import topologies
from placement.core.snapshot import NEAR_LABELS
from placement.runtime import agents, groups, inventory
from placement.runtime.claims import Claim
from placement.runtime.discovery import NodeInfo
from placement.runtime.fleet import Fleet
from placement.runtime.observed import ObservedCluster
from placement.runtime.state import ServiceState
from placement.wire.deployment import Deployment
from tests import locks
from tests.locks import LockOrderError, WatchedLock

NODE = NodeInfo("n", "n", "n", gpu_count=8)


def made(line: str) -> WatchedLock:
    return WatchedLock(threading.RLock(), line)


def test_a_circle_is_noticed_though_nobody_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_after", {})
    first, second, third = map(made, ("a", "b", "c"))
    with first, second, first:
        pass
    with second, third:
        pass
    with third, pytest.raises(LockOrderError, match="c -> a -> b -> c"):
        first.acquire()
    assert third.acquire() and first.acquire(blocking=False), "who does not wait stops nobody"


def test_a_node_is_asked_and_planned_with_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking makes its actor, which is told what stands there; a plan wants to know what it answered meanwhile."""
    actor = SimpleNamespace(
        adopt=SimpleNamespace(remote=lambda *_: "adopted"), facts=SimpleNamespace(remote=lambda _: "asked")
    )
    ray = SimpleNamespace(
        get=lambda call, timeout: topologies.facts("dgx-1v"),
        wait=lambda calls, num_returns, timeout: (calls, []),
    )
    for module in (agents, inventory):
        monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(inventory.ledger, "save_facts", lambda *_: None)
    monkeypatch.setattr(groups, "available_resources", lambda: {"n": {"GPU": 8.0}})
    state = ServiceState(lambda nodes: cluster.touch(nodes))
    fleet = Fleet(lambda info: actor, state.holdings, "placement:t:")
    cluster = ObservedCluster(state, fleet, NEAR_LABELS)
    assert isinstance(state.lock, WatchedLock)
    fleet.inventory.refresh([NODE])
    cluster.read()
    with state.lock:
        state.claim(Claim(Deployment(name="d", model="m/m", runtime="vllm"), ()))
        [seen] = cluster.snapshot([NODE]).nodes
    assert len(seen.free) == 8
