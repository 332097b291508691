"""What a user declares: a deployment, and optional constraints on where it may go."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from placement.core.labels import parse_condition
from placement.core.policy import Policy
from placement.core.request import Bundle, Strategy
from placement.core.roles import RoleLink, Roles, Via
from placement.core.score import ANY_PROFILE, GIB, WHOLE, GpuName, Needs, Within
from placement.core.snapshot import UNIT
from placement.errors import InvalidDeployment, MissingSecret, counted
from placement.wire.base import Model
from placement.wire.runtimes import Runtime, infer_runtime, runtime_before
from placement.wire.unknown import unknown_field

LocalRuntime = Literal["vllm", "tensorrt", "ort", "candle", "cudarc", "mistralrs", "python"]
RemoteRuntime = Literal["openai", "anthropic", "gemini", "litellm"]
Transport = Literal["local_gpu", "local_cpu", "remote_network"]

REMOTE_RUNTIMES = ("openai", "anthropic", "gemini", "litellm")
GPU_RUNTIMES = ("tensorrt", "cudarc")
"""Those that run on nothing but GPUs."""
DEFAULT_KEY_VARIABLES = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "litellm": "LITELLM_API_KEY",
}
"""The variable each provider's own client reads where a deployment names no key."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ENV_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SECRET_PATTERN = re.compile(
    r"api[_-]?key|secret|passw(or)?d|credential|authorization|private[_-]?key|(^|[_-])token$", re.IGNORECASE
)
_MIG_PATTERN = re.compile(r"([1-8]c\.)?[1-8]g\.\d{1,3}gb([+-][a-z.]+)?")
_UUID_PATTERN = re.compile(r"(GPU|MIG)-[A-Za-z0-9/-]{4,120}")
_PROVIDER_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,31}")
_WORD_PATTERN = re.compile(r"[A-Za-z_-]{1,31}\d?")
"""What may be shown where a key might have been pasted: no key looks like this."""

STANDS = {"stands": True}
"""Validation context for what stands already: rules for new requests do not apply to it."""

MOST = 100_000
"""A count above this is a slip of the pen, not a deployment."""

MOST_BUNDLES = 4096
"""More bundles than this in one placement group are a slip of the pen."""

MOST_MEMBERS = 512
"""More replicas than this in one group are a slip of the pen: they are placed all at once."""

LEAST = 0.001
"""An amount below this would count as none: 1 MiB, a thousandth of a CPU or of a GB/s."""

NO_LINKS_BETWEEN_INSTANCES = (
    "no NVLink and no peer-to-peer access leads from one MIG instance to another, not even on one GPU"
)
"""Why one replica cannot have several; https://github.com/NVIDIA/nccl/issues/1716."""


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as spreadsheets and other programs write whole numbers: 8.0
    if isinstance(value, bool) or not isinstance(value, int):
        fractional = isinstance(value, float) and math.isfinite(value)
        raise ValueError(
            f"{value!r} is {'fractional' if fractional else 'not a number'}; use a whole number of at least 1"
        )
    if value < 1:
        raise ValueError(f"{value} is too small; use a whole number of at least 1")
    if value > MOST:
        raise ValueError(f"{value if value < 10**18 else 'it'} is too large; use at most {MOST}")
    return value


def _one_of(what: str, known: tuple[str, ...]) -> Callable[[Any], Any]:
    """A validator that refuses a name that there is not, and says which there are."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and value not in known:
            named = f"{value!r} is" if _WORD_PATTERN.fullmatch(value) else "is"
            raise ValueError(f"{named} no {what}; there are {', '.join(known)}")
        return value

    return check


def _amount(value: float, info: ValidationInfo) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number; leave it out for no limit")
    if _stands(info):
        return value
    if value < LEAST:
        raise ValueError(f"{value:g} is too small; use at least {LEAST}, or leave it out")
    if value > MOST:
        raise ValueError(f"{value:g} is too large; use at most {MOST}")
    return value


def _keys(value: JsonValue) -> Iterator[str]:
    """All field names in a JSON value, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _capability(value: Any) -> Any:
    text = f"{value:.1f}" if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,2}\.\d", text):
        raise ValueError(f'{value!r} is not a compute capability; write major.minor, such as "8.0"')
    return text


def _gpus(value: Any) -> Any:
    if isinstance(value, float) and not (value >= 1 and value.is_integer()):
        if value > 1:
            raise ValueError(
                f"{value!r} GPUs is more than one and not whole, and a share cannot span two GPUs; "
                "use a whole number, or a share below 1"
            )
        fits = value * WHOLE >= 0.5 and math.isclose(value * WHOLE, round(value * WHOLE), abs_tol=1e-6)
        if not fits:
            raise ValueError(f"{value!r} is no share of a GPU; use 0.001 to 0.999, in thousandths")
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise ValueError(
            f"{value} is too small; use at least 1, or leave gpus out on a remote deployment, and where cpus is set"
        )
    return _whole(value)


def _check_name(value: str, what: str) -> str:
    if not value:
        raise ValueError(f"is empty; give the {what} a name")
    if not NAME_PATTERN.fullmatch(value):
        raise ValueError(
            f"{value[:80]!r} is not a name Ray groups can carry; use letters, digits, '.', '_' and '-', "
            "start with a letter or digit, at most 63 characters"
        )
    return value


