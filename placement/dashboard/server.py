"""Serves the page, and sends changes to every browser that shows it. It only reads, and answers only GET.

Access control (docs/dashboard.md): it listens on loopback unless told otherwise; a request must name
a host of this server, against DNS rebinding; if the cluster
has a token, a request must have the key; and only the page's own script runs in the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from aiohttp import web

from placement.dashboard import view
from placement.dashboard.source import ServiceSource, Source
from placement.errors import PlacementError, UnknownDeployment, UnknownNode

logger = logging.getLogger(__name__)

EVERY_SECONDS = 1.0
"""How often the service is asked while anybody has the page open."""
SHARE, MOST_SECONDS = 0.1, 5.0
"""Asking takes at most this part of the time, but the interval is at most this long."""
MACHINES_SECONDS = 60.0
"""How often the machines are asked for; also whenever other nodes are known."""
FACTS_SECONDS = 5.0
"""How long an answer about a node, or about why something waits, is used again."""
HEARTBEAT_SECONDS = 15.0

PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("elements", "map", "lists", "details", "page")
    },
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Board:
    """The contents of the page, from one source for all viewers, kept up to date while there are any.

    Args:
        source: where the data comes from.
    """

    def __init__(self, source: Source) -> None:
        self.entries: dict[str, Any] = {}
        self._source = source
        self._viewers = 0
        self._viewed, self._changed = asyncio.Event(), asyncio.Event()
        self._last_event = 0
        self._machine_of: Mapping[str, str] = {}
        self._machines: dict[str, Any] = {}
        self._asked_for: tuple[float, frozenset[str]] = (float("-inf"), frozenset())

    async def refresh(self) -> None:
        """Asks once.

        Raises:
            PlacementError: there is no answer.
        """
        reading = await self._source.read(self._last_event)
        status, at = reading["status"], time.time()
        nodes = frozenset(node["id"] for node in status["nodes"] if node["topology_known"])
        now = time.monotonic()
        if nodes != self._asked_for[1] or now - self._asked_for[0] > MACHINES_SECONDS:
            told = await self._source.machines()
            self._machines, self._machine_of = view.machine_entries(told["machines"]), told["machine_of"]
            self._asked_for = now, nodes
        events = reading["events"]
        self._last_event = events[-1]["number"] if events else self._last_event
        self._show(
            view.entries_of(status, self._machine_of, at, self.entries)
            | self._machines
            | view.with_events(self.entries, events)
            | {"service": self._service()}
        )

    async def follow(self) -> None:
        """Asks repeatedly while anybody has the page open. If the service is gone, the page shows that."""
        while True:
            await self._viewed.wait()
            began = time.monotonic()
            try:
                await self.refresh()
            except PlacementError as error:
                self._show(self.entries | {"service": self._service(str(error))})
            except Exception:  # a service of another version may answer in another form
                logger.exception("the service's answer cannot be shown")
                problem = "the service's answer cannot be shown; is it of the same version as this page?"
                self._show(self.entries | {"service": self._service(problem)})
            took = time.monotonic() - began
            await asyncio.sleep(max(EVERY_SECONDS, min(took / SHARE, MOST_SECONDS)))

    async def changes(self) -> AsyncGenerator[dict[str, Any], None]:
        """First everything that the page shows, then what has changed; without end.

        A slow reader gets all changes meanwhile as one. If nothing changes, ``{}`` every few seconds.
        """
        self._viewers += 1
        self._viewed.set()
        try:
            shown: Mapping[str, Any] = {}
            while True:
                now, changed = self.entries, self._changed
                yield view.changes(shown, now)
                shown = now
                if self.entries is now:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
        finally:
            self._viewers -= 1
            if not self._viewers:
                self._viewed.clear()

    def _service(self, problem: str = "") -> dict[str, Any]:
        return {"ok": not problem, "problem": problem, "cluster": self._source.cluster}

    def _show(self, entries: dict[str, Any]) -> None:
        entries = view.unchanged_kept(self.entries, entries)
        if view.changes(self.entries, entries):
            self.entries = entries
            self._changed.set()
            self._changed = asyncio.Event()


class Answers:
    """Questions about one thing: a repeated question within a moment gets the same answer."""

    def __init__(self, ask: Callable[[str], Awaitable[Mapping[str, Any]]]) -> None:
        self._ask = ask
        self._known: dict[str, tuple[float, asyncio.Task[Mapping[str, Any]]]] = {}

    async def of(self, name: str) -> Mapping[str, Any]:
        """The recent answer, or a new one."""
        now = time.monotonic()
        self._known = {key: one for key, one in self._known.items() if now - one[0] < FACTS_SECONDS}
        if name not in self._known:
            self._known[name] = now, asyncio.ensure_future(self._ask(name))
        # A viewer that leaves does not end the question of others.
        return await asyncio.shield(self._known[name][1])


class Guard:
    """Decides who may look.

    Args:
        host: where the server listens.
        token: the cluster's token; ``None`` if it has none.
    """

    def __init__(self, host: str, token: str | None) -> None:
        self.token = token
        self.key = None if token is None else viewing_key(token)
        self._names = {"localhost", host.lower()}
        if not is_loopback(host):
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def refusal(self, request: web.Request) -> web.Response | None:
        """The refusal of a request; ``None`` if it is allowed."""
        if not self._is_ours(request.headers.get("Host", "")):
            # https://en.wikipedia.org/wiki/DNS_rebinding
            text = "this server does not have that name; use the address that `placement dashboard` printed\n"
            return web.Response(status=421, text=text)
        if request.method != "GET":
            return web.Response(status=405, text="this page only reads: GET\n", headers={"Allow": "GET"})
        if self.key is None:
            return None
        cookie = f"placement_dashboard_{request.url.port}"
        given = request.query.get("token")
        if given is not None and self._knows(given):
            found = web.Response(status=303, headers={"Location": "/"})
            # Lax: a link on any page may lead here, but other sites' requests do not carry the cookie.
            found.set_cookie(cookie, self.key, httponly=True, samesite="Lax", path="/")
            return found
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._knows(request.cookies.get(cookie, "")) or self._knows(bearer):
            return None
        text = "this cluster has a token, so its page needs a key; use the address that `placement dashboard` printed\n"
        return web.Response(status=401, text=text, headers={"WWW-Authenticate": "Bearer"})

    def _knows(self, given: str) -> bool:
        """Whether it is the page's key or the cluster's token; compared in constant time."""
        assert self.key is not None and self.token is not None
        told = given.encode("utf-8", "replace")
        return hmac.compare_digest(told, self.key.encode()) | hmac.compare_digest(told, self.token.encode())

    def _is_ours(self, said: str) -> bool:
        """Whether a Host header names this server: an IP address, which DNS cannot redirect, or its name."""
        name = said.rpartition("]")[0].removeprefix("[") or said.partition(":")[0]
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self._names
        return True


def viewing_key(token: str) -> str:
    """The key that allows reading the page of a cluster with this token, and nothing else.

    The token itself allows running code there, so it is in no address and no cookie.
    """
    return hmac.new(token.encode(), b"placement dashboard", hashlib.sha256).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def url_of(host: str, port: int, key: str | None) -> str:
    """The page's address, for a browser."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/" + (f"?token={key}" if key else "")


