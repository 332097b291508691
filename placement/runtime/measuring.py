"""``placement measure``: a real all-reduce on GPUs that are held like a placement.

The GPUs are a lease of this process: on Ctrl-C they are given back, and when it is killed Ray ends their placement
group and the workers in it, as it does with every lease.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import ray

from placement.core.measured import beside_predicted, sets_to_measure
from placement.core.shape import shape_of
from placement.errors import CannotMeasure, NoCollectiveLibrary, PlacementError
from placement.runtime.client import Client
from placement.runtime.connection import ask, own_errors
from placement.runtime.orders import own_name
from placement.runtime.results import NodeAssignment
from placement.wire.cluster import ClusterFile
from placement.wire.facts import NodeFacts
from placement.wire.fields import STANDS
from placement.wire.machine import Machine, mb_per_s
from placement.wire.measurements import MeasuredRate, Measurement

MESSAGE_BYTES = {"nccl": 1 << 30, "gloo": 1 << 22}
"""Message bytes per GPU, enough to keep the links busy; with gloo, which copies through the CPUs, less is enough."""
TIMED_SECONDS = 1.0
"""About how long a set is timed, in 3 to 20 all-reduces (nccl-tests does 20)."""
SET_SECONDS = 60.0
"""A set that takes longer hangs: setting up NCCL takes some seconds, and a gigabyte at 0.1 GB/s ten."""
START_SECONDS = 300.0
"""How long the workers may take to start; all of them import torch at once, which takes minutes on a machine of two
CPUs that has much else to do."""

Gpus = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A node whose GPUs are to be measured.

    Attributes:
        free: the GPUs that are wholly free.
        uuids: the UUIDs of all its GPUs.
        machine: its make.
        facts: the facts of its GPUs.
    """

    id: str
    name: str
    free: Gpus
    uuids: tuple[str | None, ...]
    machine: Machine
    facts: NodeFacts

    @property
    def bus_ids(self) -> dict[int, str]:
        """GPU -> PCI bus id, where it is known."""
        return {gpu.ordinal: gpu.pci_bus_id for gpu in self.facts.gpus if gpu.pci_bus_id}

    def measurement(self, rates: Sequence[MeasuredRate]) -> Measurement:
        """These rates as a measurement of the node."""
        return Measurement(host=self.name, uuids=self.uuids, machine=self.machine, rates=tuple(rates))


@dataclass
class Outcome:
    """The outcome for one node.

    Attributes:
        rates: the measured rates.
        failed: set -> why not.
        left_out: how many sets were left out for lack of time.
    """

    target: Target
    rates: list[MeasuredRate] = field(default_factory=list)
    failed: dict[Gpus, str] = field(default_factory=dict)
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON-ready values."""
        return {
            **as_report(self.target.measurement(self.rates)),
            "failed": [{"gpus": list(gpus), "problem": problem} for gpus, problem in self.failed.items()],
            "left_out": self.left_out,
        }


def as_report(measurement: Measurement) -> dict[str, Any]:
    """A measurement as JSON-ready values: node, and its sets with measured and predicted rates."""
    predicted = shape_of(measurement.machine.topology()).mb_per_s
    sets = [
        {**one.model_dump(mode="json"), **beside_predicted(mb_per_s(one.gb_per_s), predicted(one.gpus))}
        for one in measurement.rates
    ]
    return {"node": measurement.host, "sets": sets}


def targets(topology: Sequence[Mapping[str, Any]], snapshot: Mapping[str, Any]) -> list[Target]:
    """The GPU nodes in the service's ``topology`` and ``snapshot`` reports."""
    said = {one["id"]: one["facts"] for one in topology}
    cluster = ClusterFile.model_validate(snapshot, context=STANDS)
    found = []
    for one in cluster.nodes:
        if one.id in said and one.machine is not None:
            machine = cluster.machines[one.machine].model_copy(update={"measured": ()})
            uuids = tuple(one.uuids.get(gpu) for gpu in range(len(machine.topology())))
            facts = (
                NodeFacts(source="none") if said[one.id] is None else NodeFacts.model_validate(said[one.id])
            )
            found.append(Target(one.id, one.name, one.free, uuids, machine, facts))
    return found


