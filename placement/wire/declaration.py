"""The fields of a deployment, each checked by itself, and their meaning for the planner."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from placement.core.needs import ANY_PROFILE, GIB, WHOLE, GpuName, Needs, Within
from placement.core.policy import Policy
from placement.wire.constraints import PlacementConstraints
from placement.wire.fields import Amount, Count, Declared, check_name, gpu_amount
from placement.wire.groups import Group
from placement.wire.layout import BundleLayout
from placement.wire.runtime_config import Budget, NamedRuntime, RuntimeConfig, Serving, Transport
from placement.wire.runtimes import Runtime, infer_runtime

REMOTE_RUNTIMES = ("openai", "anthropic", "gemini", "litellm")
DEFAULT_KEY_VARIABLES = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "litellm": "LITELLM_API_KEY",
}
"""The variable each provider's own client reads where a deployment names no key."""


class Declaration(Declared):
    """Fields that are valid one by one; :class:`~placement.Deployment` also checks that none contradicts another."""

    path = ""

    name: str = Field(
        description="unique in the cluster; letters, digits, '.', '_' and '-', at most 63 characters",
        examples=["llama-70b"],
    )
    model: str = Field(
        description="the model that the runtime loads, or that the provider is asked for",
        examples=["meta-llama/Llama-3.1-70B-Instruct"],
    )
    runtime: NamedRuntime | None = Field(
        default=None,
        description="what runs the model; if left out, runtime_config.runtime, else inferred from the model's name",
        examples=["vllm"],
    )
    runtime_config: RuntimeConfig | None = Field(
        default=None,
        description="how the runtime is reached and configured",
        examples=[{"api_key": {"from_env": "OPENAI_API_KEY"}}],
    )
    gpus: Annotated[int | float, BeforeValidator(gpu_amount)] | None = Field(
        default=None,
        description="GPUs per replica, or a share of one (0.25); 1 if left out; not allowed on a remote runtime",
        examples=[4, 0.25],
    )
    gpu_memory_gib: Amount | None = Field(
        default=None,
        description="instead of gpus: the share of one GPU that has this much memory",
        examples=[20],
    )
    mig: str | None = Field(
        default=None, description="instead of gpus: one MIG instance of this profile", examples=["1g.10gb"]
    )
    tensor_parallel: Count | None = Field(
        default=None,
        description="GPUs of a replica that must be on one node, or in one NVLink domain",
        examples=[8],
    )
    pipeline_parallel: Count | None = Field(
        default=None,
        description="how many such groups a replica has; they may be on several nodes",
        examples=[2],
    )
    placement_group: BundleLayout | None = Field(
        default=None, description="instead of gpus: a Ray placement group laid out bundle by bundle"
    )
    cpus: Amount | None = Field(
        default=None,
        description="instead of gpus: CPUs per replica, which has no GPU and calls no provider (an embedding model "
        "on CPUs, a tokenizer, a router); CPUs beside GPUs are constraints.cpus_per_gpu",
        examples=[4],
    )
    memory_gib: Amount | None = Field(default=None, description="with cpus: memory per replica", examples=[8])
    replicas: Count = Field(default=1, description="how many replicas", examples=[2])
    min_bandwidth_gb_per_s: Amount | None = Field(
        default=None,
        description="floor: the least all-reduce bus bandwidth between a replica's GPUs, per direction, measured or "
        "predicted; of a replica with several groups, within each group",
        examples=[200],
    )
    within: Within | None = Field(
        default=None,
        description="floor for the same GPUs: nvlink (a collective runs on NVLink alone), switch (past no CPU), numa, "
        "or node",
        examples=["nvlink"],
    )
    policy: Policy = Field(
        default=Policy.TOPOLOGY,
        description="which node goes first among those with room",
        examples=["fragmentation"],
    )
    serving: Serving = Field(
        default=Serving(), description="how a replica serves", examples=[{"max_concurrent": 16}]
    )
    budget: Budget | None = Field(
        default=None,
        description="spending limits, which the workers must obey",
        examples=[{"usd_per_day": 200.0}],
    )
    idempotent: bool = Field(
        default=False, description="requests may be sent twice; information for the workers", examples=[True]
    )
    constraints: PlacementConstraints | None = Field(
        default=None, description="limits on nodes and GPUs", examples=[{"gpu_nodes": ["gpu-a"]}]
    )
    gang: bool = Field(
        default=False, description="all replicas are placed at once, or all wait", examples=[True]
    )
    deadline_seconds: Amount | None = Field(
        default=None,
        description="how long replicas may wait for room; then those that still wait are given up",
        examples=[3600],
    )
    owner: Literal["detached", "caller", "job"] = Field(
        default="detached",
        description="with what it ends: nothing (detached), the process that places it (caller), or that process's "
        "Ray job (job)",
        examples=["job"],
    )
    ttl_seconds: Amount | None = Field(
        default=None,
        description="how long it stays placed unless it is renewed, or placed or applied again; no limit if left out",
        examples=[3600],
    )
    group: Group | None = Field(
        default=None, description="the group that it is a member of; a file says it under [[groups]]"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return check_name(value, "deployment")

    @field_validator("model")
    @classmethod
    def _model(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty; name the model to serve")
        return value

    @property
    def runtime_name(self) -> Runtime:
        """The runtime: explicit, or that of ``runtime_config``, or inferred from the model's name."""
        configured = self.runtime_config.runtime if self.runtime_config else None
        return self.runtime or configured or infer_runtime(self.model)

    @property
    def runtime_from(self) -> str:
        """Where the runtime comes from: ``declared``, ``runtime_config`` or ``by the model's name``."""
        if self.runtime:
            return "declared"
        configured = self.runtime_config and self.runtime_config.runtime
        return "runtime_config" if configured else "by the model's name"

    @property
    def transport(self) -> Transport:
        """Whether replicas run on local GPUs, run on CPUs alone, or call a provider."""
        if self.runtime_name == "custom":
            assert self.runtime_config is not None and self.runtime_config.transport is not None
            return self.runtime_config.transport
        if self.runtime_name in REMOTE_RUNTIMES:
            return "remote_network"
        return "local_gpu" if self.cpus is None else "local_cpu"

    @property
    def remote(self) -> bool:
        """Whether replicas call a provider instead of running on GPUs."""
        return self.transport == "remote_network"

    @property
    def provider(self) -> str | None:
        """The provider a remote deployment calls, ``None`` for a local one."""
        if not self.remote:
            return None
        if self.runtime_name == "custom":
            return self.runtime_config.provider if self.runtime_config else None
        return self.runtime_name

    @property
    def gpus_per_replica(self) -> int:
        """GPUs per replica: also 1 for each share or a MIG instance; 0 for a remote replica or a CPU replica."""
        if self.transport != "local_gpu":
            return 0
        gpus = self.gpus_asked
        if gpus is None:
            return (self.tensor_parallel or 1) * (self.pipeline_parallel or 1)
        return gpus if isinstance(gpus, int) else 1

    @property
    def named(self) -> tuple[GpuName, ...]:
        """The GPUs that are named; empty for any."""
        return (self.constraints and self.constraints.gpus) or ()

    @property
    def gpus_asked(self) -> int | float | None:
        """GPUs as declared, or a share of one; ``None`` if another field says it, or none does."""
        return self.gpus if self.placement_group is None else self.placement_group.gpus

    @property
    def stages(self) -> int:
        """How many tensor-parallel groups a replica has; 1 if not declared."""
        if self.tensor_parallel is not None:
            return self.gpus_per_replica // self.tensor_parallel
        return self.pipeline_parallel or 1

    @property
    def divisible(self) -> bool:
        """Whether a replica that no node can hold may be cut into stages: only if no field says how it is divided."""
        on_one_node = self.placement_group is not None or self.group is not None
        return self.tensor_parallel is None and self.pipeline_parallel is None and not on_one_node

    @property
    def needs(self) -> Needs:
        """What each tensor-parallel group of a replica needs of a node's GPUs; most replicas are one such group."""
        limits, gpus, layout = self.constraints, self.gpus_asked, self.placement_group
        amounts = layout.amounts if layout is not None else ()
        instance = any(str(name).startswith("MIG-") for name in self.named)
        return Needs(
            gpus=sum(amount // WHOLE for amount in amounts)
            if amounts
            else self.gpus_per_replica // self.stages,
            within=self.within or Within.NODE,
            min_bandwidth_gb_per_s=self.min_bandwidth_gb_per_s or 0.0,
            share=round(gpus * WHOLE) if isinstance(gpus, float) else WHOLE,
            memory_bytes=round((self.gpu_memory_gib or 0) * GIB),
            free_memory_bytes=round(((limits and limits.min_free_gpu_memory_gib) or 0) * GIB),
            profile=self.mig or (ANY_PROFILE if instance else ""),
            named=self.named,
            amounts=amounts,
        )

    @property
    def cpu_milli_per_gpu(self) -> int:
        """CPUs (thousandths) that each GPU's bundle also takes."""
        return round(((self.constraints and self.constraints.cpus_per_gpu) or 0) * 1000)

    @property
    def memory_bytes_per_gpu(self) -> int:
        """Memory that each GPU's bundle also takes."""
        return round(((self.constraints and self.constraints.memory_gib_per_gpu) or 0) * GIB)

    @property
    def cpu_milli(self) -> int:
        """CPUs (thousandths) that each replica without GPUs takes; 0 for the others."""
        return round((self.cpus or 0) * 1000)

    @property
    def memory_bytes(self) -> int:
        """Memory that each replica without GPUs takes; 0 for the others."""
        return round((self.memory_gib or 0) * GIB)

    @property
    def egress_per_replica(self) -> int:
        """Egress units (concurrent requests) each replica takes; 0 for a local one."""
        return self.serving.max_concurrent if self.remote else 0

    @property
    def key_fingerprint(self) -> str | None:
        """Identifies (API key reference, endpoint) without revealing it: 16 hex digits of a SHA-256.

        It is computed from the reference, not from the key: placing never reads a key.
        """
        if not self.remote:
            return None
        config = self.runtime_config
        default = f"env:{DEFAULT_KEY_VARIABLES.get(self.provider or '', '')}"
        reference = config.api_key.reference if config and config.api_key else default
        endpoint = (config.base_url or "") if config else ""
        return hashlib.sha256(f"{reference}\n{endpoint}".encode()).hexdigest()[:16]

    @property
    def calls(self) -> tuple[str, str] | None:
        """What a remote replica calls, as (provider, key fingerprint); ``None`` for a local one."""
        return (self.provider or "", self.key_fingerprint or "") if self.remote else None

    def shape(self) -> dict[str, Any]:
        """The fields that decide where replicas can be, in one normal form. Changes of other fields move no replica."""
        limits = self.constraints or PlacementConstraints()
        of_each_kind: dict[Transport, set[str]] = {
            "local_gpu": {
                "gpu_nodes", "accelerators", "min_compute_capability", "min_free_gpu_memory_gib", "cpus_per_gpu",
                "memory_gib_per_gpu", "gpus",
            },
            "local_cpu": {"cpu_nodes"},
            "remote_network": {"egress_nodes", "egress_preference"},
        }  # fmt: skip
        of_the_other_kinds = set().union(*of_each_kind.values()) - of_each_kind[self.transport]
        return {
            **self.needs._asdict(),
            "stages": self.stages,
            "divisible": self.divisible,
            "placement_group": self.placement_group and self.placement_group.model_dump(mode="json"),
            "cpu_milli": self.cpu_milli,
            "memory": self.memory_bytes,
            "provider": self.provider,
            "max_concurrent": self.egress_per_replica,
            "api_key": self.key_fingerprint,
            "constraints": limits.model_dump(mode="json", exclude=of_the_other_kinds),
        }
