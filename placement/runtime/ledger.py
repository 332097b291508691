"""What was asked for, durable in Ray's GCS key-value store. The rest is rebuilt from what lives.

One record for each deployment: its declaration, and for each replica the name and id of its group and
what it holds. No secret is in it: a declaration holds references to API keys only.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from ray.experimental import internal_kv

VERSION = 1
_NAMESPACE = b"placement"
_RECORD = "deployment/"
_TOKEN = b"token"


def token() -> str:
    """Marks the groups of this cluster's service apart from everybody else's. Made once, then kept."""
    found = internal_kv._internal_kv_get(_TOKEN, namespace=_NAMESPACE)
    if found is None:
        internal_kv._internal_kv_put(
            _TOKEN, secrets.token_hex(4).encode(), overwrite=False, namespace=_NAMESPACE
        )
        found = internal_kv._internal_kv_get(_TOKEN, namespace=_NAMESPACE)
    return str(found.decode())


def save(name: str, deployment: dict[str, Any], replicas: list[dict[str, Any]]) -> None:
    """Writes the record of a deployment, replacing an older one."""
    record = {"version": VERSION, "deployment": deployment, "replicas": replicas}
    key = (_RECORD + name).encode()
    internal_kv._internal_kv_put(key, json.dumps(record).encode(), overwrite=True, namespace=_NAMESPACE)


def delete(name: str) -> None:
    """Removes the record of a deployment."""
    internal_kv._internal_kv_del((_RECORD + name).encode(), namespace=_NAMESPACE)


def records() -> Iterator[dict[str, Any]]:
    """All records, ordered by name."""
    for key in sorted(internal_kv._internal_kv_list(_RECORD.encode(), namespace=_NAMESPACE)):
        value = internal_kv._internal_kv_get(key, namespace=_NAMESPACE)
        if value is not None:
            yield json.loads(value)
