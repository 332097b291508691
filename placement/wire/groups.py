"""Groups of roles as declared: checks that they are complete, and shows the route of each link."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Protocol, Self, TypedDict, TypeVar

from pydantic import Field, field_validator, model_validator

from placement.core.node import Node
from placement.core.replicas import PlannedReplica
from placement.core.routes import Located, Member, RoleLink, Roles, Via, joined
from placement.errors import InvalidDeployment
from placement.wire.fields import MOST_LABEL, Amount, Count, Declared, Named, check_name

MOST_MEMBERS = 512
"""More replicas than this in one group, or tensor-parallel groups of them, are a slip of the pen: all are placed at
once."""


class Grouped(Protocol):
    """What a group needs to know of a member."""

    @property
    def name(self) -> str:
        """Unique in the cluster."""

    @property
    def group(self) -> Group | None:
        """The group that it is a member of."""

    @property
    def replicas(self) -> int:
        """How many there are to be."""

    @property
    def stages(self) -> int:
        """How many tensor-parallel groups a replica is made of."""

    def model_dump(self, *, exclude_unset: bool) -> dict[str, Any]:
        """Its fields."""

    @classmethod
    def model_validate(cls, obj: Any) -> Self:
        """A member with these fields."""


D = TypeVar("D", bound=Grouped)

ViaName = Literal["nvlink", "pcie", "network"]


class LinkFields(TypedDict):
    """The fields of a :class:`GroupLink`, as a type checker sees them in a dictionary."""

    between: tuple[str, str] | list[str]
    via: Via | ViaName
    within: NotRequired[str | None]
    min_bandwidth_gb_per_s: NotRequired[float | None]


class GroupLink(Declared):
    """Two members of a group that talk: within a unit, each replica of one with each replica of the other."""

    between: tuple[Named, Named] = Field(description="two members", examples=[["prefill", "decode"]])
    via: Via = Field(
        description="what their transport can use: nvlink (else PCIe), pcie (even beside NVLink), or network",
        examples=["pcie"],
    )
    within: Annotated[str, MOST_LABEL] | None = Field(
        default=None,
        min_length=1,
        description="floor: nvlink, switch (past no CPU), numa, node; or a node label with the same value on both",
        examples=["numa"],
    )
    min_bandwidth_gb_per_s: Amount | None = Field(
        default=None,
        description="floor: the least bandwidth of the route between any two of their GPUs, per direction",
        examples=[20],
    )

    if TYPE_CHECKING:  # validation accepts more than the fields' own types

        def __init__(
            self,
            *,
            between: tuple[str, str] | list[str],
            via: Via | ViaName,
            within: str | None = None,
            min_bandwidth_gb_per_s: float | None = None,
        ) -> None: ...

    @model_validator(mode="after")
    def _can_be_met(self) -> GroupLink:
        if self.between[0] == self.between[1]:
            raise ValueError(
                f"between names {self.between[0]!r} twice; name two members (how close the GPUs of one replica are is "
                "the deployment's own within)"
            )
        if self.via is Via.NETWORK and self.min_bandwidth_gb_per_s is not None:
            raise ValueError(
                f"min_bandwidth_gb_per_s: {self.min_bandwidth_gb_per_s:g} via 'network' cannot be checked, since "
                "nothing is known of the network's bandwidth; leave it out, or say how near by within"
            )
        impossible = {Via.PCIE: ("nvlink",), Via.NETWORK: ("nvlink", "switch", "numa")}.get(self.via, ())
        if self.within in impossible:
            raise ValueError(
                f"within: {self.within!r} contradicts via: {str(self.via)!r}, whose routes are not over that; use "
                f"{'switch, numa, node' if self.via is Via.PCIE else 'node'} or a node label"
            )
        return self

    def planned(self) -> RoleLink:
        """The same in the planner's terms."""
        return RoleLink(self.between, self.via, self.within or "", self.min_bandwidth_gb_per_s or 0.0)


