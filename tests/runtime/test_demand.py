"""What is asked of the autoscaler, on a make-believe Ray and clock: bounded, withdrawn, asked again after a while."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from placement.runtime import arrivals, asking, backoff, shapes
from placement.runtime.asking import Asked, Asks, State
from placement.runtime.autoscaler import Group, Heard, SeenNode
from placement.runtime.demand import Demand
from placement.runtime.needs import Need, Way

GPU4 = Need("4 GPUs", (Way(((("GPU", 4.0),),)),))
GPU8 = Need("8 GPUs", (Way(((("GPU", 8.0),),)),))
L40S = Need("4 GPUs", GPU4.ways, (("ray.io/accelerator-type", "L40S"),))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(asking, "time", clock)
    monkeypatch.setattr(backoff, "time", clock)
    return clock


class MakeBelieve:
    """A cluster and its autoscaler, as far as they are asked."""

    def __init__(self) -> None:
        self.groups: dict[str, tuple[Way, dict[str, str]]] = {}
        self.on: dict[str, str] = {}
        self.gone: set[str] = set()
        self.nodes: dict[str, SeenNode] = {}
        self.infeasible: set[str] = set()
        self.problem = ""
        self.refused: tuple[str, ...] = ()
        self.attempts = 1
        self.hopeless = True
        self.broken: set[str] = set()

    def hear(self) -> Heard:
        if self.problem:
            return Heard(self.problem)
        return Heard("", frozenset(self.infeasible), self.refused, dict(self.nodes))

    def create(self, name: str, way: Way, labels: Mapping[str, str]) -> str:
        if self.broken & set(labels):
            raise ValueError("no such label")
        assert name.startswith("ask-") and name not in self.groups
        self.groups[name] = way, dict(labels)
        return name

    def look(self, group: str) -> Group:
        if group in self.gone:
            return Group("REMOVED")
        if group not in self.on:
            return Group("PENDING", {}, self.attempts, hopeless=self.hopeless)
        if self.on[group] not in self.nodes:
            return Group("RESCHEDULING")
        return Group("CREATED", {self.on[group]: self.groups[group][0].total})

    def remove(self, group: str) -> None:
        assert group in self.groups, "what others ask for is theirs"
        self.gone.add(group)

    def free(self) -> dict[str, dict[str, float]]:
        free = {node_id: dict(node.total) for node_id, node in self.nodes.items()}
        for group, node_id in self.on.items():
            if group not in self.gone and node_id in free:
                for resource, amount in self.groups[group][0].total.items():
                    free[node_id][resource] -= amount
        return free

    @property
    def open(self) -> list[str]:
        return [group for group in self.groups if group not in self.gone]

    def arrive(self, group: str, node_id: str, labels: Mapping[str, str] | None = None) -> None:
        """A node comes for a group, which takes it."""
        self.nodes[node_id] = SeenNode(labels or {}, self.groups[group][0].total)
        self.on[group] = node_id


def wait_of(told: asking.Asked) -> float:
    """After how many seconds it is asked again."""
    assert told.again is not None and told.since is not None
    return told.again - told.since


class World:
    """The asks on that cluster, looked at as often as they say."""

    def __init__(self, clock: SimpleNamespace, max_open: int = 32) -> None:
        self.clock, self.ray = clock, MakeBelieve()
        self.asks = Asks("ask-", max_open, self.ray)
        self.wanted: dict[str, Need | str] = {}
        self.known: set[str] = set()

    def run(self, seconds: float = 0.0) -> Mapping[str, Asked]:
        end = self.clock.now + seconds
        pause = self.asks.step(self.wanted, self.known)
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + (pause or 2.0))
            pause = self.asks.step(self.wanted, self.known)
        return self.asks.told

    def states(self, seconds: float = 0.0) -> dict[str, State]:
        return {key: asked.state for key, asked in self.run(seconds).items()}


@pytest.fixture
def world(clock: SimpleNamespace) -> World:
    return World(clock)


def test_what_waits_is_asked_for_oldest_first_and_no_longer_than_it_waits(clock: SimpleNamespace) -> None:
    world = World(clock, max_open=2)
    world.wanted = {"a:0:0": GPU4, "b:0:0": GPU8, "c:0:0": GPU4, "d:0:0": "names nodes"}
    assert [State.ASKED, State.ASKED, State.NOT_ASKED, State.NOT_ASKED] == list(world.states().values())
    assert "2 others are asked for first" == world.asks.told["c:0:0"].reason
    assert "names nodes" == world.asks.told["d:0:0"].reason
    assert [4.0, 8.0] == [world.ray.groups[group][0].total["GPU"] for group in world.ray.open]
    first = world.ray.open
    world.ray.infeasible = {"another's"}
    world.run(60)
    assert first == world.ray.open, "nothing changes while nothing happens"
    del world.wanted["b:0:0"]
    assert State.ASKED is world.states(1)["c:0:0"]
    assert [4.0, 4.0] == [world.ray.groups[group][0].total["GPU"] for group in world.ray.open]
    world.wanted = {}
    world.run(1)
    assert (True, []) == (world.asks.empty, world.ray.open)


def test_it_takes_nothing_on_the_nodes_that_are_there_and_keeps_to_its_conditions(world: World) -> None:
    world.known = {"n2"}
    world.ray.nodes["n1"] = SeenNode({}, {})  # a node that nobody could read
    world.wanted = {"a:0:0": L40S, "b:0:0": Need("1", GPU4.ways, (("ray.io/node-id", "!in(n2, n9)"),))}
    world.run()
    assert [
        {"ray.io/accelerator-type": "L40S", "ray.io/node-id": "!in(n1, n2)"},
        {"ray.io/node-id": "!in(n1, n2, n9)"},
    ] == [labels for _, labels in world.ray.groups.values()]


def test_a_new_node_is_held_until_it_is_known_and_then_given_back_before_it_is_told(world: World) -> None:
    world.wanted = {"a:0:0": GPU4}
    world.run()
    (group,) = world.ray.open
    world.ray.arrive(group, "new")
    asked = world.run(5)["a:0:0"]
    assert (State.ASKED, ("new",), [group]) == (asked.state, asked.nodes, world.ray.open)
    world.known = {"new"}
    pause = world.asks.step(world.wanted, world.known)
    assert ([], State.ASKED) == (world.ray.open, world.asks.told["a:0:0"].state), "the books follow"
    assert pause is not None and pause < 0.05
    asked = world.run(0.1)["a:0:0"]
    assert (State.ARRIVED, ("new",)) == (asked.state, asked.nodes)
    assert State.ARRIVED is world.states(20)["a:0:0"]
    assert 1 == len(world.ray.groups), "not asked for again"


def test_a_node_that_nobody_gets_to_know_is_not_held_for_ever(world: World) -> None:
    world.wanted = {"a:0:0": GPU4}
    world.run()
    world.ray.arrive(world.ray.open[0], "new")
    assert State.ARRIVED is world.states(asking.HOLD_SECONDS + 2)["a:0:0"]
    assert [] == world.ray.open


def arrived(world: World, node_id: str) -> None:
    """A node comes for the only group that is open, and is known at once."""
    (group,) = world.ray.open
    world.ray.arrive(group, node_id)
    world.known.add(node_id)
    world.run(1)
    assert [] == world.ray.open


def test_a_node_has_its_time_to_say_what_its_gpus_are_before_it_is_one_that_will_not_do(world: World) -> None:
    """A first reading takes 30 s where the driver's state is not kept."""
    world.wanted = {"a:0:0": GPU4}
    world.run()
    world.ray.arrive(world.ray.open[0], "new")
    assert State.ARRIVED is world.states(asking.HOLD_SECONDS + arrivals.KNOWN_SECONDS - 1)["a:0:0"]
    world.known = {"new"}
    assert State.ARRIVED is world.states(arrivals.PLACED_SECONDS - 5)["a:0:0"]
    assert State.NOT_ASKED is world.states(10)["a:0:0"]
    world.wanted["b:0:0"] = GPU4
    assert State.NOT_ASKED is world.states(1)["b:0:0"]


