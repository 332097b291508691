"""The states of a replica: what is allowed, and that the rest is refused and changes nothing."""

from __future__ import annotations

import pickle
from itertools import product

import pytest

from placement.core.lifecycle import HOLDING, TRANSITIONS, Event, IllegalTransition, State, after

LIVES = {
    "placed and released": "reserve reserved release released",
    "refused, then placed": "reserve refused reserve reserved release released",
    "its node dies, and it moves": "reserve reserved lost reserve reserved release released",
    "one of its nodes dies": "reserve reserved part-lost lost reserve reserved release released",
    "lost, and there is no room": "reserve reserved lost reserve refused reserve refused release released",
    "given up while it is lost": "reserve reserved lost release released",
    "given up while one of its nodes is gone": "reserve reserved part-lost release released",
}


@pytest.mark.parametrize("events", LIVES.values(), ids=LIVES)
def test_a_life(events: str) -> None:
    state: State | None = None
    for event in events.split():
        state = after(0, state, Event(event.replace("-", " ")))
    assert state is None


@pytest.mark.parametrize(
    ("state", "event"), [one for one in product([None, *State], Event) if one not in TRANSITIONS]
)
def test_whatever_is_not_in_the_table_is_loud(state: State | None, event: Event) -> None:
    with pytest.raises(IllegalTransition, match=f"replica 3 is .*{event.value}"):
        after(3, state, event)


def test_every_state_can_be_reached_and_left_and_every_life_can_end() -> None:
    reached = set(TRANSITIONS.values())
    assert reached - {None} == set(State)
    can_end: set[State | None] = {None}
    while more := {state for (state, _), then in TRANSITIONS.items() if then in can_end} - can_end:
        can_end |= more
    assert can_end == {None, *State}


def test_only_a_reservation_leads_to_holding_something() -> None:
    for (state, event), then in TRANSITIONS.items():
        if then in HOLDING and state not in HOLDING:
            assert event is Event.RESERVED


def test_what_cannot_happen_says_so_and_crosses_a_process_as_itself() -> None:
    error = pickle.loads(pickle.dumps(IllegalTransition(3, State.PLACED, Event.RESERVE)))
    assert (error.replica, error.state, error.event) == (3, State.PLACED, Event.RESERVE)
    assert str(error) == "replica 3 is placed: event 'reserve' is not allowed now"
    assert (
        str(IllegalTransition(0, None, Event.LOST))
        == "replica 0 is not there: event 'lost' is not allowed now"
    )
