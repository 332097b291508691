"""What the history costs: ``python -m benchmarks.history``. Milliseconds of CPU and bytes for 1,000 decisions.

Each is a release with one event, of 50 deployments by five callers, on a store in memory. Medians of seven rounds.
"""

from __future__ import annotations

import asyncio
import os
import platform
import tempfile
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

from placement.runtime import ledger, log
from placement.runtime.decisions import noted
from placement.runtime.feed import Feed
from placement.runtime.history import History

COUNT = 1000
ROUNDS = 7


async def decide(feed: Feed) -> None:
    """Takes all decisions."""
    for i in range(COUNT):
        name, gpus = f"llama-{i % 50}", [i % 8, (i + 1) % 8]
        caller = {
            "user": "alice",
            "job": f"0{i % 5}000000",
            "address": f"10.0.0.{i % 5}",
            "pid": str(4000 + i),
        }
        feed.add(name, i % 4, "placed", f"on gpu-{i % 30} GPUs {gpus}")
        await noted(feed, "release", name, caller, asyncio.sleep(0, 1))


def milliseconds(do: Callable[[], object]) -> float:
    """Of this thread's CPU."""
    began = time.thread_time()
    do()
    return (time.thread_time() - began) * 1e3


def measure() -> dict[str, float]:
    """What each part takes, in milliseconds, and ``bytes`` in the store."""
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        store: dict[bytes, bytes] = {}
        kv = SimpleNamespace(
            kv_get=lambda key, namespace, store=store: store.get(key),
            kv_put=lambda key, value, namespace, store=store: store.update({key: value}),
            kv_keys=lambda prefix, namespace, store=store: list(store),
        )
        with mock.patch.object(ledger, "ray_internals", kv):
            history = History()
            took: dict[str, Any] = {
                "while deciding": lambda history=history: asyncio.run(decide(Feed(keep=history.add))),
                "writing and logging": history.flush,
                "reading": history.read,
                "going on after a death": History,
            }
            for what, do in took.items():
                found.setdefault(what, []).append(milliseconds(do))
        found.setdefault("bytes", []).append(sum(map(len, store.values())))
    return {what: median(several) for what, several in found.items()}


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as folder:
        log.begin(folder)
        found = measure()
    python = platform.python_version()
    print(f"python -m benchmarks.history  (Python {python}, {os.cpu_count()} cores, {COUNT:,} decisions)\n")
    for what, value in found.items():
        print(f"{value:10,.0f} B   in the store" if what == "bytes" else f"{value:10.1f} ms  {what}")


if __name__ == "__main__":
    main()
