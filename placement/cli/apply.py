"""``placement apply``: makes the cluster match what files declare."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from placement import errors
from placement.cli import common, waiting
from placement.cli.group import REFUSED, Command, OptionalNumber
from placement.cli.plan import planned, unmanaged
from placement.cli.progress import Progress
from placement.errors import counted

AFTER_PRUNE_SECONDS = 5.0
"""How long waiting replicas may take to get the room of what was released."""


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement apply deployments.toml\n  placement apply deployments/ --prune\n"
    "  placement apply deployments.toml --wait 600",
)
@common.with_files
@click.option(
    "--atomic",
    is_flag=True,
    help="If any deployment does not fit now, also one that waits already, change nothing; without it, replicas that "
    "find no room wait.",
)
@click.option("--prune", is_flag=True, help="Release deployments that none of the files names. Asks first.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--wait",
    cls=OptionalNumber,
    unsaid=math.inf,
    type=common.Seconds(min=0),
    metavar="[SECONDS]",
    help="Wait until all replicas are placed, for SECONDS at most; exits with 1 if they are not.",
)
@common.with_address
@common.with_json
def apply(
    files: tuple[Path, ...],
    recursive: bool,
    atomic: bool,
    prune: bool,
    yes: bool,
    wait: float | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Makes the cluster match each FILE. FILE is TOML or YAML, a folder of them, or - for stdin.

    Replicas that find no room wait for it. The command says which; this is no error. If one deployment cannot be
    applied, the others still are. Deployments that no FILE names stay as they are.
    """
    from placement.wire.files import load_all

    wanted = load_all(files, recursive)
    names = [one.name for one in wanted]
    with common.service(address) as service:
        standing = common.ask(service.status.remote())["deployments"]
        others = unmanaged(standing, names)
        pruned = others if prune else []
        with _noting_what_waits(standing):
            if not as_json:
                _show_difference(service, wanted, atomic, standing, pruned)
            if pruned and not yes and not _agreed(pruned, standing, as_json):
                common.note("nothing is changed")
                sys.exit(REFUSED)
            if not as_json:
                common.note(f"placing {counted(len(wanted), 'deployment')} ...")
            results, partly = _apply(service, wanted, atomic, shows=not as_json)
        released = [] if partly else _release(service, pruned)
        waited = None
        if wait is not None:
            waited = waiting.until_placed(service, results, wait, tells=not as_json)
            results |= waited.results
        elif released:
            waits = [name for name, one in results.items() if one["pending"]]
            results |= waiting.until_placed(service, waits, AFTER_PRUNE_SECONDS, tells=False).results
        places = _places(service, results)
        groups = _groups(service, wanted) if not as_json else []
    left = [name for name in others if name not in released]
    listed = [{**one, "queue_position": places.get(name)} for name, one in results.items()]
    if as_json:
        failures = dict(partly.failures) if partly else {}
        common.dump({"deployments": listed, "failures": failures, "released": released, "unmanaged": left})
    else:
        _show_results(listed, places, released, left, prune, groups)
    if partly is not None:
        raise partly
    if waited is not None and wait is not None:
        waiting.require_placed(waited, wait)


