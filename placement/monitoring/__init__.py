"""The service's Prometheus metrics, as a table; and the Grafana dashboard and the alert rules that use them.

:mod:`placement.runtime.metrics` measures what the table names. docs/metrics.md shows it to users.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

PREFIX = "ray_"
"""Ray puts this before the name of each metric."""
GPU_STATES = ("free", "placed", "shared", "foreign", "unknown")
REPLICA_STATES = ("placed", "pending", "lost", "releasing")
NODE_STATES = ("alive", "draining", "dead")
OWNERS = ("none", "caller", "job", "actor")
WAITING = ("deployment", "call")
OUTCOMES = ("reserved", "full", "interfered", "failed")
OTHERS = "(others)"
"""The label of all nodes, or deployments, beyond those that have series of their own."""
MOST_NODES, MOST_DEPLOYMENTS = 1000, 200
"""How many have series of their own: the oldest deployments, and the first nodes by name."""

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without Ray's prefix, and without the ``_total`` that a counter gets.
        kind: gauge, counter or histogram.
        unit: what it counts, or the unit of what it measures.
        meaning: what it measures.
        labels: the names of its labels, beside those that Ray adds.
        buckets: the upper bounds of a histogram's buckets.
    """

    name: str
    kind: str
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """What Prometheus calls it; a histogram has ``_bucket``, ``_sum`` and ``_count`` after that."""
        return f"{PREFIX}{self.name}" + ("_total" if self.kind == COUNTER else "")


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LONG = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)

METRICS = (
    Metric(
        "placement_gpus", GAUGE, "GPUs",
        "GPUs that Ray has on the node, by state: `free`; `placed`, held whole by one replica (a MIG instance counts "
        "as one); `shared`, held in shares; `foreign`, held by other Ray users; `unknown`, reported as failed by NVML.",
        ("node", "state"),
    ),
    Metric(
        "placement_gpus_lost", GAUGE, "GPUs",
        "GPUs that NVML reports as failed, held or not.",
        ("node",),
    ),
    Metric("placement_nodes", GAUGE, "nodes", "`alive`, `draining`, or `dead` (in the last minutes).", ("state",)),
    Metric(
        "placement_replicas", GAUGE, "replicas",
        "Replicas by deployment: `placed`; `pending`, waiting for room; `lost`, whose node or placement group is gone, "
        "and not yet placed again; `releasing`.",
        ("deployment", "state"),
    ),
    Metric(
        "placement_deployments", GAUGE, "deployments",
        "Deployments by the kind of their owner: `none`, `caller` (these are leases), `job` or `actor`.",
        ("owner",),
    ),
    Metric(
        "placement_queue_length", GAUGE, "deployments, calls",
        "How many wait for room: stored deployments (`deployment`), or calls with `wait_seconds` (`call`).",
        ("kind",),
    ),
    Metric(
        "placement_queue_oldest_seconds", GAUGE, "seconds",
        "How long the oldest of these waits; 0 if nothing does.",
    ),
    Metric(
        "placement_allreduce_bytes_per_second", GAUGE, "bytes per second",
        "All-reduce bus bandwidth of the deployment's slowest replica with two GPUs or more, measured or predicted; no "
        "series where a link is unknown.",
        ("deployment",),
    ),
    Metric(
        "placement_allreduce_best_ratio", GAUGE, "0 to 1",
        "That bandwidth divided by that of the best set of the same size on the node if it were empty; the least over "
        "the replicas.",
        ("deployment",),
    ),
    Metric(
        "placement_gpus_fragmented", GAUGE, "GPUs",
        "How many free GPUs an average request like the declared ones could not use (Weng et al., USENIX ATC 2023, "
        "section 3); 0 while nothing is declared.",
    ),
    Metric(
        "placement_refusals", COUNTER, "calls",
        "Calls to place something that were refused, by the code of the error (docs/errors.md); each failed deployment "
        "of an `apply_all` counts.",
        ("code",),
    ),
    Metric(
        "placement_reservations", COUNTER, "reservations",
        "Attempts to reserve what was planned: `reserved`; `full`, a node had too few GPUs free after all; "
        "`interfered`, the GPUs could not be verified, since others took or freed some, or a node did not answer; "
        "`failed`, with an exception.",
        ("outcome",),
    ),
    Metric(
        "placement_steering_attempts", HISTOGRAM, "attempts",
        "How many attempts a node needed until Ray gave the wanted GPUs.",
        (), (1, 2, 3, 4, 6, 8, 12),
    ),
    Metric(
        "placement_duration_seconds", HISTOGRAM, "seconds",
        "From the start of an attempt to place replicas until they are reserved, verified and recorded; without the "
        "time in the queue.",
        (), _SECONDS,
    ),
    Metric(
        "placement_recovery_seconds", HISTOGRAM, "seconds",
        "From when the loss of a replica was noticed until it was placed again; only where the service did not restart "
        "in between.",
        (), _LONG,
    ),
)  # fmt: skip


def dashboard() -> str:
    """The Grafana dashboard, JSON, for Grafana's import or a provisioning folder."""
    return _text("grafana_dashboard.json")


def alerts() -> str:
    """The alert rules, YAML, for ``rule_files`` of Prometheus."""
    return _text("alerts.yaml")


def _text(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
