"""The demo's cluster of simulated nodes: of this process, or kept by another one until `placement demo --stop`.

The keeper listens on a socket that has a name and no file: one for each user, RAY_TMPDIR and network namespace. Who
connects learns from the kernel which process listens, and is disconnected when it has ended. So there is no pid in a
file, which could be somebody else's by now.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from placement.cli.group import NotDone
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode, embedded_cluster

NODES = (
    SimulatedNode("dgx", topology="dgx-1v"),
    SimulatedNode("hgx", topology="dgx-h100"),
    SimulatedNode("pcie", topology="a100-pcie-4x"),
    SimulatedNode("egress-a", resources={"egress_openai": 32, "egress_anthropic": 16, "egress_gemini": 16}),
    SimulatedNode("egress-b", resources={"egress": 32}),
)
READY = "ready "
NAME = f"\0placement-demo-{os.getuid()}-{crc32(os.environ.get('RAY_TMPDIR', '').encode())}"
START_SECONDS, STOP_SECONDS = 300.0, 120.0
"""How long the keeper may take; on a quiet machine it starts in 15 s and ends in 5 s."""


@contextmanager
def started(
    tell: Callable[[str], None], ending: AbstractContextManager[Any] | None = None
) -> Iterator[EmbeddedCluster]:
    """The cluster, of this process, until the end of the block.

    Args:
        tell: told what is being started.
        ending: entered while the cluster is stopped.
    """

    def end(cluster: AbstractContextManager[Any]) -> None:
        with ending or nullcontext(), uninterrupted():
            cluster.__exit__(None, None, None)

    with ExitStack() as stack:
        with uninterrupted() as let_through:

            def next_node(name: str) -> None:
                let_through()
                tell(name)

            cluster = embedded_cluster(NODES, progress=next_node)
            running = cluster.__enter__()
            stack.callback(end, cluster)
        yield running


@dataclass(frozen=True)
class Kept:
    """A cluster that is kept.

    Attributes:
        address: ``host:port`` of its head.
        pid: the process that keeps it.
    """

    address: str
    pid: int


def kept() -> Kept | None:
    """The cluster that is kept, if one is; waits while it is being started.

    Raises:
        NotDone: its keeper does not answer.
    """
    with _keeper(START_SECONDS) as (hear, pid):
        address = hear()
    return Kept(address, pid) if address else None


def keep(tell: Callable[[str], None]) -> Kept:
    """Starts a keeper, and returns when its cluster is there.

    Args:
        tell: told what is being started.

    Raises:
        NotDone: the cluster could not be started.
    """
    command = [sys.executable, "-m", "placement.cli.demo_cluster"]
    # A session of its own: no terminal's end and no Ctrl-C reaches it.
    keeper = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    assert keeper.stdout is not None
    said = ""
    try:
        with keeper.stdout:
            for said in map(str.strip, keeper.stdout):
                if said.startswith(READY):
                    return Kept(said.removeprefix(READY), keeper.pid)
                tell(said)
    except BaseException:
        keeper.terminate()
        keeper.wait()
        raise
    raise NotDone(
        "demo_failed",
        f"the demo's cluster did not start: {said or 'its process was ended'}",
        {"pid": keeper.pid},
    )


def stop() -> bool:
    """Ends the cluster that is kept, and its keeper; whether there was one.

    Raises:
        NotDone: its keeper does not end.
    """
    with _keeper(STOP_SECONDS) as (hear, pid):
        if not pid:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        while hear():
            pass
    return True


@contextmanager
def _keeper(seconds: float) -> Iterator[tuple[Callable[[], str], int]]:
    """What the keeper says next, empty at its end; and its pid, 0 if there is none.

    Raises:
        NotDone: it says nothing within so many seconds.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        pid = 0
        with suppress(ConnectionRefusedError):
            connection.connect(NAME)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, user, _ = struct.unpack("3i", credentials)
            if user != os.getuid():
                raise NotDone(
                    "demo_failed", f"process {pid}, of another user, poses as your demo", {"pid": pid}
                )

        def hear() -> str:
            try:
                return connection.recv(100).decode() if pid else ""
            except ConnectionResetError:
                return ""

        try:
            yield hear, pid
        except TimeoutError:
            problem = (
                f"the demo's process {pid} does not answer; `kill -9 {pid}` ends it, and its cluster with it"
            )
            raise NotDone("demo_failed", problem, {"pid": pid}) from None


def main() -> None:
    """The keeper. Prints what it starts, then the address; ends on SIGTERM, or when the head has ended (`ray stop`)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with socket.socket(socket.AF_UNIX) as listener, suppress(KeyboardInterrupt):
        try:
            listener.bind(NAME)
        except OSError:
            sys.exit("another `placement demo --keep` is starting it; wait for that one")
        listener.listen()
        with started(lambda name: print(name, flush=True)) as cluster:
            print(f"{READY}{cluster.address}", flush=True)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            _serve(listener, cluster)


def _serve(listener: socket.socket, cluster: EmbeddedCluster) -> None:
    """Tells whoever connects the address, and stays connected: the connection's end tells of the process's end."""
    told: list[socket.socket] = []
    while cluster.is_alive():
        for ready in select.select([listener, *told], [], [], 1.0)[0]:
            if ready is listener:
                told.append(listener.accept()[0])
                with suppress(OSError):  # it may not have waited
                    told[-1].sendall(cluster.address.encode())
            else:
                told.remove(ready)
                ready.close()


@contextmanager
def uninterrupted() -> Iterator[Callable[[], None]]:
    """Holds back Ctrl-C and SIGTERM until the end of the block, or until what it yields is called.

    Ray keeps no account of a node whose start was cut short, and half a clean-up leaves the other half.
    """
    held_back: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: held_back.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }

    def let_through() -> None:
        if held_back:
            number = held_back.pop()
            handler = before[signal.Signals(number)]
            if callable(handler):
                handler(number, None)

    try:
        yield let_through
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    let_through()


if __name__ == "__main__":
    main()