def test_a_node_that_came_and_died_at_once_is_nothing_against_the_next(world: World) -> None:
    world.wanted = {"a:0:0": GPU4}
    world.run()
    arrived(world, "new")
    del world.ray.nodes["new"]
    told = world.run(asking.QUIET_SECONDS + 1)["a:0:0"]
    assert (State.NOT_ASKED, "it was withdrawn a moment ago") == (told.state, told.reason)
    assert State.ASKED is world.states(asking.FICKLE_SECONDS[0])["a:0:0"]
    assert 1 == len(world.ray.open)


def test_what_becomes_of_a_need_is_known_before_it_is_wanted(world: World) -> None:
    assert "the autoscaler has not reported yet" == world.asks.outlook(GPU8).reason
    world.ray.problem = "there is none"
    world.asks.listen()
    assert Asked(State.NOT_ASKED, "there is none") == world.asks.outlook(GPU8)
    assert Asked(State.NOT_ASKED, "names nodes") == world.asks.outlook("names nodes")
    world.ray.problem = ""
    world.asks.listen()
    assert Asked(State.ASKED, "asked for a node with 8 GPUs") == world.asks.outlook(GPU8)
    world.wanted = {"a:0:0": GPU8}
    world.run()
    assert world.asks.told["a:0:0"].reason == world.asks.outlook(GPU8).reason, "and no other word later"
    world.ray.infeasible = set(world.ray.open)
    asked = world.run(asking.STATUS_SECONDS)["a:0:0"]
    assert (State.INFEASIBLE, asked) == (asked.state, world.asks.outlook(GPU8))


