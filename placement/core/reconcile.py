"""What is to be done so that a deployment is as it is declared: ``reconcile(desired, observed, snapshot)``.

The loop of the service is: look at what is there, ask here what is to be done, do it, look again. Nothing is remembered
between two rounds, so that a change that was cut off, a node that died and a declaration that waited for room all
take the same way. Promises:

1. What satisfies the declaration stays (:mod:`placement.core.staying` decides).
2. What is replaced is given up only once its replacement has room: beside it, or in its own place.
3. What is there and no longer wanted is given back, whether there is room for the rest or not.
4. All that is missing is placed at once if that is possible; if not, each replica by itself, the first by index. A
   gang's are placed all at once or not at all.
5. Carried out, the actions leave nothing to do but to wait: a second round has no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import TypeVar

from placement.core.planner import Shortfall, Step, attempt, vacate
from placement.core.replicas import Plan, PlannedReplica
from placement.core.request import Request
from placement.core.snapshot import Snapshot
from placement.core.staying import staying
from placement.errors import Unplaceable

Key = TypeVar("Key")


@dataclass(frozen=True)
class Desired:
    """One deployment as it is declared now.

    Attributes:
        request: what is asked for; of ``replicas`` all that are wanted, 0 to n-1. ``standing`` is empty.
        gang: replicas that are missing are placed all at once, or none of them.
        releasing: all of it is to go.
    """

    request: Request
    gang: bool = False
    releasing: bool = False


@dataclass(frozen=True)
class Observed:
    """One replica that is there.

    Attributes:
        parts: what it holds on each node, by ranks.
        request: that of the declaration under which it was placed; which replicas it names is of no meaning.
        gone: whether its placement group is not there any more.
    """

    parts: tuple[PlannedReplica, ...]
    request: Request
    gone: bool = False


@dataclass(frozen=True)
class Drop:
    """A replica is lost: what is left of it is to be given back, and it is to be forgotten.

    ``nodes``: ids of its nodes that are no more; none if its placement group alone is gone.
    """

    index: int
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Keep:
    """Replicas of an earlier declaration satisfy this one: they count as replicas of this one from now on."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class Release:
    """Replicas are to be given back: they are no longer wanted, or what comes next takes their place."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class Reserve:
    """A plan is to be carried out; after that, what it ``replaces`` is to be given back."""

    plan: Plan
    replaces: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wait:
    """There is no room for these replicas. Those of them that an earlier declaration placed stay as they are."""

    indices: tuple[int, ...]
    refusal: Unplaceable


Action = Drop | Keep | Release | Reserve | Wait


@dataclass(frozen=True)
class Decision:
    """What is to be done.

    Attributes:
        actions: in the order in which they are to be executed; none if nothing is to be done.
        snapshot: the cluster once they have been.
        refusal: why nothing is done; only of what is ``atomic``.
        step: what was planned first, or, if something waits or is refused, what was refused; ``None`` if nothing
            is missing.
    """

    actions: tuple[Action, ...]
    snapshot: Snapshot
    refusal: Unplaceable | None = None
    step: Step | None = None


def reconcile(
    desired: Desired,
    observed: Mapping[int, Observed],
    snapshot: Snapshot,
    *,
    atomic: bool = False,
    may_wait: Collection[int] = (),
) -> Decision:
    """What is to be done so that ``desired`` is there.

    Args:
        desired: the declaration.
        observed: index -> replica, of all that are there.
        snapshot: the cluster; what is observed is held on it.
        atomic: if there is no room for all that is missing, nothing is done.
        may_wait: indices that were waiting before, there or not. If ``atomic``, there need be no room for them, nor
            for those that were lost with a node.
    """
    return _Round(desired, observed, snapshot, _Refused()).decide(atomic, may_wait)


def outcome(
    desired: Desired, observed: Mapping[int, Observed], actions: Iterable[Action]
) -> dict[int, Observed]:
    """What is there once actions are carried out."""
    there = dict(observed)
    for action in actions:
        if isinstance(action, Drop):
            del there[action.index]
        elif isinstance(action, Keep):
            there |= {index: replace(there[index], request=desired.request) for index in action.indices}
        elif isinstance(action, Release | Reserve):
            for index in action.indices if isinstance(action, Release) else action.replaces:
                del there[index]
        if isinstance(action, Reserve):
            there |= {
                index: Observed(parts, desired.request) for index, parts in _by_index(action.plan).items()
            }
    return dict(sorted(there.items()))


def _by_index(plan: Plan) -> dict[int, tuple[PlannedReplica, ...]]:
    """Replica -> its parts, by ranks."""
    found: dict[int, tuple[PlannedReplica, ...]] = {}
    for part in sorted(plan.replicas, key=attrgetter("replica_index", "ranks")):
        found[part.replica_index] = (*found.get(part.replica_index, ()), part)
    return found


def admit(
    waiting: Sequence[tuple[Key, Desired, Mapping[int, Observed]]], snapshot: Snapshot
) -> list[tuple[Key, Decision]]:
    """Looks at all that waits, with one snapshot: each on what those before it leave.

    Which goes first is the caller's to say: by age now, by priority or quota later.

    Args:
        waiting: key, declaration and what is there of it; those that go first come first.
        snapshot: the cluster.
    """
    refused = _Refused()
    decided = []
    for key, desired, observed in waiting:
        decision = _Round(desired, observed, snapshot, refused).decide()
        snapshot = decision.snapshot
        decided.append((key, decision))
    return decided


class _Refused:
    """Requests for which there was no room on a cluster that has only lost room since."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Shortfall] = {}

    def clear(self) -> None:
        """Forgets all: there may be more room now."""
        self._known.clear()

    def attempt(self, snapshot: Snapshot, request: Request) -> tuple[Step, Snapshot] | Shortfall:
        """Plans a request, unless it is known that there is no room."""
        alike = request.likeness
        if alike is None:
            return attempt(snapshot, request)
        for count in {1, len(request.replicas)}:
            if (known := self._known.get((alike, count))) is not None:
                return known.of(request)
        found = attempt(snapshot, request)
        if isinstance(found, Shortfall):
            self._known[alike, len(request.replicas)] = found
        return found