def application(board: Board, source: Source, guard: Guard) -> web.Application:
    """The server, which follows the source while it runs."""
    page = {
        path: (files("placement.dashboard").joinpath("static", name).read_bytes(), kind)
        for path, (name, kind) in PAGE.items()
    }
    nodes, reasons = Answers(source.node), Answers(source.why)

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        return guard.refusal(request) or await handler(request)

    async def static(request: web.Request) -> web.Response:
        body, kind = page[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8")

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        kind = "whole"
        # It ends when the connection is closed.
        with contextlib.suppress(ConnectionError):
            async with contextlib.aclosing(board.changes()) as changes:
                async for changed in changes:
                    # It has no line break: JSON escapes those in texts.
                    data = (
                        f"event: {kind}\ndata: {json.dumps(changed, separators=(',', ':'))}\n\n"
                        if changed
                        else ":\n\n"
                    )
                    await response.write(data.encode())
                    kind = "changes"
        return response

    def answering(answers: Answers) -> Handler:
        async def answer(request: web.Request) -> web.Response:
            try:
                return web.json_response(await answers.of(request.match_info["name"]))
            except PlacementError as error:
                status = 404 if isinstance(error, UnknownNode | UnknownDeployment) else 503
                return web.json_response({"error": error.to_dict()}, status=status)

        return answer

    async def following(app: web.Application) -> AsyncIterator[None]:
        task = asyncio.create_task(board.follow())
        yield
        task.cancel()
        await asyncio.wait([task])

    async def with_headers(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)
        response.headers.popall("Server", None)

    app = web.Application(middlewares=[guarded])
    app.cleanup_ctx.append(following)
    app.on_response_prepare.append(with_headers)
    for path in PAGE:
        app.router.add_get(path, static)
    app.router.add_get("/stream", stream)
    app.router.add_get("/nodes/{name}", answering(nodes))
    app.router.add_get("/why/{name}", answering(reasons))
    return app


async def serve(address: str | None, host: str, listener: socket.socket, tell: Callable[[str], None]) -> None:
    """Serves the page of a cluster until it is cancelled.

    Args:
        address: the cluster's address, as in ``--address`` of every command.
        host: where it listens, as the user gave it.
        listener: the socket that does.
        tell: called with the page's address, once it answers.

    Raises:
        ClusterUnreachable, ServiceNotRunning: there is none now. If it ends later, the server waits for it.
    """
    source = ServiceSource(address)
    try:
        board = Board(source)
        await board.refresh()
        guard = Guard(host, source.token)
        runner = web.AppRunner(
            application(board, source, guard),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=0.5,
        )
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            tell(url_of(host, listener.getsockname()[1], guard.key))
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()
    finally:
        await source.close()
