"""The rules of tests/rules.py on a real cluster, for as long as one likes: ``make soak ARGS='--minutes 30 --seed 7'``.

Real raylets come and go, the service and its node actors are killed at their steps, other users take and free GPUs,
clients ask at once and again, callers that own what they asked for are killed. After each of these everything must
come right: Ray's books, its table of groups, the ledger, what ``status`` says, and what a worker in every bundle says.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from ray.experimental import internal_kv
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import placement
from placement.runtime import ledger
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode, embedded_cluster
from placement.runtime.groups import group_from_hex, ready_or_removed, remove_group
from tests.rules import ASKED, Call, Rules

NODE_STEPS = ("agent.steered", "agent.created", "agent.verified", "agent.prepared", "agent.confirmed")
MORE_SERVICE_STEPS = (
    "service.ordered", "service.prepared", "service.lent", "service.group_created", "service.confirmed",
    "service.egress_created",
)  # fmt: skip
FEWEST_NODES, MOST_NODES = 2, 4
"""How many GPU nodes there are at a time."""
PATIENCE_SECONDS = 60.0
"""Ray notices a killed raylet after 15 s; the rest is for a busy machine."""
KEY = "sk-planted-2e71b6f0c4d95a38"
HONEST = (
    placement.Unplaceable,
    placement.ReservationFailed,
    placement.DeploymentConflict,
    placement.UnknownDeployment,
    placement.LeaseExpired,
)
OWNER = """
import json, sys
import ray, placement
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[1].split(":")[0], log_to_driver=False, logging_level="ERROR")
try:
    placement.Client().place(json.loads(sys.argv[2]))
except Exception as error:
    print("refused:", type(error).__name__, flush=True)
else:
    print("owns it", flush=True)
