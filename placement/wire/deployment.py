"""What a user declares: a deployment. Its parts are in modules of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationInfo, model_validator

from placement.wire.consistency import require_consistent
from placement.wire.declaration import Declaration
from placement.wire.fields import STANDS, stands
from placement.wire.runtimes import Runtime, infer_runtime, runtime_before


class Deployment(Declaration):
    """A model, how many replicas of it, and what each one needs.

    Example:
        >>> Deployment(name="llama", model="meta-llama/Llama-3.1-70B-Instruct", gpus=4, replicas=2).runtime_name
        'vllm'
    """

    @classmethod
    def recorded(cls, declared: Mapping[str, Any], runtime: Runtime | None = None) -> Deployment:
        """A declaration that was accepted before, by this version or an earlier one.

        The rules, and the meaning of a model's name, may have changed since: it keeps its runtime.

        Args:
            declared: its fields.
            runtime: the runtime it was placed with; ``None`` if an earlier version did not record it.
        """
        return cls.model_validate(with_runtime(declared, runtime), context=STANDS)

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Deployment:
        require_consistent(self, stands(info))
        return self


def with_runtime(declared: Mapping[str, Any], runtime: Runtime | None) -> dict[str, Any]:
    """The fields of a placed deployment, with its runtime if the model's name means another one today.

    Args:
        declared: its fields.
        runtime: the runtime it was placed with; ``None`` for what the name meant in earlier versions.
    """
    model, config = declared.get("model"), declared.get("runtime_config")
    said = declared.get("runtime") or (isinstance(config, Mapping) and config.get("runtime"))
    if said or not isinstance(model, str):
        return dict(declared)
    runtime, means = runtime or runtime_before(model), None
    with contextlib.suppress(ValueError):
        means = infer_runtime(model)
    return {**declared, "runtime": runtime} if means != runtime else dict(declared)
