"""Which actions make a deployment match its declaration: ``reconcile(desired, observed, snapshot)``.

The loop of the service is: look at what is there, ask here what to do, do it, look again. Nothing is remembered
between two rounds, so that an interrupted change, a node that died and a declaration that waited for room all
take the same path. Promises:

1. A replica that satisfies the declaration stays (:mod:`placement.core.staying` decides).
2. A replica is given up only once its replacement has room: beside it, or in its place.
3. A replica that is no longer wanted is given back, even if there is no room for the rest.
4. All missing replicas are placed at once if possible; if not, one by one, in the order of their indices. The replicas
   of a gang are placed all at once or not at all.
5. Once the actions are carried out, only waiting is left: a second round has no other action.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from typing import TypeVar

from placement.core.at_best import Capacity, capacity
from placement.core.mix import Kind
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
        request: the request; its ``replicas`` are all that are wanted, 0 to n-1. ``standing`` is empty.
        gang: missing replicas are placed all at once, or none of them.
        releasing: the deployment is being released.
    """

    request: Request
    gang: bool = False
    releasing: bool = False


@dataclass(frozen=True)
class Observed:
    """One replica that is there.

    Attributes:
        parts: what it holds on each node, by ranks.
        request: that of the declaration by which it was placed; its ``replicas`` have no meaning.
        gone: whether its placement group no longer exists.
    """

    parts: tuple[PlannedReplica, ...]
    request: Request
    gone: bool = False


@dataclass(frozen=True)
class Drop:
    """A replica is lost: give back what is left of it, and forget it.

    ``nodes``: ids of its nodes that no longer exist; empty if only its placement group is gone.
    """

    index: int
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Keep:
    """Replicas of an earlier declaration satisfy this one: from now on they count as replicas of this one."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class Release:
    """Give back replicas: they are no longer wanted, or the next action needs their place."""

    indices: tuple[int, ...]


@dataclass(frozen=True)
class Reserve:
    """Carry out a plan; after that, give back what it ``replaces``."""

    plan: Plan
    replaces: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wait:
    """There is no room for these replicas. Those of them that were placed by an earlier declaration stay."""

    indices: tuple[int, ...]
    refusal: Unplaceable


Action = Drop | Keep | Release | Reserve | Wait


@dataclass(frozen=True)
class Decision:
    """The decision.

    Attributes:
        actions: in the order of execution; empty if there is nothing to do.
        snapshot: the cluster after the actions.
        refusal: why nothing is done; only with ``atomic``.
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
) -> Decision:
    """Which actions make the cluster match ``desired``.

    Args:
        desired: the declaration.
        observed: index -> replica, of all that are there.
        snapshot: the cluster, which includes what is observed.
        atomic: if there is no room for all replicas, whether they waited before or not, nothing is done.
    """
    return _Round(desired, observed, snapshot, _Refused()).decide(atomic)


def outcome(
    desired: Desired, observed: Mapping[int, Observed], actions: Iterable[Action]
) -> dict[int, Observed]:
    """The replicas after the actions."""
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
    """Plans the whole queue on one snapshot: each entry on what those before it leave.

    The caller decides the order: by age now, by priority or quota later.

    Args:
        waiting: key, declaration and its existing replicas, in the order of the queue.
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
    """Requests that were refused on a cluster that has only lost room since."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Shortfall] = {}
        self._capacity: dict[Hashable, Capacity] = {}

    def lacks(self, snapshot: Snapshot, desired: Desired) -> str:
        """Why not all replicas can be placed on the nodes that there are, however long they wait; empty if they can."""
        request = desired.request
        if request.told is not None:  # the refusal of its group says it
            return ""
        labels = request.spread_label, request.domain_label
        limited = bool(request.apart_from or request.kept_away_by or request.near_to)
        kind = Kind.of(request), request.stages, request.parts, request.divisible, labels, limited
        if kind not in self._capacity:
            self._capacity[kind] = capacity(snapshot, request)
        return self._capacity[kind].lacks(request, len(request.replicas), desired.gang)

    def clear(self) -> None:
        """Forgets all refusals: there may be more room now."""
        self._known.clear()

    def attempt(self, snapshot: Snapshot, request: Request) -> tuple[Step, Snapshot] | Shortfall:
        """Plans a request, unless an equal one is known to be refused."""
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
"""A declaration's request, without the indices of its replicas and its relations to other deployments."""


def _ask_the_same(one: Request, other: Request) -> bool:
    return one is other or bool(_ASKED(one) == _ASKED(other))