sys.stdin.read()
"""
"""A driver that asks for something which is to end with it, and waits to be killed."""


@ray.remote(num_cpus=0, max_calls=0)
def who() -> tuple[str, list[int]]:
    """The node and GPUs of the bundle that this task runs in."""
    context = ray.get_runtime_context()
    return context.get_node_id(), [int(gpu) for gpu in context.get_accelerator_ids()["GPU"]]


class Found(BaseException):
    """Something is wrong. Not an ``Exception``: Hypothesis would try the same again, and tell of that."""


class Soak(Rules):
    """The rules on a real cluster. One cluster serves all runs; each begins and ends with nothing placed."""

    cluster: ClassVar[EmbeddedCluster]
    service: ClassVar[Any]
    faults: ClassVar[Path]
    ends_at: float
    found: ClassVar[Counter[str]] = Counter()
    slowest: ClassVar[dict[str, float]] = {}
    gpu_nodes: ClassVar[list[str]] = []
    born: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.others: list[Any] = []
        self.confirmed: set[str] = set()
        self.waiting: set[str] = set()
        self.last = ""
        self.owners: list[subprocess.Popen[str]] = []

    def over(self) -> bool:
        return time.monotonic() > self.ends_at

    # -- what happens --------------------------------------------------------------------------------

    def clients_send(self, calls: Sequence[Call]) -> None:
        self.last = "clients ask"
        for asked in [getattr(self.service, call.method).remote(call.argument()) for call in calls]:
            try:
                ray.get(asked, timeout=120)
                self.found["done"] += 1
            except HONEST as refusal:
                self.found[f"refused: {type(refusal.cause).__name__}"] += 1  # type: ignore[union-attr]

    def kill_the_service(self) -> None:
        self.last = "the service is killed"
        ray.kill(self.service, no_restart=False)

    def kill_at(self, step: str) -> None:
        (self.faults / step).touch()
        self.waiting.add(step)

    def a_node_ends(self, pick: int) -> bool:
        if len(self.gpu_nodes) <= FEWEST_NODES:
            return False
        self.last = "a node dies"
        name = self.gpu_nodes.pop(pick % len(self.gpu_nodes))
        self.cluster.kill(name, signal.SIGKILL if pick > 8 else signal.SIGTERM)
        return True

    def a_node_begins(self) -> bool:
        if len(self.gpu_nodes) >= MOST_NODES:
            return False
        self.last = "a node comes"
        name = f"gpu-{Soak.born}"
        Soak.born += 1
        self.cluster.add(SimulatedNode(name, topology="a100-pcie-4x", labels={"rack": "r"}))
        self.gpu_nodes.append(name)
        return True

    def another_user_begins(self, gpus: int) -> bool:
        self.last = "another user takes GPUs"
        # With a name that looks like one of ours.
        name = f"placement:{'0' * 8}:a:0:{secrets.token_hex(4)}:1"
        group = placement_group([{"GPU": gpus}], name=name)
        taken = ready_or_removed(group)
        if taken:
            self.others.append(group)
        return taken

    def another_user_ends(self) -> bool:
        if not self.others:
            return False
        self.last = "another user frees GPUs"
        remove_group(self.others.pop(0), ready=True)
        return True

    def remove_a_group_of_ours(self, pick: int) -> bool:
        ours = sorted(self.ours())
        if not ours:
            return False
        remove_group(group_from_hex(ours[pick % len(ours)]))
        self.kill_the_service()  # it is noticed when the service starts
        self.last = "somebody removes a group of ours, and the service is killed"
        return True

    def time_passes(self) -> None:
        time.sleep(1.5)

    @rule(step=st.sampled_from(NODE_STEPS))
    def a_node_actor_will_be_killed(self, step: str) -> None:
        self.kill_at(step)

    @rule(step=st.sampled_from(MORE_SERVICE_STEPS))
    def the_service_will_be_killed_in_the_middle_of_a_reservation(self, step: str) -> None:
        self.kill_at(step)

    @precondition(lambda self: len(self.owners) < 2)
    @rule(call=ASKED, owner=st.sampled_from(("caller", "caller", "job")), at_once=st.booleans())
    def a_driver_asks(self, call: Call, owner: str, at_once: bool) -> None:
        """It owns what it gets; it may be killed while it waits for it."""
        if self.over():
            return
        self.last = f"a driver asks, owner {owner}"
        arguments = [self.cluster.address, json.dumps({**call.argument(), "owner": owner})]
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.owners.append(process)
        if at_once:
            time.sleep(2.0)
            self.a_driver_is_killed(-1)
            return
        assert process.stdout is not None
        self.found[f"a driver {process.stdout.readline().strip() or 'ended by itself'}"] += 1

    @precondition(lambda self: self.owners)
    @rule(pick=st.integers(0, 1))
    def a_driver_is_killed(self, pick: int) -> None:
        self.last = "a driver is killed"
        self.tried[self.last] += 1
        process = self.owners.pop(pick % len(self.owners))
        process.kill()
        process.communicate()

    # -- what must hold ------------------------------------------------------------------------------

    @invariant()
    def all_comes_right(self) -> None:
        if self.over():
            return
        began = time.monotonic()
        while problem := self.problem():
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise Found(f"after {self.last!r}: {problem}")
            time.sleep(0.1)
        took = time.monotonic() - began
        for step in [step for step in self.waiting if not (self.faults / step).exists()]:
            self.waiting.remove(step)
            self.tried[f"killed at {step}"] += 1
        if self.last:
            self.slowest[self.last] = max(took, self.slowest.get(self.last, 0.0))
        self.last = ""

    def ours(self) -> dict[str, dict[str, Any]]:
        """Group id -> row of Ray's table, of the groups of this service that are not removed."""
        prefix = f"placement:{ledger.token()}:"
        table = placement_group_table().items()
        return {
            gid: row for gid, row in table if row["name"].startswith(prefix) and row["state"] != "REMOVED"
        }

    def problem(self) -> str:
        """What is not right yet; empty if all is."""
        status = ray.get(self.service.status.remote(), timeout=120)
        alive = {row["NodeID"] for row in ray.nodes() if row["Alive"]}
        if len([row for row in ray.nodes() if row["Alive"] and row["Resources"].get("GPU")]) != len(
            self.gpu_nodes
        ):
            return "Ray has not noticed yet which nodes there are"
        assignments = [a for deployment in status["deployments"] for a in deployment["assignments"]]
        if lost := [a for a in assignments if a["node"] not in alive]:
            return f"on nodes that are gone: {lost}"
        ours, known = self.ours(), {a["placement_group"] for a in assignments}
        if set(ours) != known:
            return f"groups that nobody knows of: {set(ours) - known}; that are gone: {known - set(ours)}"
        if odd := {row["name"]: row["state"] for row in ours.values() if row["state"] != "CREATED"}:
            return f"groups that are not reserved: {odd}"
        rows = placement_group_table().values()
        if holds := [
            row["name"] for row in rows if row["name"].startswith("hold-") and row["state"] != "REMOVED"
        ]:
            return f"holds that are left: {holds}"
        recorded = {
            record.name: {replica["group"] for replica in record.content["replicas"]}
            for record in ledger.records()
            if record.content is not None
        }
        said = {d["name"]: {a["placement_group"] for a in d["assignments"]} for d in status["deployments"]}
        if recorded != said:
            return f"the ledger has {recorded}, status says {said}"
        held: Counter[tuple[str, int]] = Counter()
        units: Counter[str] = Counter()
        for a in assignments:
            held.update({(a["node"], gpu): a["share"] for gpu in a["gpus"]})
            units[a["node"]] += a["egress_units"]
        assert max(held.values(), default=0) <= 1, f"a GPU is held twice: {held}"
        return self.books(alive, held, units) or self.workers()

    def books(self, alive: set[str], held: Counter[tuple[str, int]], units: Counter[str]) -> str:
        """Whether Ray's books show as taken what we hold and what the other users hold, and nothing else."""
        table = placement_group_table()
        for other in [one for one in self.others if table[one.id.hex()]["state"] != "CREATED"]:
            remove_group(other)  # its node died: or Ray would place it on another one when it likes
            self.others.remove(other)
        taken = Counter({node: sum(share for (on, _), share in held.items() if on == node) for node in alive})
        for other in self.others:
            row = table[other.id.hex()]
            taken[row["bundles_to_node_id"][0]] += row["bundles"][0]["GPU"]
        free = ray._private.state.available_resources_per_node()
        for row in ray.nodes():
            node, total = row["NodeID"], row["Resources"]
            for name, amount in (("GPU", taken[node]), ("egress", units[node])):
                if row["Alive"] and name in total:
                    shown = total[name] - free.get(node, {}).get(name, 0.0)
                    if abs(shown - amount) > 1e-4:
                        return f"{name} on {row['NodeName']}: {shown} taken in Ray's books, {amount} known"
        return ""

    def workers(self) -> str:
        """Whether the workers of new replicas get their GPUs, and the other users' workers get others."""
        places: set[tuple[str, int]] = set()
        for name in {d["name"] for d in ray.get(self.service.status.remote())["deployments"]}:
            for a in ray.get(self.service.get.remote(name)).assignments:
                if a.placement_group.id.hex() not in self.confirmed and a.gpus:
                    asked = [who.options(**a.actor_options(rank)).remote() for rank in range(len(a.gpus))]
                    said = ray.get(asked, timeout=60)
                    assert said == [(a.node, [gpu]) for gpu in a.gpus], (said, a)
                if a.share == 1:
                    places |= {(a.node, gpu) for gpu in a.gpus}
                self.confirmed.add(a.placement_group.id.hex())
        for other in self.others:
            row = placement_group_table(other)
            inside = PlacementGroupSchedulingStrategy(other, placement_group_bundle_index=0)
            asked = who.options(num_gpus=row["bundles"][0]["GPU"], scheduling_strategy=inside).remote()
            node, gpus = ray.get(asked, timeout=60)
            assert not places & {(node, gpu) for gpu in gpus}, "another user's GPU was given out"
        return ""

    def teardown(self) -> None:
        for step in self.waiting:
            (self.faults / step).unlink(missing_ok=True)
        while self.others:
            self.another_user_ends()
        while self.owners:
            self.a_driver_is_killed(0)
        while len(self.gpu_nodes) < MOST_NODES:
            self.a_node_begins()
        ray.get(self.service.release_all.remote(), timeout=120)
        self.last, self.ends_at = "everything is released", float("inf")
        self.all_comes_right()
        assert not self.ours()
        # What is free can be had: no node actor takes for held what is not.
        everything = {"name": "all", "model": "m", "gpus": 4, "replicas": len(self.gpu_nodes)}
        try:
            ray.get(self.service.place.remote(everything), timeout=120)
        except Exception as error:
            status = ray.get(self.service.status.remote(), timeout=120)
            raise Found(f"not all can be placed: {error}; {status}") from error
        ray.get(self.service.release.remote("all"), timeout=120)
        self.found["runs in which all came right"] += 1


