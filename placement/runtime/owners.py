"""Whose end ends a deployment: Ray jobs and actors, and whether they are no more."""

from __future__ import annotations

from collections.abc import Mapping

import ray

from placement.errors import InvalidDeployment
from placement.runtime.state import Owner
from placement.wire.deployment import Deployment


def owner_of(wanted: Deployment, caller: Mapping[str, str] | None) -> Owner | None:
    """The owner of a deployment that somebody asks for; ``None`` if it is to outlive everybody.

    Args:
        wanted: what is declared.
        caller: who asks, as :class:`placement.Client` says it: ``job``, ``actor`` and ``owner_actor``, ids in hex.

    Raises:
        InvalidDeployment: the declaration names an owner that is not known here.
    """
    said = dict(caller or {})
    if actor := said.get("owner_actor"):
        return {"kind": "actor", "actor": actor}
    if wanted.owner == "detached":
        return None
    where = f"deployment {wanted.name!r}"
    if wanted.owner == "job":
        if not said.get("job"):
            problem = "owner: job needs to know whose; ask by placement.Client, or say owner: detached"
            raise InvalidDeployment(where, (problem,))
        return {"kind": "job", "job": said["job"]}
    return {"kind": "caller", **{name: said[name] for name in ("job", "actor") if said.get(name)}}


def has_ended(owner: Owner) -> bool:
    """Whether a job or an actor is no more, as the GCS knows; one that it does not know has ended."""
    return _is_dead_actor(owner["actor"]) if owner["kind"] == "actor" else _is_dead_job(owner["job"])


def waits_in_vain(caller: Mapping[str, str]) -> bool:
    """Whether a call that waits is of no use to anybody: its caller is no more, or the actor for which it is."""
    actors = [caller[name] for name in ("actor", "owner_actor") if caller.get(name)]
    return any(map(_is_dead_actor, actors)) or ("job" in caller and _is_dead_job(caller["job"]))


def _is_dead_actor(actor: str) -> bool:
    known = ray._private.state.state.actor_table(actor)
    return not known or known["State"] == "DEAD"


def _is_dead_job(job: str) -> bool:
    jobs = {row["JobID"]: row for row in ray._private.state.state.job_table()}
    return job not in jobs or bool(jobs[job]["IsDead"])
