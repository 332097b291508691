"""The states of a replica, and the events that each state allows.

An event that a state does not allow is a defect in the caller: it raises, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    """The state of a replica."""

    PENDING = "pending"
    """Declared, but there is no room for it."""
    RESERVING = "reserving"
    """Its GPUs are being reserved. Nothing is promised yet."""
    PLACED = "placed"
    """It holds its GPUs, verified and recorded."""
    DEGRADED = "degraded"
    """One of its nodes is gone, others hold their part. It moves as a whole."""
    LOST = "lost"
    """It holds nothing any more: all of it is gone, or the rest was given back."""
    RELEASING = "releasing"
    """It is being released. This is carried out, whatever fails."""


class Event(StrEnum):
    """An event of a replica."""

    RESERVE = "reserve"
    RESERVED = "reserved"
    REFUSED = "refused"
    PART_LOST = "part lost"
    LOST = "lost"
    RELEASE = "release"
    RELEASED = "released"


TRANSITIONS: Mapping[tuple[State | None, Event], State | None] = {
    (None, Event.RESERVE): State.RESERVING,
    (State.PENDING, Event.RESERVE): State.RESERVING,
    (State.LOST, Event.RESERVE): State.RESERVING,
    (State.RESERVING, Event.RESERVED): State.PLACED,
    (State.RESERVING, Event.REFUSED): State.PENDING,
    (State.PLACED, Event.PART_LOST): State.DEGRADED,
    (State.PLACED, Event.LOST): State.LOST,
    (State.DEGRADED, Event.LOST): State.LOST,
    (State.PENDING, Event.RELEASE): State.RELEASING,
    (State.PLACED, Event.RELEASE): State.RELEASING,
    (State.DEGRADED, Event.RELEASE): State.RELEASING,
    (State.LOST, Event.RELEASE): State.RELEASING,
    (State.RELEASING, Event.RELEASED): None,
}
"""(state, event) -> the state after it; ``None`` is "there is no such replica"."""

HOLDING = frozenset({State.PLACED, State.DEGRADED})
"""States in which a replica has assignments; in the others it has none."""


class IllegalTransition(Exception):
    """An event that the state does not allow. Nothing was changed.

    Args:
        replica: its index.
        state: the state; ``None`` if there is no such replica.
        event: the event.
    """

    def __init__(self, replica: int, state: State | None, event: Event) -> None:
        super().__init__(replica, state, event)
        self.replica, self.state, self.event = replica, state, event

    def __str__(self) -> str:
        return f"replica {self.replica} is {self.state or 'not there'}: event {self.event.value!r} is not allowed now"


def after(replica: int, state: State | None, event: Event) -> State | None:
    """The state of a replica after an event.

    Raises:
        IllegalTransition: the state does not allow it.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(replica, state, event) from None