class Rank:
    """The worker on one GPU. It is the only part of this package that needs PyTorch.

    Args:
        node: name of the node, for errors.
        is_simulated: its GPUs are only counted; then gloo measures the path through the CPUs.
    """

    def __init__(self, node: str, is_simulated: bool) -> None:
        self._node, self._is_simulated = node, is_simulated
        self._backend = ""
        self._store: Any = None

    def library(self) -> str:
        """The collective library, and its version.

        Raises:
            NoCollectiveLibrary: there is none.
        """
        try:
            import torch
            import torch.distributed as distributed
        except ImportError as error:
            raise NoCollectiveLibrary(
                self._node, f"its workers cannot import torch ({error}); `pip install torch` in their Python"
            ) from None
        if distributed.is_available():
            if torch.cuda.is_available() and distributed.is_nccl_available():
                self._backend = "nccl"
                return "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
            if self._is_simulated and distributed.is_gloo_available():
                self._backend = "gloo"
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this node
                return f"gloo of torch {torch.__version__}"
        raise NoCollectiveLibrary(
            self._node,
            f"torch {torch.__version__} of its workers has no NCCL, or sees no GPU; install one that is built for "
            "CUDA and for the node's driver",
        )

    def open_store(self) -> int:
        """Starts the store with which the ranks of a set find each other on this rank; returns the port."""
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def seconds(self, port: int, number: int, rank: int, ranks: int) -> tuple[float, int]:
        """How long an all-reduce among ``ranks`` takes, of which this is one; and its bytes per rank.

        Args:
            port: the port of the store.
            number: the number of the set; each set has its own.
            rank: which one this is.
            ranks: how many there are.

        Raises:
            CannotMeasure: the sum is wrong.
        """
        import torch
        import torch.distributed as distributed

        patience = timedelta(seconds=SET_SECONDS)
        store = distributed.PrefixStore(
            f"set-{number}", distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=patience)
        )
        device = "cuda" if self._backend == "nccl" else "cpu"
        distributed.init_process_group(
            self._backend, store=store, rank=rank, world_size=ranks, timeout=patience
        )
        try:
            message = torch.ones(MESSAGE_BYTES[self._backend] // 4, device=device)
            distributed.all_reduce(message)
            if not bool((message == ranks).all()):
                raise CannotMeasure(self._node, f"an all-reduce among {ranks} GPUs came to a wrong sum")
            message.zero_()

            def timed(times: int) -> float:
                """The time of each of ``count`` all-reduces: that of the slowest rank."""
                slowest = torch.zeros(1, device=device)
                distributed.all_reduce(slowest)  # all ranks begin together
                self._synchronize()
                began = time.perf_counter()
                for _ in range(times):
                    distributed.all_reduce(message)
                self._synchronize()
                slowest.fill_((time.perf_counter() - began) / times)
                distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
                return float(slowest.item())

            once = timed(2)
            return timed(min(20, max(3, int(TIMED_SECONDS / once)))), message.nbytes
        finally:
            distributed.destroy_process_group()

    def _synchronize(self) -> None:
        import torch

        if self._backend == "nccl":
            torch.cuda.synchronize()


class _Ranks:
    """The workers on the GPUs of an assignment; they are restarted after a set that hung or failed."""

    def __init__(self, assignment: NodeAssignment, target: Target) -> None:
        self._assignment, self._target = assignment, target
        self._workers: dict[int, Any] = {}
        self._port = self._number = 0
        self.library = ""

    def start(self) -> None:
        """Starts the workers, unless they run.

        Raises:
            CannotMeasure: they do not start in time, or have no collective library.
        """
        if self._workers:
            return
        worker = ray.remote(Rank)
        is_simulated = self._target.facts.source == "catalogue"
        for rank, gpu in enumerate(self._assignment.gpus):
            options = self._assignment.actor_options(rank)
            self._workers[gpu] = worker.options(**options).remote(self._target.name, is_simulated)
        first, *_ = self._workers.values()
        try:
            with own_errors():
                self.library, *_ = ray.get(
                    [one.library.remote() for one in self._workers.values()], timeout=START_SECONDS
                )
                self._port = ray.get(first.open_store.remote(), timeout=START_SECONDS)
        except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as error:
            self.stop()
            why = f"its workers did not start within {START_SECONDS:g} s, or ended ({type(error).__name__})"
            raise CannotMeasure(self._target.name, f"{why}; try it again, or see Ray's log there") from None

    def bus_gb_per_s(self, gpus: Gpus, seconds: float) -> tuple[float, int]:
        """The bus bandwidth of a set, 10^9 bytes per second and GPU as in nccl-tests, and the message's bytes.

        Raises:
            CannotMeasure: it took too long, failed, or came to a wrong sum.
        """
        self.start()
        self._number += 1
        calls = [
            self._workers[gpu].seconds.remote(self._port, self._number, rank, len(gpus))
            for rank, gpu in enumerate(gpus)
        ]
        try:
            with own_errors():
                each, size = ray.get(calls, timeout=seconds)[0]
        except ray.exceptions.GetTimeoutError:
            self.stop()
            raise CannotMeasure(self._target.name, f"no all-reduce within {seconds:.0f} s") from None
        except PlacementError:
            self.stop()
            raise
        except ray.exceptions.RayError as error:
            self.stop()
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            raise CannotMeasure(self._target.name, "".join(last)[:200]) from None
        return size / each * 2 * (len(gpus) - 1) / len(gpus) / 1e9, size

    def stop(self) -> None:
        """Ends the workers."""
        for one in self._workers.values():
            with contextlib.suppress(Exception):
                ray.kill(one)
        self._workers.clear()


def measure(
    client: Client, target: Target, pairs_only: bool, until: float, told: Callable[[str], None]
) -> Outcome:
    """Measures sets of the free GPUs of a node, one after the other, and stores the rates in the service.

    Rates measured before an interruption are kept.

    Args:
        client: of the service.
        target: the node.
        pairs_only: no sets of more than two GPUs.
        until: no set is started after this time, by ``time.monotonic``.
        told: called with a line for each set.

    Raises:
        CannotMeasure: fewer than two GPUs are free, or no set could be measured.
        Unplaceable, ReservationFailed: others took the GPUs meanwhile.
    """
    if len(target.free) < 2:
        free = f"{len(target.free)} of its GPUs {'is' if len(target.free) == 1 else 'are'} free"
        raise CannotMeasure(target.name, f"{free}, and two are needed; release some, or wait")
    outcome = Outcome(target)
    topology = target.machine.topology()
    predicted = shape_of(topology).mb_per_s
    with _held(client, target) as assignment:
        sets = sets_to_measure(topology, assignment.gpus, pairs_only, predicted)
        ranks = _Ranks(assignment, target)
        try:
            ranks.start()
            for number, gpus in enumerate(sets, start=1):
                left = until - time.monotonic()
                if left <= 0:
                    outcome.left_out = len(sets) - number + 1
                    break
                what = f"{target.name} {number}/{len(sets)}: GPU {' '.join(map(str, gpus))}"
                try:
                    rate, size = ranks.bus_gb_per_s(gpus, SET_SECONDS)
                except CannotMeasure as error:
                    outcome.failed[gpus] = error.problem
                    told(f"{what}: failed, {error.problem}")
                    continue
                outcome.rates.append(
                    MeasuredRate(
                        gpus=gpus,
                        gb_per_s=max(0.001, round(rate, 3)),
                        message_bytes=size,
                        library=ranks.library,
                        driver_version=target.facts.driver_version,
                        measured_at=datetime.now(UTC).replace(microsecond=0),
                    )
                )
                told(f"{what}: {rate:.3g} GB/s, predicted {predicted(gpus) / 1000:.3g}")
        finally:
            ranks.stop()
            if outcome.rates:
                kept = target.measurement(outcome.rates).model_dump(mode="json")
                ask(client.handle.record_measurements.remote([kept]))
    if not outcome.rates and outcome.failed:
        raise CannotMeasure(target.name, f"no set could be measured: {next(iter(outcome.failed.values()))}")
    return outcome


@contextlib.contextmanager
def _held(client: Client, target: Target) -> Iterator[NodeAssignment]:
    """All free GPUs of a node, held until the block ends or this process dies."""
    name = own_name("measure")
    wanted: Mapping[str, Any] = {
        "name": name,
        "model": "measure",
        "runtime": "python",
        "owner": "caller",
        "gpus": len(target.free),
        "constraints": {"gpu_nodes": [target.id]},
    }
    result = client.place(wanted)
    try:
        [assignment] = result.assignments
        yield assignment
    finally:
        client.release(name)
