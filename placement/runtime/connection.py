"""A process and its cluster: how it connects, how it asks the service, and how the service may call it."""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray

from placement.errors import ClusterUnreachable, PlacementError, ServiceNotRunning
from placement.runtime import ray_internals

T = TypeVar("T")

NAME = NAMESPACE = "placement"
"""Of the service's actor; its node actors are in this namespace, too."""
CONNECT_DEADLINE_SECONDS = 5.0


@contextmanager
def cluster(address: str | None = None) -> Iterator[str]:
    """Connects this process to a running Ray cluster, quietly, and disconnects at the end; see :func:`connect_ray`.

    Yields:
        The address it connected to.
    """
    found = connect_ray(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    try:
        yield found
    finally:
        ray.shutdown()


def connect_ray(address: str | None = None, **options: Any) -> str:
    """Connects this process to a running Ray cluster, and starts none.

    Args:
        address: ``host:port`` of the head; ``None`` or ``"auto"`` takes RAY_ADDRESS, else the cluster
            that was started on this machine.
        options: further arguments of ``ray.init``.

    Returns:
        The address it connected to.

    Raises:
        ClusterUnreachable: nothing answers there, or it is no head's address. Raised within seconds, while Ray would
            retry for minutes.
    """
    wanted = address or os.environ.get("RAY_ADDRESS") or "auto"
    found = wanted if wanted != "auto" else ray_internals.local_address()
    if found is None:
        raise ClusterUnreachable("auto", "RAY_ADDRESS is not set and no cluster was started on this machine")
    if not found.startswith("ray://"):
        _require_listener(found)
    try:
        ray.init(address=found, **options, **_loopback_options(found))
    except (ConnectionError, RuntimeError, TimeoutError, ValueError, OSError) as error:
        # Ray 2.52 does not say that a token is wrong.
        reason = (
            str(error).strip()
            or f"{type(error).__name__}; is the token right, in RAY_AUTH_TOKEN or its file?"
        )
        raise ClusterUnreachable(found, reason.splitlines()[0][:200]) from None
    return found


def connect() -> Any:
    """Finds the placement service of the connected cluster.

    Returns:
        The actor handle.

    Raises:
        RuntimeError: Ray is not connected; call ``ray.init(address="auto")`` first.
        ServiceNotRunning: nobody started it.
    """
    require_ray()
    try:
        return ray.get_actor(NAME, namespace=NAMESPACE)
    except ValueError:
        raise ServiceNotRunning(ray.get_runtime_context().gcs_address) from None


def require_ray() -> None:
    """Raises RuntimeError unless Ray is connected."""
    if not ray.is_initialized():
        raise RuntimeError(
            'Ray is not connected; call ray.init(address="auto") before using the placement service'
        )


def ask(reference: Any, tell: Callable[[], None] | None = None) -> Any:
    """The answer of an actor call; the service's own errors as themselves, without Ray's traceback around them.

    Args:
        reference: of the call.
        tell: called twice a second until the answer is there.

    Raises:
        ServiceNotRunning: it was stopped meanwhile.
    """
    with own_errors():
        while tell is not None and not ray.wait([reference], timeout=0.5)[0]:
            tell()
        return ray.get(reference)


def ask_or_abandon(reference: Any) -> Any:
    """The same; on Ctrl-C the service stops the call, too."""
    with _abandoning(reference):
        return ask(reference)


async def answer(reference: Any) -> Any:
    """:func:`ask` for ``async`` code."""
    with own_errors():
        return await reference


async def answer_or_abandon(reference: Any) -> Any:
    """:func:`ask_or_abandon` for ``async`` code: on Ctrl-C, or on cancellation."""
    with _abandoning(reference):
        return await answer(reference)


@contextmanager
def own_errors() -> Iterator[None]:
    """A block that waits for a call, in which the service's errors have their own type.

    Raises:
        ServiceNotRunning: it was stopped meanwhile.
    """
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PlacementError):
            raise error.cause from None
        raise
    except ray.exceptions.ActorDiedError:
        raise ServiceNotRunning(ray.get_runtime_context().gcs_address) from None


@contextmanager
def _abandoning(reference: Any) -> Iterator[None]:
    """A block after which the service stops the call, too, if the caller no longer waits: on Ctrl-C or cancellation."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        with contextlib.suppress(Exception):
            ray.cancel(reference)
        raise


def in_cluster(function: Callable[..., T], *arguments: Any) -> T:
    """Runs a function in a process of the cluster: this one, or under ``ray://`` one there; returns its result."""
    if ray_internals.is_ray_client():
        return ray.get(ray.remote(num_cpus=0)(function).remote(*arguments))
    return function(*arguments)


def caller(owner: Any = None) -> dict[str, str]:
    """Describes the caller to the service, which ends what this process owns when this process has ended.

    Args:
        owner: the handle of an actor that is to be the owner instead.

    Returns:
        ``job`` and ``node``: ids, hex; of the proxy in the cluster that stands for a ``ray://`` client. ``actor``: the
        id of the actor that this process is. ``pid``, not of a ``ray://`` client. ``submission``: the submission id of
        the job, if it was submitted. ``user``: the name of who runs this process. ``owner_actor``: the id of the
        actor ``owner``. ``address``: of this process's node as Ray knows it, not of a ``ray://`` client. What is not
        known is left out.
    """
    context = ray.get_runtime_context()
    said = {"job": context.get_job_id(), "node": context.get_node_id(), "actor": context.get_actor_id()}
    if not ray_internals.is_ray_client():
        address = ray_internals.node_address()
        said |= {"pid": str(os.getpid()), "submission": ray_internals.submission_id(), "address": address}
    with contextlib.suppress(KeyError, OSError, ImportError):  # a container's user may have no name
        said["user"] = getpass.getuser()
    if owner is not None:
        said["owner_actor"] = ray_internals.actor_id(owner)
    return {name: value for name, value in said.items() if value}


def _require_listener(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise ClusterUnreachable(address, "that is the job server's address, for `ray job submit` only")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterUnreachable(address, "not of the form HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_DEADLINE_SECONDS).close()
    except OSError as error:
        raise ClusterUnreachable(address, error.strerror or str(error)) from None


def _loopback_options(address: str) -> dict[str, str]:
    """If the head has a loopback address of its own (simulated nodes), this driver must use the same."""
    host = address.rpartition(":")[0]
    return ray_internals.driver_at(host) if host.startswith("127.") and host != "127.0.0.1" else {}