def planted() -> list[str]:
    """Where the key is that the egress nodes have in their environment; it should be nowhere."""
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    places = {
        str(path.relative_to(session)): path.read_bytes() for path in session.rglob("*") if path.is_file()
    }
    kv = internal_kv.internal_kv_get_gcs_client()
    keys = internal_kv._internal_kv_list(b"", namespace=b"placement")
    places |= {
        key.decode(): zlib.decompress(value) if key.startswith(b"history/") else value
        for key, value in kv.internal_kv_multi_get(keys, namespace=b"placement").items()
    }
    places["status"] = str(ray.get(Soak.service.status.remote())).encode()
    places["events"] = str([ray.get(Soak.service.events.remote())]).encode()
    return [place for place, content in places.items() if KEY.encode() in content]


def main() -> int:
    """Runs until the time is up or something is found; says what was tried, and what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=25, help="of each run")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    once = settings(
        max_examples=2,
        stateful_step_count=options.steps,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PLACEMENT_FAULTS"] = folder
        Soak.faults = Path(folder)
        nodes = [
            SimulatedNode(f"gpu-{i}", topology="a100-pcie-4x", labels={"rack": "r"})
            for i in range(MOST_NODES)
        ]
        Soak.gpu_nodes = [node.name for node in nodes]
        Soak.born = len(nodes)
        nodes += [
            SimulatedNode(f"out-{i}", resources={"egress": 8}, env={"PLANTED_KEY": KEY}) for i in range(2)
        ]
        with embedded_cluster(nodes, progress=lambda name: print(f"starting {name}", flush=True)) as cluster:
            Soak.cluster, Soak.service = cluster, placement.start(idle_seconds=3.0)
            Soak.ends_at = time.monotonic() + 60 * options.minutes
            number = options.seed
            failed = 0
            try:
                while time.monotonic() < Soak.ends_at:
                    seed(number)(Soak)
                    run_state_machine_as_test(Soak, settings=once)
                    print(
                        f"seed {number}: all came right; {round((Soak.ends_at - time.monotonic()) / 60)} min left",
                        flush=True,
                    )
                    number += 1
            except (Exception, Found) as error:
                print(f"\nseed {number} found:", *traceback.format_exception(error), sep="\n")
                failed = 1
            if where := planted():
                print(f"\nthe planted key is in {where}")
                failed = 1
    print("\ntried:")
    for what, count in sorted(Rules.tried.items()):
        print(f"{count:7}  {what}")
    print("what came of it:")
    for what, count in sorted(Soak.found.items()):
        print(f"{count:7}  {what}")
    print("longest until all was right again:")
    for what, seconds in sorted(Soak.slowest.items()):
        print(f"{seconds:6.1f} s  after: {what}")
    print("something was found" if failed else "nothing was lost, left over, held twice or told")
    return failed


if __name__ == "__main__":
    sys.exit(main())
