"""Generate with vLLM on the best GPUs that are free.

On a running cluster (``ray start --head --num-gpus=8``; the service is started if it does not run)::

    python examples/vllm_generate.py --model meta-llama/Llama-3.1-8B-Instruct --gpus 2 "Ray is"
"""

import argparse
import json

from vllm import LLM, SamplingParams

from placement.vllm import Executor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of LLM, as JSON")
    parser.add_argument("prompt", nargs="+")
    args = parser.parse_args()

    llm = LLM(
        args.model,
        tensor_parallel_size=args.gpus,
        distributed_executor_backend=Executor,
        additional_config={"placement": {"name": "example", "wait_seconds": 600}},
        **args.engine,
    )
    for output in llm.generate(args.prompt, SamplingParams(max_tokens=8)):
        print(f"{output.prompt} -> {output.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts processes, which import this file
    main()
