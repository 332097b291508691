"""The ``placement`` command: the group, and where each command is.

Ray, pydantic and rich are imported by the commands that need them, so that help is instant.
"""

from __future__ import annotations

import click

from placement import __version__
from placement.cli import (
    apply,
    dashboard,
    doctor,
    measure,
    metrics,
    offline,
    past,
    plan,
    release,
    service,
    show,
    topology,
    waiting,
)
from placement.cli.group import Commands, exit_code
from placement.cli.offline import POLICIES

__all__ = ["POLICIES", "Commands", "exit_code", "main"]

EPILOG = """\b
Exit codes:
  0    done; also if something waits for room
  1    refused: there is no room, other users took the GPUs, the name is not
       known, or the service runs with other settings or in another version;
       not all could be applied, or placed in the time given; of `placement
       diff`, something differs; of `placement doctor`, a check failed
  2    bad input: a file, a field or an option
  3    no Ray cluster at the address, or no placement service on it
  130  interrupted
  143  stopped by SIGTERM

\b
Example:
  ray start --head --num-gpus=8
  placement up
  placement apply deployments.toml
"""


@click.group(cls=Commands, epilog=EPILOG)
@click.version_option(__version__, prog_name="placement")
def main() -> None:
    """Places deployments on exactly the right GPUs of a Ray cluster."""


for _command in (
    offline.demo,
    service.up,
    doctor.doctor,
    apply.apply,
    waiting.wait,
    plan.plan,
    plan.diff,
    plan.snapshot,
    offline.simulate,
    show.status,
    show.list_,
    show.get,
    past.events,
    past.logs,
    metrics.metrics,
    topology.topology,
    dashboard.dashboard,
    measure.measure,
    release.release,
    release.renew,
    service.down,
):
    main.add_command(_command)


if __name__ == "__main__":
    main()