class Group(Declared):
    """Deployments whose replicas talk to each other: placed all or none, near each other, and released as one.

    It consists of ``units``; each has the same number of replicas of a member. Replicas 0 and 1 of a member that has
    two in each unit are in the first unit, 2 and 3 in the second.

    Example:
        >>> pd = Group(name="pd", members={"prefill": 1, "decode": 2}, units=4,
        ...            links=[{"between": ("prefill", "decode"), "via": "pcie"}])
        >>> pd.replicas("decode")
        8
    """

    name: str = Field(description="unique in the cluster, also among deployments", examples=["qwen"])
    members: dict[Named, Count] = Field(
        min_length=1,
        description="deployment -> how many of its replicas are in each unit",
        examples=[{"prefill": 1, "decode": 2}],
    )
    units: Count = Field(default=1, description="how many units there are", examples=[4])
    links: tuple[GroupLink, ...] = Field(
        default=(),
        description="which members talk",
        examples=[[{"between": ["prefill", "decode"], "via": "pcie"}]],
    )

    if TYPE_CHECKING:  # as above

        def __init__(
            self,
            *,
            name: str,
            members: Mapping[str, int],
            units: int = 1,
            links: Sequence[GroupLink | LinkFields] = (),
        ) -> None: ...

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_name(value, "group")

    @model_validator(mode="after")
    def _links_exist(self) -> Group:
        seen: set[frozenset[str]] = set()
        for link in self.links:
            for end in link.between:
                if end not in self.members:
                    raise ValueError(
                        f"links: {end!r} is no member of group {self.name!r}; use two of: {', '.join(self.members)}"
                    )
            if frozenset(link.between) in seen:
                raise ValueError(f"links: {' and '.join(link.between)} are linked twice; keep one of the two")
            seen.add(frozenset(link.between))
        if self.name in self.members:
            raise ValueError(f"name: {self.name!r} is the name of a member, too; rename one of them")
        total = self.units * sum(self.members.values())
        if total > MOST_MEMBERS:
            raise ValueError(
                f"units: {self.units} make {total} replicas, which are placed all at once; use at most {MOST_MEMBERS}, "
                "and several groups"
            )
        return self

    def replicas(self, member: str) -> int:
        """How many replicas a member has in all units."""
        return self.units * self.members[member]

    def of(self, deployments: Iterable[D]) -> list[D]:
        """The members as declarations for ``apply_all`` and ``plan_all``.

        Args:
            deployments: the declarations of all members, and no others; ``replicas`` may be left out.

        Raises:
            InvalidDeployment: one is missing, or is no member.
            ValidationError: one cannot be a member, as its replicas have no GPUs, say.
        """
        given = {one.name: one for one in deployments}
        problems = [
            f"members: there is no deployment {name!r} among those given ({', '.join(given) or 'none'}); declare it"
            for name in self.members
            if name not in given
        ]
        problems += [
            f"members: {name!r} is given, and is no member; add it, or leave it out"
            for name in given
            if name not in self.members
        ]
        if problems:
            raise InvalidDeployment(f"group {self.name!r}", tuple(problems))
        return [type(given[name]).model_validate(self.bound(given[name])) for name in self.members]

    def bound(self, deployment: Grouped) -> dict[str, Any]:
        """The fields of a deployment as a member: with the group, and the number of replicas that follows from it."""
        declared = deployment.model_dump(exclude_unset=True)
        return {"replicas": self.replicas(deployment.name), **declared, "group": self}

    def planned(self) -> Roles:
        """The same in the planner's terms."""
        return Roles(self.name, self.members, self.units, tuple(link.planned() for link in self.links))


def groups_of(wanted: Sequence[Grouped]) -> dict[str, Group]:
    """The groups that deployments are members of, by name.

    Raises:
        InvalidDeployment: members of one are missing, or declare it differently: a group is declared as one.
    """
    found: dict[str, Group] = {}
    problems = []
    names = [one.name for one in wanted]
    for one in wanted:
        if one.group is None:
            continue
        group = found.setdefault(one.group.name, one.group)
        if group != one.group:
            problems.append(f"group: {one.name!r} declares {group.name!r} unlike others; give all the same")
    for group in found.values():
        pieces = sum(one.replicas * one.stages for one in wanted if one.group == group)
        if pieces > MOST_MEMBERS:
            problems.append(
                f"group: the replicas of {group.name!r} are made of {pieces} tensor-parallel groups, which are placed "
                f"all at once; use at most {MOST_MEMBERS}, and several groups"
            )
        missing = [name for name in group.members if name not in names]
        if missing:
            problems.append(
                f"group: {group.name!r} is declared without its members {', '.join(missing)}; it is planned as one, so "
                "give all of them in one call of apply_all or plan_all"
            )
        if group.name in names:
            problems.append(f"group: {group.name!r} is the name of a deployment, too; rename one of them")
    if problems:
        raise InvalidDeployment("groups", tuple(problems))
    return found


def together(wanted: Sequence[Grouped], order: Iterable[int]) -> list[int]:
    """Positions in the same order, except that the members of a group directly follow the first of them."""
    left = list(order)
    found: list[int] = []
    while left:
        group = wanted[left[0]].group
        several = [i for i in left if i == left[0] or (group is not None and wanted[i].group == group)]
        found += several
        left = [i for i in left if i not in several]
    return found


def located(
    nodes: Mapping[str, Node], replicas: Mapping[str, Iterable[PlannedReplica]]
) -> dict[Member, list[Located]]:
    """Where the parts of replicas are, of those that are on nodes that are alive.

    Args:
        nodes: by id.
        replicas: deployment -> what it holds.
    """
    found: dict[Member, list[Located]] = {}
    for name, parts in replicas.items():
        for part in parts:
            if part.node_id in nodes and part.gpus:
                found.setdefault((name, part.replica_index), []).append((nodes[part.node_id], part.gpus))
    return found


def links_of(
    group: Group, near: Sequence[str], places: Mapping[Member, Sequence[Located]]
) -> list[dict[str, Any]]:
    """What path each two replicas got that talk, JSON-ready.

    Each entry has ``unit``, ``between``, ``via``, ``route``, ``gb_per_s`` (``None`` if not known) and ``gpus``.

    Args:
        group: as it is declared.
        near: labels that have the same value on nodes near each other, widest first.
        places: where its replicas are.
    """
    roles = group.planned()
    return [one.to_dict(roles.unit_of(one.one)) for one in joined(roles, near, places)]