@contextlib.contextmanager
def _noting_what_waits(standing: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Adds to a refusal that the deployment waited before, as a refusal does not end that."""
    try:
        yield
    except errors.Unplaceable as refusal:
        name = refusal.deployment  # or its group
        if any(one["pending"] and name in (one["name"], one.get("group")) for one in standing):
            refusal.add_note(f"{name} goes on waiting as it did before")
        raise


def _show_difference(
    service: Any,
    wanted: Sequence[Any],
    atomic: bool,
    standing: Sequence[Mapping[str, Any]],
    pruned: Sequence[str],
) -> None:
    from placement.cli.views.difference import difference_lines, workers_of

    with Progress(f"planning {counted(len(wanted), 'deployment')}"):
        plans, failures = planned(service, wanted, atomic)
    told = {name: error.to_dict() for name, error in failures.items()}
    common.show(*difference_lines([one.to_dict() for one in plans], workers_of(standing), pruned, told), "")


def _agreed(pruned: Sequence[str], standing: Sequence[Mapping[str, Any]], as_json: bool) -> bool:
    """Asks whether the deployments that no file names may be released."""
    replicas = sum(
        len({a["replica_index"] for a in one["assignments"]}) for one in standing if one["name"] in pruned
    )
    what = f"release {', '.join(pruned)} with {counted(replicas, 'replica')}, ending their workers"
    return common.agreed(what, "add --yes", as_json)


def _apply(
    service: Any, wanted: Sequence[Any], atomic: bool, shows: bool
) -> tuple[waiting.Results, errors.PartlyApplied | None]:
    """The results of those that could be applied, in order, and the errors of the others."""
    options = {"atomic": True} if atomic else {}
    with common.noted(KeyboardInterrupt, common.GOES_ON), Progress("placing", shows) as progress:

        def tell() -> None:
            progress.say(how_many_are_placed(service, wanted))

        try:
            applied = service.apply_all.remote(wanted, caller=common.asker(), **options)
            results = common.ask(applied, tell if progress.is_shown else None)
        except errors.PartlyApplied as error:
            found: waiting.Results = {}
            for name in error.applied:
                with contextlib.suppress(errors.UnknownDeployment):  # somebody released it meanwhile
                    found[name] = common.ask(service.get.remote(name)).to_dict()
            return found, error
    return {one.deployment: one.to_dict() for one in results}, None


def how_many_are_placed(service: Any, wanted: Sequence[Any]) -> str:
    """How far the service is: ``25 of 80 replicas placed``."""
    names = {one.name for one in wanted}
    standing = [one for one in common.ask(service.status.remote())["deployments"] if one["name"] in names]
    placed = sum(len({a["replica_index"] for a in one["assignments"]}) for one in standing)
    return f"{placed} of {counted(sum(one.replicas for one in wanted), 'replica')} placed"


def _release(service: Any, names: Sequence[str]) -> list[str]:
    released = []
    for name in names:
        with (
            common.noted(KeyboardInterrupt, f"the placement service goes on releasing {name}"),
            contextlib.suppress(errors.UnknownDeployment),  # somebody else released it first
        ):
            common.ask(service.release.remote(name, caller=common.asker()))
            released.append(name)
    return released


def _places(service: Any, results: waiting.Results) -> dict[str, int]:
    """The places in the queue of the deployments that wait."""
    if not any(one["pending"] for one in results.values()):
        return {}
    report = common.ask(service.status.remote())
    return {one["name"]: one["queue_position"] for one in report["deployments"] if one.get("queue_position")}


def _groups(service: Any, wanted: Sequence[Any]) -> list[Mapping[str, Any]]:
    """The groups that are declared, as a status report has them."""
    names = {one.group.name for one in wanted if one.group is not None}
    if not names:
        return []
    return [one for one in common.ask(service.status.remote())["groups"] if one["name"] in names]


def _show_results(
    results: Sequence[Mapping[str, Any]],
    places: Mapping[str, int],
    released: Sequence[str],
    left: Sequence[str],
    prune: bool,
    groups: Sequence[Mapping[str, Any]] = (),
) -> None:
    from placement.cli.views.difference import unmanaged_line
    from placement.cli.views.tables import assignments_table, links_view

    common.show(assignments_table(results, title="placed", places=places))
    for group in groups:
        common.show(*links_view(group["links"], group["name"]))
    pending = sum(len(one["pending"]) for one in results)
    if pending:
        verb = "waits" if pending == 1 else "wait"
        common.note(
            f"{counted(pending, 'replica')} {verb} for room; `placement wait NAME` waits for a deployment"
        )
    if released:
        common.say(f"released {', '.join(released)}")
    if prune and left:
        common.note(f"not released, as not all could be applied: {', '.join(left)}")
    elif left:
        common.note(unmanaged_line(left))
