"""Suggests the right field for one that does not exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

_OPTIONS = "runtime_config.options"

_MEANT: Mapping[str, str] = {
    **dict.fromkeys(("tensor_parallel_size", "tensor_parallelism", "tp", "tp_size"), "tensor_parallel"),
    **dict.fromkeys(("pipeline_parallel_size", "pipeline_parallelism", "pp", "pp_size", "stages"), "pipeline_parallel"),
    **dict.fromkeys(
        ("gpu", "num_gpus", "num_gpu", "n_gpus", "ngpus", "gpu_count", "gpus_per_replica", "nvidia_com_gpu"), "gpus"
    ),
    **dict.fromkeys(("gpu_memory", "gpu_memory_gb", "vram", "vram_gb"), "gpu_memory_gib"),
    **dict.fromkeys(("mig_profile", "mig_instance"), "mig"),
    **dict.fromkeys(
        ("num_replicas", "replica_count", "instances", "min_replicas", "max_replicas", "data_parallel_size", "dp"),
        "replicas",
    ),
    **dict.fromkeys(("model_id", "model_name", "model_path", "hf_model_id", "model_source"), "model"),
    **dict.fromkeys(("engine", "backend", "framework"), "runtime"),
    **dict.fromkeys(("deployment", "deployment_name", "id"), "name"),
    **dict.fromkeys(
        (
            "max_concurrency", "concurrency", "max_concurrent_requests", "max_ongoing_requests",
            "target_ongoing_requests", "max_parallel_requests",
        ),
        "serving.max_concurrent",
    ),
    **dict.fromkeys(("bandwidth", "min_bandwidth", "bandwidth_gb_per_s"), "min_bandwidth_gb_per_s"),
    **dict.fromkeys(("strategy", "scheduling_policy", "placement_strategy"), "policy"),
    **dict.fromkeys(("api_base", "endpoint", "endpoint_url", "url"), "runtime_config.base_url"),
    **dict.fromkeys(("key", "api_key_env", "env", "from_environment"), "runtime_config.api_key.from_env"),
    **dict.fromkeys(("accelerator", "accelerator_type", "gpu_type", "gpu_model"), "constraints.accelerators"),
    **dict.fromkeys(("compute_capability", "min_capability"), "constraints.min_compute_capability"),
    **dict.fromkeys(("node", "nodes", "gpu_node"), "constraints.gpu_nodes"),
    **dict.fromkeys(("labels", "label_selector", "node_selector", "node_label"), "constraints.node_labels"),
    **dict.fromkeys(("num_cpus", "cpus", "cpu"), "constraints.cpus_per_gpu"),
    **dict.fromkeys(("memory", "memory_gib", "memory_gb", "ram"), "constraints.memory_gib_per_gpu"),
    **dict.fromkeys(("anti_affinity", "apart"), "constraints.apart_from"),
    **dict.fromkeys(("affinity", "near"), "constraints.near_to"),
    **dict.fromkeys(
        (
            "gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "dtype",
            "quantization", "kv_cache_dtype", "enforce_eager", "trust_remote_code", "enable_prefix_caching",
            "swap_space", "block_size", "load_format", "served_model_name", "tokenizer", "seed",
            "engine_kwargs", "engine_args", "temperature", "max_tokens", "timeout",
        ),
        _OPTIONS,
    ),
}  # fmt: skip
"""Names of fields in other systems: vLLM, Ray, Kubernetes, LiteLLM."""


def unknown_field(name: str, here: Collection[str], elsewhere: Mapping[str, str]) -> str:
    """The sentence about an unknown field, without its name."""
    instead = meant(name, here, elsewhere)
    hint = f"did you mean {instead}? Known here" if instead else "known here"
    if instead == _OPTIONS:
        hint = f"it belongs in {_OPTIONS}, which the engine gets as it is; known here"
    return f"unknown field; {hint}: {', '.join(here)}"


def meant(name: str, here: Collection[str], elsewhere: Mapping[str, str]) -> str:
    """The suggestion; empty if there is none.

    Args:
        name: the unknown field.
        here: the known fields in the place where it was written.
        elsewhere: field -> its full name, for all other fields.
    """
    plain = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name).lower()).strip("_")
    for spelling in (plain, plain.replace("_", "")):
        for known in here:
            if spelling in (known, known.replace("_", "")):
                return known
    other = _MEANT.get(plain) or elsewhere.get(plain)
    if other == _OPTIONS:
        return other
    if other is not None:
        last = other.rpartition(".")[2]
        return last if last in here else other if "." in other else f"the deployment's own {other}"
    close = difflib.get_close_matches(plain, here, 1, 0.75)
    if close:
        return close[0]
    close = difflib.get_close_matches(plain, [*elsewhere, *_MEANT], 1, 0.85)
    return meant(close[0], here, elsewhere) if close else ""
