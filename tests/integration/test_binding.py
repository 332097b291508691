"""Workers that bind themselves to what is near their GPU, on make-believe hosts with the CPUs that there are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray

import placement
from placement.core.topology import Link, Topology
from placement.core.topology import Path as PciePath
from placement.runtime.embedded import SimulatedNode, embedded_cluster
from tests import fake_nvml
from tests.fake_host import FakeHost, switch
from tests.integration.test_jobs import EXAMPLES, JobStatus, JobSubmissionClient, jobs, run

__all__ = ["jobs"]
CPUS = sorted(os.sched_getaffinity(0))[:2]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs"),
]


def machine(*numa: int) -> str:
    """Two GPUs on these NUMA nodes."""
    link = Link(PciePath.PIX if numa[0] == numa[1] else PciePath.SYS)
    return fake_nvml.describe(Topology(((link, link), (link, link)), numa=tuple((node,) for node in numa)))


def sockets(host: FakeHost) -> None:
    """A socket of one core for each GPU, with a card beside it."""
    for socket, cpu in enumerate(CPUS):
        host.numa_node(socket, str(cpu))
        host.cpu(cpu, str(cpu), socket)
        host.device(f"{switch(socket)}/0000:60:0{socket}.0/{fake_nvml.bus_id(socket)}", socket)
        host.rdma(f"mlx5_{socket}", host.device(f"{switch(socket)}/0000:60:08.0/0000:7{socket}:00.0", socket))


def one_socket(host: FakeHost) -> None:
    """Two cores and two GPUs on one socket, and beside both an Ethernet card."""
    host.numa_node(0, f"{CPUS[0]},{CPUS[1]}")
    for gpu, cpu in enumerate(CPUS):
        host.cpu(cpu, str(cpu), 0)
        host.device(f"{switch(0)}/0000:60:0{gpu}.0/{fake_nvml.bus_id(gpu)}", 0)
    host.net("ens0", host.device(f"{switch(0)}/0000:60:08.0/0000:70:00.0", 0))
    host.routes("ens0")


def cut(host: FakeHost) -> None:
    """The sockets, in a container that may use the CPU of only the first."""
    sockets(host)
    host.allow(str(CPUS[0]))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("hosts")
    library = fake_nvml.build(folder)

    def node(name: str, described: str, build: Any) -> SimulatedNode:
        (folder / name).mkdir()
        (folder / name / "machine.txt").write_text(described)
        build(FakeHost(folder / name / "host"))
        return SimulatedNode(name, gpus=2, env=fake_nvml.environment(library, folder / name / "machine.txt"))

    nodes = [
        node("sockets", machine(0, 1), sockets),
        node("one", machine(0, 0), one_socket),
        node("cut", machine(0, 1), cut),
        node("unknown", machine(0, 1), lambda host: None),
    ]
    with embedded_cluster(nodes, dashboard=True) as running:
        yield running.address


@ray.remote
class Worker:
    """Says what it is told, and what it is bound to; ``may``: the CPUs that its container lets it use."""

    def __init__(self, may: list[int] | None = None) -> None:
        if may:
            os.sched_setaffinity(0, may)
        self.bound = placement.bind()

    def told(self, prefixes: tuple[str, ...]) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}

    def cpus(self) -> tuple[list[int], list[int]]:
        return sorted(self.bound.cpus), sorted(os.sched_getaffinity(0))


TOLD = ("PLACEMENT_CPUS", "PLACEMENT_NUMA", "NCCL_", "UCX_")


def place(service: Any, node: str, **more: Any) -> Any:
    wanted = {"name": f"on-{node}", "model": "m", "constraints": {"gpu_nodes": [node]}, **more}
    return ray.get(service.place.remote(wanted))


def start(result: Any, replica: int, rank: int, may: list[int] | None = None) -> Any:
    env = {"env_vars": result.environment(replica, rank)}
    return Worker.options(**result.actor_options(replica, rank), runtime_env=env).remote(may)


def test_ranks_are_bound_to_the_socket_of_their_gpu_and_told_its_card(service: Any) -> None:
    result = place(service, "sockets", gpus=2)
    assert result.assignments[0].environment(1) == result.environment(0, 1)
    for rank, cpu in enumerate(CPUS):
        worker = start(result, 0, rank)
        assert ray.get(worker.cpus.remote()) == ([cpu], [cpu])
        assert ray.get(worker.told.remote(TOLD)) == {
            "PLACEMENT_CPUS": str(cpu),
            "PLACEMENT_NUMA_NODE": str(rank),
            "UCX_NET_DEVICES": f"mlx5_{rank}:1",
            "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        }
        ray.kill(worker)


def test_two_replicas_on_one_socket_have_cpus_of_their_own(service: Any) -> None:
    result = place(service, "one", replicas=2)
    workers = [start(result, replica, 0) for replica in range(2)]
    found = {
        a.gpus[0]: ray.get(worker.cpus.remote())
        for a, worker in zip(result.assignments, workers, strict=True)
    }
    assert found == {0: ([CPUS[0]],) * 2, 1: ([CPUS[1]],) * 2}
    told = ray.get(workers[0].told.remote(TOLD))
    assert (told["NCCL_SOCKET_IFNAME"], "NCCL_IB_HCA" in told) == ("=ens0", False)
    for worker in workers:
        ray.kill(worker)


def test_a_worker_stays_within_the_cpus_that_it_has(service: Any) -> None:
    result = place(service, "sockets", gpus=2)
    for may, bound in ((CPUS[:1], []), (CPUS[1:], CPUS[1:])):
        worker = start(result, 0, 1, may)
        assert ray.get(worker.cpus.remote()) == (bound, may)
        ray.kill(worker)


def test_in_a_cut_cpuset_only_what_is_in_it_is_given_out(service: Any) -> None:
    result = place(service, "cut", gpus=2)
    assert result.environment(0, 0)["PLACEMENT_CPUS"] == str(CPUS[0])
    assert "PLACEMENT_CPUS" not in result.environment(0, 1)
    worker = start(result, 0, 1)
    assert ray.get(worker.cpus.remote()) == ([], CPUS), "nothing is known to be near"
    ray.kill(worker)


def test_what_is_unknown_is_left_out(service: Any) -> None:
    result = place(service, "unknown", gpus=2)
    assert [name for name in result.environment(0, 0) if name.startswith(TOLD)] == []
    worker = start(result, 0, 0)
    assert ray.get(worker.cpus.remote()) == ([], CPUS)
    ray.kill(worker)


def test_what_is_near_is_known_after_a_restart_of_the_service(service: Any) -> None:
    result = place(service, "sockets", gpus=2)
    ray.kill(service, no_restart=False)
    again = ray.get(placement.start().get.remote("on-sockets"))
    assert [again.environment(0, rank) for rank in range(2)] == [
        result.environment(0, rank) for rank in range(2)
    ]


def test_the_example_runs_as_a_job(jobs: JobSubmissionClient, service: Any) -> None:
    others = [place(service, node, gpus=2) for node in ("cut", "unknown", "one")]
    assert len(others) == 3, "so that only the two sockets are left"
    status, code, output = run(jobs, EXAMPLES, f"{sys.executable} bind.py --gpus 2")
    assert (status, code) == (JobStatus.SUCCEEDED, 0), output
    for rank, cpu in enumerate(CPUS):
        said = f"replica 0 rank {rank}: GPU {rank}: CPUs [{cpu}], network cards =mlx5_0:1,mlx5_1:1"
        assert said in output, output
