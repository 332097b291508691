"""Serve a model over HTTP from the exact GPUs that were placed for it: the last step of docs/tutorial.md.

On a running cluster, where the deployment is placed already::

    python examples/serve_locally.py chat --port 8000
    curl -s http://127.0.0.1:8000/generate -d 'hello'

The model is a toy that turns words around, so that it needs no GPU and no download. Put your engine in its place.
"""

import argparse
import contextlib
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import ray

from placement import Client


@ray.remote
class Engine:
    """One rank of a replica. A real engine loads its part of the model here."""

    def generate(self, prompt: str) -> dict[str, Any]:
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return {"text": " ".join(reversed(prompt.split())), "gpu": int(gpus[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of a deployment that is placed")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    ray.init(address="auto", log_to_driver=False)
    result = Client().get(args.name)
    ranks = range(len(result.assignments[0].gpus))
    engines = [Engine.options(**result.actor_options(0, rank)).remote() for rank in ranks]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
            answers = ray.get([engine.generate.remote(prompt) for engine in engines])
            told = {"text": answers[0]["text"], "gpus": [answer["gpu"] for answer in answers]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode() + b"\n")

    server = HTTPServer(("127.0.0.1", args.port), Handler)
    print(f"{args.name} answers on http://127.0.0.1:{args.port}/generate", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
