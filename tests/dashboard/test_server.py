"""The page's server: whom it lets in, what it tells, and how often it asks. With recorded data, and no browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from placement.dashboard import server
from placement.errors import ServiceNotRunning
from tests.dashboard.recorded import Recorded

TOKEN = "the-token-of-the-cluster"
Change = tuple[str, dict[str, Any]]


def run(test: Callable[..., Awaitable[None]], **options: Any) -> None:
    """Runs a test with a client and the source that its server asks."""

    async def with_client() -> None:
        async with serving(**options) as (client, source):
            await asyncio.wait_for(test(client, source), 60)

    asyncio.run(with_client())


@asynccontextmanager
async def serving(
    nodes: int = 4, token: str | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[TestClient[Any, Any], Recorded]]:
    source = Recorded(nodes)
    board = server.Board(source)
    await board.refresh()
    app = server.application(board, source, server.Guard(host, token))
    async with TestClient(TestServer(app)) as client:
        yield client, source


async def next_change(response: ClientResponse) -> Change:
    """The next event of a stream: its kind, and what it tells."""
    kind = ""
    while line := (await response.content.readuntil(b"\n")).decode().rstrip("\n"):
        if line.startswith("event: "):
            kind = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
    return kind, data


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "EVERY_SECONDS", 0.02)


@pytest.mark.parametrize("path", [*server.PAGE, "/stream", "/nodes/id-0", "/why/llama-405b", "/nothing"])
def test_every_answer_has_the_headers_that_keep_others_out(path: str) -> None:
    async def test(client: TestClient[Any, Any], source: Recorded) -> None:
        async with client.get(path) as response:
            assert response.status == (404 if path == "/nothing" else 200)
            assert {name: response.headers[name] for name in server.HEADERS} == server.HEADERS
            assert not {"Access-Control-Allow-Origin", "Server"} & {*response.headers}

    run(test)


@pytest.mark.parametrize(
    ("host", "named", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8267", 200),
        ("127.0.0.1", "localhost:9000", 200),  # by ssh -L
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "[::1]:8267", 200),
        ("127.0.0.1", "evil.example:8267", 421),
        ("127.0.0.1", "127.0.0.1.evil.example", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "[evil.example]", 421),
        ("127.0.0.1", "", 421),
        ("gpu-head", "gpu-head:8267", 200),
        ("gpu-head", "10.0.0.1:8267", 200),
        ("gpu-head", "evil.example", 421),
    ],
)
def test_a_name_that_is_not_ours_is_refused_so_that_no_other_page_can_rebind_to_this_one(
    host: str, named: str, status: int
) -> None:
    async def test(client: TestClient[Any, Any], source: Recorded) -> None:
        async with client.get("/", headers={"Host": named}) as response:
            assert response.status == status

    run(test, host=host)


def test_it_only_reads() -> None:
    async def test(client: TestClient[Any, Any], source: Recorded) -> None:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            async with client.request(method, "/") as response:
                assert (response.status, response.headers["Allow"]) == (405, "GET")

    run(test)


def test_where_the_cluster_has_a_token_nothing_is_shown_without() -> None:
    key = server.viewing_key(TOKEN)
    assert TOKEN not in key

    async def test(client: TestClient[Any, Any], source: Recorded) -> None:
        for path in (
            "/",
            "/page.js",
            "/stream",
            "/nodes/id-0",
            "/why/llama-405b",
            "/?token=",
            "/?token=wrong",
            "/?token=%ff",
        ):
            async with client.get(path) as response:
                assert (response.status, "token" in await response.text()) == (401, True), path
        for wrong in ("Bearer wrong", f"Bearer {key}x", f"Bearer {TOKEN[:-1]}", "Bearer", "Basic x", ""):
            async with client.get("/", headers={"Authorization": wrong}) as response:
                assert response.status == 401, wrong
        for right in (TOKEN, key):
            async with client.get("/stream", headers={"Authorization": f"Bearer {right}"}) as response:
                assert response.status == 200
        async with client.get(f"/?token={key}", allow_redirects=False) as response:
            assert (response.status, response.headers["Location"]) == (303, "/")
            cookie = response.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and TOKEN not in cookie
        async with client.get("/page.js") as response:  # the cookie is there now
            assert response.status == 200

    run(test, token=TOKEN)


def test_a_page_is_told_all_at_first_and_then_what_changes() -> None:
    async def test(client: TestClient[Any, Any], source: Recorded) -> None:
        async with client.get("/stream") as response:
            assert response.content_type == "text/event-stream"
            kind, told = await next_change(response)
            assert kind == "whole"
            assert {key.partition(":")[0] for key in told} == {
                "node", "deployment", "machine", "event", "totals", "demand", "service"
            }  # fmt: skip
            assert told["service"] == {"ok": True, "problem": "", "cluster": source.cluster}
            one = told["deployment:llama-405b"]
            assert (one["state"], one["not_placed"][0]["reason"]) == (
                "pending",
                source.deployments["llama-405b"].reasons[0],
            )
            assert [gpu[0] for gpu in told["node:id-0"]["gpus"]] == ["held"] * 4 + [
                "other",
                "free",
                "free",
                "held",
            ]
            links = told[f"machine:{told['node:id-1']['machine']}"]
            assert links == {"numa": [0, 0, 1, 1], "links": [[0, 1, 12], [2, 3, 12]], "nvswitch": False}
            gone = source.deployments.pop("llama-405b")
            source.feed.add("llama-405b", None, "released")
            kind, told = await next_change(response)
            assert gone.deployment.name == "llama-405b"
            assert (kind, told["deployment:llama-405b"]) == ("changes", None)
            assert "node:id-0" not in told, "nothing has changed there"
            assert [value["state"] for key, value in told.items() if key.startswith("event:")] == ["released"]

    run(test)


def test_what_only_grows_older_is_not_told_again() -> None:
    async def test() -> None:
        board = server.Board(Recorded(10))
        await board.refresh()
        told = board.entries
        await asyncio.sleep(0.1)
        await board.refresh()
        assert board.entries is told

    asyncio.run(test())


def test_many_viewers_cost_one_question_and_without_any_nothing_is_asked() -> None:
    async def test(client: TestClient[Any, Any], source: Recorded) -> None:
        await asyncio.sleep(0.2)
        assert source.reads == 1, "before anybody looks"
        streams = [await client.get("/stream") for _ in range(50)]
        for one in streams:
            assert (await next_change(one))[0] == "whole"
        before = source.reads
        source.move()
        for one in streams:
            kind, told = await next_change(one)
            assert kind == "changes" and any(key.startswith("event:") for key in told)
        assert source.reads - before < len(streams)
        for one in streams:
            one.close()
        while True:  # the server notices that they are gone
            before = source.reads
            await asyncio.sleep(0.3)
            if source.reads == before:
                return

    run(test)


def test_a_service_that_is_gone_is_shown_as_gone_and_comes_back() -> None:
    async def test(client: TestClient[Any, Any], source: Recorded) -> None:
        async with client.get("/stream") as response:
            await next_change(response)
            source.fails = ServiceNotRunning("10.0.0.1:6379")
            kind, told = await next_change(response)
            assert (kind, [*told]) == ("changes", ["service"]), "what was last known stays"
            assert not told["service"]["ok"] and "start it with `placement up`" in told["service"]["problem"]
            source.fails = None
            _, told = await next_change(response)
            assert told["service"]["ok"]
            source.fails = KeyError("a service of another version")
            _, told = await next_change(response)
            assert "of the same version" in told["service"]["problem"]

    run(test)


def test_what_one_node_reports_and_why_something_waits_is_asked_once_for_all() -> None:
    async def test(client: TestClient[Any, Any], source: Recorded) -> None:
        asked = []
        answer = source.node

        async def asked_of(node: str) -> Any:
            asked.append(node)
            return await answer(node)

        source.node = asked_of  # type: ignore[method-assign]
        app = server.application(server.Board(source), source, server.Guard("127.0.0.1", None))
        async with TestClient(TestServer(app)) as other:
            for _ in range(3):
                async with other.get("/nodes/id-0") as response:
                    assert (await response.json())["gpu_model"] == "NVIDIA H100 80GB HBM3"
            assert asked == ["id-0"]
            async with other.get("/why/llama-405b") as response:
                assert (await response.json())["explanation"]["nodes"] == 400
            for path, code in (("/nodes/none", "unknown_node"), ("/why/none", "unknown_deployment")):
                async with other.get(path) as response:
                    assert (response.status, (await response.json())["error"]["code"]) == (404, code)

    run(test)


def test_the_address_that_is_printed_can_be_opened() -> None:
    assert server.url_of("127.0.0.1", 1, None) == "http://127.0.0.1:1/"
    assert server.url_of("::1", 1, "k") == "http://[::1]:1/?token=k"
    assert "0.0.0.0" not in server.url_of("0.0.0.0", 1, None)
    assert [server.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "gpu")] == [
        True, True, True, False, False,
    ]  # fmt: skip