def test_what_came_for_one_may_be_another_s_that_waits_for_the_same(world: World) -> None:
    """The node for the second replica comes first, and the planner places the first on it."""
    world.wanted = {"d:0:0": GPU4, "d:1:0": GPU4}
    world.run()
    first, second = world.ray.open
    world.ray.arrive(second, "new")
    world.known = {"new"}
    assert [State.ASKED, State.ARRIVED] == list(world.states(2).values())
    (renewed,) = world.ray.open
    assert renewed != first
    assert {"ray.io/node-id": "!in(new)"} == world.ray.groups[renewed][1]
    del world.wanted["d:0:0"]
    assert State.ASKED is world.states(1)["d:1:0"]
    assert [renewed] == world.ray.open
    assert State.ASKED is world.states(600)["d:1:0"]
    assert [renewed] == world.ray.open, "it is not asked for anew"


def test_what_is_given_back_is_not_taken_by_what_was_asked_for_before_the_node_came(world: World) -> None:
    """Ray would give it to whatever group is pending, before the planner sees it; but what fits beside it stays."""
    world.wanted = {"a:0:0": GPU4, "b:0:0": GPU4, "c:0:0": GPU8, "d:0:0": L40S}
    world.run()
    a, b, c, d = world.ray.open
    world.ray.hopeless = False
    world.ray.arrive(a, "new")
    world.known = {"new"}
    world.run(0.9)
    assert [a, b, c, d] == world.ray.open, "it may have its place beside it in a moment"
    assert State.ASKED is world.states(0.3)["b:0:0"], "all the time"
    assert [a, b, c, d] == world.ray.open, "Ray may just be reserving it"
    world.ray.attempts += 1
    states = world.states(0.5)
    assert [State.ARRIVED, State.ASKED, State.ASKED, State.ASKED] == list(states.values())
    assert [c, d] == world.ray.open[:2], "they would not go there"
    assert {"ray.io/node-id": "!in(new)"} == world.ray.groups[world.ray.open[2]][1]


