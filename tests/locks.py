"""Locks that notice when two of them are taken in both orders, by whichever threads and tests: a deadlock to come."""

from __future__ import annotations

import importlib
import pkgutil
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

_after: dict[str, set[str]] = {}
"""Where a lock is made -> where those are made that were asked for by who held it."""
_held = threading.local()


class LockOrderError(AssertionError):
    """Two threads that do this at once may wait for each other for ever."""


class WatchedLock:
    """A lock, known by the line that makes it. Those of one line, such as one for each name, count as one.

    Args:
        lock: what really locks.
        made_at: the line.
    """

    def __init__(self, lock: Any, made_at: str) -> None:
        self._lock, self._made_at = lock, made_at

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        held: list[WatchedLock] = _held.__dict__.setdefault("locks", [])
        if blocking and self not in held:
            for other in held:
                self._comes_after(other._made_at)
        taken: bool = self._lock.acquire(blocking, timeout)
        if taken:
            held.append(self)
        return taken

    def release(self) -> None:
        self._lock.release()
        held: list[WatchedLock] = _held.__dict__.setdefault("locks", [])
        if self in held:  # it may be given back by another thread
            held.reverse()
            held.remove(self)
            held.reverse()

    def _comes_after(self, first: str) -> None:
        if first == self._made_at or self._made_at in _after.setdefault(first, set()):
            return
        _after[first].add(self._made_at)
        if path := _path(self._made_at, first):
            _after[first].remove(self._made_at)
            raise LockOrderError(f"{' -> '.join([first, *path])}: locks are taken in a circle")

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def __getattr__(self, name: str) -> Any:  # what threading.Condition looks for
        return getattr(self._lock, name)


def _path(start: str, end: str) -> list[str]:
    """From one line to another, each asked for by who held the one before; empty if there is none."""
    paths = [[start]]
    seen = {start}
    while paths:
        path = paths.pop()
        if path[-1] == end:
            return path
        for following in _after.get(path[-1], set()) - seen:
            seen.add(following)
            paths.append([*path, following])
    return []


def watch(package: str) -> None:
    """Has every lock that a module of this package makes from now on be a watched one."""
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if not found.name.endswith("__main__"):
            module = importlib.import_module(found.name)
            if getattr(module, "threading", None) is threading:
                vars(module)["threading"] = _watching(module)


def _watching(module: ModuleType) -> Any:
    def made_at() -> str:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals["__name__"] != module.__name__:
            frame = frame.f_back  # a dataclass makes it
        return f"{module.__name__.rpartition('.')[2]}:{frame.f_lineno}"

    shown = SimpleNamespace(**vars(threading))
    shown.Lock = lambda: WatchedLock(threading.Lock(), made_at())
    shown.RLock = lambda: WatchedLock(threading.RLock(), made_at())
    shown.Condition = lambda: threading.Condition(WatchedLock(threading.RLock(), made_at()))  # type: ignore[arg-type]
    return shown
