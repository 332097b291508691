"""What may happen to the service, in any order: the same rules for a make-believe Ray and for a real cluster.

``tests/properties/test_service.py`` runs them in milliseconds, ``tests/soak.py`` (``make soak``) on real raylets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

SERVICE_STEPS = (
    "service.planned", "service.reserved", "service.kept",
    "service.releasing", "service.given_back", "service.ended",
)  # fmt: skip
"""Points at which the service may be killed (``placement/runtime/faults.py``), in either world."""


@dataclass(frozen=True)
class Call:
    """A client's call: ``place`` or ``apply`` of a declaration, ``release`` of a name."""

    method: str
    name: str
    fields: tuple[tuple[str, Any], ...] = ()

    def argument(self) -> Any:
        """What is sent."""
        if self.method == "release":
            return self.name
        return {"name": self.name, "model": "m", **dict(self.fields)}


NAMES = st.sampled_from(("a", "b", "c"))
SHAPES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"gpus": st.sampled_from((1, 1, 2, 4))}),
    st.fixed_dictionaries({"gpus": st.sampled_from((0.25, 0.5))}),
    st.fixed_dictionaries({"tensor_parallel": st.sampled_from((1, 2, 4)), "pipeline_parallel": st.just(2)}),
    st.fixed_dictionaries({"cpus": st.sampled_from((1, 2)), "memory_gib": st.just(0.25)}),
    st.fixed_dictionaries(
        {
            "runtime": st.just("openai"),
            "serving": st.just({"max_concurrent": 3}),
            "runtime_config": st.just({"api_key": {"from_env": "PLANTED_KEY"}}),
        },
    ),
)
TERMS: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    ({}, {}, {}, {"gang": True}, {"deadline_seconds": 900}, {"ttl_seconds": 1800})
)
"""How it waits and ends: for so long that in the soak it hardly ever does."""
ASKED = st.builds(
    lambda method, name, shape, replicas, terms: Call(
        method, name, (*sorted({**shape, **terms}.items()), ("replicas", replicas))
    ),
    st.sampled_from(("place", "apply")),
    NAMES,
    SHAPES,
    st.integers(1, 3),
    TERMS,
)
CALLS = st.one_of(ASKED, ASKED, st.builds(Call, st.just("release"), NAMES))


class Rules(RuleBasedStateMachine):
    """The rules. What each means, and what must hold after each, is for the subclass to say.

    What returns a ``bool`` says whether it happened: there may be no node left to end.
    """

    tried: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Call] = []

    @abstractmethod
    def clients_send(self, calls: Sequence[Call]) -> None:
        """Each is answered, or honestly refused; Ray sends it again if the service dies meanwhile."""

    @abstractmethod
    def kill_the_service(self) -> None: ...

    @abstractmethod
    def kill_at(self, step: str) -> None:
        """The process that next comes to this point ends there."""

    @abstractmethod
    def a_node_ends(self, pick: int) -> bool: ...

    @abstractmethod
    def a_node_begins(self) -> bool: ...

    @abstractmethod
    def another_user_begins(self, gpus: int) -> bool: ...

    @abstractmethod
    def another_user_ends(self) -> bool: ...

    @abstractmethod
    def remove_a_group_of_ours(self, pick: int) -> bool: ...

    @abstractmethod
    def time_passes(self) -> None:
        """So much that the service looks at its nodes."""

    @rule(call=ASKED)
    def a_client_asks(self, call: Call) -> None:
        self._send([call])

    @rule(name=NAMES)
    def a_client_releases(self, name: str) -> None:
        self._send([Call("release", name)])

    @rule(calls=st.lists(CALLS, min_size=2, max_size=4))
    def several_clients_ask_at_once(self, calls: list[Call]) -> None:
        self._send(calls)

    @rule(pick=st.integers(0, 99))
    def an_old_call_comes_again(self, pick: int) -> None:
        """Actor calls are at-least-once, and a caller that has lost patience asks again."""
        if self.sent:
            self.tried["an old call comes again"] += 1
            self.clients_send([self.sent[-1 - pick % len(self.sent)]])

    def _send(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.tried[f"a client asks: {call.method}"] += 1
        self.sent += calls
        self.clients_send(calls)

    @rule()
    def the_service_is_killed(self) -> None:
        self.tried["the service is killed"] += 1
        self.kill_the_service()

    @rule(step=st.sampled_from(SERVICE_STEPS))
    def the_service_will_be_killed(self, step: str) -> None:
        self.kill_at(step)

    @rule(pick=st.integers(0, 9))
    def a_node_dies(self, pick: int) -> None:
        self.tried["a node dies"] += self.a_node_ends(pick)

    @rule()
    def a_node_comes(self) -> None:
        self.tried["a node comes"] += self.a_node_begins()

    @rule(gpus=st.integers(1, 2))
    def another_user_comes(self, gpus: int) -> None:
        self.tried["another user takes GPUs"] += self.another_user_begins(gpus)

    @rule()
    def another_user_goes(self) -> None:
        self.tried["another user frees GPUs"] += self.another_user_ends()

    @rule(pick=st.integers(0, 9))
    def somebody_removes_a_group_of_ours(self, pick: int) -> None:
        self.tried["somebody removes a group of ours"] += self.remove_a_group_of_ours(pick)

    @rule()
    def a_while_passes(self) -> None:
        self.time_passes()
