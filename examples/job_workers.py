"""A job that starts workers in what is placed already, and lets each say which GPU it has::

    ray job submit --working-dir examples -- python job_workers.py llama-70b

Workers end with the job; the placement stays. An engine that should outlive the job is started with
``lifetime="detached"`` and a name.
"""

import sys

import ray

import placement


@ray.remote
class Worker:
    """One rank."""

    def gpu(self) -> int:
        return int(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])


def main() -> int:
    ray.init(address="auto", log_to_driver=False)
    result = placement.Client().get(sys.argv[1])
    wrong = 0
    for a in result.assignments:
        workers = [Worker.options(**a.actor_options(rank)).remote() for rank in range(len(a.gpus))]
        got = ray.get([worker.gpu.remote() for worker in workers])
        print(f"{result.deployment}[{a.replica_index}] {a.node_name}: placed on {a.gpus}, workers on {got}")
        wrong += got != a.gpus
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
