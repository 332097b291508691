"""The errors of this package.

Every field is a positional constructor argument, so that an error keeps its type across a Ray actor call.
The sentence is in ``__str__``: what was refused, why, and what to do next. No error carries a secret.
Every class has a ``code`` of its own, which stays the same when messages are reworded; docs/errors.md lists them.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self


class PlacementError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        code: identifies the error for programs; each class has its own.
    """

    code: ClassVar[str] = "placement_error"

    def to_dict(self) -> dict[str, Any]:
        """``code``, ``type``, ``message`` and the fields, as JSON-ready values."""
        # ray.get raises a class that Ray derives from our class and its own; our error is its cause.
        cause = vars(self).get("cause")
        if isinstance(cause, PlacementError):
            return cause.to_dict()
        fields = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"code": self.code, "type": type(self).__name__, "message": str(self), **_json_ready(fields)}


class InvalidDeployment(PlacementError):
    """A deployment or a deployment file that cannot be accepted.

    Args:
        source: the file or deployment that was refused (``"examples/deployments.toml"``).
        problems: one sentence each, naming the field, the value and the fix.
    """

    code = "invalid_deployment"

    def __init__(self, source: str, problems: tuple[str, ...]) -> None:
        super().__init__(source, problems)
        self.source, self.problems = source, tuple(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        return f"{self.source}: {len(self.problems)} problems\n" + "\n".join(f"  {p}" for p in self.problems)


class UnknownTopology(PlacementError):
    """A topology name that is not in the catalogue.

    Args:
        name: what was asked for.
        known: the names in the catalogue.
        where: where it was named (``"label placement/topology of node 127.0.0.4"``), may be empty.
    """

    code = "unknown_topology"

    def __init__(self, name: str, known: tuple[str, ...], where: str = "") -> None:
        super().__init__(name, known, where)
        self.name, self.known, self.where = name, tuple(known), where

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        return f"{where}unknown topology {self.name!r}; use one of: {', '.join(self.known)}"


class MatrixError(PlacementError):
    """Text that is not the output of ``nvidia-smi topo -m``.

    Args:
        line: 1-based line number, 0 if the text as a whole is at fault.
        problem: what is wrong there.
    """

    code = "invalid_matrix"

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(line, problem)
        self.line, self.problem = line, problem

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.problem}; paste the output of `nvidia-smi topo -m` unchanged"


class InvalidClusterFile(PlacementError):
    """A file that is not what ``placement snapshot`` wrote.

    Args:
        problem: the file or field, what is wrong with it, and the fix.
    """

    code = "invalid_cluster_file"

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


class MissingSecret(PlacementError):
    """An API key reference whose value is needed here and cannot be read. The value is never shown.

    Args:
        field: ``"runtime_config.api_key.from_env"``.
        reference: the variable or file that the field names.
        reason: ``"is not set"``, ``"does not exist"`` and the like.
    """

    code = "missing_secret"

    def __init__(self, field: str, reference: str, reason: str) -> None:
        super().__init__(field, reference, reason)
        self.field, self.reference, self.reason = field, reference, reason

    def __str__(self) -> str:
        fix = (
            f"export {self.reference}=..." if self.field.endswith("from_env") else f"create {self.reference}"
        )
        return f"{self.field}: {self.reference} {self.reason} where the key is needed; {fix} on that node"


class Unplaceable(PlacementError):
    """A deployment that fits nowhere now. Nothing of it stays reserved.

    Args:
        deployment: its name.
        summary: one sentence, what is missing.
        excluded: reason -> how many nodes it excluded.
        advice: what would make it fit.
    """

    code = "unplaceable"

    def __init__(self, deployment: str, summary: str, excluded: Mapping[str, int], advice: str) -> None:
        super().__init__(deployment, summary, dict(excluded), advice)
        self.deployment, self.summary, self.excluded, self.advice = (
            deployment,
            summary,
            dict(excluded),
            advice,
        )

    def advised(self, more: str) -> Self:
        """The same, with more advice."""
        deployment, summary, excluded, advice, *rest = self.args
        return type(self)(deployment, summary, excluded, f"{advice}; {more}", *rest)

    def __str__(self) -> str:
        counts = ", ".join(f"{counted(n, 'node')}: {reason}" for reason, n in self.excluded.items())
        return (
            f"cannot place {self.deployment!r}: {self.summary}"
            + (f" ({counts})" if counts else "")
            + f"; {self.advice}"
        )


