"""What a model's name means: names that people write, and the runtime that each is for."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from placement.wire.deployment import Deployment
from placement.wire.runtimes import infer_runtime

OPENAI = """
    gpt-4 gpt-4o gpt-4o-mini gpt-4.1-nano gpt-4-32k gpt-4.5-preview gpt-4o-2024-08-06 gpt-4o-mini-transcribe
    gpt-4-turbo gpt-3.5-turbo gpt-3.5-turbo-instruct-0914 gpt-35-turbo gpt-5 gpt-5-mini gpt-5.1-codex-max
    gpt-5-chat-latest gpt-6 o1 o1-mini o1-preview-2024-09-12 o3 o3-pro o3-deep-research o4-mini o4-mini-2025-04-16
    chatgpt-4o-latest text-embedding-3-small text-embedding-3-large text-embedding-ada-002 whisper-1 tts-1 tts-1-hd
    dall-e-2 dall-e-3 gpt-image-1 gpt-image-1-mini gpt-audio gpt-realtime gpt-realtime-2025-08-28
    gpt-4o-realtime-preview sora-2 omni-moderation-latest text-moderation-stable computer-use-preview
    codex-mini-latest davinci-002 babbage-002 text-davinci-003 ft:gpt-4o-2024-08-06:acme::AbC ft:davinci-002:acme
    openai/gpt-4o openai/o3 openai/gpt-5-mini openai/ft:gpt-4o:acme openai/whisper-1 openai/text-embedding-3-small
    openai/openai/gpt-oss-20b openai/org/model text-completion-openai/gpt-3.5-turbo-instruct GPT-4o OpenAI/GPT-4o
    O3-mini
"""
ANTHROPIC = """
    claude-sonnet-4 claude-3-5-haiku-latest claude-opus-4-1-20250805 claude-instant-1.2 Claude-Sonnet-4-5
    anthropic/claude-3 anthropic/claude-sonnet-4-5
"""
GEMINI = """
    gemini-2.5-pro gemini-1.5-flash-8b gemini-embedding-001 Gemini-2.0-Flash gemini/gemini-2.5-pro gemini/imagen-4.0
    google/gemini-flash google/gemini-2.5-pro models/gemini-2.5-flash models/text-embedding-004 text-embedding-004
    publishers/google/models/gemini-2.5-pro tunedModels/mine-123 imagen-4.0-generate-001 veo-3.0-generate-001
"""
LITELLM = """
    litellm/command-r litellm_proxy/anything gpt-4o-via-litellm claude-via-litellm azure/gpt-4o azure/my-deployment
    azure_ai/mistral-large Azure/GPT-4o bedrock/anthropic.claude-v2 bedrock/converse/us.amazon.nova-pro-v1:0
    sagemaker/endpoint vertex_ai/gemini-2.5-pro vertex_ai/claude-sonnet-4@20250514 openrouter/openai/gpt-4o
    openrouter/google/gemma-3-27b-it groq/llama-3.3-70b-versatile groq/openai/gpt-oss-120b groq/whisper-large-v3
    together_ai/meta-llama/Llama-3-70b-chat-hf fireworks_ai/accounts/fireworks/models/llama-v3p1-8b-instruct
    accounts/fireworks/models/llama-v3p1-8b-instruct mistral/mistral-large-latest mistral/open-mistral-7b
    deepseek/deepseek-chat xai/grok-4 x-ai/grok-4 perplexity/sonar-pro replicate/meta/llama-3-70b
    cohere/command-r-plus cohere/embed-v4.0 huggingface/meta-llama/Llama-3.1-8B nvidia_nim/meta/llama3-70b-instruct
    cerebras/llama3.1-8b cerebras/openai/gpt-oss-120b databricks/databricks-claude-3-7-sonnet
    watsonx/ibm/granite-3-8b ollama/llama3 hosted_vllm/facebook/opt-125m lm_studio/model.gguf
    wandb/deepseek-ai/DeepSeek-V3.1 snowflake/llama3.1-70b anthropic.claude-3-haiku-20240307-v1:0
    us.anthropic.claude-sonnet-4-20250514-v1:0 amazon.titan-embed-text-v2:0
    global.anthropic.claude-haiku-4-5-20251001-v1:0 apac.amazon.nova-lite-v1:0 meta.llama3-70b-instruct-v1:0
    mistral.mistral-large-2402-v1:0 openai.gpt-oss-120b-1:0 qwen.qwen3-32b-v1:0 us.deepseek.r1-v1:0
    arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.anthropic.claude-sonnet-4-20250514-v1:0
    projects/p/locations/us-central1/endpoints/1 @cf/meta/llama-3-8b amazon/nova-pro-v1 mistral-large-latest
    mistral-small-2506 mistral-medium mistral-embed mistral-ocr-latest codestral-latest codestral-2405
    ministral-8b-latest open-mistral-nemo open-mixtral-8x22b voxtral-mini-latest voxtral-mini-transcribe-2507
    magistral-medium-2506 devstral-medium-2507 pixtral-large-latest Mistral-Large-Latest ft:open-mistral-7b:x
    command-r-08-2024 command-a-03-2025 embed-english-v3.0 rerank-v3.5 deepseek-chat deepseek-reasoner grok-4
    grok-3-mini grok-2-1212 sonar sonar-pro voyage-3-large jamba-large-1.7 qwen-max qwen-plus-latest moonshot-v1-8k
    kimi-latest kimi-k2-0905-preview kimi-k2-turbo-preview
    text-bison@002
