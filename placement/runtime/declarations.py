"""What callers declare: parsed, checked as a whole, and given its owner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from placement.errors import InvalidDeployment
from placement.runtime.deployment_state import Owner
from placement.runtime.owners import owner_of
from placement.wire.constraints import PlacementConstraints
from placement.wire.deployment import Deployment
from placement.wire.files import parse_model

BY_CLIENT = "use `placement.Client().place`, which creates them"
ONE_BY_ONE = "place them one by one with `placement.Client().place`, which creates them"

DeploymentLike = Deployment | Mapping[str, Any]
Limits = PlacementConstraints | Mapping[str, Any] | None
Caller = Mapping[str, str] | None
"""The caller: ``job``, ``actor`` and ``owner_actor``, ids in hex, as :class:`placement.Client` gives them."""


def parse(deployment: DeploymentLike, constraints: Any) -> Deployment:
    """Parses and checks a caller's declaration.

    Raises:
        InvalidDeployment: a field is refused.
    """
    source = f"deployment {deployment.get('name')!r}" if isinstance(deployment, Mapping) else "deployment"
    wanted = parse_model(Deployment, deployment, source)
    if constraints is not None:
        limits = parse_model(PlacementConstraints, constraints, f"deployment {wanted.name!r}: constraints")
        # Validated again as a whole: constraints can contradict the rest.
        wanted = parse_model(Deployment, wanted.model_copy(update={"constraints": limits}), source)
    return wanted


def alone(wanted: Deployment) -> Deployment:
    """Checks that a deployment is placed by itself.

    Raises:
        InvalidDeployment: it is a member of a group.
    """
    if wanted.group is not None:
        problem = (
            f"group: it is a member of {wanted.group.name!r}, which is placed as one; give all of its members to "
            "apply_all (with atomic all are placed now, or none)"
        )
        raise InvalidDeployment(f"deployment {wanted.name!r}", (problem,))
    return wanted


def owner_unless_caller(wanted: Deployment, caller: Caller, instead: str = BY_CLIENT) -> Owner | None:
    """The owner of a deployment whose groups the service creates; ``None`` if it has none.

    Args:
        wanted: the declaration.
        caller: the caller.
        instead: the advice for a deployment that is to end with its caller.

    Raises:
        InvalidDeployment: its caller has to create the groups; or its owner is unknown.
    """
    if wanted.owner == "caller":
        problem = (
            f"owner: caller: the caller must create the placement groups; {instead}, or set owner: detached"
        )
        raise InvalidDeployment(f"deployment {wanted.name!r}", (problem,))
    return owner_of(wanted, caller)


def owner_key(owner: Owner | None) -> tuple[tuple[str, str], ...]:
    """An owner in a comparable form."""
    return tuple(sorted((owner or {}).items()))
