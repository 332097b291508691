"""What was asked for, durable in Ray's GCS key-value store. The rest is rebuilt from what lives.

One record for each deployment: its declaration, since when it waits, whose end ends it, and for each replica the name
and id of its group and what it holds; of a replica that is to be replaced also the declaration it was placed under. No
secret is in it: a declaration holds references to API keys only. Beside them, for a while, a note for each deployment
that was released, for a caller whose answer was lost with the service; for each node what its GPUs are, so that a
service that starts anew need not wake the nodes that hold nothing; what was measured on hosts, whether they are there
or not; which numbers no event has had yet; and the history, whose entries have a version of their own
(:mod:`placement.runtime.history`).

Version 1 had no ``releasing``, version 2 no generations, owners or queue. A record that this version cannot read is
left byte for byte as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from placement.runtime import ray_internals
from placement.wire.facts import NodeFacts
from placement.wire.measurements import Measurement

VERSION = 3
_NAMESPACE = b"placement"
_RECORD = "deployment/"
_ENDED = "ended/"
_FACTS = "facts/"
_MEASURED = "measured/"
_TOKEN = b"token"
_EVENT_NUMBERS = b"event numbers"
_HISTORY = "history/"


@dataclass(frozen=True)
class Record:
    """One record as it was found.

    Attributes:
        content: what it says; ``None`` if it cannot be read.
        problem: why not.
        newer: a later version of the service wrote it.
    """

    name: str
    content: dict[str, Any] | None
    problem: str = ""
    newer: bool = False


def token() -> str:
    """Marks the groups of this cluster's service apart from everybody else's. Made once, then kept."""
    found = ray_internals.kv_get(_TOKEN, _NAMESPACE)
    if found is None:
        ray_internals.kv_put(_TOKEN, secrets.token_hex(4).encode(), _NAMESPACE, overwrite=False)
        found = ray_internals.kv_get(_TOKEN, _NAMESPACE)
        assert found is not None
    return found.decode()


def save(name: str, record: Mapping[str, Any]) -> None:
    """Writes the record of a deployment, replacing an older one.

    Args:
        name: of the deployment.
        record: what is to be kept, JSON-ready; the version is added.
    """
    key = (_RECORD + name).encode()
    value = json.dumps({"version": VERSION, **record}).encode()
    ray_internals.kv_put(key, value, _NAMESPACE)


def delete(name: str) -> None:
    """Removes the record of a deployment."""
    ray_internals.kv_delete((_RECORD + name).encode(), _NAMESPACE)


def note_ended(name: str, replicas: int) -> None:
    """Notes that so many replicas of a deployment were given back, until :func:`forget_ended`."""
    ray_internals.kv_put((_ENDED + name).encode(), str(replicas).encode(), _NAMESPACE)


def forget_ended(name: str) -> None:
    """Removes that note."""
    ray_internals.kv_delete((_ENDED + name).encode(), _NAMESPACE)


def ended() -> dict[str, int]:
    """Deployment -> replicas that were given back, of all that are noted."""
    return {name: int(value) for name, value in _all(_ENDED).items() if value.isdigit()}


def event_numbers() -> int:
    """The number that no event has reached yet."""
    found = ray_internals.kv_get(_EVENT_NUMBERS, _NAMESPACE)
    return int(found) if found is not None and found.isdigit() else 0


def save_event_numbers(end: int) -> None:
    """Notes it."""
    ray_internals.kv_put(_EVENT_NUMBERS, str(end).encode(), _NAMESPACE)


def save_facts(node_id: str, facts: NodeFacts) -> None:
    """Notes what a node's GPUs are."""
    key, value = (_FACTS + node_id).encode(), facts.model_dump_json(exclude_none=True).encode()
    ray_internals.kv_put(key, value, _NAMESPACE)


def forget_facts(node_id: str) -> None:
    """Removes that note."""
    ray_internals.kv_delete((_FACTS + node_id).encode(), _NAMESPACE)


def facts() -> dict[str, NodeFacts | None]:
    """Node id -> what its GPUs are; ``None`` where the note cannot be read, and the node is to be asked."""
    found: dict[str, NodeFacts | None] = {}
    for node_id, value in _all(_FACTS).items():
        try:
            found[node_id] = NodeFacts.model_validate_json(value)
        except ValueError:
            found[node_id] = None
    return found


def save_measurement(measurement: Measurement) -> None:
    """Keeps what was measured on a host, in the place of what was kept of it before."""
    value = measurement.model_dump_json(exclude_none=True).encode()
    ray_internals.kv_put(_key_of(measurement), value, _NAMESPACE)


def forget_measurement(measurement: Measurement) -> None:
    """Removes what was measured on a host, if it is kept."""
    ray_internals.kv_delete(_key_of(measurement), _NAMESPACE)


def _key_of(measurement: Measurement) -> bytes:
    which = repr((measurement.identity, measurement.machine.model_dump_json())).encode()
    return (_MEASURED + hashlib.sha256(which).hexdigest()[:32]).encode()


def measurements() -> list[Measurement]:
    """What was measured on all hosts; what this version cannot read is left as it is."""
    found = []
    for value in _all(_MEASURED).values():
        with contextlib.suppress(ValueError):
            found.append(Measurement.model_validate_json(value))
    return found


def history_segments() -> list[str]:
    """The names of the segments of the history, in their order."""
    keys = ray_internals.kv_keys(_HISTORY.encode(), _NAMESPACE)
    return sorted(key.decode().removeprefix(_HISTORY) for key in keys)


def history_segment(name: str) -> bytes | None:
    """A segment of the history; ``None`` if it is not there any more."""
    return ray_internals.kv_get((_HISTORY + name).encode(), _NAMESPACE)


def save_history_segment(name: str, value: bytes) -> None:
    """Writes a segment of the history, in the place of what it was before."""
    ray_internals.kv_put((_HISTORY + name).encode(), value, _NAMESPACE)


def drop_history_segment(name: str) -> None:
    """Removes a segment of the history."""
    ray_internals.kv_delete((_HISTORY + name).encode(), _NAMESPACE)


def records() -> Iterator[Record]:
    """All records, ordered by name; also those that cannot be read."""
    for name, value in sorted(_all(_RECORD).items()):
        yield read(name, value)


def _all(prefix: str) -> dict[str, bytes]:
    """What follows the prefix in a key -> value."""
    values = ray_internals.kv_all(prefix.encode(), _NAMESPACE)
    return {key.decode(errors="replace").removeprefix(prefix): value for key, value in values.items()}


def read(name: str, value: bytes) -> Record:
    """One record from its bytes."""
    try:
        content = json.loads(value)
        version = content["version"]
    except (ValueError, TypeError, KeyError):
        return Record(name, None, "its record is not one that this service wrote, or only a part of one")
    if not isinstance(version, int) or version > VERSION:
        problem = f"its record has version {version}, and this service reads up to {VERSION}"
        return Record(name, None, problem, newer=True)
    return Record(name, content)