_ASKED = attrgetter(
    *(one.name for one in fields(Request) if one.name not in ("replicas", "standing", "kept_away_by", "told"))
)
"""What a declaration asks for, without which replicas are meant and what others have to do with it."""


def _ask_the_same(one: Request, other: Request) -> bool:
    return one is other or bool(_ASKED(one) == _ASKED(other))


class _Round:
    """One look at a deployment, and what is decided on the way.

    Attributes:
        stays: replicas that are as declared, placed just now or before.
        outdated: those that are to be replaced.
        surplus: those that are not wanted any more.
        missing: the indices of those that are not there.
        dropped: those of them that were lost.
        holding: those that are to be replaced, too, but not now.
    """

    def __init__(
        self, desired: Desired, observed: Mapping[int, Observed], snapshot: Snapshot, refused: _Refused
    ) -> None:
        self.desired, self.observed = desired, observed
        self.start = self.snapshot = snapshot
        self.refused = refused
        self.actions: list[Action] = []
        self.stays: dict[int, tuple[PlannedReplica, ...]] = {}
        self.outdated: dict[int, Observed] = {}
        self.surplus: dict[int, Observed] = {}
        self.missing: list[int] = []
        self.dropped: list[int] = []
        self.holding: dict[int, Observed] = {}
        self.planned: Step | None = None

    def decide(self, atomic: bool = False, may_wait: Collection[int] = ()) -> Decision:
        """Decides."""
        if self.desired.releasing:
            if self.observed:
                self.release(self.observed)
            return Decision(tuple(self.actions), self.snapshot)
        self.sort()
        if atomic:
            return self.decide_atomic({*may_wait, *self.dropped})
        return self.wait(self.place())

    def decide_atomic(self, may_wait: Collection[int]) -> Decision:
        """Places all that must be placed, or does nothing; then what may wait."""
        may = [index for index in self.missing if index in may_wait]
        holding = {index: one for index, one in self.outdated.items() if index in may_wait}
        if holding and self.place_jointly() is None:  # what waits to be replaced may make room for the others
            return self.wait(None)
        if self.desired.gang and len(may) + len(holding) < len(self.missing) + len(self.outdated):
            may, holding = [], {}
        self.missing = [index for index in self.missing if index not in may]
        self.outdated = {i: one for i, one in self.outdated.items() if i not in holding}
        self.holding = holding
        if self.missing or self.outdated:
            refused = self.place_jointly()
            if refused is not None:
                step = refused[1].step()
                assert isinstance(step.outcome, Unplaceable)
                return Decision((), self.start, step.outcome, step)
        self.release_surplus()
        planned = self.planned
        self.missing, self.outdated, self.holding = may, holding, {}
        decision = self.wait(self.place())
        return decision if planned is None else replace(decision, step=planned)

    def sort(self) -> None:
        """Tells apart what is lost, what stays, what is outdated and what is not wanted."""
        request, snapshot, stays = self.desired.request, self.snapshot, self.stays
        wanted = frozenset(request.replicas)
        earlier: list[tuple[Request, dict[int, Observed]]] = []
        for index, one in sorted(self.observed.items()):
            lost = [part.node_id for part in one.parts if not snapshot.bit(part.node_id)]
            if lost or one.gone:
                self.actions.append(Drop(index, tuple(sorted({*lost}))))
                self.dropped.append(index)
            elif index not in wanted:
                self.surplus[index] = one
            elif _ask_the_same(one.request, request):
                stays[index] = one.parts
            else:
                alike = next((found for asked, found in earlier if _ask_the_same(asked, one.request)), None)
                if alike is None:
                    earlier.append((one.request, {index: one}))
                else:
                    alike[index] = one
        if len(stays) == len(self.observed) == len(request.replicas):
            return
        self.vacate(self.dropped)
        kept: list[int] = []
        for asked, found in earlier:
            parts = {index: one.parts for index, one in found.items()}
            stay = staying(self.snapshot, parts, asked, request, self.stays.values())
            kept += stay
            self.stays |= {index: parts[index] for index in stay}
            self.outdated |= {index: one for index, one in found.items() if index not in stay}
        if kept:
            self.actions.append(Keep(tuple(sorted(kept))))
        self.missing = [i for i in request.replicas if i not in self.stays and i not in self.outdated]

    def place(self) -> Step | None:
        """Places what is missing or outdated, as far as there is room; says why not for the rest."""
        short: Shortfall | None = None
        while self.missing or self.outdated:
            refused = self.place_jointly()
            short = refused and refused[0]
            outdated, left = len(self.outdated), len(self.missing) + len(self.outdated)
            if short is None or left == 1 or self.desired.gang:
                break
            self.release_surplus()
            short = self.place_singly()
            # What was replaced may have left room, and without what was placed the others may fit together.
            if not outdated or len(self.missing) + len(self.outdated) == left:
                break
        self.release_surplus()
        return None if short is None else short.step()

    def place_jointly(self) -> tuple[Shortfall, Shortfall] | None:
        """Places all at once: beside what leaves, or in its place; if there is no room, says why not for both."""
        leaving = {**self.outdated, **self.surplus}
        indices = tuple(sorted([*self.missing, *self.outdated]))
        request = self.asking(indices, self.holding)
        beside = self.refused.attempt(self.snapshot, request)
        if not isinstance(beside, Shortfall):
            self.reserve(*beside, leaving)
            return None
        instead = attempt(self.without(leaving, self.snapshot), request) if leaving else beside
        if isinstance(instead, Shortfall):
            return beside, instead
        self.release(leaving)
        self.reserve(*instead)
        return None

    def place_singly(self) -> Shortfall | None:
        """Places one after the other; returns why not for the first for which there is no room.

        Of one that is not there yet, rather than of one that is to be replaced.
        """
        refused: Shortfall | None = None
        holds: Shortfall | None = None
        for index in sorted([*self.missing, *self.outdated]):
            if index in self.outdated:
                holds = self.replace_one(index) or holds
            elif refused is None:
                request = self.asking((index,), self.outdated)
                found = self.refused.attempt(self.snapshot, request)
                if isinstance(found, Shortfall):
                    refused = found  # the others ask for the same
                else:
                    self.reserve(*found)
        return refused or holds

    def replace_one(self, index: int) -> Shortfall | None:
        """Replaces one: beside it, or in its place; if there is no room, says why not beside it."""
        others = {other: one for other, one in self.outdated.items() if other != index}
        request = self.asking((index,), others)
        beside = self.refused.attempt(self.snapshot, request)
        if not isinstance(beside, Shortfall):
            self.reserve(*beside, (index,))
            return None
        instead = attempt(self.without((index,), self.snapshot), request)
        if isinstance(instead, Shortfall):
            return beside
        self.release((index,))
        self.reserve(*instead)
        return None

    def wait(self, step: Step | None) -> Decision:
        """The decision, in which all that has found no room waits."""
        left = tuple(sorted([*self.missing, *self.outdated]))
        if step is not None and left:
            assert isinstance(step.outcome, Unplaceable)
            self.actions.append(Wait(left, step.outcome))
        return Decision(tuple(self.actions), self.snapshot, None, step or self.planned)

    # -- what the actions do -----------------------------------------------------------------------

    def asking(self, indices: tuple[int, ...], others: Mapping[int, Observed]) -> Request:
        """The request for some replicas, beside those that stay and others that are there as yet."""
        begin = [parts[0].node_id for parts in self.stays.values()]
        begin += [one.parts[0].node_id for one in others.values()]
        return replace(self.desired.request, replicas=indices, standing=Counter(begin))

    def release(self, indices: Iterable[int]) -> None:
        """Decides to give some back."""
        leaving = tuple(sorted(indices))
        if leaving:
            self.actions.append(Release(leaving))
            self.vacate(leaving)

    def release_surplus(self) -> None:
        """Decides to give back what is not wanted any more."""
        self.release(self.surplus)

    def reserve(self, step: Step, later: Snapshot, replaces: Iterable[int] = ()) -> None:
        """Decides to place what is planned, and to give back what it replaces."""
        assert isinstance(step.outcome, Plan)
        leaving = tuple(sorted(replaces))
        self.actions.append(Reserve(step.outcome, leaving))
        self.snapshot = later
        self.vacate(leaving)
        self.planned = self.planned or step
        self.stays |= _by_index(step.outcome)
        self.outdated = {i: one for i, one in self.outdated.items() if i not in self.stays}
        self.missing = [i for i in self.missing if i not in self.stays]

    def vacate(self, indices: Sequence[int]) -> None:
        """Notes that some of what is there has gone."""
        if indices:
            self.snapshot = self.without(indices, self.snapshot)
            self.surplus = {i: one for i, one in self.surplus.items() if i not in indices}
            self.refused.clear()

    def without(self, indices: Iterable[int], snapshot: Snapshot) -> Snapshot:
        """The snapshot once some of what is there has gone."""
        leaving: dict[tuple[str, str] | None, list[PlannedReplica]] = {}
        for index in indices:
            one = self.observed[index]
            leaving.setdefault(one.request.calls, []).extend(one.parts)
        for called, parts in leaving.items():
            snapshot = vacate(snapshot, parts, self.desired.request.deployment, called)
        return snapshot
