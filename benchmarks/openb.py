"""How much of a cluster can be allocated, beside the published packers: ``python -m benchmarks.openb DATA``.

DATA is a folder with the openb trace (1,213 nodes, 6,212 GPUs, shares and whole GPUs) and the published results, as in
the artifact of "Beware of Fragmentation: Scheduling GPU-Sharing Workloads with Fragmentation Gradient Descent"
(USENIX ATC 2023, https://github.com/hkust-adsl/kubernetes-scheduler-simulator): ``openb_node_list_gpu_node.csv``,
``openb_pod_list_*.csv`` and ``published_allocation.csv`` (workload, policy, allocated percent at 80 ... 130 %).

A run goes as theirs: the pods are shuffled and drawn from again until 130 % of the cluster's GPUs are asked for;
they come one by one and never leave; one that does not fit is skipped, one that fits is placed. Ours is the
planner as the service uses it, which learns the mix from what has come; theirs knows it beforehand.

The bound: no placement of the pods that have come can hold more, whatever it skips. It is a linear programme over
makes of nodes and fillings of single GPUs (a cutting-stock relaxation by column generation, solved by HiGHS).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import highspy

from placement.cli.simulate import cluster_of
from placement.core.needs import WHOLE
from placement.core.node import Node
from placement.core.planner import advance
from placement.core.policy import Policy
from placement.core.replicas import Plan
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.wire.workload import openb_request, read_rows

NODES = "openb_node_list_gpu_node.csv"
PODS = "openb_pod_list_"
PUBLISHED = "published_allocation.csv"
MARKS = (80, 90, 100, 110, 120, 130)


def milli(request: Request) -> int:
    """Thousandths of GPUs that a pod asks for."""
    return request.needs.gpus * request.needs.share


def arrivals(pods: Sequence[Request], total: int, seed: int) -> list[Request]:
    """The pods in the order of one seed."""
    dice = random.Random(seed)
    sequence = dice.sample(pods, len(pods))
    asked = sum(map(milli, sequence))
    while asked < total * MARKS[-1] / 100:
        sequence.append(dice.choice(pods))
        asked += milli(sequence[-1])
    return sequence


def load(data: Path, workload: str) -> tuple[Snapshot, list[Request]]:
    """The cluster, and the pods of a workload; alike ones are one object."""
    path = data / f"{PODS}{workload}.csv"
    alike: dict[str, Request] = {}
    pods = []
    for row in read_rows(path):
        request = replace(openb_request(row, str(path)), deployment="pod")
        pods.append(alike.setdefault(repr(request), request))
    return cluster_of(str(data / NODES)), pods


def total_of(snapshot: Snapshot) -> int:
    """Thousandths of GPUs that a cluster has."""
    return WHOLE * sum(len(node.topology) for node in snapshot.nodes)


def run(data: Path, workload: str, policy: Policy, seed: int) -> tuple[list[float], float]:
    """One run: percent allocated at each mark, and how many seconds it took."""
    snapshot, pods = load(data, workload)
    total = total_of(snapshot)
    sequence = arrivals(pods, total, seed)
    begin = time.perf_counter()
    arrived = allocated = 0
    reached: list[float] = []
    hopeless: set[int] = set()
    known = {id(pod): replace(pod, policy=policy) for pod in sequence}
    for pod in sequence:
        arrived += milli(pod)
        if id(pod) not in hopeless:  # nothing leaves, so that what did not fit will not
            step, snapshot = advance(snapshot, known[id(pod)])
            if isinstance(step.outcome, Plan):
                allocated += milli(pod)
            else:
                hopeless.add(id(pod))
        while len(reached) < len(MARKS) and arrived >= total * MARKS[len(reached)] / 100:
            reached.append(100 * allocated / total)
    return reached, time.perf_counter() - begin


# -- the bound -----------------------------------------------------------------------------------------


def bound(data: Path, workload: str, seed: int, mark: int) -> float:
    """No placement of what has arrived at a mark allocates more percent of the cluster."""
    snapshot, pods = load(data, workload)
    total = total_of(snapshot)
    count: Counter[int] = Counter()
    by_id = {id(pod): pod for pod in pods}
    arrived = 0
    for pod in arrivals(pods, total, seed):
        if arrived >= total * mark / 100:
            break
        count[id(pod)] += 1
        arrived += milli(pod)
    return 100 * most([(by_id[key], many) for key, many in count.items()], snapshot.nodes) / total


def most(wanted: Sequence[tuple[Request, int]], nodes: Sequence[Node]) -> float:
    """A bound on the thousandths of GPUs that can be allocated.

    One variable for each kind of pod on each make of node, limited by the make's CPUs, memory and nodes. Shares are
    covered by fillings of one GPU, whole pods by whole GPUs. Fillings that would pay are added until none would.
    """
    makes = Counter(
        (len(n.topology), n.cpu_milli, n.memory_bytes, tuple(sorted(n.accelerators))) for n in nodes
    )
    models = sorted({make[3] for make in makes})
    sizes = sorted({pod.needs.share for pod, _ in wanted if pod.needs.gpus == 1 and pod.needs.share < WHOLE})
    lp = highspy.Highs()
    lp.setOptionValue("output_flag", False)
    inf = highspy.kHighsInf
    rows = 0

    def row(limit: float) -> int:
        nonlocal rows
        lp.addRow(-inf, limit, 0, [], [])
        rows += 1
        return rows - 1

    of_pod = [row(many) for _, many in wanted]
    of_make = {
        make: (row(make[1] * nodes), row(make[2] / 2**20 * nodes), row(nodes))
        for make, nodes in makes.items()
    }
    gpus_of = {
        model: row(sum(make[0] * n for make, n in makes.items() if make[3] == model)) for model in models
    }
    covered = {(model, size): row(0) for model in models for size in sizes}
    for index, (pod, _) in enumerate(wanted):
        needs = pod.needs
        for make in makes:
            gpus, cpu, memory, model = make
            fits = needs.gpus <= gpus and pod.cpu_milli <= cpu and pod.memory_bytes <= memory
            if not fits or (pod.accelerators and not set(model) & set(pod.accelerators)):
                continue
            entries = {of_pod[index]: 1.0}
            entries[of_make[make][0]] = pod.cpu_milli
            entries[of_make[make][1]] = pod.memory_bytes / 2**20
            if needs.gpus and needs.share < WHOLE:
                entries[covered[model, needs.share]] = 1
            elif needs.gpus:
                entries[gpus_of[model]] = needs.gpus
                entries[of_make[make][2]] = 1 / (gpus // needs.gpus)
            lp.addCol(-milli(pod), 0, inf, len(entries), list(entries), list(entries.values()))

    seen: set[tuple[tuple[str, ...], tuple[int, ...]]] = set()

    def fill(model: tuple[str, ...], filling: tuple[int, ...]) -> None:
        entries = {gpus_of[model]: 1.0}
        for size, many in Counter(filling).items():
            entries[covered[model, size]] = -many
        lp.addCol(0, 0, inf, len(entries), list(entries), list(entries.values()))
        seen.add((model, filling))

    for model in models:
        for size in sizes:
            fill(model, (size,) * (WHOLE // size))
    while True:
        lp.run()
        duals = lp.getSolution().row_dual
        better = [
            (model, filling)
            for model in models
            for worth, filling in [_richest({size: -duals[covered[model, size]] for size in sizes})]
            if worth > -duals[gpus_of[model]] + 1e-6 and (model, filling) not in seen
        ]
        if not better:
            return -lp.getInfo().objective_function_value
        for model, filling in better:
            fill(model, filling)


def _richest(worth: dict[int, float]) -> tuple[float, tuple[int, ...]]:
    """The filling of one GPU that is worth most: an unbounded knapsack."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (WHOLE + 1)
    for space in range(1, WHOLE + 1):
        best[space] = best[space - 1]
        for size, value in worth.items():
            if size <= space and best[space - size][0] + value > best[space][0] + 1e-9:
                best[space] = best[space - size][0] + value, (*best[space - size][1], size)
    return best[WHOLE][0], tuple(sorted(best[WHOLE][1]))


