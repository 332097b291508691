"""What the service would tell of a cluster of recorded machines, as large as one likes, for the page.

``python -m tests.dashboard.recorded 400`` serves it, for a look.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from aiohttp import web

from placement import Deployment, topologies
from placement.core.explanation import Explanation, Stage
from placement.core.lifecycle import State
from placement.core.needs import Within
from placement.core.shape import shape_of
from placement.dashboard import server
from placement.errors import UnknownDeployment, UnknownNode
from placement.runtime.discovery import DeadNode, NodeInfo
from placement.runtime.feed import Feed
from placement.runtime.orders import hardware_of
from placement.runtime.results import NodeAssignment
from placement.runtime.status import Observed, cluster_status
from placement.runtime.topology_report import topology_report
from placement.wire.facts import NodeFacts
from placement.wire.machine import Machine
from tests.runtime.test_status import Known

MACHINES = ("dgx-h100", "dgx-1v", "a100-pcie-4x", "a100-mig-4x", "l40s-4x")
MODELS = (
    "meta-llama/Llama-3.1-70B-Instruct",
    "Qwen/Qwen2.5-32B",
    "openai/whisper-large-v3",
    "mistralai/Mistral-7B",
)
NO_ROOM = "no node has 8 GPUs free within 'nvlink': 1 has 6, the others fewer; release something, or wait"
_NO_GROUP: Any = SimpleNamespace(id=SimpleNamespace(hex=lambda: "00"))


class Recorded:
    """A cluster of which the service tells something else after each change. A source of the page.

    Args:
        nodes: how many; each fifth is another machine of the catalogue, and a few nodes are egress nodes.

    Attributes:
        deployments: what stands, by name; may be changed.
        reads: how often it was asked.
        fails: is raised instead of an answer, where it is set.
    """

    cluster = "10.0.0.1:6379"

    def __init__(self, nodes: int) -> None:
        self.reads = 0
        self.fails: Exception | None = None
        self.feed = Feed()
        self.facts: dict[str, NodeFacts] = {}
        self.nodes = [self._node(number) for number in range(nodes)]
        self.foreign = {self.nodes[0].id: frozenset({4})}
        self.deployments: dict[str, Known] = {}
        for number, info in enumerate(self.nodes):
            self._occupy(number, info)
        waits = Deployment(name="llama-405b", model="meta-llama/Llama-3.1-405B", gpus=8, within=Within.NVLINK)
        self.deployments["llama-405b"] = Known(waits, states={0: State.PENDING}, reasons={0: NO_ROOM})
        self.feed.add("llama-405b", 0, "pending", NO_ROOM)
        self.feed.add("mixtral", None, "refused", f"cannot place 'mixtral': {NO_ROOM}")

    def _node(self, number: int) -> NodeInfo:
        if number % 20 == 3:
            return NodeInfo(
                f"id-{number}",
                f"egress-{number:03}",
                f"10.1.0.{number % 250}",
                0,
                egress={"egress_openai": 32},
            )
        machine = MACHINES[number * 7 % 10 % len(MACHINES)] if number % 2 else "dgx-h100"
        facts = topologies.facts(machine)
        info = NodeInfo(
            f"id-{number}", f"gpu-{number:03}", f"10.0.{number // 250}.{number % 250}", len(facts.gpus)
        )
        self.facts[info.id] = facts
        return info

    def _occupy(self, number: int, info: NodeInfo) -> None:
        """Places something: whole islands, pairs, shares, an instance, requests; and leaves some free."""
        if info.egress:
            self._place(
                "gpt-4o", "gpt-4o", info, [], egress_resource="egress_openai", egress_units=8 + number % 3 * 8
            )
            return
        instances = self.facts[info.id].slots
        if instances:
            self._place("embed", "BAAI/bge-m3", info, [min(instances)], mig=instances[min(instances)])
            return
        size, at = (1, 2, 4, 8)[number % 4], 0
        used = info.gpu_count if number % 5 else info.gpu_count // 2
        while at + size <= used:
            name = f"{MODELS[number % 4].split('/')[1].lower()}-{number % 40 // 4}"
            self._place(name, MODELS[number % 4], info, list(range(at, at + size)))
            at += size
        if used < info.gpu_count:
            self._place("reranker", "BAAI/bge-reranker-v2-m3", info, [info.gpu_count - 1], share=0.25)

    def _place(
        self, name: str, model: str, info: NodeInfo, gpus: list[int], share: float = 1.0, **more: Any
    ) -> None:
        one = self.deployments.get(name)
        if one is None:
            one = Known(Deployment(name=name, model=model), declared_at=time.time() - 4000)
            self.deployments[name] = one
        index = len(one.held)
        if len(gpus) > 1:
            shape = self.facts[info.id].topology()
            predicted = shape_of(shape).predicted
            more |= {
                "bandwidth_gb_per_s": predicted.mb_per_s(tuple(gpus)) / 1000,
                "weakest_link": str(shape.link(*gpus[:2])),
            }
        one.held.append(NodeAssignment(index, info.id, gpus, _NO_GROUP, [0], info.name, share, **more))
        one.states[index] = State.PLACED
        one.deployment = one.deployment.model_copy(update={"replicas": index + 1})
        self.feed.add(name, index, "placed", f"on {info.name}" + f" GPUs {gpus}" * bool(gpus))

    def move(self) -> None:
        """Something happens: a replica goes, and comes again."""
        one = next(one for one in self.deployments.values() if len(one.held) > 1)
        gone = one.held.pop()
        info = next(info for info in self.nodes if info.id == gone.node)
        self.feed.add(one.deployment.name, gone.replica_index, "released")
        self._place(one.deployment.name, "", info, list(gone.gpus), gone.share)

    async def read(self, since: int) -> Mapping[str, Any]:
        self.reads += 1
        if self.fails is not None:
            raise self.fails
        queue = [name for name, one in self.deployments.items() if one.reasons]
        dead = (
            [DeadNode(NodeInfo("id-dead", "gpu-dead", "10.9.9.9", 4), time.time() - 30)]
            if len(self.nodes) > 3
            else []
        )
        seen = Observed(
            self.nodes, self.deployments, lambda info: hardware_of(self.facts.get(info.id), info.gpu_count), self.facts,
            foreign=self.foreign, queue=queue, dead=dead,
        )  # fmt: skip
        return {"status": cluster_status(seen), "events": [one.to_dict() for one in self.feed.since(since)]}

    async def machines(self) -> Mapping[str, Any]:
        keys: dict[Machine, str] = {}
        of = {
            node: keys.setdefault(Machine.make(facts.topology()), f"m{len(keys)}")
            for node, facts in self.facts.items()
        }
        return {"machines": {key: one.model_dump(mode="json") for one, key in keys.items()}, "machine_of": of}

    async def node(self, node: str) -> Mapping[str, Any]:
        for info in self.nodes:
            if info.id == node and info.gpu_count:
                return topology_report(info, self.facts[node])
        raise UnknownNode("--node", node, ())

    async def why(self, deployment: str) -> Mapping[str, Any]:
        if deployment not in self.deployments:
            raise UnknownDeployment(deployment, tuple(self.deployments))
        stages = (
            Stage("GPU nodes", 300, {"has no GPUs": 100}),
            Stage("within", 0, {"has no 8 free GPUs within 'nvlink'": 300}),
        )
        explanation = Explanation(400, stages, "gpu-003 has 6 free GPUs", "add a node that has them")
        return {"refusal": NO_ROOM, "explanation": explanation.to_dict()}


async def serve(nodes: int, port: int) -> None:
    """Serves it until interrupted; something happens each second."""
    source = Recorded(nodes)
    board = server.Board(source)
    await board.refresh()
    runner = web.AppRunner(server.application(board, source, server.Guard("127.0.0.1", None)))
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", port))
    await web.SockSite(runner, listener).start()
    print(server.url_of("127.0.0.1", listener.getsockname()[1], None), flush=True)
    while True:
        await asyncio.sleep(1)
        source.move()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
