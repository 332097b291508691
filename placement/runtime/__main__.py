"""Starts the service in a job of its own: the child process of ``start``, where the caller's job has an environment."""

from __future__ import annotations

import json
import logging
import sys

import ray

from placement.errors import ServiceNotRunning
from placement.runtime.bootstrap import start_in_this_job
from placement.runtime.ray_internals import WITHOUT_HOOK, driver_at
from placement.wire.node_types import NodeType


def main(argument: str) -> None:
    """Connects as a driver without a runtime_env, and starts the service. The last line of stderr tells a failure."""
    address, node_address, types, *settings = json.loads(argument)
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **driver_at(node_address),
        **WITHOUT_HOOK,
    )
    try:
        start_in_this_job([NodeType(**one) for one in types], *settings)
    except ServiceNotRunning as error:
        sys.exit(error.problem)


if __name__ == "__main__":
    main(sys.argv[1])