# -- the table -----------------------------------------------------------------------------------------


def published(data: Path) -> dict[tuple[str, str], list[float]]:
    """(workload, policy) -> percent at each mark."""
    if not (data / PUBLISHED).exists():
        return {}
    with (data / PUBLISHED).open(encoding="utf-8", newline="") as file:
        return {
            (row["workload"], row["policy"]): [float(row[f"allocated_percent_at_arrived_{m}"]) for m in MARKS]
            for row in csv.DictReader(file)
        }


def main() -> None:
    """Runs all and prints a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with the openb trace and the published results")
    parser.add_argument(
        "--workloads", nargs="+", help="as in openb_pod_list_NAME.csv; without it, all there are"
    )
    parser.add_argument("--seeds", type=int, nargs=2, default=(42, 51), metavar=("FIRST", "LAST"))
    parser.add_argument("--policies", nargs="+", type=Policy, default=[Policy.FRAGMENTATION, Policy.TOPOLOGY])
    parser.add_argument("--no-bound", action="store_true", help="leave out the upper bound")
    options = parser.parse_args()
    found = sorted(path.stem.removeprefix(PODS) for path in options.data.glob(f"{PODS}*.csv"))
    workloads = options.workloads or found
    if not workloads or not (options.data / NODES).exists():
        parser.error(f"{options.data} holds no {NODES} and {PODS}*.csv")
    seeds = range(options.seeds[0], options.seeds[1] + 1)
    theirs = published(options.data)
    print(f"python -m benchmarks.openb   {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"seeds {seeds[0]} to {seeds[-1]}; percent of the GPUs allocated, mean, by percent arrived")  # fmt: skip
    with ProcessPoolExecutor() as pool:
        for workload in workloads:
            print(f"\n{workload:32}" + "".join(f"{mark:>8}" for mark in MARKS) + f"{'seconds':>10}")
            runs = {
                policy: [pool.submit(run, options.data, workload, policy, seed) for seed in seeds]
                for policy in options.policies
            }
            bounds = [
                []
                if options.no_bound
                else [pool.submit(bound, options.data, workload, s, m) for s in seeds[:2]]
                for m in MARKS
            ]
            for (name, policy), values in theirs.items():
                if name == PODS + workload:
                    print(f"  {policy + ', published':30}" + "".join(f"{value:8.2f}" for value in values))
            for policy, futures in runs.items():
                done = [future.result() for future in futures]
                columns = list(zip(*(reached for reached, _ in done), strict=True))
                print(f"  {'ours, ' + policy:30}" + "".join(f"{fmean(column):8.2f}" for column in columns)
                      + f"{fmean(seconds for _, seconds in done):10.1f}", flush=True)  # fmt: skip
                if len(done) > 1:
                    print(f"  {'  standard deviation':30}" + "".join(f"{stdev(c):8.2f}" for c in columns))
            if not options.no_bound:
                print(f"  {'at most (first two seeds)':30}"
                      + "".join(f"{fmean(f.result() for f in each):8.2f}" for each in bounds), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