def _gpu_name(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < MOST:
            raise ValueError(f"{value} is no GPU of a node; use 0 or more, as `placement status` shows them")
        return value
    if not isinstance(value, str) or not _UUID_PATTERN.fullmatch(value):
        shown = repr(value[:80] if isinstance(value, str) else value)
        raise ValueError(
            f"{shown} names no GPU; write its ordinal, such as 2, or its UUID: GPU-... or MIG-..."
        )
    return value


def _stands(info: ValidationInfo) -> bool:
    """Whether what is read stands already."""
    return info.context == STANDS


MOST_NAME = Field(max_length=253)
"""No name in DNS is longer; nor is one of a node, an accelerator or a deployment."""
MOST_LABEL = Field(max_length=317)
"""No label of Kubernetes is longer: a name in DNS, a slash, and 63 characters."""

Named = Annotated[str, MOST_NAME]
Count = Annotated[int, BeforeValidator(_whole)]
Amount = Annotated[float, AfterValidator(_amount)]
NamedRuntime = Annotated[Runtime, BeforeValidator(_one_of("runtime", get_args(Runtime)))]
NamedTransport = Annotated[Transport, BeforeValidator(_one_of("transport", get_args(Transport)))]


class _Declared(Model):
    """What somebody wrote. Others will read it on their terminals, so that it holds no control characters.

    But for ``options``, which nobody here reads: JSON shows them escaped.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _says_what_was_meant(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Of an unknown field, says what there is instead, also where no file or service stands between."""
        try:
            return validate(value)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            if not any(problem["type"] == "extra_forbidden" for problem in problems):
                raise
            told = [cls._told(problem) for problem in problems]
            raise ValidationError.from_exception_data(cls.__name__, told, hide_input=True) from None

    @classmethod
    def _told(cls, problem: ErrorDetails) -> InitErrorDetails:
        kind: str | PydanticCustomError = problem["type"]
        if kind == "extra_forbidden" and len(problem["loc"]) == 1:
            message = unknown_field(str(problem["loc"][0]), list(cls.model_fields), _full_names())
            kind = PydanticCustomError("unknown_field", "{message}", {"message": message})
        elif kind == "unknown_field":
            kind = PydanticCustomError(kind, "{message}", problem["ctx"])
        return InitErrorDetails(
            type=kind, loc=problem["loc"], input=problem["input"], ctx=problem.get("ctx", {})
        )

    @field_validator("*", mode="after")
    @classmethod
    def _is_printable(cls, value: Any, info: ValidationInfo) -> Any:
        texts: Iterable[Any] = ()
        if isinstance(value, str):
            texts = (value,)
        elif isinstance(value, (list, tuple)):
            texts = value
        elif isinstance(value, dict) and info.field_name != "options":
            texts = (*value.keys(), *value.values())
        for text in texts:
            if isinstance(text, str) and not text.isprintable():
                odd = next(character for character in text if not character.isprintable())
                raise ValueError(f"contains the character U+{ord(odd):04X}, which cannot be shown; remove it")
        return value


class ApiKey(_Declared):
    """A reference to an API key. The key itself never enters a deployment, the ledger or a log.

    Exactly one of the two is set. Which node resolves it, and when, is up to the worker: see :meth:`resolve`.
    """

    from_env: str | None = Field(
        default=None, description="name of an environment variable on the egress node"
    )
    from_file: str | None = Field(default=None, description="path of a file on the egress node")

    @field_validator("from_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not _ENV_PATTERN.fullmatch(value):
            raise ValueError(
                "is not the name of an environment variable; name one, never paste the key itself"
            )
        return value

    @field_validator("from_file")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("/", "~/", "./")):
            raise ValueError(
                "is not a path that starts with /, ~/ or ./; name a file, never paste the key itself"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _is_a_reference(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError('must not hold a key; write {from_env = "VARIABLE"} or {from_file = "/path"}')
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> ApiKey:
        if (self.from_env is None) == (self.from_file is None):
            raise ValueError("set exactly one of from_env and from_file")
        return self

    @property
    def reference(self) -> str:
        """``env:NAME`` or ``file:PATH``: what identifies the key without being it."""
        return f"env:{self.from_env}" if self.from_env is not None else f"file:{self.from_file}"

    def resolve(self) -> str:
        """The key itself, read here and now. Placing never calls this; a worker that needs the key does.

        Raises:
            MissingSecret: the variable is not set or empty, or the file cannot be read.
        """
        if self.from_env is not None:
            value = os.environ.get(self.from_env, "")
            if not value:
                raise MissingSecret("runtime_config.api_key.from_env", self.from_env, "is not set")
            return value
        path = str(self.from_file)
        try:
            value = Path(path).expanduser().read_text(encoding="utf-8").strip()
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
            raise MissingSecret("runtime_config.api_key.from_file", path, reason) from None
        if not value:
            raise MissingSecret("runtime_config.api_key.from_file", path, "is empty")
        return value


class RuntimeConfig(_Declared):
    """How the runtime is reached and configured."""

    runtime: NamedRuntime | None = Field(
        default=None, description="the runtime, where the deployment does not say"
    )
    transport: NamedTransport | None = Field(
        default=None, description="required by, and only for, runtime custom"
    )
    provider: str | None = Field(default=None, description="provider that a custom remote runtime calls")
    api_key: ApiKey | None = Field(default=None, description="remote runtimes: a reference to the key")
    base_url: str | None = Field(default=None, description="remote runtimes: endpoint of a proxy or gateway")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="handed to the runtime unread")

    @field_validator("provider")
    @classmethod
    def _provider(cls, value: str | None) -> str | None:
        if value is not None and not _PROVIDER_PATTERN.fullmatch(value):
            raise ValueError(
                "use lower-case letters, digits and _; it names the node resource egress_<provider>"
            )
        return value

    @field_validator("options")
    @classmethod
    def _can_be_written(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError(
                "holds NaN or an infinite number, which JSON cannot carry; use a number"
            ) from None
        except RecursionError:
            raise ValueError("is nested too deep to be stored; use fewer levels") from None
        return value

    @field_validator("options")
    @classmethod
    def _no_secrets(cls, value: dict[str, JsonValue], info: ValidationInfo) -> dict[str, JsonValue]:
        if _stands(info):
            return value
        secret = next((key for key in _keys(value) if _SECRET_PATTERN.search(key)), None)
        if secret is not None:
            raise ValueError(
                f"{secret!r} looks like a secret, and options are stored; use api_key with a reference"
            )
        return value

    @field_validator("base_url")
    @classmethod
    def _base_url(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s@?#]+", value):
            raise ValueError("must start with http:// or https:// and hold no user, password or query")
        return value


class Serving(_Declared):
    """How a replica serves."""

    max_concurrent: Count = Field(
        default=1, description="requests in flight per replica; egress units it takes"
    )
    on_capacity_exhausted: Literal["queue", "reject"] = Field(
        default="queue", description="what the replica does with a request above max_concurrent"
    )


class Budget(_Declared):
    """Spending limits, for the workers to keep: every result carries them. Placing does not read them."""

    usd_per_day: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    tokens_per_minute: int | None = Field(default=None, gt=0)
    requests_per_minute: int | None = Field(default=None, gt=0)


class Spread(_Declared):
    """Keeps replicas apart: at most ``max`` of them on nodes with one value of ``label``."""

    label: Annotated[str, MOST_LABEL] = Field(
        min_length=1, description="a node label, such as ray.io/availability-zone"
    )
    max: Count = 1


class PlacementConstraints(_Declared):
    """Limits the choice of nodes. A node is named by its id, its name or its address.

    ``None`` means "any that the cluster has"; an empty list is refused.
    """

    gpu_nodes: tuple[Named, ...] | None = Field(default=None, min_length=1)
    gpus: tuple[Annotated[GpuName, BeforeValidator(_gpu_name)], ...] | None = Field(
        default=None,
        min_length=1,
        description="only these GPUs, all of one node: ordinals as `placement status` shows them, or UUIDs",
    )
    egress_nodes: tuple[Named, ...] | None = Field(default=None, min_length=1)
    egress_preference: tuple[Named, ...] = Field(
        default=(), description="egress nodes to try first, best first"
    )
    cpu_nodes: tuple[Named, ...] | None = Field(
        default=None, min_length=1, description="for replicas that cpus is set for"
    )
    accelerators: tuple[Named, ...] | None = Field(
        default=None, min_length=1, description='accelerator types, as Ray names them: ["H100", "H200"]'
    )
    min_compute_capability: Annotated[str, BeforeValidator(_capability)] | None = Field(
        default=None, description='the least that will do: "8.0"'
    )
    min_free_gpu_memory_gib: Amount | None = Field(
        default=None, description="that NVML must show as free on each GPU"
    )
    node_labels: dict[Annotated[str, MOST_LABEL], str] = Field(
        default_factory=dict, description="label -> a, !a, in(a, b) or !in(a, b), as Ray's label_selector"
    )
    cpus_per_gpu: Amount | None = None
    memory_gib_per_gpu: Amount | None = None
    spread: Spread | None = None
    apart_from: tuple[Named, ...] = Field(
        default=(), description="deployments that must not be on the node; they keep away from this one, too"
    )
    near_to: tuple[Named, ...] = Field(
        default=(),
        description="deployments that must be on the node; they may be on others, too, and may leave",
    )

    @field_validator("node_labels")
    @classmethod
    def _conditions(cls, value: dict[str, str]) -> dict[str, str]:
        for condition in value.values():
            parse_condition(condition)
        return value

    @field_validator("gpus")
    @classmethod
    def _each_once(cls, value: tuple[GpuName, ...] | None) -> tuple[GpuName, ...] | None:
        twice = next((name for name in value or () if (value or ()).count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"names {twice} twice; name each GPU once")
        return value and tuple(sorted(value, key=lambda name: (isinstance(name, str), name)))

    @model_validator(mode="after")
    def _no_contradiction(self) -> PlacementConstraints:
        both = sorted(set(self.apart_from) & set(self.near_to))
        if both:
            raise ValueError(f"apart_from and near_to both name {both[0]!r}; remove it from one of them")
        return self

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """The least compute capability, as (major, minor)."""
        if self.min_compute_capability is None:
            return None
        major, _, minor = self.min_compute_capability.partition(".")
        return int(major), int(minor)


class BundleLayout(_Declared):
    """A replica as a Ray placement group, bundle by bundle: what :func:`placement.placement_group` asks for.

    The GPUs that it has on one node are one set; its bundles get them in ascending order.
    """

    bundles: tuple[dict[str, float], ...] = Field(
        min_length=1,
        max_length=MOST_BUNDLES,
        description='what each takes: {"GPU": 1, "CPU": 4, "memory": 1e9}, and custom resources',
    )
    strategy: Strategy = Field(default=Strategy.PACK, description="as in Ray")
    bundle_label_selector: tuple[dict[Annotated[str, MOST_LABEL], str], ...] = Field(
        default=(), description="label -> condition, in Ray's syntax, for each bundle; as in Ray"
    )
    domain_label: Annotated[str, MOST_LABEL] | None = Field(
        default=None, description="all bundles on nodes with one value of this label; Ray's topology_strategy"
    )

    @field_validator("bundles")
    @classmethod
    def _amounts(cls, value: tuple[dict[str, float], ...]) -> tuple[dict[str, float], ...]:
        for i, bundle in enumerate(value):
            for resource, amount in bundle.items():
                if is_egress(resource) or resource == "object_store_memory":
                    raise ValueError(
                        f"bundle {i} asks for {resource}, which is not planned with for a group; leave it out, or "
                        "call ray.util.placement_group, which chooses no GPUs"
                    )
                most = 2**60 if resource == "memory" else MOST
                if not 0 <= amount <= most:
                    raise ValueError(f"bundle {i} asks for {amount:g} {resource}; use 0 to {most}")
            if (amount := bundle.get("GPU", 0.0)) > 1 and not amount.is_integer():
                raise ValueError(
                    f"bundle {i} asks for {amount:g} GPUs, and a share cannot span two GPUs; use a whole number, or a "
                    "share below 1"
                )
        gpus = [bundle["GPU"] for bundle in value if bundle.get("GPU")]
        if not gpus:
            raise ValueError("no bundle asks for a GPU, so that there is none to choose; give one a GPU")
        if any(amount < 1 for amount in gpus) and len(gpus) > 1:
            raise ValueError(
                f"{len(gpus)} bundles have GPUs, one of them {min(gpus):g} of one, and a share must be alone in its "
                "group; give each bundle whole GPUs, of which actors may take shares, or make a group for each share"
            )
        for amount in gpus:
            if amount < 1:
                _gpus(amount)
        return value

    @field_validator("bundle_label_selector")
    @classmethod
    def _conditions(cls, value: tuple[dict[str, str], ...]) -> tuple[dict[str, str], ...]:
        for labels in value:
            for condition in labels.values():
                parse_condition(condition)
        return value

    @model_validator(mode="after")
    def _selectors_fit(self) -> BundleLayout:
        if len(self.bundle_label_selector) not in (0, len(self.bundles)):
            raise ValueError(
                f"bundle_label_selector has {len(self.bundle_label_selector)} entries for {len(self.bundles)} bundles; "
                "give one for each bundle, or none"
            )
        if self.on_one_node:
            self.check_labels_agree()
        for i, (bundle, labels) in enumerate(zip(self.bundles, self.labels, strict=True)):
            if self.domain_label in labels and not _has_gpus(bundle):
                raise ValueError(
                    f"bundle {i} has no GPUs and a condition on {self.domain_label}, which is that of the bundles "
                    "with GPUs; leave the condition out"
                )
        return self

    def check_labels_agree(self) -> None:
        """Refuses conditions that contradict each other where all bundles are on one node."""
        together: dict[str, str] = {}
        for labels in self.labels:
            for key, condition in labels.items():
                if together.setdefault(key, condition) != condition:
                    raise ValueError(
                        f"bundle_label_selector asks for {key} {together[key]!r} and {condition!r} of one node; "
                        "write the condition that both mean"
                    )

    @property
    def gpus(self) -> int | float:
        """GPUs of all bundles, or the share of the one that has any."""
        total = sum(bundle.get("GPU", 0) for bundle in self.bundles)
        return total if total < 1 else round(total)

    @property
    def labels(self) -> tuple[Mapping[str, str], ...]:
        """The conditions for each bundle."""
        return self.bundle_label_selector or ({},) * len(self.bundles)

    @property
    def on_one_node(self) -> bool:
        """Whether all its GPUs are to be on one node."""
        return self.strategy is Strategy.STRICT_PACK or sum(map(_has_gpus, self.bundles)) == 1

    @property
    def bundle_of_rank(self) -> list[int]:
        """The bundle of each GPU, by rank: the first bundle has the first ranks."""
        return [i for i, bundle in enumerate(self.bundles) for _ in range(math.ceil(bundle.get("GPU", 0)))]

    def planned(self) -> list[Bundle]:
        """The bundles as the planner sees them. Of those without GPUs what they take counts where a node holds all."""
        return [
            Bundle(
                math.ceil(bundle.get("GPU", 0)),
                round(bundle.get("CPU", 0) * 1000),
                round(bundle.get("memory", 0)),
                tuple(sorted(labels.items())),
                tuple(
                    (resource, round(amount * UNIT))
                    for resource, amount in sorted(bundle.items())
                    if resource not in ("GPU", "CPU", "memory") and amount
                ),
            )
            for bundle, labels in zip(self.bundles, self.labels, strict=True)
            if _has_gpus(bundle) or self.strategy is Strategy.STRICT_PACK
        ]


def is_egress(resource: str) -> bool:
    """Whether a resource of Ray's says how many requests a node may carry: ``egress``, ``egress_<provider>``."""
    return resource == "egress" or resource.startswith("egress_")


def _has_gpus(bundle: Mapping[Any, float]) -> bool:
    return bundle.get("GPU", 0) > 0


class GroupLink(_Declared):
    """Two members of a group that talk: within a unit, each replica of the one with each replica of the other."""

    between: tuple[Named, Named] = Field(description="two members")
    via: Via = Field(
        description="what their transport can use: nvlink (else PCIe), pcie (also where there is NVLink), or network"
    )
    within: Annotated[str, MOST_LABEL] | None = Field(
        default=None,
        min_length=1,
        description="floor: nvlink, switch (past no CPU), numa, node; or a node label whose value both nodes share",
    )
    min_bandwidth_gb_per_s: Amount | None = Field(
        default=None, description="floor: what the route between any two of their GPUs carries per direction"
    )

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


class Group(_Declared):
    """Deployments whose replicas talk to each other: placed all or none, near each other, and released as one.

    It consists of ``units``, each with so many replicas of every member. Replicas 0 and 1 of a member that has two in
    each unit are in the first unit, 2 and 3 in the second.

    Example:
        >>> pd = Group(name="pd", members={"prefill": 1, "decode": 2}, units=4,
        ...            links=[{"between": ("prefill", "decode"), "via": "pcie"}])
        >>> pd.replicas("decode")
        8
    """

    name: str = Field(description="unique in the cluster, among deployments, too")
    members: dict[Named, Count] = Field(
        min_length=1, description="deployment -> how many of its replicas are in each unit"
    )
    units: Count = Field(default=1, description="how many units there are")
    links: tuple[GroupLink, ...] = Field(default=(), description="which members talk")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _check_name(value, "group")

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
                raise ValueError(f"links: {' and '.join(link.between)} are joined twice; keep one of the two")
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

    def of(self, deployments: Iterable[Deployment]) -> list[Deployment]:
        """The members, as they are declared: what ``apply_all`` and ``plan_all`` take.

        Args:
            deployments: the declarations of all members, and no others; ``replicas`` may be left out.

        Raises:
            InvalidDeployment: one is missing, or is no member.
            ValidationError: one cannot be a member, as its replicas are not of whole GPUs on one node each.
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
        return [Deployment.model_validate(self.bound(given[name])) for name in self.members]

    def bound(self, deployment: Deployment) -> dict[str, Any]:
        """The fields of a deployment as a member: with the group, and as many replicas as that says."""
        declared = deployment.model_dump(exclude_unset=True)
        return {"replicas": self.replicas(deployment.name), **declared, "group": self}

    def planned(self) -> Roles:
        """The same in the planner's terms."""
        return Roles(self.name, self.members, self.units, tuple(link.planned() for link in self.links))


class Deployment(_Declared):
    """A model, how many replicas of it, and what each one needs.

    Example:
        >>> Deployment(name="llama", model="meta-llama/Llama-3.1-70B-Instruct", gpus=4, replicas=2).runtime_name
        'vllm'
    """

    name: str = Field(description="unique in the cluster; letters, digits, '.', '_' and '-', at most 63")
    model: str = Field(description="what the runtime loads or the provider is asked for")
    runtime: NamedRuntime | None = Field(
        default=None,
        description="else runtime_config.runtime, else by the model's name: wire/runtimes.py says how",
    )
    runtime_config: RuntimeConfig | None = None
    gpus: Annotated[int | float, BeforeValidator(_gpus)] | None = Field(
        default=None,
        description="GPUs per replica, or a share of one (0.25); 1 if left out; never on a remote runtime",
    )
    gpu_memory_gib: Amount | None = Field(
        default=None, description="instead of gpus: as much of one GPU as has this much memory"
    )
    mig: str | None = Field(default=None, description="instead of gpus: one MIG instance, such as 1g.10gb")
    tensor_parallel: Count | None = Field(
        default=None, description="GPUs of a replica that one node, or one NVLink domain, must hold together"
    )
    pipeline_parallel: Count | None = Field(
        default=None, description="how many such groups a replica is made of; they may lie on several nodes"
    )
    placement_group: BundleLayout | None = Field(
        default=None, description="instead of gpus: a Ray placement group laid out bundle by bundle"
    )
    cpus: Amount | None = Field(
        default=None,
        description="instead of gpus: CPUs per replica, which has no GPU and calls no provider (an embedding model "
        "on CPUs, a tokenizer, a router); CPUs beside GPUs are constraints.cpus_per_gpu",
    )
    memory_gib: Amount | None = Field(default=None, description="with cpus: memory per replica")
    replicas: Count = 1
    min_bandwidth_gb_per_s: Amount | None = Field(
        default=None,
        description="floor: predicted all-reduce bus bandwidth between a replica's GPUs, GB/s per direction; "
        "of one made of several groups, between those of each group",
    )
    within: Within | None = Field(
        default=None,
        description="floor for the same GPUs: nvlink (a collective runs on NVLink alone), switch (past no CPU), numa, "
        "or node",
    )
    policy: Policy = Field(default=Policy.TOPOLOGY, description="which node goes first among those with room")
    serving: Serving = Serving()
    budget: Budget | None = None
    idempotent: bool = Field(default=False, description="requests may be sent twice")
    constraints: PlacementConstraints | None = None
    gang: bool = Field(default=False, description="replicas get their places all at once, or wait all")
    deadline_seconds: Amount | None = Field(
        default=None,
        description="how long replicas may wait for room; those that still wait then are given up",
    )
    owner: Literal["detached", "caller", "job"] = Field(
        default="detached",
        description="whose end ends it: nobody's, that of the process that asks, or that of its Ray job",
    )
    ttl_seconds: Amount | None = Field(
        default=None, description="how long it stands unless it is renewed; without limit if left out"
    )
    group: Group | None = Field(
        default=None, description="the group that it is a member of; a file says it under [[groups]]"
    )

    @classmethod
    def recorded(cls, declared: Mapping[str, Any], runtime: Runtime | None = None) -> Deployment:
        """A declaration that was accepted once, by this version or an earlier one, and stands.

        What may be asked for, and what a model's name means, may have changed since: it keeps its runtime.

        Args:
            declared: its fields.
            runtime: what it was placed as; ``None`` if nobody noted that, as earlier versions did not.
        """
        return cls.model_validate(with_runtime(declared, runtime), context=STANDS)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _check_name(value, "deployment")

    @field_validator("model")
    @classmethod
    def _model(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty; name the model to serve")
        return value

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Deployment:
        config = self.runtime_config
        if config and self.runtime and config.runtime and config.runtime != self.runtime:
            raise ValueError(
                f"runtime is {self.runtime!r} but runtime_config.runtime is {config.runtime!r}; keep one"
            )
        if self.runtime_name == "custom":
            if config is None or config.transport is None:
                raise ValueError(
                    'runtime custom needs runtime_config.transport: "local_gpu", "local_cpu" or "remote_network"'
                )
            if config.transport == "remote_network" and config.provider is None:
                raise ValueError("a custom remote runtime needs runtime_config.provider, such as openai")
        self._no_contradiction()
        if not _stands(info):
            self._check_endpoint()
            self._check_floors()
            self._check_group()
        return self

    def _check_endpoint(self) -> None:
        """Refuses what only remote runtimes, or only custom ones, have a use for."""
        config, runtime = self.runtime_config, self.runtime_name
        if config is None:
            return
        if runtime != "custom":
            for field in ("transport", "provider"):
                if getattr(config, field) is not None:
                    if getattr(config, field) == "local_cpu":
                        raise ValueError(
                            f"runtime_config.transport is for runtime custom, not {runtime} ({self.runtime_from}); "
                            "remove it, and set cpus: that says it"
                        )
                    calls = "" if self.remote else "litellm if replicas call that provider, or to "
                    raise ValueError(
                        f"runtime_config.{field} is for runtime custom, not {runtime} ({self.runtime_from}); set "
                        f"runtime to {calls}custom, or remove {field}"
                    )
        elif config.provider is not None and not self.remote:
            raise ValueError(
                "runtime_config.provider is for a custom runtime that calls one; set transport to remote_network, "
                "or remove provider"
            )
        for field in ("base_url", "api_key"):
            if getattr(config, field) is not None and not self.remote:
                instead = (
                    "transport to remote_network" if runtime == "custom" else "runtime to openai (or litellm)"
                )
                raise ValueError(
                    f"runtime_config.{field} is for remote runtimes, not {runtime} ({self.runtime_from}); set "
                    f"{instead} if replicas call an endpoint, or remove {field}"
                )

    def _check_floors(self) -> None:
        """Refuses a floor on links where each set is one GPU."""
        if self.needs.gpus != 1 or self.gpus_per_replica == 1:
            return
        for field in ("min_bandwidth_gb_per_s", "within"):
            value = getattr(self, field)
            if value is not None:
                asked = {"gpus", "tensor_parallel", "pipeline_parallel"}
                named = [f"{name}: {getattr(self, name)}" for name in sorted(asked) if getattr(self, name)]
                raise ValueError(
                    f"{field}: {value} is about the links within a tensor-parallel group, and with "
                    f"{', '.join(named)} each has one GPU; set tensor_parallel to 2 or more, or leave {field} out"
                )

    def _no_contradiction(self) -> None:
        self._check_cpus()
        self._check_layout()
        self._check_parallelism()
        self._check_named()
        if self.mig is not None and (self.gpus or 0) > 1:
            raise ValueError(
                f"mig: {self.mig} and gpus: {self.gpus} ask for tensor parallelism across MIG instances; "
                f"{NO_LINKS_BETWEEN_INSTANCES}; ask for one larger instance, or for whole GPUs"
            )
        asked = [name for name in ("gpus", "gpu_memory_gib", "mig") if getattr(self, name) is not None]
        if len(asked) > 1:
            values = " and ".join(f"{name}: {getattr(self, name)}" for name in asked)
            raise ValueError(f"{values} are different ways to ask for GPUs; keep one of them")
        if self.remote and asked:
            raise ValueError(
                f"{asked[0]}: {getattr(self, asked[0])} on a remote deployment ({self.runtime_name}); leave "
                f"{asked[0]} out, or set runtime to a local one such as vllm"
            )
        if self.mig is not None and not _MIG_PATTERN.fullmatch(self.mig):
            raise ValueError(f"mig: {self.mig!r} is not a MIG profile; write one such as 1g.10gb")
        for field in ("min_bandwidth_gb_per_s", "within"):
            value = getattr(self, field)
            if value is not None and self.gpus_per_replica < 2:
                has = "one GPU at most" if self.gpus_per_replica else "no GPUs"
                raise ValueError(
                    f"{field}: {value} is about the links between a replica's GPUs, and it has {has}; "
                    "leave it out, or ask for 2 gpus or more"
                )
        limits = self.constraints
        if limits and self.name in (*limits.apart_from, *limits.near_to):
            raise ValueError(
                f"constraints: apart_from or near_to names {self.name!r} itself; use constraints.spread to keep "
                "its replicas apart"
            )

    def _check_cpus(self) -> None:
        if self.cpus is None:
            if self.memory_gib is not None:
                raise ValueError(
                    f"memory_gib: {self.memory_gib:g} is for replicas without GPUs, which say cpus as well; add cpus, "
                    "or use constraints.memory_gib_per_gpu"
                )
            if self.transport == "local_cpu":
                raise ValueError("runtime_config.transport local_cpu needs cpus: how many each replica takes")
            return
        asked = f"cpus: {self.cpus:g}"
        for field in (
            "gpus",
            "gpu_memory_gib",
            "mig",
            "tensor_parallel",
            "pipeline_parallel",
            "placement_group",
        ):
            if getattr(self, field) is not None:
                raise ValueError(
                    f"{asked} is for replicas without GPUs, and {field} asks for GPUs; leave one of them out, or use "
                    "constraints.cpus_per_gpu for CPUs beside GPUs"
                )
        if self.remote:
            raise ValueError(
                f"{asked} on a remote deployment ({self.runtime_name}); leave cpus out, or set runtime to one that "
                "runs here, such as python"
            )
        if self.runtime_name in GPU_RUNTIMES:
            raise ValueError(
                f"{asked} with runtime {self.runtime_name}, which needs GPUs; ask for gpus, or set runtime to another "
                "one, such as ort"
            )
        if self.transport == "local_gpu":
            raise ValueError(f"{asked} with transport local_gpu; set runtime_config.transport to local_cpu")

    def _check_group(self) -> None:
        """Refuses what a member of a group cannot be."""
        group = self.group
        if group is None:
            return
        if self.name not in group.members:
            raise ValueError(f"group: {self.name!r} is no member of {group.name!r}; add it to its members")
        if self.replicas != group.replicas(self.name):
            raise ValueError(
                f"replicas: {self.replicas}, but group {group.name!r} has {counted(group.units, 'unit')} with "
                f"{group.members[self.name]} each; leave replicas out, or set it to {group.replicas(self.name)}"
            )
        limits = self.constraints or PlacementConstraints()
        others = sorted({*limits.apart_from, *limits.near_to} & group.members.keys())
        refused = {
            "runtime": self.runtime_name if self.remote else None,
            "cpus": self.cpus,
            "mig": self.mig,
            "gpu_memory_gib": self.gpu_memory_gib,
            "gpus": self.gpus if isinstance(self.gpus, float) else None,
            "pipeline_parallel": self.stages if self.stages > 1 else None,
            "placement_group": self.placement_group and "given",
            "constraints.spread": limits.spread and limits.spread.label,
            "constraints.apart_from or near_to": others[0] if others else None,
            "policy": None if self.policy is Policy.TOPOLOGY else str(self.policy),
            "owner": self.owner if self.owner == "caller" else None,
            "deadline_seconds": self.deadline_seconds,
        }
        for field, value in refused.items():
            if value:
                raise ValueError(
                    f"{field}: {value} is not possible for a member of a group ({group.name!r}), whose replicas have "
                    "whole GPUs on one node each, are placed by the group's links, and end as one; leave it out, or "
                    f"take {self.name!r} out of the group"
                )

    def _check_layout(self) -> None:
        if self.placement_group is None:
            return
        for field in ("gpus", "gpu_memory_gib", "mig", "tensor_parallel", "pipeline_parallel"):
            if getattr(self, field) is not None:
                raise ValueError(f"placement_group says all of what is asked for; leave {field} out")
        limits = self.constraints or PlacementConstraints()
        if limits.model_copy(update={"gpus": None}) != PlacementConstraints():
            raise ValueError(
                "placement_group says all of what is asked for, but for constraints.gpus; leave the other "
                "constraints out"
            )
        if self.replicas > 1:
            raise ValueError(f"placement_group is one replica, not {self.replicas}; leave replicas out")
        if self.remote:
            raise ValueError(f"placement_group has GPUs, and {self.runtime_name} is remote; leave it out")
        if self.owner != "caller":
            raise ValueError(
                f"placement_group is created by its caller, and owner is {self.owner}; call "
                "placement.placement_group, or set owner to caller"
            )

    def _check_named(self) -> None:
        """Refuses GPUs that are named, and cannot be had as they are asked for."""
        if not self.named:
            return
        if self.remote:
            raise ValueError(
                f"constraints.gpus names GPUs, and {self.runtime_name} is remote; leave constraints.gpus out"
            )
        if self.cpus is not None:
            raise ValueError(
                f"constraints.gpus names GPUs, and cpus: {self.cpus:g} is for replicas without; leave one of them out"
            )
        kinds = {name[:3] for name in self.named if isinstance(name, str)}
        if len(kinds) > 1:
            raise ValueError("constraints.gpus names GPUs and MIG instances; name one kind of them")
        if "GPU" in kinds and self.mig is not None:
            raise ValueError(
                f"constraints.gpus names GPUs, and mig: {self.mig} is an instance; name one of these"
            )
        asked, by_memory = self._gpus_asked, self.gpu_memory_gib is not None
        if "MIG" in kinds and (self.gpus_per_replica > 1 or isinstance(asked, float) or by_memory):
            raise ValueError(
                f"constraints.gpus names MIG instances, and a replica is one of them, all of it; "
                f"{NO_LINKS_BETWEEN_INSTANCES}; ask for 1 GPU per replica"
            )
        each = WHOLE // self.needs.share if self.needs.share < WHOLE else 1
        most = len(self.named) * each // self.gpus_per_replica
        if self.replicas > most and not by_memory:
            many = f"{self.replicas} replicas need" if self.replicas > 1 else "a replica needs"
            needed = -(-self.replicas * self.gpus_per_replica // each)
            raise ValueError(
                f"constraints.gpus names {counted(len(self.named), 'GPU')}, and {many} {needed}; name more, or ask "
                "for less"
            )
        if self.placement_group is not None:
            several = sum(map(_has_gpus, self.placement_group.bundles)) > 1
            if several and self.placement_group.strategy is Strategy.STRICT_SPREAD:
                raise ValueError(
                    "constraints.gpus names GPUs of one node, and STRICT_SPREAD wants each bundle on a node of its "
                    "own; use PACK, or make a group for each node"
                )
            self.placement_group.check_labels_agree()

    def _check_parallelism(self) -> None:
        tensor, pipeline = self.tensor_parallel, self.pipeline_parallel
        asked = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
        for name, value in asked.items():
            if value is None:
                continue
            if self.remote:
                raise ValueError(
                    f"{name}: {value} on a remote deployment ({self.runtime_name}); leave it out"
                )
            if self.mig is not None:
                raise ValueError(
                    f"mig: {self.mig} and {name}: {value} ask for a replica of several MIG instances; "
                    f"{NO_LINKS_BETWEEN_INSTANCES}; ask for one larger instance, or for whole GPUs"
                )
            if isinstance(self.gpus, float) or self.gpu_memory_gib is not None:
                raise ValueError(f"{name}: {value} is for whole GPUs, not for a share of one; leave it out")
            if self.gpus is not None and self.gpus % value:
                raise ValueError(f"gpus: {self.gpus} cannot be divided by {name}: {value}; leave gpus out")
        if tensor is not None and pipeline is not None and self.gpus not in (None, tensor * pipeline):
            raise ValueError(
                f"gpus: {self.gpus} is not tensor_parallel x pipeline_parallel ({tensor} x {pipeline} = "
                f"{tensor * pipeline}); leave gpus out"
            )

    @property
    def runtime_name(self) -> Runtime:
        """The runtime: explicit, or that of ``runtime_config``, or inferred from the model's name."""
        configured = self.runtime_config.runtime if self.runtime_config else None
        return self.runtime or configured or infer_runtime(self.model)

    @property
    def runtime_from(self) -> str:
        """Who says so: ``declared``, ``runtime_config`` or ``by the model's name``."""
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
        """GPUs each replica has: 1 also where it is a share or a MIG instance; 0 for a remote one, or on CPUs."""
        if self.transport != "local_gpu":
            return 0
        gpus = self._gpus_asked
        if gpus is None:
            return (self.tensor_parallel or 1) * (self.pipeline_parallel or 1)
        return gpus if isinstance(gpus, int) else 1

    @property
    def named(self) -> tuple[GpuName, ...]:
        """The GPUs that are named; empty for any."""
        return (self.constraints and self.constraints.gpus) or ()

    @property
    def _gpus_asked(self) -> int | float | None:
        return self.gpus if self.placement_group is None else self.placement_group.gpus

    @property
    def stages(self) -> int:
        """How many tensor-parallel groups a replica is made of; one, unless it says so."""
        if self.tensor_parallel is not None:
            return self.gpus_per_replica // self.tensor_parallel
        return self.pipeline_parallel or 1

    @property
    def divisible(self) -> bool:
        """Whether a replica that no node can hold may be cut into stages: where nothing says how it is made up."""
        on_one_node = self.placement_group is not None or self.group is not None
        return self.tensor_parallel is None and self.pipeline_parallel is None and not on_one_node

    @property
    def needs(self) -> Needs:
        """What each tensor-parallel group of a replica needs of a node's GPUs; mostly that is all of it."""
        limits, gpus = self.constraints, self._gpus_asked
        instance = any(str(name).startswith("MIG-") for name in self.named)
        return Needs(
            gpus=self.gpus_per_replica // self.stages,
            within=self.within or Within.NODE,
            min_bandwidth_gb_per_s=self.min_bandwidth_gb_per_s or 0.0,
            share=round(gpus * WHOLE) if isinstance(gpus, float) else WHOLE,
            memory_bytes=round((self.gpu_memory_gib or 0) * GIB),
            free_memory_bytes=round(((limits and limits.min_free_gpu_memory_gib) or 0) * GIB),
            profile=self.mig or (ANY_PROFILE if instance else ""),
            named=self.named,
        )

    @property
    def cpu_milli_per_gpu(self) -> int:
        """CPUs (thousandths) that each GPU's bundle takes as well."""
        return round(((self.constraints and self.constraints.cpus_per_gpu) or 0) * 1000)

    @property
    def memory_bytes_per_gpu(self) -> int:
        """Memory that each GPU's bundle takes as well."""
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

        It is taken of the reference, not of the key: placing never reads a key.
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
        """What decides where replicas can sit, however it was written. Any other change leaves them alone."""
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


def with_runtime(declared: Mapping[str, Any], runtime: Runtime | None) -> dict[str, Any]:
    """The fields of what stands, with its runtime where that is not what the model's name means today.

    Args:
        declared: its fields.
        runtime: what it was placed as; ``None`` for what the name meant in earlier versions.
    """
    model, config = declared.get("model"), declared.get("runtime_config")
    said = declared.get("runtime") or (isinstance(config, Mapping) and config.get("runtime"))
    if said or not isinstance(model, str):
        return dict(declared)
    runtime, means = runtime or runtime_before(model), None
    with contextlib.suppress(ValueError):
        means = infer_runtime(model)
    return {**declared, "runtime": runtime} if means != runtime else dict(declared)


@cache
def _full_names() -> Mapping[str, str]:
    """Field -> its name from the deployment on, of all there are; the outermost of two."""
    parts: tuple[tuple[str, type[_Declared]], ...] = (
        ("", Deployment),
        ("serving.", Serving),
        ("constraints.", PlacementConstraints),
        ("constraints.spread.", Spread),
        ("runtime_config.", RuntimeConfig),
        ("runtime_config.api_key.", ApiKey),
        ("budget.", Budget),
    )
    return {name: where + name for where, part in reversed(parts) for name in part.model_fields}
