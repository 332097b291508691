"""The durable records of deployments, in Ray's GCS key-value store. All else is rebuilt from what exists.

One record for each deployment: its declaration, since when it waits, whose end ends it, and for each replica the name
and id of its group and what it holds; of a replica that is to be replaced also the declaration it was placed under. No
secret is in it: a declaration holds references to API keys only. Beside them, for a while, a note for each deployment
that was released, for a caller whose answer was lost with the service; for each node what its GPUs are, so that a
service that starts anew need not wake the nodes that hold nothing; what was measured on hosts, whether they are there
or not; which numbers no event has had yet; and the history, whose entries have a version of their own
(:mod:`placement.runtime.history`).

Version 1 had no ``releasing``, version 2 no generations, owners or queue, version 3 one share for all GPUs of a replica
on a node. A record has the lowest version that can say what is in it, so that an earlier service can read the others. A
record that this version cannot read stays unchanged, byte for byte.
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

VERSION = 4
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
    """One record as it was read.

    Attributes:
        content: its contents; ``None`` if it cannot be read.
        problem: why not.
        newer: a later version of the service wrote it.
    """

    name: str
    content: dict[str, Any] | None
    problem: str = ""
    newer: bool = False


def token() -> str:
    """The token that marks the groups of this cluster's service. It is created once and then kept."""
    found = ray_internals.kv_get(_TOKEN, _NAMESPACE)
    if found is None:
        ray_internals.kv_put(_TOKEN, secrets.token_hex(4).encode(), _NAMESPACE, overwrite=False)
        found = ray_internals.kv_get(_TOKEN, _NAMESPACE)
        assert found is not None
    return found.decode()


def save(name: str, record: Mapping[str, Any], version: int = VERSION) -> None:
    """Writes the record of a deployment, replacing an older one.

    Args:
        name: of the deployment.
        record: its contents, JSON-ready; the version is added.
        version: the lowest that can say what is in it.
    """
    key = (_RECORD + name).encode()
    value = json.dumps({"version": version, **record}).encode()
    ray_internals.kv_put(key, value, _NAMESPACE)


def delete(name: str) -> None:
    """Removes the record of a deployment."""
    ray_internals.kv_delete((_RECORD + name).encode(), _NAMESPACE)


def note_ended(name: str, replicas: int) -> None:
    """Records how many replicas of a deployment were released, until :func:`forget_ended`."""
    ray_internals.kv_put((_ENDED + name).encode(), str(replicas).encode(), _NAMESPACE)


def forget_ended(name: str) -> None:
    """Removes that note."""
    ray_internals.kv_delete((_ENDED + name).encode(), _NAMESPACE)


def ended() -> dict[str, int]:
    """Deployment -> how many replicas were released, for all such notes."""
    return {name: int(value) for name, value in _all(_ENDED).items() if value.isdigit()}


def event_numbers() -> int:
    """The first unused event number."""
    found = ray_internals.kv_get(_EVENT_NUMBERS, _NAMESPACE)
    return int(found) if found is not None and found.isdigit() else 0


def save_event_numbers(end: int) -> None:
    """Records it."""
    ray_internals.kv_put(_EVENT_NUMBERS, str(end).encode(), _NAMESPACE)


def save_facts(node_id: str, facts: NodeFacts) -> None:
    """Records the facts of a node's GPUs."""
    key, value = (_FACTS + node_id).encode(), facts.model_dump_json(exclude_none=True).encode()
    ray_internals.kv_put(key, value, _NAMESPACE)


def forget_facts(node_id: str) -> None:
    """Removes that note."""
    ray_internals.kv_delete((_FACTS + node_id).encode(), _NAMESPACE)


def facts() -> dict[str, NodeFacts | None]:
    """Node id -> the facts of its GPUs; ``None`` if the note cannot be read, and the node must be asked."""
    found: dict[str, NodeFacts | None] = {}
    for node_id, value in _all(_FACTS).items():
        try:
            found[node_id] = NodeFacts.model_validate_json(value)
        except ValueError:
            found[node_id] = None
    return found


def save_measurement(measurement: Measurement) -> None:
    """Stores the measured rates of a host, replacing its earlier ones."""
    value = measurement.model_dump_json(exclude_none=True).encode()
    ray_internals.kv_put(_key_of(measurement), value, _NAMESPACE)


def forget_measurement(measurement: Measurement) -> None:
    """Removes the measured rates of a host, if there are any."""
    ray_internals.kv_delete(_key_of(measurement), _NAMESPACE)


def _key_of(measurement: Measurement) -> bytes:
    which = repr((measurement.identity, measurement.machine.model_dump_json())).encode()
    return (_MEASURED + hashlib.sha256(which).hexdigest()[:32]).encode()


def measurements() -> list[Measurement]:
    """The measured rates of all hosts; entries that this version cannot read are left as they are."""
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
    """All records, ordered by name; including those that cannot be read."""
    for name, value in sorted(_all(_RECORD).items()):
        yield read(name, value)


def _all(prefix: str) -> dict[str, bytes]:
    """The part of the key after the prefix -> value."""
    values = ray_internals.kv_all(prefix.encode(), _NAMESPACE)
    return {key.decode(errors="replace").removeprefix(prefix): value for key, value in values.items()}


def read(name: str, value: bytes) -> Record:
    """One record from its bytes."""
    try:
        content = json.loads(value)
        version = content["version"]
    except (ValueError, TypeError, KeyError):
        return Record(name, None, "its record was not written by this service, or is incomplete")
    if not isinstance(version, int) or version > VERSION:
        problem = f"its record has version {version}, and this service reads up to {VERSION}"
        return Record(name, None, problem, newer=True)
    return Record(name, content)
