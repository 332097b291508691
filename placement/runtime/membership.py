"""Which deployments a name means, since a group is placed, changed and released as one.

Other threads may change declarations meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from placement.errors import UnknownDeployment
from placement.wire.deployment import Deployment


class Declared(Protocol):
    """An object with a declaration."""

    @property
    def deployment(self) -> Deployment:
        """Its declaration."""


def meant_by(name: str, declared: Mapping[str, Declared], unreadable: Collection[str] = ()) -> list[str]:
    """The deployment of that name, or the existing members of the group of that name.

    Args:
        name: of a deployment, or of a group.
        declared: all deployments, by name.
        unreadable: names of unreadable records.

    Raises:
        UnknownDeployment: neither exists.
    """
    if name in declared or name in unreadable:
        return [name]
    members = [each for each in _members_of(name, declared) if each in declared]
    if not members:
        raise UnknownDeployment(name, names_of(declared, unreadable))
    return members


def names_of(declared: Mapping[str, Declared], unreadable: Collection[str] = ()) -> tuple[str, ...]:
    """All names that mean something: of deployments, of groups, and of unreadable records."""
    groups = {
        one.deployment.group.name for one in tuple(declared.values()) if one.deployment.group is not None
    }
    return tuple(sorted({*declared, *unreadable, *groups}))


def with_members(
    names: Iterable[str], declared: Mapping[str, Declared], groups: Mapping[str, Sequence[str]]
) -> list[str]:
    """The names of deployments, whether they are there or not, with its members in place of each known group.

    Args:
        names: of deployments and groups.
        declared: all deployments, by name.
        groups: name -> members of groups that are there, or were.
    """
    return [each for name in names for each in ([name] if name in declared else groups.get(name, [name]))]


def changed_with(name: str, declared: Mapping[str, Declared]) -> list[str]:
    """The members of the group of that name, or of the group of the deployment of that name.

    Only the name, if there is no such group.
    """
    known = declared.get(name)
    if known is None:
        return _members_of(name, declared) or [name]
    group = known.deployment.group
    return sorted(group.members) if group is not None else [name]


def _members_of(group_name: str, declared: Mapping[str, Declared]) -> list[str]:
    """The declared members of a group; empty if there is no such group."""
    groups = (one.deployment.group for one in tuple(declared.values()))
    return next((sorted(one.members) for one in groups if one is not None and one.name == group_name), [])
