"""``python -m placement.dashboard ADDRESS``: the child process with which the page's server asks the placement service.

A line of standard input is a question, ``[number, what, *arguments]``; a line of standard output its answer,
``[number, answer, error]``, in any order. The first answer, number 0, is the cluster that it is connected to. It ends
when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TextIO

from placement.errors import ClusterUnreachable, PlacementError
from placement.runtime import connection, ray_internals

THREADS = 8


def main() -> int:
    """Answers until the input ends; returns 1 if it could not connect."""
    # Ray also prints messages about raylets on standard output.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answers = _Answers(out)
    try:
        with connection.cluster(json.loads(sys.argv[1])) as cluster:
            threads = ThreadPoolExecutor(THREADS)
            answers.tell(0, lambda: {"cluster": cluster, "token": ray_internals.auth_token()}, cluster)
            for line in sys.stdin:
                number, what, *arguments = json.loads(line)
                threads.submit(answers.tell, number, partial(_ANSWERS[what], *arguments), cluster)
    except ClusterUnreachable as error:
        answers.write([0, None, error.to_dict()])
        return 1
    return 0


class _Answers:
    """Standard output, a line at a time."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._lock = out, threading.Lock()

    def tell(self, number: int, answer: Callable[[], Any], cluster: str) -> None:
        """Writes the result or the error of a function."""
        try:
            line = [number, answer(), None]
        except PlacementError as error:
            line = [number, None, error.to_dict()]
        except Exception as error:  # Ray may raise anything while a head or the service ends
            reason = next(iter(str(error).splitlines()), "")[:200]
            line = [number, None, ClusterUnreachable(cluster, f"{type(error).__name__}: {reason}").to_dict()]
        self.write(line)

    def write(self, line: list[Any]) -> None:
        """Writes a line."""
        with self._lock:
            self._out.write(json.dumps(line) + "\n")
            self._out.flush()


def _read(since: int) -> dict[str, Any]:
    service = connection.connect()
    status, events = service.status.remote(), service.events.remote(None, since)
    return {"status": connection.ask(status), "events": connection.ask(events)}


def _machines() -> dict[str, Any]:
    """Of a cluster file only what the machines are: the rest holds what was declared."""
    file = connection.ask(connection.connect().snapshot.remote())
    machine_of = {node["id"]: node["machine"] for node in file["nodes"] if node.get("machine")}
    return {"machines": file["machines"], "machine_of": machine_of}


def _node(node: str) -> Any:
    return connection.ask(connection.connect().topology.remote(node))[0]


def _why(deployment: str) -> dict[str, Any]:
    service = connection.connect()
    declared = connection.ask(service.describe.remote(deployment))["deployment"]
    [explained] = connection.ask(service.explain_all.remote([declared]))
    found: dict[str, Any] = explained.to_dict()
    return {"refusal": found["refusal"], "explanation": found["explanation"]}


_ANSWERS: dict[str, Callable[..., Any]] = {
    "read": _read, "machines": _machines, "node": _node, "why": _why,
}  # fmt: skip


if __name__ == "__main__":
    os._exit(main())  # a thread may wait for an answer that never comes
