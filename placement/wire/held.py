"""What is placed: deployments, their replicas, and what these hold."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from placement.core.needs import WHOLE
from placement.core.replicas import PlannedReplica
from placement.wire.base import Model
from placement.wire.declaration import REMOTE_RUNTIMES
from placement.wire.deployment import Deployment, with_runtime
from placement.wire.runtimes import infer_runtime


class HeldReplica(Model):
    """A placed replica: its node, and the GPUs, the egress units or the CPUs that it holds there."""

    replica_index: int
    node: str
    gpus: tuple[int, ...] = ()
    ranks: tuple[int, ...] = Field(
        default=(), description="the ranks on this node, for a replica over several nodes"
    )
    share: int = Field(default=WHOLE, description="thousandths of the GPU")
    shares: tuple[int, ...] = Field(default=(), description="thousandths of each GPU, if they differ")
    profile: str = Field(default="", description="profile of the MIG instance that it holds instead of a GPU")
    cpu_milli: int = 0
    memory_bytes: int = 0
    egress_resource: str | None = None
    egress_units: int = 0
    set_size: int = Field(default=0, description="GPUs of each of its sets; 0 if all GPUs are one set")
    generation: int = Field(
        default=0, description="the key under `earlier` by which it was placed; 0: as declared now"
    )

    @property
    def taken(self) -> dict[int, int]:
        """GPU -> thousandths of it."""
        return self.planned().taken

    def planned(self) -> PlannedReplica:
        """The same in the planner's terms."""
        fields = self.model_dump(exclude={"node", "generation"})
        return PlannedReplica(node_id=self.node, **fields)

    @classmethod
    def of(cls, planned: PlannedReplica) -> HeldReplica:
        """What a plan will hold once it is carried out."""
        fields = {name: value for name, value in vars(planned).items() if name != "node_id"}
        return cls.model_construct(node=planned.node_id, **fields)


class HeldDeployment(Model):
    """A deployment that exists; replicas that are declared and not listed are pending."""

    deployment: Deployment
    replicas: tuple[HeldReplica, ...]
    releasing: bool = Field(default=False, description="it is being released")
    earlier: dict[int, Deployment] = Field(
        default_factory=dict,
        description="earlier declarations, by which replicas were placed that wait to be replaced",
    )

    @model_validator(mode="before")
    @classmethod
    def _keeps_its_runtime(cls, value: Any) -> Any:
        """What replicas hold shows whether their model's name was taken for that of an API when they were placed."""
        if not isinstance(value, Mapping):
            return value
        declared, replicas = value.get("deployment"), value.get("replicas")
        if not isinstance(declared, Mapping) or not isinstance(replicas, list | tuple):
            return value
        held = [one for one in replicas if isinstance(one, Mapping)]
        found = {**value, "deployment": _as_placed(declared, held, 0)}
        earlier = value.get("earlier")
        if isinstance(earlier, Mapping):
            found["earlier"] = {
                key: _as_placed(one, held, key) if isinstance(one, Mapping) else one
                for key, one in earlier.items()
            }
        return found

    @model_validator(mode="after")
    def _knows_all_generations(self) -> Self:
        for number in {one.generation for one in self.replicas}:
            if number and number not in self.earlier:
                raise ValueError(f"a replica is of generation {number}, which earlier does not have")
        return self

    @classmethod
    def of(cls, deployment: Deployment, replicas: Iterable[PlannedReplica]) -> HeldDeployment:
        """The deployment as it is once a plan is carried out."""
        held = tuple(map(HeldReplica.of, replicas))
        return cls.model_construct(deployment=deployment, replicas=held, releasing=False, earlier={})

    def declared(self, replica: HeldReplica) -> Deployment:
        """The declaration by which a replica was placed."""
        return self.earlier[replica.generation] if replica.generation else self.deployment

    def becomes(
        self, deployment: Deployment, replicas: Iterable[PlannedReplica], outdated: Collection[int]
    ) -> HeldDeployment:
        """The same once it is declared anew.

        Args:
            deployment: what is declared.
            replicas: those that are there, except the outdated ones.
            outdated: the indices of those that stay until they can be replaced.
        """
        this = max(self.earlier, default=0) + 1
        old = [one for one in self.replicas if one.replica_index in outdated]
        kept = [one.model_copy(update={"generation": one.generation or this}) for one in old]
        declared = {one.generation: self.declared(before) for one, before in zip(kept, old, strict=True)}
        held = (*map(HeldReplica.of, replicas), *kept)
        return self.model_construct(deployment=deployment, replicas=held, releasing=False, earlier=declared)

    def by_index(self) -> dict[int, tuple[PlannedReplica, ...]]:
        """Replica -> its parts, in the planner's terms."""
        found: dict[int, tuple[PlannedReplica, ...]] = {}
        for replica in self.replicas:
            found[replica.replica_index] = (*found.get(replica.replica_index, ()), replica.planned())
        return found


def _as_placed(
    declared: Mapping[str, Any], replicas: Iterable[Mapping[str, Any]], generation: object
) -> dict[str, Any]:
    """The fields of a declaration, with the runtime that replicas of that generation have been placed as."""
    remote = {
        "egress_resource" in one for one in replicas if str(one.get("generation", 0)) == str(generation)
    }
    placed_as = None
    with contextlib.suppress(ValueError):
        means = infer_runtime(str(declared.get("model")))
        if remote <= {means in REMOTE_RUNTIMES}:
            placed_as = means
    return with_runtime(declared, placed_as)
