"""What happened and what was decided, kept in the ledger's store for days: an append-only record with bounds.

It is a chain of segments. Each is a key of the store, named by the number and time of its first entry, and holds
compressed lines of JSON, one an entry. Entries wait in memory for a thread that writes them in batches, so that no
decision waits for the store; the last segment is written anew with each batch until it is full. A service that starts
anew goes on with the last segment. The oldest segments are dropped.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from placement.runtime import ledger, log
from placement.runtime.settings import HISTORY_DAYS, HISTORY_MIB

VERSION = 1
SEGMENT_BYTES = 64 * 1024
PIECE_BYTES = 16 * 1024
"""The most that is added to a segment with one write, before it is compressed."""
SEGMENT_SECONDS = 86400.0
WRITE_SECONDS = 0.25
"""How long entries wait for others to be written with them."""
RETRY_SECONDS = 1.0
MOST_UNWRITTEN = 20_000
"""So many entries wait for a store that fails; then the oldest are lost, and the history says so."""
LONGEST = 1000
"""The most characters of a text that are kept."""
BATCH = 200
"""So many entries are written at once, at most."""
PAGE = 1000
RECALLED = 2
"""So many segments, the last ones, does a service read that starts anew."""

Entry = dict[str, Any]
"""What :class:`placement.runtime.client_base.Entry` has, without ``time``."""

_NAME = re.compile(r"\d{20}-\d{12}")

logger = logging.getLogger(__name__)


def entry(number: int, at: float, kind: str, deployment: str, state: str, text: str, **more: Any) -> Entry:
    """One entry; ``more`` are fields that only some have."""
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    fields = {"kind": kind, "deployment": deployment, "replica": None, "state": state, "text": text}
    return {"number": number, "at": at, **fields, **more}


def told(one: Mapping[str, Any]) -> Entry:
    """An entry for callers, with ``time``: ``at`` in words, in UTC."""
    return {**one, "time": datetime.fromtimestamp(one["at"], UTC).isoformat(timespec="milliseconds")}


@dataclass
class Page:
    """A part of the history.

    Attributes:
        entries: those found, in order.
        last: the number of the last entry that was looked at: the next page comes after it.
        more: whether there is a next page.
        skipped: entries that this version cannot read.
    """

    entries: list[Entry] = field(default_factory=list)
    last: int = 0
    more: bool = False
    skipped: int = 0


class _Segment:
    """The segment that grows: its name in the store, and its value so far."""

    def __init__(self, name: str) -> None:
        self.name, self.value = name, b""
        self._squeeze, self._done = zlib.compressobj(), b""

    def add(self, text: bytes) -> None:
        """Adds lines to its value."""
        self._done += self._squeeze.compress(text)
        self.value = self._done + self._squeeze.copy().flush()

    def is_full(self, now: float) -> bool:
        """Whether what comes next belongs into another."""
        room = SEGMENT_BYTES - len(self.value)
        return room < PIECE_BYTES + 1024 or now - _start(self.name)[1] >= SEGMENT_SECONDS


class History:
    """Keeps entries, and finds them again. Thread-safe; :meth:`add` waits for nothing.

    Args:
        days: how long entries are kept.
        mib: how much of the store they may take, in MiB (2^20 bytes); at least two segments.

    Attributes:
        was_cut_off: the service before this one died: what happened in its last second may be missing.
    """

    def __init__(self, days: float = HISTORY_DAYS, mib: float = HISTORY_MIB) -> None:
        self.days, self.mib = days, mib
        self._most = max(2.0, mib * 2**20 / SEGMENT_BYTES)
        self._lock = threading.Lock()  # held for microseconds only
        self._writing = threading.Lock()
        self._unwritten: deque[Entry] = deque()  # grows without a lock, and shrinks with both
        self._is_unsaved = False
        self._names = [name for name in ledger.history_segments() if _NAME.fullmatch(name)]
        self._growing: _Segment | None = None
        self._grown = Page()  # what is in it
        self._go_on()
        last = self._grown.entries[-1] if self._grown.entries else {}
        self.was_cut_off = bool(self._names) and last.get("state") != "stopped"

    def _go_on(self) -> None:
        """Goes on with the last segment, if it can be read."""
        text = _unpacked(ledger.history_segment(self._names[-1])) if self._names else None
        if text is not None:
            self._growing = _Segment(self._names[-1])
            self._growing.add(text)
            self._grown = _parsed(text)

    # -- writing -----------------------------------------------------------------------------------

    def add(self, one: Entry) -> None:
        """Has an entry be kept; its number is higher than all before.

        Takes no lock: who calls holds the feed's, for which the garbage collector may wait in a thread that reads here.
        """
        self._unwritten.append(one)

    def start(self) -> None:
        """Begins to write, in a thread of its own."""
        threading.Thread(target=self._run, name="history", daemon=True).start()

    def _run(self) -> None:
        is_failing = False
        while True:
            time.sleep(RETRY_SECONDS if is_failing else WRITE_SECONDS)
            try:
                self.flush()
                is_failing = False
            except Exception as error:
                if not is_failing:
                    logger.warning("the history cannot be written; trying again: %s", error)
                is_failing = True
                self._drop_what_is_too_much()

    def _drop_what_is_too_much(self) -> None:
        with self._writing, self._lock:
            lost = None
            while len(self._unwritten) > MOST_UNWRITTEN:
                lost = self._unwritten.popleft()
            if lost is not None:
                self._unwritten.appendleft(gap(lost["number"], lost["at"]))

    def flush(self) -> None:
        """Writes what waits to be written, and drops what is over the bounds."""
        with self._writing:
            while self._is_unsaved or self._grow():
                assert self._growing is not None
                ledger.save_history_segment(self._growing.name, self._growing.value)
                self._is_unsaved = False
                self._trim()

    def _grow(self) -> bool:
        """Moves entries into the segment that grows; whether there were any."""
        waiting = self._waiting()[:BATCH]
        if not waiting:
            return False
        text, moved = b"", list[Entry]()
        for one in waiting:
            line = json.dumps({"version": VERSION, **one}, ensure_ascii=False).encode(
                errors="backslashreplace"
            )
            if moved and len(text) + len(line) >= PIECE_BYTES:
                break
            text += line + b"\n"
            moved.append(one)
        growing = self._growing
        if growing is None or growing.is_full(moved[0]["at"]):
            growing = _Segment(_name(moved[0]))
        growing.add(text)
        with self._lock:
            if growing is not self._growing:
                self._names.append(growing.name)
                self._growing, self._grown = growing, Page()
            self._grown.entries += moved
            for _ in moved:
                self._unwritten.popleft()
        self._is_unsaved = True
        for one in moved:
            log.tell(one)
        return True

    def _waiting(self) -> list[Entry]:
        while True:
            try:
                return list(self._unwritten)
            except RuntimeError:  # it has grown meanwhile
                continue

    def _trim(self) -> None:
        oldest = time.time() - self.days * 86400
        while len(self._names) > self._most or (len(self._names) > 1 and _start(self._names[1])[1] < oldest):
            ledger.drop_history_segment(self._names[0])
            with self._lock:
                del self._names[0]

    # -- reading -----------------------------------------------------------------------------------

    def read(
        self, since: int = 0, names: Collection[str] | None = None, earliest: float = 0.0, most: int = PAGE
    ) -> Page:
        """Entries after a number, oldest first; those that wait to be written, too.

        Where entries after it are not kept any more, one of kind ``gap`` says so.

        Args:
            since: the number; 0 for the beginning.
            names: only what is about these deployments.
            earliest: only those of this time or later, in seconds since 1970.
            most: no further segment is read once so many are found.
        """
        with self._lock:
            closed = self._names[:-1] if self._growing else self._names[:]
            grown = Page(self._grown.entries + self._waiting(), skipped=self._grown.skipped)
        starts = [_start(name) for name in closed]
        if grown.entries:
            starts.append((grown.entries[0]["number"], grown.entries[0]["at"]))
        page = Page(last=since)
        if starts and 0 < since < starts[0][0] - 1:
            page.entries.append(gap(starts[0][0] - 1, starts[0][1]))
        for position, name in enumerate(closed):
            number, at = starts[position + 1] if position + 1 < len(starts) else (math.inf, math.inf)
            if number - 1 <= since or at < earliest:
                continue
            if len(page.entries) >= most:
                page.more = True
                return page
            text = _unpacked(ledger.history_segment(name))
            _collect(page, _parsed(text) if text is not None else Page(skipped=1), since, earliest, names)
        _collect(page, grown, since, earliest, names)
        return page

    def recall(self) -> tuple[list[Entry], int]:
        """The last events, and up to which number they may lack some."""
        with self._lock:
            names = self._names[-RECALLED:]
        if not names:
            return [], 0
        before = _start(names[0])[0] - 1
        page = self.read(before, most=sys.maxsize)
        return [one for one in page.entries if one["kind"] == "event"], before


def gap(number: int, at: float) -> Entry:
    """Says that entries up to this number are not kept."""
    return entry(number, at, "gap", "", "gap", "what happened before is not kept any more")


def _collect(page: Page, found: Page, since: int, earliest: float, names: Collection[str] | None) -> None:
    """Adds to a page what is asked for of a segment."""
    if not found.entries or found.entries[0]["number"] > since:  # else they were counted before
        page.skipped += found.skipped
    for one in found.entries:
        if one["number"] > since:
            page.last = max(page.last, one["number"])
            if one["at"] >= earliest and (names is None or one["deployment"] in names):
                page.entries.append(one)


def _parsed(text: bytes) -> Page:
    """The lines of a segment; those that another version wrote are counted."""
    page = Page()
    for line in text.splitlines():
        try:
            one = json.loads(line)
            if one.pop("version") > VERSION:
                raise ValueError("a later version wrote it")
            page.entries.append(entry(**one))
        except (ValueError, TypeError, KeyError, AttributeError):
            page.skipped += 1
    return page


def _unpacked(value: bytes | None) -> bytes | None:
    try:
        return None if value is None else zlib.decompress(value)
    except zlib.error:
        return None


def _name(first: Mapping[str, Any]) -> str:
    return f"{first['number']:020d}-{int(first['at']):012d}"


def _start(name: str) -> tuple[int, float]:
    """The number and the time of the first entry."""
    number, at = name.split("-")
    return int(number), float(at)
