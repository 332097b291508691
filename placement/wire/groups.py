"""Groups among deployments: that they are whole, and what path each of their links got."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from placement.core.replicas import PlannedReplica
from placement.core.roles import Located, Member, joined
from placement.core.snapshot import Node
from placement.errors import InvalidDeployment
from placement.wire.deployment import Deployment, Group


def groups_of(wanted: Sequence[Deployment]) -> dict[str, Group]:
    """The groups that deployments are members of, by name.

    Raises:
        InvalidDeployment: members of one are missing, or declare it differently: a group is declared as one.
    """
    found: dict[str, Group] = {}
    problems = []
    names = [one.name for one in wanted]
    for one in wanted:
        if one.group is None:
            continue
        group = found.setdefault(one.group.name, one.group)
        if group != one.group:
            problems.append(f"group: {one.name!r} declares {group.name!r} unlike others; give all the same")
    for group in found.values():
        missing = [name for name in group.members if name not in names]
        if missing:
            problems.append(
                f"group: {group.name!r} is declared without its members {', '.join(missing)}; it is planned as one, so "
                "give all of them in one call of apply_all or plan_all"
            )
        if group.name in names:
            problems.append(f"group: {group.name!r} is the name of a deployment, too; rename one of them")
    if problems:
        raise InvalidDeployment("groups", tuple(problems))
    return found


def together(wanted: Sequence[Deployment], order: Iterable[int]) -> list[int]:
    """Positions in the same order, but that the members of a group follow the first of them."""
    left = list(order)
    found: list[int] = []
    while left:
        group = wanted[left[0]].group
        several = [i for i in left if i == left[0] or (group is not None and wanted[i].group == group)]
        found += several
        left = [i for i in left if i not in several]
    return found


def located(
    nodes: Mapping[str, Node], replicas: Mapping[str, Iterable[PlannedReplica]]
) -> dict[Member, Located]:
    """Where replicas are, of those that are on one node that is alive.

    Args:
        nodes: by id.
        replicas: deployment -> what it holds.
    """
    return {
        (name, part.replica_index): (nodes[part.node_id], part.gpus)
        for name, parts in replicas.items()
        for part in parts
        if part.node_id in nodes and part.gpus
    }


def links_of(group: Group, near: Sequence[str], places: Mapping[Member, Located]) -> list[dict[str, Any]]:
    """What path each two replicas got that talk, JSON-ready.

    Each has ``unit``, ``between``, ``via``, ``route``, ``gb_per_s`` (``None`` if not known) and ``gpus``.

    Args:
        group: as it is declared.
        near: labels of which nodes near each other share the values, widest first.
        places: where its replicas are.
    """
    roles = group.planned()
    return [one.to_dict(roles.unit_of(one.one)) for one in joined(roles, near, places)]
