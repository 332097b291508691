"""The service as commands see it: its methods, of which each answers what a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from click.testing import CliRunner, Result

from placement import errors
from placement.cli import common
from placement.cli.main import main

ASKER = {"user": "me"}


@dataclass(frozen=True)
class Answer:
    """What has a ``to_dict``, as results and plans do."""

    deployment: str
    told: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"deployment": self.deployment, **self.told}


class FakeService:
    """Answers with a value, the next of several, or what a function makes of the arguments; an error is raised.

    Attributes:
        calls: (method, positional arguments, named ones), in order.
    """

    def __init__(self, **answers: Any) -> None:
        self.answers = {"status": report(), "members": lambda name: [name]} | answers
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, method: str) -> Any:
        return Method(self, method)

    def asked(self, method: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for name, args, options in self.calls if name == method]


@dataclass(frozen=True)
class Method:
    service: FakeService
    name: str

    def remote(self, *args: Any, **options: Any) -> Any:
        self.service.calls.append((self.name, args, options))
        answer = self.service.answers[self.name]
        if isinstance(answer, Iterator):
            answer = next(answer)
        return answer(*args, **options) if callable(answer) else answer


def use(monkeypatch: pytest.MonkeyPatch, service: FakeService) -> None:
    """Has commands find this service."""

    @contextmanager
    def connected(address: str | None) -> Iterator[FakeService]:
        yield service

    def ask(answer: Any, tell: Callable[[], None] | None = None) -> Any:
        if tell is not None:
            tell()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(common, "service", connected)
    monkeypatch.setattr(common, "asker", lambda: ASKER)
    monkeypatch.setattr(common, "ask", ask)


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, list(args), input=stdin)


def assignment(**fields: Any) -> dict[str, Any]:
    empty = {
        "replica_index": 0, "node": "id-a", "node_name": "a", "gpus": [0], "bundle_indices": [0], "ray_gpus": [],
        "weakest_link": None, "bandwidth_gb_per_s": None, "ray_bandwidth_gb_per_s": None, "egress_resource": None,
        "egress_units": 0, "share": 1.0, "mig": "", "ranks": [0],
    }  # fmt: skip
    return empty | fields


def result(name: str, *replicas: int, pending: Mapping[int, str] | None = None) -> Answer:
    """What ``get`` and ``apply`` answer of a deployment with these replicas."""
    told = {str(index): reason for index, reason in (pending or {}).items()}
    return Answer(name, {"assignments": [assignment(replica_index=i) for i in replicas], "pending": told})


def described(
    name: str, *replicas: int, pending: Mapping[int, str] | None = None, **fields: Any
) -> dict[str, Any]:
    """What ``describe`` answers of it."""
    state = "pending" if pending else "placed"
    found = result(name, *replicas, pending=pending).to_dict()
    return {"deployment": {"name": name}, "result": found, "state": state, "owner": None, **fields}


def plan(name: str, *replicas: int, pending: Mapping[int, str] | None = None, **fields: Any) -> Answer:
    """What ``plan_all`` answers."""
    told = result(name, *replicas, pending=pending).told
    standing = fields.get("change") == "unchanged" and not pending
    return Answer(
        name, {**told, "standing": standing, "runtime": "vllm", "runtime_from": "declared", **fields}
    )


def standing(name: str, *replicas: int, **fields: Any) -> dict[str, Any]:
    """A deployment of a status report."""
    assignments = [assignment(replica_index=i) for i in replicas]
    empty = {
        "name": name, "model": "m", "runtime": "vllm", "runtime_from": "declared", "replicas": len(replicas),
        "state": "placed", "pending": {}, "assignments": assignments, "owner": "detached", "queue_position": None,
        "age_seconds": 60.0, "generation": 1, "outdated": [],
    }  # fmt: skip
    return empty | fields


def report(*deployments: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    return {"nodes": list(nodes), "deployments": list(deployments), "unreadable": []}


def no_room(name: str) -> errors.Unplaceable:
    return errors.Unplaceable(name, "none is free", {}, "wait")