def test_what_has_waited_for_longer_may_take_what_came(world: World) -> None:
    world.wanted = {"a:0:0": GPU4}
    world.run()
    arrived(world, "new")
    world.ray.nodes["new"] = SeenNode({}, {"GPU": 3.0})
    assert State.ARRIVED is world.states(arrivals.PLACED_SECONDS - 2)["a:0:0"]
    assert State.ASKED is world.states(2 + asking.FICKLE_SECONDS[0] + 2)["a:0:0"]


def test_what_was_placed_may_ask_again_when_its_node_is_lost_later(world: World) -> None:
    world.wanted = {"a:0:0": GPU4}
    world.run()
    arrived(world, "new")
    world.wanted = {}
    world.run()
    world.clock.now += 3600  # nobody looks while nothing is wanted
    world.wanted = {"a:0:0": GPU4}
    assert State.ASKED is world.states(1)["a:0:0"]


def test_what_the_planner_refuses_is_not_asked_for_again_for_minutes_nor_anything_like_it(
    world: World,
) -> None:
    world.wanted = {"a:0:0": GPU4}
    world.run()
    arrived(world, "new")
    world.wanted |= {"b:0:0": GPU4, "c:0:0": GPU8}  # waiting as well by now
    assert [State.ARRIVED, State.ASKED, State.ASKED] == list(world.states(5).values())
    told = world.run(arrivals.PLACED_SECONDS)
    assert [State.NOT_ASKED, State.NOT_ASKED, State.ASKED] == [one.state for one in told.values()]
    assert "1 node joined for it, and it was not placed there" == told["a:0:0"].reason
    assert shapes.REFUSED_SECONDS[0] == wait_of(told["a:0:0"])
    assert [8.0] == [world.ray.groups[group][0].total["GPU"] for group in world.ray.open]
    states = world.states(shapes.REFUSED_SECONDS[0])
    assert [State.ASKED, State.NOT_ASKED, State.ASKED] == list(states.values()), (
        "one shows whether it is better"
    )


@pytest.mark.parametrize("arrives", [False, True])
def test_what_comes_and_goes_among_what_waits_is_not_asked_for_each_time(world: World, arrives: bool) -> None:
    """It may not be among it while a placement is tried."""
    world.wanted = {"a:0:0": GPU4}
    world.run()
    if arrives:
        arrived(world, "new")
    for _ in range(1000):
        world.wanted = {}
        world.run(5)
        world.wanted = {"a:0:0": GPU4}
        world.run(5)
    assert 5 < len(world.ray.groups) < 15
    world.wanted = {}
    world.run()
    world.clock.now += 3600
    world.wanted = {"a:0:0": GPU4}
    assert State.ASKED is world.states(1)["a:0:0"], "that is forgotten"


def test_one_need_never_brings_node_after_node(world: World) -> None:
    """Whatever comes, the planner does not want it: in six hours a handful, not thousands."""
    world.wanted = {"a:0:0": GPU4}
    for number in range(6 * 360):
        world.run(10)
        for group in world.ray.open:
            world.ray.arrive(group, f"n{number}")
            world.known.add(f"n{number}")
    assert 5 < len(world.ray.nodes) < 12


