"""Use ``placement.placement_group`` where code calls ``ray.util.placement_group``: the same group, on the best GPUs.

On a running cluster (``ray start --head --num-gpus=8``; the service is started if it does not run)::

    python examples/placement_group.py --gpus 4
"""

import argparse

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from placement import placement_group  # instead of ray.util.placement_group


@ray.remote
class Trainer:
    """Stands for one rank of a training framework."""

    def gpu(self) -> str:
        return ray.get_runtime_context().get_accelerator_ids()["GPU"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=2)
    args = parser.parse_args()

    ray.init(address="auto", log_to_driver=False)
    group = placement_group([{"GPU": 1, "CPU": 0.5}] * args.gpus, strategy="PACK", name="example")
    inside = [
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(args.gpus)
    ]
    ranks = [Trainer.options(num_gpus=1, num_cpus=0.5, scheduling_strategy=one).remote() for one in inside]
    print(f"ranks on GPUs {[int(gpu) for gpu in ray.get([rank.gpu.remote() for rank in ranks])]}")
    remove_placement_group(group)  # or just end: the group is this process's own


if __name__ == "__main__":
    main()
