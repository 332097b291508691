"""The contents of the page, as entries: key -> JSON-ready value. Only changed entries are sent.

An entry whose value has not changed is the same object as before, so that comparing two boards costs one check per key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from placement.core.matrix import parse_matrix

Entries = Mapping[str, Any]

KEPT_EVENTS = 200
"""How many events are shown."""
AGE_STEP_SECONDS = 5.0
"""Times are rounded to this step, so that ages alone do not make entries change each second."""


def entries_of(
    status: Mapping[str, Any], machine_of: Mapping[str, str], at: float, before: Entries
) -> dict[str, Any]:
    """Nodes, deployments, groups and totals of a report.

    Args:
        status: the service's ``status``.
        machine_of: node id -> key of its machine, if known.
        at: the time of the status, in seconds since 1970.
        before: the entries before.
    """
    found: dict[str, Any] = {"totals": status["totals"], "demand": [_asked(one) for one in status["demand"]]}
    for node in status["nodes"]:
        found[f"node:{node['id']}"] = _node(node, machine_of.get(node["id"]))
    for one in status["deployments"]:
        key = f"deployment:{one['name']}"
        found[key] = _deployment(one, at, before.get(key, {}))
    for group in status["groups"]:
        found[f"group:{group['name']}"] = group
    for one in status["unreadable"]:
        found[f"unreadable:{one['name']}"] = one
    return found


def machine_entries(machines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The links between the GPUs of each make of node, and the NUMA node near each GPU.

    Args:
        machines: of a cluster file (:class:`placement.wire.cluster.ClusterFile`).
    """
    found = {}
    for key, machine in machines.items():
        shape = parse_matrix(machine["matrix"])
        links = [
            [a, b, shape.link(a, b).nvlinks]
            for a in range(len(shape))
            for b in range(a + 1, len(shape))
            if shape.link(a, b).nvlinks
        ]
        numa = [min(nodes) if nodes else None for nodes in shape.numa]
        found[f"machine:{key}"] = {"numa": numa, "links": links, "nvswitch": shape.nvswitch}
    return found


def with_events(entries: Entries, events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Entries with the last events among them."""
    known = {key: value for key, value in entries.items() if key.startswith("event:")}
    known |= {f"event:{one['number']}": one for one in events}
    latest = sorted(known, key=lambda key: -int(known[key]["number"]))[:KEPT_EVENTS]
    return {key: known[key] for key in latest}


def unchanged_kept(before: Entries, now: Entries) -> dict[str, Any]:
    """``now``, in which unchanged values are the same objects as before."""
    return {key: before[key] if before.get(key) == value else value for key, value in now.items()}


def changes(before: Entries, now: Entries) -> dict[str, Any]:
    """The difference of two boards: new values by key, and ``None`` for keys that are gone."""
    gone = dict.fromkeys(before.keys() - now.keys())
    return gone | {key: value for key, value in now.items() if before.get(key) is not value}


def _node(node: Mapping[str, Any], machine: str | None) -> dict[str, Any]:
    shown = (
        "id", "name", "address", "state", "gpu_count", "gpu_model", "topology", "topology_known", "nvswitch", "islands",
        "others_unlocated", "egress", "cpus", "suspects", "problem",
    )  # fmt: skip
    found = {key: node[key] for key in shown}
    if node["dead_seconds"] is not None:
        found["dead_seconds"] = _stepped(node["dead_seconds"])
    found["machine"] = machine
    found["gpus"] = [
        [
            gpu["state"],
            gpu["mig"],
            gpu["problem"],
            [[who["deployment"], who["replica"], who["share"]] for who in gpu["occupants"]],
        ]
        for gpu in node["gpus"]
    ]
    return found


def _deployment(one: Mapping[str, Any], at: float, before: Mapping[str, Any]) -> dict[str, Any]:
    shown = (
        "name", "model", "runtime", "runtime_from", "transport", "replicas", "state", "generation", "owner",
        "queue_position", "outdated", "group",
    )  # fmt: skip
    found = {key: one[key] for key in shown}
    since = at - one["age_seconds"]
    # Its start is reported as an age, which differs by milliseconds between two answers.
    known = before.get("since")
    found["since"] = known if known is not None and abs(known - since) < AGE_STEP_SECONDS else round(since)
    found["not_placed"] = [each for each in one["replica_states"] if each["state"] != "placed"]
    found["assignments"] = [
        {key: value for key, value in a.items() if key in _ALWAYS or (key in _IF_SAID and value)}
        for a in one["assignments"]
    ]
    return found


_ALWAYS = {"replica_index", "node", "node_name", "gpus", "share"}
_IF_SAID = {
    "shares", "mig", "bandwidth_gb_per_s", "bandwidth_measured", "upper_bandwidth_gb_per_s", "weakest_link", "ray_gpus",
    "ray_bandwidth_gb_per_s", "egress_resource", "egress_units", "cpus",
}  # fmt: skip
"""Empty fields are left out, as there may be thousands."""


def _asked(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the requests to the autoscaler."""
    return {
        key: _stepped(value) if key in ("seconds", "again_in_seconds") and value is not None else value
        for key, value in row.items()
    }


def _stepped(seconds: float) -> float:
    return AGE_STEP_SECONDS * round(seconds / AGE_STEP_SECONDS)