def test_what_no_node_type_can_hold_is_withdrawn_and_asked_again_after_a_growing_wait(world: World) -> None:
    world.wanted = {**{f"a:{index}:0": GPU8 for index in range(3)}, "b:0:0": GPU4}
    world.run()
    kept, *too_many, other = world.ray.open
    world.ray.infeasible = set(too_many)  # the type's maximum is reached with the first
    told = world.run(asking.STATUS_SECONDS)
    assert [State.ASKED, State.INFEASIBLE, State.INFEASIBLE, State.ASKED] == [
        one.state for one in told.values()
    ]
    assert told["a:1:0"].reason == (
        "no node type of this cluster can hold a node with 8 GPUs, or its maximum is reached"
    )
    assert 30.0 == wait_of(told["a:1:0"])
    assert [kept, other] == world.ray.open
    assert State.INFEASIBLE is world.states(27)["a:1:0"]
    world.run(5)
    assert [kept, other] == world.ray.open, "the one that is open shows whether it is better"
    del world.wanted["a:0:0"]
    for wait in (60.0, 120.0):
        world.run(5)
        assert 2 == len(world.ray.open)
        world.ray.infeasible |= set(world.ray.open) - {other}
        told = world.run(asking.STATUS_SECONDS)
        assert ([other], wait) == (world.ray.open, wait_of(told["a:1:0"]))
        world.run(wait)
    (group,) = set(world.ray.open) - {other}
    world.ray.arrive(group, "new")
    world.known = {"new"}
    world.run(1)
    assert 2 == len(world.ray.open), "all of them again, after one arrived"


@pytest.mark.parametrize(("largest", "pieces"), [(0, True), (4, True), (8, False)])
def test_it_is_asked_for_in_pieces_only_if_no_node_is_large_enough(
    world: World, largest: int, pieces: bool
) -> None:
    whole = Way(((("GPU", 8.0),),))
    need = Need("8 GPUs", (whole, Way(((("GPU", 1.0),),) * 8, smaller_than=8)))
    if largest:
        world.ray.nodes["old"] = SeenNode({}, {"GPU": float(largest)})
    world.wanted = {"a:0:0": need}
    world.run()
    world.ray.infeasible = set(world.ray.open)
    asked = world.run(asking.STATUS_SECONDS)["a:0:0"]
    assert (State.ASKED if pieces else State.INFEASIBLE) is asked.state
    assert [need.ways[1]] * pieces == [world.ray.groups[group][0] for group in world.ray.open]
    if pieces:
        world.ray.infeasible = set(world.ray.open)
        assert State.INFEASIBLE is world.states(asking.STATUS_SECONDS)["a:0:0"]
        world.run(shapes.INFEASIBLE_SECONDS[0])
        assert [whole] == [world.ray.groups[group][0] for group in world.ray.open], "from the first way on"


def test_it_is_not_asked_for_in_pieces_while_a_node_so_large_is_on_its_way(world: World) -> None:
    """The second of two finds the maximum reached; the pieces of it would get what comes for the first."""
    need = Need("8 GPUs", (Way(((("GPU", 8.0),),)), Way(((("GPU", 1.0),),) * 8, smaller_than=8)))
    world.wanted = {"d:0:0": need, "d:1:0": need}
    world.run()
    first, second = world.ray.open
    world.ray.infeasible = {second}
    assert [State.ASKED, State.INFEASIBLE] == list(world.states(asking.STATUS_SECONDS).values())
    assert [first] == world.ray.open


def test_nodes_that_lack_what_their_type_promises_are_not_brought_one_after_the_other(world: World) -> None:
    world.wanted = {"a:0:0": L40S, "a:1:0": L40S}
    world.run()
    for number in range(3):
        assert 2 == len(world.ray.open)
        world.ray.nodes[f"small{number}"] = SeenNode({}, {"GPU": 1.0})  # somebody else's
        world.ray.nodes[f"n{number}"] = SeenNode({}, {"GPU": 4.0})
        world.run(3)
    assert [] == world.ray.open
    asked = world.run(0)["a:0:0"]
    assert State.NOT_ASKED is asked.state
    assert "3 nodes joined without the labels that it asks for" == asked.reason


def test_nothing_is_asked_of_an_autoscaler_that_is_not_there_or_too_old(world: World) -> None:
    world.ray.problem = "there is none"
    world.wanted = {"a:0:0": GPU4}
    assert Asked(State.NOT_ASKED, "there is none") == world.run(100)["a:0:0"]
    assert {} == world.ray.groups
    world.ray.problem = ""
    assert State.ASKED is world.states(asking.QUIET_SECONDS)["a:0:0"]
    world.ray.problem = "it has gone"
    assert Asked(State.NOT_ASKED, "it has gone") == world.run(asking.STATUS_SECONDS + 1)["a:0:0"]
    assert [] == world.ray.open