"""
LOCAL = """
    openai/gpt-oss-120b openai/gpt-oss-20b openai/whisper-large-v3 openai/whisper-tiny.en
    openai/clip-vit-base-patch32 openai-community/gpt2 OpenAI/gpt-oss-20b google/gemma-3-27b-it google/t5-v1_1-xxl
    google/flan-t5-xl deepseek-ai/DeepSeek-R1 deepseek-ai/deepseek-llm-7b-chat
    nvidia/Llama-3.1-Nemotron-70B-Instruct-HF O1-OPEN/OpenO1-LLama-8B-v0.1 gpt-4all-falcon gpt4all-j
    nomic-ai/gpt4all-falcon meta-llama/Llama-3.1-70B-Instruct Qwen/Qwen2.5-32B-Instruct HuggingFaceH4/zephyr-7b-beta
    CohereForAI/c4ai-command-r-v01 perplexity-ai/r1-1776 xai-org/grok-1 ai21labs/Jamba-v0.1 zai-org/GLM-4.6
    moonshotai/Kimi-K2-Instruct MiniMaxAI/MiniMax-M2 tencent/Hunyuan-A13B Snowflake/snowflake-arctic-instruct
    cerebras/Cerebras-GPT-13B Groq/Llama-3-Groq-8B-Tool-Use amazon/chronos-t5-small runwayml/stable-diffusion-v1-5
    Xenova/text-embedding-ada-002 BAAI/bge-m3 m llama my/model simulated llama3:70b gpt2 gpt-oss:20b gpt-oss-120b
    gpt-j-6b gpt-neox-20b gpt-4-x-alpaca-13b o1-open-llama-8b claude2-alpaca-13b whisper-large-v3 Codestral-22B-v0.1
    qwen2.5-72b-instruct deepseek-r1 grok-1 Meta-Llama-3-8B /models/gpt-4o ./gpt-4o ../claude-3 ~/gemini-2.5-pro
    /models/azure/x C:\\models\\gpt-4o s3://bucket/gpt-4o gs://bucket/claude-3 hf://openai/gpt-4o
    https://huggingface.co/openai/gpt-4o gpt-4o.gguf gemini-nano.safetensors bartowski/gpt-4o-GGUF hf.co/a/b-GGUF
    models/llama vllm/model
"""
MISTRALRS = """
    mistral mistral-7b mistralai/Mistral-7B-Instruct-v0.3 mistralai/Mistral-Large-Instruct-2411
    /models/mistral-large-latest Mistral-7B-Instruct-v0.3 Mistral-Nemo-Instruct-2407 Mistral-Large-Instruct-2411
    TheBloke/Mistral-7B-GGUF mistral.gguf mistral-small:24b mistral-community/pixtral-12b
"""
MEANT = [
    (name, runtime)
    for runtime, names in {
        "openai": OPENAI, "anthropic": ANTHROPIC, "gemini": GEMINI, "litellm": LITELLM, "vllm": LOCAL,
        "mistralrs": MISTRALRS,
    }.items()
    for name in names.split()
]  # fmt: skip


@pytest.mark.parametrize(("name", "runtime"), MEANT)
def test_a_name_means_what_people_mean_by_it(name: str, runtime: str) -> None:
    assert (infer_runtime(name), infer_runtime(f" {name}\n")) == (runtime, runtime)


@pytest.mark.parametrize(
    ("name", "readings"),
    [
        ("databricks/dbrx-instruct", ("weights of databricks on a model hub", "databricks's API", "litellm")),
        ("openai/my-model", ("weights of openai on a model hub", "openai's API", "or openai")),
        ("huggingface/CodeBERTa-small-v1", ("on a model hub", "litellm")),
        ("meta/llama-3.1-8b-instruct", ("on a model hub", "litellm")),
        ("Snowflake/snowflake-arctic-embed-l", ("on a model hub", "litellm")),
        ("mistral-large", ("weights that go by that name", "Mistral's API", "mistralrs", "litellm")),
        ("devstral-small-2507", ("weights that go by that name", "Mistral's API", "vllm", "litellm")),
        ("command-r-plus", ("weights that go by that name", "Cohere's API")),
        ("grok-2", ("weights that go by that name", "xAI's API")),
    ],
)
def test_a_name_that_can_be_meant_both_ways_is_refused_with_both(
    name: str, readings: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="say runtime: ") as refused:
        infer_runtime(name)
    said = str(refused.value)
    assert [reading for reading in (f"model: {name!r} may mean", *readings) if reading not in said] == []
    with pytest.raises(ValidationError, match="say runtime: "):
        Deployment(name="d", model=name)


@pytest.mark.parametrize("runtime", ["vllm", "python", "openai", "litellm"])
@pytest.mark.parametrize("name", ["mistral-large", "gpt-4o", "openai/gpt-oss-120b", "azure/gpt-4o", "m"])
def test_what_is_declared_wins_whatever_the_name(name: str, runtime: str) -> None:
    declared = Deployment.model_validate({"name": "d", "model": name, "runtime": runtime})
    configured = Deployment.model_validate(
        {"name": "d", "model": name, "runtime_config": {"runtime": runtime}}
    )
    assert (declared.runtime_name, declared.runtime_from) == (runtime, "declared")
    assert (configured.runtime_name, configured.runtime_from) == (runtime, "runtime_config")


def test_it_is_said_that_the_name_decided() -> None:
    assert Deployment(name="d", model="gpt-5").runtime_from == "by the model's name"


@pytest.mark.parametrize(
    "name", ["gpt-5", "o3", "azure/gpt-4o", "text-embedding-3-small", "mistral-large-latest"]
)
def test_gpus_for_a_providers_model_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=r"gpus: 1 on a remote deployment .*set runtime to a local one"):
        Deployment(name="d", model=name, gpus=1)
