"""``placement.serve.install``: the groups that Ray Serve makes lie on exact GPUs, in unchanged user code."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray

from examples import serve_app
from placement import placement_group
from placement.runtime.embedded import EmbeddedCluster
from tests.engines import serving
from tests.engines.serving import (
    NODES,
    PATIENT,
    QUICK,
    Replica,
    Unchanged,
    controller,
    controllers_log,
    groups_of_serve,
    known,
    names_of_nodes,
    replicas,
    serve,
    serve_on,
    waiting,
)
from tests.integration.conftest import settled
from tests.integration.test_place import another_user

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    with serve_on(NODES, PATIENT) as running:
        yield running


@pytest.fixture
def neighbours(cluster: EmbeddedCluster) -> Iterator[None]:
    """Other Ray users have GPU 0 of each node. After the test, nothing else is held, and nothing is known to be."""
    with serving.neighbours():
        yield
    assert settled(lambda: not known()), known()


@serve.deployment(placement_group_bundles=[{"CPU": 0.1}] * 2, ray_actor_options={"num_cpus": 0.1}, **QUICK)
class Router:
    """It has no GPU."""

    def __call__(self) -> str:
        return "here"


def run(version: str = "a", **options: Any) -> Any:
    return serving.run(Unchanged, version, **options)


def kill_controller() -> None:
    """Kills Serve's controller, and waits for the next one."""
    pid = ray.get(controller().get_pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert settled(lambda: ray.get(controller().get_pid.remote()) != pid)


def gpus_by_node(found: set[Replica]) -> dict[str, list[tuple[int, ...]]]:
    name = names_of_nodes()
    by_node: dict[str, list[tuple[int, ...]]] = {}
    for one in found:
        [node] = set(one.nodes)
        by_node.setdefault(name(node), []).append(one.gpus)
    return by_node


@pytest.mark.smoke
def test_the_service_is_started_and_a_replica_gets_the_best_pair(neighbours: None) -> None:
    [replica] = replicas(run(), 1, "a")
    assert replica.gpus == (2, 3), "Ray alone would give 1 and 2"
    [name] = groups_of_serve()
    assert name.startswith("SERVE_REPLICA::app#Unchanged#"), "Serve finds its groups by their names"
    [deployment] = known()
    assert deployment.startswith("app-Unchanged-")
    serve.delete("app")
    assert settled(lambda: not groups_of_serve() and not known())


def test_scaling_up_and_down(neighbours: None) -> None:
    [first] = replicas(run(), 1, "a")
    two = replicas(run(num_replicas=2), 2, "a")
    assert first in two
    assert gpus_by_node(two) == {"pcie": [(2, 3)], "pcie-b": [(2, 3)]}
    [left] = replicas(run(num_replicas=1), 1, "a")
    assert left in two
    assert settled(lambda: len(groups_of_serve()) == 1 and len(known()) == 1)


def test_a_rolling_update_with_room_has_the_new_replica_on_the_best_pair(neighbours: None) -> None:
    [old] = replicas(run("a"), 1, "a")
    [new] = replicas(run("b"), 1, "b")
    assert (old.gpus, new.gpus) == ((2, 3), (2, 3))
    assert settled(lambda: len(groups_of_serve()) == 1 and len(known()) == 1)


def test_a_rolling_update_without_room_waits_for_the_pairs_of_the_old_replicas(neighbours: None) -> None:
    both = {"pcie": [(2, 3)], "pcie-b": [(2, 3)]}
    assert gpus_by_node(replicas(run("a", num_replicas=2), 2, "a")) == both
    assert gpus_by_node(replicas(run("b", num_replicas=2), 2, "b")) == both
    assert settled(lambda: len(groups_of_serve()) == len(known()) == 2)


def test_a_replica_that_is_killed_comes_back_on_the_best_pair(neighbours: None) -> None:
    handle = run()
    [first] = replicas(handle, 1, "a")
    os.kill(first.pid, signal.SIGKILL)
    [second] = replicas(handle, 1, "a")
    assert second.pid != first.pid
    assert second.gpus == (2, 3)
    assert settled(lambda: len(groups_of_serve()) == 1 and len(known()) == 1)


def test_a_controller_that_is_killed_keeps_its_groups_and_goes_on_with_exact_ones(neighbours: None) -> None:
    [first] = replicas(run(), 1, "a")
    kill_controller()
    two = replicas(run(num_replicas=2), 2, "a")
    assert first in two
    assert gpus_by_node(two) == {"pcie": [(2, 3)], "pcie-b": [(2, 3)]}


def test_a_group_whose_replica_was_never_made_is_removed_by_serves_next_controller(neighbours: None) -> None:
    name = "SERVE_REPLICA::app#Gone#abcdefgh"
    placement_group([{"GPU": 1}], name=name, lifetime="detached")
    assert list(groups_of_serve()) == [name] and len(known()) == 1
    kill_controller()
    assert settled(lambda: not groups_of_serve() and not known())


def test_without_room_it_waits_for_the_best_pair_and_another_application_starts_meanwhile(
    neighbours: None,
) -> None:
    others = [another_user("pcie", 3), another_user("pcie-b", 3)]
    with ThreadPoolExecutor(1) as beside:
        handle = beside.submit(run)
        assert settled(lambda: waiting() == 1)
        assert groups_of_serve() == {}
        serve.run(Router.bind(), name="beside", route_prefix=None)
        ray.kill(others.pop())
        [replica] = replicas(handle.result(120), 1, "a")
    assert replica.gpus == (2, 3)
    ray.kill(others.pop())


def test_a_replica_that_waits_and_is_deleted_leaves_nothing(neighbours: None) -> None:
    others = [another_user("pcie", 3), another_user("pcie-b", 3)]
    wanted = serve.RunTarget(Unchanged.bind("a"), name="app", route_prefix=None)
    serve.run_many([wanted], wait_for_applications_running=False)
    assert settled(lambda: waiting() == 1)
    serve.delete("app")
    assert settled(lambda: waiting() == 0)
    for other in others:
        ray.kill(other)
    assert groups_of_serve() == {} and known() == []


def test_the_example_that_knows_nothing_of_placement(neighbours: None) -> None:
    handle = serve.run(serve_app.engine, name="app", route_prefix=None)
    assert handle.remote().result(timeout_s=120) == [2, 3]


def test_a_group_without_gpus_is_serves_own(neighbours: None) -> None:
    assert serve.run(Router.bind(), name="app", route_prefix=None).remote().result(timeout_s=60) == "here"
    assert known() == []


def test_a_group_that_the_service_refuses_is_rays_own_with_one_warning(neighbours: None) -> None:
    @serve.deployment(
        placement_group_bundles=[{"CPU": 0.1, "GPU": 0.5}, {"GPU": 0.25}],
        ray_actor_options={"num_cpus": 0.1},
        **QUICK,
    )
    class Shares:
        def __call__(self) -> str:
            return "here"

    before = controllers_log().count("is Ray's own")
    assert serve.run(Shares.bind(), name="app", route_prefix=None).remote().result(timeout_s=60) == "here"
    assert known() == []
    assert controllers_log().count("is Ray's own") == before + 1


def test_where_ray_differs_nothing_is_changed_and_the_log_says_in_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.serve._private import default_impl

    from placement.serve import _difference

    assert _difference(default_impl) == ""

    def with_more(request: Any, more: Any) -> None: ...

    def without() -> None: ...

    monkeypatch.setattr(default_impl, "_default_create_placement_group", with_more)
    assert "has no ray.serve._private.default_impl._default_create_placement_group(request)" in _difference(
        default_impl
    )
    monkeypatch.undo()
    monkeypatch.setattr(default_impl, "create_deployment_scheduler", without)
    assert "does not use" in _difference(default_impl)