def test_a_machine_that_the_cloud_refuses_is_told(world: World) -> None:
    world.ray.refused = ("p5",)
    world.wanted = {"a:0:0": L40S}
    assert world.run(3)["a:0:0"].reason == (
        "asked for a node with 4 GPUs and ray.io/accelerator-type L40S; the cloud refuses node type p5"
    )


def test_a_group_is_removed_only_when_ray_is_not_reserving_it(world: World) -> None:
    world.ray.hopeless = False  # a node has room but for what others hold: Ray tries each second
    world.wanted = {"a:0:0": GPU4}
    world.run()
    world.wanted = {}
    world.run(0.5)
    assert 1 == len(world.ray.open)
    world.ray.attempts += 1
    world.run(0.1)
    assert [] == world.ray.open


def test_what_one_asks_for_does_not_keep_others_from_asking(world: World) -> None:
    world.ray.broken = {"odd"}
    world.wanted = {"a:0:0": Need("4 GPUs", GPU4.ways, (("odd", "x"),)), "b:0:0": GPU4}
    told = world.run(1)
    assert [State.INFEASIBLE, State.ASKED] == [one.state for one in told.values()]
    assert "it could not be asked for: no such label" == told["a:0:0"].reason


def test_a_node_that_dies_while_it_is_held_is_asked_for_again(world: World) -> None:
    world.wanted = {"a:0:0": GPU4}
    world.run()
    world.ray.arrive(world.ray.open[0], "new")
    world.run(1)
    del world.ray.nodes["new"]
    world.run(1)
    assert 1 == len(world.ray.open)
    assert 2 == len(world.ray.groups)


def test_a_declaration_that_changes_asks_for_what_it_is_now(world: World) -> None:
    world.wanted = {"a:0:0": GPU4}
    world.run()
    arrived(world, "new")
    world.wanted = {"a:0:0": GPU8}
    world.run(1)
    assert [8.0] == [world.ray.groups[group][0].total["GPU"] for group in world.ray.open]


def test_nobody_waits_for_a_ray_that_hangs() -> None:
    ray, go_on = MakeBelieve(), threading.Event()
    hear = ray.hear
    ray.hear = lambda: hear() if go_on.wait(60) else Heard()  # type: ignore[method-assign]
    changed = threading.Event()
    demand = Demand("ask-", cluster=ray, on_change=changed.set)
    demand.want({"a:0:0": GPU4}, ())
    assert State.NOT_ASKED is demand.poll()["a:0:0"].state
    (row,) = demand.report()
    assert ("a", 0, 0, "a node with 4 GPUs") == (row["deployment"], row["replica"], row["set"], row["asked"])
    assert not changed.is_set()
    go_on.set()
    assert changed.wait(60)
    assert State.ASKED is demand.poll()["a:0:0"].state
    assert 1 == len(ray.open)
    demand.withdraw()
    assert ([], {}) == (ray.open, demand.poll())


def test_a_ray_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("placement.runtime.demand.RETRY_SECONDS", 0.01)
    ray, failures = MakeBelieve(), iter([1, 2, 3])
    hear = ray.hear

    def sometimes() -> Heard:
        if next(failures, 0):
            raise ConnectionError("the GCS is away")
        return hear()

    ray.hear = sometimes  # type: ignore[method-assign]
    demand = Demand("ask-", cluster=ray)
    demand.want({"a:0:0": GPU4}, ())
    pause = threading.Event()
    while demand.poll()["a:0:0"].state is not State.ASKED:
        pause.wait(0.01)
    demand.withdraw()
    assert [] == ray.open
