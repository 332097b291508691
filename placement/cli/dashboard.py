"""``placement dashboard``: a live map of the cluster in the browser."""

from __future__ import annotations

import errno
import socket

import click

from placement.cli import common
from placement.cli.group import Command

HOST, PORT = "127.0.0.1", 8267


@click.command(
    cls=Command,
    epilog="\b\nExample:\n  placement dashboard\n  placement dashboard --port 0 --address 10.0.0.1:6379",
)
@click.option(
    "--host",
    default=HOST,
    show_default=True,
    help="Where to listen. To look from another machine prefer `ssh -L 8267:localhost:8267`, which is encrypted.",
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 for any free port."
)
@common.with_address
@common.with_json
def dashboard(host: str, port: int, address: str | None, as_json: bool) -> None:
    """Serves a live map of the cluster in the browser. Prints its address, and goes on until interrupted.

    It only reads. It shows nodes, NVLink islands, replicas with their bandwidth, what waits and why, and the last
    events. If the service ends, the page says so, and goes on when it is back. If the cluster has a token, the printed
    address has a key.
    """
    import asyncio

    from placement.dashboard import server

    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        fix = "choose another --port, or 0 for any that is free" if in_use else "check --host"
        why = str(error.strerror).partition(" (")[0]
        raise click.UsageError(f"cannot listen at {host} port {port}: {why}; {fix}") from None

    def tell(url: str) -> None:
        if not server.is_loopback(host):
            whom = "whoever has the key in its address" if "?" in url else "everybody who can reach it"
            common.note(f"warning: --host {host} is not loopback: the page goes, unencrypted, to {whom}")
        if as_json:
            common.dump({"url": url})
        else:
            common.say(url)
            common.note("Ctrl-C ends it")

    with listener:
        asyncio.run(server.serve(address, host, listener, tell))
