"""Which runtime a model's name means, if no runtime is declared.

Case does not matter. A name is one of these, checked in this order:

1. A path or a URL: it runs on the cluster.
2. ``PREFIX/...`` as LiteLLM writes it: the model of a provider. Some providers have an organisation of that name on a
   model hub as well. There, what follows decides; a second slash is enough, since a model of a hub has only one.
3. A name or an id that a provider's API has (``gpt-5``, ``claude-sonnet-4``, ``us.anthropic.claude-...-v1:0``).
4. Anything else, mostly ``ORG/NAME`` of a hub: it runs on the cluster.

An ambiguous name is refused: a wrong guess would hold a GPU for nothing, or call a provider for a local model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal, NamedTuple

Runtime = Literal[
    "vllm", "tensorrt", "ort", "candle", "cudarc", "mistralrs", "python",
    "openai", "anthropic", "gemini", "litellm",
    "custom",
]  # fmt: skip

_PATH = re.compile(r"[./~\\]|[a-z]:[\\/]|[a-z][a-z0-9+.-]*://|.*\\")
_FILE = re.compile(r".*\.(gguf|ggml|safetensors|bin|pth?|onnx|engine|plan)")

_NATIVE: dict[str, Runtime] = {
    "openai": "openai", "text-completion-openai": "openai",
    "anthropic": "anthropic", "anthropic_text": "anthropic",
    "gemini": "gemini",
}  # fmt: skip
"""Prefixes of providers that have a runtime of their own."""

_PREFIXES = {
    "a2a", "ai21", "ai21_chat", "aihubmix", "aiml", "aiohttp_openai", "amazon_nova", "anyscale", "apertis",
    "assemblyai", "aws_polly", "azure", "azure_ai", "azure_text", "bedrock", "bedrock_mantle", "black_forest_labs",
    "bytez", "charity_engine", "chatgpt", "chutes", "clarifai", "cloudflare", "codestral", "cohere_chat",
    "cometapi", "compactifai", "custom_openai", "dashscope", "datarobot", "deepgram", "deepinfra", "deepseek",
    "docker_model_runner", "elevenlabs", "empower", "fal_ai", "featherless_ai", "fireworks_ai", "galadriel",
    "gigachat", "github", "github_copilot", "gradient_ai", "helicone", "heroku", "hosted_vllm", "hyperbolic",
    "inception", "infinity", "jina_ai", "lambda_ai", "lemonade", "libertai", "litellm", "litellm_agent",
    "litellm_proxy", "llamafile", "lm_studio", "maritalk", "meta_llama", "minimax", "mistral", "moonshot", "morph",
    "nano-gpt", "neosantara", "nlp_cloud", "novita", "nscale", "nvidia_nim", "nvidia_riva", "oci", "ollama",
    "ollama_chat", "oobabooga", "openai_like", "openrouter", "ovhcloud", "palm", "parasail", "perplexity", "petals",
    "poe", "publicai", "recraft", "reducto", "replicate", "sagemaker", "sagemaker_chat", "sagemaker_nova",
    "sambanova", "sap", "scaleway", "soniox", "stability", "synthetic", "tensormesh", "text-completion-codestral",
    "text-completion-inception", "together_ai", "topaz", "triton", "v0", "vercel_ai_gateway", "vertex_ai",
    "vertex_ai_beta", "volcengine", "voyage", "watsonx", "watsonx_text", "x-ai", "xai", "xiaomi_mimo", "xinference",
    "zai",
}  # fmt: skip
"""Prefixes of other providers, whose runtime is ``litellm``: https://docs.litellm.ai/docs/providers. ``x-ai`` is
OpenRouter's name for xAI. Not ``vllm``, which LiteLLM runs in its own process."""


class _Shared(NamedTuple):
    """How names continue after the prefix: those of the API, and those of the organisation on a hub."""

    api: str | None = None
    hub: str | None = None


_SHARED: dict[str, _Shared] = {
    "openai": _Shared(  # its API is in _BEGINNINGS
        hub=r"gpt-oss|whisper-(?!1$)|clip-|imagegpt|shap-e|point-e|jukebox|consistency-|diffusers-|circuit-|privacy-"
    ),
    "cerebras": _Shared(
        api=r"(llama-?[34]|qwen-3|gpt-oss|zai-glm)(?!.*(docchat|reap|llava))",
        hub=r"cerebras-|btlm|.*(docchat|reap|llava)",
    ),
    "cohere": _Shared(api=r"command|embed-|rerank-|c4ai-|aya-"),
    "databricks": _Shared(api=r"databricks-"),
    "groq": _Shared(api=r"(?!llama-3-groq-)", hub=r"llama-3-groq-"),
    "runwayml": _Shared(api=r"gen\d|act|eleven|upscale", hub=r"stable-diffusion"),
    "snowflake": _Shared(
        api=r"claude-|deepseek-|gemma-|jamba-|llama\d|mi[sx]tral-|openai-|reka-|snowflake-(arctic$|llama-)",
        hub=r"(snowflake-)?arctic-(instruct|base|text2sql)|llama-3.*swiftkv",
    ),
    "baseten": _Shared(),
    "friendliai": _Shared(),
    "huggingface": _Shared(),
    "meta": _Shared(),
    "modelscope": _Shared(),
    "nebius": _Shared(),
    "predibase": _Shared(),
    "wandb": _Shared(),
}
"""Prefixes that are organisations on a hub, too."""

