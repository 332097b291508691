"""``placement plan``, ``placement diff`` and ``placement snapshot``: what applying declarations would do."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from placement import errors
from placement.cli import common
from placement.cli.group import Command

DIFFERENT = 1
"""The exit code of ``placement diff`` if applying would change something, as for ``diff`` and ``kubectl diff``."""

Failures = dict[str, errors.PlacementError]
"""Deployment -> why it could not be applied."""


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement plan deployments.toml\n"
    "  placement snapshot > cluster.json\n  placement plan --file cluster.json --explain deployments.toml",
)
@common.with_files
@click.option(
    "--file",
    "cluster",
    type=click.Path(path_type=Path),
    help="Plan for the cluster in this file of `placement snapshot`. Needs no Ray and no cluster.",
)
@click.option(
    "--explain", is_flag=True, help="Also say, stage by stage, how many nodes were excluded and why."
)
@click.option(
    "--atomic",
    is_flag=True,
    help="Refuse if any deployment does not fit now; without it, replicas that find no room wait.",
)
@click.option(
    "--prune", is_flag=True, help="Also show the release of deployments that none of the files names."
)
@common.with_address
@common.with_json
def plan(
    files: tuple[Path, ...],
    recursive: bool,
    cluster: Path | None,
    explain: bool,
    atomic: bool,
    prune: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Shows what applying each FILE would do now. Reserves nothing.

    With --explain, it ends with the first deployment that finds no room, and exits with 1.
    """
    from placement.wire.files import load_all

    if cluster is not None and address is not None:
        raise click.UsageError("--file and --address exclude each other; give one of them")
    wanted = load_all(files, recursive)
    plans: list[Any] = []
    explained: list[Any] = []
    failures: Failures = {}
    if cluster is not None:
        from placement.wire.cluster import load_cluster
        from placement.wire.dry_run import explain_deployments, plan_deployments

        known = load_cluster(cluster)
        snapshot, held = known.snapshot(), known.held()
        if explain:
            explained = explain_deployments(snapshot, held, wanted)
        else:
            plans = plan_deployments(snapshot, held, wanted, atomic)
        standing = [_held(name, one) for name, one in held.items()]
    else:
        with common.service(address) as service:
            standing = [] if as_json else common.ask(service.status.remote())["deployments"]
            if explain:
                explained = common.ask(service.explain_all.remote(wanted))
            else:
                plans, failures = planned(service, wanted, atomic)
    refusal = explained[-1].error if explained else None
    plans = plans or [one.plan for one in explained if one.plan is not None]
    if failures and not plans:
        raise _first(failures)
    if as_json:
        listed = explained if explain else plans
        common.dump({"deployments": [one.to_dict() for one in listed]})
    else:
        from placement.cli.views.difference import unmanaged_line
        from placement.cli.views.tables import explanation_view

        for one in explained:
            common.show(*explanation_view(one.to_dict()))
        others = unmanaged(standing, [one.name for one in wanted])
        _show(plans, standing, others if prune else [], failures)
        if others and not prune:
            common.note(unmanaged_line(others))
    if failures:
        raise _first(failures)
    if refusal is not None:
        raise refusal


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement diff deployments.toml || placement apply deployments.toml",
)
@common.with_files
@click.option("--prune", is_flag=True, help="Deployments that none of the files names are a difference, too.")
@common.with_address
@common.with_json
def diff(files: tuple[Path, ...], recursive: bool, prune: bool, address: str | None, as_json: bool) -> None:
    """Shows how the cluster differs from what each FILE declares. New is +, unchanged =, changed ~, replaced -/+.

    Exits with 0 if nothing differs, and with 1 if something does.
    """
    from placement.cli.views.difference import difference_lines, differs, unmanaged_line, workers_of
    from placement.wire.files import load_all

    wanted = load_all(files, recursive)
    with common.service(address) as service:
        standing = common.ask(service.status.remote())["deployments"]
        plans, failures = planned(service, wanted)
    if failures and not plans:
        raise _first(failures)
    others = unmanaged(standing, [one.name for one in wanted])
    workers, listed = workers_of(standing), [one.to_dict() for one in plans]
    different = differs(listed, workers) or bool(prune and others)
    if as_json:
        common.dump({"differs": different, "deployments": listed, "unmanaged": others})
    else:
        told = {name: error.to_dict() for name, error in failures.items()}
        common.show(*difference_lines(listed, workers, others if prune else [], told))
        if others and not prune:
            common.note(unmanaged_line(others))
    if failures:
        raise _first(failures)
    sys.exit(DIFFERENT if different else 0)


