"""What vLLM's check of its arguments lacks for :class:`placement.vllm.Executor`.

- Pipeline parallelism by the command line. vLLM 0.21 to 0.33 asks the executor's *class* whether it has that, and a
  command line only names it: ``_check_feature_supported`` in ``vllm/engine/arg_utils.py`` then refuses.
- A refusal of ``data_parallel_backend="ray"``, with which vLLM makes placement groups that no executor can choose.

vLLM loads this by the entry point ``vllm.general_plugins``, before it checks.
"""

from __future__ import annotations

from typing import Any

from placement.errors import InvalidDeployment

NAME = "placement.vllm.Executor"
_MAKES_GROUPS = (
    "'ray' has vLLM make the placement groups itself, on whatever GPUs Ray gives; leave it out, and each engine "
    "core of this machine places its own, or start one engine for each replica"
)


def register() -> None:
    """Adds to vLLM's check of its arguments. Of no effect on any other executor."""
    from vllm.engine.arg_utils import EngineArgs

    check = getattr(EngineArgs, "_check_feature_supported", None)
    if check is None:
        return

    def check_by_class(self: Any, *args: Any) -> Any:
        if self.distributed_executor_backend == NAME:
            from placement.vllm import Executor

            self.distributed_executor_backend = Executor
        places = getattr(self.distributed_executor_backend, "places_its_group", False)
        if places and self.data_parallel_size > 1 and self.data_parallel_backend == "ray":
            raise InvalidDeployment("data_parallel_backend", (_MAKES_GROUPS,))
        return check(self, *args)

    EngineArgs._check_feature_supported = check_by_class
