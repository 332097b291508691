"""``ray job submit`` for real: a job that applies a deployment file, and one that starts workers in the result."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

import placement
from placement.runtime.embedded import SimulatedNode, embedded_cluster
from tests.integration.conftest import left_over, settled

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
EXAMPLES = Path(__file__).parents[2] / "examples"
FILE = """
deployments:
  - {name: pair, model: m, gpus: 2, replicas: 2}
  - {name: gpt, model: gpt-4o, serving: {max_concurrent: 4}}
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    nodes = [SimulatedNode("pcie", topology="a100-pcie-4x"), SimulatedNode("egress", resources={"egress": 8})]
    with embedded_cluster(nodes, dashboard=True) as running:
        yield running.address


@pytest.fixture(scope="module")
def jobs(address: str) -> JobSubmissionClient:
    return JobSubmissionClient(f"http://{ray._private.worker.get_dashboard_url()}")


def run(
    jobs: JobSubmissionClient, folder: Path, entrypoint: str, env: dict[str, Any] | None = None
) -> tuple[JobStatus, int | None, str]:
    """Submits a job, waits for its end: status, exit code, output."""
    job = jobs.submit_job(entrypoint=entrypoint, runtime_env=env or {"working_dir": str(folder)})
    ended = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
    end = time.monotonic() + 180
    while jobs.get_job_status(job) not in ended and time.monotonic() < end:
        time.sleep(0.3)
    return jobs.get_job_status(job), jobs.get_job_info(job).driver_exit_code, jobs.get_job_logs(job)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user submits: the example jobs and a deployment file."""
    folder = tmp_path_factory.mktemp("job")
    for name in ("job_apply.py", "job_workers.py"):
        (folder / name).write_text((EXAMPLES / name).read_text())
    (folder / "two.yaml").write_text(FILE)
    (folder / "huge.yaml").write_text("deployments: [{name: huge, model: m, gpus: 67}]")
    return folder


def test_a_job_starts_the_service_and_it_inherits_nothing(jobs: JobSubmissionClient, folder: Path) -> None:
    code = "import ray; ray.init(); import placement; placement.start()"
    env = {"working_dir": str(folder), "env_vars": {"CUDA_VISIBLE_DEVICES": "0"}}
    status, _, output = run(jobs, folder, f"{sys.executable} -c '{code}'", env)
    assert status is JobStatus.SUCCEEDED, output

    def look(_: Any) -> tuple[dict[str, Any], str | None, bool]:
        import os

        import ray

        here = dict(ray.get_runtime_context().runtime_env)
        return here, os.environ.get("CUDA_VISIBLE_DEVICES"), os.path.exists("two.yaml")

    assert ray.get(placement.connect().__ray_call__.remote(look)) == ({}, None, False)


def test_a_job_applies_a_file_and_another_starts_workers_in_it(
    jobs: JobSubmissionClient, folder: Path, service: Any
) -> None:
    status, code, output = run(jobs, folder, f"{sys.executable} job_apply.py two.yaml")
    assert (status, code) == (JobStatus.SUCCEEDED, 0), output
    assert "pair[0] pcie [0, 1]\npair[1] pcie [2, 3]\ngpt[0] egress egress\n" in output

    status, code, output = run(jobs, folder, f"{sys.executable} job_workers.py pair")
    assert (status, code) == (JobStatus.SUCCEEDED, 0), output
    assert "pair[0] pcie: placed on [0, 1], workers on [0, 1]" in output
    assert "pair[1] pcie: placed on [2, 3], workers on [2, 3]" in output
    # The jobs are over; what they placed stands.
    assert [a.gpus for a in ray.get(service.get.remote("pair")).assignments] == [[0, 1], [2, 3]]


def test_a_job_whose_file_does_not_fit_fails_with_the_reason(
    jobs: JobSubmissionClient, folder: Path, service: Any
) -> None:
    status, code, output = run(jobs, folder, f"{sys.executable} job_apply.py huge.yaml")
    assert (status, code) == (JobStatus.FAILED, 1), output
    assert "not placed: cannot place 'huge': 67 GPUs per replica, but the largest node has 4" in output
    assert not left_over()


def test_the_driver_example_runs_as_a_job(jobs: JobSubmissionClient, service: Any) -> None:
    status, code, output = run(jobs, EXAMPLES, f"{sys.executable} driver.py --gpus 2 --replicas 2")
    assert (status, code) == (JobStatus.SUCCEEDED, 0), output
    assert "replica 1 on pcie: placed on [2, 3], workers on [2, 3]\nreleased" in output
    assert settled(lambda: not left_over()), left_over()


def test_the_driver_example_may_own_what_it_places(jobs: JobSubmissionClient, service: Any) -> None:
    status, code, output = run(jobs, EXAMPLES, f"{sys.executable} driver.py --owned --gpus 2 --replicas 2")
    assert (status, code) == (JobStatus.SUCCEEDED, 0), output
    assert len(re.findall(r"placed on (\[.*\]), workers on \1\n", output)) == 2, output
    assert settled(lambda: not left_over()), left_over()


def test_the_example_of_rays_own_call_runs_as_a_job(jobs: JobSubmissionClient, service: Any) -> None:
    status, code, output = run(jobs, EXAMPLES, f"{sys.executable} placement_group.py --gpus 2")
    assert (status, code) == (JobStatus.SUCCEEDED, 0), output
    assert "ranks on GPUs [0, 1]" in output
    assert settled(lambda: not left_over()), left_over()


OWNER = """
import os, signal, sys, time, ray
ray.init(logging_level="ERROR")
from placement import Client
name, until, ends = sys.argv[1:]
Client().place({"name": name, "model": "m", "owner": "job"})
while not os.path.exists(until):
    time.sleep(0.05)
if ends == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
os._exit(3)
"""


@pytest.mark.parametrize("ends", ["crashes", "killed", "stopped"])
def test_what_a_submitted_job_owns_ends_with_it(
    ends: str, jobs: JobSubmissionClient, service: Any, tmp_path: Path
) -> None:
    """Not with the driver that asked, if the job goes on."""
    (tmp_path / "job.py").write_text(OWNER)
    goes_on = "; sleep 600" if ends == "stopped" else ""
    command = f"{sys.executable} job.py owned {tmp_path / 'end'} {ends}{goes_on}"
    job = jobs.submit_job(entrypoint=command, runtime_env={"working_dir": str(tmp_path)})
    stands = lambda: placement.UnknownDeployment not in kinds(service)  # noqa: E731
    assert settled(stands, 120), jobs.get_job_logs(job)
    (tmp_path / "end").touch()
    if goes_on:
        time.sleep(2.5)
        assert stands()
        jobs.stop_job(job)
    assert settled(lambda: not stands() and not left_over())


def kinds(service: Any) -> tuple[type, ...]:
    """What is raised where the owned deployment is asked for."""
    try:
        ray.get(service.get.remote("owned"))
    except placement.UnknownDeployment as error:
        return type(error).__mro__
    return ()
