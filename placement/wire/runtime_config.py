"""How replicas run: their runtime and its endpoint, how many requests they serve, what they may spend."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, JsonValue, ValidationInfo, field_validator, model_validator

from placement.errors import MissingSecret
from placement.wire.fields import Count, Declared, one_of, stands
from placement.wire.runtimes import Runtime

Transport = Literal["local_gpu", "local_cpu", "remote_network"]
_ENV_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SECRET_PATTERN = re.compile(
    r"api[_-]?key|secret|passw(or)?d|credential|authorization|private[_-]?key|(^|[_-])token$", re.IGNORECASE
)
_PROVIDER_PATTERN = re.compile(r"[a-z][a-z0-9_]{0,31}")

NamedRuntime = Annotated[Runtime, BeforeValidator(one_of("runtime", get_args(Runtime)))]
NamedTransport = Annotated[Transport, BeforeValidator(one_of("transport", get_args(Transport)))]


class ApiKey(Declared):
    """A reference to an API key. The key itself never enters a deployment, the ledger or a log.

    Exactly one of the two is set. Which node resolves it, and when, is up to the worker: see :meth:`resolve`.
    """

    path = "runtime_config.api_key."

    from_env: str | None = Field(
        default=None,
        description="name of an environment variable on the egress node",
        examples=["OPENAI_API_KEY"],
    )
    from_file: str | None = Field(
        default=None, description="path of a file on the egress node", examples=["/etc/keys/openai"]
    )

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
        """``env:NAME`` or ``file:PATH``: identifies the key without holding it."""
        return f"env:{self.from_env}" if self.from_env is not None else f"file:{self.from_file}"

    def resolve(self) -> str:
        """Reads the key itself, in this process. Placing never calls this; a worker that needs the key does.

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


class RuntimeConfig(Declared):
    """How the runtime is reached and configured."""

    path = "runtime_config."

    runtime: NamedRuntime | None = Field(
        default=None, description="the runtime, if the deployment does not name one", examples=["litellm"]
    )
    transport: NamedTransport | None = Field(
        default=None,
        description="whether a custom runtime runs on GPUs, on CPUs, or calls a provider; required by runtime custom, "
        "and only for it",
        examples=["local_cpu"],
    )
    provider: str | None = Field(
        default=None, description="the provider that a custom remote runtime calls", examples=["openai"]
    )
    api_key: ApiKey | None = Field(
        default=None,
        description="remote runtimes: a reference to the key, never the key",
        examples=[{"from_env": "OPENAI_API_KEY"}],
    )
    base_url: str | None = Field(
        default=None,
        description="remote runtimes: endpoint of a proxy or gateway",
        examples=["https://gateway.example/v1"],
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="passed to the runtime unread", examples=[{"max_model_len": 8192}]
    )

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
        if stands(info):
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


class Serving(Declared):
    """How a replica serves."""

    path = "serving."

    max_concurrent: Count = Field(
        default=1,
        description="concurrent requests per replica: the egress units that it takes",
        examples=[16],
    )
    on_capacity_exhausted: Literal["queue", "reject"] = Field(
        default="queue",
        description="what to do with a request above max_concurrent, which the workers must obey",
        examples=["reject"],
    )


class Budget(Declared):
    """Spending limits, which the workers must obey: every result carries them. Placing does not read them."""

    path = "budget."

    usd_per_day: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="most to spend", examples=[200.0]
    )
    tokens_per_minute: int | None = Field(default=None, gt=0, description="most tokens", examples=[100_000])
    requests_per_minute: int | None = Field(default=None, gt=0, description="most requests", examples=[600])


def _keys(value: JsonValue) -> Iterator[str]:
    """All field names in a JSON value, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)