class NoGpuNodes(Unplaceable):
    """No node offers GPUs, or none that the constraints allow."""

    code = "no_gpu_nodes"


class NoEgressNodes(Unplaceable):
    """No node may call out to the provider, or none that the constraints allow.

    Args:
        deployment: its name.
        summary: one sentence, what is missing.
        excluded: reason -> how many nodes it excluded.
        advice: what would make it fit.
        provider: ``"openai"``, ``"anthropic"``, ...
    """

    code = "no_egress_nodes"

    def __init__(
        self, deployment: str, summary: str, excluded: Mapping[str, int], advice: str, provider: str = ""
    ) -> None:
        super().__init__(deployment, summary, excluded, advice)
        self.args = (deployment, summary, dict(excluded), advice, provider)
        self.provider = provider


class NoCpuNodes(Unplaceable):
    """No node has the CPUs and the memory free for a CPU replica, or none that the constraints allow."""

    code = "no_cpu_nodes"


class NotEnoughGpus(Unplaceable):
    """There are GPU nodes, but not this many GPUs free together.

    Args:
        deployment: its name.
        summary: one sentence, what is missing.
        excluded: reason -> how many nodes it excluded.
        advice: what would make it fit.
        requested: GPUs per replica.
        largest_node: GPUs of the largest node that was considered.
    """

    code = "not_enough_gpus"

    def __init__(
        self,
        deployment: str,
        summary: str,
        excluded: Mapping[str, int],
        advice: str,
        requested: int = 0,
        largest_node: int = 0,
    ) -> None:
        super().__init__(deployment, summary, excluded, advice)
        self.args = (deployment, summary, dict(excluded), advice, requested, largest_node)
        self.requested, self.largest_node = requested, largest_node


class BelowFloor(Unplaceable):
    """No set of GPUs is as close together or as fast as the deployment demands: of those that are free, or of all."""

    code = "below_floor"


class NotEnoughEgress(Unplaceable):
    """There are egress nodes for the provider, but none has enough capacity free."""

    code = "not_enough_egress"


class ReservationFailed(PlacementError):
    """Others kept taking the GPUs while they were being reserved. Nothing stays reserved.

    Args:
        deployment: its name.
        node: where it was tried last.
        attempts: how often.
        reason: what happened the last time.
    """

    code = "reservation_failed"

    def __init__(self, deployment: str, node: str, attempts: int, reason: str) -> None:
        super().__init__(deployment, node, attempts, reason)
        self.deployment, self.node, self.attempts, self.reason = deployment, node, attempts, reason

    def __str__(self) -> str:
        return (
            f"cannot reserve {self.deployment!r} on {self.node}: gave up after {counted(self.attempts, 'attempt')} "
            f"({self.reason}); nothing is held; try again now, or when the node is less busy"
        )


class DeploymentConflict(PlacementError):
    """The name is placed already, with another shape.

    Args:
        name: the deployment.
        differences: field -> (what is placed, what was asked for) as text; equal if the values are not shown.
    """

    code = "deployment_conflict"

    def __init__(self, name: str, differences: Mapping[str, tuple[str, str]]) -> None:
        super().__init__(name, dict(differences))
        self.name, self.differences = name, dict(differences)

    def __str__(self) -> str:
        changes = ", ".join(
            f"{field} {old} -> {new}" if old != new else f"{field} differs"
            for field, (old, new) in self.differences.items()
        )
        return (
            f"deployment {self.name!r} is placed with another shape ({changes}); "
            f"use apply to change it, release it first, or choose another name"
        )


class GroupStands(PlacementError):
    """A group is placed, and its new declaration would move placed replicas. Nothing is changed.

    Args:
        group: its name.
        deployment: the member.
        problem: what would change.
    """

    code = "group_stands"

    def __init__(self, group: str, deployment: str, problem: str) -> None:
        super().__init__(group, deployment, problem)
        self.group, self.deployment, self.problem = group, deployment, problem

    def __str__(self) -> str:
        return (
            f"group {self.group!r}, member {self.deployment!r}: {self.problem}; while it is placed, only units and "
            f"fields that move no replica can change, so release it first: placement release {self.group}"
        )


