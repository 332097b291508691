"""Makes vLLM's command line accept :class:`placement.vllm.Executor` with pipeline parallelism.

vLLM 0.21 to 0.33 asks the executor's *class* whether it supports pipeline parallelism, but a command line gives only
its name: ``_check_feature_supported`` in ``vllm/engine/arg_utils.py`` then refuses. vLLM loads this plugin by the entry
point ``vllm.general_plugins``, before it checks.
"""

from __future__ import annotations

from typing import Any

NAME = "placement.vllm.Executor"


def register() -> None:
    """Replaces the executor's name in vLLM's arguments by its class. Other executors are not changed."""
    from vllm.engine.arg_utils import EngineArgs

    check = getattr(EngineArgs, "_check_feature_supported", None)
    if check is None:
        return

    def check_by_class(self: Any, *args: Any) -> Any:
        if self.distributed_executor_backend == NAME:
            from placement.vllm import Executor

            self.distributed_executor_backend = Executor
        return check(self, *args)

    EngineArgs._check_feature_supported = check_by_class