@click.command(cls=Command, epilog="\b\nExample:\n  placement snapshot > cluster.json")
@common.with_address
@common.with_json
def snapshot(address: str | None, as_json: bool) -> None:
    """Prints the cluster as the planner sees it, as JSON. It is for `placement plan --file`, and holds no secret."""
    with common.service(address) as service:
        common.dump(common.ask(service.snapshot.remote()))


def planned(service: Any, wanted: Sequence[Any], atomic: bool = False) -> tuple[list[Any], Failures]:
    """What applying would do; if one deployment cannot be applied, what each alone would do.

    Returns:
        The plans, and why others cannot be applied.

    Raises:
        PlacementError: with ``atomic``, what would be refused.
    """
    try:
        return common.ask(service.plan_all.remote(wanted, **_if_atomic(atomic))), {}
    except errors.PlacementError:
        if atomic:
            raise
    plans: list[Any] = []
    failures: Failures = {}
    for several in _apart(wanted):
        try:
            if len(several) == 1:
                plans.append(common.ask(service.plan.remote(several[0])))
            else:
                plans += common.ask(service.plan_all.remote(several))
        except errors.PlacementError as error:
            failures |= {one.name: error for one in several}
    return plans, failures


def _apart(wanted: Sequence[Any]) -> list[list[Any]]:
    """The deployments one by one, except that the members of a group come together."""
    found: dict[tuple[bool, str], list[Any]] = {}
    for one in wanted:
        key = (True, one.group.name) if one.group else (False, one.name)
        found.setdefault(key, []).append(one)
    return list(found.values())


def unmanaged(standing: Iterable[Mapping[str, Any]], names: Iterable[str]) -> list[str]:
    """Placed deployments that are not among the names; without those that have an owner or are being released."""
    known = set(names)
    return sorted(
        one["name"]
        for one in standing
        if one["name"] not in known
        and _kind(one.get("owner")) == "detached"
        and one.get("state") != "releasing"
    )


def _kind(owner: Any) -> str:
    """What kind of owner a deployment has."""
    return str((owner.get("kind") if isinstance(owner, Mapping) else owner) or "detached")


def _if_atomic(atomic: bool) -> dict[str, Any]:
    return {"atomic": True} if atomic else {}


def _first(failures: Failures) -> errors.PlacementError:
    """The first of several errors, with the others as its notes."""
    first, *others = failures.values()
    for error in others:
        first.add_note(str(error))
    return first


def _held(name: str, one: Any) -> dict[str, Any]:
    """A deployment in a file of ``placement snapshot``, in the form of a status report."""
    assignments = [
        {"replica_index": index, "gpus": list(part.gpus)}
        for index, parts in one.by_index().items()
        for part in parts
    ]
    return {"name": name, "assignments": assignments}


def _show(
    plans: Sequence[Any], standing: Sequence[Mapping[str, Any]], pruned: Sequence[str], failures: Failures
) -> None:
    from placement.cli.views.difference import difference_lines, workers_of
    from placement.cli.views.tables import assignments_table, links_view, runtimes_note

    told = {name: error.to_dict() for name, error in failures.items()}
    rows = [one.to_dict() for one in plans]
    common.show(*difference_lines(rows, workers_of(standing), pruned, told), "")
    placed = [{**row, "pending": {}} for row in rows]
    if plans:
        common.show(assignments_table(placed, title="planned, nothing is reserved"))
        for group in dict.fromkeys(row["group"] for row in rows if row.get("group")):
            members = [row for row in rows if row.get("group") == group]
            links = [link for row in members for link in row["links"]]
            common.show(*links_view(links, group, any(row["bounded"] for row in members)), "")
        common.show(runtimes_note(rows))
