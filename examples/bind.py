"""Place a model and bind each worker to what is near its GPU: its own CPUs, the memory near it, the network cards.

On a running cluster (``ray start --head --num-gpus=8``; the service is started if it does not run)::

    python examples/bind.py --gpus 2
"""

import argparse
import os

import ray

import placement


@ray.remote
class Engine:
    """Stands for one rank of an inference engine."""

    def __init__(self) -> None:
        placement.bind()  # first, before a model is loaded

    def where(self) -> str:
        gpu = ray.get_runtime_context().get_accelerator_ids()["GPU"][0]
        cards = os.environ.get("NCCL_IB_HCA", "as NCCL finds them")
        return f"GPU {gpu}: CPUs {sorted(os.sched_getaffinity(0))}, network cards {cards}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2, help="GPUs per replica")
    parser.add_argument("--replicas", type=int, default=1)
    args = parser.parse_args()

    ray.init(address="auto", log_to_driver=False)
    client = placement.Client.start()
    result = client.place(
        placement.Deployment(name="bind-example", model="my/model", gpus=args.gpus, replicas=args.replicas)
    )
    try:
        for a in result.assignments:
            for rank in a.ranks:
                told = {"env_vars": result.environment(a.replica_index, rank)}
                options = result.actor_options(a.replica_index, rank)
                engine = Engine.options(**options, runtime_env=told).remote()
                print(f"replica {a.replica_index} rank {rank}: {ray.get(engine.where.remote())}")
    finally:
        client.release("bind-example")


if __name__ == "__main__":
    main()
