"""A driver's connection to a cluster and its service, for the command line and the examples."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from placement.errors import ClusterUnreachable, PlacementError, ServiceNotRunning

CONNECT_DEADLINE_SECONDS = 5.0


@contextmanager
def cluster(address: str | None = None) -> Iterator[str]:
    """Connects this process to a running Ray cluster, quietly, and disconnects at the end.

    Args:
        address: ``host:port`` of the head; ``None`` or ``"auto"`` takes RAY_ADDRESS, else the cluster
            that was started on this machine.

    Yields:
        The address it connected to.

    Raises:
        ClusterUnreachable: nothing answers there, or it is no head's address. Said within seconds, where Ray would
            retry for minutes.
    """
    wanted = address or os.environ.get("RAY_ADDRESS") or "auto"
    found = wanted if wanted != "auto" else _local_address()
    if found is None:
        raise ClusterUnreachable("auto", "RAY_ADDRESS is not set and no cluster was started on this machine")
    if not found.startswith("ray://"):
        _require_listener(found)
    try:
        ray.init(
            address=found,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            **_loopback_options(found),
        )
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        raise ClusterUnreachable(found, str(error).strip().splitlines()[0][:200]) from None
    try:
        yield found
    finally:
        ray.shutdown()


def ask(reference: Any) -> Any:
    """The answer of an actor call; the service's own errors as themselves, without Ray's traceback around them.

    Raises:
        ServiceNotRunning: somebody stopped it meanwhile.
    """
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PlacementError):
            raise error.cause from None
        raise
    except ray.exceptions.ActorDiedError:
        raise ServiceNotRunning(ray.get_runtime_context().gcs_address) from None


def _local_address() -> str | None:
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address("auto") or "") or None
    except ConnectionError:
        return None


def _require_listener(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise ClusterUnreachable(address, "that is the job server, which only `ray job submit` talks to")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterUnreachable(address, "not of the form HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_DEADLINE_SECONDS).close()
    except OSError as error:
        raise ClusterUnreachable(address, error.strerror or str(error)) from None


def _loopback_options(address: str) -> dict[str, str]:
    """Where the head has a loopback address of its own (simulated nodes), this driver must use the same."""
    host = address.rpartition(":")[0]
    return {"_node_ip_address": host} if host.startswith("127.") and host != "127.0.0.1" else {}
