"""``placement release``: gives back what deployments hold."""

from __future__ import annotations

import click

from placement import errors
from placement.cli import common
from placement.cli.group import Command
from placement.errors import counted


@click.command(cls=Command, epilog="\b\nExample:\n  placement release llama-70b whisper")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@common.with_address
@common.with_json
def release(names: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Gives back all that deployments hold, and ends the workers in their placement groups.

    If one of the names is not known, nothing is released.
    """
    released: dict[str, int] = {}
    with common.service(address) as service:
        report = common.ask(service.status.remote())
        placed = [one["name"] for one in report["deployments"]]
        known = {*placed, *(one["name"] for one in report["unreadable"])}
        wanted = dict.fromkeys(names)
        if missing := [name for name in wanted if name not in known]:
            error = errors.UnknownDeployment(missing[0], tuple(placed))
            for name in missing[1:]:
                error.add_note(f"nor is {name!r}")
            error.add_note("nothing was released")
            raise error
        for name in wanted:
            before = f"released before: {', '.join(released)}" if released else "nothing was released"
            with (
                common.noted(KeyboardInterrupt, f"the placement service goes on releasing {name}"),
                common.noted(errors.PlacementError, before),
            ):
                released[name] = common.ask(service.release.remote(name))
            if not as_json:
                common.say(f"released {name}: {counted(released[name], 'replica')}")
    if as_json:
        common.dump({"released": released})
