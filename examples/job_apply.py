"""A job that applies a deployment file and leaves it placed::

ray job submit --working-dir examples -- python job_apply.py deployments.toml
"""

import sys

import ray

import placement


def main() -> int:
    try:
        deployments = placement.load_deployments(sys.argv[1])
        ray.init(address="auto", log_to_driver=False)
        results = placement.Client.start().apply_all(deployments, atomic=True)
    except placement.PlacementError as error:
        print(f"not placed: {error}", file=sys.stderr)
        return 1
    for result in results:
        for a in result.assignments:
            print(
                f"{result.deployment}[{a.replica_index}] {a.node_name} {a.gpus if a.gpus else a.egress_resource}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
