"""``placement release`` and ``placement renew``: deployments released, or kept for longer."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import click

from placement import errors
from placement.cli import common
from placement.cli.group import REFUSED, Command
from placement.errors import counted


@click.command(
    cls=Command, epilog="\b\nExample:\n  placement release llama-70b whisper\n  placement release --all --yes"
)
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "everything", is_flag=True, help="Release every deployment. Asks first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@common.with_address
@common.with_json
def release(names: tuple[str, ...], everything: bool, yes: bool, address: str | None, as_json: bool) -> None:
    """Releases deployments, and ends their workers. All that they hold is given back.

    If one of the names is not known, nothing is released. With --all, add --yes if there is no terminal to ask on.
    """
    if everything == bool(names):
        raise click.UsageError("give the names of deployments, or --all" + " and no names" * everything)
    with common.service(address) as service:
        report = common.ask(service.status.remote())
        if everything:
            released = _release_all(service, report, yes, as_json)
        else:
            released = _release(service, report, names, as_json)
    if as_json:
        common.dump({"released": released})


def _release(service: Any, report: dict[str, Any], names: tuple[str, ...], as_json: bool) -> dict[str, int]:
    released: dict[str, int] = {}
    listed = [*report["deployments"], *report["unreadable"], *report.get("groups", ())]
    known = tuple(sorted({one["name"] for one in listed}))
    wanted = dict.fromkeys(names)
    if missing := [name for name in wanted if name not in known]:
        error = errors.UnknownDeployment(missing[0], known)
        for name in missing[1:]:
            error.add_note(f"nor is there one named {name!r}")
        error.add_note("nothing was released")
        raise error
    group_of = {one["name"]: one.get("group") or one["name"] for one in report["deployments"]}
    ended: set[str] = set()
    for name in wanted:
        if (one_with := group_of.get(name, name)) in ended:  # its group is released already
            continue
        ended.add(one_with)
        before = f"released before: {', '.join(released)}" if released else "nothing was released"
        with (
            common.noted(KeyboardInterrupt, f"the placement service goes on releasing {name}"),
            common.noted(errors.PlacementError, before),
        ):
            released[name] = common.ask(service.release.remote(name, caller=common.asker()))
        if not as_json:
            members = [one for one in report["deployments"] if group_of[one["name"]] == one_with]
            common.say(f"released {name}: {_what_ended(released[name], members)}")
    return released


def _what_ended(replicas: int, members: list[dict[str, Any]]) -> str:
    """What a release did; ``members`` are the deployments as they were before."""
    queued = any(one["queue_position"] is not None for one in members)
    waited = max(0, sum(one["replicas"] for one in members) - replicas) if queued else 0
    if not waited:
        return counted(replicas, "replica")
    if not replicas:
        return "it waited for room, and is no longer in the queue"
    return f"{counted(replicas, 'replica')}; {waited} more waited for room, and left the queue"


def _release_all(service: Any, report: dict[str, Any], yes: bool, as_json: bool) -> dict[str, int]:
    """Releases everything; returns how many replicas each deployment had."""
    replicas = {one["name"]: _replicas(one) for one in report["deployments"]}
    if replicas and not yes and not common.agreed(what_ends(report), "add --yes", as_json):
        common.note("nothing is changed")
        sys.exit(REFUSED)
    with common.noted(KeyboardInterrupt, "the placement service goes on releasing"):
        names = common.ask(service.release_all.remote(caller=common.asker()))
    if not as_json:
        common.say(f"released {', '.join(names)}" if names else "nothing is placed")
    return {name: replicas.get(name, 0) for name in names}


def what_ends(report: dict[str, Any]) -> str:
    """What releasing everything would do."""
    placed = report["deployments"]
    replicas = sum(map(_replicas, placed))
    return f"release {counted(len(placed), 'deployment')} with {counted(replicas, 'replica')}, ending their workers"


def _replicas(one: dict[str, Any]) -> int:
    return len({a["replica_index"] for a in one["assignments"]})


@click.command(cls=Command, epilog="\b\nExample:\n  placement renew llama-70b")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@common.with_address
@common.with_json
def renew(names: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Renews deployments with ttl_seconds. Their time starts again now."""
    renewed: dict[str, float | None] = {}
    with common.service(address) as service:
        for name in dict.fromkeys(names):
            before = f"renewed before: {', '.join(renewed)}" if renewed else "nothing was renewed"
            with common.noted(errors.PlacementError, before):
                until = renewed[name] = common.ask(service.renew.remote(name))
            if not as_json:
                when = None if until is None else datetime.fromtimestamp(until).strftime("%Y-%m-%d %H:%M:%S")
                common.say(
                    f"{name} stays {f'until {when}' if when else 'without limit: it has no ttl_seconds'}"
                )
    if as_json:
        common.dump({"renewed": renewed})