_CLOSED: tuple[tuple[Runtime, str], ...] = (
    ("gemini", r"google/gemini"),
    ("litellm", r"amazon/(nova|titan)-"),
    ("litellm", r"tencent/hunyuan-(turbos?|t1|lite|standard|role|functioncall)(-|$)"),
)
"""Models that an organisation of a hub serves but does not publish, as OpenRouter and others write them."""

_WEIGHTS = re.compile(
    r"(.*[-_.])?(\d+(\.\d+)?b|\d+x\d+b|awq|gptq|gguf|ggml|exl2|fp8|bf16|int[48]|nvfp4|lora|distill\w*"
    r"|llama|alpaca|vicuna|falcon|qwen\d*)([-_.]|$)"
)
"""Marks of downloadable weights: a size, a quantisation, another family."""

_BEGINNINGS: tuple[tuple[Runtime, str], ...] = (
    ("openai", r"gpt-(3\.?5|[4-9])(\.\d+)?o?([-:]|$)|chatgpt-|o[1-9]([-:]|$)"),
    ("openai", r"gpt-(image|audio|realtime)(-|$)|computer-use-|codex-(mini|large)-|sora-\d|dall-e-\d$"),
    ("openai", r"whisper-1$|tts-1(-|$)|text-embedding-(3-|ada-)|(text|omni)-moderation-"),
    ("openai", r"(babbage|davinci)-002$|(text|code)-(davinci|curie|babbage|ada)-"),
    ("anthropic", r"claude-"),
)
"""How an API's names begin. Weights that are named after them (``gpt-4-x-alpaca-13b``) have a mark of weights."""

_DATE = r"(latest|\d{4}|\d{2}-\d{2}|\d{2}-\d{4})"
_REGION = r"us|us-gov|eu|apac|ap|jp|au|ca|sa|me|af|il|uk|in|mx|global"
_VENDOR = (
    r"ai21|amazon|anthropic|cohere|deepseek|google|luma|meta|minimax|mistral|moonshot|moonshotai|nvidia|openai|qwen"
    r"|stability|twelvelabs|writer|zai"
)
_NAMES: tuple[tuple[Runtime, str], ...] = (
    # Gemini.
    ("gemini", r"gemini-.*|(imagen|veo|learnlm)-\d.*|text-embedding-(00\d|large-exp.*|preview.*)"),
    # Mistral. Its weights are called Mistral-Large-Instruct-2411, Codestral-22B-v0.1.
    ("litellm", r"ft:(open-)?(mi[sx]tral|ministral|codestral|pixtral).*"),
    (
        "litellm",
        rf"(mistral-(large|medium|small|saba|ocr|moderation|nemo)|pixtral-\w+)-{_DATE}(-completion)?",
    ),
    ("litellm", rf"(ministral-\d+b|(codes|magis|devs|vox)tral(-\w+)*?)-{_DATE}"),
    ("litellm", r"mistral-(tiny|medium|embed)|codestral-embed|open-(mistral|mixtral|codestral)-.*"),
    # Fine-tuned models of OpenAI.
    ("openai", r"ft:.*"),
    # Cohere.
    ("litellm", rf"command-(light|nightly)|command-(r|r-plus|a|r7b)(-\w+)?-{_DATE}"),
    ("litellm", r"(embed|rerank)-((english|multilingual)-)?(light-)?v\d.*"),
    # AI21.
    ("litellm", r"jamba-(large|mini|1\.5-large|1\.5-mini|instruct)(-[\d.]+)?(@\d+)?|j2-(light|mid|ultra)"),
    # DeepSeek, Moonshot, ByteDance, Tencent, Alibaba.
    ("litellm", r"deepseek-(chat|reasoner)|kimi-(latest|.*-preview)|moonshot-v\d-.*|doubao-.*"),
    ("litellm", r"hunyuan-(turbos?|t1|lite|standard)(-.*)?"),
    ("litellm", r"qwen[\d.]*-((vl|coder|omni)-)?(max|plus|turbo)(-.*)?|qwq-plus.*|text-embedding-v\d"),
    # xAI, whose weights are called grok-1 and grok-2; Perplexity; Voyage.
    ("litellm", r"grok-(beta|vision-beta|code-.*|[3-9].*|2-(latest|vision.*|image.*|\d{4}))"),
    ("litellm", r"sonar(-(pro|reasoning|deep|small|medium).*)?"),
    ("litellm", r"voyage-(\d.*|(large|code|law|finance|multilingual)-\d.*)"),
    # Vertex AI's own.
    ("litellm", r"(text|chat|code|codechat)-(bison|gecko|unicorn).*|textembedding-gecko.*"),
    ("litellm", r"text-multilingual-embedding-.*|multimodalembedding.*"),
    # Amazon Bedrock: vendor.model, perhaps after a region.
    ("litellm", rf"(({_REGION})\.)?({_VENDOR})\.[a-z].*-.*"),
)
"""Complete names of an API; none has a slash."""

