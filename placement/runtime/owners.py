"""Owners of deployments: Ray jobs and actors, and whether they have ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping

import ray

from placement.errors import DeploymentConflict, InvalidDeployment
from placement.runtime import ray_internals
from placement.runtime.deployment_state import DeploymentState, Owner
from placement.wire.deployment import Deployment

JOBS_SECONDS = 0.2
"""How old the list of jobs may be: Ray returns all at once, including those that ended long ago."""


def owner_of(wanted: Deployment, caller: Mapping[str, str] | None) -> Owner | None:
    """The owner of a new declaration; ``None`` if it has none.

    Args:
        wanted: the declaration.
        caller: the caller, as :class:`placement.Client` gives it: ``job``, ``actor`` and ``owner_actor``, ids in hex;
            ``submission``.

    Raises:
        InvalidDeployment: the declared owner is unknown here.
    """
    said = dict(caller or {})
    if actor := said.get("owner_actor"):
        return {"kind": "actor", "actor": actor}
    if wanted.owner == "detached":
        return None
    where = f"deployment {wanted.name!r}"
    if wanted.owner == "job":
        if not said.get("job"):
            problem = "owner: job needs the caller's job; call placement.Client, or set owner: detached"
            raise InvalidDeployment(where, (problem,))
        return {"kind": "job", **{name: said[name] for name in ("job", "submission") if said.get(name)}}
    return asker_of(said)


def asker_of(caller: Mapping[str, str] | None) -> Owner:
    """The caller in the form of an owner."""
    said = caller or {}
    return {"kind": "caller", **{name: said[name] for name in ("job", "actor") if said.get(name)}}


def belongs_to_another(known: DeploymentState, owner: Owner | None) -> DeploymentConflict:
    """The error that the deployment belongs to another owner than the caller."""
    theirs, ours = ("nobody" if one is None else one["kind"] for one in (known.owner, owner))
    return DeploymentConflict(known.name, {"owner": (theirs, f"another {ours}" if ours == theirs else ours)})


def has_ended(owner: Owner) -> bool:
    """Whether a job or an actor has ended, by the GCS; one that the GCS does not know has ended.

    For an actor its job does not count: a detached actor outlives it. A submitted job consists of all its drivers, and
    of the actor that runs its command. If nothing is known of an owner, it counts as alive.
    """
    if "actor" in owner:
        return ray_internals.actor_has_ended(owner["actor"])
    if "job" not in owner or owner["job"] in _jobs.running():
        return False
    return "submission" not in owner or not _is_submitted(owner["submission"])


class _Jobs:
    """Ids of the Ray jobs that have not ended. Thread-safe."""

    def __init__(self, read: Callable[[], list[dict[str, object]]]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._running: frozenset[str] = frozenset()
        self._read_at = float("-inf")

    def running(self) -> frozenset[str]:
        """The jobs as they were some tenths of a second ago, at most."""
        with self._lock:
            if (now := time.monotonic()) - self._read_at > JOBS_SECONDS:
                self._running = frozenset(str(row["JobID"]) for row in self._read() if not row["IsDead"])
                self._read_at = now
            return self._running


_jobs = _Jobs(ray_internals.jobs)


def _is_submitted(submission: str) -> bool:
    """Whether the actor that runs the command of a submitted job exists."""
    name, namespace = ray_internals.SUPERVISOR
    with contextlib.suppress(ValueError):
        ray.get_actor(name.format(submission), namespace=namespace)
        return True
    return False
