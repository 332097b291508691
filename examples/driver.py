"""Place a model from Python and start one worker on each GPU it got.

On a running cluster (``ray start --head --num-gpus=8``, then ``placement up``)::

    python examples/driver.py
"""

import argparse

import ray

from placement import Client, Deployment


@ray.remote
class Engine:
    """Stands for one tensor-parallel rank of an inference engine."""

    def gpu(self) -> str:
        return ray.get_runtime_context().get_accelerator_ids()["GPU"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2, help="GPUs per replica")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument(
        "--owned", action="store_true", help="release it when this process ends, even if it is killed"
    )
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="how long to wait for room"
    )
    args = parser.parse_args()

    ray.init(address="auto", log_to_driver=False)
    client = Client.start()
    result = client.place(
        Deployment(
            name="driver-example",
            model="my/model",
            gpus=args.gpus,
            replicas=args.replicas,
            owner="caller" if args.owned else "detached",
        ),
        wait_seconds=args.wait,
    )
    try:
        for assignment in result.assignments:
            ranks = range(len(assignment.gpus))
            workers = [Engine.options(**assignment.actor_options(rank)).remote() for rank in ranks]
            got = [int(gpu) for gpu in ray.get([worker.gpu.remote() for worker in workers])]
            where = f"replica {assignment.replica_index} on {assignment.node_name}"
            print(f"{where}: placed on {assignment.gpus}, workers on {got}")
            assert got == assignment.gpus
    finally:
        client.release("driver-example")
    print("released")


if __name__ == "__main__":
    main()
