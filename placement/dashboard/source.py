"""Where the page's data comes from: the placement service, asked by a child process.

The child alone connects to Ray. Ray ends a process that cannot reach its head for a minute, and none of its calls has
a time limit that can be relied on; a child can be ended and started again, and the page goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from itertools import count
from typing import Any, Protocol

from placement import errors
from placement.errors import ClusterUnreachable, PlacementError

ANSWER_SECONDS = 30.0
"""After this time without an answer a question is given up, and the child is ended."""
START_SECONDS = 90.0
"""How long the child may take to import Ray and to connect."""
GOODBYE_SECONDS = 5.0
MOST_BYTES = 1 << 28
"""The largest answer: far more than the status of 10,000 nodes."""


class Source(Protocol):
    """The questions of the page. Each method raises a :class:`~placement.PlacementError` if there is no answer.

    Attributes:
        cluster: the cluster's name for users.
    """

    cluster: str

    async def read(self, since: int) -> Mapping[str, Any]:
        """``status``, and the ``events`` after number ``since``."""

    async def machines(self) -> Mapping[str, Any]:
        """``machines``: by key, as in a cluster file; ``machine_of``: node id -> key."""

    async def node(self, node: str) -> Mapping[str, Any]:
        """The facts of one node's GPUs, from ``topology`` of the service."""

    async def why(self, deployment: str) -> Mapping[str, Any]:
        """Where a deployment would fit now, stage by stage, as ``placement plan --explain`` shows it."""


class ServiceSource:
    """The placement service of a cluster.

    Args:
        address: ``host:port`` of the head; as ``--address`` of every command.

    Attributes:
        cluster: the address that was found.
        token: the cluster's authentication token; ``None`` if it has none. Both are known after :meth:`start`.
    """

    def __init__(self, address: str | None) -> None:
        self.cluster: str = address or "auto"
        self.token: str | None = None
        self._address = address
        self._starting = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count(1)

    async def read(self, since: int) -> Mapping[str, Any]:
        """See :class:`Source`."""
        answer: Mapping[str, Any] = await self._ask("read", since)
        return answer

    async def machines(self) -> Mapping[str, Any]:
        """See :class:`Source`."""
        answer: Mapping[str, Any] = await self._ask("machines")
        return answer

    async def node(self, node: str) -> Mapping[str, Any]:
        """See :class:`Source`."""
        answer: Mapping[str, Any] = await self._ask("node", node)
        return answer

    async def why(self, deployment: str) -> Mapping[str, Any]:
        """See :class:`Source`."""
        answer: Mapping[str, Any] = await self._ask("why", deployment)
        return answer

    async def start(self) -> asyncio.subprocess.Process:
        """Starts the child, and waits until it is connected.

        Raises:
            ClusterUnreachable: nothing answers at the address.
        """
        async with self._starting:
            if self._child is not None:
                return self._child
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "placement.dashboard", json.dumps(self._address)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=MOST_BYTES,
                start_new_session=True,  # Ctrl-C is for this process, which ends the child
            )
            self._child = child
            ready = self._waiting[0] = asyncio.get_running_loop().create_future()
            self._reading = asyncio.create_task(self._read_answers(child))
            hello = await self._answer(0, ready, START_SECONDS)
            self.cluster, self.token = hello["cluster"], hello["token"]
            return child

    async def close(self) -> None:
        """Ends the child by closing its input; it disconnects from Ray if that takes only a moment."""
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._child.wait(), GOODBYE_SECONDS)
        await self._end_child()

    async def _ask(self, what: str, *arguments: Any) -> Any:
        child = await self.start()
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        assert child.stdin is not None
        with contextlib.suppress(ConnectionError):  # its end is noticed where its answers are read
            child.stdin.write(json.dumps([number, what, *arguments]).encode() + b"\n")
            await child.stdin.drain()
        return await self._answer(number, answer, ANSWER_SECONDS)

    async def _answer(self, number: int, answer: asyncio.Future[Any], seconds: float) -> Any:
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            await self._end_child()
            raise ClusterUnreachable(self.cluster, f"no answer for {seconds:g} s") from None
        finally:
            self._waiting.pop(number, None)

    async def _read_answers(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        try:
            async for line in child.stdout:
                number, answer, error = json.loads(line)
                waiting = self._waiting.get(number)
                if waiting is None or waiting.done():
                    continue
                if error is None:
                    waiting.set_result(answer)
                else:
                    waiting.set_exception(_as_raised(error))
        finally:
            if self._child is child:
                self._child = None
            for waiting in self._waiting.values():
                if not waiting.done():
                    reason = "the process that asks the service has ended; it is started again"
                    waiting.set_exception(ClusterUnreachable(self.cluster, reason))

    async def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        if self._reading is not None:
            await asyncio.wait([self._reading])


def _as_raised(told: Mapping[str, Any]) -> PlacementError:
    """An error from its ``to_dict``: its fields are its arguments, in order."""
    fields = [value for key, value in told.items() if key not in ("code", "type", "message")]
    error: PlacementError = getattr(errors, told["type"])(*fields)
    return error
