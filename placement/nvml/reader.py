"""Reading NVML in a child process with a deadline, as it may block for ever."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from placement.wire.facts import NodeFacts

_KILL_SECONDS = 1.0
"""How long a killed child may take to end before it counts as stuck in the driver."""


_FRESH_SECONDS = 5.0


class Reader:
    """Keeps the last good reading of this node's GPUs. Thread-safe.

    Each reading is made by a child process. If it misses its deadline it is killed. If that does not help
    (it hangs inside the driver) it is left alone, and no other child is started before it has ended.

    Args:
        deadline_seconds: how long a reading may take. If the driver has to start the GPUs for it (no persistence
            mode) 8 GPUs were seen to take 30 s (Azure/aks-gpu#105), else below 1 s (unslothai/unsloth#10720).
            It may be changed, for the next readings.
        env: variables set for the child, beside this process's own.
        clock: monotonic seconds, for the age of a reading.
    """

    def __init__(
        self,
        deadline_seconds: float = 30.0,
        env: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deadline_seconds = deadline_seconds
        # The child can import what this process can, but not from the working directory.
        paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
        self._env = {**os.environ, **(env or {}), "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        self._clock = clock
        self._changed = threading.Condition()
        self._last: tuple[NodeFacts, float] | None = None
        self._failure: str | None = None
        self._reading = self._closed = False
        self._child: subprocess.Popen[str] | None = None

    @property
    def has_read(self) -> bool:
        """Whether there is a good reading."""
        return self._last is not None

    def facts(self, max_age_seconds: float | None = None) -> NodeFacts:
        """The last good reading with its age; ``problem`` says why the newest one failed, if it did.

        The first call starts a reading and waits for it, at most for the deadline. Never raises: if there was
        no good reading yet, the source is ``"none"``.

        Args:
            max_age_seconds: an older reading is replaced first; if that takes more than 5 s, the old one is returned.
        """
        with self._changed:
            age = 0.0 if self._last is None else self._clock() - self._last[1]
            if max_age_seconds is not None and age > max_age_seconds:
                self.refresh()
                self._changed.wait_for(lambda: not self._reading, min(self.deadline_seconds, _FRESH_SECONDS))
            if self._last is None and self._failure is None:
                self.refresh()
                self._changed.wait_for(lambda: not self._reading, self.deadline_seconds)
            if self._last is None:
                return NodeFacts(source="none", problem=self._failure or self._too_late())
            reading, read_at = self._last
            problem = self._failure or reading.problem
            return reading.model_copy(update={"age_seconds": self._clock() - read_at, "problem": problem})

    def refresh(self) -> None:
        """Starts a new reading in the background, unless one is under way or stuck. Returns at once."""
        with self._changed:
            stuck = self._child is not None and self._child.poll() is None
            if self._closed or self._reading or stuck:
                return
            self._reading = True
            threading.Thread(target=self._read, name="nvml-reader", daemon=True).start()

    def close(self) -> None:
        """Ends a reading that is under way. The last one can still be asked for."""
        with self._changed:
            self._closed = True
            self._failure = "the reader is closed"
            if self._child is not None:
                self._child.kill()

    def _read(self) -> None:
        started = self._clock()
        reading: NodeFacts | None = None
        failure: str | None = None
        try:
            reading = self._read_in_child()
        except (OSError, RuntimeError) as error:
            failure = str(error)
        with self._changed:
            self._reading = False
            if reading and reading.source == "none" and self._last and self._last[0].source == "nvml":
                # An old reading is better than none.
                failure, reading = reading.problem, None
            if reading is not None:
                self._last = reading, started
            if not self._closed:
                self._failure = failure
            self._changed.notify_all()

    def _read_in_child(self) -> NodeFacts:
        with self._changed:
            if self._closed:
                raise RuntimeError("the reader is closed")
            child = self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "placement.nvml"],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
            )
        try:
            output, errors = child.communicate(timeout=self.deadline_seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(self._abandon(child)) from None
        try:
            return NodeFacts.model_validate_json(output)
        except ValidationError:
            said = errors.strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"the NVML process ended with code {child.returncode}: {said[-1]}") from None

    def _abandon(self, child: subprocess.Popen[str]) -> str:
        child.kill()
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_KILL_SECONDS)
            return self._too_late()
        return f"{self._too_late()}; it is not asked again while process {child.pid} hangs in the driver"

    def _too_late(self) -> str:
        return f"NVML did not answer within {self.deadline_seconds:g} s"