class _Round:
    """One round of reconciling a deployment, with its decisions so far.

    Attributes:
        stays: replicas that match the declaration, placed just now or before.
        outdated: replicas to be replaced.
        surplus: replicas that are no longer wanted.
        missing: the indices of replicas that are not there.
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
        self.planned: Step | None = None

    def decide(self, atomic: bool = False) -> Decision:
        """Decides."""
        if self.desired.releasing:
            if self.observed:
                self.release(self.observed)
            return Decision(tuple(self.actions), self.snapshot)
        self.sort()
        if atomic:
            return self.decide_atomic()
        return self.wait(self.place())

    def decide_atomic(self) -> Decision:
        """Places all that is missing or outdated, or does nothing."""
        if self.missing or self.outdated:
            refused = self.place_jointly()
            if refused is not None:
                step = refused[1].step()
                return Decision((), self.start, self.why(step), step)
        self.release_surplus()
        return self.wait(None)

    def sort(self) -> None:
        """Sorts the replicas: lost, staying, outdated, or no longer wanted."""
        request, snapshot, stays = self.desired.request, self.snapshot, self.stays
        wanted = frozenset(request.replicas)
        earlier: list[tuple[Request, dict[int, Observed]]] = []
        dropped: list[int] = []
        for index, one in sorted(self.observed.items()):
            lost = [part.node_id for part in one.parts if not snapshot.bit(part.node_id)]
            if lost or one.gone:
                self.actions.append(Drop(index, tuple(sorted({*lost}))))
                dropped.append(index)
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
        self.vacate(dropped)
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
        """Places what is missing or outdated, as far as there is room; returns why the rest is not placed."""
        short: Shortfall | None = None
        while self.missing or self.outdated:
            refused = self.place_jointly()
            short = refused and refused[0]
            outdated, left = len(self.outdated), len(self.missing) + len(self.outdated)
            if short is None or left == 1 or self.desired.gang:
                break
            self.release_surplus()
            short = self.place_singly()
            # Replaced replicas may have left room, and the rest may now fit together.
            if not outdated or len(self.missing) + len(self.outdated) == left:
                break
        self.release_surplus()
        return None if short is None else short.step()

    def place_jointly(self) -> tuple[Shortfall, Shortfall] | None:
        """Places all at once: beside what they replace, or in its place; if neither fits, returns both reasons."""
        leaving = {**self.outdated, **self.surplus}
        indices = tuple(sorted([*self.missing, *self.outdated]))
        request = self.asking(indices, {})
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
        """Places one after the other; returns the refusal of the first that does not fit.

        A missing replica counts before one that is to be replaced.
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
                    refused = found  # the others have equal requests
                else:
                    self.reserve(*found)
        return refused or holds

    def replace_one(self, index: int) -> Shortfall | None:
        """Replaces one: beside it, or in its place; if neither fits, returns the refusal for a place beside it."""
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
        """The decision, in which all that found no room waits."""
        left = tuple(sorted([*self.missing, *self.outdated]))
        if step is not None and left:
            self.actions.append(Wait(left, self.why(step)))
        return Decision(tuple(self.actions), self.snapshot, None, step or self.planned)

    def why(self, step: Step) -> Unplaceable:
        """The refusal of a step; it also says if waiting cannot help."""
        assert isinstance(step.outcome, Unplaceable)
        lacks = self.refused.lacks(self.start, self.desired)
        return step.outcome.advised(lacks) if lacks else step.outcome

    # -- what the actions do -----------------------------------------------------------------------

    def asking(self, indices: tuple[int, ...], others: Mapping[int, Observed]) -> Request:
        """The request for some replicas, with those that stay and others that are still there as standing."""
        begin = [parts[0].node_id for parts in self.stays.values()]
        begin += [one.parts[0].node_id for one in others.values()]
        return replace(self.desired.request, replicas=indices, standing=Counter(begin))

    def release(self, indices: Iterable[int]) -> None:
        """Decides to give some replicas back."""
        leaving = tuple(sorted(indices))
        if leaving:
            self.actions.append(Release(leaving))
            self.vacate(leaving)

    def release_surplus(self) -> None:
        """Decides to give back what is no longer wanted."""
        self.release(self.surplus)

    def reserve(self, step: Step, later: Snapshot, replaces: Iterable[int] = ()) -> None:
        """Decides to carry out the plan, and to give back what it replaces."""
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
        """Records that some replicas are gone."""
        if indices:
            self.snapshot = self.without(indices, self.snapshot)
            self.surplus = {i: one for i, one in self.surplus.items() if i not in indices}
            self.refused.clear()

    def without(self, indices: Iterable[int], snapshot: Snapshot) -> Snapshot:
        """The snapshot without some of the replicas."""
        leaving: dict[tuple[str, str] | None, list[PlannedReplica]] = {}
        for index in indices:
            one = self.observed[index]
            leaving.setdefault(one.request.calls, []).extend(one.parts)
        for called, parts in leaving.items():
            snapshot = vacate(snapshot, parts, self.desired.request.deployment, called)
        return snapshot