class UnknownDeployment(PlacementError):
    """No deployment of that name exists.

    Args:
        name: what was asked for.
        known: the names that exist; if there are many, the first few are shown.
    """

    code = "unknown_deployment"

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        super().__init__(name, known)
        self.name, self.known = name, tuple(known)

    def __str__(self) -> str:
        near = difflib.get_close_matches(self.name, self.known, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        return f"no deployment {self.name!r}{meant}; there are: {_first_few(self.known) or 'none'}"


class UnknownNode(PlacementError):
    """A node that the cluster does not have.

    Args:
        field: where it was named (``"constraints.gpu_nodes"``, ``"--node"``).
        name: what was asked for.
        known: the nodes of the cluster.
    """

    code = "unknown_node"

    def __init__(self, field: str, name: str, known: tuple[str, ...]) -> None:
        super().__init__(field, name, known)
        self.field, self.name, self.known = field, name, tuple(known)

    def __str__(self) -> str:
        return f"{self.field}: no node {self.name!r}; use one of: {', '.join(self.known) or '(none alive)'}"


class UnknownGpu(PlacementError):
    """A GPU that no node of the cluster has.

    Args:
        field: where it was named (``"constraints.gpus"``).
        name: what was asked for: an ordinal, or a UUID.
        known: the GPUs that exist, each with its node; if there are many, the first few are shown.
    """

    code = "unknown_gpu"

    def __init__(self, field: str, name: int | str, known: tuple[str, ...]) -> None:
        super().__init__(field, name, known)
        self.field, self.name, self.known = field, name, tuple(known)

    def __str__(self) -> str:
        what = f"GPU {self.name}" if isinstance(self.name, int) else self.name
        none = "none that is known" + (
            "" if isinstance(self.name, int) else " by its UUID, which NVML reports"
        )
        return f"{self.field}: no node has {what}; there are: {_first_few(self.known) or none}"


class UnreadableRecord(PlacementError):
    """A deployment whose record in the ledger cannot be read. It is left as it is.

    Args:
        name: the deployment.
        problem: why it cannot be read.
        newer: a later version of the service wrote it.
    """

    code = "unreadable_record"

    def __init__(self, name: str, problem: str, newer: bool = False) -> None:
        super().__init__(name, problem, newer)
        self.name, self.problem, self.newer = name, problem, newer

    def __str__(self) -> str:
        fix = (
            "run the version of placement that wrote it, with `placement down --keep-placements` in between"
            if self.newer
            else f"release what it holds with `placement release {self.name}`, then place it again"
        )
        return f"{self.name!r}: {self.problem}; {fix}"


class ServiceNotRunning(PlacementError):
    """The cluster answers, but no placement service runs on it.

    Args:
        address: the cluster's address.
        problem: why it could not be started, and what to do; empty if nobody tried.
    """

    code = "service_not_running"

    def __init__(self, address: str, problem: str = "") -> None:
        super().__init__(address, problem)
        self.address, self.problem = address, problem

    def __str__(self) -> str:
        if self.problem:
            return f"the placement service did not start on the Ray cluster at {self.address}: {self.problem}"
        return f"no placement service on the Ray cluster at {self.address}; start it with `placement up`"


class UnsupportedRay(PlacementError):
    """The installed Ray is not a version that placement can use. Nothing was started.

    Args:
        version: the installed version of Ray.
        requirement: what to install, in pip's syntax (``"ray[default]>=2.52,<2.61"``).
        problem: what is wrong with that version.
    """

    code = "unsupported_ray"

    def __init__(self, version: str, requirement: str, problem: str) -> None:
        super().__init__(version, requirement, problem)
        self.version, self.requirement, self.problem = version, requirement, problem

    def __str__(self) -> str:
        return (
            f"placement cannot run on Ray {self.version}: {self.problem}; `pip install '{self.requirement}'` in the "
            "Python that runs `ray start`, on all nodes, and start the cluster again"
        )


class ClusterUnreachable(PlacementError):
    """No Ray cluster answers at the address; or none was named, and several run on this machine.

    Args:
        address: what was tried; ``"auto"`` if none was named.
        reason: one line, may be empty.
        running: the addresses of the several.
    """

    code = "cluster_unreachable"

    def __init__(self, address: str, reason: str = "", running: tuple[str, ...] = ()) -> None:
        super().__init__(address, reason, running)
        self.address, self.reason, self.running = address, reason, tuple(running)

    def __str__(self) -> str:
        if self.running:
            several = f"{len(self.running)} Ray clusters run on this machine"
            return f"{several}; name one with --address or RAY_ADDRESS: {', '.join(self.running)}"
        reason = f" ({self.reason})" if self.reason else ""
        fix = "start one with `ray start --head`, or name another: --address HOST:PORT, RAY_ADDRESS"
        where = "" if self.address == "auto" else f" at {self.address}"
        return f"no Ray cluster{where}{reason}; {fix}"


class ServiceDiffers(PlacementError):
    """The placement service runs already, of another version or with other settings. It is left as it is.

    Args:
        address: the cluster's address.
        differences: setting -> (what runs, what was asked for) as text.
    """

    code = "service_differs"

    def __init__(self, address: str, differences: Mapping[str, tuple[str, str]]) -> None:
        super().__init__(address, dict(differences))
        self.address, self.differences = address, dict(differences)

    def __str__(self) -> str:
        changes = ", ".join(f"{name} {runs}, not {asked}" for name, (runs, asked) in self.differences.items())
        return (
            f"the placement service on the Ray cluster at {self.address} runs already, with {changes}; nothing is "
            f"changed; restart it with `placement down --keep-placements`, then the same `placement up`"
        )


class Busy(PlacementError):
    """The service has reached its limit of calls under way; this call did nothing.

    Args:
        what: ``"calls that change deployments"`` and the like.
        limit: how many of them it accepts at once.
    """

    code = "busy"

    def __init__(self, what: str, limit: int) -> None:
        super().__init__(what, limit)
        self.what, self.limit = what, limit

    def __str__(self) -> str:
        return f"the placement service is busy with {self.limit} {self.what}; ask again in a moment"


class PartlyApplied(PlacementError):
    """Some deployments of several could not be applied; the others were.

    Args:
        failures: deployment -> its error, as :meth:`PlacementError.to_dict` gives it.
        applied: the names of the others.
    """

    code = "partly_applied"

    def __init__(self, failures: Mapping[str, Mapping[str, Any]], applied: tuple[str, ...]) -> None:
        super().__init__(dict(failures), tuple(applied))
        self.failures, self.applied = dict(failures), tuple(applied)

    def __str__(self) -> str:
        whys = "\n".join(f"  {name}: {failure['message']}" for name, failure in self.failures.items())
        done = f"; applied: {', '.join(self.applied)}" if self.applied else "; none was"
        return f"{counted(len(self.failures), 'deployment')} could not be applied{done}\n{whys}"


class LeaseExpired(PlacementError):
    """GPUs were prepared for a caller's own placement group, which was not created in time. Nothing is held.

    Args:
        deployment: its name.
        problem: what went wrong.
    """

    code = "lease_expired"

    def __init__(self, deployment: str, problem: str) -> None:
        super().__init__(deployment, problem)
        self.deployment, self.problem = deployment, problem

    def __str__(self) -> str:
        return f"cannot place {self.deployment!r} for its caller: {self.problem}; ask again"


class InvalidMeasurement(PlacementError):
    """A file that ``placement measure --import`` cannot read: not its own, not of nccl-tests, or not of this node.

    Args:
        source: the file.
        problem: what is wrong with it, and the fix.
    """

    code = "invalid_measurement"

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(source, problem)
        self.source, self.problem = source, problem

    def __str__(self) -> str:
        return f"{self.source}: {self.problem}"


class CannotMeasure(PlacementError):
    """Nothing could be measured on a node; nothing stays held.

    Args:
        node: its name.
        problem: why not, and the fix.
    """

    code = "cannot_measure"

    def __init__(self, node: str, problem: str) -> None:
        super().__init__(node, problem)
        self.node, self.problem = node, problem

    def __str__(self) -> str:
        return f"cannot measure node {self.node!r}: {self.problem}"


class NoCollectiveLibrary(CannotMeasure):
    """The Python of the node's workers has no collective library for its GPUs."""

    code = "no_collective_library"


def counted(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _first_few(names: Sequence[str]) -> str:
    """``a, b, and 3 more``; empty for none."""
    more = len(names) - 8
    return ", ".join([*names[:8], *([f"and {more} more"] if more > 0 else [])])


def _json_ready(value: Any) -> Any:
    """A field as a JSON value; a number that JSON cannot express is ``None``."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json_ready(one) for key, one in value.items()}
    return [_json_ready(one) for one in value] if isinstance(value, Iterable) else str(value)