_IDS: tuple[tuple[Runtime, str], ...] = (
    ("gemini", r"(models|publishers/google/models)/(gemini|text-embedding|embedding-0|imagen|veo|learnlm)"),
    ("gemini", r"tunedmodels/"),
    ("litellm", r"projects/[^/]+/locations/|publishers/[^/]+/models/"),  # Vertex AI
    ("litellm", r"accounts/[^/]+/(models|deployments|deployedmodels)/"),  # Fireworks
    ("litellm", r"@(cf|hf)/"),  # Cloudflare
    ("litellm", r"arn:aws[a-z-]*:"),
)
"""How providers' own ids with slashes begin."""

_EITHER: dict[str, str] = {
    r"mistral-(large|small)|(pixtral-12b|(magistral|devstral)-small)-\d{4}": "Mistral",
    r"command-(r|r-plus|a)": "Cohere",
    r"grok-2": "xAI",
}
"""Names of an API that are also used for weights, by Ollama for example -> the API's owner."""


@lru_cache(maxsize=1024)
def infer_runtime(model: str) -> Runtime:
    """The runtime that a model's name means.

    Raises:
        ValueError: it may mean weights as well as a provider's model; the message says what to declare.
    """
    name = model.strip().lower()
    prefix, slash, rest = name.partition("/")
    here: Runtime = "mistralrs" if "mistral" in name else "vllm"
    there = _NATIVE.get(prefix, "litellm")
    if _PATH.match(name):
        return here
    if "via-litellm" in name:
        return "litellm"
    if slash and prefix in _SHARED:
        shared = _SHARED[prefix]
        api = _of_an_api(rest) == "openai" if prefix == "openai" else _begins(rest, shared.api)
        if api or "/" in rest:
            return there
        if _begins(rest, shared.hub) or _FILE.fullmatch(name):
            return here
        raise _ambiguous(model, here, there, f"weights of {prefix} on a model hub", f"{prefix}'s API")
    if slash and (prefix in _NATIVE or prefix in _PREFIXES):
        return there
    if _FILE.fullmatch(name):
        return here
    if slash:
        return _beginning((*_IDS, *_CLOSED), name) or here
    for pattern, provider in _EITHER.items():
        if re.fullmatch(pattern, name):
            raise _ambiguous(model, here, there, "weights that go by that name", f"{provider}'s API")
    return _of_an_api(name) or here


def _of_an_api(name: str) -> Runtime | None:
    """The runtime of the API that has a model of that name, if one has."""
    whole = next((runtime for runtime, pattern in _NAMES if re.fullmatch(pattern, name)), None)
    if whole is not None or _WEIGHTS.match(name):
        return whole
    return _beginning(_BEGINNINGS, name)


def _beginning(table: Iterable[tuple[Runtime, str]], name: str) -> Runtime | None:
    return next((runtime for runtime, pattern in table if re.match(pattern, name)), None)


def _begins(name: str, pattern: str | None) -> bool:
    return pattern is not None and re.match(pattern, name) is not None


def _ambiguous(model: str, here: Runtime, there: Runtime, local: str, remote: str) -> ValueError:
    return ValueError(
        f"model: {model[:80]!r} may mean {local}, or a model of {remote}; "
        f"say runtime: {here} (or another that runs on GPUs here), or {there}"
    )


_BEFORE: tuple[tuple[Runtime, str], ...] = (
    ("litellm", r"litellm/|.*via-litellm"),
    ("openai", r"gpt-4|gpt-3\.5|o1-|o3-|chatgpt-"),
    ("anthropic", r"claude-|anthropic/"),
    ("gemini", r"gemini-|google/gemini"),
    ("mistralrs", r".*mistral"),
)


def runtime_before(model: str) -> Runtime:
    """The runtime that earlier versions inferred from a model's name, as their records do not have it."""
    return _beginning(_BEFORE, model.lower()) or "vllm"
